"""Small shapes and random inputs that the semantics tests share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import oracle
import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """Sizes of an attention; the properties are the keyword arguments of the public functions."""

    l: int = 4
    d: int = 2
    l_sel: int = 6
    n_sel: int = 4
    w: int = 7
    init_blocks: int = 1
    local_blocks: int = 2
    g: int = 2
    h: int = 3
    d_k: int = 5
    d_v: int = 3

    @property
    def compression(self) -> dict[str, int]:
        return {"l": self.l, "d": self.d}

    @property
    def choice(self) -> dict[str, int]:
        forced = {"init_blocks": self.init_blocks, "local_blocks": self.local_blocks}
        return {**self.compression, "l_sel": self.l_sel, "n_sel": self.n_sel, **forced}

    @property
    def everything(self) -> dict[str, int]:
        return {**self.choice, "w": self.w}


class Inputs(NamedTuple):
    """Positional arguments of `nsa_attention`, in its order."""

    q: Tensor
    k_cmp: Tensor
    v_cmp: Tensor
    k_slc: Tensor
    v_slc: Tensor
    k_win: Tensor
    v_win: Tensor
    gates: Tensor


def draw(*size: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers, drawn in fp64 so that a seed means the same numbers in every type."""
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def draw_inputs(
    shape: Shape, t: int, *, b: int = 1, s: int | None = None, c: int | None = None, seed: int = 0, dtype=torch.float64
) -> Inputs:
    """Random inputs for `t` queries; `s` keys and `c` compressed tokens, by default those of a plain sequence.

    Queries are three times as large as keys, so that the attention is far from uniform and choices matter.
    """
    s = t if s is None else s
    c = oracle.count_blocks(s, shape.l, shape.d) if c is None else c
    sizes = [
        (b, t, shape.g * shape.h, shape.d_k),
        *[(b, length, shape.g, channels) for length in (c, s, s) for channels in (shape.d_k, shape.d_v)],
        (b, t, shape.g * shape.h, 3),
    ]
    tensors = [draw(*size, seed=100 * seed + i, dtype=dtype) for i, size in enumerate(sizes)]
    return Inputs(tensors[0] * 3, *tensors[1:])


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)
