"""Time one layer's attention of a decode step in a CUDA graph, from new queries and keys to the gated sum.

`python profiles/decode.py OUT.json`. A graph holds several layers, each with caches of its own, so that what one reads
is no longer in the L2 when it comes round again. Positions are set back before every replay.
"""

import argparse
import datetime
import json
import statistics
from pathlib import Path

import torch
import triton

import nsa_compile as nsa

HEADS, GROUPS, CHANNELS = 64, 4, 128
SIZES = {"l": 32, "d": 16, "l_sel": 64, "n_sel": 16, "w": 512}


def measure(context: int, batch: int, layers: int, replays: int = 60) -> dict:
    """Microseconds per layer, and GB/s of the tokens read, at `context` tokens in every row of a batch."""
    model = torch.nn.ModuleList(
        nsa.NSAAttention(64, HEADS, GROUPS, CHANNELS, CHANNELS, **SIZES).to("cuda", torch.bfloat16)
        for _ in range(layers)
    )
    cache = nsa.NSACache.for_model(model, batch, context + 8)
    for layer in cache.layers:
        for buffer in layer.buffers.values():
            buffer.normal_()
    draw = lambda n: torch.randn(batch, 1, n, CHANNELS, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    inputs = [(draw(HEADS), *(draw(GROUPS) for _ in range(6))) for _ in range(layers)]
    gates = torch.full((batch, 1, HEADS, 3), 1 / 3, device="cuda", dtype=torch.bfloat16)

    def step():
        for module, layer, new in zip(model, cache.layers, inputs, strict=True):
            module._step(layer, *new, gates, None)

    def rewind():
        for layer in cache.layers:
            layer.positions.fill_(context)

    with torch.inference_mode():
        rewind()
        step()
        rewind()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        events = []
        for _ in range(replays):
            rewind()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            events.append((begin, end))
        torch.cuda.synchronize()
        times = [1000 * begin.elapsed_time(end) / layers for begin, end in events[5:]]
        rewind()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
            graph.replay()
            torch.cuda.synchronize()
    spent = {x.key: round(x.self_device_time_total / layers, 2) for x in trace.key_averages()}
    kernels = {name: us for name, us in spent.items() if us > 0}
    tokens = cache.layers[0].actual_reads[..., 3].sum().item()
    median, quarters = statistics.median(times), statistics.quantiles(times, n=4)
    return {
        "context": context, "batch": batch, "layers": layers, "us": median, "iqr": quarters[2] - quarters[0],
        "gb_per_s": tokens * 2 * CHANNELS * 2 / median / 1000, "kernels_us": kernels,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    rows = []
    for context, batch, layers in ((8192, 1, 32), (65536, 1, 24), (131064, 1, 16), (32768, 16, 4), (65536, 32, 3)):
        rows.append(measure(context, batch, layers))
        x = rows[-1]
        print(f"{context:7d} x {batch:2d}: {x['us']:7.1f} ± {x['iqr']:.1f} us per layer, {x['gb_per_s']:6.0f} GB/s")
        print("   ", x["kernels_us"], flush=True)
    record = {
        "gpu": torch.cuda.get_device_name(), "date": datetime.date.today().isoformat(), "torch": torch.__version__,
        "triton": triton.__version__, "dtype": "bfloat16", "heads": HEADS, "groups": GROUPS, "channels": CHANNELS,
        **SIZES, "rows": rows,
    }  # fmt: skip
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
