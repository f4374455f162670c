"""The training loop: optimizer, schedule, checkpoints, resume."""

import dataclasses
import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_model
from torch import Tensor

from nsa_compile.config import NSAConfig
from nsa_compile.data import Batch, Corpus, PackedBatches, TokenShards, prefetch
from nsa_compile.model import NSALanguageModel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
STATE_FILE = "train_state.pt"
METRICS_FILE = "metrics.jsonl"
DATA_FOLDER = "data"
"""Where the commands put the token shards of a run."""
MAY_CHANGE = ("steps", "compile", "eval_every", "eval_batches", "save_every")
"""Settings that a resumed run may change; `steps` changes the rest of the schedule, `compile` the rounding."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of a run. Raises ValueError naming the setting, what was expected and what came."""

    steps: int = 1000
    """Updates."""
    seq_len: int = 512
    """Tokens of a row, each predicted from those before it."""
    batch_size: int = 8
    """Rows of an update."""
    packed: bool = True
    """Whether attention stays within a document (`cu_seqlens`); else a row is one sequence: faster on a CPU."""
    max_documents: int | None = None
    """Most pieces of documents in a row, None for as many as there are; see `PackedBatches`."""
    lr: float = 1e-3
    """Highest learning rate."""
    warmup: int = 50
    """Steps over which the learning rate rises linearly; from there it falls as a cosine."""
    final_lr: float = 0.1
    """Learning rate at the end, as a share of the highest."""
    weight_decay: float = 0.1
    """AdamW's, on matrices only."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    seed: int = 0
    """Decides the order of documents and rows."""
    dtype: str = "fp32"
    """Type of weights, activations and optimizer state alike: "fp32" or "bf16"."""
    compile: bool = True
    """Compile the loss to one graph (`torch.compile(fullgraph=True)`)."""
    eval_every: int = 200
    """Steps between two losses on held-out text; there is always one at the end."""
    eval_batches: int = 8
    """Batches of held-out text."""
    save_every: int = 200
    """Steps between two checkpoints; there is always one at the end."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "eval_every", "eval_batches", "save_every"):
            self._expect(name, getattr(self, name) >= 1, "at least 1")
        self._expect("seq_len", self.seq_len >= 2, "at least 2")
        self._expect("max_documents", self.max_documents is None or self.max_documents >= 1, "None or at least 1")
        self._expect("warmup", self.warmup >= 0, "at least 0")
        for name in ("lr", "clip"):
            self._expect(name, 0 < getattr(self, name) < math.inf, "a positive number")
        self._expect("weight_decay", 0 <= self.weight_decay < math.inf, "a number >= 0")
        self._expect("final_lr", 0 <= self.final_lr <= 1, "a share in 0 … 1")
        self._expect("dtype", self.dtype in DTYPES, f"one of {', '.join(map(repr, DTYPES))}")

    def _expect(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")

    def lr_at(self, step: int) -> float:
        """Learning rate of the update `step`, counted from 0: linear warm-up, then a cosine down to the final one."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        share = (step - self.warmup) / max(1, self.steps - 1 - self.warmup)
        return self.lr * (self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, share))))


class StepMetrics(NamedTuple):
    """One update, as the metrics file has it: losses in nats per token, `step` counted from 1."""

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens_per_s: float
    val_loss: float | None


class TrainResult(NamedTuple):
    """How a run ended."""

    step: int
    """Updates done, those before a resume included."""
    val_loss: float | None
    """Last loss on held-out text in nats per token; None if this call did not come to one."""
    interrupted: bool
    """Whether SIGINT stopped it; the checkpoint is written."""
    checkpoint: Path


def train(
    model: NSALanguageModel,
    corpus: Corpus,
    config: TrainConfig,
    out: str | Path,
    *,
    resume: bool = False,
    on_step: Callable[[StepMetrics], None] | None = None,
) -> TrainResult:
    """Train a model on token shards; its weights change in place, to `config.dtype` too.

    `out` gets checkpoints `step-NNNNNN` (what `save_pretrained` writes and the optimizer's state; the newest one stays)
    and `metrics.jsonl`, a line per step. With `resume` the run continues from the newest checkpoint as if it had never
    stopped: the same batches, learning rates and, on the same machine, the same losses to the bit. SIGINT ends the
    run after the step at hand, with a checkpoint; a second one ends it at once.

    Raises: ValueError for text that is too short, tokens that the model does not know, an `out` that holds a run
        already, or one that does not fit `resume`;
        FloatingPointError for a loss or gradient that is not finite, before it changes the weights.
    """
    out = Path(out)
    check_text(corpus.train, config.seq_len, "training")
    check_text(corpus.validation, config.seq_len, "validation")
    if corpus.vocab_size > model.config.vocab_size:
        raise ValueError(f"model: expected a vocab_size of {corpus.vocab_size} or more, got {model.config.vocab_size}")
    newest = checkpoint_to_resume(out, resume)
    model.to(DTYPES[config.dtype])
    optimizer = make_optimizer(model, config)
    done = 0 if newest is None else _load_checkpoint(newest, model, optimizer, config, corpus)
    out.mkdir(parents=True, exist_ok=True)
    _drop_metrics_after(out / METRICS_FILE, done)
    loss_function = torch.compile(model.loss, fullgraph=True, dynamic=False) if config.compile else model.loss

    batches = make_batches(corpus.train, config, seed=config.seed)
    held_out = make_batches(corpus.validation, config, seed=None, max_documents=batches.max_documents)

    device, val_loss = model.head.weight.device, None
    with (
        _interrupt_flag() as interrupted,
        (out / METRICS_FILE).open("a") as metrics_file,
        prefetch(batches.batch, range(done, config.steps), device=device) as stream,
    ):
        while done < config.steps and not interrupted.is_set():
            start = time.perf_counter()
            batch = next(stream)
            for group in optimizer.param_groups:
                group["lr"] = config.lr_at(done)
            loss, grad_norm = update(model, optimizer, loss_function, batch, config, done + 1)
            done += 1
            tokens_per_s = batch.ids.numel() / (time.perf_counter() - start)
            evaluated = None
            if done % config.eval_every == 0 or done == config.steps:
                evaluated = val_loss = evaluate(loss_function, held_out, config, device)
            metrics = StepMetrics(done, loss, config.lr_at(done - 1), grad_norm, tokens_per_s, evaluated)
            metrics_file.write(json.dumps({k: v for k, v in metrics._asdict().items() if v is not None}) + "\n")
            metrics_file.flush()
            if on_step is not None:
                on_step(metrics)
            if done % config.save_every == 0:
                _save_checkpoint(out, model, optimizer, config, corpus, done)
        checkpoint = _save_checkpoint(out, model, optimizer, config, corpus, done)
        return TrainResult(done, val_loss, interrupted.is_set(), checkpoint)


def make_optimizer(model: NSALanguageModel, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with betas 0.9 and 0.95 that decays matrices and leaves norms and biases alone."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95))


def update(
    model: NSALanguageModel,
    optimizer: torch.optim.Optimizer,
    loss_function: Callable[[Tensor, Tensor | None], Tensor],
    batch: Batch,
    config: TrainConfig,
    step: int,
) -> tuple[float, float]:
    """One step of the optimizer; returns the loss and the norm of the gradient before clipping."""
    optimizer.zero_grad(set_to_none=True)
    loss = loss_function(batch.ids, batch.cu_seqlens)
    loss_value = loss.item()
    _check_finite("loss", loss_value, step)
    loss.backward()
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip).item()
    _check_finite("gradient norm", grad_norm, step)
    optimizer.step()
    return loss_value, grad_norm


def _check_finite(name: str, value: float, step: int) -> None:
    if not math.isfinite(value):
        raise FloatingPointError(
            f"{name}: expected a finite number at step {step}, got {value}; the weights are those of step {step - 1}, "
            "a lower learning rate or a longer warm-up may help"
        )


def check_text(tokens: TokenShards, seq_len: int, name: str) -> None:
    """Raise ValueError for a text of less than seq_len + 1 tokens."""
    if tokens.n_tokens < seq_len + 1:
        raise ValueError(
            f"text: expected at least seq_len + 1 = {seq_len + 1} tokens for {name}, got {tokens.n_tokens}: "
            "give more text or a shorter seq_len"
        )


def make_batches(
    tokens: TokenShards, config: TrainConfig, *, seed: int | None, max_documents: int | None = None
) -> PackedBatches:
    """The batches of a run's settings, in the order of a seed."""
    return PackedBatches(
        tokens, seq_len=config.seq_len, batch_size=config.batch_size, seed=seed, packed=config.packed,
        max_documents=max_documents or config.max_documents,
    )  # fmt: skip


def evaluate(
    loss_function: Callable[[Tensor, Tensor | None], Tensor],
    batches: PackedBatches,
    config: TrainConfig,
    device: torch.device,
) -> float:
    """Mean loss on evenly spaced rows of held-out text, in nats per token."""
    # with gradients on, as in training, so that a compiled loss function needs no second graph
    total = n_targets = 0.0
    for batch in batches.evenly_spaced(config.eval_batches):
        ids, cu_seqlens, n = batch.to(device)
        total += loss_function(ids, cu_seqlens).item() * n
        n_targets += n
    return total / max(1.0, n_targets)


def find_checkpoint(folder: str | Path) -> Path | None:
    """The newest checkpoint `step-NNNNNN` in a run's folder; None if there is none."""
    return max(Path(folder).glob("step-[0-9]*[0-9]"), key=lambda path: int(path.name[5:]), default=None)


def checkpoint_to_resume(out: str | Path, resume: bool) -> Path | None:
    """The newest checkpoint to resume a run from. Raises ValueError for one without `resume`, and for none with it."""
    newest = find_checkpoint(out)
    if newest is not None and not resume:
        raise ValueError(f"out: expected a folder without checkpoints, or resume, got {newest}")
    if newest is None and resume:
        raise ValueError(f"resume: expected a folder with checkpoints of a run, got {out}")
    return newest


def _save_checkpoint(
    out: Path,
    model: NSALanguageModel,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    corpus: Corpus,
    step: int,
) -> Path:
    """Write a checkpoint, unless there is that of this step, whole or not at all; then remove the older ones."""
    final, temporary = out / f"step-{step:06d}", out / f".step-{step:06d}.part"
    if final.exists():
        return final
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    state = {
        "step": step,
        "optimizer": optimizer.state_dict(),
        "config": dataclasses.asdict(config),
        "text": corpus.digest(),
    }
    torch.save(state, temporary / STATE_FILE)
    temporary.rename(final)
    for older in out.glob("step-[0-9]*[0-9]"):
        if older != final:
            shutil.rmtree(older)
    return final


def _load_checkpoint(
    folder: Path, model: NSALanguageModel, optimizer: torch.optim.Optimizer, config: TrainConfig, corpus: Corpus
) -> int:
    """Load weights and optimizer state; returns the updates done. Raises ValueError if the run was another one."""
    if not (folder / STATE_FILE).is_file():
        raise ValueError(f"resume: expected a checkpoint with {STATE_FILE}, got {folder}")
    _check_same("model", dataclasses.asdict(NSAConfig.load(folder / "config.json")), dataclasses.asdict(model.config))
    state = torch.load(folder / STATE_FILE, map_location=model.head.weight.device, weights_only=True)
    kept = [{k: v for k, v in c.items() if k not in MAY_CHANGE} for c in (state["config"], dataclasses.asdict(config))]
    _check_same("run", *kept)
    if state["text"] != corpus.digest():
        raise ValueError("resume: expected the text that the run was trained on, got another one")
    load_model(model, str(folder / "model.safetensors"), device=str(model.head.weight.device))
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def _check_same(what: str, before: dict[str, Any], now: dict[str, Any]) -> None:
    for name in before:
        if before[name] != now[name]:
            raise ValueError(f"resume: expected the {what}'s {name} = {before[name]!r}, got {now[name]!r}")


def _drop_metrics_after(path: Path, step: int) -> None:
    """Leave the lines up to `step` in a metrics file: those of later steps come again."""
    if path.exists():
        lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
        path.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= step))


@contextmanager
def _interrupt_flag() -> Iterator[threading.Event]:
    """An event that the first SIGINT sets; the second one acts as before. Outside the main thread it is never set."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    before = signal.getsignal(signal.SIGINT)

    def interrupt(signal_number: int, frame: object) -> None:
        flag.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, before)
