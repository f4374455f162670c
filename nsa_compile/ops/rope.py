"""Rotary positions (RoPE), half-split as in Llama."""

import torch
from torch import Tensor

from nsa_compile.ops.attend import compute_dtype
from nsa_compile.ops.checks import check_tensor


def apply_rope(x: Tensor, positions: Tensor, *, theta: float = 10000.0) -> Tensor:
    """Rotate every head of x by its token's position.

    Channel pair (i, i + d/2) turns by `positions * theta ** (-2i / d)` radians.

    Args:
        x: [b, t, n, d] float, d even.
        positions: integers [b, t] or [t].
        theta: base of the wavelengths.

    Returns: [b, t, n, d] in the type of x, computed in at least fp32; the angles in fp64, since in fp32 they would be
        off by 0.004 radians at position 65536.

    Raises: ValueError for an odd d, shapes that do not fit or positions that are not integers.
    """
    check_tensor("x", x), check_tensor("positions", positions)
    if x.ndim != 4 or x.shape[-1] % 2:
        raise ValueError(f"x: expected shape [b, t, n, d] with d even, got {tuple(x.shape)}")
    if positions.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"positions: expected dtype int32 or int64, got {positions.dtype}")
    if positions.shape not in (x.shape[:2], x.shape[1:2]):
        raise ValueError(
            f"positions: expected shape {tuple(x.shape[:2])} or {tuple(x.shape[1:2])}, got {tuple(positions.shape)}"
        )
    dtype, half = compute_dtype(x), x.shape[-1] // 2
    frequency = theta ** (torch.arange(half, device=x.device, dtype=torch.float64) / -half)
    angle = (positions.double().unsqueeze(-1) * frequency).unsqueeze(-2)  # [b or none, t, 1, d/2]
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    first, second = x.to(dtype).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
