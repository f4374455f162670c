"""The cache: whatever way tokens come in, each gets what one full forward gives it, and nothing else is touched."""

from __future__ import annotations

import pytest
import torch
from cases import draw, int32
from models import CHOICES, LAYER, MODEL, choice_id, draw_ids, make_layer, make_model
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from nsa_compile import NSACache, generate
from nsa_compile.graphs.cache import free_memory

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
SIZES = {"l": 4, "d": 2, "l_sel": 4, "n_sel": 3, "w": 5}
PREFIXES = (SIZES["n_sel"] + 3) * SIZES["l_sel"]
T = PREFIXES + 7
EACH_CHOICE = pytest.mark.parametrize("choice", CHOICES, ids=choice_id)
EACH_ATTENTION = pytest.mark.parametrize("attention", ["nsa", "dense"])
ONE_CHOICE = {"phi": "mlp", "gate": "sigmoid"}

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def no_gradients():
    with torch.no_grad():
        yield


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def new_cache(model: nn.Module, batch: int, capacity: int = T, *, poison: bool = False) -> NSACache:
    """A cache whose buffers hold NaN wherever nothing has been written yet, if asked.

    Not those of dense attention: torch's own attention multiplies hidden values by 0.
    """
    cache = NSACache.for_model(model, batch, capacity)
    if poison:
        for layer in cache.layers:
            for buffer in layer.buffers.values() if "k_slc" in layer.buffers else ():
                buffer.fill_(float("nan"))
    return cache


def snapshot(cache: NSACache) -> list[Tensor]:
    return [tensor.clone() for tensor in cache.tensors()]


def assert_untouched(cache: NSACache, before: list[Tensor]) -> None:
    assert all(torch.equal(now, then) for now, then in zip(cache.tensors(), before, strict=True))


def feed(model: nn.Module, cache: NSACache, x: Tensor, chunks: list[int]) -> Tensor:
    """Outputs of x [b, t, ...] that comes in chunks of the sizes given."""
    assert sum(chunks) == x.shape[1]
    return torch.cat([model(part, cache) for part in x.split(chunks, 1)], 1)


def feed_rows(model: nn.Module, cache: NSACache, x: Tensor, steps: list[list[int]]) -> Tensor:
    """Outputs of x [b, t, ...] of which each row takes its own number of tokens at a time (0: it idles)."""
    outputs = [[] for _ in x]
    starts = [0] * len(x)
    for counts in steps:
        t = max(1, *counts)
        parts = [row[start : start + count] for row, start, count in zip(x, starts, counts, strict=True)]
        padded = [
            torch.cat((part, row[:1].expand(t - len(part), *row.shape[1:]))) for part, row in zip(parts, x, strict=True)
        ]
        y = model(torch.stack(padded), cache, lengths=int32(*counts))
        for row, count in enumerate(counts):
            outputs[row].append(y[row, :count])
            starts[row] += count
    assert cache.positions.tolist() == starts
    return torch.stack([torch.cat(row) for row in outputs])


def ragged_prefills() -> list[list[int]]:
    """Row i prefills i + 1 tokens and then decodes to the end; the rows that reach it idle."""
    prefix = list(range(1, PREFIXES + 1))
    return [prefix] + [[int(p + step < T) for p in prefix] for step in range(T - 1)]


# --- cached equals full ----------------------------------------------------------------------------------------------


@EACH_CHOICE
def test_prefill_of_every_length_and_decode_equal_the_full_forward(choice):
    layer, x = make_layer(**SIZES, **choice), draw(1, T, LAYER["dim"], seed=1)
    full = layer(x)
    for prefix in range(1, PREFIXES + 1):
        close(feed(layer, NSACache.for_model(layer, 1, T), x, [prefix] + [1] * (T - prefix)), full)


@pytest.mark.parametrize(
    "changes", [*CHOICES, {"attention": "dense"}], ids=lambda x: "dense" if "attention" in x else choice_id(x)
)
def test_rows_of_every_length_and_idle_rows_equal_the_full_forward(changes):
    """With NaN wherever a buffer has not been written."""
    attn = make_model(**SIZES, **changes).layers[0].attn
    x = draw(PREFIXES, T, LAYER["dim"], seed=2)
    close(feed_rows(attn, new_cache(attn, PREFIXES, poison=True), x, ragged_prefills()), attn(x))


@EACH_ATTENTION
@pytest.mark.parametrize("size", range(1, T + 1), ids=lambda size: f"chunks-of-{size}")
def test_chunks_of_every_size_equal_the_full_forward(attention, size):
    model, ids = make_model(attention=attention, **SIZES, **ONE_CHOICE), draw_ids(2, T)
    chunks = [size] * (T // size) + [T % size] * (T % size > 0)
    close(feed(model, new_cache(model, 2, poison=True), ids, chunks), model(ids))


@EACH_CHOICE
def test_uneven_chunks_equal_the_full_forward(choice):
    layer, x = make_layer(**SIZES, **choice), draw(1, T, LAYER["dim"], seed=3)
    close(feed(layer, NSACache.for_model(layer, 1, T), x, [1, 2, 1, 9, 3, 1, T - 17]), layer(x))


@pytest.mark.parametrize(
    "sizes",
    [
        {"l": 6, "d": 1, "l_sel": 7, "n_sel": 3, "w": 1},
        {"l": 5, "d": 5, "l_sel": 5, "n_sel": 3, "w": 40},
        {"l": 1, "d": 1, "l_sel": 1, "n_sel": 5, "w": 2},
        {"l": 9, "d": 3, "l_sel": 12, "n_sel": 1, "w": 6, "init_blocks": 0, "local_blocks": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("tie_kv", [False, True], ids=["separate", "tied"])
def test_other_sizes_equal_the_full_forward(sizes, tie_kv):
    layer, x = make_layer(**sizes, phi="mlp", tie_kv=tie_kv), draw(1, 40, LAYER["dim"], seed=4)
    full = layer(x)
    for chunks in ([1] * 40, [13] + [1] * 27, [2, 11, 1, 20, 6]):
        close(feed(layer, new_cache(layer, 1, 40, poison=True), x, chunks), full)


@EACH_ATTENTION
def test_rows_of_a_model_do_not_depend_on_their_neighbours(attention):
    model, ids = make_model(attention=attention, **SIZES, **ONE_CHOICE), draw_ids(4, T)
    steps = [[9, 0, 3, 1], [0, 1, 1, 1], [5, 2, 0, 4], [T - 14, T - 3, T - 4, T - 6]]
    close(feed_rows(model, new_cache(model, 4, poison=True), ids, steps), model(ids))


@pytest.mark.parametrize("branch", ["cmp", "slc", "win"])
def test_single_branches_equal_the_full_forward(branch):
    layer, x = make_layer(**SIZES, phi="mlp"), draw(1, T, LAYER["dim"], seed=5)
    cache = NSACache.for_model(layer, 1, T)
    close(
        torch.cat([layer(part, cache, branch=branch) for part in x.split([6] + [1] * (T - 6), 1)], 1),
        layer(x, branch=branch),
    )


@pytest.mark.parametrize("tie_kv", [False, True], ids=["separate", "tied"])
@pytest.mark.parametrize("chunk", [1, 3, 8, 19], ids=lambda size: f"chunks-of-{size}")
def test_rings_are_right_after_many_turns(tie_kv, chunk):
    """200 tokens turn the window's ring of 12 and the raw tail of 11 more than 16 times."""
    layer, x = make_layer(**SIZES, phi="mlp", tie_kv=tie_kv), draw(1, 200, LAYER["dim"], seed=6)
    cache = new_cache(layer, 1, 200, poison=True)
    chunks = [chunk] * (200 // chunk) + [200 % chunk] * (200 % chunk > 0)
    close(feed(layer, cache, x, chunks), layer(x))


@EACH_CHOICE
def test_up_to_eight_tokens_can_be_taken_back(choice):
    """Each row appends 8 tokens, of which it keeps the first few, as a speculative step does."""
    layer, x = make_layer(**SIZES, **choice), draw(9, T, LAYER["dim"], seed=7)
    full, junk = layer(x), draw(9, 8, LAYER["dim"], seed=8)
    for prefix in (1, 3, 11, 20):
        cache = new_cache(layer, 9, T + 8, poison=True)
        layer(x[:, :prefix], cache)
        kept = min(8, T - prefix)
        guess = junk.clone()
        for row in range(9):
            accepted = min(row, kept)
            guess[row, :accepted] = x[row, prefix : prefix + accepted]
        y = layer(guess, cache)
        for row in range(9):
            accepted = min(row, kept)
            close(y[row, :accepted], full[row, prefix : prefix + accepted])
            cache.positions[row] -= 8 - accepted
        starts = cache.positions.tolist()
        for step in range(T - min(starts)):
            active = [int(start + step < T) for start in starts]
            at = [min(start + step, T - 1) for start in starts]
            y = layer(x[range(9), at].unsqueeze(1), cache, lengths=int32(*active))
            for row in range(9):
                if active[row]:
                    close(y[row, 0], full[row, at[row]])


# --- idle, empty, reset ----------------------------------------------------------------------------------------------


@EACH_ATTENTION
def test_idle_rows_stay_as_they_are_and_give_zeros(attention):
    attn = make_model(attention=attention, **SIZES).layers[0].attn
    cache, x = new_cache(attn, 3), draw(3, 9, LAYER["dim"], seed=9)
    attn(x, cache, lengths=int32(9, 4, 0))
    before = snapshot(cache)
    x[1:] = float("nan")
    y = attn(x[:, :2], cache, lengths=int32(2, 0, 0))
    assert y[1:].eq(0).all() and y[0].isfinite().all()
    assert cache.positions.tolist() == [11, 4, 0]
    reads = {id(tensor) for layer in cache.layers for tensor in (layer.nominal_reads, layer.actual_reads)}
    for now, then in zip(cache.tensors(), before, strict=True):
        if id(now) not in reads:
            assert torch.equal(now[1:], then[1:])


@EACH_ATTENTION
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_all_rows_idle_on_an_empty_cache_gives_zeros(attention, mode):
    model = make_model(attention=attention, **SIZES, **ONE_CHOICE)
    attn = model.layers[0].attn
    with mode():
        cache = new_cache(model, 2, poison=True)
        y = attn(draw(2, 3, LAYER["dim"], seed=10), cache, lengths=int32(0, 0))
        assert y.eq(0).all()
        assert model(draw_ids(2, 1), cache, lengths=int32(0, 0)).isfinite().all()
        assert cache.positions.eq(0).all()


def test_cache_made_and_used_across_inference_modes():
    model, ids = make_model(**SIZES), draw_ids(1, T)
    with torch.inference_mode():
        cache = new_cache(model, 1)
        first = model(ids[:, :9], cache)
    second = model(ids[:, 9:], cache)
    close(torch.cat((first, second), 1), model(ids))


@EACH_ATTENTION
def test_reset_cache_is_like_a_new_one(attention):
    model, ids = make_model(attention=attention, **SIZES, **ONE_CHOICE), draw_ids(2, T)
    cache = new_cache(model, 2)
    cache.reserve(T)
    feed(model, cache, draw_ids(2, T, seed=1), [T - 1, 1])
    cache.reset()
    assert cache.host_lengths == [0, 0] and cache.positions.eq(0).all()
    cache.reserve(T)
    close(feed(model, cache, ids, [5] + [1] * (T - 5)), model(ids))


def test_last_logits_of_a_cached_call():
    model, ids = make_model(**SIZES), draw_ids(3, T)
    lengths, cache = int32(T, 4, 0), new_cache(model, 3)
    last = model(ids, cache, lengths=lengths, last_only=True)
    assert last.shape == (3, 1, MODEL["vocab_size"])
    close(last[:2, 0], model(ids, lengths=lengths)[[0, 1], [T - 1, 3]])
    assert last.isfinite().all()


# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tie_kv", [False, True], ids=["separate", "tied"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_memory_of_the_buffers(tie_kv, dtype):
    """A tied cache holds one copy of the keys and values; a separate one a ring for the window besides."""
    model = make_model(tie_kv=tie_kv, **SIZES)
    cache = NSACache.for_model(model, 3, 50, dtype=dtype)
    tokens = 50 + 25 + (SIZES["l"] + 7) + (0 if tie_kv else SIZES["w"] + 7)
    channels = (LAYER["d_k"] + LAYER["d_v"]) * LAYER["n_kv_groups"]
    buffers = [tensor for tensor in cache.tensors() if tensor.is_floating_point()]
    assert sum(tensor.nbytes for tensor in buffers) == 2 * 3 * tokens * channels * dtype.itemsize
    assert {tensor.dtype for tensor in buffers} == {dtype}
    assert cache.nbytes() == sum(tensor.nbytes for tensor in cache.tensors())
    counters = cache.nbytes() - sum(tensor.nbytes for tensor in buffers)
    assert counters == 2 * 3 * (4 + 8 * 4 + 8 * 4 * LAYER["n_kv_groups"])


def test_cache_takes_type_and_device_of_the_model():
    cache = NSACache.for_model(make_model(torch.bfloat16), 2, 9)
    assert {tensor.dtype for tensor in cache.tensors() if tensor.is_floating_point()} == {torch.bfloat16}
    assert {tensor.device.type for tensor in NSACache.for_model(make_model(), 2, 9, device="meta").tensors()} == {
        "meta"
    }


def test_cache_of_any_module_with_attention_layers():
    """One's own model: the layers need no LlamaBlockNSA around them."""

    class TwoLayers(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = make_layer(**SIZES), make_layer(**SIZES, tie_kv=True)

        def forward(self, x, cache=None):
            return self.second(x + self.first(x, cache), cache)

    model, x = TwoLayers(), draw(1, T, LAYER["dim"], seed=11)
    close(feed(model, new_cache(model, 1), x, [10] + [1] * (T - 10)), model(x))


# --- what is refused, before anything is written ---------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["nsa", "dense"])
@pytest.mark.parametrize(
    "counts, lengths, message",
    [
        (5, None, r"cache: expected at most 12 tokens \(its capacity\), got 13"),
        (13, None, r"cache: expected at most 12 tokens \(its capacity\), got 13"),
        (6, (1, 5), r"cache: expected at most 12 tokens \(its capacity\), got 13"),
    ],
    ids=["step", "chunk", "row"],
)
def test_call_beyond_the_capacity_writes_nothing(attention, counts, lengths, message):
    model = make_model(attention=attention, **SIZES)
    cache = new_cache(model, 2, 12)
    model(draw_ids(2, 8), cache)
    before = snapshot(cache)
    with pytest.raises(ValueError, match=message):
        model(draw_ids(2, counts), cache, lengths=None if lengths is None else int32(*lengths))
    assert_untouched(cache, before)
    model(draw_ids(2, 4), cache)
    assert cache.positions.tolist() == [12, 12]


def test_full_rows_may_idle():
    model = make_model(**SIZES)
    cache, ids = new_cache(model, 2, 12), draw_ids(2, 12)
    model(ids, cache, lengths=int32(12, 9))
    logits = model(ids[:, 9:10], cache, lengths=int32(0, 1))
    close(logits[1, 0], model(ids)[1, 9])
    assert cache.positions.tolist() == [12, 10]


def test_host_counts_what_is_reserved():
    cache = NSACache.for_model(make_model(**SIZES), 3, 12)
    before = snapshot(cache)
    cache.reserve(5)
    cache.reserve([0, 7, 2])
    assert cache.host_lengths == [5, 12, 7]
    refused = [
        (1, r"cache: expected at most 12 tokens \(its capacity\), got 12 \+ 1 in row 1"),
        ([8, 0, 0], r"cache: expected at most 12 tokens \(its capacity\), got 5 \+ 8 in row 0"),
        ([1, 0], r"counts: expected 3 numbers, one per row, got 2"),
        ([1, 0, -1], r"counts: expected at least 0, got -1"),
    ]
    for counts, message in refused:
        with pytest.raises(ValueError, match=message):
            cache.reserve(counts)
        assert cache.host_lengths == [5, 12, 7]
    assert_untouched(cache, before)


NUMBERS = [2.5, "2", None, [1.5, 2], [True, 1], ["a", 1], torch.tensor([1, 2])]


@pytest.mark.parametrize("value", NUMBERS, ids=str)
@pytest.mark.parametrize("method", ["reserve", "rollback", "reset", "copy_row"])
def test_numbers_of_another_type_are_refused(method, value):
    cache = NSACache.for_model(make_model(**SIZES), 2, 12)
    cache.reserve(5)
    before = snapshot(cache)
    if method == "reset" and value is None:
        value = 0  # one row, not a sequence
    arguments = (value, cache) if method == "copy_row" else (value,)
    name = {"reset": "rows", "copy_row": "row"}.get(method, "counts")
    with pytest.raises(TypeError, match=f"^{name}: expected (an )?ints?, got "):
        getattr(cache, method)(*arguments)
    assert cache.host_lengths == [5, 5]
    assert_untouched(cache, before)


def test_what_is_no_cache_is_refused():
    model, cache = make_model(**SIZES), NSACache.for_model(make_model(**SIZES), 2, 12)
    with pytest.raises(TypeError, match="source: expected an NSACache, got int"):
        cache.copy_row(0, 3)
    for attention in ("nsa", "dense"):
        with pytest.raises(TypeError, match="cache: expected an NSACache, got dict"):
            make_model(attention=attention, **SIZES)(draw_ids(2, 1), {})
        with pytest.raises(TypeError, match="cache: expected an NSACache, got dict"):
            make_model(attention=attention, **SIZES).layers[0].attn(draw(2, 1, LAYER["dim"], seed=0), {})
    for arguments in ({"batch": True}, {"batch": 2.0}, {"capacity": "9"}, {"capacity": None}):
        with pytest.raises(TypeError, match=f"{next(iter(arguments))}: expected an int, got "):
            NSACache.for_model(model, **{"batch": 1, "capacity": 9} | arguments)
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got int"):
        NSACache.for_model(3, 1, 9)
    for dtype in (torch.int64, "bfloat16"):
        with pytest.raises(ValueError, match="dtype: expected float16, bfloat16, float32 or float64, got "):
            NSACache.for_model(model, 1, 9, dtype=dtype)


@EACH_ATTENTION
@pytest.mark.parametrize(
    "case, message",
    [
        ("batch", "cache: expected a batch of 2, got 3"),
        ("dtype", "cache: expected keys in torch.float32 on cpu, got torch.float64 on cpu"),
        ("device", "cache: expected keys in torch.float64 on meta, got torch.float64 on cpu"),
        ("model", "cache: expected one made by NSACache.for_model for this .*'s model"),
        ("gradients", "cache: expected a call without gradients"),
        ("packed", "cu_seqlens: expected None together with cache, got both"),
        ("lengths", "lengths: expected 0 <= lengths <= 3"),
        ("lengths-type", "lengths: expected dtype int32 or int64, got torch.float32"),
        ("attn_mask", "attn_mask: expected None"),
        ("branch", "branch: expected None"),
    ],
)
def test_call_that_does_not_fit_writes_nothing(attention, case, message):
    model, other = (make_model(attention=attention, **SIZES) for _ in range(2))
    options = {"dtype": {"dtype": torch.float32}, "device": {"device": "meta"}}.get(case, {})
    cache = NSACache.for_model(other if case == "model" else model, 2, 12, **options)
    if case not in ("model", "dtype", "device"):
        model(draw_ids(2, 8), cache)
    before = snapshot(cache)
    arguments = {
        "packed": {"cu_seqlens": int32(0, 3)},
        "lengths": {"lengths": int32(1, 4)},
        "lengths-type": {"lengths": torch.tensor([1.0, 1.0])},
        "attn_mask": {"attn_mask": torch.ones(3, 3)},
        "branch": {"branch": "all"},
    }.get(case, {})
    rows = {"batch": 3, "packed": 1}.get(case, 2)
    with torch.set_grad_enabled(case == "gradients"), pytest.raises(ValueError, match=message):
        model(draw_ids(rows, 3), cache, **arguments)
    if case != "device":
        assert_untouched(cache, before)


@pytest.mark.parametrize(
    "model, batch, capacity, message",
    [
        (make_layer, 0, 9, "batch: expected at least 1, got 0"),
        (make_layer, 1, 0, "capacity: expected at least 1, got 0"),
        (lambda: nn.Linear(3, 3), 1, 9, "model: expected a module with attention layers, got Linear"),
    ],
    ids=["batch", "capacity", "model"],
)
def test_cache_that_cannot_be_is_refused(model, batch, capacity, message):
    with pytest.raises(ValueError, match=message):
        NSACache.for_model(model(), batch, capacity)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_cache_for_which_there_is_no_memory_is_refused(device, monkeypatch):
    """Before anything is allocated; the capacity of the last test would fit nowhere."""
    model = make_model(**SIZES).to(device)
    size = NSACache.for_model(model, 3, 1000, device="meta").nbytes()
    monkeypatch.setattr("nsa_compile.graphs.cache.free_memory", lambda device: size)
    NSACache.for_model(model, 3, 1000)
    monkeypatch.setattr("nsa_compile.graphs.cache.free_memory", lambda device: int(0.9 * size))
    words = rf"^capacity: expected a cache within the 0.0 GiB that are free on {device}.*, got 1000 \(a cache of 0.0"
    with pytest.raises(ValueError, match=words):
        NSACache.for_model(model, 3, 1000)
    monkeypatch.undo()
    assert 2**20 < free_memory(model.embed.weight.device) < 2**50
    with pytest.raises(ValueError, match=rf"^max_new_tokens: expected a cache within .*, got {10**15} \("):
        generate(model, [[1, 2]], max_new_tokens=10**15)
    with pytest.raises(ValueError, match=rf"^capacity: expected a cache within .*, got {10**15} \("):
        NSACache.for_model(model, 1, 10**15)
    NSACache.for_model(model, 1, 10**15, device="meta")
    with FakeTensorMode():
        NSACache.for_model(model, 1, 10**12)
