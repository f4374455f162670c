"""Packing and order: rows of tokens built of documents, and batches that follow from (seed, step) alone."""

import hashlib
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nsa_compile.data.shards import TokenShards


class Batch(NamedTuple):
    """Rows of tokens: packed as one row with `cu_seqlens`, or side by side without. `model.loss(ids, cu_seqlens)`."""

    ids: Tensor
    """int64 [1, n], or [rows, seq_len] where documents are joined."""
    cu_seqlens: Tensor | None
    """int32 [N + 1], cumulative lengths of the pieces of documents; N never changes, further entries repeat the end."""
    n_targets: int
    """Tokens that a piece of a document predicts, those that the loss is the mean of."""

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device; from pinned memory the host does not wait."""
        ids, ends = (x if x is None else x.to(device, non_blocking=True) for x in (self.ids, self.cu_seqlens))
        assert ids is not None
        return Batch(ids, ends, self.n_targets)

    def pin_memory(self) -> "Batch":
        """The batch in pinned memory, from where copies to a GPU run beside other work."""
        ends = None if self.cu_seqlens is None else self.cu_seqlens.pin_memory()
        return Batch(self.ids.pin_memory(), ends, self.n_targets)


class PackedBatches:
    """Batches of rows of `seq_len` tokens, in an order that is a function of seed, step, rank and world size.

    The documents, in an order that the seed decides, are one long row, cut into rows of `seq_len` tokens; the last one
    is shorter. A document that is cut goes on in another row as a sequence of its own: attention crosses neither
    documents nor rows. A row of more than `max_documents` pieces ends before the next piece, which starts a new row: no
    token is dropped, no documents are merged. An epoch is every row once, in an order of its own; a batch may hold the
    end of one epoch and the start of the next.

    A step's rows are the same for any world size: rank r of W takes the r-th of W equal shares. To accumulate gradients
    over P parts, part p is rank `rank * P + p` of `world_size * P`. What a run must remember is the step.

    Args:
        tokens: the documents.
        seq_len: tokens of a row.
        batch_size: rows of a step, on all ranks together.
        seed: decides the order; None keeps documents and rows as they come.
        packed: True gives `[1, n]` and `cu_seqlens`: the rows without padding one after the other, padding (token 0,
            in no sequence) at the end. False joins documents: `[rows, seq_len]` where a row is one sequence, whatever
            documents it holds (end-of-document tokens stand between them), and the last row reaches back to be full.
        max_documents: most pieces of documents in a row; None takes the most there are. A batch of R rows has
            `R * max_documents + 1` entries in `cu_seqlens`.

    Raises: ValueError naming the argument, what was expected and what came.
    """

    def __init__(
        self, tokens: TokenShards, *, seq_len: int, batch_size: int, seed: int | None = 0, packed: bool = True,
        max_documents: int | None = None,
    ) -> None:  # fmt: skip
        for name, value, least in (
            ("seq_len", seq_len, 2), ("batch_size", batch_size, 1),
            ("max_documents", 1 if max_documents is None else max_documents, 1),
        ):  # fmt: skip
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        if seq_len * batch_size >= 2**31:
            raise ValueError(
                f"batch_size: expected less than 2^31 tokens of a step, got {batch_size} rows of {seq_len}"
            )
        if tokens.n_tokens < (1 if packed else seq_len):
            least = 1 if packed else seq_len
            raise ValueError(
                f"tokens: expected at least {least} for rows of seq_len = {seq_len}, got {tokens.n_tokens}"
            )
        self.tokens, self.seq_len, self.batch_size, self.seed, self.packed = tokens, seq_len, batch_size, seed, packed
        n = tokens.n_documents
        self._order = np.arange(n) if seed is None else shuffled(n, seed, "documents")
        lengths = np.diff(tokens.starts)[self._order]
        self._starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        self._rows = cut_rows(self._starts, seq_len, max_documents if packed else None)
        if not packed:
            self._rows[-1, 0] = tokens.n_tokens - seq_len
        self.max_documents = max_documents or int(_pieces(self._starts, self._rows).max())
        self._epoch: tuple[int, np.ndarray] | None = None

    @property
    def rows_per_epoch(self) -> int:
        """Rows of an epoch."""
        return len(self._rows)

    def epoch_at(self, step: int) -> float:
        """Epochs seen before a step."""
        return step * self.batch_size / self.rows_per_epoch

    def batch(self, step: int, *, rank: int = 0, world_size: int = 1) -> Batch:
        """What a rank computes on in a step, counted from 0."""
        return self._assemble(self.rows(step, rank=rank, world_size=world_size))

    def rows(self, step: int, *, rank: int = 0, world_size: int = 1) -> list[int]:
        """The rows of `batch`, numbered as they are cut."""
        self._check(step, rank, world_size)
        share = self.batch_size // world_size
        first = step * self.batch_size + rank * share
        return [self._row_of(sample) for sample in range(first, first + share)]

    def evenly_spaced(self, n_batches: int, *, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """Batches of rows that are evenly spaced over an epoch, always the same ones."""
        for rows in self.evenly_spaced_rows(n_batches, rank=rank, world_size=world_size):
            yield self._assemble(rows)

    def evenly_spaced_rows(self, n_batches: int, *, rank: int = 0, world_size: int = 1) -> list[list[int]]:
        """The rows of each batch of `evenly_spaced`."""
        self._check(0, rank, world_size)
        share, n = self.batch_size // world_size, n_batches * self.batch_size
        firsts = (step * self.batch_size + rank * share for step in range(n_batches))
        return [[i * self.rows_per_epoch // n for i in range(first, first + share)] for first in firsts]

    def lengths(self, rows: Iterable[int]) -> np.ndarray:
        """Tokens of each sequence that attention sees in rows, int64 [pieces], without reading any."""
        if not self.packed:
            return np.array([self.seq_len for _ in rows], np.int64)
        pieces = []
        for row in rows:
            start, stop = self._rows[row]
            inner = self._starts[np.searchsorted(self._starts, start, side="right") :]
            inner = inner[: np.searchsorted(inner, stop, side="left")]
            pieces.append(np.diff(np.concatenate([[start], inner, [stop]])))
        return np.concatenate(pieces)

    def n_targets(self, rows: Iterable[int]) -> int:
        """Tokens that a piece of a document predicts in rows, as a `Batch` of them says."""
        return int((self.lengths(rows) - 1).sum())

    def describe(self, rows: Sequence[int], most: int = 16) -> str:
        """Which rows, and the numbers of the documents they have pieces of, in the order of the shards."""
        documents: list[int] = []
        for row in rows:
            start, stop = self._rows[row]
            first = int(np.searchsorted(self._starts, start, side="right")) - 1
            documents += self._order[first : int(np.searchsorted(self._starts, stop, side="left"))].tolist()
        return f"rows {_some(rows, most)} of {self.rows_per_epoch} (documents {_some(documents, most)})"

    def _check(self, step: int, rank: int, world_size: int) -> None:
        if step < 0:
            raise ValueError(f"step: expected at least 0, got {step}")
        if world_size < 1 or self.batch_size % world_size:
            raise ValueError(f"world_size: expected a divisor of batch_size = {self.batch_size}, got {world_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: expected 0 … {world_size - 1}, got {rank}")

    def _row_of(self, sample: int) -> int:
        """The row that is sample number `sample` of the run."""
        epoch, place = divmod(sample, self.rows_per_epoch)
        if self.seed is None:
            return place
        current = self._epoch  # read once: another thread may be in another epoch
        if current is None or current[0] != epoch:
            self._epoch = current = epoch, shuffled(self.rows_per_epoch, self.seed, "rows", epoch)
        return int(current[1][place])

    def _assemble(self, rows: list[int]) -> Batch:
        ids, ends, at = torch.zeros(len(rows) * self.seq_len, dtype=torch.int64), [0], 0
        for row in rows:
            start, stop = self._rows[row].tolist()
            document = int(np.searchsorted(self._starts, start, side="right")) - 1
            while start < stop:
                n = min(stop, int(self._starts[document + 1])) - start
                source = int(self.tokens.starts[self._order[document]] + start - self._starts[document])
                ids[at : at + n] = self.tokens.read(source, source + n)
                at, start, document = at + n, start + n, document + 1
                ends.append(at)
        if not self.packed:
            return Batch(ids.view(len(rows), self.seq_len), None, len(rows) * (self.seq_len - 1))
        cu_seqlens = torch.full((len(rows) * self.max_documents + 1,), at, dtype=torch.int32)
        cu_seqlens[: len(ends)] = torch.tensor(ends, dtype=torch.int32)
        return Batch(ids[None], cu_seqlens, at - (len(ends) - 1))


def _some(numbers: Sequence[int], most: int) -> str:
    more = f" and {len(numbers) - most} more" if len(numbers) > most else ""
    return ", ".join(map(str, numbers[:most])) + more


def shuffled(n: int, *key: object) -> np.ndarray:
    """The numbers 0 … n - 1 in an order that the key decides, int64 [n], whatever the machine and the versions."""
    start = int.from_bytes(hashlib.sha256(" ".join(map(str, key)).encode()).digest()[:8], "little")
    x = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(start)  # splitmix64
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(x ^ (x >> np.uint64(31)), kind="stable")


def cut_rows(starts: np.ndarray, seq_len: int, max_documents: int | None) -> np.ndarray:
    """Cut a long row of documents into rows of `seq_len` tokens, or less before a piece more than `max_documents`.

    starts int64 [documents + 1] → start and stop of each row, int64 [rows, 2].
    """
    total, rows, at = int(starts[-1]), [np.empty((0, 2), np.int64)], 0
    ahead = -(-total // seq_len)
    while at < total:
        stops = np.minimum(at + seq_len * np.arange(1, min(ahead, -(-(total - at) // seq_len)) + 1), total)
        found = np.stack([np.concatenate([[at], stops[:-1]]), stops], axis=1)
        over = np.zeros(0, int) if max_documents is None else np.flatnonzero(_pieces(starts, found) > max_documents)
        if len(over):
            found = found[: over[0] + 1]
            first = np.searchsorted(starts, found[-1, 0], side="right") - 1
            found[-1, 1] = starts[first + max_documents]
        ahead = max(1, ahead // 2) if len(over) else 2 * ahead  # rows that run over come in numbers
        at = int(found[-1, 1])
        rows.append(found)
    return np.concatenate(rows)


def _pieces(starts: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Number of documents that each row has a piece of."""
    return np.searchsorted(starts, rows[:, 1], side="left") - np.searchsorted(starts, rows[:, 0], side="right") + 1


@contextmanager
def prefetch(
    make: Callable[[int], Batch], steps: Iterable[int], *, device: torch.device | str = "cpu", ahead: int = 2
) -> Iterator[Iterator[Batch]]:
    """The batches of steps on a device, made by a thread that works up to `ahead` batches ahead.

    To a GPU they go through pinned memory, without the host waiting. What `make` raises comes out where the batch would
    have; at the end of the `with` block the thread ends, wherever it is.

        with prefetch(batches.batch, range(done, steps), device="cuda") as stream:
            for batch in stream: ...
    """
    waiting: queue.Queue[Batch | BaseException | None] = queue.Queue(ahead)
    stop, pin = threading.Event(), torch.device(device).type == "cuda"

    def put(item: Batch | BaseException | None) -> None:
        while not stop.is_set():
            try:
                return waiting.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for step in steps:
                batch = make(step)
                put(batch.pin_memory() if pin else batch)
                if stop.is_set():
                    return
            put(None)
        except BaseException as error:
            put(error)

    def stream() -> Iterator[Batch]:
        while (item := waiting.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item.to(device)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        yield stream()
    finally:
        stop.set()
        thread.join()
