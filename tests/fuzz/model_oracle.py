"""A language model of Native Sparse Attention from its weights alone, on the dense masks of `dense_oracle`.

It imports nothing of the package: RoPE, φ, gates, norms, cross-entropy are written anew, and packed sequences, padding
and caches do not exist here: every sequence is a row of its own, and rows are padded on the right, where a causal model
does not look. It runs in fp64 (`exact`), or as a plain computation of the type at hand (`plain`): fp32 arithmetic,
every tensor rounded to the type it would be stored in, its gradient too. Three-way bounds are made of the two.

The choice of blocks hangs on rounding where scores nearly tie. So the oracle can be given the blocks that a model
chose: they are judged by its scores, and everything else is computed with them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import dense_oracle as dense
import torch
from torch import Tensor

NORM_EPS = 1e-6
BRANCHES = ("cmp", "slc", "win")


class Answer(NamedTuple):
    """What the oracle says of rows [r, t]."""

    logits: Tensor
    """[r, t, vocab]; of an attention layer alone its outputs [r, t, dim]."""
    scores: list[Tensor]
    """p_grp [r, t, g, blocks] of each layer, from the inputs that the given blocks of earlier layers lead to."""
    blocks: list[Tensor]
    """The blocks that were used, int64 [r, t, g, n_sel] of each layer."""


class Oracle:
    """A model or an attention layer with the weights of `state`, computing as type `dtype` would.

    config: what `NSAConfig` holds, as a dict. The weights are leaves with gradients; tied ones are one leaf.
    """

    def __init__(self, config: Mapping[str, Any], state: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self.config, self.stored = config, dtype
        self.compute = torch.promote_types(dtype, torch.float32)
        self.weights = {name: w.detach().to(self.compute).clone().requires_grad_() for name, w in state.items()}
        if config["tie_embeddings"] and "head.weight" in self.weights:
            self.weights["head.weight"] = self.weights["embed.weight"]

    def keep(self, x: Tensor) -> Tensor:
        """x as it is after it was stored; its gradient is stored, too."""
        return x.to(self.stored).to(self.compute)

    def weight(self, name: str) -> Tensor:
        return self.keep(self.weights[name])

    def linear(self, x: Tensor, name: str) -> Tensor:
        y = x @ self.weight(f"{name}.weight").mT
        return self.keep(y + self.weight(f"{name}.bias") if f"{name}.bias" in self.weights else y)

    def norm(self, x: Tensor, name: str) -> Tensor:
        return self.keep(x * (x.square().mean(-1, keepdim=True) + NORM_EPS).rsqrt() * self.weight(f"{name}.weight"))

    def silu(self, x: Tensor) -> Tensor:
        return self.keep(x / (1 + torch.exp(-x)))

    # --- attention ---------------------------------------------------------------------------------------------------

    def rope(self, x: Tensor, position: Tensor) -> Tensor:
        """Channel i of x [r, t, n, d] turned with channel i + d / 2 by `position * theta ** (-2 i / d)`."""
        half = x.shape[-1] // 2
        turns = self.config["rope_theta"] ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
        angle = position.double()[:, None, None] * turns
        cos, sin = angle.cos().to(self.compute), angle.sin().to(self.compute)
        a, b = x[..., :half], x[..., half:]
        return self.keep(torch.cat((a * cos - b * sin, a * sin + b * cos), -1))

    def compress(self, x: Tensor, name: str) -> Tensor:
        """φ of every block of x [r, t, g, channels]: the mean, and what is learned of the block."""
        c = self.config
        if x.shape[1] < c["l"]:
            return x[:, :0]
        blocks = x.unfold(1, c["l"], c["d"])  # [r, c, g, channels, l]
        mean = self.keep(blocks.mean(-1))
        if c["phi"] == "avg":
            return mean
        kernel, place = self.weight(f"{name}.conv.weight"), self.weight(f"{name}.position")
        features = self.keep((kernel * place.mT).sum((1, 2)))
        for part, weights in zip(blocks.split(c["d"], -1), kernel.split(c["d"], -1), strict=True):
            features = self.keep(features + self.keep(part.flatten(-2) @ weights.flatten(1).mT))
        return self.keep(mean + self.linear(self.silu(self.linear(features, f"{name}.fc1")), f"{name}.fc2"))

    def gates(self, x: Tensor, q: Tensor, name: str) -> Tensor:
        """[r, t, n, 3] from hidden states x and unrotated queries q [r, t, n, d_k]."""
        c = self.config
        n, g = c["n_heads"], c["n_kv_groups"]
        if c["gate"] == "softmax":
            x = self.keep(q.unflatten(2, (g, n // g)).mean(3))
        logits = self.linear(self.silu(self.linear(x, f"{name}.fc1")), f"{name}.fc2")
        if c["gate"] == "sigmoid":
            return self.keep(torch.sigmoid(logits.unflatten(-1, (n, 3))))
        return self.keep(torch.softmax(logits / c["gate_temperature"], -1).repeat_interleave(n // g, dim=2))

    def attention(
        self, x: Tensor, name: str = "", blocks: Tensor | None = None, branch: str | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Outputs [r, t, dim] of an attention layer, the scores of its blocks, and the blocks that were used."""
        c = self.config
        position = torch.arange(x.shape[1], device=x.device)

        def heads(weight: str, n: int) -> Tensor:
            return self.linear(x, name + weight).unflatten(-1, (n, -1))

        q, g = heads("W_Q", c["n_heads"]), c["n_kv_groups"]
        if c["attention"] == "dense":
            keys = self.rope(heads("W_K", g), position)
            o, _ = dense.window_attention(self.rope(q, position), keys, heads("W_V", g), w=x.shape[1])
            return self.linear(self.keep(o).flatten(2), f"{name}out"), None, None
        gates = self.gates(x, q, f"{name}gate")
        if branch is not None:
            gates = torch.zeros_like(gates)
            gates[..., BRANCHES.index(branch)] = 1
        tails = ("", "", "") if c["tie_kv"] else ("_cmp", "_sel", "_win")
        (k_cmp, v_cmp), (k_slc, v_slc), (k_win, v_win) = [(heads(f"W_K{i}", g), heads(f"W_V{i}", g)) for i in tails]
        q, k_slc, k_win = (self.rope(y, position) for y in (q, k_slc, k_win))
        k_cmp, v_cmp = self.compress(k_cmp, f"{name}phi_k"), self.compress(v_cmp, f"{name}phi_v")
        k_cmp = self.rope(k_cmp, torch.arange(k_cmp.shape[1], device=x.device) * c["d"] + c["l"] - 1)

        l, d, l_sel = c["l"], c["d"], c["l_sel"]
        scores = dense.block_scores(q.detach(), k_cmp.detach(), l=l, d=d, l_sel=l_sel)
        if blocks is None:
            blocks = dense.choose(scores, position.expand(x.shape[:2]), **choice_sizes(c))
        o_cmp, _ = dense.compressed_attention(q, k_cmp, v_cmp, l=l, d=d)
        o_slc, _ = dense.selected_attention(q, k_slc, v_slc, blocks, l_sel=l_sel)
        o_win, _ = dense.window_attention(q, k_win, v_win, w=c["w"])
        o = self.keep(dense.mix(gates, tuple(self.keep(y) for y in (o_cmp, o_slc, o_win))))
        return self.linear(o.flatten(2), f"{name}out"), scores, blocks

    # --- model -------------------------------------------------------------------------------------------------------

    def __call__(self, ids: Tensor, blocks: Sequence[Tensor] | None = None, branch: str | None = None) -> Answer:
        """Logits for rows of ids [r, t]; with the blocks [r, t, g, n_sel] of each layer, or its own."""
        # torch adds the gradients of a row that is read often in the type of the weights
        x = torch.nn.functional.embedding(ids, self.weights["embed.weight"].to(self.stored)).to(self.compute)
        scores, used = [], []
        for i in range(self.config["n_layers"]):
            name, given = f"layers.{i}.", None if not blocks else blocks[i]
            y, *choice = self.attention(self.norm(x, f"{name}norm_attn"), f"{name}attn.", given, branch)
            if choice[0] is not None:
                scores.append(choice[0])
                used.append(choice[1])
            x = self.keep(x + y)
            up = self.silu(self.linear(self.norm(x, f"{name}norm_mlp"), f"{name}mlp.up"))
            x = self.keep(x + self.linear(up, f"{name}mlp.down"))
        return Answer(self.linear(self.norm(x, "norm"), "head"), scores, used)


def choice_sizes(config: Mapping[str, Any]) -> dict[str, int]:
    return {name: config[name] for name in ("l_sel", "n_sel", "init_blocks", "local_blocks")}


def next_token_loss(logits: Tensor, ids: Tensor, lengths: Sequence[int]) -> Tensor:
    """Sum over the rows ids [r, t] of the cross-entropies of each next token within the row's length."""
    index = torch.arange(ids.shape[1] - 1, device=ids.device)
    counted = index + 1 < torch.tensor(lengths, device=ids.device)[:, None]
    entropies = -torch.log_softmax(logits[:, :-1], -1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return entropies.masked_fill(~counted, 0.0).sum()


# --- rows ------------------------------------------------------------------------------------------------------------


def stack_rows(rows: Sequence[Tensor], value: int | float = 0) -> Tensor:
    """Rows [t_i, ...] of unequal length as [r, max t_i, ...], padded on the right."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)


def inside(lengths: Sequence[int], device: torch.device | str) -> Tensor:
    """Which tokens of stacked rows are none of padding, bool [r, t]."""
    return torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]


# --- judgements ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bound:
    """Error of a type: `factor` times that of the plain computation, and so many units of its precision."""

    rms: float
    largest: float
    units: float


BOUNDS = {
    torch.float64: Bound(2, 4, 2**18),
    torch.float32: Bound(2, 4, 256),
    torch.bfloat16: Bound(2, 4, 8),
    torch.float16: Bound(2, 4, 8),
}


def compare(name: str, actual: Tensor, exact: Tensor, plain: Tensor, dtype: torch.dtype, unit: float = 0) -> list[str]:
    """Failures of the three-way bound for tensors of one shape; `unit` is the least size they are taken to have.

    Root mean square and largest error are at most twice (four times) those of the plain computation, plus some units
    of precision of the numbers' size, which is all of it that a few numbers can tell.
    """
    if actual.shape != exact.shape:
        return [f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"]
    if not actual.numel():
        return []
    actual, exact, plain = (x.detach().double() for x in (actual, exact, plain))
    if not bool(actual.isfinite().all()):
        bad = (~actual.isfinite()).nonzero()[0].tolist()
        return [f"{name}: {int((~actual.isfinite()).sum())} of {actual.numel()} not finite, first at {bad}"]
    bound, failures = BOUNDS[dtype], []
    error, usual = (actual - exact).abs(), (plain - exact).abs()
    size = max(float(rms(exact)), unit) * torch.finfo(dtype).eps * bound.units
    for kind, got, other, factor, units in (
        ("rms", rms(error), rms(usual), bound.rms, 1.0), ("largest", error.max(), usual.max(), bound.largest, 8.0)
    ):  # fmt: skip
        if got > factor * other + units * size:
            at = [int(i) for i in torch.unravel_index(error.argmax(), error.shape)]
            failures.append(
                f"{name}: {kind} error {got:.3g}, plain {other:.3g}, size {rms(exact):.3g}, worst at {at} of "
                f"{list(error.shape)}"
            )
    return failures


def rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def score_tolerance(exact: Tensor, plain: Tensor, dtype: torch.dtype) -> float:
    """How far scores may be off where a list is judged by them."""
    size = float(exact.abs().max()) if exact.numel() else 0.0
    off = float((plain.double() - exact.double()).abs().max()) if exact.numel() else 0.0
    return 4 * off + 64 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps * size


def judge_blocks(
    name: str, got: Tensor, scores: Tensor, valid: Tensor, config: Mapping[str, Any], tolerance: float
) -> list[str]:
    """Failures of chosen blocks got [r, t, g, n_sel] by the scores [r, t, g, blocks], where `valid` [r, t].

    A list is ascending, holds the forced blocks, as many others as there are slots and blocks for, and leaves out none
    that is better by more than `tolerance` than one it holds. Scores of exactly 0 are no matter of rounding: of those
    the first win.
    """
    sizes = choice_sizes(config)
    n_sel = sizes["n_sel"]
    if got.shape != (*scores.shape[:3], n_sel):
        return [f"{name}: blocks of shape {tuple(got.shape)}, expected {(*scores.shape[:3], n_sel)}"]
    got, n = got.long(), scores.shape[-1]
    block = torch.arange(n, device=got.device)
    position = torch.arange(got.shape[1], device=got.device)[None, :, None, None]
    own = position // sizes["l_sel"]
    started = (block <= own).expand(scores.shape)
    forced = started & ((block < sizes["init_blocks"]) | (block > own - sizes["local_blocks"]))
    held = torch.zeros(*got.shape[:3], n + 1, dtype=torch.bool, device=got.device)
    held = held.scatter(-1, torch.where((got >= 0) & (got < n), got, n), True)[..., :n]
    used = got >= 0
    wanted = started.sum(-1).clamp_max(n_sel)
    slot = torch.arange(n_sel, device=got.device)
    ascending = torch.where(used[..., 1:], got[..., 1:] > got[..., :-1], True).all(-1)
    free, left = held & ~forced, started & ~held
    worst = scores.masked_fill(~free, math.inf).amin(-1)
    best = scores.masked_fill(~left, -math.inf).amax(-1)
    last_zero = torch.where(free & (scores == 0), block, -1).amax(-1)
    first_zero = torch.where(left & (scores == 0), block, n).amin(-1)
    faults = {
        "not ascending": ~ascending | (used != (slot < wanted[..., None])).any(-1),
        "not as many as there are": held.sum(-1) != wanted,
        "a block that has not begun": (held & ~started).any(-1) | ((got >= n) | (got < -1)).any(-1),
        "a forced block is missing": (forced & ~held).any(-1),
        "a better block was left out": best > worst + tolerance,
        "of scores 0 the first do not win": first_zero < last_zero,
    }
    failures = []
    for fault, where in faults.items():
        where = where & valid[..., None]
        if bool(where.any()):
            r, t, g = where.nonzero()[0].tolist()
            failures.append(
                f"{name}: {fault}, {int(where.sum())} lists, first in row {r}, token {t}, group {g}: "
                f"{got[r, t, g].tolist()}"
            )
    return failures
