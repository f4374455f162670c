"""Wrong input: one error that names the argument, what was expected and what came."""

import pytest
import torch

from nsa_compile import (
    LlamaBlockNSA,
    NSAAttention,
    NSACache,
    NSAConfig,
    NSALanguageModel,
    apply_rope,
    compress_mean,
    compressed_attention,
    gated_sum,
    nsa_attention,
    num_cmp,
    select_blocks,
    selected_attention,
    window_attention,
)

B, T, G, H, D_K, D_V = 2, 20, 2, 3, 4, 6
L, D, L_SEL, N_SEL, W = 4, 2, 6, 3, 5
LAYER = {
    "dim": 16,
    "n_heads": 4,
    "n_kv_groups": 2,
    "d_k": 4,
    "d_v": 6,
    "l": L,
    "d": D,
    "l_sel": L_SEL,
    "n_sel": N_SEL,
    "w": W,
}


def int32(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def arguments(name: str) -> dict:
    """Valid arguments of a public function, by name."""
    q, k, v = torch.randn(B, T, G * H, D_K), torch.randn(B, T, G, D_K), torch.randn(B, T, G, D_V)
    k_cmp, v_cmp = torch.randn(B, num_cmp(T, L, D), G, D_K), torch.randn(B, num_cmp(T, L, D), G, D_V)
    blocks = torch.tensor([0, 1, -1], dtype=torch.int32).expand(B, T, G, 3).clone()
    o, gates = torch.randn(B, T, G * H, D_V), torch.randn(B, T, G * H, 3)
    sizes = {"l": L, "d": D}
    return {
        "apply_rope": {"x": q, "positions": torch.arange(T)},
        "compress_mean": {"k": k, **sizes},
        "compressed_attention": {"q": q, "k_cmp": k_cmp, "v_cmp": v_cmp, **sizes},
        "select_blocks": {"q": q, "k_cmp": k_cmp, "lse": o[..., 0], **sizes, "l_sel": L_SEL, "n_sel": N_SEL},
        "selected_attention": {"q": q, "k": k, "v": v, "block_indices": blocks, "l_sel": L_SEL},
        "window_attention": {"q": q, "k": k, "v": v, "w": W},
        "gated_sum": {"o_cmp": o, "o_slc": o, "o_win": o, "gates": gates},
        "nsa_attention": {
            "q": q, "k_cmp": k_cmp, "v_cmp": v_cmp, "k_slc": k, "v_slc": v, "k_win": k, "v_win": v, "gates": gates,
            **sizes, "l_sel": L_SEL, "n_sel": N_SEL, "w": W,
        },
    }[name]  # fmt: skip


FUNCTIONS = {
    f.__name__: f
    for f in (
        apply_rope, compress_mean, compressed_attention, select_blocks, selected_attention, window_attention, gated_sum,
        nsa_attention,
    )
}  # fmt: skip
PACKED = ["compress_mean", "compressed_attention", "selected_attention", "window_attention"]
PLACED = ["compressed_attention", "select_blocks", "selected_attention", "window_attention", "nsa_attention"]
TENSORS = [
    pytest.param(name, key, id=f"{name}-{key}")
    for name in FUNCTIONS
    for key, value in arguments(name).items()
    if isinstance(value, torch.Tensor) and key not in ("positions", "block_indices")
]


def refuse(name: str, match: str, error: type[Exception] = ValueError, **changes) -> None:
    call = arguments(name) | changes
    with pytest.raises(error, match=match):
        FUNCTIONS[name](**call)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_arguments_these_tests_start_from_are_valid(name):
    FUNCTIONS[name](**arguments(name))


@pytest.mark.parametrize(("name", "key"), TENSORS)
def test_something_that_is_no_tensor(name, key):
    refuse(name, f"{key}: expected a torch.Tensor, got list", TypeError, **{key: [1.0]})


@pytest.mark.parametrize(("name", "key"), [p for p in TENSORS if p.values[0] != "apply_rope"])
def test_a_missing_axis(name, key):
    refuse(name, rf"{key}: expected .*, got .*\(", **{key: arguments(name)[key][0]})


@pytest.mark.parametrize(("name", "key"), [p for p in TENSORS if p.values[0] not in ("apply_rope", "compress_mean")])
@pytest.mark.parametrize("other", [torch.bfloat16, "meta"], ids=["dtype", "device"])
def test_mismatched_dtype_or_device(name, key, other):
    refuse(name, r"\w+: expected .*(float32|bfloat16|cpu|meta).*, got", **{key: arguments(name)[key].to(other)})


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if n not in ("apply_rope", "gated_sum")])
def test_integers_as_floats(name):
    call = arguments(name)
    key = next(iter(call))
    refuse(
        name, f"{key}: expected dtype float16, bfloat16, float32 or float64, got torch.int64", **{key: call[key].long()}
    )


@pytest.mark.parametrize("size", ["batch", "tokens"])
@pytest.mark.parametrize("name", [n for n in FUNCTIONS if n != "apply_rope"])
def test_empty_batch_or_no_tokens(name, size):
    empty = {
        k: v[:0] if size == "batch" else v[:, :0] for k, v in arguments(name).items() if isinstance(v, torch.Tensor)
    }
    refuse(name, r"expected axis \w >= 1, got shape", **empty)


@pytest.mark.parametrize("name", PLACED)
def test_heads_that_are_no_multiple_of_the_groups(name):
    five = {k: v[:, :, :5] for k, v in arguments(name).items() if k in ("q", "lse", "gates")}
    refuse(name, "q: expected a number of heads divisible by the 2 .* got 5", **five)


@pytest.mark.parametrize(
    ("name", "changes", "match"),
    [
        ("compress_mean", {"l": 5}, "l: expected a multiple of d = 2, got 5"),
        ("compressed_attention", {"l": 3}, "l: expected a multiple of d = 2, got 3"),
        ("compress_mean", {"d": 0}, "d: expected at least 1, got 0"),
        ("select_blocks", {"l_sel": 7}, "l_sel: expected a multiple of d = 2 .*, got 7"),
        ("select_blocks", {"l_sel": 2}, "l_sel: expected .* at least l = 4, got 2"),
        ("select_blocks", {"n_sel": 2}, r"n_sel: expected at least init_blocks \+ local_blocks = 3, got 2"),
        ("select_blocks", {"local_blocks": 0}, "local_blocks: expected at least 1, got 0"),
        ("select_blocks", {"init_blocks": -1}, "init_blocks: expected at least 0, got -1"),
        ("selected_attention", {"l_sel": 0}, "l_sel: expected at least 1, got 0"),
        ("window_attention", {"w": 0}, "w: expected at least 1, got 0"),
        ("nsa_attention", {"w": -3}, "w: expected at least 1, got -3"),
        ("window_attention", {"impl": "fast"}, "impl: expected one of .*, got 'fast'"),
        ("compressed_attention", {"k_cmp": torch.randn(B, 3, G, D_K), "v_cmp": torch.randn(B, 3, G, D_V)},
         "k_cmp: expected c = 9 compressed tokens for t = 20, got shape"),
        ("window_attention", {"k": torch.randn(B, 25, G, D_K), "v": torch.randn(B, 25, G, D_V)},
         "k: expected s = t = 20 keys without q_start, got shape"),
        ("window_attention", {"v": torch.randn(B, T, 1, D_V)}, "v: expected axis g = 2 .*, got shape"),
        ("gated_sum", {"gates": torch.randn(B, T, G * H, 2)}, "gates: expected axis branches = 3 .*, got shape"),
        ("apply_rope", {"x": torch.randn(B, T, G, 5)}, "x: expected shape .* d even, got"),
        ("apply_rope", {"positions": torch.arange(T).float()}, "positions: expected dtype int32 or int64, got"),
        ("apply_rope", {"positions": torch.arange(3)}, "positions: expected shape .*, got"),
        ("selected_attention", {"block_indices": torch.zeros(B, T, G, 2, dtype=torch.int16)},
         "block_indices: expected dtype int32 or int64, got torch.int16"),
        ("selected_attention", {"block_indices": torch.zeros(B, T, 1, 2, dtype=torch.int32)},
         "block_indices: expected shape .*, got"),
        ("selected_attention", {"block_indices": torch.zeros(B, T, G, 2, dtype=torch.int32)},
         "block_indices: expected no block twice .*, got duplicates"),
        ("selected_attention", {"block_indices": torch.full((B, T, G, 1), 4, dtype=torch.int32)},
         "block_indices: expected values in -1 … 3, got 4"),
        ("selected_attention", {"block_indices": torch.full((B, T, G, 1), -2, dtype=torch.int32)},
         "block_indices: expected values in -1 … 3, got -2"),
    ],
)  # fmt: skip
def test_sizes_and_choices(name, changes, match):
    refuse(name, match, **changes)


def test_kernels_that_cannot_run(monkeypatch):
    double = {k: v.double() for k, v in arguments("window_attention").items() if isinstance(v, torch.Tensor)}
    refuse("window_attention", "impl: expected .* on cpu, got 'triton': .* not torch.float64", impl="triton", **double)
    wide = {k: torch.randn(B, T, G, 257) for k in ("q", "k", "v")}
    refuse("window_attention", "impl: expected .*, got 'triton': .* up to 256 channels, not 257", impl="triton", **wide)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name in (n for n in FUNCTIONS if n != "apply_rope"):
        refuse(name, r"impl: expected .* \w+ on cpu, got 'triton'.*TRITON_INTERPRET", impl="triton")


def test_sizes_that_are_no_integers():
    refuse("window_attention", "w: expected an int, got float", TypeError, w=5.0)
    refuse("compress_mean", "l: expected an int, got str", TypeError, l="4")


@pytest.mark.parametrize("name", PLACED)
@pytest.mark.parametrize(
    ("q_start", "match"),
    [
        (int32(0), "q_start: expected shape"),
        (torch.zeros(B), "q_start: expected dtype int32 or int64, got torch.float32"),
        (int32(0, -1), "q_start: expected values in 0 … .*, got -1 … 0"),
        (int32(0, 99), "q_start: expected values in 0 … .*, got 0 … 99"),
    ],
    ids=["shape", "dtype", "negative", "past-the-keys"],
)
def test_wrong_starts(name, q_start, match):
    refuse(name, match, q_start=q_start)


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize(
    ("cu_seqlens", "match"),
    [
        (int32(0, 9, 5), r"cu_seqlens: expected to start at 0 and never fall .*, got \[0, 9, 5\]"),
        (int32(1, 9), r"cu_seqlens: expected to start at 0 .*, got \[1, 9\]"),
        (int32(0, 21), r"cu_seqlens: expected .* or pass 20 tokens, got \[0, 21\]"),
        (int32(0), "cu_seqlens: expected shape"),
        (torch.tensor([0.0, 9.0]), "cu_seqlens: expected dtype int32 or int64, got torch.float32"),
        (torch.tensor([0, 2**32]), "cu_seqlens: expected values of 32 bits, got 0 … 4294967296"),
        ([0, 9], "cu_seqlens: expected a torch.Tensor, got list"),
    ],
    ids=["falls", "starts-late", "too-long", "no-sequence", "dtype", "too-large", "list"],
)
def test_wrong_packing(name, cu_seqlens, match):
    one = {k: v[:1] for k, v in arguments(name).items() if isinstance(v, torch.Tensor)}
    refuse(name, match, TypeError if isinstance(cu_seqlens, list) else ValueError, **one, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("name", PACKED)
def test_packing_of_a_batch(name):
    refuse(name, "cu_seqlens: expected a batch of 1 packed row, got a batch of 2", cu_seqlens=int32(0, 9))


@pytest.mark.parametrize(
    ("q_start", "cu_seqlens", "match"),
    [
        (int32(0, 1), int32(0, 9), r"q_start: expected shape \(1,\), got \(2,\)"),
        (int32(20), int32(0, 9), "q_start: expected values in 0 … 19 for the length of k, got 20 … 20"),
        (int32(0), int32(0, 21), "cu_seqlens: expected to start at 0 and never fall or pass 20 tokens"),
    ],
    ids=["starts-of-rows", "start-behind-the-keys", "sequences-behind-the-keys"],
)
def test_starts_in_packed_sequences(q_start, cu_seqlens, match):
    one = {k: v[:1] for k, v in arguments("window_attention").items() if isinstance(v, torch.Tensor)}
    refuse("window_attention", match, **one, cu_seqlens=cu_seqlens, q_start=q_start)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"n_heads": 5}, "n_heads: expected a multiple of n_kv_groups = 2, got 5"),
        ({"n_heads": 0}, "n_heads: expected at least 1, got 0"),
        ({"l": 5}, "l: expected a multiple of d = 2, got 5"),
        ({"l_sel": 7}, "l_sel: expected a multiple of d = 2, got 7"),
        ({"l_sel": 2}, "l_sel: expected at least l = 4, got 2"),
        ({"n_sel": 2}, r"n_sel: expected at least init_blocks \+ local_blocks = 3, got 2"),
        ({"d_k": 3}, r"d_k: expected an even number .*, got 3"),
        ({"w": 0}, "w: expected at least 1, got 0"),
        ({"local_blocks": 0}, "local_blocks: expected at least 1, got 0"),
        ({"phi": "max"}, "phi: expected one of 'avg', 'mlp', got 'max'"),
        ({"gate": "hard"}, "gate: expected one of 'softmax', 'sigmoid', got 'hard'"),
        ({"gate_temperature": 0.0}, "gate_temperature: expected a positive number, got 0.0"),
    ],
    ids=lambda x: "-".join(f"{k}={v}" for k, v in x.items()) if isinstance(x, dict) else "",
)
@pytest.mark.parametrize("make", [NSAAttention, LlamaBlockNSA, NSAConfig], ids=lambda x: x.__name__)
def test_sizes_of_a_layer(make, changes, match):
    with pytest.raises(ValueError, match=match):
        make(**LAYER | changes)


def test_types_of_a_config():
    with pytest.raises(TypeError, match="w: expected int, got '5'"):
        NSAConfig(**LAYER | {"w": "5"})
    with pytest.raises(TypeError, match="n_heads: expected int, got True"):
        NSAConfig(**LAYER | {"n_heads": True})
    with pytest.raises(ValueError, match="attention: expected one of 'nsa', 'dense', got 'linear'"):
        NSAConfig(**LAYER, attention="linear")
    with pytest.raises(ValueError, match=r"config: expected the names .*, got heads"):
        NSAConfig.from_dict({"heads": 4})
    with pytest.raises(ValueError, match="format_version: expected 1, got 2"):
        NSAConfig.from_dict({"format_version": 2})


def test_dropout_is_refused():
    with pytest.raises(ValueError, match=r"dropout: expected 0 .*, got 0.1"):
        NSAAttention(**LAYER, dropout=0.1)


@pytest.mark.parametrize("attention", ["nsa", "dense"])
@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"x": torch.randn(0, 9, 16)}, r"x: expected shape \[b, t, 16\] with b, t >= 1, got"),
        ({"x": torch.randn(2, 0, 16)}, r"x: expected shape \[b, t, 16\] with b, t >= 1, got"),
        ({"x": torch.randn(2, 9, 15)}, r"x: expected shape \[b, t, 16\] .*, got \(2, 9, 15\)"),
        ({"attn_mask": torch.ones(9, 9)}, "attn_mask: expected None .*, got a mask"),
        ({"branch": "all"}, "branch: expected None .*, got 'all'"),
        ({"lengths": int32(9, 10)}, r"lengths: expected 0 <= lengths <= 9, got \[9, 10\]"),
        ({"lengths": int32(9, -1)}, r"lengths: expected 0 <= lengths <= 9, got \[9, -1\]"),
        ({"lengths": int32(9)}, r"lengths: expected shape \(2,\), got \(1,\)"),
        ({"lengths": torch.tensor([True, True])}, "lengths: expected dtype int32 or int64, got torch.bool"),
        ({"cu_seqlens": int32(0, 9)}, "cu_seqlens: expected a batch of 1 packed row, got a batch of 2"),
        ({"x": torch.randn(1, 9, 16), "cu_seqlens": int32(0, 9, 4)}, r"cu_seqlens: .*, got \[0, 9, 4\]"),
        ({"x": torch.randn(1, 9, 16), "cu_seqlens": int32(0, 9), "lengths": int32(9)},
         "cu_seqlens: expected None together with lengths, got both"),
    ],
)  # fmt: skip
def test_calls_of_a_layer(attention, changes, match):
    layer = LlamaBlockNSA(config=NSAConfig(**LAYER, attention=attention)).attn
    with pytest.raises(ValueError, match=match):
        layer(**{"x": torch.randn(2, 9, 16)} | changes)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"ids": torch.zeros(2, 0, dtype=torch.int64)}, r"ids: expected integers \[b, t\] with b, t >= 1, got"),
        ({"ids": torch.zeros(0, 5, dtype=torch.int64)}, r"ids: expected integers \[b, t\] with b, t >= 1, got"),
        ({"ids": torch.zeros(2, 5)}, "ids: expected integers .*, got torch.float32"),
        ({"ids": torch.zeros(5, dtype=torch.int64)}, r"ids: expected integers \[b, t\] .*, got torch.int64 \(5,\)"),
        ({"ids": torch.full((2, 5), 50)}, "ids: expected values in 0 … 49, got 50"),
        ({"ids": torch.full((2, 5), -1)}, "ids: expected values in 0 … 49, got -1"),
        ({"attn_mask": torch.ones(5, 5)}, "attn_mask: expected None .*, got a mask"),
        ({"ids": torch.zeros(1, 5, dtype=torch.int64), "cu_seqlens": int32(0, 5), "last_only": True},
         "last_only: expected False together with cu_seqlens, got True"),
    ],
)  # fmt: skip
def test_calls_of_a_model(changes, match):
    model = NSALanguageModel(NSAConfig(**LAYER, n_layers=1, vocab_size=50))
    with pytest.raises(ValueError, match=match):
        model(**{"ids": torch.zeros(2, 5, dtype=torch.int64)} | changes)


def test_a_cached_call_with_packing_or_gradients_or_another_model():
    layer, other = NSAAttention(**LAYER), NSAAttention(**LAYER)
    cache, x = NSACache.for_model(layer, 1, 9), torch.randn(1, 5, 16)
    with pytest.raises(ValueError, match=r"cache: expected a call without gradients .*, got one with"):
        layer(x, cache=cache)
    with torch.no_grad():
        with pytest.raises(ValueError, match="cu_seqlens: expected None together with cache, got both"):
            layer(x, cache=cache, cu_seqlens=int32(0, 5))
        with pytest.raises(ValueError, match=r"cache: expected one made by NSACache.for_model for this"):
            other(x, cache=cache)
        with pytest.raises(ValueError, match=r"cache: expected at most 9 tokens \(its capacity\), got 10"):
            layer(torch.randn(1, 10, 16), cache=cache)
    assert not any(tensor.any() for tensor in cache.tensors())


def test_a_model_that_is_given_no_config():
    with pytest.raises(TypeError, match="config: expected an NSAConfig, got dict"):
        NSALanguageModel(LAYER)
    with pytest.raises(TypeError, match="config: expected it alone, got other arguments beside it"):
        LlamaBlockNSA(16, config=NSAConfig(**LAYER))
