"""Mixed precision: weights in fp32, computation in bf16."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def computing_in(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Let a model's modules read their weights as `dtype`, and so compute in it; the weights keep their own type.

    Gradients and the optimizer's state are those of the weights as they are: fp32 master weights, of which a forward
    pass makes copies in bf16. This is what `fully_shard`'s `MixedPrecisionPolicy(param_dtype=dtype)` computes, without
    processes, and it compiles to one graph, whole or per block; `torch.autocast` would leave the residual stream and
    what is kept of it in fp32, and weights in bf16 with masters in the optimizer would sum gradients in bf16. Names,
    `state_dict` and `parameters()` are as before, and everything is at the end of the block.
    """
    classes: dict[tuple[type, tuple[str, ...]], type] = {}
    before = []
    for module in list(model.modules()):
        names = tuple(name for name, p in module.named_parameters(recurse=False) if p.dtype != dtype)
        if names:
            before.append((module, type(module)))
            key = (type(module), names)
            if key not in classes:
                classes[key] = type(key[0].__name__, key[:1], {name: cast_reader(name, dtype) for name in names})
            module.__class__ = classes[key]
    try:
        yield
    finally:
        for module, cls in before:
            module.__class__ = cls


def cast_reader(name: str, dtype: torch.dtype) -> property:
    """A property that reads the parameter `name` as `dtype`."""

    def read(self: nn.Module) -> Tensor:
        weight = self._parameters[name]
        assert weight is not None
        return weight.to(dtype)

    return property(read)
