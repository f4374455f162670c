"""Train a whole model on one GPU, Native Sparse Attention beside dense attention: tokens/s, peak memory, utilisation.

`python profiles/train.py OUT.json`. The package's own loop (`nsa_compile.train.train`) on Python's standard library as
bytes, joined to rows of 65536 tokens, in bf16 with fp32 master weights, selective activation checkpointing and chunked
cross-entropy over 32768 token ids. The first steps compile and are left out. Dense attention is torch's (SDPA), causal.
"""

import argparse
import datetime
import json
import statistics
import tempfile
from pathlib import Path

import torch
import triton

import nsa_compile as nsa
from nsa_compile.data import Corpus, build_shards
from nsa_compile.train import StepMetrics, TrainConfig, train

SIZES = {"dim": 1024, "n_heads": 16, "n_kv_groups": 1, "d_k": 128, "d_v": 128, "n_layers": 12, "vocab_size": 32768}
WARM = 2


def measure(attention: str, corpus: Corpus, config: TrainConfig, sizes: dict, device: str) -> dict:
    """A short run from the same weights and rows."""
    torch.manual_seed(0)
    model = nsa.NSALanguageModel(nsa.NSAConfig(**sizes, attention=attention)).to(device)
    steps: list[StepMetrics] = []
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with tempfile.TemporaryDirectory() as out:
        train(model, corpus, config, out, on_step=steps.append)
    timed = steps[WARM:]
    speed = statistics.median(x.tokens_per_s for x in timed)
    return {
        "attention": attention, "parameters": sum(p.numel() for p in model.parameters()), "tokens_per_s": speed,
        "s_per_step": config.batch_size * config.seq_len / speed,
        "tokens_per_s_of_steps": [x.tokens_per_s for x in timed],
        "mfu": None if timed[0].mfu is None else statistics.median(x.mfu for x in timed),
        "gb_peak": torch.cuda.max_memory_allocated() / 1e9, "gb_weights": before / 1e9,
        "losses": [x.loss for x in steps],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--layers", type=int, default=SIZES["n_layers"])
    parser.add_argument("--compile", default="block", help="model, block or none")
    parser.add_argument("--checkpointing", nargs="+", default=["selective"], help="none, matmuls, selective or full")
    parser.add_argument("--attention", nargs="+", default=["nsa", "dense"])
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    sizes, rows = SIZES | {"n_layers": args.layers}, []
    with tempfile.TemporaryDirectory() as folder:
        corpus = build_shards([], Path(folder) / "shards")
        for checkpointing in args.checkpointing:
            config = TrainConfig(
                steps=args.steps, seq_len=args.tokens, batch_size=args.batch, packed=False, warmup=2, dtype="bf16",
                compile=args.compile, checkpointing=checkpointing, eval_every=args.steps, eval_batches=1,
                stats_every=args.steps + 1, save_every=args.steps,
            )  # fmt: skip
            for attention in args.attention:
                rows.append({"checkpointing": checkpointing} | measure(attention, corpus, config, sizes, args.device))
                x = rows[-1]
                print(
                    f"{attention}, {checkpointing}: {x['tokens_per_s']:,.0f} tokens/s, {x['s_per_step']:.3f} s a step, "
                    f"peak {x['gb_peak']:.1f} GB, MFU {x['mfu'] or 0:.1%}, loss {x['losses'][0]:.3f} to "
                    f"{x['losses'][-1]:.3f}",
                    flush=True,
                )
                torch.compiler.reset()
    record = {
        "gpu": torch.cuda.get_device_name(), "date": datetime.date.today().isoformat(), "torch": torch.__version__,
        "triton": triton.__version__, "tokens": args.tokens, "batch": args.batch, "compile": args.compile, **sizes,
        "rows": rows,
    }  # fmt: skip
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
