"""The training loop: optimizer, schedule, accumulation, evaluation, resume, on one process or a mesh of them."""

import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from nsa_compile.checkpoints import Checkpoints, find_checkpoint, load_state, read_facts, step_of
from nsa_compile.config import NSAConfig
from nsa_compile.data import Batch, Corpus, PackedBatches, TokenShards, prefetch
from nsa_compile.faults import StopFlag, Watchdog, stop_flag
from nsa_compile.launch import patience, together
from nsa_compile.metrics import (
    LayerStatistics,
    MetricsWriter,
    layer_statistics,
    model_flops,
    peak_flops,
    peak_memory,
    summary_writer,
)
from nsa_compile.model import NSALanguageModel
from nsa_compile.parallel import check_row, check_sizes, clip_grad_norm, parallelize
from nsa_compile.precision import computing_in
from nsa_compile.recompute import MODES, recomputing, unwrap_forward, wrap_forward
from nsa_compile.storage import locked

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
COMPILE = ("model", "block", "none")
DATA_FOLDER = "data"
"""Where the commands put the token shards of a run."""
LOCK_FILE = ".lock"
MAY_CHANGE = (
    "steps", "compile", "accumulate", "checkpointing", "eval_every", "eval_batches", "stats_every", "save_every",
    "keep", "timeout", "tensorboard", "peak_tflops",
)  # fmt: skip
"""Settings that a resumed run may change; `steps` changes the rest of the schedule, some others the rounding."""
Loss = Callable[[Tensor, Tensor | None], Tensor]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of a run. Raises ValueError naming the setting, what was expected and what came."""

    steps: int = 1000
    """Updates."""
    seq_len: int = 512
    """Tokens of a row, each predicted from those before it."""
    batch_size: int = 8
    """Rows of an update, on all processes together."""
    accumulate: int = 1
    """Parts of an update that each process computes one after the other, to hold the activations of one alone."""
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
    """Type to compute in: "fp32", or "bf16" with weights, sums of gradients and optimizer state in fp32."""
    compile: str = "model"
    """What is compiled to one graph (`torch.compile(fullgraph=True)`): "model" (the loss, on one process), "block"
    (each block) or "none"."""
    checkpointing: str = "none"
    """What blocks keep for the backward pass, from most memory and least work on: "none" (recomputed), "matmuls",
    "selective" (outputs of attention) or "full" (recomputed)."""
    eval_every: int = 200
    """Steps between two losses on held-out text; there is always one at the end."""
    eval_batches: int = 8
    """Batches of held-out text."""
    stats_every: int = 200
    """Steps between two looks at gates and selection, on a part of a held-out batch."""
    save_every: int = 200
    """Steps between two checkpoints; there is always one at the end."""
    keep: int = 1
    """Checkpoints to keep, the newest ones."""
    tensorboard: bool = False
    """Write metrics for TensorBoard too."""
    peak_tflops: float | None = None
    """TFLOP/s of a device that utilisation is a share of; None takes data sheets' for bf16 on GPUs that are known."""
    timeout: float | None = None
    """Seconds without progress after which the process writes its stacks and ends; None waits forever."""

    def __post_init__(self) -> None:
        for name in (
            "steps", "batch_size", "accumulate", "eval_every", "eval_batches", "stats_every", "save_every", "keep",
        ):  # fmt: skip
            self._expect(name, getattr(self, name) >= 1, "at least 1")
        self._expect("seq_len", self.seq_len >= 2, "at least 2")
        self._expect("max_documents", self.max_documents is None or self.max_documents >= 1, "None or at least 1")
        self._expect("warmup", self.warmup >= 0, "at least 0")
        for name in ("lr", "clip"):
            self._expect(name, 0 < getattr(self, name) < math.inf, "a positive number")
        self._expect("weight_decay", 0 <= self.weight_decay < math.inf, "a number >= 0")
        self._expect("final_lr", 0 <= self.final_lr <= 1, "a share in 0 … 1")
        for name in ("peak_tflops", "timeout"):
            value = getattr(self, name)
            self._expect(name, value is None or 0 < value < math.inf, "None or a positive number")
        for name, choices in (("dtype", tuple(DTYPES)), ("compile", COMPILE), ("checkpointing", MODES)):
            self._expect(name, getattr(self, name) in choices, f"one of {', '.join(map(repr, choices))}")
        divides = self.batch_size % self.accumulate == 0
        self._expect("accumulate", divides, f"a divisor of batch_size = {self.batch_size}")

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
    """Of all processes, padding included."""
    mfu: float | None
    """Model FLOP utilisation: FLOP that the model needs (`model_flops`) as a share of what the devices could do."""
    memory: int
    """Most bytes that this process had so far, on the GPU if there is one."""
    val_loss: float | None
    layers: list[LayerStatistics] | None

    def record(self) -> dict[str, Any]:
        """As JSON has it."""
        layers = None if self.layers is None else [layer._asdict() for layer in self.layers]
        return self._asdict() | {"layers": layers or None}


class TrainResult(NamedTuple):
    """How a run ended."""

    step: int
    """Updates done, those before a resume included."""
    val_loss: float | None
    """Last loss on held-out text in nats per token; None if this call did not come to one."""
    signal: str | None
    """Name of the signal that stopped it, "SIGINT" or "SIGTERM"; the checkpoint is written."""
    checkpoint: Path

    @property
    def interrupted(self) -> bool:
        """Whether a signal stopped it."""
        return self.signal is not None


class Ranks(NamedTuple):
    """What a process of a run is to the others."""

    rank: int
    size: int
    rows: int
    """Number of its share of the rows, of `shares`."""
    shares: int
    group: dist.ProcessGroup | None
    """All processes, over the CPU; None for a single one."""

    @classmethod
    def of(cls, mesh: DeviceMesh | None, timeout: float | None = None) -> "Ranks":
        """From the mesh of a run and the timeout of its watchdog."""
        if mesh is None:
            return cls(0, 1, 0, 1, None)
        dp = mesh["dp"]
        return cls(dist.get_rank(), dist.get_world_size(), dp.get_local_rank(), dp.size(), cpu_group(timeout))

    def agree(self, flag: StopFlag) -> int:
        """The signal that any process got, 0 for none."""
        if self.group is None:
            return flag.signal
        seen = torch.tensor(flag.signal)
        dist.all_reduce(seen, dist.ReduceOp.MAX, self.group)
        return int(seen)

    def wait(self) -> None:
        """Wait for the others."""
        if self.group is not None:
            dist.barrier(self.group)


def cpu_group(timeout: float | None) -> dist.ProcessGroup:
    """A new group of all processes over the CPU, more patient than a watchdog of `timeout` seconds."""
    return dist.new_group(backend="gloo", timeout=patience(timeout, least=1800.0))


def train(
    model: NSALanguageModel,
    corpus: Corpus,
    config: TrainConfig,
    out: str | Path,
    *,
    resume: bool | Literal["auto"] = False,
    mesh: DeviceMesh | None = None,
    on_step: Callable[[StepMetrics], None] | None = None,
    lock: bool = True,
) -> TrainResult:
    """Train a model on token shards; its weights change in place, to fp32 too.

    `out` gets checkpoints `step-NNNNNN` (see `Checkpoints`; the newest ones stay) and `metrics.jsonl`, a line per step.
    With `resume` the run continues from the newest checkpoint as if it had never stopped: the same batches, learning
    rates and, on the same machine and mesh, the same losses to the bit (on GPUs under
    `torch.use_deterministic_algorithms`); on another mesh but for rounding. "auto" starts a run where there is none to
    resume, so that one command can be started again and again. SIGINT or SIGTERM, on any
    process, ends the run after the step at hand, with a checkpoint; a second one ends it at once.

    With a `mesh` of `make_mesh` all processes call it, with equal arguments, and the model is spread over them
    (`parallelize`) for good.

    One run at a time may have `out`: the first process holds a lock on it, unless `lock` is False, for a caller that
    has `run_lock(out)` already.

    Raises: ValueError for text that is too short, tokens that the model does not know, settings that do not fit the
        mesh, an `out` that holds a run already, that another run is writing to, or that does not fit `resume`;
        FloatingPointError for a loss or gradient that is not finite, before it changes the weights;
        OSError naming a file that cannot be read or written.
    """
    out, ranks = Path(out), Ranks.of(mesh, config.timeout)
    facts = {"config": dataclasses.asdict(config), "text": corpus.digest()}
    stack = ExitStack()

    def begin() -> tuple[Path | None, PackedBatches, PackedBatches]:
        check_text(corpus.train, config.seq_len, "training")
        check_text(corpus.validation, config.seq_len, "validation")
        if corpus.vocab_size > model.config.vocab_size:
            raise ValueError(
                f"model: expected a vocab_size of {corpus.vocab_size} or more, got {model.config.vocab_size}"
            )
        check_mesh(config, model.config, None if mesh is None else tuple(mesh.shape))
        if config.tensorboard:
            summary_writer()
        if lock and ranks.rank == 0:
            stack.enter_context(run_lock(out))
        newest = checkpoint_to_resume(out, resume)
        if newest is not None:
            check_run(newest, model.config, facts)
        batches = make_batches(corpus.train, config, seed=config.seed)
        return newest, batches, make_batches(corpus.validation, config, seed=None, max_documents=batches.max_documents)

    with stack:
        newest, batches, held_out = begin() if ranks.group is None else together(begin, ranks.group)
        # a group of their own: their thread and this one would mix up the order of what they send
        checkpoints = Checkpoints(
            out, keep=config.keep, group=None if mesh is None else cpu_group(config.timeout),
            saved=None if newest is None else step_of(newest),
        )  # fmt: skip
        loss_function = stack.enter_context(prepared(model, config, mesh))
        optimizer = make_optimizer(model, config)
        if newest is not None:
            load_state(newest, model, optimizer, ranks.group)
        done, val_loss, stopped = 0 if newest is None else step_of(newest), None, 0
        out.mkdir(parents=True, exist_ok=True)
        checkpoints.clean()
        ranks.wait()
        writer = stack.enter_context(
            MetricsWriter(out if ranks.rank == 0 else None, done, tensorboard=config.tensorboard)
        )
        stop = stack.enter_context(stop_flag())
        watchdog = stack.enter_context(Watchdog(config.timeout, out, ranks.rank))
        stack.push(lambda kind, *error: checkpoints.give_up() if kind else None)
        source = Source(batches, config, ranks)
        device = model.head.weight.device
        indices = range(done * config.accumulate, config.steps * config.accumulate)
        stream = stack.enter_context(prefetch(source.part, indices, device=device))
        while done < config.steps and not stopped:
            start = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = config.lr_at(done)
            parts = watched(((x, weight) for weight, x in zip(source.weights(done), stream, strict=False)), watchdog)
            loss, grad_norm = update(model, optimizer, loss_function, parts, config, done + 1, source)
            seconds, done, evaluated, layers = time.perf_counter() - start, done + 1, None, None
            if done % config.eval_every == 0 or done == config.steps:
                evaluated = val_loss = evaluate(loss_function, held_out, config, device, ranks, watchdog)
            if done % config.stats_every == 0:
                ids, ends, _ = next(Source(held_out, config, ranks).held_out(1))[0].to(device)
                layers = layer_statistics(model, ids, ends, ranks.group)
            metrics = StepMetrics(
                done, loss, config.lr_at(done - 1), grad_norm, config.batch_size * config.seq_len / seconds,
                utilisation(source.flops(model.config, done - 1), seconds, config, device, ranks.size),
                peak_memory(device), evaluated, layers,
            )  # fmt: skip
            writer.write(metrics.record())
            if on_step is not None:
                on_step(metrics)
            watchdog.beat()
            if done % config.save_every == 0:
                checkpoints.save(done, model, optimizer, facts)
            stopped = ranks.agree(stop)
        checkpoint = checkpoints.save(done, model, optimizer, facts)
        checkpoints.wait()
        ranks.wait()  # for the first process to have renamed it
        return TrainResult(done, val_loss, signal.Signals(stopped).name if stopped else None, checkpoint)


def run_lock(out: str | Path) -> AbstractContextManager[None]:
    """A lock on the folder of a run, which ends with the block or the process; see `locked`."""
    return locked(Path(out) / LOCK_FILE, f"out: expected a folder that no other run writes to, got {out}")


def check_mesh(config: TrainConfig, model: NSAConfig, shape: tuple[int, ...] | None) -> None:
    """Raise ValueError for settings that do not fit a mesh (dp, cp, tp); None for a single process without one."""
    dp, cp, tp = shape or (1, 1, 1)
    parts = dp * config.accumulate
    if config.batch_size % parts:
        raise ValueError(
            f"batch_size: expected a multiple of dp * accumulate = {dp} * {config.accumulate}, got {config.batch_size}"
        )
    if shape is not None and config.compile == "model":
        raise ValueError("compile: expected 'block' or 'none' with a mesh, whose collectives are no part of a graph, "
                         "got 'model'")  # fmt: skip
    check_sizes(model, cp=cp, tp=tp)
    check_row("seq_len", config.seq_len * (config.batch_size // parts if config.packed else 1), model, cp=cp)


@contextmanager
def prepared(model: NSALanguageModel, config: TrainConfig, mesh: DeviceMesh | None) -> Iterator[Loss]:
    """The loss to train by: fp32 weights, the type to compute in, checkpointing, compilation, the mesh.

    Without a mesh the model is as before at the end of the block.
    """
    model.to(torch.float32)
    blocks, compiled = list(model.layers), partial(torch.compile, fullgraph=True, dynamic=False)
    for block in blocks:
        wrap_forward(block, partial(recomputing, mode=config.checkpointing))
    if mesh is not None:
        dtype = None if config.dtype == "fp32" else DTYPES[config.dtype]
        yield parallelize(model, mesh, dtype=dtype, compile=config.compile == "block").loss
        return
    try:
        with computing_in(model, DTYPES[config.dtype]):
            if config.compile == "block":
                for block in blocks:
                    wrap_forward(block, compiled)
            yield compiled(model.loss) if config.compile == "model" else model.loss
    finally:
        for block in blocks:
            unwrap_forward(block)


def make_optimizer(model: NSALanguageModel, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with betas 0.9 and 0.95 that decays matrices and leaves norms and biases alone."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95))


class Source:
    """The parts of the batches that this process computes: its share of a step's rows, cut for accumulation.

    Part p of share r is rank `r * accumulate + p` of the `PackedBatches`. A step's loss is the mean over the targets of
    all parts of all processes, so each part has a weight.
    """

    def __init__(self, batches: PackedBatches, config: TrainConfig, ranks: Ranks) -> None:
        self.batches, self.accumulate, self.ranks = batches, config.accumulate, ranks
        self.world = ranks.shares * config.accumulate

    def part(self, index: int) -> Batch:
        """Part `index % accumulate` of step `index // accumulate`."""
        step, part = divmod(index, self.accumulate)
        return self.batches.batch(step, rank=self.ranks.rows * self.accumulate + part, world_size=self.world)

    def rows(self, step: int, part: int | None = None) -> list[int]:
        """The rows of a part of a step on all processes; of all parts."""
        own = range(self.world) if part is None else range(part, self.world, self.accumulate)
        return [row for rank in own for row in self.batches.rows(step, rank=rank, world_size=self.world)]

    def weights(self, step: int) -> list[float]:
        """Each part's share of a step's targets."""
        counts = [self.batches.n_targets(self.rows(step, part)) for part in range(self.accumulate)]
        return [1.0] if len(counts) == 1 else [n / max(1, sum(counts)) for n in counts]

    def flops(self, model: NSAConfig, step: int) -> int:
        """`model_flops` of a step."""
        return model_flops(model, self.batches.lengths(self.rows(step)))

    def describe(self, step: int, part: int | None = None) -> str:
        """The rows and documents of a step, or of a part of it."""
        return self.batches.describe(self.rows(step, part))

    def held_out(self, n_batches: int) -> Iterator[tuple[Batch, ...]]:
        """This process's parts of batches of held-out text."""
        first = self.ranks.rows * self.accumulate
        return zip(*(
            self.batches.evenly_spaced(n_batches, rank=rank, world_size=self.world)
            for rank in range(first, first + self.accumulate)
        ), strict=True)  # fmt: skip

    def held_out_targets(self, n_batches: int) -> list[list[int]]:
        """Targets of each part of batches of held-out text, on all processes."""
        ranks = range(self.world)
        rows = [self.batches.evenly_spaced_rows(n_batches, rank=rank, world_size=self.world) for rank in ranks]
        shares = [rows[part :: self.accumulate] for part in range(self.accumulate)]
        return [[sum(self.batches.n_targets(x[i]) for x in share) for share in shares] for i in range(n_batches)]


def watched(items: Iterable[T], watchdog: Watchdog) -> Iterator[T]:
    """The items, each one a beat."""
    for item in items:
        watchdog.beat()
        yield item


def update(
    model: NSALanguageModel,
    optimizer: torch.optim.Optimizer,
    loss_function: Loss,
    parts: Iterable[tuple[Batch, float]],
    config: TrainConfig,
    step: int,
    source: Source | None = None,
) -> tuple[float, float]:
    """One step of the optimizer over parts of a batch and their weights; the loss, and the norm before clipping.

    Raises: FloatingPointError, before the weights change, naming the step (from 1) and what `source` says it read.
    """
    optimizer.zero_grad(set_to_none=True)
    losses, weights = [], []
    for batch, weight in parts:
        loss = loss_function(batch.ids, batch.cu_seqlens)
        (loss * weight).backward()
        losses.append(loss.detach())
        weights.append(weight)
    norm = clip_grad_norm(model, config.clip)
    *values, grad_norm = torch.stack([*losses, norm.to(losses[0].dtype)]).tolist()
    for part, value in enumerate(values):
        _check_finite("loss", value, step, source, part)
    _check_finite("gradient norm", grad_norm, step, source)
    optimizer.step()
    return sum(value * weight for value, weight in zip(values, weights, strict=True)), grad_norm


def _check_finite(name: str, value: float, step: int, source: Source | None, part: int | None = None) -> None:
    if not math.isfinite(value):
        read = "" if source is None else f" for {source.describe(step - 1, part)}"
        raise FloatingPointError(
            f"{name}: expected a finite number at step {step}, got {value}{read}; the weights are those of step "
            f"{step - 1}, a lower learning rate or a longer warm-up may help"
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
    loss_function: Loss, batches: PackedBatches, config: TrainConfig, device: torch.device, ranks: Ranks,
    watchdog: Watchdog,
) -> float:  # fmt: skip
    """Mean loss on evenly spaced rows of held-out text, in nats per token."""
    # with gradients on, as in training, so that a compiled loss function needs no second graph
    source = Source(batches, config, ranks)
    total = n_targets = 0.0
    counts = source.held_out_targets(config.eval_batches)
    for parts, numbers in zip(source.held_out(config.eval_batches), counts, strict=True):
        for batch, n in watched(zip(parts, numbers, strict=True), watchdog):
            ids, cu_seqlens, _ = batch.to(device)
            total += loss_function(ids, cu_seqlens).item() * n
            n_targets += n
    return total / max(1.0, n_targets)


def utilisation(flops: int, seconds: float, config: TrainConfig, device: torch.device, devices: int) -> float | None:
    """The FLOP of a step as a share of what the devices could do; None where that is not known."""
    peak = peak_flops(device) if config.dtype == "bf16" else None
    if config.peak_tflops is not None:
        peak = 1e12 * config.peak_tflops
    return None if peak is None else flops / (seconds * peak * devices)


def checkpoint_to_resume(out: str | Path, resume: bool | Literal["auto"]) -> Path | None:
    """The newest checkpoint to resume a run from; see `train`.

    Raises: ValueError for one without `resume`, and for none with it.
    """
    newest = find_checkpoint(out)
    if newest is not None and not resume:
        raise ValueError(f"out: expected a folder without checkpoints, or resume, got {newest}")
    if newest is None and resume is True:
        raise ValueError(f"resume: expected a folder with checkpoints of a run, got {out}")
    return newest


def check_run(checkpoint: Path, model: NSAConfig, facts: dict[str, Any]) -> None:
    """Raise ValueError if a checkpoint is that of a run of another model, text, or settings that matter."""
    before = read_facts(checkpoint, "config", "text")
    saved = NSAConfig.load(checkpoint / "config.json")
    _check_same("model", dataclasses.asdict(saved), dataclasses.asdict(model))
    _check_same("run", *({k: v for k, v in x["config"].items() if k not in MAY_CHANGE} for x in (before, facts)))
    if before["text"] != facts["text"]:
        raise ValueError("resume: expected the text that the run was trained on, got another one")


def _check_same(what: str, before: dict[str, Any], now: dict[str, Any]) -> None:
    for name in now:
        if before.get(name) != now[name]:
            raise ValueError(f"resume: expected the {what}'s {name} = {before.get(name)!r}, got {now[name]!r}")
