"""Conversion leaves other models alone, and what a converted model, checkpoint or command cannot take is refused."""

import copy
import json

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
    run,
)

from nsa_compile import NSALanguageModel, convert, load_converted

transformers = pytest.importorskip("transformers")


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
