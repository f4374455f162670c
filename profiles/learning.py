"""Train one model on real text with Native Sparse Attention, by both gates, and with dense attention.

`python profiles/learning.py OUT.json` (extras train, and bench for the picture OUT.png). Text is what is installed:
sources and documents of Python and its packages, equal files once, a twentieth of the files held out, in tokens of a
vocabulary of 8192 that is learnt from 64 MiB of the others. The package's own loop (`nsa_compile.train.train`) takes
every model over the same rows in the same order, in bf16 with fp32 master weights. Then held-out text is read in
contexts of the trained length and of 2, 4 and 8 times that, the same tokens each time: documents joined, and files that
are that long.

`--only NAME` does one model, in a few minutes of an H100, and leaves what it builds in `--folder`; with `--minutes M`
it stops after so long, and the same command goes on from there. `OUT.json --merge A.json B.json …` joins files and
draws without a GPU. `--only data` builds the text alone. Beside each file of Native Sparse Attention, OUT-NAME.npz
says which blocks the trained model picks in a held-out file: `text` (tokens), `queries` (their positions), `blocks`
int16 [layers, queries, groups, n_sel], -1 for none, and `gates` float16 [layers, queries, groups, 3].
"""

import argparse
import datetime
import hashlib
import itertools
import json
import signal
import statistics
import sysconfig
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import nsa_compile as nsa
from nsa_compile.data import Corpus, PackedBatches, TokenShards, build_shards
from nsa_compile.data.shards import TOKENIZER_FILE
from nsa_compile.metrics import METRICS_FILE
from nsa_compile.precision import computing_in
from nsa_compile.train import StepMetrics, TrainConfig, train

MODELS = {
    "dense": {"attention": "dense"},
    "nsa-softmax": {"attention": "nsa", "gate": "softmax"},
    "nsa-sigmoid": {"attention": "nsa", "gate": "sigmoid"},
}
FULL: dict[str, Any] = {
    "model": {"dim": 512, "n_layers": 12, "n_heads": 16, "n_kv_groups": 2, "d_k": 64, "d_v": 64, "phi": "mlp",
              "l": 32, "d": 16, "l_sel": 64, "n_sel": 8, "w": 256},
    "vocab": 8192, "bytes": 2**29, "seq_len": 4096, "batch_size": 16, "steps": 800, "lr": 1e-3, "warmup": 80,
    "eval_every": 50, "eval_batches": 4, "test_tokens": 2**20, "compile": "block",
}  # fmt: skip
SMALL = FULL | {
    "model": {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_groups": 2, "d_k": 16, "d_v": 16, "phi": "mlp",
              "l": 8, "d": 4, "l_sel": 16, "n_sel": 4, "w": 32},
    "vocab": 512, "bytes": 2**21, "seq_len": 256, "batch_size": 4, "steps": 100, "lr": 4e-3, "warmup": 10,
    "eval_every": 20, "eval_batches": 2, "test_tokens": 2**12, "compile": "none",
}  # fmt: skip
SUFFIXES = {".py", ".pyi", ".md", ".rst", ".h", ".hpp", ".cuh"}
LARGEST = 2**20
"""Bytes of a file; larger ones are mostly tables."""
LONGER = (1, 2, 4, 8)
EVERY = 16
"""Every 16th query's blocks are kept."""


# --- text ------------------------------------------------------------------------------------------------------------


def gather(path: Path, most: int) -> None:
    """Write installed text files as JSON Lines, in the order of their hashes, up to `most` bytes."""
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    roots = {Path(sysconfig.get_path(name)).resolve() for name in names} | {Path(torch.__file__).resolve().parents[1]}
    found = {}
    for file in sorted({file for root in roots for file in root.rglob("*") if file.suffix in SUFFIXES}):
        if file.is_file() and 0 < file.stat().st_size <= LARGEST:  # sha256 decides already what is held out
            found.setdefault(hashlib.blake2b(file.read_bytes()).hexdigest(), file)
    total = 0
    with path.open("w") as out:
        for _, file in sorted(found.items()):
            try:
                text = file.read_bytes().decode()
            except UnicodeDecodeError:
                continue
            total += len(text.encode())
            if total > most:
                break
            out.write(json.dumps({"text": text}) + "\n")


def learn_vocabulary(documents: TokenShards, size: int, path: Path, most: int = 2**26) -> None:
    """Byte pairs of the documents, which are bytes, up to `most` of them."""
    import tokenizers

    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    n = int(np.searchsorted(documents.starts, most))
    texts = (
        documents.document(i)[:-1].numpy().astype(np.uint8).tobytes() for i in range(min(n, documents.n_documents))
    )
    model.train_from_iterator((text.decode() for text in texts), trainer)
    model.save(str(path))


def prepare(folder: Path, s: dict) -> tuple[Corpus, dict]:
    """The text as tokens, built in a folder where it is not there yet, and facts about it."""
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "text.jsonl"
    if not text.exists():
        gather(folder / "text.part", s["bytes"])
        (folder / "text.part").rename(text)
    as_bytes = build_shards([text], folder / "bytes")  # the same documents are held out, whatever the tokenizer
    if not (folder / TOKENIZER_FILE).exists():
        learn_vocabulary(as_bytes.train, s["vocab"], folder / TOKENIZER_FILE)
    corpus = build_shards([text], folder / "tokens", tokenizer=folder / TOKENIZER_FILE)
    facts: dict[str, Any] = {"digest": corpus.digest(), "vocab": corpus.vocab_size}
    for name in ("train", "validation"):
        one, other = getattr(as_bytes, name), getattr(corpus, name)
        n_bytes = one.n_tokens - one.n_documents
        facts[name] = {"files": other.n_documents, "bytes": n_bytes, "tokens": other.n_tokens}
    return corpus, facts


# --- a model ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def losses(model: nsa.NSALanguageModel, rows: Tensor, length: int) -> Tensor:
    """Nats of each token of rows [n, t], cut into contexts, but the first of each: [contexts, length - 1]."""
    found, tokens = [], rows.shape[1]
    for ids in rows.view(-1, length).split(tokens // length):
        x, target = model.hidden(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        parts = zip(x.split(2**13), target.split(2**13), strict=True)
        each = [torch.nn.functional.cross_entropy(model.head(a).float(), b, reduction="none") for a, b in parts]
        found.append(torch.cat(each).view(len(ids), -1))
    return torch.cat(found)


def read_longer(model: nsa.NSALanguageModel, rows: Tensor, seq_len: int) -> dict:
    """Losses of the same rows by the length of the context they are cut into, and by position in it."""
    longest, by_length, by_position = LONGER[-1] * seq_len, {}, {}
    for times in LONGER:
        each = losses(model, rows, times * seq_len)
        by_length[times * seq_len] = each.mean().item()
        if times in (1, LONGER[-1]):
            edges = [0, *(2**i for i in range(5, 40) if 2**i < each.shape[1]), each.shape[1]]
            mean = each.mean(0)
            by_position[times * seq_len] = {
                f"{a}-{b - 1}": mean[a:b].mean().item() for a, b in itertools.pairwise(edges)
            }
    return {"rows": len(rows), "tokens": rows.numel(), "longest": longest, "by_length": by_length,
            "by_position": by_position}  # fmt: skip


def long_rows(corpus: Corpus, s: dict) -> dict[str, Tensor]:
    """Held-out rows of the longest context: documents joined, evenly spaced, and starts of files that long, if any."""
    longest = LONGER[-1] * s["seq_len"]
    n = max(1, min(s["test_tokens"], corpus.validation.n_tokens) // longest)
    batches = PackedBatches(corpus.validation, seq_len=longest, batch_size=1, seed=None, packed=False)
    joined = torch.cat([batch.ids for batch in batches.evenly_spaced(n)])
    long = np.flatnonzero(np.diff(corpus.validation.starts) > longest)[:n]
    files = [corpus.validation.document(int(i))[:longest] for i in long]
    return {"joined": joined} | ({"files": torch.stack(files)} if files else {})


class Seen(TorchDispatchMode):
    """Keeps what layers select and mix, as their ops run."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[Tensor] = []
        self.gates: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "nsa_compile":
            given = dict(zip((x.name for x in func._schema.arguments), args, strict=False)) | (kwargs or {})
            if func._schema.name == "nsa_compile::select_blocks":
                self.blocks.append(out)
            elif func._schema.name == "nsa_compile::selected_mixture":
                self.gates.append(given["gates"])
        return out


@torch.no_grad()
def write_selection(model: nsa.NSALanguageModel, corpus: Corpus, seq_len: int, path: Path, device: str) -> None:
    """The blocks that a trained model picks in the first held-out file of `seq_len` tokens or more."""
    c, lengths = model.config, np.diff(corpus.validation.starts)
    index = int(np.flatnonzero(lengths > seq_len)[0]) if (lengths > seq_len).any() else int(lengths.argmax())
    ids = corpus.validation.document(index)[:seq_len]
    with Seen() as seen:
        model.hidden(ids[None].to(device))
    gates = torch.cat(seen.gates)[:, EVERY - 1 :: EVERY].unflatten(2, (c.n_kv_groups, -1)).float().mean(3)
    tokenizer = corpus.tokenizer()
    np.savez_compressed(
        path, text=np.array([tokenizer.decode([token]).decode() for token in ids.tolist()]),
        queries=np.arange(EVERY - 1, len(ids), EVERY, dtype=np.int32),
        blocks=torch.cat(seen.blocks)[:, EVERY - 1 :: EVERY].to(torch.int16).cpu().numpy(),
        gates=gates.half().cpu().numpy(), config=json.dumps({"l_sel": c.l_sel, "n_sel": c.n_sel, "w": c.w}),
    )  # fmt: skip


def run(name: str, s: dict, folder: Path, corpus: Corpus, minutes: float, selection: Path, device: str) -> dict | None:
    """Train a model, or go on with it, and read longer contexts; None if the minutes were over before its end."""
    begin, out = time.perf_counter(), folder / name
    torch.manual_seed(0)
    model = nsa.NSALanguageModel(nsa.NSAConfig(**s["model"], **MODELS[name], vocab_size=corpus.vocab_size)).to(device)
    n_parameters = sum(p.numel() for p in model.parameters())
    config = TrainConfig(
        steps=s["steps"], seq_len=s["seq_len"], batch_size=s["batch_size"], packed=False, lr=s["lr"],
        warmup=s["warmup"], dtype="bf16" if device == "cuda" else "fp32", compile=s["compile"],
        eval_every=s["eval_every"], eval_batches=s["eval_batches"], stats_every=s["steps"], save_every=s["steps"],
    )  # fmt: skip
    print(f"{name}: {n_parameters:,} parameters, {s['steps'] * s['batch_size'] * s['seq_len']:,} tokens")

    def on_step(x: StepMetrics) -> None:
        if x.val_loss is not None:
            print(f"  step {x.step}: loss {x.loss:.4f}, held out {x.val_loss:.4f}, {x.tokens_per_s:,.0f} tokens/s, "
                  f"{time.perf_counter() - begin:.0f} s", flush=True)  # fmt: skip
        if time.perf_counter() - begin > 60 * minutes and x.step < s["steps"]:
            signal.raise_signal(signal.SIGINT)  # the loop saves and ends

    result = train(model, corpus, config, out, resume="auto", on_step=on_step)
    if result.step < s["steps"]:
        print(f"{name}: stopped at step {result.step} of {s['steps']}; the same command goes on")
        return None
    steps = [json.loads(line) for line in (out / METRICS_FILE).read_text().splitlines()]
    batches = PackedBatches(corpus.train, seq_len=s["seq_len"], batch_size=s["batch_size"], packed=False)
    speed = statistics.median(x["tokens_per_s"] for x in steps)
    with computing_in(model, torch.bfloat16) if device == "cuda" else nullcontext():
        longer = {
            kind: read_longer(model, rows.to(device), s["seq_len"]) for kind, rows in long_rows(corpus, s).items()
        }
        if MODELS[name]["attention"] == "nsa":
            write_selection(model, corpus, s["seq_len"], selection, device)
    return {
        "gpu": torch.cuda.get_device_name() if device == "cuda" else "cpu", "date": datetime.date.today().isoformat(),
        "torch": torch.__version__, "parameters": n_parameters, "epochs": batches.epoch_at(s["steps"]),
        "tokens": s["steps"] * s["batch_size"] * s["seq_len"], "tokens_per_s": speed,
        "mfu": statistics.median(x["mfu"] for x in steps) if "mfu" in steps[0] else None,
        "gb_peak": max(x["memory"] for x in steps) / 1e9, "layers": steps[-1].get("layers"),
        "losses": [round(x["loss"], 5) for x in steps],
        "held_out": [(x["step"], x["val_loss"]) for x in steps if "val_loss" in x], "longer": longer,
    }  # fmt: skip


# --- all of them -----------------------------------------------------------------------------------------------------


def merge(records: list[dict]) -> dict:
    """One record of several of the same text and sizes."""
    first = records[0]
    for other in records[1:]:
        for name in ("text", "sizes"):
            if other[name] != first[name]:
                raise ValueError(f"merge: expected the same {name} in all files, got {first[name]} and {other[name]}")
    return first | {"runs": {name: x for record in records for name, x in record["runs"].items()}}


def compare(record: dict) -> dict[str, dict]:
    """Each model's loss relative to dense attention, at the end of training and by context; printed, too."""
    runs, found = record["runs"], {}
    dense = runs.get("dense")
    for name, x in runs.items():
        print(
            f"{name}: held out {x['held_out'][-1][1]:.4f}, {x['epochs']:.2f} epochs, {x['tokens_per_s']:,.0f} tokens/s"
        )
        if dense is not None and name != "dense":
            found[name] = {"held_out": x["held_out"][-1][1] / dense["held_out"][-1][1] - 1}
            for kind in x["longer"]:
                pairs = zip(
                    x["longer"][kind]["by_length"].items(), dense["longer"][kind]["by_length"].values(), strict=True
                )
                found[name] |= {f"{kind}, {length}": a / b - 1 for (length, a), b in pairs}
            print("  against dense: " + "; ".join(f"{key} {value:+.2%}" for key, value in found[name].items()))
    return found


def plot(record: dict, path: Path) -> None:
    """Losses over the tokens trained on, by the length of the context, and by position in the longest."""
    from matplotlib import pyplot

    s, runs = record["sizes"], record["runs"]
    figure, (curves, lengths, positions) = pyplot.subplots(1, 3, figsize=(17, 4.6), layout="constrained")
    millions = s["batch_size"] * s["seq_len"] / 1e6
    for name, color in zip(MODELS, ("#444444", "#0b3c8c", "#c8321e"), strict=True):
        if name not in runs:
            continue
        n = max(1, len(runs[name]["losses"]) // 50)
        smooth = np.convolve(runs[name]["losses"], np.ones(n) / n, "valid")
        curves.plot(millions * (np.arange(len(smooth)) + n), smooth, color=color, alpha=0.35, linewidth=1)
        steps, values = zip(*runs[name]["held_out"], strict=True)
        curves.plot(millions * np.array(steps), values, color=color, marker=".", label=name)
        for kind, x in runs[name]["longer"].items():
            how = {"color": color, "marker": ".", "linestyle": "-" if kind == "joined" else "--",
                   "label": f"{name}, {'documents joined' if kind == 'joined' else 'long files'}"}  # fmt: skip
            lengths.plot(list(x["by_length"]), list(x["by_length"].values()), **how)
            bins = x["by_position"][str(x["longest"])]
            positions.plot([where.split("-")[0] for where in bins], list(bins.values()), **how)
    low = min(min(x["losses"]) for x in runs.values())
    curves.set(xlabel="million tokens", ylabel="nats per token", title="held out, and training (pale, running mean)",
               ylim=(0.95 * low, 1.8 * low))  # fmt: skip
    lengths.set(xlabel=f"tokens of a context; trained with {s['seq_len']}", title="held out, the same tokens")
    positions.set(xlabel=f"position in {LONGER[-1] * s['seq_len']} tokens, from … on", title="held out, by position")
    positions.tick_params(axis="x", rotation=60)
    for ax in (curves, lengths, positions):
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", choices=("data", *MODELS), help="one of the models, or the text alone")
    parser.add_argument("--merge", type=Path, nargs="+", metavar="JSON", help="join files of --only")
    parser.add_argument("--folder", type=Path, help="for text and checkpoints; default: OUT without its suffix")
    parser.add_argument("--minutes", type=float, default=8.0, help="of training in this call, for each model")
    parser.add_argument("--small", action="store_true", help="sizes for a CPU: two minutes, to see that it works")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="other sizes, such as steps=100")
    args = parser.parse_args()
    if args.merge:
        record = merge([json.loads(path.read_text()) for path in args.merge])
    else:
        s = dict(SMALL if args.small else FULL)
        for item in args.set:
            name, value = item.split("=")
            s[name] = value if isinstance(s[name], str) else type(s[name])(float(value))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        folder = args.folder or args.out.with_suffix("")
        corpus, facts = prepare(folder, s)
        print(json.dumps(facts))
        if args.only == "data":
            return
        record = {"text": facts, "sizes": s, "runs": {}}
        for name in [args.only] if args.only else MODELS:
            selection = args.out.with_name(f"{args.out.stem}-{name}.npz")
            found = run(name, s, folder, corpus, args.minutes, selection, device)
            if found is None:
                raise SystemExit(1)
            record["runs"][name] = found
            torch.compiler.reset()
        record = json.loads(json.dumps(record))
    record["against_dense"] = compare(record)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    plot(record, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
