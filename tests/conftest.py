"""One thread per test process: the tensors are small, and the processes share the machine.

Without a CUDA device Triton's interpreter runs the kernels that a test asks for; it must be chosen before its import.
"""

import os
import resource
from importlib.util import find_spec

import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
if find_spec("triton") and not torch.cuda.is_available():
    from triton.language import int1
    from triton.runtime.interpreter import InterpreterBuilder

    splat = InterpreterBuilder.create_splat

    def splat_bits(builder, ret_ty, arg):
        """A comparison that becomes a block stays bool, as masks must be from Triton 3.9 on."""
        out = splat(builder, ret_ty, arg)
        if ret_ty.scalar == int1:
            out.data = out.data.astype(bool)
        return out

    InterpreterBuilder.create_splat = splat_bits
collect_ignore = (
    []
    if find_spec("triton")
    else ["test_compiler_faults.py", "test_kernels.py", "test_mixture.py", "test_resources.py"]
)


@pytest.fixture
def file_limit():
    """Sets the bytes that files may grow to, None for no limit: the next best thing to a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(n: int | None) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, before if n is None else (n, before[1]))

    yield limit
    limit(None)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder of four short files."""
    folder = tmp_path_factory.mktemp("text")
    for number in range(4):
        (folder / f"{number}.txt").write_text("".join(f"{number} times {i} is {number * i}\n" for i in range(200)))
    return folder
