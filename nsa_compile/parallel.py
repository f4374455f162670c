"""Training on many GPUs: FSDP2, tensor parallelism over the K/V groups, context parallelism over the tokens.

One process per GPU (`torchrun`), one `DeviceMesh` with the dimensions dp, cp and tp:

- **dp** ranks read different rows.
- **tp** ranks hold the heads of different K/V groups, which never meet before the output projection.
- **cp** ranks hold different tokens of the same rows. A row is cut into 2*cp chunks, and rank r has the chunks r and
  2*cp - 1 - r, so that all ranks have as much past to attend to. Compressed tokens and the selection's keys and values
  are all-gathered (reduce-scattered in the backward pass); the window's come from the chunk before.
- The dp and cp ranks together shard weights, gradients and optimizer state (`fully_shard`), block by block.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from nsa_compile.config import NSAConfig
from nsa_compile.custom_ops import sharding  # noqa: F401  (lets the ops take DTensors)
from nsa_compile.custom_ops.cross_entropy import linear_cross_entropy
from nsa_compile.model import NSALanguageModel, check_ids, check_targets, next_tokens
from nsa_compile.module import GateMLP, NSAAttention, check_branch, check_row_layout
from nsa_compile.ops.checks import check_int, check_number
from nsa_compile.ops.gating import GateStatistics
from nsa_compile.ops.layout import compressed_slots, query_layout

MESH_DIMS = ("dp", "cp", "tp")
M = TypeVar("M", bound=nn.Module)


def make_mesh(*, dp: int | None = None, cp: int = 1, tp: int = 1, device: str | None = None) -> DeviceMesh:
    """The mesh (dp, cp, tp) of all processes; starts `torch.distributed` if need be, without torchrun for one process.

    dp defaults to the processes that cp and tp leave; device to "cuda" (NCCL) where there is one, else "cpu" (gloo).
    Ranks that differ in tp alone are neighbours.

    Raises: ValueError or TypeError naming the argument, if dp * cp * tp is not the number of processes.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_int("cp", cp)
    check_int("tp", tp)
    if not dist.is_initialized():
        alone: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, **({} if "RANK" in os.environ else alone))
    world = dist.get_world_size()
    if dp is None:
        if world % (cp * tp):
            raise ValueError(f"cp, tp: expected cp * tp to divide the {world} processes, got {cp} * {tp}")
        dp = world // (cp * tp)
    check_int("dp", dp)
    if dp * cp * tp != world:
        raise ValueError(f"dp, cp, tp: expected dp * cp * tp = {world} processes, got {dp} * {cp} * {tp}")
    return init_device_mesh(device, (dp, cp, tp), mesh_dim_names=MESH_DIMS)


def parallelize(
    model: NSALanguageModel, mesh: DeviceMesh, *, dtype: torch.dtype | None = None, compile: bool = False,
    reshard_after_forward: bool = True,
) -> "ParallelLanguageModel":  # fmt: skip
    """Spread a model over a mesh of `make_mesh`, in place: afterwards it is a `ParallelLanguageModel`.

    Every parameter becomes a DTensor of the same name: a shard of the weights that rank 0 had. Make the optimizer
    afterwards, and clip with `clip_grad_norm`.

    Args:
        model: on the mesh's device, the same config on every rank.
        mesh: dimensions dp, cp, tp.
        dtype: type of activations, gathered weights and local gradients, e.g. bfloat16; weights, sums of gradients over
            ranks and optimizer state keep the model's. None computes in the model's type.
        compile: compile each block to one graph (`torch.compile(fullgraph=True)`).
        reshard_after_forward: free gathered weights between forward and backward, and gather them again.

    Raises: ValueError naming the argument, what was expected and what came, before anything is changed.
    """
    check_plan(model, mesh)
    for tensor in (*model.parameters(), *model.buffers()):
        dist.broadcast(tensor.detach(), 0)
    cp, tp = mesh["cp"], mesh["tp"]
    if tp.size() > 1:
        shard_groups(model, tp)
    ring = TokenRing(cp) if cp.size() > 1 else None
    blocks: list[Any] = list(model.layers)
    for block in blocks:
        if ring is not None:
            become(block.attn, ContextParallelAttention).ring = ring
        if compile:
            block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False)
    parallel = become(model, ParallelLanguageModel)
    parallel.plan = Plan(mesh["dp"].get_group(), mesh["dp"].size() * cp.size(), cp.size() * tp.size(), ring)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=None if dtype is None else model.head.weight.dtype)
    how: dict[str, Any] = {"mesh": data_mesh(mesh), "mp_policy": policy, "reshard_after_forward": reshard_after_forward}
    for block in blocks:
        fully_shard(block, **how)
    fully_shard(parallel, **how)
    register_fsdp_forward_method(parallel, "loss")  # it reads weights of the head, gathered as for a forward
    return parallel


def check_plan(model: NSALanguageModel, mesh: DeviceMesh) -> None:
    """Check that the model can be spread over the mesh."""
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh: expected a DeviceMesh, as make_mesh gives it, got {type(mesh).__name__}")
    if mesh.mesh_dim_names != MESH_DIMS or mesh.size() != dist.get_world_size():
        raise ValueError(
            f"mesh: expected dimensions {MESH_DIMS} over {dist.get_world_size()} processes, got "
            f"{mesh.mesh_dim_names} over {mesh.size()}"
        )
    if type(model) is not NSALanguageModel:
        raise ValueError(f"model: expected an NSALanguageModel that is not yet parallel, got {type(model).__name__}")
    weight, c = model.head.weight, model.config
    if weight.device.type != mesh.device_type:
        raise ValueError(f"model: expected weights on {mesh.device_type} as the mesh's, got {weight.device}")
    check_sizes(c, cp=mesh["cp"].size(), tp=mesh["tp"].size())


def check_sizes(model: NSAConfig, *, cp: int, tp: int) -> None:
    """Raise ValueError for numbers of context- and tensor-parallel processes that a model does not allow."""
    for name, size in (("n_kv_groups", model.n_kv_groups), ("4 * dim", 4 * model.dim)):
        if size % tp:
            raise ValueError(f"tp: expected a divisor of {name} = {size}, got {tp}")
    if cp > 1 and model.attention != "nsa":
        raise ValueError(f"cp: expected 1 for attention {model.attention!r}, got {cp}")


def check_row(name: str, tokens: int, model: NSAConfig, *, cp: int) -> None:
    """Raise ValueError for a row of tokens, whole or packed, that cannot be cut into chunks for cp > 1 processes."""
    if cp > 1 and (tokens % (2 * cp * model.d) or tokens < 2 * cp * model.l):
        raise ValueError(
            f"{name}: expected rows of a multiple of 2 * cp * d = {2 * cp * model.d} tokens, at least 2 * cp * l = "
            f"{2 * cp * model.l}, got {tokens}"
        )


def data_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The ranks that see different tokens, dp and cp, as one dimension."""
    if 1 in (mesh["dp"].size(), mesh["cp"].size()):
        return mesh["dp" if mesh["cp"].size() == 1 else "cp"]
    return mesh["dp", "cp"]._flatten("dp_cp")


def become(module: nn.Module, cls: type[M]) -> M:
    """Give a module a subclass of its class, as `fully_shard` does: the object and its parameters' names stay."""
    module.__class__ = cls
    assert isinstance(module, cls)
    return module


# --- the model -------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """What a parallel model knows of its mesh."""

    rows: dist.ProcessGroup
    """The dp ranks, which see other rows."""
    data_ranks: int
    """dp * cp, the ranks over which `fully_shard` averages."""
    parts: int
    """cp * tp, the ranks that share a row."""
    ring: "TokenRing | None"
    """The cp ranks, if there are several."""


class ParallelLanguageModel(NSALanguageModel):
    """What `parallelize` makes of an `NSALanguageModel`: the same calls, on whole rows.

    The cp and tp ranks of one dp index are given the same `ids`, `cu_seqlens` and `lengths`; each computes its own
    tokens (`own_tokens`) and heads.
    """

    plan: Plan

    def forward(self, ids: Tensor, cache=None, cu_seqlens=None, lengths=None, *, last_only=False, **kwargs) -> Tensor:
        """Logits [b, t / cp, vocab_size] of this rank's tokens of ids [b, t]; as `NSALanguageModel.forward` for cp = 1.

        Raises: ValueError, with cp > 1 also for a cache, for `last_only` and for a t that `own_tokens` refuses.
        """
        if self.plan.ring is not None and last_only:
            raise ValueError("last_only: expected none with cp > 1, got one")
        return super().forward(ids, cache, cu_seqlens, lengths, last_only=last_only, **kwargs)

    def hidden(self, ids: Tensor, cache=None, cu_seqlens=None, lengths=None, **kwargs) -> Tensor:
        """What the head reads of this rank's tokens, [b, t / cp, dim]; as `NSALanguageModel.hidden` for cp = 1."""
        if self.plan.ring is None:
            return super().hidden(ids, cache, cu_seqlens, lengths, **kwargs)
        if cache is not None:
            raise ValueError("cache: expected none with cp > 1, got one")
        check_ids(ids, self.config.vocab_size)
        cu_seqlens, lengths = check_row_layout(ids, None, cu_seqlens, lengths)
        x = self.embed(self.own_tokens(ids))
        for layer in self.layers:
            x = layer(x, None, cu_seqlens, lengths, **kwargs)
        return self.norm(x)

    def loss(self, ids: Tensor, cu_seqlens: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        """Mean cross-entropy of each next token over the rows of all ranks, the same number on each of them.

        Its gradient is that of this rank's share times dp * cp, since `fully_shard` averages over those ranks.
        """
        plan = self.plan
        check_ids(ids, self.config.vocab_size)
        cu_seqlens, lengths = check_row_layout(ids, None, cu_seqlens, lengths)
        target = next_tokens(ids, cu_seqlens, lengths)
        if ids.shape[1] < 2:  # without a look at values: other ranks may have what is missing here
            check_targets(ids, target)
        count = all_reduce((target >= 0).sum(), plan.rows).clamp_min(1)
        x = self.hidden(ids, None, cu_seqlens, lengths).flatten(0, 1)
        share = linear_cross_entropy(x, self.head.weight, self.own_tokens(target).flatten()) / count
        total = all_reduce(share.detach(), plan.rows)
        if plan.ring is not None:
            total = all_reduce(total, plan.ring.group)
        share = share * plan.data_ranks
        return total + (share - share.detach())

    def own_tokens(self, x: Tensor) -> Tensor:
        """This rank's tokens of x [b, t, ...]: its chunks r and 2*cp - 1 - r, [b, t / cp, ...]; all of them for cp = 1.

        Raises: ValueError unless t is a multiple of 2 * cp * d and a chunk is at least l tokens.
        """
        ring = self.plan.ring
        if ring is None:
            return x
        check_row("ids", x.shape[1], self.config, cp=ring.size)
        chunk = x.shape[1] // (2 * ring.size)
        return torch.cat([x[:, start : start + chunk] for start in ring.starts(chunk)], dim=1)

    def all_tokens(self, x: Tensor) -> Tensor:
        """The tokens of all cp ranks in order, from what each of them has, x [b, t / cp, ...]; differentiable."""
        return x if self.plan.ring is None else self.plan.ring.gather(x)[0]

    def gate_statistics(self, ids: Tensor, cu_seqlens=None, lengths=None) -> list[GateStatistics]:
        """As `NSALanguageModel.gate_statistics`; with cp or tp > 1, where no rank has all gates, a ValueError."""
        if self.plan.parts > 1:
            raise ValueError(f"gate_statistics: expected cp * tp = 1, got {self.plan.parts}")
        return super().gate_statistics(ids, cu_seqlens, lengths)

    def save_pretrained(self, folder: str | Path) -> None:
        """As `NSALanguageModel.save_pretrained`: every rank calls it, rank 0 writes."""
        weights = {name: weight.full_tensor().cpu() for name, weight in self.state_dict().items()}
        if dist.get_rank() == 0:
            whole = NSALanguageModel(self.config).to(weights["head.weight"].dtype)
            whole.load_state_dict(weights)
            whole.save_pretrained(folder)
        dist.barrier()


def clip_grad_norm(model: nn.Module, max_norm: float) -> Tensor:
    """Scale the gradients of a parallel model down to the norm `max_norm` over all ranks; the norm before, a scalar."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    check_number("max_norm", max_norm)
    weights = [p for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in weights if p.grad is not None])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    nn.utils.clip_grads_with_norm_(weights, max_norm, norm)
    return norm


def all_reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over the ranks of a group; passes no gradient."""
    summed = torch.ops._c10d_functional.all_reduce(x.detach(), "sum", group.group_name)
    return torch.ops._c10d_functional.wait_tensor(summed)


# --- tensor parallelism ----------------------------------------------------------------------------------------------


def shard_groups(model: NSALanguageModel, mesh: DeviceMesh) -> None:
    """Give each rank the heads of its K/V groups, and its part of the MLPs; the rest is the same on all ranks.

    Weights become DTensors over `mesh`, and modules compute with the local part: of the projections and of the paper's
    gate their rows, of output projections their columns. What the groups share (φ, gates) gets its gradient summed.
    """
    tp = mesh.size()
    placements: dict[tuple[nn.Module, str], Placement] = {}
    summed: set[nn.Module] = set()
    blocks: list[Any] = list(model.layers)
    for block in blocks:
        attn = block.attn
        attn.config = replace(attn.config, n_heads=attn.config.n_heads // tp, n_kv_groups=attn.config.n_kv_groups // tp)
        rows = [m for name, m in attn.named_children() if name.startswith("W_")] + [block.mlp.up]
        columns = [attn.out, block.mlp.down]
        if isinstance(attn, NSAAttention):
            gate: GateMLP = attn.gate
            gate.n_heads, gate.g = attn.config.n_heads, attn.config.n_kv_groups
            rows += [gate.fc2] if gate.kind == "sigmoid" else []
            summed |= {m for part in (gate, attn.phi_k, attn.phi_v) for m in part.modules()} - set(rows)
        placements |= {(m, name): Shard(0) for m in rows for name, _ in m.named_parameters()}
        placements |= {(m, "weight"): Shard(1) for m in columns}
        for entry in (attn, block.mlp):
            entry.register_forward_pre_hook(lambda _, args: (sum_gradients(args[0], mesh), *args[1:]))
        for m in columns:
            m.register_forward_hook(lambda _, args, y: sum_over(y, mesh))

    distributed: dict[nn.Parameter, nn.Parameter] = {}  # tied weights stay tied
    classes: dict[tuple[type, tuple[str, ...], bool], type] = {}
    for module in list(model.modules()):
        names = tuple(name for name, _ in module.named_parameters(recurse=False))
        for name in names:
            weight = module._parameters[name]
            assert weight is not None
            if weight not in distributed:
                placement = placements.get((module, name), Replicate())
                distributed[weight] = nn.Parameter(distribute_tensor(weight.detach(), mesh, [placement]))
            module._parameters[name] = distributed[weight]
        if names:
            key = (type(module), names, module in summed)
            become(module, classes.setdefault(key, local_class(*key, mesh)))


def local_class(cls: type, names: tuple[str, ...], summed: bool, mesh: DeviceMesh) -> type:
    """A subclass in which gathered parameters `names` read as local tensors, with gradients summed if asked for."""

    def reader(name: str) -> property:
        def read(self: nn.Module) -> Tensor:
            weight: Any = self._parameters[name]
            if weight.device_mesh.ndim > 1:  # at rest, sharded over the dp and cp ranks too
                return weight
            return sum_gradients(weight.to_local(), mesh) if summed else weight.to_local()

        return property(read)

    return type(cls.__name__, (cls,), {name: reader(name) for name in names})


def sum_gradients(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """x, the same on all ranks of a mesh, whose gradient becomes the sum of theirs."""
    return DTensor.from_local(x, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])


def sum_over(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum of x over the ranks of a mesh, all of which go on with it alike."""
    return DTensor.from_local(x, mesh, [Partial()], run_check=False).redistribute(placements=[Replicate()]).to_local()


# --- context parallelism ---------------------------------------------------------------------------------------------


class TokenRing:
    """The ranks that share the tokens of a row, cut into n = 2 * size chunks, of which rank r has r and n - 1 - r.

    Chunk i's neighbours are then on the ranks r - 1 and r + 1 (the last rank has both middle chunks), the same ones for
    both chunks, and one all-to-all exchanges what both need of them.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self.group, self.size, self.rank = mesh.get_group(), mesh.size(), mesh.get_local_rank()
        self.after = min(self.rank + 1, self.size - 1)
        """Rank of the chunk after the first and before the second of this rank."""

    def starts(self, chunk: int) -> tuple[int, int]:
        """Index of the first token of this rank's two chunks."""
        return self.rank * chunk, (2 * self.size - 1 - self.rank) * chunk

    def gather(self, *own: Tensor) -> tuple[Tensor, ...]:
        """All tokens in order, [b, t, ...], from each rank's [b, t / size, ...] of tensors alike but in the last axis.

        The gradients are reduce-scattered.
        """
        channels = [x.shape[-1] for x in own]
        x = torch.cat(own, dim=-1) if len(own) > 1 else own[0]
        gathered = torch.ops._c10d_functional.all_gather_into_tensor(x.contiguous(), self.size, self.group.group_name)
        gathered = torch.ops._c10d_functional.wait_tensor(gathered)
        head, tail = rearrange(gathered, "(r b) (two t) ... -> two r b t ...", r=self.size, two=2).unbind(0)
        ordered = torch.cat((head, tail.flip(0)))
        return rearrange(ordered, "n b t ... -> b (n t) ...").split(channels, dim=-1)

    def from_before(self, x: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """The n tokens before each chunk, [b, n, ...], for x [b, 2 * chunk, ...]; none before the row's first chunk."""
        head, tail = x.chunk(2, dim=1)
        first, second = self._exchange(tail[:, tail.shape[1] - n :], head[:, head.shape[1] - n :])
        return first, second

    def from_behind(self, x: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """The n tokens after each chunk, [b, n, ...], for x [b, 2 * chunk, ...]; zeros after the row's last chunk."""
        head, tail = x.chunk(2, dim=1)
        second, first = self._exchange(head[:, :n], tail[:, :n])
        return first, second if self.rank else torch.zeros_like(first)

    def _exchange(self, to_before: Tensor, to_after: Tensor) -> tuple[Tensor, Tensor]:
        """Give tensors [b, n, ...] to the ranks r - 1 and `after`; returns what they give, empty from before rank 0."""
        n = to_after.shape[1]
        splits = [n * (r == self.rank - 1) + n * (r == self.after) for r in range(self.size)]
        x = torch.cat((to_before[:, : n if self.rank else 0], to_after), dim=1)
        given = rearrange(x, "b n ... -> n b ...").contiguous()
        given = torch.ops._c10d_functional.all_to_all_single(given, splits, splits, self.group.group_name)
        got = rearrange(torch.ops._c10d_functional.wait_tensor(given), "n b ... -> b n ...")
        return got[:, : got.shape[1] - n], got[:, got.shape[1] - n :]


class ContextParallelAttention(NSAAttention):
    """`NSAAttention` of this rank's tokens, while other ranks have the others of the same rows."""

    ring: TokenRing

    def forward(
        self, x: Tensor, cache=None, cu_seqlens: Tensor | None = None, lengths: Tensor | None = None, *,
        branch: str | None = None, attn_mask: None = None,
    ) -> Tensor:  # fmt: skip
        """x [b, t / cp, dim] → [b, t / cp, dim], the tokens of the rank's two chunks.

        `cu_seqlens` and `lengths` are those of the whole rows. Other arguments as in `NSAAttention.forward`, but for a
        cache, which is a ValueError.
        """
        if cache is not None or attn_mask is not None:
            raise ValueError(f"{'attn_mask' if cache is None else 'cache'}: expected None with cp > 1, got one")
        check_branch(branch)
        c, chunk = self.config, x.shape[1] // 2
        starts = self.ring.starts(chunk)
        parts = (slice(0, chunk), slice(chunk, None))
        q_starts = [x.new_full(x.shape[:1], start, dtype=torch.int32) for start in starts]
        layouts = [query_layout(x[:, part], at, cu_seqlens) for part, at in zip(parts, q_starts, strict=True)]
        positions = torch.cat([layout.position for layout in layouts], dim=1)
        valid = None
        if cu_seqlens is not None:
            valid = torch.cat([layout.valid for layout in layouts], dim=1)
        elif lengths is not None:
            valid = positions < lengths[:, None]
        if valid is not None:
            x = torch.where(valid[..., None], x, 0.0)

        q, gates, (k_cmp, v_cmp, k_slc, v_slc, k_win, v_win) = self._heads(x, branch)
        q, k_slc, k_win = self._rotate(q, k_slc, k_win, positions)
        k_cmp, v_cmp = self._compress(k_cmp, v_cmp, cu_seqlens)
        k_slc, v_slc = self.ring.gather(k_slc, v_slc)
        windows = self._windows(k_slc, v_slc) if c.tie_kv else self._windows(k_win, v_win)
        outputs = []
        for part, start, q_start, (k_win, v_win) in zip(parts, starts, q_starts, windows, strict=True):
            end = start + chunk
            first = end - k_win.shape[1]
            o, _ = self._attend(
                q[:, part], k_cmp[:, : end // c.d], v_cmp[:, : end // c.d], k_slc[:, :end], v_slc[:, :end],
                k_win, v_win, gates[:, part], q_start=q_start, q_start_win=q_start - first,
                cu_seqlens=None if cu_seqlens is None else cu_seqlens.clamp_max(end),
                cu_seqlens_win=None if cu_seqlens is None else (cu_seqlens - first).clamp(0, end - first),
            )  # fmt: skip
            outputs.append(o)
        y = self.out(rearrange(torch.cat(outputs, dim=1), "b t n v -> b t (n v)"))
        return y if valid is None else torch.where(valid[..., None], y, 0.0)

    def _windows(self, k: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each chunk and up to w - 1 tokens before; k, v [b, t / cp, g, *], if tied all tokens'."""
        c, ring = self.config, self.ring
        size, channels = c.w - 1, (k.shape[-1], v.shape[-1])
        chunk = k.shape[1] // (2 * ring.size if c.tie_kv else 2)
        if not c.tie_kv and size <= chunk:
            own = torch.cat((k, v), dim=-1)
            halos = ring.from_before(own, size) if size else (own[:, :0], own[:, :0])
            return [torch.cat(x, dim=1).split(channels, dim=-1) for x in zip(halos, own.chunk(2, dim=1), strict=True)]
        if not c.tie_kv:
            k, v = ring.gather(k, v)
        spans = [slice(max(0, start - size), start + chunk) for start in ring.starts(chunk)]
        return [(k[:, span], v[:, span]) for span in spans]

    def _compress(self, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        """All compressed tokens in the order of `compress_mean`; a block is made where its first token is."""
        c, ring = self.config, self.ring
        chunk = k.shape[1] // 2
        own = torch.cat((k, v), dim=-1)
        halo = c.l - (c.d if cu_seqlens is None else 1)
        halos = ring.from_behind(own, halo) if halo else (own[:, :0], own[:, :0])
        made = []
        for start, *parts in zip(ring.starts(chunk), own.chunk(2, dim=1), halos, strict=True):
            tokens = torch.cat(parts, dim=1).split((k.shape[-1], v.shape[-1]), dim=-1)
            here = None if cu_seqlens is None else sequences_within(cu_seqlens, start, start + chunk + halo, c.d)
            k_cmp, v_cmp = self.phi_k(tokens[0], here), self.phi_v(tokens[1], here)
            made.append(torch.cat((k_cmp, v_cmp), dim=-1)[:, : chunk // c.d])
        (every,) = ring.gather(torch.cat(made, dim=1))
        block = torch.arange(every.shape[1], device=k.device)
        if cu_seqlens is not None:  # the chunks' blocks leave gaps
            block, first, used = compressed_slots(every.shape[1], cu_seqlens, l=c.l, d=c.d)
            first = torch.where(used, first, 2 * ring.size * chunk)
            borders = torch.arange(2 * ring.size + 1, device=k.device) * chunk
            before = torch.searchsorted(first, borders)  # blocks that begin before each chunk
            of = first // chunk
            slot = torch.arange(every.shape[1], device=k.device)
            every = every.index_select(1, (of * (chunk // c.d) + slot - before[of]).clamp_max(every.shape[1] - 1))
        k, v = every.split((k.shape[-1], v.shape[-1]), dim=-1)
        return self._rotate_blocks(k, block), v


def sequences_within(cu_seqlens: Tensor, start: int, end: int, d: int) -> Tensor:
    """Packed sequences [N + 2] of the tokens start … end - 1 of a row, cut so that blocks lie as in the row.

    The sequence that is under way at `start` begins at its first block from there on; what lies before is a sequence of
    less than d tokens, which has no block.
    """
    ends = cu_seqlens.long()
    under_way = torch.where(ends <= start, ends, 0).amax()
    following = torch.where(ends <= start, end, ends).amin()
    first = torch.minimum(start + (under_way - start) % d, following)
    inner = torch.where(ends <= start, first, ends).clamp(start, end)
    return nn.functional.pad(inner - start, (1, 0)).int()
