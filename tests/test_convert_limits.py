"""Conversion leaves other models alone, and what a converted model, checkpoint or command cannot take is refused."""

import json
import re

import pytest
import torch
from test_convert import (
    CACHE,
    EXACT,
    SIZED,
    SIZES,
    close,
    draw,
    logits_of,
    make_dense,
    make_pair,
    pad,
    refused,
    run,
)

from nsa_compile import NSAConfig, NSALanguageModel, convert, load_converted

transformers = pytest.importorskip("transformers")


@pytest.fixture
def folder(tmp_path):
    make_dense("llama").save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    return tmp_path / "dense"


@pytest.mark.parametrize("name", ["llama", "qwen2-sliding", "mistral-sliding"])
def test_models_that_share_a_config_stay_apart(name, tmp_path):
    teacher = make_dense(name)
    config, before = teacher.config, teacher.config.to_dict()
    one, two = (type(teacher)(config).eval() for _ in range(2))
    for model in (one, two):
        model.load_state_dict(teacher.state_dict())
    ids = draw(1, 3 * EXACT)
    expected = logits_of(teacher, ids)
    for model, layers in ((one, [0]), (two, [1, 2])):
        convert(model, **SIZES, layers=layers)
        assert all(getattr(module, "config", model.config) is model.config for module in model.modules())
        assert model.config.nsa["layers"] == layers
    assert one.config.nsa["layers"] == [0]
    assert teacher.config is teacher.model.config is config and config.to_dict() == before
    torch.testing.assert_close(logits_of(teacher, ids), expected, rtol=0, atol=0)
    teacher.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == name.split("-")[0]
    start = ids[:, :4]
    how = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(start)}
    assert torch.equal(one.generate(start, **how), teacher.generate(start, **how))


@pytest.mark.parametrize("layers", [1, "all", range(10**12), [0, 1] * 10**5, [10**9], []], ids=lambda x: str(x)[:9])
def test_layers_that_are_not_there_are_named_shortly(layers):
    model = make_dense("llama")
    with pytest.raises((TypeError, ValueError), match=r"^layers: expected .{1,60}, got .{1,60}$"):
        convert(model, **SIZES, layers=layers)
    assert type(model.model.layers[0].self_attn).__name__ == "LlamaAttention"


@pytest.mark.parametrize("layers", ["0-3000000000", "0-200000", "9" * 5000])
def test_the_command_bounds_ranges_of_layers(folder, tmp_path, layers):
    refused(run(folder, tmp_path / "out", *SIZED, "--layers", layers), tmp_path, "layers: expected", most=200)


CONFIGS = {"list": "[1]", "cut": "{", "bytes": "\x00", "number": '{"model_type": 1}', "kind": {"vocab_size": "x"},
           "zero": {"num_attention_heads": 0}, "negative": {"hidden_size": -24}}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_the_command_names_a_config_that_it_cannot_read(folder, tmp_path, case):
    path, changed = folder / "config.json", CONFIGS[case]
    if isinstance(changed, dict):
        changed = json.dumps(json.loads(path.read_text()) | changed)
    path.write_text(changed)
    refused(run(folder, tmp_path / "out", *SIZED), tmp_path, "folder: expected", str(path))


@pytest.mark.parametrize("keep", [-100, 50, 4, 0])
def test_cut_weights_are_named(folder, tmp_path, keep):
    path = sorted(folder.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:keep])
    refused(run(folder, tmp_path / "out", *SIZED), tmp_path, "folder: expected", str(path))
    make_pair()[1].save_pretrained(tmp_path / "nsa")
    path = tmp_path / "nsa" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load_converted(tmp_path / "nsa")


def test_cut_weights_of_the_package_s_own_model_are_named(tmp_path):
    NSALanguageModel(NSAConfig(dim=8, n_heads=2, n_kv_groups=1, d_k=4, d_v=4, n_layers=1)).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=re.escape(str(path))):
        NSALanguageModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [None, [1], {"layers": [0, 7]}, {"layers": "all"}, {"layers": 1}, {"depth": 3}, {"l": "4"}, {"l": 5}, {"dim": 24}],
    ids=str,
)
def test_loading_names_settings_that_do_not_fit(tmp_path, changes):
    make_pair()[1].save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    settings = json.loads(path.read_text())
    settings["nsa"] = settings["nsa"] | changes if isinstance(changes, dict) else changes
    for kept in (settings, {name: value for name, value in settings.items() if name != "nsa"}):
        path.write_text(json.dumps(kept))
        with pytest.raises(ValueError, match=r"folder: expected .*config\.json.* nsa: "):
            load_converted(tmp_path)


HOLE = torch.tensor([[1] * 40, [1] * 9 + [0] + [1] * 30])
TWICE = torch.arange(40).remainder(25).expand(2, -1)


@pytest.mark.parametrize(
    ("good", "bad", "words"),
    [
        ({"attention_mask": HOLE.sort().values}, {"attention_mask": HOLE}, "between tokens"),
        ({"position_ids": torch.arange(40).expand(2, -1)}, {"position_ids": TWICE}, "packed row"),
    ],
    ids=["hole", "restart"],
)
def test_a_compiled_model_refuses_them_too(good, bad, words):
    model, ids = make_pair(layers=[0])[1], draw(2, 40)
    compiled = torch.compile(
        lambda **how: model(ids, use_cache=False, **how).logits, fullgraph=True, backend="aot_eager"
    )
    with torch.no_grad():
        expected = logits_of(model, ids, use_cache=False, **good)
        keep = good.get("attention_mask", torch.ones_like(ids)).bool()
        close(compiled(**good)[keep], expected[keep])
        for call in (lambda **how: logits_of(model, ids, use_cache=False, **how), compiled):
            with pytest.raises((ValueError, RuntimeError), match=words):
                call(**bad)


def test_a_compiled_step_refuses_a_mask_with_a_hole():
    model, ids = make_pair(layers=[0])[1], draw(2, 9)
    cache = transformers.StaticCache(config=model.config, max_cache_len=16)
    compiled = torch.compile(lambda **how: model(**how).logits, backend="aot_eager")
    with torch.no_grad():
        compiled(input_ids=ids[:, :8], attention_mask=torch.ones(2, 8), **{CACHE: cache})
        with pytest.raises((ValueError, RuntimeError), match="between tokens"):
            compiled(input_ids=ids[:, 8:], attention_mask=torch.ones(2, 9).index_fill(1, torch.tensor(3), 0),
                     **{CACHE: cache})  # fmt: skip


def test_a_new_layer_is_in_the_mode_of_the_model():
    for mode in (False, True):
        model = convert(make_dense("llama").train(mode), **SIZES)
        assert {module.training for module in model.modules()} == {mode}


@pytest.mark.parametrize("where", ["call", "config", "generate"])
def test_attention_weights_are_refused(where):
    model, ids = make_pair(layers=[0])[1], draw(1, 4)
    with pytest.raises(ValueError, match="output_attentions: expected False"):
        if where == "call":
            model(ids, output_attentions=True)
        elif where == "config":
            model.set_attn_implementation("eager")
            model.config.output_attentions = True
            model(ids)
        else:
            model.generate(ids, max_new_tokens=2, output_attentions=True, return_dict_in_generate=True)


def test_generate_wants_padding_on_the_left():
    model = make_pair()[1]
    ids, mask = pad([draw(1, 9), draw(1, 5)], left=False)
    with pytest.raises(ValueError, match="for generate pad on the left"):
        model.generate(ids, attention_mask=mask, max_new_tokens=3)
