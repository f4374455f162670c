"""The kernels of the package, how often a test launches them and, interpreted, whether they stay in their memory."""

from __future__ import annotations

import importlib
import pkgutil
from collections import Counter
from collections.abc import Iterable

import numpy as np
import pytest
from torch import Tensor
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from nsa_compile.custom_ops import kernels


def find_kernels(*, gluon: bool = False) -> set[str]:
    """Names "file.kernel" of all Triton functions that are launched: those whose name ends in _kernel.

    Those in Gluon are among them only where `gluon`.
    """
    kinds: tuple[type, ...] = (JITFunction, InterpretedFunction, *([GluonJITFunction] if gluon else []))
    found = set()
    for module in pkgutil.iter_modules(kernels.__path__):
        members = vars(importlib.import_module(f"{kernels.__name__}.{module.name}")).values()
        found |= {kernel_name(x) for x in members if type(x) in kinds}
    return {name for name in found if name.endswith("_kernel")}


def kernel_name(kernel: JITFunction | InterpretedFunction) -> str:
    """Name of a Triton function as "file.kernel"."""
    return f"{kernel.fn.__module__.split('.')[-1]}.{kernel.fn.__name__}"


def memory_of(arguments: Iterable[object]) -> tuple[np.ndarray, np.ndarray]:
    """Address ranges [start, end) of the tensors among a kernel's arguments, in ascending order."""
    tensors = [x.base if isinstance(x, TensorDescriptor) else x for x in arguments]
    tensors = [x for x in tensors if isinstance(x, Tensor) and x.numel()]
    last = [sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) for x in tensors]
    start = np.array([x.data_ptr() for x in tensors], np.uint64)
    end = np.array([x.data_ptr() + (i + 1) * x.element_size() for x, i in zip(tensors, last, strict=True)], np.uint64)
    order = np.argsort(start)
    return start[order], np.maximum.accumulate(end[order])


class Launches(Counter[str]):
    """Launches by "file.kernel"."""

    def of(self, *files: str) -> int:
        """Launches of the kernels of some files."""
        return sum(count for name, count in self.items() if name.split(".")[0] in files)


def watch(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """Count launches from now on; interpreted kernels may only touch memory of the tensors they are given."""
    launches = Launches()
    memory = [memory_of([])]

    def counted(original):
        def run(kernel, *args, **kwargs):
            launches[kernel_name(kernel)] += 1
            memory[0] = memory_of((*args, *kwargs.values()))
            return original(kernel, *args, **kwargs)

        return run

    def guarded(original, pointers: int, mask: int):
        def access(builder, *args, **options):
            start, end = memory[0]
            used = args[pointers].data[np.broadcast_to(args[mask].data, args[pointers].data.shape).astype(bool)]
            owner = np.searchsorted(start, used, side="right").astype(np.int64) - 1
            assert (owner >= 0).all() and (used < end[owner]).all(), "a kernel left the memory of its arguments"
            return original(builder, *args, **options)

        return access

    for kind in (JITFunction, InterpretedFunction):
        monkeypatch.setattr(kind, "run", counted(kind.run))
    for name, *places in (("create_masked_load", 0, 1), ("create_masked_store", 0, 2), ("create_atomic_rmw", 1, 3)):
        monkeypatch.setattr(InterpreterBuilder, name, guarded(getattr(InterpreterBuilder, name), *places))
    return launches
