"""Index tensors are int32 or int64 everywhere, what is no tensor is named, and a loss has something to predict."""

import pytest
import torch
from models import draw_ids, make_layer, make_model
from test_inputs import FUNCTIONS, PACKED, PLACED, arguments

import nsa_compile
from nsa_compile import (
    GateMLP,
    NSACache,
    clip_grad_norm,
    gate_statistics,
    parallelize,
    range_statistics,
    sample,
    selection_ranges,
    token_reads,
)


def int32(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def same(x, y) -> None:
    for a, b in zip(*((z if isinstance(z, tuple) else (z,)) for z in (x, y)), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def statistics(name: str) -> tuple:
    """A public function that looks at a selection, and valid arguments."""
    blocks = torch.tensor([0, 1, -1], dtype=torch.int32).expand(1, 20, 2, 3).clone()
    position = torch.arange(20)[None]
    return {
        "selection_ranges": (selection_ranges, {"block_indices": blocks, "l_sel": 6}),
        "range_statistics": (range_statistics, {"ranges": selection_ranges(blocks, l_sel=6)}),
        "token_reads": (
            token_reads, {"position": position, "block_indices": blocks, "l": 4, "d": 2, "l_sel": 6, "w": 5}
        ),
        "gate_statistics": (gate_statistics, {"gates": torch.rand(1, 20, 4, 3), "valid": position < 9}),
        "sample": (sample, {
            "logits": torch.randn(2, 5), "temperature": torch.ones(2), "top_p": torch.ones(2),
            "seed": torch.zeros(2, dtype=torch.int64), "position": int32(3, 4),
        }),
        "GateMLP": (make_layer().gate, {
            "x": torch.randn(1, 5, 20, dtype=torch.float64), "q": torch.randn(1, 5, 6, 6, dtype=torch.float64),
        }),
    }[name]  # fmt: skip


@pytest.mark.parametrize("name", [*FUNCTIONS, "selection_ranges", "range_statistics"])
def test_functions_take_both(name):
    function, call = (FUNCTIONS[name], arguments(name)) if name in FUNCTIONS else statistics(name)
    given = {key: x for key, x in call.items() if isinstance(x, torch.Tensor) and x.dtype == torch.int32}
    cases = [call]
    if name in PLACED:
        cases.append(call | {"q_start": int32(3, 0)})
        if "k" in call or "k_slc" in call:  # the queries stand before the end of the keys
            cases[-1] |= {key: call[key][:, :17] for key in ("q", "gates", "block_indices") if key in call}
    one = {key: x[:1] for key, x in call.items() if isinstance(x, torch.Tensor)}
    if name in PACKED or name in ("selection_ranges", "range_statistics"):
        packed = call | one | {"cu_seqlens": int32(0, 9, 20)}
        if name == "compressed_attention":
            packed |= {key: torch.randn(1, 10, *call[key].shape[2:]) for key in ("k_cmp", "v_cmp")}
        cases.append(packed)
    for case in cases:
        long = {key: x.long() for key, x in case.items() if getattr(x, "dtype", None) == torch.int32}
        assert given.keys() <= long.keys()
        same(function(**case | long), function(**case))


@pytest.mark.parametrize("attention", ["nsa", "dense"])
def test_layers_models_and_caches_take_both(attention):
    model, ids = make_model(attention=attention), draw_ids(2, 20)
    lengths, cu = int32(20, 7), int32(0, 9, 20)
    for call in (model, model.loss, torch.compile(model, fullgraph=True, backend="eager")):
        same(call(ids, lengths=lengths.long()), call(ids, lengths=lengths))
        same(call(ids[:1], cu_seqlens=cu.long()), call(ids[:1], cu_seqlens=cu))
    both = (model.gate_statistics(ids, None, x) for x in (lengths.long(), lengths))
    for got, expected in zip(*both, strict=True):
        same(tuple(got), tuple(expected))
    with torch.no_grad():
        caches = [NSACache.for_model(model, 2, 32) for _ in range(2)]
        for _ in range(2):
            calls = zip(caches, (int32(9, 4), torch.tensor([9, 4])), strict=True)
            same(*(model(ids[:, :9], cache, lengths=n) for cache, n in calls))
        same(*(tuple(cache.tensors()) for cache in caches))


def test_one_cast_serves_a_whole_model(monkeypatch):
    seen, forward = [], nsa_compile.NSAAttention.forward

    def look(self, x, cache=None, cu_seqlens=None, lengths=None, **kwargs):
        seen.append(cu_seqlens)
        return forward(self, x, cache, cu_seqlens, lengths, **kwargs)

    monkeypatch.setattr(nsa_compile.NSAAttention, "forward", look)
    make_model()(draw_ids(1, 20), cu_seqlens=torch.tensor([0, 20]))
    assert len(seen) == 2 and seen[0] is seen[1] and seen[0].dtype == torch.int32


@pytest.mark.parametrize("kind", ["native", "converted"])
def test_models_of_transformers_take_both(kind):
    pytest.importorskip("transformers")
    if kind == "native":
        from nsa_compile.hf import NsaForCausalLM

        model = NsaForCausalLM.from_language_model(make_model())
    else:
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
        config = LlamaConfig(vocab_size=31, num_hidden_layers=1, **sizes, bos_token_id=None, eos_token_id=None)
        model = nsa_compile.convert(LlamaForCausalLM(config), l=4, d=2, l_sel=4, n_sel=4, w=8)
    ids, cu = draw_ids(1, 20), int32(0, 9, 20)
    same(model(ids, cu_seq_lens_q=cu.long()).logits, model(ids, cu_seq_lens_q=cu).logits)
    for name in ("cu_seq_lens_q", "position_ids", "labels") if kind == "native" else ("cu_seq_lens_q", "position_ids"):
        with pytest.raises(TypeError, match=f"{name}: expected a torch.Tensor, got list"):
            model(ids, **{name: [0, 9, 20]})
    with pytest.raises(ValueError, match=r"cu_seq_lens_q: expected int32 or int64 \[N \+ 1\], got torch.float32"):
        model(ids, cu_seq_lens_q=cu.float())


@pytest.mark.parametrize("name", [*FUNCTIONS, "selection_ranges", "range_statistics", "token_reads", "gate_statistics",
                                  "sample", "GateMLP"])  # fmt: skip
def test_lists_in_the_place_of_tensors_of_functions(name):
    function, call = (FUNCTIONS[name], arguments(name)) if name in FUNCTIONS else statistics(name)
    keys = [key for key, x in call.items() if isinstance(x, torch.Tensor)]
    if name in PLACED or "ranges" in name or name == "range_statistics":
        keys.append("q_start")
    if name in PLACED or name in PACKED or "ranges" in name or name == "range_statistics":
        keys.append("cu_seqlens")
    for key in keys:
        with pytest.raises(TypeError, match=f"{key}: expected a torch.Tensor, got list"):
            function(**call | {key: [0, 9]})
    if name in PLACED:
        with pytest.raises(TypeError, match="scale: expected a number, got list"):
            function(**call | {"scale": [1.0]})


def test_lists_in_the_place_of_tensors_of_modules():
    model, ids = make_model(), draw_ids(1, 20)
    layer, x = model.layers[0].attn, torch.randn(1, 20, 20, dtype=torch.float64)
    calls = {
        "layer": (layer, {"x": x}), "block": (model.layers[0], {"x": x}), "model": (model, {"ids": ids}),
        "hidden": (model.hidden, {"ids": ids}), "loss": (model.loss, {"ids": ids}),
        "gate_statistics": (model.gate_statistics, {"ids": ids}),
    }  # fmt: skip
    for function, call in calls.values():
        for key in (*call, "cu_seqlens", "lengths"):
            with pytest.raises(TypeError, match=f"{key}: expected a torch.Tensor, got list"):
                function(**call | {key: [0, 20]})
    with pytest.raises(TypeError, match="cache: expected an NSACache, got list"):
        model(ids, [])
    with pytest.raises(TypeError, match="mesh: expected a DeviceMesh, as make_mesh gives it, got list"):
        parallelize(model, [1, 1, 1])
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got list"):
        clip_grad_norm([], 1.0)
    with pytest.raises(TypeError, match="max_norm: expected a number, got list"):
        clip_grad_norm(model, [1.0])
    assert isinstance(layer.gate, GateMLP)


@pytest.mark.parametrize("attention", ["nsa", "dense"])
def test_a_loss_without_anything_to_predict(attention):
    model = make_model(attention=attention)
    with pytest.raises(ValueError, match=r"ids: expected rows of at least 2 tokens, .*, got \(3, 1\)"):
        model.loss(draw_ids(3, 1))
    for where in ({"lengths": int32(1, 0)}, {"cu_seqlens": int32(0, 1, 2, 2, 3)}):
        with pytest.raises(ValueError, match="ids: expected a sequence of at least 2 tokens to predict one of"):
            model.loss(draw_ids(2 if "lengths" in where else 1, 3), **where)
    assert model.loss(draw_ids(2, 3), lengths=int32(1, 2)) > 0
