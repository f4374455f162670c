"""Training does something: one step lowers a loss, and a small model learns a task that needs the past."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch
from models import needs_compiler

from nsa_compile import NSAAttention, NSAConfig, NSALanguageModel


@pytest.mark.parametrize("phi", ["avg", "mlp"])
@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
@pytest.mark.parametrize("tie_kv", [False, True], ids=["separate", "tied"])
def test_one_step_lowers_the_loss(phi, gate, tie_kv):
    torch.manual_seed(0)
    layer = NSAAttention(
        dim=128, n_heads=4, n_kv_groups=2, d_k=32, d_v=32, l=8, d=4, l_sel=16, n_sel=4, w=32, phi=phi, gate=gate,
        tie_kv=tie_kv,
    )  # fmt: skip
    x, target = torch.randn(2, 16, 128), torch.randn(2, 16, 128)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3)
    before = torch.nn.functional.mse_loss(layer(x), target)
    before.backward()
    optimizer.step()
    assert torch.nn.functional.mse_loss(layer(x), target) < before


@pytest.mark.parametrize("attention", ["nsa", "dense"])
def test_model_learns_to_copy(attention):
    """Ten letters, then the same again: the window of 4 does not reach the letter to copy."""
    torch.manual_seed(0)
    config = NSAConfig(
        dim=32, n_heads=2, n_kv_groups=1, d_k=16, d_v=16, l=2, d=1, l_sel=2, n_sel=8, w=4, n_layers=2, vocab_size=8,
        attention=attention,
    )  # fmt: skip
    model, n = NSALanguageModel(config), 10
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)

    def copy_loss() -> torch.Tensor:
        letters = torch.randint(config.vocab_size, (32, n))
        ids = torch.cat((letters, letters), 1)
        logits = model(ids)[:, n - 1 : -1]  # predictions of the second half
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), letters.flatten())

    assert abs(copy_loss().item() - math.log(config.vocab_size)) < 0.1
    for _ in range(160):
        optimizer.zero_grad()
        loss = copy_loss()
        loss.backward()
        optimizer.step()
    assert copy_loss() < 0.5


@needs_compiler
def test_the_demo_learns_real_text_in_a_fresh_compile_cache(tmp_path):
    """The command as a newcomer runs it: on the standard library's sources, far below the entropy of single bytes."""
    command = [sys.executable, "-c", "from nsa_compile.cli import main; main()", "demo", "--out", str(tmp_path / "out")]
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    loss, entropy = map(float, re.findall(r"([0-9.]+)\s+nats/byte", result.stdout))
    assert loss < entropy - 0.7
    assert "compiled (the first step takes a while)" in result.stdout and "within 1e-09" in result.stdout
    with (tmp_path / "out" / "metrics.jsonl").open() as lines:
        assert [json.loads(line)["step"] for line in lines] == list(range(1, 251))
