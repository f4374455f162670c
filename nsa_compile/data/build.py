"""Text to token shards: processes turn units of sources into tokens, one process puts them into shards in order."""

import hashlib
import json
import math
import multiprocessing
import shutil
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from nsa_compile.data.shards import (
    FORMAT,
    MANIFEST,
    PARTS,
    TOKENIZER_FILE,
    Corpus,
    Shard,
    open_shards,
    read_manifest,
    token_type,
)
from nsa_compile.data.sources import (
    UNIT_BYTES,
    Source,
    Unit,
    cpus,
    find_text,
    plan_units,
    read_documents,
    say_paths,
)
from nsa_compile.data.tokenizer import FileTokenizer, Tokenizer, load_tokenizer
from nsa_compile.storage import check_folder, locked, naming

BYTES_PER_WORKER = 2**26
"""Bytes of sources that make another process worth its start, which takes seconds."""


class BuildProgress(NamedTuple):
    """How far a build has come."""

    n_bytes: int
    total_bytes: int
    n_documents: int
    n_tokens: int


class _Held(NamedTuple):
    """What is held out: documents of a share below `below`, or, of the only document, the last `end` of its bytes."""

    below: float
    end: float | None = None


class _Tokenized(NamedTuple):
    """A unit as tokens: the length of each document, per part; its tokens are in a file per part."""

    lengths: dict[str, np.ndarray]
    n_documents: int
    n_skipped: int
    files: set[Path]
    low: float
    """Lowest and highest share of its documents."""
    high: float


def build_shards(
    paths: Sequence[str | Path],
    out: str | Path,
    *,
    tokenizer: Tokenizer | str | Path | None = None,
    held_out: float = 0.05,
    field: str = "text",
    workers: int | None = None,
    shard_tokens: int = 2**28,
    rebuild: bool = False,
    on_progress: Callable[[BuildProgress], None] | None = None,
    unit_bytes: int = UNIT_BYTES,
    verify: bool | None = None,
) -> Corpus:
    """Turn text into token shards in a new folder `out`, or open it if it was built from the same before.

    The folder holds `train-NNNNN.bin` and `validation-NNNNN.bin` (token ids, little-endian, of 1, 2 or 4 bytes by the
    vocabulary), beside each the ends of its documents as int64 (`.ends`), `manifest.json` and, if there is one,
    `tokenizer.json`. Documents keep the order of the sources, and each is followed by the end-of-document token. The
    result is the same for any number of workers. It is written beside `out` and renamed when it is whole; one process
    at a time may build the same folder. Memory holds a few documents per worker.

    About `held_out` of the documents are held out for validation, chosen by a hash: of a file's name for text files,
    of the text for rows of JSON Lines and Parquet, so that equal rows stay together; at least one document and never
    all. Of a single document it is the end.

    Args:
        paths: text files, `.jsonl`, `.jsonl.gz` and `.parquet` files and folders of them; see `find_text`.
        tokenizer: None for bytes, a tokenizer, or the path of its file.
        field: where JSON Lines and Parquet have the text, as a dotted path.
        workers: processes that read and tokenize; None takes one per CPU, fewer for little text. With more than one,
            a script must guard its start by `if __name__ == "__main__"`.
        shard_tokens: a shard ends with the document in which it comes to that many tokens.
        rebuild: build anew whatever shards `out` holds.
        on_progress: called after each unit of about `unit_bytes` bytes.
        verify: as in `open_shards`: what was just written is read once and compared.

    Raises: ValueError for paths without text, broken files (see `read_documents`), or an `out` that holds shards of
        other sources or settings, or something else; OSError naming a file that cannot be read or written.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out: expected a share between 0 and 1, got {held_out}")
    for name, value in (("workers", 1 if workers is None else workers), ("shard_tokens", shard_tokens)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    out = Path(out)
    if tokenizer is None or isinstance(tokenizer, (str, Path)):
        tokenizer = load_tokenizer(tokenizer)
    sources = find_text(paths)
    settings = {
        "tokenizer": tokenizer.digest, "held_out": held_out, "field": field, "shard_tokens": shard_tokens,
        "sources": _fingerprint(sources),
    }  # fmt: skip
    if _is_same(out, settings, rebuild):
        return open_shards(out, verify=verify)
    lock = locked(out.parent / f".{out.name}.lock", f"out: expected a folder that no other process builds, got {out}")
    with lock:
        if not _is_same(out, settings, rebuild):  # another one may have ended meanwhile
            _build_folder(out, paths, sources, tokenizer, settings, workers, unit_bytes, on_progress)
        return open_shards(out, verify=verify)


def _build_folder(
    out: Path, paths: Sequence[str | Path], sources: Sequence[Source], tokenizer: Tokenizer, settings: dict[str, Any],
    workers: int | None, unit_bytes: int, on_progress: Callable[[BuildProgress], None] | None,
) -> None:  # fmt: skip
    held_out, field, shard_tokens = settings["held_out"], settings["field"], settings["shard_tokens"]
    units = plan_units(sources, unit_bytes=unit_bytes)
    if workers is None:
        workers = min(cpus(), 1 + sum(unit.n_bytes for unit in units) // BYTES_PER_WORKER)
    temporary = out.parent / f".{out.name}.part"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        header = {
            "format": FORMAT, "vocab_size": tokenizer.vocab_size, "end_token": tokenizer.end_token,
            "unit": tokenizer.unit, "source": say_paths(paths), "settings": settings,
        }  # fmt: skip
        if isinstance(tokenizer, FileTokenizer):
            header["end_name"] = tokenizer.end_name()
            _write(temporary / TOKENIZER_FILE, tokenizer.content)
        held: _Held | None = _Held(held_out)
        while held is not None:  # of few documents a hash may hold out none or all: then once more
            job = _Job(temporary, tokenizer, field, held)
            built = _build(units, job, min(workers, len(units)), shard_tokens, on_progress)
            held = _hold_otherwise(held_out, held, built, say_paths(paths))
        _write(temporary / MANIFEST, json.dumps(header | built.manifest(), indent=1).encode())
        if out.exists():
            shutil.rmtree(out)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class _Job(NamedTuple):
    """What the processes need to know."""

    folder: Path
    tokenizer: Tokenizer
    field: str
    held: _Held

    def part_file(self, index: int, part: str) -> Path:
        """Where the tokens of a unit lie until they come to a shard."""
        return self.folder / f"unit-{index}-{part}"

    def tokenize(self, index: int, unit: Unit) -> _Tokenized:
        """Write the tokens of a unit."""
        kind, end = token_type(self.tokenizer.vocab_size), self.tokenizer.end_token
        lengths: dict[str, list[int]] = {part: [] for part in PARTS}
        n_documents = n_skipped = 0
        files, low, high = set(), math.inf, -math.inf
        with ExitStack() as stack:
            outputs: dict[str, BinaryIO] = {}
            for part in PARTS:
                stack.enter_context(naming(self.part_file(index, part)))  # closing writes, too
                outputs[part] = stack.enter_context(self.part_file(index, part).open("wb"))
            for path, text, share in read_documents(unit, self.field):
                if text is None:
                    n_skipped += 1
                    continue
                n_documents += 1
                files.add(path)
                low, high = min(low, share), max(high, share)
                for part, piece in self._split(text, share):
                    tokens = self.tokenizer.encode(piece)
                    with naming(self.part_file(index, part)):
                        outputs[part].write(np.append(tokens, np.asarray(end, tokens.dtype)).astype(kind).data)
                    lengths[part].append(len(tokens) + 1)
        arrays = {part: np.array(lengths[part], np.int64) for part in PARTS}
        return _Tokenized(arrays, n_documents, n_skipped, files, low, high)

    def _split(self, text: bytes, share: float) -> Iterator[tuple[str, bytes]]:
        """The document and its part; in two pieces, with whole characters, where its end is held out."""
        if self.held.end is None:
            yield PARTS[share < self.held.below], text
            return
        cut = max(1, round(len(text) * (1 - self.held.end)))
        while cut < len(text) and text[cut] & 0xC0 == 0x80:
            cut += 1
        yield PARTS[0], text[:cut]
        if cut < len(text):
            yield PARTS[1], text[cut:]


class _Writer:
    """Puts the tokens of units into the shards of a part."""

    def __init__(self, folder: Path, part: str, kind: np.dtype, shard_tokens: int) -> None:
        self.folder, self.part, self.kind, self.shard_tokens = folder, part, kind, shard_tokens
        self.shards: list[Shard] = []
        self.lengths: list[np.ndarray] = []
        self.n_tokens = 0
        self.file: BinaryIO | None = None

    def append(self, path: Path, lengths: np.ndarray) -> None:
        """Move the tokens of a unit's documents to the end, into the next shard where one is full; removes the file."""
        with naming(path), path.open("rb") as tokens:
            while len(lengths):
                ends = np.cumsum(lengths)
                n = min(len(lengths), int(np.searchsorted(ends, self.shard_tokens - self.n_tokens)) + 1)
                self._copy(tokens, int(ends[n - 1]) * self.kind.itemsize)
                self.lengths.append(lengths[:n])
                self.n_tokens += int(ends[n - 1])
                lengths = lengths[n:]
                if self.n_tokens >= self.shard_tokens:
                    self.close()
        path.unlink()

    def _copy(self, tokens: BinaryIO, size: int) -> None:
        with naming(self._path()):
            if self.file is None:
                self.file, self.hash = self._path().open("wb"), hashlib.sha256()
            while size:
                block = tokens.read(min(size, 2**22))
                if not block:
                    raise ValueError(f"data: expected {size} bytes more in {tokens.name}, got none")
                self.hash.update(block)
                self.file.write(block)
                size -= len(block)

    def _name(self) -> str:
        return f"{self.part}-{len(self.shards):05d}"

    def _path(self) -> Path:
        return self.folder / f"{self._name()}.bin"

    def close(self) -> None:
        """End the shard at hand, if there is one."""
        if self.file is None:
            return
        self.abort()
        ends = np.cumsum(np.concatenate(self.lengths)).astype("<i8").tobytes()
        _write(self.folder / f"{self._name()}.ends", ends)
        self.hash.update(ends)
        self.shards.append(Shard(self._name(), self.n_tokens, len(ends) // 8, self.hash.hexdigest()))
        self.lengths, self.n_tokens, self.file = [], 0, None

    def abort(self) -> None:
        """Give the file at hand back, whatever it holds."""
        if self.file is not None:
            with naming(self._path()):
                self.file.close()


class _Built(NamedTuple):
    """What a pass over the units wrote."""

    shards: dict[str, list[Shard]]
    n_documents: int
    n_skipped: int
    n_files: int
    low: float
    high: float

    def manifest(self) -> dict[str, Any]:
        """What the manifest says of it."""
        parts = {part: [shard._asdict() for shard in shards] for part, shards in self.shards.items()}
        return {"n_files": self.n_files, "n_skipped": self.n_skipped, **parts}


def _build(
    units: Sequence[Unit], job: _Job, workers: int, shard_tokens: int,
    on_progress: Callable[[BuildProgress], None] | None,
) -> _Built:  # fmt: skip
    kind = token_type(job.tokenizer.vocab_size)
    writers = {part: _Writer(job.folder, part, kind, shard_tokens) for part in PARTS}
    n_documents = n_skipped = n_tokens = n_bytes = 0
    files: set[Path] = set()
    low, high, total = math.inf, -math.inf, sum(unit.n_bytes for unit in units)
    try:
        with closing(_tokenize_in_order(units, job, workers)) as stream:
            for index, done in enumerate(stream):
                for part, writer in writers.items():
                    writer.append(job.part_file(index, part), done.lengths[part])
                    n_tokens += int(done.lengths[part].sum())
                n_documents, n_skipped = n_documents + done.n_documents, n_skipped + done.n_skipped
                low, high = min(low, done.low), max(high, done.high)
                files |= done.files
                n_bytes += units[index].n_bytes
                if on_progress is not None:
                    on_progress(BuildProgress(n_bytes, total, n_documents, n_tokens))
        for writer in writers.values():
            writer.close()
    finally:
        for writer in writers.values():
            writer.abort()
    shards = {part: writer.shards for part, writer in writers.items()}
    return _Built(shards, n_documents, n_skipped, len(files), low, high)


def _hold_otherwise(held_out: float, held: _Held, built: _Built, source: str) -> _Held | None:
    """What to hold out instead, where the hash left a part without documents; None if all is well."""
    if built.n_documents == 0:
        raise ValueError(f"text: expected UTF-8 text, got none in {source}")
    if held.end is not None or all(built.shards.values()):
        return None
    if built.n_documents == 1:
        return _Held(0.0, held_out)
    if built.low == built.high:
        raise ValueError(f"text: expected documents that differ, to hold some out, got equal ones in {source}")
    return _Held(math.nextafter(built.low, 1.0) if not built.shards["validation"] else built.high)


def _tokenize_in_order(units: Sequence[Unit], job: _Job, workers: int) -> Generator[_Tokenized, None, None]:
    """The units one after the other, while processes work ahead by a few."""
    if workers <= 1:
        for index, unit in enumerate(units):
            yield job.tokenize(index, unit)
        return
    pool = ProcessPoolExecutor(workers, _processes(), initializer=_leave_sigint_to_the_parent)
    try:
        ahead: deque[Future[_Tokenized]] = deque()
        for index, unit in enumerate(units):
            ahead.append(pool.submit(job.tokenize, index, unit))
            if len(ahead) > 2 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _processes() -> Any:
    """How processes start: no copies of this one, whose threads may hold locks; torch is loaded once if it can be."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", __name__])
    return context


def _leave_sigint_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _is_same(out: Path, settings: dict[str, Any], rebuild: bool) -> bool:
    """Whether shards in `out` are those of the settings; False to build them. Raises ValueError if they may not be."""
    check_folder("out", out)
    if not out.exists() or not any(out.iterdir()):
        return False
    if not (out / MANIFEST).is_file():
        raise ValueError(f"out: expected a new folder or one of token shards, got {out}, which holds something else")
    if rebuild:
        return False
    before = read_manifest(out)["settings"]
    for name, value in settings.items():
        if before.get(name) != value:
            got = f"{name} = {before.get(name)!r}, not {value!r}" if name not in ("sources", "tokenizer") else name
            raise ValueError(f"out: expected token shards of the same text and settings in {out}, got ones of other "
                             f"{got}; rebuild them, or take another folder")  # fmt: skip
    return True


def _fingerprint(sources: Sequence[Source]) -> str:
    """A name for the sources as they are: names, sizes and times of last change."""
    stats = [(source.name, (stat := source.path.stat()).st_size, stat.st_mtime_ns) for source in sources]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()


def _write(path: Path, content: bytes) -> None:
    with naming(path):
        path.write_bytes(content)
