"""How the ops take DTensors: sharded over rows, or over K/V groups together with their query heads.

Each op's tensors are written as axes, in the order of its schema: `inputs -> outputs`. Rows and groups never meet
inside an op, so every rank computes its own. What is sharded otherwise (over tokens, say) DTensor redistributes before
the op, as it does for its own ops, since a query needs the keys of all tokens. Without a rule it refuses an op:
decoding, what else writes to caches, and RoPE's angles, whose positions are plain tensors.
"""

import math
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from nsa_compile.custom_ops import block_choice, compression, gating, mixture, selection, window  # noqa: F401  (define the ops)

RULES = {
    "compress_mean": "b s g x, N -> b c g x",
    "compress_mean_backward": "b c g x, N -> b s g x",
    "compressed_attention": "b t n k, b c g k, b c g v, b, N -> b t n v, b t n",
    "compressed_attention_backward": (
        "b t n v, b t n, b t n v, b t n, b t n k, b c g k, b c g v, b, N -> b t n k, b c g k, b c g v"
    ),
    "select_blocks": "b t n k, b c g k, b t n, b, N -> b t g i",
    "selected_attention": "b t n k, b s g k, b s g v, b t g i, b, N -> b t n v, b t n",
    "selected_attention_backward": (
        "b t n v, b t n, b t n v, b t n, b t n k, b s g k, b s g v, b t g i, b, N -> b t n k, b s g k, b s g v"
    ),
    "window_attention": "b t n k, b s g k, b s g v, b, N -> b t n v, b t n",
    "window_attention_backward": (
        "b t n v, b t n, b t n v, b t n, b t n k, b s g k, b s g v, b, N -> b t n k, b s g k, b s g v"
    ),
    "selected_mixture": (
        "b t n k, b s g k, b s g v, b t g i, b t n v, b t n v, b t n c, b, N -> b t n v, b t n v, b t n"
    ),
    "selected_mixture_backward": (
        "b t n v, b t n v, b t n, b t n k, b s g k, b s g v, b t g i, b t n v, b t n v, b t n c, b, N "
        "-> b t n k, b s g k, b s g v, b t n v, b t n v, b t n c"
    ),
    "gated_sum": "b t n v, b t n v, b t n v, b t n c -> b t n v",
    "gated_sum_backward": "b t n v, b t n v, b t n v, b t n v, b t n c -> b t n v, b t n v, b t n v, b t n c",
}
SHARDED = ("b", "gn")
"""Axes that are sharded together: rows; K/V groups and their query heads."""


def acceptable_shardings(
    axes: list[list[str] | None], outputs: list[list[str]], arguments: tuple[Any, ...]
) -> list[tuple[list[Any], list[Any]]]:
    """Placements (outputs, arguments) over one mesh dimension; None, as `axes`, for arguments that are no tensors."""
    given = [(x, names) for x, names in zip(arguments, axes, strict=True) if names is not None and x is not None]
    ways = []
    for sharded in ("", *SHARDED):
        sizes = [size for x, names in given for size, axis in zip(x.shape, names, strict=True) if axis in sharded]
        if all(divides(given[0][0].mesh, size, min(sizes)) for size in sizes):
            tensors = [None if names is None or x is None else names for x, names in zip(arguments, axes, strict=True)]
            ways.append(([place(names, sharded) for names in outputs], [place(names, sharded) for names in tensors]))
    return ways


def place(names: list[str] | None, sharded: str) -> Placement | None:
    """Placement of a tensor with these axes, of which it has at most one in `sharded`; None for no tensor."""
    if names is None:
        return None
    return next((Shard(i) for i, axis in enumerate(names) if axis in sharded), Replicate())


def divides(mesh: DeviceMesh, size: int, smallest: int) -> bool:
    """Whether an axis has shards of one size over every dimension of a mesh, and over several where that can happen.

    It cannot where it would leave ranks without any of the `smallest` axis: DTensor skips such rules.
    """
    ranks = sorted(x for x in mesh.shape if x > 1)
    alone = len(ranks) < 2 or smallest < ranks[0] * ranks[1]
    return all(size % x == 0 for x in ranks) and (alone or size % math.prod(ranks) == 0)


def register_rules() -> None:
    """Give DTensor the rule of every op."""
    for name, rule in RULES.items():
        op = getattr(torch.ops.nsa_compile, name).default
        inputs, outputs = ([axes.split() for axes in side.split(",")] for side in rule.split(" -> "))
        tensors = iter(inputs)
        axes = [next(tensors) if "Tensor" in str(x.type) else None for x in op._schema.arguments]
        register_sharding(op)(lambda *arguments, axes=axes, out=outputs: acceptable_shardings(axes, out, arguments))


register_rules()
