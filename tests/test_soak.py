"""The soak at a tiny size: it passes, says what it did, and finds what is wrong."""

import json

import soak
import torch

from nsa_compile import NSACache

TINY = {"rows": 2, "requests": 8, "capacity": 30}


def test_a_short_soak(tmp_path, capsys):
    out = tmp_path / "soak.json"
    sizes = [word for name, value in TINY.items() for word in (f"--{name}", str(value))]
    assert soak.main(["--steps", "60", "--dtype", "float32", "--device", "cpu", *sizes, "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out) == record
    assert record["steps"] >= 60 and record["failures"] == [] and record["versions"]["torch"] == torch.__version__
    assert {"command", "date", "device", "seed", "seconds", "tokens"} <= record.keys()
    assert [set(sample) for sample in record["memory"]][-1] == {"step", "allocated", "reserved", "rss"}


def test_a_soak_finds_rows_that_are_not_what_they_were(monkeypatch):
    """A key is lost where tokens are taken back, which happens to half of the prompts at random."""
    taken_back = NSACache.rollback

    def lose_a_key(cache, counts):
        taken_back(cache, counts)
        for layer in cache.layers:
            layer.buffers["k_slc"][:, 0] = -9.0

    monkeypatch.setattr(NSACache, "rollback", lose_a_key)
    run = soak.Soak("cpu", torch.float32, **TINY, seed=0)
    run.learn()
    run.run(60)
    assert run.failures and " in row " in run.failures[0]
