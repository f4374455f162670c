"""The config of the transformers classes: every name has an effect, or is refused, or is the library's."""

from __future__ import annotations

import json

import pytest
import torch
from models import LAYER, draw_ids, make_model
from test_convert import make_pair

from nsa_compile import NSAConfig, load_converted

transformers = pytest.importorskip("transformers")

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig  # noqa: E402

from nsa_compile.hf import NsaConfig, NsaForCausalLM  # noqa: E402

SIZES = {**LAYER, "n_layers": 2, "vocab_size": 31}
WITHOUT_EFFECT = {
    "head_dim": (64, "d_k and d_v"),
    "intermediate_size": (128, r"4\*dim"),
    "sliding_window": (4096, "here: w"),
    "attention_dropout": (0.1, "no dropout"),
    "per_layer_config": ({0: {"d_k": 2}}, "alike"),
    "layer_types": (["full_attention"] * 2, "one kind"),
    "rms_norm_eps": (1e-5, "1e-6"),
    "n_select": (8, r"did you mean n_sel\?"),
    "num_key_value_head": (1, r"did you mean num_key_value_heads\?"),
    "ropetheta": (5.0, r"did you mean rope_theta\?"),
    "max_blocks_of_anything": (3, "$"),
}


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_names_without_an_effect_are_refused(name, tmp_path):
    value, hint = WITHOUT_EFFECT[name]
    expected = pytest.raises(ValueError, match=rf"^config: expected .*, got {name}.*{hint}")
    with expected:
        NsaConfig(**SIZES, **{name: value})
    with expected:
        AutoConfig.for_model("nsa", **SIZES, **{name: value})
    with expected:
        NsaConfig.from_sizes(NSAConfig(**SIZES), **{name: value})
    NsaConfig(**SIZES).save_pretrained(tmp_path)
    if name != "max_blocks_of_anything":  # which could be for a tokenizer or pipeline that loads the config
        for cls in (NsaConfig, AutoConfig):
            with expected:
                cls.from_pretrained(tmp_path, **{name: value})
    told = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(told | {name: value}))
    for cls in (NsaConfig, AutoConfig, NsaForCausalLM, AutoModelForCausalLM):
        with expected:
            cls.from_pretrained(tmp_path)


def test_all_names_without_an_effect_are_told_at_once():
    with pytest.raises(ValueError, match=r"got head_dim .*, other, n_select \(did you mean n_sel\?\)$"):
        NsaConfig(head_dim=4, other=3, n_select=8)


@pytest.mark.parametrize("name", ["n_select", "head_dim", "sliding_window"])
def test_they_are_refused_by_assignment_too(name):
    config = NsaConfig(**SIZES)
    with pytest.raises(ValueError, match=f"got {name}"):
        setattr(config, name, 3)
    assert not hasattr(config, name)
    config.n_heads = config.hidden_size = 12
    assert config.sizes() == NSAConfig(**SIZES | {"n_heads": 12, "dim": 12})


@pytest.mark.parametrize("arguments", [{"n_select": 8}, {"head_dim": 4}])
def test_a_model_takes_no_unknown_name_either(arguments, tmp_path):
    model = NsaForCausalLM(NsaConfig(**SIZES))
    model.save_pretrained(tmp_path)
    for build in (
        lambda: AutoModelForCausalLM.from_config(model.config, **arguments),
        lambda: AutoModelForCausalLM.from_pretrained(tmp_path, **arguments),
        lambda: NsaForCausalLM.from_language_model(make_model(), **arguments),
    ):
        with pytest.raises((TypeError, ValueError), match=f"'?{next(iter(arguments))}"):
            build()


ROPE = [
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    {"rope_parameters": {"rope_theta": 1e6}},
    {"rope_parameters": {"type": "default", "rope_theta": 1e6, "partial_rotary_factor": 1.0}},
    {"rope_scaling": {"rope_type": "default", "rope_theta": 1e6}},
    {"rope_parameters": {"rope_type": "default"}, "rope_theta": 1e6},
    {"rope_parameters": None, "rope_scaling": None, "rope_theta": 1e6},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_theta": 1e6},
]


@pytest.mark.parametrize("arguments", ROPE, ids=str)
def test_the_base_of_rope_is_honoured_wherever_it_stands(arguments, tmp_path):
    config = NsaConfig(**SIZES, **arguments)
    assert config.sizes().rope_theta == config.rope_theta == config.rope_parameters["rope_theta"] == 1e6
    torch.manual_seed(0)
    model, ids = NsaForCausalLM(config).eval(), draw_ids(1, 60)
    torch.manual_seed(0)
    other = NsaForCausalLM(NsaConfig(**SIZES)).eval()
    assert (model(ids).logits - other(ids).logits).abs().max() > 1e-7
    torch.testing.assert_close(model(ids).logits, model.to_language_model()(ids))
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path) == config
    NsaConfig(**SIZES).save_pretrained(tmp_path)
    if "rope_scaling" not in arguments:  # of which some versions warn only
        for cls in (NsaConfig, AutoConfig):
            assert cls.from_pretrained(tmp_path, **arguments) == config
    told = json.loads((tmp_path / "config.json").read_text())
    del told["rope_theta"]
    (tmp_path / "config.json").write_text(json.dumps(told | arguments))
    assert AutoConfig.from_pretrained(tmp_path) == config


def test_the_base_of_rope_is_assigned_by_any_of_its_names():
    config = NsaConfig(**SIZES)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    config.rope_parameters = {"rope_type": "default", "rope_theta": 5.0}
    assert config.sizes().rope_theta == 5.0
    config.rope_theta = 7.0
    assert config.rope_parameters["rope_theta"] == 7.0
    with pytest.raises(ValueError, match="rope_parameters: expected rope_type 'default'"):
        config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 5.0, "factor": 2.0}
    assert config.rope_theta == 7.0


BAD = {
    "yarn": (
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
        "rope_parameters: expected rope_type 'default'",
    ),
    "old": ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_scaling: expected type 'default'"),
    "factor": (
        {"rope_parameters": {"factor": 4.0}},
        "rope_parameters: expected rope_type and rope_theta, got 'factor'",
    ),
    "layers": (
        {"rope_parameters": {"full_attention": {"rope_theta": 5.0}}},
        "rope_parameters: expected rope_type and rope_theta, got 'full_attention'",
    ),
    "partial": ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 1.0, .* got 0.5"),
    "number": ({"rope_parameters": 1e6}, "rope_parameters: expected a dict of rope_type and rope_theta, got 1000000.0"),
    "negative": ({"rope_parameters": {"rope_theta": -1.0}}, "rope_theta: expected a positive number, got -1.0"),
    "text": ({"rope_parameters": {"rope_theta": "1e6"}}, "rope_theta: expected"),
    "both": (
        {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}},
        "rope_parameters: expected 10000.0, as rope_theta beside it says, got 1000000.0",
    ),
    "sizes": ({"dim": 64, "hidden_size": 128}, "hidden_size: expected 64, as dim beside it says, got 128"),
    "tied": ({"tie_embeddings": True, "tie_word_embeddings": False}, "tie_embeddings: expected False"),
    "encoder": ({"is_encoder_decoder": True}, "is_encoder_decoder: expected False"),
    "chunks": ({"chunk_size_feed_forward": 3}, "chunk_size_feed_forward: expected 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_contradicts_or_is_not_there_is_refused(case):
    arguments, message = BAD[case]
    with pytest.raises((ValueError, TypeError), match=message):
        NsaConfig(**arguments)


LIBRARY = {
    "architectures": ["NsaForCausalLM"], "torch_dtype": "bfloat16", "transformers_version": "5.0.0",
    "name_or_path": "someone/something", "_name_or_path": "someone/something", "_commit_hash": "abc",
    "_attn_implementation_autoset": True, "model_type": "nsa", "output_hidden_states": True, "return_dict": False,
    "id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2}, "num_labels": 3,
    "problem_type": "regression", "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "auto_map": {"AutoConfig": "a.B"}, "task_specific_params": {"x": {"max_length": 3}}, "tokenizer_class": "T",
    "max_position_embeddings": 4096, "temperature": 0.3, "max_length": 30, "attn_implementation": "eager",
    "is_encoder_decoder": False, "chunk_size_feed_forward": 0, "use_cache": False, "pad_token_id": 1,
    "eos_token_id": [2, 3], "tie_word_embeddings": True, "gradient_checkpointing": False, "custom_pipelines": {},
}  # fmt: skip


def test_what_the_library_adds_passes(tmp_path):
    config = NsaConfig(**SIZES, **LIBRARY)
    assert config.dtype in (torch.bfloat16, "bfloat16") and config.num_labels == 3 and config.id2label[2] == "c"
    assert config.quantization_config["load_in_8bit"] and config.max_position_embeddings == 4096
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path) == config
    assert NsaConfig.from_dict(config.to_dict()) == config
    told = {**SIZES, **LIBRARY}
    (tmp_path / "config.json").write_text(json.dumps(told))
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.sizes() == config.sizes() and again.id2label == config.id2label


def test_arguments_of_others_that_load_a_config_pass(tmp_path):
    """AutoTokenizer and pipeline() hand all of their own arguments to AutoConfig."""
    config = NsaConfig(**SIZES)
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path, padding_side="left", use_fast=True, low_cpu_mem_usage=True) == config


def test_what_this_version_of_the_base_class_knows_passes():
    """A newer version adds fields; they are asked for, not listed."""
    config, base = NsaConfig(**SIZES), PreTrainedConfig()
    told = {name: value for name, value in base.to_dict().items() if not name.startswith("_")}
    assert NsaConfig(**SIZES, **told) == config
    for name, value in told.items():
        if name != "model_type":
            setattr(config, name, value)


def test_a_name_of_a_newer_base_class_passes(monkeypatch):
    from nsa_compile import hf_config

    class Newer(PreTrainedConfig):
        """A base with a field, a property and an argument that it takes for itself."""

        def __init__(self, **kwargs):
            self.a_new_field = kwargs.pop("a_new_field", 3)
            kwargs.pop("a_new_argument", None)
            super().__init__(**kwargs)

        @property
        def a_new_property(self):
            return None

        @a_new_property.setter
        def a_new_property(self, value):
            pass

    with pytest.raises(ValueError, match="a_new_field, a_new_argument, a_new_property"):
        hf_config.refuse_unknown(["a_new_field", "a_new_argument", "a_new_property"])
    monkeypatch.setattr(hf_config, "PreTrainedConfig", Newer)
    hf_config.base_names.cache_clear()
    try:
        hf_config.refuse_unknown(["a_new_field", "a_new_argument", "a_new_property"])
        with pytest.raises(ValueError, match=r"got a_new_fiel$"):
            hf_config.refuse_unknown(["a_new_fiel", "a_new_field"])
    finally:
        hf_config.base_names.cache_clear()


OLD = {
    "5.0": {
        "architectures": ["NsaForCausalLM"], "attention": "nsa", "bos_token_id": None, "d": 2, "d_k": 6, "d_v": 4,
        "dim": 20, "dtype": "float32", "eos_token_id": None, "format_version": 1, "gate": "softmax", "gate_hidden": 3,
        "gate_temperature": 1.0, "impl": "auto", "init_blocks": 1, "l": 4, "l_sel": 6, "local_blocks": 2,
        "model_type": "nsa", "n_heads": 6, "n_kv_groups": 2, "n_layers": 2, "n_sel": 4, "pad_token_id": None,
        "phi": "avg", "rope_theta": 10000.0, "tie_kv": False, "tie_word_embeddings": False,
        "transformers_version": "5.0.0", "use_cache": True, "vocab_size": 31, "w": 7,
    },
}  # fmt: skip
OLD["whole"] = OLD["5.0"] | {
    "_name_or_path": "", "chunk_size_feed_forward": 0, "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "is_encoder_decoder": False, "label2id": {"LABEL_0": 0, "LABEL_1": 1}, "output_attentions": False,
    "output_hidden_states": False, "problem_type": None, "return_dict": True,
}  # fmt: skip


@pytest.mark.parametrize("name", OLD)
def test_a_config_that_an_older_version_wrote_loads(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(OLD[name]))
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is NsaConfig and config.sizes() == NSAConfig(**SIZES)


def test_notes_of_others_are_not_saved_where_they_could_not_be_read(tmp_path):
    config = NsaConfig(**SIZES)
    config.unsloth_version, config._note = "1", "2"
    config.quantization_config = {"quant_method": "bitsandbytes"}
    config.save_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    assert not {"unsloth_version", "_note"} & told.keys() and told["quantization_config"] == config.quantization_config
    assert AutoConfig.from_pretrained(tmp_path) == config


def test_the_packages_own_config_says_what_was_meant():
    with pytest.raises(ValueError, match=r"got head_dim, n_select \(did you mean n_sel\?\)$"):
        NSAConfig.from_dict({"head_dim": 3, "n_select": 8})
    with pytest.raises(TypeError, match="n_select"):
        NSAConfig(n_select=8)
    with pytest.raises(ValueError, match=r"config: expected that of an NSALanguageModel, got .* model_type 'nsa'"):
        NSAConfig.from_dict(NsaConfig(**SIZES).to_dict())


MISPLACED = {
    "n_sel": (4, r"n_sel: expected settings of NSA within nsa, such as nsa\['n_sel'\], got it beside nsa"),
    "n_select": (4, r"n_select: .* such as nsa\['n_sel'\]"),
    "attention_dropout": (0.1, "expected attention_dropout 0"),
    "sliding_window": (5, "sliding_window: expected none in layer 0"),
    "rope_parameters": ({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, "expected RoPE of type default"),
}
UNREAD = {"attention": "dense", "rope_theta": 3.0, "n_layers": 1, "vocab_size": 9, "n_select": 8}


@pytest.mark.parametrize("name", MISPLACED)
def test_a_converted_model_refuses_what_its_layers_do_not_do(name, tmp_path):
    make_pair()[1].save_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    value, message = MISPLACED[name]
    (tmp_path / "config.json").write_text(json.dumps(told | {name: value}))
    for load in (load_converted, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=message):
            load(tmp_path)


@pytest.mark.parametrize("name", UNREAD)
def test_a_converted_model_refuses_settings_that_nothing_reads(name, tmp_path):
    make_pair()[1].save_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(told | {"nsa": told["nsa"] | {name: UNREAD[name]}}))
    hint = r" \(did you mean n_sel\?\)" if name == "n_select" else ""
    with pytest.raises(ValueError, match=f"nsa: expected the names layers, .* got {name}{hint}"):
        load_converted(tmp_path)


@pytest.mark.parametrize("kind", ["llama", "llama-llama3", "qwen2-sliding", "qwen3", "mistral-sliding"])
def test_a_converted_model_loads_with_notes_of_others_in_its_config(kind, tmp_path):
    for layers in (None, [1]):
        model = make_pair(kind, layers=layers)[1]
        model.config.unsloth_version = "1"
        model.config.quantization_note, model.config.architectures = {"a": 1}, ["NSAForCausalLM"]
        model.save_pretrained(tmp_path / str(layers))
        loaded = load_converted(tmp_path / str(layers))
        assert loaded.config.nsa == model.config.nsa and loaded.config.rope_parameters == model.config.rope_parameters
        assert torch.equal(loaded(draw_ids(1, 30)).logits, model(draw_ids(1, 30)).logits)
