"""What a user's code does around layers: autocast, other parallelism than ours, checkpointing, meta devices, copies."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from models import draw_ids, make_model
from parallel_checks import run
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from nsa_compile import NSACache, NSAConfig, NSALanguageModel

CHANGES = [{}, {"phi": "mlp", "gate": "sigmoid", "tie_kv": True}]


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("changes", CHANGES, ids=["plain", "mlp-sigmoid-tied"])
def test_autocast_computes_in_bf16_with_fp32_weights_and_gradients(changes):
    ids = draw_ids(2, 24)
    plain, model, bf16 = (make_model(torch.float32, **changes) for _ in range(3))
    bf16.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(ids).dtype == torch.bfloat16
        loss = model.loss(ids)
    losses = loss, plain.loss(ids), bf16.loss(ids)
    for value in losses:
        value.backward()
    torch.testing.assert_close(losses[0], losses[1], rtol=0.02, atol=0)
    flat = [torch.cat([p.grad.float().flatten() for p in x.parameters()]) for x in (model, plain, bf16)]
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert 0 < (flat[0] - flat[1]).norm() <= 1.5 * (flat[2] - flat[1]).norm()


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("t", [1, 3, 4])
def test_every_parameter_has_a_gradient_at_any_length(t, packed):
    """DistributedDataParallel waits for all of them."""
    model, where = make_model(torch.float32, l=4, phi="mlp", gate="sigmoid"), {}
    if packed:
        where["cu_seqlens"] = torch.tensor([0, t], dtype=torch.int32)
    model(draw_ids(1, t), **where).sum().backward()
    assert not [name for name, grad in gradients(model).items() if grad is None]


def check_wrapped(device, wrap):
    """Each of two processes takes one row; the mean of their losses is one process's of both."""
    rank, ids = dist.get_rank(), draw_ids(2, 24)
    plain, model = (make_model(torch.float32, tie_embeddings=True) for _ in range(2))
    plain.loss(ids).backward()
    model = wrap(model)
    logits = model(ids[rank : rank + 1])
    torch.nn.functional.cross_entropy(logits[:, :-1].mT, ids[rank : rank + 1, 1:]).backward()
    for (name, grad), got in zip(gradients(plain).items(), gradients(model).values(), strict=True):
        got = got.full_tensor() if isinstance(got, DTensor) else got
        torch.testing.assert_close(got, grad, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def shard_fully(model):
    for block in model.layers:
        fully_shard(block)
    return fully_shard(model)


@pytest.mark.parametrize("wrap", [DistributedDataParallel, shard_fully], ids=["ddp", "fsdp2"])
def test_two_processes_have_the_gradients_of_one(wrap, tmp_path):
    run(2, tmp_path, "cpu", check_wrapped, wrap)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_have_the_same_gradients(reentrant):
    ids = draw_ids(2, 24)
    plain, model = (make_model(phi="mlp") for _ in range(2))
    plain.loss(ids).backward()
    x = model.embed(ids)
    for block in model.layers:
        x = checkpoint(block, x, use_reentrant=reentrant)
    logits = model.head(model.norm(x))
    torch.nn.functional.cross_entropy(logits[:, :-1].mT, ids[:, 1:]).backward()
    for (name, grad), got in zip(gradients(plain).items(), gradients(model).values(), strict=True):
        torch.testing.assert_close(got, grad, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("changes", [*CHANGES, {"attention": "dense"}], ids=["plain", "mlp-sigmoid-tied", "dense"])
def test_models_made_on_the_meta_device(changes, tied):
    model = make_model(torch.float32, tie_embeddings=tied, **changes)
    with torch.device("meta"):
        loaded, fresh = (NSALanguageModel(model.config) for _ in range(2))
    assert all(x.is_meta for x in (*loaded.parameters(), *loaded.buffers()))
    loaded.to_empty(device="cpu").load_state_dict(model.state_dict())
    torch.testing.assert_close(loaded(draw_ids(2, 20)), model(draw_ids(2, 20)))
    assert (loaded.head.weight is loaded.embed.weight) == tied
    expected = NSALanguageModel(model.config)
    for weight in fresh.to_empty(device="cpu").parameters():
        torch.nn.init.constant_(weight, float("nan"))
    for made in (fresh, expected):
        torch.manual_seed(0)
        made.reset_parameters()
    for (name, weight), other in zip(fresh.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(weight, other), name


def test_dynamic_graphs_of_many_lengths_and_batches_are_few():
    torch._dynamo.reset()
    model, graphs = make_model(torch.float32, phi="mlp"), []

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    compiled = torch.compile(model, dynamic=True, fullgraph=True, backend=backend)
    for b, t in ((2, 20), (3, 31), (2, 64), (5, 17), (4, 100), (7, 9)):
        ids = draw_ids(b, t, seed=t)
        torch.testing.assert_close(compiled(ids), model(ids))
    assert len(graphs) == 1


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_of_models_configs_and_caches(copier):
    model, ids = make_model(phi="mlp").eval(), draw_ids(2, 12)
    assert copier(model.config) == model.config and isinstance(copier(model.config), NSAConfig)
    with torch.no_grad():
        cache = NSACache.for_model(model, 2, 40)
        cache.reserve(12)
        model(ids, cache=cache)
        other, twin = copier((model, cache))
        assert twin.host_lengths == [12, 12] and other.layers[0].attn is not model.layers[0].attn
        expected = model(ids[:, :3], cache=cache)
        torch.testing.assert_close(other(ids[:, :3], cache=twin), expected)
        assert twin.positions.tolist() == cache.positions.tolist() == [15, 15]
        with pytest.raises(ValueError, match=r"^cache: expected one made by"):
            model(ids[:, :3], cache=twin)


def test_a_copied_cache_goes_on_with_the_same_model():
    model, ids = make_model().eval(), draw_ids(2, 12)
    with torch.no_grad():
        cache = NSACache.for_model(model, 2, 40)
        cache.reserve(12)
        model(ids, cache=cache)
        with torch.inference_mode():
            branch = copy.deepcopy(cache)
        assert branch.modules == cache.modules
        expected = model(ids[:, :3], cache=cache)
        torch.testing.assert_close(model(ids[:, :3], cache=branch), expected)
        model(ids[:, :1], cache=branch)
    assert (cache.positions == 15).all() and (branch.positions == 16).all()
    assert branch.host_lengths == [12, 12]
