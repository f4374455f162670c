"""The fuzzer finds nothing in the package, finds what is planted, and outlives crashes and hangs.

On the CPU: the reference at many configurations, the kernels in Triton's interpreter at tiny ones. On a CUDA device a
few families; `fuzz.py` is the way to run many.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import bounds
import dense_oracle
import fuzz
import oracle
import pytest
import torch
from cases import Shape, draw, draw_inputs, int32

import nsa_compile
from nsa_compile.ops import selection

pytestmark = [pytest.mark.fuzz, pytest.mark.filterwarnings("ignore::RuntimeWarning")]

DEVICE = fuzz.pick_device(None)
SEEDS = {"fixed": "17", "day": datetime.now(UTC).strftime("%Y-%m-%d")}
COUNTS = {
    ("ops", "cpu"): (30, 2), ("ops", "interpreter"): (4, 1), ("others", "cpu"): (10, 2),
    ("others", "interpreter"): (3, 1), ("caches", "cpu"): (6, 1), ("models", "cpu"): (6, 1),
}  # fmt: skip
"""Families and cases of each, by kind and size."""
RUNS = [run for run in COUNTS if find_spec(fuzz.MODULES[run[0]])]
if DEVICE == "cuda":
    COUNTS |= {(kind, "gpu"): (2, 4) for kind, _ in RUNS}
    RUNS = list(dict.fromkeys((kind, "gpu") for kind, _ in RUNS))


def requests(kind: str, size: str, seed: str, families: int, cases: int) -> Iterator[dict[str, Any]]:
    """The cases that `fuzz.py` would draw."""
    for family in islice(fuzz.families([kind], seed, size, cases), families):
        while (request := family.next_request()) is not None:
            yield request


@pytest.fixture(autouse=True)
def process():
    fuzz.prepare_process(DEVICE)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("kind", "size"), RUNS)
def test_nothing_is_wrong(kind, size, seed):
    print(f"seed {SEEDS[seed]}")
    wrong = []
    for request in requests(kind, size, SEEDS[seed], *COUNTS[kind, size]):
        failures = fuzz.check(request, DEVICE)
        wrong += [*failures, fuzz.command_of(request)] if failures else []
    assert not wrong, "\n".join(wrong)


def windows_longer(q, k, v, *, w, real=nsa_compile.window_attention, **where):
    return real(q, k, v, w=w + 1, **where)


def half_of_lse_gradient(*args, real=nsa_compile.window_attention, **where):
    o, lse = real(*args, **where)
    return o, torch.where(lse.isfinite(), (lse + lse.detach()) / 2, lse.detach())


def reads_all_keys(q, k, v, *, real=nsa_compile.window_attention, **where):
    o, lse = real(q, k, v, **where)
    return o + (0 * k.sum()).to(o.dtype), lse


def writes_its_input(q, k, v, *, real=nsa_compile.window_attention, **where):
    results = real(q, k, v, **where)
    k.detach()[:, -1].mul_(2)
    return results


def one_percent_more(*args, real=nsa_compile.selected_attention, **where):
    o, lse = real(*args, **where)
    return o * 1.01, lse


def last_slot_forgotten(q, k, v, block_indices, *, real=nsa_compile.selected_attention, **where):
    last = torch.arange(block_indices.shape[-1], device=q.device) == block_indices.shape[-1] - 1
    return real(q, k, v, block_indices.masked_fill(last, -1), **where)


def other_bits(*args, calls=[0], real=nsa_compile.compressed_attention, **where):  # noqa: B006
    calls[0] += 1
    o, lse = real(*args, **where)
    return o, lse * (1 + (calls[0] % 2) * torch.finfo(lse.dtype).eps)


def positions_ignored(q, k, v, *, real=nsa_compile.compressed_attention, q_start=None, **where):
    return real(q, k, v, q_start=q_start * 0 if q_start is not None else None, **where)


def scores_of_half(q, k, lse, *, real=nsa_compile.select_blocks, scale=None, **how):
    return real(q, k, lse, scale=(q.shape[-1] ** -0.5 if scale is None else scale) / 2, **how)


def downwards(*args, real=nsa_compile.select_blocks, **how):
    return real(*args, **how).flip(-1)


def higher_of_ties(p_grp, position, *, real=selection.choose_blocks, **sizes):
    """The higher index wins, by less than roundings may do."""
    eps = torch.finfo(p_grp.dtype).eps
    return real(p_grp * (1 + 2 * eps * torch.arange(p_grp.shape[-1], device=p_grp.device)), position, **sizes)


def last_mean_stale(k, *, real=nsa_compile.compress_mean, **how):
    means = real(k, **how)
    return torch.cat((means[:, :-1], means[:, -2:-1]), 1) if means.shape[1] > 1 else means


def gates_swapped(*args, real=nsa_compile.nsa_attention, **how):
    *tensors, gates = args
    return real(*tensors, gates.flip(-1), **how)


PLANTED = {
    "window_attention": [windows_longer, half_of_lse_gradient, reads_all_keys, writes_its_input],
    "selected_attention": [one_percent_more, last_slot_forgotten],
    "compressed_attention": [other_bits, positions_ignored],
    "select_blocks": [scores_of_half, downwards],
    "choose_blocks": [higher_of_ties],
    "compress_mean": [last_mean_stale],
    "nsa_attention": [gates_swapped],
}


@pytest.mark.skipif(DEVICE == "cuda", reason="plants errors in the reference")
@pytest.mark.parametrize(
    ("name", "wrong"),
    [(name, x) for name, all_of in PLANTED.items() for x in all_of],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_planted_errors_are_found(name: str, wrong: Callable[..., Any]):
    owner = selection if name == "choose_blocks" else nsa_compile
    for request in requests("ops", "cpu", "planted", 60, 2):
        if name == "choose_blocks" and request["case"]["contents"]["q"] != "zeros":
            continue  # where scores are equal
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, wrong)
            found = fuzz.check(request, DEVICE)
        if found and not fuzz.check(request, DEVICE):
            return
    pytest.fail("not found")


SHAPE = Shape(l=4, d=2, l_sel=6, n_sel=3, w=5, init_blocks=1, local_blocks=1, g=2, h=3)
PLACES = {
    "rows": (9, 2, 9, {}),
    "buffer": (4, 2, 17, {"q_start": int32(3, 11)}),
    "packed": (15, 1, 15, {"cu_seqlens": int32(0, 0, 1, 6, 13)}),
}


@pytest.mark.parametrize("place", PLACES)
def test_the_dense_oracle_agrees_with_nested_loops(place):
    t, b, s, where = PLACES[place]
    q, _, _, k, v, *_ = draw_inputs(SHAPE, t, b=b, s=s)
    k_cmp, v_cmp = (dense_oracle.compress_mean(x, 4, 2, where.get("cu_seqlens")) for x in (k, v))
    for x, y in ((k, k_cmp), (v, v_cmp)):
        torch.testing.assert_close(y, oracle.compress_mean(x, l=4, d=2, cu_seqlens=where.get("cu_seqlens")))
    choice = oracle.select_blocks(q, k_cmp, **SHAPE.choice, **where)
    scores = dense_oracle.block_scores(q, k_cmp, l=4, d=2, l_sel=6, **where)
    torch.testing.assert_close(scores[..., : choice.scores.shape[-1]], choice.scores)
    rule = {name: x for name, x in SHAPE.choice.items() if name not in ("l", "d")}
    position = dense_oracle.positions(b, t, s, **where).position
    lists = dense_oracle.choose(choice.scores, position, **rule)
    assert lists.int().equal(choice.block_indices)
    pairs = [
        ("compressed_attention", (q, k_cmp, v_cmp), SHAPE.compression),
        ("selected_attention", (q, k, v, lists), {"l_sel": 6}),
        ("window_attention", (q, k, v), {"w": 5}),
    ]
    for name, tensors, sizes in pairs:
        for x, y in zip(getattr(dense_oracle, name)(*tensors, **sizes, **where),
                        getattr(oracle, name)(*tensors, **sizes, **where), strict=True):  # fmt: skip
            torch.testing.assert_close(x, y, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_plain_torch_in_a_type_is_within_half_a_bound_and_an_error_is_not(dtype):
    """The a-priori part alone holds the textbook computation, and is narrower than one key of ten."""
    q, k, v, grad = (draw(1, 30, n, 16, seed=i).to(dtype) for i, n in enumerate((4, 2, 2, 4)))
    visible = dense_oracle.sees_window(dense_oracle.positions(1, 30, 30), 10)
    grad_lse = grad[..., 0].float()
    both = {"grad_o": grad, "grad_lse": grad_lse, "dtype": dtype}
    found = bounds.bound_attention(q, k, v, visible, 0.25, **both)
    plain, _ = bounds.plain_attention(q, k, v, visible, 0.25, grad, grad_lse, dtype, 0.0)
    for name, x in zip(("o", "lse", "q", "k", "v"), plain, strict=True):
        bound = found[name]
        error = (x.double() - bound.exact).abs()
        most = error.amax(-1, keepdim=True) if error.ndim == 4 else error
        assert bool((error <= bound.tolerance - 2 * most).all()), name
    shorter = dense_oracle.sees_window(dense_oracle.positions(1, 30, 30), 9)
    other = bounds.bound_attention(q, k, v, shorter, 0.25, **both)
    for name, bound in found.items():
        assert bounds.judge(name, other[name].exact.to(dtype), bound), name


CHECKS = """
import os, time

KIND = "trials"


def draw_family(rng, size):
    return {"size": size}


def draw_case(family, rng):
    return {"number": rng.randrange(10**9)}


def run_case(family, case, device):
    what = NAMES[case["number"] % len(NAMES)]
    if what == "crash":
        os.abort()
    if what == "hang":
        time.sleep(1000)
    if what == "raise":
        raise ValueError("no such thing")
    return ["wrong number"] if what == "wrong" else []
"""


def test_crashes_hangs_and_failures_are_recorded_with_their_case(tmp_path, monkeypatch, capsys):
    names = ["right", "right", "wrong", "crash", "raise", "hang"]
    (tmp_path / "trial_checks.py").write_text(f"NAMES = {names}\n{CHECKS}")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(nsa_compile.__file__).parent.parent}")
    out = tmp_path / "record.json"
    fixed = {"kinds": "trial_checks", "device": "cpu", "workers": 2, "cases": 12, "family-cases": 6, "seed": 26}
    arguments = [f"--{name}={value}" for name, value in (fixed | {"timeout": 10, "minutes": 10, "out": out}).items()]
    assert fuzz.main(arguments) == 1
    record = json.loads(out.read_text())
    assert record["cases"] == 12 and record["families_per_kind"] == {"trial_checks": 2}
    assert record["failed_cases"] == len(record["failures"]) and record["seed"] == "26"
    found = {"wrong": 0, "crash": 0, "raise": 0, "hang": 0, "right": 12 - len(record["failures"])}
    for failure in record["failures"]:
        what, message = names[failure["case"]["number"] % len(names)], failure["messages"][0]
        beginnings = {
            "wrong": "wrong number",
            "crash": "crashed, exit code -6",
            "raise": "raised ValueError",
            "hang": "hung",
        }
        assert message.startswith(beginnings[what]), message
        found[what] += 1
    assert all(found.values()), f"the seed draws not every kind: {found}"
    assert (record["crashes"], record["hangs"]) == (found["crash"], found["hang"])
    assert "FAILED trial_checks" in capsys.readouterr().out
    wrong = next(x for x in record["failures"] if x["messages"] == ["wrong number"])
    command = [sys.executable, fuzz.__file__, *shlex.split(wrong["command"])[2:], "--device", "cpu"]
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 1 and "wrong number" in again.stdout, again.stderr


def test_a_seed_draws_the_same_cases_and_another_draws_others():
    first, second, third = (list(requests("ops", "gpu", seed, 3, 2)) for seed in ("a", "a", "b"))
    assert first == second != third
    assert json.loads(json.dumps(first)) == first
