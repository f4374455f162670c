"""Numbers of a profile: time per branch, launches, gaps, kernels, rates of our ops; and two profiles side by side."""

import ast
import csv
import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from nsa_compile.profile.trace import OPS, OpCall, Trace

SUMMARY_FILE = "summary.json"
PHASES = ("forward", "backward", "update")
TOP = 10
STEP = ("step_ms", "host_ms", "busy_ms", "gap_ms", "launches", "host_launches")
"""Numbers of a step that are compared."""
TYPES = {
    "double": torch.float64, "float": torch.float32, "c10::BFloat16": torch.bfloat16, "c10::Half": torch.float16,
    "long int": torch.int64, "long": torch.int64, "int": torch.int32, "bool": torch.bool, "unsigned char": torch.uint8,
}  # fmt: skip
"""Types of tensors as traces name them."""


class Cost(NamedTuple):
    """What one call of an op has to do at least."""

    flops: int
    """From its FLOP formula; 0 where it has none."""
    nbytes: int
    """Of its inputs and outputs, each once; without buffers that it writes into, such as a cache."""


def summarize(trace: Trace, *, extra_costs: dict[str, Cost] | None = None, from_start: bool = False) -> dict[str, Any]:
    """Numbers of a trace per step, times in milliseconds.

    `extra_costs` are those of one step for ops whose calls no trace shows, by the beginning of their kernels' names.
    `from_start` says that every `q_start` was 0, which no trace shows: then queries see fewer keys than the buffers
    have, and formulas count those.
    """
    n = len(trace.steps)
    elapsed, busy = trace.elapsed() / 1000 / n, trace.busy() / 1000 / n
    kernels: dict[tuple[str, str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for work in trace.work:
        row = kernels[work.name, work.part, work.phase]
        row[0] += work.us / 1000 / n
        row[1] += work.launched / n
    rows = [
        {"kernel": name, "part": part, "phase": phase, "ms": ms, "launches": launches}
        for (name, part, phase), (ms, launches) in sorted(kernels.items(), key=lambda item: -item[1][0])
    ]
    return {
        "steps": n,
        "timed_on": "device" if trace.on_device else "host",
        "step_ms": elapsed,
        "host_ms": statistics.mean(step.us for step in trace.steps) / 1000,
        "busy_ms": busy,
        "gap_ms": elapsed - busy,
        "launches": sum(row["launches"] for row in rows),
        "host_launches": sum(step.host_launches for step in trace.steps) / n,
        "parts": _sum_parts(rows),
        "ops": _rate_ops(trace.calls, n, from_start) + _rate_kernels(rows, extra_costs or {}),
        "kernels": rows,
    }


def _sum_parts(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    parts: dict[str, dict[str, Any]] = {}
    for row in rows:
        part = parts.setdefault(
            row["part"], {"part": row["part"], "ms": 0.0, **{f"{phase}_ms": 0.0 for phase in PHASES}, "launches": 0.0}
        )
        part["ms"] += row["ms"]
        part[f"{row['phase']}_ms"] += row["ms"]
        part["launches"] += row["launches"]
    return sorted(parts.values(), key=lambda part: -part["ms"])


def _rate_ops(calls: Iterable[OpCall], n: int, from_start: bool) -> list[dict[str, Any]]:
    costs = cache(_cost_of)
    found: dict[str, list[float]] = defaultdict(lambda: [0.0] * 4)
    for call in calls:
        cost = costs(call.name, call.shapes, call.types, call.values, from_start)
        for i, value in enumerate((1, call.us / 1000, cost.flops, cost.nbytes)):
            found[call.name][i] += value / n
    ops = [_rate(name, *values) for name, values in found.items()]
    return sorted(ops, key=lambda op: -op["ms"])


def _rate_kernels(rows: Sequence[dict[str, Any]], costs: dict[str, Cost]) -> list[dict[str, Any]]:
    rated = []
    for prefix, cost in costs.items():
        own = [row for row in rows if row["kernel"].startswith(prefix)]
        if own:
            launches, ms = (sum(row[key] for row in own) for key in ("launches", "ms"))
            rated.append(_rate(f"{prefix}*", launches, ms, *cost))
    return rated


def _rate(name: str, calls: float, ms: float, flops: float, nbytes: float) -> dict[str, Any]:
    per_second = 1000 / ms if ms else 0.0
    return {
        "op": name, "calls": calls, "ms": ms, "gflop": flops / 1e9, "mb": nbytes / 1e6,
        "tflop_per_s": flops * per_second / 1e12, "gb_per_s": nbytes * per_second / 1e9,
    }  # fmt: skip


def _cost_of(
    name: str, shapes: tuple[tuple[int, ...], ...], types: tuple[str, ...], values: tuple[str, ...], from_start: bool
) -> Cost:
    """FLOPs by the formula registered for the op, bytes of its inputs and, from its fake, of its outputs."""
    if not types:  # a trace without shapes
        return Cost(0, 0)
    packet = getattr(torch.ops.nsa_compile, name.removeprefix(OPS))
    is_tensor = [kind in TYPES for kind in types]
    read = [_read_value(value) for value in values]
    schema = packet.default._schema.arguments
    formula: Callable[..., int] | None = flop_registry.get(packet)
    flops = 0
    if formula is not None:
        known = [list(s) if t else v for s, t, v in zip(shapes, is_tensor, read, strict=True)]
        if from_start:
            known = [None if a.name == "q_start" else x for a, x in zip(schema, known, strict=True)]
        flops = formula(*known, out_val=None)
    given = [
        torch.empty(shape, dtype=TYPES[kind], device="meta") if tensor else value
        for shape, kind, tensor, value in zip(shapes, types, is_tensor, read, strict=True)
    ]
    given = ["auto" if str(a.type) == "str" else value for a, value in zip(schema, given, strict=True)]
    with torch.no_grad():
        result = packet(*given)
    outputs = result if isinstance(result, (tuple, list)) else (result,)
    buffers = [a.alias_info is not None and a.alias_info.is_write for a in schema]
    inputs = [x for x, buffer in zip(given, buffers, strict=True) if not buffer]
    return Cost(flops, sum(x.nbytes for x in (*inputs, *outputs) if isinstance(x, Tensor)))


def _read_value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):  # a tensor, None, or a string: traces leave those empty
        return None


def write_kernels(path: Path, summary: dict[str, Any]) -> None:
    """The table of kernels as CSV: milliseconds and launches per step, the most expensive first."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ("kernel", "part", "phase", "ms", "launches"))
        writer.writeheader()
        writer.writerows(summary["kernels"])


def load_summary(path: Path) -> dict[str, Any]:
    """The summary in a folder of a profile, or in a file. Raises ValueError where there is none."""
    file = path / SUMMARY_FILE if path.is_dir() else path
    try:
        summary = json.loads(file.read_text())
        diff(summary, summary)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"diff: expected a folder of a profile or its {SUMMARY_FILE}, got {path}") from error
    return summary


def diff(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Two summaries side by side: the step, parts and kernels with ms and launches of a, of b and b - a.

    Parts and kernels come by the size of the change; what only one of them ran has 0 in the other.
    """

    def pair(rows: str, keys: tuple[str, ...]) -> list[dict[str, Any]]:
        sides = [{tuple(row[key] for key in keys): row for row in side[rows]} for side in (a, b)]
        pairs = []
        for names in sides[0] | sides[1]:
            row: dict[str, Any] = dict(zip(keys, names, strict=True))
            for value in ("ms", "launches"):
                before, after = (side[names][value] if names in side else 0.0 for side in sides)
                row |= {f"{value}_a": before, f"{value}_b": after, f"{value}_change": after - before}
            pairs.append(row)
        return sorted(pairs, key=lambda row: -abs(row["ms_change"]))

    steps = {name: {"a": a[name], "b": b[name], "change": b[name] - a[name]} for name in STEP}
    settings = [x.get("settings", {}) for x in (a, b)]
    changed = {
        name: [side.get(name) for side in settings]
        for name in settings[0] | settings[1]
        if settings[0].get(name) != settings[1].get(name)
    }
    kernels, parts = pair("kernels", ("kernel", "part", "phase")), pair("parts", ("part",))
    return {"settings": changed, "step": steps, "parts": parts, "kernels": kernels}


def say_profile(console: Console, summary: dict[str, Any]) -> None:
    """Print what a summary says."""
    s = summary
    where = "on the device" if s["timed_on"] == "device" else "on the host"
    console.print(
        f"{s['step_ms']:.3f} ms a step {where} ({s['steps']} steps), {s['gap_ms']:.3f} ms of it in gaps; "
        f"{s['launches']:,.0f} {'kernels' if s['timed_on'] == 'device' else 'ops'} a step"
        + (f" from {s['host_launches']:,.0f} launches, host {s['host_ms']:.3f} ms" if s["host_launches"] else ""),
        soft_wrap=True,
    )
    phases = [phase for phase in PHASES if any(part[f"{phase}_ms"] for part in s["parts"])]
    table = _table("time per branch", ("part",), ("ms", "%", *(f"{phase} ms" for phase in phases), "launches"))
    for part in s["parts"]:
        shares = (f"{part[f'{phase}_ms']:.3f}" for phase in phases)
        table.add_row(part["part"], *_ms_and_share(part["ms"], s), *shares, f"{part['launches']:,.0f}")
    table.add_row("gaps", *_ms_and_share(s["gap_ms"], s), *("" for _ in phases), "")
    console.print(table)
    table = _table("most expensive kernels", ("kernel", "part", "phase"), ("ms", "%", "launches"))
    for row in s["kernels"][:TOP]:
        named = (row["kernel"].removeprefix(OPS)[:60], row["part"], row["phase"])
        table.add_row(*named, *_ms_and_share(row["ms"], s), f"{row['launches']:,.0f}")
    console.print(table)
    table = _table("ops of nsa_compile", ("op",), ("calls", "ms", "GFLOP", "TFLOP/s", "MB", "GB/s"))
    for op in s["ops"]:
        values = (op["ms"], op["gflop"], op["tflop_per_s"], op["mb"], op["gb_per_s"])
        table.add_row(op["op"].removeprefix(OPS), f"{op['calls']:,.0f}", *(f"{value:,.4g}" for value in values))
    console.print(table)


def say_diff(console: Console, changes: dict[str, Any]) -> None:
    """Print two profiles side by side: b against a."""
    for name, (a, b) in changes["settings"].items():
        console.print(f"{name}: {a} in a, {b} in b", soft_wrap=True)
    table = _table("", ("per step",), ("a", "b", "b - a", "b / a"))
    for name, row in changes["step"].items():
        table.add_row(name, *_compared(row["a"], row["b"]))
    console.print(table)
    table = _table("time per branch", ("part",), ("ms a", "ms b", "b - a", "b / a"))
    for row in changes["parts"]:
        table.add_row(row["part"], *_compared(row["ms_a"], row["ms_b"]))
    console.print(table)
    table = _table("kernels", ("kernel", "part", "phase"), ("ms a", "ms b", "b - a", "launches"))
    for row in changes["kernels"][: 3 * TOP]:
        named = (row["kernel"].removeprefix(OPS)[:60], row["part"], row["phase"])
        launches = " → ".join(f"{row[f'launches_{side}']:,.0f}" for side in "ab")
        table.add_row(*named, *_compared(row["ms_a"], row["ms_b"])[:3], launches)
    console.print(table)


def _table(title: str, names: Sequence[str], numbers: Sequence[str]) -> Table:
    """A table that keeps long names and all numbers whole on a narrow terminal."""
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in names:
        table.add_column(name, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _ms_and_share(ms: float, summary: dict[str, Any]) -> tuple[str, str]:
    return f"{ms:.3f}", f"{100 * ms / summary['step_ms']:.1f}"


def _compared(a: float, b: float) -> tuple[str, str, str, str]:
    return f"{a:,.3f}", f"{b:,.3f}", f"{b - a:+,.3f}", f"{b / a:.2f}" if a else "new" if b else ""
