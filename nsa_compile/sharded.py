"""Checkpoints of torch.distributed.checkpoint, read without running anything that is written in them.

torch reads its `.metadata`, and what is no tensor in the shards, by pickle, which runs what a file names. Here both are
data from a stranger: of `.metadata` only the objects that torch's writer puts there are taken, and as plain records
that are checked and made into torch's objects afterwards; the rest is read as `torch.load(weights_only=True)` does.
"""

import io
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, LoadPlan
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlanner, ReadItem
from torch.futures import Future

from nsa_compile.launch import together
from nsa_compile.storage import METADATA_FILE, distributed_checkpoint, why_not_loaded

DCP = "torch.distributed.checkpoint"
CLASSES = frozenset({
    (f"{DCP}.metadata", "Metadata"), (f"{DCP}.metadata", "StorageMeta"), (f"{DCP}.metadata", "TensorStorageMetadata"),
    (f"{DCP}.metadata", "BytesStorageMetadata"), (f"{DCP}.metadata", "ChunkStorageMetadata"),
    (f"{DCP}.metadata", "TensorProperties"), (f"{DCP}.metadata", "MetadataIndex"),
    (f"{DCP}.metadata", "_MEM_FORMAT_ENCODING"), (f"{DCP}.filesystem", "_StorageInfo"), ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    # where the checkpoint was written; Python 3.13 says pathlib._local
    ("pathlib", "PosixPath"), ("pathlib", "WindowsPath"), ("pathlib._local", "PosixPath"),
    ("pathlib._local", "WindowsPath"),
})  # fmt: skip
"""What torch's writer names in `.metadata`, besides the types of tensors."""


def load_sharded(state: dict[str, Any], folder: Path, group: dist.ProcessGroup | None = None) -> None:
    """Read a state dict in place, in whatever layout it was saved; all processes of a group together.

    Raises: ValueError naming the file, for one that is missing, cut short, of other sizes than the state, or that holds
        anything but what torch's writer puts there; RuntimeError with torch's words for the rest.
    """
    read = partial(Reader, folder)
    reader = read() if group is None else together(read, group)
    with distributed_checkpoint() as dcp:
        dcp.load(state, storage_reader=reader, planner=Planner(), process_group=group, no_dist=group is None)


def count_sharded(folder: Path) -> int:
    """Elements of all tensors in a checkpoint, a tensor with two names twice. Raises as `load_sharded`."""
    saved = Reader(folder).found.state_dict_metadata.values()
    return sum(math.prod(x.size) for x in saved if isinstance(x, TensorStorageMetadata))


class Reader(FileSystemReader):
    """torch's reader of the files in a folder, but for `.metadata`, which is read at once."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.found = read_metadata(folder / METADATA_FILE)
        sizes: dict[str, int] = {}
        for part in self.found.storage_data.values():
            sizes[part.relative_path] = max(sizes.get(part.relative_path, 0), part.offset + part.length)
        for name, size in sizes.items():
            got = (folder / name).stat().st_size if (folder / name).is_file() else None
            if got is None or got < size:
                raise ValueError(
                    f"{folder / name}: expected at least {size:,} bytes, got {'no such file' if got is None else got}"
                )

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What `.metadata` says. Arguments are for metadata of each rank, which our checkpoints do not have."""
        self.found.storage_meta = StorageMeta(load_id=self.load_id)
        return self.found

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what is planned, file by file. Raises ValueError naming the one that holds something else."""
        files: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            files.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        for name, items in files.items():
            try:
                super().read_data(replace(plan, items=items), planner)
            except (OSError, MemoryError):
                raise
            except Exception as error:  # of torch and of pickle
                raise ValueError(
                    f"{self.path}/{name}: expected what {DCP} writes, got {why_not_loaded(error)}"
                ) from error
        done: Future[None] = Future()
        done.set_result(None)
        return done


class Planner(DefaultLoadPlanner):
    """torch's plan of what to read, but that nothing read is run, and no tensor is left as it was."""

    def create_local_plan(self) -> LoadPlan:
        """Raises ValueError where a tensor of the state is no whole tensor in the checkpoint."""
        assert self.metadata is not None
        for name, value in self.state_dict.items():
            saved = self.metadata.state_dict_metadata.get(name)
            if saved is not None and isinstance(value, torch.Tensor) != isinstance(saved, TensorStorageMetadata):
                raise ValueError(f"{name}: expected {type(value).__name__}, got {type(saved).__name__}")
            if isinstance(saved, TensorStorageMetadata):
                covered = sum(math.prod(chunk.sizes) for chunk in saved.chunks)
                if covered != math.prod(saved.size):
                    raise ValueError(f"{name}: expected {math.prod(saved.size)} elements in its parts, got {covered}")
        return super().create_local_plan()

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put what is no tensor into the state, as `torch.load(weights_only=True)` reads it."""
        *path, last = self.mappings[read_item.dest_index.fqn]
        target: Any = self.original_state_dict
        for key in path:
            target = target[key]
        target[last] = torch.load(value, weights_only=True)


# --- .metadata -------------------------------------------------------------------------------------------------------


class Record:
    """An object in a file: the name of its class, what it was made of, its state. It does nothing."""

    name = ""
    state: Any = None

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


class MetadataUnpickler(pickle.Unpickler):
    """Makes `Record`s of the classes that torch's writer names, of types of their own for each file.

    Raises: ValueError for any other name, before it is looked up.
    """

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self.types: dict[str, type[Record]] = {}

    def find_class(self, module: str, name: str) -> type[Record]:
        """The record type of an admitted name."""
        if (module, name) not in CLASSES and not (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            raise ValueError(f"{module}.{name}, which could run code and was not loaded")
        return self.types.setdefault(name, type(name, (Record,), {"name": name}))


def read_metadata(path: Path) -> Metadata:
    """The `.metadata` of a checkpoint.

    Raises: ValueError naming the file, if it holds anything but what torch's writer puts there, or is cut short.
    """
    try:
        with path.open("rb") as file:
            return _metadata(MetadataUnpickler(file).load())
    except OSError:
        raise
    except Exception as error:  # a broken pickle raises nearly anything
        raise ValueError(f"{path}: expected what {DCP} writes, got {error}") from error


def _fields(value: Any, kind: str) -> dict[str, Any]:
    """The state of a record of a class, by the names of its fields; the class itself has none."""
    if not isinstance(value, Record) or value.name != kind:
        raise ValueError(f"{_say(value)} for {kind}")
    state = {} if value.state is None else value.state
    if not isinstance(state, dict):
        raise ValueError(f"{_say(state)} as fields of {kind}")
    return state


def _of(kind: type, value: Any) -> Any:
    """The value, if it is of exactly that type."""
    if type(value) is not kind:
        raise ValueError(f"{_say(value)} for {kind.__name__}")
    return value


def _say(value: Any) -> str:
    return value.name if isinstance(value, Record) else type(value).__name__


def _items(value: Any, key: Callable[[Any], Any], item: Callable[[Any], Any]) -> dict[Any, Any]:
    return {key(k): item(v) for k, v in _of(dict, value).items()}


def _metadata(value: Any) -> Metadata:
    fields = _fields(value, "Metadata")
    tensors = _items(fields["state_dict_metadata"], partial(_of, str), _entry)
    return Metadata(tensors, storage_data=_items(fields["storage_data"], _index, _part))


def _entry(value: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    if isinstance(value, Record) and value.name == "BytesStorageMetadata":
        return BytesStorageMetadata()
    fields = _fields(value, "TensorStorageMetadata")
    size = _size(fields["size"])
    chunks = [_chunk(chunk, size) for chunk in _of(list, fields["chunks"])]
    return TensorStorageMetadata(TensorProperties(dtype=_dtype(fields["properties"])), size, chunks)


def _chunk(value: Any, size: torch.Size) -> ChunkStorageMetadata:
    fields = _fields(value, "ChunkStorageMetadata")
    chunk = ChunkStorageMetadata(_size(fields["offsets"]), _size(fields["sizes"]))
    if len(chunk.offsets) != len(size) or len(chunk.sizes) != len(size) or any(
        offset + length > whole for offset, length, whole in zip(chunk.offsets, chunk.sizes, size, strict=True)
    ):  # fmt: skip
        raise ValueError(f"a part {tuple(chunk.sizes)} at {tuple(chunk.offsets)} of a tensor {tuple(size)}")
    return chunk


def _dtype(value: Any) -> torch.dtype:
    """The type of a tensor, the first of its properties; the others say nothing that loading needs."""
    if not isinstance(value, Record) or value.name != "TensorProperties" or not isinstance(value.state, tuple):
        raise ValueError(f"{_say(value)} for TensorProperties")
    kind = value.state[0]
    dtype = getattr(torch, kind.name, None) if isinstance(kind, type) and issubclass(kind, Record) else None
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{_say(kind)} for a type of tensors")
    return dtype


def _size(value: Any) -> torch.Size:
    if not isinstance(value, Record) or value.name != "Size" or len(value.args) != 1:
        raise ValueError(f"{_say(value)} for Size")
    sizes = [_of(int, n) for n in _of(tuple, value.args[0])]
    if any(not 0 <= n < 2**63 for n in sizes):
        raise ValueError(f"a size of {sizes}")
    return torch.Size(sizes)


def _index(value: Any) -> MetadataIndex:
    fields = _fields(value, "MetadataIndex")
    offset, index = fields.get("offset"), fields.get("index")
    return MetadataIndex(
        _of(str, fields["fqn"]), None if offset is None else _size(offset), None if index is None else _of(int, index)
    )


@dataclass(frozen=True)
class Part:
    """Where an item lies: torch's `_StorageInfo`, of files in the checkpoint's own folder only, in bytes."""

    relative_path: str
    offset: int
    length: int
    transform_descriptors: None = None


def _part(value: Any) -> Part:
    fields = _fields(value, "_StorageInfo")
    name, offset, length = (
        _of(kind, fields[x]) for x, kind in (("relative_path", str), ("offset", int), ("length", int))
    )
    if name != Path(name).name or not name.endswith(".distcp"):
        raise ValueError(f"a shard in {name!r}, which is no file of shards in this folder")
    if offset < 0 or length < 0 or fields.get("transform_descriptors"):
        raise ValueError(f"a part of {name} at {offset}, of {length} bytes, {fields.get('transform_descriptors')}")
    return Part(name, offset, length)
