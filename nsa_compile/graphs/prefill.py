"""Prompts of any length into a cache, in chunks of a few fixed sizes."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nsa_compile.graphs.cache import NSACache, check_cache
from nsa_compile.graphs.capture import new_pool, plain_tensors, prepare
from nsa_compile.ops.checks import check_int, check_ints

SIZES = (128, 512, 2048)
"""Tokens of the chunks that `PrefillGraph` captures."""
CALLS = tuple(2**i for i in range(7, 14))
"""Tokens of the chunks of `prefill`, 128 … 8192, so that any lengths make few shapes."""


def split_chunks(length: int, sizes: Sequence[int], full: float = 0.5) -> list[int]:
    """Sizes of the chunks that take `length` tokens: the largest that is used to the part `full`, else the smallest."""
    chunks, sizes = [], sorted(sizes)
    while length > 0:
        fitting = [size for size in sizes if length >= full * size]
        chunks.append(max(fitting, default=sizes[0]))
        length -= chunks[-1]
    return chunks


def prefill(model: nn.Module, rows: Sequence[Sequence[int]], cache: NSACache, *, chunk: int | None = None) -> Tensor:
    """Append rows of token ids, not all of them empty, to a cache; returns the logits [b, vocab] after each row's last.

    `chunk` is the number of tokens of every call, padding included; by default one of `CALLS`. Goes without gradients.
    Raises ValueError or TypeError before anything is written if a row would pass the cache's capacity.
    """
    if chunk is not None:
        check_int("chunk", chunk)
    logits: Tensor | None = None

    def feed(ids: Tensor, lengths: Tensor) -> None:
        nonlocal logits
        new = model(ids, cache=cache, lengths=lengths, last_only=True)[:, 0]
        logits = new.clone() if logits is None else torch.where((lengths > 0)[:, None], new, logits)

    _feed_chunks(rows, cache, CALLS if chunk is None else (chunk,), feed, full=0.75)
    if logits is None:
        raise ValueError("rows: expected at least 1 token in one of them, got none")
    return logits


def _feed_chunks(
    rows: Sequence[Sequence[int]],
    cache: NSACache,
    sizes: Sequence[int],
    feed: Callable[[Tensor, Tensor], None],
    vocab_size: int | None = None,
    full: float = 0.5,
) -> None:
    """Hand out chunks of ids int64 [b, size] with their lengths int32 [b], on the cache's device."""
    if not isinstance(rows, Sequence) or isinstance(rows, (str, bytes)):
        raise TypeError(f"rows: expected a sequence of token ids per row, got {type(rows).__name__}")
    rows = [check_ints("rows", row, 0, None if vocab_size is None else vocab_size - 1) for row in rows]
    if len(rows) != cache.batch:
        raise ValueError(f"rows: expected {cache.batch}, one per row of the cache, got {len(rows)}")
    device, lengths = cache.positions.device, [len(row) for row in rows]
    chunks = split_chunks(max(lengths), [min(size, cache.capacity) for size in sizes], full)
    padded = torch.zeros(len(rows), sum(chunks), dtype=torch.int64, pin_memory=device.type == "cuda")
    for ids, row in zip(padded, rows, strict=True):
        ids[: len(row)] = torch.tensor(row, dtype=torch.int64)
    cache.reserve(lengths)
    padded = padded.to(device, non_blocking=True)
    left = torch.tensor(lengths, dtype=torch.int32, pin_memory=device.type == "cuda").to(device, non_blocking=True)
    with plain_tensors():
        for ids in padded.split(chunks, dim=1):
            here = left.clamp(0, ids.shape[1])
            feed(ids.contiguous(), here)
            left = left - here


class PrefillGraph:
    """Appends prompts to a cache through one CUDA graph per chunk size, captured when this is made.

    Where nothing can be captured (on a CPU, or a model compiled with `mode="reduce-overhead"`), the same calls go to
    the model.

    Args:
        model: as in `generate`.
        cache: of any number of rows.
        sizes: tokens of the chunks. A prompt is cut into them, the last one padded.
        capture: False to go without CUDA graphs; default: with them where possible.

    Raises: ValueError or TypeError naming the argument.
    """

    def __init__(
        self, model: nn.Module, cache: NSACache, *, sizes: Sequence[int] = SIZES, capture: bool | None = None
    ) -> None:
        self.model, self.cache = model, check_cache("cache", cache)
        self.sizes = sorted({min(size, cache.capacity) for size in check_ints("sizes", sizes, 1)})
        if not self.sizes:
            raise ValueError("sizes: expected at least 1, got none")
        self.logits: Tensor | None = None  # from the warm-up on
        self._device = cache.positions.device
        pool = new_pool(self._device)
        self._runs = {size: self._prepare(size, capture, pool) for size in reversed(self.sizes)}

    def _prepare(self, size: int, wanted: bool | None, pool: Any) -> tuple[Tensor, Tensor, Callable[[], None]]:
        with plain_tensors():
            ids = torch.zeros(self.cache.batch, size, dtype=torch.int64, device=self._device)
            lengths = torch.zeros(self.cache.batch, dtype=torch.int32, device=self._device)

        def run() -> None:
            new = self.model(ids, cache=self.cache, lengths=lengths, last_only=True)[:, 0]
            if self.logits is None:
                self.logits = torch.zeros_like(new)
            self.logits.copy_(torch.where((lengths > 0)[:, None], new, self.logits))

        return ids, lengths, prepare(run, self.model, self._device, wanted, pool)

    def __call__(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Append a prompt, possibly empty, to each row of the cache.

        Returns: logits [b, vocab] after each row's last token, those of before for a row without one; the next call
        writes into the same tensor.

        Raises: ValueError or TypeError before anything is written for ids that the model does not know, or if a row
            would pass the cache's capacity.
        """
        assert self.logits is not None
        _feed_chunks(rows, self.cache, self.sizes, self._run, self.logits.shape[-1])
        return self.logits

    def _run(self, ids: Tensor, lengths: Tensor) -> None:
        static_ids, static_lengths, run = self._runs[ids.shape[1]]
        static_ids.copy_(ids)
        static_lengths.copy_(lengths)
        run()
