"""What kernels must not contain, since compilers make wrong code of it; test_gpu_sizes.py shows the values on a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAUNCHES = """
import compile_only as compiler
import torch
from nsa_compile.custom_ops.kernels import block_choice, selection

def selected(h, d_k, d_v, l_sel):
    q, k, v = (torch.zeros(1, 256, *size, dtype=torch.float16) for size in ((h, d_k), (1, d_k), (1, d_v)))
    blocks = torch.zeros(1, 256, 1, 4, dtype=torch.int32)
    return lambda: selection.selected_attention(q, k, v, blocks, l_sel, None, None, 0.1)

def selected_backward(h, d_k, d_v, l_sel):
    q, o, k, v = (torch.zeros(1, 256, *size, dtype=torch.float16) for size in ((h, d_k), (h, d_v), (1, d_k), (1, d_v)))
    blocks, lse = torch.zeros(1, 256, 1, 4, dtype=torch.int32), torch.zeros(1, 256, h)
    return lambda: selection.selected_attention_backward(o, None, o, lse, q, k, v, blocks, l_sel, None, None, 0.1)

def choice(l, d, l_sel, packed):
    q, k = torch.zeros(1, 512, 16, 64, dtype=torch.float16), torch.zeros(1, 512 // d, 1, 64, dtype=torch.float16)
    cu_seqlens = torch.tensor([0, 100, 512], dtype=torch.int32) if packed else None
    lse = torch.zeros(1, 512, 16)
    return lambda: block_choice.select_blocks(q, k, lse, l, d, l_sel, 4, 1, 1, None, cu_seqlens, 0.1)

with compiler.pretended_device(90):
    launches = compiler.record_launches({call})
print(compiler.compile_launch(next(x for x in launches if x.kernel.__name__ == "{kernel}"), 90).asm["ptx"])
"""


def ptx(kernel: str, call: str) -> str:
    """Code for sm_90 of the first launch of a kernel that a call makes, compiled without Triton's interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    paths = [str(ROOT), str(ROOT / "tests"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    program = LAUNCHES.replace("{call}", call).replace("{kernel}", kernel)
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("sizes", [(32, 128, 16, 96), (24, 80, 24, 148), (12, 64, 8, 48)], ids=str)
def test_narrow_values_of_odd_blocks_do_without_wgmma(sizes):
    """ptxas 12.8 gives these products wrong addresses of values; ordinary tensor-core instructions have none."""
    code = ptx("_selected_fwd_kernel", f"selected{sizes}")
    assert "mma.sync" in code and "wgmma" not in code


def test_blocks_of_whole_tiles_use_wgmma():
    """The rule above costs no others their speed: such tiles come by TMA and were never wrong."""
    assert "wgmma.mma_async" in ptx("_selected_fwd_kernel", "selected(32, 256, 256, 64)")


@pytest.mark.parametrize("sizes", [(1, 56, 56, 256), (1, 128, 64, 64), (2, 64, 64, 64)], ids=str)
def test_no_integer_is_reduced_into_a_uniform_register_beside_wgmma(sizes):
    """ptxas 12.8 puts it where the descriptor of a product still to be read is: h = 1 gave wrong dK and dV."""
    code = ptx("_selected_bwd_dkv_kernel", f"selected_backward{sizes}")
    products = code[code.index("wgmma.mma_async") : code.rindex("wgmma.mma_async")]
    assert "redux.sync" not in products


@pytest.mark.parametrize("packed", [False, True])
def test_scores_of_blocks_are_summed_without_fused_products(packed):
    """With them, lanes that add the same two products in either order differ in the last bit and in what is best."""
    assert "fma.rn.f32" not in ptx("_top_blocks_kernel", f"choice(64, 4, 64, {packed})")
