"""Training steps of a model on several GPUs, each way of spreading it, beside one GPU.

`torchrun --standalone --nproc-per-node 2 profiles/parallel.py OUT.json`. One row per dp rank, of random bytes; a step
is loss, gradient, clipping and AdamW, in bf16 with fp32 weights and optimizer state, each block compiled to one graph.
With cp or tp the ranks share a row, with dp (FSDP) each has its own.
"""

import argparse
import contextlib
import datetime
import json
import os
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
import triton

import nsa_compile as nsa

SIZES = {
    "dim": 2048, "n_heads": 32, "n_kv_groups": 2, "d_k": 128, "d_v": 128, "n_layers": 2, "vocab_size": 256,
    "phi": "mlp",
}  # fmt: skip


def measure(plan: dict[str, int], tokens: int, steps: int, sizes: dict, device: str) -> dict:
    """Milliseconds per step, tokens/s of all ranks together and peak memory of this one."""
    torch.manual_seed(0)
    mesh = nsa.make_mesh(**plan, device=device)
    with torch.device(device):
        model = nsa.NSALanguageModel(nsa.NSAConfig(**sizes))
    model = nsa.parallelize(model, mesh, dtype=torch.bfloat16, compile=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    row = torch.Generator().manual_seed(mesh["dp"].get_local_rank())
    ids = torch.randint(sizes["vocab_size"], (1, tokens), generator=row).to(device)
    synchronize, losses, times = torch.cuda.synchronize if device == "cuda" else (lambda: None), [], []
    for step in range(3 + steps):
        if step == 3 and device == "cuda":  # compiled, and the allocator has settled
            torch.cuda.reset_peak_memory_stats()
        synchronize()
        begin = time.perf_counter()
        loss = model.loss(ids)
        loss.backward()
        nsa.clip_grad_norm(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        synchronize()
        times.append(1000 * (time.perf_counter() - begin))
        losses.append(loss.item())
    median = statistics.median(times[3:])
    rows = mesh["dp"].size()
    peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None
    return {
        "ranks": mesh.size(), **{name: mesh[name].size() for name in ("dp", "cp", "tp")}, "tokens": tokens,
        "ms_per_step": median, "ms": times[3:], "tokens_per_s": 1000 * rows * tokens / median,
        "peak_gb": peak, "first_loss": losses[0], "last_loss": losses[-1],
    }  # fmt: skip


@contextlib.contextmanager
def processes(**which):
    """A process group of the processes that the keyword arguments of `init_process_group` name."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(minutes=30), **which)
    try:
        yield
    finally:
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, nargs="+", default=[65536, 262144])
    parser.add_argument("--plans", nargs="+", default=["one", "cp", "tp", "dp"], help="one GPU, or all of them so")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--sizes", type=json.loads, default={}, help="changes of the model's sizes, as JSON")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    sizes = SIZES | args.sizes
    record = {
        "gpu": torch.cuda.get_device_name() if device == "cuda" else "none", "date": datetime.date.today().isoformat(),
        "torch": torch.__version__, "triton": triton.__version__, "dtype": "bfloat16", **sizes, "rows": [],
    }  # fmt: skip

    def run(plan: str, tokens: int) -> None:
        row = measure({} if plan == "one" else {plan: world}, tokens, args.steps, sizes, device)
        torch.compiler.reset()
        if device == "cuda":
            torch.cuda.empty_cache()
        if rank == 0:
            record["rows"].append({"plan": plan, **row})
            args.out.write_text(json.dumps(record, indent=1) + "\n")
            peak = "" if row["peak_gb"] is None else f", peak {row['peak_gb']:.1f} GB"
            print(
                f"{plan} x {row['ranks']}, {tokens} tokens: {row['ms_per_step']:.1f} ms,",
                f"{row['tokens_per_s']:.0f} tokens/s{peak}, loss {row['first_loss']:.4f}",
                flush=True,
            )

    if rank == 0 and "one" in args.plans:  # the others wait where they meet
        with processes(store=dist.HashStore(), rank=0, world_size=1):
            for tokens in args.tokens:
                run("one", tokens)
    with processes():
        for tokens in args.tokens:
            for plan in args.plans:
                if plan != "one":
                    run(plan, tokens)


if __name__ == "__main__":
    main()
