"""Profiles of training, prefill and decoding: a scheduled trace, its numbers, memory, all in one folder."""

import dataclasses
import datetime
import errno
import gzip
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from nsa_compile.config import NSAConfig
from nsa_compile.custom_ops.ranges import RANGE
from nsa_compile.data.batches import Batch
from nsa_compile.graphs.cache import NSACache
from nsa_compile.graphs.decode import DecodeGraph
from nsa_compile.graphs.prefill import prefill
from nsa_compile.model import MLP, DenseAttention, NSALanguageModel
from nsa_compile.module import GateMLP, MeanCompressor, NSAAttention
from nsa_compile.profile.summary import SUMMARY_FILE, Cost, summarize, write_kernels
from nsa_compile.profile.trace import analyze, read_events, summarize_memory
from nsa_compile.storage import check_folder, naming
from nsa_compile.train import DTYPES, TrainConfig, make_optimizer, update

MODES = ("train", "prefill", "decode")
TRACE_FILE = "trace.json.gz"
KERNELS_FILE = "kernels.csv"
MEMORY_FILE = "memory.json"
SNAPSHOT_FILE = "memory.pickle"
TENSORBOARD = "tensorboard"
CHUNK = 4096
"""Tokens of a call that fills the cache before decoding."""


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """What is run and how much of it is traced. Raises ValueError naming the setting."""

    mode: str = "train"
    """"train": updates on random tokens. "prefill": a prompt into an empty cache. "decode": steps after a prompt."""
    batch: int = 1
    """Rows."""
    tokens: int = 256
    """Tokens of a row: of a window to train on, of the prompt to prefill, in the cache before the first step."""
    dtype: str = "fp32"
    """Type of weights and activations: "fp32" or "bf16"."""
    compile: bool = True
    """Run the model through torch.compile, as one graph."""
    graph: bool = True
    """Decode by CUDA graph on CUDA. Its kernels have no ops around them: their names tell the branch."""
    wait: int = 1
    """Steps without the profiler, after those that compile."""
    warmup: int = 2
    """Steps with the profiler on and its events dropped."""
    active: int = 3
    """Steps of the trace."""
    memory: bool = True
    """Trace the memory of one more step: memory.json, on CUDA also a snapshot, memory.pickle."""
    seed: int = 0
    """Decides the tokens."""

    def __post_init__(self) -> None:
        lowest = {"batch": 1, "tokens": 2, "wait": 0, "warmup": 0, "active": 1, "seed": 0}
        for name, least in lowest.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        for name, known in (("mode", MODES), ("dtype", tuple(DTYPES))):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name}: expected one of {', '.join(map(repr, known))}, got {getattr(self, name)!r}"
                )  # fmt: skip


def default_sizes(device: torch.device) -> dict[str, Any]:
    """Sizes of a model to profile: the paper's in four layers on CUDA, small ones on a CPU."""
    if device.type == "cuda":
        return {"n_layers": 4, "vocab_size": 32768}
    return {
        "dim": 128, "n_heads": 8, "n_kv_groups": 2, "d_k": 16, "d_v": 16, "l": 16, "d": 8, "l_sel": 16, "n_sel": 4,
        "w": 32, "n_layers": 1, "vocab_size": 256,
    }  # fmt: skip


def run_profile(
    model: Callable[[], NSALanguageModel], config: ProfileConfig, device: torch.device, out: Path
) -> dict[str, Any]:
    """Build a model, run it under the profiler and write a folder; returns the summary, which is in it too.

    The folder gets trace.json.gz (Perfetto, chrome://tracing), tensorboard/ with the same trace, kernels.csv,
    summary.json and, with `config.memory`, memory.json (on a CPU) or memory.pickle (on CUDA).

    Raises: ValueError for a folder that holds a profile.
    """
    check_folder("out", out)
    if (out / SUMMARY_FILE).exists():
        raise ValueError(f"out: expected a folder without a profile, got {out}")
    cuda = device.type == "cuda"
    if cuda and config.memory:
        torch.cuda.memory._record_memory_history(stacks="python", max_entries=200_000)
    try:
        torch.manual_seed(config.seed)
        with device:
            built = model()
        out.mkdir(parents=True, exist_ok=True)
        built.to(device=device, dtype=DTYPES[config.dtype])
        work = _Work(built, config, device)
        with nullcontext() if config.compile else module_ranges(built):
            work.step()  # compiles
            _synchronize(device)
            memory: dict[str, Any] = {}
            if config.memory:
                memory = _trace_memory(work, device, out)
    finally:
        if cuda and config.memory:
            torch.cuda.memory._record_memory_history(enabled=None)
    with nullcontext() if config.compile else module_ranges(built):
        path = _trace_steps(work, config, device, out)
    summary = {
        **_describe(built.config, config, device),
        **summarize(analyze(read_events(path)), extra_costs=work.costs(), from_start=config.mode == "prefill"),
        "memory": memory,
    }
    summary["tokens_per_s"] = 1000 * work.tokens_per_step / summary["step_ms"]
    with naming(out / KERNELS_FILE):
        write_kernels(out / KERNELS_FILE, summary)
    with naming(out / SUMMARY_FILE):
        (out / SUMMARY_FILE).write_text(json.dumps(summary, indent=1) + "\n")
    return summary


class _Work:
    """The step that is profiled."""

    def __init__(self, model: NSALanguageModel, config: ProfileConfig, device: torch.device) -> None:
        self.model, self.config = model, config
        self.cache: NSACache | None = None
        b, t = config.batch, config.tokens
        self.tokens_per_step = b * (1 if config.mode == "decode" else t)
        ids = torch.randint(model.config.vocab_size, (b, t))
        # kernels of the CPU get ranges of their names; on CUDA the profiler sees kernels anyway
        options: dict[str, Any] | None = {"cpp.enable_kernel_profile": True} if device.type == "cpu" else None
        compiled = {"fullgraph": True, "dynamic": False, "options": options}
        steps = 2 + config.memory + config.wait + config.warmup + config.active
        if config.mode == "train":
            self.step = self._train(ids.to(device), compiled if config.compile else None)
            return
        model.eval()
        called: nn.Module = torch.compile(model, **compiled) if config.compile else model  # type: ignore[call-overload]
        self.cache = cache = NSACache.for_model(model, b, t + (steps + 1 if config.mode == "decode" else 0))
        if config.mode == "prefill":
            self.step = self._prefill(called, cache, ids.to(device))
            return
        graph = DecodeGraph(called, cache, capture=None if config.graph else False)
        rows = ids.tolist()
        prefill(model, [row[:-1] for row in rows], cache, chunk=min(CHUNK, t - 1))
        for number, row in enumerate(rows):
            graph.start(number, row[-1], max_new_tokens=steps)
        self.step = graph.step

    def _train(self, ids: torch.Tensor, compiled: dict[str, Any] | None) -> Callable[[], object]:
        settings = TrainConfig(dtype=self.config.dtype, lr=1e-5)
        optimizer = make_optimizer(self.model, settings)
        loss = self.model.loss if compiled is None else torch.compile(self.model.loss, **compiled)
        batch = Batch(ids, None, ids.numel() - len(ids))
        return lambda: update(self.model, optimizer, loss, [(batch, 1.0)], settings, 1)

    def _prefill(self, called: nn.Module, cache: NSACache, ids: torch.Tensor) -> Callable[[], object]:
        @torch.no_grad()
        def step() -> None:
            cache.reset()
            cache.reserve(ids.shape[1])
            called(ids, cache=cache, last_only=True)

        return step

    def costs(self) -> dict[str, Cost]:
        """What the kernels of a decode step have to do, by the tokens that the cache counted in the last step."""
        c = self.model.config
        if self.cache is None or self.config.mode != "decode" or c.attention != "nsa":
            return {}
        tokens = sum(int(layer.actual_reads[..., 3].sum()) for layer in self.cache.layers)
        size = DTYPES[self.config.dtype].itemsize
        flops = 2 * tokens * (c.n_heads // c.n_kv_groups) * (c.d_k + c.d_v)
        return {"_decode_": Cost(flops, tokens * (c.d_k + c.d_v) * size)}


@contextmanager
def module_ranges(model: nn.Module) -> Iterator[None]:
    """Profiler ranges `nsa/<part>` around what is no op of ours: projections, gates, φ, MLP, norms, vocabulary.

    For models that are not compiled.
    """
    handles = []
    for name, module in model.named_modules():
        part = _part_of_module(name, module)
        if part is not None:
            opened: list[record_function] = []

            def enter(module: nn.Module, args: Any, part: str = part, opened: list = opened) -> None:
                opened.append(record_function(RANGE + part))
                opened[-1].__enter__()

            def leave(module: nn.Module, args: Any, output: Any, opened: list = opened) -> None:
                opened.pop().__exit__(None, None, None)

            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _part_of_module(name: str, module: nn.Module) -> str | None:
    last = name.rpartition(".")[2]
    kinds: tuple[tuple[type, str], ...] = (
        (NSAAttention, "layer"), (DenseAttention, "layer"), (GateMLP, "gates"), (MeanCompressor, "cmp"), (MLP, "mlp"),
        (nn.RMSNorm, "norm"), (nn.Embedding, "vocabulary"),
    )  # fmt: skip
    for kind, part in kinds:
        if isinstance(module, kind):
            return part
    if last == "head":
        return "vocabulary"
    return "projections" if last == "out" or last.startswith("W_") else None


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _activities(device: torch.device) -> list[ProfilerActivity]:
    return [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])


def _trace_steps(work: _Work, config: ProfileConfig, device: torch.device, out: Path) -> Path:
    """Run the scheduled steps; writes the trace for Perfetto and TensorBoard and returns its path."""
    before = config.wait + config.warmup
    plan = schedule(wait=config.wait, warmup=config.warmup, active=config.active, repeat=1)
    with profile(activities=_activities(device), schedule=plan, record_shapes=True) as profiler:
        for number in range(before + config.active):
            if number == before:
                _synchronize(device)  # what the steps before left to do is not theirs
            work.step()
            if number == before + config.active - 1:
                _synchronize(device)
            profiler.step()
    with tempfile.TemporaryDirectory() as folder:
        raw = _export(profiler, Path(folder))
        path = out / TRACE_FILE
        with naming(path), raw.open("rb") as source, gzip.open(path, "wb", compresslevel=5) as target:
            shutil.copyfileobj(source, target)
    logs = out / TENSORBOARD
    logs.mkdir(exist_ok=True)
    shutil.copyfile(path, logs / f"{socket.gethostname()}_{os.getpid()}.{time.time_ns()}.pt.trace.json.gz")
    return path


def _export(profiler: profile, folder: Path) -> Path:
    """The trace as torch writes it. Raises OSError where it does not: it only logs what went wrong."""
    raw = folder / "trace.json"
    profiler.export_chrome_trace(str(raw))
    if not raw.exists():
        raise OSError(errno.EIO, "torch could not write the trace: is the disk full?", str(raw))
    return raw


def _trace_memory(work: _Work, device: torch.device, out: Path) -> dict[str, Any]:
    """Run one step for its memory; writes the files and returns the numbers for the summary."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work.step()
        torch.cuda.synchronize(device)
        torch.cuda.memory._dump_snapshot(str(out / SNAPSHOT_FILE))
        return {
            "peak_bytes": torch.cuda.max_memory_allocated(device),
            "reserved_bytes": torch.cuda.memory_reserved(device),
            "file": SNAPSHOT_FILE,
        }
    with profile(activities=_activities(device), profile_memory=True) as profiler:
        work.step()
    with tempfile.TemporaryDirectory() as folder:
        raw = _export(profiler, Path(folder))
        memory = summarize_memory(read_events(raw))
    with naming(out / MEMORY_FILE):
        (out / MEMORY_FILE).write_text(json.dumps(memory) + "\n")
    return {key: memory[key] for key in ("peak_bytes", "allocated_at_peak")} | {"file": MEMORY_FILE}


def _describe(model: NSAConfig, config: ProfileConfig, device: torch.device) -> dict[str, Any]:
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else f"{platform.machine()}, {torch.get_num_threads()} threads"
    return {
        "settings": {
            **dataclasses.asdict(config), "device": name, "torch": torch.__version__, "triton": triton,
            **{f"model.{key}": value for key, value in dataclasses.asdict(model).items() if key != "format_version"},
        },
        "date": datetime.date.today().isoformat(),
    }  # fmt: skip
