"""Files that must be whole: torch.distributed.checkpoint with plain errors, and names that are on disk."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def distributed_checkpoint() -> Iterator[Any]:
    """torch.distributed.checkpoint, its errors as they were raised, without its warning about a single process."""
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        try:
            yield dcp
        except dcp.api.CheckpointException as error:
            rank, (cause, _) = next(iter(error.failures.items()))
            if isinstance(cause, OSError):
                raise cause from error
            raise RuntimeError(f"{cause} (rank {rank})") from error


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
