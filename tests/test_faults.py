"""Runs under torchrun: killed, hanging, stopped, resumed elsewhere; and what a process is told at the start."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from faulty_train import run_in_turn
from typer.testing import CliRunner

from nsa_compile import NSALanguageModel, cli
from nsa_compile.checkpoints import find_checkpoint
from nsa_compile.faults import HANG_CODE, Watchdog, stop_flag
from nsa_compile.launch import meet
from nsa_compile.metrics import METRICS_FILE
from nsa_compile.train_command import TERMINATED

ROOT = Path(__file__).parents[1]
SIZES = {
    "steps": 8, "seq-len": 24, "batch-size": 4, "warmup": 2, "eval-batches": 1, "eval-every": 4, "stats-every": 4,
    "save-every": 3, "keep": 9, "n-layers": 1, "dim": 16, "n-heads": 2, "n-kv-groups": 2, "d-k": 8, "d-v": 8, "l": 4,
    "d": 2, "l-sel": 4, "n-sel": 3, "w": 6,
}  # fmt: skip
TINY = ["--no-compile", *itertools.chain.from_iterable((f"--{name}", size) for name, size in SIZES.items())]


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def torchrun(faults, *arguments, restarts, timeout=240):
    """`nsa-compile` in two processes, with a fault "what:rank:step" at each start."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "--max-restarts",
        restarts, "--", Path(__file__).parent / "faulty_train.py", faults, *arguments,
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(list(map(str, command)), env=environment, **pipes) as process:
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.terminate()  # then torchrun ends the processes it started
            raise
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def metrics(folder, *names):
    lines = map(json.loads, (folder / METRICS_FILE).read_text().splitlines())
    return [tuple(line.get(name) for name in ("step", "loss", *names)) for line in lines]


PLANS = ("tp", "cp")


@pytest.fixture(scope="module")
def twice(text, tmp_path_factory):
    """Runs of two processes, one after the other in the same two: the folder, and what(name, rank, kind) they left."""
    folder = tmp_path_factory.mktemp("twice")
    runs = {
        "unbroken": ((), None),
        "sigterm": ((), ("SIGTERM", 1, 4)),
        **{name: (("--resume", f"--{name}", 2), None) for name in PLANS},
        "lr": (("--lr", 1, "--auto-resume", "--out", folder / "unbroken"), None),
        "processes": (("--tp", 3), None),
        "groups": (("--tp", 2, "--n-kv-groups", 1), None),
        "usage": (("--no-such-option",), None),
    }
    runs = {
        name: ([str(x) for x in ("train", "--text", text, "--out", folder / name, *TINY, *options)], fault)
        for name, (options, fault) in runs.items()
    }
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # as torchrun's, for all starts
    torch.multiprocessing.get_context("forkserver").set_forkserver_preload(["nsa_compile.cli", "pytest"])

    def start(names):
        arguments = (store.port, {name: runs[name] for name in names}, folder)
        torch.multiprocessing.start_processes(run_in_turn, arguments, nprocs=2, start_method="forkserver")

    start(name for name in runs if name not in PLANS)
    for name in PLANS:
        copy_until(folder / "unbroken", folder / name, 3)
    start(PLANS)
    return folder, lambda name, rank, kind: (folder / f"{name}-{rank}-{kind}").read_text()


def copy_until(unbroken, folder, step):
    """The run as it was at an earlier checkpoint."""
    shutil.copytree(unbroken, folder)
    for path in folder.glob("step-*"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)


@pytest.fixture(scope="module")
def unbroken(twice):
    """A run of two processes that read different rows, without a fault."""
    folder, what = twice
    assert [what("unbroken", rank, "code") for rank in (0, 1)] == ["0", "0"], what("unbroken", 0, "err")
    shown = what("unbroken", 0, "out")
    assert "2 processes on cpu: dp 2, cp 1, tp 1" in shown and shown.count("step 8/8") == 1
    assert not what("unbroken", 1, "out")
    return folder / "unbroken"


def test_killed_it_starts_anew_with_the_same_losses_and_hanging_it_ends_with_all_stacks(text, unbroken, tmp_path):
    start = time.monotonic()
    done = torchrun("SIGKILL:1:5,hang:1:7", "train", "--text", text, "--out", tmp_path, *TINY, "--auto-resume",
                    "--timeout", 8, restarts=1)  # fmt: skip
    assert done.returncode != 0 and time.monotonic() - start < 200
    assert "exitcode: -9" in done.stderr and f"exitcode: {HANG_CODE}" in done.stderr
    names = ("grad_norm", "val_loss", "layers")
    assert metrics(tmp_path, *names) == metrics(unbroken, *names)[:7]
    assert find_checkpoint(tmp_path).name == "step-000006"
    for rank, words in ((0, "all_reduce"), (1, "on_step_then_fault")):
        assert words in (tmp_path / f"stacks-rank-{rank}.txt").read_text()
        assert f"rank {rank}: nothing went on for" in done.stderr


def test_sigterm_to_one_process_saves_and_ends_all(unbroken, twice):
    folder, what = twice
    assert [what("sigterm", rank, "code") for rank in (0, 1)] == [str(TERMINATED)] * 2
    assert "interrupted after step 4" in what("sigterm", 0, "out")
    assert find_checkpoint(folder / "sigterm").name == "step-000004"
    assert metrics(folder / "sigterm") == metrics(unbroken)[:4]


@pytest.mark.parametrize("plan", ["", *PLANS], ids=["one process", "heads", "tokens"])
def test_another_layout_goes_on(text, unbroken, twice, tmp_path, plan):
    folder, what = twice
    if plan:
        assert what(plan, 0, "code") == "0", what(plan, 0, "err")
        assert f"{plan} 2" in what(plan, 0, "out")
        folder = folder / plan
    else:
        folder = tmp_path / "run"
        copy_until(unbroken, folder, 3)
        result = run("train", "--text", text, "--out", folder, *TINY, "--resume")
        assert result.exit_code == 0, result.output
    for now, before in zip(metrics(folder), metrics(unbroken), strict=True):
        assert now == pytest.approx(before, rel=1e-5)
    weights = NSALanguageModel.from_pretrained(find_checkpoint(folder)).state_dict()
    for name, weight in NSALanguageModel.from_pretrained(find_checkpoint(unbroken)).state_dict().items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=1e-4)


def test_a_run_of_two_processes_is_exported_and_generates(unbroken, tmp_path):
    result = run("export", unbroken, tmp_path / "out", "--dtype", "bf16")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "model.safetensors").is_file()
    for folder in (unbroken, tmp_path / "out"):
        result = run("generate", folder, "--prompt", "2 times", "--max-new-tokens", 4)
        assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    "name, words",
    [
        ("lr", "resume: expected the run's lr = 0.001, got 1.0"),
        ("processes", r"cp, tp: expected cp \* tp to divide the 2 processes, got 1 \* 3"),
        ("groups", "tp: expected a divisor of n_kv_groups = 1, got 2"),
        ("usage", "No such option: --no-such-option .*"),
    ],
)
def test_bad_plans_are_one_line_at_the_start(unbroken, twice, name, words):
    folder, what = twice
    assert [what(name, rank, "code") for rank in (0, 1)] == ["2", "2"]
    assert re.fullmatch(f"error: {words}\n", what(name, 0, "err")) and not what(name, 1, "err")
    assert not (folder / name).exists() and len(metrics(unbroken)) == 8


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--tp", 2), "dp, cp, tp: expected 1 each without torchrun, got 1, 1 and 2"),
        (("--dp", 0), "dp, cp, tp: expected 1 each without torchrun, got 0, 1 and 1"),
        (("--accumulate", 3), "accumulate: expected a divisor of batch_size = 4, got 3"),
        (("--compile", "block"), "compile: expected it without --no-compile, got 'block'"),
        (("--timeout", -1), "timeout: expected None or a positive number, got -1.0"),
        (("--peak-tflops", 0), "peak_tflops: expected None or a positive number, got 0.0"),
    ],
)
def test_bad_options_are_one_line(text, tmp_path, arguments, words):
    result = run("train", "--text", text, "--out", tmp_path, *TINY, *arguments)
    assert result.exit_code == 2 and result.stderr == f"error: {words}\n"
    assert not list(tmp_path.iterdir())
    assert run("train", "--no-such-option").exit_code == 2


def test_shards_of_another_tokenizer_are_refused(text, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    names = []
    for name, words in (("a", ["?", "<stop>", "is"]), ("b", ["?", "<stop>", "times"])):
        model = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="?"))
        model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        model.save(str(tmp_path / f"{name}.json"))
        names.append(("--tokenizer", tmp_path / f"{name}.json", "--end-token", "<stop>"))
    shards, out = tmp_path / "shards", tmp_path / "out"
    assert run("tokenize", text, "--out", shards, *names[0]).exit_code == 0
    result = run("train", "--data", shards, "--out", out, *TINY, *names[1])
    assert result.exit_code == 2 and "tokenizer: expected the one that made the shards in" in result.stderr
    assert run("train", "--data", shards, "--out", out, *TINY, *names[0], "--steps", 1).exit_code == 0
    data = shards / "train-00000.bin"
    data.write_bytes(b"\x09" * data.stat().st_size)  # as of a larger vocabulary
    result = run("train", "--data", shards, "--out", tmp_path / "other", *TINY, "--no-verify")
    assert result.exit_code == 2
    assert re.fullmatch(r"error: data: expected tokens below 3 in .*train-00000.bin, got 9: .*\n", result.stderr)


def test_a_shard_that_is_gone_is_named(text, tmp_path):
    shards = tmp_path / "shards"
    assert run("tokenize", text, "--out", shards).exit_code == 0
    (shards / "train-00000.bin").write_bytes(b"short")
    result = run("train", "--data", shards, "--out", tmp_path / "out", *TINY)
    assert result.exit_code == 2 and "train-00000.bin of" in result.stderr and "got 5" in result.stderr


def test_a_disk_without_room_ends_the_run_in_one_line(text, tmp_path, file_limit):
    arguments = ("train", "--text", text, "--out", tmp_path, *TINY)
    assert run(*arguments, "--steps", 3).exit_code == 0
    file_limit(30_000)
    result = run(*arguments, "--steps", 5, "--resume")
    file_limit(None)
    assert result.exit_code == 2
    assert re.fullmatch(r"error: \[Errno 27\] File too large: '.*/\.step-000005\.part'\n", result.stderr)
    assert [path.name for path in tmp_path.glob("*step-*")] == ["step-000003"]
    assert run(*arguments, "--steps", 5, "--resume").exit_code == 0


def test_the_first_signal_is_kept_and_the_second_acts_as_before():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with stop_flag() as flag:
        assert not flag
        os.kill(os.getpid(), signal.SIGTERM)
        assert flag and flag.signal == signal.SIGTERM
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_watchdog_that_is_beaten_does_nothing(tmp_path):
    with Watchdog(0.6, tmp_path) as watchdog:
        for _ in range(6):
            time.sleep(0.2)
            watchdog.beat()
    assert not list(tmp_path.iterdir())
    with Watchdog(None, tmp_path) as watchdog:
        watchdog.beat()


def test_processes_meet_under_a_name_of_their_own():
    store = dist.HashStore()

    def start(size):
        names = {}
        threads = [
            threading.Thread(target=lambda rank=rank: names.update({rank: meet(store, rank, size, 20.0)}))
            for rank in reversed(range(size))
        ]
        for thread in threads:
            thread.start()
            time.sleep(0.1)
        for thread in threads:
            thread.join()
        return names

    first, second, third = start(3), start(3), start(2)
    assert len(first) == len(second) == 3 and len(third) == 2
    found = [set(names.values()) for names in (first, second, third)]
    assert all(len(names) == 1 for names in found) and len(set.union(*found)) == 3
    with pytest.raises(TimeoutError, match="torchrun: expected 2 processes within 0 s, and rank 0 did not meet all"):
        meet(store, 0, 2, 0.2)
