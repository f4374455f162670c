"""Metrics of a run: a line of JSON per step and TensorBoard, FLOP of the model, what gates and selection look like."""

import json
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nsa_compile.config import NSAConfig
from nsa_compile.custom_ops.registration import causal_pairs, compressed_pairs
from nsa_compile.model import NSALanguageModel
from nsa_compile.module import BRANCHES
from nsa_compile.ops.layout import num_cmp, query_layout
from nsa_compile.storage import naming

METRICS_FILE = "metrics.jsonl"
TENSORBOARD = "tensorboard"
PEAK_TFLOPS = (("H200", 989.4), ("H100 NVL", 835.5), ("H100 PCIe", 756.0), ("H100", 989.4), ("A100", 311.9))
"""Dense bf16 TFLOP/s by NVIDIA's data sheets, for names of GPUs that begin or go on with the first part."""


# --- where they go ---------------------------------------------------------------------------------------------------


class MetricsWriter:
    """Appends a line of JSON per step to `metrics.jsonl` in a folder, and scalars to `tensorboard/` if asked for.

    Lines of later steps than `done` go: those steps come again. Writes nothing without a folder.

    Raises: ImportError for TensorBoard without its package; OSError naming the file that cannot be written.
    """

    def __init__(self, folder: Path | None, done: int, *, tensorboard: bool = False) -> None:
        self.path = None if folder is None else folder / METRICS_FILE
        self.board: Any = None
        if self.path is None:
            return
        self.boards = self.path.parent / TENSORBOARD
        if tensorboard:
            with naming(self.boards):
                self.board = summary_writer()(str(self.boards), purge_step=done + 1)
        with naming(self.path):
            keep_until(self.path, done)
            self.file = self.path.open("a")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self.path is not None:
            with naming(self.path):
                self.file.close()
        if self.board is not None:
            with naming(self.boards):
                self.board.close()

    def write(self, metrics: dict[str, Any]) -> None:
        """Append the metrics of a step that are not None; lists of dicts are those of layers."""
        if self.path is None:
            return
        metrics = {name: value for name, value in metrics.items() if value is not None}
        with naming(self.path):
            self.file.write(json.dumps(metrics) + "\n")
            self.file.flush()
        if self.board is not None:
            with naming(self.boards):
                for name, value in scalars(metrics):
                    self.board.add_scalar(name, value, metrics["step"])


def summary_writer() -> Any:
    """torch's writer for TensorBoard. Raises ImportError, saying what to install, where that is not there."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "tensorboard: expected the package tensorboard, which pip install 'nsa-compile[train]' brings, got none"
        ) from error
    return SummaryWriter


def keep_until(path: Path, step: int) -> None:
    """Cut a metrics file before the first line that is not whole, or of a step after `step`.

    Raises: ValueError for a file with other lines: it is not a run's.
    """
    if path.exists():
        with path.open("r+b") as file:
            end = 0
            for line in file:
                try:
                    later = line.endswith(b"}\n") and json.loads(line)["step"] > step
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(f"out: expected metrics of a run in {path}, got {line[:80]!r}") from error
                if later or not line.endswith(b"}\n"):
                    break
                end += len(line)
            file.truncate(end)


def scalars(metrics: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """Names and values of all numbers but the step: `loss`, `layers/0/entropy`."""
    found: list[tuple[str, float]] = []
    for name, value in metrics.items():
        if isinstance(value, dict):
            found += scalars(value, f"{prefix}{name}/")
        elif isinstance(value, list):
            found += scalars(dict(zip(map(str, range(len(value))), value, strict=True)), f"{prefix}{name}/")
        elif prefix or name != "step":
            found.append((prefix + name, float(value)))
    return found


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process had: of the GPU through torch, or on a CPU of memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# --- FLOP ------------------------------------------------------------------------------------------------------------


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s of a GPU's dense bf16 products by its data sheet; None for what is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * tflops for part, tflops in PEAK_TFLOPS if all(x in name for x in part.split())), None)


def linear_weights(c: NSAConfig) -> int:
    """Weights that every token is multiplied with: projections, gates, MLPs, head; those of φ apart."""
    branches = 1 if c.attention == "dense" or c.tie_kv else 3
    attention = c.dim * (c.n_heads * c.d_k + branches * c.n_kv_groups * (c.d_k + c.d_v)) + c.n_heads * c.d_v * c.dim
    gate, hidden = 0, c.gate_hidden or 0
    if c.attention == "nsa":
        gate = c.n_kv_groups * hidden * (c.d_k + 3) if c.gate == "softmax" else hidden * (c.dim + 3 * c.n_heads)
    return c.n_layers * (attention + gate + 8 * c.dim**2) + c.vocab_size * c.dim


def model_flops(c: NSAConfig, lengths: Sequence[int] | np.ndarray) -> int:
    """FLOP that the loss of sequences and its gradient need: products only, nothing computed twice.

    Three times those of a forward pass: two per weight and token, two per channel of every (query, key) pair that a
    query sees. Selected attention sees `min(t + 1, n_sel * l_sel)` tokens; choosing blocks counts for nothing, since it
    may use the probabilities of compressed attention.
    """
    pairs, phi = 0, 0
    for length, count in zip(*(x.tolist() for x in np.unique(np.asarray(lengths), return_counts=True)), strict=True):
        if c.attention == "dense":
            pairs += count * causal_pairs(length, length, False)
            continue
        blocks = num_cmp(length, c.l, c.d)
        pairs += count * compressed_pairs(length, blocks, c.l, c.d, False)
        pairs += count * sum(causal_pairs(length, most, False) for most in (c.n_sel * c.l_sel, c.w))
        if c.phi == "mlp":
            phi += count * blocks * c.n_kv_groups * sum(c.l * x * x + 4 * x * x for x in (c.d_k, c.d_v))
    tokens = int(np.sum(lengths))
    attention = c.n_layers * (c.n_heads * pairs * (c.d_k + c.d_v) + phi)
    return 3 * 2 * (tokens * linear_weights(c) + attention)


# --- gates and selection ---------------------------------------------------------------------------------------------


class LayerStatistics(NamedTuple):
    """How a layer attends, as means over tokens, heads and groups."""

    gates: dict[str, float]
    """Each branch's share of the gates."""
    entropy: float
    """Of the shares, in nats."""
    distance: float
    """From a query back to the first token of a block it selected, in tokens."""
    overlap: float
    """Share of a query's blocks that the query before it selected too."""


class Observer(TorchDispatchMode):
    """Takes sums of what layers choose and mix from their ops' arguments and results, as they run."""

    def __init__(self) -> None:
        super().__init__()
        self.chosen: list[Tensor] = []
        self.mixed: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "nsa_compile":
            given = dict(zip((x.name for x in func._schema.arguments), args, strict=False)) | (kwargs or {})
            name = func._schema.name.partition("::")[2]
            if name == "select_blocks":
                self.chosen.append(sum_selection(out, given["l_sel"], given["q_start"], given["cu_seqlens"]))
            elif name == "selected_mixture":
                self.mixed.append(sum_gates(given["gates"], given["q"], given["q_start"], given["cu_seqlens"]))
        return out


def sum_gates(gates: Tensor, q: Tensor, q_start: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """(shares of cmp, slc, win; entropy; count), summed over tokens and heads, fp64 [5]."""
    valid = query_layout(q, q_start, cu_seqlens).valid.expand(q.shape[:2])[..., None].expand(gates.shape[:3])
    share = gates.double() / gates.double().sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    share = share[valid]
    entropy = -torch.special.xlogy(share, share).sum()
    return torch.stack((*share.sum(0), entropy, valid.sum().double()))


def sum_selection(blocks: Tensor, l_sel: int, q_start: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """(distances, their count, overlaps, their count), summed over blocks, or queries and groups, fp64 [4]."""
    layout = query_layout(blocks, q_start, cu_seqlens)
    position, valid = (x.expand(blocks.shape[:2])[..., None, None] for x in (layout.position, layout.valid))
    used = (blocks >= 0) & valid
    distance = ((position - blocks.long() * l_sel) * used).sum()
    follows = used[:, 1:].any(-1) & (position[:, 1:, :, 0] > 0)
    common = sum(
        (blocks[:, 1:, :, i, None] == blocks[:, :-1]).any(-1) & used[:, 1:, :, i] for i in range(used.shape[-1])
    )
    overlap = (common / used[:, 1:].sum(-1).clamp_min(1))[follows].double().sum()
    return torch.stack([x.double() for x in (distance, used.sum(), overlap, follows.sum())])


@torch.no_grad()
def layer_statistics(
    model: NSALanguageModel, ids: Tensor, cu_seqlens: Tensor | None = None, group: dist.ProcessGroup | None = None
) -> list[LayerStatistics]:
    """How each layer attends to rows, by a pass of its own that is not compiled; none for dense attention.

    With a `group` of processes, each with its rows, tokens or heads, the means over all of them.
    """
    with torch.compiler.set_stance("force_eager"), Observer() as seen:
        model.loss(ids, cu_seqlens)  # a forward pass for `fully_shard` too
    if not seen.mixed:
        return []
    calls = len(seen.mixed) // len(model.layers)  # several for a layer that attends in parts
    both = (torch.stack(x).unflatten(0, (-1, calls)).sum(1) for x in (seen.mixed, seen.chosen))
    sums = torch.cat(tuple(both), dim=1).cpu()
    if group is not None:
        dist.all_reduce(sums, group=group)
    found = []
    for cmp, slc, win, entropy, n, distance, n_blocks, overlap, n_queries in sums.tolist():
        gates = dict(zip(BRANCHES, (x / max(1, n) for x in (cmp, slc, win)), strict=True))
        found.append(
            LayerStatistics(gates, entropy / max(1, n), distance / max(1, n_blocks), overlap / max(1, n_queries))
        )
    return found
