"""A few drawn models and caches on the CPU, and that the judges see what is planted before them."""

from __future__ import annotations

import random
from collections.abc import Iterator

import cache_checks
import dense_oracle as dense
import model_checks
import pytest
import torch
from model_oracle import BOUNDS, compare, judge_blocks

from nsa_compile import NSACache, module
from nsa_compile.custom_ops import decode
from nsa_compile.ops import selection

pytestmark = pytest.mark.fuzz
KINDS = {"caches": cache_checks, "models": model_checks}


def failures(kind: str, seed: int, size: str = "cpu", cases: int = 3, **fixed) -> Iterator[str]:
    """Of the cases of one family, in which some draws are fixed."""
    checks, rng = KINDS[kind], random.Random(f"{kind}/{size}/{seed}")
    family = checks.draw_family(rng, size)
    family |= {name: value for name, value in fixed.items() if name in family}
    for _ in range(cases):
        case = checks.draw_case(family, rng) | {name: value for name, value in fixed.items() if name not in family}
        yield from (f"{message} {family} {case}" for message in checks.run_case(family, case, "cpu"))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_drawn_models_on_the_reference(kind, seed):
    assert list(failures(kind, seed, isolate=False, backend=None)) == []


def test_a_drawn_layer_in_the_interpreter():
    pytest.importorskip("triton")
    assert list(failures("models", 1, "interpreter", 1, part="layer", layout="packed", isolate=False)) == []


def test_lengths_of_a_compiled_layer_one_after_another():
    assert list(failures("models", 5, part="layer", layout="lengths", backend="aot_eager", cases=1)) == []


# --- planted errors ---------------------------------------------------------------------------------------------------


def spoiled_copy(original):
    """`NSACache.copy_row` that leaves the unrotated tail behind."""

    def copy_row(self, row, source, source_row=0):
        kept = [x[row].clone() for layer in self.layers for name, x in layer.buffers.items() if "raw" in name]
        original(self, row, source, source_row)
        for layer in self.layers:
            for name, x in layer.buffers.items():
                if "raw" in name:
                    x[row] = kept.pop(0)

    return copy_row


PLANTED = {
    "a window's ring too short to be taken back": ("caches", lambda patch: patch.setattr(module, "STEP", 1)),
    "rows copied without their tail": (
        "caches",
        lambda patch: patch.setattr(NSACache, "copy_row", spoiled_copy(NSACache.copy_row)),
    ),
    "padding that is appended": (
        "caches",
        lambda patch: patch.setattr(decode, "write_slots", lambda x, row, at, new, keep: x.__setitem__((row, at), new)),
    ),
    "queries and keys that are not rotated": (
        "models",
        lambda patch: patch.setattr(module, "rotate_all", lambda xs, at, theta: list(xs)),
    ),
    "scores of a group's first head alone": (
        "models",
        lambda patch: patch.setattr(selection, "group_scores", lambda p_slc: p_slc[:, :, :, 0]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_planted_errors_are_found(name, monkeypatch):
    kind, plant = PLANTED[name]
    plant(monkeypatch)
    what = {"what": "calls"} if kind == "caches" else {"part": "model"}
    assert any(
        message
        for seed in range(10)
        for message in failures(kind, seed, cases=4, backend=None, sharp=1.0, alphabet=10**6, dtype="fp64", **what)
    )  # fmt: skip


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_bounds_take_rounding_and_refuse_a_wrong_number(dtype):
    exact = torch.randn(50, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rounded = exact.to(dtype)
    assert compare("x", rounded, exact, rounded, dtype) == []
    wrong = rounded.clone()
    wrong[3, 5] += 1
    assert "worst at [3, 5]" in compare("x", wrong, exact, rounded, dtype)[0]
    wrong[3, 5] = float("nan")
    assert "1 of 400 not finite" in compare("x", wrong, exact, rounded, dtype)[0]


def test_lists_are_judged_by_their_scores():
    sizes = {"l_sel": 4, "n_sel": 4, "init_blocks": 1, "local_blocks": 1}
    scores = torch.tensor([9.0, 0.0, 0.0, 0.5, 0.5 - 1e-9, 0.0]).double().expand(1, 24, 1, 6).clone()
    valid = torch.ones(1, 24, dtype=torch.bool)
    position = torch.arange(24)[None]
    right = dense.choose(scores, position, **sizes)
    assert judge_blocks("x", right, scores, valid, sizes, 0.0) == []
    assert right[0, 23, 0].tolist() == [0, 3, 4, 5] and right[0, 15, 0].tolist() == [0, 1, 2, 3]
    lists = {
        (23, (0, 4, 3, 5)): "not ascending",
        (23, (0, 3, 5, -1)): "not as many",
        (3, (0, 1, -1, -1)): "has not begun",
        (23, (1, 3, 4, 5)): "forced",
        (23, (0, 2, 3, 5)): "better",
        (19, (0, 2, 3, 4)): None,
    }
    scores[..., 1] = 0.2
    for (at, blocks), fault in lists.items():
        got = dense.choose(scores, position, **sizes)
        got[0, at, 0] = torch.tensor(blocks)
        found = judge_blocks("x", got, scores, valid, sizes, 1e-6)
        if at == 19:
            assert "better" in found[0]
        else:
            assert fault in " ".join(found), (blocks, found)
    scores[..., 1:3] = 0.0
    got = dense.choose(scores, position, **{**sizes, "n_sel": 3})
    got[0, 15, 0] = torch.tensor((0, 2, 3))
    assert "of scores 0" in judge_blocks("x", got, scores, valid, {**sizes, "n_sel": 3}, 1e-6)[0]
