"""Small layers and models with random weights that the tests of layer, cache and graphs share."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nsa_compile import NSAAttention, NSAConfig, NSALanguageModel
from nsa_compile.terminal import cpp_compiler

needs_compiler = pytest.mark.skipif(cpp_compiler() is None, reason="torch.compile needs a C++ compiler on a CPU")

LAYER = {
    "dim": 20, "n_heads": 6, "n_kv_groups": 2, "d_k": 6, "d_v": 4, "l": 4, "d": 2, "l_sel": 6, "n_sel": 4, "w": 7,
}  # fmt: skip
MODEL = {**LAYER, "vocab_size": 31, "n_layers": 2}
CHOICES = [
    {"phi": phi, "gate": gate, "tie_kv": tie}
    for phi in ("avg", "mlp") for gate in ("softmax", "sigmoid") for tie in (False, True)
]  # fmt: skip


def choice_id(choice: dict) -> str:
    return f"{choice['phi']}-{choice['gate']}-{'tied' if choice['tie_kv'] else 'separate'}"


def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights everywhere, those that start at zero included, and queries far from uniform attention."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            width = weight.shape[-1] if weight.ndim > 1 else 1
            scale = 3.0 if name.endswith("W_Q.weight") else 1.0
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64) * scale / width**0.5)
    return module


def make_layer(dtype: torch.dtype = torch.float64, **changes) -> NSAAttention:
    return randomize(NSAAttention(**LAYER | changes).to(dtype))


def make_model(dtype: torch.dtype = torch.float64, **changes) -> NSALanguageModel:
    return randomize(NSALanguageModel(NSAConfig(**MODEL | changes)).to(dtype))


def draw_ids(*size: int, seed: int = 0, vocab: int = MODEL["vocab_size"]) -> torch.Tensor:
    return torch.randint(vocab, size, generator=torch.Generator().manual_seed(seed))
