"""The alternatives, timed in the same rounds: dense attention of torch (SDPA) and of flash-attn, other windows."""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from nsa_compile.bench.cases import Case, Inputs, attention_work, window_oracle
from nsa_compile.custom_ops import flash

FLASH_MODULES = {4: "flash_attn.cute", 2: "flash_attn"}
BLOCK = 128
"""Tile of flex_attention's masks."""


def alternatives(what: str, x: Inputs) -> list[Case]:
    """What to time beside one of our kinds: for "window" other windows, for "nsa" dense attention."""
    if what == "nsa":
        return [*sdpa_cases(x), *flash_cases(x, None)]
    return [*flex_cases(x), *flash_cases(x, x.options.w)] if what == "window" else []


def sdpa_backends(x: Inputs) -> dict[str, SDPBackend]:
    """Back ends of torch's attention that may work on the device and type, by name."""
    if "sdpa" not in x.options.beside:
        return {}
    if x.device.type != "cuda":
        return {"SDPA flash": SDPBackend.FLASH_ATTENTION, "SDPA math": SDPBackend.MATH}
    if x.dtype == torch.float32:
        return {"SDPA efficient": SDPBackend.EFFICIENT_ATTENTION}
    return {"SDPA flash": SDPBackend.FLASH_ATTENTION, "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION}


def dense_pairs(x: Inputs) -> int:
    """(query, key) pairs of causal attention, of all rows and heads."""
    return x.heads_of(x.t * (x.t + 1) // 2)


def sdpa_cases(x: Inputs) -> list[Case]:
    """Dense causal attention of torch."""
    return [
        Case(
            "dense", name, partial(sdpa, backend, *x.heads_first, causal=True),
            attention_work(x.heads_first, dense_pairs(x)), x.heads_first, partial(window_oracle, x, x.t), ours=False,
        )
        for name, backend in sdpa_backends(x).items()
    ]  # fmt: skip


def sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """torch's attention on [b, t, n, *]."""
    q, k, v = (y.transpose(1, 2) for y in (q, k, v))
    if backend is SDPBackend.EFFICIENT_ATTENTION:  # it knows no groups: keys and values go to every head
        k, v = (y.repeat_interleave(q.shape[1] // y.shape[1], 1) for y in (k, v))
    with sdpa_kernel(backend):
        o = scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=k.shape[1] != q.shape[1])
    return o.transpose(1, 2)


def flash_attn(x: Inputs) -> dict[str, Callable[..., Any]]:
    """The functions of flash-attn's versions that are installed, by name; on CUDA in bf16 and fp16."""
    if "flash-attn" not in x.options.beside or x.device.type != "cuda" or x.dtype == torch.float32:
        return {}
    return {f"flash-attn {version}": partial(call_flash_attn, version) for version in flash.installed()}


def call_flash_attn(version: int, *tensors: Tensor, **options: Any) -> Tensor:
    """flash-attn's output. A version that is installed but does not import fails here, so that a row says so."""
    o = importlib.import_module(FLASH_MODULES[version]).flash_attn_func(*tensors, **options)
    return o[0] if isinstance(o, tuple) else o


def flash_cases(x: Inputs, w: int | None) -> list[Case]:
    """Causal attention of flash-attn, dense or with a window."""
    inputs = (x.q, *x.kv["slc" if w is None else "win"])
    limits: Any = {} if w is None else {"window_size": (w - 1, 0)}
    work = attention_work(inputs, dense_pairs(x) if w is None else x.pairs("win"))

    return [
        Case(
            "dense" if w is None else "window", name, partial(function, *inputs, causal=True, **limits), work, inputs,
            partial(window_oracle, x, x.t if w is None else w), ours=False,
        )
        for name, function in flash_attn(x).items()
    ]  # fmt: skip


def flex_cases(x: Inputs) -> list[Case]:
    """Sliding window through compiled flex_attention."""
    if "flex" not in x.options.beside:
        return []
    from torch.nn.attention.flex_attention import flex_attention

    inputs = x.heads_first
    mask = window_mask(x.t, x.options.w, x.device)
    compiled: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=False)

    def run() -> Tensor:
        q, k, v = (y.transpose(1, 2) for y in inputs)
        return compiled(q, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2)

    work = attention_work(inputs, x.pairs("win"))
    oracle = partial(window_oracle, x, x.options.w)
    return [Case("window", "flex_attention", run, work, inputs, oracle, ours=False)]


def window_mask(t: int, w: int, device: torch.device) -> Any:
    """flex_attention's mask of a causal window of w tokens; which tiles it touches is worked out, not tried out."""
    from torch.nn.attention.flex_attention import BlockMask

    def visible(b: Tensor, n: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key > query - w)

    tile = torch.arange(-(-t // BLOCK), device=device)
    first, last = tile * BLOCK, tile * BLOCK + BLOCK - 1
    touched = (tile <= tile[:, None]) & (last > first[:, None] - w)
    full = (tile < tile[:, None]) & (first > last[:, None] - w) & (last[:, None] < t)

    def listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
        order = tiles.int().sort(dim=-1, descending=True, stable=True).indices
        return tiles.sum(-1, dtype=torch.int32)[None, None], order.int()[None, None]

    return BlockMask.from_kv_blocks(
        *listed(touched & ~full), *listed(full), BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(t, t)
    )
