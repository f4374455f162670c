"""Decode with a whole model of random weights in a CUDA graph, Native Sparse Attention beside dense attention.

`python profiles/model.py OUT.json`. A prompt of random tokens fills the cache through prefill graphs, then steps from
embedding to sampled token are timed. The dense model's attention is cuDNN's over exactly the cached tokens, the fastest
of torch's own (SDPA) for one query per row; its graph is captured for that length, so it does not even have to mask.
"""

import argparse
import datetime
import itertools
import json
import statistics
import time
from pathlib import Path

import torch
import triton
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import nsa_compile as nsa
from nsa_compile.model import DenseAttention

SIZES = {"dim": 2560, "n_heads": 64, "n_kv_groups": 4, "d_k": 128, "d_v": 128, "n_layers": 32, "vocab_size": 32768}
CHUNK = 4096


class DenseStep(nn.Module):
    """`DenseAttention` for one new token per row after exactly `length` cached ones."""

    def __init__(self, attention: DenseAttention, length: int) -> None:
        super().__init__()
        self.attention, self.length = attention, length

    def forward(self, x, cache, cu_seqlens=None, lengths=None, *, branch=None, attn_mask=None):
        a, c = self.attention, self.attention.config
        layer = cache.layer(a)
        projected = a.project(x, few=True)
        q = projected["W_Q"].unflatten(-1, (c.n_heads, c.d_k))
        k, v = (projected[name].unflatten(-1, (c.n_kv_groups, -1)) for name in ("W_K", "W_V"))
        at = layer.positions[:, None]
        q, k = (nsa.apply_rope(y, at, theta=c.rope_theta) for y in (q, k))
        layer.buffers["k"][:, self.length] = k[:, 0]
        layer.buffers["v"][:, self.length] = v[:, 0]
        keys, values = (layer.buffers[name][:, : self.length + 1].transpose(1, 2) for name in "kv")
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            o = nn.functional.scaled_dot_product_attention(q.transpose(1, 2), keys, values, enable_gqa=True)
        return a.out(o.transpose(1, 2).flatten(2))


def build(attention: str) -> nsa.NSALanguageModel:
    """A model of random weights in bf16."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = nsa.NSALanguageModel(nsa.NSAConfig(**SIZES, attention=attention))
        torch.set_default_dtype(torch.float32)
    return model.eval()


def measure(attention: str, context: int, batch: int, steps: int, compiled: bool) -> dict:
    """Tokens/s and GB/s of weights and cached tokens read, at `context` tokens in every row."""
    model = build(attention)
    cache = nsa.NSACache.for_model(model, batch, context + steps + 16)
    result: dict = {"attention": attention, "context": context, "batch": batch, "compiled": compiled}
    if attention == "nsa":
        fill = nsa.PrefillGraph(model, cache, sizes=(CHUNK,))
        prompts = torch.randint(SIZES["vocab_size"], (batch, context - 1)).tolist()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        fill(prompts)
        torch.cuda.synchronize()
        result["prefill_s"] = time.perf_counter() - begin
        del fill
    else:
        for layer in cache.layers:
            for buffer in layer.buffers.values():
                buffer.normal_()
            layer.positions.fill_(context - 1)
        cache.reserve(context - 1)
        for block in model.layers:
            block.attn = DenseStep(block.attn, context - 1)
    step = torch.compile(model, fullgraph=attention == "nsa") if compiled else model
    torch.cuda.empty_cache()
    graph = nsa.DecodeGraph(step, cache)
    for row in range(batch):
        graph.start(row, 1, max_new_tokens=steps + 10)
    graph.step(4)
    graph.collect()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for event in events[1:]:
        graph.step()
        event.record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in itertools.pairwise(events)]
    median = statistics.median(times)
    weights = sum(p.nbytes for p in model.parameters()) - model.embed.weight.nbytes
    tokens = (
        sum(layer.actual_reads[..., 3].sum().item() for layer in cache.layers)
        if attention == "nsa"
        else batch * SIZES["n_kv_groups"] * context * SIZES["n_layers"]
    )
    read = tokens * (SIZES["d_k"] + SIZES["d_v"]) * 2
    quarters = statistics.quantiles(times, n=4)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        graph.step()
        torch.cuda.synchronize()
    kernels = sorted(
        ((x.key[:100], round(x.self_device_time_total)) for x in trace.key_averages()), key=lambda x: -x[1]
    )
    return result | {
        "ms_per_step": median, "iqr_ms": quarters[2] - quarters[0], "tokens_per_s": 1000 * batch / median,
        "gb_per_s": (weights + read) / median / 1e6, "gb_weights": weights / 1e9, "gb_cache_read": read / 1e9,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9, "kernels_us": dict(kernels[:16]),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--context", type=int, nargs="+", default=[65536])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--eager", action="store_true", help="do not compile the model before capturing it")
    args = parser.parse_args()
    rows = []
    for context in args.context:
        for attention in ("nsa", "dense"):
            torch.cuda.reset_peak_memory_stats()
            rows.append(x := measure(attention, context, args.batch, args.steps, not args.eager))
            print(
                f"{attention} {context} x {args.batch}: {x['ms_per_step']:.3f} ms, {x['tokens_per_s']:.1f} tokens/s,",
                f"{x['gb_per_s']:.0f} GB/s ({x['gb_weights']:.2f} of weights, {x['gb_cache_read']:.2f} of cache),",
                f"peak {x['peak_gb']:.1f} GB, prefill {x.get('prefill_s', 0):.1f} s",
            )
            print("   ", x["kernels_us"], flush=True)
            torch.compiler.reset()
            torch.cuda.empty_cache()
    record = {
        "gpu": torch.cuda.get_device_name(), "date": datetime.date.today().isoformat(), "torch": torch.__version__,
        "triton": triton.__version__, "dtype": "bfloat16", **SIZES, "rows": rows,
    }  # fmt: skip
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
