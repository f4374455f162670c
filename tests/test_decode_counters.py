"""Token reads of decode steps: the formula, the paper's table, and a count of the tokens that were chosen."""

import pytest
import torch
from models import make_layer

from nsa_compile import NSAAttention, NSACache, num_cmp, token_reads

SMALL = {
    "dim": 64, "n_heads": 4, "n_kv_groups": 1, "d_k": 16, "d_v": 16, "l": 4, "d": 2, "l_sel": 4, "n_sel": 4, "w": 8,
}  # fmt: skip
PAPER = {"l": 32, "d": 16, "l_sel": 64, "w": 512}


def nominal_totals(prefill: int, steps: int) -> list[int]:
    """Nominal totals of decode steps of the small layer after a prefill."""
    attn, totals = NSAAttention(**SMALL), []
    with torch.no_grad():
        cache = NSACache.for_model(attn, 1, 32)
        if prefill:
            attn(torch.randn(1, prefill, 64), cache=cache)
        for _ in range(steps):
            attn(torch.randn(1, 1, 64), cache=cache)
            totals.append(cache.layers[0].nominal_reads[0, 3].item())
    return totals


def test_nominal_totals_from_an_empty_cache():
    assert nominal_totals(0, 4) == [17, 18, 19, 21]


def test_nominal_totals_after_a_prefill_of_six():
    assert nominal_totals(6, 4) == [25, 27, 27, 28]


@pytest.mark.parametrize(("tokens", "table"), [(8192, 2048), (16384, 2560), (32768, 3584), (65536, 5632)])
def test_nominal_reads_are_one_less_than_the_papers_table(tokens, table):
    blocks = torch.arange(16, dtype=torch.int32).view(1, 1, 1, 16)
    reads = token_reads(torch.tensor([[tokens - 1]]), blocks, **PAPER)
    cmp, slc, win, total = reads.nominal[0, 0].tolist()
    assert (cmp, slc, win) == (num_cmp(tokens, 32, 16), 1024, 512)
    assert total == cmp + slc + win == table - 1


def test_actual_reads_count_the_tokens_that_exist():
    blocks = torch.tensor([[[[0, 2, 3, -1], [0, 1, 2, 3]]]], dtype=torch.int32)
    reads = token_reads(torch.tensor([[17]]), blocks, l=4, d=2, l_sel=5, w=7)
    assert reads.actual.tolist() == [[[[8, 13, 7, 28], [8, 18, 7, 33]]]]
    assert reads.nominal.tolist() == [[[8, 20, 7, 35]]]


def test_reads_of_a_cache_are_those_of_each_rows_last_token(monkeypatch):
    layer = make_layer()
    c, chosen = layer.config, []
    original = token_reads

    def spy(position, block_indices, **sizes):
        chosen.append((position, block_indices))
        return original(position, block_indices, **sizes)

    monkeypatch.setattr("nsa_compile.module.token_reads", spy)
    counts = [[30, 11, 0], [1, 1, 0], [4, 0, 2], [1, 1, 1]]
    tokens = [0, 0, 0]
    with torch.no_grad():
        cache = NSACache.for_model(layer, 3, 60)
        for row_counts in counts:
            x = torch.randn(3, max(row_counts), c.dim, dtype=torch.float64)
            layer(x, cache=cache, lengths=torch.tensor(row_counts, dtype=torch.int32))
            position, blocks = chosen[-1]
            for row, count in enumerate(row_counts):
                tokens[row] += count
                nominal, actual = cache.layers[0].nominal_reads[row], cache.layers[0].actual_reads[row]
                if count == 0:
                    assert not nominal.any() and not actual.any()
                    continue
                S = tokens[row]
                assert position[row, count - 1] == S - 1
                cmp, win = num_cmp(S, c.l, c.d), min(c.w, S)
                assert nominal.tolist() == [cmp, c.n_sel * c.l_sel, win, cmp + c.n_sel * c.l_sel + win]
                for g in range(c.n_kv_groups):
                    picked = [j for j in blocks[row, count - 1, g].tolist() if j >= 0]
                    slc = sum(s // c.l_sel in picked for s in range(S))
                    assert actual[g].tolist() == [cmp, slc, win, cmp + slc + win]
    assert cache.positions.tolist() == tokens
