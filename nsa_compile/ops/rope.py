"""Rotary positions (RoPE), half-split as in Llama."""

import torch
from torch import Tensor

from nsa_compile.ops.attend import compute_dtype


def rope_turns(positions: Tensor, half: int, theta: float, double: bool) -> tuple[Tensor, Tensor]:
    """Cosines and sines of `positions * theta ** (-i / half)`, i < half, each [..., half] for positions [...].

    fp32, or fp64 if `double`. The angles are fp64: in fp32 they would be off by 0.004 radians at position 65536.
    """
    frequency = theta ** (torch.arange(half, device=positions.device, dtype=torch.float64) / -half)
    dtype = torch.float64 if double else torch.float32
    angle = positions.double().unsqueeze(-1) * frequency
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channel pairs (i, i + d/2) of x [b, t, n, d] by cos and sin [b or none, t, d/2]; in the type of x."""
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    first, second = x.to(compute_dtype(x)).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
