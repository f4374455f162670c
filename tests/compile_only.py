"""Compile every kernel for GPUs that are not there, at the sizes of real launches: registers, shared memory, spills.

`python tests/compile_only.py sm_90-h16-128-128-bfloat16` prints what the kernels take at these sizes, with `-packed` at
the end for packed sequences. Without a name it prints all of CONFIGS; with `--write` it stores them in resources.json.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

TYPES = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64",
    torch.int8: "*i8", torch.bool: "*i1",
}  # fmt: skip
TABLE = Path(__file__).with_name("resources.json")
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
"""Bytes of shared memory that a program may take, by compute capability."""


class Config(NamedTuple):
    """Sizes at which the kernels are compiled, and the compute capability they are compiled for."""

    capability: int
    h: int
    d_k: int
    d_v: int
    dtype: torch.dtype
    packed: bool = False

    @property
    def name(self) -> str:
        dtype, packed = str(self.dtype).removeprefix("torch."), "-packed" * self.packed
        return f"sm_{self.capability}-h{self.h}-{self.d_k}-{self.d_v}-{dtype}{packed}"

    @classmethod
    def from_name(cls, name: str) -> Config:
        capability, h, d_k, d_v, dtype, *packed = name.removeprefix("sm_").replace("-h", "-", 1).split("-")
        return cls(int(capability), int(h), int(d_k), int(d_v), getattr(torch, dtype), packed == ["packed"])


CONFIGS = [
    Config(120, 16, 256, 256, torch.float32),
    Config(120, 16, 256, 256, torch.bfloat16),
    Config(120, 16, 128, 128, torch.float32),
    *(Config(capability, 16, 128, 128, torch.bfloat16) for capability in SHARED_LIMIT),
    Config(90, 16, 128, 128, torch.bfloat16, packed=True),
    Config(90, 4, 192, 128, torch.bfloat16),
    Config(80, 1, 64, 64, torch.float16),
]
"""What the table holds, the slowest first."""


class Launch(NamedTuple):
    """One launch of a kernel: its arguments by name and its options."""

    kernel: JITFunction
    arguments: dict[str, Any]
    options: dict[str, int]


class Resources(NamedTuple):
    """What a compiled kernel takes: registers a thread, bytes of shared memory, bytes of stack a thread (spills)."""

    registers: int
    shared: int
    stack: int


def record_launches(run: Callable[[], Any]) -> list[Launch]:
    """The kernels `run` launches, in order; none of them runs."""
    launches, original = [], JITFunction.run

    def record(self, *args, grid, warmup, **kwargs):
        options = {name: kwargs.pop(name) for name in list(kwargs) if name not in self.arg_names}
        launches.append(Launch(self, dict(zip(self.arg_names, args, strict=False)) | kwargs, options))

    JITFunction.run = record
    try:
        run()
    finally:
        JITFunction.run = original
    return launches


def compile_launch(launch: Launch, capability: int) -> CompiledKernel:
    """Compile a launch for a compute capability as the runtime would, pointers being aligned to 16 bytes."""
    signature, constants, attributes = {}, {}, {}
    for i, (name, parameter) in enumerate(zip(launch.kernel.arg_names, launch.kernel.params, strict=True)):
        value = launch.arguments[name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name], attributes[(i,)] = TYPES[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, (TensorDescriptor, GluonDescriptor)):
            layout = f",{value.layout!r}" if isinstance(value, GluonDescriptor) else ""
            signature[name] = f"tensordesc<{TYPES[value.base.dtype][1:]}{value.block_shape}{layout}>"
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    source_type = GluonASTSource if launch.kernel.is_gluon() else ASTSource
    source = source_type(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)


def resources(compiled: CompiledKernel) -> Resources:
    """What a compiled kernel takes, as cuobjdump reads it."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout)
    assert found, usage.stdout
    return Resources(int(found[1]), compiled.metadata.shared, int(found[2]))


@contextmanager
def pretended_device(capability: int) -> Iterator[None]:
    """Tensors seem to be on a CUDA device of this compute capability."""
    with (
        mock.patch.object(Tensor, "is_cuda", True),
        mock.patch("torch.cuda.get_device_capability", lambda device=None: divmod(capability, 10)),
        mock.patch("torch.cuda.get_device_properties", lambda device=None: mock.Mock(multi_processor_count=132)),
    ):
        yield


def every_launch(config: Config) -> list[Launch]:
    """All kernels of a forward and a backward of every op, and of a decode step."""
    from nsa_compile.custom_ops.kernels import (
        block_choice,
        cache,
        compression,
        decode,
        gating,
        interval,
        mixture,
        places,
        selection,
    )

    _, h, d_k, d_v, dtype, packed = config
    t, g, l, d, l_sel, n_sel, scale = 256, 2, 32, 16, 64, 8, 0.1
    q, o = torch.zeros(1, t, g * h, d_k, dtype=dtype), torch.zeros(1, t, g * h, d_v, dtype=dtype)
    k, v, lse = q[:, :, :g].contiguous(), o[:, :, :g].contiguous(), torch.zeros(1, t, g * h)
    c = t // d if packed else (t - l) // d + 1
    cu = torch.tensor([0, 100, 256], dtype=torch.int32) if packed else None
    k_cmp, v_cmp = k[:, :c].contiguous(), v[:, :c].contiguous()
    blocks = torch.zeros(1, t, g, n_sel, dtype=torch.int32)
    gates = torch.zeros(1, t, g * h, 3, dtype=dtype)
    one, some = torch.zeros(1, dtype=torch.int32), torch.zeros(1, g, 4, dtype=torch.int64)
    new = (x[:, :1] for x in (q, k, v, k, v, k, v))
    caches = (k_cmp, v_cmp, k[:, :39].contiguous(), v[:, :39].contiguous(), k, v, k[:, :71].contiguous(), v[:, :71])

    def run() -> None:
        compression.compress_mean(k, l, d, cu)
        compression.compress_mean_backward(k_cmp, t, l, d, cu)
        keys = places.compressed_intervals(q, c, l, d, None, cu)
        places.window_intervals(q, t, 64, None, cu)
        interval.interval_attention(q, k_cmp, v_cmp, keys, scale)
        interval.interval_attention_backward(o, None, o, lse, q, k_cmp, v_cmp, keys, scale)
        block_choice.select_blocks(q, k_cmp, lse, l, d, l_sel, n_sel, 1, 2, None, cu, scale)
        selection.selected_attention(q, k, v, blocks, l_sel, None, cu, scale)
        selection.selected_attention_backward(o, lse, o, lse, q, k, v, blocks, l_sel, None, cu, scale)
        gating.gated_sum(o, o, o, gates)
        cache.cache_append(k, k_cmp, one, None, False)
        cache.cache_write(k, k_cmp, torch.zeros(1, c, dtype=torch.int64), torch.zeros(1, c, dtype=torch.bool))
        cache.cache_recall(k, k_cmp, one, one, c)
        gating.gated_sum_backward(o, o, o, o, gates)
        mixture.selected_mixture(q, k, v, blocks, o, o, gates, l_sel, None, cu, scale, True)
        gating.gated_sum_backward_with_delta(o, o, o, o, gates, lse)
        decode.decode_attention(
            *new,
            None,
            None,
            gates[:, :1],
            None,
            one,
            some[:, 0],
            some,
            *caches,
            l,
            d,
            l_sel,
            n_sel,
            64,
            1,
            2,
            1e4,
            scale,
        )

    with pretended_device(config.capability):
        return record_launches(run)


def compile_all(config: Config) -> dict[str, dict[str, int]]:
    """Resources of every launch of a config by the kernel's name and how often it was launched before."""
    found, seen = {}, Counter()
    for launch in every_launch(config):
        kernel = launch.kernel.__name__
        found[f"{kernel} {seen[kernel]}"] = resources(compile_launch(launch, config.capability))._asdict()
        seen[kernel] += 1
    return found


def as_json(table: dict[str, Any]) -> str:
    """JSON with one line per launch."""
    text = json.dumps(table, indent=1)
    return re.sub(r"\{\s+([^{}]*?)\s+\}", lambda match: "{" + re.sub(r"\s+", " ", match[1]) + "}", text) + "\n"


def main() -> None:
    write = sys.argv[1:] == ["--write"]
    configs = CONFIGS if write else [Config.from_name(name) for name in sys.argv[1:]] or CONFIGS
    with ProcessPoolExecutor(min(len(configs), os.cpu_count() or 1)) as pool:
        results = pool.map(compile_all, configs)
        found = {config.name: launches for config, launches in zip(configs, results, strict=True)}
    if write:
        TABLE.write_text(as_json({"triton": triton.__version__, **found}))
    else:
        print(as_json(found), end="")


if __name__ == "__main__":
    main()
