"""Checks of what has a state: caches in every order of calls, decode steps and prefill as graphs, generation.

However tokens come in (chunks, steps of 1 … 8, guesses that are taken back, rows reset, copied, idle, full), each gets
what one forward of the oracle over the whole row gives it; graphs give the bits of the calls they were captured from.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import draws
import subjects
import torch
from recording import Recorder, check_texts
from torch import Tensor

from nsa_compile import DecodeGraph, NSACache, NSALanguageModel, PrefillGraph, generate
from nsa_compile.ops.sampling import sample

KIND = "caches"
CASES = 12
"""Cases of a family."""
STEP = 8
"""Tokens of a step, and how many a row can take back."""


def draw_family(rng: random.Random, size: str = "gpu") -> dict[str, Any]:
    """A model, and what compiles it if any does."""
    family = subjects.draw_family(rng, size)
    backends = {None: 8, "aot_eager": 1, "inductor": 1} if size == "gpu" else {None: 19, "aot_eager": size == "cpu"}
    return {**family, "backend": draws.weighted(rng, backends)}


def draw_case(family: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """What is done with the model's cache: everything else follows from the seed."""
    tiny = family["size"] == "interpreter"
    rows, most = rng.randint(1, 2 if tiny else 4), {"gpu": 24, "cpu": 14, "interpreter": 3}[family["size"]]
    capacity = max(4, subjects.draw_length(family, rows + 3, rng))
    return {
        "what": draws.weighted(rng, {"calls": 5, "decode": 0.5 if tiny else 3, "generate": 0 if tiny else 1}),
        "seed": rng.randrange(2**31),
        "rows": rows, "capacity": capacity,
        "calls": rng.randint(min(4, most), most), "sharp": subjects.draw_sharpness(family, rng),
        "alphabet": subjects.draw_alphabet(rng), "poison": rng.choice(("none", "nan", "mixed")),
        "drafts": min(capacity - 1, rng.choice((0, 0, 1, 3, 7))),
    }  # fmt: skip


def run_case(family: dict[str, Any], case: dict[str, Any], device: str) -> list[str]:
    """Failures of a case, as one-line messages."""
    model = subjects.build(family, device, case["seed"], case["sharp"]).requires_grad_(False).eval()
    run = subjects.compiled(model, family["backend"]) if family["backend"] else model
    act: Callable[..., tuple[Recorder, list[str]]] = {"calls": calls, "decode": decode, "generate": generation}[
        case["what"]
    ]
    with torch.no_grad():
        recorder, failures = act(model, run, family, case, device)
        return failures + check_texts(recorder, asdict(model.config), subjects.CELLS[family["size"]])


def new_cache(model: NSALanguageModel, rows: int, case: dict[str, Any]) -> NSACache:
    """A cache whose buffers hold anything where nothing was written; torch's attention of dense layers reads zeros."""
    cache = NSACache.for_model(model, rows, case["capacity"])
    for row in range(rows):
        poison_row(cache, row, case)
    return cache


def poison_row(cache: NSACache, row: int, case: dict[str, Any]) -> None:
    """Fill an empty row's buffers with NaN and the like."""
    for layer in cache.layers if "k_slc" in cache.layers[0].buffers else ():
        for buffer in layer.buffers.values():
            part, gen = buffer[row : row + 1], draws.generator(case["seed"] + row, buffer.device.type)
            everywhere = torch.ones(part.shape[:2], dtype=torch.bool, device=buffer.device)
            part.copy_(draws.poison(part, everywhere, case["poison"], gen))


def int32(values: list[int], device: str) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


# --- calls in any order ----------------------------------------------------------------------------------------------


def calls(
    model: NSALanguageModel, run: Callable[..., Tensor], family: dict[str, Any], case: dict[str, Any], device: str
) -> tuple[Recorder, list[str]]:
    """Calls of the model with a cache, and of the cache's own methods, until some rows are full."""
    rng, b = random.Random(case["seed"]), case["rows"]
    recorder = Recorder(model, run)
    cache, slot = (new_cache(model, rows, case) for rows in (b, 1))
    script = _Script(recorder, family, case, rng, device)
    for _ in range(case["calls"]):
        action = draws.weighted(rng, {"chunk": 3, "step": 5, "undo": 2, "reset": 1, "copy": 1, "twin": 0.5, "over": 1})
        if action in ("chunk", "step"):
            script.feed(cache, STEP if action == "step" else case["capacity"])
        elif action == "undo":  # guesses of which some are taken back
            before = list(cache.host_lengths)
            script.feed(cache, STEP)
            back = [rng.randint(0, n - m) for n, m in zip(cache.host_lengths, before, strict=True)]
            most = [max(0, min(n, n + STEP - p)) for n, p in zip(cache.host_lengths, cache.host_peaks, strict=True)]
            further = [min(m, n + rng.choice((0, 0, 2, STEP, STEP))) for n, m in zip(back, most, strict=True)]
            cache.rollback(further)
        elif action == "reset":
            rows = sorted(rng.sample(range(b), rng.randint(1, b)))
            cache.reset(rows if len(rows) < b or rng.random() < 0.5 else None)
            for row in rows:
                recorder.go_back(cache, row, 0)
                poison_row(cache, row, case)
        elif action == "copy":  # a prompt that was prefilled elsewhere, or a row of this cache
            row, other = rng.randrange(b), rng.randrange(b)
            if rng.random() < 0.5 or row == other:
                slot.reset()
                recorder.go_back(slot, 0, 0)
                script.feed(slot, case["capacity"])
                recorder.copy_row(cache, row, slot, 0)
            else:
                recorder.copy_row(cache, row, cache, other)
        elif action == "twin":
            twin = copy.deepcopy(cache)
            recorder.copy(cache, twin)
            script.feed(twin, STEP)  # what one does the other does not see
            if rng.random() < 0.5:
                cache = twin
        else:
            script.pass_capacity(cache)
    row = script.fill(cache)
    if torch.device(device).type == "cuda" or not recorder.runs_eagerly:
        script.overrun(cache, row)
    return recorder, script.failures


class _Script:
    """Calls of a recorded model with texts that are drawn as they go on."""

    def __init__(self, recorder: Recorder, family: dict[str, Any], case: dict[str, Any], rng: random.Random, device):
        self.recorder, self.family, self.case, self.rng, self.device = recorder, family, case, rng, device
        self.gen = subjects.seeded(case["seed"])
        self.failures: list[str] = []

    def ids(self, b: int, t: int) -> Tensor:
        return subjects.draw_ids(b * t, self.family, self.case["alphabet"], self.gen).view(b, t).to(self.device)

    def feed(self, cache: NSACache, most: int, counts: list[int] | None = None) -> None:
        """One call of up to `most` tokens of each row, as far as there is room; others idle."""
        rng, room = self.rng, [cache.capacity - n for n in cache.host_lengths]
        t = rng.randint(1, max(1, min(most, max(room))))
        if counts is None:
            counts = [min(rng.choice((0, 1, t, t, rng.randint(0, t))), n) for n in room]
        t = max(t, *counts)
        whole = all(n == t for n in counts) and rng.random() < 0.7
        watched = rng.random() < 0.3
        before = [x.clone() for x in cache.tensors()] if watched else []
        cache.reserve(counts)
        lengths = None if whole else int32(counts, self.device)
        self.recorder(self.ids(len(counts), t), cache, lengths, last_only=rng.random() < 0.2)
        if watched:
            self.check_idle(cache, before, [row for row, n in enumerate(counts) if not n])

    def check_idle(self, cache: NSACache, before: list[Tensor], idle: list[int]) -> None:
        """Rows that were given no token hold what they held, but for the counters of reads."""
        for now, then in zip(cache.tensors(), before, strict=True):
            if now.dtype != torch.int64 and not all(draws.same_bits(now[row], then[row]) for row in idle):
                self.failures.append(f"a tensor {tuple(now.shape)} of an idle row was written, one of {idle}")

    def pass_capacity(self, cache: NSACache) -> None:
        """A token more than there is room for is refused, and nothing is written."""
        before, held = [x.clone() for x in cache.tensors()], list(cache.host_lengths)
        row = self.rng.randrange(cache.batch)
        counts = [0] * cache.batch
        counts[row] = cache.capacity - held[row] + 1
        try:
            cache.reserve(counts)
            self.failures.append(f"reserve took {counts[row]} tokens more than {held[row]} of {cache.capacity}")
        except ValueError as error:
            if "capacity" not in str(error):
                self.failures.append(f"reserve past the capacity says {error}")
        if torch.device(self.device).type == "cpu" and self.recorder.runs_eagerly and counts[row] <= cache.capacity:
            try:
                self.recorder.model(self.ids(cache.batch, counts[row]), cache=cache, lengths=int32(counts, self.device))
                self.failures.append(f"a call took {counts[row]} tokens more than {held[row]} of {cache.capacity}")
            except ValueError as error:
                if "capacity" not in str(error):
                    self.failures.append(f"a call past the capacity says {error}")
        same = all(draws.same_bits(now, then) for now, then in zip(cache.tensors(), before, strict=True))
        if cache.host_lengths != held or not same:
            self.failures.append("what was refused has written to the cache")

    def fill(self, cache: NSACache) -> int:
        """Fill a row up to the capacity, the last tokens one by one; the others may idle. Returns the row."""
        row = self.rng.randrange(cache.batch)
        room = cache.capacity - cache.host_lengths[row]
        single = min(room, self.rng.randint(1, 4))
        for n in ([room - single] if room > single else []) + [1] * single:
            counts = [0] * cache.batch
            counts[row] = n
            self.feed(cache, n, counts)
        self.feed(cache, 1)
        return row

    def overrun(self, cache: NSACache, row: int) -> None:
        """Where the host cannot see the positions, a full row that is driven on gives NaN."""
        t = self.rng.randint(1, min(STEP, cache.capacity))
        counts = [t if r == row else 0 for r in range(cache.batch)]
        logits = self.recorder.call(self.ids(cache.batch, t), cache=cache, lengths=int32(counts, self.device))
        if not bool(logits[row].isnan().all()):
            self.failures.append(f"tokens past the capacity of {cache.capacity} got numbers")


# --- graphs ----------------------------------------------------------------------------------------------------------


def decode(
    model: NSALanguageModel, run: Callable[..., Tensor], family: dict[str, Any], case: dict[str, Any], device: str
) -> tuple[Recorder, list[str]]:
    """Rows come and go in a `DecodeGraph`, prompts through a `PrefillGraph`; captured ones do what calls do."""
    recorder = Recorder(model, run)
    eager, failures = serve(recorder, recorder, family, case, device, capture=False)
    if torch.device(device).type == "cuda":
        captured, _ = serve(run, None, family, case, device, capture=None, given=eager["guesses"])
        failures += same_service(eager, captured)
    return recorder, failures


def same_service(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Failures of two services that should agree to the bit."""
    failures = []
    if one["drawn"] != other["drawn"]:
        failures.append(f"captured steps drew {other['drawn']}, calls {one['drawn']}")
    names = [name for name in one["tensors"] if not draws.same_bits(one["tensors"][name], other["tensors"][name])]
    return failures + [f"captured and called differ in {name}" for name in names]


def serve(
    run: Callable[..., Tensor], recorder: Recorder | None, family: dict[str, Any], case: dict[str, Any], device: str,
    capture: bool | None, given: list[Tensor | None] | None = None,
) -> tuple[dict[str, Any], list[str]]:  # fmt: skip
    """What the rows drew and what is in the caches afterwards, and failures that show at once.

    given: the guesses of each round, of which a recorded service draws its own.
    """
    rng, gen, b = random.Random(case["seed"]), subjects.seeded(case["seed"]), case["rows"]
    model = recorder.model if recorder is not None else getattr(run, "_orig_mod", run)
    capacity, failures, drawn = case["capacity"], [], []
    cache, slot = (new_cache(model, rows, case) for rows in (b, 1))
    graph = DecodeGraph(run, cache, drafts=case["drafts"], capture=capture)
    sizes = sorted({rng.randint(1, max(1, capacity // 2)) for _ in range(2)})
    fill = PrefillGraph(run, slot, sizes=sizes, capture=capture)
    running: dict[int, dict[str, Any]] = {}
    guesses: list[Tensor | None] = []
    for number in range(case["calls"]):
        for row in [row for row in graph.idle if rng.random() < 0.6]:
            if rng.random() < 0.8 or cache.host_lengths[row] + 2 > capacity:  # else it goes on with what it holds
                prompt = subjects.draw_ids(rng.randint(1, max(1, capacity - 2)), family, case["alphabet"], gen).tolist()
                slot.reset()
                fill([prompt[:-1]])
                if recorder is not None:
                    recorder.go_back(slot, 0, len(prompt) - 1)
                    recorder.copy_row(cache, row, slot, 0)
                else:
                    cache.copy_row(row, slot)
                last = prompt[-1]
            else:
                last = int(subjects.draw_ids(1, family, case["alphabet"], gen))
            length = cache.host_lengths[row]
            arguments = {
                "max_new_tokens": rng.randint(1, capacity - length - 1) if rng.random() < 0.5 else 1,
                "temperature": rng.choice((0.0, 0.0, 0.7)), "top_p": rng.choice((1.0, 0.8)),
                "seed": rng.randrange(-(2**40), 2**40),
                "stop_token": rng.choice((None, rng.randrange(family["sizes"]["vocab_size"]))),
            }  # fmt: skip
            graph.start(row, last, **arguments)
            running[row] = {"first": length, "token": last, "tokens": [], **arguments}
        if recorder is not None:
            guesses.append(guess(recorder, cache, running, case, number, device))
        drafts = guesses[number] if given is None else given[number]
        graph.step(rng.randint(1, 2 if family["size"] == "interpreter" else 9), drafts=drafts)
        if rng.random() < 0.15 and running:
            graph.cancel(rng.choice(sorted(running)))
        for update in graph.collect():
            state = running[update.row]
            state["tokens"] += update.tokens
            if update.finished:
                del running[update.row]
                drawn.append((update.row, state["tokens"], update.stopped))
                if recorder is not None:
                    recorder.go_back(cache, update.row, cache.host_lengths[update.row])
                    failures += check_drawn(recorder, cache, update.row, state, update.stopped)
        if cache.positions.tolist() != cache.host_lengths:
            failures.append(f"positions are {cache.positions.tolist()}, the host counts {cache.host_lengths}")
        for row in graph.idle:
            if rng.random() < 0.2:
                cache.reset([row])
                if recorder is not None:
                    recorder.go_back(cache, row, 0)
    tensors = {f"the cache's tensor {i}": x for i, x in enumerate([*cache.tensors(), *slot.tensors()])}
    return {"drawn": drawn, "tensors": {**tensors, "prefill's logits": fill.logits}, "guesses": guesses}, failures


def guess(
    recorder: Recorder,
    cache: NSACache,
    running: dict[int, dict[str, Any]],
    case: dict[str, Any],
    number: int,
    device: str,
) -> Tensor | None:
    """Drafts [b, drafts] of a round: of each row that runs some that are right as far as the model goes, then any."""
    rng, b = random.Random(f"{case['seed']}/{number}"), cache.batch
    if not case["drafts"] or rng.random() < 0.3:
        return None
    vocab = recorder.config.vocab_size
    drafts = [[rng.randint(-1, vocab - 1) for _ in range(case["drafts"])] for _ in range(b)]
    for row, state in running.items():
        tokens = [state["token"], *state["tokens"]]
        ids = recorder.texts(cache)[row].ids[: state["first"]] + tokens
        for i in range(min(case["drafts"], rng.choice((0, 1, 3)), cache.capacity - len(ids))):
            logits = recorder.model(torch.tensor([ids], device=device), last_only=True)[0, 0]
            drafts[row][i] = draw_alone(logits, state, len(ids))
            ids.append(drafts[row][i])
    return torch.tensor(drafts, device=device)


def check_drawn(recorder: Recorder, cache: NSACache, row: int, state: dict[str, Any], stopped: bool) -> list[str]:
    """Failures of a row's drawn tokens by the logits that were recorded."""
    text, first = recorder.texts(cache)[row], state["first"]
    tokens = state["tokens"] + ([state["stop_token"]] if stopped else [])
    if text.ids[first:] != [state["token"], *tokens[:-1]]:
        return [f"row {row} holds {text.ids[first:]}, and drew {tokens} after {state['token']}"]
    failures = []
    for i, (token, logits) in enumerate(zip(tokens, text.logits[first:], strict=False)):
        assert logits is not None
        expected = draw_alone(logits, state, first + 1 + i)
        if token != expected:
            failures.append(f"row {row} drew {token} at {first + 1 + i}, alone {expected}")
    early = [token for token in state["tokens"] if token == state["stop_token"]]
    if early or len(tokens) > state["max_new_tokens"]:
        failures.append(f"row {row} drew {tokens}, at most {state['max_new_tokens']} up to {state['stop_token']}")
    return failures


def draw_alone(logits: Tensor, state: dict[str, Any], position: int) -> int:
    """The token that a row draws from its logits [vocab], by itself."""
    if not state["temperature"]:
        return int(logits.float().argmax())
    device = logits.device
    return int(
        sample(
            logits[None], temperature=torch.tensor([state["temperature"]], device=device),
            top_p=torch.tensor([state["top_p"]], device=device), seed=torch.tensor([state["seed"]], device=device),
            position=torch.tensor([position], device=device),
        )
    )  # fmt: skip


# --- generation ------------------------------------------------------------------------------------------------------


def generation(
    model: NSALanguageModel, run: Callable[..., Tensor], family: dict[str, Any], case: dict[str, Any], device: str
) -> tuple[Recorder, list[str]]:
    """`generate` of prompts of unequal length, its tokens by the logits; captured as called, and the same again."""
    rng, gen, b = random.Random(case["seed"]), subjects.seeded(case["seed"]), case["rows"]
    new = rng.randint(1, max(1, min(case["calls"], case["capacity"] - 2)))
    prompts = [
        subjects.draw_ids(rng.randint(1, case["capacity"] - new), family, case["alphabet"], gen).tolist()
        for _ in range(b)
    ]
    arguments: dict[str, Any] = {
        "max_new_tokens": new, "temperature": [rng.choice((0.0, 0.9)) for _ in range(b)],
        "top_p": rng.choice((1.0, 0.6)), "seed": rng.randrange(2**31),
        "stop_token": rng.choice((None, rng.randrange(family["sizes"]["vocab_size"]))),
        "prefill_chunk": rng.choice((None, rng.randint(1, 40))),
    }  # fmt: skip
    recorder, cache = Recorder(model, run), new_cache(model, b, case)
    graph = DecodeGraph(recorder, cache, capture=False)
    got = generate(recorder, prompts, graph=graph, **arguments)
    failures = []
    for row, prompt in enumerate(prompts):
        state = {
            "first": len(prompt) - 1, "token": prompt[-1], "tokens": got.tokens[row],
            "temperature": arguments["temperature"][row], "top_p": arguments["top_p"], "seed": arguments["seed"] + row,
            "stop_token": arguments["stop_token"], "max_new_tokens": new,
        }  # fmt: skip
        failures += check_drawn(recorder, cache, row, state, got.stopped[row])
        if not got.stopped[row] and len(got.tokens[row]) != new:
            failures.append(f"row {row} drew {len(got.tokens[row])} tokens of {new}, and did not stop")
    again = generate(run, prompts, cache=NSACache.for_model(model, b, case["capacity"]), **arguments)
    if again != got:
        failures.append(f"generated {again}, and {got} with other capturing")
    return recorder, failures
