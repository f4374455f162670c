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
collect_ignore = [] if find_spec("triton") else ["test_kernels.py", "test_mixture.py", "test_resources.py"]


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
