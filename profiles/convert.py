"""Train a small dense Llama of transformers on Python sources, convert it, and bring it back at long context.

`python profiles/convert.py OUT.json` (extra hf, and bench for the picture OUT.png). The dense model learns bytes in
short rows, then in long ones. Its converted copies (one for each `--phi`) and itself then go on over the same long
rows; losses on held-out text, in nats per byte, are taken on the way and by position. `--small` is for a CPU: a minute,
to see that it works. With `--dense FILE` the training before the conversion is a run of its own: it writes FILE only,
and the same command once more does the rest.
"""

import argparse
import copy
import datetime
import itertools
import json
import math
import sysconfig
import time
from pathlib import Path

import torch
import transformers
from torch import Tensor

import nsa_compile as nsa

FULL = {
    "model": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8,
              "num_key_value_heads": 2, "head_dim": 64},
    "nsa": {"l": 16, "d": 8, "l_sel": 32, "n_sel": 32, "w": 512},
    "short": 1024, "long": 16384, "tokens": 65536, "short_steps": 1000, "long_steps": 1000, "steps": 500,
    "lr": 1e-3, "long_lr": 3e-4, "last_lr": 5e-5, "gate_lr": 3e-3, "eval_every": 50, "eval_rows": 16, "bytes": 2**30,
}  # fmt: skip
SMALL = FULL | {
    "model": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "head_dim": 16},
    "nsa": {"l": 8, "d": 4, "l_sel": 16, "n_sel": 4, "w": 64},
    "short": 128, "long": 512, "tokens": 1024, "short_steps": 100, "long_steps": 10, "steps": 12,
    "lr": 3e-3, "long_lr": 1e-3, "last_lr": 1e-3, "eval_every": 4, "eval_rows": 4, "bytes": 2**22,
}  # fmt: skip


def read_text(folders: list[Path], most: int) -> tuple[Tensor, Tensor, int]:
    """Bytes of Python files, 0 between files: to train on, and of each twentieth folder, held out; number of files."""
    files = sorted({path for folder in folders for path in folder.rglob("*.py")})
    groups: dict[Path, list[bytes]] = {}
    count = total = 0
    for path in files:
        if "site-packages" in path.parts and not any("site-packages" in folder.parts for folder in folders):
            continue
        text = path.read_bytes()
        if total < most and text.strip():
            groups.setdefault(path.parent, []).append(text)
            count, total = count + 1, total + len(text)
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for number, texts in enumerate(groups.values()):  # a folder is on one side
        parts[number % 20 == 10].extend(texts)
    train, held_out = (torch.frombuffer(bytearray(b"\0".join(part)), dtype=torch.uint8) for part in parts)
    return train, held_out, count


def draw(text: Tensor, rows: int, length: int, generator: torch.Generator, device: str) -> Tensor:
    """Rows of length + 1 bytes from random places."""
    starts = torch.randint(len(text) - length - 1, (rows, 1), generator=generator)
    return text[starts + torch.arange(length + 1)].to(device).long()


def losses(model, ids: Tensor) -> Tensor:
    """Nats per byte at each position, [rows, length]."""
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.is_cuda):
        logits = model(ids[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), ids[:, 1:], reduction="none")


@torch.no_grad()
def evaluate(model, rows: Tensor) -> dict:
    """Mean loss over held-out rows, and by position in bins that double."""
    by_position = torch.stack([losses(model, row[None])[0] for row in rows]).mean(0)
    edges = [0, *(2**i for i in range(6, 40) if 2**i < len(by_position)), len(by_position)]
    bins = {f"{a}-{b - 1}": by_position[a:b].mean().item() for a, b in itertools.pairwise(edges)}
    return {"loss": by_position.mean().item(), "by_position": bins}


def train(model, text: Tensor, s: dict, *, length: int, steps: int, lr: float, seed: int, rows=None) -> tuple:
    """AdamW with warm-up and cosine; returns [(step, held-out loss)] where rows are given, and seconds."""
    device = next(model.parameters()).device.type
    gates = [p for name, p in model.named_parameters() if ".gate." in name]
    others = [p for name, p in model.named_parameters() if ".gate." not in name]
    groups = [{"params": others, "lr": lr}, {"params": gates, "lr": s["gate_lr"]}]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=0.01, betas=(0.9, 0.95))
    shape = lambda step: min((step + 1) / 20, 0.55 + 0.45 * math.cos(math.pi * step / steps))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, shape)
    generator = torch.Generator().manual_seed(seed)
    curve, spent, begin = [], 0.0, time.perf_counter()
    for step in range(steps + 1):
        if rows is not None and (step % s["eval_every"] == 0 or step == steps):
            spent += time.perf_counter() - begin
            curve.append((step, evaluate(model, rows)["loss"]))
            print(f"  step {step}: {curve[-1][1]:.4f}", flush=True)
            begin = time.perf_counter()
        if step == steps:
            break
        ids = draw(text, max(1, s["tokens"] // length), length, generator, device)
        for part in ids.split(max(1, 2**16 // length)):
            (losses(model, part).mean() * len(part) / len(ids)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if rows is None and step % 100 == 0:
            print(f"  step {step}", flush=True)
    return curve, spent + time.perf_counter() - begin


def make_dense(s: dict) -> transformers.LlamaForCausalLM:
    """A dense model of the sizes."""
    config = transformers.LlamaConfig(
        vocab_size=256, max_position_embeddings=s["long"], bos_token_id=None, eos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, **s["model"],
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def train_dense(text: Tensor, rows: Tensor, s: dict) -> tuple:
    """A dense model that learned short rows, then long ones; its losses and seconds, each by stage."""
    dense = make_dense(s).to(rows.device)
    stages, seconds = {}, {}
    for kind, name, lr, seed in (("short", "dense, short rows only", "lr", 2), ("long", "dense", "long_lr", 3)):
        print(f"dense, {kind} rows")
        _, seconds[name] = train(dense, text, s, length=s[kind], steps=s[f"{kind}_steps"], lr=s[lr], seed=seed)
        stages[name] = evaluate(dense, rows)
        print(f"{name}: {stages[name]['loss']:.4f}", flush=True)
    return dense, stages, seconds


def plot(record: dict, path: Path) -> None:
    """Loss over the steps after the conversion, and by position."""
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    for name, curve in record["curves"].items():
        left.plot(*zip(*curve, strict=True), marker=".", label=name)
    left.set(xlabel=f"steps at {record['sizes']['long']} bytes", ylabel="nats per byte, held out")
    for name, stage in record["stages"].items():
        right.plot(list(stage["by_position"]), list(stage["by_position"].values()), marker=".", label=name)
    stages = [stage["by_position"].values() for name, stage in record["stages"].items() if "short" not in name]
    low, high = min(map(min, stages)), max(map(max, stages))  # who knows short rows only leaves the picture
    right.set(xlabel="position in the row", ylim=(0.95 * low, 1.05 * high))
    right.tick_params(axis="x", rotation=60)
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--small", action="store_true", help="sizes for a CPU")
    parser.add_argument("--text", type=Path, nargs="+", help="folders of Python files; default: the standard library")
    parser.add_argument("--copy", action="store_true", help="a copy of the key and value projections for every branch")
    parser.add_argument("--gate", default="softmax", choices=("softmax", "sigmoid"))
    parser.add_argument("--phi", nargs="+", default=["avg"], choices=("avg", "mlp"), help="a converted copy for each")
    parser.add_argument("--dense", type=Path, help="file of the dense model: read if there, else written, and no more")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=NUMBER", help="other sizes, such as steps=100")
    args = parser.parse_args()
    s = copy.deepcopy(SMALL if args.small else FULL)
    for item in args.set:
        name, value = item.split("=")
        where = next((x for x in (s["model"], s["nsa"]) if name in x), s)
        where[name] = type(where[name])(float(value))
    for path in filter(None, (args.out, args.dense)):
        path.parent.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    text, held_out, n_files = read_text(args.text or [Path(sysconfig.get_paths()["stdlib"])], s["bytes"])
    print(f"{n_files} files, {len(text):,} bytes to train on, {len(held_out):,} held out")
    rows = draw(held_out, s["eval_rows"], s["long"], torch.Generator().manual_seed(1), device)
    made_of = {name: s[name] for name in s if name not in ("nsa", "steps", "last_lr", "gate_lr", "eval_every")}
    made_of |= {"files": n_files, "train": len(text)}
    if args.dense and args.dense.exists():
        weights, stages, seconds, before = torch.load(args.dense, map_location=device)
        if before != made_of:
            raise ValueError(f"{args.dense}: expected a dense model made of {made_of}, got {before}")
        dense = make_dense(s).to(device)
        dense.load_state_dict(weights)
    else:
        dense, stages, seconds = train_dense(text, rows, s)
        if args.dense:
            torch.save((dense.state_dict(), stages, seconds, made_of), args.dense)
            print(f"wrote {args.dense}; the same command now goes on with it")
            return
    models = {}
    for phi in dict.fromkeys(args.phi):
        name = f"converted, φ {phi}"
        models[name] = nsa.convert(copy.deepcopy(dense), tie_kv=not args.copy, gate=args.gate, phi=phi, **s["nsa"])
        stages[name] = evaluate(models[name], rows)
    curves = {}
    for name, model in (models | {"dense": dense}).items():
        print(f"{name}: {stages[name]['loss']:.4f}; trained on")
        curves[name], seconds[f"{name}, trained on"] = train(
            model, text, s, length=s["long"], steps=s["steps"], lr=s["last_lr"], seed=4, rows=rows
        )
        stages[f"{name}, trained on"] = evaluate(model, rows)
    for name in curves:
        print(f"{name}: {stages[name]['loss']:.4f} to {stages[f'{name}, trained on']['loss']:.4f}")
    record = {
        "gpu": torch.cuda.get_device_name() if device == "cuda" else "cpu", "date": datetime.date.today().isoformat(),
        "torch": torch.__version__, "transformers": transformers.__version__, "files": n_files, "train": len(text),
        "held_out": len(held_out), "parameters": sum(p.numel() for p in dense.parameters()), "sizes": s,
        "options": {"copy": args.copy, "gate": args.gate, "phi": args.phi}, "seconds": seconds, "stages": stages,
        "curves": curves,
    }  # fmt: skip
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    plot(record, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
