"""Where text comes from: files found, cut into units of work, and read document by document."""

import gzip
import hashlib
import json
import os
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nsa_compile.data.tokenizer import SEPARATOR
from nsa_compile.storage import naming

SKIPPED_FOLDERS = frozenset({"__pycache__", "site-packages", "dist-packages", "node_modules", "test", "tests"})
UNIT_BYTES = 2**23
"""Bytes of sources that a process reads at once, about: no more than a document need be in memory."""


class Source(NamedTuple):
    """A file, and its name relative to the path given."""

    name: str
    path: Path

    def kind(self) -> str:
        """How it is read: "jsonl", "jsonl.gz", "parquet", or as one document, "text"."""
        name = self.path.name.lower()
        return next((kind for kind in ("jsonl", "jsonl.gz", "parquet") if name.endswith(f".{kind}")), "text")


class Unit(NamedTuple):
    """Sources of one kind that are read in one go: whole files, or a part of one."""

    kind: str
    sources: tuple[Source, ...]
    n_bytes: int
    """Size in bytes, to show progress."""
    start: int = 0
    stop: int = 0
    """Bytes that the lines of a JSON Lines file start in, or row groups of a Parquet file."""


class Document(NamedTuple):
    """A document: UTF-8 text, or None for one to leave out, and a number in [0, 1) that decides who sees it."""

    path: Path
    text: bytes | None
    share: float


def find_text(paths: Sequence[str | Path] = ()) -> list[Source]:
    """Files to read, sorted by name.

    A folder stands for all files in it except hidden ones and those of folders with caches, installed packages or
    tests; without paths it is the Python standard library's sources on this machine.

    Raises: ValueError for a path that does not exist, or where there are no files.
    """
    standard_library = not paths
    found: dict[Path, str] = {}
    for path in [Path(sysconfig.get_path("stdlib"))] if standard_library else [Path(p) for p in paths]:
        if path.is_file():
            found[path.resolve()] = path.name
        elif path.is_dir():
            for file in _files_below(path, "*.py" if standard_library else "*"):
                found.setdefault(file.resolve(), file.relative_to(path).as_posix())
        else:
            raise ValueError(f"text: expected files or folders, got {path}, which does not exist")
    if not found:
        raise ValueError(f"text: expected text files, got none in {say_paths(paths)}")
    return sorted(Source(name, file) for file, name in found.items())


def cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def say_paths(paths: Sequence[str | Path]) -> str:
    """The paths in words."""
    return ", ".join(map(str, paths)) or "the Python standard library"


def plan_units(sources: Sequence[Source], *, unit_bytes: int = UNIT_BYTES) -> list[Unit]:
    """Cut sources into units of about `unit_bytes`; read one after the other they give the documents in order."""
    units: list[Unit] = []
    texts: list[Source] = []
    size = 0
    for source in sources:
        kind, n_bytes = source.kind(), source.path.stat().st_size
        if texts and (kind != "text" or size + n_bytes > unit_bytes):
            units.append(Unit("text", tuple(texts), size))
            texts, size = [], 0
        if kind == "text":
            texts.append(source)
            size += n_bytes
        elif kind == "jsonl":
            for start in range(0, n_bytes, unit_bytes):
                stop = min(start + unit_bytes, n_bytes)
                units.append(Unit(kind, (source,), stop - start, start, stop))
        elif kind == "jsonl.gz":
            units.append(Unit(kind, (source,), n_bytes))
        else:
            units.extend(_parquet_units(source, n_bytes, unit_bytes))
    return [*units, Unit("text", tuple(texts), size)] if texts else units


def read_documents(unit: Unit, field: str) -> Iterator[Document]:
    """The documents of a unit.

    Of text files each is one, known by its name; of JSON Lines and Parquet each row's `field`, a dotted path such as
    "meta.text", known by its text. Left out are documents that are empty or null, that have a zero byte, or that are
    no UTF-8 text.

    Raises: ValueError naming file and line or row where there is no such field, or where JSON or Parquet is broken;
        OSError for a file that cannot be read.
    """
    if unit.kind == "text":
        for source in unit.sources:
            with naming(source.path):
                text = source.path.read_bytes()
            yield Document(source.path, _checked(text), _share(source.name.encode()))
        return
    (source,) = unit.sources
    for value in _parquet_rows(source, unit, field) if unit.kind == "parquet" else _json_rows(source, unit, field):
        row = _checked(value.encode("utf-8", "surrogatepass"))
        yield Document(source.path, row, _share(row or b""))


def _checked(text: bytes) -> bytes | None:
    """The text, None unless it is UTF-8 without zero bytes, and not empty."""
    try:
        text.decode()
    except UnicodeDecodeError:
        return None
    return None if SEPARATOR in text or not text else text


def _share(name: bytes) -> float:
    """A number in [0, 1) that the name decides."""
    return int.from_bytes(hashlib.sha256(name).digest()[:6], "big") / 2**48


def _files_below(folder: Path, pattern: str) -> Iterator[Path]:
    for file in folder.rglob(pattern):
        folders = file.relative_to(folder).parts[:-1]
        hidden = any(part.startswith(".") for part in (*folders, file.name))
        if not hidden and not SKIPPED_FOLDERS.intersection(folders) and file.is_file():
            yield file


def _json_rows(source: Source, unit: Unit, field: str) -> Iterator[str]:
    for offset, line in _lines(source, unit):
        try:
            record = json.loads(line.decode("utf-8-sig" if offset == 0 else "utf-8"))
            value = _look_up(record, field)
        except (ValueError, RecursionError) as error:  # broken UTF-8 and JSON included
            number = _line_number(source, unit, offset)
            raise ValueError(f"{source.path}, line {number}: expected JSON with text in {field!r}, {error}") from error
        yield value


def _lines(source: Source, unit: Unit) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, with the place where each starts; of a part of a file, those that start in it."""
    with naming(source.path), gzip.open(source.path) if unit.kind == "jsonl.gz" else source.path.open("rb") as file:
        offset = 0
        if unit.start:  # a line begun before the part belongs to the part before
            file.seek(unit.start - 1)
            offset = unit.start - 1 + len(file.readline())
        try:
            while unit.kind == "jsonl.gz" or offset < unit.stop:
                line = file.readline()
                if not line:
                    break
                if line.strip():
                    yield offset, line
                offset += len(line)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"text: expected a whole gzip file, got {source.path}: {error}") from error


def _line_number(source: Source, unit: Unit, offset: int) -> int:
    with gzip.open(source.path) if unit.kind == "jsonl.gz" else source.path.open("rb") as file:
        number = 1
        while offset > 0 and (line := file.readline()):
            offset -= len(line)
            number += 1
    return number


def _look_up(record: Any, field: str) -> str:
    """The text in a record's field, "" for null. Raises ValueError where there is none."""
    names = [field] if isinstance(record, dict) and field in record else field.split(".")
    for name in names:
        if not isinstance(record, dict):
            raise ValueError(f"got {type(record).__name__} where {name!r} should be")
        if name not in record:
            raise ValueError(f"got no {name!r} among {', '.join(map(repr, record)) or 'no fields'}")
        record = record[name]
    if record is not None and not isinstance(record, str):
        raise ValueError(f"got {type(record).__name__}")
    return record or ""


def _open_parquet(source: Source) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            f"text: expected the package pyarrow to read {source.path}; pip install 'nsa-compile[train]'"
        ) from error
    try:
        return pyarrow.parquet.ParquetFile(source.path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"text: expected a Parquet file, got {source.path}: {error}") from error


def _parquet_units(source: Source, n_bytes: int, unit_bytes: int) -> Iterator[Unit]:
    with _open_parquet(source) as file:
        groups = file.metadata.num_row_groups
    step = max(1, unit_bytes * groups // max(1, n_bytes))
    for start in range(0, groups, step):
        stop = min(start + step, groups)
        yield Unit("parquet", (source,), n_bytes * stop // groups - n_bytes * start // groups, start, stop)


def _parquet_rows(source: Source, unit: Unit, field: str) -> Iterator[str]:
    import pyarrow

    with _open_parquet(source) as file:
        names = file.schema_arrow.names
        column = field if field in names else field.split(".")[0]
        if column not in names:
            raise ValueError(f"{source.path}: expected a column {field!r}, got {', '.join(map(repr, names))}")
        for group in range(unit.start, unit.stop):
            row = 0
            try:
                for batch in file.iter_batches(64, row_groups=[group], columns=[column]):
                    for record in batch.to_pylist():
                        yield _look_up(record, field)
                        row += 1
            except (ValueError, OSError, pyarrow.ArrowException) as error:
                raise ValueError(
                    f"{source.path}, row {row + 1} of row group {group}: expected text in {field!r}, {error}"
                ) from error
