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


def torchrun(*arguments, fault=("none", 0, 0), restarts=0, processes=2, timeout=240):
    """`nsa-compile` in two processes, one of which may have a fault (what, rank, step)."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes, "--max-restarts",
        restarts, "--", Path(__file__).parent / "faulty_train.py", *fault, *arguments,
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


@pytest.fixture(scope="module")
def unbroken(text, tmp_path_factory):
    """A run of two processes that read different rows, without a fault."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    done = torchrun("train", "--text", text, "--out", folder, *TINY)
    assert done.returncode == 0, done.stderr
    assert "2 processes on cpu: dp 2, cp 1, tp 1" in done.stdout and done.stdout.count("step 8/8") == 1
    return folder


def test_a_killed_process_starts_anew_and_the_losses_are_the_same(text, unbroken, tmp_path):
    done = torchrun("train", "--text", text, "--out", tmp_path, *TINY, "--auto-resume", fault=("SIGKILL", 1, 5),
                    restarts=1)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "exitcode: -9" in done.stderr
    assert metrics(tmp_path, "grad_norm", "val_loss", "layers") == metrics(unbroken, "grad_norm", "val_loss", "layers")
    assert find_checkpoint(tmp_path).name == "step-000008"


def test_a_hang_ends_with_the_stack_of_each_process(text, tmp_path):
    start = time.monotonic()
    done = torchrun("train", "--text", text, "--out", tmp_path, *TINY, "--timeout", 8, fault=("hang", 1, 5))
    assert done.returncode != 0 and time.monotonic() - start < 200
    assert f"exitcode: {HANG_CODE}" in done.stderr
    for rank, words in ((0, "all_reduce"), (1, "on_step_then_fault")):
        assert words in (tmp_path / f"stacks-rank-{rank}.txt").read_text()
        assert f"rank {rank}: nothing went on for" in done.stderr


def test_sigterm_to_one_process_saves_and_ends_all(text, unbroken, tmp_path):
    done = torchrun("train", "--text", text, "--out", tmp_path, *TINY, fault=("SIGTERM", 1, 4))
    assert f"exitcode  : {TERMINATED}" in done.stderr and "interrupted after step 4" in done.stdout
    assert find_checkpoint(tmp_path).name == "step-000004"
    assert metrics(tmp_path) == metrics(unbroken)[:4]


def copy_until(unbroken, folder, step):
    """The run as it was at an earlier checkpoint."""
    shutil.copytree(unbroken, folder)
    for path in folder.glob("step-*"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)


@pytest.mark.parametrize("plan", [(), ("--tp", 2), ("--cp", 2)], ids=["one process", "heads", "tokens"])
def test_another_layout_goes_on(text, unbroken, tmp_path, plan):
    copy_until(unbroken, tmp_path / "run", 3)
    arguments = ("train", "--text", text, "--out", tmp_path / "run", *TINY, "--resume", *plan)
    if plan:
        done = torchrun(*arguments)
        assert done.returncode == 0, done.stderr
        assert f"{plan[0][2:]} 2" in done.stdout
    else:
        result = run(*arguments)
        assert result.exit_code == 0, result.output
    for now, before in zip(metrics(tmp_path / "run"), metrics(unbroken), strict=True):
        assert now == pytest.approx(before, rel=1e-5)
    weights = NSALanguageModel.from_pretrained(find_checkpoint(tmp_path / "run")).state_dict()
    for name, weight in NSALanguageModel.from_pretrained(find_checkpoint(unbroken)).state_dict().items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=1e-4)


def test_a_run_of_two_processes_is_exported_and_generates(unbroken, tmp_path):
    result = run("export", unbroken, tmp_path / "out", "--dtype", "bf16")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "model.safetensors").is_file()
    for folder in (unbroken, tmp_path / "out"):
        result = run("generate", folder, "--prompt", "2 times", "--max-new-tokens", 4)
        assert result.exit_code == 0, result.output


def test_bad_plans_are_one_line_at_the_start(text, unbroken, tmp_path):
    before = metrics(unbroken)
    done = torchrun("train", "--text", text, "--out", unbroken, *TINY, "--lr", 1, "--auto-resume")
    assert re.findall(r"^error.*$", done.stderr, re.MULTILINE) == [
        "error: resume: expected the run's lr = 0.001, got 1.0"
    ]
    assert metrics(unbroken) == before
    for arguments, words in (
        (("--tp", 3), r"cp, tp: expected cp \* tp to divide the 2 processes, got 1 \* 3"),
        (("--tp", 2, "--n-kv-groups", 1), "tp: expected a divisor of n_kv_groups = 1, got 2"),
    ):
        done = torchrun("train", "--text", text, "--out", tmp_path, *TINY, *arguments)
        (line,) = re.findall(r"^error.*$", done.stderr, re.MULTILINE)
        assert re.fullmatch(f"error: {words}", line)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--tp", 2), "dp, cp, tp: expected 1 each without torchrun, got 1, 1 and 2"),
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
    result = run("train", "--data", shards, "--out", tmp_path / "other", *TINY)
    assert result.exit_code == 2
    assert re.fullmatch(r"error: data: expected tokens below 3 in .*train-00000.bin, got 9: .*\n", result.stderr)


def test_a_shard_that_is_gone_is_named(text, tmp_path):
    shards = tmp_path / "shards"
    assert run("tokenize", text, "--out", shards).exit_code == 0
    (shards / "train-00000.bin").write_bytes(b"short")
    result = run("train", "--data", shards, "--out", tmp_path / "out", *TINY)
    assert result.exit_code == 2 and "train-00000.bin of" in result.stderr and "got 5" in result.stderr


def test_a_disk_without_room_ends_the_run_in_one_line(text, tmp_path):
    """A limit on the size of files stands for it."""
    arguments = list(map(str, ("train", "--text", text, "--out", tmp_path, *TINY)))
    assert run(*arguments, "--steps", 3).exit_code == 0
    script = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (30000, 30000)); " \
             "from nsa_compile.cli import main; main()"  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments, "--steps", "5", "--resume"], capture_output=True, text=True,
        check=False, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 2
    assert re.fullmatch(r"error: \[Errno 27\] File too large: '.*/\.step-000005\.part'\n", done.stderr)
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
