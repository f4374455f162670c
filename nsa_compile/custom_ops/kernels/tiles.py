"""What the kernels share: tiles of rows, tile products, the delta of a softmax's gradient, sizes of tiles."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


class Tiles(NamedTuple):
    """Query rows and keys of a tile, warps of a program, stages of its load pipeline."""

    rows: int
    keys: int
    warps: int
    stages: int


def padded(n: int, least: int = 16) -> int:
    """The power of two, at least `least`, that holds n."""
    return max(least, triton.next_power_of_2(n))


def check_grid(name: str, what: str, size: int) -> None:
    """Raise ValueError if the second or third axis of a grid is longer than CUDA allows."""
    if size > 65535:
        raise ValueError(f"{name}: expected at most 65535 {what} for the Triton kernels, got {size}")


def _has_near_rows(x: Tensor) -> bool:
    """Whether the last axis is dense and an int32 holds the offset of any head or group."""
    return x.stride(-1) == 1 and abs(x.stride(1)) < 2**24 and x.shape[2] * abs(x.stride(2)) < 2**31


def row_major(x: Tensor) -> Tensor:
    """x itself where its last axis is dense and its rows are near each other, else a contiguous copy."""
    return x if _has_near_rows(x) else x.contiguous()


def aligned(x: Tensor) -> Tensor:
    """x itself where it is `row_major` and its rows begin at multiples of 16 bytes, else a copy in which they do."""
    unit = 16 // x.element_size()
    if _has_near_rows(x) and x.data_ptr() % 16 == 0 and all(y > 0 and y % unit == 0 for y in x.stride()[:-1]):
        return x
    width = x.shape[-1]
    return x.new_empty(*x.shape[:-1], triton.cdiv(width, unit) * unit)[..., :width].copy_(x)


def key_tiles(x: Tensor, keys: int, cols: int) -> TensorDescriptor:
    """Descriptor of tiles [1, 1, keys, cols] of `aligned` x [b, s, g, d] seen as [b, g, s, d]; 0 outside."""
    x = x.transpose(1, 2)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, keys, cols])


@triton.jit
def load_keys(tiles, b, g, key, KEYS: tl.constexpr, COLS: tl.constexpr):
    """Tile [KEYS, COLS] of the keys `key` on, through a descriptor of `key_tiles`."""
    return tiles.load([b.to(tl.int32), g, key, 0]).reshape(KEYS, COLS)


def query_tiles(x: Tensor, h: int, rows: int, cols: int) -> TensorDescriptor:
    """Descriptor of tiles [1, tokens, heads, cols], `rows` rows of a group of h heads, of `aligned` x [b, t, n, d]."""
    heads = min(rows, padded(h, 1))
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, rows // heads, heads, cols])


@triton.jit
def load_queries(tiles, b, token, head, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Tile [ROWS, COLS] of the heads `head` on of the tokens `token` on, through a descriptor of `query_tiles`."""
    return tiles.load([b.to(tl.int32), token, head, 0]).reshape(ROWS, COLS)


@triton.jit
def dot(a, b):
    """a @ b in fp32; fp32 operands are multiplied in full."""
    return tl.dot(a, b, input_precision="ieee", out_dtype=tl.float32)


@triton.jit
def load_rows(x, first, end, stride, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, BOUND: tl.constexpr):
    """Tile [ROWS, COLS] of rows `first` on of x [*, WIDTH]: 0 from column WIDTH on and, if BOUND, from row `end` on."""
    row, col = tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None, :]
    pointers = x + tl.cast(first, tl.int64) * stride + (row * stride + col)
    if BOUND:
        return tl.load(pointers, mask=(first + row < end) & (col < WIDTH), other=0.0)
    elif WIDTH < COLS:
        return tl.load(pointers, mask=col < WIDTH, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def gather_rows(x, token, channel, live, stride_t, WIDTH: tl.constexpr, COLS: tl.constexpr):
    """Tile [rows, COLS] of x at `token * stride_t + channel` (both [rows]); 0 where not `live` and from WIDTH on."""
    col = tl.arange(0, COLS)[None, :]
    pointers = x + (token.to(tl.int64) * stride_t + channel)[:, None] + col
    return tl.load(pointers, mask=live[:, None] & (col < WIDTH), other=0.0)


@triton.jit
def scatter_rows(x, tile, token, channel, live, stride_t, WIDTH: tl.constexpr, COLS: tl.constexpr):
    """Store a tile where `gather_rows` would read it."""
    col = tl.arange(0, COLS)[None, :]
    pointers = x + (token.to(tl.int64) * stride_t + channel)[:, None] + col
    tl.store(pointers, tile.to(x.dtype.element_ty), mask=live[:, None] & (col < WIDTH))


@triton.jit
def is_finite(x):
    """Elementwise: neither NaN nor infinite."""
    return (x.to(tl.float32) - x.to(tl.float32)) == 0.0


@triton.jit
def finite(x):
    """x with 0 for NaN and infinity."""
    return tl.where(is_finite(x), x, 0.0)


@triton.jit
def accumulate(acc, top, total, q, k, v, scale2, seen=None, CAREFUL: tl.constexpr = False):
    """One step of the online softmax over a tile of keys: new (acc, top, total).

    Scores are `scale2 * q·k` in base 2, scale2 >= 0. `top` is the largest score so far divided by scale2, -inf if none.
    `seen` hides pairs: bool [rows, keys] if CAREFUL, where also NaN in hidden values is kept from the rows; or bool
    [rows], True for rows that see the whole tile and False for rows that see none of it; None where all see all.
    """
    scores = dot(q, tl.trans(k))
    if CAREFUL:
        scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.where(seen, tl.exp2((scores - base[:, None]) * scale2), 0.0)
        decay = tl.where(top == float("-inf"), 0.0, tl.exp2((top - base) * scale2))
        broken = tl.max(tl.where(is_finite(v), 0, 1), 1)
        broken = tl.max(tl.where(seen, broken[None, :], 0), 1)
        v = finite(v)
    elif seen is None:
        new_top = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores * scale2 - (new_top * scale2)[:, None])
        decay = tl.where(top > float("-inf"), tl.exp2((top - new_top) * scale2), 0.0)
    else:
        new_top = tl.where(seen, tl.maximum(top, tl.max(scores, 1)), top)
        p = tl.exp2(scores * scale2 - tl.where(seen, new_top * scale2, float("inf"))[:, None])
        decay = tl.where(seen & (top > float("-inf")), tl.exp2((top - new_top) * scale2), tl.where(seen, 0.0, 1.0))
    total = total * decay + tl.sum(p, 1)
    acc = acc * decay[:, None] + dot(p.to(v.dtype), v)
    if CAREFUL:
        acc = tl.where(broken[:, None] > 0, float("nan"), acc)
    return acc, new_top, total


@triton.jit
def score_gradient(scores, lse2, dp, delta, scale2):
    """(p, dS / scale) from scores q·k, the base-2 LSE, dP = dO·V and delta, all broadcast to [rows, keys].

    p is at most 1, whatever huge scores round to.
    """
    p = tl.exp2(tl.minimum(scores * scale2 - lse2, 0.0, propagate_nan=tl.PropagateNan.ALL))
    return p, p * (dp - delta)


@triton.jit
def row_delta(out, grad, lse):
    """`sum_d dO * O` and the LSE in base 2 of rows, both fp32; 0 and +inf where the LSE is -inf.

    The LSE of a row is finite only if its query and dO are, else NaN: in a tile that other rows or keys do not share
    with it, kernels may then leave these out, and p is NaN where the row sees a key.
    """
    seen = lse > float("-inf")
    delta = tl.sum(tl.where(seen[:, None], out * grad, 0.0), 1)
    sound = is_finite(lse) & (tl.sum(grad * 0.0, 1) == 0.0)
    return delta, tl.where(lse == float("-inf"), float("inf"), tl.where(sound, lse * LOG2E, float("nan")))


@triton.jit
def _delta_kernel(
    o, grad_o, lse, grad_lse, delta, lse2, rows, n, o_t, g_b, g_t, g_n, l_b, l_t, l_n, t,
    WIDTH: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    """delta = sum_d(dO * O) - dLSE and LSE in base 2, as `row_delta` gives it, per (b, t, head)."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = r < rows
    head, token = r % n, r // n
    b = token // t
    channel = b * g_b + (token - b * t) * g_t + head * g_n
    out = gather_rows(o, r, r * 0, live, WIDTH, WIDTH, COLS).to(tl.float32)
    grad = gather_rows(grad_o, r * 0, channel, live, 0, WIDTH, COLS).to(tl.float32)
    value = tl.load(lse + r, mask=live, other=float("-inf"))
    difference, value2 = row_delta(out, grad, value)
    if HAS_LSE:
        slot = b * l_b + (token - b * t) * l_t + head * l_n
        difference -= tl.load(grad_lse + slot, mask=live & (value > float("-inf")), other=0.0).to(tl.float32)
    tl.store(delta + r, difference, mask=live)
    tl.store(lse2 + r, value2, mask=live)


def softmax_delta(o: Tensor, grad_o: Tensor, lse: Tensor, grad_lse: Tensor | None) -> tuple[Tensor, Tensor]:
    """`delta = sum_d(dO * O) - dLSE` and the LSE in base 2 (`row_delta`), fp32 [b, t, n]."""
    b, t, n, d_v = o.shape
    o, lse = o.contiguous(), lse.contiguous()
    delta, lse2 = torch.empty_like(lse), torch.empty_like(lse)
    rows, cols = b * t * n, padded(d_v)
    per_program = max(1, 4096 // cols)
    strides = (0, 0, 0) if grad_lse is None else grad_lse.stride()
    _delta_kernel[(triton.cdiv(rows, per_program),)](
        o, grad_o, lse, lse if grad_lse is None else grad_lse, delta, lse2, rows, n, d_v, *grad_o.stride()[:3],
        *strides, t, WIDTH=d_v, COLS=cols, ROWS=per_program, HAS_LSE=grad_lse is not None,
    )  # fmt: skip
    return delta, lse2
