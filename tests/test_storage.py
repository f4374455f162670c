"""Locks on folders: one run, one build at a time, whatever way the one before it ended."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading

import pytest
from test_cli import TINY, one_line_error, run
from test_train import CONFIG, corpus, losses, make_model, unbroken  # noqa: F401

from nsa_compile import storage
from nsa_compile.data import build_shards
from nsa_compile.storage import locked
from nsa_compile.train import run_lock, train

HOLD = """
import importlib.util, pathlib, sys, time
spec = importlib.util.spec_from_file_location("storage", sys.argv[1])
storage = importlib.util.module_from_spec(spec)
spec.loader.exec_module(storage)
with storage.locked(pathlib.Path(sys.argv[2]), "refused"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder():
    """Starts a process that holds a lock file."""
    started = []

    def hold(path):
        command = [sys.executable, "-c", HOLD, storage.__file__, str(path)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout.readline() == "held\n"
        return started[-1]

    yield hold
    for process in started:
        process.kill()
        process.communicate()


def test_a_killed_process_leaves_no_lock(tmp_path, holder):
    path = tmp_path / "run" / ".lock"
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        process = holder(path)
        with (
            pytest.raises(ValueError, match=rf"^refused, which process {process.pid} on \S+ does$"),
            locked(path, "refused"),
        ):
            raise AssertionError
        process.send_signal(number)
        process.wait()
        with locked(path, "refused"):
            assert f"process {os.getpid()} on" in path.read_text()
    assert not path.exists()  # and the folder, which was there, stays
    assert path.parent.is_dir()


def test_a_lock_and_folders_made_for_it_go(tmp_path):
    with locked(tmp_path / "a" / "b" / ".lock", ""):
        pass
    assert not (tmp_path / "a").exists()
    with locked(tmp_path / "a" / "b" / ".lock", ""):
        (tmp_path / "a" / "file").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["file"]


def test_never_two_hold_a_lock_that_comes_and_goes(tmp_path):
    inside, most, refused = [], [], []

    def work():
        for _ in range(300):
            try:
                with locked(tmp_path / "lock", "no"):
                    inside.append(1)
                    most.append(len(inside))
                    inside.pop()
            except ValueError:
                refused.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1 and len(most) + len(refused) == 1200
    assert not (tmp_path / "lock").exists()


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    said = pytest.warns(UserWarning, match=r"x: this file system has no locks \(No locks available\)")
    with said, locked(tmp_path / "x", ""):
        pass


def listing(folder):
    return sorted((path.relative_to(folder).as_posix(), path.stat().st_mtime_ns) for path in folder.rglob("*"))


def test_a_second_run_in_a_folder_is_refused_before_it_writes(text, tmp_path, holder):
    out = tmp_path / "run"
    out.mkdir()
    process = holder(out / ".lock")
    before = listing(out)
    for arguments in (
        ("train", "--text", text, "--out", out, "--steps", 2, *TINY),
        ("train", "--text", text, "--out", out, "--steps", 2, *TINY, "--auto-resume"),
        ("demo", "--text", text, "--out", out, "--steps", 2, "--no-compile"),
    ):
        one_line_error(run(*arguments), "out: expected a folder that no other run writes to, got", str(process.pid))
        assert listing(out) == before
    process.kill()
    process.wait()
    result = run("train", "--text", text, "--out", out, "--steps", 2, *TINY)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in out.iterdir()) == ["data", "metrics.jsonl", "step-000002"]


def test_two_trainings_at_once_leave_one_run(corpus, tmp_path, unbroken):  # noqa: F811
    """The second starts while the first is at work, and changes nothing."""
    tried = []

    def start_another(metrics):
        if metrics.step in (2, 5):
            before = listing(tmp_path)
            for resume in (False, "auto"):
                with pytest.raises(ValueError, match="out: expected a folder that no other run writes to"):
                    train(make_model(), corpus, CONFIG, tmp_path, resume=resume)
            if metrics.step == 2:  # no thread writes a checkpoint
                assert listing(tmp_path) == before
            tried.append(metrics.step)

    train(make_model(), corpus, CONFIG, tmp_path, on_step=start_another)
    assert tried == [2, 5] and losses(tmp_path) == losses(unbroken[0])
    with run_lock(tmp_path / "free"):
        pass


def test_a_folder_is_built_by_one_process(text, tmp_path, holder):
    process = holder(tmp_path / ".shards.lock")
    (tmp_path / ".shards.part").mkdir()
    (tmp_path / ".shards.part" / "unit-0-train").touch()
    before = listing(tmp_path)
    with pytest.raises(ValueError, match=f"out: expected a folder that no other process builds.*{process.pid}"):
        build_shards([text], tmp_path / "shards")
    assert listing(tmp_path) == before
    process.kill()
    process.wait()
    build_shards([text], tmp_path / "shards", workers=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shards"]
