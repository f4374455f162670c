"""`nsa-compile` with faults: under torchrun `faulty_train.py FAULT:RANK:STEP,... ARGUMENTS...`, or runs in turn."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from typer.testing import CliRunner

from nsa_compile import cli, terminal


def with_fault(train: Callable, fault: str, rank: int, step: int, start: int) -> Callable:
    """`train` that hangs, or sends itself a signal, on a rank after a step; only at the given start by torchrun."""

    def faulty(*args, on_step, **options):
        def on_step_then_fault(metrics):
            on_step(metrics)
            here = tuple(int(os.environ[name]) for name in ("RANK", "TORCHELASTIC_RESTART_COUNT"))
            if (*here, metrics.step) == (rank, start, step):
                if fault == "hang":
                    time.sleep(600)
                os.kill(os.getpid(), getattr(signal, fault))

        return train(*args, on_step=on_step_then_fault, **options)

    return faulty


def run_in_turn(rank: int, port: int, runs: dict[str, tuple], folder: Path) -> None:
    """What one of two processes of torchrun does that starts anew for each of `runs` (arguments, fault or None).

    Leaves exit code, stdout and stderr of each run in files.
    """
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
    }  # fmt: skip
    torch.set_num_threads(1)
    train = terminal.train
    for name, (arguments, fault) in runs.items():
        terminal.train = with_fault(train, *fault, 0) if fault else train
        done = CliRunner().invoke(cli.app, arguments)
        if dist.is_initialized():  # after an error
            dist.destroy_process_group()
        for kind, text in (("code", str(done.exit_code)), ("out", done.stdout), ("err", done.stderr)):
            (folder / f"{name}-{rank}-{kind}").write_text(text)


def main() -> None:
    faults, *arguments = sys.argv[1:]
    torch.set_num_threads(1)
    for start, fault in enumerate(faults.split(",")):
        what, rank, step = fault.split(":")
        terminal.train = with_fault(terminal.train, what, int(rank), int(step), start)
    sys.argv[1:] = arguments
    cli.main()


if __name__ == "__main__":
    main()
