"""Files that must be whole: torch.distributed.checkpoint with plain errors, and names that are on disk."""

import os
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

METADATA_FILE = ".metadata"
"""In a checkpoint of torch.distributed.checkpoint: what its shards hold, and where."""


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
            if isinstance(cause, (OSError, ValueError)):
                raise cause from error
            text = str(cause) or type(cause).__name__
            raise RuntimeError(f"{text.splitlines()[0]} (rank {rank})") from error


def why_not_loaded(error: Exception) -> str:
    """What torch found in a file, in one line of the page that it says about it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if isinstance(error, pickle.UnpicklingError):
        refused = next((line for line in lines if "unsupported" in line.lower()), lines[0])
        return f"something that could run code and was not loaded: {refused}"
    return lines[0]


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
