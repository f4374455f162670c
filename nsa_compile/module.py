"""NSAAttention: Native Sparse Attention as a layer, with its gate and its compressors."""

import copy
import dataclasses
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor, nn

from nsa_compile.config import IMPLS, NSAConfig
from nsa_compile.custom_ops.compression import compress_mean
from nsa_compile.custom_ops.decode import STEP, runs_step
from nsa_compile.custom_ops.dispatch import beside_flash
from nsa_compile.custom_ops.nsa import op_branches
from nsa_compile.custom_ops.rope import apply_rope, rotate_all
from nsa_compile.ops.attend import compute_dtype
from nsa_compile.ops.checks import check_cu_seqlens, check_lengths, check_tensor
from nsa_compile.ops.compression import gather_blocks
from nsa_compile.ops.layout import compressed_slots, num_cmp_at, query_layout
from nsa_compile.ops.nsa import attend_branches
from nsa_compile.ops.selection import token_reads

if TYPE_CHECKING:
    from nsa_compile.graphs.cache import LayerCache, NSACache

BRANCHES = ("cmp", "slc", "win")


class GateMLP(nn.Module):
    """Gates of the three branches (Eq. 5): [b, t, n_heads, 3] in the order cmp, slc, win.

    `kind="softmax"`: mean of each group's queries, before RoPE, over its heads → Linear → SiLU → Linear → softmax over
    the branches at a temperature; every gate starts as 1/3. `kind="sigmoid"` (the paper's): the hidden state
    → Linear → SiLU → Linear → sigmoid, one gate per branch and query head; every gate starts as 1/2.
    """

    def __init__(self, config: NSAConfig) -> None:
        super().__init__()
        assert config.gate_hidden is not None
        self.kind, self.temperature = config.gate, config.gate_temperature
        self.n_heads, self.g = config.n_heads, config.n_kv_groups
        inputs, outputs = (config.d_k, 3) if self.kind == "softmax" else (config.dim, 3 * config.n_heads)
        self.fc1 = nn.Linear(inputs, config.gate_hidden)
        self.fc2 = nn.Linear(config.gate_hidden, outputs)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zero the last layer."""
        nn.init.zeros_(self.fc2.weight)
        nn.init.zeros_(self.fc2.bias)

    def forward(self, x: Tensor, q: Tensor) -> Tensor:
        """Gates for hidden states x [b, t, dim] and unrotated queries q [b, t, n_heads, d_k], in the type of q."""
        check_tensor("x", x), check_tensor("q", q)
        return self.values(x, q).to(q.dtype)

    def values(self, x: Tensor, q: Tensor) -> Tensor:
        """The gates in at least fp32."""
        softmax = self.kind == "softmax"
        features = reduce(q, "b t (g h) k -> b t g k", "mean", g=self.g) if softmax else x
        logits = self.fc2(nn.functional.silu(self.fc1(features)))
        logits = logits.to(compute_dtype(logits))
        if softmax:
            gates = torch.softmax(logits / self.temperature, dim=-1)
            return repeat(gates, "b t g c -> b t (g h) c", h=self.n_heads // self.g)
        return torch.sigmoid(rearrange(logits, "b t (n c) -> b t n c", c=3))


class MeanCompressor(nn.Module):
    """φ as the mean of a block (`phi="avg"`)."""

    def __init__(self, config: NSAConfig, channels: int) -> None:
        super().__init__()
        self.l, self.d, self.impl = config.l, config.d, beside_flash(config.impl)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """x [b, s, g, channels] → [b, c, g, channels], c = num_cmp(s), packed s // d."""
        return compress_mean(x, l=self.l, d=self.d, cu_seqlens=cu_seqlens, impl=self.impl)


class MLPCompressor(MeanCompressor):
    """Learnable φ (`phi="mlp"`): `mean + MLP(Conv1d(block + intra-block position encoding))`.

    The convolution has kernel l and stride d; the MLP's last layer starts at zero, so that φ starts as the mean.
    """

    def __init__(self, config: NSAConfig, channels: int) -> None:
        super().__init__(config, channels)
        self.position = nn.Parameter(torch.empty(config.l, channels))
        self.conv = nn.Conv1d(channels, channels, config.l, stride=config.d, bias=False)
        self.fc1 = nn.Linear(channels, 2 * channels, bias=False)
        self.fc2 = nn.Linear(2 * channels, channels, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Small positions, a zero last layer."""
        nn.init.normal_(self.position, std=0.02)
        nn.init.zeros_(self.fc2.weight)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """x [b, s, g, channels] → [b, c, g, channels], c = num_cmp(s), packed s // d."""
        mean = super().forward(x, cu_seqlens)
        c, used, stride = mean.shape[1], None, self.d
        if cu_seqlens is not None:  # side by side, so that a stride of l visits each sequence's own blocks
            blocks, used = gather_blocks(x, cu_seqlens, l=self.l, d=self.d)
            x, stride = rearrange(blocks, "b c l g x -> b (c l) g x"), self.l
        # the convolution as matrix products: a block is `parts` neighbouring strides
        parts = self.l // stride
        padded = nn.functional.pad(x, (0, 0, 0, 0, 0, stride - x.shape[1] % stride))  # always some: one graph for all
        strides = rearrange(padded, "b (c d) g x -> b c g (d x)", d=stride)
        weights = rearrange(self.conv.weight, "e x (r d) -> r e (d x)", d=stride)
        features = torch.einsum("exl,lx->e", self.conv.weight, self.position)  # positions are the same in every block
        for r in range(parts):
            features = features + nn.functional.linear(strides[:, r : r + c], weights[r])
        learned = self.fc2(nn.functional.silu(self.fc1(features)))
        if used is not None:
            learned = learned.masked_fill(~used[:, None, None], 0.0)
        dtype = compute_dtype(x)
        return (mean.to(dtype) + learned.to(dtype)).to(x.dtype)


def set_impl(module: nn.Module, impl: str) -> None:
    """Change the implementation that a built layer, or every layer of a model, runs from its next call on.

    Assigning to `impl` of a layer or model of this package does the same. What is saved afterwards has the new choice,
    `torch.compile` compiles once more, and a CUDA graph that was captured stays as it is.

    Args:
        module: an `NSAAttention`, or any module that contains such layers or converted ones, compiled or not.
        impl: "auto", "reference", "triton" or "flash", as in `NSAConfig`.

    Raises: ValueError or TypeError before anything is changed for another name, or a module without such layers.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
    if impl not in IMPLS:
        raise ValueError(f"impl: expected one of {', '.join(map(repr, IMPLS))}, got {impl!r}")
    parts = list(module.modules())
    compressors = [part for part in parts if isinstance(part, MeanCompressor)]
    if not compressors:
        raise ValueError(f"module: expected one with NSA layers, got {type(module).__name__} without any")
    for compressor in compressors:
        compressor.impl = beside_flash(impl)
    for part, name, sizes in _configs(parts):
        setattr(part, name, dataclasses.replace(sizes, impl=impl))
    # configs of transformers are written by save_pretrained, and other models may have the same objects
    shared = {id(x): x for x in (getattr(part, "config", None) for part in parts if hasattr(part, "save_pretrained"))}
    own: dict[int, Any] = {
        key: copy.copy(config) for key, config in shared.items() if not isinstance(config, NSAConfig)
    }
    for config in own.values():
        if hasattr(config, "nsa"):
            config.nsa = config.nsa | {"impl": impl}
        else:
            config.impl = impl
    for part in parts:
        for name, value in list(vars(part).items()):
            if id(value) in own:
                setattr(part, name, own[id(value)])


def impl_of(module: nn.Module) -> str:
    """The implementation of a module's first layer, as `set_impl` or its config chose it."""
    return next(_configs(module.modules()))[2].impl


def _configs(parts: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, str, NSAConfig]]:
    """Every attribute of modules that is an `NSAConfig`."""
    for part in parts:
        for name, value in list(vars(part).items()):
            if isinstance(value, NSAConfig):
                yield part, name, value


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer is a product with its weight and nothing else."""
    plain = type(layer) is nn.Linear and layer.bias is None
    return plain and not layer._forward_hooks and not layer._forward_pre_hooks


class PackedProjections(nn.Module):
    """A layer with bias-free projections `W_*` of its input, which a step of a few tokens can take in one product.

    A product with a few rows waits for memory, not for arithmetic, and several small ones wait longer than a large one.
    """

    _packed: tuple[Tensor, tuple[nn.Parameter, ...]] | None = None

    def pack_projections(self) -> None:
        """Lay the weights `W_*` one after the other in memory; each stays the parameter it was.

        Does nothing where something else stands behind them: other types or devices, hooks, sharded or replaced layers.
        Moving or converting the layer undoes it.
        """
        layers = list(self._projections().values())
        if self._is_packed(layers) or not all(is_plain(x) and type(x.weight) is nn.Parameter for x in layers):
            return
        weights = tuple(cast(nn.Parameter, layer.weight) for layer in layers)
        if len({(w.dtype, w.device) for w in weights}) > 1:
            return
        with torch.inference_mode(False):  # parameters take no data of an inference tensor
            packed = torch.cat([w.detach() for w in weights])
            torch._dynamo.mark_static_address(packed)
            for weight, part in zip(weights, packed.split([len(w) for w in weights]), strict=True):
                weight.data = torch.from_dlpack(part)  # a storage of its own, as savers of weights expect
        self._packed = packed, weights

    def project(self, x: Tensor, *, few: bool) -> dict[str, Tensor]:
        """x [b, t, dim] through each `W_*`, by name; with `few` tokens and no gradient by one product if packed."""
        layers = self._projections()
        if not few or torch.is_grad_enabled() or not self._is_packed(list(layers.values())):
            return {name: layer(x) for name, layer in layers.items()}
        assert self._packed is not None
        packed, weights = self._packed
        parts = nn.functional.linear(x, packed).split([w.shape[0] for w in weights], -1)
        return dict(zip(layers, parts, strict=True))

    def _projections(self) -> dict[str, nn.Linear]:
        return {name: layer for name, layer in self._modules.items() if name.startswith("W_")}  # type: ignore[misc]

    def _is_packed(self, layers: list[nn.Linear]) -> bool:
        """Whether the weights that were packed are those of the layers now."""
        if self._packed is None:
            return False
        return all(is_plain(x) and x.weight is w for x, w in zip(layers, self._packed[1], strict=True))

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self._packed = None  # the parameters get memory of their own
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_packed": None}


class NSAAttention(PackedProjections):
    """Native Sparse Attention as a layer: projections, RoPE, φ, three branches, gate, output projection.

    Arguments are those of `NSAConfig`; `dim … w` are the paper's sizes. `dropout` must be 0: the branches have none.

    Raises: ValueError or TypeError naming the argument, what was expected and what came.
    """

    impl = property(impl_of, set_impl, doc="The implementation that it runs; see `set_impl`.")

    def __init__(
        self, dim: int, n_heads: int, n_kv_groups: int, d_k: int, d_v: int,
        l: int = 32, d: int = 16, l_sel: int = 64, n_sel: int = 16, w: int = 512, *,
        init_blocks: int = 1, local_blocks: int = 2, phi: str = "avg", gate: str = "softmax",
        gate_hidden: int | None = None, gate_temperature: float = 1.0, tie_kv: bool = False,
        rope_theta: float = 10000.0, impl: str = "auto", dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        if dropout:
            raise ValueError(f"dropout: expected 0 (Native Sparse Attention has none), got {dropout!r}")
        self.config = config = NSAConfig(
            dim=dim, n_heads=n_heads, n_kv_groups=n_kv_groups, d_k=d_k, d_v=d_v, l=l, d=d, l_sel=l_sel, n_sel=n_sel,
            w=w, init_blocks=init_blocks, local_blocks=local_blocks, phi=phi, gate=gate, gate_hidden=gate_hidden,
            gate_temperature=gate_temperature, tie_kv=tie_kv, rope_theta=rope_theta, impl=impl,
        )  # fmt: skip
        self.W_Q = nn.Linear(dim, n_heads * d_k, bias=False)
        for branch in ("",) if tie_kv else ("_sel", "_win", "_cmp"):
            self.add_module(f"W_K{branch}", nn.Linear(dim, n_kv_groups * d_k, bias=False))
            self.add_module(f"W_V{branch}", nn.Linear(dim, n_kv_groups * d_v, bias=False))
        self.out = nn.Linear(n_heads * d_v, dim, bias=False)
        compressor = MeanCompressor if phi == "avg" else MLPCompressor
        self.phi_k, self.phi_v = compressor(config, d_k), compressor(config, d_v)
        self.gate = GateMLP(config)

    def extra_repr(self) -> str:
        """The sizes that submodules do not show."""
        c = self.config
        return f"l={c.l}, d={c.d}, l_sel={c.l_sel}, n_sel={c.n_sel}, w={c.w}, impl={c.impl!r}"

    def cache_layout(self, capacity: int) -> tuple[dict[str, tuple[int, int]], int]:
        """Buffers a cache of this layer has (name → length, channels), and the key/value heads."""
        c = self.config
        # rings are as long as a step that is taken back as a whole makes necessary
        lengths = {"slc": capacity, "cmp": -(-capacity // c.d), "raw": c.l + STEP - 1}
        if not c.tie_kv:
            lengths["win"] = c.w + STEP - 1
        channels = {"k": c.d_k, "v": c.d_v}
        layout = {f"{kv}_{name}": (n, channels[kv]) for name, n in lengths.items() for kv in "kv"}
        return layout, c.n_kv_groups

    def forward(
        self, x: Tensor, cache: "NSACache | None" = None, cu_seqlens: Tensor | None = None,
        lengths: Tensor | None = None, *, branch: str | None = None, attn_mask: None = None,
    ) -> Tensor:  # fmt: skip
        """Attend causally.

        Args:
            x: [b, t, dim] float.
            cache: made by `NSACache.for_model` for this layer or a model around it; x continues what it holds.
            cu_seqlens: int32 or int64 [N + 1] on the device of x, for b = 1 packed sequences; not with a cache.
            lengths: int32 or int64 [b] on the device of x: tokens of each right-padded row, the others are ignored.
            branch: "cmp", "slc" or "win" to let that branch alone through, for ablation.
            attn_mask: must be None: attention is causal, its sparsity is learned.

        Returns: [b, t, dim] in the type of x; 0 for padding.

        Raises: ValueError or TypeError naming the argument, before anything is written.
        """
        c = self.config
        t, cu_seqlens, lengths = check_layer_input(x, c.dim, cache, cu_seqlens, lengths, attn_mask)
        check_branch(branch)
        layer = None if cache is None else cache.layer(self)
        valid = valid_tokens(x, cu_seqlens, lengths)
        if valid is not None:
            x = torch.where(valid[..., None], x, 0.0)

        q, gates, (k_cmp, v_cmp, k_slc, v_slc, k_win, v_win) = self._heads(
            x, branch, few=layer is not None and t <= STEP
        )
        if layer is not None:
            layer.check_room(k_slc, lengths)
            if runs_step(beside_flash(c.impl), q, v_slc, d=c.d, l_sel=c.l_sel):
                o = self._step(layer, q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, lengths)
                return self.out(rearrange(o, "b t n v -> b t (n v)"))
        positions = query_layout(x, None if layer is None else layer.positions, cu_seqlens).position
        q, k_slc, k_win = self._rotate(q, k_slc, k_win, positions)
        q_start = q_start_win = None
        if layer is None:
            k_cmp, v_cmp = self._compress(k_cmp, v_cmp, cu_seqlens)
        else:
            q_start = layer.positions.clamp_max(layer.capacity - 1)  # a full row is idle, or its outputs are spoiled
            kept = layer.room(t, lengths)
            k_cmp, v_cmp = self._extend_compressed(layer, k_cmp, v_cmp, kept)
            if not c.tie_kv:
                k_win, v_win, q_start_win = self._extend_window(layer, k_win, v_win, kept)
            layer.append("k_slc", k_slc, kept)
            layer.append("v_slc", v_slc, kept)
            k_slc, v_slc = layer.buffers["k_slc"], layer.buffers["v_slc"]
            if c.tie_kv:
                k_win, v_win = k_slc, v_slc

        o, blocks = self._attend(
            q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates,
            q_start=q_start, q_start_win=q_start_win, cu_seqlens=cu_seqlens,
        )  # fmt: skip
        y = self.out(rearrange(o, "b t n v -> b t (n v)"))
        if layer is not None:
            layer.keep_reads(kept, *token_reads(positions, blocks, l=c.l, d=c.d, l_sel=c.l_sel, w=c.w))
            layer.advance(t, lengths)
            y = layer.spoil(y, positions)
        return y if valid is None else torch.where(valid[..., None], y, 0.0)

    def _heads(self, x: Tensor, branch: str | None, *, few: bool = False) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Queries, gates, and (k_cmp, v_cmp, k_slc, v_slc, k_win, v_win) of all tokens; nothing is rotated."""
        c = self.config
        projected = self.project(x, few=few)
        q = rearrange(projected.pop("W_Q"), "b t (n k) -> b t n k", k=c.d_k)
        gates = self.gate(x, q)
        if branch is not None:
            gates = torch.eye(3, dtype=gates.dtype, device=x.device)[BRANCHES.index(branch)].expand_as(gates)
        kv = {name: rearrange(y, "b t (g x) -> b t g x", g=c.n_kv_groups) for name, y in projected.items()}
        if c.tie_kv:
            return q, gates, (kv["W_K"], kv["W_V"]) * 3
        return q, gates, tuple(kv[f"W_{x}_{p}"] for p in ("cmp", "sel", "win") for x in "KV")

    def _attend(self, q: Tensor, *keys_and_gates: Tensor, **where: Any) -> tuple[Tensor, Tensor]:
        """Mixed outputs of the branches, and the chosen blocks; arguments as those of `attend_branches`."""
        c = self.config
        impl = c.impl if where["q_start"] is None else beside_flash(c.impl)  # flash-attn places no queries
        return attend_branches(
            q, *keys_and_gates, l=c.l, d=c.d, l_sel=c.l_sel, n_sel=c.n_sel, w=c.w,
            init_blocks=c.init_blocks, local_blocks=c.local_blocks, branches=op_branches(impl), **where,
        )  # fmt: skip

    def _compress(self, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        """Compressed tokens of whole sequences, keys rotated to the position of their block's last token."""
        k, v = self.phi_k(k, cu_seqlens), self.phi_v(v, cu_seqlens)
        block = torch.arange(k.shape[1], device=k.device)
        if cu_seqlens is not None:
            block, _, _ = compressed_slots(k.shape[1], cu_seqlens, l=self.config.l, d=self.config.d)
        return self._rotate_blocks(k, block), v

    def _rotate(self, q: Tensor, k_slc: Tensor, k_win: Tensor, positions: Tensor) -> list[Tensor]:
        """Queries and keys of tokens at their positions; tied keys are rotated once."""
        if self.config.tie_kv:
            q, k_slc = rotate_all((q, k_slc), positions, theta=self.config.rope_theta)
            return [q, k_slc, k_slc]
        return rotate_all((q, k_slc, k_win), positions, theta=self.config.rope_theta)

    def _rotate_blocks(self, k_cmp: Tensor, block: Tensor) -> Tensor:
        return apply_rope(k_cmp, block * self.config.d + self.config.l - 1, theta=self.config.rope_theta)

    def _step(
        self, layer: "LayerCache", q: Tensor, k_cmp: Tensor, v_cmp: Tensor, k_slc: Tensor, v_slc: Tensor,
        k_win: Tensor, v_win: Tensor, gates: Tensor, count: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Mixed outputs of the branches for a few new tokens, through the kernels made for that; 0 for padding."""
        c, buffers = self.config, layer.buffers
        emitted: tuple[Tensor | None, ...] = (None, None)
        if c.phi != "avg":
            n = -(-q.shape[1] // c.d)
            first = num_cmp_at(layer.positions - 1, l=c.l, d=c.d) * c.d
            raw = (layer.recall(f"{x}_raw", y, first, (n - 1) * c.d + c.l) for x, y in (("k", k_cmp), ("v", v_cmp)))
            emitted = tuple(phi(x).contiguous() for phi, x in zip((self.phi_k, self.phi_v), raw, strict=True))
        o, _ = torch.ops.nsa_compile.decode_attention(
            q, k_cmp, v_cmp, k_slc, v_slc, *((None, None) if c.tie_kv else (k_win, v_win)), *emitted, gates, count,
            layer.positions, layer.nominal_reads, layer.actual_reads,
            *(buffers.get(f"{x}_{branch}") for branch in ("cmp", "raw", "slc", "win") for x in "kv"),
            c.l, c.d, c.l_sel, c.n_sel, c.w, c.init_blocks, c.local_blocks, c.rope_theta, c.d_k**-0.5,
        )  # fmt: skip
        return o

    def _extend_compressed(self, layer: "LayerCache", k: Tensor, v: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """Emit the blocks that the new raw tokens complete, keep the raw tail; returns the compressed buffers."""
        l, d, t = self.config.l, self.config.d, k.shape[1]
        start = layer.positions
        end = start + count
        first = num_cmp_at(start - 1, l=l, d=d)
        n = -(-t // d)  # t tokens complete at most this many blocks
        block = first[:, None] + torch.arange(n, device=k.device)
        complete = block * d + l <= end[:, None]
        segments = {x: layer.recall(f"{x}_raw", y, first * d, (n - 1) * d + l) for x, y in (("k", k), ("v", v))}
        layer.write("k_cmp", self._rotate_blocks(self.phi_k(segments["k"]), block), block, complete)
        layer.write("v_cmp", self.phi_v(segments["v"]), block, complete)
        layer.append("k_raw", k, count)
        layer.append("v_raw", v, count)
        return layer.buffers["k_cmp"], layer.buffers["v_cmp"]

    def _extend_window(self, layer: "LayerCache", k: Tensor, v: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The window's past in order followed by the new tokens, and the first query's place there; then append."""
        w, t = self.config.w, k.shape[1]
        q_start = layer.positions.clamp_max(w - 1)
        first = layer.positions - q_start
        k_past, v_past = (layer.recall(f"{x}_win", y, first, w - 1 + t) for x, y in (("k", k), ("v", v)))
        layer.append("k_win", k, count)
        layer.append("v_win", v, count)
        return k_past, v_past, q_start


def check_layer_input(
    x: Tensor, dim: int, cache: object, cu_seqlens: Tensor | None, lengths: Tensor | None, attn_mask: object
) -> tuple[int, Tensor | None, Tensor | None]:
    """Check the arguments of an attention layer's forward; tokens per row, `cu_seqlens` and `lengths` as int32."""
    if check_tensor("x", x).ndim != 3 or x.shape[-1] != dim or 0 in x.shape:
        raise ValueError(f"x: expected shape [b, t, {dim}] with b, t >= 1, got {tuple(x.shape)}")
    if attn_mask is not None:
        raise ValueError("attn_mask: expected None (attention is causal; use lengths or cu_seqlens), got a mask")
    return x.shape[1], *check_row_layout(x, cache, cu_seqlens, lengths)


def check_branch(branch: object) -> None:
    """Check the branch that an ablation lets through alone."""
    if branch is not None and branch not in BRANCHES:
        raise ValueError(f"branch: expected None or one of {', '.join(map(repr, BRANCHES))}, got {branch!r}")


def valid_tokens(x: Tensor, cu_seqlens: Tensor | None, lengths: Tensor | None) -> Tensor | None:
    """Which tokens of x [b, t, ...] are no padding, bool [b, t]; None where there is none."""
    if cu_seqlens is not None:
        return query_layout(x, None, cu_seqlens).valid
    return None if lengths is None else torch.arange(x.shape[1], device=x.device) < lengths[:, None]


def check_row_layout(
    x: Tensor, cache: object, cu_seqlens: Tensor | None, lengths: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return `cu_seqlens` and `lengths` of rows x [b, t, ...] as int32: at most one of them, no packed cached rows."""
    b, t = x.shape[:2]
    if cache is not None and not hasattr(cache, "layer"):
        raise TypeError(f"cache: expected an NSACache, got {type(cache).__name__}")
    if cu_seqlens is not None:
        if cache is not None or lengths is not None:
            other = "cache" if cache is not None else "lengths"
            raise ValueError(f"cu_seqlens: expected None together with {other}, got both")
        cu_seqlens = check_cu_seqlens(cu_seqlens, b, t, x.device)
    if lengths is not None:
        lengths = check_lengths(lengths, b, t, x.device)
    return cu_seqlens, lengths
