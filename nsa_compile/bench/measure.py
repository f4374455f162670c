"""Check every case, then time all cases of one size in rounds, so that a drifting clock meets all of them alike."""

import gc
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nsa_compile.bench.beside import alternatives
from nsa_compile.bench.cases import BUILDERS, Case, Inputs, Sampled, Work, as_tuple
from nsa_compile.bench.decode import decode_cases, dense_decode_cases
from nsa_compile.bench.options import DTYPES, FIXED, Options

FORWARD, BOTH = "forward", "forward+backward"
LONGEST_SLEEP = 100_000_000
"""Cycles that the device waits at most while the host launches a call: 50 ms at 2 GHz."""
Progress = Callable[[str, float], None]
"""Told what is being done, and the share of the whole that is done."""


class Rates(NamedTuple):
    """The most the device reached, in the rounds of one size, at a large matrix product and at passes over memory."""

    flops: float
    bytes: float


class Spread(NamedTuple):
    """Quartiles in ms."""

    low: float
    ms: float
    high: float


@dataclass(eq=False)
class Timed:
    """One call to time, `layers` of which it holds."""

    call: Callable[[], Any]
    before: Callable[[], None] | None = None
    layers: int = 1
    flush: bool = False
    cycles: int = 0
    ms: list[float] = field(default_factory=list)
    peak: int | None = None

    def spread(self) -> Spread:
        """Quartiles of the time per layer."""
        return Spread(*(ms / self.layers for ms in statistics.quantiles(self.ms, n=4, method="inclusive")))


class Clock:
    """Times calls on one device.

    On CUDA between events, with the device asleep while the host launches the call, and with the L2 overwritten before
    calls that ask for it; on a CPU by the host's clock.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        self.l2 = torch.cuda.get_device_properties(device).L2_cache_size if self.cuda else 0
        self._flushed = torch.empty(2 * self.l2, dtype=torch.int8, device=device) if self.cuda else None
        self._events: list[tuple[Timed, Any, Any]] = []

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def warm_up(self, timed: Timed) -> None:
        """Call a few times; find the peak memory and how long the host takes to launch."""
        for _ in range(2):
            self._prepared(timed)
        if self.cuda:
            self.synchronize()
            torch.cuda.reset_peak_memory_stats(self.device)
            held = torch.cuda.memory_allocated(self.device)
            self._prepared(timed)
            self.synchronize()
            timed.peak = torch.cuda.max_memory_allocated(self.device) - held
            started = time.perf_counter()
            self._prepared(timed)
            seconds = time.perf_counter() - started
            self.synchronize()
            timed.cycles = min(LONGEST_SLEEP, int(4e9 * seconds))  # twice the time of the launches, at 2 GHz

    def _prepared(self, timed: Timed) -> None:
        if timed.before is not None:
            timed.before()
        timed.call()

    def sample(self, timed: Timed) -> None:
        """Time one call; on CUDA, `collect` has the result."""
        if timed.before is not None:
            timed.before()
        if not self.cuda:
            started = time.perf_counter()
            timed.call()
            timed.ms.append(1000 * (time.perf_counter() - started))
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(timed.cycles)  # meanwhile the host launches the whole call: no event waits for it
        if timed.flush and self._flushed is not None:
            self._flushed.zero_()
        begin.record()
        timed.call()
        end.record()
        self._events.append((timed, begin, end))

    def collect(self) -> None:
        """Wait, and keep the times of the samples since the last call."""
        self.synchronize()
        for timed, begin, end in self._events:
            timed.ms.append(begin.elapsed_time(end))
        self._events.clear()


def run_bench(
    options: Options,
    on_progress: Progress = lambda line, done: None,
    wanted: Callable[[Case, int, list[dict[str, Any]]], bool] = lambda case, tokens, rows: True,
) -> list[dict[str, Any]]:
    """Rows of every case at every size, smallest first.

    `wanted(case, tokens, rows so far)` may leave cases out. A row has its case and sizes, `status` ("ok", "wrong",
    "failed", "unavailable", "out of memory") and, if that is "ok", median and spread in ms, its floor and the fraction
    of it that was reached.
    """
    sizes = [(t, n, dtype) for dtype in options.dtypes for n in options.heads for t in sorted(options.tokens)]
    device = torch.device(options.device)
    rows: list[dict[str, Any]] = []
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for index, (tokens, heads, dtype) in enumerate(sizes):

            def progress(line: str, done: float, index: int = index, size: str = f"{dtype}, T {tokens}") -> None:
                on_progress(f"{size}: {line}", (index + done) / len(sizes))

            rows += measure_size(options, tokens, heads, dtype, progress, partial(_is_wanted, wanted, tokens, rows))
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            if "flex" in options.beside:
                torch.compiler.reset()  # every size is a compilation of its own, and their number is limited
    on_progress("done", 1.0)
    return rows


def _is_wanted(wanted: Any, tokens: int, rows: list[dict[str, Any]], case: Case) -> bool:
    return wanted(case, tokens, rows)


def measure_size(
    options: Options, tokens: int, heads: int, dtype: str, on_progress: Progress, wanted: Callable[[Case], bool]
) -> list[dict[str, Any]]:
    """Rows of one size: build, check, warm up, then rounds over all that is right."""
    clock = Clock(torch.device(options.device))
    inputs, cold = Inputs(options, tokens, heads, DTYPES[dtype]), 4 * clock.l2
    ceiling = ceilings(clock, DTYPES[dtype])
    for timed in ceiling:
        clock.warm_up(timed)
    rows: list[dict[str, Any]] = []
    running: list[tuple[dict[str, Any], Timed, list[Work]]] = []
    grads: dict[Any, Tensor] = {}
    for number, what in enumerate(options.what):
        if what == "decode":
            builders = (partial(decode_cases, inputs, cold), partial(dense_decode_cases, inputs, cold))
        else:
            builders = (partial(BUILDERS[what], inputs), partial(alternatives, what, inputs))
        for ours, build in zip((True, False), builders, strict=True):
            done = 0.5 * (number + (not ours) / 2) / len(options.what)
            on_progress(f"checking {what}" + ("" if ours else " of others"), done)
            cases, failure = attempt(build, ours)
            if failure is not None:
                rows.append(describe(options, tokens, heads, dtype, what, "", FORWARD, ours) | failure)
            for case in filter(wanted, cases or []):
                for name, timed, work, row in prepare_case(case, options, clock, grads, cold):
                    size = describe(options, tokens, heads, dtype, case.what, case.impl, name, ours)
                    rows.append(size | {"runs": case.runs, "op": case.op} | row)
                    if timed is not None:
                        running.append((rows[-1], timed, work))
    timeds = [*ceiling, *(timed for _, timed, _ in running)]
    for number in range(options.repeats + 1):
        on_progress(f"round {number} of {options.repeats}", 0.5 + 0.5 * number / (options.repeats + 1))
        for timed in list(timeds):
            _, failure = attempt(partial(clock.sample, timed), ours=True)
            if failure is not None:  # as when memory that was free at the warm-up is not any more
                timeds.remove(timed)
                for row, other, _ in running:
                    if other is timed:
                        row |= failure
        clock.collect()
        if number == 0:  # warm-up in the order of the others
            for timed in timeds:
                timed.ms.clear()
    product, *passes = (min(timed.ms) / 1000 for timed in ceiling)
    rates = Rates(ceiling_flops(clock.cuda) / product, ceiling_bytes(clock.cuda) / min(passes))
    for row, timed, work in running:
        if row["status"] == "ok":
            row |= result(timed, work, rates)
    return rows


def attempt(work: Callable[[], Any], ours: bool) -> tuple[Any, dict[str, Any] | None]:
    """What `work` gives, or the status and message of a row if it cannot."""
    try:
        with nullcontext() if ours else warnings.catch_warnings(action="ignore"):  # of back ends that say they cannot
            return work(), None
    except torch.OutOfMemoryError:
        return None, {"status": "out of memory", "message": "out of memory"}
    except Exception as error:  # whatever an alternative raises, the others go on
        refused = isinstance(error, ValueError) and str(error).startswith("impl:")  # an op without this implementation
        message = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return None, {"status": "unavailable" if refused or not ours else "failed", "message": message}


def prepare_case(case: Case, options: Options, clock: Clock, grads: dict[Any, Tensor], cold: int) -> list[tuple]:
    """(pass, what to time, its work, first part of its row) of the passes of a case; nothing to time if it is wrong."""
    passes = [FORWARD, BOTH] if options.backward and case.inputs and case.work[1] is not None else [FORWARD]
    prepared: list[tuple] = []
    failure: dict[str, Any] | None = None
    for name in passes:
        row: dict[str, Any] = {}
        timed = None
        if failure is None:
            verdict, failure = attempt(partial(case.differs, name == BOTH), case.ours)
            if verdict is not None:
                row |= {"error": verdict.error, "tolerance": verdict.tolerance}
                failure = wrong(verdict)
        if failure is None:
            timed, failure = attempt(partial(ready, case, name, clock, grads, cold), case.ours)
        if timed is not None:
            l2 = "flushed" if timed.flush else "cold: layers take turns" if case.layers > 1 else "as it comes"
            row |= {"status": "ok", "message": "", "l2": l2 if clock.cuda else None}
        works = [work for work in case.work[: 2 if name == BOTH else 1] if work is not None]
        prepared.append((name, timed, works, row | (failure or {})))
    return prepared


def wrong(verdict: Sampled) -> dict[str, Any] | None:
    """The status of a row whose result is not the reference's."""
    if verdict.holds:
        return None
    message = f"differs from the reference by {verdict.error:.3g}, expected at most {verdict.tolerance:.3g}"
    return {"status": "wrong", "message": message}


def ready(case: Case, name: str, clock: Clock, grads: dict[Any, Tensor], cold: int) -> Timed:
    """A warmed-up call of one pass."""
    if name == BOTH:
        out = as_tuple(case.run())[: case.differentiable]
        layouts = [(o.shape, o.stride(), o.dtype) for o in out]
        for o, layout in zip(out, layouts, strict=True):
            if layout not in grads:
                grads[layout] = torch.randn_like(o)
        del out
        call = partial(forward_and_backward, case, [grads[layout] for layout in layouts])
    else:
        call = partial(without_grad, case.run if case.capture is None else case.capture())
    timed = Timed(call, case.before, case.layers, flush=clock.cuda and case.layers == 1 and case.work[0].bytes < cold)
    clock.warm_up(timed)
    if case.capture is not None:
        timed.peak = None  # a graph has memory of its own
    return timed


def without_grad(run: Callable[[], Any]) -> None:
    """A forward that keeps nothing."""
    with torch.no_grad():
        run()


def forward_and_backward(case: Case, grads: list[Tensor]) -> None:
    """A forward and the gradients of its inputs."""
    with torch.enable_grad():
        torch.autograd.grad(as_tuple(case.run())[: case.differentiable], case.inputs, grads)


def ceiling_flops(cuda: bool) -> int:
    """FLOP of the matrix product whose rate is the ceiling."""
    return 2 * (8192 if cuda else 512) ** 3


def ceiling_bytes(cuda: bool) -> int:
    """Bytes that a pass over memory reads and writes for the ceiling of bandwidth: more than caches hold."""
    return 2**31 if cuda else 2**28


def ceilings(clock: Clock, dtype: torch.dtype) -> tuple[Timed, Timed, Timed]:
    """A large matrix product, a large copy, and a large sum that reads three times what it writes.

    Memory may read faster than it writes, so that a copy alone is no bound for what mostly reads.
    """
    n = round((ceiling_flops(clock.cuda) / 2) ** (1 / 3))
    generator = torch.Generator(clock.device).manual_seed(0)
    a, b = (torch.randn(n, n, generator=generator, device=clock.device, dtype=dtype) for _ in range(2))
    product, memory = torch.empty_like(a), torch.zeros(ceiling_bytes(clock.cuda) // 4, device=clock.device)
    (source, target), (x, y, z, out) = memory.chunk(2), memory.chunk(4)
    return (
        Timed(lambda: torch.mm(a, b, out=product)),
        Timed(lambda: target.copy_(source)),
        Timed(lambda: torch.addcmul(x, y, z, out=out)),
    )


def result(timed: Timed, works: list[Work], rates: Rates) -> dict[str, Any]:
    """Time, floor and the fraction reached. The floor of a pass is what its products or its bytes take, if not more."""
    spread = timed.spread()
    products, moves = (
        [1000 * x / rate for x in column] for column, rate in zip(zip(*works, strict=True), rates, strict=True)
    )
    floor = sum(map(max, products, moves))
    return {
        "ms": spread.ms, "iqr_ms": spread.high - spread.low, "q1_ms": spread.low, "q3_ms": spread.high,
        "samples": len(timed.ms),
        "floor_ms": floor, "fraction": floor / spread.ms,
        "bound": "products" if sum(products) > sum(moves) else "bytes",
        "gflop": sum(w.flops for w in works) / 1e9, "gbyte": sum(w.bytes for w in works) / 1e9,
        "tflop_per_s": rates.flops / 1e12, "gb_per_s": rates.bytes / 1e9,
        "peak_mib": None if timed.peak is None else timed.peak / 2**20,
    }  # fmt: skip


def describe(
    options: Options, tokens: int, heads: int, dtype: str, what: str, impl: str, name: str, ours: bool
) -> dict[str, Any]:
    """What a row is about."""
    return {
        "what": what, "impl": impl, "pass": name, "tokens": tokens, "heads": heads, "dtype": dtype,
        **{key: getattr(options, key) for key in FIXED}, "ours": ours,
    }  # fmt: skip
