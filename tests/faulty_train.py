"""`nsa-compile` with a fault: `faulty_train.py FAULT RANK STEP ARGUMENTS...`, for torchrun; not after a restart."""

import os
import signal
import sys
import time

import torch

from nsa_compile import cli, terminal


def main() -> None:
    fault, rank, step, *arguments = sys.argv[1:]
    torch.set_num_threads(1)
    train = terminal.train

    def faulty(*args, on_step, **options):
        def on_step_then_fault(metrics):
            on_step(metrics)
            if (os.environ["RANK"], metrics.step, os.environ["TORCHELASTIC_RESTART_COUNT"]) == (rank, int(step), "0"):
                if fault == "hang":
                    time.sleep(600)
                os.kill(os.getpid(), getattr(signal, fault))

        return train(*args, on_step=on_step_then_fault, **options)

    if fault != "none":
        terminal.train = faulty
    sys.argv[1:] = arguments
    cli.main()


if __name__ == "__main__":
    main()
