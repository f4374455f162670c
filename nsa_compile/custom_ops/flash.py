"""flash-attn as a back end of window and compressed attention: what each version takes, and how it is called.

The window branch is its sliding window. Compressed attention becomes plain causal attention: the first l - 1 queries
see nothing; of the others, d in a row see the same blocks, one more than the d before them, so a run of d queries
stands as one query with d times the heads.

flash-attn multiplies what is hidden in a tile by 0, so that NaN and infinity there would spread to other queries, keys
and packed sequences. It is not given them: values become finite, the keys of broken ones NaN, which reach the queries
that see them and no others; gradients leave out broken queries, and what these reach becomes NaN afterwards.
"""

import importlib
import importlib.metadata
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from nsa_compile.ops.attend import finite
from nsa_compile.ops.layout import query_layout, sequence_of, visible_slots

DTYPES = (torch.bfloat16, torch.float16)
PACKAGES = {4: "flash-attn-4", 2: "flash-attn"}
MODULES = {4: "flash_attn.cute.interface", 2: "flash_attn.flash_attn_interface"}
GRID = 65535
"""Rows and heads that a launch takes at most."""


class Support(NamedTuple):
    """What one version of flash-attn takes on some GPUs; bf16 and fp16, causal, windows, GQA and varlen everywhere.

    d_k and d_v are multiples of 8 up to `width`, or one of `pairs`.
    """

    version: int
    majors: tuple[int, ...]
    """Compute capabilities, the number before the dot."""
    width: int
    pairs: tuple[tuple[int, int], ...] = ()
    equal: str = "no"
    """Where d_k = d_v is needed: "no", "always", or "gradients" (of heads that share keys)."""
    gradient_step: int = 8
    """What d_k must be a multiple of for gradients."""
    lse_gradient: bool = True
    """Whether gradients pass through the LSE, except for heads of 256 channels where `pairs` has them."""
    deterministic: bool = True
    """Whether gradients can be the same bits at every call."""
    measured: bool = False
    """Whether it ran on such a GPU; else the row is from the package's sources (4.0.0b36, 2.8.3)."""


SUPPORT = (
    # 4.0.0b36 rounds d_k up to 16 where it writes dQ and to 32 where it reads it: at 72 a gradient came out wrong
    Support(4, (9,), 256, equal="gradients", gradient_step=32, measured=True),
    Support(4, (10, 11), 128, pairs=((192, 128), (256, 256))),
    Support(4, (12,), 128, deterministic=False),
    Support(2, (8, 9, 10, 11, 12), 256, equal="always", lse_gradient=False),
)


class Pick(NamedTuple):
    """The version that takes a call, or 0 and the reason why none does."""

    version: int
    why_not: str


@cache
def installed() -> dict[int, str]:
    """Versions of flash-attn that are installed, the preferred one first: {4: "4.0.0b36"}."""
    found = {}
    for version, package in PACKAGES.items():
        try:
            found[version] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@cache
def import_error(version: int) -> str:
    """Why an installed version cannot be imported; empty if it can."""
    try:
        importlib.import_module(MODULES[version])
    except Exception as error:  # a build for another CUDA or GPU fails in many ways
        return f"{PACKAGES[version]} does not import: {type(error).__name__}: {error}"
    return ""


def capability_of(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of an NVIDIA GPU, None for other devices."""
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(device)


def pick_version(
    q: Tensor, v: Tensor, *, q_start: Tensor | None, backward: bool = False, grad_lse: Tensor | None = None,
    fold: int = 1,
) -> Pick:  # fmt: skip
    """The version that takes queries q [b, t, n, d_k] and values v [b, s, g, d_v], or why none does.

    `fold` is the number of queries that stand as one; `backward` asks about the gradient, `grad_lse` being the LSE's.
    """
    capability = capability_of(q.device)
    if capability is None:
        return Pick(0, "flash-attn runs on NVIDIA GPUs")
    if not installed():
        return Pick(0, f"neither {PACKAGES[4]} nor {PACKAGES[2]} is installed (pip install 'nsa-compile[flash]')")
    if q_start is not None:
        return Pick(0, "flash-attn takes no q_start: its queries end with the keys")
    if q.shape[0] > GRID or q.shape[2] * fold > GRID:
        return Pick(0, f"flash-attn takes up to {GRID} rows and heads, not {q.shape[0]} and {q.shape[2] * fold}")
    reasons, shared = [], q.shape[2] * fold > v.shape[2]
    for version in installed():
        row = next((row for row in SUPPORT if row.version == version and capability[0] in row.majors), None)
        if row is None:
            where = ".".join(map(str, capability))
            reason = f"flash-attn {version} has no forward and backward for compute capability {where}"
        else:
            call = (q.dtype, q.shape[-1], v.shape[-1], shared, backward, grad_lse is not None)
            reason = table_refusal(row, *call) or import_error(version)
        if not reason:
            return Pick(version, "")
        reasons.append(reason)
    return Pick(0, "; ".join(reasons))


def table_refusal(
    row: Support, dtype: torch.dtype, d_k: int, d_v: int, shared: bool, backward: bool, lse_gradient: bool
) -> str:
    """Why a row of the table does not take a call; `shared` says that query heads share keys. Empty if it does."""
    name, widths = f"flash-attn {row.version}", f"(d_k, d_v) = ({d_k}, {d_v})"
    if dtype not in DTYPES:
        return f"{name} takes bfloat16 and float16, not {dtype}"
    if d_k % 8 or d_v % 8 or (max(d_k, d_v) > row.width and (d_k, d_v) not in row.pairs):
        pairs = "".join(f" or {pair}" for pair in row.pairs)
        return f"{name} takes multiples of 8 up to {row.width} channels{pairs} on this GPU, not {widths}"
    if d_k != d_v and (row.equal == "always" or (row.equal == "gradients" and shared and backward)):
        what = "takes" if row.equal == "always" else "has gradients on this GPU for"
        return f"{name} {what} d_k = d_v only, not {widths}"
    if backward and d_k % row.gradient_step:
        return f"{name} has gradients on this GPU for d_k in multiples of {row.gradient_step} only, not {d_k}"
    if lse_gradient and (not row.lse_gradient or ((256, 256) in row.pairs and d_k == 256)):
        return f"{name} passes no gradient through the LSE" + (" of 256 channels" if row.lse_gradient else "")
    if backward and not row.deterministic and torch.are_deterministic_algorithms_enabled():
        return f"{name} has no deterministic gradients on this GPU"
    return ""


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, *, w: int, cu_seqlens: Tensor | None, scale: float, version: int
) -> tuple[Tensor, Tensor]:
    """o [b, t, n, d_v] and LSE [b, t, n] of window attention; without `q_start`."""
    ends = None if cu_seqlens is None else safe_ends(cu_seqlens, q.shape[1])
    return call_forward(version, q, k, v, window=w, ends=ends, scale=scale)


def window_attention_backward(
    grad_o: Tensor, grad_lse: Tensor | None, o: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *,
    w: int, cu_seqlens: Tensor | None, scale: float, version: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients (dq, dk, dv) of `window_attention`."""
    ends = None if cu_seqlens is None else safe_ends(cu_seqlens, q.shape[1])
    return call_backward(version, grad_o, grad_lse, o, lse, q, k, v, window=w, ends=ends, scale=scale)


def compressed_attention(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, *, l: int, d: int, cu_seqlens: Tensor | None, scale: float, version: int
) -> tuple[Tensor, Tensor]:
    """o [b, t, n, d_v] and LSE [b, t, n] of compressed attention; without `q_start`."""
    runs = Runs.of(q, k_cmp, l=l, d=d, cu_seqlens=cu_seqlens)
    if k_cmp.shape[1] == 0:
        return q.new_zeros(*q.shape[:3], v_cmp.shape[-1]), q.new_full(q.shape[:3], float("-inf"), dtype=torch.float32)
    o, lse = call_forward(version, runs.fold(q), k_cmp, v_cmp, window=None, ends=runs.ends, scale=scale)
    return runs.unfold(o, 0.0), runs.unfold(lse[..., None], float("-inf"))[..., 0].contiguous()


def compressed_attention_backward(
    grad_o: Tensor, grad_lse: Tensor | None, o: Tensor, lse: Tensor, q: Tensor, k_cmp: Tensor, v_cmp: Tensor, *,
    l: int, d: int, cu_seqlens: Tensor | None, scale: float, version: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients (dq, dk_cmp, dv_cmp) of `compressed_attention`."""
    runs = Runs.of(q, k_cmp, l=l, d=d, cu_seqlens=cu_seqlens)
    if k_cmp.shape[1] == 0:
        return q.new_zeros(q.shape), k_cmp.new_empty(k_cmp.shape), v_cmp.new_empty(v_cmp.shape)
    folded = [runs.fold(x) for x in (grad_o, o, lse[..., None], q)]
    if grad_lse is not None:
        grad_lse = runs.fold(grad_lse[..., None])[..., 0]
    dq, dk, dv = call_backward(
        version, folded[0], grad_lse, folded[1], folded[2][..., 0], folded[3], k_cmp, v_cmp,
        window=None, ends=runs.ends, scale=scale,
    )  # fmt: skip
    return runs.unfold(dq, 0.0), dk, dv


@dataclass(frozen=True)
class Runs:
    """Queries [b, t, g*h, x] as runs of d that see the same blocks: [b, c, g*d*h, x], run i seeing blocks 0 … i.

    Queries that see no block have no place in a run; places of no query hold 0, which adds nothing to a gradient.
    """

    t: int
    g: int
    l: int
    d: int
    ends: Tensor | None = None
    """Cumulative numbers of runs, and so of blocks, int32 [N + 1], of packed sequences."""
    place: Tensor | None = None
    """For packed sequences the place c*d that each query takes, int64 [t]; c*d for those without."""
    slots: int = 0
    """For packed sequences c."""

    @classmethod
    def of(cls, q: Tensor, k_cmp: Tensor, *, l: int, d: int, cu_seqlens: Tensor | None) -> "Runs":
        t, (_, c, g, _) = q.shape[1], k_cmp.shape
        if cu_seqlens is None:
            return cls(t, g, l, d)
        cu_seqlens = safe_ends(cu_seqlens, t)
        layout = query_layout(q, None, cu_seqlens)
        first, end = (x[0] for x in visible_slots(layout, cu_seqlens, l=l, d=d))
        inside = (layout.position[0] - (l - 1)) % d
        place = torch.where(end > first, (end - 1) * d + inside, c * d).clamp(0, c * d)
        counts = torch.where(cu_seqlens.diff() < l, 0, (cu_seqlens.diff() - l) // d + 1)
        ends = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
        return cls(t, g, l, d, ends.clamp_max(c), place, c)

    def fold(self, x: Tensor) -> Tensor:
        """x [b, t, g*h, x] as runs, contiguous."""
        l, d, g = self.l, self.d, self.g
        if self.place is not None:
            y = x.new_zeros(self.slots * d + 1, *x.shape[2:]).index_copy_(0, self.place, x[0])
            return rearrange(y[:-1], "(c d) (g h) x -> 1 c (g d h) x", d=d, g=g).contiguous()
        full, rest = divmod(self.t - l + 1, d)
        y = x.new_empty(x.shape[0], full + (rest > 0), g, d, x.shape[2] // g, x.shape[3])
        y[:, :full] = rearrange(x[:, l - 1 : self.t - rest], "b (c d) (g h) x -> b c g d h x", d=d, g=g)
        if rest:
            y[:, full, :, :rest] = rearrange(x[:, self.t - rest :], "b d (g h) x -> b g d h x", g=g)
            y[:, full, :, rest:] = 0
        return y.flatten(2, 4)

    def unfold(self, y: Tensor, missing: float) -> Tensor:
        """Runs [b, c, g*d*h, x] as [b, t, g*h, x], with `missing` for queries without a place."""
        l, d, g = self.l, self.d, self.g
        if self.place is not None:
            rows = rearrange(y[0], "c (g d h) x -> (c d) (g h) x", d=d, g=g)
            lost = (self.place == self.slots * d)[:, None, None]
            return rows[self.place.clamp_max(self.slots * d - 1)].masked_fill(lost, missing)[None]
        full, rest = divmod(self.t - l + 1, d)
        x = y.new_empty(y.shape[0], self.t, y.shape[2] // d, y.shape[3])
        x[:, : l - 1] = missing
        y = rearrange(y, "b c (g d h) x -> b c d g h x", d=d, g=g)
        x[:, l - 1 : self.t - rest] = rearrange(y[:, :full], "b c d g h x -> b (c d) (g h) x")
        if rest:
            x[:, self.t - rest :] = rearrange(y[:, full, :rest], "b d g h x -> b d (g h) x")
        return x


def safe_ends(cu_seqlens: Tensor, t: int) -> Tensor:
    """`cu_seqlens` that never falls and stays in 0 … t: flash-attn reads and writes where it points."""
    return cu_seqlens.clamp(0, t).cummax(0).values


def call_forward(
    version: int, q: Tensor, k: Tensor, v: Tensor, *, window: int | None, ends: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """o [b, t, n, d_v] and LSE [b, t, n] of causal attention to the last `window` keys, or all of them.

    `ends` are the cumulative lengths of packed queries and of keys; what lies after them gets 0 and -inf.
    """
    module: Any = importlib.import_module(MODULES[version])
    q, k, v = (x if ends is None else used_part(x, ends) for x in (q, k, v))
    k = k.masked_fill(~v.isfinite().all(-1, keepdim=True), float("nan"))
    q, k, v = aligned(q), aligned(k), aligned(finite(v))
    left, t = None if window is None or window >= k.shape[-3] else window - 1, q.shape[-3]
    with torch.cuda.device_of(q):
        if version == 4:
            packed: dict[str, Any] = {}
            if ends is not None:
                packed = {
                    "cu_seqlens_q": ends,
                    "cu_seqlens_k": ends,
                    "out": q.new_zeros(*q.shape[:-1], v.shape[-1]),
                    "lse": q.new_full((q.shape[1], t), float("-inf"), dtype=torch.float32),
                }
            pack_gqa = False if window is None else None  # enough queries per head without
            o, lse = module._flash_attn_fwd(
                q, k, v, softmax_scale=scale, causal=True, window_size_left=left, window_size_right=0,
                pack_gqa=pack_gqa, return_lse=True, **packed,
            )[:2]  # fmt: skip
        else:
            options: dict[str, Any] = {
                "dropout_p": 0.0, "softmax_scale": scale, "causal": True, "softcap": 0.0, "alibi_slopes": None,
                "window_size_left": -1 if left is None else left, "window_size_right": 0, "return_softmax": False,
            }  # fmt: skip
            if ends is None:
                o, lse = module._flash_attn_forward(q, k, v, **options)[:2]
            else:
                o, lse = module._flash_attn_varlen_forward(q, k, v, ends, ends, t, t, **options, zero_tensors=True)[:2]
    o, lse = (x if ends is None else x[None] for x in (o, lse))
    # the versions give broken queries infinities of either sign
    return o.contiguous(), lse.transpose(1, 2).masked_fill(o[..., 0].isnan(), float("nan")).contiguous()


def call_backward(
    version: int, grad_o: Tensor, grad_lse: Tensor | None, o: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *,
    window: int | None, ends: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients (dq, dk, dv) of `call_forward`, contiguous; those of what lies after `ends` are 0.

    NaN where a query, its LSE or its gradients are broken, and in the keys and values that it sees.
    """
    module: Any = importlib.import_module(MODULES[version])
    lowest, highest = grad_o.aminmax(dim=-1)
    sound = lse.isfinite() & lowest.isfinite() & highest.isfinite()  # of a finite LSE the query is, too
    if grad_lse is not None:
        sound &= grad_lse.isfinite()
    broken = ~sound & (lse != float("-inf"))
    reached = reached_keys(broken, k.shape[2], window, ends)
    dlse, lse_ = (None if x is None else x.masked_fill(~sound, 0.0).transpose(1, 2) for x in (grad_lse, lse))
    q, o, grad_o = (x.masked_fill(~sound.unsqueeze(-1), 0.0) for x in (q, o, grad_o))
    k, v = finite(k), finite(v)
    if ends is not None:
        q, o, grad_o = (x[0] for x in (q, o, grad_o))
        k, v = used_part(k, ends), used_part(v, ends)
        dlse, lse_ = (None if x is None else x[0] for x in (dlse, lse_))
    q, k, v, o, grad_o = (aligned(x) for x in (q, k, v, o, grad_o))
    dlse, lse_ = (None if x is None else x.contiguous() for x in (dlse, lse_))
    left, t = None if window is None or window >= k.shape[-3] else window - 1, q.shape[-3]
    grads = tuple(x.new_empty(x.shape) if ends is None else x.new_zeros(x.shape) for x in (q, k, v))
    options: dict[str, Any] = {
        "softmax_scale": scale, "causal": True, "window_size_right": 0, "softcap": 0.0,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }  # fmt: skip
    with torch.cuda.device_of(q):
        if version == 4:
            if ends is not None:
                options.update(cu_seqlens_q=ends, cu_seqlens_k=ends)
            dq, dk, dv = grads
            module._flash_attn_bwd(
                q, k, v, o, grad_o, lse_, window_size_left=left, dlse=dlse, dq=dq, dk=dk, dv=dv, **options
            )
        else:
            assert dlse is None  # refused by the table
            options.update(dropout_p=0.0, window_size_left=-1 if left is None else left, alibi_slopes=None)
            inputs = (grad_o, q, k, v, o, lse_, *grads)
            if ends is None:
                module._flash_attn_backward(*inputs, **options)
            else:
                module._flash_attn_varlen_backward(*inputs, ends, ends, t, t, **options, zero_tensors=True)
    dq, dk, dv = (x if ends is None else x[None] for x in grads)
    for x, nan in ((dq, broken), (dk, reached), (dv, reached)):
        x.masked_fill_(nan.unsqueeze(-1), float("nan"))
    return dq, dk, dv


def reached_keys(broken: Tensor, g: int, window: int | None, ends: Tensor | None) -> Tensor:
    """Keys [b, s, g] that any of the `broken` queries [b, t, g*h] sees, of s = t; arguments as in `call_forward`."""
    t = broken.shape[1]
    some = rearrange(broken, "b t (g h) -> b t g h", g=g).any(-1)
    before = torch.nn.functional.pad(some.cumsum(1), (0, 0, 1, 0))
    key = torch.arange(t, device=broken.device)
    stop = torch.full_like(key, t)
    if ends is not None:
        ends = ends.long()
        stop = ends[sequence_of(ends, key) + 1]
    if window is not None:
        stop = torch.minimum(stop, key + window)
    return before[:, stop] > before[:, :-1]


def used_part(x: Tensor, ends: Tensor) -> Tensor:
    """Packed x [1, t, ...] as [t, ...] with 0 after the last sequence, since a tile may reach there."""
    return x[0].masked_fill((torch.arange(x.shape[1], device=x.device) >= ends[-1])[:, None, None], 0.0)


def aligned(x: Tensor) -> Tensor:
    """x itself if its rows are whole and start at multiples of 16 bytes, else a contiguous copy."""
    step = 16 // x.element_size()
    rows = zip(x.shape[:-1], x.stride()[:-1], strict=True)
    whole = x.stride(-1) == 1 and all(size == 1 or (stride > 0 and stride % step == 0) for size, stride in rows)
    return x if whole and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)
