"""Run every kernel of the package in every variant at tiny sizes, for NVIDIA's compute-sanitizer.

    python tests/sanitize.py --tool memcheck      # or initcheck, racecheck, synccheck: run the cases under the tool
    python tests/sanitize.py                      # run the cases alone and check that no kernel or variant was left out
    python tests/sanitize.py --list               # names of the cases; names, or parts of them, pick cases

With --tool the cases first run without it, in several processes, so that nothing compiles under it. Each remark of the
tool is then counted by kernel; what EXPLAINED does not say why it is harmless makes the exit code 1. Every tensor gets
an allocation of its own (PYTORCH_NO_CUDA_MEMORY_CACHING=1), so that memcheck knows where it ends and initcheck that
nobody has written it yet. Results are copied to the host, where initcheck looks for elements that no kernel wrote.

Without a CUDA device Triton's interpreter runs the cases in fp32, but for the Gluon kernels of Hopper GPUs. With
--dry-run nothing runs: what a Hopper GPU would be given to launch is checked on any machine, as a test does.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

if "--dry-run" not in sys.argv[1:]:
    import conftest  # noqa: F401  (chooses the interpreter where no GPU is)

import torch
from cases import Shape, draw, draw_inputs, int32
from launches import find_kernels, kernel_name
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from nsa_compile import compress_mean, compressed_attention, gated_sum, select_blocks, selected_attention
from nsa_compile import window_attention as attend_window
from nsa_compile.custom_ops import dispatch
from nsa_compile.custom_ops.kernels import block_choice, cache, decode, hopper, hopper_backward
from nsa_compile.custom_ops.mixture import selected_mixture
from nsa_compile.ops import checks

DRY = "--dry-run" in sys.argv[1:]
ON_GPU = DRY or torch.cuda.is_available()
ON_HOPPER = DRY or (ON_GPU and torch.cuda.get_device_capability()[0] == 9)
DEVICE = "cuda" if ON_GPU and not DRY else "cpu"
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = {FP32, BF16, FP16} if ON_GPU else {FP32}
TOOLS = ("memcheck", "initcheck", "racecheck", "synccheck")

EXPLAINED: dict[tuple[str, str], str] = {
    ("initcheck", "_decode_merge_kernel"): (
        "EAGER loads the parts of all splits before it knows which have keys, and gives those without no weight"
    ),
}
"""Why remarks of a tool on a kernel are harmless."""


class Attention(NamedTuple):
    """A forward and a backward of every branch, of their mixture and of the choice of blocks."""

    shape: Shape
    t: int
    dtype: torch.dtype = FP32
    b: int = 1
    s: int | None = None
    q_start: tuple[int, ...] = ()
    cu_seqlens: tuple[int, ...] = ()
    scale: float | None = None
    hopper: bool = False
    """Whether Hopper GPUs run their own kernels."""
    deterministic: bool = False
    poisoned: bool = False
    """NaN in the last key and value."""
    scratch: int | None = None
    """Bytes of the choice's scratch memory."""


class Step(NamedTuple):
    """A decode step of t tokens per row over caches of 96 tokens."""

    shape: Shape
    t: int
    dtype: torch.dtype = FP32
    positions: tuple[int, ...] = (67, 3)
    counts: tuple[int, ...] = ()
    tied: bool = False
    emitted: bool = False
    splits: tuple[int, int, int] | None = None


class Buffers(NamedTuple):
    """Tokens into and out of a buffer or a ring."""

    dtype: torch.dtype = FP32


SMALL = Shape(8, 4, 16, 4, 20, g=2, h=3, d_k=12, d_v=20)
ODD = Shape(4, 2, 6, 5, 33, init_blocks=0, local_blocks=1, g=1, h=3, d_k=10, d_v=7)
EVEN = Shape(8, 8, 64, 3, 120, g=1, h=4, d_k=16, d_v=32)
FORCED = Shape(8, 4, 16, 3, 80, g=1, h=2, d_k=16, d_v=16)
LONG = Shape(16, 8, 192, 3, 130, local_blocks=1, g=1, h=2, d_k=24, d_v=40)
NARROW = Shape(16, 8, 64, 4, 100, g=2, h=16, d_k=24, d_v=40)
WIDE = Shape(16, 8, 64, 3, 80, g=1, h=8, d_k=128, d_v=96)
WIDER = Shape(16, 8, 64, 3, 80, g=1, h=4, d_k=192, d_v=128)
WIDEST = Shape(8, 4, 16, 3, 40, g=1, h=2, d_k=256, d_v=160)
THREE = Shape(16, 8, 64, 3, 80, g=2, h=3, d_k=128, d_v=128)
MANY = Shape(16, 8, 128, 3, 80, g=1, h=64, d_k=64, d_v=64)
PACKED = (0, 7, 7, 50, 51, 61)

CASES: dict[str, Attention | Step | Buffers] = {
    "plain": Attention(SMALL, 55, b=2),
    "negative": Attention(SMALL, 40, scale=-0.4),
    "buffer": Attention(SMALL, 30, b=2, s=90, q_start=(50, 1)),
    "packed": Attention(SMALL, 64, cu_seqlens=PACKED),
    "packed-buffer": Attention(SMALL, 25, s=64, q_start=(30,), cu_seqlens=PACKED),
    "packed-negative": Attention(ODD, 64, cu_seqlens=PACKED, scale=-0.7),
    "deterministic": Attention(SMALL, 30, deterministic=True),
    "odd": Attention(ODD, 40),
    "whole-tiles": Attention(EVEN, 140),
    "all-forced": Attention(FORCED, 60),
    "several-pieces": Attention(LONG, 200),
    "many-heads": Attention(Shape(4, 4, 8, 4, 9, g=1, h=32, d_k=16, d_v=16), 20),
    "several-chunks": Attention(SMALL, 40, scratch=1),
    "wide": Attention(WIDEST, 30),
    "poisoned": Attention(SMALL, 20, poisoned=True),
    "step": Step(SMALL, 1),
    "step-three": Step(SMALL, 3, counts=(3, 1)),
    "step-tied": Step(SMALL, 1, tied=True, counts=(0, 1)),
    "step-emitted": Step(SMALL, 2, emitted=True),
    "step-odd": Step(ODD, 1),
    "step-one-token-blocks": Step(Shape(1, 1, 4, 6, 20, g=1, h=2, d_k=8, d_v=8), 1),
    "step-many-rows": Step(Shape(8, 4, 16, 4, 20, g=1, h=16, d_k=16, d_v=16), 8, positions=(80, 4)),
    "step-many-splits": Step(Shape(8, 4, 16, 4, 20, g=1, h=2, d_k=16, d_v=72), 1, splits=(24, 6, 4)),
    "step-wide": Step(Shape(8, 4, 32, 3, 20, g=1, h=2, d_k=160, d_v=20), 1),
    "buffers": Buffers(),
}
for kind in (BF16, FP16):
    CASES |= {
        f"{name}-{str(kind).removeprefix('torch.')}": case
        for name, case in {
            "plain": Attention(SMALL, 75, kind),
            "packed": Attention(ODD, 64, kind, cu_seqlens=PACKED, scale=-0.7),
            "whole-tiles": Attention(EVEN, 150, kind),
            "several-pieces": Attention(LONG, 210, kind),
            "wide": Attention(WIDER, 70, kind, scale=-0.1),
            "widest": Attention(WIDEST, 40, kind),
            "hopper": Attention(NARROW, 150, kind, b=2, hopper=True),
            "hopper-negative": Attention(WIDE, 200, kind, scale=-0.1, hopper=True),
            "hopper-buffer": Attention(WIDE, 90, kind, b=2, s=200, q_start=(100, 3), hopper=True),
            "hopper-packed": Attention(WIDE, 200, kind, cu_seqlens=(0, 7, 7, 150, 199), hopper=True),
            "hopper-wide": Attention(WIDER, 150, kind, hopper=True),
            "hopper-three": Attention(THREE, 150, kind, hopper=True),
            "hopper-many": Attention(MANY, 140, kind, hopper=True),
            "hopper-poisoned": Attention(WIDE, 100, kind, poisoned=True, hopper=True),
            "hopper-deterministic": Attention(WIDE, 100, kind, deterministic=True, hopper=True),
            "step": Step(SMALL, 1, kind),
            "step-four": Step(SMALL, 4, kind, counts=(4, 2), emitted=True),
            "step-wide": Step(WIDER, 1, kind, tied=True),
            "buffers": Buffers(kind),
        }.items()
    }

SWITCHES: dict[str, dict[str, Callable[[Mapping[str, Any]], bool]]] = {
    "interval._interval_fwd_kernel": {"padded channels": lambda a: a["D_K"] < a["DK"]},
    "interval._interval_bwd_dkv_kernel": {
        "queries as boxes": lambda a: a["H"] & (a["H"] - 1) == 0,
        "several parts": lambda a: len(a["grad_k"]) > 1,
    },
    "block_choice._group_probabilities_kernel": {"padded heads": lambda a: a["H"] < a["HP"]},
    "block_choice._top_blocks_kernel": {
        "padded strides": lambda a: a["A"] < a["AP"],
        "overlap with the next block": lambda a: a["M"] > 1,
        "blocks to choose": lambda a: a["N"] > a["INIT"] + a["LOCAL"],
        "first of several chunks": lambda a: a["chunk"] < a["t"],
    },
    "selection._selected_fwd_kernel": {"whole tiles": lambda a: a["L_SEL"] % a["BN"] == 0},
    "selection._selected_bwd_dq_kernel": {"whole tiles": lambda a: a["L_SEL"] % a["BN"] == 0},
    "selection._selected_bwd_dkv_kernel": {
        "several pieces": lambda a: a["L_SEL"] > a["BN"],
        "several tokens": lambda a: a["TOKENS"] > 1,
    },
    "gating._gated_sum_bwd_kernel": {"delta": lambda a: a["lse"] is not None},
    "hopper.attend_kernel": {
        "blocks": lambda a: a["CAPACITY"] > 0,
        "output": lambda a: a["o"] is not None,
        "mixture": lambda a: a["gates"] is not None,
        "wide tiles": lambda a: a["DK"] > 128,
        "several pieces": lambda a: a["PIECES"] > 1,
    },
    "hopper_backward.sum_queries_kernel": {"blocks": lambda a: a["CAPACITY"] > 0},
    "hopper_backward.sum_keys_kernel": {
        "blocks": lambda a: a["ITEM"] > 0,
        "several parts": lambda a: a["ITEM"] == 0 and len(a["grad_k"]) > 1,
        "several tokens": lambda a: a["H"] < 64,
        "wide tiles": lambda a: a["DK"] > 64,
    },
    "decode._decode_append_kernel": {"several tokens": lambda a: a["T"] > 1},
    "decode._decode_scan_kernel": {
        "overlap with the next block": lambda a: a["M"] > 1,
        "several tokens": lambda a: a["T"] > 1,
        "several tiles of rows": lambda a: a["ROW_TILES"] > 1,
    },
    "decode._decode_selected_kernel": {"several pieces": lambda a: a["L_SEL"] > a["BN"]},
}
"""What must be so in one launch of a kernel and not so in another, besides each constexpr bool."""
WITHOUT_TYPE = {
    "block_choice._top_blocks_kernel", "decode._decode_choice_kernel", "decode._decode_scores_kernel",
    "places._compressed_ends_kernel", "places._interval_queries_kernel", "places._places_kernel",
    "selection._inverse_kernel", "selection._union_kernel",
}  # fmt: skip
"""Kernels whose arguments are never in the type of the inputs."""


class Seen:
    """What the launches of each kernel were like."""

    def __init__(self) -> None:
        self.launches: Counter[str] = Counter()
        self.switches: dict[tuple[str, str], set[bool]] = defaultdict(set)
        self.dtypes: dict[str, set[torch.dtype]] = defaultdict(set)

    def add(self, name: str, arguments: Mapping[str, Any]) -> None:
        """Note a launch of the kernel "file.kernel"."""
        self.launches[name] += 1
        for argument, value in arguments.items():
            if isinstance(value, bool):
                self.switches[name, argument].add(value)
        for switch, is_on in SWITCHES.get(name, {}).items():
            self.switches[name, switch].add(bool(is_on(arguments)))
        tensors = (x.base if hasattr(x, "base") else x for x in arguments.values())
        kinds = {x.dtype for x in tensors if isinstance(x, Tensor) and x.is_floating_point()}
        self.dtypes[name] |= kinds - {FP32} or kinds

    def missing(self, kernels: Iterable[str]) -> list[str]:
        """What was left out of the variants of these kernels, one line each."""
        lines = [f"{name} never ran" for name in sorted(kernels) if not self.launches[name]]
        for (name, switch), values in sorted(self.switches.items()):
            if len(values) < 2:
                lines.append(f"{name} ran only {'with' if True in values else 'without'} {switch}")
        for name, dtypes in sorted(self.dtypes.items()):
            wanted = DTYPES - {FP32} if name.startswith("hopper") else DTYPES
            if name not in WITHOUT_TYPE and wanted - dtypes:
                lines.append(f"{name} never ran in {', '.join(sorted(map(str, wanted - dtypes)))}")
        return lines


@contextlib.contextmanager
def watched(seen: Seen) -> Iterator[None]:
    """Launches are noted in `seen`, and in a dry run not made."""

    def noted(original):
        def run(kernel, *args, **kwargs):
            arguments = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
            seen.add(kernel_name(kernel), {name: arguments[name] for name in kernel.arg_names if name in arguments})
            return None if DRY else original(kernel, *args, **kwargs)

        return run

    with contextlib.ExitStack() as stack:
        if DRY:
            stack.enter_context(mock.patch.object(Tensor, "is_cuda", True))
            stack.enter_context(mock.patch("torch.cuda.get_device_capability", lambda device=None: (9, 0)))
            stack.enter_context(mock.patch.object(decode, "multiprocessors", lambda x: 132))
            stack.enter_context(mock.patch.object(dispatch, "kernel_refusal", lambda *of: ""))
            stack.enter_context(mock.patch.object(checks, "values_are_visible", lambda x: False))
        for kind in (JITFunction, InterpretedFunction):
            stack.enter_context(mock.patch.object(kind, "run", noted(kind.run)))
        yield


def place(x: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    """x on the device; what it needs to become is done on the host, so that no other kernel runs."""
    return None if x is None else x.to(dtype or x.dtype).to(DEVICE)


def run_attention(case: Attention) -> list[Tensor]:
    """Outputs and gradients of every op of the attention."""
    shape, packed = case.shape, bool(case.cu_seqlens)
    s = case.s or case.t
    x = draw_inputs(shape, case.t, b=case.b, s=case.s, c=s // shape.d if packed else None, dtype=case.dtype)
    if case.poisoned:
        for keys in (x.k_cmp, x.v_cmp, x.k_slc, x.v_slc, x.k_win, x.v_win):
            keys[:, -1] = float("nan")
    q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates = (place(y).requires_grad_() for y in x)
    q_start, cu_seqlens = (place(int32(*y)) if y else None for y in (case.q_start, case.cu_seqlens))
    how: dict[str, Any] = {"q_start": q_start, "cu_seqlens": cu_seqlens, "scale": case.scale, "impl": "triton"}
    results: list[Tensor] = []

    def differentiate(outputs: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> None:
        grads = [place(draw(*o.shape, seed=70 + i), o.dtype) for i, o in enumerate(outputs)]
        results.extend((*outputs, *torch.autograd.grad(outputs, inputs, grads)))

    if q_start is None:
        mean = compress_mean(k_slc, **shape.compression, cu_seqlens=cu_seqlens, impl="triton")
        differentiate((mean,), (k_slc,))
    o_cmp, lse = compressed_attention(q, k_cmp, v_cmp, **shape.compression, **how)
    differentiate((o_cmp, lse), (q, k_cmp, v_cmp))
    if case.scratch is None:
        blocks = select_blocks(q, k_cmp, lse, **shape.choice, **how)
    else:
        scale = shape.d_k**-0.5 if case.scale is None else case.scale
        with torch.no_grad():
            blocks = block_choice.select_blocks(
                q, k_cmp, lse, *shape.choice.values(), q_start, cu_seqlens, scale, case.scratch
            )
    results.append(blocks)
    differentiate(selected_attention(q, k_slc, v_slc, blocks, l_sel=shape.l_sel, **how), (q, k_slc, v_slc))
    o_win, _ = attend_window(q, k_win, v_win, w=shape.w, **how)
    differentiate((o_win,), (q, k_win, v_win))
    branches = [y.detach().requires_grad_() for y in (o_cmp, o_win)]
    differentiate((gated_sum(branches[0], branches[1], branches[1], gates, impl="triton"),), (*branches, gates))
    inputs = (q, k_slc, v_slc, *branches, gates)
    mixture = selected_mixture(*inputs[:3], blocks, *inputs[3:], l_sel=shape.l_sel, **how)
    differentiate((mixture,), inputs)
    with torch.no_grad():
        results.append(selected_mixture(*inputs[:3], blocks, *inputs[3:], l_sel=shape.l_sel, **how))
    return results


def run_step(case: Step) -> list[Tensor]:
    """Output, blocks and caches of a decode step."""
    shape, b, capacity = case.shape, len(case.positions), 96
    n, seeds = shape.g * shape.h, iter(range(1000))

    def tensor(tokens: int, heads: int, channels: int) -> Tensor:
        return place(draw(b, tokens, heads, channels, seed=next(seeds), dtype=case.dtype))

    def pair(tokens: int) -> list[Tensor]:
        return [tensor(tokens, shape.g, channels) for channels in (shape.d_k, shape.d_v)]

    q, gates = tensor(case.t, n, shape.d_k), tensor(case.t, n, 3)
    new = [*pair(case.t), *pair(case.t), *((None, None) if case.tied else pair(case.t))]
    emitted = pair(-(-case.t // shape.d)) if case.emitted else (None, None)
    caches = [
        *pair(-(-capacity // shape.d)), *pair(shape.l + 7), *pair(capacity),
        *((None, None) if case.tied else pair(shape.w + 7)),
    ]  # fmt: skip
    positions = place(int32(*case.positions))
    nominal, actual = torch.zeros(b, 4, dtype=torch.int64), torch.zeros(b, shape.g, 4, dtype=torch.int64)
    reads = [place(nominal), place(actual)]
    o, blocks = decode.decode_attention(
        q, *new, *emitted, gates, place(int32(*case.counts)) if case.counts else None, positions, *reads, *caches,
        shape.l, shape.d, shape.l_sel, shape.n_sel, shape.w, shape.init_blocks, shape.local_blocks,
        1e4, shape.d_k**-0.5, splits=decode.Splits(*case.splits) if case.splits else None,
    )  # fmt: skip
    return [o, blocks, positions, *reads, *(x for x in caches if x is not None)]


def run_buffers(case: Buffers) -> list[Tensor]:
    """A buffer and a ring after appends and writes, and what is read from them."""
    results = []
    positions, count = place(int32(5, 20)), place(int32(3, 0))
    new = place(draw(2, 9, 3, 10, seed=1, dtype=case.dtype))
    for ring in (False, True):
        for given in (None, count):
            buffer = place(draw(2, 23, 3, 10, seed=2, dtype=case.dtype))
            cache.cache_append(buffer, new, positions, given, ring)
            results += [buffer, cache.cache_recall(buffer, new, positions, positions - 4, 12)]
    index = torch.arange(9).expand(2, 9) + torch.tensor([[3], [18]])
    cache.cache_write(buffer, new, place(index), place(index % 2 == 0))
    return [*results, buffer]


def run(case: Attention | Step | Buffers) -> None:
    """Run a case; its results hold no NaN unless that was put in."""
    with contextlib.ExitStack() as stack:
        if isinstance(case, Step):
            results = run_step(case)
        elif isinstance(case, Buffers):
            results = run_buffers(case)
        else:
            if not case.hopper:
                for module in (hopper, hopper_backward):
                    stack.enter_context(mock.patch.object(module, "takes", lambda *args: False))
            if case.deterministic:
                torch.use_deterministic_algorithms(True)
                stack.callback(torch.use_deterministic_algorithms, False)
            results = run_attention(case)
        values = [x.detach().cpu() for x in results]
    if not DRY and not (isinstance(case, Attention) and case.poisoned):
        assert not any(x.isnan().any() for x in values), "a result holds NaN"


def pick(names: list[str]) -> dict[str, Attention | Step | Buffers]:
    """The cases that have one of the names, or parts of names, and run on this device; all of them without names."""
    chosen = {name: case for name, case in CASES.items() if not names or any(part in f"^{name}$" for part in names)}
    if not chosen:
        raise SystemExit(f"names: expected parts of {', '.join(CASES)}, got {', '.join(names)}")
    return {
        name: case for name, case in chosen.items()
        if (case.dtype is FP32 or ON_GPU) and (ON_HOPPER or not getattr(case, "hopper", False))
    }  # fmt: skip


def run_all(names: list[str]) -> int:
    """Run cases here, and without names check that nothing was left out; returns the exit code."""
    torch.utils.deterministic.fill_uninitialized_memory = False  # or initcheck would find nothing
    seen, start = Seen(), time.monotonic()
    with watched(seen):
        for name, case in pick(names).items():
            begin = time.monotonic()
            run(case)
            print(f"{name}: {time.monotonic() - begin:.1f} s", flush=True)
    kernels = find_kernels(gluon=ON_HOPPER)
    print(
        f"{len(seen.launches)} of {len(kernels)} kernels in {seen.launches.total()} launches, "
        f"{time.monotonic() - start:.0f} s"
    )
    missing = [] if names else seen.missing(kernels)
    print("\n".join(missing), end="\n" if missing else "")
    return 1 if missing else 0


def warm_up(names: list[str], jobs: int) -> None:
    """Run cases in several processes, so that Triton's cache holds all that they compile."""
    chosen = list(pick(names))

    def work(part: list[str]) -> None:
        subprocess.run([sys.executable, __file__, "--exactly", *part], check=True, stdout=subprocess.DEVNULL)

    parts = [chosen[i::jobs] for i in range(min(jobs, len(chosen)))]
    with ThreadPoolExecutor(len(parts)) as pool:
        list(pool.map(work, parts))


PLACE = r"at (?:0x[0-9a-f]+ in (?:\S+\.\w+:\d+:)?)?(?:void )?(?!0x)([\w:]+)"
"""How a remark names its kernel: `at kernel+0x1a0 in file.py:88`, or `at 0x1a0 in file.py:88:kernel`."""


class Remark(NamedTuple):
    """A remark of the tool: the kernel it is about, or where none is named the call of the host, and its first line."""

    where: str
    what: str


def read_remarks(log: Iterable[str]) -> list[Remark]:
    """The remarks in what compute-sanitizer prints."""
    remarks: list[Remark] = []
    for line in log:
        if not line.startswith("=========") or not line[9:].strip():
            continue
        text = line[9:]
        if text.startswith("     "):
            kernel = re.match(rf"\s+{PLACE}", text)
            if kernel and remarks and remarks[-1].where == "the host":
                remarks[-1] = remarks[-1]._replace(where=kernel[1])
            continue
        text = text.strip()
        if re.match(r"COMPUTE-SANITIZER|.*SUMMARY:|Target application returned", text):
            continue
        kernel = re.search(rf"[Aa]ccess {PLACE}", text)
        remarks.append(Remark(kernel[1] if kernel else "the host", text))
    return remarks


def run_tool(tool: str, names: list[str], sanitizer: str, jobs: int, log: Path) -> int:
    """Run cases under a tool of compute-sanitizer and print its remarks by kernel; returns the exit code."""
    start = time.monotonic()
    warm_up(names, jobs)
    print(f"compiled in {time.monotonic() - start:.0f} s", flush=True)
    start, options = time.monotonic(), ["--print-limit", "100000", "--show-backtrace", "no"]
    if tool == "memcheck":
        options += ["--destroy-on-device-error", "kernel", "--padding", "512"]
    command = [sanitizer, "--tool", tool, *options, "--log-file", str(log), sys.executable, __file__, *names]
    code = subprocess.run(command, env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}).returncode
    lines = log.read_text(errors="replace").splitlines()
    found = Counter((x.where, re.sub(r"0x[0-9a-f]+|\d+", "#", x.what)) for x in read_remarks(lines))
    unexplained = 0
    for (where, what), count in found.most_common():
        reason = EXPLAINED.get((tool, where))
        unexplained += reason is None
        print(f"{count:6} {where}: {what}\n       {'UNEXPLAINED' if reason is None else reason}")
    print(
        f"{tool}: {found.total()} remarks, {unexplained} kinds unexplained, the cases ended with {code}, "
        f"{time.monotonic() - start:.0f} s; log in {log}\n{lines[-1] if lines else 'the tool wrote nothing'}"
    )
    return 1 if unexplained or code or not any("SUMMARY" in line for line in lines) else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="names of cases, or parts of them; default all")
    parser.add_argument("--list", action="store_true", help="print the names of the cases that run here")
    parser.add_argument("--dry-run", action="store_true", help="launch nothing, as if on a Hopper GPU")
    parser.add_argument("--exactly", action="store_true", help="take whole names")
    parser.add_argument("--compile-only", action="store_true", help="run in several processes, to fill Triton's cache")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile")
    parser.add_argument("--tool", choices=TOOLS, help="run under this tool of compute-sanitizer")
    parser.add_argument("--sanitizer", default="compute-sanitizer", help="path of compute-sanitizer")
    parser.add_argument("--log", type=Path, default=Path("sanitizer.log"), help="where the tool writes")
    arguments = parser.parse_args()
    names = [f"^{name}$" for name in arguments.names] if arguments.exactly else arguments.names
    if arguments.list:
        print("\n".join(pick(names)))
        return 0
    if arguments.compile_only:
        warm_up(names, arguments.jobs)
        return 0
    if arguments.tool:
        return run_tool(arguments.tool, names, arguments.sanitizer, arguments.jobs, arguments.log)
    return run_all(names)


if __name__ == "__main__":
    raise SystemExit(main())
