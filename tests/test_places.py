"""Where queries, compressed tokens and keys stand, by the kernels against `ops/layout.py`: on a GPU, or interpreted."""

from __future__ import annotations

import random
from functools import partial

import pytest
import torch
from cases import int32
from launches import watch

from nsa_compile import compress_mean, compressed_attention, window_attention
from nsa_compile.custom_ops.kernels import places
from nsa_compile.custom_ops.kernels.places import compressed_intervals, invert_intervals, window_intervals
from nsa_compile.ops import layout

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    return watch(monkeypatch)


@pytest.mark.parametrize("seed", range(24))
def test_places_are_those_of_the_layout(seed):
    """Rows and packed sequences, empty and short ones, anywhere in a buffer of keys, which may be too short."""
    draw = random.Random(seed)
    d = draw.choice([1, 2, 4])
    l, w = d * draw.randint(1, 4), draw.randint(1, 40)
    t, packed = draw.choice([1, 7, 70, 300]), seed % 2 == 1
    b = 1 if packed else draw.randint(1, 3)
    ends = sorted(draw.randint(0, t) for _ in range(draw.choice([1, 3, 40])))
    cu_seqlens = int32(0, *ends).to(DEVICE) if packed else None
    start = [draw.randint(0, 90) for _ in range(b)] if seed % 4 > 1 else None
    q_start = None if start is None else int32(*start).to(DEVICE)
    s = t if start is None else draw.choice([t // 2 + 1, t + 100])
    c = s // d if packed else layout.num_cmp(s, l, d)
    q = torch.zeros(b, t, 1, 1, device=DEVICE)

    where = layout.query_layout(q, q_start, cu_seqlens)
    begin = where.first.clamp(0, s)
    position = torch.minimum(torch.where(where.valid, where.position, -1), s - 1 - begin)
    got, span = places.query_places(q, s, q_start, cu_seqlens)
    assert torch.equal(got.position, position.int()) and torch.equal(got.first, begin.int())
    assert torch.equal(span.start, got.first)
    assert torch.equal(span.end, torch.where(position < 0, 0, begin + position + 1).int())

    window = window_intervals(q, s, w, q_start, cu_seqlens)
    own = where.first + where.position
    seen = where.valid & (own - w + 1 < s)
    assert torch.equal((window.end - window.start)[~where.valid], torch.zeros_like(own.int()[~where.valid]))
    assert torch.equal(window.end[seen], (own + 1).clamp_max(s).int()[seen])
    assert torch.equal(window.start[seen], torch.maximum(where.first, own - w + 1).int()[seen])

    first, last = layout.visible_slots(where, cu_seqlens, l=l, d=d)
    for compressed in (
        compressed_intervals(q, c, l, d, q_start, cu_seqlens),
        places.places_of_choice(q, c, l, d, q_start, cu_seqlens)[1],
    ):
        assert torch.equal(compressed.start[where.valid], first.clamp_max(c).int()[where.valid])
        assert torch.equal(compressed.end[where.valid], last.clamp_max(c).int()[where.valid])
        assert torch.equal(compressed.start[~where.valid], compressed.end[~where.valid])
    if packed:
        expected = layout.compressed_ends(cu_seqlens, l=l, d=d)
        assert torch.equal(places.compressed_ends(cu_seqlens, l, d), expected)

    for keys, n in ((window, s), (compressed, c)):
        key, token = torch.arange(n, device=DEVICE), torch.arange(t, device=DEVICE)[:, None]
        sees = (keys.start[..., None] <= key) & (key < keys.end[..., None])
        if n > 0:
            low, high = invert_intervals(keys, n)
            assert torch.equal(sees, sees & (low[:, None] <= token) & (token < high[:, None]))


def test_places_may_be_strided():
    x, k, shape = torch.randn(2, 30, 2, 4, device=DEVICE), torch.randn(1, 30, 2, 4, device=DEVICE), {"l": 4, "d": 2}
    q_start = int32(11).to(DEVICE).expand(2)
    got, _ = window_attention(x, x, x, w=5, q_start=q_start, impl="triton")
    torch.testing.assert_close(got, window_attention(x, x, x, w=5, q_start=q_start.clone(), impl="triton")[0])
    cu_seqlens = int32(0, 13, 13, 27).to(DEVICE)
    strided = torch.stack((cu_seqlens, cu_seqlens + 99), 1)[:, 0]
    for function in (
        partial(compress_mean, k, **shape),
        partial(compressed_attention, k, k[:, :15], k[:, :15], **shape),
    ):
        got, expected = (function(cu_seqlens=ends, impl="triton") for ends in (strided, cu_seqlens))
        torch.testing.assert_close(got, expected)


def test_no_query_of_padding_counts_among_those_that_see_a_key():
    q = torch.zeros(1, 70, 1, 8, device=DEVICE)
    cu_seqlens = int32(0, 20, 20, 63).to(DEVICE)
    for intervals, keys in (
        (window_intervals(q, 70, 20, None, cu_seqlens), 70),
        (compressed_intervals(q, 17, 8, 4, None, cu_seqlens), 17),
    ):
        first, last = invert_intervals(intervals, keys)
        token = torch.arange(70, device=DEVICE)[None, :, None]
        sees = (intervals.start[..., None] <= torch.arange(keys, device=DEVICE)) & (
            torch.arange(keys, device=DEVICE) < intervals.end[..., None]
        )
        assert torch.equal(sees, (first[:, None] <= token) & (token < last[:, None]))
        assert last.max() == 63
