"""On a CUDA device: the ops, a compiled training step and decode in CUDA graphs, without a stop of the host."""

import pytest
import torch
from torch._dynamo.utils import counters

from nsa_compile import NSACache, NSAConfig, NSALanguageModel, compress_mean, nsa_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SIZES = {"l": 8, "d": 4, "l_sel": 16, "n_sel": 4, "w": 24}


@pytest.fixture
def no_sync():
    """Any operation that makes the host wait for the device is an error."""
    yield lambda on: torch.cuda.set_sync_debug_mode("error" if on else "default")
    torch.cuda.set_sync_debug_mode("default")


def make_model(**changes) -> NSALanguageModel:
    torch.manual_seed(0)
    sizes = {"dim": 64, "n_heads": 8, "n_kv_groups": 2, "d_k": 16, "d_v": 16, "n_layers": 2, **SIZES, **changes}
    return NSALanguageModel(NSAConfig(**sizes)).cuda()


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_attention_and_gradients_equal_those_on_the_cpu(packed):
    torch.manual_seed(0)
    b, t = (1, 150) if packed else (2, 133)
    cu_seqlens = torch.tensor([0, 40, 40, 141], dtype=torch.int32) if packed else None
    cpu = [torch.randn(b, t, n, x, dtype=torch.float64) for n, x in ((8, 16), (2, 16), (2, 12), (8, 3))]

    def run(device):
        q, k, v, gates = (x.to(device, copy=True).requires_grad_() for x in cpu)
        cu = None if cu_seqlens is None else cu_seqlens.to(device)
        k_cmp, v_cmp = (compress_mean(x, l=8, d=4, cu_seqlens=cu) for x in (k, v))
        o = nsa_attention(q, k_cmp, v_cmp, k, v, k, v, gates, **SIZES, cu_seqlens=cu)
        return [o, *torch.autograd.grad(o.square().sum(), (q, k, v, gates))]

    for got, expected in zip(run("cuda"), run("cpu"), strict=True):
        torch.testing.assert_close(got.cpu(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("phi", ["avg", "mlp"])
def test_a_compiled_training_step_never_stops_the_host(phi, no_sync):
    model = make_model(phi=phi)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loss = torch.compile(model.loss, fullgraph=True)
    ids = torch.randint(0, 256, (4, 200), device="cuda")
    losses = []
    for step in range(10):
        no_sync(step >= 2)
        value = loss(ids)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.detach())
    no_sync(False)
    assert losses[-1].item() < losses[0].item()


@pytest.mark.parametrize("phi", ["avg", "mlp"])
def test_decode_steps_are_one_cuda_graph_that_never_stops_the_host(phi, no_sync):
    model = make_model(phi=phi)
    prompt = torch.randint(0, 256, (3, 70), device="cuda")
    lengths = torch.tensor([70, 33, 1], dtype=torch.int32, device="cuda")

    def decode(step, cache, synchronizes):
        token, out = model(prompt, cache=cache, lengths=lengths, last_only=True)[:, -1].argmax(-1, keepdim=True), []
        for i in range(200):
            no_sync(not synchronizes and i >= 5)
            torch.compiler.cudagraph_mark_step_begin()
            out.append(step(token, cache=cache)[:, -1].clone())
            token = out[-1].argmax(-1, keepdim=True)
        no_sync(False)
        return torch.stack(out, 1)

    with torch.inference_mode():
        expected = decode(model, NSACache.for_model(model, 3, 300), synchronizes=True)
        torch._dynamo.reset()
        counters.clear()
        step, cache = torch.compile(model, fullgraph=True, mode="reduce-overhead"), NSACache.for_model(model, 3, 300)
        step(prompt[:, :1].clone(), cache=cache)
        cache.reset()
        with torch.compiler.set_stance("fail_on_recompile"):
            got = decode(step, cache, synchronizes=False)
    assert counters["inductor"]["cudagraph_skips"] == 0
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert cache.positions.tolist() == [270, 233, 201]
