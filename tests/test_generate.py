"""Sampling and the decode loop: draws, unequal rows, chunks, stop tokens, callbacks, errors."""

import pytest
import torch
from torch import nn

from nsa_compile import NSAAttention, NSACache, NSAConfig, NSALanguageModel
from nsa_compile.generate import generate
from nsa_compile.graphs.prefill import prefill
from nsa_compile.ops.sampling import sample, uniform_bits

SIZES = {"dim": 32, "n_heads": 4, "n_kv_groups": 2, "d_k": 8, "d_v": 8, "l": 4, "d": 2, "l_sel": 4, "n_sel": 4, "w": 6}
PROMPTS = [[3, 1, 4, 1, 5], [9], list(range(20)), [7, 7, 7]]


@pytest.fixture(scope="module", params=["nsa", "dense"])
def model(request):
    torch.manual_seed(0)
    model = NSALanguageModel(NSAConfig(**SIZES, n_layers=2, vocab_size=24, attention=request.param)).double().eval()
    with torch.no_grad():  # sharp logits, so that greedy choices are far from ties
        model.head.weight.mul_(50)
    return model


def rows(value, b: int = 1, dtype=torch.float32):
    return torch.full((b,), value, dtype=dtype)


def draw(logits, *, temperature=1.0, top_p=1.0, seed=None, position=None):
    b = logits.shape[0]
    seed = rows(0, b, torch.int64) if seed is None else seed
    position = rows(0, b, torch.int64) if position is None else position
    return sample(logits, temperature=rows(temperature, b), top_p=rows(top_p, b), seed=seed, position=position)


def full_greedy(model, prompt, n):
    """The oracle: one whole forward per token, no cache."""
    ids = list(prompt)
    for _ in range(n):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("vary", ["position", "seed", "high seed bits", "both"])
def test_uniform_is_uniform_over_seeds_and_positions(vary):
    n, bins = 1 << 16, 64
    count = torch.arange(n)
    zero = torch.zeros_like(count)
    seed, position = {
        "position": (zero + 5, count),
        "seed": (count, zero + 5),
        "high seed bits": (count << 32, zero),
        "both": (count // 256, count % 256),
    }[vary]
    u = uniform_bits(seed, position) * 2.0**-24
    assert u.min() >= 0 and u.max() < 1
    for values in (u, (u * 4096) % 1):  # leading and lower bits
        observed = torch.histc(values, bins, 0, 1)
        chi_square = ((observed - n / bins) ** 2 / (n / bins)).sum()
        assert chi_square < 63 + 5 * (2 * 63) ** 0.5
    neighbours = torch.corrcoef(torch.stack((u[:-1], u[1:])))[0, 1]
    assert neighbours.abs() < 5 / n**0.5


def test_uniform_takes_every_int64_seed():
    seeds = torch.tensor([-(2**63), -1, 0, 1, 2**63 - 1, 2**32, -(2**32)])
    u = uniform_bits(seeds, torch.full((7,), 2**31 - 1, dtype=torch.int32))
    assert u.unique().numel() == 7
    assert u.min() >= 0 and u.max() < 2**24


def test_sample_follows_the_probabilities():
    n = 20000
    p = torch.tensor([0.5, 0.05, 0.3, 0.15])
    for temperature in (1.0, 0.5):
        expected = p ** (1 / temperature) / (p ** (1 / temperature)).sum()
        token = draw(p.log().expand(n, 4), temperature=temperature, position=torch.arange(n))
        share = torch.bincount(token, minlength=4) / n
        assert ((share - expected) ** 2 / expected).sum() * n < 3 + 5 * 6**0.5


@pytest.mark.parametrize(
    "top_p, kept", [(0.4, {0}), (0.5, {0}), (0.51, {0, 2}), (0.8, {0, 2}), (0.82, {0, 2, 3}), (1.0, {0, 1, 2, 3})]
)
def test_sample_keeps_the_nucleus(top_p, kept):
    logits = torch.tensor([0.5, 0.0625, 0.3125, 0.125]).log().expand(4000, 4)
    assert set(draw(logits, top_p=top_p, position=torch.arange(4000)).tolist()) == kept


def test_sample_is_greedy_at_temperature_0_and_near_it():
    logits = torch.randn(64, 100, generator=torch.Generator().manual_seed(0))
    for temperature in (0.0, 1e-30):
        assert torch.equal(draw(logits, temperature=temperature), logits.argmax(-1))


def test_sample_never_draws_what_has_no_probability():
    logits = torch.full((2000, 8), float("-inf"))
    logits[:, 2] = logits[:, 5] = 0.0
    assert set(draw(logits, position=torch.arange(2000)).tolist()) == {2, 5}


def test_sample_takes_any_temperature_and_nucleus():
    logits = torch.randn(64, 100, generator=torch.Generator().manual_seed(0))
    position = torch.arange(64)
    likeliest = logits.argmax(-1)
    for arguments in ({"temperature": 1e-6}, {"temperature": 3.0, "top_p": 1e-30}, {"top_p": 1e-46}):
        assert torch.equal(draw(logits, **arguments, position=position), likeliest)
    flat = draw(logits[:1].expand(20000, 100), temperature=1e6, position=torch.arange(20000))
    expected = 20000 / 100
    assert ((torch.bincount(flat, minlength=100) - expected) ** 2 / expected).sum() < 99 + 5 * (2 * 99) ** 0.5
    assert draw(torch.zeros(3, 1), position=torch.arange(3)).eq(0).all()


@pytest.mark.parametrize("temperature", [0.0, 1e-6, 1.0, 1e6])
@pytest.mark.parametrize("top_p", [1e-30, 0.5, 1.0])
def test_sample_takes_infinite_logits_and_stays_in_the_vocabulary_with_nan(temperature, top_p):
    inf, nan = float("inf"), float("nan")
    logits = torch.tensor([[0.0, inf, 1.0], [-inf, 0.0, -inf], [1e38, -3e38, 3e38]])
    assert draw(logits, temperature=temperature, top_p=top_p).tolist() == [1, 1, 2]
    broken = torch.tensor([[nan, 1.0, 2.0], [0.0, nan, inf], [-inf, -inf, -inf], [nan, nan, nan]])
    drawn = draw(broken, temperature=temperature, top_p=top_p)
    assert drawn.min() >= 0 and drawn.max() < 3


def test_the_sum_that_a_draw_is_held_against_does_not_depend_on_the_order_of_adding(monkeypatch):
    """As on a CUDA device, where torch adds up a single row in another order than many, and not always in the same."""
    logits = 0.1 * torch.randn(300, 30000, generator=torch.Generator().manual_seed(0))
    position = torch.arange(300)
    expected = draw(logits, position=position)

    def backwards(x, dim):
        after = torch.cat((torch.zeros_like(x[..., :1]), x[..., 1:].flip(dim)), dim).cumsum_(dim)
        return x.sum(dim, keepdim=True) - after.flip(dim)

    monkeypatch.setattr(torch.Tensor, "cumsum", backwards)
    assert torch.equal(draw(logits, position=position), expected)


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"logits": [[0.0]]}, TypeError, "logits: expected a torch.Tensor, got list"),
        ({"logits": torch.zeros(2)}, ValueError, r"logits: expected float \[b, vocab\], got torch.float32 \(2,\)"),
        ({"logits": torch.zeros(2, 0)}, ValueError, r"logits: expected float .*, got torch.float32 \(2, 0\)"),
        ({"logits": torch.ones(2, 3).long()}, ValueError, "logits: expected float .*, got torch.int64"),
        ({"temperature": 1.0}, TypeError, "temperature: expected a torch.Tensor, got float"),
        ({"temperature": torch.ones(3)}, ValueError, r"temperature: expected float \[2\], got torch.float32 \(3,\)"),
        ({"top_p": torch.ones(2, 1)}, ValueError, r"top_p: expected float \[2\], got torch.float32 \(2, 1\)"),
        ({"seed": torch.ones(2)}, ValueError, r"seed: expected integers \[2\], got torch.float32 \(2,\)"),
        ({"position": torch.tensor([1])}, ValueError, r"position: expected integers \[2\], got torch.int64 \(1,\)"),
    ],
)
def test_sample_refuses_what_does_not_fit(change, error, words):
    arguments = {"logits": torch.zeros(2, 3), "temperature": torch.ones(2), "top_p": torch.ones(2)}
    arguments |= {"seed": torch.arange(2), "position": torch.arange(2)} | change
    with pytest.raises(error, match=words):
        sample(arguments.pop("logits"), **arguments)


def test_a_draw_depends_on_its_own_row_only():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 50, generator=generator)
    arguments = {
        "temperature": torch.tensor([0.0, 0.5, 1.0, 2.0, 1.0, 1.0]),
        "top_p": torch.tensor([1.0, 0.9, 0.5, 1.0, 1.0, 0.2]),
        "seed": torch.arange(6),
        "position": torch.tensor([5, 6, 7, 8, 9, 10]),
    }
    together = sample(logits, **arguments)
    for row in range(6):
        alone = sample(logits[row : row + 1], **{k: v[row : row + 1] for k, v in arguments.items()})
        assert alone == together[row]


def test_sample_compiles_to_one_graph():
    compiled = torch.compile(sample, fullgraph=True, backend="aot_eager")
    logits = torch.randn(3, 20)
    arguments = {"temperature": torch.tensor([0.0, 1.0, 0.7]), "top_p": torch.tensor([1.0, 0.9, 0.8])}
    arguments |= {"seed": torch.arange(3), "position": torch.arange(3, dtype=torch.int32)}
    assert torch.equal(compiled(logits, **arguments), sample(logits, **arguments))


@pytest.mark.parametrize("chunk", [None, 1, 3, 8, 64])
def test_greedy_equals_whole_forwards_for_rows_of_unequal_length(model, chunk):
    new = 18  # past n_sel * l_sel tokens: blocks are dropped
    result = generate(model, PROMPTS, max_new_tokens=new, prefill_chunk=chunk)
    assert result.tokens == [full_greedy(model, prompt, new) for prompt in PROMPTS]
    assert result.stopped == [False] * 4


def test_prompts_of_any_lengths_make_few_shapes(model):
    calls = []
    hook = model.register_forward_pre_hook(lambda _, args: calls.append(args[0].shape[1]))
    for length in (2, 60, 129, 200, 370, 700):
        generate(model, [[1] * length], max_new_tokens=1, cache=NSACache.for_model(model, 1, 1024))
    hook.remove()
    assert [n for n in calls if n > 1] == [128, 128, 128, 256, 256, 128, 512, 128, 128]


def test_a_padded_chunk_may_be_longer_than_what_follows(model):
    prompts = [list(range(17)), [4]]
    expected = [full_greedy(model, prompt, 2) for prompt in prompts]
    assert generate(model, prompts, max_new_tokens=2, prefill_chunk=16).tokens == expected


def test_prompts_may_be_bytes_or_a_tensor(model):
    expected = generate(model, [[1, 2, 3]], max_new_tokens=4)
    assert generate(model, [b"\x01\x02\x03"], max_new_tokens=4) == expected
    assert generate(model, torch.tensor([[1, 2, 3]], dtype=torch.int32), max_new_tokens=4) == expected


def test_sampled_rows_do_not_depend_on_their_neighbours(model):
    arguments = {"max_new_tokens": 12, "temperature": 3.0}
    together = generate(model, PROMPTS, seed=[5, 6, 7, 8], top_p=[1.0, 0.9, 1.0, 0.8], **arguments)
    for row, (seed, top_p) in enumerate([(5, 1.0), (6, 0.9), (7, 1.0), (8, 0.8)]):
        alone = generate(model, [PROMPTS[row]], seed=seed, top_p=top_p, **arguments)
        assert alone.tokens[0] == together.tokens[row]


def test_one_seed_gives_row_r_the_seed_plus_r(model):
    arguments = {"max_new_tokens": 12, "temperature": 3.0}
    result = generate(model, [[1, 2]] * 3, seed=4, **arguments)
    assert result == generate(model, [[1, 2]] * 3, seed=torch.tensor([4, 5, 6]), **arguments)
    assert result == generate(model, [[1, 2]] * 3, seed=torch.tensor(4), **arguments)
    assert len({tuple(row) for row in result.tokens}) == 3


@pytest.mark.parametrize("streaming", [True, False])
def test_a_stop_token_ends_its_row_and_leaves_the_cache_as_it_is(model, streaming):
    new = 40
    free = generate(model, PROMPTS, max_new_tokens=new).tokens
    stop = free[0][2]
    expected = [row[: row.index(stop)] if stop in row else row for row in free]
    assert any(len(row) == new for row in expected) or len({len(row) for row in expected}) > 1
    cache = NSACache.for_model(model, 4, 80)
    heard: list[list[int | None]] = []
    result = generate(
        model, PROMPTS, max_new_tokens=new, stop_token=stop, cache=cache,
        on_token=(lambda step, tokens: heard.append(tokens)) if streaming else None,
    )  # fmt: skip
    assert result.tokens == expected
    assert result.stopped == [stop in row for row in free]
    assert cache.positions.tolist() == cache.host_lengths
    assert cache.host_lengths == [
        len(prompt) + min(len(row), new - 1) for prompt, row in zip(PROMPTS, expected, strict=True)
    ]
    if streaming:
        assert [[t for t in row if t is not None] for row in zip(*heard, strict=True)] == expected
        for row in zip(*heard, strict=True):  # None from the stop on
            assert None not in row[: len([t for t in row if t is not None])]


def test_streaming_ends_with_the_last_row(model):
    stop = generate(model, [[1]], max_new_tokens=1).tokens[0][0]
    steps = []
    generate(
        model, [[1]], max_new_tokens=9, stop_token=stop, on_token=lambda step, tokens: steps.append((step, tokens))
    )
    assert steps == [(0, [None])]


def test_a_cache_continues_where_it_was(model):
    whole = generate(model, [[3, 1, 4, 1, 5, 9, 2, 6]], max_new_tokens=6)
    cache = NSACache.for_model(model, 1, 14)
    prefill(model, [[3, 1, 4]], cache)
    assert generate(model, [[1, 5, 9, 2, 6]], max_new_tokens=6, cache=cache, prefill_chunk=2) == whole


class OwnModel(nn.Module):
    """Somebody else's model around an attention layer: no config, a call of the same form."""

    def __init__(self):
        super().__init__()
        self.embed, self.attn, self.head = nn.Embedding(24, 32), NSAAttention(**SIZES), nn.Linear(32, 24)

    def forward(self, ids, cache=None, lengths=None, last_only=False):
        x = self.embed(ids)
        x = self.head(x + self.attn(x, cache=cache, lengths=lengths))
        if not last_only:
            return x
        last = torch.full_like(ids[:, 0], ids.shape[1]) if lengths is None else lengths.long()
        return x[torch.arange(x.shape[0]), (last - 1).clamp_min(0)][:, None]


def test_a_model_of_ones_own_decodes_in_the_same_loop():
    torch.manual_seed(1)
    own = OwnModel().double()
    result = generate(own, PROMPTS, max_new_tokens=10, prefill_chunk=4)
    assert result.tokens == [full_greedy(own, prompt, 10) for prompt in PROMPTS]


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad])
def test_compiled_models_decode_without_compiling_again(mode):
    torch.compiler.reset()
    torch.manual_seed(0)
    model = NSALanguageModel(NSAConfig(**SIZES, n_layers=1, vocab_size=24)).double().eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    expected = generate(model, PROMPTS, max_new_tokens=6)
    cache = NSACache.for_model(model, 4, 40)
    with mode():
        assert generate(compiled, PROMPTS, max_new_tokens=6, prefill_chunk=8, cache=cache) == expected
        cache.reset()
        with torch.compiler.set_stance("fail_on_recompile"):
            assert generate(compiled, PROMPTS, max_new_tokens=6, prefill_chunk=8, cache=cache) == expected


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"prompts": []}, "prompts: expected at least 1 row"),
        ({"prompts": [[1], []]}, "prompts: expected at least 1 token in every row, got none in row 1"),
        ({"prompts": [[1], [24]]}, r"prompts: expected token ids in 0 … 23, got 24 in row 1"),
        ({"prompts": [[1], [-1]]}, r"prompts: expected token ids in 0 … 23, got -1 in row 1"),
        ({"prompts": [[1], [0.5]]}, r"prompts: expected token ids .*, got 0.5 in row 1"),
        ({"prompts": torch.ones(2, 2)}, r"prompts: expected integers \[b, t\], got torch.float32"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected at least 1, got 0"),
        ({"prefill_chunk": 0}, "prefill_chunk: expected at least 1, got 0"),
        ({"temperature": -0.5}, r"temperature: expected a finite number >= 0, got -0.5"),
        ({"temperature": float("nan")}, "temperature: expected a finite number >= 0, got nan"),
        ({"temperature": [1.0, 1.0, 1.0]}, "temperature: expected one number or 2, one per row, got 3"),
        ({"top_p": 0.0}, r"top_p: expected a number in \(0, 1\], got 0.0"),
        ({"top_p": [1.0, 1.1]}, r"top_p: expected a number in \(0, 1\], got 1.1"),
        ({"seed": 1.5}, "seed: expected an int64 number, got 1.5"),
        ({"seed": 2**63 - 1}, "seed: expected an int64 number"),
        ({"seed": True}, "seed: expected an int64 number, got True"),
        ({"prompts": [[1], [True]]}, r"prompts: expected token ids .*, got True in row 1"),
        ({"temperature": 1e300}, r"temperature: expected a finite number >= 0, got 1e\+300"),
        ({"stop_token": 24}, "stop_token: expected 0 … 23, got 24"),
        ({"stop_token": -1}, "stop_token: expected 0 … 23, got -1"),
        ({"prompts": [[1]]}, "cache: expected one for 1 rows as prompts has, got 2"),
        ({"max_new_tokens": 9}, r"max_new_tokens: expected .* at most 10 tokens \(its capacity\), got 11"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(model, changes, words):
    cache = NSACache.for_model(model, 2, 10)
    before = [tensor.clone() for tensor in cache.tensors()]
    arguments = {"prompts": [[1, 2], [1]], "max_new_tokens": 2, "cache": cache} | changes
    with pytest.raises(ValueError, match=words):
        generate(model, **arguments)
    assert cache.host_lengths == [0, 0]
    assert all(torch.equal(a, b) for a, b in zip(before, cache.tensors(), strict=True))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model": 3}, "model: expected a torch.nn.Module, got int"),
        ({"prompts": None}, "prompts: expected a sequence of token ids per row, got NoneType"),
        ({"max_new_tokens": 2.5}, "max_new_tokens: expected an int, got float"),
        ({"max_new_tokens": True}, "max_new_tokens: expected an int, got True"),
        ({"prefill_chunk": "8"}, "prefill_chunk: expected an int, got str"),
        ({"stop_token": 0.5}, "stop_token: expected an int, got float"),
        ({"cache": 3}, "cache: expected an NSACache, got int"),
        ({"graph": 3}, "graph: expected a DecodeGraph, got int"),
        ({"on_token": 3}, "on_token: expected a function, got int"),
    ],
    ids=str,
)
def test_arguments_of_another_type_are_refused_before_anything_is_written(model, changes, words):
    cache = NSACache.for_model(model, 2, 10)
    arguments = {"model": model, "prompts": [[1, 2], [1]], "max_new_tokens": 2, "cache": cache} | changes
    with pytest.raises(TypeError, match=words):
        generate(arguments.pop("model"), arguments.pop("prompts"), **arguments)
    assert cache.host_lengths == cache.positions.tolist() == [0, 0]


def test_token_ids_are_held_against_the_vocabulary_of_a_model_without_config():
    own = OwnModel().double()
    cache = NSACache.for_model(own, 1, 10)
    for changes, words in (
        ({"prompts": [[1, 24]]}, "prompts: .* 0 … 23, got 24"),
        ({"stop_token": 24}, "stop_token: "),
    ):
        with pytest.raises(ValueError, match=words):
            generate(own, **{"prompts": [[1, 2]], "max_new_tokens": 2, "cache": cache} | changes)
    assert cache.host_lengths == cache.positions.tolist() == [0]


def test_text_is_no_prompt(model):
    for prompts in ("text", b"text", ["text"], [1, 2]):
        with pytest.raises(TypeError, match="prompts: expected a sequence of token ids per row"):
            generate(model, prompts, max_new_tokens=1)
