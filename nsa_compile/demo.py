"""The demo: train a small byte model, decode from its cache, show what was read, hold it against the full forward."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from nsa_compile.config import NSAConfig
from nsa_compile.data import Corpus, unigram_entropy
from nsa_compile.generate import generate
from nsa_compile.graphs.cache import NSACache
from nsa_compile.graphs.prefill import prefill
from nsa_compile.metrics import METRICS_FILE
from nsa_compile.model import NSALanguageModel
from nsa_compile.module import BRANCHES
from nsa_compile.storage import naming
from nsa_compile.terminal import (
    TextStream,
    build_with_progress,
    can_compile,
    say_corpus,
    say_model,
    train_with_progress,
)
from nsa_compile.train import DATA_FOLDER, TrainConfig, checkpoint_to_resume, run_lock

DECODE_FILE = "decode.jsonl"
DEMO_MODEL = NSAConfig(
    dim=128, n_heads=4, n_kv_groups=1, d_k=32, d_v=32, l=8, d=4, l_sel=8, n_sel=6, w=32, n_layers=2, vocab_size=256
)
DEMO_SEQ_LEN = 256
DEMO_HELD_OUT = DEMO_SEQ_LEN * 8
DEMO_PROMPT, DEMO_NEW = 128, 96
DEMO_TEMPERATURE, DEMO_TOP_P = 0.7, 0.9
DECODE_TOLERANCE = 1e-9


def run_demo(text: Sequence[Path], out: Path, steps: int, compile: bool) -> None:
    """The parts of `demo`, one after the other, in a folder that no other run has."""
    with run_lock(out):
        checkpoint_to_resume(out, False)
        run_parts(Console(markup=False, highlight=False), text, out, steps, compile)


def run_parts(console: Console, text: Sequence[Path], out: Path, steps: int, compile: bool) -> None:
    """The parts of `demo` in a folder that is locked."""
    corpus = build_with_progress(console, text, out / DATA_FOLDER)
    if corpus.validation.n_tokens < DEMO_HELD_OUT:
        raise ValueError(
            f"text: expected enough to hold out {DEMO_HELD_OUT} bytes, got {corpus.validation.n_tokens} of "
            f"{corpus.train.n_tokens + corpus.validation.n_tokens}"
        )
    entropy = unigram_entropy(corpus.train)
    say_corpus(console, corpus)
    compile = compile and can_compile(console, "cpu")
    torch.manual_seed(0)
    model = NSALanguageModel(DEMO_MODEL)
    config = TrainConfig(
        steps=steps, seq_len=DEMO_SEQ_LEN, batch_size=4, lr=4e-3, warmup=max(1, steps // 10),
        compile="model" if compile else "none", stats_every=steps,
        eval_every=steps, eval_batches=8, save_every=steps, packed=False,
    )  # fmt: skip
    say_model(console, model, config)
    result = train_with_progress(console, model, corpus, config, out, resume=False, lock=False)
    if result.interrupted:
        return
    model.eval()

    prompt, reads = stream_demo(console, model, corpus)
    with naming(out / DECODE_FILE):
        (out / DECODE_FILE).write_text("".join(json.dumps(step._asdict()) + "\n" for step in reads.steps))
    show_reads(console, reads.steps)
    window = held_out_tokens(corpus, DEMO_HELD_OUT).view(-1, DEMO_SEQ_LEN)
    show_gates(console, model, window)
    difference = decode_difference(model, prompt, reads.tokens)
    equal = difference <= DECODE_TOLERANCE
    console.print(
        f"decode against one full forward over the same {len(prompt) + len(reads.tokens)} bytes, both in fp64: largest "
        f"difference of a logit {difference:.1e}, {'within' if equal else 'NOT within'} {DECODE_TOLERANCE:.0e}"
    )
    console.print(
        f"loss on held-out text {result.val_loss:.3f} nats/byte; entropy of single bytes (a model without context) "
        f"{entropy:.3f} nats/byte"
    )
    console.print(
        f"checkpoint {result.checkpoint}, metrics {out / METRICS_FILE} and {out / DECODE_FILE}", soft_wrap=True
    )
    if not equal:
        raise typer.Exit(1)


class StepReads(NamedTuple):
    """Tokens that the layers read in one decode step, as (cmp, slc, win, total)."""

    cached: int
    """Tokens in the cache, the new one counted."""
    nominal: list[int]
    actual: list[list[list[int]]]
    """[layer][group]"""

    def mean(self) -> list[float]:
        """Actual reads as a mean over layers and groups."""
        return torch.tensor(self.actual, dtype=torch.float64).mean((0, 1)).tolist()


class Streamed(NamedTuple):
    """What the demo generated, and its reads in each decode step."""

    tokens: list[int]
    steps: list[StepReads]


def stream_demo(console: Console, model: NSALanguageModel, corpus: Corpus) -> tuple[list[int], Streamed]:
    """Continue the start of the held-out text from a static cache, printing it as it comes."""
    prompt = held_out_tokens(corpus, DEMO_PROMPT).tolist()
    cache = NSACache.for_model(model, 1, DEMO_PROMPT + DEMO_NEW)
    stream, steps = TextStream(), []

    def on_token(step: int, tokens: list[int | None]) -> None:
        stream.write(tokens[0])
        actual = [layer.actual_reads[0].tolist() for layer in cache.layers]
        steps.append(StepReads(len(prompt) + step, cache.layers[0].nominal_reads[0].tolist(), actual))

    console.print("decode runs uncompiled: compiling it would take longer than these few steps")
    console.rule(f"{len(prompt)} held-out bytes >>> {DEMO_NEW} decoded from a static cache")
    for byte in prompt:
        stream.write(byte)
    print(" >>> ", end="")
    result = generate(
        model,
        [prompt],
        max_new_tokens=DEMO_NEW,
        temperature=DEMO_TEMPERATURE,
        top_p=DEMO_TOP_P,
        prefill_chunk=64,
        cache=cache,
        on_token=on_token,
    )
    stream.close()
    console.rule()
    return prompt, Streamed(result.tokens[0], steps)


def held_out_tokens(corpus: Corpus, n: int) -> Tensor:
    """The first n tokens of the held-out text, int64 [n]."""
    return corpus.validation.read(0, n)


def show_reads(console: Console, steps: Sequence[StepReads]) -> None:
    """A table of reads, some of the steps."""
    table = Table("cached", *BRANCHES, "total", title="Tokens read per decode step, nominal / actual")
    for step in [*steps[:: max(1, len(steps) // 8)], steps[-1]]:
        pairs = zip(step.nominal, step.mean(), strict=True)
        table.add_row(str(step.cached), *(f"{nominal} / {actual:.1f}" for nominal, actual in pairs))
    table.caption = "actual: mean over layers and groups"
    console.print(table)


def show_gates(console: Console, model: NSALanguageModel, ids: Tensor) -> None:
    """A table of the gates' means per layer on token ids [b, t]."""
    table = Table("layer", *BRANCHES, "entropy (nats)", title="Gates on held-out text, mean per layer")
    for number, statistics in enumerate(model.gate_statistics(ids)):
        table.add_row(str(number), *(f"{x:.3f}" for x in (*statistics.mean.tolist(), statistics.entropy.item())))
    console.print(table)


def decode_difference(model: NSALanguageModel, prompt: list[int], new: list[int]) -> float:
    """Largest difference between the logits of a prefill and decode steps and those of one forward, in fp64."""
    exact = NSALanguageModel(model.config).double().eval()
    exact.load_state_dict(model.state_dict())
    cache = NSACache.for_model(exact, 1, len(prompt) + len(new))
    with torch.no_grad():
        decoded = [prefill(exact, [prompt], cache, chunk=64)]
        for token in new[:-1]:
            cache.reserve(1)
            decoded.append(exact(torch.tensor([[token]]), cache=cache)[:, 0])
        full = exact(torch.tensor([prompt + new[:-1]]))[0, len(prompt) - 1 :]
    return (torch.cat(decoded) - full).abs().max().item()
