"""What every kernel takes on GPUs that are not there: within the hardware's limits and the committed table."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from compile_only import CONFIGS, SHARED_LIMIT, TABLE

ROOT = Path(__file__).parent.parent
REGISTERS = 8
"""Registers by which a kernel may pass its entry in the table."""


def compile_in_a_process(name: str) -> dict[str, dict[str, int]]:
    """Resources of every launch of a config, compiled without Triton's interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(ROOT / "tests/compile_only.py"), name]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)[name]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_kernels_stay_within_the_hardware_and_the_table(config):
    """After a change of the kernels: `python tests/compile_only.py --write`, and look at the difference."""
    found = compile_in_a_process(config.name)
    limit = SHARED_LIMIT[config.capability]
    too_large = {launch: used["shared"] for launch, used in found.items() if used["shared"] > limit}
    assert not too_large, f"more than {limit} bytes of shared memory"
    table = json.loads(TABLE.read_text())
    if table["triton"] != triton.__version__:
        pytest.skip(f"the table is that of Triton {table['triton']}, not {triton.__version__}")
    committed = table[config.name]
    assert list(found) == list(committed)
    for launch, used in found.items():
        allowed = committed[launch] | {"registers": committed[launch]["registers"] + REGISTERS}
        assert all(used[what] <= allowed[what] for what in used), f"{launch}: {used}, in the table {committed[launch]}"
