"""LlamaBlockNSA and NSALanguageModel: a language model of Native Sparse Attention, or dense for comparison."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Self, cast

import torch
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from nsa_compile.config import NSAConfig
from nsa_compile.custom_ops.cross_entropy import linear_cross_entropy
from nsa_compile.custom_ops.decode import STEP
from nsa_compile.custom_ops.rope import rotate_all
from nsa_compile.module import (
    GateMLP,
    MLPCompressor,
    NSAAttention,
    PackedProjections,
    check_layer_input,
    check_row_layout,
    valid_tokens,
)
from nsa_compile.ops.checks import check_tensor, values_are_visible
from nsa_compile.ops.gating import GateStatistics, gate_statistics
from nsa_compile.ops.layout import query_layout
from nsa_compile.storage import METADATA_FILE, whole_files

if TYPE_CHECKING:
    from nsa_compile.graphs.cache import NSACache

NORM_EPS = 1e-6


class DenseAttention(PackedProjections):
    """Causal grouped-query attention over the whole past, with the call of `NSAAttention`: the yardstick."""

    def __init__(self, config: NSAConfig) -> None:
        super().__init__()
        self.config = c = config
        self.W_Q = nn.Linear(c.dim, c.n_heads * c.d_k, bias=False)
        self.W_K = nn.Linear(c.dim, c.n_kv_groups * c.d_k, bias=False)
        self.W_V = nn.Linear(c.dim, c.n_kv_groups * c.d_v, bias=False)
        self.out = nn.Linear(c.n_heads * c.d_v, c.dim, bias=False)

    def cache_layout(self, capacity: int) -> tuple[dict[str, tuple[int, int]], int]:
        """Buffers a cache of this layer has (name → length, channels), and the key/value heads."""
        c = self.config
        return {"k": (capacity, c.d_k), "v": (capacity, c.d_v)}, c.n_kv_groups

    def forward(
        self, x: Tensor, cache: "NSACache | None" = None, cu_seqlens: Tensor | None = None,
        lengths: Tensor | None = None, *, branch: None = None, attn_mask: None = None,
    ) -> Tensor:  # fmt: skip
        """As `NSAAttention.forward`; `branch` must be None."""
        c = self.config
        t = check_layer_input(x, c.dim, cache, cu_seqlens, lengths, attn_mask)
        if branch is not None:
            raise ValueError(f"branch: expected None (dense attention has no branches), got {branch!r}")
        layer = None if cache is None else cache.layer(self)
        valid = valid_tokens(x, cu_seqlens, lengths)
        if valid is not None:
            x = torch.where(valid[..., None], x, 0.0)
        projected = self.project(x, few=layer is not None and t <= STEP)
        q = rearrange(projected["W_Q"], "b t (n k) -> b t n k", k=c.d_k)
        k = rearrange(projected["W_K"], "b t (g k) -> b t g k", k=c.d_k)
        v = rearrange(projected["W_V"], "b t (g v) -> b t g v", v=c.d_v)
        if layer is not None:
            layer.check_room(k, lengths)
        layout = query_layout(x, None if layer is None else layer.positions, cu_seqlens)
        q, k = rotate_all((q, k), layout.position, theta=c.rope_theta)
        if layer is not None:
            layer.append("k", k, lengths)
            layer.append("v", v, lengths)
            layer.advance(t, lengths)
            k, v = layer.buffers["k"], layer.buffers["v"]
        mask = None
        if layer is not None or cu_seqlens is not None:
            key = torch.arange(k.shape[1], device=x.device)
            own = (layout.first + layout.position)[..., None]
            mask = ((key >= layout.first[..., None]) & (key <= own)).unsqueeze(1)
        q, k, v = (rearrange(y, "b t n x -> b n t x") for y in (q, k, v))
        o = nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
        y = self.out(rearrange(o, "b n t v -> b t (n v)"))
        return y if valid is None else torch.where(valid[..., None], y, 0.0)


class MLP(nn.Module):
    """Bias-free feed-forward layer: Linear(dim → 4 dim) → SiLU → Linear(4 dim → dim)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, 4 * dim, bias=False)
        self.down = nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] → [..., dim]."""
        return self.down(nn.functional.silu(self.up(x)))


class LlamaBlockNSA(nn.Module):
    """Transformer block: `x + NSA(RMSNorm(x))`, then `x + MLP(RMSNorm(x))`; RMSNorm's epsilon is 1e-6.

    Arguments are those of `NSAAttention`, or `config=` alone, whose `attention` may be "dense".
    """

    def __init__(self, *args: int, config: NSAConfig | None = None, **kwargs) -> None:
        super().__init__()
        if config is not None and (args or kwargs):
            raise TypeError("config: expected it alone, got other arguments beside it")
        if config is not None and config.attention == "dense":
            self.attn: nn.Module = DenseAttention(config)
        else:
            self.attn = (
                NSAAttention(*args, **kwargs) if config is None else NSAAttention(**config.attention_arguments())
            )
        dim = self.attn.config.dim
        self.norm_attn = nn.RMSNorm(dim, eps=NORM_EPS)
        self.norm_mlp = nn.RMSNorm(dim, eps=NORM_EPS)
        self.mlp = MLP(dim)

    def forward(
        self, x: Tensor, cache: "NSACache | None" = None, cu_seqlens: Tensor | None = None,
        lengths: Tensor | None = None, *, branch: str | None = None, attn_mask: None = None,
    ) -> Tensor:  # fmt: skip
        """x [b, t, dim] → [b, t, dim]; arguments as in `NSAAttention.forward`."""
        x = x + self.attn(self.norm_attn(x), cache, cu_seqlens, lengths, branch=branch, attn_mask=attn_mask)
        return x + self.mlp(self.norm_mlp(x))


class NSALanguageModel(nn.Module):
    """Decoder-only language model: embedding, `n_layers` blocks, RMSNorm, head."""

    def __init__(self, config: NSAConfig) -> None:
        super().__init__()
        if not isinstance(config, NSAConfig):
            raise TypeError(f"config: expected an NSAConfig, got {type(config).__name__}")
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(LlamaBlockNSA(config=config) for _ in range(config.n_layers))
        self.norm = nn.RMSNorm(config.dim, eps=NORM_EPS)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        self.reset_parameters()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if self.config.tie_embeddings:  # which `to_empty` makes two of on the way from the meta device
            self.head.weight = self.embed.weight
        return self

    def reset_parameters(self) -> None:
        """Normal weights of 0.02, less for the layers that write to the residual stream; gates and φ as they start."""
        for name, module in self.named_modules():
            if isinstance(module, (nn.RMSNorm, nn.Conv1d)) or getattr(module, "bias", None) is not None:
                cast(nn.Linear, module).reset_parameters()
            if isinstance(module, (nn.Linear, nn.Embedding)):
                into_residual = name.endswith((".out", ".down"))
                nn.init.normal_(module.weight, std=0.02 / (2 * self.config.n_layers) ** 0.5 if into_residual else 0.02)
        for module in self.modules():
            if isinstance(module, (GateMLP, MLPCompressor)):
                module.reset_parameters()

    def forward(
        self, ids: Tensor, cache: "NSACache | None" = None, cu_seqlens: Tensor | None = None,
        lengths: Tensor | None = None, *, last_only: bool = False, branch: str | None = None, attn_mask: None = None,
    ) -> Tensor:  # fmt: skip
        """Logits of the next token.

        Args:
            ids: int64 or int32 [b, t] token ids.
            cache, cu_seqlens, lengths, branch, attn_mask: as in `NSAAttention.forward`.
            last_only: give the logits of each row's last token alone, [b, 1, vocab_size].

        Returns: [b, t, vocab_size] in the type of the weights.

        Raises: ValueError or TypeError naming the argument, before anything is written.
        """
        x = self.hidden(ids, cache, cu_seqlens, lengths, branch=branch, attn_mask=attn_mask)
        if last_only:
            if cu_seqlens is not None:
                raise ValueError("last_only: expected False together with cu_seqlens, got True")
            last = x.new_full((x.shape[0],), x.shape[1], dtype=torch.int64) if lengths is None else lengths.long()
            x = x[torch.arange(x.shape[0], device=x.device), (last - 1).clamp_min(0)].unsqueeze(1)
        return self.head(x)

    def hidden(
        self, ids: Tensor, cache: "NSACache | None" = None, cu_seqlens: Tensor | None = None,
        lengths: Tensor | None = None, *, branch: str | None = None, attn_mask: None = None,
    ) -> Tensor:  # fmt: skip
        """What the head reads, [b, t, dim]; arguments as in `forward`."""
        check_ids(ids, self.config.vocab_size)
        check_row_layout(ids, cache, cu_seqlens, lengths)
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, cache, cu_seqlens, lengths, branch=branch, attn_mask=attn_mask)
        return self.norm(x)

    def loss(self, ids: Tensor, cu_seqlens: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        """Mean cross-entropy of each next token within its own sequence, in nats, fp32 (fp64 for fp64 weights).

        ids [b, t] with t >= 2; `cu_seqlens` and `lengths` as in `forward`. Compiles to one graph. The logits of all
        tokens are never there at once; see `linear_cross_entropy`.
        """
        target = next_tokens(ids, cu_seqlens, lengths)
        x = self.hidden(ids, None, cu_seqlens, lengths)
        total = linear_cross_entropy(x.flatten(0, 1), self.head.weight, target.flatten())
        return total / (target >= 0).sum().clamp_min(1)

    @torch.no_grad()
    def gate_statistics(
        self, ids: Tensor, cu_seqlens: Tensor | None = None, lengths: Tensor | None = None
    ) -> list[GateStatistics]:
        """How each layer mixes its branches on a batch; see `gate_statistics`."""
        valid = valid_tokens(ids, cu_seqlens, lengths)
        gates: list[Tensor] = []
        modules = [m for m in self.modules() if isinstance(m, GateMLP)]
        hooks = [m.register_forward_hook(lambda module, args, output: gates.append(output)) for m in modules]
        try:
            self(ids, None, cu_seqlens, lengths)
        finally:
            for hook in hooks:
                hook.remove()
        return [gate_statistics(g, valid) for g in gates]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors into a folder, made where missing: both, or after an error neither.

        Raises: ValueError for a file in the folder's place; OSError naming the folder, as for a full disk.
        """
        with whole_files(Path(folder), "model.safetensors", "config.json") as (weights, config):
            save_model(self, str(weights))
            self.config.save(config)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> Self:
        """Read what `save_pretrained` wrote, or a checkpoint of `train`.

        Raises: ValueError for a folder without such a model, or weights that do not fit the config.
        """
        from nsa_compile.sharded import count_sharded, load_sharded  # takes a moment

        folder = Path(folder)
        weights, shards = folder / "model.safetensors", folder / METADATA_FILE
        for path in (folder / "config.json", shards if shards.is_file() else weights):
            if not path.is_file():
                raise ValueError(
                    f"folder: expected one with {path.name} as save_pretrained writes it, or a checkpoint, got {folder}"
                )
        config = NSAConfig.load(folder / "config.json")
        try:
            found = count_elements(weights) if weights.is_file() else count_sharded(folder)
            with torch.device("meta"):  # a config of a model that no memory holds is refused before it is made
                n = sum(p.numel() for p in cls(config).parameters())
            if n > found:
                raise ValueError(f"{found:,} elements for {n:,} parameters")
            model = cls(config)
            if weights.is_file():
                load_model(model, str(weights))
            else:
                load_sharded({"model": model.state_dict()}, folder)
        except SafetensorError as error:
            raise ValueError(f"folder: expected a whole file of weights, got {weights}: {error}") from error
        except (RuntimeError, ValueError, OSError) as error:
            raise ValueError(f"folder: expected weights that fit {folder / 'config.json'}, got {error}") from error
        return model.to(device=device, dtype=dtype)


def count_elements(path: Path) -> int:
    """Elements of all tensors in a file of safetensors, by its header."""
    with safe_open(path, "pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def check_ids(ids: object, vocab_size: int) -> None:
    """Check token ids: int64 or int32 [b, t], b and t at least 1, values below `vocab_size`."""
    tensor = check_tensor("ids", ids)
    if tensor.dtype not in (torch.int32, torch.int64) or tensor.ndim != 2 or 0 in tensor.shape:
        raise ValueError(f"ids: expected integers [b, t] with b, t >= 1, got {tensor.dtype} {tuple(tensor.shape)}")
    if values_are_visible(tensor) and not 0 <= tensor.min() <= tensor.max() < vocab_size:
        low, high = (int(x) for x in tensor.aminmax())
        raise ValueError(f"ids: expected values in 0 … {vocab_size - 1}, got {low} … {high}")


def next_tokens(ids: Tensor, cu_seqlens: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
    """The token after each of ids [b, t] within its own sequence: int64 [b, t], -100 for none."""
    target = torch.where(query_layout(ids, None, cu_seqlens).position[:, 1:] > 0, ids[:, 1:].long(), -100)
    valid = valid_tokens(ids, cu_seqlens, lengths)
    if valid is not None:
        target = torch.where(valid[:, 1:], target, -100)
    return nn.functional.pad(target, (0, 1), value=-100)
