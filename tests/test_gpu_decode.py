"""Decode graphs on a CUDA device: captured equals uncaptured, decode the full forward, and the host never waits."""

import pytest
import torch
from torch._dynamo.utils import counters

from nsa_compile import DecodeGraph, NSACache, NSAConfig, NSALanguageModel, PrefillGraph
from nsa_compile.graphs.prefill import prefill

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
LENGTHS = (1, 33, 70, 510, 1025)
STEPS = 512
CHOICES = [{}, {"phi": "mlp", "gate": "sigmoid"}, {"tie_kv": True}]


def choice_id(choice: dict) -> str:
    return "-".join(map(str, choice)) or "plain"


def make_model(dtype=torch.bfloat16, **changes) -> NSALanguageModel:
    torch.manual_seed(0)
    sizes = {"dim": 128, "n_heads": 8, "n_kv_groups": 2, "d_k": 32, "d_v": 32, "n_layers": 2, "vocab_size": 512}
    sizes |= {"l": 32, "d": 16, "l_sel": 64, "n_sel": 4, "w": 96}
    model = NSALanguageModel(NSAConfig(**sizes | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # random where training starts at zero, too
                parameter.normal_(std=parameter[0].numel() ** -0.5)
        model.embed.weight.normal_()
    return model.to("cuda", dtype).eval()


def draw_prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(512, (n,), generator=generator).tolist() for n in LENGTHS]


def run(model, *, capture, drafts=0, steps=STEPS) -> tuple[list[list[int]], NSACache]:
    prompts = draw_prompts()
    cache = NSACache.for_model(model, len(prompts), max(LENGTHS) + STEPS)
    graph = DecodeGraph(model, cache, capture=capture, drafts=drafts)
    prefill(model, [prompt[:-1] for prompt in prompts], cache)
    for row, prompt in enumerate(prompts):
        graph.start(row, prompt[-1], max_new_tokens=steps, temperature=row % 2 * 1.0, seed=row)
    graph.step(steps)
    return [update.tokens for update in graph.collect()], cache


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("choice", CHOICES, ids=choice_id)
def test_captured_steps_equal_uncaptured_ones_to_the_bit(choice, dtype):
    model = make_model(dtype, **choice)
    (captured, cache), (uncaptured, other) = (run(model, capture=on) for on in (True, False))
    assert captured == uncaptured and all(len(row) == STEPS for row in captured)
    for a, b in zip(cache.tensors(), other.tensors(), strict=True):
        assert torch.equal(a, b)


def decode_logits(model, ids, first: int) -> torch.Tensor:
    """Logits of the tokens from `first` on, which are fed one by one."""
    cache = NSACache.for_model(model, len(ids), ids.shape[1])
    rows = [row[:first] for row in ids.tolist()]
    out = [prefill(model, rows, cache)]
    token = torch.zeros(len(ids), 1, dtype=torch.int64, device="cuda")
    step = torch.cuda.CUDAGraph()
    with torch.no_grad():
        model(token, cache=cache, lengths=torch.zeros(len(ids), dtype=torch.int32, device="cuda"))
        with torch.cuda.graph(step):
            logits = model(token, cache=cache)[:, 0]
        for i in range(first, ids.shape[1] - 1):
            token.copy_(ids[:, i : i + 1])
            step.replay()
            out.append(logits.clone())
    return torch.stack(out, 1)


@pytest.mark.parametrize("first", [1, 700])
@pytest.mark.parametrize("choice", CHOICES, ids=choice_id)
def test_decoded_logits_equal_those_of_the_full_forward(choice, first):
    """bf16: no further from the exact ones than twice what the reference in bf16 is; fp32: within 1e-4."""
    ids = torch.randint(512, (3, first + STEPS), generator=torch.Generator().manual_seed(2)).cuda()
    state = make_model(torch.bfloat16, **choice).state_dict()

    def like(dtype, **changes):
        model = make_model(dtype, **choice, **changes)
        model.load_state_dict(state)
        return model

    with torch.no_grad():
        exact = like(torch.float64, impl="reference")(ids)[:, first - 1 : -1]
        plain = like(torch.bfloat16, impl="reference")(ids)[:, first - 1 : -1].double()
    for dtype in (torch.bfloat16, torch.float32):
        got = decode_logits(like(dtype), ids, first).double()
        error, bound = (got - exact).abs(), 1e-4
        if dtype == torch.bfloat16:
            assert error.square().mean().sqrt() <= 2 * (plain - exact).square().mean().sqrt() + 1e-3
            bound = 2 * (plain - exact).abs().max().item() + 1e-3
        assert error.max() <= bound
        top = exact.topk(2, -1)
        clear = top.values[..., 0] - top.values[..., 1] > 2 * bound
        assert clear.any()
        assert torch.equal(got.argmax(-1)[clear], top.indices[..., 0][clear])


def test_a_graph_captured_under_autocast_keeps_its_casts():
    """Those that autocast keeps are freed when it ends."""
    model = make_model(torch.float32)
    tokens = []
    for capture in (True, False):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            cache = NSACache.for_model(model, 1, 200, dtype=torch.bfloat16)
            prefill(model, [[1, 2, 3]], cache)
            graph = DecodeGraph(model, cache, capture=capture)
            graph.start(0, 4, max_new_tokens=100)
            graph.step(2)
        junk = [torch.full((2**20,), float("nan"), device="cuda") for _ in range(64)] if capture else []
        with torch.autocast("cuda", dtype=torch.bfloat16):
            graph.step(98)
        tokens.append(graph.collect()[0].tokens)
        del junk
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_thousand_replays_never_stop_the_host_compile_or_allocate(compiled):
    model = make_model()
    step = torch.compile(model, fullgraph=True) if compiled else model
    cache, slot = NSACache.for_model(model, 4, 4096), NSACache.for_model(model, 1, 4096)
    graph, fill = DecodeGraph(step, cache), PrefillGraph(step, slot, sizes=(64, 256))
    prompts = draw_prompts()
    for row in range(3):
        fill([prompts[row][:-1]])
        cache.copy_row(row, slot)
        slot.reset()
        graph.start(row, prompts[row][-1], max_new_tokens=1100, temperature=0.5, seed=row)
    graph.step(3)
    torch.cuda.synchronize()
    counters.clear()
    before = torch.cuda.memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.compiler.set_stance("fail_on_recompile"):
            graph.step(500)
            fill([prompts[4][:-1]])  # a prompt meanwhile, into a row that was idle
            cache.copy_row(3, slot)
            graph.start(3, prompts[4][-1], max_new_tokens=600, temperature=0.5, seed=3)
            graph.step(500)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    after = torch.cuda.memory_stats()
    for key in ("reserved_bytes.all.current", "allocated_bytes.all.current", "segment.all.allocated"):
        assert after[key] == before[key], key
    assert not counters["stats"] and not counters["inductor"]
    tokens = {update.row: update.tokens for update in graph.collect()}
    assert [len(tokens[row]) for row in range(4)] == [1003, 1003, 1003, 500]
    for row in range(4):  # alone in the same graph
        graph.cancel(row)
    graph.collect()
    for row in (1, 3):
        prompt = prompts[4 if row == 3 else row]
        slot.reset()
        fill([prompt[:-1]])
        cache.copy_row(row, slot)
        graph.start(row, prompt[-1], max_new_tokens=len(tokens[row]), temperature=0.5, seed=row)
        graph.step(len(tokens[row]))
        assert graph.collect()[0].tokens == tokens[row]


@pytest.mark.parametrize("choice", CHOICES, ids=choice_id)
def test_models_compiled_for_graphs_of_their_own_draw_the_same(choice):
    model = make_model(torch.float32, **choice)
    expected, _ = run(model, capture=True, steps=200)
    counters.clear()
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    got, _ = run(compiled, capture=None, steps=200)
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert got == expected
    with pytest.raises(
        ValueError, match=r"capture: expected None or False \(the model runs in CUDA graphs of its own\)"
    ):
        run(compiled, capture=True)


def test_captured_drafts_give_the_tokens_of_plain_steps():
    model = make_model(torch.float32)
    expected, _ = run(model, capture=True, steps=120)
    prompts = draw_prompts()
    cache = NSACache.for_model(model, len(prompts), max(LENGTHS) + STEPS)
    graph = DecodeGraph(model, cache, drafts=7)
    prefill(model, [prompt[:-1] for prompt in prompts], cache)
    for row, prompt in enumerate(prompts):
        graph.start(row, prompt[-1], max_new_tokens=120, temperature=row % 2 * 1.0, seed=row)
    texts, step = [[] for _ in prompts], 0
    while len(graph.idle) < len(prompts):
        guesses = torch.full((len(prompts), 7), -1)
        for row, text in enumerate(texts):
            follow = expected[row][len(text) :][: (step + row) % 8]
            guesses[row, : len(follow)] = torch.tensor(follow, dtype=torch.int64)
        graph.step(drafts=guesses.cuda())
        for update in graph.collect():
            texts[update.row] += update.tokens
        step += 1
    assert texts == expected and step < 60
