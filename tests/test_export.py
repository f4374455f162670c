"""`torch.export` and AOTInductor: programs of the forward, of prefill and of a decode step do what the model does."""

import zipfile

import pytest
import torch
from models import draw_ids, make_model, needs_compiler
from torch.export import Dim

from nsa_compile import DecodeGraph, NSACache, export_program

CAPACITY = 64
STEP_OPS = {"cache_append", "cache_recall", "cache_write", "compress_mean", "compressed_attention", "select_blocks",
            "selected_mixture", "window_attention"}  # fmt: skip
MODELS = {
    "plain": {"impl": "reference"},
    "mlp-sigmoid-tied": {"impl": "reference", "phi": "mlp", "gate": "sigmoid", "tie_kv": True},
    "dense": {"attention": "dense"},
    "kernels": {"impl": "triton", "phi": "mlp", "n_layers": 1},
}
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter runs where no CUDA device is")
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def our_ops(program):
    names = {str(node.target) for node in program.graph.nodes}
    return {name.split(".")[1] for name in names if name.startswith("nsa_compile.")}


def saved_and_loaded(program, path):
    torch.export.save(program, path)
    return torch.export.load(path).module()


def packaged_and_loaded(program, path):
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    with zipfile.ZipFile(path) as package:
        library = next(package.read(name) for name in package.namelist() if name.endswith(".so"))
    if not any(name in library for name in (b"libstdc++.so", b"libc++.")):  # torch would crash in std::regex
        pytest.skip("the C++ compiler links its library statically; name another by CXX")
    return torch._inductor.aoti_load_package(str(path))


@torch.no_grad()
def assert_does_what_the_model_does(model, prefill, step):
    """Prompts of several lengths and batches, then steps in which row 0 is idle at times."""
    device = model.embed.weight.device
    slow = model.config.impl == "triton" and device.type == "cpu"
    for b, t in ((3, 12),) if slow else ((1, 9), (3, 12), (2, 33), (5, 17)):
        ids = draw_ids(b, t, seed=t).to(device)
        lengths = torch.arange(t, t - 2 * b, -2, dtype=torch.int32, device=device)
        cache, other = (NSACache.for_model(model, b, CAPACITY) for _ in range(2))
        expected = model(ids, cache=cache, lengths=lengths, last_only=True)
        torch.testing.assert_close(prefill(ids, lengths, other.tensors()), expected, rtol=1e-4, atol=1e-4)
        for i in range(3):
            token, lengths = expected[:, -1].argmax(-1)[:, None], torch.ones_like(lengths)
            lengths[0] = i % 3 > 0
            expected = model(token, cache=cache, lengths=lengths, last_only=True)
            torch.testing.assert_close(step(token, lengths, other.tensors()), expected, rtol=1e-4, atol=1e-4)
        for got, wanted in zip(other.tensors(), cache.tensors(), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [*list(MODELS)[:-1], pytest.param("kernels", marks=no_gpu)])
def test_saved_programs_do_what_the_model_does(name, tmp_path):
    model = make_model(torch.float32, **MODELS[name]).eval()
    prefill, step = export_program(model, CAPACITY), export_program(model, CAPACITY, tokens=1)
    few = {"cache_recall", "compress_mean", "decode_attention"}  # the kernels for a step of a few tokens
    assert our_ops(step) == {"dense": {"cache_append"}, "kernels": few}.get(name, STEP_OPS)
    loaded = (saved_and_loaded(program, tmp_path / f"{i}.pt2") for i, program in enumerate((prefill, step)))
    assert_does_what_the_model_does(model, *loaded)


@needs_compiler
@pytest.mark.parametrize("name", ["mlp-sigmoid-tied", pytest.param("kernels", marks=no_gpu)])
def test_packages_do_what_the_model_does(name, tmp_path):
    model = make_model(torch.float32, **MODELS[name] | {"n_layers": 1}).eval()
    programs = export_program(model, CAPACITY), export_program(model, CAPACITY, tokens=1)
    loaded = (packaged_and_loaded(program, tmp_path / f"{i}.pt2") for i, program in enumerate(programs))
    assert_does_what_the_model_does(model, *loaded)


@pytest.mark.parametrize("load", [saved_and_loaded, pytest.param(packaged_and_loaded, marks=needs_compiler)])
def test_forward_exports_with_any_batch_and_length(load, tmp_path):
    model = make_model(torch.float32, n_layers=1).eval()
    with torch.no_grad():
        shapes = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},)
        run = load(torch.export.export(model, (draw_ids(2, 20),), dynamic_shapes=shapes), tmp_path / "model.pt2")
        for b, t in ((1, 6), (3, 31), (2, 50)):
            ids = draw_ids(b, t, seed=t)
            torch.testing.assert_close(run(ids), model(ids), rtol=1e-4, atol=1e-4)


def test_program_of_a_model_that_has_decoded():
    """Its projections are packed then."""
    model = make_model(torch.float32, n_layers=1).eval()
    DecodeGraph(model, NSACache.for_model(model, 1, 20))
    prefill, step = export_program(model, CAPACITY), export_program(model, CAPACITY, tokens=1)
    assert_does_what_the_model_does(model, prefill.module(), step.module())


def test_program_refuses_other_lengths_and_caches():
    model = make_model(torch.float32, n_layers=1).eval()
    prefill, step = export_program(model, CAPACITY).module(), export_program(model, CAPACITY, tokens=1).module()
    ids, lengths = draw_ids(2, 20), torch.tensor([20, 20], dtype=torch.int32)
    cache = NSACache.for_model(model, 2, CAPACITY)
    for run, tokens, tensors in (
        (prefill, ids[:, :8], cache.tensors()),
        (step, ids[:, :2], cache.tensors()),
        (prefill, ids, NSACache.for_model(model, 2, CAPACITY - 1).tensors()),
    ):
        with pytest.raises(AssertionError, match="Guard failed"), torch.no_grad():
            run(tokens, lengths, tensors)
    bf16 = NSACache.for_model(model, 2, CAPACITY, dtype=torch.bfloat16)
    for counts, tensors in ((lengths.long(), cache.tensors()), (lengths, bf16.tensors())):
        with pytest.raises(RuntimeError, match="dtype"), torch.no_grad():
            prefill(ids, counts, tensors)
    assert not bf16.positions.any()
    assert not cache.positions.any()


@pytest.mark.parametrize(("l", "d", "least"), [(4, 2, 9), (32, 16, 32), (16, 16, 17)])
@pytest.mark.parametrize("room", [1, 30])
def test_prefill_takes_lengths_from_a_block_on(l, d, least, room):
    model = make_model(torch.float32, n_layers=1, l=l, d=d, l_sel=32, w=5).eval()
    bounds = export_program(model, least + room).range_constraints.values()
    assert (least, least + room) in [(int(x.lower), x.upper) for x in bounds]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"capacity": 0}, ValueError, "^capacity: expected at least 1, got 0$"),
        ({"capacity": 9}, ValueError, "^capacity: expected at least 10 for a prefill of any length, got 9$"),
        ({"capacity": 17, "model": make_model(l=16, d=16, l_sel=32)}, ValueError, "^capacity: expected at least 18 "),
        ({"capacity": 20, "tokens": 21}, ValueError, "^tokens: expected 1 … 20, got 21$"),
        ({"capacity": 20, "tokens": "1"}, TypeError, "^tokens: expected an int, got str$"),
        ({"capacity": 20, "dtype": torch.int32}, ValueError, "^dtype: expected float16"),
        ({"model": torch.nn.Linear(2, 2), "capacity": 20}, ValueError, "^model: expected a module with attention"),
        ({"model": torch.compile(torch.nn.Linear(2, 2)), "capacity": 20}, TypeError, "^model: expected one not"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_program_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        export_program(**{"model": make_model(torch.float32, n_layers=1)} | arguments)


@pytest.mark.parametrize("load", [saved_and_loaded, packaged_and_loaded])
@pytest.mark.parametrize("phi", [pytest.param(phi, marks=gpu) for phi in ("avg", "mlp")])
def test_programs_run_the_kernels_on_a_gpu(phi, load, tmp_path):
    model = make_model(torch.float32, phi=phi, impl="triton").eval().cuda()
    programs = export_program(model, CAPACITY), export_program(model, CAPACITY, tokens=1)
    assert "decode_attention" in our_ops(programs[1]) and "selected_mixture" in our_ops(programs[0])
    loaded = (load(program, tmp_path / f"{i}.pt2") for i, program in enumerate(programs))
    assert_does_what_the_model_does(model, *loaded)
