"""The attention ops of the package against the dense oracle: of one configuration all that the contract says.

A family is what kernels are compiled for; a case is a row length, a place, contents, layouts in memory.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import block_checks
import dense_oracle as oracle
import draws
import torch
from bounds import Bound, bound_attention, bound_mean, epsilons, judge
from torch import Tensor

import nsa_compile

KIND = "ops"
CASES = 20
"""Cases of a family."""


class Limits(NamedTuple):
    """How large a case may be: groups, heads of a group, channels, l_sel, n_sel, w, (query head, key) pairs."""

    groups: int
    heads: int
    channels: int
    block: int
    chosen: int
    window: int
    pairs: int


SIZES = {
    "gpu": Limits(8, 64, 256, 256, 32, 1024, 2**28),
    "cpu": Limits(3, 8, 48, 24, 8, 100, 2**19),
    "interpreter": Limits(2, 4, 24, 12, 5, 12, 2**12),
}
"""Limits by where cases run: kernels on a GPU, the reference on a CPU, kernels in Triton's interpreter."""
PAIRS_OF_GROUP = 2**26
"""Most (query head, key) pairs of a row and group, and (query, group, block) triples of a case: the oracle's memory."""


def draw_family(rng: random.Random, size: str = "gpu") -> dict[str, Any]:
    """Values that kernels are compiled for; `size` is one of SIZES."""
    most = SIZES[size]
    types = {"fp32": 3, "bf16": 3.5, "fp16": 3.5}
    impl = {"cpu": "reference", "interpreter": "triton"}.get(size) or draws.weighted(rng, {"auto": 9, "reference": 1})
    if size == "interpreter":
        del types["bf16"]  # the interpreter's arithmetic in it is wrong
    elif impl == "reference":
        types["fp64"] = 3
    l, d, l_sel = draws.blocks(rng, most.block)
    dtype = draws.weighted(rng, types)
    # wide kernels in fp32 take a compiler most of a minute each
    channels = min(most.channels, 64) if dtype == "fp32" and rng.random() < 0.8 else most.channels
    return {
        "impl": impl,
        "dtype": dtype,
        "g": rng.randint(1, most.groups),
        "h": draws.heads(rng, most.heads),
        "d_k": draws.width(rng, channels),
        "d_v": draws.width(rng, channels),
        **{"l": l, "d": d, "l_sel": l_sel},
        **draws.selection(rng, most.chosen),
        "w": draws.near(rng, (1, 8, 16, 64, 100), 1, most.window),
        "negative": rng.random() < 0.2,
        "sixteens": rng.random() < 0.4,  # lengths that 16 divides are a compiler's special case
        # what strides and lengths are divisible by is compiled for, so one layout and one kind of places for all cases
        "layouts": {name: draws.weighted(rng, draws.LAYOUTS) for name in ("q", "k", "v", "grad_o", "gates")},
        "mode": draws.weighted(rng, {"rows": 3, "packed": 3, "start": 2, "both": 2}),
        "queries": draws.weighted(rng, {"one": 1, "few": 2, "many": 3}),  # with q_start
        "lengths": rng.randrange(2**31),  # for the same reason its cases share four of them
        "whole": rng.random() < 0.5,
        "size": size,
    }


def draw_case(family: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """Lengths, places, contents and layouts."""
    packed, start = family["mode"] in ("packed", "both"), family["mode"] in ("start", "both")
    mine, rng = rng, random.Random(f"{family['lengths']}/{rng.randrange(4)}")
    b = 1 if packed else draws.weighted(rng, {1: 4, 2: 4, 3: 2})
    units = [family["l"], family["d"], family["l_sel"], family["w"], 16, 64, 128]
    most, chosen = most_tokens(family, b, rng), family["n_sel"] * family["l_sel"]
    s = draws.length(rng, units, most)
    if rng.random() < 0.4:  # long enough for blocks to be left out
        s = min(most, draws.log_uniform(rng, chosen, 6 * chosen))
    s = draws.multiple(s, family["sixteens"])
    t = s
    if start and family["queries"] == "many":
        t = min(s, draws.multiple(draws.length(rng, units, s), family["sixteens"]))
    elif start:
        t = min(s, 1 if family["queries"] == "one" else rng.randint(2, 8))
    cuts, rng = draws.cuts(rng, t, family["sixteens"]), mine
    case = {
        "seed": rng.randrange(2**31),
        "b": b,
        "t": t,
        "s": s,
        "q_start": [rng.choice((0, s - t, rng.randint(0, s - t))) for _ in range(b)] if start else None,
        "cu_seqlens": draws.packing(rng, s) if packed else None,
        "scale": draws.scale(rng, family["d_k"], family["negative"]),
        "contents": {
            "q": draws.weighted(rng, {"normal": 6, "zeros": 1.5, "grid": 1, "few": 1}),
            "k": draws.weighted(rng, {"normal": 6, "few": 1, "grid": 1, "constant": 1}),
            "v": draws.weighted(rng, {"normal": 6, "constant": 1, "few": 1}),
            "grad_o": draws.weighted(rng, {"normal": 6, "ones": 1, "zeros": 0.5}),
        },
        "q_size": draws.weighted(rng, {1.0: 5, 3.0: 4, 30.0: 1}),
        "poison": draws.weighted(rng, {"none": 1, "nan": 3, "inf": 1, "mixed": 2}),
        "grads": draws.weighted(rng, {"o": 4, "both": 4, "lse": 1}),
        "lists": draws.weighted(rng, {"chosen": 3, "random": 1}),
        "deterministic": rng.random() < 0.3,
        "isolate": draws.weighted(rng, {None: 2, "future": 1, "sequence" if packed else "row": 2}),
        "cuts": cuts if rng.random() < 0.4 else [],
        "whole": family["whole"] and rng.random() < 0.7,
    }
    if family["size"] == "interpreter":  # minutes are few: one of three
        kept = rng.choice(("isolate", "cuts", "whole"))
        case |= {name: none for name, none in (("isolate", None), ("cuts", []), ("whole", False)) if name != kept}
    return case


def most_tokens(family: dict[str, Any], b: int, rng: random.Random) -> int:
    """Keys that a case may have: most cases are an eighth of the largest in work."""
    pairs = SIZES[family["size"]].pairs // (1 if rng.random() < 0.1 else 8)
    squares = (
        pairs // (b * family["g"] * family["h"]),
        PAIRS_OF_GROUP // family["h"],
        PAIRS_OF_GROUP * family["l_sel"] // (b * family["g"] * 4),
    )
    return min(3000, max(4, math.isqrt(min(squares))))


@dataclass
class World:
    """A case made real: sizes, places, tensors, and the failures found in it."""

    family: dict[str, Any]
    case: dict[str, Any]
    device: str
    failures: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        f, c = self.family, self.case
        self.dtype = draws.DTYPES[f["dtype"]]
        self.b, self.t, self.s, self.g, self.n = c["b"], c["t"], c["s"], f["g"], f["g"] * f["h"]
        self.gen = draws.generator(c["seed"], self.device)
        self.rng = random.Random(c["seed"])
        self.scale = oracle_scale(c["scale"], f["d_k"])
        self.where = {
            name: draws.ints(c[name], self.device) for name in ("q_start", "cu_seqlens") if c[name] is not None
        }
        self.how = {"scale": c["scale"], "impl": f["impl"]}
        self.blocks = {name: f[name] for name in ("l", "d")}
        self.choice = {name: f[name] for name in ("l_sel", "n_sel", "init_blocks", "local_blocks")}
        self.places = oracle.positions(self.b, self.t, self.s, **self.where, device=self.device)

    @property
    def cu_seqlens(self) -> Tensor | None:
        return self.where.get("cu_seqlens")

    @cached_property
    def victims(self) -> Tensor | None:
        """The queries bool [b, t] that are to be spoilt: a row, a sequence or the future; None if there is no such."""
        kind, index = self.case["isolate"], torch.arange(self.t, device=self.device)
        chosen = None
        if kind == "row" and self.b > 1:
            chosen = torch.arange(self.b, device=self.device)[:, None].expand(-1, self.t) == self.rng.randrange(self.b)
        if kind == "sequence" and self.cu_seqlens is not None and bool(self.places.valid.any()):
            firsts = self.places.first[self.places.valid].unique()
            chosen = self.places.valid & (self.places.first == firsts[self.rng.randrange(len(firsts))])
        if kind == "future" and self.t > 1:
            chosen = (index >= self.rng.randrange(1, self.t)).expand(self.b, -1)
        return None if chosen is None or bool(chosen.all()) else chosen

    def draw(self, name: str, *size: int, factor: float = 1.0) -> Tensor:
        """A tensor of the case's type, with the content and such repetitions as its layout asks for; contiguous."""
        x = draws.fill(size, self.case["contents"].get(name, "normal"), self.gen) * factor
        return draws.repeats(x, self.layout(name)).to(self.dtype)

    def layout(self, name: str) -> str:
        return self.family["layouts"].get(name, "contiguous")

    def spoil(self, name: str, x: Tensor, hidden: Tensor, *more: tuple[Tensor, str]) -> Tensor:
        """x with the case's poison where `hidden` (leading axes), and with others where told, in its layout.

        A layout that repeats numbers holds none that differ.
        """
        layout, spoilt = self.layout(name), [(hidden, self.case["poison"]), *more]
        spoilt = [(where, kind) for where, kind in spoilt if kind != "none" and bool(where.any())]
        if layout in ("one_group", "one_row") and (spoilt or self.victims is not None):
            layout = "contiguous"
        for where, kind in spoilt:
            x = draws.poison(x, where, kind, self.gen)
        return draws.arrange(x, layout)

    def expect(self, right: bool, message: str) -> None:
        if not right:
            self.failures.append(message)


def oracle_scale(scale: float | None, d_k: int) -> float:
    return d_k**-0.5 if scale is None else scale


@contextmanager
def deterministic_algorithms(on: bool):
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(on)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def leaves_of(tensors: list[Tensor]) -> list[Tensor]:
    return [x.detach().requires_grad_() for x in tensors]


def differentiate(world: World, call: Callable[..., Any], given: list[Tensor], grads: list[Tensor | None]):
    """Outputs and gradients of `call(*given)`, which gives a tuple; twice, the same bits, when deterministic."""
    results = []
    on = world.case["deterministic"]
    with deterministic_algorithms(on):
        for _ in range(2 if on else 1):
            leaves = leaves_of(given)
            outputs = call(*leaves)
            pairs = [(x, y) for x, y in zip(outputs, grads, strict=True) if y is not None]
            got = torch.autograd.grad([x for x, _ in pairs], leaves, [y for _, y in pairs])
            results.append(([x.detach() for x in outputs], list(got)))
    return *results[0], on and not all(map(draws.same_bits, results[0][1], results[1][1]))


@dataclass
class Branch:
    """An attention op: `call(q, k, v, part, where)` of a range of queries gives (o, lse); which keys a query sees."""

    name: str
    tensors: list[Tensor]
    """q, k, v: finite, contiguous."""
    visible: Tensor
    """bool [b, t, 1 or g, s]"""
    call: Callable[..., tuple[Tensor, Tensor]]


def shown_to(branch: Branch, queries: Tensor) -> Tensor:
    """Keys bool [b, s, 1 or g] that some of the queries bool [b, t] see."""
    return (branch.visible & queries[..., None, None]).any(1).transpose(1, 2)


def hidden_keys(world: World, branch: Branch, queries: Tensor | None = None) -> Tensor:
    """Keys bool [b, s, g] that none of the queries (default: all) sees."""
    everyone = torch.ones_like(world.places.valid)
    return ~shown_to(branch, everyone if queries is None else queries).expand(-1, -1, world.g)


def lay_out(world: World, branch: Branch, victims: Tensor | None = None, kind: str = "none") -> list[Tensor]:
    """q, k, v in their layouts, spoilt where no query may look; by `kind` also the victims and what only they see."""
    hidden = hidden_keys(world, branch)
    more: list[tuple[Tensor, ...]] = [(), ()]
    if victims is not None:
        more = [((victims, kind),), ((hidden_keys(world, branch, ~victims), kind),)]
    q, k, v = branch.tensors
    return [
        world.spoil("q", q, ~world.places.valid, *more[0]),
        world.spoil("k", k, hidden, *more[1]),
        world.spoil("v", v, hidden, *more[1]),
    ]


def gradients_for(world: World, d_v: int) -> list[Tensor | None]:
    """grad_o [b, t, n, d_v] in a layout of its own and grad_lse, None for what is not differentiated."""
    size, which = (world.b, world.t, world.n, d_v), world.case["grads"]
    lse_type = torch.promote_types(world.dtype, torch.float32)
    if world.case["contents"]["grad_o"] == "ones":
        grad_o = torch.ones((), dtype=world.dtype, device=world.device).expand(size)
    else:
        grad_o = draws.arrange(world.draw("grad_o", *size), world.layout("grad_o"))
    grad_lse = torch.randn(*size[:3], generator=world.gen, device=world.device, dtype=lse_type)
    return [None if which == "lse" else grad_o, None if which == "o" else grad_lse]


def check_branch(world: World, branch: Branch) -> list[Tensor]:
    """Everything that holds for an attention op; returns the tensors it was given, in their layouts."""
    full, name = slice(0, world.t), branch.name
    given = lay_out(world, branch)
    grads = gradients_for(world, given[2].shape[-1])
    before = [draws.storage_bits(x) for x in (*given, *(x for x in grads if x is not None))]

    def call(q, k, v):
        return branch.call(q, k, v, full, world.where)

    outputs, found, unsteady = differentiate(world, call, given, grads)
    world.expect(not unsteady, f"{name}: gradients of two calls differ in bits, in deterministic mode")
    again = call(*given)
    for what, x, y in zip(("o", "lse"), outputs, again, strict=True):
        world.expect(draws.same_bits(x, y), f"{name} {what}: two calls differ in bits")
    after = [draws.storage_bits(x) for x in (*given, *(x for x in grads if x is not None))]
    world.expect(all(map(torch.equal, before, after)), f"{name}: an input was written to")

    bounds = bound_attention(*branch.tensors, branch.visible, world.scale, *grads, world.dtype)
    for what, x in zip(("o", "lse", "q", "k", "v"), [*outputs, *found], strict=True):
        world.failures += judge(f"{name} {what if what in ('o', 'lse') else 'd' + what}", x, bounds[what])
    check_isolation(world, branch, grads, outputs, found, bounds)
    check_chunks(world, branch, given, bounds)
    return given


def check_isolation(world, branch, grads, outputs, found, bounds) -> None:
    """NaN and infinity in some queries and in all keys that the others do not see leave the others alone."""
    victims = world.victims
    if victims is None:
        return
    others, kind = ~victims, "nan" if world.rng.random() < 0.6 else "mixed"
    hidden = hidden_keys(world, branch, others)
    with deterministic_algorithms(world.case["deterministic"]):
        leaves = leaves_of(lay_out(world, branch, victims, kind))
        spoilt = branch.call(*leaves, slice(0, world.t), world.where)
        pairs = [(x, y) for x, y in zip(spoilt, grads, strict=True) if y is not None]
        dq, dk, dv = torch.autograd.grad([x for x, _ in pairs], leaves, [y for _, y in pairs])
    what = f"{branch.name}: {world.case['isolate']} spoilt by {kind},"
    for name, x, y in zip(("o", "lse", "dq"), (*outputs, found[0]), (*spoilt, dq), strict=True):
        world.expect(draws.same_numbers(x[others], y.detach()[others]), f"{what} other {name} changed")
    if world.case["isolate"] != "future":
        for name, x in (("k", dk), ("v", dv)):
            world.failures += judge(f"{what} other d{name}", x, bounds[name], ~hidden)
    if kind == "nan":
        sees = branch.visible.any(-1).expand(-1, -1, world.g).repeat_interleave(world.n // world.g, 2)
        lost = spoilt[0].detach()[sees & victims.unsqueeze(-1)]
        world.expect(bool(lost.isnan().all()), f"{what} but its own o is not NaN everywhere")


def chunks(world: World) -> list[tuple[slice, dict[str, Tensor]]]:
    """Ranges of queries and where they stand."""
    start = world.where.get("q_start", torch.zeros(world.b, dtype=torch.int32, device=world.device))
    ends = [0, *world.case["cuts"], world.t] if world.case["cuts"] else []
    return [(slice(a, z), {**world.where, "q_start": start + a}) for a, z in pairwise(ends)]


def check_chunks(world: World, branch: Branch, given: list[Tensor], bounds: dict[str, Bound]) -> None:
    """Ranges of the queries alone, placed by q_start, give what they give in the whole."""
    q, k, v = given
    for part, where in chunks(world):
        results = branch.call(q[:, part], k, v, part, where)
        for what, x in zip(("o", "lse"), results, strict=True):
            world.failures += judge(f"{branch.name} {what} of queries {part.start}:{part.stop}", x,
                                    bounds[what].part(slice(None), part))  # fmt: skip


def check_means(world: World, name: str, x: Tensor) -> Tensor:
    """`compress_mean` of x [b, s, g, *] and its gradient; returns the means."""
    f, cu_seqlens = world.family, world.cu_seqlens
    covered = torch.zeros(world.b, world.s, dtype=torch.bool, device=world.device)
    ends = cu_seqlens.tolist() if cu_seqlens is not None else [0, world.s]
    for first, end in pairwise(ends):
        count = 0 if end - first < f["l"] else (end - first - f["l"]) // f["d"] + 1
        covered[:, first : first + ((count - 1) * f["d"] + f["l"] if count else 0)] = True
    given = world.spoil(name[0], x, ~covered)
    before = draws.storage_bits(given)

    def mean(y: Tensor) -> tuple[Tensor]:
        return (nsa_compile.compress_mean(y, **world.blocks, cu_seqlens=cu_seqlens, impl=f["impl"]),)

    c = oracle.compress_mean(x[:1, :, :1, :1].float(), f["l"], f["d"], cu_seqlens).shape[1]
    grad = draws.fill((world.b, c, world.g, x.shape[-1]), "normal", world.gen).to(world.dtype)
    (means,), (found,), unsteady = differentiate(world, mean, [given], [grad])
    world.expect(not unsteady, f"means of {name}: gradients of two calls differ in bits, in deterministic mode")
    world.expect(draws.same_bits(means, mean(given)[0]), f"means of {name}: two calls differ in bits")
    world.expect(torch.equal(before, draws.storage_bits(given)), f"means of {name}: the input was written to")
    bounds = bound_mean(x, f["l"], f["d"], cu_seqlens, world.dtype, grad)
    world.failures += judge(f"means of {name}", means, bounds["k_cmp"]) + judge(f"means d{name}", found, bounds["k"])
    return means if bool(means.isfinite().all()) else bounds["k_cmp"].exact.to(world.dtype)


def check_blocks(world: World, branch: Branch, given: list[Tensor]) -> Tensor:
    """The choice of blocks; returns it, or the oracle's if it breaks a rule that the next op relies on."""
    (q, k_cmp, v_cmp), sizes = given, {**world.blocks, **world.choice}
    full = slice(0, world.t)

    def choose(q: Tensor, k: Tensor, v: Tensor, part: slice, where: dict[str, Tensor]) -> Tensor:
        _, lse = branch.call(q[:, part], k, v, part, where)
        return nsa_compile.select_blocks(q[:, part], k, lse, **sizes, **where, **world.how)

    lists = choose(q, k_cmp, v_cmp, full, world.where)
    for _ in range(3):
        again = choose(q, k_cmp, v_cmp, full, world.where)
        world.expect(draws.same_bits(lists, again), "blocks: two calls differ")
    scores = block_checks.bound_scores(
        branch.tensors[0], branch.tensors[1], world.where, world.scale, world.dtype, **world.blocks,
        l_sel=world.choice["l_sel"],
    )  # fmt: skip
    wrong = block_checks.judge(lists, scores, world.places.position, **world.choice)
    in_order = not wrong
    world.failures += [f"blocks: {x}" for x in wrong]
    victims = world.victims
    if victims is not None:
        other = choose(*lay_out(world, branch, victims, "nan"), full, world.where)
        world.expect(
            torch.equal(lists[~victims], other[~victims]), f"blocks: {world.case['isolate']} spoilt, others changed"
        )
    for part, where in chunks(world):
        got = choose(q, k_cmp, v_cmp, part, where)
        wrong = block_checks.judge(got, scores.part(part), world.places.position[:, part], **world.choice)
        world.failures += [f"blocks of queries {part.start}:{part.stop}: {x}" for x in wrong]
    return lists if in_order else oracle.choose(scores.exact, world.places.position, **world.choice).int()


def random_lists(world: World) -> Tensor:
    """Lists int32 [b, t, g, n_sel] of any blocks up to the query's own, ascending, some of them empty."""
    n_sel, l_sel = world.choice["n_sel"], world.choice["l_sel"]
    position = world.places.position
    blocks = oracle.n_blocks(world.places, l_sel)
    started = torch.arange(blocks, device=world.device) <= (position // l_sel)[..., None, None]
    rank = torch.rand(world.b, world.t, world.g, blocks, generator=world.gen, device=world.device)
    count = torch.randint(0, n_sel + 1, (*rank.shape[:3], 1), generator=world.gen, device=world.device)
    order = rank.masked_fill(~started | (position < 0)[..., None, None], -1.0).sort(-1, descending=True)
    taken = (order.values >= 0) & (torch.arange(blocks, device=world.device) < count)
    lists = torch.where(taken, order.indices, blocks)[..., :n_sel]
    lists = torch.nn.functional.pad(lists, (0, n_sel - lists.shape[-1]), value=blocks).sort(-1).values
    return torch.where(lists == blocks, -1, lists).int()


def run_case(family: dict[str, Any], case: dict[str, Any], device: str) -> list[str]:
    """What is wrong with the attention ops in one case; one line each."""
    world = World(family, case, device)
    f = family
    q = world.draw("q", world.b, world.t, world.n, f["d_k"], factor=case["q_size"])
    keys = [world.draw("k", world.b, world.s, world.g, f["d_k"]) for _ in range(3)]
    values = [world.draw("v", world.b, world.s, world.g, f["d_v"]) for _ in range(3)]
    k_cmp, v_cmp = check_means(world, "k", keys[0]), check_means(world, "v", values[0])
    compressed = oracle.slots(k_cmp.shape[1], f["l"], f["d"], world.cu_seqlens, device)

    def attend_compressed(q, k, v, part, where):
        return nsa_compile.compressed_attention(q, k, v, **world.blocks, **where, **world.how)

    def attend_selected(q, k, v, part, where):
        return nsa_compile.selected_attention(q, k, v, lists[:, part], l_sel=f["l_sel"], **where, **world.how)

    def attend_window(q, k, v, part, where):
        return nsa_compile.window_attention(q, k, v, w=f["w"], **where, **world.how)

    visible = oracle.sees_compressed(world.places, compressed, f["l"], f["d"])
    cmp = Branch("compressed", [q, k_cmp, v_cmp], visible, attend_compressed)
    given = check_branch(world, cmp)
    chosen = check_blocks(world, cmp, given)
    lists = chosen if case["lists"] == "chosen" else random_lists(world)
    if world.layout("k") in ("heads_first", "channels_first"):
        lists = draws.arrange(lists, world.layout("k"))
    visible = oracle.sees_selected(world.places, lists, f["l_sel"])
    slc = Branch("selected", [q, keys[1], values[1]], visible, attend_selected)
    check_branch(world, slc)
    win = Branch("window", [q, keys[2], values[2]], oracle.sees_window(world.places, f["w"]), attend_window)
    check_branch(world, win)
    if case["whole"]:
        if case["lists"] != "chosen":
            slc.visible = oracle.sees_selected(world.places, chosen, f["l_sel"])
        check_whole(world, cmp, slc, win)
    return world.failures


def check_whole(world: World, *branches: Branch) -> None:
    """`nsa_attention` and its gradients, and `gated_sum` alone."""
    d_v = world.family["d_v"]
    valid = world.places.valid
    gates = world.draw("gates", world.b, world.t, world.n, 3)
    given = lay_out_whole(world, branches, gates)
    sizes = {**world.blocks, **world.choice, "w": world.family["w"]}
    grad_o = draws.arrange(world.draw("grad_o", world.b, world.t, world.n, d_v), world.layout("grad_o"))
    before = [draws.storage_bits(x) for x in given]

    def call(*tensors: Tensor) -> tuple[Tensor]:
        return (nsa_compile.nsa_attention(*tensors, **sizes, **world.where, **world.how),)

    (o,), found, unsteady = differentiate(world, call, given, [grad_o])
    world.expect(not unsteady, "whole: gradients of two calls differ in bits, in deterministic mode")
    world.expect(draws.same_bits(o, call(*leaves_of(given))[0]), "whole: two calls differ in bits")
    with torch.no_grad():
        alone = call(*given)[0]
    world.expect(all(map(torch.equal, before, map(draws.storage_bits, given))), "whole: an input was written to")
    bounds = bound_whole(world, branches, gates.masked_fill(~valid[..., None, None], 0.0), grad_o)
    names = ("q", "k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win", "gates")
    world.failures += judge("whole o", o, bounds["o"]) + judge("whole o without gradients", alone, bounds["o"])
    for name, x in zip(names, found, strict=True):
        world.failures += judge(f"whole d{name}", x, bounds[name])
    check_whole_isolation(world, branches, gates, grad_o, call, o, found, bounds)


def lay_out_whole(world: World, branches: tuple[Branch, ...], gates: Tensor, victims: Tensor | None = None):
    """The arguments of `nsa_attention`, as `lay_out` spoils them."""
    tensors = [lay_out(world, branch, victims, "nan") for branch in branches]
    more = () if victims is None else ((victims, "nan"),)
    gates = world.spoil("gates", gates, ~world.places.valid, *more)
    return [tensors[0][0], *(x for own in tensors for x in own[1:]), gates]


def bound_whole(world: World, branches: tuple[Branch, ...], gates: Tensor, grad_o: Tensor) -> dict[str, Bound]:
    """Bounds of the mixture and of its gradients, each branch's made of its own."""
    eps = epsilons(world.dtype)
    own = eps.own
    parts = []
    for i, branch in enumerate(branches):
        grad = grad_o.double() * gates[..., i : i + 1].double()
        parts.append(bound_attention(*branch.tensors, branch.visible, world.scale, grad, None, world.dtype, own))
    weights = gates.double().abs()
    o = oracle.mix(gates.double(), tuple(x["o"].exact for x in parts))
    off = oracle.mix(weights, tuple(x["o"].tolerance + own * x["o"].exact.abs() for x in parts))
    seen = world.places.valid[..., None, None]
    out = {"o": Bound(o, off + own * o.abs() + eps.smallest * seen)}
    dq = sum(x["q"].exact for x in parts)
    out["q"] = Bound(dq, sum(x["q"].tolerance + 2 * own * x["q"].exact.abs() for x in parts) + own * dq.abs())
    for name, x in zip(("cmp", "slc", "win"), parts, strict=True):
        out |= {f"k_{name}": x["k"], f"v_{name}": x["v"]}
    exact = torch.stack([(grad_o.double() * x["o"].exact).sum(-1) for x in parts], -1)
    size = torch.stack(
        [(grad_o.double().abs() * (x["o"].tolerance + 2 * own * x["o"].exact.abs())).sum(-1) for x in parts], -1
    )
    exact, size = exact.masked_fill(~seen, 0.0), size.masked_fill(~seen, 0.0)
    out["gates"] = Bound(exact, size + own * exact.abs() + eps.smallest * seen)
    return out


def check_whole_isolation(world, branches, gates, grad_o, call, o, found, bounds) -> None:
    """As `check_isolation`, with the gates spoilt, too."""
    victims = world.victims
    if victims is None:
        return
    hidden = [y for branch in branches for y in [hidden_keys(world, branch, ~victims)] * 2]
    leaves = leaves_of(lay_out_whole(world, branches, gates, victims))
    with deterministic_algorithms(world.case["deterministic"]):
        (spoilt,) = call(*leaves)
        grads = torch.autograd.grad(spoilt, leaves, grad_o)
    what, others = f"whole: {world.case['isolate']} spoilt,", ~victims
    for name, x, y in (("o", o, spoilt.detach()), ("dq", found[0], grads[0]), ("dgates", found[-1], grads[-1])):
        world.expect(draws.same_numbers(x[others], y[others]), f"{what} other {name} changed")
    if world.case["isolate"] != "future":
        names = ("k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win")
        for name, x, y in zip(names, grads[1:7], hidden, strict=True):
            world.failures += judge(f"{what} other d{name}", x, bounds[name], ~y)
