"""Find needles in long text: Native Sparse Attention, and the same model with its window alone.

`python profiles/needle.py OUT.json` (extra bench for the picture OUT.png). `--only nsa` and `--only window` make one
model each, in about 4 minutes of an H100; `OUT.json --merge A.json B.json` joins them and draws without a GPU.

A row is text (bytes of Python's standard library) in which needles, keys followed by their values, stand at random
places, `together` of them side by side in each of equal parts of the text. After the text all keys come once more, in
another order, each with its value, which is to be predicted. Nothing else counts for the loss. Windows of all layers
together reach back `layers * (w - 1)` tokens: what stands further away, a model with its window alone cannot know, but
guess. That model is the package's (`branch="win"`): gates of 1 for the window and 0 for the others, in training and in
the test. The tests "without" a branch are of the trained model with that branch's gates closed: they tell what counts.
Filler of the test is held-out text, with one needle for `test_apart` tokens of a row, or fewer.

How it learns: many needles in a row, so that there are many answers; short rows first, but longer than windows reach,
twice as long as soon as 95 % are found (or after a share of the time), and then the longer lengths in turn; weights
that start with a standard deviation of 1/sqrt(inputs), with which small models learnt several times faster; a rising,
then falling learning rate.
"""

import argparse
import copy
import datetime
import json
import math
import tempfile
import time
from collections import deque
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import nsa_compile as nsa
from nsa_compile.data import build_shards
from nsa_compile.module import BRANCHES, GateMLP
from nsa_compile.precision import computing_in

BYTES = 256
MODELS = {"nsa": None, "window": "win"}
FULL: dict[str, Any] = {
    "model": {"dim": 128, "n_heads": 8, "n_kv_groups": 2, "d_k": 64, "d_v": 64, "n_layers": 2, "phi": "mlp",
              "l": 8, "d": 4, "l_sel": 16, "n_sel": 8, "w": 16, "rope_theta": 500000.0},
    "lengths": [64, 128, 256, 512, 1024, 2048, 4096, 8192], "test": [512, 1024, 2048, 4096, 8192, 16384],
    "needles": 64, "apart": 8, "test_apart": 64, "together": 1, "keys": 64, "values": 32, "value_tokens": 2,
    "tokens": 65536, "steps": 12000, "seconds": 200.0, "lr": 2e-3, "warmup": 100, "test_tokens": 2**20, "seed": 0,
}  # fmt: skip
SMALL = FULL | {
    "model": {"dim": 64, "n_heads": 4, "n_kv_groups": 2, "d_k": 32, "d_v": 32, "n_layers": 2, "phi": "mlp",
              "l": 8, "d": 4, "l_sel": 8, "n_sel": 6, "w": 16, "rope_theta": 500000.0},
    "lengths": [32, 64, 128, 256], "test": [128, 256, 512],
    "needles": 16, "apart": 8, "test_apart": 16, "together": 1, "keys": 32, "values": 16, "value_tokens": 1,
    "tokens": 2048, "steps": 400, "seconds": 60.0, "lr": 3e-3, "warmup": 20, "test_tokens": 2**14,
}  # fmt: skip
DEPTHS = 10


class Rows(NamedTuple):
    """Rows of text with needles, and their questions."""

    ids: Tensor
    """int64 [b, t]."""
    asked: Tensor
    """Places in a row that the tokens of the answers are predicted at, int64 [n * value tokens]."""
    needles: Tensor
    """Place of the needle that each question is about, int64 [b, n]."""


def draw(text: Tensor, t: int, s: dict, generator: torch.Generator) -> Rows:
    """About `s["tokens"]` tokens in rows of t; text uint8 [bytes] on the device of the generator."""
    rows, size, together, device = max(1, s["tokens"] // t), 1 + s["value_tokens"], s["together"], text.device
    n_groups = min(s["needles"], t // s["apart"]) // together
    n = n_groups * together
    how: dict[str, Any] = {"generator": generator, "device": device}
    begin = t - n * size  # of the questions
    part = begin // n_groups
    starts = torch.randint(len(text) - t, (rows, 1), **how)
    ids = text[starts + torch.arange(t, device=device)].long()
    keys = BYTES + torch.rand(rows, s["keys"], **how).argsort(1)[:, :n, None]
    values = BYTES + s["keys"] + torch.randint(s["values"], (rows, n, s["value_tokens"]), **how)
    items = torch.cat((keys, values), 2)
    groups = torch.randint(part - together * size + 1, (rows, n_groups), **how)
    groups = groups + torch.arange(n_groups, device=device) * part
    needles = (groups[..., None] + torch.arange(together, device=device) * size).flatten(1)
    ids.scatter_(1, (needles[..., None] + torch.arange(size, device=device)).flatten(1), items.flatten(1))
    order = torch.rand(rows, n, **how).argsort(1)
    ids[:, begin:] = items.gather(1, order[..., None].expand_as(items)).flatten(1)
    asked = begin + torch.arange(n, device=device)[:, None] * size + torch.arange(size - 1, device=device)
    return Rows(ids, asked.flatten(), needles.gather(1, order))


def answer(model: nsa.NSALanguageModel, rows: Rows, branch: str | None) -> tuple[Tensor, Tensor]:
    """Loss of the answers in nats per token, and which ones are right in all tokens, bool [b, n]."""
    logits = model.head(model.hidden(rows.ids, branch=branch).index_select(1, rows.asked)).float()
    target = rows.ids[:, rows.asked + 1]
    right = (logits.argmax(-1) == target).unflatten(1, (rows.needles.shape[1], -1)).all(-1)
    return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten()), right


def make_model(s: dict, device: str) -> nsa.NSALanguageModel:
    """A model whose products start with outputs about as large as their inputs."""
    torch.manual_seed(s["seed"])
    model = nsa.NSALanguageModel(nsa.NSAConfig(**s["model"], vocab_size=BYTES + s["keys"] + s["values"]))
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight.any():  # last layers of gates and φ start at zero
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    return model.to(device)


def train(model: nsa.NSALanguageModel, text: Tensor, s: dict, branch: str | None) -> list[dict]:
    """AdamW over rows that grow; what happened at every 50th step and at the end of each length."""
    generator = torch.Generator(text.device).manual_seed(1 + s["seed"])
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    lengths, stage, since, curve = s["lengths"], 0, 0.0, []
    recent: deque[Tensor] = deque(maxlen=20)
    begin = time.perf_counter()
    for step in range(s["steps"]):
        seconds = time.perf_counter() - begin
        share = max(step / s["steps"], seconds / s["seconds"])
        if share >= 1:
            break
        grows, longer = stage < len(lengths) and share < 0.5, lengths[len(lengths) // 3 :]
        t = lengths[stage] if grows else longer[step % len(longer)]
        for group in optimizer.param_groups:
            fall = 0.5 + 0.5 * math.cos(math.pi * max(0.0, 2 * share - 1))
            group["lr"] = s["lr"] * min((step + 1) / s["warmup"], 0.02 + 0.98 * fall)
        rows = draw(text, t, s, generator)
        loss, right = answer(model, rows, branch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent.append(right.float().mean())
        grown = False
        if grows and step % 10 == 9:  # the host waits for the device at every tenth step only
            known = len(recent) == recent.maxlen and torch.stack(list(recent)).mean().item() >= 0.95
            grown = known or share - since > (0.25 if stage == 0 else (0.5 - since) / (len(lengths) - stage))
        if grown or step % 50 == 49:
            found, seconds = torch.stack(list(recent)).mean().item(), time.perf_counter() - begin
            curve.append({"step": step + 1, "tokens": t, "loss": loss.item(), "found": found, "seconds": seconds})
            print(f"  step {step + 1}, {t} tokens: loss {loss.item():.4f}, found in the last steps {found:.1%}, "
                  f"{seconds:.0f} s", flush=True)  # fmt: skip
        if grown:
            stage, since = stage + 1, share
            recent.clear()
    return curve


class Choices(TorchDispatchMode):
    """Keeps the blocks that each layer selects, as the ops run: int32 [b, t, g, n_sel]."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "nsa_compile" and "select_blocks" in func._schema.name:
            self.blocks.append(out)
        return out


def without(model: nn.Module, branch: str, stack: ExitStack) -> None:
    """Close a trained model's gates of one branch, until the stack ends."""
    for module in model.modules():
        if isinstance(module, GateMLP):
            keep = torch.tensor([name != branch for name in BRANCHES], device=module.fc1.weight.device)
            hook = module.register_forward_hook(lambda module, args, gates, keep=keep: gates * keep)
            stack.callback(hook.remove)


@torch.no_grad()
def test(model: nsa.NSALanguageModel, text: Tensor, s: dict, t: int, branch: str | None, closed: str = "") -> dict:
    """Share of answers found in rows of t tokens: all, beyond the windows' reach, by depth of the needle."""
    c = model.config
    generator = torch.Generator(text.device).manual_seed(2**30)
    rights, depths, far, chosen = [], [], [], []
    with ExitStack() as stack:
        if closed:
            without(model, closed, stack)
        for _ in range(max(1, s["test_tokens"] // s["tokens"])):
            rows = draw(text, t, s | {"apart": s["test_apart"]}, generator)
            with Choices() as choices:
                _, right = answer(model, rows, branch)
            place = rows.asked[:: s["value_tokens"]]
            wanted = (rows.needles // c.l_sel)[..., None]
            hits = [(blocks[:, place].flatten(2) == wanted).any(-1) for blocks in choices.blocks]
            rights.append(right)
            depths.append(rows.needles * DEPTHS // rows.asked[0])
            far.append(place - rows.needles - s["value_tokens"] > c.n_layers * (c.w - 1))
            chosen.append(torch.stack(hits).any(0))
    right, depth, beyond, hit = (torch.cat(x).flatten().cpu() for x in (rights, depths, far, chosen))
    share = lambda mask: right[mask].double().mean().item() if mask.any() else None  # noqa: E731
    return {
        "tokens": t, "answers": right.numel(), "found": share(depth >= 0), "beyond_reach": int(beyond.sum()),
        "found_beyond_reach": share(beyond), "by_depth": [share(depth == i) for i in range(DEPTHS)],
        "selected": hit[beyond].double().mean().item() if beyond.any() else None,
    }  # fmt: skip


def run(name: str, s: dict, device: str) -> dict:
    """Train and test one of the two models."""
    with tempfile.TemporaryDirectory() as folder:
        corpus = build_shards([], Path(folder) / "shards")
        texts = [part.read(0, min(part.n_tokens, 2**26)) for part in (corpus.train, corpus.validation)]
        text, held_out = (x.to(device, torch.uint8) for x in texts)
    model, branch = make_model(s, device), MODELS[name]
    print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters")
    with computing_in(model, torch.bfloat16) if device == "cuda" else nullcontext():
        curve = train(model, text, s, branch)
        tests = {"whole": [test(model, held_out, s, t, branch) for t in s["test"]]}
        if name == "nsa":
            tests |= {f"without {x}": [test(model, held_out, s, t, branch, x) for t in s["test"]] for x in BRANCHES}
    for kind, rows in tests.items():
        for x in rows:
            print(f"  {kind}, {x['tokens']} tokens: found {x['found']:.2%}, beyond the windows' reach "
                  f"{x['found_beyond_reach'] or 0:.2%}, their block selected {x['selected'] or 0:.2%}")  # fmt: skip
    return {
        "gpu": torch.cuda.get_device_name() if device == "cuda" else "cpu", "date": datetime.date.today().isoformat(),
        "torch": torch.__version__, "sizes": s, "parameters": sum(p.numel() for p in model.parameters()),
        "curve": curve, "tests": tests,
    }  # fmt: skip


def plot(record: dict, path: Path) -> None:
    """Heat maps of what is found by depth and length, and the curves of training."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(record) + 1, figsize=(5 * len(record) + 4, 4), layout="constrained")
    for ax, (name, x) in zip(axes, record.items(), strict=False):
        rows, c = x["tests"]["whole"], x["sizes"]["model"]
        values = [[float("nan") if y is None else 100 * y for y in row["by_depth"]] for row in rows]
        ax.imshow(values, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
        for i, line in enumerate(values):
            for j, value in enumerate(line):
                ax.text(j, i, f"{value:.0f}" if value < 99.5 or value == 100 else f"{value:.1f}", ha="center",
                        va="center", fontsize=8)  # fmt: skip
        trained = max(x["sizes"]["lengths"])
        ax.set(title=f"{name}: % found", xlabel="depth of the needle, tenths of the text", ylabel="tokens",
               xticks=range(DEPTHS), yticks=range(len(rows)),
               yticklabels=[f"{row['tokens']}{'*' if row['tokens'] > trained else ''}" for row in rows])  # fmt: skip
        axes[-1].plot([y["step"] for y in x["curve"]], [100 * y["found"] for y in x["curve"]], marker=".", label=name)
    axes[-1].set(xlabel="steps, rows growing", ylabel="% found in training", ylim=(-2, 102))
    axes[-1].legend(loc="center right")
    axes[-1].grid(alpha=0.3)
    figure.suptitle(
        f"a query reads {c['n_sel'] * c['l_sel']} selected + {c['w']} window tokens and a compressed one for every "
        f"{c['d']}; {c['n_layers']} layers' windows "
        f"reach back {c['n_layers'] * (c['w'] - 1)}; * longer than trained", fontsize=10,
    )  # fmt: skip
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", choices=MODELS, help="one of the models")
    parser.add_argument("--merge", type=Path, nargs="+", metavar="JSON", help="join files of --only")
    parser.add_argument("--small", action="store_true", help="sizes for a CPU: two minutes, one-token values")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=NUMBER", help="other sizes, such as steps=100")
    args = parser.parse_args()
    record = {}
    for path in args.merge or []:
        record |= json.loads(path.read_text())
    if not args.merge:
        s = copy.deepcopy(SMALL if args.small else FULL)
        for item in args.set:
            name, value = item.split("=")
            where = s["model"] if name in s["model"] else s
            where[name] = type(where[name])(float(value))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        record = {name: run(name, s, device) for name in ([args.only] if args.only else MODELS)}
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    plot(record, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
