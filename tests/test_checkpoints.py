"""Checkpoints: whole or not at all, beside the training, in any layout; safetensors from them."""

import dataclasses
import json
import shutil
import threading
import time

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter

from nsa_compile import NSAConfig, NSALanguageModel
from nsa_compile.checkpoints import RUN_FILE, Checkpoints, find_checkpoint, load_state, read_facts
from nsa_compile.train import TrainConfig, make_optimizer

MODEL = NSAConfig(
    dim=16, n_heads=2, n_kv_groups=1, d_k=8, d_v=8, l=4, d=2, l_sel=4, n_sel=3, w=6, n_layers=1, vocab_size=256
)


def make(seed=0, steps=2, **changes):
    """A model and its optimizer after some updates."""
    torch.manual_seed(seed)
    model = NSALanguageModel(dataclasses.replace(MODEL, **changes))
    optimizer = make_optimizer(model, TrainConfig())
    for _ in range(steps):
        optimizer.zero_grad()
        model.loss(torch.randint(256, (2, 20))).backward()
        optimizer.step()
    return model, optimizer


def state(model, optimizer):
    moments = [optimizer.state[p] for p in model.parameters()]
    return [*(p.detach().clone() for p in model.parameters()), *(x.clone() for s in moments for x in s.values())]


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"phi": "mlp", "gate": "sigmoid"}], ids=str)
def test_what_is_loaded_is_what_was_saved(changes, tmp_path):
    model, optimizer = make(**changes)
    before, checkpoints = state(model, optimizer), Checkpoints(tmp_path)
    path = checkpoints.save(2, model, optimizer, {"text": "abc"})
    with torch.no_grad():  # what comes after the call is not saved
        for p in model.parameters():
            p.add_(1)
    checkpoints.wait()
    assert find_checkpoint(tmp_path) == path == tmp_path / "step-000002"
    assert read_facts(path) == {"step": 2, "text": "abc"}
    other, others = make(seed=1, steps=0, **changes)
    load_state(path, other, others)
    assert equal(state(other, others), before)
    assert others.param_groups[0]["weight_decay"] == optimizer.param_groups[0]["weight_decay"]
    loaded = NSALanguageModel.from_pretrained(path)
    assert loaded.config == model.config
    assert equal([*loaded.parameters()], before[: len([*loaded.parameters()])])


def test_the_newest_few_are_kept(tmp_path):
    model, optimizer = make()
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3, 10):
        checkpoints.save(step, model, optimizer, {})
    checkpoints.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000003", "step-000010"]
    stamp = (find_checkpoint(tmp_path) / RUN_FILE).stat().st_mtime_ns
    checkpoints.save(10, model, optimizer, {})
    checkpoints.wait()
    assert (find_checkpoint(tmp_path) / RUN_FILE).stat().st_mtime_ns == stamp


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    model, optimizer = make()
    go, write = threading.Event(), FileSystemWriter.write_data
    monkeypatch.setattr(FileSystemWriter, "write_data", lambda *args: (go.wait(), write(*args))[1])
    checkpoints = Checkpoints(tmp_path)
    start = time.perf_counter()
    checkpoints.save(5, model, optimizer, {})
    assert time.perf_counter() - start < 5 and find_checkpoint(tmp_path) is None
    assert [path.name for path in tmp_path.iterdir()] == [".step-000005.part"]
    go.set()
    checkpoints.wait()
    assert find_checkpoint(tmp_path).name == "step-000005"


def test_what_a_crash_left_does_not_count_and_goes(tmp_path):
    model, optimizer = make()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, model, optimizer, {})
    checkpoints.wait()
    shutil.copytree(tmp_path / "step-000001", tmp_path / ".step-000007.part")
    (tmp_path / "step-000009").mkdir()
    assert find_checkpoint(tmp_path).name == "step-000001"
    checkpoints.clean()
    assert not (tmp_path / ".step-000007.part").exists()


def test_another_process_may_make_the_folder_first(tmp_path, monkeypatch):
    model, optimizer = make()
    remove, part = shutil.rmtree, tmp_path / ".step-000001.part"
    monkeypatch.setattr(shutil, "rmtree", lambda path, **how: (remove(path, **how), part.mkdir()))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, model, optimizer, {})
    monkeypatch.undo()
    checkpoints.wait()
    assert find_checkpoint(tmp_path).name == "step-000001"


def test_a_full_disk_is_named_and_costs_nothing_that_was_saved(tmp_path, monkeypatch):
    model, optimizer = make()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, model, optimizer, {})
    checkpoints.wait()

    def fail(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(FileSystemWriter, "write_data", fail)
        checkpoints.save(2, model, optimizer, {})
        with pytest.raises(OSError, match=r"No space left on device: '.*\.step-000002\.part'"):
            checkpoints.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    assert equal([*NSALanguageModel.from_pretrained(tmp_path / "step-000001").parameters()], [*model.parameters()])
    checkpoints.save(3, model, optimizer, {})
    checkpoints.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step-000003"]


def test_files_that_may_not_grow_are_named(tmp_path, file_limit):
    """A real error of the file system."""
    model, optimizer = make()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, model, optimizer, {})
    checkpoints.wait()
    file_limit(20_000)
    checkpoints.save(2, model, optimizer, {})
    with pytest.raises(OSError, match=r"\.step-000002\.part"):
        checkpoints.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_what_cannot_be_read_is_named(tmp_path):
    model, optimizer = make()
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(1, model, optimizer, {})
    checkpoints.wait()
    shards = next(path.glob("*.distcp"))
    shards.write_bytes(shards.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"resume: expected a checkpoint that can be read, got .*step-000001"):
        load_state(path, *make(seed=1))
    with pytest.raises(ValueError, match=r"folder: expected weights that fit .*step-000001"):
        NSALanguageModel.from_pretrained(path)
    (path / RUN_FILE).write_text("{")
    with pytest.raises(ValueError, match=r"resume: expected a checkpoint with run.json, got .*step-000001"):
        read_facts(path)
    (path / RUN_FILE).write_text('{"step": 1}')
    assert read_facts(path) == {"step": 1}
    with pytest.raises(ValueError, match=r"resume: expected a checkpoint with run.json, got .*KeyError\('config'\)"):
        read_facts(path, "config")
    assert json.loads((path / "config.json").read_text())["dim"] == 16


def test_safetensors_come_from_a_checkpoint(tmp_path):
    model, optimizer = make(tie_embeddings=True)
    checkpoints = Checkpoints(tmp_path / "run")
    path = checkpoints.save(1, model, optimizer, {})
    checkpoints.wait()
    NSALanguageModel.from_pretrained(path, dtype=torch.bfloat16).save_pretrained(tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    out = NSALanguageModel.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert equal([*out.parameters()], [p.bfloat16() for p in model.parameters()])
