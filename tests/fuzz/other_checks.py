"""The ops beside attention: the gated sum, rotary positions and the cross-entropy of a linear head."""

from __future__ import annotations

import math
import random
from typing import Any

import dense_oracle as oracle
import draws
import torch
from bounds import Bound, compute_type, epsilons, judge

import nsa_compile
from nsa_compile.custom_ops.cross_entropy import linear_cross_entropy

KIND = "others"
CASES = 20


def draw_family(rng: random.Random, size: str = "gpu") -> dict[str, Any]:
    """Types and widths; `size` is "gpu", "cpu" or "interpreter"."""
    impl = {"gpu": "auto", "cpu": "reference", "interpreter": "triton"}[size]
    return {
        "impl": impl,
        "dtype": draws.weighted(rng, {"fp32": 1, "fp16": 1} | ({"bf16": 1} if size != "interpreter" else {})),
        "n": rng.randint(1, 24),
        "d_v": draws.width(rng, 32 if size == "interpreter" else 256),
        "d_k": 2 * draws.width(rng, 128),
        "most": {"gpu": 3000, "cpu": 200, "interpreter": 12}[size],
        "layouts": [draws.weighted(rng, draws.LAYOUTS) for _ in range(6)],
    }


def draw_case(family: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """Lengths, layouts, and which tokens are NaN."""
    t = draws.length(rng, (16, 64, 128), family["most"])
    return {
        "seed": rng.randrange(2**31),
        "b": rng.randint(1, 3),
        "t": t,
        "spoilt": rng.randrange(t) if rng.random() < 0.5 else None,
        "position": rng.choice((0, 1, 1000, 10**6)),
        "theta": rng.choice((10000.0, 500000.0, 1e6, 10.0)),
        "vocab": draws.log_uniform(rng, 1, 500),
        "dim": draws.log_uniform(rng, 1, 128),
        "chunk": rng.choice((None, 1, 3, 64)),
        "deterministic": rng.random() < 0.3,
    }


def run_case(family: dict[str, Any], case: dict[str, Any], device: str) -> list[str]:
    """What is wrong; one line each."""
    gen = draws.generator(case["seed"], device)
    dtype = draws.DTYPES[family["dtype"]]
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(case["deterministic"])
    try:
        failures = check_gated_sum(family, case, dtype, gen)
        failures += check_rope(family, case, dtype, gen)
        return failures + check_cross_entropy(case, dtype, gen)
    finally:
        torch.use_deterministic_algorithms(before)


def check_gated_sum(family: dict[str, Any], case: dict[str, Any], dtype: torch.dtype, gen: torch.Generator):
    """Outputs and gradients, also beside a token of NaN."""
    b, t, n, d_v = case["b"], case["t"], family["n"], family["d_v"]
    eps = epsilons(dtype)
    where = torch.arange(t, device=gen.device).expand(b, t) == case["spoilt"]
    layouts = family["layouts"][:5]
    if case["spoilt"] is not None:  # numbers that are one in memory cannot differ
        layouts = ["contiguous" if x in ("one_group", "one_row") else x for x in layouts]
    sizes = [(b, t, n, d_v)] * 3 + [(b, t, n, 3), (b, t, n, d_v)]
    pairs = list(zip(sizes, layouts, strict=True))
    drawn = [draws.repeats(draws.fill(size, "normal", gen), layout).to(dtype) for size, layout in pairs]
    *given, grad = (draws.arrange(x, layout) for x, layout in zip(drawn, layouts, strict=True))
    stored = [draws.storage_bits(x) for x in (*given, grad)]
    leaves = [x.detach().requires_grad_() for x in given]
    o = nsa_compile.gated_sum(*leaves, impl=family["impl"])
    found = torch.autograd.grad(o, leaves, grad)
    wide = [x.double().requires_grad_() for x in drawn[:4]]
    exact = oracle.mix(wide[3], tuple(wide[:3]))
    truths = (exact.detach(), *torch.autograd.grad(exact, wide, drawn[4].double()))
    size = [x.detach().abs() for x in wide]
    g = drawn[4].double().abs()
    sums = torch.stack([(g * x).sum(-1) for x in size[:3]], -1)
    units = (oracle.mix(size[3], tuple(size[:3])), *(g * size[3][..., i : i + 1] for i in range(3)), sums)
    failures = []
    for name, x, truth, unit in zip(
        ("o", "do_cmp", "do_slc", "do_win", "dgates"), (o.detach(), *found), truths, units, strict=True
    ):
        bound = Bound(truth, (eps.own + 64 * eps.compute) * unit + eps.smallest)
        failures += judge(f"gated_sum {name}", x, bound)
    if not all(map(torch.equal, stored, map(draws.storage_bits, (*given, grad)))):
        failures.append("gated_sum: an input was written to")
    if case["spoilt"] is not None:
        spoilt = [
            draws.arrange(draws.poison(x, where, "mixed", gen), layout).requires_grad_()
            for x, layout in zip(drawn[:4], layouts[:4], strict=True)
        ]
        other = nsa_compile.gated_sum(*spoilt, impl=family["impl"])
        others = torch.autograd.grad(other, spoilt, grad)
        for name, x, y in zip(
            ("o", "do_cmp", "do_slc", "do_win", "dgates"), (o, *found), (other, *others), strict=True
        ):
            if not draws.same_numbers(x.detach()[~where], y.detach()[~where]):
                failures.append(f"gated_sum: a token spoilt, {name} of others changed")
    return failures


def check_rope(family: dict[str, Any], case: dict[str, Any], dtype: torch.dtype, gen: torch.Generator) -> list[str]:
    """Rotation and its gradient at positions from some number on."""
    size, eps = (case["b"], case["t"], family["n"], family["d_k"]), epsilons(dtype)
    layout = family["layouts"][5]
    x = draws.repeats(draws.fill(size, "normal", gen), layout).to(dtype)
    grad = draws.fill(size, "normal", gen).to(dtype)
    position = torch.arange(case["t"], device=gen.device, dtype=torch.int32) + case["position"]
    if case["seed"] % 2:
        position = position.long().expand(size[:2])
    leaf = draws.arrange(x, layout).detach().requires_grad_()
    y = nsa_compile.apply_rope(leaf, position, theta=case["theta"])
    (found,) = torch.autograd.grad(y, leaf, grad)
    failures = []
    # an angle is that of fp64, its cosine of fp32; the gradient turns back
    for name, got, given, turn in (("y", y.detach(), x, position), ("dx", found, grad, -position)):
        wide = given.double()
        first, second = wide.abs().chunk(2, -1)
        unit = torch.cat([first + second] * 2, -1)
        exact = oracle.rope(wide, turn, case["theta"])
        failures += judge(
            f"rope {name}", got, Bound(exact, eps.own * exact.abs() + 8 * eps.compute * unit + eps.smallest)
        )
    return failures


def check_cross_entropy(case: dict[str, Any], dtype: torch.dtype, gen: torch.Generator) -> list[str]:
    """Loss and gradients; logits are rounded to the type of the inputs."""
    n, vocab, dim, eps = case["t"], case["vocab"], case["dim"], epsilons(dtype)
    x = draws.fill((n, dim), "normal", gen).to(dtype)
    weight = (draws.fill((vocab, dim), "normal", gen) / math.sqrt(dim)).to(dtype)
    target = torch.randint(-1, vocab, (n,), generator=gen, device=gen.device)
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    loss = linear_cross_entropy(*leaves, target, chunk=case["chunk"])
    found = torch.autograd.grad(loss, leaves)
    wide = [y.double().requires_grad_() for y in (x, weight)]
    logits = wide[0] @ wide[1].mT
    exact = torch.nn.functional.cross_entropy(logits, target, ignore_index=-1, reduction="sum")
    truths = torch.autograd.grad(exact, wide)
    counted = (target >= 0).unsqueeze(-1)
    with torch.no_grad():
        sizes = wide[0].abs() @ wide[1].abs().mT
        off = (
            eps.own * logits.abs().amax(-1, keepdim=True) + 16 * eps.compute * sizes.amax(-1, keepdim=True)
        ) * counted
        total = 2 * off.sum() + eps.compute * (8 + math.sqrt(n)) * (2 * logits.abs().amax() + 8) * n
        p = logits.softmax(-1)
        onehot = torch.nn.functional.one_hot(target.clamp_min(0), vocab)
        grad = (p - onehot).abs() * (eps.own + compute_eps(dtype, n)) + 4 * off * p * (1 + p) + 4 * off * onehot
        grad = (grad + eps.smallest + 8 * eps.compute * p) * counted
        units = (grad @ wide[1].abs(), grad.mT @ wide[0].abs())
    failures = judge("cross-entropy", loss.detach().view(1), Bound(exact.detach().view(1), total.view(1)))
    for name, got, truth, unit in zip(("dx", "dweight"), found, truths, units, strict=True):
        # the product with the weight may be summed in pieces of the inputs' type
        failures += judge(f"cross-entropy {name}", got, Bound(truth, unit + eps.own * truth.abs() + eps.smallest))
    return failures


def compute_eps(dtype: torch.dtype, n: int) -> float:
    """Relative error of a sum of n products."""
    return torch.finfo(compute_type(dtype)).eps * (32 + math.sqrt(n))
