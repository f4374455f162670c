"""What a row, a sequence or the future holds stays there: NaN and infinity change nothing that must not see them.

Of a result with one input poisoned, what belongs to other rows and sequences, and outputs and dq of earlier tokens, is
what it is without; on the reference and on the kernels, on a CUDA device if there is one, else in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import draw, int32
from launches import Launches, watch
from poisons import (
    BRANCHES,
    DEVICE,
    INF,
    LAYOUTS,
    NAN,
    SMALL,
    SMALL_LAYOUTS,
    Branch,
    Poison,
    Setup,
    assert_same,
    check_isolation,
    draw_arguments,
    is_interpreted,
    paper,
    poisoned,
)
from torch import Tensor

from nsa_compile import NSAAttention, NSACache, compressed_attention, select_blocks

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def launches(monkeypatch) -> Launches:
    return watch(monkeypatch)


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """Sums in one order, so that kernels can be held to the same bits."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


SETUPS = {
    "reference": Setup("reference", torch.float64, SMALL, SMALL_LAYOUTS),
    "kernels": Setup("triton", torch.float32, SMALL, {x: SMALL_LAYOUTS[x] for x in ("packed", "buffer")}),
}
GPU_SETUPS = {
    f"{h}x{d_k}x{d_v}-{str(dtype)[6:]}": Setup("triton", dtype, paper(h, d_k, d_v), LAYOUTS)
    for h, d_k, d_v, dtype in (
        (16, 128, 128, torch.bfloat16), (16, 64, 64, torch.float16), (16, 192, 128, torch.bfloat16),
        (4, 128, 128, torch.bfloat16), (1, 64, 128, torch.float16), (3, 128, 128, torch.bfloat16),
        (16, 128, 128, torch.float32),
    )
}  # fmt: skip

gpu = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))
CASES = [
    pytest.param(setup, layout, id=f"{name}-{place}", marks=gpu if name in GPU_SETUPS else ())
    for name, setup in (SETUPS | GPU_SETUPS).items()
    for place, layout in setup.layouts.items()
]


@pytest.mark.parametrize("setup, layout", CASES)
@pytest.mark.parametrize("branch", BRANCHES.values(), ids=BRANCHES)
def test_poison_stays_where_it_may_be(branch, setup, layout, launches):
    if branch is BRANCHES["compress_mean"] and layout.q_start:
        pytest.skip("compress_mean takes no q_start")
    if branch is BRANCHES["selected_mixture"] and is_interpreted(setup.impl) and layout.cu_seqlens:
        pytest.skip("its kernels are those of selected_attention and gated_sum")
    check_isolation(branch, setup, layout)
    assert (launches.of(*branch.files) > 0) == (setup.impl == "triton")


@pytest.mark.parametrize("setup, layout", CASES)
def test_choice_of_other_sequences_and_earlier_queries_stays(setup, layout, launches):
    branch = Branch({"q": "query", "k_cmp": "slot", "v_cmp": "slot"}, {"lse": "query"}, lambda *_: (), ())
    arguments = draw_arguments(branch, setup, layout)
    how: dict[str, Any] = {**layout.where, "impl": setup.impl}
    _, arguments["lse"] = compressed_attention(
        *(arguments[x] for x in ("q", "k_cmp", "v_cmp")), **setup.shape.compression, **how
    )

    def choose(arguments: dict[str, Tensor]) -> Tensor:
        return select_blocks(*(arguments[x] for x in ("q", "k_cmp", "lse")), **setup.shape.choice, **how)

    clean, (sequence, position) = choose(arguments), layout.places("query", setup.shape)
    last = len(layout.cu_seqlens) - 2 if layout.cu_seqlens else layout.b - 1
    for name in ("q", "k_cmp", "lse"):
        poisons = ((NAN, 0, True), (INF, last, False), (NAN, last, False), (-INF, 0, False))
        for value, poisoned_sequence, whole in poisons[: 2 if is_interpreted(setup.impl) else 4]:
            poison = Poison(name, value, poisoned_sequence, whole)
            changed = poisoned(branch, setup, layout, arguments, poison)
            if changed is not None:
                kept = (sequence != poisoned_sequence) | (position < changed[1])
                assert torch.equal(choose(changed[0])[kept], clean[kept]), poison
    assert (launches.of("block_choice") > 0) == (setup.impl == "triton")


@pytest.mark.parametrize("phi", ["avg", "mlp"])
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_packed_sequences_and_rows_of_a_layer(impl, phi):
    """NaN in the input or the gradient of one sequence leaves the others' outputs and gradients alone."""
    interpreted = is_interpreted(impl)
    if interpreted and phi == "mlp":
        pytest.skip("the kernels are the same")
    torch.manual_seed(0)
    layer = NSAAttention(24, 4, 2, 12, 10, 4, 2, 8, 3, 9, phi=phi, impl=impl).to(DEVICE)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    packed, lengths = {"cu_seqlens": int32(0, 13, 16, 29).to(DEVICE)}, {"lengths": int32(17, 23).to(DEVICE)}
    sequence = torch.tensor([[0] * 13 + [1] * 3 + [2] * 13 + [-1] * 3], device=DEVICE)
    layouts = ((packed, sequence), (lengths, torch.tensor([[0] * 25, [1] * 25], device=DEVICE)))
    for where, ids in layouts[: 1 if interpreted else 2]:
        x, grad = (draw(*ids.shape, 24, seed=i, dtype=torch.float32).to(DEVICE) for i in range(2))

        def differentiate(x, grad, where=where):
            x = x.clone().requires_grad_()
            y = layer(x, **where)
            return y.detach(), *torch.autograd.grad(y, x, grad)

        clean = differentiate(x, grad)
        for value, poison in [(NAN, 0), (INF, 1), (-INF, 0), (NAN, 1)][: 1 if interpreted else 4]:
            mine = ids == poison
            hurt = torch.where(mine[..., None], value, x)
            outputs = [differentiate(hurt, grad), differentiate(x, torch.where(mine[..., None], value, grad))]
            for got in outputs:
                for a, e in zip(got, clean, strict=True):
                    assert_same(a[~mine], e[~mine], f"{value} in sequence {poison}", False)
            assert outputs[0][0][mine].isnan().any() and outputs[1][1][mine].isnan().any()


@torch.no_grad()
@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("t", [1, 3])
def test_a_row_of_a_cache_leaves_the_others_alone(impl, t):
    """NaN and infinity in the prompt or in a step of one row."""
    torch.manual_seed(0)
    layer = NSAAttention(24, 4, 2, 12, 10, 4, 2, 8, 3, 9, impl=impl).to(DEVICE)
    length = 12 if is_interpreted(impl) else 30
    prompt, steps = (draw(3, n, 24, seed=n, dtype=torch.float32).to(DEVICE) for n in (length, 2 * t))

    def decode(prompt: Tensor, steps: Tensor) -> Tensor:
        cache = NSACache.for_model(layer, 3, 60)
        return torch.cat([layer(x, cache=cache) for x in (prompt, *steps.split(t, 1))], 1)

    clean = decode(prompt, steps)
    for value, at in [(NAN, 1), (INF, 0), (NAN, 0), (-INF, 1)][: 1 if is_interpreted(impl) else 4]:
        inputs = [prompt.clone(), steps.clone()]
        inputs[at][1, 1:] = value
        got = decode(*inputs)
        assert_same(got[[0, 2]], clean[[0, 2]], f"{value}", False)
        earlier = 1 if at == 0 else length + 1
        assert_same(got[1, :earlier], clean[1, :earlier], f"{value} later", False)
        assert not got[1, earlier:].isfinite().all()
