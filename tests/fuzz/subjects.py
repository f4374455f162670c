"""Models with drawn sizes and weights, and how long rows may be where they run: what cache and model checks share."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

import draws
import torch
import torch._inductor.config
from torch import Tensor, nn

from nsa_compile import NSAConfig, NSALanguageModel

DTYPES = draws.DTYPES
CELLS = {"gpu": 1.5e7, "cpu": 3e5, "interpreter": 3e3}
"""Most cells of the dense masks of all rows and heads, by where a family runs."""


def draw_family(rng: random.Random, size: str) -> dict[str, Any]:
    """What kernels are compiled for: sizes, choices and type of a model.

    size: "gpu"; "cpu" for the reference; "interpreter" for kernels at tiny sizes, where each takes its time.
    """
    tiny = size == "interpreter"
    most = {"gpu": 160, "cpu": 48, "interpreter": 16}[size]
    l, d, l_sel = draws.blocks(
        rng, rng.choice({"gpu": (8, 32, 64, 128), "cpu": (4, 8, 24), "interpreter": (4, 8)}[size])
    )
    g = rng.choice((1, 1, 2, 2, 3, 4)) if not tiny else rng.choice((1, 2))
    h = rng.choice((1, 2, 3, 4, 5, 8, 16)) if g < 3 and not tiny else rng.choice((1, 2, 3, 4))
    sizes = {
        "dim": rng.choice((8, 24, 32, 48, 64)), "n_heads": g * h, "n_kv_groups": g,
        "d_k": 2 * (draws.width(rng, most) // 2), "d_v": draws.width(rng, most), "l": l, "d": d, "l_sel": l_sel,
        **draws.selection(rng, rng.choice((4, 6, 12)) if size == "gpu" else 5),
        "w": draws.log_uniform(rng, 1, {"gpu": 200, "cpu": 60, "interpreter": 12}[size]),
        "phi": rng.choice(("avg", "mlp")), "gate": rng.choice(("softmax", "sigmoid")),
        "gate_hidden": rng.choice((None, None, 1, 7)), "gate_temperature": rng.choice((1.0, 1.0, 0.25, 3.0)),
        "tie_kv": rng.random() < 0.3, "rope_theta": rng.choice((10000.0, 10000.0, 500.0, 1e6)),
        "n_layers": 1 if tiny else rng.randint(1, 2), "vocab_size": rng.choice((2, 17, 32, 61, 131)),
        "tie_embeddings": rng.random() < 0.3,
        "attention": "nsa" if tiny else draws.weighted(rng, {"nsa": 14, "dense": 1}),
    }  # fmt: skip
    types = {"fp32": 4, "fp16": 1.5} if tiny else {"fp32": 4, "fp16": 1.5, "bf16": 3, "fp64": 1.5}
    impls = {"gpu": {"auto": 9, "reference": 1}, "cpu": {"auto": 1}, "interpreter": {"triton": 1}}[size]
    return {
        "size": size, "sizes": sizes, "dtype": draws.weighted(rng, types),  # the interpreter's bf16 is wrong
        "impl": draws.weighted(rng, impls),
    }  # fmt: skip


def draw_length(family: Mapping[str, Any], rows: int, rng: random.Random) -> int:
    """Tokens of a row that is judged together with others, often at an edge of blocks, window or ring."""
    c = family["sizes"]
    units = (c["l"], c["d"], c["l_sel"], c["w"], c["w"] + 7, c["l_sel"] * c["n_sel"])
    most = max(4, min(700, int((CELLS[family["size"]] / (rows * c["n_heads"])) ** 0.5)))
    if c["l_sel"] * c["n_sel"] < most and rng.random() < 0.4:  # so that blocks are left out
        return rng.randint(c["l_sel"] * c["n_sel"], most)
    return draws.length(rng, units, most)


@lru_cache(maxsize=1)
def _build(family: str, device: str) -> NSALanguageModel:
    compiled.cache_clear()  # what was compiled for the family before
    torch._dynamo.reset()
    told = json.loads(family)
    config = NSAConfig(**told["sizes"], impl=told["impl"])
    return NSALanguageModel(config).to(device, DTYPES[told["dtype"]])


def build(family: Mapping[str, Any], device: str, seed: int, sharp: float) -> NSALanguageModel:
    """The model of a family with weights of a seed; the last family's is kept, and so is what was compiled for it."""
    model = _build(json.dumps(family, sort_keys=True), device)
    randomize(model, seed, sharp)
    return model.requires_grad_().train()


@lru_cache(maxsize=8)
def compiled(call: Callable[..., Any], backend: str) -> Callable[..., Any]:
    """`torch.compile` of a model or a method of one, made once, for any number of kinds of calls."""
    torch._dynamo.config.recompile_limit = 64
    torch._inductor.config.compile_threads = 1
    return torch.compile(call, fullgraph=True, backend=backend)


@torch.no_grad()
def randomize(module: nn.Module, seed: int, sharp: float) -> None:
    """Random weights everywhere, those that start at zero included; large `sharp` makes attention far from uniform."""
    for number, (name, weight) in enumerate(module.named_parameters()):
        width = weight[0].numel() if weight.ndim > 1 else 1
        scale = sharp if name.endswith("W_Q.weight") else 1.0
        new = torch.randn(weight.shape, generator=draws.generator(seed + number, "cpu"))
        weight.copy_(new * scale / width**0.5)


def draw_sharpness(family: Mapping[str, Any], rng: random.Random) -> float:
    """Of the queries' weights; 0 makes all scores equal, large ones let attention see one token."""
    return rng.choice((0.0, 1e-3, 1.0, 2.0, 3.0) if family["dtype"] in ("bf16", "fp16") else (0.0, 1e-3, 1.0, 3.0, 9.0))


def draw_ids(t: int, family: Mapping[str, Any], alphabet: int, gen: torch.Generator) -> Tensor:
    """t ids of the first `alphabet` ones of the vocabulary, on the CPU."""
    return torch.randint(min(alphabet, family["sizes"]["vocab_size"]), (t,), generator=gen)


def draw_alphabet(rng: random.Random) -> int:
    """Different ids in a text: one or two make keys that differ in nothing but their position."""
    return rng.choice((1, 2, 10**6, 10**6, 10**6))


seeded = partial(draws.generator, device="cpu")
