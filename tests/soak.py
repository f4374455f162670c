"""A long run of decode steps with rows that come and go: `python tests/soak.py --steps 1000000 --out soak.json`.

A pool of requests (prompts of any length, greedy or sampled, with and without a stop token) is decoded by captured
steps, of one token or with verified drafts, over one cache: at random requests begin, end and are cancelled, prompts go
through prefill graphs into a cache of one row and from there into theirs, some after tokens that are taken back, and
rows are reset. A request belongs to a row and is cut into steps as it was in a run over the whole pool at the start, so
that its logits are the same to the bit: every text is held against the one drawn then, and in the end the whole pool is
run once more. Memory of the device at the end is what it was at the start, to the byte, and that of the host within
128 MiB.

Exit code 0 if all of that holds. The record goes to --out and to stdout, a line each for what is wrong to stderr.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import platform
import random
import resource
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import nsa_compile
from nsa_compile import DecodeGraph, NSACache, NSAConfig, NSALanguageModel, PrefillGraph

VOCAB, DRAFTS = 64, 7
CONFIG = NSAConfig(
    dim=64, n_heads=4, n_kv_groups=2, d_k=32, d_v=32, l=8, d=4, l_sel=16, n_sel=4, w=24, n_layers=2, vocab_size=VOCAB,
    phi="mlp",
)  # fmt: skip
SCALES = {"W_Q": 3.0, "attn.out": 6.0, "head": 3.0}
"""Weights that are larger than 1 / sqrt(width)."""
RSS_SLACK = 128 * 2**20
FAILURES = 20
"""A run ends after so many."""


@dataclass(frozen=True)
class Request:
    """One of the pool."""

    number: int
    row: int
    prompt: list[int]
    drafted: bool
    arguments: dict[str, Any]


@dataclass
class Running:
    """A request in its row."""

    request: Request
    tokens: list[int] = field(default_factory=list)
    cancelled: bool = False

    @property
    def left(self) -> int:
        """Tokens that it may still draw."""
        return self.request.arguments["max_new_tokens"] - len(self.tokens)


def make_model(device: str, dtype: torch.dtype, seed: int) -> NSALanguageModel:
    """A model of random weights whose next token hangs on its whole past."""
    generator = torch.Generator().manual_seed(seed)
    model = NSALanguageModel(CONFIG)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                scale = next((x for part, x in SCALES.items() if part in name), 1.0)
                weight.copy_(torch.randn(weight.shape, generator=generator) * scale * weight[0].numel() ** -0.5)
    return model.to(device, dtype).eval()


def draw_requests(rows: int, number: int, capacity: int, rng: random.Random) -> list[Request]:
    """Prompts and settings; a prompt and its new tokens fill the cache at most."""
    requests = []
    for i in range(number):
        length = rng.choice((1, 2, rng.randint(1, capacity // 2), rng.randint(1, capacity // 2)))
        new = rng.choice((1, capacity - length - DRAFTS, rng.randint(1, capacity // 2), rng.randint(1, capacity // 2)))
        arguments = {"max_new_tokens": new, "stop_token": rng.choice((None, None, rng.randrange(VOCAB)))}
        if rng.random() < 0.15:
            arguments |= {"temperature": rng.choice((0.7, 1.0)), "top_p": rng.choice((0.9, 1.0)), "seed": i}
        prompt = [rng.randrange(VOCAB) for _ in range(length)]
        requests.append(Request(i, i % rows, prompt, i // rows % 4 == 3, arguments))
    return requests


class Soak:
    """Model, cache, graphs and requests of a run."""

    def __init__(self, device: str, dtype: torch.dtype, rows: int, requests: int, capacity: int, seed: int) -> None:
        self.rng = random.Random(seed)
        model = make_model(device, dtype, seed)
        self.cache, self.slot = (NSACache.for_model(model, n, capacity) for n in (rows, 1))
        self.fill = PrefillGraph(model, self.slot, sizes=(8, 32, 128))
        self.graphs = {False: DecodeGraph(model, self.cache), True: DecodeGraph(model, self.cache, drafts=DRAFTS)}
        self.requests = draw_requests(rows, requests, capacity, self.rng)
        self.running: dict[int, Running] = {}
        self.expected: dict[int, list[int]] = {}
        self.failures: list[str] = []
        self.counts = dict.fromkeys(("steps", "drafted_steps", "tokens", "finished", "cancelled", "rollbacks"), 0)
        # what drafts are guessed from: each request's text, and that of each row, at the positions of the tokens
        self._texts = torch.zeros(requests, capacity + DRAFTS + 1, dtype=torch.int64, device=device)
        self._text_of_row = torch.zeros(rows, capacity + DRAFTS + 1, dtype=torch.int64, device=device)
        self._ahead = torch.arange(1, DRAFTS + 1, device=device)

    def guesses(self) -> Tensor:
        """Drafts [rows, DRAFTS], some of them wrong. What a row gets depends on its request and position alone, and so
        does how its text is cut into steps: only then its logits are the same to the bit.
        """
        at = self.cache.positions.long()[:, None] + self._ahead
        known = self._text_of_row.gather(1, at.clamp_max(self._text_of_row.shape[1] - 1))
        return torch.where(at * at % 11 == 3, (known + 1) % VOCAB, known)

    def begin(self, request: Request) -> None:
        """Prefill a request and start it in its row; nothing waits for the device."""
        row = request.row
        self.slot.reset()
        self.fill([request.prompt[:-1]])
        room = self.cache.capacity - self.slot.host_lengths[0]
        if room and self.rng.random() < 0.5:  # tokens that are taken back leave no trace
            wrong = self.rng.randint(1, min(8, room))
            self.fill([[self.rng.randrange(VOCAB) for _ in range(wrong)]])
            self.slot.rollback(wrong)
            self.counts["rollbacks"] += 1
        if self.rng.random() < 0.3:
            self.cache.reset([row])
        self.cache.copy_row(row, self.slot)
        self._text_of_row[row].copy_(self._texts[request.number])
        self.graphs[request.drafted].start(row, request.prompt[-1], **request.arguments)
        self.running[row] = Running(request)

    def turn(self) -> None:
        """A few steps of each graph that has rows, and then a look at what they drew."""
        plain, drafted = (
            max((x.left for x in self.running.values() if x.request.drafted == kind), default=0)
            for kind in (False, True)
        )
        if plain:
            n = min(self.rng.randint(1, 48), plain)
            self.graphs[False].step(n)
            self.counts["steps"] += n
        if drafted:
            n = min(self.rng.randint(1, 12), drafted)
            for _ in range(n):
                self.graphs[True].step(drafts=self.guesses())
            self.counts["steps"] += n
            self.counts["drafted_steps"] += n
        for graph in self.graphs.values():
            for update in graph.collect():
                running = self.running[update.row]
                running.tokens += update.tokens
                self.counts["tokens"] += len(update.tokens)
                if update.finished:
                    self.end(self.running.pop(update.row))

    def cancel(self, row: int) -> None:
        """End a row's request before its time."""
        running = self.running[row]
        running.cancelled = True
        self.graphs[running.request.drafted].cancel(row)

    def end(self, running: Running) -> None:
        """Hold a text against that of the first run."""
        request, tokens = running.request, running.tokens
        self.counts["cancelled" if running.cancelled else "finished"] += 1
        expected = self.expected.setdefault(request.number, tokens)
        if tokens != (expected[: len(tokens)] if running.cancelled else expected):
            first = next((i for i, (a, b) in enumerate(zip(tokens, expected, strict=False)) if a != b), None)
            where = f"other tokens from {first} on" if first is not None else f"{len(tokens)} tokens"
            self.failures.append(f"step {self.counts['steps']}, request {request.number} in row {request.row}: {where}")

    def run_pool(self) -> None:
        """Every request once, each row's one after the other."""
        waiting = [deque(r for r in self.requests if r.row == row) for row in range(self.cache.batch)]
        while any(waiting) or self.running:
            for row, queue in enumerate(waiting):
                if queue and row not in self.running:
                    self.begin(queue.popleft())
            self.turn()

    def learn(self) -> None:
        """The text of every request; first without guesses, from which those of the second run are made."""
        self.run_pool()
        for number, tokens in self.expected.items():
            first = len(self.requests[number].prompt)
            self._texts[number, first : first + len(tokens)] = torch.tensor(tokens)
        # in steps of other sizes logits may differ in the last bits
        for request in self.requests:
            if request.drafted:
                del self.expected[request.number]
        self.run_pool()

    def run(self, steps: int) -> None:
        """Requests that come and go at random for a number of steps; then no row decodes."""
        end = self.counts["steps"] + steps
        by_row = [[r for r in self.requests if r.row == row] for row in range(self.cache.batch)]
        while self.counts["steps"] < end and len(self.failures) < FAILURES:
            for row, requests in enumerate(by_row):
                if row not in self.running and self.rng.random() < 0.6:
                    self.begin(self.rng.choice(requests))
            if self.running and self.rng.random() < 0.03:
                self.cancel(self.rng.choice(sorted(self.running)))
            self.turn()
        for row in list(self.running):
            self.cancel(row)
        self.turn()
        if self.cache.positions.tolist() != self.cache.host_lengths:
            held = f"{self.cache.positions.tolist()}, counted {self.cache.host_lengths}"
            self.failures.append(f"step {self.counts['steps']}: rows hold {held}")


def memory(device: str) -> dict[str, int]:
    """Bytes of the device's tensors, of what is reserved for them, and of the host's process."""
    gc.collect()
    cuda = device.startswith("cuda")
    statm = Path("/proc/self/statm")
    pages = int(statm.read_text().split()[1]) if statm.exists() else 0
    return {
        "allocated": torch.cuda.memory_allocated() if cuda else 0,
        "reserved": torch.cuda.memory_reserved() if cuda else 0,
        "rss": pages * resource.getpagesize(),
    }


def versions() -> dict[str, str]:
    """Of what takes part."""
    try:
        import triton

        found = triton.__version__
    except ImportError:
        found = "none"
    return {
        "nsa_compile": nsa_compile.__version__, "torch": torch.__version__, "triton": found,
        "python": platform.python_version(),
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run and write the record; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1_000_000, help="decode steps (default 1,000,000)")
    parser.add_argument("--out", type=Path, help="file for the record (JSON)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--rows", type=int, default=8, help="rows of the cache")
    parser.add_argument("--requests", type=int, default=96, help="requests in the pool")
    parser.add_argument("--capacity", type=int, default=768, help="tokens per row of the cache")
    parser.add_argument("--seed", type=int, default=0)
    o = parser.parse_args(arguments)
    least = {"steps": 1, "rows": 1, "requests": o.rows, "capacity": 2 * DRAFTS + 4}
    for name, minimum in least.items():
        if getattr(o, name) < minimum:
            parser.error(f"--{name}: expected at least {minimum}, got {getattr(o, name)}")

    soak = Soak(o.device, getattr(torch, o.dtype), o.rows, o.requests, o.capacity, o.seed)
    soak.learn()
    soak.run(min(5000, o.steps))  # until the allocators hold what they will hold
    soak.counts = dict.fromkeys(soak.counts, 0)
    samples, began = [{"step": 0} | memory(o.device)], time.perf_counter()
    while soak.counts["steps"] < o.steps and len(soak.failures) < FAILURES:
        soak.run(min(max(1, o.steps // 10), o.steps - soak.counts["steps"]))
        samples.append({"step": soak.counts["steps"]} | memory(o.device))
        print(samples[-1], file=sys.stderr, flush=True)
    seconds = time.perf_counter() - began
    soaked = dict(soak.counts)
    soak.run_pool()
    first, last = samples[0], {"step": "end"} | memory(o.device)
    for name, slack in (("allocated", 0), ("reserved", 0), ("rss", RSS_SLACK)):
        if not first[name] - slack <= last[name] <= first[name] + slack:
            soak.failures.append(f"memory: expected {name} of {first[name]} bytes as at the start, got {last[name]}")
    for name in ("finished", "cancelled", "rollbacks", "drafted_steps"):
        if not soak.counts[name]:
            soak.failures.append(f"steps: expected enough for some to be {name}, got {o.steps} with none")
    cuda = o.device.startswith("cuda")
    record = {
        "command": " ".join(["python tests/soak.py", *(sys.argv[1:] if arguments is None else arguments)]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(o.device) if cuda else f"cpu, {torch.get_num_threads()} threads",
        "versions": versions(),
        "seed": o.seed,
        "seconds": round(seconds, 1),
        **soaked,
        "memory": [*samples, last],
        "failures": soak.failures,
    }
    text = json.dumps(record, indent=1)
    if o.out is not None:
        o.out.write_text(text + "\n")
    print(text)
    for failure in soak.failures:
        print(failure, file=sys.stderr)
    return 1 if soak.failures else 0


if __name__ == "__main__":
    sys.exit(main())
