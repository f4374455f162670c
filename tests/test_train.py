"""The training loop: schedule, checkpoints, exact resume, interruption, losses that are not finite."""

import dataclasses
import itertools
import json
import math
import os
import signal

import pytest
import torch
from models import needs_compiler

from nsa_compile import NSAConfig, NSALanguageModel
from nsa_compile.checkpoints import find_checkpoint
from nsa_compile.data import Corpus, build_shards, unigram_entropy
from nsa_compile.metrics import METRICS_FILE
from nsa_compile.train import TrainConfig, check_mesh, make_batches, make_optimizer, train

MODEL = NSAConfig(
    dim=16, n_heads=2, n_kv_groups=1, d_k=8, d_v=8, l=4, d=2, l_sel=4, n_sel=3, w=6, n_layers=1, vocab_size=256
)
CONFIG = TrainConfig(
    steps=8, seq_len=24, batch_size=2, lr=1e-2, warmup=2, compile="none", eval_every=4, eval_batches=2, save_every=3
)


def make_model(seed: int = 0) -> NSALanguageModel:
    torch.manual_seed(seed)
    return NSALanguageModel(MODEL)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(30):
        (folder / f"{i}.txt").write_text("".join(f"{i} times {j} is {i * j}\n" for j in range(9)))
    return build_shards([folder], folder / "shards", held_out=0.15)


def read_metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]


def losses(folder) -> list[tuple]:
    return [(m["step"], m["loss"], m["grad_norm"], m["lr"], m.get("val_loss")) for m in read_metrics(folder)]


@pytest.fixture(scope="module")
def unbroken(corpus, tmp_path_factory):
    """A run without a break: its folder and final weights."""
    folder, model = tmp_path_factory.mktemp("unbroken"), make_model()
    train(model, corpus, CONFIG, folder)
    return folder, model.state_dict()


def test_the_learning_rate_rises_linearly_and_falls_as_a_cosine():
    config = TrainConfig(steps=110, warmup=10, lr=1.0, final_lr=0.1)
    rates = [config.lr_at(step) for step in range(110)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == pytest.approx(1.0) and rates[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert (rates[10 + 33] + rates[109 - 33]) / 2 == pytest.approx(0.55)


@pytest.mark.parametrize(
    "name, value",
    [("steps", 0), ("seq_len", 1), ("batch_size", 0), ("lr", 0.0), ("lr", math.nan), ("warmup", -1), ("clip", -1.0),
     ("final_lr", 2.0), ("dtype", "fp8"), ("weight_decay", -0.1), ("save_every", 0), ("max_documents", 0),
     ("keep", 0), ("timeout", 0.0), ("compile", "all"), ("checkpointing", "some"), ("peak_tflops", -1.0)],
)  # fmt: skip
def test_bad_settings_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected .*, got"):
        TrainConfig(**{name: value})


def test_only_matrices_decay():
    model = make_model()
    decay, keep = make_optimizer(model, CONFIG).param_groups
    assert decay["weight_decay"] == CONFIG.weight_decay and keep["weight_decay"] == 0
    assert {p.ndim for p in decay["params"]} == {2} and {p.ndim for p in keep["params"]} == {1}
    assert len(decay["params"]) + len(keep["params"]) == len(list(model.parameters()))


def test_a_run_leaves_metrics_and_one_checkpoint(unbroken):
    folder, weights = unbroken
    metrics = read_metrics(folder)
    assert [m["step"] for m in metrics] == list(range(1, 9))
    assert all({"step", "loss", "lr", "grad_norm", "tokens_per_s"} <= set(m) for m in metrics)
    assert [m["step"] for m in metrics if "val_loss" in m] == [4, 8]
    assert sorted(path.name for path in folder.iterdir()) == [METRICS_FILE, "step-000008"]
    loaded = NSALanguageModel.from_pretrained(find_checkpoint(folder)).state_dict()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "joined"])
def test_training_learns(corpus, tmp_path, packed):
    config = dataclasses.replace(CONFIG, steps=60, batch_size=8, eval_every=60, packed=packed)
    result = train(make_model(), corpus, config, tmp_path)
    assert result.val_loss < unigram_entropy(corpus.train) - 0.2


class Stopped(Exception):
    """Stands for a process that dies."""


@pytest.mark.parametrize("dies_after", [4, 6])
def test_a_resumed_run_equals_an_unbroken_one(corpus, tmp_path, unbroken, dies_after):
    def die(metrics):
        if metrics.step == dies_after:
            raise Stopped

    with pytest.raises(Stopped):
        train(make_model(), corpus, CONFIG, tmp_path, on_step=die)
    assert find_checkpoint(tmp_path).name == "step-000003"
    other_weights = make_model(seed=1)
    result = train(other_weights, corpus, CONFIG, tmp_path, resume=True)
    assert result.step == 8 and not result.interrupted
    assert losses(tmp_path) == losses(unbroken[0])
    assert all(torch.equal(x, unbroken[1][name]) for name, x in other_weights.state_dict().items())


def test_sigint_saves_and_the_run_resumes_exactly(corpus, tmp_path, unbroken):
    before = signal.getsignal(signal.SIGINT)

    def interrupt(metrics):
        if metrics.step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    result = train(make_model(), corpus, CONFIG, tmp_path, on_step=interrupt)
    assert result.interrupted and result.step == 5 and result.checkpoint.name == "step-000005"
    assert signal.getsignal(signal.SIGINT) is before
    train(make_model(seed=1), corpus, CONFIG, tmp_path, resume=True)
    assert losses(tmp_path) == losses(unbroken[0])


def test_a_second_sigint_ends_the_run_at_once(corpus, tmp_path):
    def interrupt(metrics):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the second one comes through")

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background process ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            train(make_model(), corpus, CONFIG, tmp_path, on_step=interrupt)
    finally:
        signal.signal(signal.SIGINT, before)


@needs_compiler
def test_compiled_training_resumes_exactly(corpus, tmp_path):
    torch.compiler.reset()
    config = dataclasses.replace(CONFIG, steps=4, save_every=2, compile="model")
    train(make_model(), corpus, config, tmp_path / "whole")

    def interrupt(metrics):
        if metrics.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    train(make_model(), corpus, config, tmp_path / "broken", on_step=interrupt)
    train(make_model(), corpus, config, tmp_path / "broken", resume=True)
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")


def test_a_loss_that_is_not_finite_stops_before_the_update(corpus, tmp_path):
    model = make_model()
    poisoned = {}

    def poison(metrics):
        if metrics.step == 4:
            with torch.no_grad():
                model.norm.weight[0] = math.inf
            poisoned.update({name: x.clone() for name, x in model.state_dict().items()})

    with pytest.raises(FloatingPointError, match=r"loss: expected a finite number at step 5, got (nan|inf)"):
        train(model, corpus, CONFIG, tmp_path, on_step=poison)
    assert all(torch.equal(x, poisoned[name]) for name, x in model.state_dict().items())
    assert find_checkpoint(tmp_path).name == "step-000003"


def test_a_gradient_that_is_not_finite_stops_before_the_update(corpus, tmp_path):
    model = make_model()
    model.norm.weight.register_hook(lambda grad: grad * math.nan)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(FloatingPointError, match="gradient norm: expected a finite number at step 1, got nan"):
        train(model, corpus, CONFIG, tmp_path)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_what_does_not_fit_is_refused(corpus, tmp_path, unbroken):
    (tmp_path / "short.txt").write_text("x" * 24)
    short = build_shards([tmp_path / "short.txt"], tmp_path / "short")
    (tmp_path / "out").mkdir()
    tmp_path = tmp_path / "out"
    with pytest.raises(ValueError, match=r"text: expected at least seq_len \+ 1 = 25 tokens for training, got 24"):
        train(make_model(), short, CONFIG, tmp_path)
    with pytest.raises(ValueError, match="model: expected a vocab_size of 256 or more, got 255"):
        train(NSALanguageModel(dataclasses.replace(MODEL, vocab_size=255)), corpus, CONFIG, tmp_path)
    with pytest.raises(ValueError, match="resume: expected a folder with checkpoints"):
        train(make_model(), corpus, CONFIG, tmp_path, resume=True)
    assert list(tmp_path.iterdir()) == []

    folder = unbroken[0]
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"out: expected a folder without checkpoints, or resume, got"):
        train(make_model(), corpus, CONFIG, folder)
    with pytest.raises(ValueError, match=r"resume: expected the run's lr = 0\.01, got 0\.5"):
        train(make_model(), corpus, dataclasses.replace(CONFIG, lr=0.5), folder, resume=True)
    with pytest.raises(ValueError, match="resume: expected the text that the run was trained on"):
        train(make_model(), dataclasses.replace(corpus, train=corpus.validation), CONFIG, folder, resume=True)
    with pytest.raises(ValueError, match="resume: expected the model's w = 6, got 7"):
        train(NSALanguageModel(dataclasses.replace(MODEL, w=7)), corpus, CONFIG, folder, resume=True)
    assert files == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_half_written_checkpoint_does_not_count(corpus, tmp_path):
    (tmp_path / ".step-000099.part").mkdir()
    assert find_checkpoint(tmp_path) is None
    assert train(make_model(), corpus, CONFIG, tmp_path).checkpoint.name == "step-000008"


def test_bf16_computes_with_fp32_weights(corpus, tmp_path):
    model = make_model()
    classes = [type(module) for module in model.modules()]
    train(model, corpus, dataclasses.replace(CONFIG, dtype="bf16", steps=2, checkpointing="selective"), tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert [type(module) for module in model.modules()] == classes
    assert not any("forward" in vars(module) for module in model.modules())
    assert NSALanguageModel.from_pretrained(find_checkpoint(tmp_path), dtype=torch.bfloat16)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "joined"])
def test_accumulated_parts_are_one_batch(corpus, tmp_path, packed):
    """Parts of unequal numbers of targets, each weighted by its own."""
    config = dataclasses.replace(CONFIG, batch_size=4, steps=4, packed=packed)
    runs = {}
    for parts in (1, 2, 4):
        model = make_model()
        train(model, corpus, dataclasses.replace(config, accumulate=parts), tmp_path / str(parts))
        runs[parts] = losses(tmp_path / str(parts)), model.state_dict()
    for parts in (2, 4):
        for now, before in zip(runs[parts][0], runs[1][0], strict=True):
            assert [x for x in now if x] == pytest.approx([x for x in before if x], rel=2e-5)
        for name, weight in runs[parts][1].items():
            torch.testing.assert_close(weight, runs[1][1][name], rtol=1e-3, atol=2e-5)


def test_a_non_finite_loss_names_its_rows(corpus, tmp_path):
    model, config = make_model(), dataclasses.replace(CONFIG, batch_size=4, accumulate=2)
    rows = make_batches(corpus.train, config, seed=config.seed).rows(0, rank=1, world_size=2)
    loss, calls = model.loss, []

    def poisoned(ids, cu_seqlens=None):
        calls.append(ids)
        return loss(ids, cu_seqlens) * (math.nan if len(calls) == 2 else 1.0)

    model.loss = poisoned
    with pytest.raises(FloatingPointError, match=rf"step 1, got nan for rows {rows[0]}, {rows[1]} of \d+ \(documents "):
        train(model, corpus, config, tmp_path)


def test_settings_that_do_not_divide_are_refused(corpus, tmp_path):
    with pytest.raises(ValueError, match="accumulate: expected a divisor of batch_size = 2, got 3"):
        dataclasses.replace(CONFIG, accumulate=3)
    for shape, changes, words in (
        ((2, 1, 1), {"accumulate": 2}, r"batch_size: expected a multiple of dp \* accumulate = 2 \* 2, got 2"),
        ((1, 1, 1), {"compile": "model"}, "compile: expected 'block' or 'none' with a mesh, .* got 'model'"),
        ((1, 1, 2), {}, "tp: expected a divisor of n_kv_groups = 1, got 2"),
        ((1, 2, 1), {"seq_len": 25}, r"seq_len: expected rows of a multiple of 2 \* cp \* d = 8 tokens, .* got 50"),
    ):
        with pytest.raises(ValueError, match=words):
            check_mesh(dataclasses.replace(CONFIG, **changes), MODEL, shape)
    with pytest.raises(ValueError, match=r"tp: expected a divisor of 4 \* dim = 64, got 3"):
        check_mesh(CONFIG, dataclasses.replace(MODEL, n_heads=3, n_kv_groups=3), (1, 1, 3))
    dense = dataclasses.replace(MODEL, attention="dense")
    with pytest.raises(ValueError, match="cp: expected 1 for attention 'dense', got 2"):
        check_mesh(CONFIG, dense, (1, 2, 1))


def test_auto_resume_starts_or_continues(corpus, tmp_path, unbroken):
    def interrupt(metrics):
        if metrics.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    result = train(make_model(), corpus, CONFIG, tmp_path, resume="auto", on_step=interrupt)
    assert (result.step, result.signal) == (2, "SIGTERM")
    train(make_model(seed=1), corpus, CONFIG, tmp_path, resume="auto")
    assert losses(tmp_path) == losses(unbroken[0])
