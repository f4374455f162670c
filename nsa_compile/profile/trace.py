"""What a profiler trace says, step by step: pieces of work with their branch and phase, calls of our ops, gaps.

Reads the Chrome traces that `torch.profiler` exports. Work on a GPU belongs to the step, branch and phase that launched
it, found through its correlation id; where a CUDA graph launched it, to the branch that its kernel's name tells. On a
CPU the work of an op is the time within it that is in no other op. Times are in microseconds.
"""

import gzip
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from nsa_compile.custom_ops.ranges import BRANCHES, RANGE, kernel_part

STEP_RANGE = "ProfilerStep#"
OPS = "nsa_compile::"
BACKWARD = "autograd::engine::evaluate_function"
DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
HOST_WORK = ("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver")
MATMUL_OPS = ("mm", "linear", "linear_pointwise")
"""Ends of the names of ops that multiply matrices."""
MATMUL_KERNELS = ("gemm", "gemv", "cutlass", "nvjet", "splitk", "cublas")
"""What the names of kernels that do have in them."""
WRAPPERS = ("Torch-Compiled Region", "TorchDynamo", "CompiledFunction", "AOTDispatcher", "Pregraph", BACKWARD)
"""Names of host work between the ops of compiled code and of autograd."""


class Work(NamedTuple):
    """One kernel on a device, or on a CPU the time of one op that is in no other op."""

    name: str
    part: str
    """Branch (cmp, choice, slc, win, gates, ...) or another part of the model."""
    phase: str
    """forward, backward, or update for what follows the backward pass."""
    step: int
    start: float
    us: float
    launched: bool
    """Whether it counts as a launch: any kernel; on a CPU any op, but not a range in it."""


class OpCall(NamedTuple):
    """One call of an op of ours."""

    name: str
    step: int
    us: float
    """Of its kernels on the device; on a CPU of the whole call."""
    shapes: tuple[tuple[int, ...], ...]
    types: tuple[str, ...]
    values: tuple[str, ...]


@dataclass
class Step:
    """One step of the loop that was profiled."""

    start: float
    us: float
    """Time of the host."""
    host_launches: int = 0


@dataclass
class Trace:
    """The steps of a trace and the work in them."""

    on_device: bool
    """Whether the work is that of a GPU."""
    steps: list[Step]
    work: list[Work] = field(default_factory=list)
    calls: list[OpCall] = field(default_factory=list)

    def elapsed(self) -> float:
        """Time of all steps: from the first kernel's start to the last one's end, or that of the host."""
        if self.on_device:
            return max(w.start + w.us for w in self.work) - min(w.start for w in self.work)
        return sum(step.us for step in self.steps)

    def busy(self) -> float:
        """Time in which anything ran: kernels of all streams, overlaps counted once; on a CPU ops."""
        if not self.on_device:
            return sum(w.us for w in self.work)
        return covered((w.start, w.start + w.us) for w in self.work)


@dataclass(slots=True)
class _Node:
    """An event of the host among those it is nested in."""

    event: dict[str, Any]
    parent: "_Node | None"
    step: int | None
    phase: str
    part: str | None
    inner: float = 0.0
    """Time of the events directly in it."""
    device_us: float = 0.0

    @property
    def name(self) -> str:
        return self.event["name"]

    @property
    def end(self) -> float:
        return self.event["ts"] + self.event["dur"]

    def op(self) -> "_Node | None":
        """The innermost op it is in or is."""
        node: _Node | None = self
        while node is not None and node.event["cat"] != "cpu_op":
            node = node.parent
        return node


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events of a Chrome trace, packed by gzip or not. Raises ValueError for another file."""
    try:
        text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return json.loads(text)["traceEvents"]
    except (ValueError, KeyError, TypeError, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"trace: expected a Chrome trace as torch.profiler exports it, got {path}") from error


def analyze(events: Sequence[dict[str, Any]]) -> Trace:
    """Steps and work of a trace that was scheduled with `torch.profiler.schedule`.

    Raises: ValueError for a trace without steps.
    """
    spans = [e for e in events if e.get("ph") == "X" and "dur" in e]
    ranges = sorted(
        (e for e in spans if e.get("cat") == "user_annotation" and e["name"].startswith(STEP_RANGE)),
        key=lambda e: e["ts"],
    )
    if not ranges:
        raise ValueError(f"trace: expected steps ({STEP_RANGE}N), got none")
    steps = [Step(e["ts"], e["dur"]) for e in ranges]
    nodes = _nest([e for e in spans if e.get("cat") in HOST_WORK], steps)
    device = [e for e in spans if e.get("cat") in DEVICE_WORK]
    trace = Trace(bool(device), steps)
    if device:
        _add_device_work(trace, nodes, device)
    else:
        _add_host_work(trace, nodes, ranges[0]["tid"])
    for node in nodes:
        if node.step is not None and node.event["cat"] == "cpu_op" and node.name.startswith(OPS):
            trace.calls.append(_read_call(node, node.device_us if device else node.event["dur"]))
    return trace


def _nest(host: list[dict[str, Any]], steps: list[Step]) -> list[_Node]:
    """Events of the host, earlier ones first, each with the step, phase and part that it is in."""
    nodes: list[_Node] = []
    stacks: dict[Any, list[_Node]] = {}
    forward: dict[int, _Node] = {}  # by sequence number, the last op that began with it: the one autograd recorded
    began: dict[int, float] = {}  # the backward pass, by step
    current = 0
    for event in sorted(host, key=lambda e: (e["ts"], -e["dur"])):
        start, name = event["ts"], event["name"]
        stack = stacks.setdefault((event["pid"], event["tid"]), [])
        while stack and start >= stack[-1].end:
            stack.pop()
        parent = stack[-1] if stack else None
        while current + 1 < len(steps) and start >= steps[current + 1].start:
            current += 1
        inside = steps[current].start <= start < steps[current].start + steps[current].us
        step = current if inside else None
        phase, part = "forward", None
        if parent is not None and parent.phase != "forward":
            phase, part = parent.phase, parent.part
        elif step in began:
            phase, part = "update", parent.part if parent is not None else None
        elif parent is not None:
            part = parent.part
        number = event.get("args", {}).get("Sequence number")
        if name.startswith(BACKWARD):
            phase = "backward"
            if step is not None:
                began.setdefault(step, start)
            part = forward[number].part if number in forward else part
        if name.startswith(RANGE):
            part = name.removeprefix(RANGE).removesuffix(" backward")
            inner = [node for node in stack if node.name.startswith((OPS, RANGE))]
            if inner and inner[-1].name.startswith(OPS):  # of the op's whole body, not of a piece in it
                _claim(inner[-1], part, nodes)
        node = _Node(event, parent, step, phase, part)
        if number is not None and phase == "forward":
            forward[number] = node
        if parent is not None:
            parent.inner += event["dur"]
        stack.append(node)
        nodes.append(node)
    return nodes


def _claim(op: _Node, part: str, nodes: list[_Node]) -> None:
    """Make an op and what began in it so far, such as what autograd does around its body, its branch's work."""
    for node in reversed(nodes):
        if node.event["tid"] == op.event["tid"]:
            node.part = part
        if node is op:
            return


def _add_host_work(trace: Trace, nodes: list[_Node], thread: Any) -> None:
    for node in nodes:
        op = node.op()
        if node.step is None or op is None or node.event["tid"] != thread:
            continue
        us = max(0.0, node.event["dur"] - node.inner)
        part = node.part or _part_of_op(op.name, node.phase)
        trace.work.append(Work(op.name, part, node.phase, node.step, node.event["ts"], us, node is op))


def _add_device_work(trace: Trace, nodes: list[_Node], device: list[dict[str, Any]]) -> None:
    launches = {n.event["args"]["correlation"]: n for n in nodes if "correlation" in n.event.get("args", {})}
    ops = [n for n in nodes if n.event["cat"] == "cpu_op"]
    by_id = {n.event["args"]["External id"]: n for n in ops if "External id" in n.event.get("args", {})}
    for node in nodes:
        if node.step is not None and node.event["cat"] in ("cuda_runtime", "cuda_driver") and "Launch" in node.name:
            trace.steps[node.step].host_launches += 1
    for event in device:
        args = event.get("args", {})
        op = by_id.get(args.get("External id"))
        launch = launches.get(args.get("correlation"), op)
        if launch is None or launch.step is None:
            continue
        owner = launch if launch.parent is not None or op is None else op
        own = kernel_part(event["name"])
        shared = own is None or own not in BRANCHES  # then what launched it knows better
        part = owner.part if shared and owner.part not in (None, "step") else own
        part = part or _part_of_kernel(event["name"], owner.phase)
        work = Work(event["name"], part, owner.phase, launch.step, event["ts"], event["dur"], True)
        trace.work.append(work)
        above: _Node | None = owner
        while above is not None:
            above.device_us += work.us
            above = above.parent
    if not trace.work:
        raise ValueError("trace: expected kernels that its steps launched, got none")


def _part_of_op(name: str, phase: str) -> str:
    if phase == "update":
        return "optimizer"
    if name.startswith(WRAPPERS):
        return "host"
    if "_fused_" in name:
        return "fused"
    return "matmul" if name.endswith(MATMUL_OPS) else "other"


def _part_of_kernel(name: str, phase: str) -> str:
    if phase == "update":
        return "optimizer"
    if name.startswith("triton_"):
        return "fused"
    if name.startswith(("Memcpy", "Memset")):
        return "copies"
    return "matmul" if any(word in name.lower() for word in MATMUL_KERNELS) else "other"


def _read_call(node: _Node, us: float) -> OpCall:
    args = node.event.get("args", {})
    shapes = tuple(tuple(dims) if all(isinstance(n, int) for n in dims) else () for dims in args.get("Input Dims", ()))
    values = tuple(str(value) for value in args.get("Concrete Inputs", ()))
    assert node.step is not None
    return OpCall(node.name, node.step, us, shapes, tuple(args.get("Input type", ())), values)


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals (start, end)."""
    total, reach = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reach))
        reach = max(reach, end)
    return total


def summarize_memory(events: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Bytes of the CPU's allocator over time, and what was allocated at the peak, by part.

    Of a trace with `profile_memory=True`; what was there before it began is in the totals but in no part.
    """
    spans = [e for e in events if e.get("ph") == "X" and "dur" in e and e.get("cat") in HOST_WORK]
    first = min((e["ts"] for e in spans), default=0.0)
    nodes = _nest(spans, [Step(first, max((e["ts"] for e in spans), default=0.0) - first + 1.0)])
    allocations = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"])
    live: dict[int, tuple[int, str]] = {}
    timeline, peak, at_peak = [], -1, {}
    stacks: dict[Any, list[_Node]] = {}
    waiting = iter(nodes)
    upcoming = next(waiting, None)
    for event in allocations:
        if event["args"].get("Device Type", 0) != 0:
            continue
        while upcoming is not None and upcoming.event["ts"] <= event["ts"]:
            stacks.setdefault(upcoming.event["tid"], []).append(upcoming)
            upcoming = next(waiting, None)
        stack = stacks.setdefault(event["tid"], [])
        while stack and stack[-1].end < event["ts"]:
            stack.pop()
        size, address, total = (event["args"][key] for key in ("Bytes", "Addr", "Total Allocated"))
        if size > 0:
            node = stack[-1] if stack else None
            op = node.op() if node is not None else None
            part = (node.part if node is not None else None) or (_part_of_op(op.name, op.phase) if op else "other")
            live[address] = (size, part)
        else:
            live.pop(address, None)
        timeline.append([round(event["ts"] - allocations[0]["ts"], 1), total])
        if total > peak:
            peak, at_peak = total, dict(live)
    parts: dict[str, int] = {}
    for size, part in at_peak.values():
        parts[part] = parts.get(part, 0) + size
    return {
        "peak_bytes": max(peak, 0),
        "allocated_at_peak": dict(sorted(parts.items(), key=lambda item: -item[1])),
        "timeline_us_bytes": timeline,
    }
