"""Sizes off the beaten path on a GPU: what once gave wrong numbers there, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nsa_compile import compressed_attention, select_blocks, selected_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def draw(generator: torch.Generator, *size: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*size, generator=generator, device="cuda").to(dtype)


def draw_blocks(generator: torch.Generator, t: int, g: int, l_sel: int, n_sel: int) -> Tensor:
    """Random blocks of a plain sequence, int32 [1, t, g, n_sel], ascending, -1 in unused slots."""
    n_blocks = -(-t // l_sel)
    started = torch.arange(n_blocks, device="cuda") <= (torch.arange(t, device="cuda") // l_sel)[:, None, None]
    score = torch.rand(t, g, n_blocks, generator=generator, device="cuda").masked_fill(~started, -1.0)
    best, block = score.topk(min(n_sel, n_blocks), -1)
    block = block.masked_fill(best < 0, n_blocks).sort(-1).values
    return block.masked_fill(block == n_blocks, -1).int()[None]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "h, d_k, d_v, l_sel",
    [
        (32, 128, 16, 96), (24, 80, 24, 148), (48, 128, 8, 160), (32, 32, 8, 48), (12, 64, 24, 160), (64, 80, 24, 80),
        (16, 128, 32, 208), (24, 64, 8, 112), (32, 128, 48, 96), (32, 128, 16, 128), (4, 128, 8, 80), (64, 64, 32, 40),
        (1, 56, 56, 256), (1, 64, 64, 64), (1, 40, 64, 192),
    ],
)  # fmt: skip
def test_blocks_of_any_length_and_narrow_values(h, d_k, d_v, l_sel, dtype):
    """Of the first eight o was wrong by half its norm, or memory was accessed illegally; of the 13th dk and dv were."""
    generator, t, g = torch.Generator("cuda").manual_seed(0), 500, 2
    q, k = draw(generator, 1, t, g * h, d_k, dtype=dtype), draw(generator, 1, t, g, d_k, dtype=dtype)
    v, grad = draw(generator, 1, t, g, d_v, dtype=dtype), draw(generator, 1, t, g * h, d_v, dtype=dtype)
    blocks = draw_blocks(generator, t, g, l_sel, 4)

    def outputs(impl: str, dtype: torch.dtype) -> list[Tensor]:
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        o, lse = selected_attention(*inputs, blocks, l_sel=l_sel, impl=impl)
        return [o, lse, *torch.autograd.grad(o, inputs, grad.to(dtype))]

    got, same_type = outputs("triton", dtype), outputs("reference", dtype)
    for name, x, other, exact in zip(
        ("o", "lse", "dq", "dk", "dv"), got, same_type, outputs("reference", torch.float64), strict=True
    ):
        error, allowed = ((y.double() - exact).abs().max().item() for y in (x, other))
        assert error <= 2 * allowed + 1e-5, name


def choose(q: Tensor, k_cmp: Tensor, impl: str = "auto", **how) -> Tensor:
    attention = {name: how[name] for name in ("l", "d", "cu_seqlens", "scale") if name in how}
    _, lse = compressed_attention(q, k_cmp, k_cmp, **attention, impl=impl)
    return select_blocks(q, k_cmp, lse, **how, impl=impl)


def assert_ascending(blocks: Tensor) -> None:
    unused = blocks < 0
    assert ((blocks[..., 1:] > blocks[..., :-1]) | unused[..., 1:]).all()
    assert (unused[..., 1:] | ~unused[..., :-1]).all()


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("n_sel, forced", [(4, (1, 1)), (5, (0, 1)), (16, (1, 2)), (130, (1, 2))])
@pytest.mark.parametrize("h, l, d, l_sel", [(16, 64, 4, 64), (64, 64, 4, 64), (4, 24, 8, 96), (16, 64, 1, 64)])
def test_scores_that_nearly_tie_give_the_same_ascending_blocks_at_every_call(
    h, l, d, l_sel, n_sel, forced, packed, impl
):
    """Lanes that sum the same scores in another order once disagreed on which was best: [0, 2, 1, 4]."""
    generator, t, g = torch.Generator("cuda").manual_seed(0), 1300, 2
    q = draw(generator, 1, t, g * h, 64, dtype=torch.float16)
    k_cmp = draw(generator, 1, t // d if packed else (t - l) // d + 1, g, 64, dtype=torch.float16)
    cu_seqlens = {"cu_seqlens": torch.tensor([0, 700, 701, 701, t], device="cuda", dtype=torch.int32)} if packed else {}
    how = {"l": l, "d": d, "l_sel": l_sel, "n_sel": n_sel, "init_blocks": forced[0], "local_blocks": forced[1]}
    blocks = choose(q, k_cmp, impl, **how, **cu_seqlens, scale=1e-6)
    assert_ascending(blocks)
    for _ in range(5):
        assert torch.equal(blocks, choose(q, k_cmp, impl, **how, **cu_seqlens, scale=1e-6))


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("h, l, d, l_sel", [(16, 64, 4, 64), (3, 32, 16, 64), (5, 24, 8, 96), (1, 8, 8, 40)])
def test_the_lower_index_wins_where_the_bits_of_scores_agree(h, l, d, l_sel, packed, impl):
    """With q = 0 all blocks between the first one and the last ones have scores of the same bits."""
    t, g, n_sel = 1500, 2, 7
    q = torch.zeros(1, t, g * h, 64, device="cuda", dtype=torch.bfloat16)
    k_cmp = torch.ones(1, t // d if packed else (t - l) // d + 1, g, 64, device="cuda", dtype=torch.bfloat16)
    cu_seqlens = {"cu_seqlens": torch.tensor([0, t - 700, t], device="cuda", dtype=torch.int32)} if packed else {}
    blocks = choose(q, k_cmp, impl, l=l, d=d, l_sel=l_sel, n_sel=n_sel, init_blocks=1, local_blocks=2, **cu_seqlens)
    last = blocks.amax(-1)
    expected = torch.cat((torch.arange(n_sel - 2, device="cuda").expand(*last.shape, -1),
                          torch.stack((last - 1, last), -1)), -1)  # fmt: skip
    assert torch.equal(blocks[last > n_sel].long(), expected[last > n_sel])
