"""`nsa-compile profile` at tiny sizes: what its traces hold, how its numbers add up; TensorBoard opens them."""

from __future__ import annotations

import ast
import copy
import csv
import gzip
import itertools
import json
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from models import needs_compiler
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

import nsa_compile
from nsa_compile import NSAConfig, NSALanguageModel, cli
from nsa_compile.custom_ops.ranges import in_range, kernel_part
from nsa_compile.profile.run import module_ranges
from nsa_compile.profile.summary import Cost, diff, load_summary, summarize
from nsa_compile.profile.trace import analyze, covered, read_events

SIZES = {
    "dim": 32, "n_heads": 4, "n_kv_groups": 2, "d_k": 8, "d_v": 8, "l": 8, "d": 4, "l_sel": 8, "n_sel": 4, "w": 12,
    "n_layers": 1, "vocab_size": 64,
}  # fmt: skip
TOKENS, BATCH, ACTIVE = 48, 2, 2
OPTIONS = [
    *itertools.chain.from_iterable((f"--{name.replace('_', '-')}", size) for name, size in SIZES.items()),
    "--device", "cpu", "--tokens", TOKENS, "--batch", BATCH, "--wait", 0, "--warmup", 1, "--active", ACTIVE,
]  # fmt: skip
BRANCHES = ("cmp", "choice", "slc", "win", "gates")
FORWARD = ("compress_mean", "compressed_attention", "select_blocks", "window_attention", "selected_mixture")
BACKWARD = tuple(f"{name}_backward" for name in FORWARD if name != "select_blocks")


def run(*arguments):
    return CliRunner().invoke(cli.app, ["profile", *(str(a) for a in arguments)])


@pytest.fixture(scope="module")
def profiles(tmp_path_factory):
    """Folders by mode, each made when first asked for, and what the command printed."""
    made = {}

    def get(mode):
        if mode not in made:
            folder = tmp_path_factory.mktemp("profile") / "out"
            result = run(mode, "--no-compile", "--out", folder, *OPTIONS)
            assert result.exit_code == 0, result.output
            made[mode] = folder, result.stdout
        return made[mode]

    return get


MODES = ("train", "prefill", "decode")


def spans(folder):
    return [e for e in read_events(folder / "trace.json.gz") if e.get("ph") == "X"]


def enclosing(event, events, category):
    """Names of what an event is in."""
    end = event["ts"] + event["dur"]
    return [
        e["name"] for e in events
        if e.get("cat") == category and e["tid"] == event["tid"] and e["ts"] <= event["ts"]
        and end <= e["ts"] + e["dur"] and e is not event
    ]  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_traces_show_ops_by_name_and_ranges_by_branch(profiles, mode):
    check_names(*profiles(mode), mode)


def check_names(folder, shown, mode, compiled=False):
    events = spans(folder)
    ops = {e["name"] for e in events if e.get("cat") == "cpu_op"}
    expected = (*FORWARD, *BACKWARD) if mode == "train" else FORWARD
    cached = () if mode == "train" else ("cache_append", "cache_write", "cache_recall")
    assert {f"nsa_compile::{name}" for name in (*expected, *cached)} <= ops
    ranges = [e for e in events if e.get("cat") == "user_annotation" and e["name"].startswith("nsa/")]
    names = {e["name"] for e in ranges}
    assert {f"nsa/{branch}" for branch in BRANCHES} <= names
    assert ("nsa/cache" in names) == (mode != "train")
    backward = {f"nsa/{branch} backward" for branch in BRANCHES if branch != "choice"}
    assert names & backward == (backward if mode == "train" else set())
    for event in ranges:
        if event["name"] in ("nsa/win", "nsa/slc backward"):
            op = "window_attention" if event["name"] == "nsa/win" else "selected_mixture_backward"
            assert f"nsa_compile::{op}" in enclosing(event, events, "cpu_op")
    assert {"nsa/projections", "nsa/mlp", "nsa/norm", "nsa/vocabulary", "nsa/layer"} <= names or compiled
    assert any("cpp_fused" in name for name in ops) == compiled


@pytest.mark.parametrize("mode", MODES)
def test_the_summary_adds_up(profiles, mode):
    check_sums(*profiles(mode), mode)


def check_sums(folder, shown, mode, compiled=False):
    s = load_summary(folder)
    events = spans(folder)
    steps = [e for e in events if e["name"].startswith("ProfilerStep#")]
    assert s["steps"] == len(steps) == ACTIVE
    assert s["step_ms"] == pytest.approx(sum(e["dur"] for e in steps) / ACTIVE / 1000)
    parts = {part["part"]: part for part in s["parts"]}
    assert {*BRANCHES} <= parts.keys()
    assert sum(part["ms"] for part in s["parts"]) == pytest.approx(s["busy_ms"])
    assert s["busy_ms"] + s["gap_ms"] == pytest.approx(s["step_ms"]) and 0 < s["gap_ms"] < s["step_ms"]
    for name, part in parts.items():
        assert part["ms"] == pytest.approx(sum(part[f"{phase}_ms"] for phase in ("forward", "backward", "update")))
        assert (part["backward_ms"] > 0) >= (mode == "train" and name in BRANCHES and name != "choice")
        assert part["update_ms"] == 0 or mode == "train"
    if mode == "train":
        assert parts["choice"]["backward_ms"] == 0 and parts["optimizer"]["update_ms"] > 0
    inside = [(step["ts"], step["ts"] + step["dur"]) for step in steps]
    called = [e for e in events if e.get("cat") == "cpu_op" and any(a <= e["ts"] < z for a, z in inside)]
    assert s["launches"] * ACTIVE == pytest.approx(len(called))
    assert s["launches"] == pytest.approx(sum(part["launches"] for part in s["parts"]))
    assert s["kernels"] == sorted(s["kernels"], key=lambda row: -row["ms"])
    with (folder / "kernels.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["kernel"] for row in rows] == [row["kernel"] for row in s["kernels"]]
    assert sum(float(row["ms"]) for row in rows) == pytest.approx(s["busy_ms"])
    assert s["tokens_per_s"] == pytest.approx(1000 * BATCH * (1 if mode == "decode" else TOKENS) / s["step_ms"])
    shown = " ".join(shown.split())
    for words in ("time per branch", "gaps", "most expensive kernels", "TFLOP/s", "https://ui.perfetto.dev"):
        assert words in shown


@pytest.mark.parametrize("mode", MODES)
def test_time_of_an_op_is_time_of_its_branch(profiles, mode):
    check_branches(*profiles(mode), mode)


def check_branches(folder, shown, mode, compiled=False):
    s = load_summary(folder)
    ops = {op["op"].removeprefix("nsa_compile::"): op for op in s["ops"]}
    parts = {part["part"]: part for part in s["parts"]}
    spent = {
        op: sum(row["ms"] for name, row in ops.items() if name.removesuffix("_backward") == op) for op in FORWARD
    }  # fmt: skip
    for branch, op in (("win", "window_attention"), ("choice", "select_blocks")):
        assert 0 < spent[op] <= parts[branch]["ms"] * (1 + 1e-6)
        assert parts[branch]["ms"] < 2 * spent[op]  # the rest is autograd's, around the op
    mixed = spent["selected_mixture"]
    assert 0 < parts["slc"]["ms"] < 2 * mixed and mixed <= (parts["slc"]["ms"] + parts["gates"]["ms"]) * (1 + 1e-6)


def test_rates_come_from_the_formulas_and_the_tensors(profiles):
    check_rates(profiles("train")[0])


def check_rates(folder):
    s = load_summary(folder)
    model = NSALanguageModel(NSAConfig(**SIZES))
    with FlopCounterMode(display=False) as counter:
        model.loss(torch.zeros(BATCH, TOKENS, dtype=torch.int64)).backward()
    counted = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    ops = {op["op"].removeprefix("nsa_compile::"): op for op in s["ops"]}
    for name in (*FORWARD, *BACKWARD):
        op = ops[name]
        assert op["gflop"] * 1e9 == pytest.approx(counted[f"nsa_compile.{name}"])
        assert op["tflop_per_s"] == pytest.approx(op["gflop"] / op["ms"])
        assert op["gb_per_s"] == pytest.approx(op["mb"] / op["ms"])
    n, g, c = SIZES["n_heads"], SIZES["n_kv_groups"], SIZES["d_k"]
    assert ops["window_attention"]["mb"] * 1e6 == 4 * BATCH * TOKENS * (2 * n * c + 2 * g * c + n)
    assert ops["compress_mean"]["calls"] == 2


def test_a_prompt_has_the_flops_of_what_its_queries_see(profiles):
    """Fewer than a query at the end of the cache's buffers would."""
    flops = {
        mode: {op["op"]: op["gflop"] for op in load_summary(profiles(mode)[0])["ops"]} for mode in ("train", "prefill")
    }
    for name in FORWARD[1:]:
        op = f"nsa_compile::{name}"
        assert flops["prefill"][op] == pytest.approx(flops["train"][op])


def test_bytes_leave_out_the_cache_that_an_op_writes_into(profiles):
    ops = {op["op"].removeprefix("nsa_compile::"): op for op in load_summary(profiles("decode")[0])["ops"]}
    g, c = SIZES["n_kv_groups"], SIZES["d_k"]
    new, counts = 4 * BATCH * g * c, 2 * 4 * BATCH  # positions and count
    assert ops["cache_append"]["calls"] == 6 and ops["cache_append"]["mb"] * 1e6 == pytest.approx(6 * (new + counts))


@needs_compiler
def test_a_compiled_training_step_shows_the_same(tmp_path):
    """In one test: it compiles for a while."""
    result = run("train", "--compile", "--out", tmp_path / "out", *OPTIONS)
    assert result.exit_code == 0, result.output
    check_names(tmp_path / "out", result.stdout, "train", compiled=True)
    check_sums(tmp_path / "out", result.stdout, "train")
    check_branches(tmp_path / "out", result.stdout, "train")
    check_rates(tmp_path / "out")


@pytest.mark.parametrize("mode", ["train", "decode"])
def test_memory_has_a_peak_and_what_was_there(profiles, mode):
    folder, _ = profiles(mode)
    memory = json.loads((folder / "memory.json").read_text())
    assert memory["peak_bytes"] == max(total for _, total in memory["timeline_us_bytes"])
    assert 0 < sum(memory["allocated_at_peak"].values()) <= memory["peak_bytes"]
    assert set(memory["allocated_at_peak"]) & {*BRANCHES, "layer", "mlp"}
    assert load_summary(folder)["memory"]["peak_bytes"] == memory["peak_bytes"]


def test_a_diff_finds_a_planted_change(profiles, tmp_path):
    folder, _ = profiles("train")
    a = load_summary(folder)
    b = copy.deepcopy(a)
    row = next(row for row in b["kernels"] if row["part"] == "win" and row["phase"] == "backward")
    row["ms"] += 100.0
    b["parts"] = [p | {"ms": p["ms"] + 100.0 * (p["part"] == "win")} for p in b["parts"]]
    b["step_ms"] += 100.0
    b["kernels"].append({"kernel": "planted_kernel", "part": "slc", "phase": "forward", "ms": 50.0, "launches": 3.0})
    gone = next(r for r in reversed(b["kernels"]) if r["part"] == "choice")
    b["kernels"].remove(gone)
    b["settings"]["dtype"] = "bf16"
    (tmp_path / "b.json").write_text(json.dumps(b))
    changes = diff(a, load_summary(tmp_path / "b.json"))
    first, second = changes["kernels"][:2]
    assert [first[key] for key in ("kernel", "part", "phase")] == [row["kernel"], "win", "backward"]
    assert first["ms_change"] == pytest.approx(100.0)
    assert second["kernel"] == "planted_kernel" and second["ms_a"] == 0 and second["launches_b"] == 3.0
    lost = next(x for x in changes["kernels"] if x["ms_b"] == 0 and x["part"] == "choice")
    assert lost["kernel"] == gone["kernel"] and lost["ms_change"] == pytest.approx(-gone["ms"])
    assert changes["parts"][0]["part"] == "win" and changes["settings"] == {"dtype": ["fp32", "bf16"]}
    assert changes["step"]["step_ms"]["change"] == pytest.approx(100.0)
    assert all(x["ms_change"] == 0 for x in diff(a, a)["kernels"])
    result = run("--diff", folder, tmp_path / "b.json")
    assert result.exit_code == 0, result.output
    shown = " ".join(result.stdout.split())
    assert "dtype: fp32 in a, bf16 in b" in shown and "+100.000" in shown
    assert "host_launches 0.000 0.000 +0.000 time per branch" in shown
    assert "planted_kernel slc forward 0.000 50.000 +50.000 0 → 3" in shown


@pytest.mark.parametrize("change", [
    {"kernels": 1}, {"parts": [{}]}, {"host_ms": None}, {"settings": []}, {"kernels": [{"kernel": "a"}]},
])  # fmt: skip
def test_a_summary_that_is_none_is_refused(change, profiles, tmp_path):
    summary = load_summary(profiles("decode")[0])
    (tmp_path / "summary.json").write_text(json.dumps(summary | change))
    with pytest.raises(ValueError, match="diff: expected a folder of a profile"):
        load_summary(tmp_path)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((), "mode: expected one of train, prefill, decode"),
        (("sleep",), "mode: expected one of train, prefill, decode"),
        (("train", "--active", 0), "active: expected at least 1, got 0"),
        (("train", "--tokens", 1), "tokens: expected at least 2, got 1"),
        (("train", "--tokens", 0), "tokens: expected at least 2, got 0"),
        (("train", "--device", "meta"), "device: expected one that computes, got 'meta'"),
        (("train", "--device", "nonsense"), "device: expected"),
        (("train", "--l", 5, "--d", 2), "l: expected a multiple of d"),
        (("train", "--checkpoint", "nowhere", "--w", 8), "checkpoint: expected it without sizes of a model, got w"),
        (("decode", "--checkpoint", "nowhere"), "expected one with config.json"),
        (("--diff", "nowhere", "nowhere"), "diff: expected a folder of a profile or its summary.json, got nowhere"),
        (("train", "--diff", "a", "b"), "diff: expected no mode"),
    ],
)
def test_errors_are_one_line(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments, "--no-compile") if arguments[:1] == ("train",) else run(*arguments)
    assert result.exit_code == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert words in result.stderr


def test_a_folder_with_a_profile_is_left_alone(profiles):
    folder, _ = profiles("decode")
    before = (folder / "summary.json").read_bytes()
    result = run("decode", "--no-compile", "--out", folder, *OPTIONS)
    assert result.exit_code == 2 and "out: expected a folder without a profile" in result.stderr
    assert (folder / "summary.json").read_bytes() == before


def test_a_checkpoint_is_profiled_with_its_sizes(tmp_path):
    NSALanguageModel(NSAConfig(**SIZES | {"phi": "mlp", "w": 9})).save_pretrained(tmp_path / "model")
    options = ("--no-compile", "--no-memory", "--tokens", 20, "--wait", 0, "--warmup", 0, "--active", 1)
    result = run("prefill", "--checkpoint", tmp_path / "model", "--out", tmp_path / "out", "--device", "cpu", *options)
    assert result.exit_code == 0, result.output
    settings = load_summary(tmp_path / "out")["settings"]
    assert settings["model.w"] == 9 and settings["model.phi"] == "mlp" and settings["tokens"] == 20
    assert not (tmp_path / "out" / "memory.json").exists()


def test_ranges_cost_no_event_without_a_profiler_and_leave_no_hooks():
    calls = []
    body = in_range("cmp")(lambda x: calls.append(x) or x)
    assert body(3) == 3 and calls == [3]
    model = NSALanguageModel(NSAConfig(**SIZES))
    with module_ranges(model):
        assert any(module._forward_hooks for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_every_kernel_has_its_branch():
    """Names of all functions in custom_ops/kernels that are launched."""
    names = set()
    for path in (Path(nsa_compile.__file__).parent / "custom_ops" / "kernels").glob("*.py"):
        tree = ast.parse(path.read_text())
        names |= {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name.endswith("_kernel")}
    assert len(names) > 20
    assert {name for name in names if kernel_part(name) is None} == set()
    assert kernel_part("_decode_merge_kernel") == "gates" and kernel_part("triton_poi_fused_0") is None


def host(name, ts, dur, category="cpu_op", tid=1, **args):
    return {"ph": "X", "cat": category, "name": name, "pid": 1, "tid": tid, "ts": ts, "dur": dur, "args": args}


def launch(ts, correlation, tid=1, name="cudaLaunchKernel", category="cuda_runtime"):
    return host(name, ts, 1.0, category, tid, correlation=correlation)


def kernel(name, ts, dur, correlation, stream=7, category="kernel", **args):
    return {
        "ph": "X", "cat": category, "name": name, "pid": 0, "tid": stream, "ts": ts, "dur": dur,
        "args": {"correlation": correlation, "stream": stream, "device": 0, **args},
    }  # fmt: skip


def test_device_work_belongs_to_what_launched_it():
    """A trace as a GPU gives it: kernels run later than the ops that launched them, some after their step's end."""
    wide = {"Sequence number": 5}
    trace = analyze(
        [
            kernel("left_over", 90.0, 8.0, 1),  # of a step before the first one
            host("ProfilerStep#3", 100.0, 50.0, "user_annotation"),
            host("nsa/mlp", 101.0, 6.0, "user_annotation"),
            host("aten::mm", 102.0, 4.0, **wide),
            launch(103.0, 10),
            host("nsa_compile::window_attention", 110.0, 12.0, **{"External id": 77}),
            host("nsa/win", 112.0, 9.0, "user_annotation"),
            launch(113.0, 11, name="cuLaunchKernelEx", category="cuda_driver"),
            launch(115.0, 12),
            host("autograd::engine::evaluate_function: MmBackward0", 125.0, 5.0, tid=2, **wide),
            launch(126.0, 13, tid=2),
            host("nsa_compile::window_attention_backward", 131.0, 5.0, tid=2),
            host("Optimizer.step#AdamW.step", 140.0, 8.0, "user_annotation"),
            launch(141.0, 14),
            host("ProfilerStep#4", 150.0, 20.0, "user_annotation"),
            launch(151.0, 20, name="cudaGraphLaunch"),
            host("cudaStreamSynchronize", 160.0, 5.0, "cuda_runtime", correlation=21),
            host("nsa/win", 200.0, 100.0, "gpu_user_annotation", tid=7),
            kernel("nvjet_tst_128x256", 200.0, 10.0, 10),
            kernel("_interval_fwd_kernel", 215.0, 20.0, 11),
            kernel("some_library_kernel", 230.0, 10.0, 12, stream=8),  # 5 beside the one before
            kernel("_gated_sum_fwd_kernel", 241.0, 1.0, 12),  # its name says more than the range
            kernel("nvjet_tst_64x64", 245.0, 5.0, 13),
            kernel("multi_tensor_apply_kernel", 250.0, 4.0, 14),
            kernel("_decode_scan_kernel", 260.0, 6.0, 20, **{"graph node id": 3}),
            kernel("_decode_merge_kernel", 266.0, 2.0, 20, **{"graph node id": 4}),
            kernel("triton_red_fused_add_0", 270.0, 3.0, 20),
            kernel("Memcpy DtoD (Device -> Device)", 275.0, 1.0, 20, category="gpu_memcpy"),
        ]
    )
    assert trace.on_device and [step.host_launches for step in trace.steps] == [5, 1]
    found = {w.name: (w.step, w.part, w.phase) for w in trace.work}
    assert found == {
        "nvjet_tst_128x256": (0, "mlp", "forward"),
        "_interval_fwd_kernel": (0, "win", "forward"),
        "some_library_kernel": (0, "win", "forward"),
        "_gated_sum_fwd_kernel": (0, "gates", "forward"),
        "nvjet_tst_64x64": (0, "mlp", "backward"),
        "multi_tensor_apply_kernel": (0, "optimizer", "update"),
        "_decode_scan_kernel": (1, "cmp + win", "forward"),
        "_decode_merge_kernel": (1, "gates", "forward"),
        "triton_red_fused_add_0": (1, "fused", "forward"),
        "Memcpy DtoD (Device -> Device)": (1, "copies", "forward"),
    }
    calls = {call.name: call.us for call in trace.calls}
    assert calls == {"nsa_compile::window_attention": 31.0, "nsa_compile::window_attention_backward": 0.0}


def test_device_time_counts_overlaps_once_and_gaps_between_steps():
    events = [
        host("ProfilerStep#0", 0.0, 10.0, "user_annotation"),
        launch(1.0, 1), launch(3.0, 2),
        host("ProfilerStep#1", 10.0, 10.0, "user_annotation"),
        launch(11.0, 3),
        kernel("a", 100.0, 20.0, 1), kernel("b", 110.0, 20.0, 2, stream=8),
        kernel("_decode_scan_kernel", 150.0, 50.0, 3),
    ]  # fmt: skip
    s = summarize(analyze(events), extra_costs={"_decode_": Cost(2_000_000, 1_000_000)})
    assert (s["step_ms"], s["busy_ms"], s["gap_ms"]) == pytest.approx((0.05, 0.04, 0.01))
    assert s["launches"] == 1.5 and s["host_launches"] == 1.5 and s["host_ms"] == pytest.approx(0.01)
    (rate,) = s["ops"]
    assert rate["op"] == "_decode_*" and rate["ms"] == pytest.approx(0.025)
    assert rate["gb_per_s"] == pytest.approx(40.0) and rate["tflop_per_s"] == pytest.approx(0.08)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("compiled", ["--compile", "--no-compile"])
def test_a_gpu_is_profiled(mode, compiled, tmp_path):
    sizes = {
        **SIZES,
        "dim": 256,
        "n_heads": 16,
        "d_k": 64,
        "d_v": 64,
        "l": 16,
        "d": 8,
        "l_sel": 32,
        "n_sel": 6,
        "w": 64,
    }
    options = itertools.chain.from_iterable((f"--{name.replace('_', '-')}", size) for name, size in sizes.items())
    result = run(mode, compiled, "--out", tmp_path / "out", "--device", "cuda", "--tokens", 512, *options)
    assert result.exit_code == 0, result.output
    s = load_summary(tmp_path / "out")
    parts = {part["part"]: part for part in s["parts"]}
    assert s["timed_on"] == "device" and s["busy_ms"] + s["gap_ms"] == pytest.approx(s["step_ms"])
    assert sum(part["ms"] for part in s["parts"]) == pytest.approx(s["busy_ms"], rel=0.05)  # one stream
    assert {"choice", "slc"} <= parts.keys()
    assert ({"win", "cmp"} if mode != "decode" else {"cmp + win", "cache", "gates"}) <= parts.keys()
    if mode == "decode":
        assert s["host_launches"] <= 3 and s["launches"] > 20  # one graph
        (rate,) = (op for op in s["ops"] if op["op"] == "_decode_*")
        assert rate["gb_per_s"] > 0 and rate["calls"] == 6 * SIZES["n_layers"]
    if mode == "train":
        assert all(parts[name]["backward_ms"] > 0 for name in ("cmp", "slc", "win", "gates"))
        assert parts["optimizer"]["update_ms"] > 0
        assert next(op for op in s["ops"] if op["op"].endswith("::window_attention_backward"))["tflop_per_s"] > 0
    assert (tmp_path / "out" / "memory.pickle").stat().st_size > 0 and s["memory"]["peak_bytes"] > 0


def test_covered_joins_intervals():
    assert covered([]) == 0
    assert covered([(5, 7), (0, 2), (1, 3), (1, 2)]) == 5


def test_a_trace_without_steps_or_of_another_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match="trace: expected steps"):
        analyze([host("aten::mm", 0.0, 1.0)])
    for name, content in (("a.json", b"{}"), ("b.json.gz", b"no gzip"), ("c.json.gz", gzip.compress(b"[1"))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="trace: expected a Chrome trace"):
            read_events(tmp_path / name)


@pytest.mark.skipif(not find_spec("torch_tb_profiler"), reason="needs the extra `profile`")
def test_tensorboard_opens_what_was_written(profiles, tmp_path):
    """The plugin torch-tb-profiler, served on loopback: its data on runs, operators and the trace."""
    logs = profiles("train")[0] / "tensorboard"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "tensorboard.main", "--logdir", str(logs), "--host", "127.0.0.1", "--port", str(port),
        "--load_fast", "false",
    ]  # fmt: skip

    def get(path, **query):
        url = f"http://127.0.0.1:{port}/data/plugin/pytorch_profiler/{path}?{urllib.parse.urlencode(query)}"
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(url, timeout=10) as answer:
            body = answer.read()
        return json.loads(gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body)

    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline, runs = time.monotonic() + 50, {}
        while time.monotonic() < deadline and not runs.get("runs"):
            assert server.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.3)
            try:
                runs = get("runs")
            except OSError:  # not up yet
                continue
        assert runs.get("runs"), (tmp_path / "log").read_text()
        (name,) = runs["runs"]
        assert {"Overview", "Operator", "Trace"} <= set(get("views", run=name))
        (worker,) = get("workers", run=name, view="Overview")
        (span,) = get("spans", run=name, worker=worker)
        where = {"run": name, "worker": worker, "span": span}
        overview = get("overview", **where, view="Overview")
        assert len(overview["steps"]["rows"]) == ACTIVE
        table = get("operation/table", **where, view="Operator", group_by="Operation")
        shown = {row["name"]: row["calls"] for row in table["data"]}
        for op in (*FORWARD, *BACKWARD):
            assert shown[f"nsa_compile::{op}"] == ACTIVE * (2 if op.startswith("compress_mean") else 1)
        pies = get("operation", **where, view="Operator", group_by="Operation")
        assert any(row[0].startswith("nsa_compile::") for row in pies["host_total_time"]["rows"])
        names = {event.get("name") for event in get("trace", **where, view="Trace")["traceEvents"]}
        assert {"nsa/win", "nsa/slc backward", "nsa_compile::selected_mixture"} <= names
    finally:
        server.terminate()
        server.wait(10)
