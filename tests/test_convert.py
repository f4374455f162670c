"""Dense transformers models converted to NSA: the same logits at the start, caches, padding, packing, checkpoints."""

import copy
import inspect
import itertools
import json
import re
import shutil

import pytest
import torch
from typer.testing import CliRunner

from nsa_compile import NSAAttention, cli, convert, load_converted
from nsa_compile.convert.command import parse_layers
from nsa_compile.convert.model import convert_folder

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

CACHE = "cache" if "cache" in inspect.signature(transformers.LlamaForCausalLM.forward).parameters else "past_key_values"

SIZES = {"l": 4, "d": 2, "l_sel": 8, "n_sel": 3, "w": 24}
EXACT = 24
SMALL = {
    "vocab_size": 40, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "bos_token_id": None, "eos_token_id": None,
    "pad_token_id": 0,
}  # fmt: skip
SCALED = {"rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
ROPE = {
    "llama3": {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **SCALED},
    "yarn": {"rope_type": "yarn", **SCALED},
    "linear": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0},
}
SLIDING = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}
MODELS = {
    "llama": ("Llama", {}),
    "llama-biases": ("Llama", {"attention_bias": True, "num_key_value_heads": 4}),
    "llama-llama3": ("Llama", {"rope_parameters": ROPE["llama3"]}),
    "llama-yarn": ("Llama", {"rope_parameters": ROPE["yarn"], "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {}),
    "qwen2-sliding": ("Qwen2", SLIDING),
    "qwen3": ("Qwen3", {"head_dim": 12, "rope_parameters": ROPE["linear"]}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-sliding": ("Mistral", {"sliding_window": 24, "rope_parameters": ROPE["yarn"]}),
}


def make_dense(name, **changes):
    """A small dense model with random weights, biases and norms."""
    kind, more = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**copy.deepcopy(SMALL | more | changes))
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(noise * 1.5 / weight.shape[-1] ** 0.5 if weight.ndim > 1 else 1 + 0.3 * noise)
    return model


def make_pair(name="llama", **options):
    dense = make_dense(name)
    return dense, convert(copy.deepcopy(dense), **SIZES | options)


def train_a_little(model):
    """Gates and compressors away from their start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".gate." in name or ".phi_" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.5)
    return model


def draw(*size, seed=0):
    return torch.randint(1, SMALL["vocab_size"], size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_of(model, ids, **how):
    return model(ids, **how).logits


def close(a, b):
    """Equal within fp32's rounding in a few layers."""
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


@pytest.mark.parametrize("tie_kv", [True, False], ids=["tied", "copied"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_the_dense_ones_up_to_w_and_n_sel_blocks(name, tie_kv):
    dense, converted = make_pair(name, tie_kv=tie_kv)
    ids = draw(2, 3 * EXACT)
    expected, got = logits_of(dense, ids, use_cache=False), logits_of(converted, ids, use_cache=False)
    close(got[:, :EXACT], expected[:, :EXACT])
    close(logits_of(converted, ids[:, :EXACT]), expected[:, :EXACT])  # with the cache a call makes by itself
    close(logits_of(converted, ids[:1, :1]), expected[:1, :1])
    assert (got[:, EXACT:] - expected[:, EXACT:]).abs().amax((0, 2)).min() > 1e-3  # sparse from the next token on
    assert expected.std() > 0.1


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
@pytest.mark.parametrize("phi", ["avg", "mlp"])
def test_the_attention_is_the_dense_one_in_fp64_for_every_choice(phi, gate):
    dense, converted = make_pair("qwen3", phi=phi, gate=gate)  # transformers' norms round whole models to fp32
    old, new = (m.double().model.layers[1].self_attn for m in (dense, converted))
    x = torch.randn(2, EXACT, SMALL["hidden_size"], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turn = dense.model.rotary_emb(x, torch.arange(EXACT)[None])
    expected, _ = old(x, position_embeddings=turn, attention_mask=None)
    torch.testing.assert_close(new(x, position_embeddings=turn)[0], expected, rtol=0, atol=1e-14)
    assert expected.std() > 0.01


def test_a_converted_layer_is_nsa_attention_beyond_that():
    converted = train_a_little(make_pair("llama", tie_kv=False, phi="mlp", gate="sigmoid")[1])
    layer = converted.model.layers[0].self_attn
    sizes = {"dim": 24, "n_heads": 4, "n_kv_groups": 2, "d_k": 8, "d_v": 8}
    plain = NSAAttention(**sizes, **SIZES, phi="mlp", gate="sigmoid")
    names = {"W_Q": "q_proj", "out": "o_proj"}
    names |= {
        f"W_{x.upper()}_{b}": f"{x}_proj{e}" for x in "kv" for b, e in (("sel", ""), ("win", "_win"), ("cmp", "_cmp"))
    }
    for name, of in names.items():
        getattr(plain, name).weight = getattr(layer, of).weight
    plain.phi_k, plain.phi_v, plain.gate = layer.phi_k, layer.phi_v, layer.gate
    x = torch.randn(2, 4 * EXACT, 24, generator=torch.Generator().manual_seed(0))
    turn = converted.model.rotary_emb(x, torch.arange(x.shape[1])[None])
    close(layer(x, position_embeddings=turn)[0], plain(x))


def test_yarn_scales_the_scores_of_every_branch():
    converted = train_a_little(make_pair("llama-yarn")[1])
    layer, factor = converted.model.layers[0].self_attn, converted.model.rotary_emb.attention_scaling
    assert factor > 1.1
    x = torch.randn(2, 4 * EXACT, 24, generator=torch.Generator().manual_seed(0))
    turn = converted.model.rotary_emb(x, torch.arange(x.shape[1])[None])
    expected, _ = layer(x, position_embeddings=turn)
    layer.scaling *= factor**2
    close(layer(x, position_embeddings=tuple(y / factor for y in turn))[0], expected)


@pytest.mark.parametrize("name", ["llama", "qwen2-sliding", "mistral-sliding"])
def test_a_subset_of_layers(name):
    dense, converted = make_pair(name, layers=[2, 0])
    kinds = [type(layer.self_attn).__name__ for layer in converted.model.layers]
    assert kinds[0] == kinds[2] == "ConvertedAttention" != kinds[1]
    assert converted.config.nsa["layers"] == [0, 2]
    ids = draw(2, 2 * EXACT)
    expected, got = logits_of(dense, ids), logits_of(converted, ids, use_cache=False)
    close(got[:, :EXACT], expected[:, :EXACT])
    assert (got[:, EXACT:] - expected[:, EXACT:]).abs().max() > 1e-3
    close(stepwise(converted, ids, 5, 31), got)


@pytest.mark.parametrize("tie_kv", [True, False], ids=["tied", "copied"])
def test_gradients_flow_everywhere(tie_kv):
    converted = make_pair("qwen3", tie_kv=tie_kv, phi="mlp")[1].train()
    ids = draw(2, 2 * EXACT)
    converted(ids, labels=ids).loss.backward()
    at_zero = r"gate\.fc1|phi_.\.|_cmp\."  # behind a zero layer, or in compression, whose share starts as 0
    for name, weight in converted.named_parameters():
        assert bool(weight.grad.abs().sum() > 0) != bool(re.search(at_zero, name)), name
    assert converted.model.layers[0].self_attn.gate.fc2.bias.grad.abs().min() > 0
    train_a_little(converted).zero_grad()
    converted.gradient_checkpointing_enable()
    converted(ids, labels=ids).loss.backward()
    assert all(weight.grad.abs().sum() > 0 for weight in converted.parameters())


def stepwise(model, ids, *ends, cache=None):
    """Logits of ids in chunks that end at `ends`, then token by token, from a cache."""
    cache = transformers.DynamicCache(config=model.config) if cache is None else cache
    ends = [0, *ends, *range(max(ends) + 1, ids.shape[1] + 1)]
    return torch.cat([logits_of(model, ids[:, a:b], **{CACHE: cache}) for a, b in itertools.pairwise(ends)], 1)


@pytest.mark.parametrize("tie_kv", [True, False], ids=["tied", "copied"])
@pytest.mark.parametrize("name", ["llama-yarn", "mistral-sliding", "qwen3"])
def test_chunks_and_steps_from_a_cache_equal_the_whole(name, tie_kv):
    model = train_a_little(make_pair(name, tie_kv=tie_kv, phi="mlp")[1])
    ids = draw(2, 2 * EXACT + 9)
    expected = logits_of(model, ids, use_cache=False)
    close(stepwise(model, ids, 3, 40), expected)
    static = transformers.StaticCache(config=model.config, max_cache_len=70)
    close(stepwise(model, ids, 30, 50, cache=static), expected)
    static.reset()
    close(stepwise(model, ids, 30, 50, cache=static), expected)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama-llama3", "qwen2", "mistral-sliding"])
def test_generate_equals_dense_generate(name, static):
    dense, converted = make_pair(name)
    ids = draw(2, 9)
    how = {"max_new_tokens": EXACT - 9, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    how |= {"cache_implementation": "static", "disable_compile": True} if static else {}
    got = converted.generate(ids, **how)
    assert torch.equal(got, dense.generate(ids, **how))
    assert len(set(got[0].tolist())) > 3


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_generate_with_left_padding_equals_rows_alone(static):
    model = train_a_little(make_pair("qwen2")[1])
    rows = [draw(1, n, seed=n) for n in (37, 5, 30)]
    how = {"max_new_tokens": 12, "do_sample": False}
    how |= {"cache_implementation": "static", "disable_compile": True} if static else {}
    alone = [model.generate(row, attention_mask=torch.ones_like(row), **how)[:, row.shape[1] :] for row in rows]
    ids, mask = pad(rows, left=True)
    together = model.generate(ids, attention_mask=mask, **how)[:, 37:]
    assert torch.equal(together, torch.cat(alone))


def pad(rows, left):
    most = max(row.shape[1] for row in rows)
    side = lambda n: (most - n, 0) if left else (0, most - n)  # noqa: E731
    pads = [torch.nn.functional.pad(row, side(row.shape[1])) for row in rows]
    masks = [torch.nn.functional.pad(torch.ones_like(row), side(row.shape[1])) for row in rows]
    return torch.cat(pads), torch.cat(masks)


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no-cache"])
def test_padded_rows_equal_rows_alone(left, use_cache):
    model = train_a_little(make_pair("llama-biases")[1])
    rows = [draw(1, n, seed=n) for n in (57, 5, 33)]
    ids, mask = pad(rows, left)
    got = logits_of(model, ids, attention_mask=mask, use_cache=use_cache)
    for row, padded, keep in zip(rows, got, mask.bool(), strict=True):
        close(padded[keep], logits_of(model, row, use_cache=False)[0])
    if left and use_cache:  # a chunk that ends within the padding of a row
        cache = transformers.DynamicCache(config=model.config)
        parts = [
            logits_of(model, ids[:, a:b], attention_mask=mask[:, :b], **{CACHE: cache})
            for a, b in ((0, 30), (30, 54), (54, 57))
        ]
        close(torch.cat(parts, 1)[mask.bool()], got[mask.bool()])


def test_packed_rows_equal_rows_alone():
    model = train_a_little(make_pair("llama-yarn")[1])
    rows = [draw(1, n, seed=n) for n in (3, 57, 1, 30)]
    ids = torch.cat(rows, 1)
    positions = torch.cat([torch.arange(row.shape[1]) for row in rows])[None]
    ends = torch.tensor([0, *itertools.accumulate(row.shape[1] for row in rows)])
    expected = torch.cat([logits_of(model, row, use_cache=False) for row in rows], 1)
    close(logits_of(model, ids, position_ids=positions), expected)
    flash = {"cu_seq_lens_q": ends.int(), "cu_seq_lens_k": ends.int(), "max_length_q": 57, "max_length_k": 57}
    close(logits_of(model, ids, position_ids=positions, **flash), expected)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"attention_mask": torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]])}, "between tokens"),
        ({"attention_mask": torch.ones(2, 1, 4, 4, dtype=torch.bool)}, "4 axes"),
        ({"position_ids": torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3]])}, "packed"),
        ({"cu_seq_lens_q": torch.tensor([0, 4], dtype=torch.int32)}, "packed"),
        ({"cu_seq_lens_q": torch.tensor([0, 4]), "attention_mask": torch.ones(2, 4)}, "padding"),
    ],
)
def test_masks_and_packing_that_do_not_fit_are_refused(how, words):
    model = make_pair()[1]
    with pytest.raises(ValueError, match=words):
        model(draw(2, 4), **how)


def test_a_cache_that_forgets_is_refused():
    dense, model = make_pair("mistral-sliding")
    cache = transformers.DynamicCache(config=dense.config)
    with pytest.raises(ValueError, match="keeps all tokens"):
        model(draw(1, 4), **{CACHE: cache})
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bf16"])
def test_low_precision(autocast):
    dense, converted = make_pair("qwen3", tie_kv=False)
    ids = draw(2, EXACT)
    expected = logits_of(dense, ids)
    if not autocast:
        dense, converted = dense.bfloat16(), converted.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        base, whole, steps = logits_of(dense, ids), logits_of(converted, ids), stepwise(converted, ids, 9)
    error = (base.float() - expected).abs().mean()
    assert all((got.float() - expected).abs().mean() < 2 * error for got in (whole, steps))


def test_compiled_in_one_graph():
    model = train_a_little(make_pair("llama", layers=[0])[1])
    ids = draw(2, 40)
    expected = logits_of(model, ids, use_cache=False)
    compiled = torch.compile(lambda ids: model(ids, use_cache=False).logits, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        close(compiled(ids), expected)


REFUSED = {
    "layer out of range": ("llama", {}, {"layers": [0, 3]}, ValueError, "layers"),
    "negative layer": ("llama", {}, {"layers": [-1]}, ValueError, "layers"),
    "layer twice": ("llama", {}, {"layers": [1, 1]}, ValueError, "layers"),
    "no layer": ("llama", {}, {"layers": []}, ValueError, "layers"),
    "layer of another type": ("llama", {}, {"layers": ["0"]}, TypeError, "layers"),
    "sizes": ("llama", {}, {"l": 5}, ValueError, "l: expected a multiple"),
    "too few blocks": ("llama", {}, {"n_sel": 2}, ValueError, "n_sel"),
    "choice": ("llama", {}, {"gate": "hard"}, ValueError, "gate"),
    "dropout": ("llama", {"attention_dropout": 0.1}, {}, ValueError, "attention_dropout"),
    "dynamic RoPE": (
        "llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, {}, ValueError,
        "RoPE",
    ),
    "short window": ("mistral-sliding", {"sliding_window": 23}, {}, ValueError, "sliding window"),
    "short window in some layers": ("qwen2-sliding", {"sliding_window": 23}, {}, ValueError, "window in layer 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_before_anything_changes(case):
    name, changes, options, error, words = REFUSED[case]
    model = make_dense(name, **changes)
    config, kind, modules = model.config.to_dict(), type(model), dict(model.named_modules())
    with pytest.raises(error, match=words):
        convert(model, **SIZES | options)
    assert model.config.to_dict() == config and type(model) is kind
    assert dict(model.named_modules()) == modules and not hasattr(model.config, "nsa")


def test_other_models_are_refused():
    dense, converted = make_pair()
    with pytest.raises(ValueError, match="converted one"):
        convert(converted, **SIZES)
    with pytest.raises(TypeError, match="got LlamaModel"):
        convert(dense.model, **SIZES)
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9))
    with pytest.raises(TypeError, match="got GPT2LMHeadModel"):
        convert(gpt2, **SIZES)
    dense.model.layers[1].self_attn.k_proj = torch.nn.Sequential(dense.model.layers[1].self_attn.k_proj)
    with pytest.raises(ValueError, match="k_proj of layer 1"):
        convert(dense, **SIZES)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama-yarn", {}),
        ("qwen3", {"tie_kv": False, "phi": "mlp"}),
        ("qwen2-sliding", {"layers": [1]}),
        ("mistral-sliding", {"layers": [0, 1]}),
        ("mistral-sliding", {"gate": "sigmoid"}),
    ],
)
def test_a_checkpoint_loads_again(name, options, tmp_path):
    model = train_a_little(make_pair(name, **options)[1])
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ids = draw(2, 3 * EXACT)
    expected = logits_of(model, ids)
    for loaded in (load_converted(tmp_path), transformers.AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert type(loaded) is type(model) and loaded.config.nsa == model.config.nsa
        torch.testing.assert_close(logits_of(loaded, ids), expected, rtol=0, atol=0)
    assert load_converted(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16
    twin = copy.deepcopy(model)
    close(stepwise(twin, ids, 60), expected)


def test_loading_says_what_does_not_fit(tmp_path):
    dense, model = make_pair(tie_kv=False)
    dense.save_pretrained(tmp_path / "dense")
    model.save_pretrained(tmp_path / "nsa")
    with pytest.raises(ValueError, match=r"nsa_llama.*got 'llama'"):
        load_converted(tmp_path / "dense")
    with pytest.raises(ValueError, match=r"config\.json"):
        load_converted(tmp_path / "nothing")
    config = tmp_path / "nsa" / "config.json"
    settings = json.loads(config.read_text())
    for changed in ({"hidden_size": 32}, {"nsa": settings["nsa"] | {"phi": "mlp"}}):
        config.write_text(json.dumps(settings | changed))
        with pytest.raises(ValueError, match="expected weights that fit"):
            load_converted(tmp_path / "nsa")


def run(*arguments):
    return CliRunner().invoke(cli.app, ["convert", *(str(a) for a in arguments)])


SIZED = [*itertools.chain.from_iterable((f"--{k.replace('_', '-')}", v) for k, v in SIZES.items())]


@pytest.fixture
def folder(tmp_path):
    make_dense("llama").save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "tokenizer.json").write_text("{}")
    return tmp_path / "dense"


def test_the_command_writes_a_new_checkpoint(folder, tmp_path):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    out = tmp_path / "new" / "nsa"
    result = run(folder, out, *SIZED, "--layers", "0,2", "--copy")
    assert result.exit_code == 0, result.output
    assert "NSALlamaForCausalLM, NSA in 2 of 3 layers, separate keys" in result.stdout and "24 tokens" in result.stdout
    model, ids = load_converted(out), draw(2, EXACT)
    assert model.config.nsa["layers"] == [0, 2] and not model.config.nsa["tie_kv"]
    close(logits_of(model, ids), logits_of(make_dense("llama"), ids))
    assert (out / "tokenizer.json").read_text() == "{}" and [path.name for path in out.parent.iterdir()] == ["nsa"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    again = run(folder, out, *SIZED)
    assert again.exit_code == 2 and "new or empty folder" in again.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--layers", "0,3"], ["layers:", "0 … 2"]),
        (["--layers", "2-0"], ["layers:", "2-0"]),
        (["--l", "5"], ["l:", "multiple of d"]),
    ],
)
def test_the_command_refuses_before_it_writes(folder, tmp_path, options, words):
    refused(run(folder, tmp_path / "out", *SIZED, *options), tmp_path, *words)


def refused(result, tmp_path, *words, most=1000):
    assert result.exit_code == 2 and len(result.stderr) < most, result.output
    assert re.fullmatch(r"error: [^\n]+\n", result.stderr), result.stderr
    assert all(word in result.stderr for word in words), result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


@pytest.mark.parametrize("changes", [{"hidden_size": 32}, {"num_hidden_layers": 4}, {"model_type": "gpt2"}])
def test_the_command_refuses_another_checkpoint(folder, tmp_path, changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    refused(run(folder, tmp_path / "out", *SIZED), tmp_path, "folder: expected")


def test_a_failed_write_leaves_nothing(folder, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(shutil, "copy2", fail)
    with pytest.raises(OSError, match="disk full"):
        convert_folder(folder, tmp_path / "out", **SIZES)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_layers_as_text():
    assert list(parse_layers("0, 2-4,7")) == [0, 2, 3, 4, 7]
    for text in ("", "a", "1-", "-1", "3-2", "1,,2"):
        with pytest.raises(ValueError, match="layers"):
            parse_layers(text)
