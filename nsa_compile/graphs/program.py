"""Calls with a cache as `torch.export` programs: prefill and decode steps to save, load and compile ahead of time."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from nsa_compile.custom_ops.decode import STEP
from nsa_compile.graphs.cache import NSACache
from nsa_compile.graphs.capture import plain_tensors
from nsa_compile.ops.checks import check_int


class CachedCall(nn.Module):
    """A model's call with a cache whose tensors are inputs."""

    def __init__(self, model: nn.Module, cache: NSACache) -> None:
        super().__init__()
        self.model, self.cache = model, cache

    def forward(self, ids: Tensor, lengths: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """Logits [b, 1, vocab] of each row's last token."""
        layers, start = [], 0
        for layer in self.cache.layers:
            end = start + len(layer.tensors())
            layers.append(layer.over(tensors[start:end]))
            start = end
        cache = NSACache(self.cache.modules, layers, self.cache.batch, self.cache.capacity)
        return self.model(ids, cache=cache, lengths=lengths, last_only=True)


def export_program(
    model: nn.Module, capacity: int, *, tokens: int | None = None, dtype: torch.dtype | None = None
) -> ExportedProgram:
    """Prefill or a decode step as a program for `torch.export.save` or `torch._inductor.aoti_compile_and_package`.

    The program computes `(ids, lengths, tensors) -> logits` for any number b of rows: ids int64 [b, t], lengths int32
    [b] (tokens of each right-padded row), `tensors` those of an `NSACache` in the order of `cache.tensors()`, to which
    it appends in place; logits [b, 1, vocab_size] after each row's last token. Run it without gradients. It checks no
    values: tokens that a row has no room for give NaN, so let `cache.reserve` count. A package of AOTInductor checks no
    sizes and types, either. Its attention is the ops of this package, which Python runs: import `nsa_compile` before a
    program is loaded.

    Args:
        model: as in `generate`, not compiled. The program keeps its weights, their type and device.
        capacity: tokens per row of the caches that the program takes.
        tokens: t, 1 for a decode step; default any t from max(9, l, d + 1) to `capacity` (pad shorter prompts).
        dtype: of the caches; default as in `NSACache.for_model`.

    Raises: ValueError or TypeError naming the argument; what `torch.export` raises for a model that it cannot trace.
    """
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise TypeError("model: expected one not compiled, got the result of torch.compile")
    cache = NSACache.for_model(model, 2, capacity, dtype=dtype)  # of 1 row, torch.export would make a program of 1 row
    configs = [m.config for m, layer in zip(cache.modules, cache.layers, strict=True) if "k_cmp" in layer.buffers]
    least = max([STEP + 1, *(max(c.l, c.d + 1) for c in cast(Any, configs))])
    if tokens is None and capacity <= least:
        raise ValueError(f"capacity: expected at least {least + 1} for a prefill of any length, got {capacity}")
    # a prefill is traced at a length that takes the way of long ones
    t = capacity - 1 if tokens is None else tokens
    check_int("tokens", t, 1, capacity)
    rows, device = {0: Dim.DYNAMIC}, cache.positions.device
    with plain_tensors():
        inputs = (
            torch.zeros(2, t, dtype=torch.int64, device=device),
            torch.full((2,), t, dtype=torch.int32, device=device),
            cache.tensors(),
        )
        length = {1: Dim.DYNAMIC(max=capacity)} if tokens is None else {}
        shapes = (rows | length, rows, [rows] * len(inputs[2]))
        return torch.export.export(CachedCall(model, cache), inputs, dynamic_shapes=shapes, strict=False)
