"""Activation checkpointing and mixed precision: which ops run again, equal gradients, one graph, fp32 weights."""

from collections import Counter

import pytest
import torch
from models import draw_ids, make_model
from torch.utils._python_dispatch import TorchDispatchMode

from nsa_compile.ops import compression, selection, window
from nsa_compile.precision import computing_in
from nsa_compile.recompute import MODES, recomputing, unwrap_forward, wrap_forward

BACKEND, GRAPH = "aot_eager_decomp_partition", {"fullgraph": True, "dynamic": False}
"""Graphs as Inductor gets them, without its minutes of C++."""
OPS = ("compress_mean", "compressed_attention", "select_blocks", "selected_mixture", "window_attention")
FUNCTIONS = (
    (compression, "compress_mean"), (compression, "compressed_attention"), (selection, "select_blocks"),
    (selection, "selected_attention"), (window, "window_attention"),
)  # fmt: skip


class Count(TorchDispatchMode):
    """How often each op is computed: an outer mode sees none of those that checkpointing takes from what it kept."""

    def __init__(self) -> None:
        super().__init__()
        self.of = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.of[func.name().split("::")[1].split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def run(model, ids):
    """The loss, the gradients, and how often each op ran."""
    with Count() as count:
        value = model.loss(ids)
        value.backward()
    return value.item(), {name: p.grad for name, p in model.named_parameters()}, count.of


def counting(counts, name, function):
    def call(*args, **kwargs):
        counts[name] += 1
        return function(*args, **kwargs)

    return call


def checkpointed(mode, dtype=torch.float64, **changes):
    model = make_model(dtype, **changes)
    for block in model.layers:
        wrap_forward(block, lambda forward: recomputing(forward, mode))
    return model


@pytest.mark.parametrize("mode", MODES)
def test_attention_does_not_run_again(mode):
    ids = draw_ids(2, 20)
    loss, gradients, counts = run(make_model(), ids)
    again = run(checkpointed(mode), ids)
    assert again[0] == loss
    assert all(torch.equal(grad, gradients[name]) for name, grad in again[1].items())
    for op in OPS:
        assert counts[op] == (4 if op == "compress_mean" else 2)
        assert again[2][op] == counts[op] * (2 if mode == "full" else 1)
    extra = again[2]["mm"] - counts["mm"]
    assert extra > 10 if mode in ("selective", "full") else extra == 0


def test_dense_attention_does_not_run_again():
    ids = draw_ids(2, 20)
    name = "_scaled_dot_product_flash_attention_for_cpu"
    for mode, times in (("none", 2), ("selective", 2), ("full", 4)):
        assert run(checkpointed(mode, attention="dense", d_v=6), ids)[2][name] == times


@pytest.mark.parametrize("whole", [False, True], ids=["block", "model"])
def test_compiled_attention_does_not_run_again(whole, monkeypatch):
    torch.compiler.reset()
    ids = draw_ids(2, 20)
    loss, gradients, _ = run(make_model(torch.float32, n_layers=1), ids)
    model = checkpointed("selective", torch.float32, n_layers=1)
    if not whole:
        wrap_forward(model.layers[0], lambda forward: torch.compile(forward, backend=BACKEND, **GRAPH))
    compiled = torch.compile(model.loss, backend=BACKEND, **GRAPH) if whole else model.loss
    compiled(ids).backward()
    model.zero_grad()
    counts = Counter()
    for module, name in FUNCTIONS:
        monkeypatch.setattr(module, name, counting(counts, name, getattr(module, name)))
    value = compiled(ids)
    value.backward()
    assert value.item() == pytest.approx(loss, rel=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-3, atol=1e-4)
    assert [counts[name] for _, name in FUNCTIONS] == [2, 1, 1, 1, 1]


def test_blocks_share_one_graph():
    """More of them than dynamo would compile again for."""
    torch.compiler.reset()
    model, graphs = checkpointed("selective", torch.float32, n_layers=10), []

    def keep_graph(graph, inputs):
        graphs.append(graph)
        return graph

    with computing_in(model, torch.bfloat16):
        for block in model.layers:
            wrap_forward(block, lambda forward: torch.compile(forward, backend=keep_graph, **GRAPH))
        model.loss(draw_ids(1, 20)).backward()
    assert len(graphs) == 1


def test_a_block_gets_its_forward_back():
    model = checkpointed("full")
    unwrap_forward(model.layers[0])
    assert "forward" not in vars(model.layers[0]) and "forward" in vars(model.layers[1])
    with pytest.raises(ValueError, match=r"checkpointing: expected one of 'none', .*, got 'some'"):
        recomputing(model.forward, "some")


@pytest.mark.parametrize("changes", [{}, {"phi": "mlp", "gate": "sigmoid"}, {"tie_embeddings": True}], ids=str)
def test_bf16_computes_with_fp32_master_weights(changes):
    ids = draw_ids(2, 20)
    model, half = make_model(torch.float32, **changes), make_model(torch.bfloat16, **changes)
    classes = [type(module) for module in model.modules()]
    with torch.no_grad():
        expected = half.loss(ids)
    with computing_in(model, torch.bfloat16):
        assert model(ids).dtype == torch.bfloat16
        loss = model.loss(ids)
        assert list(model.state_dict()) == list(half.state_dict())
        loss.backward()
    assert loss.item() == expected.item()
    assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {torch.float32}
    assert [type(module) for module in model.modules()] == classes
    assert model(ids).dtype == torch.float32


@pytest.mark.parametrize("whole", [False, True], ids=["block", "model"])
def test_mixed_precision_is_one_graph(whole):
    torch.compiler.reset()
    ids, model = draw_ids(1, 20), checkpointed("selective", torch.float32, n_layers=1)
    with computing_in(model, torch.bfloat16):
        expected = model.loss(ids).item()
        loss = torch.compile(model.loss, backend=BACKEND, **GRAPH) if whole else model.loss
        if not whole:
            wrap_forward(model.layers[0], lambda forward: torch.compile(forward, backend=BACKEND, **GRAPH))
        value = loss(ids)
        value.backward()
    assert value.item() == pytest.approx(expected, rel=2e-2)
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
