"""What every process of a parallel test runs: a model over a mesh against the same model in one process."""

from __future__ import annotations

import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from cases import Shape, draw, draw_inputs, int32
from models import draw_ids, make_layer, make_model
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from nsa_compile import (
    NSACache,
    NSALanguageModel,
    clip_grad_norm,
    compress_mean,
    compressed_attention,
    gated_sum,
    make_mesh,
    nsa_attention,
    parallelize,
    select_blocks,
    selected_attention,
    window_attention,
)
from nsa_compile.checkpoints import Checkpoints, find_checkpoint, load_state
from nsa_compile.launch import SaidElsewhere
from nsa_compile.model import next_tokens
from nsa_compile.train import cpu_group

T = 64
BOUNDS = [(0, 5, 5, 29, 60), (0, 16, 17, 33, 48, 64), (0, 64), (0, 1, 2, 31)]
"""Packed rows: sequences over borders of chunks and on them, shorter than a block, empty, padding."""
MODELS = {
    "plain": {},
    "mlp-sigmoid": {"phi": "mlp", "gate": "sigmoid"},
    "mlp-softmax": {"phi": "mlp"},
    "tied": {"tie_kv": True, "tie_embeddings": True},
    "window-over-chunks": {"w": 40},
    "no-halos": {"l": 4, "d": 4, "l_sel": 8, "n_sel": 3, "w": 1},
}


class Rows(NamedTuple):
    """A batch of a dp rank: ids [b, t] and how they are packed or padded."""

    ids: Tensor
    cu_seqlens: Tensor | None = None
    lengths: Tensor | None = None


def draw_rows(kind: str, ranks: int, device: str, seed: int = 0) -> list[Rows]:
    """Rows for each dp rank."""
    ids = draw_ids(ranks, 1 if kind == "packed" else 2, T, seed=seed).to(device)
    if kind == "packed":
        return [Rows(x, int32(*BOUNDS[(i + seed) % 4]).to(device)) for i, x in enumerate(ids)]
    if kind == "lengths":
        return [Rows(x, None, int32(T - i, 30 + i).to(device)) for i, x in enumerate(ids)]
    return [Rows(x) for x in ids]


def whole_loss(model: NSALanguageModel, rows: list[Rows]) -> Tensor:
    """The mean over all tokens of all rows in one process."""
    targets = [next_tokens(*x) for x in rows]
    total = sum(
        torch.nn.functional.cross_entropy(model(x.ids, None, *x[1:]).mT, y, reduction="sum")
        for x, y in zip(rows, targets, strict=True)
    )
    return total / sum((y >= 0).sum() for y in targets)


def assert_near(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    error = (actual - expected).abs().max() / expected.abs().max().clamp_min(1e-4)
    assert error <= tolerance, f"{what}: off by {error:.1e} of the largest"


class Bench:
    """A mesh and a type to check in."""

    def __init__(self, dp: int, cp: int, tp: int, device: str, dtype: torch.dtype) -> None:
        self.mesh = make_mesh(dp=dp, cp=cp, tp=tp, device=device)
        self.dp, self.row, self.device, self.dtype = dp, self.mesh["dp"].get_local_rank(), device, dtype
        self.tolerance = 1e-11 if dtype == torch.float64 else 1e-5

    def models(self, **changes) -> tuple[NSALanguageModel, NSALanguageModel]:
        """The same model twice; of the second one only rank 0 has the weights."""
        plain, other = (make_model(self.dtype, **changes).to(self.device) for _ in range(2))
        if dist.get_rank():
            with torch.no_grad():
                for weight in other.parameters():
                    weight.zero_()
        return plain, other

    def check_gradients(self, kind: str, backend: str = "", **changes) -> None:
        """Logits, loss and gradients."""
        plain, other = self.models(**changes)
        model = parallelize(other, self.mesh)
        if backend:
            for block in model.layers:
                block.forward = torch.compile(block.forward, backend=backend, fullgraph=True, dynamic=False)
        rows = draw_rows(kind, self.dp, self.device)
        mine = rows[self.row]
        logits = plain(mine.ids, None, *mine[1:])
        assert_near(model.all_tokens(model(mine.ids, None, *mine[1:])), logits, self.tolerance, "logits")
        expected, loss = whole_loss(plain, rows), model.loss(*mine)
        assert_near(loss, expected, self.tolerance, "loss")
        expected.backward()
        loss.backward()
        for (name, whole), (same, weight) in zip(plain.named_parameters(), model.named_parameters(), strict=True):
            assert name == same
            assert isinstance(weight, DTensor)
            assert_near(weight.grad.full_tensor(), whole.grad, 100 * self.tolerance, f"gradient of {name}")

    def check_training(self, kind: str, **changes) -> None:
        """Losses, norms of gradients and weights over 20 steps of AdamW."""
        plain, other = self.models(**changes)
        model = parallelize(other, self.mesh)
        optimizers = [torch.optim.AdamW(x.parameters(), lr=3e-3) for x in (plain, model)]
        losses = []
        for step in range(20):
            rows = draw_rows(kind, self.dp, self.device, seed=step % 3)
            expected, loss = whole_loss(plain, rows), model.loss(*rows[self.row])
            expected.backward()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
            assert_near(clip_grad_norm(model, 0.5), norm, 1e4 * self.tolerance, f"norm of step {step}")
            assert_near(loss, expected, 1e3 * self.tolerance, f"loss of step {step}")
            losses.append(loss.item())
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        assert losses[-1] < losses[0] - 0.2
        for (name, whole), weight in zip(plain.named_parameters(), model.parameters(), strict=True):
            assert_near(weight.full_tensor(), whole, 1e4 * self.tolerance, name)

    def check_decoding(self) -> None:
        """Ranks of tensor parallelism keep caches of their own groups."""
        plain, other = self.models(phi="mlp")
        model, ids = parallelize(other, self.mesh), draw_ids(2, 40).to(self.device)
        with torch.no_grad():
            cache = NSACache.for_model(model, batch=2, capacity=64)
            steps = [model(ids[:, a:z], cache) for a, z in pairwise([0, 30, 31, 32, 36, 40])]
            assert_near(torch.cat(steps, dim=1), plain(ids), self.tolerance, "decoding")

    def check_mixed_precision(self) -> None:
        """Weights, gradients and optimizer state stay in fp32 while bf16 computes."""
        plain, other = (x.float() for x in self.models())
        model = parallelize(other, self.mesh, dtype=torch.bfloat16)
        seen = []
        model.layers[0].attn.W_Q.register_forward_hook(lambda module, args, y: seen.append((args[0].dtype, y.dtype)))
        rows = draw_rows("rows", self.dp, self.device)
        loss = model.loss(*rows[self.row])
        loss.backward()
        assert seen == [(torch.bfloat16, torch.bfloat16)]
        assert loss.dtype == torch.float32
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
        assert_near(loss, whole_loss(plain, rows), 5e-2, "loss in bf16")

    def check_saving(self) -> None:
        plain, other = self.models(tie_embeddings=True)
        model = parallelize(other, self.mesh)
        folder = [tempfile.mkdtemp()]
        dist.broadcast_object_list(folder)
        model.save_pretrained(folder[0])
        loaded = NSALanguageModel.from_pretrained(folder[0])
        for whole, weight in zip(plain.parameters(), loaded.parameters(), strict=True):
            assert torch.equal(whole.float().cpu(), weight)

    def check_sharing(self) -> None:
        """Each rank holds its part of the weights."""
        plain, other = self.models()
        model = parallelize(other, self.mesh)
        ranks = dist.get_world_size()
        whole, local = (sum(getattr(p, "_local_tensor", p).numel() for p in x.parameters()) for x in (plain, model))
        assert local < 1.4 * whole / ranks or self.mesh["tp"].size() > 1  # embedding and head are on every tp rank
        part, all_of_it = (x.layers[0].mlp.up.weight for x in (model, plain))
        assert part.to_local().numel() * ranks == all_of_it.numel()


def refuse(match: str, call: Callable) -> None:
    try:
        call()
    except ValueError as error:
        assert re.search(match, str(error)), f"expected {match!r}, got {error}"
    else:
        raise AssertionError(f"expected a ValueError with {match!r}")


def check_errors(device: str) -> None:
    """What cannot be spread over 2 processes."""
    refuse("cp, tp: expected cp \\* tp to divide the 2 processes, got 3 \\* 1", lambda: make_mesh(cp=3, device=device))
    refuse("expected dp \\* cp \\* tp = 2 processes, got 2 \\* 2 \\* 1", lambda: make_mesh(dp=2, cp=2, device=device))
    context, tensor = (make_mesh(device=device, **{name: 2}) for name in ("cp", "tp"))
    other = init_device_mesh(device, (2,), mesh_dim_names=("tp",))
    model = make_model().to(device)
    refuse("mesh: expected dimensions", lambda: parallelize(model, other))
    one_group = make_model(n_kv_groups=1).to(device)
    refuse("tp: expected a divisor of n_kv_groups = 1, got 2", lambda: parallelize(one_group, tensor))
    dense = make_model(attention="dense").to(device)
    refuse("cp: expected 1 for attention 'dense', got 2", lambda: parallelize(dense, context))
    assert type(model) is NSALanguageModel
    assert not any(isinstance(p, DTensor) for p in model.parameters())
    spread = parallelize(model, context)
    refuse("model: expected an NSALanguageModel that is not yet parallel", lambda: parallelize(model, context))
    ids = draw_ids(1, 62).to(device)
    refuse("ids: expected rows of a multiple of 2 \\* cp \\* d = 8 tokens", lambda: spread.loss(ids))
    refuse("at least 2 \\* cp \\* l = 16, got 8", lambda: spread(ids[:, :8]))
    refuse("last_only: expected none with cp > 1", lambda: spread(ids, last_only=True))
    cache = NSACache.for_model(make_model().to(device), 1, 64)
    refuse("cache: expected none with cp > 1", lambda: spread(ids[:, :8], cache))
    refuse("gate_statistics: expected cp \\* tp = 1, got 2", lambda: spread.gate_statistics(ids))
    refuse("branch: expected None or one of", lambda: spread(draw_ids(1, T).to(device), branch="none"))


PLANS = {
    2: {"dp": (2, 1, 1), "cp": (1, 2, 1), "tp": (1, 1, 2)},
    4: {"dp-cp": (2, 2, 1), "dp-tp": (2, 1, 2), "cp-tp": (1, 2, 2), "cp": (1, 4, 1)},
    8: {"dp-cp-tp": (2, 2, 2)},
}


def check_everything(device: str, dtype: torch.dtype) -> None:
    """All plans of this number of processes; of more than two, each with half of the kinds of rows and models."""
    if dist.get_world_size() == 2 and dtype == torch.float64:
        check_errors(device)
    for i, (plan, sizes) in enumerate(PLANS[dist.get_world_size()].items()):
        bench = Bench(*sizes, device, dtype)
        for j, (name, changes) in enumerate(MODELS.items()):
            both = ("rows", "packed")
            for kind in both if dist.get_world_size() == 2 else both[(i + j) % 2 :][:1]:
                labelled(f"{plan} {name} {kind}", bench.check_gradients, kind, **changes)
        labelled(f"{plan} lengths", bench.check_gradients, "lengths")
        labelled(f"{plan} sharing", bench.check_sharing)
        labelled(f"{plan} mixed precision", bench.check_mixed_precision)
        labelled(f"{plan} saving", bench.check_saving)
        if sizes[1] == 1:
            labelled(f"{plan} decoding", bench.check_decoding)
        if plan != "cp" or dist.get_world_size() == 2:
            labelled(f"{plan} training", bench.check_training, "packed", phi="mlp")


def check_compiled(device: str, dtype: torch.dtype, backend: str, *plans: str) -> None:
    """Blocks as whole graphs, one for both layers; on a CPU, where that takes long, each kind of rows in few plans."""
    cases = {"packed": {"phi": "mlp", "gate": "sigmoid"}, "rows": {}}
    kinds = {"dp": ("rows",), "cp": ("packed", "rows"), "tp": ("packed",), "cp-tp": ("packed",)}
    for plan in plans:
        bench = Bench(*PLANS[dist.get_world_size()][plan], device, dtype)
        for kind in cases if device == "cuda" else kinds[plan]:
            changes = cases[kind]
            torch.compiler.reset()
            torch._dynamo.utils.counters.clear()
            labelled(f"{plan} compiled {kind}", bench.check_gradients, kind, backend, **changes)
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, f"{plan} {kind}: more than one graph"


def check_dtensors(device: str, shape: tuple[int, ...], dims: dict[str, list]) -> None:
    """nsa_attention of DTensors against that of whole tensors: what is sharded how, and how often ranks talk."""
    mesh = init_device_mesh(device, shape)
    sizes = Shape(g=4, h=2)
    whole = [x.to(device).requires_grad_() for x in draw_inputs(sizes, 40, b=4)]
    o = nsa_attention(*whole, **sizes.everything)
    expected = [o, *torch.autograd.grad(o.square().sum(), whole)]
    for name, placements in dims.items():
        stays = all(not isinstance(p, Shard) or p.dim in (0, 2) for p in placements)
        tensors = [distribute_tensor(x.detach(), mesh, placements).requires_grad_() for x in whole]
        with CommDebugMode() as talk:
            o = nsa_attention(*tensors, **sizes.everything)
            got = [o, *torch.autograd.grad(o.square().sum(), tensors)]
        assert (talk.get_total_counts() == 0) == stays, f"{name}: {talk.get_total_counts()} collectives"
        assert not stays or all(x.placements == tuple(placements) for x in got), name
        for x, y in zip(got, expected, strict=True):
            assert_near(x.full_tensor(), y, 1e-12, name)


def check_packed_dtensors(device: str) -> None:
    """Every op on a packed row of DTensors, sharded over groups; compiled, too."""
    mesh, sizes, t = init_device_mesh(device, (2,)), Shape(), 40
    cu_seqlens = int32(0, 7, 31, 38).to(device)
    whole = [x.to(device) for x in draw_inputs(sizes, t, c=t // sizes.d)]
    tensors = [distribute_tensor(x, mesh, [Shard(2)]) for x in whole]

    def attend(q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, where) -> list[Tensor]:
        o_cmp, lse = compressed_attention(q, k_cmp, v_cmp, **sizes.compression, cu_seqlens=where)
        blocks = select_blocks(q, k_cmp, lse, **sizes.choice, cu_seqlens=where)
        o_slc, _ = selected_attention(q, k_slc, v_slc, blocks, l_sel=sizes.l_sel, cu_seqlens=where)
        o_win, _ = window_attention(q, k_win, v_win, w=sizes.w, cu_seqlens=where)
        k_mean = compress_mean(k_slc, **sizes.compression, cu_seqlens=where)
        return [gated_sum(o_cmp, o_slc, o_win, gates), blocks, k_mean]

    expected, where = attend(*whole, cu_seqlens), distribute_tensor(cu_seqlens, mesh, [Replicate()])
    for run in (attend, torch.compile(attend, backend="aot_eager", fullgraph=True)):
        for x, y in zip(run(*tensors, where), expected, strict=True):
            assert x.placements == (Shard(2),)
            assert_near(x.full_tensor().double(), y.double(), 1e-12, "packed")


def check_refused_dtensors(device: str) -> None:
    """Never a part of the tokens as if it were all of them: a clear error where there is no rule."""
    mesh, sizes = init_device_mesh(device, (2,)), Shape()
    q, k, v = (x.to(device) for x in draw_inputs(sizes, 40)[:1] + draw_inputs(sizes, 40)[5:7])
    sharded = distribute_tensor(q, mesh, [Shard(1)])
    buffer = distribute_tensor(k, mesh, [Shard(2)])
    positions = distribute_tensor(int32(0).to(device), mesh, [Replicate()])
    layer = make_layer().to(device)
    for match, call in {
        "mixed torch.Tensor and DTensor": lambda: window_attention(sharded, k, v, w=7),
        "does not have a sharding strategy": lambda: torch.ops.nsa_compile.cache_append(
            buffer, buffer, positions, None, False
        ),
        "got mixed": lambda: layer(distribute_tensor(draw(1, 40, 20, seed=0).to(device), mesh, [Shard(1)])),
    }.items():
        with pytest.raises((RuntimeError, NotImplementedError), match=match):
            call()


def check_checkpoints(device: str) -> None:
    """All processes decide alike what to save, however long the first one takes to rename a folder."""
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    group = cpu_group(1000.0)
    assert group._get_backend(torch.device("cpu")).options._timeout.total_seconds() == 2010
    slow = dist.new_group(backend="gloo", timeout=timedelta(seconds=20))
    model = parallelize(make_model().float(), make_mesh(device="cpu"))
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoints, rename = Checkpoints(Path(folder[0]), group=slow), Path.rename
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", lambda path, to: (time.sleep(1), rename(path, to)))
        for _ in range(2):
            checkpoints.save(1, model, optimizer, {})
        checkpoints.wait()
    dist.barrier()
    assert find_checkpoint(folder[0]).name == "step-000001"
    load_state(find_checkpoint(folder[0]), model, optimizer, slow)
    dist.barrier()
    if dist.get_rank() == 0:  # a pickle that names os.system; all refuse it together, and one says why
        (find_checkpoint(folder[0]) / ".metadata").write_bytes(b"cposix\nsystem\n.")
    dist.barrier()
    with pytest.raises(ValueError, match=r"posix\.system, which could run code") as error:
        load_state(find_checkpoint(folder[0]), model, optimizer, slow)
    assert isinstance(error.value, SaidElsewhere) == (dist.get_rank() > 0)


def check_together(device: str, checks: list[tuple]) -> None:
    """Several checks with their arguments."""
    for check, *args in checks:
        labelled(check.__name__, check, device, *args)


def labelled(label: str, check: Callable, *args, **kwargs) -> None:
    try:
        check(*args, **kwargs)
    except Exception as error:
        raise AssertionError(f"{label}: {error}") from error


def work(rank: int, world: int, store: str, device: str, check: Callable, args: tuple) -> None:
    """A process of `run`."""
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(world)}
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world)
    try:
        check(device, *args)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def run(world: int, folder: Path, device: str, check: Callable, *args) -> None:
    """Run `check(device, *args)` in `world` processes, of a server that has loaded torch for all of them."""
    torch.multiprocessing.get_context("forkserver").set_forkserver_preload(["nsa_compile.train", "pytest"])
    arguments = (world, str(folder / "store"), device, check, args)
    torch.multiprocessing.start_processes(work, arguments, nprocs=world, start_method="forkserver")


if __name__ == "__main__":  # 8 processes are too many for a test
    with tempfile.TemporaryDirectory() as name:
        run(int(sys.argv[1]), Path(name), "cpu", check_everything, torch.float64)
