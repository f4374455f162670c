"""Checks of whole layers and models against the oracle: outputs, loss, gradients of all weights, compiled and eager.

Rows come whole, padded with `lengths`, or packed; what pads them may be NaN. Compiled calls see several lengths in a
row, so that shapes become dynamic. transformers' class is one more way to call the same model.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, NamedTuple

import draws
import subjects
import torch
from model_oracle import Oracle, compare, inside, judge_blocks, next_token_loss, rms, score_tolerance, stack_rows
from recording import recorded_choices
from torch import Tensor

from nsa_compile import NSALanguageModel

KIND = "models"
CASES = 12
"""Cases of a family."""
PARTS = {"layer": 3, "model": 5, "hf": 1}
LAYOUTS = ("whole", "lengths", "packed")


def draw_family(rng: random.Random, size: str = "gpu") -> dict[str, Any]:
    """A model, the part of it that is called, the layout of its rows, and what compiles it if any does."""
    family = subjects.draw_family(rng, size)
    parts = {name: weight for name, weight in PARTS.items() if name != "hf" or find_spec("transformers")}
    backends = {None: 6, "aot_eager": 1, "inductor": 2} if size == "gpu" else {None: 19, "aot_eager": size == "cpu"}
    part = draws.weighted(rng, parts)
    if family["sizes"]["attention"] == "dense" and part == "layer":
        part = "model"
    return {**family, "part": part, "layout": rng.choice(LAYOUTS), "backend": draws.weighted(rng, backends)}


def draw_case(family: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """Rows of one call, or of several calls of one compiled function; everything else follows from the seed."""
    calls = rng.randint(2, 4) if family["backend"] else 1
    whole = family["sizes"]["attention"] == "nsa" and not family["backend"]
    return {
        "calls": [draw_rows(family, rng) for _ in range(calls)], "seed": rng.randrange(2**31),
        "sharp": subjects.draw_sharpness(family, rng), "alphabet": subjects.draw_alphabet(rng),
        "branch": rng.choice((None,) * 9 + ("cmp", "slc", "win")) if whole else None,
        "poison": rng.choice(("none", "nan", "mixed")), "side": rng.choice(("left", "right")),
        "deterministic": rng.random() < 0.25, "isolate": rng.random() < 0.5,
    }  # fmt: skip


def draw_rows(family: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """Tokens of each row, or the ends of packed sequences, and the columns t that they lie in."""
    if family["layout"] == "packed":
        t = subjects.draw_length(family, 2, rng)
        return {"t": t, "rows": draws.packing(rng, t)}
    b = rng.randint(1, 3)
    t = subjects.draw_length(family, b, rng)
    if family["layout"] == "whole":
        return {"t": t, "rows": [t] * b}
    return {"t": t, "rows": [rng.choice((t, rng.randint(0, t), rng.randint(0, min(t, 3)))) for _ in range(b)]}


def run_case(family: dict[str, Any], case: dict[str, Any], device: str) -> list[str]:
    """Failures of a case, as one-line messages."""
    model = subjects.build(family, device, case["seed"], case["sharp"])
    act: Callable[..., list[str]] = {"layer": check_layer, "model": check_model, "hf": check_hf}[family["part"]]
    failures = []
    with deterministic() if case["deterministic"] else nullcontext():
        for number, call in enumerate(case["calls"]):
            rows = Rows.of(family["layout"], call, device)
            if any(rows.lengths):  # something to judge
                told = {**case, "seed": case["seed"] + number}
                failures += [f"call {number}, {x}" for x in act(model, rows, family, told, device)]
            model.zero_grad()
    return failures


class deterministic:
    """`torch.use_deterministic_algorithms` inside."""

    def __enter__(self) -> None:
        self.before = (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        )
        torch.use_deterministic_algorithms(True, warn_only=True)  # torch's own ops are not what is checked

    def __exit__(self, *error: object) -> None:
        torch.use_deterministic_algorithms(self.before[0], warn_only=self.before[1])


class Rows(NamedTuple):
    """Sequences and where they lie in a batch [b, t]: row and first column of each, none of them empty."""

    b: int
    t: int
    lengths: list[int]
    places: list[tuple[int, int]]
    options: dict[str, Tensor]

    @classmethod
    def of(cls, layout: str, call: dict[str, Any], device: str) -> Rows:
        t, told = call["t"], call["rows"]
        if layout == "packed":
            spans = [(start, stop - start) for start, stop in pairwise(told) if stop > start]
            options = {"cu_seqlens": draws.ints(told, device)}
            return cls(1, t, [n for _, n in spans], [(0, start) for start, _ in spans], options)
        options = {"lengths": draws.ints(told, device)} if layout == "lengths" else {}
        rows = [(row, n) for row, n in enumerate(told) if n]
        return cls(len(told), t, [n for _, n in rows], [(row, 0) for row, _ in rows], options)

    def take(self, x: Tensor) -> list[Tensor]:
        """The sequences of a batch x [b, t, ...]."""
        return [x[row, at : at + n] for (row, at), n in zip(self.places, self.lengths, strict=True)]

    def stack(self, x: Tensor, value: int = 0) -> Tensor:
        """The sequences of a batch as rows of their own [r, max n, ...]."""
        return stack_rows(self.take(x), value)

    def put(self, sequences: Sequence[Tensor], rest: Tensor) -> Tensor:
        """A batch [b, t, ...] of sequences, and `rest` elsewhere."""
        out = rest.clone()
        for x, (row, at) in zip(sequences, self.places, strict=True):
            out[row, at : at + len(x)] = x
        return out


class Twins:
    """The oracle in fp64 and as a plain computation of the model's type, on the same rows and blocks."""

    def __init__(self, model: NSALanguageModel, rows: Rows, chosen: list[Tensor]) -> None:
        self.config = asdict(model.config)
        self.dtype = next(model.parameters()).dtype
        self.rows, self.blocks = rows, [rows.stack(blocks, -1) for blocks in chosen]
        state = model.state_dict()
        self.oracles = [Oracle(self.config, state, kind) for kind in (torch.float64, self.dtype)]

    def judge(self, scores: list[list[Tensor]]) -> list[str]:
        """Failures of the blocks by the scores of both."""
        if not len(scores[0]) == len(scores[1]) == len(self.blocks):
            return [f"blocks were chosen {len(self.blocks)} times by {len(scores[0])} layers"]
        failures, valid = [], inside(self.rows.lengths, self.blocks[0].device) if self.blocks else None
        for i, (exact, plain, blocks) in enumerate(zip(*scores, self.blocks, strict=True)):
            assert valid is not None
            tolerance = score_tolerance(exact, plain, self.dtype)
            failures += judge_blocks(f"layer {i}", blocks, exact, valid, self.config, tolerance)
        return failures

    def compare(self, name: str, actual: Tensor, exact: Tensor, plain: Tensor) -> list[str]:
        """Three-way failures of rows [r, t, ...], padding left out."""
        valid = inside(self.rows.lengths, actual.device)
        return compare(name, actual[valid], exact[valid], plain[valid], self.dtype)

    def compare_gradients(
        self, named: dict[str, Tensor | None], prefix: str = "", dtype: torch.dtype | None = None
    ) -> list[str]:
        """Three-way failures of the gradients of weights."""
        exact, plain = self.oracles
        wanted = {name: exact.weights[prefix + name].grad for name in named}
        missing = [name for name, grad in named.items() if grad is None and wanted[name] is not None]
        failures = [f"gradient of {name}: none" for name in missing]
        unit = 0.05 * max(float(rms(grad)) for grad in wanted.values() if grad is not None)
        for name, grad in named.items():
            if grad is not None:
                want, other = (o.weights[prefix + name].grad for o in (exact, plain))
                want, other = (torch.zeros_like(grad, dtype=torch.float64) if x is None else x for x in (want, other))
                failures += compare(f"gradient of {name}", grad, want, other, dtype or self.dtype, unit)
        return failures


def same_choices(one: list[Tensor], other: list[Tensor]) -> list[str]:
    """Failures of two calls with the same inputs that chose other blocks."""
    same = len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    return [] if same else ["a second call with the same inputs chose other blocks"]


def same_gradients(model: NSALanguageModel, loss_of: Callable[[], Tensor], targets: int) -> list[str]:
    """Failures of a second backward pass of the same loss to give the bits of the first."""
    first = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    loss = loss_of()
    loss.backward(torch.full_like(loss, targets))
    names = [name for name, p in model.named_parameters() if p.grad is not None]
    others = [name for name in names if not draws.same_bits(first[name], dict(model.named_parameters())[name].grad)]
    return [f"deterministic gradients of {', '.join(others)} are others in a second call"] if others else []


# --- model -----------------------------------------------------------------------------------------------------------


def draw_batch(rows: Rows, family: dict[str, Any], case: dict[str, Any], device: str) -> Tensor:
    """ids [b, t]."""
    gen = subjects.seeded(case["seed"])
    return subjects.draw_ids(rows.b * rows.t, family, case["alphabet"], gen).view(rows.b, rows.t).to(device)


def check_model(
    model: NSALanguageModel, rows: Rows, family: dict[str, Any], case: dict[str, Any], device: str
) -> list[str]:
    """Logits; loss and the gradients of all weights, of several calls the last one's too."""
    ids = draw_batch(rows, family, case, device)
    kept = ids.clone()
    call, loss_of = model, model.loss
    if family["backend"]:
        call, loss_of = (subjects.compiled(x, family["backend"]) for x in (model, model.loss))
    with torch.no_grad(), recorded_choices() as chosen:
        logits = call(ids, **rows.options, branch=case["branch"])
    twins = Twins(model, rows, chosen)
    told = rows.stack(ids)
    with torch.no_grad():
        answers = [oracle(told, twins.blocks, case["branch"]) for oracle in twins.oracles]
    failures = twins.judge([answer.scores for answer in answers])
    failures += twins.compare("logits", rows.stack(logits), *(answer.logits for answer in answers))
    targets = sum(n - 1 for n in rows.lengths)
    if not targets:
        return failures

    with recorded_choices() as again:
        loss = loss_of(ids, **rows.options)
        loss.backward(torch.full_like(loss, targets))  # of the sum: those of a mean leave what fp16 can tell apart
    if case["deterministic"]:
        failures += same_gradients(model, lambda: loss_of(ids, **rows.options), targets)
    if case["branch"] is None and not family["backend"]:
        failures += same_choices(chosen, again)
    twins = Twins(model, rows, again)
    losses = []
    for oracle in twins.oracles:
        losses.append(next_token_loss(oracle(told, twins.blocks).logits, told, rows.lengths))
        losses[-1].backward()
    failures += compare("loss", loss * targets, losses[0], losses[1], twins.dtype)
    failures += twins.compare_gradients({name: p.grad for name, p in model.named_parameters()})
    return failures if torch.equal(ids, kept) else [*failures, "the ids were changed"]


# --- layer -----------------------------------------------------------------------------------------------------------


def check_layer(
    model: NSALanguageModel, rows: Rows, family: dict[str, Any], case: dict[str, Any], device: str
) -> list[str]:
    """Outputs and gradients of an attention layer, whatever pads its rows, and whatever stands in other sequences."""
    layer, name = model.layers[0].attn, "layers.0.attn."
    dtype, dim = next(model.parameters()).dtype, family["sizes"]["dim"]
    gen = draws.generator(case["seed"], device)
    clean, grad = (torch.randn(rows.b, rows.t, dim, generator=gen, device=device).to(dtype) for _ in range(2))
    elsewhere = ~rows.put([x > -1 for x in rows.take(torch.zeros(rows.b, rows.t, device=device))],
                          torch.zeros(rows.b, rows.t, dtype=torch.bool, device=device))  # fmt: skip
    x = draws.poison(clean, elsewhere, case["poison"], gen).requires_grad_()
    kept = x.detach().clone()
    call = subjects.compiled(layer, family["backend"]) if family["backend"] else layer
    with recorded_choices() as chosen:
        y = call(x, **rows.options, branch=case["branch"])
        y.backward(grad)
    failures = []
    if bool((y[elsewhere] != 0).any()) or bool((x.grad[elsewhere] != 0).any()):
        failures.append("outputs or gradients of padding are not 0")
    twins = Twins(model, rows, chosen)
    outputs, scores, inputs = [], [], []
    for oracle in twins.oracles:
        leaf = rows.stack(x.detach()).to(oracle.compute).requires_grad_()
        o, s, _ = oracle.attention(oracle.keep(leaf), name, twins.blocks[0], case["branch"])
        valid = inside(rows.lengths, device)
        o.backward(rows.stack(grad).to(oracle.compute) * valid[..., None])
        outputs.append(o)
        scores.append([s])
        inputs.append(leaf.grad)
    failures += twins.judge(scores)
    failures += twins.compare("outputs", rows.stack(y), *outputs)
    failures += twins.compare("gradient of x", rows.stack(x.grad), *inputs)
    failures += twins.compare_gradients({n: p.grad for n, p in layer.named_parameters()}, name)
    if not draws.same_bits(x.detach(), kept):
        failures.append("the input was changed")
    if case["isolate"] and len(rows.lengths) > 1:
        failures += check_isolation(call, rows, case, kept, grad, y.detach(), x.grad)
    return failures


def check_isolation(
    call: Callable[..., Tensor], rows: Rows, case: dict[str, Any], x: Tensor, grad: Tensor, y: Tensor, grad_x: Tensor,
) -> list[str]:  # fmt: skip
    """Failures of a call in which one sequence is NaN: the others' outputs and gradients stay what they were."""
    number = case["seed"] % len(rows.lengths)
    sequences = rows.take(x)
    sequences[number] = torch.full_like(sequences[number], float("nan"))
    broken = rows.put(sequences, x).requires_grad_()
    again = call(broken, **rows.options, branch=case["branch"])
    again.backward(grad)
    failures = []
    for what, one, other in (("outputs", y, again.detach()), ("gradient of x", grad_x, broken.grad)):
        for i, (a, b) in enumerate(zip(rows.take(one), rows.take(other), strict=True)):
            if i != number and not torch.allclose(a, b, rtol=1e-2, atol=1e-2 * float(a.abs().max())):
                failures.append(f"{what} of sequence {i} are not what they were where sequence {number} is NaN")
    return failures


# --- transformers ----------------------------------------------------------------------------------------------------


def check_hf(
    model: NSALanguageModel, rows: Rows, family: dict[str, Any], case: dict[str, Any], device: str
) -> list[str]:
    """Logits, loss and gradients of the same weights in transformers' class, padded on a side or packed."""
    from nsa_compile.hf import NsaForCausalLM

    hf = NsaForCausalLM.from_language_model(model).train()
    ids = draw_batch(rows, family, case, device)
    told: dict[str, Tensor] = {}
    seen, labels = rows, torch.full_like(ids, -100)
    if "lengths" in rows.options:
        valid = torch.arange(rows.t, device=device) < rows.options["lengths"][:, None]
        if case["side"] == "left":  # tokens of a row at its end
            ids, valid = (x.flip(1) for x in (ids, valid))
            places = [(row, rows.t - n) for (row, _), n in zip(rows.places, rows.lengths, strict=True)]
            seen = rows._replace(places=places)
        told["attention_mask"] = valid.long()
    elif "cu_seqlens" in rows.options:
        position = rows.put([torch.arange(n, device=device) for n in rows.lengths], torch.zeros_like(ids))
        rest = rows.t - sum(rows.lengths)
        position[0, rows.t - rest :] = torch.arange(rest, device=device)  # what is behind is a sequence of its own
        told["position_ids"] = position
    labels = seen.put(seen.take(ids), labels)
    for row, at in seen.places:
        labels[row, at] = -100  # nothing precedes the first
    with recorded_choices() as chosen:
        out = hf(input_ids=ids, labels=labels, **told)
    targets = sum(n - 1 for n in rows.lengths)
    # the layers see rows that begin at column 0
    twins = Twins(model, rows, chosen)
    texts, answers = seen.stack(ids), []
    for oracle in twins.oracles:
        answers.append(oracle(texts, twins.blocks))
    failures = twins.judge([answer.scores for answer in answers])
    failures += twins.compare("logits", seen.stack(out.logits), *(answer.logits for answer in answers))
    if targets:
        losses = [next_token_loss(answer.logits, texts, rows.lengths) for answer in answers]
        for loss in losses:
            loss.backward()
        out.loss.backward(torch.full_like(out.loss, targets))
        kind = torch.float32 if twins.dtype == torch.float64 else twins.dtype  # the library's loss is fp32
        failures += compare("loss", out.loss * targets, losses[0], losses[1], kind)
        named = ((name.removeprefix("model."), p.grad) for name, p in hf.named_parameters())
        names = {"embed_tokens.weight": "embed.weight", "lm_head.weight": "head.weight"}
        failures += twins.compare_gradients({names.get(name, name): grad for name, grad in named}, dtype=kind)
    return failures
