"""The branches and the whole as things to check and to time, each with the work it cannot avoid."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nsa_compile.bench.options import DTYPES, Options
from nsa_compile.custom_ops.block_choice import select_blocks
from nsa_compile.custom_ops.compression import compress_mean, compressed_attention
from nsa_compile.custom_ops.dispatch import FLASH_OPS, beside_flash, choose_attention, resolve_impl
from nsa_compile.custom_ops.gating import gated_sum
from nsa_compile.custom_ops.nsa import nsa_attention
from nsa_compile.custom_ops.registration import causal_pairs, compressed_pairs
from nsa_compile.custom_ops.selection import selected_attention
from nsa_compile.custom_ops.window import window_attention
from nsa_compile.ops.selection import token_reads

OPS = {
    "compress": "compress_mean", "compressed": "compressed_attention", "choice": "select_blocks",
    "selected": "selected_attention", "window": "window_attention", "gated_sum": "gated_sum",
    "decode": "decode_attention",
}  # fmt: skip
WHOLE = tuple(op for what, op in OPS.items() if what != "decode")
"""Ops of `nsa_attention` and of what leads to it."""
SPOT = 32
"""Queries of a row that are compared with the reference, at each of three places."""
TOLERANCE = {
    torch.float32: (1e-4, 2e-4), torch.float16: (3e-3, 6e-3), torch.bfloat16: (1e-2, 2e-2),
}  # fmt: skip
"""Largest relative error of outputs and of gradients, in the Frobenius norm over the compared queries."""
OTHER_BLOCKS = 0.01
"""Share of the chosen blocks that may differ from the reference's, which breaks near ties otherwise."""
ALIKE = 0.8
"""Chance that a query keeps a block of the one before it, where neighbours choose alike."""


class Work(NamedTuple):
    """What no implementation can avoid: FLOP of the products, bytes read and written once."""

    flops: float
    bytes: float


class Sampled(NamedTuple):
    """How far a case may be from the reference, and how far it is."""

    error: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """False for NaN too."""
        return self.error <= self.tolerance


@dataclass
class Case:
    """One implementation of one thing, at one size.

    `run()` gives a tensor or a tuple of them, the first `differentiable` of which pass gradients to `inputs`. The first
    `per_query` inputs and the outputs have queries [b, t, ...]; `oracle(part, *inputs)` gives the outputs of a range
    of queries in fp32. `check` replaces that comparison where it does not fit.
    """

    what: str
    impl: str
    run: Callable[[], Any]
    work: tuple[Work, Work | None]
    inputs: tuple[Tensor, ...] = ()
    oracle: Callable[..., Any] | None = None
    per_query: int = 1
    differentiable: int = 1
    check: Callable[[], Sampled] | None = None
    runs: str = ""
    """What the implementation resolved to."""
    op: str = ""
    before: Callable[[], None] | None = None
    """Runs before every call, outside the time."""
    layers: int = 1
    """Layers of one call; times are per layer."""
    capture: Callable[[], Callable[[], None]] | None = None
    """Makes a CUDA graph of `run` (on a CPU, `run` itself), which is then timed in its place."""
    ours: bool = True

    def differs(self, backward: bool) -> Sampled:
        """How far outputs, or gradients, are from the reference in fp32 on sampled queries."""
        if self.check is not None:
            return self.check()
        assert self.oracle is not None
        with torch.set_grad_enabled(backward):
            out = as_tuple(self.run())
        tolerance = TOLERANCE[out[0].dtype][backward]
        t = out[0].shape[1]
        parts = sampled_parts(t) if self.per_query else [slice(0, t)]
        if not backward:
            with torch.no_grad():
                shared = [x.detach().float() for x in self.inputs[self.per_query :]]
                pairs = []
                for part in parts:
                    mine = [x.detach()[:, part].float() for x in self.inputs[: self.per_query]]
                    want = as_tuple(self.oracle(part, *mine, *shared))
                    pairs.append([(o[:, part], w) for o, w in zip(out, want, strict=False)])
            return Sampled(
                max(relative_error(*zip(*same, strict=True)) for same in zip(*pairs, strict=True)), tolerance
            )
        return Sampled(self._gradient_error(out[: self.differentiable], parts), tolerance)

    def _gradient_error(self, out: Sequence[Tensor], parts: list[slice]) -> float:
        assert self.oracle is not None
        generator = torch.Generator(out[0].device).manual_seed(1)
        grads = [torch.zeros_like(o) for o in out]
        for grad in grads:
            for part in parts:
                grad[:, part] = torch.randn(grad[:, part].shape, generator=generator, device=grad.device)
        got = torch.autograd.grad(out, self.inputs, grads)
        n = self.per_query
        shared = [x.detach().float().requires_grad_() for x in self.inputs[n:]]
        sums = [torch.zeros_like(x) for x in shared]
        mine: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(n)]
        for part in parts:
            own = [x.detach()[:, part].float().requires_grad_() for x in self.inputs[:n]]
            want = as_tuple(self.oracle(part, *own, *shared))[: len(out)]
            wanted = torch.autograd.grad(want, [*own, *shared], [g[:, part].float() for g in grads])
            for pairs, g, w in zip(mine, got[:n], wanted[:n], strict=True):
                pairs.append((g[:, part], w))
            for total, w in zip(sums, wanted[n:], strict=True):
                total += w
        errors = [relative_error(*zip(*pairs, strict=True)) for pairs in mine]
        return max([*errors, *(relative_error([g], [w]) for g, w in zip(got[n:], sums, strict=True))])


def as_tuple(x: Any) -> tuple[Tensor, ...]:
    """What a run gave, as a tuple."""
    return x if isinstance(x, tuple) else (x,)


def sampled_parts(t: int) -> list[slice]:
    """Ranges of queries to compare: the first, some in the middle that no tile starts at, the last; few are all."""
    if t <= 5 * SPOT:
        return [slice(0, t)]
    middle = t // 2 - 13
    return [slice(0, SPOT), slice(middle, middle + SPOT), slice(t - SPOT, t)]


def relative_error(got: Iterable[Tensor], want: Iterable[Tensor]) -> float:
    """`|got - want| / |want|` in the Frobenius norm over all of both; equal infinities differ by 0."""
    difference = size = 0.0
    for g, w in zip(got, want, strict=True):
        w = w.detach()
        off = torch.where(g == w, 0.0, g.detach().to(w.dtype) - w)
        difference += float(off.double().square().sum())
        size += float(w.double().masked_fill(w.isinf(), 0.0).square().sum())
    return math.sqrt(difference / max(size, 1e-30)) if math.isfinite(difference) else math.inf


def nbytes(*tensors: Tensor) -> int:
    """Bytes of tensors."""
    return sum(x.nbytes for x in tensors)


class Inputs:
    """Random tensors of one size, each drawn when first asked for and from a seed of its own."""

    def __init__(self, options: Options, tokens: int, heads: int, dtype: torch.dtype) -> None:
        self.options, self.t, self.n, self.dtype = options, tokens, heads, dtype
        self.device = torch.device(options.device)
        self.mean: Any = {"l": options.l, "d": options.d}
        self.sizes: Any = {**self.mean, "l_sel": options.l_sel, "n_sel": options.n_sel}
        self._chosen: dict[str, Tensor] = {}

    def draw(self, seed: int, *shape: int) -> Tensor:
        """Standard normal numbers as a leaf."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(*shape, generator=generator, device=self.device, dtype=self.dtype).requires_grad_()

    @cached_property
    def q(self) -> Tensor:
        """Queries [b, t, n, d_k]."""
        return self.draw(0, self.options.batch, self.t, self.n, self.options.d_k)

    @cached_property
    def gates(self) -> Tensor:
        """Gates [b, t, n, 3]."""
        gates = self.draw(1, self.options.batch, self.t, self.n, 3).detach()
        return torch.softmax(gates, -1).requires_grad_()

    @cached_property
    def kv(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Keys and values [b, t, g, *] of the three branches."""
        o, seeds = self.options, iter(range(2, 8))
        shape = o.batch, self.t, o.groups
        return {x: (self.draw(next(seeds), *shape, o.d_k), self.draw(next(seeds), *shape, o.d_v)) for x in BRANCHES}

    @cached_property
    def cmp(self) -> tuple[Tensor, Tensor]:
        """Means of the compression blocks as leaves."""
        k, v = (compress_mean(x.detach(), **self.mean).requires_grad_() for x in self.kv["cmp"])
        return k, v

    @cached_property
    def lse(self) -> Tensor:
        """LSE of the compressed attention."""
        with torch.no_grad():
            return compressed_attention(self.q, *self.cmp, **self.mean)[1]

    @cached_property
    def branches(self) -> tuple[Tensor, ...]:
        """Stand-ins for the outputs of the branches [b, t, n, d_v]."""
        return tuple(self.draw(seed, self.options.batch, self.t, self.n, self.options.d_v) for seed in (8, 9, 10))

    def chosen(self, impl: str) -> Tensor:
        """The blocks that `nsa_attention` selects."""
        if impl not in self._chosen:
            other = beside_flash(impl)
            with torch.no_grad():
                k, v = (compress_mean(x, **self.mean, impl=other) for x in self.kv["cmp"])
                lse = compressed_attention(self.q, k, v, **self.mean, impl=impl)[1]
                self._chosen[impl] = select_blocks(self.q, k, lse, **self.sizes, impl=other)
        return self._chosen[impl]

    @cached_property
    def heads_first(self) -> tuple[Tensor, ...]:
        """Queries, keys, values [b, t, n, *] as leaves, contiguous as [b, n, t, *] for SDPA and flex."""
        tensors = (self.q, *self.kv["slc"])
        return tuple(y.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for y in tensors)

    def start(self, part: slice) -> Tensor:
        """`q_start` of a range of queries."""
        return torch.full((self.options.batch,), part.start, dtype=torch.int32, device=self.device)

    def heads_of(self, pairs: int) -> int:
        """(query, key) pairs of all rows and heads, from those of one."""
        return self.options.batch * self.n * pairs

    def pairs(self, branch: str, blocks: Tensor | None = None) -> int:
        """(query, key) pairs of all rows and heads of a branch; of the selection from the blocks at hand."""
        o, t = self.options, self.t
        if branch == "cmp":
            return self.heads_of(compressed_pairs(t, self.cmp[0].shape[1], o.l, o.d, False))
        if branch == "win":
            return self.heads_of(causal_pairs(t, o.w, False))
        assert blocks is not None
        position = torch.arange(t, device=self.device).expand(o.batch, t)
        reads = token_reads(position, blocks, l=o.l, d=o.d, l_sel=o.l_sel, w=o.w)
        return int(reads.actual[..., 1].sum()) * (self.n // o.groups)


BRANCHES = ("cmp", "slc", "win")


def neighbouring_blocks(x: Inputs, rho: float) -> Tensor:
    """Blocks [b, t, g, n_sel] as `draw_blocks` draws them, the same for all rows."""
    o = x.options
    blocks = draw_blocks(x.t, o.groups, rho, n_sel=o.n_sel, l_sel=o.l_sel, device=x.device)
    return blocks.expand(o.batch, -1, -1, -1).contiguous()


def draw_blocks(t: int, g: int, rho: float, *, n_sel: int, l_sel: int, device: torch.device | str) -> Tensor:
    """Blocks [1, t, g, n_sel] of which each free one is kept by the next query with chance rho, else drawn anew."""
    generator = torch.Generator(device).manual_seed(0)
    n_blocks = -(-t // l_sel)
    block, own = torch.arange(n_blocks, device=device), torch.arange(t, device=device)[:, None] // l_sel
    per_group = []
    for _ in range(g):
        scores = torch.rand(t, n_blocks, generator=generator, device=device)
        if rho > 0:
            moved = torch.rand(t, n_blocks, generator=generator, device=device) > rho
            # a block's score is the last one drawn for it: the index of the last move at or before t
            last = torch.where(moved, torch.arange(t, device=device)[:, None], 0).cummax(0).values
            scores = scores.gather(0, last)
            del moved, last
        scores = scores.masked_fill_((block == 0) | (block > own - 2), 2.0).masked_fill_(block > own, -1.0)
        top = scores.topk(min(n_sel, n_blocks), -1)
        chosen = top.indices.masked_fill(top.values < 0, n_blocks).sort(-1).values
        chosen = nn.functional.pad(chosen, (0, n_sel - chosen.shape[-1]), value=n_blocks)
        per_group.append(chosen.masked_fill(chosen == n_blocks, -1).int())
    return torch.stack(per_group, 1)[None]


def attention_work(inputs: tuple[Tensor, ...], pairs: int, *more: Tensor) -> tuple[Work, Work]:
    """Work of an attention and of its gradient over (query, key) pairs of all heads; `more` is read besides q, k, v."""
    q, k, v = inputs
    b, t, n, d_k = q.shape
    d_v = v.shape[-1]
    read, o, lse = nbytes(q, k, v, *more), b * t * n * d_v * q.element_size(), b * t * n * 4
    forward = Work(2 * pairs * (d_k + d_v), read + o + lse)
    return forward, Work(2 * pairs * (3 * d_k + 2 * d_v), read + 2 * o + lse + nbytes(q, k, v))


def resolved_impl(x: Inputs, op: str, impl: str) -> str:
    """What `impl` means for an op on these tensors, "forward, backward" where that is not the same."""
    o = x.options
    if op not in FLASH_OPS or impl != "auto":
        return resolve_impl(op, impl, x.device, x.dtype, max(o.d_k, o.d_v)).impl
    fold = o.d if op == OPS["compressed"] else 1
    choose = partial(choose_attention, op, impl, x.q, x.kv["win"][1], q_start=None, cu_seqlens=None, fold=fold)
    return ", ".join(dict.fromkeys(choose(backward=backward).impl for backward in (False, True)))


def implementations(x: Inputs, *ops: str) -> list[tuple[str, str]]:
    """(asked, what it resolves to) of the wanted implementations that all of these ops have here.

    Several ops are the whole attention, in which "flash" means "auto" for the ops that flash-attn does not have.
    """
    wanted = x.options.impls
    found: dict[str, str] = {}
    for impl in wanted or (("auto", "flash") if x.device.type == "cuda" else ("auto",)):
        try:
            resolved = dict.fromkeys(resolved_impl(x, op, impl_in(ops, op, impl)) for op in ops)
        except ValueError:
            continue
        runs = " + ".join(resolved)
        if wanted is not None or runs not in found.values():
            found[impl] = runs
    return list(found.items())


def impl_in(ops: Sequence[str], op: str, impl: str) -> str:
    """What an implementation of some ops together means for one of them."""
    return beside_flash(impl) if len(ops) > 1 and op not in FLASH_OPS else impl


def check_impls(options: Options) -> list[str]:
    """What will not be timed as asked, and why. Raises ValueError for an implementation that nothing to time has."""
    width, left_out = max(options.d_k, options.d_v), []
    for impl in options.impls or ():
        refused = []
        for what in options.what:
            ops = (OPS[what],) if what in OPS else WHOLE
            for dtype in options.dtypes:
                try:
                    for op in ops:
                        resolve_impl(op, impl_in(ops, op, impl), options.device, DTYPES[dtype], width)
                except ValueError as error:
                    refused.append((f"{what} by {impl} in {dtype}: {error}", error))
        if len(refused) == len(options.what) * len(options.dtypes):
            raise refused[0][1]
        left_out += [line for line, _ in refused]
    return left_out


def compress_cases(x: Inputs) -> list[Case]:
    """Block means of keys and values."""
    k, v = x.kv["cmp"]
    work = Work(sum(m.numel() * x.options.l for m in x.cmp), nbytes(k, v, *x.cmp))

    def means(impl: str, k: Tensor, v: Tensor) -> Any:
        return tuple(compress_mean(y, **x.mean, impl=impl) for y in (k, v))

    def oracle(part: slice, *kv: Tensor) -> Any:
        return means("reference", *kv)

    return [
        Case(
            "compress", impl, partial(means, impl, k, v), (work, work), (k, v), oracle, per_query=0, differentiable=2,
            runs=runs, op=OPS["compress"],
        )
        for impl, runs in implementations(x, OPS["compress"])
    ]  # fmt: skip


def compressed_cases(x: Inputs) -> list[Case]:
    """Attention to the compressed tokens."""
    inputs = (x.q, *x.cmp)
    work = attention_work(inputs, x.pairs("cmp"))

    def oracle(part: slice, *qkv: Tensor) -> Any:
        return compressed_attention(*qkv, **x.mean, q_start=x.start(part), impl="reference")

    return [
        Case(
            "compressed", impl, partial(compressed_attention, *inputs, **x.mean, impl=impl), work, inputs,
            oracle, runs=runs, op=OPS["compressed"],
        )
        for impl, runs in implementations(x, OPS["compressed"])
    ]  # fmt: skip


def choice_cases(x: Inputs) -> list[Case]:
    """The choice of blocks."""
    q, k, lse = x.q.detach(), x.cmp[0].detach(), x.lse
    indices = x.options.batch * x.t * x.options.groups * x.options.n_sel * 4
    work = Work(2 * x.pairs("cmp") * q.shape[-1], nbytes(q, k, lse) + indices)

    def check(impl: str) -> Sampled:
        blocks, k32, same, most = select_blocks(q, k, lse, **x.sizes, impl=impl), k.float(), 0, 0
        for part in sampled_parts(x.t):
            want = select_blocks(
                q[:, part].float(), k32, lse[:, part], **x.sizes, q_start=x.start(part), impl="reference"
            )
            got = blocks[:, part]
            same += int(((got[..., None] == want[..., None, :]) & (got[..., None] >= 0)).sum())
            most += max(int((got >= 0).sum()), int((want >= 0).sum()))
        return Sampled(1 - same / most, OTHER_BLOCKS)

    return [
        Case(
            "choice", impl, partial(select_blocks, q, k, lse, **x.sizes, impl=impl), (work, None),
            check=partial(check, impl), runs=runs, op=OPS["choice"],
        )
        for impl, runs in implementations(x, OPS["choice"])
    ]  # fmt: skip


def selected_cases(x: Inputs) -> list[Case]:
    """Attention to selected blocks: random ones, and ones that neighbouring queries share."""
    inputs = (x.q, *x.kv["slc"])
    cases = []
    for name, rho in (("selected, random", 0.0), (f"selected, rho {ALIKE}", ALIKE)):
        blocks = neighbouring_blocks(x, rho)

        def run(impl: str, blocks: Tensor = blocks) -> Any:
            return selected_attention(x.q, *x.kv["slc"], blocks, l_sel=x.options.l_sel, impl=impl)

        def oracle(part: slice, q: Tensor, k: Tensor, v: Tensor, blocks: Tensor = blocks) -> Any:
            at: Any = {"l_sel": x.options.l_sel, "q_start": x.start(part), "impl": "reference"}
            return selected_attention(q, k, v, blocks[:, part].contiguous(), **at)

        work = attention_work(inputs, x.pairs("slc", blocks), blocks)
        cases += [
            Case(name, impl, partial(run, impl), work, inputs, oracle, runs=runs, op=OPS["selected"])
            for impl, runs in implementations(x, OPS["selected"])
        ]
    return cases


def window_cases(x: Inputs) -> list[Case]:
    """Sliding-window attention."""
    inputs = (x.q, *x.kv["win"])
    work = attention_work(inputs, x.pairs("win"))
    return [
        Case(
            "window", impl, partial(window_attention, *inputs, w=x.options.w, impl=impl), work, inputs,
            partial(window_oracle, x, x.options.w), runs=runs, op=OPS["window"],
        )
        for impl, runs in implementations(x, OPS["window"])
    ]  # fmt: skip


def window_oracle(x: Inputs, w: int, part: slice, *qkv: Tensor) -> Any:
    """Window attention of a range of queries; dense causal attention where w is all tokens."""
    return window_attention(*qkv, w=w, q_start=x.start(part), impl="reference")


def gated_sum_cases(x: Inputs) -> list[Case]:
    """The mixture of the branches."""
    inputs = (*x.branches, x.gates)
    o = x.branches[0]

    def oracle(part: slice, *mine: Tensor) -> Any:
        return gated_sum(*mine, impl="reference")

    work = Work(6 * o.numel(), nbytes(*inputs, o)), Work(9 * o.numel(), 2 * nbytes(*inputs) + nbytes(o))
    return [
        Case(
            "gated_sum", impl, partial(gated_sum, *inputs, impl=impl), work, inputs,
            oracle, per_query=4, runs=runs, op=OPS["gated_sum"],
        )
        for impl, runs in implementations(x, OPS["gated_sum"])
    ]  # fmt: skip


def nsa_cases(x: Inputs) -> list[Case]:
    """The whole: block means, three branches, choice and mixture."""
    o, slc, win = x.options, x.kv["slc"], x.kv["win"]
    inputs = (x.q, x.gates, *x.kv["cmp"], *slc, *win)

    def run(impl: str) -> Tensor:
        k_cmp, v_cmp = (compress_mean(y, **x.mean, impl=beside_flash(impl)) for y in x.kv["cmp"])
        return nsa_attention(x.q, k_cmp, v_cmp, *slc, *win, x.gates, **x.sizes | {"w": o.w, "impl": impl})

    def oracle(impl: str, part: slice, q: Tensor, gates: Tensor, *kv: Tensor) -> Tensor:
        k_slc, v_slc, k_win, v_win = kv[2:]
        at: Any = {"q_start": x.start(part), "impl": "reference"}
        k_cmp, v_cmp = (compress_mean(y, **x.mean, impl="reference") for y in kv[:2])
        blocks = x.chosen(impl)[:, part].contiguous()  # as chosen in the type at hand: near ties are no error here
        branches = (
            compressed_attention(q, k_cmp, v_cmp, **x.mean | at)[0],
            selected_attention(q, k_slc, v_slc, blocks, **{"l_sel": o.l_sel} | at)[0],
            window_attention(q, k_win, v_win, w=o.w, **at)[0],
        )
        return gated_sum(*branches, gates, impl="reference")

    cases = []
    for impl, runs in implementations(x, *WHOLE):
        pairs = x.pairs("cmp") + x.pairs("win") + x.pairs("slc", x.chosen(impl))
        choice = 2 * x.pairs("cmp") * o.d_k
        out = o.batch * x.t * x.n * o.d_v * x.q.element_size()
        work = (
            Work(2 * pairs * (o.d_k + o.d_v) + choice, nbytes(*inputs) + out),
            Work(2 * pairs * (3 * o.d_k + 2 * o.d_v), 2 * nbytes(*inputs) + out),
        )
        cases.append(
            Case(
                "nsa", impl, partial(run, impl), work, inputs, partial(oracle, impl), per_query=2, runs=runs,
                op="nsa_attention",
            )
        )  # fmt: skip
    return cases


BUILDERS: dict[str, Callable[[Inputs], list[Case]]] = {
    "compress": compress_cases, "compressed": compressed_cases, "choice": choice_cases, "selected": selected_cases,
    "window": window_cases, "gated_sum": gated_sum_cases, "nsa": nsa_cases,
}  # fmt: skip
