"""One thread per test process: the tensors are small, and the processes share the machine.

Without a CUDA device Triton's interpreter runs the kernels that a test asks for; it must be chosen before its import.
"""

import os
from importlib.util import find_spec

import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
collect_ignore = [] if find_spec("triton") else ["test_kernels.py", "test_mixture.py", "test_resources.py"]
