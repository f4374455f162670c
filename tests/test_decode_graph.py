"""Rows that come and go through prefill and decode graphs: each draws what it would draw alone, whatever the others do.

On a CPU the graphs are calls of the model; on CUDA they are captured.
"""

import copy

import pytest
import torch
from models import make_model
from safetensors.torch import load_file

from nsa_compile import DecodeGraph, NSACache, PrefillGraph, generate
from nsa_compile.graphs.capture import captures_itself
from nsa_compile.graphs.decode import LOG
from nsa_compile.graphs.prefill import prefill, split_chunks

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
SIZES = {"l": 4, "d": 2, "l_sel": 4, "n_sel": 3, "w": 5}
CAPACITY = 96
PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6], [5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6], [2, 6, 4], [3, 3, 8, 3, 2]]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=GPU)])
def device(request):
    return request.param


def sharp_model(device, **changes):
    """A model whose choices are far from ties."""
    model = make_model(torch.float64 if device == "cpu" else torch.float32, **SIZES, **changes).eval().to(device)
    with torch.no_grad():
        model.head.weight.mul_(20)
    return model


@pytest.fixture(params=[{"phi": "mlp", "gate": "sigmoid"}, {"tie_kv": True}, {"attention": "dense"}], ids=str)
def model(request, device):
    return sharp_model(device, **request.param)


def arguments_of(row: int) -> dict:
    """Different for every prompt, some greedy."""
    return {"temperature": (0.0, 3.0, 2.0, 0.0, 4.0)[row], "top_p": (1.0, 0.9, 1.0, 1.0, 0.7)[row], "seed": 7 * row}


def alone(model, row: int, n: int, **changes) -> list[int]:
    return generate(model, [PROMPTS[row]], max_new_tokens=n, **arguments_of(row) | changes).tokens[0]


def serve(model, batch: int, counts: list[int], every: int, *, stop_token=None, graph=None) -> list[list[int]]:
    """The prompts through a batch of a few rows, each as soon as one is free."""
    graph = graph or DecodeGraph(model, NSACache.for_model(model, batch, CAPACITY))
    slot = NSACache.for_model(model, 1, CAPACITY)
    fill = PrefillGraph(model, slot, sizes=(2, 8))
    waiting, texts, of = list(range(len(counts))), [[] for _ in counts], {}
    while waiting or of:
        for row in graph.idle[: len(waiting)]:
            of[row] = number = waiting.pop(0)
            slot.reset()
            fill([PROMPTS[number][:-1]])
            graph.cache.copy_row(row, slot)
            graph.start(
                row, PROMPTS[number][-1], max_new_tokens=counts[number], stop_token=stop_token, **arguments_of(number)
            )
        graph.step(every)
        for update in graph.collect():
            texts[of[update.row]] += update.tokens
            if update.finished:
                del of[update.row]
    return texts


@pytest.mark.parametrize("batch, every", [(1, 1), (2, 3), (3, 1), (5, 7)])
def test_rows_that_come_and_go_draw_what_they_draw_alone(model, batch, every):
    counts = [20, 33, 5, 41, 1]
    assert serve(model, batch, counts, every) == [alone(model, row, n) for row, n in enumerate(counts)]


def test_rows_in_one_graph_are_the_same_to_the_bit_whatever_their_neighbours_do(device):
    """Also where choices are near ties, since nothing but the neighbours differs."""
    model = make_model(torch.float32, **SIZES, phi="mlp").eval().to(device)
    graph = DecodeGraph(model, NSACache.for_model(model, 3, CAPACITY))
    together = serve(model, 3, [30, 18, 25], 4, graph=graph)
    for row in range(3):
        graph.cache.reset()
        if len(PROMPTS[row]) > 1:
            prefill(model, [PROMPTS[row][:-1] if r == row else [] for r in range(3)], graph.cache)
        graph.start(row, PROMPTS[row][-1], max_new_tokens=[30, 18, 25][row], **arguments_of(row))
        graph.step(30)
        (update,) = graph.collect()
        assert update.finished and update.tokens == together[row]


def test_a_stop_token_frees_its_row_for_the_next(model):
    free = [alone(model, row, 30) for row in range(5)]
    stop = free[2][4]
    expected = [row[: row.index(stop)] if stop in row else row for row in free]
    assert serve(model, 2, [30] * 5, 4, stop_token=stop) == expected


def test_steps_past_the_end_change_nothing(model):
    graph = DecodeGraph(model, NSACache.for_model(model, 2, CAPACITY))
    graph.start(1, 6, max_new_tokens=3)
    graph.step(LOG + 10)
    (update,) = graph.collect()
    assert (update.row, len(update.tokens), update.finished, update.stopped) == (1, 3, True, False)
    assert graph.cache.positions.tolist() == graph.cache.host_lengths == [0, 3]
    assert graph.collect() == [] and graph.idle == [0, 1]


def test_more_steps_than_the_device_keeps_lose_no_token(device):
    model = sharp_model(device)
    graph = DecodeGraph(model, NSACache.for_model(model, 1, 3 * LOG))
    graph.start(0, 6, max_new_tokens=2 * LOG + 9)
    graph.step(2 * LOG + 9)
    (update,) = graph.collect()
    assert update.tokens == generate(model, [[6]], max_new_tokens=2 * LOG + 9).tokens[0]


def test_a_cancelled_row_keeps_what_it_drew(model):
    expected = alone(model, 2, 30)
    graph = DecodeGraph(model, NSACache.for_model(model, 2, CAPACITY))
    prefill(model, [[], PROMPTS[2][:-1]], graph.cache)
    graph.start(1, PROMPTS[2][-1], max_new_tokens=30, **arguments_of(2))
    graph.step(11)
    graph.cancel(1)
    graph.step(3)
    (update,) = graph.collect()
    assert update == (1, expected[:11], True, False)
    assert graph.cache.positions.tolist() == graph.cache.host_lengths == [0, len(PROMPTS[2]) + 10]
    graph.start(1, expected[10], max_new_tokens=19, **arguments_of(2))  # and goes on where it was
    graph.step(19)
    assert graph.collect()[0].tokens == expected[11:]


def test_a_row_ends_after_its_tokens_even_if_its_cache_is_reset_meanwhile(model):
    graph = DecodeGraph(model, NSACache.for_model(model, 1, CAPACITY))
    graph.start(0, 6, max_new_tokens=20)
    graph.step(7)
    graph.cache.reset([0])
    graph.step(30)
    (update,) = graph.collect()
    assert (len(update.tokens), update.finished, graph.idle) == (20, True, [0])
    assert not graph._active.any()


@pytest.mark.parametrize("inside", [(True, False, True), (False, True, False)], ids=str)
def test_graphs_work_across_inference_modes(device, inside):
    """Made, started and stepped in inference mode or not."""
    model = sharp_model(device)
    expected = alone(model, 2, 20)
    with torch.inference_mode(inside[0]):
        cache = NSACache.for_model(model, 1, CAPACITY)
        graph, fill = DecodeGraph(model, cache, drafts=1), PrefillGraph(model, cache, sizes=(4,))
    with torch.inference_mode(inside[1]):
        fill([PROMPTS[2][:-1]])
        graph.start(0, PROMPTS[2][-1], max_new_tokens=20, **arguments_of(2))
        graph.step(5)
    with torch.inference_mode(inside[2]):
        graph.step(5)
        graph.step(drafts=torch.zeros(1, 1, dtype=torch.int64, device=device))
        graph.step(9)
    assert graph.collect()[0].tokens == expected


def test_a_step_that_fails_can_be_made_again(monkeypatch):
    model = sharp_model("cpu")
    graph = DecodeGraph(model, NSACache.for_model(model, 1, CAPACITY))
    graph.start(0, 6, max_new_tokens=5)
    graph.step(2)

    def fail(*args, **kwargs):
        raise KeyError

    monkeypatch.setattr(model, "forward", fail)
    with pytest.raises(KeyError):
        graph.step()
    monkeypatch.undo()
    graph.step(3)
    assert graph.collect()[0].tokens == generate(model, [[6]], max_new_tokens=5).tokens[0]


def test_graphs_share_a_cache(model):
    cache = NSACache.for_model(model, 2, CAPACITY)
    plain, drafting = DecodeGraph(model, cache), DecodeGraph(model, cache, drafts=3)
    prefill(model, [PROMPTS[0][:-1], PROMPTS[2][:-1]], cache)
    plain.start(0, PROMPTS[0][-1], max_new_tokens=20, **arguments_of(0))
    drafting.start(1, PROMPTS[2][-1], max_new_tokens=15, **arguments_of(2))
    for _ in range(20):
        plain.step()
        drafting.step()
    (one,), (other,) = plain.collect(), drafting.collect()
    assert (one.tokens, other.tokens) == (alone(model, 0, 20), alone(model, 2, 15))
    assert cache.positions.tolist() == cache.host_lengths


# --- speculative steps -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drafts", range(1, 8))
def test_verified_drafts_give_the_tokens_of_plain_steps(model, drafts):
    """Drafts that are right up to a place that changes from step to step, in rows that differ in it."""
    n = 60
    expected = [alone(model, row, n) for row in range(3)]
    graph = DecodeGraph(model, NSACache.for_model(model, 3, CAPACITY), drafts=drafts)
    prefill(model, [ids[:-1] for ids in PROMPTS[:3]], graph.cache)
    for row in range(3):
        graph.start(row, PROMPTS[row][-1], max_new_tokens=n, **arguments_of(row))
    texts, step, device = [[], [], []], 0, graph.cache.positions.device
    while len(graph.idle) < 3:
        guesses = torch.full((3, drafts), -1, dtype=torch.int64)
        for row in range(3):
            follow = expected[row][len(texts[row]) :][:drafts]
            right = (step * (row + 2)) % (drafts + 1)
            for i, token in enumerate(follow):
                guesses[row, i] = token if i < right else (token + 1) % 31
        graph.step(drafts=guesses.to(device))
        for update in graph.collect():
            right = min((step * (update.row + 2)) % (drafts + 1), drafts)
            assert len(update.tokens) == min(right + 1, n - len(texts[update.row]))
            texts[update.row] += update.tokens
        step += 1
    assert texts == expected
    assert graph.cache.positions.tolist() == graph.cache.host_lengths == [len(ids) - 1 + n for ids in PROMPTS[:3]]


@pytest.mark.parametrize("draft", [31, 2**62, -7])
def test_drafts_that_no_host_could_check_are_wrong_guesses_where_they_are_no_tokens(model, draft):
    graph = DecodeGraph(model, NSACache.for_model(model, 1, CAPACITY), drafts=2)
    graph.start(0, 6, max_new_tokens=5)
    for _ in range(5):
        graph._drafts.fill_(draft)
        graph.step()
    assert graph.collect()[0].tokens == generate(model, [[6]], max_new_tokens=5).tokens[0]


def test_a_stop_token_among_verified_drafts_ends_the_row_there(model):
    free = alone(model, 2, 20)
    stop = free[5]
    before = free.index(stop)
    graph = DecodeGraph(model, NSACache.for_model(model, 1, CAPACITY), drafts=7)
    prefill(model, [PROMPTS[2][:-1]], graph.cache)
    graph.start(0, PROMPTS[2][-1], max_new_tokens=20, stop_token=stop, **arguments_of(2))
    graph.step(drafts=torch.tensor([free[:7]], device=graph.cache.positions.device))
    (update,) = graph.collect()
    assert update == (0, free[:before], True, True)
    assert graph.cache.positions.tolist() == graph.cache.host_lengths == [len(PROMPTS[2]) + before]


@pytest.mark.parametrize("m", range(1, 9))
def test_tokens_of_a_step_can_be_taken_back_to_any_of_them(model, m):
    device = next(model.parameters()).device
    ids = torch.randint(31, (m + 1, 40), generator=torch.Generator().manual_seed(0)).to(device)
    guess = ids.clone()
    cache = NSACache.for_model(model, m + 1, 40)
    tolerance = 1e-9 if device.type == "cpu" else 1e-3
    with torch.no_grad():
        full = model(ids)
        cache.reserve(17)
        model(ids[:, :17], cache)
        for row in range(m + 1):  # row r keeps r of m
            guess[row, 17 + row : 17 + m] = (guess[row, 17 + row : 17 + m] + 1) % 31
        cache.reserve(m)
        logits = model(guess[:, 17 : 17 + m], cache)
        cache.rollback([m - row for row in range(m + 1)])
        assert cache.host_lengths == cache.positions.tolist() == [17 + row for row in range(m + 1)]
        for row in range(m + 1):
            torch.testing.assert_close(logits[row, :row], full[row, 17 : 17 + row], rtol=tolerance, atol=tolerance)
        for step in range(10):
            at = torch.arange(17, 18 + m, device=device) + step
            row = torch.arange(m + 1, device=device)
            logits = model(ids[row, at][:, None], cache)[:, 0]
            torch.testing.assert_close(logits, full[row, at], rtol=tolerance, atol=tolerance)


# --- projections in one product ---------------------------------------------------------------------------------------


def step_logits(model, compiled=False):
    """Logits of two steps of 1 and 3 tokens after a prompt."""
    device = next(model.parameters()).device
    ids = torch.arange(2 * 9, device=device).view(2, 9)
    cache = NSACache.for_model(model, 2, 16)
    step = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    with torch.no_grad():
        model(ids[:, :5], cache)
        return torch.cat((step(ids[:, 5:6], cache), step(ids[:, 6:], cache)), 1)


def pack(model) -> list:
    layers = [m for m in model.modules() if hasattr(m, "pack_projections")]
    for layer in layers:
        layer.pack_projections()
    return layers


def test_packed_projections_are_the_same_parameters_and_give_the_same_steps(model):
    expected, before = step_logits(model), {name: p.clone() for name, p in model.named_parameters()}
    layers = pack(model)
    assert all(layer._packed is not None for layer in layers)
    assert {name: id(p) for name, p in model.named_parameters()}.keys() == before.keys()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    tolerance = 1e-9 if expected.dtype == torch.float64 else 1e-3
    for compiled in (False, True):
        torch.testing.assert_close(step_logits(model, compiled), expected, rtol=tolerance, atol=tolerance)


def test_packed_projections_follow_their_weights(model, tmp_path):
    """An update in place, loaded weights, copies, types, and parameters that were replaced."""
    pack(model)
    other = copy.deepcopy(model)
    assert all(m._packed is None for m in other.modules() if hasattr(m, "pack_projections"))
    other.save_pretrained(tmp_path)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.25)
        for p in other.parameters():
            p.mul_(1.25)
    torch.testing.assert_close(step_logits(model), step_logits(other))
    model.save_pretrained(tmp_path / "packed")
    loaded, saved = load_file(tmp_path / "packed" / "model.safetensors"), other.state_dict()
    assert loaded.keys() == saved.keys() and all(torch.equal(loaded[name], saved[name].cpu()) for name in saved)
    model.load_state_dict({name: 0.5 * p for name, p in other.state_dict().items()})
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(step_logits(model), step_logits(other))
    model.load_state_dict({name: 2 * p for name, p in other.state_dict().items()}, assign=True)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(step_logits(model), step_logits(other))
    layers = pack(model)
    model.to(torch.float32)
    assert all(layer._packed is None for layer in layers)


def test_projections_with_hooks_are_left_alone(device):
    model = sharp_model(device)
    seen = []
    model.layers[0].attn.W_Q.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    first, second = pack(model)
    assert first._packed is None and second._packed is not None
    graph = DecodeGraph(model, NSACache.for_model(model, 1, 8), capture=False)
    assert seen
    model.layers[1].attn.W_Q.register_forward_hook(lambda module, inputs, output: seen.append("late"))
    graph.step()
    assert "late" in seen


# --- prefill and cache -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "length, chunks",
    [(0, []), (1, [4]), (4, [4]), (5, [4, 4]), (7, [4, 4]), (8, [16]), (17, [16, 4]), (40, [64]), (90, [64, 16, 16])],
)
def test_chunks_waste_at_most_half_of_one(length, chunks):
    assert split_chunks(length, (64, 4, 16)) == chunks


def test_prefill_graph_equals_one_call(model):
    whole, chunked = (NSACache.for_model(model, 4, CAPACITY) for _ in range(2))
    fill = PrefillGraph(model, chunked, sizes=(2, 8, 200))
    assert fill.sizes == [2, 8, CAPACITY]
    prompts = [[*ids, *ids, *ids] for ids in PROMPTS[:4]]
    tolerance = 1e-9 if whole.positions.device.type == "cpu" else 1e-3
    for _ in range(2):
        torch.testing.assert_close(fill(prompts), prefill(model, prompts, whole), rtol=tolerance, atol=tolerance)
    before = fill.logits.clone()
    after = fill([[], [1], [], []])
    assert torch.equal(after[[0, 2, 3]], before[[0, 2, 3]]) and not torch.equal(after[1], before[1])
    assert chunked.positions.tolist() == chunked.host_lengths


def test_chunks_without_tokens_are_refused(model):
    with pytest.raises(ValueError, match=r"^chunk: expected at least 1, got 0"):
        prefill(model, [[1, 2]], NSACache.for_model(model, 1, CAPACITY), chunk=0)


def test_reset_of_some_rows_leaves_the_others(model):
    cache = NSACache.for_model(model, 3, CAPACITY)
    prefill(model, [[1, 2], [3, 4, 5], [6]], cache)
    cache.reset([0, 2])
    assert cache.positions.tolist() == cache.host_lengths == [0, 3, 0]
    assert all(layer.positions.tolist() == [0, 3, 0] for layer in cache.layers)


@pytest.mark.parametrize("in_place", [False, True], ids=["wrapped", "in place"])
@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize(
    "options, own",
    [
        ({}, False),
        ({"mode": "reduce-overhead"}, True),
        ({"mode": "max-autotune"}, True),
        ({"mode": "max-autotune-no-cudagraphs"}, False),
        ({"options": {"triton.cudagraphs": True}}, True),
        ({"backend": "aot_eager"}, False),
    ],
    ids=str,
)
def test_models_that_run_in_cuda_graphs_of_their_own_are_known(options, own, fullgraph, in_place):
    model = torch.nn.Linear(2, 2)
    assert not captures_itself(model)
    if in_place:
        model.compile(fullgraph=fullgraph, **options)
        assert captures_itself(model) == own
    else:
        assert captures_itself(torch.compile(model, fullgraph=fullgraph, **options)) == own


# --- what is refused, before anything is written ---------------------------------------------------------------------


def refused(words: str, call, *args, **kwargs) -> None:
    with pytest.raises(ValueError, match=words):
        call(*args, **kwargs)


def test_wrong_arguments_are_refused():
    model = sharp_model("cpu")
    cache, other = NSACache.for_model(model, 2, 12), NSACache.for_model(model, 2, 13)
    graph = DecodeGraph(model, cache)
    graph.start(0, 1, max_new_tokens=3)
    before = [tensor.clone() for tensor in cache.tensors()]
    refused(r"row: expected one of the idle rows \[1\], got 0", graph.start, 0, 1, max_new_tokens=3)
    refused(r"row: expected one of the idle rows \[1\], got 2", graph.start, 2, 1, max_new_tokens=3)
    refused("token: expected 0 … 30, got -1", graph.start, 1, -1, max_new_tokens=3)
    refused("token: expected 0 … 30, got 31", graph.start, 1, 31, max_new_tokens=3)
    refused("rows: expected 0 … 30, got 31", PrefillGraph(model, other, sizes=(4,)), [[1, 31], []])
    refused("rows: expected 2, one per row of the cache, got 1", PrefillGraph(model, other, sizes=(4,)), [[1]])
    assert other.host_lengths == other.positions.tolist() == [0, 0]
    refused("max_new_tokens: expected at least 1, got 0", graph.start, 1, 1, max_new_tokens=0)
    refused(
        r"max_new_tokens: .* at most 12 tokens \(the cache's capacity\), got 13", graph.start, 1, 1, max_new_tokens=12
    )
    refused("temperature: expected a finite number", graph.start, 1, 1, max_new_tokens=1, temperature=-1.0)
    refused("top_p: expected a number in", graph.start, 1, 1, max_new_tokens=1, top_p=2)
    refused("temperature: expected a finite number", graph.start, 1, 1, max_new_tokens=1, temperature=1e300)
    for token in (-1, 31, 2**70):
        refused(f"stop_token: expected 0 … 30, got {token}", graph.start, 1, 1, max_new_tokens=1, stop_token=token)
    refused("n: expected at least 0, got -1", graph.step, -1)
    refused(r"row: expected one of the decoding rows \[0\], got 1", graph.cancel, 1)
    refused(r"drafts: expected int64 \(2, 0\)", graph.step, drafts=torch.zeros(2, 1, dtype=torch.int64))
    refused("drafts: expected 0 … 7, got 8", DecodeGraph, model, cache, drafts=8)
    refused(
        r"capture: expected None or False \(the cache is on cpu\), got True", DecodeGraph, model, cache, capture=True
    )
    refused("sizes: expected at least 1, got none", PrefillGraph, model, cache, sizes=())
    refused("sizes: expected at least 1, got 0", PrefillGraph, model, cache, sizes=(4, 0))
    refused("source: expected a cache of the same model", cache.copy_row, 0, other)
    refused("row: expected 0 … 1, got 2", cache.copy_row, 2, cache)
    refused("source_row: expected 0 … 1, got -1", cache.copy_row, 1, cache, -1)
    refused("rows: expected 0 … 1, got 2", cache.reset, [0, 2])
    refused(
        "cache: expected None together with graph",
        generate,
        model,
        [[1]] * 2,
        max_new_tokens=1,
        cache=cache,
        graph=graph,
    )
    refused("graph: expected one whose rows are all idle", generate, model, [[1]] * 2, max_new_tokens=1, graph=graph)
    assert all(torch.equal(a, b) for a, b in zip(before, cache.tensors(), strict=True))
    graph.step(3)
    assert graph.collect() == [(0, generate(model, [[1]], max_new_tokens=3).tokens[0], True, False)]


def test_arguments_of_another_type_are_refused():
    model = sharp_model("cpu")
    cache = NSACache.for_model(model, 2, 12)
    graph, fill = DecodeGraph(model, cache, drafts=1), PrefillGraph(model, cache, sizes=(4,))
    state = [x for x in vars(graph).values() if isinstance(x, torch.Tensor)]
    before = [tensor.clone() for tensor in (*cache.tensors(), *state)]

    def start(**changes):
        arguments = {"row": 0, "token": 1, "max_new_tokens": 2} | changes
        return lambda: graph.start(**arguments)

    calls = {
        "row: expected an int, got str": start(row="0"),
        "row: expected an int, got float": start(row=0.0),
        "row: expected an int, got True": start(row=True),
        "token: expected an int, got float": start(token=1.5),
        "max_new_tokens: expected an int, got float": start(max_new_tokens=2.5),
        "stop_token: expected an int, got float": start(stop_token=0.5),
        "stop_token: expected an int, got str": start(stop_token="a"),
        "n: expected an int, got float": lambda: graph.step(1.5),
        "drafts: expected a torch.Tensor, got list": lambda: graph.step(drafts=[[1], [1]]),
        "row: expected an int, got list": lambda: graph.cancel([0]),
        "drafts: expected an int, got True": lambda: DecodeGraph(model, cache, drafts=True),
        "cache: expected an NSACache, got int": lambda: DecodeGraph(model, 3),
        "model: expected a torch.nn.Module, got int": lambda: DecodeGraph(3, cache),
        "capture: expected None, True or False, got 'no'": lambda: DecodeGraph(model, cache, capture="no"),
        "cache: expected an NSACache, got None": lambda: PrefillGraph(model, None),
        "sizes: expected ints, got int": lambda: PrefillGraph(model, cache, sizes=5),
        "sizes: expected an int, got float": lambda: PrefillGraph(model, cache, sizes=(1.5,)),
        "rows: expected a sequence of token ids per row, got NoneType": lambda: fill(None),
        "rows: expected a sequence of token ids per row, got Tensor": lambda: fill(torch.ones(2, 2)),
        "rows: expected ints, got int": lambda: fill([1, 2]),
        "rows: expected ints, got str": lambda: fill(["ab", "c"]),
        "rows: expected an int, got float": lambda: fill([[1], [1.5]]),
    }
    for words, call in calls.items():
        with pytest.raises(TypeError, match=f"^{words}"):
            call()
    refused("drafts: expected values in -1 … 30, got 3 … 31", graph.step, drafts=torch.tensor([[31], [3]]))
    refused("drafts: expected values in -1 … 30, got -2 … 3", graph.step, drafts=torch.tensor([[-2], [3]]))
    assert cache.host_lengths == [0, 0] and graph.idle == [0, 1] and graph.collect() == []
    assert all(torch.equal(a, b) for a, b in zip(before, (*cache.tensors(), *state), strict=True))


def test_a_row_whose_tokens_were_not_counted_does_not_start():
    model = sharp_model("cpu")
    cache = NSACache.for_model(model, 2, 40)
    with torch.no_grad():
        model(torch.ones(2, 20, dtype=torch.int64), cache)
    graph = DecodeGraph(model, cache)
    refused("row: expected 0 tokens in row 1 of the cache, .*, got 20", graph.start, 1, 1, max_new_tokens=3)
    cache.reserve(20)
    graph.start(1, 1, max_new_tokens=3)


def test_a_row_goes_back_eight_tokens_at_most():
    model = sharp_model("cpu")
    cache = NSACache.for_model(model, 2, 40)
    prefill(model, [[1] * 20, [1] * 3], cache)
    refused("counts: expected at most 8 tokens to take back from row 0, which holds 20 and held 20", cache.rollback, 9)
    refused("counts: expected at most 3 tokens to take back from row 1", cache.rollback, [0, 4])
    cache.rollback([5, 0])
    refused("counts: expected at most 3 tokens to take back from row 0, which holds 15", cache.rollback, [4, 0])
    cache.rollback([3, 3])
    assert cache.positions.tolist() == cache.host_lengths == [12, 0]
    refused("counts: expected at least 0, got -1", cache.rollback, [1, -1])


def test_a_graph_is_used_again_by_generate(device):
    model = sharp_model(device)
    graph = DecodeGraph(model, NSACache.for_model(model, 2, CAPACITY))
    for _ in range(2):
        graph.cache.reset()
        got = generate(model, PROMPTS[:2], max_new_tokens=9, graph=graph)
        assert got == generate(model, PROMPTS[:2], max_new_tokens=9)


def test_generate_leaves_a_graph_idle_where_it_is_interrupted():
    model = sharp_model("cpu")
    graph = DecodeGraph(model, NSACache.for_model(model, 2, CAPACITY))

    def interrupt(step, tokens):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, PROMPTS[:2], max_new_tokens=9, graph=graph, on_token=interrupt)
    assert graph.idle == [0, 1]
    assert graph.cache.positions.tolist() == graph.cache.host_lengths == [len(ids) + 3 for ids in PROMPTS[:2]]
    graph.cache.reset()
    assert generate(model, PROMPTS[:2], max_new_tokens=9, graph=graph) == generate(model, PROMPTS[:2], max_new_tokens=9)


@pytest.mark.parametrize("changes", [{"phi": "mlp"}, {"tie_kv": True}, {"attention": "dense"}], ids=str)
def test_a_cache_takes_the_type_that_keys_have_under_autocast(device, changes):
    model = make_model(torch.float32, **SIZES, **changes).eval().to(device)
    plain = NSACache.for_model(model, 2, CAPACITY)
    with torch.autocast(device, dtype=torch.bfloat16):
        cache = NSACache.for_model(model, 2, CAPACITY, dtype=torch.bfloat16)
        expected = generate(model, PROMPTS[:2], max_new_tokens=9, cache=cache)
        assert generate(model, PROMPTS[:2], max_new_tokens=9) == expected
        cache, slot = NSACache.for_model(model, 2, CAPACITY), NSACache.for_model(model, 1, CAPACITY)
        graph, fill = DecodeGraph(model, cache), PrefillGraph(model, slot, sizes=(4,))
        fill([PROMPTS[0][:-1]])
        cache.copy_row(1, slot)
        graph.start(1, PROMPTS[0][-1], max_new_tokens=9)
        graph.step(9)
        assert graph.collect()[0].tokens == expected.tokens[0]
        words = "cache: expected keys in torch.float32 on .*, got torch.bfloat16"
        refused(words, generate, model, PROMPTS[:2], max_new_tokens=2, cache=plain)
        double = make_model(torch.float64, **SIZES, **changes).eval()
        generate(double, [[1, 2]], max_new_tokens=2)  # whose keys autocast leaves in fp64
    kinds = {tensor.dtype for tensor in cache.tensors() if tensor.is_floating_point()}
    assert kinds == {torch.bfloat16} and cache.nbytes() < plain.nbytes()
    with torch.autocast(device, dtype=torch.bfloat16):
        assert NSACache.for_model(model, 2, 9, device="meta").layers[0].positions.is_meta
