"""Rotary positions, whose cosines and sines are an op of their own.

A compiler that fuses their fp64 arithmetic into the rotation does it again for every head: 20 ms for the queries of one
layer at 65536 tokens and 64 heads, two thirds of what its attention takes. For the few tokens of a decode step that
costs nothing, and the op's launches do.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from nsa_compile.custom_ops.decode import STEP
from nsa_compile.custom_ops.transforms import pass_no_gradient
from nsa_compile.ops import rope as reference
from nsa_compile.ops.attend import compute_dtype
from nsa_compile.ops.checks import check_number, check_tensor, has_shape


def apply_rope(x: Tensor, positions: Tensor, *, theta: float = 10000.0) -> Tensor:
    """Rotate every head of x by its token's position.

    Channel pair (i, i + d/2) turns by `positions * theta ** (-2i / d)` radians.

    Args:
        x: [b, t, n, d] float, d even.
        positions: integers [b, t] or [t].
        theta: base of the wavelengths.

    Returns: [b, t, n, d] in the type of x, computed in at least fp32, the angles in fp64.

    Raises: ValueError for an odd d, shapes that do not fit or positions that are not integers.
    """
    check_tensor("x", x), check_tensor("positions", positions)
    check_number("theta", theta)
    if x.ndim != 4 or x.shape[-1] % 2:
        raise ValueError(f"x: expected shape [b, t, n, d] with d even, got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"x: expected a float dtype, got {x.dtype}")
    if positions.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"positions: expected dtype int32 or int64, got {positions.dtype}")
    if not has_shape(positions, *x.shape[:2]) and not has_shape(positions, x.shape[1]):
        raise ValueError(
            f"positions: expected shape {tuple(x.shape[:2])} or {tuple(x.shape[1:2])}, got {tuple(positions.shape)}"
        )
    return rotate_all((x,), positions, theta=theta)[0]


def rotate_all(heads: Iterable[Tensor], positions: Tensor, *, theta: float) -> list[Tensor]:
    """`apply_rope`, unchecked, of tensors of one type, b, t and d, whose cosines and sines are computed once."""
    first, *_ = heads = list(heads)
    few = statically_known_true(first.shape[1] <= STEP)  # what asks a traced size would compile once more
    find = reference.rope_turns if few else torch.ops.nsa_compile.rope_turns
    turns = find(positions, first.shape[-1] // 2, theta, compute_dtype(first) == torch.float64)
    return [reference.rotate(x, *turns) for x in heads]


# no dtype among the arguments: a package of torch 2.11's AOTInductor passes another
@torch.library.custom_op("nsa_compile::rope_turns", mutates_args=())
def _rope_turns(positions: Tensor, half: int, theta: float, double: bool) -> tuple[Tensor, Tensor]:
    return reference.rope_turns(positions.contiguous(), half, theta, double)


@_rope_turns.register_fake
def _(positions, half, theta, double):
    shape, dtype = (*positions.shape, half), torch.float64 if double else torch.float32
    return positions.new_empty(shape, dtype=dtype), positions.new_empty(shape, dtype=dtype)


pass_no_gradient(_rope_turns, fold=False)
