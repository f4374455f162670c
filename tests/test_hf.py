"""The transformers classes: padding, packing, generation, saving, compiling."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from models import LAYER, draw_ids, make_model, needs_compiler, randomize

import nsa_compile
from nsa_compile import NSACache, NSAConfig, NSALanguageModel

transformers = pytest.importorskip("transformers")

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DataCollatorWithFlattening  # noqa: E402

from nsa_compile.hf import CACHE, NsaCache, NsaConfig, NsaForCausalLM, NsaModel  # noqa: E402

SIZES = {**LAYER, "n_layers": 2, "vocab_size": 31}
LENGTHS = (40, 23, 3)


def make(dtype: torch.dtype = torch.float64, **changes) -> NsaForCausalLM:
    return randomize(NsaForCausalLM(NsaConfig(**SIZES | changes)).to(dtype)).eval()


def pad(ids: torch.Tensor, side: str) -> tuple[torch.Tensor, torch.Tensor, list[slice]]:
    """Rows cut to LENGTHS and padded with ids that would be noticed, their mask, and where each row's tokens are."""
    t = ids.shape[1]
    places = [slice(t - n, t) if side == "left" else slice(0, n) for n in LENGTHS]
    padded, mask = torch.full_like(ids, 7), torch.zeros_like(ids)
    for row, (place, n) in enumerate(zip(places, LENGTHS, strict=True)):
        padded[row, place], mask[row, place] = ids[row, :n], 1
    return padded, mask, places


def assert_same(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# config and weights


def test_config_has_the_names_of_both_and_checks_them(tmp_path):
    config = NsaConfig(**SIZES, eos_token_id=3)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (20, 2, 6)
    assert config.sizes() == NSAConfig(**SIZES)
    assert NsaConfig.from_sizes(config.sizes(), eos_token_id=3) == config != NsaConfig(**SIZES)
    assert NsaConfig(hidden_size=12, num_key_value_heads=4, tie_embeddings=True).sizes() == NSAConfig(
        dim=12, n_kv_groups=4, tie_embeddings=True
    )
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path) == config
    with pytest.raises(ValueError, match="n_heads: expected a multiple of n_kv_groups = 4, got 6"):
        NsaConfig(num_attention_heads=6)
    config.d = 3
    with pytest.raises(ValueError, match="l: expected a multiple of d = 3"):
        NsaModel(config)


def test_auto_classes_know_the_models():
    config = AutoConfig.for_model("nsa", **SIZES)
    assert type(AutoModel.from_config(config)) is NsaModel
    assert type(AutoModelForCausalLM.from_config(config)) is NsaForCausalLM


@pytest.mark.parametrize("changes", [{}, {"phi": "mlp", "gate": "sigmoid"}, {"attention": "dense"}], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_language_models_share_their_weights(changes, tied):
    ids = draw_ids(2, 30)
    source = make_model(tie_embeddings=tied, **changes)
    model = NsaForCausalLM.from_language_model(source, eos_token_id=3)
    assert model.config.eos_token_id == 3 and (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert_same(model(ids).logits, source(ids))
    back = model.to_language_model()
    assert back.config == source.config
    assert_same(back(ids), source(ids))
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(2)
    assert_same(back(ids), model(ids).logits)
    assert_same(source(ids), model(ids).logits)


def test_initial_weights_are_those_of_the_language_model():
    model, ours = NsaForCausalLM(NsaConfig(**SIZES | {"dim": 256})), NSALanguageModel(NSAConfig(**SIZES | {"dim": 256}))
    other = model.to_language_model()
    for (name, weight), expected in zip(other.named_parameters(), ours.parameters(), strict=True):
        if not expected.any():
            assert not weight.any(), name
        elif weight.numel() > 500:
            assert float(weight.std(correction=0)) == pytest.approx(float(expected.std(correction=0)), rel=0.2), name


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_saved_in_shards_and_loaded_anywhere(tmp_path, tied):
    ids, model = draw_ids(2, 30), make(torch.float32, tie_word_embeddings=tied, phi="mlp")
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    for arguments in ({}, {"device_map": "auto"}, {"device_map": {"": "cpu"}}):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **arguments)
        assert_same(loaded(ids).logits, model(ids).logits, 1e-6)
        assert torch.equal(
            loaded.generate(ids, max_new_tokens=5, do_sample=False),
            model.generate(ids, max_new_tokens=5, do_sample=False),
        )
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16} and half(ids).logits.dtype == torch.bfloat16
    assert_same(AutoModel.from_pretrained(tmp_path)(ids).last_hidden_state, model.model(ids).last_hidden_state, 1e-6)


def test_layers_may_lie_on_the_disk(tmp_path):
    ids, model = draw_ids(2, 30), make(torch.float32)
    model.save_pretrained(tmp_path / "model", max_shard_size="5KB")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map={**places, "lm_head": "cpu"}, offload_folder=tmp_path / "offload"
    )
    assert any(p.device.type == "meta" for p in loaded.parameters())
    assert_same(loaded(ids).logits, model(ids).logits, 1e-6)
    generated = loaded.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(generated, model.generate(ids, max_new_tokens=5, do_sample=False))


def test_weights_may_come_to_the_device_layer_by_layer():
    accelerate = pytest.importorskip("accelerate")
    ids, model = draw_ids(2, 30), make(torch.float32)
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)
    model.free_cache()
    accelerate.cpu_offload(model)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), expected)


def test_weights_of_another_shape_are_refused(tmp_path):
    make(torch.float32).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"size mismatch|mismatched"):
        NsaForCausalLM.from_pretrained(tmp_path, d_v=8)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    model = make(torch.float32)
    small = {"hidden_size": 24, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 6}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**small, num_key_value_heads=2, vocab_size=31))
    for name, each in (("nsa", model), ("native", model.to_language_model()), ("llama", llama), ("base", model.model)):
        each.save_pretrained(tmp_path / name)
    for name, kind in (("native", "none: an NSALanguageModel loads by NSALanguageModel.from_p"), ("llama", "'llama'")):
        for cls in (NsaForCausalLM, NsaModel, NsaConfig):
            with pytest.raises(ValueError, match=f"model of type 'nsa' in {tmp_path / name}, got {kind}"):
                cls.from_pretrained(tmp_path / name)
    for changes, missing in (({"n_layers": 3}, r"layers\.2\."), ({"phi": "mlp"}, r"layers\.0\.attn\.phi")):
        for cls in (NsaForCausalLM, NsaModel):
            with pytest.raises(ValueError, match=f"weights of the config in {tmp_path / 'nsa'}, got none .*{missing}"):
                cls.from_pretrained(tmp_path / "nsa", **changes)
    assert NsaForCausalLM.from_pretrained(tmp_path / "base").config == model.config  # with a new head


# batches


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["nsa", "dense"])
def test_padded_rows_equal_rows_alone(side, attention):
    model, ids = make(attention=attention, phi="mlp"), draw_ids(3, 40)
    padded, mask, places = pad(ids, side)
    labels = padded.masked_fill(mask == 0, -100)
    labels[torch.arange(3), [place.start for place in places]] = -100  # nothing predicts a row's first token
    outputs = model(padded, attention_mask=mask, labels=labels, output_hidden_states=True)
    embedded = model(inputs_embeds=model.model.embed_tokens(padded), attention_mask=mask).logits
    outputs.loss.backward()
    gradient = model.model.layers[0].attn.W_Q.weight.grad.clone()
    model.zero_grad()
    losses = []
    for row, (place, n) in enumerate(zip(places, LENGTHS, strict=True)):
        alone = model(ids[row : row + 1, :n], labels=ids[row : row + 1, :n], output_hidden_states=True)
        assert_same(outputs.logits[row, place], alone.logits[0])
        assert_same(embedded[row, place], alone.logits[0])
        for hidden, expected in zip(outputs.hidden_states, alone.hidden_states, strict=True):
            assert_same(hidden[row, place], expected[0])
        losses.append(alone.loss * (n - 1))
        last = model(padded, attention_mask=mask, logits_to_keep=2).logits
        assert_same(last[row], alone.logits[0, -2:])
    loss = sum(losses) / sum(n - 1 for n in LENGTHS)
    loss.backward()
    assert_same(outputs.loss, loss, 1e-5)  # the library computes it in fp32
    assert_same(gradient, model.model.layers[0].attn.W_Q.weight.grad, 1e-5)


def test_packed_sequences_equal_sequences_alone():
    model, ids = make(phi="mlp"), draw_ids(1, sum(LENGTHS))[0]
    rows = ids.split(LENGTHS)
    alone = torch.cat([model(row[None]).logits for row in rows], 1)
    features = [{"input_ids": row} for row in rows]
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_tensors="pt")(features)
    assert_same(model(**batch).logits, alone)
    loss = sum(model(row[None], labels=row[None]).loss * (len(row) - 1) for row in rows) / (len(ids) - len(rows))
    assert_same(model(**batch).loss, loss, 1e-5)
    positions = batch["position_ids"]
    assert_same(model(ids[None], position_ids=positions).logits, alone)
    assert_same(model(ids[None], position_ids=positions, attention_mask=torch.ones_like(positions)).logits, alone)
    assert_same(model(ids[None], cu_seq_lens_q=batch["cu_seq_lens_q"]).logits, alone)
    many = model(ids.repeat(2, 1), position_ids=positions.repeat(2, 1), output_hidden_states=True)
    assert_same(many.logits, alone.repeat(2, 1, 1))
    assert {h.shape for h in many.hidden_states} == {(2, len(ids), SIZES["dim"])}


def test_positions_of_one_sequence_change_nothing():
    model, (padded, mask, _) = make(), pad(draw_ids(3, 40), "left")
    positions = torch.arange(40)[None]
    assert_same(model(padded, position_ids=positions + 5).logits, model(padded).logits)
    counted = (mask.cumsum(1) - 1).clamp_min(0)
    assert_same(
        model(padded, attention_mask=mask, position_ids=counted).logits, model(padded, attention_mask=mask).logits
    )


ONES = torch.ones(2, 12, dtype=torch.int64)
HOLE = torch.tensor([[1] * 12, [1] * 5 + [0] + [1] * 6])
PADDED = torch.tensor([[1] * 12, [0] * 5 + [1] * 7])
RESTART = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]]).repeat(2, 1)
ENDS = torch.tensor([0, 5, 12], dtype=torch.int32)
BAD = {
    "hole": ({"attention_mask": HOLE}, ValueError, "attention_mask: expected rows padded on the left or the right"),
    "mask-shape": ({"attention_mask": ONES[:, 1:]}, ValueError, r"attention_mask: expected shape \[2, 12\]"),
    "mask-4d": ({"attention_mask": ONES[:, None, None]}, ValueError, r"attention_mask: expected shape \[2, 12\]"),
    "positions-shape": ({"position_ids": RESTART[:, 1:]}, ValueError, r"position_ids: expected shape \[2, 12\]"),
    "packed-padded": (
        {"position_ids": RESTART, "attention_mask": PADDED}, ValueError, "expected no packed sequences together with",
    ),
    "ends-padded": (
        {"input_ids": ONES[:1], "cu_seq_lens_q": ENDS, "attention_mask": PADDED[1:]}, ValueError,
        "expected no packed sequences together with",
    ),
    "ends-rows": ({"cu_seq_lens_q": ENDS}, ValueError, "cu_seq_lens_q: expected a batch of 1 packed row"),
    "ends-list": ({"input_ids": ONES[:1], "cu_seq_lens_q": [0, 5, 12]}, TypeError, "cu_seq_lens_q: expected a torch"),
    "ends-float": (
        {"input_ids": ONES[:1], "cu_seq_lens_q": ENDS.float()}, ValueError,
        r"cu_seq_lens_q: expected int32 or int64 \[N",
    ),
    "ids-values": ({"input_ids": ONES * 31}, ValueError, r"input_ids: expected values in 0 … 30, got 31 … 31"),
    "ids-shape": ({"input_ids": ONES[0]}, ValueError, r"input_ids: expected shape \[b, t\]"),
    "two-inputs": ({"inputs_embeds": torch.ones(2, 12, 20)}, ValueError, "input_ids: expected exactly one"),
    "attentions": ({"output_attentions": True}, ValueError, "output_attentions: expected False"),
    "cache": ({"cache": transformers.DynamicCache()}, TypeError, "expected an NsaCache, as generate makes it, got Dyn"),
    "cache-gradients": ({"use_cache": True}, ValueError, "cache: expected a call without gradients"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused(name):
    arguments, error, message = BAD[name]
    with pytest.raises(error, match=message):
        make()(**{"input_ids": ONES} | arguments)


def test_models_of_the_other_kind_are_refused():
    model, other = make(), torch.nn.Linear(2, 2)
    for call in (
        lambda: nsa_compile.generate(model, [[1, 2, 3]], max_new_tokens=2),
        lambda: nsa_compile.export_program(model, 40),
        lambda: nsa_compile.export_program(model.model, 40, tokens=1),
    ):
        with pytest.raises(TypeError, match=r"model: expected an NSALanguageModel, e.g. by to_language_model\(\), got"):
            call()
    for each in (other, model, None):
        with pytest.raises(TypeError, match=f"model: expected an NSALanguageModel, got {type(each).__name__}"):
            NsaForCausalLM.from_language_model(each)
    for each in (other, model.to_language_model(), None):
        with pytest.raises(TypeError, match=f"expected an NsaModel or NsaForCausalLM, got {type(each).__name__}"):
            NsaCache(each, 1, 200)


def test_packed_sequences_are_refused_with_a_cache():
    model = make()
    cache = NsaCache(model, 2, 20)
    with torch.no_grad(), pytest.raises(ValueError, match="expected no packed sequences together with a cache"):
        model(ONES, position_ids=RESTART, cache=cache)
    assert cache.get_seq_length() == 0 and not cache.nsa.positions.any()


# generation


@pytest.mark.parametrize("side", ["left", "right"])
def test_generate_equals_the_decode_loop(side):
    model, ids = make(phi="mlp"), draw_ids(3, 40)
    padded, mask, _ = pad(ids, side)
    prompts = [ids[row, :n].tolist() for row, n in enumerate(LENGTHS)]
    expected = torch.tensor(nsa_compile.generate(model.to_language_model(), prompts, max_new_tokens=24).tokens)
    generated = model.generate(padded, attention_mask=mask, max_new_tokens=24, do_sample=False)
    assert torch.equal(generated[:, :40], padded) and torch.equal(generated[:, 40:], expected)
    again = model.generate(padded, attention_mask=mask, max_new_tokens=24, do_sample=False, pad_token_id=0)
    assert torch.equal(again, generated)
    if side == "left":
        for arguments in ({"prefill_chunk_size": 7}, {"use_cache": False}, {"cache_implementation": "static"}):
            other = model.generate(padded, attention_mask=mask, max_new_tokens=24, do_sample=False, **arguments)
            assert torch.equal(other, generated)
        embeds = model.model.embed_tokens(padded)
        other = model.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=24, do_sample=False)
        assert torch.equal(other, expected)
    else:
        other = model.generate(padded, attention_mask=mask, max_new_tokens=24, do_sample=False, use_cache=False)
        assert torch.equal(other, generated)
        with pytest.raises(ValueError, match="prefill_chunk_size: expected None for rows padded on the right"):
            model.generate(padded, attention_mask=mask, max_new_tokens=4, prefill_chunk_size=7)


def test_generate_stops_where_a_row_ends():
    model, ids = make(), draw_ids(3, 20)
    free = model.generate(ids, max_new_tokens=20, do_sample=False)
    stop = int(free[0, 25])
    stopped = model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=stop, pad_token_id=0)
    end = 21 + free[0, 20:].tolist().index(stop)
    assert torch.equal(stopped[0, :end], free[0, :end]) and not stopped[0, end:].any()


@pytest.mark.parametrize(
    "arguments",
    [{"do_sample": True, "top_p": 0.9, "temperature": 0.7}, {"do_sample": True, "num_return_sequences": 3},
     {"num_beams": 3, "do_sample": False}, {"num_beams": 4, "num_return_sequences": 2, "do_sample": True}],
    ids=["sample", "sequences", "beams", "sampled-beams"],
)  # fmt: skip
def test_generate_with_a_cache_equals_without(arguments):
    model = make()
    padded, mask, _ = pad(draw_ids(3, 40), "left")
    made = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        made.append(model.generate(padded, attention_mask=mask, max_new_tokens=12, use_cache=use_cache, **arguments))
    assert torch.equal(*made)


def test_generate_returns_what_is_asked_for():
    model, ids = make(), draw_ids(2, 20)
    made = model.generate(
        ids, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True, output_scores=True,
        output_hidden_states=True,
    )  # fmt: skip
    cache = getattr(made, CACHE)
    assert isinstance(cache, NsaCache) and cache.get_seq_length() == 25 == cache.get_max_length()
    assert [len(x) for x in (made.logits, made.scores, made.hidden_states)] == [6, 6, 6]
    assert_same(torch.stack(made.logits, 1), model(made.sequences[:, :-1]).logits[:, 19:].float(), 1e-6)
    assert model._generation_cache is None  # the caller has it
    longer = model.generate(made.sequences, max_new_tokens=6, do_sample=False, **{CACHE: cache})
    assert torch.equal(longer, model.generate(ids, max_new_tokens=12, do_sample=False))


def test_a_copied_cache_goes_on_with_the_same_model():
    model, ids = make(), draw_ids(2, 30)
    cache = NsaCache(model, 2, 60)
    with torch.no_grad():
        model(ids[:, :20], **{CACHE: cache})
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)
    (other, with_model), copied = copy.deepcopy((model, cache)), copy.deepcopy(cache)
    assert copied._model is model.model and with_model._model is other.model
    for each, held in ((model, copied), (model, cache), (other, with_model)):
        assert torch.equal(each.generate(ids, max_new_tokens=5, do_sample=False, **{CACHE: held}), expected)


def test_generate_uses_its_cache_again():
    model, ids = make(), draw_ids(2, 20)
    first = model.generate(ids, max_new_tokens=10, do_sample=False)
    cache = model._generation_cache
    shorter = model.generate(ids[:, :15], max_new_tokens=5, do_sample=False)
    assert model._generation_cache is cache
    assert torch.equal(shorter, NsaForCausalLM.generate(make(), ids[:, :15], max_new_tokens=5, do_sample=False))
    assert torch.equal(model.generate(ids, max_new_tokens=10, do_sample=False), first)
    model.generate(ids[:1], max_new_tokens=10, do_sample=False)
    assert model._generation_cache is not cache
    model.float().generate(ids[:1], max_new_tokens=10, do_sample=False)
    buffers = model._generation_cache.nsa.layers[0].buffers
    assert {buffer.dtype for buffer in buffers.values()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        model.generate(ids[:1], max_new_tokens=3, do_sample=False)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied._generation_cache is None
        assert_same(copied(ids).logits, model(ids).logits)
    model.free_cache()
    assert model._generation_cache is None


def test_calls_with_a_cache_equal_one_call():
    model, ids = make(phi="mlp", w=200), draw_ids(2, 300)
    padded_mask = torch.ones_like(ids)
    padded_mask[1, :9] = 0
    with torch.no_grad():
        full = model(ids, attention_mask=padded_mask).logits
        outputs = model(ids[:, :100], attention_mask=padded_mask[:, :100], use_cache=True)
        parts = [outputs.logits]
        for start, end in ((100, 101), (101, 127), (127, 140), (140, 290), (290, 300)):  # passes the first capacity
            cache = getattr(outputs, CACHE)
            outputs = model(ids[:, start:end], attention_mask=padded_mask[:, :end], **{CACHE: cache})
            parts.append(outputs.logits)
    assert cache.get_seq_length() == 300 and cache.get_max_length() >= 300
    for row, first in ((0, 0), (1, 9)):
        assert_same(torch.cat(parts, 1)[row, first:], full[row, first:])


def test_a_mask_that_contradicts_the_cache_is_refused():
    model, ids = make(), draw_ids(2, 30)
    padded = torch.ones_like(ids)
    padded[1, :9] = 0
    hole = torch.ones_like(ids)
    hole[1, 5:8] = 0
    for held, given in ((None, hole), (None, padded), (padded, torch.ones_like(ids))):
        cache = NsaCache(model, 2, 60)
        with torch.no_grad():
            model(ids[:, :20], attention_mask=None if held is None else held[:, :20], **{CACHE: cache})
        with pytest.raises(ValueError, match="attention_mask: expected as many tokens in the first 20 columns as"):
            model.generate(ids, attention_mask=given, max_new_tokens=4, **{CACHE: cache})
        with torch.no_grad(), pytest.raises(ValueError, match="attention_mask: expected as many tokens in the first"):
            model(ids[:, 20:21], attention_mask=given[:, :21], **{CACHE: cache})
        assert cache.get_seq_length() == 20 == max(cache.nsa.host_lengths)
        mask = torch.ones_like(ids) if held is None else held
        model.generate(ids, attention_mask=mask, max_new_tokens=4, **{CACHE: cache})


@needs_compiler
def test_a_compiled_call_refuses_a_mask_that_contradicts_the_cache():
    model, ids = make(torch.float32, n_layers=1), draw_ids(2, 12)
    torch._dynamo.reset()
    compiled, cache = torch.compile(model, fullgraph=True, backend="aot_eager"), NsaCache(model, 2, 60)
    with torch.no_grad():
        model(ids[:, :10], **{CACHE: cache})
        compiled(ids[:, 10:11], attention_mask=ONES[:, :11], **{CACHE: cache})
        with pytest.raises(RuntimeError, match="attention_mask: expected as many tokens in the first"):
            compiled(ids[:, 11:], attention_mask=PADDED, **{CACHE: cache})


def test_each_layer_has_its_cache_where_it_lies():
    model = make_model()
    model.layers[1].to("meta")
    first, second = NSACache.for_model(model, 2, 20).layers
    assert {x.device.type for x in first.tensors()} == {"cpu"}
    assert {x.device.type for x in second.tensors()} == {"meta"}


def test_what_the_cache_cannot_do_is_refused():
    model, ids = make(), draw_ids(1, 20)
    with pytest.raises(ValueError, match="cache_implementation: expected None, 'static' or 'dynamic', got 'quantized'"):
        model.generate(ids, max_new_tokens=4, cache_implementation="quantized")
    with pytest.raises(TypeError, match="expected an NsaCache, got StaticCache"):
        cache = transformers.StaticCache(model.config, max_cache_len=30)
        model.generate(ids, max_new_tokens=4, **{CACHE: cache})
    with pytest.raises(ValueError, match="crop"):
        model.generate(ids, max_new_tokens=4, prompt_lookup_num_tokens=3, eos_token_id=30)


# compiling


@needs_compiler
@pytest.mark.parametrize("layout", ["whole", "left", "packed", "ends"])
def test_compiles_to_one_graph_with_its_backward(layout):
    model = make(torch.float32, n_layers=1)
    padded, mask, _ = pad(draw_ids(3, 40), "left")
    labels = padded.masked_fill(mask == 0, -100) if layout == "left" else padded
    inputs = {"input_ids": padded, "labels": labels}
    if layout == "left":
        inputs |= {"attention_mask": mask}
    if layout == "packed":
        inputs |= {"position_ids": torch.cat((torch.arange(25), torch.arange(15))).repeat(3, 1)}
    if layout == "ends":
        inputs = {k: v[:1] for k, v in inputs.items()} | {"cu_seq_lens_q": torch.tensor([0, 25, 40], dtype=torch.int32)}
    expected = model(**inputs)
    expected.loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch._dynamo.reset()
    outputs = torch.compile(model, fullgraph=True)(**inputs)
    outputs.loss.backward()
    kept = mask.bool() if layout == "left" else ...
    assert_same(outputs.logits[kept], expected.logits[kept], 1e-4)
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        assert_same(p.grad, gradient, 1e-4)


@needs_compiler
def test_compiled_call_refuses_a_hole():
    torch._dynamo.reset()
    compiled = torch.compile(make(torch.float32), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        compiled(ONES, attention_mask=PADDED)
        with pytest.raises(RuntimeError, match="padded on the left or the right, got one with a hole"):
            compiled(ONES, attention_mask=HOLE)


@needs_compiler
def test_compiled_call_refuses_packed_sequences_with_a_mask():
    torch._dynamo.reset()
    model = make(torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    counted = (PADDED.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        logits = compiled(ONES, attention_mask=PADDED, position_ids=counted).logits
        assert_same(logits, model(ONES, attention_mask=PADDED).logits, 1e-5)
        with pytest.raises(RuntimeError, match="position_ids: expected no packed sequences together with"):
            compiled(ONES, attention_mask=ONES, position_ids=RESTART)
        cache = NsaCache(model, 2, 20)
        with pytest.raises(RuntimeError, match="position_ids: expected no packed sequences together with"):
            compiled(ONES, position_ids=RESTART, **{CACHE: cache})


@needs_compiler
def test_generate_compiles_its_step_once():
    model, ids = make(torch.float32, n_layers=1), draw_ids(3, 40)
    padded, mask, _ = pad(ids, "left")
    how = transformers.CompileConfig(mode="default", fullgraph=True, dynamic=False)
    how._compile_all_devices = True
    arguments = {"do_sample": False, "compile_config": how}
    expected = model.generate(padded, attention_mask=mask, max_new_tokens=12, do_sample=False)
    torch._dynamo.reset()
    model.generate(padded, attention_mask=mask, max_new_tokens=12, **arguments)
    with torch.compiler.set_stance("fail_on_recompile"):
        again = model.generate(padded, attention_mask=mask, max_new_tokens=12, **arguments)
        shorter = model.generate(padded[:, 1:], attention_mask=mask[:, 1:], max_new_tokens=5, **arguments)
    assert torch.equal(again, expected) and shorter.shape == (3, 44)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_generate_captures_its_step():
    sizes = {"dim": 128, "n_heads": 8, "n_kv_groups": 2, "d_k": 32, "d_v": 32, "l": 16, "d": 8, "l_sel": 16, "w": 64}
    model = NsaForCausalLM(NsaConfig(**sizes, n_sel=4, n_layers=2)).to("cuda", torch.bfloat16).eval()
    randomize(model)
    padded = draw_ids(3, 200, vocab=256).cuda()
    mask = torch.ones_like(padded)
    mask[1, :77] = 0
    arguments = {"attention_mask": mask, "max_new_tokens": 40, "do_sample": False}
    eager = model.generate(padded, disable_compile=True, **arguments)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    made = [model.generate(padded, **arguments) for _ in range(3)]
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
    assert all(torch.equal(made[0], other) for other in made[1:])
    assert float((made[0] == eager).float().mean()) > 0.9  # fused kernels round bf16 elsewhere
    sampled = model.generate(padded, attention_mask=mask, max_new_tokens=8, do_sample=True, top_p=0.9)
    assert sampled.shape == (3, 208)
