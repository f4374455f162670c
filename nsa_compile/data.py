"""Text to token shards, packing, sampling order: files as bytes, one long row of tokens, batches by (seed, step)."""

import hashlib
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

SEPARATOR = 0
"""Byte between two documents; text has no such byte."""
SKIPPED_FOLDERS = frozenset({"__pycache__", "site-packages", "dist-packages", "node_modules", "test", "tests"})


class Corpus(NamedTuple):
    """Text as bytes, uint8 [n]: the files to train on and those held out, with a zero byte between two files."""

    train: Tensor
    validation: Tensor
    n_files: int
    source: str

    def digest(self) -> str:
        """A name for exactly these bytes."""
        hashes = [hashlib.sha256(part.numpy().data).hexdigest()[:16] for part in (self.train, self.validation)]
        return "-".join(hashes)


def find_text(paths: Sequence[str | Path] = ()) -> list[tuple[str, Path]]:
    """Files to read as (name relative to the path given, file), sorted by name.

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
        raise ValueError(
            f"text: expected text files, got none in {', '.join(map(str, paths)) or 'the standard library'}"
        )
    return sorted((name, file) for file, name in found.items())


def _files_below(folder: Path, pattern: str) -> Iterator[Path]:
    for file in folder.rglob(pattern):
        folders = file.relative_to(folder).parts[:-1]
        hidden = any(part.startswith(".") for part in (*folders, file.name))
        if not hidden and not SKIPPED_FOLDERS.intersection(folders) and file.is_file():
            yield file


def load_text(paths: Sequence[str | Path] = (), *, held_out: float = 0.05) -> Corpus:
    """Read text files as bytes and hold whole files out for validation, chosen by a hash of their names.

    Files that are no UTF-8 text, or empty, are left out of a folder. About `held_out` of the files are held out, but
    at least one and never all; of a single file it is the end.

    Raises: ValueError for a missing path or one without text.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out: expected a share between 0 and 1, got {held_out}")
    texts = {name: text for name, file in find_text(paths) if (text := _read_text(file))}
    source = _source(paths)
    if not texts:
        raise ValueError(f"text: expected UTF-8 text, got none in {source}")
    if len(texts) == 1:
        (text,) = texts.values()
        cut = max(1, round(len(text) * (1 - held_out)))
        return Corpus(_tokens([text[:cut]]), _tokens([text[cut:]]), 1, source)
    by_hash = sorted(texts, key=_share)
    n_held = min(max(1, sum(_share(name) < held_out for name in by_hash)), len(by_hash) - 1)
    held = set(by_hash[:n_held])
    parts = [[text for name, text in texts.items() if (name in held) == wanted] for wanted in (False, True)]
    return Corpus(_tokens(parts[0]), _tokens(parts[1]), len(texts), source)


def _source(paths: Sequence[str | Path]) -> str:
    return ", ".join(map(str, paths)) or "the Python standard library"


def _share(name: str) -> float:
    """A number in [0, 1) that the name decides."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48


def _read_text(file: Path) -> bytes | None:
    """The file's bytes, None unless they are UTF-8 text."""
    text = file.read_bytes()
    try:
        text.decode()
    except UnicodeDecodeError:
        return None
    return None if SEPARATOR in text else text


def _tokens(texts: Sequence[bytes]) -> Tensor:
    joined = bytearray(bytes([SEPARATOR]).join(texts))
    return torch.frombuffer(joined, dtype=torch.uint8) if joined else torch.empty(0, dtype=torch.uint8)


def check_text(tokens: Tensor, seq_len: int, name: str) -> None:
    """Raise ValueError for a text of less than seq_len + 1 tokens."""
    if tokens.numel() < seq_len + 1:
        raise ValueError(
            f"text: expected at least seq_len + 1 = {seq_len + 1} bytes for {name}, got {tokens.numel()}: "
            "give more text or a shorter seq_len"
        )


def training_batch(tokens: Tensor, step: int, *, seed: int, batch_size: int, seq_len: int) -> Tensor:
    """The batch of one step, windows at random places: int64 [batch_size, seq_len], a function of (seed, step) only."""
    number = int.from_bytes(hashlib.sha256(f"{seed} {step}".encode()).digest()[:7], "big")
    generator = torch.Generator().manual_seed(number)
    starts = torch.randint(0, tokens.numel() - seq_len + 1, (batch_size,), generator=generator)
    return _windows(tokens, starts, seq_len)


def validation_batches(tokens: Tensor, n_batches: int, *, batch_size: int, seq_len: int) -> Iterator[Tensor]:
    """Batches of evenly spaced windows, always the same ones: n_batches times int64 [batch_size, seq_len]."""
    last, n = tokens.numel() - seq_len, n_batches * batch_size
    starts = torch.arange(n) * last // max(1, n - 1)
    for chunk in starts.split(batch_size):
        yield _windows(tokens, chunk, seq_len)


def _windows(tokens: Tensor, starts: Tensor, seq_len: int) -> Tensor:
    return tokens[starts[:, None] + torch.arange(seq_len)].long()


def unigram_entropy(tokens: Tensor) -> float:
    """Entropy of the distribution of single bytes, in nats per byte: the loss of the best model without context."""
    share = torch.bincount(tokens.long(), minlength=256).double() / max(1, tokens.numel())
    return float(-torch.special.xlogy(share, share).sum())
