"""Activation checkpointing: what the backward pass computes anew, block by block, in place of keeping it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

MODES = ("none", "matmuls", "selective", "full")
"""From most memory and least work to the reverse: "matmuls" keeps outputs of attention and of matrix products,
"selective" those of attention, "full" nothing but a block's input."""

ATTENTION = (
    "nsa_compile::compress_mean", "nsa_compile::compressed_attention", "nsa_compile::select_blocks",
    "nsa_compile::selected_attention", "nsa_compile::selected_mixture", "nsa_compile::window_attention",
    "nsa_compile::gated_sum", "aten::_scaled_dot_product_cudnn_attention", "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_fused_attention_overrideable",
)  # fmt: skip
MATMULS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")


def keep(names: tuple[str, ...], context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep the outputs of the ops of these names, whatever memory the compiler thinks they are worth."""
    return CheckpointPolicy.MUST_SAVE if op.name().split(".")[0] in names else CheckpointPolicy.PREFER_RECOMPUTE


def recomputing(function: Callable[..., Any], mode: str) -> Callable[..., Any]:
    """The function, of which the backward pass computes anew what `mode` says; compiles to one graph with it.

    Norms, RoPE, the elementwise parts of gates and MLPs, casts of weights and, with "selective", projections are cheap
    beside the memory of their outputs; attention is not. Raises ValueError for a mode that is none of `MODES`.
    """
    if mode not in MODES:
        raise ValueError(f"checkpointing: expected one of {', '.join(map(repr, MODES))}, got {mode!r}")
    if mode == "none":
        return function
    how: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # nothing draws random numbers
    if mode != "full":
        names = ATTENTION + (MATMULS if mode == "matmuls" else ())
        how["context_fn"] = partial(create_selective_checkpoint_contexts, partial(keep, names))

    def call(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(function, *args, **how, **kwargs) if torch.is_grad_enabled() else function(*args, **kwargs)

    return call


def wrap_forward(module: nn.Module, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put a function of the module's forward in its place; `unwrap_forward` takes it away."""
    module.forward = wrap(module.forward)


def unwrap_forward(module: nn.Module) -> None:
    """Give a module the forward of its class back."""
    vars(module).pop("forward", None)
