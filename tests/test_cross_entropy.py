"""The cross-entropy of a linear head: equal to torch's, never the logits of all tokens, one graph."""

import pytest
import torch
from models import draw_ids, make_model
from torch.utils._python_dispatch import TorchDispatchMode

from nsa_compile.custom_ops.cross_entropy import linear_cross_entropy


def draw(dtype=torch.float64, n=23, dim=6, vocab=11):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(m, dim, generator=generator, dtype=torch.float64).to(dtype) for m in (n, vocab))
    target = torch.randint(vocab, (n,), generator=generator)
    target[::5] = -100
    return x.requires_grad_(), weight.requires_grad_(), target


def plain(x, weight, target):
    logits = (x @ weight.mT).to(torch.promote_types(x.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(logits, target, reduction="sum")


@pytest.mark.parametrize("chunk", [1, 5, 23, 100, None])
def test_loss_and_gradients_are_those_of_torch(chunk):
    x, weight, target = draw()
    loss, expected = linear_cross_entropy(x, weight, target, chunk=chunk), plain(x, weight, target)
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    gradients = (torch.autograd.grad(3 * y, (x, weight)) for y in (loss, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def test_bf16_is_as_near_to_fp64_as_torch_is():
    x, weight, target = draw(torch.bfloat16, n=300, dim=64, vocab=50)
    exact = [y.detach().double().requires_grad_() for y in (x, weight)]
    expected = torch.autograd.grad(plain(*exact, target), exact)
    ours = torch.autograd.grad(linear_cross_entropy(x, weight, target, chunk=40), (x, weight))
    theirs = torch.autograd.grad(plain(x, weight, target), (x, weight))
    for a, b, c in zip(ours, theirs, expected, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a - c).abs().max() <= 2 * (b - c).abs().max() + 1e-6


def test_no_target_gives_no_loss_and_no_gradient():
    x, weight, target = draw()
    loss = linear_cross_entropy(x, weight, torch.full_like(target, -100))
    assert loss == 0 and not any(grad.any() for grad in torch.autograd.grad(loss, (x, weight)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_tokens_without_a_target_hold_reaches_nothing(value):
    x, weight, target = draw()
    expected = linear_cross_entropy(x, weight, target, chunk=5)
    hurt = torch.where(target[:, None] < 0, value, x.detach()).requires_grad_()
    loss = linear_cross_entropy(hurt, weight, target, chunk=5)
    assert torch.equal(loss, expected)
    gradients = torch.autograd.grad(loss, (hurt, weight)), torch.autograd.grad(expected, (x, weight))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_nan_of_a_token_leaves_the_gradients_of_others_alone():
    x, weight, target = draw()
    (expected,) = torch.autograd.grad(linear_cross_entropy(x, weight, target, chunk=5), x)
    hurt = x.detach().clone()
    hurt[7] = torch.nan
    loss = linear_cross_entropy(hurt.requires_grad_(), weight, target, chunk=5)
    (grad,) = torch.autograd.grad(loss, hurt)
    others = torch.arange(len(x)) != 7
    assert loss.isnan() and grad[7].isnan().all() and torch.equal(grad[others], expected[others])


def test_without_gradients_none_are_computed():
    x, weight, target = draw()
    with torch.no_grad():
        _, *gradients = torch.ops.nsa_compile.linear_cross_entropy(x, weight, target, 5, False)
        assert [grad.shape for grad in gradients] == [(0,), (0,)]
        assert linear_cross_entropy(x, weight, target) == plain(x, weight, target)


def test_bad_targets_are_refused():
    x, weight, target = draw()
    for bad in (target.int(), target[:-1]):
        with pytest.raises(ValueError, match="target: expected int64"):
            linear_cross_entropy(x, weight, bad)
    with pytest.raises(ValueError, match="target: expected values below 11, got 11"):
        linear_cross_entropy(x, weight, target.clamp_min(11))
    with pytest.raises(TypeError, match="target: expected"):
        linear_cross_entropy(x, weight, None)
    with pytest.raises(ValueError, match="chunk: expected"):
        linear_cross_entropy(x, weight, target, chunk=0)


def test_the_op_is_registered_as_it_behaves():
    op, inputs = torch.ops.nsa_compile.linear_cross_entropy.default, draw(torch.float32)
    torch.library.opcheck(op, (*inputs, 7, True))
    torch.library.opcheck(op, (*(x.detach() for x in inputs), 7, False))


class Largest(TorchDispatchMode):
    """The most elements that any tensor has that an operation makes, below our ops too."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            self.elements = max(self.elements, x.numel() if isinstance(x, torch.Tensor) else 0)
        return out


def test_the_logits_of_all_tokens_are_never_there():
    x, weight, target = draw(torch.float32, n=256, dim=4, vocab=64)
    with Largest() as seen:
        linear_cross_entropy(x, weight, target, chunk=8).backward()
    assert seen.elements <= 1024  # x; a chunk's logits are 512, all of them 16384
    with Largest() as seen:
        plain(x, weight, target).backward()
    assert seen.elements == 16384


@pytest.mark.parametrize("rows", ["plain", "packed", "lengths"])
def test_a_models_loss_is_one_graph(rows):
    torch.compiler.reset()
    model = make_model(torch.float32, n_layers=1)
    ids, where = draw_ids(2, 12), {}
    if rows == "packed":
        ids, where = draw_ids(1, 24), {"cu_seqlens": torch.tensor([0, 5, 20], dtype=torch.int32)}
    if rows == "lengths":
        where = {"lengths": torch.tensor([12, 7], dtype=torch.int32)}
    weights = list(model.parameters())
    compiled = torch.compile(model.loss, fullgraph=True, dynamic=False, backend="aot_eager")(ids, **where)
    eager = model.loss(ids, **where)
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)
    gradients = (torch.autograd.grad(loss, weights, allow_unused=True) for loss in (compiled, eager))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
