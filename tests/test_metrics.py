"""Metrics: files, FLOP against the counter's, statistics of gates and selection against plain loops."""

import json
import math
import sys
import threading
from itertools import pairwise

import pytest
import torch
from models import MODEL, draw_ids, make_model
from torch.utils.flop_counter import FlopCounterMode

from nsa_compile import NSAConfig
from nsa_compile.metrics import (
    METRICS_FILE,
    TENSORBOARD,
    LayerStatistics,
    MetricsWriter,
    keep_until,
    layer_statistics,
    model_flops,
    peak_flops,
    peak_memory,
    scalars,
)
from nsa_compile.ops.selection import select_blocks
from nsa_compile.recompute import wrap_forward

SIZES = {
    "dim": 32, "n_heads": 4, "n_kv_groups": 2, "d_k": 8, "d_v": 6, "l": 4, "d": 2, "l_sel": 4, "n_sel": 3, "w": 9,
    "vocab_size": 50, "n_layers": 2,
}  # fmt: skip


def test_a_line_per_step_and_steps_that_come_again_go(tmp_path):
    with MetricsWriter(tmp_path, 0) as writer:
        for step in (1, 2, 3):
            writer.write({"step": step, "loss": 1 / step, "val_loss": None})
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 4, "lo')  # a crash in mid-write
    with MetricsWriter(tmp_path, 2) as writer:
        writer.write({"step": 3, "loss": 9.0, "val_loss": 8.0})
    lines = [json.loads(line) for line in (tmp_path / METRICS_FILE).read_text().splitlines()]
    assert lines == [
        {"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}, {"step": 3, "loss": 9.0, "val_loss": 8.0},
    ]  # fmt: skip
    with MetricsWriter(None, 0) as writer:
        writer.write({"step": 1})


def test_what_was_written_stays_on_a_full_disk(tmp_path, file_limit):
    path = tmp_path / METRICS_FILE
    path.write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 6)))
    file_limit(0)
    keep_until(path, 3)
    assert path.read_text().splitlines() == [f'{{"step": {step}}}' for step in (1, 2, 3)]


def test_a_full_disk_is_named_for_tensorboard(tmp_path, file_limit, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setattr(threading, "excepthook", lambda error: None)
    file_limit(0)
    with pytest.raises(OSError, match=f"File too large: .*{TENSORBOARD}"):
        MetricsWriter(tmp_path, 0, tensorboard=True)


def test_a_full_disk_is_named(tmp_path):
    (tmp_path / METRICS_FILE).symlink_to("/dev/full")
    writer = MetricsWriter(None, 0)
    writer.path, writer.file = tmp_path / METRICS_FILE, (tmp_path / METRICS_FILE).open("a")
    with pytest.raises(OSError, match=f"No space left on device: .*{METRICS_FILE}"):
        writer.write({"step": 1})


def test_tensorboard_has_the_numbers(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    layer = LayerStatistics({"cmp": 0.2, "slc": 0.3, "win": 0.5}, 1.0, 12.5, 0.75)
    metrics = {"step": 3, "loss": 2.5, "mfu": None, "layers": [layer._asdict()]}
    assert dict(scalars({"step": 3, "layers": [layer._asdict()]})) == {
        "layers/0/gates/cmp": 0.2, "layers/0/gates/slc": 0.3, "layers/0/gates/win": 0.5, "layers/0/entropy": 1.0,
        "layers/0/distance": 12.5, "layers/0/overlap": 0.75,
    }  # fmt: skip
    with MetricsWriter(tmp_path, 0, tensorboard=True) as writer:
        writer.write(metrics)
    board = event_accumulator.EventAccumulator(str(tmp_path / TENSORBOARD)).Reload()
    (event,) = board.Scalars("loss")
    assert (event.step, event.value) == (3, 2.5)
    assert board.Scalars("layers/0/distance")[0].value == 12.5 and "mfu" not in board.Tags()["scalars"]


def test_without_tensorboard_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"tensorboard: expected the package .* pip install 'nsa-compile\[train\]'"):
        MetricsWriter(tmp_path, 0, tensorboard=True)
    assert not (tmp_path / METRICS_FILE).exists()


@pytest.mark.parametrize(
    "changes, tolerance",
    [({}, 0), ({"gate": "sigmoid"}, 0), ({"tie_kv": True}, 0), ({"phi": "mlp"}, 0.02)],
    ids=["softmax", "sigmoid", "tied", "mlp"],
)
def test_flops_are_those_of_the_counter(changes, tolerance):
    """Of a forward pass, without the choice, sums of the means and the mixture, and φ's padding."""
    config = NSAConfig(**SIZES | changes)
    model, ids = make_model(torch.float32, **SIZES | changes), draw_ids(1, 48, vocab=50)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.loss(ids)
    counts = counter.get_flop_counts()["Global"]
    others = sum(n for op, n in counts.items() if str(op).split(".")[-1] in ("select_blocks", "compress_mean"))
    mixture = SIZES["n_layers"] * 2 * 3 * 48 * SIZES["n_heads"] * SIZES["d_v"]
    assert model_flops(config, [48]) / 3 == pytest.approx(sum(counts.values()) - others - mixture, rel=tolerance)
    assert model_flops(config, [48, 48, 7]) == 2 * model_flops(config, [48]) + model_flops(config, [7])


def test_dense_flops_are_causal():
    config = NSAConfig(**SIZES | {"attention": "dense"})
    pairs = 48 * 49 // 2
    attention = 2 * 4 * pairs * (8 + 6) * 2
    assert model_flops(config, [48]) == 3 * (attention + 48 * 2 * (model_flops(config, [1]) // 6 - 4 * 14 * 2))


def test_a_cpu_has_no_peak_but_memory():
    assert peak_flops(torch.device("cpu")) is None
    assert peak_memory(torch.device("cpu")) > 2**20


def plain_statistics(model, ids, bounds):
    """Of the first layer, sequence by sequence."""
    attn, c = model.layers[0].attn, model.config
    distances, overlaps, shares = [], [], []
    for a, z in bounds:
        x = model.layers[0].norm_attn(model.embed(ids[:, a:z]))
        seen = {}

        def keep(module, args, output, seen=seen):
            seen["gates"] = output

        hook = attn.gate.register_forward_hook(keep)
        q, _, (k_cmp, v_cmp, *_) = attn._heads(x, None)
        hook.remove()
        positions = torch.arange(z - a)[None]
        from nsa_compile.custom_ops.rope import apply_rope
        from nsa_compile.ops.compression import compressed_attention

        q = apply_rope(q, positions, theta=c.rope_theta)
        k_cmp, v_cmp = attn._compress(k_cmp, v_cmp, None)
        _, lse = compressed_attention(q, k_cmp, v_cmp, l=c.l, d=c.d)
        blocks = select_blocks(q, k_cmp, lse, l=c.l, d=c.d, l_sel=c.l_sel, n_sel=c.n_sel)[0].tolist()
        for g in range(c.n_kv_groups):
            sets = [{b for b in blocks[t][g] if b >= 0} for t in range(z - a)]
            distances += [t - b * c.l_sel for t, chosen in enumerate(sets) for b in chosen]
            overlaps += [len(now & before) / len(now) for before, now in pairwise(sets)]
        shares += [row for token in seen["gates"][0].tolist() for row in token]
    entropies = [-sum(x / sum(row) * math.log(x / sum(row)) for x in row) for row in shares]
    means = [sum(row[i] / sum(row) for row in shares) / len(shares) for i in range(3)]
    return means, *(sum(x) / len(x) for x in (entropies, distances, overlaps))


@pytest.mark.parametrize("bounds", [[(0, 40)], [(0, 13), (13, 14), (14, 33)]], ids=["plain", "packed"])
@torch.no_grad()
def test_statistics_are_those_of_plain_loops(bounds):
    model, ids = make_model(gate="sigmoid"), draw_ids(1, 40)
    ends = None if len(bounds) == 1 else torch.tensor([0, *(z for _, z in bounds), bounds[-1][1]], dtype=torch.int32)
    found = layer_statistics(model, ids, ends)
    assert len(found) == MODEL["n_layers"]
    means, entropy, distance, overlap = plain_statistics(model, ids, bounds)
    assert list(found[0].gates) == ["cmp", "slc", "win"]
    assert list(found[0].gates.values()) == pytest.approx(means)
    assert found[0][1:] == pytest.approx((entropy, distance, overlap))


def test_statistics_do_not_run_compiled_code():
    model, ids = make_model(torch.float32), draw_ids(1, 40)
    expected = layer_statistics(model, ids)
    for block in model.layers:
        wrap_forward(block, lambda forward: torch.compile(forward, fullgraph=True, backend=fail))
    assert layer_statistics(model, ids) == expected
    assert layer_statistics(make_model(attention="dense"), ids) == []


def fail(graph, inputs):
    raise AssertionError("compiled")
