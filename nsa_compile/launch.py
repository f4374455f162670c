"""Processes of a run: what torchrun says about this one, and work that the first of them does for all."""

import datetime
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
JOIN_TIMEOUT = 600.0
"""Seconds that a process waits for the others to start."""


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among those of the run."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    def by_first(self, work: Callable[[], T], then: Callable[[], T]) -> T:
        """`work()` on the first process, and when it is done `then()` on the others; see `together`."""
        result = together(lambda: work() if self.first else None)
        others = together(lambda: None if self.first else then())
        found = result if self.first else others
        assert found is not None
        return found


class SaidElsewhere(ValueError):
    """An error about input that another process of the run says."""


def together(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """`work()` on every process of a group (by default all, if there are several); if it fails on one, it does on all.

    Raises: on the first process where `work` raises ValueError, TypeError, ImportError or OSError that error, on all
        others `SaidElsewhere`.
    """
    if not dist.is_initialized():
        return work()
    result, error = None, None
    try:
        result = work()
    except (ValueError, TypeError, ImportError, OSError) as failed:
        error = failed
    said: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(said, None if error is None else str(error), group)
    first = next((r for r, text in enumerate(said) if text is not None), None)
    if first is None:
        return result  # type: ignore[return-value]
    if error is not None and first == dist.get_rank(group):
        raise error
    raise SaidElsewhere(f"rank {first}: {said[first]}")


def launched() -> bool:
    """Whether torchrun, or something like it, started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank() -> int:
    """The number of this process, 0 without torchrun."""
    return int(os.environ["RANK"]) if launched() else 0


def local_rank() -> int:
    """The number of this process on its machine, 0 without torchrun."""
    return int(os.environ.get("LOCAL_RANK", 0)) if launched() else 0


def world_size() -> int:
    """The number of processes, 1 without torchrun."""
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


@contextmanager
def process_group(device: torch.device, timeout: float | None) -> Iterator[World]:
    """Join the processes of torchrun over gloo, and NCCL too on CUDA, on this process's device; alone without torchrun.

    Communication that takes more than twice `timeout` seconds fails, so that a watchdog of `timeout` speaks first.
    """
    if not launched():
        yield World(rank=0, size=1, device=device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    store, rank, size = next(dist.rendezvous("env://"))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore(meet(store, rank, size, JOIN_TIMEOUT), store), rank=rank, world_size=size,
        timeout=patience(timeout),
    )  # fmt: skip
    yield World(rank=dist.get_rank(), size=dist.get_world_size(), device=device)
    dist.destroy_process_group()  # not after an error: the others may not come


def patience(timeout: float | None, least: float = 0.0) -> datetime.timedelta | None:
    """How long communication may take for a watchdog of `timeout` seconds to speak first; None as torch has it."""
    return None if timeout is None else datetime.timedelta(seconds=max(least, 2 * timeout + 10))


def meet(store: dist.Store, rank: int, size: int, timeout: float) -> str:
    """A name that all living processes agree on through a store, and that none had before.

    torchrun keeps its store over restarts, addresses of the processes that died included, and its nodes count restarts
    differently: what the processes of one start write there needs a name of their own. Each one leaves a new token;
    the first one proposes a name together with the tokens it sees, until every other has found its own among them.

    Raises: TimeoutError if some process does not come.
    """
    own, deadline = uuid.uuid4().hex, time.monotonic() + timeout
    store.set(f"meet/{rank}", own)
    while time.monotonic() < deadline:
        if rank == 0:
            others = range(1, size)
            seen = [store.get(f"meet/{r}").decode() if store.check([f"meet/{r}"]) else "" for r in others]
            store.set("meet", json.dumps([own, *seen]))
            if all(store.check([f"met/{own}/{r}"]) for r in others):
                return own
        elif store.check(["meet"]):
            name, *seen = json.loads(store.get("meet"))
            if seen[rank - 1 : rank] == [own]:
                store.set(f"met/{name}/{rank}", "")
                return name
        time.sleep(0.05)
    raise TimeoutError(f"torchrun: expected {size} processes within {timeout:.0f} s, and rank {rank} did not meet all")
