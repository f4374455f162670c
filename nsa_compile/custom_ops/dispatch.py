"""Which implementation an op runs on a device, and why."""

import os
from typing import NamedTuple

import torch
from torch import Tensor

IMPLS = ("auto", "reference", "triton", "flash")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNEL_WIDTH = 256


class Choice(NamedTuple):
    """The implementation that runs and the reason in one phrase."""

    impl: str
    why: str


def kernel_refusal(device: torch.device, dtype: torch.dtype, width: int) -> str:
    """Why the Triton kernels cannot run on such tensors; empty if they can."""
    if dtype not in KERNEL_DTYPES:
        return f"its Triton kernels take float32, bfloat16 and float16, not {dtype}"
    if width > KERNEL_WIDTH:
        return f"its Triton kernels take up to {KERNEL_WIDTH} channels, not {width}"
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
    float64 and more than 256 channels (`width`).

    Raises ValueError for an unknown name and for an explicit choice that cannot run, with the reason.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl: expected one of {', '.join(map(repr, IMPLS))}, got {impl!r}")
    device = torch.device(device)
    refusal = kernel_refusal(device, dtype, width)
    if impl == "flash":
        raise ValueError(f"impl: expected 'auto', 'reference' or 'triton' for {op} on {device.type}, got 'flash'")
    if impl == "triton" and refusal:
        raise ValueError(f"impl: expected 'auto' or 'reference' for {op} on {device.type}, got 'triton': {refusal}")
    if impl != "auto":
        return Choice(impl, "asked for")
    if device.type == "cuda" and not refusal:
        return Choice("triton", "the fastest on CUDA")
    return Choice("reference", refusal or f"the default on {device.type}")


def runs_triton(op: str, impl: str, *tensors: Tensor) -> bool:
    """Whether `op` runs its Triton kernels on these tensors; raises as `resolve_impl` does."""
    first, width = tensors[0], max(x.shape[-1] for x in tensors)
    return resolve_impl(op, impl, first.device, first.dtype, width).impl == "triton"
