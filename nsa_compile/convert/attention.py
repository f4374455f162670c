"""ConvertedAttention: Native Sparse Attention on the projections, norms and RoPE of a dense transformers layer."""

import copy
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from nsa_compile.config import NSAConfig
from nsa_compile.custom_ops.nsa import nsa_attention
from nsa_compile.module import GateMLP, MeanCompressor, MLPCompressor, impl_of, set_impl
from nsa_compile.ops.checks import check_ints_of, check_tensor
from nsa_compile.ops.layout import compressed_slots, ends_of_sequences, roll_rows
from nsa_compile.rows import require


class Rows(NamedTuple):
    """Where the sequences of a batch lie, the same for all layers of a call."""

    first: Tensor | None = None
    """Tokens of padding to the left of each row, int64 [b]; None if there are none."""
    cu_seqlens: Tensor | None = None
    """Cumulative lengths of packed sequences, int32 [N + 1]."""


class StartedGate(GateMLP):
    """A gate moved by a constant: it starts at (0, 1/2, 1/2) for cmp, slc, win, and cmp learns from the first step on.

    Softmax gates still sum to 1: cmp can become -1/3 … 2/3, slc and win 1/6 … 7/6; sigmoid gates -1/2 … 1/2 and 0 … 1.
    """

    def values(self, x: Tensor, q: Tensor) -> Tensor:
        """As in `GateMLP`; exactly the start while the last layer is zero."""
        moved = super().values(x, q) - (1 / 3 if self.kind == "softmax" else 1 / 2)
        cmp, others = moved.split((1, 2), -1)
        return torch.cat((cmp, others + 0.5), -1)


class ConvertedAttention(nn.Module):
    """Takes the place of `self_attn` in a decoder layer of transformers, and its projections.

    With tied keys and values the state dict is the dense layer's and the gate. Otherwise `k_proj`, `v_proj` and
    `k_norm` serve selection, and copies named `…_win` and `…_cmp` the other branches.

    Args:
        dense: the layer's attention, whose projections move here.
        rotary: the model's rotary embedding; stays where it is.
        sizes: sizes and choices.
    """

    q_proj: nn.Linear
    o_proj: nn.Linear
    q_norm: nn.Module
    phi_k: MeanCompressor
    phi_v: MeanCompressor
    gate: StartedGate
    impl = property(impl_of, set_impl, doc="The implementation that it runs; see `nsa_compile.set_impl`.")

    def __init__(self, dense: Any, rotary: nn.Module, sizes: NSAConfig) -> None:
        super().__init__()
        self.config, self.layer_idx, self.scaling, self.head_dim = (
            dense.config, dense.layer_idx, dense.scaling, dense.head_dim,
        )  # fmt: skip
        self.sizes, self._rotary = sizes, (rotary,)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"):
            if hasattr(dense, name):
                self.add_module(name, getattr(dense, name))
        self.branches = ("",) if sizes.tie_kv else ("", "_win", "_cmp")
        for branch in self.branches[1:]:
            for name in ("k_proj", "v_proj", "k_norm"):
                if hasattr(dense, name):
                    self.add_module(name + branch, copy.deepcopy(getattr(dense, name)))
        compressor = MeanCompressor if sizes.phi == "avg" else MLPCompressor
        weight = dense.q_proj.weight
        with torch.device(weight.device):
            self.phi_k, self.phi_v = (compressor(sizes, x).to(weight.dtype) for x in (sizes.d_k, sizes.d_v))
            self.gate = StartedGate(sizes).to(weight.dtype)
        self.train(dense.training)

    def extra_repr(self) -> str:
        """The sizes that submodules do not show."""
        c = self.sizes
        tied = "tied" if c.tie_kv else "separate"
        return f"l={c.l}, d={c.d}, l_sel={c.l_sel}, n_sel={c.n_sel}, w={c.w}, {tied} keys and values, impl={c.impl!r}"

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Any = None, cache: Any = None, past_key_values: Any = None, nsa_rows: Rows = Rows(),  # noqa: B008
        cache_position: Tensor | None = None, **_: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """Attend causally, called as the dense attention is.

        Args:
            hidden_states: [b, t, dim].
            position_embeddings: cos and sin [b or 1, t, d_k] of the queries' positions.
            attention_mask: not looked at; `nsa_rows` says where the rows' tokens are.
            cache, past_key_values: a transformers cache that keeps all tokens; it gets keys before RoPE, those of the
                branches side by side.
            nsa_rows: padding and packing, as `find_rows` gives them.
            cache_position: for the cache, where transformers gives it (5.0).

        Returns: [b, t, dim], and None in the place of attention weights.
        """
        x, cache = hidden_states, past_key_values if cache is None else cache
        q = rearrange(self.q_proj(x), "b t (n k) -> b t n k", k=self.head_dim)
        if hasattr(self, "q_norm"):
            q = self.q_norm(q)
        gates = self.gate(x, q)
        k, v = (torch.cat([self._project(f"{kv}_{{}}{branch}", x) for branch in self.branches], -1) for kv in "kv")
        q, k, gates = (y.to(v.dtype) for y in (q, k, gates))  # under autocast norms give fp32
        past: Any = 0
        if cache is not None:
            past = self._past(cache)
            all_k, all_v = (rearrange(y, "b t g x -> b g t x") for y in (k, v))
            where = {} if cache_position is None else {"cache_kwargs": {"cache_position": cache_position}}
            all_k, all_v = cache.update(all_k, all_v, self.layer_idx, **where)
        if isinstance(past, int) and past == 0:
            assert position_embeddings is not None
            o = self._attend_whole(q, k, v, gates, *position_embeddings, nsa_rows)
        else:
            all_k, all_v = (rearrange(y, "b g t x -> b t g x") for y in (all_k, all_v))
            o = self._attend_cached(q, all_k, all_v, gates, past, nsa_rows.first)
        return self.o_proj(rearrange(o, "b t n v -> b t (n v)")), None

    def _project(self, name: str, x: Tensor) -> Tensor:
        y = rearrange(getattr(self, name.format("proj"))(x), "b t (g k) -> b t g k", k=self.head_dim)
        return getattr(self, name.format("norm"))(y) if hasattr(self, name.format("norm")) else y

    def _past(self, cache: Any) -> Any:
        """Tokens in the cache. Raises ValueError for one that forgets some."""
        layers = getattr(cache, "layers", ())
        layer = layers[self.layer_idx] if self.layer_idx < len(layers) else None
        if getattr(layer, "is_sliding", False):
            raise ValueError(
                f"cache: expected one that keeps all tokens of layer {self.layer_idx}, such as "
                f"DynamicCache(config=model.config) with the converted model's config, got {type(layer).__name__}"
            )
        past = cache.get_seq_length(self.layer_idx)
        return past.clone() if isinstance(past, Tensor) else past  # a static cache counts on in place

    def _attend_whole(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, cos: Tensor, sin: Tensor, rows: Rows
    ) -> Tensor:
        """Attention within whole sequences, padded to either side or packed."""
        t, cu_seqlens = q.shape[1], rows.cu_seqlens
        if rows.first is not None:  # to the right end with the padding
            shift = rows.first
            cos, sin = (y.expand(q.shape[0], -1, -1) for y in (cos, sin))
            q, k, v, gates, cos, sin = (roll_rows(y, shift) for y in (q, k, v, gates, cos, sin))
        last = torch.arange(t // self.sizes.d if cu_seqlens is not None else t, device=q.device)
        if cu_seqlens is None:
            last = last[self.sizes.l - 1 :: self.sizes.d]
        else:
            _, start, _ = compressed_slots(last.shape[0], cu_seqlens, l=self.sizes.l, d=self.sizes.d)
            last = (start + self.sizes.l - 1).clamp(0, t - 1)
        o = self._attend(q, k, v, gates, (cos, sin), (cos, sin), last, cu_seqlens=cu_seqlens)
        return o if rows.first is None else roll_rows(o, -rows.first)

    def _attend_cached(self, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, past: Any, first: Tensor | None) -> Tensor:
        """Attention of new tokens, of which `past` are in the cache before them."""
        (b, t), s = q.shape[:2], k.shape[1]
        start = torch.as_tensor(past, device=q.device).expand(b)
        shift = None
        if first is not None:
            shift, start = (first - start).clamp(0, t), (start - first).clamp_min(0)
            k, v = (roll_rows(y, first) for y in (k, v))
            q, gates = (roll_rows(y, shift) for y in (q, gates))
        positions = torch.arange(s, device=q.device)
        cos, sin = self._rotary[0](k, positions[None])
        own = (start[:, None] + positions[:t]).clamp_max(s - 1)
        last = positions[self.sizes.l - 1 :: self.sizes.d]
        o = self._attend(q, k, v, gates, (cos[0, own], sin[0, own]), (cos, sin), last, q_start=start.int())
        return o if shift is None else roll_rows(o, -shift)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, turn_q: tuple[Tensor, Tensor],
        turn_k: tuple[Tensor, Tensor], last: Tensor, *, q_start: Tensor | None = None, cu_seqlens: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The branches, mixed. q, k before RoPE; turn_q, turn_k the cos and sin of their positions; `last` the index of
        each compression block's last token, at whose position its key is rotated."""
        c = self.sizes
        keys, values = k.split(self.head_dim, -1), v.split(self.head_dim, -1)
        k_slc, k_win, k_cmp = keys * 3 if c.tie_kv else keys
        v_slc, v_win, v_cmp = values * 3 if c.tie_kv else values
        q, rotated = rotate(q, *turn_q), rotate(k_slc, *turn_k)
        k_win = rotated if c.tie_kv else rotate(k_win, *turn_k)
        cos, sin = turn_k
        k_cmp, v_cmp = self.phi_k(k_cmp, cu_seqlens), self.phi_v(v_cmp, cu_seqlens)
        k_cmp = rotate(k_cmp, cos[:, last], sin[:, last])
        return nsa_attention(
            q, k_cmp, v_cmp, rotated, v_slc, k_win, v_win, gates, l=c.l, d=c.d, l_sel=c.l_sel, n_sel=c.n_sel, w=c.w,
            init_blocks=c.init_blocks, local_blocks=c.local_blocks, q_start=q_start, cu_seqlens=cu_seqlens,
            scale=self.scaling, impl=c.impl if q_start is None else "auto" if c.impl == "flash" else c.impl,
        )  # fmt: skip


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of x [b, t, n, d] by cos and sin [b or 1, t, d], computed as transformers does it; in the type of x."""
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)


def find_rows(
    attention_mask: Any, position_ids: Tensor | None, cu_seqlens: Tensor | None, shape: tuple[int, int], past: Any
) -> Rows:
    """Where the sequences of a batch of `shape` (b, t) lie, from what a transformers model is called with.

    Args:
        attention_mask: None, or 1 for tokens and 0 for padding, [b, past + t]; or the causal mask [b, 1, t, s] that
            `generate` makes of it for a static cache, also in a dict by type of layer.
        position_ids: int [b or 1, t]; where they do not count on, a packed row's next sequence starts. None where a
            cache says the positions.
        cu_seqlens: int32 or int64 [N + 1], as DataCollatorWithFlattening gives it (`cu_seq_lens_q`).
        past: tokens in the cache.

    Raises: ValueError for padding within a row, packed rows with a mask or in a batch of more than one, other masks;
        what only values tell is a RuntimeError of the device in a compiled call.
    """
    b, t = shape
    look = not torch.compiler.is_compiling()
    if cu_seqlens is not None:
        if attention_mask is not None:
            raise ValueError("attention_mask: expected None with packed sequences (cu_seq_lens_q), got padding as well")
        check_ints_of("cu_seq_lens_q", cu_seqlens, "N + 1")
        if b != 1:
            raise ValueError(f"cu_seq_lens_q: expected a batch of 1 packed row, got a padded batch of {b}")
        return Rows(cu_seqlens=cu_seqlens.int())
    if position_ids is not None:
        check_tensor("position_ids", position_ids)
    if isinstance(attention_mask, dict):
        attention_mask = attention_mask.get("full_attention")
    if attention_mask is None:
        return Rows() if position_ids is None else packed_rows(position_ids, b, look)
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim not in (2, 4):
        raise ValueError(f"attention_mask: expected [b, s] of tokens and padding, got {describe(attention_mask)}")
    if attention_mask.ndim == 2:
        valid = attention_mask.bool()
        if look and valid.all():
            return Rows()
        first = valid.int().argmax(-1)
        key = torch.arange(valid.shape[1], device=valid.device)
        count = valid.sum(-1)
        require(
            (valid == ((key >= first[:, None]) & (key < (first + count)[:, None]))).all(),
            "attention_mask: expected padding at the ends of a row, got padding between tokens "
            "(for generate pad on the left)",
        )
        return Rows(first=first)
    message = (
        "attention_mask: expected [b, s] of tokens and padding, or a causal mask with padding to the left, got another "
        "mask with 4 axes, or padding between tokens"
    )
    visible = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
    if visible.shape[0] != b or visible.shape[2] != t:
        raise ValueError(message)
    first = visible[:, 0, -1].int().argmax(-1)
    key = torch.arange(visible.shape[-1], device=visible.device)
    own = torch.arange(t, device=visible.device)[:, None] + past
    require((visible[:, 0] == ((key <= own) & (key >= first[:, None, None]))).all(), message)
    return Rows(first=first)


def packed_rows(position_ids: Tensor, b: int, look: bool) -> Rows:
    """`cu_seqlens` with a place for every token, from positions that start anew."""
    starts = position_ids.diff(dim=-1) != 1
    if look and not starts.any():
        return Rows()
    if b != 1 or position_ids.shape[0] != 1:
        require(
            ~starts.any(),
            f"position_ids: expected a batch of 1 packed row where positions start anew, got {b} rows",
        )
        return Rows()  # compiled: rows that count on
    return Rows(cu_seqlens=ends_of_sequences(nn.functional.pad(starts[0], (1, 0), value=True)).int())


def describe(mask: object) -> str:
    """A mask in an error."""
    return f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__


def rows_of_call(base: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Forward pre-hook of a converted model's decoder: hands `Rows` to its layers as `nsa_rows`."""
    names = ("input_ids", "attention_mask", "position_ids")
    given = dict(zip(names, args, strict=False)) | kwargs
    tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
    if tokens is None:
        return args, kwargs  # the model says what is wrong
    wanted = given.get("output_attentions")
    if wanted or (wanted is None and base.config.output_attentions):
        raise ValueError("output_attentions: expected False (converted layers compute no attention weights), got True")
    cache = given.get("cache") if given.get("cache") is not None else given.get("past_key_values")
    past = 0 if cache is None else cache.get_seq_length()
    rows = find_rows(
        given.get("attention_mask"), given.get("position_ids") if cache is None else None, given.get("cu_seq_lens_q"),
        (tokens.shape[0], tokens.shape[1]), past,
    )  # fmt: skip
    kwargs = kwargs | {"nsa_rows": rows}
    if rows.cu_seqlens is not None:
        if cache is not None:
            raise ValueError("cache: expected None with packed sequences, got one")
        kwargs["use_cache"] = False
    return args, kwargs
