"""Which implementation an op runs on a device, and why."""

import json
import os
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from nsa_compile.custom_ops import flash

IMPLS = ("auto", "reference", "triton", "flash")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNEL_WIDTH = 256
HAS_TRITON = find_spec("triton") is not None
FLASH_OPS = ("compressed_attention", "window_attention")
"""Ops that flash-attn can run."""


class Choice(NamedTuple):
    """The implementation that runs and the reason in one phrase; for "flash" the version of flash-attn."""

    impl: str
    why: str
    flash_version: int = 0


class Threshold(NamedTuple):
    """From how many tokens on one version of flash-attn is faster than Triton; one entry of thresholds.json."""

    op: str
    direction: str
    """"forward" or "backward"."""
    gpu: str
    """Name of the device, as torch gives it."""
    version: int
    """Of flash-attn: 4 or 2."""
    d_k: int
    d_v: int
    tokens: int | None
    """None where flash-attn never won, or nothing was measured."""
    source: str
    """File of the measurement; empty where nothing was measured."""


def kernel_refusal(device: torch.device, dtype: torch.dtype, width: int) -> str:
    """Why the Triton kernels cannot run on such tensors; empty if they can."""
    if dtype not in KERNEL_DTYPES:
        return f"its Triton kernels take float32, bfloat16 and float16, not {dtype}"
    if width > KERNEL_WIDTH:
        return f"its Triton kernels take up to {KERNEL_WIDTH} channels, not {width}"
    if not HAS_TRITON:
        return "its Triton kernels need the package triton, which is not installed"
    if device.type == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device) if torch.cuda.is_available() else (8, 0)
        return (
            "" if major >= 8 else f"its Triton kernels need compute capability 8.0, and this device has {major}.{minor}"
        )
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    return f"its Triton kernels run on CUDA, and on the CPU with TRITON_INTERPRET=1, not on {device.type}"


def resolve_impl(
    op: str, impl: str, device: torch.device | str, dtype: torch.dtype = torch.float32, width: int = 0
) -> Choice:
    """The implementation of `op` that `impl` ("auto", "reference", "triton", "flash") means on `device`.

    "auto" takes the Triton kernels on CUDA and the reference elsewhere; and the reference for what no kernel takes:
    float64 and more than 256 channels (`width`). Whether "flash" takes the tensors at hand, and whether "auto" takes
    flash-attn for them, is up to `choose_attention`.

    Raises ValueError for an unknown name and for an explicit choice that cannot run, with the reason.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl: expected one of {', '.join(map(repr, IMPLS))}, got {impl!r}")
    device = torch.device(device)
    refusal = kernel_refusal(device, dtype, width)
    if impl == "flash":
        if op not in FLASH_OPS:
            raise ValueError(flash_error(op, device, f"flash-attn runs {' and '.join(FLASH_OPS)} only"))
        return Choice("flash", "asked for")
    if impl == "triton" and refusal:
        raise ValueError(f"impl: expected 'auto' or 'reference' for {op} on {device.type}, got 'triton': {refusal}")
    if impl != "auto":
        return Choice(impl, "asked for")
    if device.type == "cuda" and not refusal:
        return Choice("triton", "the fastest on CUDA")
    return Choice("reference", refusal or f"the default on {device.type}")


def flash_error(op: str, device: torch.device, reason: str) -> str:
    """The message for `impl="flash"` where it cannot run."""
    return f"impl: expected 'auto', 'reference' or 'triton' for {op} on {device.type}, got 'flash': {reason}"


def beside_flash(impl: str) -> str:
    """What `impl` means, in a whole layer, for the ops that flash-attn does not have: "auto" beside "flash"."""
    return "auto" if impl == "flash" else impl


def choose_attention(
    op: str, impl: str, q: Tensor, v: Tensor, *, q_start: Tensor | None, cu_seqlens: Tensor | None,
    backward: bool = False, grad_lse: Tensor | None = None, fold: int = 1,
) -> Choice:  # fmt: skip
    """The implementation that runs compressed or window attention of q [b, t, n, d_k], v [b, s, g, d_v].

    "auto" takes flash-attn from the number of tokens on from which it was measured to be faster on this GPU with heads
    of these widths, if it can run; never for packed rows (not measured), nor under
    `torch.use_deterministic_algorithms`. `fold` as in `flash.pick_version`.

    Raises ValueError as `resolve_impl` does.
    """
    choice = resolve_impl(op, impl, q.device, q.dtype, max(q.shape[-1], v.shape[-1]))
    if choice.impl == "flash":
        pick = flash.pick_version(q, v, q_start=q_start, backward=backward, grad_lse=grad_lse, fold=fold)
        if pick.why_not:
            raise ValueError(flash_error(op, q.device, pick.why_not))
        return choice._replace(flash_version=pick.version)
    if impl != "auto" or choice.impl != "triton" or q_start is not None or cu_seqlens is not None:
        return choice
    if torch.are_deterministic_algorithms_enabled():
        return choice
    for entry in thresholds_of(op, q.device):
        if (entry.d_k, entry.d_v) != (q.shape[-1], v.shape[-1]) or entry.tokens is None or q.shape[1] < entry.tokens:
            continue
        if entry.direction == ("backward" if backward else "forward"):
            pick = flash.pick_version(q, v, q_start=None, backward=backward, grad_lse=grad_lse, fold=fold)
            if pick.version == entry.version:
                return Choice("flash", f"faster from {entry.tokens} tokens on", pick.version)
    return choice


@cache
def thresholds() -> tuple[Threshold, ...]:
    """The measured thresholds that "auto" goes by, from thresholds.json."""
    entries = json.loads((Path(__file__).parent / "thresholds.json").read_text())
    return tuple(Threshold(**entry) for entry in entries)


def gpu_name(device: torch.device) -> str:
    """Name of a CUDA device; empty for others."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" and torch.cuda.is_available() else ""


def thresholds_of(op: str, device: torch.device) -> list[Threshold]:
    """The thresholds of an op for the GPU at hand."""
    entries = [entry for entry in thresholds() if entry.op == op]
    return [entry for entry in entries if entry.gpu == gpu_name(device)] if entries else []


def explain_thresholds(op: str, device: torch.device) -> str:
    """What "auto" does with flash-attn for an op on a CUDA device, in one phrase; empty where there is no question."""
    if op not in FLASH_OPS or device.type != "cuda":
        return ""
    entries = [entry for entry in thresholds_of(op, device) if entry.source]
    if not entries:
        return f"flash-attn not: no threshold measured on {gpu_name(device) or 'this GPU'}"
    return "; ".join(
        f"flash-attn {e.version} {'never' if e.tokens is None else f'from T = {e.tokens} on'} for the {e.direction} "
        f"with ({e.d_k}, {e.d_v}) channels ({e.source})"
        for e in entries
    )


def runs_triton(op: str, impl: str, *tensors: Tensor) -> bool:
    """Whether `op` runs its Triton kernels on these tensors; raises as `resolve_impl` does."""
    first, width = tensors[0], max(x.shape[-1] for x in tensors)
    return resolve_impl(op, impl, first.device, first.dtype, width).impl == "triton"
