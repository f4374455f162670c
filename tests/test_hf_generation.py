"""Ways of transformers to generate that models of NSA, native and converted, refuse or take as they are."""

from __future__ import annotations

import pytest
import torch
from models import MODEL, draw_ids, randomize
from test_convert import make_pair

transformers = pytest.importorskip("transformers")

from nsa_compile.hf import NsaConfig, NsaForCausalLM  # noqa: E402

GREEDY = {"max_new_tokens": 4, "do_sample": False}


def make(kind: str):
    if kind == "native":
        return randomize(NsaForCausalLM(NsaConfig(**MODEL)).to(torch.float32)).eval()
    return make_pair(kind)[1]


@pytest.fixture(params=["native", "llama", "mistral-sliding"])
def model(request):
    return make(request.param)


def test_continuous_batching_is_refused_at_the_start(model):
    message = rf"^generate_batch: expected a model of dense attention, .* got {type(model).__name__}: use generate"
    for prompts in ([[1, 2, 3]], []):
        with pytest.raises(ValueError, match=message):
            model.generate_batch(prompts, max_new_tokens=3)
    with pytest.raises(ValueError, match=message):
        model.init_continuous_batching()
    with pytest.raises(ValueError, match=message), model.continuous_batching_context_manager():
        pass


@pytest.mark.parametrize("kind", ["native", "llama"])
def test_generate_runs_as_it_is_within_torch_compile(kind):
    model, ids = make(kind), draw_ids(2, 9)
    expected = model.generate(ids, **GREEDY)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert torch.equal(torch.compile(model.generate)(ids, **GREEDY), expected)
    assert torch.equal(torch.compile(lambda x: model.generate(x + 0, **GREEDY), backend="eager")(ids), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 1  # of x + 0
    with pytest.raises(torch._dynamo.exc.Unsupported, match="compile the model instead"):
        torch.compile(lambda x: model.generate(x + 0, **GREEDY), fullgraph=True, backend="eager")(ids)


def test_the_models_still_say_that_they_generate(model):
    assert type(model).can_generate() and model.generation_config is not None
