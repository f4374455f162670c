"""Hold the bytes that a decode step's attention reads against its counters of tokens, by the GPU's own counters.

`python profiles/decode_bytes.py OUT.json` runs a step of one layer under Nsight Compute (`ncu` on the PATH), which
empties the caches before every kernel, so that what a kernel reads comes from memory. The counters times the bytes of a
token say what the kernels that attend have to read: compressed tokens and window in the scan, blocks in the selected
attention.
"""

import argparse
import csv
import datetime
import io
import json
import subprocess
import sys
from pathlib import Path

import torch

import nsa_compile as nsa

HEADS, GROUPS, CHANNELS = 64, 4, 128
SIZES = {"l": 32, "d": 16, "l_sel": 64, "n_sel": 16, "w": 512}
READS = {"_decode_scan_kernel": ("cmp", "win"), "_decode_selected_kernel": ("slc",)}
"""Branches whose tokens a kernel reads; the others read and write what passes between these."""


def step(context: int, batch: int) -> dict[str, int]:
    """Run a step on random caches; returns the tokens it read by branch, summed over rows and groups."""
    torch.manual_seed(0)
    layer = nsa.NSAAttention(64, HEADS, GROUPS, CHANNELS, CHANNELS, **SIZES).to("cuda", torch.bfloat16)
    cache = nsa.NSACache.for_model(layer, batch, context + 8)
    for buffer in cache.layers[0].buffers.values():
        buffer.normal_()
    cache.positions.fill_(context)
    with torch.inference_mode():
        layer(torch.randn(batch, 1, 64, device="cuda", dtype=torch.bfloat16), cache)
    reads = cache.layers[0].actual_reads.sum((0, 1)).tolist()
    return dict(zip(("cmp", "slc", "win"), reads, strict=False))


def measure(context: int, batch: int) -> dict:
    """Bytes read and written by each kernel, and what the counters say of them."""
    command = [
        "ncu", "--csv", "--page", "raw", "--clock-control", "none", "--kernel-name", "regex:_decode_",
        "--metrics", "dram__bytes_read.sum,dram__bytes_write.sum",
        sys.executable, __file__, "--step", str(context), str(batch),
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"ncu: exit code {run.returncode}\n{run.stdout[-2000:]}\n{run.stderr[-2000:]}")
    tokens = json.loads(next(line for line in run.stdout.splitlines() if line.startswith("{")))
    table = [line for line in run.stdout.splitlines() if line.startswith('"')]
    rows = list(csv.DictReader(io.StringIO("\n".join(table))))
    units = {"byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}
    kernels: dict[str, dict[str, float]] = {}
    for row in rows[1:]:  # the first holds the units
        found = {
            name: float(row[f"dram__bytes_{name}.sum"].replace(",", "")) * units[rows[0][f"dram__bytes_{name}.sum"]]
            for name in ("read", "write")
        }
        kernels[row["Kernel Name"]] = found
    counted = {name: sum(tokens[b] for b in branches) * 2 * CHANNELS * 2 for name, branches in READS.items()}
    seen = {name: kernels[name]["read"] for name in READS}
    return {
        "context": context, "batch": batch, "tokens": tokens, "counted_bytes": counted, "read_bytes": seen,
        "ratio": sum(seen.values()) / sum(counted.values()),
        "ratio_of_all": sum(k["read"] for k in kernels.values()) / sum(counted.values()), "kernels": kernels,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--step", type=int, nargs=2, metavar=("CONTEXT", "BATCH"))
    args = parser.parse_args()
    if args.step:
        print(json.dumps(step(*args.step)))
        return
    rows = [measure(65536, batch) for batch in (1, 8)]
    for x in rows:
        print(f"{x['context']} x {x['batch']}: read / counted {x['ratio']:.3f}, of all kernels {x['ratio_of_all']:.3f}")
        print("   ", x["counted_bytes"], {name: round(value) for name, value in x["read_bytes"].items()})
    record = {
        "gpu": torch.cuda.get_device_name(), "date": datetime.date.today().isoformat(), "torch": torch.__version__,
        "rows": rows,
    }  # fmt: skip
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
