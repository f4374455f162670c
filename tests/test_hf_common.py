"""transformers' own common model tests on a tiny configuration, from the `tests/` of its source distribution.

They are no part of its wheel: `.ci/run` unpacks them as the package `transformers_tests`. The source distribution
leaves out the folders below `tests/`, `GenerationTesterMixin` and `ExportTesterMixin` among them, so that generation is
tested in test_hf.py; where a whole `tests/` is unpacked, `GenerationTesterMixin` runs too.
"""

import sys
import types
import unittest
from importlib.util import find_spec

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


class NsaModelTest(ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (NsaModel, NsaForCausalLM)
    has_attentions = False

    def setUp(self) -> None:
        self.model_tester = Tester(self)
