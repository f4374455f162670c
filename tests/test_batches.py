"""Rows and batches: every row once an epoch for any world size, static shapes, losses of packed documents, prefetch."""

import pickle
import threading
import time
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import make_model, needs_compiler

from nsa_compile.data import Batch, PackedBatches, TokenShards, prefetch
from nsa_compile.data.batches import cut_rows, shuffled
from nsa_compile.data.shards import Shard

VOCAB = 31
END = VOCAB - 1


class Tokens(TokenShards):
    """Documents in memory: document i counts up from i, modulo 29, to the end token."""

    def __init__(self, lengths):
        self.vocab_size, self.shards = VOCAB, ()
        self.row = torch.cat([self.spell(i, n) for i, n in enumerate(lengths)])
        self._bounds = np.array([0, len(self.row)])
        self.starts = np.cumsum([0, *lengths])

    @staticmethod
    def spell(i, n):
        return torch.tensor([*((i + j) % 29 for j in range(n - 1)), END])

    def read(self, start, stop):
        assert 0 <= start <= stop <= self.n_tokens
        return self.row[start:stop].clone()


def pieces(batch: Batch) -> list[tuple[int, ...]]:
    ends = batch.cu_seqlens.tolist()
    return [tuple(batch.ids[0, a:z].tolist()) for a, z in pairwise(ends) if z > a]


LENGTHS = st.lists(st.integers(2, 40), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(2, 24), st.integers(0, 3), st.sampled_from([None, 1, 2, 5]))
def test_rows_hold_every_token_once(lengths, seq_len, seed, most):
    tokens = Tokens(lengths)
    batches = PackedBatches(tokens, seq_len=seq_len, batch_size=1, seed=seed, max_documents=most)
    rows = batches._rows
    assert rows[0, 0] == 0 and rows[-1, 1] == tokens.n_tokens and (rows[1:, 0] == rows[:-1, 1]).all()
    sizes = rows[:, 1] - rows[:, 0]
    assert sizes.min() > 0 and sizes.max() <= seq_len
    counts = [len(pieces(batches._assemble([row]))) for row in range(len(rows))]
    assert max(counts) <= batches.max_documents
    if most is None:
        assert max(counts) == batches.max_documents
    # a row is short only if it is full of pieces, or the last one
    assert all(size == seq_len or n == most for size, n in zip(sizes[:-1], counts[:-1], strict=True))
    # glued together the rows are the documents, whole, in the seed's order
    everything = torch.cat([batches._assemble([row]).ids[0, :size] for row, size in enumerate(sizes)])
    order = shuffled(len(lengths), seed, "documents")
    assert torch.equal(everything, torch.cat([tokens.document(i) for i in order]))


@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.integers(2, 16), st.sampled_from([(4, 2), (4, 4), (6, 3), (12, 4)]), st.integers(0, 3), st.data())
def test_a_step_is_the_same_for_any_world_size(lengths, seq_len, sizes, seed, data):
    batch_size, world_size = sizes
    batches = PackedBatches(Tokens(lengths), seq_len=seq_len, batch_size=batch_size, seed=seed)
    step = data.draw(st.integers(0, 20))
    whole = batches.batch(step)
    fresh = PackedBatches(Tokens(lengths), seq_len=seq_len, batch_size=batch_size, seed=seed)  # as after a resume
    shares = [fresh.batch(step, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert [piece for share in shares for piece in pieces(share)] == pieces(whole)
    assert sum(share.n_targets for share in shares) == whole.n_targets
    assert sum(len(piece) - 1 for piece in pieces(whole)) == whole.n_targets
    for share, rows in [(whole, batch_size), *((share, batch_size // world_size) for share in shares)]:
        assert share.ids.shape == (1, rows * seq_len) and share.ids.dtype == torch.int64
        assert share.cu_seqlens.shape == (rows * batches.max_documents + 1,) and share.cu_seqlens.dtype == torch.int32
        ends = share.cu_seqlens
        assert ends[0] == 0 and (ends.diff() >= 0).all() and (share.ids[0, ends[-1] :] == 0).all()


@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.integers(2, 24), st.integers(0, 3), st.sampled_from([None, 2]), st.booleans())
def test_what_a_batch_holds_is_known_without_reading_it(lengths, seq_len, seed, most, packed):
    tokens = Tokens([seq_len, *lengths])
    batches = PackedBatches(tokens, seq_len=seq_len, batch_size=4, seed=seed, max_documents=most, packed=packed)
    for rows, batch in [
        (batches.rows(3, rank=1, world_size=2), batches.batch(3, rank=1, world_size=2)),
        (batches.evenly_spaced_rows(2, rank=0, world_size=2)[1], list(batches.evenly_spaced(2, world_size=2))[1]),
    ]:
        assert batches.n_targets(rows) == batch.n_targets
        if packed:
            assert batches.lengths(rows).tolist() == [len(piece) for piece in pieces(batch)]


def test_a_batch_is_described_by_rows_and_documents():
    batches = PackedBatches(Tokens([5, 9, 4, 6]), seq_len=8, batch_size=2, seed=0)
    order = shuffled(4, 0, "documents").tolist()
    assert batches.describe([0]) == f"rows 0 of 3 (documents {order[0]}, {order[1]})"
    assert batches.describe([0, 2, 1], most=2).startswith("rows 0, 2 and 1 more of 3 (documents ")


@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.integers(2, 16), st.integers(1, 5), st.integers(0, 3), st.booleans())
def test_an_epoch_is_every_row_once_in_an_order_of_its_own(lengths, seq_len, batch_size, seed, packed):
    lengths = [seq_len, *lengths]
    batches = PackedBatches(Tokens(lengths), seq_len=seq_len, batch_size=batch_size, seed=seed, packed=packed)
    n, seen = batches.rows_per_epoch, []
    batches._assemble = seen.extend
    for step in range(-(-3 * n // batch_size)):
        batches.batch(step)
    epochs = [seen[i * n : (i + 1) * n] for i in range(3)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    if n >= 20:
        assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert batches.epoch_at(0) == 0 and batches.epoch_at(n) == batch_size


def test_the_order_is_what_it_was():
    """Runs that were stopped resume at the very sample: the order may not change."""
    assert shuffled(10, 0, "documents").tolist() == [6, 4, 7, 8, 9, 5, 0, 1, 2, 3]
    assert shuffled(10, 7, "rows", 3).tolist() == [6, 5, 4, 7, 1, 3, 0, 8, 9, 2]
    assert sorted(shuffled(10_000, 1).tolist()) == list(range(10_000))
    first = np.bincount([int(shuffled(8, key)[0]) for key in range(4000)], minlength=8)
    assert first.min() > 400 and first.max() < 600  # every number comes first alike, 500 times of 4000


def test_seeds_give_other_orders():
    lengths = [7] * 50
    rows = [pieces(PackedBatches(Tokens(lengths), seq_len=8, batch_size=4, seed=seed).batch(0)) for seed in range(4)]
    assert len({str(row) for row in rows}) == 4
    plain = PackedBatches(Tokens(lengths), seq_len=7, batch_size=4, seed=None)
    assert [int(piece[0]) for piece in pieces(plain.batch(1))] == [4, 5, 6, 7]


def test_joined_rows_run_across_documents():
    tokens = Tokens([5, 9, 4, 6])
    batches = PackedBatches(tokens, seq_len=7, batch_size=2, seed=None, packed=False)
    ids, cu_seqlens, n_targets = batches.batch(1)
    assert cu_seqlens is None and n_targets == 12 and batches.rows_per_epoch == 4
    assert torch.equal(ids, torch.stack([tokens.row[14:21], tokens.row[17:24]]))  # the last one reaches back


def test_held_out_batches_are_evenly_spaced():
    batches = PackedBatches(Tokens([8] * 20), seq_len=8, batch_size=2, seed=None)
    held = list(batches.evenly_spaced(4))
    assert [[piece[0] for piece in pieces(batch)] for batch in held] == [[0, 2], [5, 7], [10, 12], [15, 17]]
    ranks = [list(batches.evenly_spaced(4, rank=rank, world_size=2)) for rank in (0, 1)]
    assert [pieces(a) + pieces(b) for a, b in zip(*ranks, strict=True)] == [pieces(batch) for batch in held]
    few = PackedBatches(Tokens([8] * 3), seq_len=8, batch_size=2, seed=None)
    assert [[piece[0] for piece in pieces(batch)] for batch in few.evenly_spaced(3)] == [[0, 0], [1, 1], [2, 2]]


def test_rows_of_many_documents_are_cut_in_little_time():
    lengths = np.random.default_rng(0).integers(2, 9, 200_000)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    start = time.perf_counter()
    rows = cut_rows(starts, 64, 11)
    assert time.perf_counter() - start < 10
    size = rows[:, 1] - rows[:, 0]
    assert size.sum() == starts[-1] and 0.05 < (size < 64).mean() < 0.95


def test_positions_pass_2_to_the_31():
    starts = np.arange(0, 2**36, 2**33)
    rows = cut_rows(starts, 2**20, None)
    assert rows.dtype == np.int64 and rows[-1, 1] == starts[-1] and len(rows) == starts[-1] // 2**20


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"seq_len": 1}, "seq_len: expected at least 2, got 1"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"max_documents": 0}, "max_documents: expected at least 1, got 0"),
        ({"batch_size": 2**29}, "batch_size: expected less than 2\\^31 tokens of a step"),
        ({"seq_len": 99, "packed": False}, "tokens: expected at least 99 for rows of seq_len = 99, got 10"),
    ],
)
def test_bad_settings_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        PackedBatches(Tokens([4, 6]), **{"seq_len": 5, "batch_size": 2} | changes)


def test_bad_places_are_refused():
    batches = PackedBatches(Tokens([4, 6]), seq_len=5, batch_size=4)
    for arguments, words in (
        ((-1, 0, 1), "step: expected at least 0, got -1"),
        ((0, 0, 3), "world_size: expected a divisor of batch_size = 4, got 3"),
        ((0, 2, 2), "rank: expected 0 … 1, got 2"),
    ):
        with pytest.raises(ValueError, match=words):
            batches.batch(arguments[0], rank=arguments[1], world_size=arguments[2])


def test_batches_are_picklable():
    batches = PackedBatches(Tokens([4, 6, 9]), seq_len=5, batch_size=2, seed=3)
    assert pieces(pickle.loads(pickle.dumps(batches)).batch(5)) == pieces(batches.batch(5))


@pytest.mark.parametrize("attention", ["nsa", "dense"])
def test_the_loss_of_packed_documents_is_the_mean_of_their_losses(attention):
    """To the bit of fp64 nearly: padding at the end, empty entries of cu_seqlens and neighbours change nothing."""
    model = make_model(attention=attention)
    batches = PackedBatches(Tokens([9, 23, 2, 14, 31, 5]), seq_len=24, batch_size=3, seed=1, max_documents=6)
    for step in range(3):
        batch = batches.batch(step)
        documents = [piece for piece in pieces(batch) if len(piece) > 1]
        alone = sum(model.loss(torch.tensor([piece])) * (len(piece) - 1) for piece in documents)
        packed = model.loss(batch.ids, batch.cu_seqlens)
        torch.testing.assert_close(packed * batch.n_targets, alone, rtol=1e-12, atol=0)
        weight = model.embed.weight
        gradients = [torch.autograd.grad(loss, weight)[0] for loss in (packed * batch.n_targets, alone)]
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


@needs_compiler
def test_batches_compile_once():
    torch.compiler.reset()
    model = make_model(torch.float32, n_layers=1)
    loss = torch.compile(model.loss, fullgraph=True, dynamic=False)
    batches = PackedBatches(Tokens([9, 23, 2, 14, 31, 5]), seq_len=24, batch_size=2, seed=1)
    first = batches.batch(0)
    loss(first.ids, first.cu_seqlens)
    with torch.compiler.set_stance("fail_on_recompile"):
        for step in range(1, 4):
            ids, cu_seqlens, _ = batches.batch(step)
            torch.testing.assert_close(loss(ids, cu_seqlens), model.loss(ids, cu_seqlens), rtol=1e-4, atol=1e-5)


def make_numbered(step: int) -> Batch:
    return Batch(torch.tensor([[step]]), torch.tensor([0, 1], dtype=torch.int32), 0)


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_prefetch_gives_the_batches_in_order_and_works_ahead():
    made = []

    def make(step):
        made.append(step)
        return make_numbered(step)

    with prefetch(make, range(3, 40), ahead=2) as stream:
        assert int(next(stream).ids) == 3
        deadline = time.monotonic() + 10
        while len(made) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert made == [3, 4, 5, 6]  # one given, two waiting, one in hand
        assert [int(batch.ids) for batch in stream] == list(range(4, 40))
    assert not prefetch_threads()


def test_prefetch_ends_with_its_block_and_passes_errors_on():
    with pytest.raises(KeyError), prefetch(make_numbered, range(10**9)) as stream:
        next(stream)
        raise KeyError
    assert not prefetch_threads()

    def fail(step):
        if step == 2:
            raise OSError("gone")
        return make_numbered(step)

    with pytest.raises(OSError, match="gone"), prefetch(fail, range(5)) as stream:
        assert [int(next(stream).ids) for _ in range(2)] == [0, 1]
        next(stream)
    assert not prefetch_threads()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_prefetch_brings_batches_to_the_gpu():
    batches = PackedBatches(Tokens([9, 23, 2, 14, 31, 5]), seq_len=24, batch_size=2, seed=1)
    assert batches.batch(0).pin_memory().ids.is_pinned()
    with prefetch(batches.batch, range(20), device="cuda") as stream:
        for step, batch in enumerate(stream):
            assert batch.ids.is_cuda and batch.cu_seqlens.is_cuda
            assert torch.equal(batch.ids.cpu(), batches.batch(step).ids)


def test_the_tokens_of_the_tests_are_shards_in_all_but_name(tmp_path):
    tokens = Tokens([4, 6])
    tokens.row.numpy().astype("u1").tofile(tmp_path / "x.bin")
    np.array([4, 10], "<i8").tofile(tmp_path / "x.ends")
    stored = TokenShards(tmp_path, [Shard("x", 10, 2, "")], vocab_size=VOCAB)
    for attribute in ("n_tokens", "n_documents", "vocab_size"):
        assert getattr(stored, attribute) == getattr(tokens, attribute)
    assert torch.equal(stored.read(2, 9), tokens.read(2, 9)) and stored.starts.tolist() == tokens.starts.tolist()
