"""The implementation of a built layer or model: changed by one call or an assignment, and nothing is ignored."""

import pytest
import torch
from models import LAYER, draw_ids, make_layer, make_model
from torch import nn

from nsa_compile import NSAConfig, NSALanguageModel, set_impl
from nsa_compile.config import IMPLS
from nsa_compile.custom_ops import dispatch

BOGUS = r"impl: expected one of 'auto', 'reference', 'triton', 'flash', got 'bogus'"
REFUSED = "impl: expected .* for .*, got 'triton': its Triton kernels take float32"
"""What fp64 says to kernels: the choice reached the ops."""


def modules() -> dict:
    inner = nn.Sequential(make_layer(), make_layer(phi="mlp"))
    return {"layer": make_layer(), "block": make_model().layers[0], "model": make_model(), "of your own": inner}


@pytest.mark.parametrize("name", modules())
def test_a_built_module_changes(name):
    module = modules()[name]
    x = draw_ids(1, 20) if name == "model" else torch.randn(1, 20, LAYER["dim"], dtype=torch.float64)
    expected = module(x)
    for change in [set_impl] if name == "of your own" else [set_impl, lambda m, impl: setattr(m, "impl", impl)]:
        for wrong in ("bogus", None, 3):
            with pytest.raises(ValueError, match=BOGUS if wrong == "bogus" else r"impl: expected one of 'auto'"):
                change(module, wrong)
        assert torch.equal(module(x), expected)
        change(module, "triton")
        assert name == "of your own" or module.impl == "triton"
        with pytest.raises(ValueError, match=REFUSED):
            module(x)
        compressors = [m for m in module.modules() if hasattr(m, "phi_k")]
        assert compressors and all(m.phi_k.impl == m.phi_v.impl == "triton" for m in compressors)
        change(module, "flash")  # beside it, "auto" for what flash-attn has not
        assert all(m.phi_k.impl == "auto" and m.config.impl == "flash" for m in compressors)
        change(module, "reference")
        assert torch.equal(module(x), expected)


def test_names_are_checked_where_they_are_written_down():
    assert IMPLS == dispatch.IMPLS
    for make in (make_layer, make_model, lambda impl: NSAConfig(impl=impl)):
        with pytest.raises(ValueError, match=BOGUS):
            make(impl="bogus")
    with pytest.raises(ValueError, match="module: expected one with NSA layers, got Linear without any"):
        set_impl(nn.Linear(2, 2), "auto")
    with pytest.raises(ValueError, match="module: expected one with NSA layers, got NSALanguageModel without any"):
        make_model(attention="dense").impl = "reference"
    with pytest.raises(TypeError, match=r"module: expected a torch\.nn\.Module, got int"):
        set_impl(3, "auto")


def test_a_saved_model_has_the_choice(tmp_path):
    model = make_model()
    model.impl = "reference"
    model.save_pretrained(tmp_path)
    assert NSALanguageModel.from_pretrained(tmp_path).impl == model.config.impl == "reference"


def test_a_compiled_model_compiles_once_more():
    torch._dynamo.reset()
    model = make_model()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    ids = draw_ids(1, 20)
    expected = compiled(ids)
    compiled.impl = "triton"
    assert model.impl == "triton"
    with pytest.raises(Exception, match="got 'triton'"):
        compiled(ids)
    set_impl(compiled, "reference")
    assert torch.equal(compiled(ids), expected)


@pytest.mark.parametrize("kind", ["native", "converted"])
def test_models_of_transformers(kind, tmp_path):
    pytest.importorskip("transformers")
    if kind == "native":
        from nsa_compile.hf import NsaForCausalLM

        model = NsaForCausalLM.from_language_model(make_model())
        other = type(model)(model.config)
        layers, saved = model.model.layers[0].attn, lambda config: config.impl
    else:
        from transformers import LlamaConfig, LlamaForCausalLM

        from nsa_compile import convert

        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
        config = LlamaConfig(vocab_size=31, num_hidden_layers=1, **sizes, bos_token_id=None, eos_token_id=None)
        model = convert(LlamaForCausalLM(config), l=4, d=2, l_sel=4, n_sel=4, w=8).double()
        other = type(model)(model.config)
        layers, saved = model.model.layers[0].self_attn, lambda config: config.nsa["impl"]
    ids = draw_ids(1, 20)
    expected = model(ids).logits
    with pytest.raises(ValueError, match=BOGUS):
        model.impl = "bogus"
    model.impl = "triton"
    assert model.config is model.model.config and saved(model.config) == layers.impl == model.impl == "triton"
    assert saved(other.config) == other.impl == "auto"
    with pytest.raises(ValueError, match=REFUSED):
        model(ids)
    model.impl = "reference"
    assert torch.equal(model(ids).logits, expected)
    model.save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path).impl == "reference"
