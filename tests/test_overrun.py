"""A row that calls drive past its capacity, with no `reserve` to refuse it, gives NaN; all else stays right.

On a CPU, cached calls look at positions first; here they do not, as nothing does in compiled code or on a GPU.
"""

from __future__ import annotations

import pytest
import torch
from cases import int32
from models import draw_ids, make_model
from torch import Tensor, nn

from nsa_compile import DecodeGraph, NSACache, PrefillGraph, export_program, generate
from nsa_compile.graphs.prefill import prefill

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
SIZES = {"l": 4, "d": 2, "l_sel": 4, "n_sel": 3, "w": 5}
CAPACITY = 21  # a block of compression ends past it, and so do one of selection and a turn of the rings
T = 60
MODELS = {
    "mlp": {"phi": "mlp", "gate": "sigmoid"},
    "avg": {},
    "tied": {"tie_kv": True},
    "dense": {"attention": "dense"},
}

pytestmark = pytest.mark.usefixtures("blind")


@pytest.fixture
def blind(monkeypatch):
    monkeypatch.setattr("nsa_compile.graphs.cache.values_are_visible", lambda x: False)
    with torch.no_grad():
        yield


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=GPU)])
def device(request):
    return request.param


@pytest.fixture(params=MODELS)
def model(request, device) -> nn.Module:
    return new_model(device, request.param)


def new_model(device: str, choice: str) -> nn.Module:
    return make_model(torch.float64 if device == "cpu" else torch.float32, **SIZES, **MODELS[choice]).to(device)


def close(actual: Tensor, expected: Tensor) -> None:
    """Logits of rows, NaN where they are expected."""
    tolerance = 1e-9 if actual.dtype == torch.float64 else 1e-3
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def expected_logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Those of one forward, NaN from the capacity on."""
    logits = model(ids)
    logits[:, CAPACITY:] = float("nan")
    return logits


def filled(model: nn.Module, ids: Tensor, *lengths: int) -> NSACache:
    """A cache whose rows hold the first tokens of ids, as counted on the host; one more row of it is never touched."""
    cache = NSACache.for_model(model, len(ids), CAPACITY)
    cache.reserve(lengths)
    model(ids[:, : max(lengths)], cache, lengths=int32(*lengths).to(ids.device))
    return cache


def held_by(cache: NSACache, row: int) -> list[Tensor]:
    return [buffer[row].clone() for layer in cache.layers for buffer in layer.buffers.values()]


def ids_for(model: nn.Module, rows: int) -> Tensor:
    return draw_ids(rows, T).to(next(model.parameters()).device)


def take(model: nn.Module, cache: NSACache, ids: Tensor, starts: list[int], counts: list[int], t: int) -> Tensor:
    """Logits [b, t, vocab] of the next `counts` tokens of rows at `starts`, padded to t."""
    at = torch.tensor(starts, device=ids.device)[:, None] + torch.arange(t, device=ids.device)
    lengths = int32(*counts).to(ids.device)
    return model(ids.gather(1, at.clamp_max(T - 1)), cache, lengths=lengths)


# --- steps and chunks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [1, 3, 8, 9, 20])
def test_tokens_past_the_capacity_give_nan_and_leave_all_else_as_it_was(model, t):
    """Rows that pass the end half-way, at once, exactly not, and that are full and idle."""
    starts = [CAPACITY - t // 2, CAPACITY, max(0, CAPACITY - t), CAPACITY, 3]
    counts = [t, t, t, 0, min(t, 7)]
    ids = ids_for(model, 5)
    cache = filled(model, ids, *starts)
    before = [held_by(cache, row) for row in (1, 3)]
    logits, expected = take(model, cache, ids, starts, counts, t), expected_logits(model, ids)
    for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
        close(logits[row, :count], expected[row, start : start + count])
    assert logits[1].isnan().all() and logits[3].isfinite().all()
    assert cache.positions.tolist() == [start + count for start, count in zip(starts, counts, strict=True)]
    for row, old in zip((1, 3), before, strict=True):
        assert all(torch.equal(now, then) for now, then in zip(held_by(cache, row), old, strict=True))
    reads = cache.layers[0].nominal_reads[:, 3].tolist()
    if "k" not in cache.layers[0].buffers:  # dense attention counts none
        assert reads[1] == reads[3] == 0 and reads[0 if t > 1 else 2] > 0
    logits = take(model, cache, ids, cache.positions.tolist(), [1] * 5, 1)  # and on from there
    assert logits[:4].isnan().all()
    close(logits[4, 0], expected[4, 3 + counts[4]])


def test_without_lengths_every_row_goes_on(model):
    ids = ids_for(model, 2)
    cache = filled(model, ids, CAPACITY - 2, 4)
    for start in range(4, 15):
        at = [CAPACITY - 6 + start, start]
        logits = model(torch.stack([ids[0, at[0]], ids[1, at[1]]])[:, None], cache)[:, 0]
        close(logits, expected_logits(model, ids)[[0, 1], at])
    chunk = model(ids[:, 15:35], cache)
    assert chunk[0].isnan().all()
    close(chunk[1], expected_logits(model, ids)[1, 15:35])


def test_rows_driven_past_the_end_do_not_touch_their_neighbours(model):
    """Nothing beside a row's own slots is written, whatever a cache lies in."""
    ids = ids_for(model, 3)
    cache = filled(model, ids, 4, CAPACITY - 1, 4)
    before = [held_by(cache, row) for row in (0, 2)]
    for t in (1, 5, 20):
        take(model, cache, ids, [4, CAPACITY - 1, 4], [0, t, 0], t)
    for row, old in zip((0, 2), before, strict=True):
        assert all(torch.equal(now, then) for now, then in zip(held_by(cache, row), old, strict=True))


def test_a_row_that_is_driven_on_for_ever_stays_past_its_capacity(model):
    ids = ids_for(model, 2)
    cache = filled(model, ids, CAPACITY, 3)
    for layer in cache.layers:
        layer.positions[0] = 2**31 - 4
    for t in (1, 8, 20):
        assert take(model, cache, ids, [0, 0], [t, 0], t)[0].isnan().all()
    assert cache.positions[0] > 2**31 - 32


@pytest.mark.parametrize("given", [1, 3, 8])
def test_tokens_taken_back_to_the_capacity_or_less_give_exact_ones_again(model, given):
    """In one step that appended up to 8, of which some were past the end, or in a further one."""
    ids = ids_for(model, 9)
    start = CAPACITY - given // 2
    cache = filled(model, ids, *[start] * 9)
    junk = ids.roll(5, 1)
    take(model, cache, junk, [start] * 9, [given] * 9, given)
    cache.host_lengths = [start + given] * 9  # what a host knows that did not ask for room
    back = list(range(9))
    cache.host_peaks = [start + given] * 9
    cache.rollback([min(n, given) for n in back])
    starts = [start + given - min(n, given) for n in back]
    assert cache.positions.tolist() == starts
    expected = expected_logits(model, ids)
    for step in range(5):
        at = [s + step for s in starts]
        logits = take(model, cache, ids, at, [1] * 9, 1)
        for row in range(9):
            if starts[row] == start:  # the others hold junk
                close(logits[row, 0], expected[row, at[row]])
            else:
                assert logits[row].isnan().all() == (at[row] >= CAPACITY)


def test_emptied_and_copied_rows(model):
    ids = ids_for(model, 3)
    cache = filled(model, ids, CAPACITY, CAPACITY, 4)
    take(model, cache, ids, [CAPACITY, CAPACITY, 4], [3, 3, 0], 3)
    cache.copy_row(2, cache, 0)
    assert take(model, cache, ids, [0] * 3, [1, 1, 1], 1).isnan().all()
    cache.reset([0])
    logits, expected = take(model, cache, ids, [0] * 3, [9, 1, 1], 9), expected_logits(model, ids)
    close(logits[0], expected[0, :9])
    assert logits[1:, 0].isnan().all()


def test_a_full_row_may_idle_where_the_host_can_look(model, monkeypatch):
    """Also one that is past its end."""
    ids = ids_for(model, 2)
    cache = filled(model, ids, CAPACITY, 4)
    take(model, cache, ids, [CAPACITY, 4], [3, 0], 3)
    monkeypatch.undo()
    with torch.no_grad():
        logits = take(model, cache, ids, [0, 4], [0, 1], 1)
        close(logits[1, 0], model(ids)[1, 4])
        if ids.device.type == "cpu":
            before = held_by(cache, 1)
            with pytest.raises(ValueError, match=r"cache: expected at most 21 tokens \(its capacity\), got 25"):
                take(model, cache, ids, [0, 5], [1, 1], 1)
            assert all(torch.equal(now, then) for now, then in zip(held_by(cache, 1), before, strict=True))


def test_a_cache_of_transformers():
    """Compiled calls, which count no columns on the host, then eager ones, for which the cache grows."""
    hf = pytest.importorskip("nsa_compile.hf")
    torch._dynamo.reset()
    inner = make_model(**SIZES)
    model, ids = hf.NsaForCausalLM.from_language_model(inner).eval(), ids_for(inner, 2)
    cache, expected = hf.NsaCache(model, 2, CAPACITY), expected_logits(inner, ids)
    step = torch.compile(model, fullgraph=True, backend="aot_eager")
    close(model(ids[:, : CAPACITY - 1], past_key_values=cache).logits, expected[:, : CAPACITY - 1])
    for i in range(CAPACITY - 1, CAPACITY + 3):
        close(step(ids[:, i : i + 1], past_key_values=cache).logits[:, 0], expected[:, i])
    for i in range(CAPACITY + 3, CAPACITY + 6):
        assert model(ids[:, i : i + 1], past_key_values=cache).logits.isnan().all()
    assert cache.nsa.capacity == 2 * CAPACITY
    cache.reset()
    close(model(ids[:, :40], past_key_values=cache).logits, inner(ids)[:, :40])


# --- compiled, exported, captured ------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice, t", [("mlp", 1), ("tied", 12), ("dense", 1)])
def test_compiled_calls(device, choice, t):
    torch._dynamo.reset()
    model = new_model(device, choice)
    ids = ids_for(model, 2)
    starts = [CAPACITY - 1, 2]
    step = torch.compile(model, fullgraph=True, backend="aot_eager")
    cache, expected = filled(model, ids, *starts), expected_logits(model, ids)
    for _ in range(3):
        logits = take(step, cache, ids, starts, [t, t], t)
        for row in range(2):
            close(logits[row], expected[row, starts[row] : starts[row] + t])
        starts = [start + t for start in starts]
    assert logits[0].isnan().all()


def test_exported_steps():
    model = make_model(**SIZES)
    ids = ids_for(model, 3)
    cache = filled(model, ids, CAPACITY, 2, CAPACITY)
    step = export_program(model, CAPACITY, tokens=1).module()
    logits = step(ids[:, 2:3], int32(1, 1, 0), cache.tensors())
    assert logits[0].isnan().all() and logits[2].isfinite().all()
    close(logits[1, 0], model(ids)[1, 2])
    assert cache.positions.tolist() == [CAPACITY + 1, 3, CAPACITY]


def test_prefill_graphs(model):
    """Prompts that the host has room for, into rows that hold more than it knows."""
    ids = ids_for(model, 2)
    cache = filled(model, ids, CAPACITY - 3, 4)
    fill = PrefillGraph(model, cache, sizes=(2, 16))
    take(model, cache, ids, [CAPACITY - 3, 4], [4, 0], 4)  # not counted
    rows = [[1, 2], ids[1, 4:13].tolist()]
    calls = (lambda: fill(rows), lambda: prefill(model, [[1], [int(ids[1, 13])]], cache))
    for call in calls:
        logits = call()
        assert logits[0].isnan().all()
        close(logits[1], model(ids)[1, cache.host_lengths[1] - 1])
    with pytest.raises(ValueError, match=r"cache: expected at most 21 tokens \(its capacity\), got "):
        fill([[], [1] * 20])


@pytest.mark.parametrize("drafts", [0, 3])
def test_decode_graphs_draw_no_token_past_the_capacity(model, drafts):
    """Tokens cannot be NaN: the row ends there, `collect` says why, and the others go on."""
    ids = ids_for(model, 2)
    alone = generate(model, [ids[1, :5].tolist()], max_new_tokens=14).tokens[0]
    cache = filled(model, ids, 4, 4)
    graph = DecodeGraph(model, cache, drafts=drafts)
    graph.start(1, int(ids[1, 4]), max_new_tokens=14)
    graph.step(3)
    graph.start(0, int(ids[0, 4]), max_new_tokens=14)
    graph.step(2)
    for layer in cache.layers:  # as by calls that nothing counted
        layer.positions[0] = CAPACITY - 2
    graph.step(3)
    before = held_by(cache, 0)
    graph.step(20)
    assert cache.positions[0] == CAPACITY
    assert all(torch.equal(now, then) for now, then in zip(held_by(cache, 0), before, strict=True))
    with pytest.raises(
        ValueError,
        match=r"row: expected all tokens that row 0 held .* reserve, .* capacity of 21 with 10 tokens left to draw",
    ):
        graph.collect()
    assert graph.idle == [0]
    (update,) = graph.collect()
    assert update.row == 1 and update.tokens == alone and update.finished
    cache.reset([0])
    graph.start(0, int(ids[1, 0]), max_new_tokens=2)
    graph.step(2)
    assert graph.collect()[0].tokens == generate(model, [[int(ids[1, 0])]], max_new_tokens=2).tokens[0]
