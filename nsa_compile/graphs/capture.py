"""Work as one CUDA graph: run until nothing compiles or allocates any more, then captured."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch._dynamo.eval_frame import innermost_backend

WARM_UPS = 3


@contextmanager
def plain_tensors() -> Iterator[None]:
    """Neither gradients nor inference mode, whatever the caller is in: work compiles once for all, and what is made
    here may be written in any mode later.
    """
    with torch.inference_mode(False), torch.no_grad():
        yield


def prepare(
    work: Callable[[], None], model: nn.Module, device: torch.device, wanted: bool | None, pool: Any
) -> Callable[[], None]:
    """Run `work`, which calls the model, until nothing compiles any more; returns its replay as a CUDA graph.

    Where it cannot be captured (not on CUDA, or a model compiled to run in graphs of its own, as by
    `mode="reduce-overhead"`), and where it is not `wanted`, that is `work` itself. What it reads and writes must stay
    where it is. Graphs of one `new_pool` share memory for what lies between, so they must not run at the same time.

    Raises: ValueError where a capture is wanted and cannot be.
    """
    if not callable(model):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if wanted is not None and not isinstance(wanted, bool):
        raise TypeError(f"capture: expected None, True or False, got {wanted!r}")
    own = captures_itself(model)
    if wanted and (own or device.type != "cuda"):
        reason = "the model runs in CUDA graphs of its own" if own else f"the cache is on {device}"
        raise ValueError(f"capture: expected None or False ({reason}), got True")
    with plain_tensors():
        if device.type != "cuda" or own or wanted is False:
            work()
            return work
        with torch.cuda.device(device), autocast_without_cache():
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    work()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                work()
    return graph.replay


def autocast_without_cache() -> Any:
    """The autocast in force, but for casts that it keeps: a captured graph would read them after they are freed."""
    if not torch.is_autocast_enabled("cuda"):
        return nullcontext()
    return torch.autocast("cuda", dtype=torch.get_autocast_dtype("cuda"), cache_enabled=False)


def new_pool(device: torch.device) -> Any:
    """Memory for graphs that `prepare` makes on the device."""
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None


def captures_itself(model: nn.Module) -> bool:
    """Whether the model was compiled to run in CUDA graphs of its own."""
    compiled = getattr(model, "_compiled_call_impl", None) or model
    ask = getattr(compiled, "get_compiler_config", None)
    if ask is None:
        return False
    context = inspect.getclosurevars(ask).nonlocals["self"]  # what it answers leaves out fullgraph=True
    backend = innermost_backend(context.callback)
    options = backend.get_compiler_config() if hasattr(backend, "get_compiler_config") else {}
    return bool(options.get("triton.cudagraphs", False))
