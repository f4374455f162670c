"""Drawing the next token: a row's draw is a function of its logits, seed and position, and of nothing else."""

import torch
from torch import Tensor

from nsa_compile.ops.checks import check_tensor, has_shape

MASK = 0xFFFFFFFF
ONE = 2.0**36
"""Probability 1 as a whole number: sums of those are exact, whatever the order in which a device adds."""


def sample(logits: Tensor, *, temperature: Tensor, top_p: Tensor, seed: Tensor, position: Tensor) -> Tensor:
    """Draw each row's next token; a row's draw depends on its own arguments only.

    Args:
        logits: [b, vocab] float.
        temperature: [b] float; 0 takes the likeliest token.
        top_p: [b] float in (0, 1]: only the likeliest tokens with less than this probability before them count; the
            first one always does.
        seed: [b] int64.
        position: [b] int, where in its row the drawn token will stand.

    Returns: int64 [b]; of a row with NaN any token. Compiles to one graph; reads nothing on the host.

    Raises: ValueError or TypeError naming the argument, what was expected and what came.
    """
    if check_tensor("logits", logits).ndim != 2 or not logits.is_floating_point() or 0 in logits.shape:
        raise ValueError(f"logits: expected float [b, vocab], got {logits.dtype} {tuple(logits.shape)}")
    per_row = {"temperature": temperature, "top_p": top_p, "seed": seed, "position": position}
    for name, value in per_row.items():
        floating = name in ("temperature", "top_p")
        if not has_shape(check_tensor(name, value), logits.shape[0]) or value.is_floating_point() != floating:
            kind, b = "float" if floating else "integers", logits.shape[0]
            raise ValueError(f"{name}: expected {kind} [{b}], got {value.dtype} {tuple(value.shape)}")
    logits = logits.float()
    greedy = temperature == 0
    scale = torch.where(greedy, 1.0, temperature.float())[:, None]
    top = logits.amax(-1, keepdim=True)
    probability, token = torch.softmax(torch.where(logits == top, 0.0, logits - top) / scale, dim=-1).sort(
        dim=-1, descending=True, stable=True
    )
    weight, top_p = (probability * ONE).long(), top_p.float()[:, None]
    upto = weight.cumsum(-1)
    kept = (upto - weight < (top_p * ONE).ceil().long()) | (top_p >= 1)
    mass = torch.where(kept, upto, 0).amax(-1)  # of the kept tokens
    draw = uniform_bits(seed, position) * mass >> 24
    index = (upto <= draw[:, None]).sum(-1).clamp_max(logits.shape[-1] - 1)
    drawn = token.gather(-1, index[:, None]).squeeze(-1)
    return torch.where(greedy, logits.argmax(-1), drawn)


def check_sampling(*, temperature: object, top_p: object, seed: object) -> None:
    """Raise ValueError for what `sample` does not take."""
    most = torch.finfo(torch.float32).max
    if not isinstance(temperature, (int, float)) or isinstance(temperature, bool) or not 0 <= temperature <= most:
        raise ValueError(f"temperature: expected a finite number >= 0, got {temperature!r}")
    if not isinstance(top_p, (int, float)) or isinstance(top_p, bool) or not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a number in (0, 1], got {top_p!r}")
    if not isinstance(seed, int) or isinstance(seed, bool) or not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed: expected an int64 number, got {seed!r}")


def uniform_bits(seed: Tensor, position: Tensor) -> Tensor:
    """24 random bits that are a function of (seed, position): int [b], int [b] → int64 [b]."""
    seed, position = seed.long(), position.long()
    x = mix_bits((seed & MASK) ^ 0x9E3779B9)
    x = mix_bits(x ^ ((seed >> 32) & MASK) ^ 0x85EBCA6B)
    x = mix_bits(x ^ (position & MASK) ^ 0xC2B2AE35)
    return x >> 8


def mix_bits(x: Tensor) -> Tensor:
    """A bijection of 32-bit numbers held in int64 in which every input bit moves every output bit (lowbias32)."""
    x = multiply_bits(x ^ (x >> 16), 0x7FEB352D)
    x = multiply_bits(x ^ (x >> 15), 0x846CA68B)
    return x ^ (x >> 16)


def multiply_bits(x: Tensor, factor: int) -> Tensor:
    """x · factor mod 2^32 for 32-bit numbers held in int64; in halves, so that nothing passes 2^63."""
    return ((x & 0xFFFF) * factor + ((((x >> 16) * factor) & 0xFFFF) << 16)) & MASK
