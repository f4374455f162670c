"""Drawing of sizes and tensors: what several kinds of checks share. Everything follows from the seeds it is given."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WIDTHS = (8, 16, 24, 32, 48, 64, 80, 96, 128, 192, 256)
BLOCKS = (
    (32, 16, 64), (16, 8, 32), (16, 8, 48), (64, 4, 64), (32, 16, 96), (16, 4, 148), (32, 32, 160), (16, 16, 128),
    (8, 8, 24), (4, 2, 6), (1, 1, 1), (2, 1, 3), (64, 16, 64), (12, 4, 20), (30, 10, 50), (32, 8, 160), (8, 4, 96),
)  # fmt: skip
"""(l, d, l_sel): the paper's, those of published models, and some that met a tile's edge."""
POISONS = {"none": (), "nan": (math.nan,), "inf": (math.inf,), "mixed": (math.nan, math.inf, -math.inf, 1e30)}


def weighted(rng: random.Random, choices: dict[T, float]) -> T:
    """One of the keys, by weight."""
    return rng.choices(list(choices), list(choices.values()))[0]


def log_uniform(rng: random.Random, low: int, high: int) -> int:
    """An int from low … high, small ones more often."""
    return min(high, max(low, round(math.exp(rng.uniform(math.log(low), math.log(high + 1))) - 0.5)))


def near(rng: random.Random, units: Sequence[int], low: int, high: int) -> int:
    """A multiple of one of the units or a neighbour of it, in low … high."""
    unit = rng.choice(list(units))
    multiple = unit * log_uniform(rng, 1, max(1, high // max(1, unit)))
    return min(high, max(low, multiple + rng.choice((-1, 0, 0, 1))))


def length(rng: random.Random, units: Sequence[int], most: int) -> int:
    """A number of tokens: mostly few, often at the edge of a block or tile, sometimes thousands."""
    kind = weighted(rng, {"few": 1.0, "edge": 2.5, "some": 4.5, "many": 1.5, "most": 0.5})
    if kind == "few":
        return rng.randint(1, min(8, most))
    if kind == "edge":
        return near(rng, units, 1, min(640, most))
    low, high = {"some": (8, 500), "many": (400, 1500), "most": (1500, 3000)}[kind]
    return log_uniform(rng, min(low, most), min(high, most))


def multiple(n: int, sixteens: bool) -> int:
    """n or a number near it that 16 divides, or that 16 does not divide; few tokens stay as few."""
    if sixteens:
        return n if n < 9 else max(16, round(n / 16) * 16)
    return n + 1 if n % 16 == 0 else n


def cuts(rng: random.Random, t: int, sixteens: bool) -> list[int]:
    """Where t tokens are cut into chunks, of lengths as `multiple` gives them."""
    ends: list[int] = []
    for _ in range(rng.choice((1, 2, 3))):
        begin = ends[-1] if ends else 0
        end = begin + multiple(log_uniform(rng, 1, max(1, t - 1)), sixteens)
        if end < t:
            ends.append(end)
    return ends


def width(rng: random.Random, most: int = 256) -> int:
    """Channels of a head: what models have, any multiple of 8, or any number from 8 on."""
    kind = weighted(rng, {"usual": 2.0, "eights": 1.0, "any": 1.0})
    if kind == "usual":
        return rng.choice([x for x in WIDTHS if x <= most])
    return 8 * rng.randint(1, most // 8) if kind == "eights" else rng.randint(8, most)


def heads(rng: random.Random, most: int = 64) -> int:
    """Query heads of a group: what models have, or any number."""
    if rng.random() < 0.55:
        return rng.choice([x for x in (1, 2, 4, 8, 16, 24, 32, 64) if x <= most])
    return log_uniform(rng, 1, most)


def blocks(rng: random.Random, most: int = 256) -> tuple[int, int, int]:
    """Any valid (l, d, l_sel), l_sel up to `most`."""
    if rng.random() < 0.45:
        return rng.choice([x for x in BLOCKS if x[2] <= most])
    d = rng.choice([x for x in (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24, 32, 48, 64) if x <= most])
    m = min(log_uniform(rng, 1, 16), max(1, most // d))
    a = min(max(m, log_uniform(rng, 1, 40)), max(m, most // d))
    return m * d, d, a * d


def selection(rng: random.Random, most: int = 32) -> dict[str, int]:
    """n_sel and the forced blocks that it includes."""
    init_blocks, local_blocks = rng.choice((0, 1, 1, 1, 2, 3)), rng.choice((1, 2, 2, 2, 3, 4))
    free = 0 if rng.random() < 0.15 else log_uniform(rng, 1, max(1, most - init_blocks - local_blocks))
    return {"init_blocks": init_blocks, "local_blocks": local_blocks, "n_sel": init_blocks + local_blocks + free}


def packing(rng: random.Random, tokens: int) -> list[int]:
    """cu_seqlens of a row: empty sequences, sequences of one token, long ones, and sometimes tokens of none."""
    used = tokens if rng.random() < 0.5 else rng.randint(0 if tokens < 4 else tokens // 2, tokens)
    cuts = sorted(rng.randint(0, used) for _ in range(rng.choice((0, 1, 2, 3, 5, 9))))
    ends = [0, *cuts, used]
    if rng.random() < 0.5:  # sequences of no and of one token
        at = rng.randrange(len(ends))
        ends = sorted([*ends, ends[at], min(used, ends[at] + 1)])
    return ends


def scale(rng: random.Random, d_k: int, negative: bool) -> float | None:
    """A factor on q·k: none given, or tiny, small, ordinary, large, zero."""
    kind = weighted(rng, {"none": 5, "tiny": 1.2, "ordinary": 2, "large": 1.2, "zero": 0.4})
    size = {"tiny": 1e-6, "ordinary": rng.uniform(0.3, 2) * d_k**-0.5, "large": rng.uniform(4, 12) * d_k**-0.5}
    if kind == "zero":
        return 0.0
    if kind == "none":
        return -(d_k**-0.5) if negative else None
    return -size[kind] if negative else size[kind]


def generator(seed: int, device: str) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def fill(size: Sequence[int], content: str, gen: torch.Generator) -> Tensor:
    """fp32 numbers of one kind on the generator's device: normal, constant, few (repeated rows), grid (of quarters)."""
    device = gen.device
    x = torch.randn(*size, generator=gen, device=device)
    if content == "grid":
        return (x * 2).round() / 4
    if content == "few":  # every token one of three
        which = torch.randint(0, 3, (size[1],), generator=gen, device=device)
        return x[:, which % size[1]].clone()
    if content == "constant":
        return x[:, :1].expand(*size).clone()
    if content == "zeros":
        return torch.zeros_like(x)
    return x


LAYOUTS = {"contiguous": 5, "heads_first": 2, "channel_slice": 2, "surrounded": 2, "channels_first": 1, "offset": 1,
           "every_other": 1, "fused": 2, "one_group": 0.5, "one_row": 0.5}  # fmt: skip
"""How a tensor lies in memory, and how often; the last two are expanded along an axis: their numbers repeat."""


def repeats(x: Tensor, layout: str) -> Tensor:
    """x with the numbers that an expanded layout can hold."""
    axis = {"one_group": 2, "one_row": 0}.get(layout)
    return x if axis is None else x.narrow(axis, 0, 1).expand_as(x).clone()


def arrange(x: Tensor, layout: str) -> Tensor:
    """x [b, t, n, d] laid out in memory as named, inside NaN where there is room between."""
    b, t, n, d = x.shape
    if layout in ("one_group", "one_row"):
        return x.narrow({"one_group": 2, "one_row": 0}[layout], 0, 1).contiguous().expand_as(x)
    if layout == "heads_first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "channels_first":
        return x.movedim(-1, 0).contiguous().movedim(0, -1)
    shapes = {
        "channel_slice": ((b, t, n, d + 8), (..., slice(3, 3 + d))),
        "surrounded": ((b + 1, t + 2, n + 1, d + 16), (slice(0, b), slice(1, t + 1), slice(1, n + 1), slice(8, 8 + d))),
        "every_other": ((b, 2 * t, n, d), (slice(None), slice(1, None, 2))),
        "fused": ((b, t, 2 * n + 1, d), (slice(None), slice(None), slice(n, 2 * n))),
    }
    if layout in shapes:
        shape, where = shapes[layout]
        return x.new_full(shape, math.nan)[where].copy_(x)
    if layout == "offset":
        return x.new_full((x.numel() + 1,), math.nan)[1:].view(x.shape).copy_(x)
    return x.contiguous()


def poison(x: Tensor, where: Tensor, kind: str, gen: torch.Generator) -> Tensor:
    """x with NaN, infinity or huge numbers in the rows `where` (bool, leading axes of x)."""
    values = POISONS[kind]
    if not values or not x.numel():
        return x
    numbers = torch.tensor(values, device=x.device, dtype=torch.float32)
    which = torch.randint(0, len(values), x.shape, generator=gen, device=x.device)
    return torch.where(where.view(*where.shape, *(1,) * (x.ndim - where.ndim)), numbers[which].to(x.dtype), x)


def bits(x: Tensor) -> Tensor:
    """The bits of x as ints, so that NaN equals itself."""
    types = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.detach().contiguous().view(types[x.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree bit by bit; NaNs of any kind agree."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    equal = bits(a) == bits(b)
    return bool((equal | (a.isnan() & b.isnan())).all() if a.is_floating_point() else equal.all())


def same_numbers(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree exactly, where 0 is -0 and NaN is NaN."""
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | (a.isnan() & b.isnan())).all())


def storage_bits(x: Tensor) -> Tensor:
    """A copy of all bytes of the memory that x lies in, to see that nothing was written."""
    storage = x.detach().untyped_storage()
    return torch.tensor([], dtype=torch.uint8, device=x.device).set_(storage).clone()


def ints(values: Sequence[int], device: Any) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int32, device=device)
