"""How a batch as transformers passes it (padded on a side, or packed) is laid out for the layers."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from nsa_compile.ops.checks import check_ints_of, check_tensor, has_shape, values_are_visible
from nsa_compile.ops.layout import ends_of_sequences, roll_rows


class Rows(NamedTuple):
    """How a batch is laid out for the layers; outputs go back the same way."""

    lengths: Tensor | None = None
    """Tokens of each right-padded row, int32 [b]."""
    cu_seqlens: Tensor | None = None
    """Ends of packed sequences, int32 [N + 1], with all rows in one."""
    shift: Tensor | None = None
    """Padding on the left of each row, int64 [b]."""

    def arrange(self, x: Tensor) -> Tensor:
        """x [b, t, ...] with its padding rolled to the right, or as one packed row [1, b*t, ...]."""
        if self.cu_seqlens is not None:
            return x.flatten(0, 1).unsqueeze(0)
        return x if self.shift is None else roll_rows(x, self.shift)

    def restore(self, x: Tensor, b: int) -> Tensor:
        """The inverse of `arrange`."""
        if self.cu_seqlens is not None:
            return x.squeeze(0).unflatten(0, (b, -1))
        return x if self.shift is None else roll_rows(x, -self.shift)


def can_look(x: Tensor) -> bool:
    """Whether the host may look at values, where need be by waiting for the device."""
    if values_are_visible(x):
        return True
    real = type(x) is Tensor and x.device.type != "meta" and not torch.compiler.is_compiling()
    return real and not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def require(fits: Tensor, message: str) -> None:
    """Raise ValueError where a bool [] is False; an assertion on the device where the host may not look."""
    if not can_look(fits):
        torch._assert_async(fits, message)
    elif not fits:
        raise ValueError(message)


def lay_out(
    b: int, t: int, attention_mask: Tensor | None, position_ids: Tensor | None, cu_seqlens: Tensor | None, cached: bool
) -> Rows:
    """Lengths, padding or packed sequences from the arguments that the library passes.

    In a compiled call, where values cannot be looked at, a mask is taken as a padded batch, and `position_ids` without
    a mask or a cache as packed sequences; a mask with holes, and `position_ids` that start anew together with a mask,
    be it of ones, or a cache, fail as assertions on the device.
    """
    mask = None
    if attention_mask is not None:
        shape = tuple(check_tensor("attention_mask", attention_mask).shape)
        if len(shape) != 2 or shape[0] != b or shape[1] < t or (shape[1] > t and not cached):
            raise ValueError(f"attention_mask: expected shape [{b}, {t}] (1 token, 0 padding), got {shape}")
        mask = attention_mask[:, shape[1] - t :] != 0
        if t > 1:
            begins = mask & ~nn.functional.pad(mask[:, :-1], (1, 0))
            message = "attention_mask: expected rows padded on the left or the right, got one with a hole"
            require((begins.sum(1) <= 1).all(), message)
            if can_look(mask) and mask.all():
                mask = None
    if position_ids is not None:
        check_tensor("position_ids", position_ids)
        if not has_shape(position_ids, b, t) and not has_shape(position_ids, 1, t):
            raise ValueError(f"position_ids: expected shape [{b}, {t}], got {tuple(position_ids.shape)}")
    name = "cu_seq_lens_q"
    if cu_seqlens is not None:
        check_ints_of(name, cu_seqlens, "N + 1")
        if b != 1:
            raise ValueError(f"{name}: expected a batch of 1 packed row, got a batch of {b}")
    elif position_ids is not None and t > 1:
        name = "position_ids"
        cu_seqlens = _packed_by_positions(position_ids.expand(b, t), mask, cached)
    if cu_seqlens is not None:
        if cached or mask is not None:
            other = "a cache" if cached else "an attention_mask with padding"
            raise ValueError(f"{name}: expected no packed sequences together with {other}, got both")
        return Rows(cu_seqlens=cu_seqlens.to(torch.int32))
    if mask is None:
        return Rows()
    lengths = mask.sum(1, dtype=torch.int32)
    return Rows(lengths, None, mask.to(torch.int32).argmax(1) if t > 1 else None)


def _packed_by_positions(position_ids: Tensor, mask: Tensor | None, cached: bool) -> Tensor | None:
    """Ends [N + 1] of the packed sequences that positions [b, t] tell of; None where each row is one sequence."""
    begins = nn.functional.pad(position_ids[:, 1:] != position_ids[:, :-1] + 1, (1, 0), value=True)
    if mask is not None:
        begins = begins & mask & nn.functional.pad(mask[:, :-1], (1, 0))  # between tokens of a row
    n, look = position_ids.numel(), can_look(position_ids)
    if look and not begins[:, 1:].any():
        return None
    if look:
        return nn.functional.pad(begins.flatten().nonzero().flatten(), (0, 1), value=n)
    if mask is None and not cached:
        return ends_of_sequences(begins.flatten())
    other = "a cache" if cached else "an attention_mask in a compiled call (leave the mask out)"
    torch._assert_async(
        ~begins[:, 1:].any(), f"position_ids: expected no packed sequences together with {other}, got both"
    )
    return None
