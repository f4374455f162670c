"""The reference works through chunks of queries, so that its memory stays bounded."""

import subprocess
import sys

SCRIPT = """
import resource
import torch
from nsa_compile import compress_mean, nsa_attention

torch.manual_seed(0)
t, n, g, x = 4096, 8, 2, 64
shapes = ((n, x), (g, x), (g, x), (n, 3))
q, k, v, gates = (torch.randn(1, t, *shape, requires_grad=True) for shape in shapes)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
k_cmp, v_cmp = (compress_mean(y, l=32, d=16) for y in (k, v))
o = nsa_attention(q, k_cmp, v_cmp, k, v, k, v, gates, l=32, d=16, l_sel=64, n_sel=16, w=512)
o.sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20)
"""


def test_forward_and_backward_at_4096_tokens_stay_under_2_gigabytes():
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert float(result.stdout) < 2.0, f"{result.stdout} GiB"
