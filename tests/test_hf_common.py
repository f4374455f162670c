"""transformers' own common model tests on a tiny configuration, from the `tests/` of its source distribution.

They are no part of its wheel: `.ci/run` unpacks them as the package `transformers_tests`. The source distribution
leaves out the folders below `tests/`, `GenerationTesterMixin` and `ExportTesterMixin` among them, so that generation is
tested in test_hf.py; where a whole `tests/` is unpacked, `GenerationTesterMixin` runs too.
"""

import sys
import types
import unittest
from importlib.util import find_spec
from unittest import mock

import pytest
import torch

pytest.importorskip("transformers")
if find_spec("transformers_tests") is None:
    pytest.skip("transformers' own tests are not here (.ci/run unpacks them)", allow_module_level=True)
pytest.importorskip("parameterized", reason="transformers' own tests need it")


def import_mixin(module: str, name: str) -> type:
    """A mixin that the common tests import, empty where the source distribution leaves its file out."""
    path = f"transformers_tests.{module}"
    try:
        found = find_spec(path) is not None
    except ModuleNotFoundError:
        found = False
    if found:
        return getattr(__import__(path, fromlist=[name]), name)
    mixin = type(name, (), {})
    package = path.rpartition(".")[0]
    sys.modules.setdefault(package, types.ModuleType(package))
    stand_in = sys.modules[path] = types.ModuleType(path)
    setattr(stand_in, name, mixin)
    return mixin


ExportTesterMixin = import_mixin("exporters.test_export", "ExportTesterMixin")
GenerationTesterMixin = import_mixin("generation.test_utils", "GenerationTesterMixin")

from transformers.models.auto.modeling_auto import (  # noqa: E402
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)
from transformers_tests.test_modeling_common import ModelTesterMixin, ids_tensor  # noqa: E402

from nsa_compile.hf import NsaConfig, NsaForCausalLM, NsaModel  # noqa: E402


class Tester:
    """What the common tests ask for a configuration and inputs."""

    batch_size, seq_length, is_training = 3, 11, True
    hidden_size, num_hidden_layers, num_attention_heads, vocab_size = 20, 2, 6, 31

    def __init__(self, parent: unittest.TestCase) -> None:
        self.parent = parent

    def get_config(self) -> NsaConfig:
        return NsaConfig(
            dim=20, n_heads=6, n_kv_groups=2, d_k=6, d_v=4, l=4, d=2, l_sel=6, n_sel=4, w=7, n_layers=2, vocab_size=31,
            pad_token_id=0, phi="mlp",
        )  # fmt: skip

    def prepare_config_and_inputs_for_common(self) -> tuple[NsaConfig, dict]:
        ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


NO_WEIGHTS = "no attention weights are computed, so none can be returned or captured"
NO_CHOICE = (
    "transformers' attention functions (eager, sdpa, flash, flex, paged) do not compute this attention; `impl` does"
)
NO_ROPE_MODULE = "RoPE is a function of `rope_theta` within the layer: no rotary module, no scaling"
OWN_HIDDEN_STATES = "hidden states are collected by the model itself, in the layout of its inputs, not by hooks"
ONE_TEXT_MODEL = "one decoder of text: no second modality, sub-config, encoder or experts"
LEFT_OUT = {
    "test_attention_outputs": NO_WEIGHTS,
    "test_bc_cache_name_forward": "it fills a cache in a call with gradients, which an NsaCache refuses",
    "test_can_capture_specific_layers_hidden_states": OWN_HIDDEN_STATES,
    "test_capture_outputs_decorator": OWN_HIDDEN_STATES,
    "test_can_load_from_already_mapped_keys": "no checkpoint needs a conversion of its keys",
    "test_reverse_loading_mapping": "no checkpoint needs a conversion of its keys",
    "test_can_set_attention_dynamically": NO_CHOICE,
    "test_can_set_attention_dynamically_composite_model": ONE_TEXT_MODEL,
    "test_attn_implementation_composite_models": ONE_TEXT_MODEL,
    "test_eager_matches_batched_and_grouped_inference": ONE_TEXT_MODEL,
    "test_eager_matches_sdpa_inference": NO_CHOICE,
    "test_encoder_decoder_loss_no_double_shift": ONE_TEXT_MODEL,
    "test_flash_attn_": NO_CHOICE,
    "test_flex_attention_with_grads": NO_CHOICE,
    "test_generation_tester_mixin_inheritance": "the source distribution has no GenerationTesterMixin to inherit",
    "test_internal_model_config_and_subconfig_are_same": ONE_TEXT_MODEL,
    "test_keep_in_fp32_modules": "no module is kept in fp32 beside a model in another type",
    "test_kernels_can_load_without_crashing": "no kernel of the hub replaces a module",
    "test_model_rope_": NO_ROPE_MODULE,
    "test_moe_models_record_router_logits": ONE_TEXT_MODEL,
    "test_multimodal_outputs_are_returned": ONE_TEXT_MODEL,
    "test_output_router_logits_from_config": ONE_TEXT_MODEL,
    "test_resize_position_vector_embeddings": "no position embeddings",
    "test_sdpa_": NO_CHOICE,
    "test_sliding_window_mask": NO_CHOICE,
    "test_tp_plan_matches_params": "no tensor-parallel plan",
    "test_vision_axial_rope": NO_ROPE_MODULE,
}
"""Tests, or beginnings of names of tests, that do not apply, with the reason. Those that need an accelerator, several
of them, DeepSpeed, MPS or hours (`slow`) skip themselves and say so."""


class NsaModelTest(ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (NsaModel, NsaForCausalLM)
    has_attentions = False
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self) -> None:
        self.model_tester = Tester(self)
        # they assign a norm's epsilon to a config of any kind, which is refused here; the model gets it all the same
        name = "transformers_tests.test_modeling_common.set_config_for_less_flaky_test"
        patch = mock.patch(name, lambda config: None)
        patch.start()
        self.addCleanup(patch.stop)
        for names, cls in ((MODEL_MAPPING_NAMES, NsaModel), (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, NsaForCausalLM)):
            # by these the tests know which of the classes has a loss
            known = mock.patch.dict(names, {NsaConfig.model_type: cls.__name__})
            known.start()
            self.addCleanup(known.stop)


for name in dir(NsaModelTest):
    for beginning, reason in LEFT_OUT.items():
        if name.startswith(beginning):
            setattr(NsaModelTest, name, unittest.skip(reason)(getattr(NsaModelTest, name)))


def test_what_is_left_out_exists() -> None:
    names = [name for name in dir(ModelTesterMixin) if name.startswith("test_")]
    assert all(any(name.startswith(beginning) for name in names) for beginning in LEFT_OUT)
