"""Steps of up to 8 tokens over a cache: the kernels against the same layer on the reference, buffer by buffer."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from launches import Launches, find_kernels, watch
from torch import Tensor
from torch.library import opcheck

from nsa_compile import NSAAttention, NSACache
from nsa_compile.custom_ops.decode import runs_step
from nsa_compile.custom_ops.kernels import cache as cache_kernels
from nsa_compile.custom_ops.kernels.decode import _rotate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN = float("nan")
BASE = {
    "dim": 24, "n_heads": 6, "n_kv_groups": 2, "d_k": 12, "d_v": 10, "l": 8, "d": 4, "l_sel": 16, "n_sel": 4, "w": 20,
}  # fmt: skip
SIZES = {
    "base": {},
    "tied": {"tie_kv": True},
    "mlp": {"phi": "mlp"},
    "sigmoid": {"gate": "sigmoid"},
    "three-strides": {"l_sel": 12, "n_sel": 5, "init_blocks": 0, "local_blocks": 1},
    "one-token-blocks": {"l": 1, "d": 1, "l_sel": 4, "n_sel": 6},
    "long-blocks": {"l": 16, "d": 2, "l_sel": 16},
    "one-head": {"n_heads": 1, "n_kv_groups": 1},
    "all-forced": {"n_sel": 3},
}


@pytest.fixture
def launches(monkeypatch) -> Launches:
    return watch(monkeypatch)


def make_layers(**changes) -> tuple[NSAAttention, NSAAttention]:
    """The same layer on the reference and on the kernels; what starts as zero is drawn, too."""
    torch.manual_seed(0)
    expected, got = (NSAAttention(**BASE | changes, impl=impl) for impl in ("reference", "triton"))
    for parameter in expected.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    got.load_state_dict(expected.state_dict())
    return expected.to(DEVICE), got.to(DEVICE)


def caches_after(layers: tuple[NSAAttention, NSAAttention], lengths: list[int], capacity: int) -> list[NSACache]:
    """Caches of both layers that hold the same prompts, NaN in everything never written."""
    caches = [NSACache.for_model(layer, len(lengths), capacity) for layer in layers]
    for buffer in caches[0].layers[0].buffers.values():
        buffer.fill_(NAN)
    x = torch.randn(len(lengths), max(lengths), BASE["dim"], device=DEVICE)
    layers[0](x, cache=caches[0], lengths=torch.tensor(lengths, dtype=torch.int32, device=DEVICE))
    for mine, theirs in zip(caches[1].tensors(), caches[0].tensors(), strict=True):
        mine.copy_(theirs)
    return caches


def assert_equal_state(caches: list[NSACache]) -> None:
    """Positions, reads and all that either cache holds agree; what was never written is NaN in both."""
    expected, got = (cache.layers[0] for cache in caches)
    for name in ("positions", "nominal_reads", "actual_reads"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name
    for name, buffer in expected.buffers.items():
        torch.testing.assert_close(got.buffers[name], buffer, rtol=1e-5, atol=1e-5, equal_nan=True, msg=name)


def step(layers, caches: list[NSACache], x: Tensor, count: list[int] | None = None) -> None:
    """One call of both layers; outputs and caches agree."""
    strided = torch.tensor([(x, 99) for x in count or ()], dtype=torch.int32, device=DEVICE)
    lengths = None if count is None else strided[:, 0]
    expected, got = (layer(x, cache=cache, lengths=lengths) for layer, cache in zip(layers, caches, strict=True))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert got.isfinite().all()
    assert_equal_state(caches)


@torch.no_grad()
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_steps_of_one_token(sizes, launches):
    """Across the boundaries of d, l, l_sel and w, from rows of different lengths."""
    layers = make_layers(**sizes)
    caches = caches_after(layers, [101, 7, 63], 120)
    for _ in range(10):
        launched = launches.of("decode")
        step(layers, caches, torch.randn(3, 1, BASE["dim"], device=DEVICE))
        assert launches.of("decode") == launched + 6


@torch.no_grad()
@pytest.mark.parametrize("sizes", [{}, {"phi": "mlp", "d": 2}, {"tie_kv": True}], ids=["base", "mlp", "tied"])
def test_steps_of_several_tokens_take_as_many_as_each_row_wants(sizes, launches):
    layers = make_layers(**sizes)
    caches = caches_after(layers, [90, 3, 40], 120)
    for count in ([8, 1, 0], [5, 8, 3], [0, 0, 0], [8, 8, 8]):
        step(layers, caches, torch.randn(3, 8, BASE["dim"], device=DEVICE), count)
    assert launches.of("decode") == 24


@pytest.mark.parametrize("ring", [False, True], ids=["buffer", "ring"])
@pytest.mark.parametrize("t", [1, 7, 23, 40])
def test_tokens_go_into_and_out_of_a_cache(ring, t, launches):
    """The kernels against the ops on the CPU, at and outside the ends of a buffer of 23 tokens; inputs strided."""
    torch.manual_seed(t)
    buffer, new = torch.randn(5, 23, 2, 6), torch.randn(5, 2, t, 7)[..., :6].transpose(1, 2)
    positions, count = (torch.tensor(x, dtype=torch.int32) for x in ((-30, 3, 20, 22, 23), (t, 1, 0, t, t // 2)))
    index = torch.stack([torch.arange(t) + first for first in (0, -2, 19, 22, 23)])[:, :23]
    keep = torch.rand(5, min(t, 23)) < 0.7
    ops, on_cpu = torch.ops.nsa_compile, (new, positions, count, index, keep)
    buffer_here = buffer.clone().to(DEVICE)
    new_here, positions_here, count_here, index_here, keep_here = (x.to(DEVICE) for x in on_cpu)
    positions_here, count_here = (torch.stack((x, x - 99), 1)[:, 0] for x in (positions_here, count_here))  # strided
    first = positions - 4
    for length in (1, 4 + t, 23):
        got = cache_kernels.cache_recall(buffer_here, new_here, positions_here, first.to(DEVICE), length)
        assert torch.equal(got.cpu(), ops.cache_recall(buffer, new, positions, first, length))
    for wanted, wanted_here in ((count, count_here), (None, None)):
        ops.cache_append(buffer, new, positions, wanted, ring)
        cache_kernels.cache_append(buffer_here, new_here, positions_here, wanted_here, ring)
        assert torch.equal(buffer_here.cpu(), buffer)
    ops.cache_write(buffer, 2 * new[:, :23], index, keep)
    cache_kernels.cache_write(buffer_here, 2 * new_here[:, :23], index_here, keep_here)
    assert torch.equal(buffer_here.cpu(), buffer)
    assert launches.of("cache") == 6


@torch.no_grad()
def test_tokens_taken_back_leave_no_trace(launches):
    layers = make_layers()
    caches = caches_after(layers, [77, 12], 120)
    step(layers, caches, torch.randn(2, 8, BASE["dim"], device=DEVICE))
    for cache in caches:
        cache.layers[0].positions.sub_(torch.tensor([6, 8], dtype=torch.int32, device=DEVICE))
    for _ in range(9):
        step(layers, caches, torch.randn(2, 1, BASE["dim"], device=DEVICE))


@torch.no_grad()
@pytest.mark.parametrize("sizes", [{"tie_kv": True}, {"phi": "mlp", "d": 2}], ids=["tied", "mlp"])
def test_tokens_past_the_capacity_give_nan_and_are_kept_nowhere(sizes, launches, monkeypatch):
    """Rows that are full, pass the end half-way or later, or idle, where the host does not look; then taken back."""
    monkeypatch.setattr("nsa_compile.graphs.cache.values_are_visible", lambda x: False)
    layers = make_layers(**sizes)
    caches = caches_after(layers, [40, 37, 40, 20], 40)
    before = [[x[row].clone() for x in cache.layers[0].buffers.values()] for cache in caches for row in (0, 2)]
    for count, t, finite in (
        ([1, 1, 0, 1], 1, [0, 1, 1, 1]),
        (None, 4, [0, 2, 0, 4]),
        ([8, 3, 0, 8], 8, [0, 0, 8, 8]),
    ):
        x = torch.randn(4, t, BASE["dim"], device=DEVICE)
        lengths = None if count is None else torch.tensor(count, dtype=torch.int32, device=DEVICE)
        expected, got = (layer(x, cache=cache, lengths=lengths) for layer, cache in zip(layers, caches, strict=True))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4, equal_nan=True)
        assert_equal_state(caches)
        for row in range(4):
            given = t if count is None else count[row]
            assert got[row, : finite[row]].isfinite().all() and got[row, finite[row] : given].isnan().all()
            assert not got[row, given:].any()
    assert caches[1].positions.tolist() == [53, 45, 44, 33]
    after = [[x[row] for x in cache.layers[0].buffers.values()] for cache in caches for row in (0, 2)]
    for old, new in zip(before, after, strict=True):
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(old, new, strict=True))
    for cache in caches:
        cache.layers[0].positions.copy_(torch.tensor([36, 40, 33, 33], device=DEVICE))
    x = torch.randn(4, 1, BASE["dim"], device=DEVICE)
    expected, got = (layer(x, cache=cache) for layer, cache in zip(layers, caches, strict=True))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert got.isfinite().flatten(1).all(1).tolist() == [True, False, True, True]
    assert_equal_state(caches)
    assert launches.of("decode") == 24


@torch.no_grad()
def test_nan_of_a_later_token_of_the_step_stays_there(launches):
    layers = make_layers()
    caches = caches_after(layers, [50], 80)
    x = torch.randn(1, 5, BASE["dim"], device=DEVICE)
    x[:, 3] = NAN
    expected, got = (layer(x, cache=cache) for layer, cache in zip(layers, caches, strict=True))
    torch.testing.assert_close(got[:, :3], expected[:, :3], rtol=1e-4, atol=1e-4)
    assert got[:, :3].isfinite().all() and got[:, 3:].isnan().all()


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True], ids=["separate", "tied"])
def test_opcheck(tied, launches):
    """What the op says it writes is what it writes, and its fake agrees."""
    layer = make_layers(tie_kv=tied)[1]
    cache = NSACache.for_model(layer, 1, 40).layers[0]
    cache.positions.fill_(33)
    q, k, v = (torch.randn(1, 2, n, x, device=DEVICE) for n, x in ((6, 12), (2, 12), (2, 10)))
    window = (None, None) if tied else (k * 2, v * 2)
    names = (f"{x}_{branch}" for branch in ("cmp", "raw", "slc", "win") for x in "kv")
    state = (cache.positions, cache.nominal_reads, cache.actual_reads, *map(cache.buffers.get, names))
    gates = torch.rand(1, 2, 6, 3, device=DEVICE)
    arguments = (q, k, v, k + 1, v + 1, *window, None, None, gates, None, *state, 8, 4, 16, 4, 20, 1, 2, 1e4, 0.3)
    opcheck(torch.ops.nsa_compile.decode_attention.default, arguments)
    assert launches.of("decode") > 0


@triton.jit
def _turn_kernel(positions, out, ROWS: tl.constexpr, LOG2_THETA: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr):
    """Cosines and sines [2, ROWS, HALF] of RoPE: (1, 0) rotated."""
    row = tl.arange(0, ROWS)
    one, zero = tl.full([ROWS, HALF], 1.0, tl.float32), tl.zeros([ROWS, HALF], tl.float32)
    cos, sin = _rotate(one, zero, tl.load(positions + row), LOG2_THETA, WIDTH, HALF)
    at = row[:, None] * HALF + tl.arange(0, HALF)[None, :]
    tl.store(out + at, cos)
    tl.store(out + ROWS * HALF + at, sin)


@pytest.mark.parametrize("width", [12, 128])
@pytest.mark.parametrize("theta", [1e4, 1e7])
def test_rotation_is_exact_to_fp32(theta, width, launches):
    """Also a million tokens on, where an angle counted in fp32 would be off by 0.06."""
    half, padded = width // 2, triton.next_power_of_2(width // 2)
    positions = torch.cat([torch.arange(128), 2**20 - 1 - torch.arange(128)]).to(DEVICE, torch.int32)
    out = torch.empty(2, 256, padded, device=DEVICE)
    _turn_kernel[(1,)](positions, out, 256, math.log2(theta), width, padded)
    frequency = theta ** (torch.arange(half, dtype=torch.float64, device=DEVICE) / -half)
    angle = positions.double()[:, None] * frequency
    assert (out[..., :half] - torch.stack([angle.cos(), angle.sin()])).abs().max() < 2e-7


def test_steps_of_more_rows_than_a_launch_takes_go_another_way(launches):
    for b, t, fits in ((65535, 1, True), (65536, 1, False), (8191, 8, True), (8192, 8, False), (2, 9, False)):
        q, v = (torch.empty((), device=DEVICE).expand(b, t, n, 8) for n in (2, 1))
        assert runs_step("triton", q, v, d=4, l_sel=16) == fits


def test_every_kernel_of_a_step_is_counted():
    assert len([name for name in find_kernels() if name.startswith("decode.")]) == 6
