"""The script for compute-sanitizer: that it leaves no kernel out, and how it reads what the tools print."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import sanitize
import torch

ROOT = Path(__file__).parent.parent


def dry_run(*names: str) -> subprocess.CompletedProcess[str]:
    """What a Hopper GPU would launch, without Triton's interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(ROOT / "tests/sanitize.py"), "--dry-run", *names]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_no_kernel_and_no_variant_is_left_out():
    result = dry_run()
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]


def test_what_is_left_out_is_named():
    seen = sanitize.Seen()
    x = torch.zeros(3, dtype=torch.bfloat16)
    seen.add("gating._gated_sum_bwd_kernel", {"grad": x, "lse": None, "ROWS": 4, "PACKED": True})
    missing = seen.missing({"gating._gated_sum_bwd_kernel", "gating._gated_sum_fwd_kernel"})
    assert missing[:3] == [
        "gating._gated_sum_fwd_kernel never ran",
        "gating._gated_sum_bwd_kernel ran only with PACKED",
        "gating._gated_sum_bwd_kernel ran only without delta",
    ]
    assert missing[3].startswith("gating._gated_sum_bwd_kernel never ran in ")


@pytest.mark.parametrize(
    ("log", "where", "what"),
    [
        (
            """
========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
=========     at _interval_fwd_kernel+0x1a0 in interval.py:88
=========     by thread (3,0,0) in block (0,0,0)
=========     Access at 0x7f3c00000190 is out of bounds
=========     and is 1 bytes after the nearest allocation at 0x7f3c00000000 of size 400 bytes
=========
========= ERROR SUMMARY: 1 error
""",
            "_interval_fwd_kernel",
            "Invalid __global__ read of size 4 bytes",
        ),
        (
            """
========= COMPUTE-SANITIZER
========= Uninitialized __global__ memory read of size 2 bytes
=========     at 0x9a0 in decode.py:450:_decode_merge_kernel
=========     by thread (0,0,0) in block (1,0,0)
=========
========= Target application returned an error
========= ERROR SUMMARY: 1 error
""",
            "_decode_merge_kernel",
            "Uninitialized __global__ memory read of size 2 bytes",
        ),
        (
            """
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at attend_kernel+0x4a0 in hopper.py:220
=========     and Read access at attend_kernel+0x520 in hopper.py:221 [64 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
""",
            "attend_kernel",
            "Error: Race reported between Write access at attend_kernel+0x4a0 in hopper.py:220",
        ),
        (
            """
========= COMPUTE-SANITIZER
========= Host API uninitialized memory access
=========     Uninitialized access at 0x7f3c00000190 on access by cudaMemcpy source
=========
========= ERROR SUMMARY: 1 error
""",
            "the host",
            "Host API uninitialized memory access",
        ),
    ],
    ids=["memcheck", "initcheck", "racecheck", "host"],
)
def test_remarks_are_read_with_their_kernels(log, where, what):
    assert sanitize.read_remarks(log.splitlines()) == [(where, what)]


def test_a_clean_log_has_no_remark():
    log = ["plain: 0.1 s", "========= COMPUTE-SANITIZER", "========= ERROR SUMMARY: 0 errors"]
    assert sanitize.read_remarks(log) == []
