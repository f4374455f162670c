"""Token shards on disk: documents as token ids in memory-mapped files, and the manifest that says what they are."""

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nsa_compile.data.sources import cpus
from nsa_compile.data.tokenizer import Tokenizer, load_tokenizer
from nsa_compile.storage import naming

FORMAT = 1
MANIFEST, TOKENIZER_FILE, CHECKED_FILE = "manifest.json", "tokenizer.json", ".checked.json"
PARTS = ("train", "validation")
FACTS = ("vocab_size", "end_token", "unit", "source", "n_files", "n_skipped")
"""What the manifest says of both parts."""
MUCH = 2**32
"""Bytes of shards whose reading takes long enough to say so."""


class Shard(NamedTuple):
    """A pair of files: `NAME.bin` with token ids, `NAME.ends` with the end of each document, int64 [documents]."""

    name: str
    tokens: int
    documents: int
    sha256: str = ""
    """Of both files, one after the other; empty in a manifest without checksums."""

    def files(self, folder: Path) -> tuple[Path, Path]:
        """The files of token ids and of ends."""
        return folder / f"{self.name}.bin", folder / f"{self.name}.ends"

    def state(self, folder: Path) -> list[Any]:
        """What is another once a file was written to or copied: sizes, times and numbers; and the checksum."""
        stats = [path.stat() for path in self.files(folder)]
        return [self.sha256, *(x for s in stats for x in (s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino))]

    def sum(self, folder: Path) -> str:
        """The checksum of the files as they are."""
        total = hashlib.sha256()
        for path in self.files(folder):
            with naming(path), path.open("rb") as file:
                while block := file.read(2**22):
                    total.update(block)
        return total.hexdigest()


def token_type(vocab_size: int) -> np.dtype:
    """The smallest unsigned type, little-endian, of token ids below `vocab_size`."""
    return np.dtype("<u1" if vocab_size <= 2**8 else "<u2" if vocab_size <= 2**16 else "<u4")


class TokenShards:
    """The documents of a part, one after the other as one long row of tokens that stays on disk; picklable.

    Each document ends with the end-of-document token. `starts` int64 [n_documents + 1] is where each starts, and
    the end of the last.

    Raises: ValueError naming the file that is missing, or whose size or ends are not those of the manifest.
    """

    def __init__(self, folder: str | Path, shards: Sequence[Shard], *, vocab_size: int) -> None:
        self.folder, self.shards, self.vocab_size = Path(folder), tuple(shards), vocab_size
        self.type = token_type(vocab_size)
        self._bounds = np.cumsum([0, *(shard.tokens for shard in self.shards)], dtype=np.int64)
        self._maps: dict[int, np.ndarray] = {}
        self.starts = np.zeros(1 + sum(shard.documents for shard in self.shards), np.int64)
        done = 1
        for shard, base in zip(self.shards, self._bounds.tolist(), strict=False):
            tokens, ends = shard.files(self.folder)
            _check_size(tokens, shard.tokens * self.type.itemsize)
            _check_size(ends, shard.documents * 8)
            here = self.starts[done : done + shard.documents]
            here[:] = np.fromfile(ends, "<i8")
            if shard.documents and not (here[0] > 0 and (here[1:] > here[:-1]).all() and here[-1] == shard.tokens):
                raise ValueError(
                    f"data: expected {ends} with ends that rise to {shard.tokens}, got others; build it anew"
                )
            here += base
            done += shard.documents

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}}  # a memory map would be pickled with all it holds

    @property
    def n_tokens(self) -> int:
        """Tokens, ends of documents counted."""
        return int(self._bounds[-1])

    @property
    def n_documents(self) -> int:
        """Documents."""
        return len(self.starts) - 1

    def read(self, start: int, stop: int) -> Tensor:
        """Tokens start … stop - 1 of the long row, int64 [stop - start]. Raises IndexError beyond its ends."""
        if not 0 <= start <= stop <= self.n_tokens:
            raise IndexError(f"tokens: expected 0 <= start <= stop <= {self.n_tokens}, got {start} and {stop}")
        out = np.empty(stop - start, np.int64)
        shard, done = int(np.searchsorted(self._bounds, start, side="right")) - 1, 0
        while done < len(out):
            first = start + done - int(self._bounds[shard])
            n = min(self.shards[shard].tokens - first, len(out) - done)
            here = self._map(shard)[first : first + n]
            if n and int(here.max()) >= self.vocab_size:
                path = self.shards[shard].files(self.folder)[0]
                raise ValueError(
                    f"data: expected tokens below {self.vocab_size} in {path}, got {int(here.max())}: is it another "
                    "tokenizer's?"
                )
            out[done : done + n] = here
            shard, done = shard + 1, done + n
        return torch.from_numpy(out)

    def document(self, index: int) -> Tensor:
        """The tokens of a document, its end-of-document token included, int64 [n]."""
        return self.read(int(self.starts[index]), int(self.starts[index + 1]))

    def verify(self) -> None:
        """Read everything and raise ValueError naming the files whose checksum is not that of the manifest."""
        check_sums(self.folder, self.shards, again=True)

    def digest(self) -> str:
        """A name for exactly these documents, as they are stored."""
        return hashlib.sha256(" ".join([self.type.str, *(shard.sha256 for shard in self.shards)]).encode()).hexdigest()

    def _map(self, index: int) -> np.ndarray:
        path, _ = self.shards[index].files(self.folder)
        # every time: to read a map of what is not there any more would end the process
        _check_size(path, self.shards[index].tokens * self.type.itemsize)
        if index not in self._maps:
            self._maps[index] = np.memmap(path, self.type, mode="r")
        return self._maps[index]


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """What `build_shards` left in a folder: documents to train on and those held out."""

    folder: Path
    train: TokenShards
    validation: TokenShards
    vocab_size: int
    end_token: int
    """The token after each document."""
    unit: str
    """What a token is: "byte" or "token"."""
    source: str
    n_files: int
    n_skipped: int
    """Documents left out: empty, with a zero byte, or no UTF-8 text."""

    def digest(self) -> str:
        """A name for exactly these documents, as they are stored."""
        return "-".join(part.digest()[:16] for part in (self.train, self.validation))

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made them."""
        if self.unit == "byte":
            return load_tokenizer(None)
        manifest = read_manifest(self.folder)
        found = load_tokenizer(self.folder / TOKENIZER_FILE, end_token=manifest["end_name"])
        if found.digest != manifest["settings"]["tokenizer"]:
            raise ValueError(f"data: expected {self.folder / TOKENIZER_FILE} as the shards were made by, got another")
        return found


def open_shards(folder: str | Path, *, verify: bool | None = None, say: Callable[[str], None] | None = None) -> Corpus:
    """Open what `build_shards` wrote.

    Args:
        verify: whether to read files and compare their checksums: by default those that are new here, or were written
            to, since they were last compared (`.checked.json` in the folder says so); True for all, False for none.
        say: called with a line where much is to be read.

    Raises: ValueError naming the folder or file that is missing, cut short, changed, or of another format.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    train, validation = (TokenShards(folder, manifest[part], vocab_size=manifest["vocab_size"]) for part in PARTS)
    if verify is not False:
        check_sums(folder, (*train.shards, *validation.shards), again=verify is True, say=say)
    return Corpus(folder=folder, train=train, validation=validation, **{name: manifest[name] for name in FACTS})


def check_sums(
    folder: Path, shards: Sequence[Shard], *, again: bool = False, say: Callable[[str], None] | None = None
) -> None:
    """Compare checksums of shards, `again` also where they were compared in this state before; several at a time.

    Raises: ValueError naming the shards that are not as they were built.
    """
    path = folder / CHECKED_FILE
    known = _read_checked(path)
    states = {shard.name: shard.state(folder) for shard in shards if shard.sha256}
    if len(states) < len(shards):
        warnings.warn(f"{folder / MANIFEST} has no checksums of {len(shards) - len(states)} shards, so that damage to "
                      "them would not be seen; build them anew to have some", stacklevel=3)  # fmt: skip
    todo = [shard for shard in shards if shard.sha256 and (again or known.get(shard.name) != states[shard.name])]
    if not todo:
        return
    n_bytes = sum(path.stat().st_size for shard in todo for path in shard.files(folder))
    if say is not None and n_bytes > MUCH:
        say(f"comparing checksums of {len(todo)} shards, {n_bytes / 1e9:,.0f} GB in {folder}")
    with ThreadPoolExecutor(min(8, cpus(), len(todo))) as pool:
        sums = list(pool.map(lambda shard: shard.sum(folder), todo))
    broken = [shard for shard, found in zip(todo, sums, strict=True) if found != shard.sha256]
    known |= {shard.name: states[shard.name] for shard in todo if shard not in broken}
    for shard in broken:
        known.pop(shard.name, None)
    _write_checked(path, known)
    if broken:
        more = f" (and {', '.join(shard.name for shard in broken[1:])})" if broken[1:] else ""
        raise ValueError(
            f"data: expected {broken[0].files(folder)[0]} and its .ends as they were built, got other bytes{more}; "
            "copy them again, or build the shards anew"
        )


def _read_checked(path: Path) -> dict[str, Any]:
    """States of shards whose checksums were right; none where the file is broken: then they are compared again."""
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _write_checked(path: Path, states: dict[str, Any]) -> None:
    temporary = path.with_name(f"{path.name}-{os.getpid()}")
    try:
        temporary.write_text(json.dumps(states))
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        warnings.warn(f"{path}: cannot be written ({error.strerror}), so that the next start compares the checksums of "
                      "all shards again", stacklevel=4)  # fmt: skip


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder of shards, with the `Shard`s of each part.

    Raises: ValueError where there is none that this version reads.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"data: expected a folder of token shards with {MANIFEST}, got {folder}")
    try:
        manifest = json.loads(path.read_text())
        version = manifest["format"]
        if version == FORMAT:
            if missing := {"settings", *FACTS} - manifest.keys():
                raise KeyError(*sorted(missing))
            token_type(manifest["vocab_size"])
            shards = {part: [Shard(**shard) for shard in manifest[part]] for part in PARTS}
            if outside := [x.name for part in PARTS for x in shards[part] if x.name != Path(x.name).name]:
                raise ValueError(f"a shard {outside[0]!r}")
            return manifest | shards
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"data: expected a manifest of token shards, got {path}: {error!r}") from error
    raise ValueError(f"data: expected {path} of format {FORMAT}, got {version!r}; build the shards anew")


def unigram_entropy(tokens: TokenShards, *, most: int = 2**28) -> float:
    """Entropy of the distribution of single tokens, in nats per token: the loss of the best model without context.

    Counts all of them, or of more than `most` that many from evenly spaced places.
    """
    block = 2**20
    n_blocks = -(-min(tokens.n_tokens, most) // block)
    counts = torch.zeros(tokens.vocab_size, dtype=torch.int64)
    for i in range(n_blocks):
        start = i * block if tokens.n_tokens <= most else i * (tokens.n_tokens - block) // max(1, n_blocks - 1)
        here = tokens.read(start, min(start + block, tokens.n_tokens))
        counts += torch.bincount(here, minlength=tokens.vocab_size)
    share = counts.double() / max(1, int(counts.sum()))
    return float(-torch.special.xlogy(share, share).sum())


def _check_size(path: Path, size: int) -> None:
    try:
        got = path.stat().st_size
    except FileNotFoundError:
        got = None
    if got != size:
        raise ValueError(
            f"data: expected {path} of {size:,} bytes, got "
            + ("no such file" if got is None else f"{got:,}")
            + "; build the shards anew"
        )
