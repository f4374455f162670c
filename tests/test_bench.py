"""nsa-compile bench at tiny sizes: what it checks, times, writes, compares and finds."""

import csv
import json
import re
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from flash_standins import Calls, flash_attn_4
from typer.testing import CliRunner

from nsa_compile import cli
from nsa_compile.bench import cases, decode, measure, plots, report
from nsa_compile.bench.beside import flash_attn, window_mask
from nsa_compile.bench.options import WHAT, Options
from nsa_compile.custom_ops import flash

SIZES = {"groups": 2, "d_k": 8, "d_v": 4, "l": 8, "d": 4, "l_sel": 8, "n_sel": 4, "w": 24}
TINY = ("--repeats", 3, *(x for name, size in SIZES.items() for x in (f"--{name.replace('_', '-')}", size)))


def run(*arguments):
    return CliRunner().invoke(cli.app, ["bench", "--device", "cpu", *(str(a) for a in (*TINY, *arguments))])


def tiny(**changes) -> Options:
    return Options.on("cpu", **SIZES | {"repeats": 2, "heads": (4,), "tokens": (40,), "beside": ()} | changes)


def row(what="window", ms=10.0, iqr=0.1, **changes) -> dict:
    """A row as a run leaves it."""
    return {
        **measure.describe(tiny(), 64, 4, "fp32", what, "auto", "forward", True), "op": cases.OPS.get(what, what),
        "status": "ok", "message": "", "ms": ms, "iqr_ms": iqr, "runs": "reference", **changes,
    }  # fmt: skip


def record(*rows, device="some GPU") -> dict:
    return {"format": report.FORMAT, "device": device, "commit": None, "date": "2026-11-25", "rows": list(rows)}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A run of everything at two lengths: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("bench")
    result = run(
        "--tokens", 192, "--tokens", 96, "--heads", 4, "--out", folder, "--commit", "abc", "--plot", "--d-v", 8
    )
    assert result.exit_code == 0, result.output
    return folder, result.stdout


def test_every_case_is_checked_timed_and_beside_its_floor(measured):
    found = json.loads((measured[0] / "bench.json").read_text())
    rows = found["rows"]
    kinds = {"selected, random", "selected, rho 0.8", "dense", "dense decode", *WHAT} - {"selected"}
    for tokens in (96, 192):
        assert {r["what"] for r in rows if r["tokens"] == tokens} == kinds
    for r in rows:
        assert r["status"] == "ok", r
        assert r["error"] <= r["tolerance"] and r["samples"] == 3
        assert 0 < r["q1_ms"] <= r["ms"] <= r["q3_ms"] and r["iqr_ms"] == pytest.approx(r["q3_ms"] - r["q1_ms"])
        assert 0 < r["fraction"] < 1.5 and r["floor_ms"] == pytest.approx(r["fraction"] * r["ms"])
        assert r["peak_mib"] is None and r["l2"] is None
    both = {r["what"] for r in rows if r["pass"] == "forward+backward"}
    assert both == kinds - {"choice", "decode", "dense decode"}
    assert len({report.key(r) for r in rows}) == len(rows)
    assert {r["impl"] for r in rows if r["what"] == "dense"} == {"SDPA flash", "SDPA math"}


def test_a_record_says_where_it_comes_from(measured):
    found = json.loads((measured[0] / "bench.json").read_text())
    assert found["gpu"] is None and found["device"] and found["threads"] == 1
    assert found["versions"]["torch"] == torch.__version__ and found["commit"] == "abc" and found["dirty"] is None
    assert re.match(r"\d{4}-\d\d-\d\dT", found["date"])
    assert found["options"]["tokens"] == [192, 96] and found["options"]["w"] == 24
    with (measured[0] / "bench.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [float(x["ms"]) for x in lines] == [r["ms"] for r in found["rows"]]
    commit, dirty = report.git_state()
    assert (commit is None) == (dirty is None) and (commit is None or re.fullmatch("[0-9a-f]{40}", commit))


def test_tables_and_pictures_show_it(measured):
    folder, shown = measured
    assert "T 192, 4 heads in 2 groups, fp32" in shown and "times as fast as dense by SDPA" in shown
    for name in ("time", "speedup", "share"):
        assert (folder / f"{name}-fp32-4-heads.png").read_bytes().startswith(b"\x89PNG")


def test_pictures_are_of_what_was_asked_for(measured, tmp_path):
    found = json.loads((measured[0] / "bench.json").read_text())
    rows = [r | {"impl": "reference"} if r["ours"] else r for r in found["rows"]]
    assert len(plots.plot_record(found | {"rows": rows}, tmp_path)) == 3
    rows += [r for r in found["rows"] if r["ours"]]
    assert [plots.shown_impl(x, "nsa") for x in (rows, rows[:1], [])] == ["auto", None, None]


def test_a_sweep_has_every_combination(tmp_path):
    sweep = ("--heads", 2, "--heads", 4, "--dtype", "fp32", "--dtype", "bf16", "--what", "window", "--tokens", 40)
    result = run(*sweep, "--no-backward", "--repeats", 2, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [(r["dtype"], r["heads"]) for r in rows] == [("fp32", 2), ("fp32", 4), ("bf16", 2), ("bf16", 4)]
    assert {path.name for path in tmp_path.glob("*.png")} == {
        f"time-{dtype}-{heads}-heads.png" for dtype in ("fp32", "bf16") for heads in (2, 4)
    }


def test_floors_count_what_the_ops_do():
    """FLOP as the ops' registered formulas say, of the selection as many as the blocks at hand hold."""
    from torch.utils.flop_counter import FlopCounterMode

    x = cases.Inputs(tiny(tokens=(64,)), 64, 4, torch.float32)
    for what in ("compress", "compressed", "choice", "window", "gated_sum"):
        (case,) = cases.BUILDERS[what](x)
        for n, work in enumerate(w for w in case.work if w is not None):
            with FlopCounterMode(display=False) as counter:
                out = cases.as_tuple(case.run())
                if n:
                    torch.autograd.grad(
                        out[: case.differentiable], case.inputs, [*map(torch.ones_like, out)][: case.differentiable]
                    )
            assert sum(w.flops for w in case.work[: n + 1]) == counter.get_total_flops(), what
            assert work.bytes > sum(y.nbytes for y in case.inputs)
    blocks = cases.neighbouring_blocks(x, 0.8)
    own = torch.arange(64)[:, None, None]
    tokens = (own + 1 - blocks[0].clamp_min(0) * 8).clamp(0, 8) * (blocks[0] >= 0)
    assert x.pairs("slc", blocks) == int(tokens.sum()) * 2


@pytest.mark.parametrize("rho", [0.0, 0.8])
def test_neighbouring_blocks_are_valid_and_alike_as_asked(rho):
    x = cases.Inputs(tiny(batch=2, n_sel=6), 1024, 4, torch.float32)
    blocks = cases.neighbouring_blocks(x, rho)
    assert blocks.shape == (2, 1024, 2, 6) and blocks.dtype == torch.int32
    last = torch.arange(1024) // 8
    for query in (0, 20, 700, 1023):
        for chosen in blocks[1, query].tolist():
            used = [block for block in chosen if block >= 0]
            assert used == sorted(set(used)) and chosen == used + [-1] * (6 - len(used))
            assert {0, int(last[query])} <= set(used) and max(used) == last[query]
            assert len(used) == min(6, int(last[query]) + 1)
    late = blocks[0, 800:, 0]
    kept = (late[1:, :, None] == late[:-1, None, :]).any(-1).float().mean()
    assert kept > 0.7 if rho else kept < 0.65


@pytest.mark.parametrize("name, what", [
    ("compress_mean", "compress"), ("compressed_attention", "compressed"), ("select_blocks", "choice"),
    ("selected_attention", "selected"), ("window_attention", "window"), ("gated_sum", "gated_sum"),
    ("nsa_attention", "nsa"),
])  # fmt: skip
def test_a_wrong_op_is_found_and_not_timed(name, what, monkeypatch):
    right = getattr(cases, name)

    def wrong(*args, impl="auto", **kwargs):
        out = right(*args, impl=impl, **kwargs)
        if impl == "reference":
            return out
        if name == "select_blocks":
            return out.roll(1, 1)
        changed = out[0] if isinstance(out, tuple) else out
        changed = changed + 0.02 * changed.detach().roll(1, 1)
        return (changed, out[1]) if isinstance(out, tuple) else changed

    monkeypatch.setattr(cases, name, wrong)
    rows = measure.run_bench(tiny(what=(what,)))
    assert rows and all(r["status"] == "wrong" and "ms" not in r for r in rows)
    assert "differs from the reference by" in rows[0]["message"]


def test_a_wrong_gradient_is_found(monkeypatch):
    def wrong(q, *args, impl, **kwargs):
        o, lse = right(q if impl == "reference" else q + 0.02 * (q - q.detach()), *args, impl=impl, **kwargs)
        return o, lse

    right = cases.window_attention
    monkeypatch.setattr(cases, "window_attention", wrong)
    forward, both = measure.run_bench(tiny(what=("window",)))
    assert forward["status"] == "ok" and both["status"] == "wrong"


def test_a_wrong_decode_step_and_wrong_alternatives_are_found(monkeypatch, tmp_path):
    right = decode.NSAAttention.forward

    def wrong(self, x, *args, **kwargs):
        return right(self, x, *args, **kwargs) + (0.0 if self.config.impl == "reference" else 0.1)

    monkeypatch.setattr(decode.NSAAttention, "forward", wrong)
    monkeypatch.setattr("nsa_compile.bench.beside.scaled_dot_product_attention", lambda q, k, v, **options: q * 0)
    result = run("--what", "decode", "--what", "nsa", "--tokens", 40, "--heads", 4, "--d-v", 8, "--out", tmp_path)
    assert result.exit_code == 1
    found = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert {(r["what"], r["status"]) for r in found} == {
        ("decode", "wrong"), ("dense decode", "wrong"), ("nsa", "ok"), ("dense", "wrong"),
    }  # fmt: skip
    assert "wrong: decode auto fwd" in result.stdout


def test_nan_is_wrong():
    error = cases.relative_error([torch.tensor([1.0, float("nan")])], [torch.ones(2)])
    assert not cases.Sampled(error, 1e-2).holds
    infinite = torch.tensor([float("-inf"), 1.0])
    assert cases.relative_error([infinite], [infinite.clone()]) == 0.0


def test_what_raises_is_a_row(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no\nkernel")

    monkeypatch.setattr("nsa_compile.bench.beside.sdpa", broken)
    monkeypatch.setattr(cases, "gated_sum", broken)
    rows = measure.run_bench(tiny(what=("gated_sum", "nsa"), beside=("sdpa",), backward=False))
    assert {(r["what"], r["status"]) for r in rows} == {
        ("gated_sum", "failed"), ("nsa", "failed"), ("dense", "unavailable"),
    }  # fmt: skip
    assert rows[0]["message"] == "RuntimeError: no kernel"


def test_kernels_are_checked_and_timed_where_asked_for():
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the interpreter is off")
    options = tiny(what=("gated_sum", "window"), impls=("triton",), tokens=(24,), heads=(2,), w=8, backward=False)
    rows = measure.run_bench(options)
    assert [(r["what"], r["runs"], r["status"]) for r in rows] == [
        ("gated_sum", "triton", "ok"), ("window", "triton", "ok"),
    ]  # fmt: skip


@pytest.mark.parametrize("t, w", [(512, 128), (700, 100), (384, 1), (300, 1000)])
def test_the_mask_of_flex_attention_is_that_which_it_would_try_out(t, w):
    from torch.nn.attention.flex_attention import create_block_mask

    mask = window_mask(t, w, torch.device("cpu"))
    tried = create_block_mask(mask.mask_mod, None, None, t, t, device="cpu")
    assert torch.equal(mask.to_dense(), tried.to_dense())
    # what is called full must be: tiles that the trial finds partial may not be
    for name in ("full_kv_num_blocks", "kv_num_blocks"):
        ours, theirs = getattr(mask, name), getattr(tried, name)
        assert (ours <= theirs).all() if name.startswith("full") else (ours >= theirs).all()


def test_cuda_times_lie_between_events_after_a_flush(monkeypatch):
    """The order of what is launched, with a stand-in for the device."""
    launched = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            launched.append("event")

        def elapsed_time(self, end):
            return 7.0

    stand_in = {
        "Event": Event, "_sleep": lambda cycles: launched.append(("sleep", cycles)), "synchronize": lambda device: None,
        "reset_peak_memory_stats": lambda device: None, "memory_allocated": lambda device: 10,
        "max_memory_allocated": lambda device: 30,
    }  # fmt: skip
    for name, function in stand_in.items():
        monkeypatch.setattr(torch.cuda, name, function)
    clock = measure.Clock(torch.device("cpu"))
    clock.cuda, clock._flushed = True, SimpleNamespace(zero_=lambda: launched.append("flush"))
    timed = measure.Timed(lambda: launched.append("call"), lambda: launched.append("before"), layers=7, flush=True)
    clock.warm_up(timed)
    assert launched == ["before", "call"] * 4 and timed.peak == 20
    launched.clear()
    clock.sample(timed)
    assert launched == ["before", ("sleep", timed.cycles), "flush", "event", "call", "event"] and timed.ms == []
    clock.collect()
    clock.collect()
    timed.ms.append(7.0)
    assert timed.ms == [7.0, 7.0] and timed.spread() == (1.0, 1.0, 1.0)


def test_compare_says_what_got_slower_beyond_noise():
    names = ("same", "slower", "noisy", "faster", "broken", "missing")
    old = record(*(row(name) for name in names))
    new = record(
        row("same", 10.4), row("slower", 10.7), row("noisy", 12.0, 1.5), row("faster", 9.0),
        row("broken", status="wrong"), row("new"),
    )  # fmt: skip
    changes = {x["what"]: x["change"] for x in report.compare(old, new)}
    assert changes == {
        "same": "same", "slower": "slower", "noisy": "same", "faster": "faster", "broken": "broken", "new": "new",
        "missing": "missing",
    }  # fmt: skip


def test_a_planted_slowdown_ends_with_exit_code_1(tmp_path):
    what = ("--what", "gated_sum", "--tokens", 40, "--heads", 4, "--no-backward", "--no-plot")
    assert run(*what, "--out", tmp_path / "old").exit_code == 0
    path = tmp_path / "old" / "bench.json"
    old = json.loads(path.read_text())

    def compared(factor, **changes):
        shutil.rmtree(tmp_path / "new", ignore_errors=True)
        rows = [r | {"ms": factor * r["ms"], "iqr_ms": 0.0} | changes for r in old["rows"]]
        path.write_text(json.dumps(old | {"rows": rows}))
        return run(*what, "--compare", path, "--out", tmp_path / "new", "--repeats", 9)

    slow = compared(1e-3)
    assert slow.exit_code == 1 and "1 slower" in slow.stdout and "gated_sum" in slow.stdout
    fast = compared(1e4)
    assert fast.exit_code == 0 and "0 slower, 1 faster" in fast.stdout
    moved = compared(1.0, w=25)
    assert moved.exit_code == 2 and "compare: expected a record of w 24, got one of 25" in moved.stderr
    other = compared(1.0, what="window")
    assert other.exit_code == 1 and "1 new, 1 missing" in other.stdout
    assert "no case is in both records" in other.stdout
    path.write_text(json.dumps(old | {"device": "another"}))
    for arguments, words in (
        ((), "compare: expected a record of"), (("--dtype", "bf16"), "compare: expected a record of"),
    ):  # fmt: skip
        refused = run(*what, *arguments, "--compare", path)
        assert refused.exit_code == 2 and words in refused.stderr and "another" in refused.stderr
    path.write_text(json.dumps(old))
    refused = run(*what, "--dtype", "bf16", "--compare", path)
    assert refused.exit_code == 2 and "compare: expected a record of dtype bf16, got one of fp32" in refused.stderr


@pytest.mark.parametrize("change", [
    {"device": None}, {"rows": 5}, {"rows": [{}]}, {"rows": [row(ms=None)]}, {"rows": [row(ms=0.0)]}, {"commit": 7},
    {"rows": [row(iqr=None)]}, {"rows": [row(ms="fast")]}, {"rows": [row() | {"what": ["window"]}]}, {"format": 2},
    {"rows": [{k: v for k, v in row().items() if k != "ours"}]},
])  # fmt: skip
def test_a_record_that_is_none_is_refused(change, tmp_path):
    """In one line and before anything is timed: exit code 1 would say that something got slower."""
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(record(row()) | change))
    with pytest.raises(ValueError, match=r"compare: expected a bench\.json"):
        report.read_record(path)
    path.write_text(json.dumps(record(row())))
    assert report.read_record(path)["rows"] == [row()]


@pytest.mark.parametrize("taken", ["record", "file", "nowhere"])
def test_where_to_write_is_looked_at_before_anything_is_timed(taken, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    if taken == "record":
        folder.mkdir()
        (folder / "bench.json").write_text("{}")
    if taken == "file":
        folder.write_text("")
    if taken == "nowhere":
        (tmp_path / "file").write_text("")
        folder = tmp_path / "file" / "out"
    monkeypatch.setattr("nsa_compile.bench.command.run_bench", lambda *args: pytest.fail("timed"))
    result = run("--what", "gated_sum", "--tokens", 40, "--heads", 4, "--out", folder)
    assert result.exit_code == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert str(folder) in result.stderr


def test_alternatives_that_got_slower_are_said_but_no_failure(capsys):
    from rich.console import Console

    old, new = record(row(ms=1.0, ours=False)), record(row(ours=False))
    assert report.say_comparison(Console(), old, report.compare(old, new))
    assert "1 slower" in capsys.readouterr().out


def test_thresholds_are_where_an_implementation_stays_the_fastest():
    times = {  # ms by T
        "triton": {64: 3.0, 128: 3.0, 256: 4.0, 512: 6.0}, "reference": {64: 1.0, 128: 3.05, 256: 50.0},
        "flash": {64: 9.0, 128: 2.0, 256: 8.0, 512: 6.1},
    }  # fmt: skip
    rows = [row(impl=impl, tokens=t, ms=ms, iqr=0.0) for impl, by in times.items() for t, ms in by.items()]
    nobody = {"triton": None, "reference": None, "flash": None}
    assert report.find_thresholds(rows, "forward") == {"window_attention": nobody}
    rows = [r | {"ms": 7.0} if (r["impl"], r["tokens"]) == ("flash", 512) else r for r in rows]
    assert report.find_thresholds(rows, "forward") == {"window_attention": nobody | {"triton": 256}}
    assert report.lost("window_attention", "reference", 512, rows)
    assert not report.lost("window_attention", "reference", 256, rows)
    assert not report.lost("window_attention", "triton", 512, rows)


def test_the_backward_alone_is_what_both_take_more():
    both = row(ms=12.0, iqr=0.4) | {"pass": "forward+backward"}
    (alone,) = report.backward_alone([row(ms=10.0, iqr=0.3), both, row("choice")])
    assert (alone["pass"], alone["what"], alone["ms"]) == ("backward", "window", 2.0)
    assert alone["iqr_ms"] == pytest.approx(0.5)


def test_an_implementation_that_an_op_refuses_is_unavailable():
    def refuse():
        raise ValueError("impl: expected 'auto', got 'flash'")

    assert measure.attempt(refuse, ours=True)[1]["status"] == "unavailable"


def test_thresholds_on_a_cpu(tmp_path):
    result = run("--threshold", "--tokens", 24, "--tokens", 48, "--heads", 4, "--impl", "reference", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "thresholds.json").read_text())
    ops = [cases.OPS[what] for what in WHAT if what not in ("nsa", "decode")]
    assert {op: found[op] for op in ops} == {op: {"reference": 24} for op in ops}
    backward = {op: {"reference": 24} for op in ops if op != "select_blocks"}
    assert found["directions"] == {"forward": {op: {"reference": 24} for op in ops}, "backward": backward}
    assert found["gpu"] is None and found["pass"] == "forward+backward" and "T 24" in result.stdout


def test_what_cannot_be_timed_as_asked_is_said(tmp_path):
    sizes = ("--tokens", 40, "--heads", 4, "--no-plot")
    mixed = run("--what", "gated_sum", "--what", "window", "--impl", "flash", *sizes, "--out", tmp_path / "a")
    assert mixed.exit_code == 1 and "nothing of ours could be timed" in mixed.stdout
    assert "left out: gated_sum by flash in fp32: impl: expected" in mixed.stdout
    assert "unavailable: window flash fwd" in mixed.stdout and "runs on NVIDIA GPUs" in mixed.stdout


def test_the_whole_is_timed_with_flash_attn_where_it_runs(monkeypatch):
    calls = Calls()
    monkeypatch.setitem(sys.modules, flash.MODULES[4], flash_attn_4(calls))
    monkeypatch.setattr(flash, "installed", lambda: {4: "4.0"})
    monkeypatch.setattr(flash, "import_error", lambda version: "")
    monkeypatch.setattr(flash, "capability_of", lambda device: (10, 0))
    monkeypatch.setattr(flash, "DTYPES", (torch.float32,))
    rows = measure.run_bench(tiny(what=("nsa",), impls=("flash",), d_v=8))
    assert [(r["what"], r["runs"], r["status"]) for r in rows] == [("nsa", "reference + flash", "ok")] * 2
    assert {name for name, _ in calls} == {"_flash_attn_fwd", "_flash_attn_bwd"}


def test_a_flash_attn_that_does_not_import_is_a_row(monkeypatch):
    x = SimpleNamespace(
        options=tiny(beside=("flash-attn",)), device=torch.device("cuda"), dtype=torch.bfloat16, q=None, t=8,
        kv={"slc": (None, None)},
    )  # fmt: skip
    monkeypatch.setattr(flash, "installed", lambda: {4: "4.0", 2: "2.8"})
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert set(flash_attn(x)) == {"flash-attn 4", "flash-attn 2"}
    row = measure.attempt(flash_attn(x)["flash-attn 2"], ours=False)[1]
    assert row["status"] == "unavailable" and "import of flash_attn halted" in row["message"]
    x.dtype = torch.float32
    assert flash_attn(x) == {}


def test_floors_go_by_the_best_rates_of_the_run(monkeypatch):
    right, ms = measure.ceilings, {}

    def ceilings(clock, dtype):
        found = right(clock, dtype)
        ms.update(zip(found, (1.0, 4.0, 2.0), strict=True))  # the copy takes longer than the sum
        return found

    monkeypatch.setattr(measure, "ceilings", ceilings)
    monkeypatch.setattr(measure.Clock, "sample", lambda self, timed: timed.ms.append(ms.get(timed, 8.0)))
    (found,) = measure.run_bench(tiny(what=("choice",)))
    assert found["tflop_per_s"] == pytest.approx(2 * 512**3 / 1e-3 / 1e12)
    assert found["gb_per_s"] == pytest.approx(2**28 / 2e-3 / 1e9)
    products, moves = found["gflop"] / found["tflop_per_s"], 1000 * found["gbyte"] / found["gb_per_s"]
    assert found["floor_ms"] == pytest.approx(max(products, moves)) and found["ms"] == 8.0
    assert found["fraction"] == pytest.approx(found["floor_ms"] / 8.0)


@pytest.mark.parametrize("arguments, words", [
    (("--threshold", "--plot"), "threshold: expected it without --plot"), (("--device", "meta"), "one that computes"),
    (("--threshold", "--beside", "sdpa"), "threshold: expected it without --beside"),
    (("--threshold", "--impl", "triton", "--d-k", 258), "got 'triton'"),
    (("--what", "all"), "what: expected some of 'compress'"), (("--dtype", "fp64"), "dtypes: expected some of"),
    (("--tokens", 4), "tokens: expected at least 8"), (("--repeats", 1), "repeats: expected at least 2"),
    (("--heads", 3), "n_heads: expected a multiple of"), (("--impl", "cuda"), "impl: expected one of"),
    (("--what", "gated_sum", "--impl", "flash"), "got 'flash'"), (("--compare", "nowhere.json"), "nowhere.json"),
    (("--tokens", 64, "--tokens", 64), "tokens: expected at least one, and none twice"),
])  # fmt: skip
def test_errors_are_one_line(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2 and words in result.stderr and result.stderr.count("\n") == 1, result.output


def test_without_matplotlib_there_are_no_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr("nsa_compile.bench.plots.find_spec", lambda name: None)
    what = ("--what", "gated_sum", "--tokens", 40, "--heads", 4, "--no-backward", "--out", tmp_path)
    refused = run(*what, "--plot")
    assert refused.exit_code == 2 and "plot: expected matplotlib" in refused.stderr
    result = run(*what)
    assert result.exit_code == 0 and "no pictures" in result.stdout and not list(tmp_path.glob("*.png"))
