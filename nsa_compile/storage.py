"""Files that must be whole: written together or not at all, on disk, by one process alone; errors that name them."""

import errno
import fcntl
import os
import pickle
import re
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

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


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give errors of the file system that name no file this one, as of a full disk, those of safetensors too."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is not None:
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        raise


def check_folder(name: str, folder: Path) -> None:
    """Raise ValueError, naming the argument, for a folder that cannot be: it, or one that it is in, is a file."""
    for path in (folder, *folder.parents):
        if path.exists():
            if not path.is_dir():
                raise ValueError(f"{name}: expected a folder, got {folder}: {path} is a file")
            return


@contextmanager
def made(folder: Path) -> Iterator[None]:
    """A folder, made where missing with those that it is in; after the block those that are new and empty go again."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with suppress(OSError):  # not empty
            for path in new:
                path.rmdir()


@contextmanager
def whole_files(folder: Path, *names: str) -> Iterator[list[Path]]:
    """Paths to write files to that go to a folder, made where missing, under their names once all are on disk.

    After an error the folder is what it was. Raises ValueError for a file in its place; OSError naming the folder.
    """
    check_folder("folder", folder)
    parts = [folder / f".{name}.{os.getpid()}.part" for name in names]
    with made(folder), naming(folder):
        try:
            yield parts
            for part in parts:
                flush(part)
            for part, name in zip(parts, names, strict=True):
                part.replace(folder / name)
            flush(folder)
        finally:
            for part in parts:
                part.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path, refusal: str) -> Iterator[None]:
    """Keep others from a block with the same lock file, until it ends or the process does, by whatever death.

    The operating system holds the lock, for this process alone; the file says who has it, and goes with the block, as
    do folders made for it that are empty then. Where a file system has no locks (some of networks) a warning says so.

    Raises: ValueError for a lock that is taken: `refusal`, and by whom; or for a file in the folder's place; OSError
        where the file cannot be made.
    """
    check_folder("out", path.parent)
    with made(path.parent):
        descriptor = _take(path, refusal)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # before it is free: whoever waits with this file open sees that it is gone
            os.close(descriptor)


def _take(path: Path, refusal: str) -> int:
    """The lock file, open and locked."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise ValueError(f"{refusal}, which {holder} does") from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                os.close(descriptor)
                raise OSError(error.errno, error.strerror, str(path)) from error
            warnings.warn(f"{path}: this file system has no locks ({error.strerror}); let no other process write to "
                          "the same folder", stacklevel=4)  # fmt: skip
            return descriptor
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
            return descriptor
        os.close(descriptor)  # its holder has just removed it
