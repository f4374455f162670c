"""Time every op at the paper's sizes on one CUDA device: medians in ms, as a table and as JSON.

`python profiles/kernels.py OUT.json [--groups 16 --heads 64 --tokens 32768]`
"""

import argparse
import datetime
import json
import statistics
import time
from pathlib import Path

import torch
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel

import nsa_compile as nsa
from nsa_compile.bench.cases import draw_blocks
from nsa_compile.module import MLPCompressor
from nsa_compile.ops.gating import gated_sum

SIZES = {"l": 32, "d": 16, "l_sel": 64, "n_sel": 16}
WINDOW = 512


def median_ms(run, seconds: float = 0.4) -> tuple[float, float]:
    """Median and spread (interquartile range) of the device's time of run() in ms, after a warm-up, under load."""

    def record(calls: int, cycles: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        for begin, end in events:
            torch.cuda._sleep(cycles)  # meanwhile the host launches all of run(): no event waits for it
            begin.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) for begin, end in events]

    record(2, 0)
    started = time.perf_counter()
    run()
    cycles = int(4e9 * (time.perf_counter() - started))  # twice the time of the launches, at 2 GHz
    times = record(max(5, min(100, int(1000 * seconds / min(record(3, cycles))))), cycles)
    quarters = statistics.quantiles(times, n=4)
    return statistics.median(times), quarters[2] - quarters[0]


def kernel_ms(run, calls: int = 3) -> dict[str, float]:
    """ms per call on the device of each kernel that run() launches, the longest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
    spent = {event.key: event.self_device_time_total / 1000 / calls for event in trace.key_averages()}
    return {name: round(ms, 3) for name, ms in sorted(spent.items(), key=lambda x: -x[1]) if ms > 0.005}


def with_backward(run, inputs):
    """run() and its gradient for a random grad of the first output."""
    first = run()
    grad = torch.randn_like(first[0] if isinstance(first, tuple) else first)

    def both():
        out = run()
        torch.autograd.grad(out[0] if isinstance(out, tuple) else out, inputs, grad)

    return both


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--heads", type=int, default=64)
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--dense", action="store_true", help="time dense causal attention (cuDNN) beside it")
    parser.add_argument("--impl", default="auto")
    args = parser.parse_args()
    t, n, g, c = args.tokens, args.heads, args.groups, 128
    torch.manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16).requires_grad_()

    q, gates = draw(1, t, n, c), torch.softmax(draw(1, t, n, 3).detach(), -1).requires_grad_()
    k, v, k_slc, v_slc, k_win, v_win = (draw(1, t, g, c) for _ in range(6))
    mean = {"l": SIZES["l"], "d": SIZES["d"]}
    k_cmp, v_cmp = (nsa.compress_mean(x, **mean).detach().requires_grad_() for x in (k, v))
    lse = nsa.compressed_attention(q, k_cmp, v_cmp, **mean)[1].detach()
    random, alike = (
        draw_blocks(t, g, rho, n_sel=SIZES["n_sel"], l_sel=SIZES["l_sel"], device="cuda") for rho in (0.0, 0.8)
    )
    torch.cuda.empty_cache()

    def whole():
        means = (nsa.compress_mean(x, **mean) for x in (k, v))
        return nsa.nsa_attention(q, *means, k_slc, v_slc, k_win, v_win, gates, **SIZES, w=WINDOW)

    def selected(blocks):
        return lambda: nsa.selected_attention(q, k_slc, v_slc, blocks, l_sel=SIZES["l_sel"])

    config = nsa.NSAConfig(n_heads=n, n_kv_groups=g, d_k=c, d_v=c, phi="mlp", **SIZES, w=WINDOW)
    phi_k, phi_v = (torch.compile(MLPCompressor(config, c).to("cuda", torch.bfloat16)) for _ in "kv")
    mix = torch.compile(gated_sum)
    branches = [nsa.window_attention(q, k_win, v_win, w=WINDOW)[0].detach().requires_grad_() for _ in range(3)]
    ops = {
        "compress_mean (K and V)": (lambda: torch.stack([nsa.compress_mean(x, **mean) for x in (k, v)]), (k, v)),
        "conv + MLP (K and V), torch.compile": (lambda: torch.stack((phi_k(k), phi_v(v))), (k, v)),
        "compressed attention": (lambda: nsa.compressed_attention(q, k_cmp, v_cmp, **mean), (q, k_cmp, v_cmp)),
        "select_blocks": (lambda: nsa.select_blocks(q, k_cmp, lse, **SIZES), None),
        "selected attention, random blocks": (selected(random), (q, k_slc, v_slc)),
        "selected attention, rho 0.8": (selected(alike), (q, k_slc, v_slc)),
        "window attention": (lambda: nsa.window_attention(q, k_win, v_win, w=WINDOW), (q, k_win, v_win)),
        "gated sum": (lambda: nsa.gated_sum(*branches, gates), (*branches, gates)),
        "gated sum, torch.compile": (lambda: mix(*branches, gates), (*branches, gates)),
        "nsa_attention": (whole, (q, k, v, k_slc, v_slc, k_win, v_win, gates)),
    }
    if args.dense:
        heads = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in (q, k_slc, v_slc)]

        def dense():
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)

        ops["dense causal attention (cuDNN)"] = (dense, tuple(heads))
    rows = []
    for name, (run, inputs) in ops.items():
        with torch.no_grad():
            forward = median_ms(run)
        step = run if inputs is None else with_backward(run, inputs)
        both = (None, None) if inputs is None else median_ms(step)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        kernels = kernel_ms(step)
        rows.append({"op": name, "forward": forward, "both": both, "peak_mb": peak, "kernels": kernels})
        print(f"{name:36s} {forward[0]:8.2f} ±{forward[1]:5.2f}", end="")
        print("" if inputs is None else f" {both[0]:8.2f} ±{both[1]:5.2f}   peak {peak:7.0f} MB", flush=True)
    record = {
        "gpu": torch.cuda.get_device_name(), "date": datetime.date.today().isoformat(), "torch": torch.__version__,
        "triton": triton.__version__, "dtype": "bfloat16", "tokens": t, "heads": n, "groups": g, "channels": c,
        **SIZES, "w": WINDOW, "unit": "ms: [median, interquartile range]", "rows": rows,
    }  # fmt: skip
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
