"""What ends a run early: signals that let it save, and a watchdog that says where a hanging process stands."""

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)
HANG_CODE = 70
"""Exit code of a process that the watchdog ends."""


class StopFlag:
    """The first signal that asked a run to end."""

    def __init__(self) -> None:
        self.signal = 0

    def __bool__(self) -> bool:
        return self.signal != 0


@contextmanager
def stop_flag() -> Iterator[StopFlag]:
    """A flag that the first SIGINT or SIGTERM sets; a second one acts as before. Never set outside the main thread."""
    flag = StopFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(number: int, frame: object) -> None:
        flag.signal = number
        restore()

    for number in SIGNALS:
        signal.signal(number, ask)
    try:
        yield flag
    finally:
        restore()


class Watchdog:
    """Ends the process with exit code 70 when `beat` is not called for `timeout` seconds, after the stacks are written.

    The stacks of all threads go to `stacks-rank-N.txt` in a folder, even if a thread holds the interpreter, and to
    stderr. The process then waits a little before it ends, so that all ranks that hang together have written theirs:
    the first one to end would make the others fail. Without a timeout nothing is watched.
    """

    def __init__(self, timeout: float | None, folder: Path, rank: int = 0) -> None:
        self.timeout, self.rank, self.path = timeout, rank, folder / f"stacks-rank-{rank}.txt"
        self.grace = min(5.0, timeout or 0.0)
        self._ended = threading.Event()
        self._beaten = time.monotonic()

    def __enter__(self) -> Self:
        if self.timeout is not None:
            self.path.unlink(missing_ok=True)
            self._file = self.path.open("w")
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self.beat()
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.timeout is not None:
            self._ended.set()
            faulthandler.cancel_dump_traceback_later()
            self._file.close()
            self._thread.join()
            self.path.unlink(missing_ok=True)

    def beat(self) -> None:
        """Say that the run goes on."""
        if self.timeout is not None:
            self._beaten = time.monotonic()
            faulthandler.dump_traceback_later(self.timeout, file=self._file)

    def _watch(self) -> None:
        assert self.timeout is not None
        while not self._ended.wait(max(0.05, self._beaten + self.timeout + 0.5 - time.monotonic())):
            idle = time.monotonic() - self._beaten
            if idle < self.timeout:
                continue
            print(
                f"rank {self.rank}: nothing went on for {idle:.0f} s (timeout {self.timeout:g} s); the stacks of all "
                f"threads are in {self.path} and below",
                file=sys.stderr,
            )
            faulthandler.dump_traceback(file=sys.__stderr__ or 2)
            time.sleep(self.grace)
            os._exit(HANG_CODE)
