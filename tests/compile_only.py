"""Compile every kernel for GPUs that are not there, at the sizes of real launches: registers, shared memory, spills."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

TYPES = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64",
    torch.int8: "*i8", torch.bool: "*i1",
}  # fmt: skip


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
        options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
        launches.append(Launch(self, dict(zip(self.arg_names, args, strict=False)) | kwargs, options))

    JITFunction.run = record
    try:
        run()
    finally:
        JITFunction.run = original
    return launches


def compile_launch(launch: Launch, capability: int) -> Resources:
    """Compile a launch for a compute capability as the runtime would, pointers being aligned to 16 bytes."""
    signature, constants, attributes = {}, {}, {}
    for i, (name, parameter) in enumerate(zip(launch.kernel.arg_names, launch.kernel.params, strict=True)):
        value = launch.arguments[name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name], attributes[(i,)] = TYPES[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{TYPES[value.base.dtype][1:]}{value.block_shape}>"
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout)
    assert found, usage.stdout
    return Resources(int(found[1]), compiled.metadata.shared, int(found[2]))


def every_launch(h: int, d_k: int, d_v: int, dtype: torch.dtype, packed: bool = False) -> list[Launch]:
    """All kernels of a forward and a backward of every op."""
    from nsa_compile.custom_ops.kernels import block_choice, compression, gating, interval, selection

    t, g, l, d, l_sel, n_sel, scale = 256, 2, 32, 16, 64, 8, 0.1
    q, o = torch.zeros(1, t, g * h, d_k, dtype=dtype), torch.zeros(1, t, g * h, d_v, dtype=dtype)
    k, v, lse = q[:, :, :g].contiguous(), o[:, :, :g].contiguous(), torch.zeros(1, t, g * h)
    c = t // d if packed else (t - l) // d + 1
    cu = torch.tensor([0, 100, 256], dtype=torch.int32) if packed else None
    k_cmp, v_cmp = k[:, :c].contiguous(), v[:, :c].contiguous()
    blocks = torch.zeros(1, t, g, n_sel, dtype=torch.int32)
    gates = torch.zeros(1, t, g * h, 3, dtype=dtype)

    def run() -> None:
        compression.compress_mean(k, l, d, cu)
        compression.compress_mean_backward(k_cmp, t, l, d, cu)
        keys = interval.compressed_intervals(q, c, l, d, None, cu)
        interval.interval_attention(q, k_cmp, v_cmp, keys, scale)
        interval.interval_attention_backward(o, None, o, lse, q, k_cmp, v_cmp, keys, scale)
        block_choice.select_blocks(q, k_cmp, lse, l, d, l_sel, n_sel, 1, 2, None, cu, scale)
        selection.selected_attention(q, k, v, blocks, l_sel, None, cu, scale)
        selection.selected_attention_backward(o, lse, o, lse, q, k, v, blocks, l_sel, None, cu, scale)
        gating.gated_sum(o, o, o, gates)
        gating.gated_sum_backward(o, o, o, o, gates)

    return record_launches(run)


def main() -> None:
    import sys

    h, d_k, d_v, capability = (int(x) for x in sys.argv[1:5])
    dtype = getattr(torch, sys.argv[5])
    for launch in every_launch(h, d_k, d_v, dtype, packed=len(sys.argv) > 6):
        print(launch.kernel.__name__, launch.options, compile_launch(launch, capability), flush=True)


if __name__ == "__main__":
    main()
