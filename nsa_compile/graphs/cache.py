"""NSACache: what the layers of a model remember, in static buffers with positions on the device."""

import copy
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from nsa_compile.custom_ops.decode import STEP, cache_append, cache_recall, cache_write
from nsa_compile.ops.checks import FLOAT_DTYPES, check_int, check_ints, values_are_visible


class LayerCache:
    """The buffers of one attention layer, each [batch, length, n_kv_groups, channels].

    A buffer shorter than the capacity is a ring: token p lies at index p % length. `positions` int32 [batch] counts the
    tokens each row was given, which is also the position of its next token. Nothing in a buffer needs clearing: what
    lies at or after a row's position is never read into a result. Tokens past the capacity are kept nowhere and give
    NaN, but they count: a row goes on giving NaN until it is taken back to before its end.

    `nominal_reads` int64 [batch, 4] and `actual_reads` int64 [batch, n_kv_groups, 4] are the tokens that each row's
    last query read, as (cmp, slc, win, total); 0 for a row that was idle in the last call.
    """

    def __init__(
        self,
        layout: dict[str, tuple[int, int]],
        g: int,
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.capacity = capacity
        self.positions = torch.zeros(batch, dtype=torch.int32, device=device)
        self.nominal_reads = torch.zeros(batch, 4, dtype=torch.int64, device=device)
        self.actual_reads = torch.zeros(batch, g, 4, dtype=torch.int64, device=device)
        self.buffers = {
            name: torch.zeros(batch, length, g, channels, dtype=dtype, device=device)
            for name, (length, channels) in layout.items()
        }

    def tensors(self) -> list[Tensor]:
        """All tensors of the layer."""
        return [self.positions, self.nominal_reads, self.actual_reads, *self.buffers.values()]

    def over(self, tensors: Sequence[Tensor]) -> "LayerCache":
        """The same layer's cache with other tensors, in the order of `tensors()`."""
        other = copy.copy(self)
        other.positions, other.nominal_reads, other.actual_reads, *buffers = tensors
        other.buffers = dict(zip(self.buffers, buffers, strict=True))
        return other

    def check_room(self, new: Tensor, count: Tensor | None) -> None:
        """Raise ValueError if `new` [b, t, ...] does not fit the cache, as far as the host can see."""
        b, t = new.shape[:2]
        buffer = next(iter(self.buffers.values()))
        if new.requires_grad:
            raise ValueError("cache: expected a call without gradients (torch.no_grad or inference_mode), got one with")
        if b != self.positions.shape[0]:
            raise ValueError(f"cache: expected a batch of {self.positions.shape[0]}, got {b}")
        if new.dtype != buffer.dtype or new.device != buffer.device:
            raise ValueError(
                f"cache: expected keys in {buffer.dtype} on {buffer.device}, got {new.dtype} on {new.device}"
            )
        if t > self.capacity:
            raise ValueError(f"cache: expected at most {self.capacity} tokens (its capacity), got {t}")
        if values_are_visible(self.positions):
            given = torch.full_like(self.positions, t) if count is None else count
            end = int(torch.where(given > 0, self.positions + given, 0).max())
            if end > self.capacity:
                raise ValueError(f"cache: expected at most {self.capacity} tokens (its capacity), got {end}")

    def room(self, t: int, count: Tensor | None) -> Tensor:
        """How many of t new tokens, or of the first `count` int32 [b] of them, each row has room for, int32 [b]."""
        room = (self.capacity - self.positions).clamp(0, t)
        return room if count is None else torch.minimum(room, count.clamp_min(0))

    def spoil(self, y: Tensor, position: Tensor) -> Tensor:
        """Outputs y [b, t, *] of tokens at `position` int [b, t], NaN where the position is past the capacity."""
        return torch.where((position < self.capacity)[..., None], y, float("nan"))

    def recall(self, name: str, new: Tensor, first: Tensor, length: int) -> Tensor:
        """Tokens `first … first + length - 1` of each row, from the buffer and the tokens `new` about to be appended.

        new [b, t, g, *], first int [b] → [b, length, g, *]. Tokens beyond the new ones repeat the last of them.
        """
        return cache_recall(self.buffers[name], new, self.positions, first, length)

    def append(self, name: str, new: Tensor, count: Tensor | None) -> None:
        """Write the first `count` int32 [b] (default all) of the tokens `new` [b, t, g, *] at the rows' positions."""
        buffer = self.buffers[name]
        cache_append(buffer, new, self.positions, count, buffer.shape[1] < self.capacity)

    def write(self, name: str, new: Tensor, index: Tensor, keep: Tensor) -> None:
        """Write `new` [b, n, g, *] at the consecutive slots `index` [b, n] where `keep` [b, n]."""
        cache_write(self.buffers[name], new, index, keep)

    def keep_reads(self, count: Tensor, nominal: Tensor, actual: Tensor) -> None:
        """Keep the reads [b, t, (g,) 4] of the last of `count` int32 [b] new tokens that are kept."""
        last, row = (count - 1).clamp_min(0).long(), torch.arange(count.shape[0], device=count.device)
        for buffer, reads in ((self.nominal_reads, nominal), (self.actual_reads, actual)):
            idle = (count == 0).view(-1, *(1,) * (buffer.ndim - 1))
            buffer.copy_(reads[row, last].masked_fill(idle, 0))

    def advance(self, t: int, count: Tensor | None) -> None:
        """Move on by t tokens, or by the first `count` int32 [b] of them, room or not."""
        most = torch.iinfo(torch.int32).max - t  # a row that is driven on for ever stays past its capacity
        self.positions.copy_(self.positions.clamp_max(most) + (t if count is None else count.clamp(0, t)))


def first_parameter(module: nn.Module) -> nn.Parameter:
    """The first floating-point parameter of a module."""
    return next(p for p in module.parameters() if p.is_floating_point())


def key_dtype(model: nn.Module, kind: str) -> torch.dtype:
    """Type of the keys that a model computes on a kind of device: its weights' or, but for fp64, autocast's."""
    dtype = first_parameter(model).dtype
    if dtype == torch.float64 or kind == "meta" or not torch.is_autocast_enabled(kind):
        return dtype
    return torch.get_autocast_dtype(kind)


def free_memory(device: torch.device) -> int | None:
    """Bytes that new tensors may take on a device, of the host's those of the container; None for other devices."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu" or not hasattr(os, "sysconf"):
        return None
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for path, pattern, unit in (
        ("/proc/meminfo", r"MemAvailable:\s+(\d+) kB", 1024), ("/sys/fs/cgroup/memory.max", r"(\d+)", 1),
    ):  # fmt: skip
        found = re.search(pattern, Path(path).read_text()) if os.access(path, os.R_OK) else None
        free = free if found is None else min(free, unit * int(found[1]))
    return free


class _Part(NamedTuple):
    """What a cache has for one layer."""

    module: nn.Module
    layout: dict[str, tuple[int, int]]
    g: int
    dtype: torch.dtype
    device: torch.device


def _parts(
    model: nn.Module, batch: int, capacity: int, dtype: torch.dtype | None, device: torch.device | str | None
) -> list[_Part]:
    """The attention layers of a model; arguments and errors as those of `NSACache.for_model`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    check_int("batch", batch)
    check_int("capacity", capacity)
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise ValueError(f"dtype: expected float16, bfloat16, float32 or float64, got {dtype!r}")
    modules = [m for m in model.modules() if hasattr(m, "cache_layout")]
    if not modules:
        raise ValueError(f"model: expected a module with attention layers, got {type(model).__name__} without any")
    parts = []
    for module in modules:
        layout, g = cast(Any, module).cache_layout(capacity)
        place = torch.device(device or first_parameter(module).device)
        parts.append(_Part(module, layout, g, dtype or key_dtype(model, place.type), place))
    return parts


def check_memory(
    model: nn.Module, batch: int, capacity: int, *, dtype: torch.dtype | None = None,
    device: torch.device | str | None = None, argument: tuple[str, int] | None = None,
) -> None:  # fmt: skip
    """Raise ValueError naming an argument (default the capacity) if a cache takes more memory than is free.

    Nothing is allocated. Other arguments and errors as those of `NSACache.for_model`.
    """
    _check_parts(_parts(model, batch, capacity, dtype, device), batch, argument or ("capacity", capacity))


def _check_parts(parts: list[_Part], batch: int, argument: tuple[str, int]) -> None:
    """`check_memory` of what `_parts` found."""
    if torch.compiler.is_compiling() or type(torch.empty(0)) is not Tensor:  # sizes that nothing is allocated for
        return
    needed: Counter[torch.device] = Counter()
    for part in parts:
        elements = part.g * sum(length * channels for length, channels in part.layout.values())
        needed[part.device] += batch * elements * part.dtype.itemsize
    for place, size in needed.items():
        free = free_memory(place)
        if free is not None and size > free:
            name, value = argument
            raise ValueError(
                f"{name}: expected a cache within the {free / 2**30:.1f} GiB that are free on {place}, "
                f"got {value} (a cache of {size / 2**30:.1f} GiB)"
            )


class NSACache:
    """Static caches of all attention layers of a model, for `batch` rows of up to `capacity` tokens.

    Prefill chunks and decode steps are the same call, `model(ids, cache=cache)`, and append in place; rows may differ
    in length, and a row whose length in a call is 0 stays as it was. Calls go without gradients. Make one with
    `NSACache.for_model`.

    `copy.deepcopy` of a cache goes on with the same model, and copied after its model in one call, as in
    `copy.deepcopy((model, cache))`, with the copied one; pickle it together with its model.
    """

    def __init__(self, modules: Sequence[nn.Module], layers: Sequence[LayerCache], batch: int, capacity: int) -> None:
        self.modules, self.layers = tuple(modules), tuple(layers)
        self.batch, self.capacity = batch, capacity
        self.host_lengths, self.host_peaks = [0] * batch, [0] * batch

    @classmethod
    def for_model(
        cls, model: nn.Module, batch: int, capacity: int, *,
        dtype: torch.dtype | None = None, device: torch.device | str | None = None,
    ) -> Self:  # fmt: skip
        """A cache for every attention layer of `model`, in the order of `model.modules()`.

        Args:
            model: an `NSALanguageModel`, an `NSAAttention`, or any module that contains such layers (compiled or not).
            batch: rows.
            capacity: tokens per row, prompt and generated ones together.
            dtype, device: of keys and values; default the type that the model's keys have (that of its first
                floating-point parameter, or under `torch.autocast` autocast's), and for each layer the device of its
                own first parameter.

        Raises: ValueError or TypeError for sizes below 1, a cache for which there is no memory (nothing is allocated
            then), a model without attention layers, or a type that is no float.
        """
        parts = _parts(model, batch, capacity, dtype, device)
        _check_parts(parts, batch, ("capacity", capacity))
        with torch.inference_mode(False):
            layers = [LayerCache(x.layout, x.g, batch, capacity, x.dtype, x.device) for x in parts]
        cache = cls([x.module for x in parts], layers, batch, capacity)
        for tensor in cache.tensors():
            torch._dynamo.mark_static_address(tensor)
        return cache

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        with torch.inference_mode(False):  # what is made in it could be written nowhere else
            layers = copy.deepcopy(self.layers, memo)
        other = type(self)([memo.get(id(m), m) for m in self.modules], layers, self.batch, self.capacity)
        other.host_lengths, other.host_peaks = list(self.host_lengths), list(self.host_peaks)
        return other

    def tensors(self) -> list[Tensor]:
        """All tensors of all layers."""
        return [tensor for layer in self.layers for tensor in layer.tensors()]

    def layer(self, module: nn.Module) -> LayerCache:
        """The cache of one attention layer. Raises ValueError for a layer of another model."""
        for known, layer in zip(self.modules, self.layers, strict=True):
            if known is module:
                return layer
        raise ValueError(f"cache: expected one made by NSACache.for_model for this {type(module).__name__}'s model")

    @property
    def positions(self) -> Tensor:
        """Tokens in the cache, int32 [batch], on the device (of the first layer)."""
        return self.layers[0].positions

    def nbytes(self) -> int:
        """Memory of all buffers in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def reserve(self, counts: int | Sequence[int]) -> None:
        """Count `counts` tokens (of every row, or per row) that the next call appends, on the host.

        A look at the positions on the device would stop the host, so the loop that drives a model keeps this mirror.

        Raises: ValueError before anything changes if a row would pass the capacity.
        """
        counts = self._per_row(counts)
        lengths = [length + count for length, count in zip(self.host_lengths, counts, strict=True)]
        if max(lengths) > self.capacity:
            row = lengths.index(max(lengths))
            raise ValueError(
                f"cache: expected at most {self.capacity} tokens (its capacity), "
                f"got {self.host_lengths[row]} + {counts[row]} in row {row}"
            )
        self.host_lengths = lengths
        self.host_peaks = [max(x) for x in zip(self.host_peaks, lengths, strict=True)]

    def count(self, row: int, length: int, *, ahead: int) -> None:
        """Note that a row holds `length` tokens, and has held at most `ahead` more, where the device decided that."""
        self.host_lengths[row] = length
        self.host_peaks[row] = max(self.host_peaks[row], min(length + ahead, self.capacity))

    def rollback(self, counts: int | Sequence[int]) -> None:
        """Take back the last `counts` tokens (of every row, or per row), as a speculative step does with wrong guesses.

        What follows is exact as long as a row goes back to at most 8 tokens fewer than it has ever held: the rings keep
        that many more than they need. Counts on the host, from what `reserve` was told.

        Raises: ValueError before anything changes if a row has not that many tokens, or would go back further.
        """
        counts = self._per_row(counts)
        for row, count in enumerate(counts):
            length, peak = self.host_lengths[row], self.host_peaks[row]
            most = min(length, length + STEP - peak)
            if count > most:
                raise ValueError(
                    f"counts: expected at most {most} tokens to take back from row {row}, which holds {length} "
                    f"and held {peak}, got {count}"
                )
        taken = torch.tensor(counts, dtype=torch.int32).to(self.positions.device, non_blocking=True)
        for layer in self.layers:
            layer.positions.sub_(taken)
        self.host_lengths = [length - count for length, count in zip(self.host_lengths, counts, strict=True)]

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Empty some rows, all by default; the others stay as they are. End what decodes in them first.

        Raises: ValueError or TypeError for what is no row.
        """
        chosen = set(range(self.batch) if rows is None else check_ints("rows", rows, 0, self.batch - 1))
        for layer in self.layers:
            if len(chosen) == self.batch:
                layer.positions.zero_()
            else:
                for row in chosen:
                    layer.positions[row : row + 1].zero_()
        for row in chosen:
            self.host_lengths[row] = self.host_peaks[row] = 0

    def copy_row(self, row: int, source: "NSACache", source_row: int = 0) -> None:
        """Replace a row by one of another cache of the same model, type, device and capacity, such as one of a single
        row that prompts are prefilled into while this one decodes. Nothing waits for the device.

        Raises: ValueError or TypeError naming the argument, before anything is written.
        """
        check_int("row", row, 0, self.batch - 1)
        check_cache("source", source)
        check_int("source_row", source_row, 0, source.batch - 1)
        if len(source.layers) != len(self.layers) or any(
            (mine.dtype, mine.device, mine.shape[1:]) != (other.dtype, other.device, other.shape[1:])
            for mine, other in zip(self.tensors(), source.tensors(), strict=True)
        ):
            raise ValueError("source: expected a cache of the same model, type, device and capacity, got another")
        length = source.host_lengths[source_row]
        for mine, other in zip(self.layers, source.layers, strict=True):
            for to, of in zip(mine.tensors(), other.tensors(), strict=True):
                to, of = to[row : row + 1], of[source_row : source_row + 1]
                if length and to.ndim == 4 and to.shape[1] == self.capacity:  # not a ring: a slot a token
                    to, of = to[:, :length], of[:, :length]
                to.copy_(of)
        self.host_lengths[row], self.host_peaks[row] = length, source.host_peaks[source_row]

    def _per_row(self, counts: int | Sequence[int]) -> list[int]:
        numbers = check_ints("counts", [counts] * self.batch if isinstance(counts, int) else counts)
        if len(numbers) != self.batch:
            raise ValueError(f"counts: expected {self.batch} numbers, one per row, got {len(numbers)}")
        return numbers


def check_cache(name: str, value: object) -> NSACache:
    """Return `value` if it is a cache, else raise TypeError."""
    if not isinstance(value, NSACache):
        raise TypeError(f"{name}: expected an NSACache, got {type(value).__name__}")
    return value
