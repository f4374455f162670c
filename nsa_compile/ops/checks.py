"""Argument checks shared by the public functions: shapes and types always, values only where the host can see them."""

from collections.abc import Iterable, Mapping
from itertools import pairwise

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(name: str, value: object) -> Tensor:
    """Return `value` if it is a tensor, else raise TypeError."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    return value


def has_shape(x: Tensor, *shape: int) -> bool:
    """Whether a tensor has this shape, compared size by size.

    A compiler that compares them as tuples guards on both as a whole, and fails where one of them turns out to be 1.
    """
    return x.ndim == len(shape) and all(a == b for a, b in zip(x.shape, shape, strict=True))


def check_layout(tensors: Mapping[str, tuple[Tensor, str]], sizes: dict[str, int] | None = None) -> dict[str, int]:
    """Check named float tensors against axis patterns such as "b t n d_k" and return the size of every axis.

    Axes of one name must agree, every axis except those of compressed tokens (`c`) must be at least 1, and all
    tensors must share dtype and device. Raises TypeError for a non-tensor, ValueError for everything else.
    """
    sizes = dict(sizes or {})
    first_name, first = "", None
    for name, (value, pattern) in tensors.items():
        tensor, axes = check_tensor(name, value), pattern.split()
        if tensor.ndim != len(axes):
            raise ValueError(f"{name}: expected {len(axes)} axes [{', '.join(axes)}], got shape {tuple(tensor.shape)}")
        for axis, size in zip(axes, tensor.shape, strict=True):
            if axis != "c" and size == 0:
                raise ValueError(f"{name}: expected axis {axis} >= 1, got shape {tuple(tensor.shape)}")
            if sizes.setdefault(axis, size) != size:
                expected = f"axis {axis} = {sizes[axis]} in [{', '.join(axes)}]"
                raise ValueError(f"{name}: expected {expected}, got shape {tuple(tensor.shape)}")
        if first is None:
            first_name, first = name, tensor
            if tensor.dtype not in FLOAT_DTYPES:
                raise ValueError(f"{name}: expected dtype float16, bfloat16, float32 or float64, got {tensor.dtype}")
        elif tensor.dtype != first.dtype:
            raise ValueError(f"{name}: expected dtype {first.dtype} as {first_name} has, got {tensor.dtype}")
        elif tensor.device != first.device:
            raise ValueError(f"{name}: expected device {first.device} as {first_name} has, got {tensor.device}")
    return sizes


def check_heads(n: int, g: int) -> None:
    """Query heads must be a multiple of the key/value heads."""
    if n % g:
        raise ValueError(f"q: expected a number of heads divisible by the {g} key/value heads, got {n}")


def check_int(name: str, value: object, minimum: int = 1, maximum: int | None = None) -> None:
    """Check a number given as a Python int (or a traced one)."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an int, got {value if isinstance(value, bool) else type(value).__name__}")
    if value < minimum or (maximum is not None and value > maximum):
        expected = f"at least {minimum}" if maximum is None else f"{minimum} … {maximum}"
        raise ValueError(f"{name}: expected {expected}, got {value}")


def check_ints(name: str, values: object, minimum: int = 0, maximum: int | None = None) -> list[int]:
    """Return several Python ints as a list, each checked as by `check_int`."""
    if not isinstance(values, Iterable) or isinstance(values, str):
        raise TypeError(f"{name}: expected ints, got {type(values).__name__}")
    numbers = list(values)
    fine = {*map(type, numbers)} <= {int}  # a prompt is long
    if not fine or (numbers and (min(numbers) < minimum or (maximum is not None and max(numbers) > maximum))):
        for value in numbers:
            check_int(name, value, minimum, maximum)
    return numbers


def check_blocks(*, l: int, d: int, l_sel: int | None = None) -> None:
    """`d` divides `l`; where given, `d` divides `l_sel` and `l <= l_sel`."""
    check_int("l", l)
    check_int("d", d)
    if l % d:
        raise ValueError(f"l: expected a multiple of d = {d}, got {l}")
    if l_sel is not None:
        check_int("l_sel", l_sel)
        if l_sel % d or l_sel < l:
            raise ValueError(f"l_sel: expected a multiple of d = {d} that is at least l = {l}, got {l_sel}")


def check_selected(*, n_sel: int, init_blocks: int, local_blocks: int) -> None:
    """The forced blocks fit into the selection."""
    check_int("n_sel", n_sel)
    check_int("init_blocks", init_blocks, 0)
    check_int("local_blocks", local_blocks)
    if n_sel < init_blocks + local_blocks:
        raise ValueError(
            f"n_sel: expected at least init_blocks + local_blocks = {init_blocks + local_blocks}, got {n_sel}"
        )


def check_number(name: str, value: object) -> None:
    """Check a number given as a Python int or float."""
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name}: expected a number, got {value if isinstance(value, bool) else type(value).__name__}")


def check_int_tensor(name: str, value: object, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Return an index tensor, int32 or int64, of known shape as int32, which it may be already."""
    tensor = check_tensor(name, value)
    if tensor.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name}: expected dtype int32 or int64, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected device {device}, got {tensor.device}")
    if not has_shape(tensor, *shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if values_are_visible(tensor) and tensor.dtype == torch.int64 and tensor.numel():
        low, high = (int(x) for x in tensor.aminmax())
        if low < -(2**31) or high >= 2**31:
            raise ValueError(f"{name}: expected values of 32 bits, got {low} … {high}")
    return tensor.to(torch.int32)


def check_ints_of(name: str, value: object, *axes: str, sizes: dict[str, int] | None = None) -> Tensor:
    """Return a tensor of int32 or int64 with the named axes, those in `sizes` of these sizes."""
    tensor, sizes = check_tensor(name, value), sizes or {}
    fits = tensor.ndim == len(axes) and all(n == sizes.get(axis, n) for n, axis in zip(tensor.shape, axes, strict=True))
    if tensor.dtype not in (torch.int32, torch.int64) or not fits:
        expected = ", ".join(str(sizes.get(axis, axis)) for axis in axes)
        raise ValueError(f"{name}: expected int32 or int64 [{expected}], got {tensor.dtype} {tuple(tensor.shape)}")
    return tensor


def check_placement(
    q: Tensor, *, q_start: Tensor | None, cu_seqlens: Tensor | None, end: int | None, key: str
) -> tuple[Tensor | None, Tensor | None]:
    """Check where the queries stand: every row's first query has a key, and packed sequences end where the keys do.

    `end` is the number of positions that the key tensor named `key` reaches, None if there is no `q_start`. Later
    queries may run past it: they are a row's padding. Returns `q_start` and `cu_seqlens` as int32.
    """
    b, t = q.shape[:2]
    if q_start is not None:
        q_start = check_int_tensor("q_start", q_start, (b,), q.device)
        if end is not None and values_are_visible(q_start):
            low, high = (int(x) for x in q_start.aminmax())
            if low < 0 or high >= end:
                raise ValueError(
                    f"q_start: expected values in 0 … {end - 1} for the length of {key}, got {low} … {high}"
                )
    if cu_seqlens is not None:
        cu_seqlens = check_cu_seqlens(cu_seqlens, b, t if q_start is None or end is None else end, q.device)
    return q_start, cu_seqlens


def check_key_placement(
    q: Tensor, k: Tensor, *, q_start: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Check where the queries stand against keys k [b, s, g, d_k]: s = t unless `q_start` is given.

    Returns `q_start` and `cu_seqlens` as int32.
    """
    t, s = q.shape[1], k.shape[1]
    where = check_placement(q, q_start=q_start, cu_seqlens=cu_seqlens, end=s, key="k")
    if q_start is None and s != t:
        raise ValueError(f"k: expected s = t = {t} keys without q_start, got shape {tuple(k.shape)}")
    return where


def check_block_indices(block_indices: object, q: Tensor, k: Tensor, *, l_sel: int, q_start: Tensor | None) -> Tensor:
    """Return selected blocks [b, t, g, n_sel] as int32: up to the queries' own, none twice, -1 in unused slots."""
    tensor = check_tensor("block_indices", block_indices)
    if tensor.ndim != 4 or tensor.shape[-1] == 0:
        raise ValueError(f"block_indices: expected shape [b, t, g, n_sel] with n_sel >= 1, got {tuple(tensor.shape)}")
    tensor = check_int_tensor("block_indices", tensor, (q.shape[0], q.shape[1], k.shape[2], tensor.shape[-1]), q.device)
    if values_are_visible(tensor):
        tokens = k.shape[1] if q_start is None else max(k.shape[1], int(q_start.max()) + q.shape[1])
        n_blocks = -(-tokens // l_sel)
        low, high = (int(x) for x in tensor.aminmax())
        if low < -1 or high >= n_blocks:
            raise ValueError(f"block_indices: expected values in -1 … {n_blocks - 1}, got {low} … {high}")
        blocks = tensor.sort(dim=-1).values
        if bool(((blocks[..., 1:] == blocks[..., :-1]) & (blocks[..., 1:] >= 0)).any()):
            raise ValueError("block_indices: expected no block twice for a query, got duplicates")
    return tensor


def check_cu_seqlens(cu_seqlens: object, b: int, t: int, device: torch.device) -> Tensor:
    """Return cumulative sequence lengths [N + 1] of one packed row of `t` tokens as int32."""
    tensor = check_tensor("cu_seqlens", cu_seqlens)
    if tensor.ndim != 1 or tensor.shape[0] < 2:
        raise ValueError(f"cu_seqlens: expected shape [N + 1] with N >= 1, got {tuple(tensor.shape)}")
    tensor = check_int_tensor("cu_seqlens", tensor, tuple(tensor.shape), device)
    if b != 1:
        raise ValueError(f"cu_seqlens: expected a batch of 1 packed row, got a batch of {b}")
    if values_are_visible(tensor):
        ends = tensor.tolist()
        if ends[0] != 0 or ends[-1] > t or any(a > z for a, z in pairwise(ends)):
            raise ValueError(f"cu_seqlens: expected to start at 0 and never fall or pass {t} tokens, got {ends}")
    return tensor


def check_lengths(lengths: object, b: int, t: int, device: torch.device) -> Tensor:
    """Return the lengths [b] of right-padded rows of `t` tokens as int32."""
    tensor = check_int_tensor("lengths", lengths, (b,), device)
    if values_are_visible(tensor) and not 0 <= int(tensor.min()) <= int(tensor.max()) <= t:
        raise ValueError(f"lengths: expected 0 <= lengths <= {t}, got {tensor.tolist()}")
    return tensor


def values_are_visible(x: Tensor) -> bool:
    """Whether looking at values is free: a real CPU tensor in eager mode (a look at the device would stop the host)."""
    if type(x) is not Tensor or x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(x)
