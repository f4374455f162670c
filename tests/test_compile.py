"""torch.compile turns training steps, prefills and decode steps into whole graphs, and does so once."""

import pytest
import torch
from functorch.compile import make_boxed_func
from models import draw_ids, needs_compiler
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters

from nsa_compile import DecodeGraph, NSACache, NSAConfig, NSALanguageModel
from nsa_compile.graphs.prefill import prefill

SIZES = {"l": 4, "d": 2, "l_sel": 4, "n_sel": 3, "w": 7}
LENGTHS = [SIZES["l"] + SIZES["d"], 14, 23, 40, 31]  # 14 is also the length of the window's ring
STOPS_THE_HOST = ("_local_scalar_dense", "item", "tolist", "nonzero")


class Graphs:
    """A backend that keeps the graphs it is given, as Dynamo traced them and as AOT autograd lowered them."""

    def __init__(self) -> None:
        self.dynamo, self.forward, self.backward = [], [], []

    def __call__(self, module, inputs):
        self.dynamo.append(module.graph)
        return aot_autograd(fw_compiler=self.keep(self.forward), bw_compiler=self.keep(self.backward))(module, inputs)

    def keep(self, graphs):
        def compiler(module, inputs):
            graphs.append(module.graph)
            return make_boxed_func(module.forward)

        return compiler

    def targets(self) -> set[str]:
        return {str(node.target) for graph in (*self.dynamo, *self.forward, *self.backward) for node in graph.nodes}

    def assert_never_stops_the_host(self) -> None:
        targets = self.targets()
        assert any("nsa_compile" in target for target in targets)
        assert not [t for t in targets if any(part in t.split(".") for part in STOPS_THE_HOST)]


@pytest.fixture
def graphs():
    torch._dynamo.reset()
    counters.clear()
    yield Graphs()
    torch._dynamo.reset()


def make_model(**changes) -> NSALanguageModel:
    torch.manual_seed(0)
    sizes = {"dim": 16, "n_heads": 4, "n_kv_groups": 2, "d_k": 4, "d_v": 6, "n_layers": 2, "vocab_size": 50, **SIZES}
    return NSALanguageModel(NSAConfig(**{**sizes, **changes}))


@pytest.mark.parametrize("rows", ["whole", "packed", "lengths"])
@pytest.mark.parametrize(("phi", "gate"), [("avg", "softmax"), ("mlp", "sigmoid")])
def test_loss_is_one_graph_forward_and_one_backward(graphs, phi, gate, rows):
    model, ids = make_model(phi=phi, gate=gate), draw_ids(1 if rows == "packed" else 2, 40)
    options = {
        "whole": {},
        "packed": {"cu_seqlens": torch.tensor([0, 11, 38], dtype=torch.int32)},
        "lengths": {"lengths": torch.tensor([40, 9], dtype=torch.int32)},
    }[rows]
    expected = model.loss(ids, **options)
    loss = torch.compile(model.loss, fullgraph=True, backend=graphs)(ids, **options)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    assert [len(g) for g in (graphs.dynamo, graphs.forward, graphs.backward)] == [1, 1, 1]
    graphs.assert_never_stops_the_host()
    assert "aten.cos.default" not in graphs.targets()  # a compiler would do the fp64 angles again for every head


@pytest.mark.parametrize(("attention", "expected"), [("nsa", 2), ("dense", 1)])
@torch.no_grad()
def test_angles_are_an_op_for_many_tokens_and_part_of_the_graph_for_few(graphs, attention, expected):
    """One op for each layer's tokens and one for its compressed tokens; none, with all its launches, for a step's."""
    model = make_model(attention=attention, n_layers=1)
    run, cache = torch.compile(model, fullgraph=True, backend=graphs), NSACache.for_model(model, 1, 64)
    run(draw_ids(1, 40), cache=cache)
    found = [str(node.target) for node in graphs.forward[0].nodes if "rope_turns" in str(node.target)]
    assert len(found) == expected
    run(draw_ids(1, 1), cache=cache)
    assert not [node for node in graphs.forward[1].nodes if "rope_turns" in str(node.target)]


@pytest.mark.parametrize("cached", [False, True], ids=["plain", "cached"])
@pytest.mark.parametrize("attention", ["nsa", "dense"])
def test_prefill_of_five_lengths_compiles_at_most_twice(graphs, attention, cached):
    model = make_model(attention=attention, phi="mlp")
    prefill = torch.compile(model, fullgraph=True, backend=graphs)
    with torch.no_grad():
        cache = NSACache.for_model(model, 2, 60) if cached else None
        for length in LENGTHS:
            ids = draw_ids(2, length)
            torch.testing.assert_close(prefill(ids, cache), model(ids))
            if cache is not None:
                cache.reset()
    assert len(graphs.dynamo) <= 2
    if attention == "nsa":
        graphs.assert_never_stops_the_host()


def decode(step, cache, n):
    """Logits of n greedy one-token steps, row 1 idle in every third one."""
    out, token = [], torch.zeros(2, 1, dtype=torch.int64)
    for i in range(n):
        lengths = torch.tensor([1, 0 if i % 3 == 2 else 1], dtype=torch.int32)
        out.append(step(token, cache, lengths=lengths))
        token = out[-1].argmax(-1)
    return torch.stack(out)


@pytest.mark.parametrize("phi", ["avg", "mlp"])
def test_two_hundred_decode_steps_compile_once(graphs, phi):
    model = make_model(phi=phi)
    with torch.no_grad():
        expected = decode(model, NSACache.for_model(model, 2, 210), 201)
        step, cache = torch.compile(model, fullgraph=True, backend=graphs), NSACache.for_model(model, 2, 210)
        first = decode(step, cache, 1)
        cache.reset()
        with torch.compiler.set_stance("fail_on_recompile"):
            got = decode(step, cache, 201)
    torch.testing.assert_close(first, expected[:1])
    torch.testing.assert_close(got, expected)
    assert len(graphs.dynamo) == 1
    graphs.assert_never_stops_the_host()


@needs_compiler
def test_two_hundred_decode_steps_compile_once_with_reduced_overhead(graphs):
    model = make_model(n_layers=1)
    with torch.no_grad():
        expected = decode(model, NSACache.for_model(model, 2, 210), 201)
        step, cache = torch.compile(model, fullgraph=True, mode="reduce-overhead"), NSACache.for_model(model, 2, 210)
        decode(step, cache, 1)
        cache.reset()
        with torch.compiler.set_stance("fail_on_recompile"):
            got = decode(step, cache, 201)
    torch.testing.assert_close(got, expected)
    assert counters["stats"]["unique_graphs"] == 1  # that no CUDA graph is skipped, test_gpu.py asserts


@needs_compiler
def test_512_steps_of_rows_of_unequal_length_compile_once_and_draw_the_same(graphs):
    """The loop of a decode graph, as it runs where nothing can be captured; fp64, so that no draw is near a tie."""
    model = make_model(phi="mlp").double().eval()
    prompts = [[3], [1, 4, 1, 5, 9], list(range(40))]

    def draw(graph):
        prefill(model, [prompt[:-1] for prompt in prompts], graph.cache, chunk=40)
        for row, prompt in enumerate(prompts):
            graph.start(row, prompt[-1], max_new_tokens=512, temperature=(0.0, 1.0, 0.5)[row], seed=row)
        graph.step(512)
        return [update.tokens for update in graph.collect()]

    expected = draw(DecodeGraph(model, NSACache.for_model(model, 3, 560)))
    graph = DecodeGraph(torch.compile(model, fullgraph=True), NSACache.for_model(model, 3, 560))
    with torch.compiler.set_stance("fail_on_recompile"):
        got = draw(graph)
    assert got == expected and [len(row) for row in got] == [512] * 3
    assert counters["stats"]["unique_graphs"] == 1


def test_a_graph_steps_in_inference_mode_without_compiling_again(graphs):
    model = make_model(phi="mlp")
    graph = DecodeGraph(torch.compile(model, fullgraph=True, backend=graphs), NSACache.for_model(model, 2, 40))
    with torch.inference_mode(), torch.compiler.set_stance("fail_on_recompile"):
        graph.start(0, 3, max_new_tokens=9)
        graph.step(9)
    assert len(graph.collect()[0].tokens) == 9 and len(graphs.dynamo) == 1


def test_a_second_cache_of_the_same_shape_recompiles_nothing(graphs):
    model = make_model()
    with torch.no_grad():
        step = torch.compile(model, fullgraph=True, backend=graphs)
        for _ in range(3):
            decode(step, NSACache.for_model(model, 2, 20), 3)
    assert len(graphs.dynamo) == 1
