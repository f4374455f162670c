"""Forward mode, double backward, torch.func and vmap through every op, through the layer and through models."""

import pytest
import torch
from models import draw_ids, make_layer, make_model
from test_custom_ops import L_SEL, N_SEL, PLACEMENTS, D, L, W, choose, make_inputs
from torch import func
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from nsa_compile import NSACache, compress_mean, compressed_attention, gated_sum, nsa_attention, window_attention
from nsa_compile.custom_ops.cross_entropy import linear_cross_entropy
from nsa_compile.custom_ops.mixture import selected_mixture
from nsa_compile.custom_ops.selection import selected_attention

OPS = torch.ops.nsa_compile


def visible_lse(o, lse):
    """The outputs, with 0 for the LSE of queries that see nothing, whose differences are NaN."""
    return o, lse.masked_fill(lse == float("-inf"), 0.0)


def make_calls(placement: str, impl: str = "auto", dtype=torch.float64) -> dict:
    """Each differentiable function with the tensors it is differentiated in, by the name of its op."""
    q, k, v, k_cmp, v_cmp, gates, q_start, cu = make_inputs(
        placement, t=13 if placement == "packed" else 9, g=1, dtype=dtype
    )
    where = {"q_start": q_start, "cu_seqlens": cu}
    blocks = choose(q, k_cmp, v_cmp, q_start, cu)
    o = [torch.randn(*q.shape[:3], v.shape[-1], dtype=dtype, requires_grad=True) for _ in range(3)]
    where["impl"] = impl
    return {
        "compress_mean": (lambda k: compress_mean(k, l=L, d=D, cu_seqlens=cu, impl=impl), (k,)),
        "compressed_attention": (
            lambda q, k, v: visible_lse(*compressed_attention(q, k, v, l=L, d=D, **where)),
            (q, k_cmp, v_cmp),
        ),
        "selected_attention": (
            lambda q, k, v: visible_lse(*selected_attention(q, k, v, blocks, l_sel=L_SEL, **where)),
            (q, k, v),
        ),
        "window_attention": (lambda q, k, v: visible_lse(*window_attention(q, k, v, w=W, **where)), (q, k, v)),
        "selected_mixture": (
            lambda *x: selected_mixture(*x[:3], blocks, *x[3:], l_sel=L_SEL, **where),
            (q, k, v, o[0], o[2], gates),
        ),
        "gated_sum": (lambda *x: gated_sum(*x, impl=impl), (*o, gates)),
    }


NAMES = list(make_calls("plain"))


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", NAMES)
def test_every_derivative_of_the_reference(name, placement):
    call, inputs = make_calls(placement)[name]
    gradcheck(
        call, inputs, fast_mode=True, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    gradgradcheck(
        call, inputs, fast_mode=True, check_fwd_over_rev=True, check_rev_over_rev=True, check_batched_grad=True
    )


def test_every_derivative_of_the_loss():
    x, weight = torch.randn(9, 4, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
    target = torch.tensor([0, 3, -100, 6, 5, -100, 2, 2, 1])
    inputs = x.requires_grad_(), weight.requires_grad_()
    gradcheck(
        lambda x, weight: linear_cross_entropy(x, weight, target, chunk=4), inputs,
        check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True,
    )  # fmt: skip
    loss = lambda x: linear_cross_entropy(x, weight.detach(), target)  # noqa: E731
    dense = lambda x: torch.nn.functional.cross_entropy(x @ weight.detach().T, target, reduction="sum")  # noqa: E731
    torch.testing.assert_close(func.hessian(loss)(x.detach()), func.hessian(dense)(x.detach()))
    gradgradcheck(lambda x, weight: linear_cross_entropy(x, weight, target), inputs, check_fwd_over_rev=True)


def flat(outputs) -> tuple:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def directional(call, inputs):
    """The tangents of a function in the direction (1, 1, ...)."""
    return flat(func.jvp(call, inputs, tuple(torch.ones_like(x) for x in inputs))[1])


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_torch_func_are_those_of_backward(name, placement, impl):
    call, inputs = make_calls(placement, impl, torch.float32)[name]
    weights = [torch.randn_like(x) for x in flat(call(*inputs))]

    def value(*inputs):
        return sum((x * weight).sum() for x, weight in zip(flat(call(*inputs)), weights, strict=True))

    expected = torch.autograd.grad(value(*inputs), inputs)
    got = func.grad(value, argnums=tuple(range(len(inputs))))(*(x.detach() for x in inputs))
    for x, y in zip(expected, got, strict=True):
        assert y.abs().max() > 0 and torch.equal(x, y)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", NAMES)
def test_forward_mode_and_double_backward_of_kernels_are_refused_by_name(name, placement):
    call, inputs = make_calls(placement, "triton", torch.float32)[name]
    forward = rf"nsa_compile::{name}: expected no forward-mode AD.*impl='reference'.*torch\.func\.vjp"
    with pytest.raises(NotImplementedError, match=forward):
        directional(call, inputs)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=forward):
        call(forward_ad.make_dual(inputs[0].detach(), torch.ones_like(inputs[0])), *inputs[1:])
    first = torch.autograd.grad(sum(x.square().sum() for x in flat(call(*inputs))), inputs, create_graph=True)
    if name == "compress_mean":  # linear: its gradient is an op of the kind again
        (second,) = torch.autograd.grad(first[0].sum(), inputs)
        assert second.abs().max() > 0
        return
    with pytest.raises(
        NotImplementedError, match=rf"{name}(_backward)?: expected no double backward.*impl='reference'"
    ):
        torch.autograd.grad(sum(x.sum() for x in first), inputs)


@pytest.mark.parametrize(
    ("name", "placement", "impl"),
    [(name, placement, "reference") for name in NAMES for placement in PLACEMENTS]
    + [(name, "plain", "triton") for name in ("compress_mean", "window_attention", "gated_sum")],
)
def test_vmap_and_per_sample_gradients_are_those_of_a_loop(name, placement, impl):
    call, inputs = make_calls(placement, impl, torch.float32)[name]
    inputs = [x.detach() for x in inputs]
    batched = [torch.stack((x, 2 * x), dim=1) if i % 2 == 0 else x for i, x in enumerate(inputs)]
    in_dims = tuple(1 if i % 2 == 0 else None for i in range(len(inputs)))
    entries = [[x[:, j] if i % 2 == 0 else x for i, x in enumerate(batched)] for j in range(2)]

    def value(*inputs):
        return sum(x.square().sum() for x in flat(call(*inputs)))

    every = tuple(range(len(inputs)))
    for function in (call, func.grad(value, argnums=every)):
        got = flat(func.vmap(function, in_dims=in_dims)(*batched))
        expected = zip(*(flat(function(*entry)) for entry in entries), strict=True)
        for x, rows in zip(got, expected, strict=True):
            torch.testing.assert_close(x, torch.stack(rows), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_second_derivatives_by_every_order_of_modes(placement):
    """A mode within another loses nothing: the silent case."""
    q, k, v, k_cmp, v_cmp, gates, q_start, cu = (
        x.detach() if isinstance(x, torch.Tensor) else x
        for x in make_inputs(placement, t=11 if placement == "packed" else 5, g=1, h=1)
    )
    sizes = {"l": L, "d": D, "l_sel": L_SEL, "n_sel": N_SEL, "w": W, "q_start": q_start, "cu_seqlens": cu}
    names = [(a, b) for a in (func.jacfwd, func.jacrev) for b in (func.jacfwd, func.jacrev)]

    def value(s):
        return nsa_attention(q * s, k_cmp, v_cmp * s, k * s, v, k, v * s, gates * s, **sizes).square().sum()

    at, step = torch.ones((), dtype=torch.float64), 1e-3
    expected = (value(at + step) - 2 * value(at) + value(at - step)) / step**2
    assert expected.abs() > 1
    for outer, inner in names:
        torch.testing.assert_close(outer(inner(value))(at), expected, rtol=1e-5, atol=0)


CHOICES = [{}, {"phi": "mlp", "gate": "sigmoid", "tie_kv": True}]


class Loss(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, lengths=None):
        return self.model.loss(ids, lengths=lengths)


@pytest.mark.parametrize("choice", CHOICES, ids=["default", "other"])
def test_models_under_torch_func(choice):
    model = Loss(make_model(**choice))
    weights = {name: x.detach() for name, x in model.named_parameters()}
    ids, lengths = draw_ids(2, 1, 40), torch.tensor([[40], [23]], dtype=torch.int32)

    def loss(weights, ids, lengths):
        return func.functional_call(model, weights, (ids, lengths))

    per_sample = func.vmap(func.grad(loss), in_dims=(None, 0, 0))(weights, ids, lengths)
    tangents = {name: torch.randn_like(x) for name, x in weights.items()}
    for row in range(2):
        model.zero_grad()
        model(ids[row], lengths[row]).backward()
        for name, weight in model.named_parameters():
            torch.testing.assert_close(per_sample[name][row], weight.grad)
        _, tangent = func.jvp(lambda x: loss(x, ids[row], lengths[row]), (weights,), (tangents,))  # noqa: B023
        along = sum((weight.grad * tangents[name]).sum() for name, weight in model.named_parameters())
        torch.testing.assert_close(tangent, along)
        with forward_ad.dual_level():
            dual = {name: forward_ad.make_dual(x, tangents[name]) for name, x in weights.items()}
            torch.testing.assert_close(forward_ad.unpack_dual(loss(dual, ids[row], lengths[row])).tangent, along)


def test_caches_refuse_every_transform():
    layer, x = make_layer(), torch.randn(2, 3, 20, dtype=torch.float64)
    with torch.no_grad():
        cache = NSACache.for_model(layer, 2, 16)
        before = [tensor.clone() for tensor in cache.tensors()]
        with pytest.raises(NotImplementedError, match=r"nsa_compile::cache_recall: expected no forward-mode AD.*cache"):
            func.jvp(lambda x: layer(x, cache=cache), (x,), (torch.ones_like(x),))
        with pytest.raises(NotImplementedError, match=r"nsa_compile::cache_recall: expected no vmap.*rows"):
            func.vmap(lambda x: layer(x, cache=cache))(torch.stack((x, x)))
    with pytest.raises(ValueError, match="cache: expected a call without gradients"):
        func.grad(lambda x: layer(x, cache=cache).sum())(x)
    assert all(torch.equal(x, y) for x, y in zip(before, cache.tensors(), strict=True))
    buffer, positions = torch.randn(2, 9, 2, 4), torch.zeros(2, dtype=torch.int32)
    new = torch.randn(2, 3, 2, 4, requires_grad=True)
    calls = {
        "cache_append": lambda new: OPS.cache_append(buffer, new, positions, None, False),
        "cache_write": lambda new: OPS.cache_write(buffer, new, positions[:, None], positions[:, None] == 0),
        "cache_recall": lambda new: OPS.cache_recall(buffer, new, positions, positions, 4),
        "decode_attention": lambda new: OPS.decode_attention(
            *(new,) * 5, *(None,) * 4, new, None, positions, *(buffer,) * 8, None, None, 4, 2, 4, 4, 4, 1, 1, 1e4, 0.5
        ),
    }
    for name, call in calls.items():
        with pytest.raises(NotImplementedError, match=f"nsa_compile::{name}: expected no forward-mode AD"):
            func.jvp(call, (new.detach(),), (torch.ones_like(new),))
        with pytest.raises(NotImplementedError, match=f"nsa_compile::{name}: expected no vmap"):
            func.vmap(call)(torch.stack((new, new)))
        with pytest.raises(NotImplementedError, match=f"nsa_compile::{name}: expected no gradient"):
            call(new)
        with pytest.raises(NotImplementedError, match=f"nsa_compile::{name}: expected no gradient"):
            func.vjp(call, new.detach())
    tested = {*calls, *NAMES, "linear_cross_entropy", "select_blocks", "rope_turns"}
    names = {x.split("::")[1] for x in torch._C._dispatch_get_all_op_names() if x.startswith("nsa_compile::")}
    assert {name.removesuffix("_backward") for name in names} == tested


def test_choices_and_positions_go_through_every_transform():
    q, _, _, k_cmp, v_cmp, *_ = make_inputs("plain")
    _, lse = compressed_attention(q, k_cmp, v_cmp, l=L, d=D)

    def call(q):
        return OPS.select_blocks(q, k_cmp, lse, L, D, L_SEL, N_SEL, 1, 2, None, None, 0.5, "auto")

    expected = call(q)
    assert torch.equal(func.jvp(call, (q.detach(),), (q.detach(),))[0], expected)
    assert torch.equal(func.vjp(lambda q: q * call(q).sum(), q.detach())[0], q * expected.sum())
    assert torch.equal(func.vmap(call)(torch.stack((q, q)))[1], expected)
    positions = torch.stack((torch.arange(3), torch.arange(3) + 5))
    cos, _ = func.vmap(lambda x: OPS.rope_turns(x, 3, 1e4, False))(positions)
    assert torch.equal(cos, OPS.rope_turns(positions, 3, 1e4, False)[0])


def test_compiled_transforms():
    torch._dynamo.reset()
    q, k, v = (torch.randn(1, 9, n, 4) for n in (4, 2, 2))

    def value(q):
        return window_attention(q, k, v, w=W)[0].square().sum()

    for transform in (func.grad(value), lambda q: func.jvp(value, (q,), (q,))[1]):
        expected = transform(q)
        got = torch.compile(transform, fullgraph=True, backend="aot_eager")(q)
        assert expected.abs().max() > 0
        torch.testing.assert_close(got, expected)
