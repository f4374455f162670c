"""What `torch.library.custom_op` lacks: forward mode, double backward, `torch.func` and `vmap` of the ops.

By itself an op would have zero tangents, silently, and errors of torch's insides for the rest. Here

- the gradient is also that of `torch.func.grad`, `vjp` and `jacrev`, whatever implementation runs;
- forward mode and double backward are those of the reference, whose body is differentiable torch; kernels refuse them;
- `vmap` makes one call of it, its axis beside that of the rows, or a call per entry where rows are packed.

Errors are NotImplementedError, and name the op and what works instead.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch._library.autograd import make_autograd_impl
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from nsa_compile.custom_ops.dispatch import resolve_impl

REFERENCE = "use impl='reference' (on a CPU 'auto' is that), or the functions of nsa_compile.ops, which are plain torch"
INFERENCE = "a cache is for inference: call without one, or under torch.no_grad() without tangents"

Arguments = tuple[Any, ...]
LIBRARY = torch.library.Library("nsa_compile", "FRAGMENT")


def attach_autograd(
    op: Any, gradient: Callable[..., Any], save: Callable[..., None], *, fold: bool = True,
    forward_mode: Callable[..., Any] | None = None,
) -> None:  # fmt: skip
    """Make an op differentiable by `gradient(ctx, *grads)`, with what `save(ctx, inputs, output)` saved.

    `fold`: whether all of its tensors but `cu_seqlens` begin with the axis of rows. `forward_mode`: the op by
    operations that have derivatives; default its body, where its last argument `impl` means the reference.
    """
    op.register_autograd(gradient, setup_context=save)
    _register(op, forward_mode or _forward_mode(op))
    op.register_vmap(_batching_rule(op, fold))


def attach_double_backward(
    backward_op: Any, op: Any, split: Callable[[Arguments], tuple[tuple[int, ...], tuple[int, ...], Arguments]]
) -> None:
    """Make a backward op differentiable where it runs the reference: by that of its forward op.

    `split(args) -> (indices of the outputs' gradients, of the forward's arguments, the latter)` takes the backward op's
    arguments apart; an index is -1 for an argument of the forward that the backward has not.
    """

    def save(ctx, inputs, output):
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs))
        ctx.options = tuple(None if isinstance(x, Tensor) else x for x in inputs)

    def gradient(ctx, *cotangents):
        args = tuple(x if o is None else o for x, o in zip(ctx.saved_tensors, ctx.options, strict=True))
        if not _runs_reference(op, args):
            raise refusal(op, "double backward", REFERENCE)
        grads, places, forward = split(args)
        used = [i for i in grads if args[i] is not None]
        inputs = [i for i in places if i >= 0 and _is_float(args[i])]

        def run(*values):
            given = dict(zip(inputs, values, strict=True))
            outputs = op._init_fn(*(given.get(i, x) for i, x in zip(places, forward, strict=True)))
            several = outputs if isinstance(outputs, tuple) else (outputs,)
            return tuple(x for x, i in zip(several, grads, strict=False) if i in used)

        def derive(*values):
            pull = torch.func.vjp(run, *values[len(used) :])[1]
            return pull(values[: len(used)])

        pull = torch.func.vjp(derive, *(args[i] for i in (*used, *inputs)))[1]
        found = dict(zip((*used, *inputs), pull(cotangents), strict=True))
        return tuple(found.get(i) for i in range(len(args)))

    backward_op.register_autograd(gradient, setup_context=save)
    _register(backward_op, _forward_mode(backward_op))
    backward_op.register_vmap(_batching_rule(backward_op, True))


def refuse_transforms(op: Any) -> None:
    """Let an op of caches, which is for inference, refuse every kind of differentiation, and `vmap`."""
    ordinary = make_autograd_impl(op._opoverload, op)

    def kernel(keyset, *args):
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            raise refusal(op, "gradient", INFERENCE)
        if (torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0) and _has_tangent(args):
            raise refusal(op, "forward-mode AD", INFERENCE)
        return ordinary(keyset, *args)

    def batch(info, in_dims, *args):
        raise refusal(op, "vmap", "the rows of a cache are its batch: make it for as many, and call without vmap")

    _put(op, kernel)
    op.register_vmap(batch)


def pass_no_gradient(op: Any, *, fold: bool = True) -> None:
    """Let an op whose outputs are whole numbers, or follow from such, run under every transform."""

    def gradient(ctx, *grads):
        return (None,) * len(op._opoverload._schema.arguments)

    op.register_autograd(gradient)
    _register(op, None)
    op.register_vmap(_batching_rule(op, fold))


def _register(op: Any, forward_mode: Callable[..., Any] | None) -> None:
    """Put a kernel in the place of the op's own for autograd, which goes on to that where nothing special is asked."""
    overload = op._opoverload
    ordinary = make_autograd_impl(overload, op)
    keep = next((i for i, x in enumerate(overload._schema.arguments) if x.name == "keep"), None)

    def forward(ctx, keyset, *args):
        # a Function runs without either mode, which the levels below may want
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), torch._C._AutoDispatchBelowAutograd():
            output = overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)
        if op._setup_context_fn is not None:
            op._setup_context_fn(ctx, args, output)
        return output

    def backward(ctx, *grads):
        return None, *op._backward_fn(ctx, *grads)

    # one level of a stack of transforms; torch.autograd.Function would begin at the top of it again
    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    one_level: Any = type(f"{op._name}_level", (_SingleLevelFunction,), methods)

    def kernel(keyset, *args):
        transformed = torch._C._are_functorch_transforms_active()
        if forward_mode is not None and (transformed or forward_ad._current_level >= 0) and _has_tangent(args):
            return forward_mode(*args)
        if not transformed:
            return ordinary(keyset, *args)
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            with torch._C._AutoDispatchBelowAutograd():
                return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)
        if keep is not None:  # the caller may not have seen that a transform further out wants a gradient
            args = (*args[:keep], True, *args[keep + 1 :])
        with enable_single_level_autograd_function():
            return one_level.apply(keyset, *args)

    _put(op, kernel)


def _put(op: Any, kernel: Callable[..., Any]) -> None:
    """Let a kernel take the place of the op's own for autograd."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Warning only once for all operators")
        LIBRARY.impl(op._name, kernel, "Autograd", with_keyset=True, allow_override=True)


def _has_tangent(args: Arguments) -> bool:
    """Whether a tensor has a tangent of the level 0, the only one there is, also where a compiler replays a graph."""
    floats = (x for x in args if _is_float(x))
    return torch._C._is_fwd_grad_enabled() and any(
        forward_ad.unpack_dual(x, level=0).tangent is not None for x in floats
    )


def _forward_mode(op: Any) -> Callable[..., Any]:
    """The op's body where it runs the reference; else an error."""

    def run(*args: Any) -> Any:
        if not _runs_reference(op, args):
            raise refusal(op, "forward-mode AD", REFERENCE + ", or reverse mode (torch.func.vjp, backward)")
        return op._init_fn(*args)

    return run


def _runs_reference(op: Any, args: Arguments) -> bool:
    """Whether a call would run the reference, whose last argument is `impl`."""
    heads = [x for x in args if isinstance(x, Tensor) and x.ndim == 4 and x.is_floating_point()]
    first, width = heads[0], max(x.shape[-1] for x in heads)
    return resolve_impl(op._name, args[-1], first.device, first.dtype, width).impl == "reference"


def refusal(op: Any, what: str, instead: str) -> NotImplementedError:
    """The error of an op that a transform does not go through."""
    return NotImplementedError(f"{op._qualname}: expected no {what}, which it has not here, got one: {instead}")


def _is_float(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _batching_rule(op: Any, fold: bool) -> Callable[..., Any]:
    """The rule for `vmap`: the new axis beside that of the rows, or a call per entry where rows are packed."""
    names = [x.name for x in op._opoverload._schema.arguments]
    packing = names.index("cu_seqlens") if "cu_seqlens" in names else None

    def rule(info, in_dims, *args):
        n = info.batch_size
        args = tuple(x if dim is None else x.movedim(dim, 0) for x, dim in zip(args, in_dims, strict=True))
        if fold and (packing is None or args[packing] is None):
            rows = (
                (x if dim is not None else x.expand(n, *x.shape)).flatten(0, 1) if isinstance(x, Tensor) else x
                for x, dim in zip(args, in_dims, strict=True)
            )
            output = op._opoverload(*rows)
            several = isinstance(output, tuple)
            outputs = [x if x.ndim == 1 else x.unflatten(0, (n, -1)) for x in (output if several else (output,))]
            dims = [None if x.ndim == 1 else 0 for x in outputs]  # of one axis: an output that is not wanted
        else:
            calls = [
                op._opoverload(*(x if dim is None else x[i] for x, dim in zip(args, in_dims, strict=True)))
                for i in range(n)
            ]
            several = isinstance(calls[0], tuple)
            outputs = [torch.stack(x) for x in (zip(*calls, strict=True) if several else (calls,))]
            dims = [0] * len(outputs)
        return (tuple(outputs), tuple(dims)) if several else (outputs[0], dims[0])

    return rule
