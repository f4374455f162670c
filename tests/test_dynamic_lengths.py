"""One compiled call, rows of ever other lengths: every length around every boundary, once lengths are dynamic."""

import pytest
import torch
from models import draw_ids, make_model

from nsa_compile import NSACache, apply_rope

SIZES = {"l": 8, "d": 4, "l_sel": 8, "n_sel": 3, "w": 14, "n_layers": 1}
BOUNDARIES = (1, 4, 8, 12, 14, 24)
"""1, d, l and l_sel, l + d, w, n_sel*l_sel."""
LENGTHS = sorted({n + i for n in BOUNDARIES for i in (-1, 0, 1)} - {0}, reverse=True)
CHOICES = {"default": {}, "mlp": {"phi": "mlp", "gate": "sigmoid"}, "tied": {"tie_kv": True, "d": 8}}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=64):
        yield
    torch._dynamo.reset()


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def calls(model) -> dict:
    """Calls `(model or its loss, tokens)` by name."""

    def cached(run, t):
        with torch.no_grad():
            cache = NSACache.for_model(model, 2, 64)
            first = run(draw_ids(2, 3), cache=cache)  # a step, too
            return first, run(draw_ids(2, t, seed=t), cache=cache, lengths=int32(t, t // 2), last_only=True)

    return {
        "loss": lambda run, t: run(draw_ids(2, t)),
        "one row": lambda run, t: run(draw_ids(1, t)),
        "packed": lambda run, t: run(draw_ids(1, t), cu_seqlens=int32(0, t // 2, t)),
        "packed loss": lambda run, t: run(draw_ids(1, t), cu_seqlens=int32(0, t)),
        "lengths": lambda run, t: run(draw_ids(2, t), lengths=int32(t, (t + 1) // 2)),
        "cache": cached,
    }


NAMES = ("loss", "packed loss", "one row", "packed", "lengths", "cache")


@pytest.mark.parametrize(
    ("name", "choice"),
    [(name, "default") for name in NAMES] + [(name, x) for name in ("one row", "packed") for x in ("mlp", "tied")],
)
def test_every_length_as_third(name, choice):
    model = make_model(**SIZES | CHOICES[choice])
    call = calls(model)[name]
    function = model.loss if "loss" in name else model
    lengths = [n for n in LENGTHS if n > 1 or "loss" not in name]
    backend = "aot_eager" if (name, choice) == ("loss", "default") else "eager"
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for t in (40, 33, *lengths, 20, 29):
        got, expected = call(compiled, t), call(function, t)
        torch.testing.assert_close(got, expected)
        if "loss" in name and t in (40, 29, 12, 2):
            grads = [torch.autograd.grad(x, list(model.parameters()), allow_unused=True) for x in (got, expected)]
            torch.testing.assert_close(*grads)


def test_lengths_of_the_readme():
    """One compressed block in the third call: c = 1 once c is dynamic."""
    sizes = {"n_heads": 8, "n_kv_groups": 2, "d_k": 16, "d_v": 16, "l": 16, "d": 8, "l_sel": 16, "n_sel": 4, "w": 32}
    model = make_model(dtype=torch.float32, dim=32, n_layers=1, **sizes)
    loss = torch.compile(model.loss, fullgraph=True, backend="eager")
    for t in (200, 150, 20):
        ids = draw_ids(2, t)
        torch.testing.assert_close(loss(ids), model.loss(ids))


def test_rope_of_any_number_of_tokens():
    rope = torch.compile(apply_rope, fullgraph=True, backend="eager")
    for b, t in ((3, 9), (3, 7), (3, 1), (1, 8), (1, 1), (2, 2)):
        x = torch.randn(b, t, 2, 4)
        for positions in (torch.arange(t), torch.arange(t) + torch.arange(b)[:, None]):
            torch.testing.assert_close(rope(x, positions), apply_rope(x, positions))


@pytest.mark.parametrize("name", ["native", "converted"])
def test_models_of_transformers(name):
    pytest.importorskip("transformers")
    if name == "native":
        from nsa_compile.hf import NsaForCausalLM

        model = NsaForCausalLM.from_language_model(make_model(**SIZES))
    else:
        from transformers import LlamaConfig, LlamaForCausalLM

        from nsa_compile import convert

        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
        config = LlamaConfig(vocab_size=31, num_hidden_layers=1, **sizes, bos_token_id=None, eos_token_id=None)
        sizes = {x: SIZES[x] for x in ("l", "d", "l_sel", "n_sel", "w")}
        model = convert(LlamaForCausalLM(config), **sizes).double()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for t in (40, 33, 25, 24, 23, 13, 12, 11, 9, 8, 7, 2, 29):
        ids = draw_ids(2, t)
        mask = torch.ones_like(ids)
        mask[1, : t // 2] = 0  # on the left
        for arguments in ({"attention_mask": mask}, {"labels": ids}):
            got, expected = compiled(ids, **arguments), model(ids, **arguments)
            torch.testing.assert_close(got.logits[0], expected.logits[0])
            torch.testing.assert_close(got.loss, expected.loss)
