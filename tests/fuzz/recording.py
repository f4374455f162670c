"""What a model was fed through its caches, and what it said: the blocks it chose, and the text of every row.

A `Recorder` stands in a model's place. It keeps the tokens that each row of each cache holds, with the logits and the
blocks that they got when they were fed; when a row goes back (rollback, rejected drafts, reset), what it held is kept
as a text of its own. `check_texts` holds every token of every text against one forward of the whole by the oracle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from model_oracle import Oracle, compare, inside, judge_blocks, score_tolerance, stack_rows
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS

from nsa_compile import NSACache, NSALanguageModel

CHOOSERS = {"nsa_compile::select_blocks": lambda out: out, "nsa_compile::decode_attention": lambda out: out[1]}
"""Ops that choose blocks, and where their outputs have them."""
KEPT = 6
"""Texts that a cache has left behind which are checked besides those it holds."""


@contextmanager
def recorded_choices() -> Iterator[list[Tensor]]:
    """The blocks [b, t, g, n_sel] that layers choose meanwhile, in order, in eager and compiled code alike."""
    chosen: list[Tensor] = []
    bodies = {name: OPDEFS[name]._backend_fns[None] for name in CHOOSERS if name in OPDEFS}

    def listen(body: Callable[..., Any], pick: Callable[[Any], Tensor]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            out = body(*args, **kwargs)
            chosen.append(pick(out).clone())
            return out

        return run

    try:
        for name, body in bodies.items():
            OPDEFS[name]._backend_fns[None] = torch._disable_dynamo(listen(body, CHOOSERS[name]))
        yield chosen
    finally:
        for name, body in bodies.items():
            OPDEFS[name]._backend_fns[None] = body


@dataclass
class Text:
    """Tokens of a row with the logits [vocab] (None where none were asked for) and blocks [g, n_sel] of each layer."""

    ids: list[int] = field(default_factory=list)
    logits: list[Tensor | None] = field(default_factory=list)
    blocks: list[list[Tensor]] = field(default_factory=list)

    def upto(self, n: int) -> Text:
        return Text(self.ids[:n], self.logits[:n], self.blocks[:n])


class Recorder(nn.Module):
    """A model that is recorded; `run` is what is called in its place, such as the model compiled."""

    def __init__(self, model: NSALanguageModel, run: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        self.call: Callable[..., Tensor] = model if run is None else run
        self.caches: list[NSACache] = []
        self.held: dict[int, list[Text]] = {}
        self.left: list[Text] = []
        self.failures: list[str] = []
        self.runs_eagerly = run is None or run is model

    def texts(self, cache: NSACache) -> list[Text]:
        """What each row of a cache holds."""
        if id(cache) not in self.held:
            self.caches.append(cache)  # so that no other one gets its id
            self.held[id(cache)] = [Text() for _ in range(cache.batch)]
        return self.held[id(cache)]

    def forward(
        self, ids: Tensor, cache: NSACache, lengths: Tensor | None = None, *, last_only: bool = False
    ) -> Tensor:
        """The model's call, recorded."""
        b, t = ids.shape
        starts = cache.positions.tolist()
        with recorded_choices() as chosen:
            logits = self.call(ids, cache=cache, lengths=lengths, last_only=last_only)
        counts = [t] * b if lengths is None else lengths.tolist()
        ends = [start + count for start, count in zip(starts, counts, strict=True)]
        layers = len(cache.layers) if self.config.attention == "nsa" else 0
        if len(chosen) != layers:
            self.failures.append(f"blocks were chosen {len(chosen)} times by {layers} layers")
            return logits
        for number, layer in enumerate(cache.layers):
            if layer.positions.tolist() != ends:
                self.failures.append(f"layer {number}: positions {layer.positions.tolist()}, expected {ends}")
        rows = ids.tolist()
        for row, text in enumerate(self.texts(cache)):
            if not counts[row]:
                continue
            if len(text.ids) < starts[row]:
                self.failures.append(f"row {row} was fed at {starts[row]}, and holds {len(text.ids)} tokens")
                continue
            self.go_back(cache, row, starts[row])
            text = self.texts(cache)[row]
            for i in range(counts[row]):
                text.ids.append(rows[row][i])
                known = logits[row, -1 if last_only else i] if not last_only or i == counts[row] - 1 else None
                text.logits.append(None if known is None else known.clone())
                text.blocks.append([blocks[row, i] for blocks in chosen])
        if layers:
            self.check_reads(cache, starts, counts)
        return logits

    def go_back(self, cache: NSACache, row: int, length: int) -> None:
        """Note that a row holds its first `length` tokens only."""
        texts = self.texts(cache)
        if length < len(texts[row].ids):
            if len(self.left) < KEPT:
                self.left.append(texts[row])
            texts[row] = texts[row].upto(length)

    def copy_row(self, cache: NSACache, row: int, source: NSACache, source_row: int) -> None:
        """`NSACache.copy_row`, recorded."""
        self.go_back(cache, row, 0)
        cache.copy_row(row, source, source_row)
        held = self.texts(source)[source_row]
        self.texts(cache)[row] = held.upto(source.host_lengths[source_row])

    def copy(self, cache: NSACache, other: NSACache) -> None:
        """Note that `other` is a copy of `cache`."""
        self.texts(other)[:] = [text.upto(len(text.ids)) for text in self.texts(cache)]

    def check_reads(self, cache: NSACache, starts: list[int], counts: list[int]) -> None:
        """Hold the reads that the layers counted against the contract's formulas."""
        c = self.config
        for number, layer in enumerate(cache.layers):
            nominal, actual = [], []
            for row, count in enumerate(counts):
                s = starts[row] + count
                cmp, win = 0 if s < c.l else (s - c.l) // c.d + 1, min(c.w, s)
                parts = [cmp, c.n_sel * c.l_sel, win] if count else [0, 0, 0]
                nominal.append([*parts, sum(parts)])
                actual.append([[0] * 4] * c.n_kv_groups)
                if count:
                    blocks = self.texts(cache)[row].blocks[-1][number].tolist()
                    slc = [sum(min(c.l_sel, s - j * c.l_sel) for j in of if j >= 0) for of in blocks]
                    actual[-1] = [[cmp, n, win, cmp + n + win] for n in slc]
            if layer.nominal_reads.tolist() != nominal:
                self.failures.append(f"layer {number}: nominal reads {layer.nominal_reads.tolist()}, not {nominal}")
            if layer.actual_reads.tolist() != actual:
                self.failures.append(f"layer {number}: actual reads {layer.actual_reads.tolist()}, not {actual}")


def check_texts(recorder: Recorder, config: Mapping[str, Any], at_once: float) -> list[str]:
    """Failures of all that was recorded, against the oracle's forward of each text as a whole.

    at_once: cells of the dense masks of the rows that are computed together.
    """
    texts = [text for texts in recorder.held.values() for text in texts] + recorder.left
    texts = [text for text in texts if text.ids]
    failures = list(recorder.failures)
    dtype, state = recorder.model.embed.weight.dtype, recorder.model.state_dict()
    while texts:
        longest = max(len(text.ids) for text in texts)
        part = texts[: max(1, int(at_once / (longest**2 * config["n_heads"])))]
        texts = texts[len(part) :]
        failures += _check_rows(part, config, state, dtype)
    return failures


@torch.no_grad()
def _check_rows(texts: list[Text], config: Mapping[str, Any], state: Mapping[str, Tensor], dtype) -> list[str]:
    device = state["embed.weight"].device
    lengths = [len(text.ids) for text in texts]
    ids = stack_rows([torch.tensor(text.ids) for text in texts]).to(device)
    layers = len(texts[0].blocks[0])
    blocks = [stack_rows([torch.stack([b[i] for b in text.blocks]) for text in texts], -1) for i in range(layers)]
    exact = Oracle(config, state, torch.float64)(ids, blocks)
    plain = exact if dtype == torch.float64 else Oracle(config, state, dtype)(ids, blocks)
    failures, valid = [], inside(lengths, device)
    for i in range(layers):
        scores, other = exact.scores[i], plain.scores[i]
        failures += judge_blocks(f"layer {i}", blocks[i], scores, valid, config, score_tolerance(scores, other, dtype))
    known = [(r, i) for r, text in enumerate(texts) for i, x in enumerate(text.logits) if x is not None]
    if known:
        row, at = torch.tensor(known, device=device).unbind(1)
        got = torch.stack([texts[r].logits[i] for r, i in known])  # type: ignore[misc]
        failures += compare("logits", got, exact.logits[row, at], plain.logits[row, at], dtype)
    return failures
