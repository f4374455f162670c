"""nsa-compile: train a small model on text, generate from it, see what runs where."""

import dataclasses
import enum
import importlib.metadata
import itertools
import platform
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

import nsa_compile
from nsa_compile.config import NSAConfig
from nsa_compile.custom_ops.dispatch import resolve_impl
from nsa_compile.data import load_text, unigram_entropy
from nsa_compile.demo import run_demo
from nsa_compile.generate import generate
from nsa_compile.graphs.cache import NSACache
from nsa_compile.model import NSALanguageModel
from nsa_compile.profile import MODES, TENSORBOARD, TRACE_FILE, ProfileConfig, default_sizes, run_profile
from nsa_compile.profile_summary import diff, load_summary, say_diff, say_profile
from nsa_compile.terminal import (
    TextStream,
    can_compile,
    cpp_compiler,
    one_thread,
    say_corpus,
    say_model,
    train_with_progress,
)  # fmt: skip
from nsa_compile.train import DTYPES, METRICS_FILE, TrainConfig, find_checkpoint

OPS = (
    "compress_mean", "compressed_attention", "select_blocks", "selected_attention", "window_attention", "gated_sum",
    "decode_attention",
)  # fmt: skip


class DType(enum.StrEnum):
    """Types of weights and activations."""

    fp32 = "fp32"
    bf16 = "bf16"


class Attention(enum.StrEnum):
    """Attention of a model."""

    nsa = "nsa"
    dense = "dense"


class ErrorLine(TyperGroup):
    """Commands whose errors about input are one line on stderr and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except (ValueError, OSError, FloatingPointError) as error:
            if ctx.params.get("traceback"):
                raise
            print("error:", " ".join(str(error).split()), file=sys.stderr)
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=ErrorLine,
    help=__doc__,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """The command nsa-compile."""
    app()


@app.callback()
def options(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error comes from.")] = False,
) -> None:
    """Native Sparse Attention: train a small model on text, generate from it, see what runs where."""


Text = Annotated[
    list[Path] | None,
    typer.Option(
        help="UTF-8 file or folder to read as bytes; may be given several times. "
        "Default: the sources of Python's standard library on this machine."
    ),
]
Compile = Annotated[bool, typer.Option("--compile/--no-compile", help="Run the model through torch.compile.")]
Device = Annotated[str, typer.Option(help='Device, such as "cpu" or "cuda".')]
SIZES_SHOWN = "small on a CPU, the paper's on CUDA"
Size = Annotated[int | None, typer.Option(show_default=SIZES_SHOWN)]
Kind = Annotated[DType, typer.Option(help="Type of weights and activations alike.")]


@app.command()
def demo(
    text: Text = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for checkpoint and metrics.", show_default="nsa-demo, or nsa-demo-2, ..."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Updates of the model.", min=1)] = 250,
    compile: Compile = True,
) -> None:
    """Train a small byte model on real text, decode from its cache, and check what it did; two minutes on a CPU.

    Compiles the loss to one graph, trains it, prefills a prompt of held-out text, streams the continuation, shows the
    tokens that each step read from the cache and how the gates mix the branches, and compares the decoded steps with
    one forward over the whole text (exit code 1 if they differ). Losses are in nats per byte.
    """
    with one_thread():
        run_demo(text or [], out or free_folder("nsa-demo"), steps, compile)


@app.command("train")
def train_command(
    text: Text = None,
    out: Annotated[Path, typer.Option(help="Folder for checkpoints and metrics.")] = Path("nsa-run"),
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out: same text and options.")] = False,
    steps: Annotated[int, typer.Option(help="Updates.")] = 1000,
    seq_len: Annotated[int, typer.Option(help="Tokens of a window.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Windows of an update.")] = 8,
    lr: Annotated[float, typer.Option(help="Highest learning rate, after warm-up; then a cosine.")] = 1e-3,
    warmup: Annotated[int, typer.Option(help="Steps of linear warm-up.")] = 50,
    clip: Annotated[float, typer.Option(help="Largest norm of the gradient.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of weights and of the order of the windows.")] = 0,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 200,
    eval_every: Annotated[int, typer.Option(help="Steps between losses on held-out text.")] = 200,
    eval_batches: Annotated[int, typer.Option(help="Batches of held-out text.")] = 8,
    device: Device = "cpu",
    dtype: Kind = DType.fp32,
    compile: Compile = True,
    attention: Annotated[Attention, typer.Option(help="Native sparse attention, or dense to compare.")] = Attention.nsa,
    n_layers: Annotated[int, typer.Option(help="Transformer blocks.")] = 4,
    dim: Annotated[int, typer.Option(help="Channels of the residual stream.")] = 256,
    n_heads: Annotated[int, typer.Option(help="Query heads.")] = 8,
    n_kv_groups: Annotated[int, typer.Option(help="Key/value heads.")] = 2,
    d_k: Annotated[int, typer.Option(help="Channels of a query and key head.")] = 32,
    d_v: Annotated[int, typer.Option(help="Channels of a value head.")] = 32,
    l: Annotated[int, typer.Option("--l", help="Length of a compression block.")] = 16,
    d: Annotated[int, typer.Option("--d", help="Stride of the compression blocks.")] = 8,
    l_sel: Annotated[int, typer.Option(help="Length of a selection block.")] = 16,
    n_sel: Annotated[int, typer.Option(help="Blocks selected per query.")] = 8,
    w: Annotated[int, typer.Option("--w", help="Length of the sliding window.")] = 64,
    phi: Annotated[str, typer.Option(help='Compressor: "avg" or "mlp".')] = "avg",
    gate: Annotated[str, typer.Option(help='Gate: "softmax" or "sigmoid".')] = "softmax",
) -> None:
    """Train a byte model on text: AdamW, warm-up and cosine, clipping; checkpoints and metrics in --out.

    Ctrl-C ends the run after the step at hand and saves; --resume continues it exactly. A loss that is not finite
    stops the run before it changes the weights.
    """
    console = Console(markup=False, highlight=False)
    target = find_device(device)
    config = TrainConfig(
        steps=steps, seq_len=seq_len, batch_size=batch_size, lr=lr, warmup=warmup, clip=clip, seed=seed,
        dtype=dtype.value, compile=compile and can_compile(console, device), eval_every=eval_every,
        eval_batches=eval_batches, save_every=save_every,
    )  # fmt: skip
    model_config = NSAConfig(
        dim=dim, n_heads=n_heads, n_kv_groups=n_kv_groups, d_k=d_k, d_v=d_v, l=l, d=d, l_sel=l_sel, n_sel=n_sel, w=w,
        phi=phi, gate=gate, n_layers=n_layers, vocab_size=256, attention=attention.value,
    )  # fmt: skip
    corpus = load_text(text or [])
    say_corpus(console, corpus)
    torch.manual_seed(seed)
    model = NSALanguageModel(model_config).to(target)
    say_model(console, model, config)
    result = train_with_progress(console, model, corpus, config, out, resume=resume)
    if result.val_loss is not None:
        entropy = unigram_entropy(corpus.train)
        console.print(
            f"loss on held-out text {result.val_loss:.3f} nats/byte; entropy of single bytes {entropy:.3f} nats/byte"
        )
    console.print(f"checkpoint {result.checkpoint}, metrics {out / METRICS_FILE}", soft_wrap=True)


@app.command("generate")
def generate_command(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a run, or of one checkpoint in it.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Bytes to generate at most.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest byte.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Share of probability to draw from, in (0, 1].")] = 0.95,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    device: Device = "cpu",
    dtype: Kind = DType.fp32,
    compile: Compile = False,
) -> None:
    """Continue a prompt with a model that `train` or `demo` left, streaming the text."""
    console = Console(stderr=True, markup=False, highlight=False)
    target = find_device(device)
    model = NSALanguageModel.from_pretrained(
        find_checkpoint(checkpoint) or checkpoint, dtype=DTYPES[dtype.value], device=target
    ).eval()
    if model.config.vocab_size != 256:
        raise ValueError(f"checkpoint: expected a model over bytes (vocab_size 256), got {model.config.vocab_size}")
    if compile and can_compile(console, device):
        model.compile()
    stream = TextStream()
    generate(
        model, [list(prompt.encode())], max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p,
        seed=seed, stop_token=0, on_token=lambda step, tokens: stream.write(tokens[0]),
    )  # fmt: skip
    stream.close()


@app.command("profile")
def profile_command(
    mode: Annotated[str | None, typer.Argument(help="train, prefill or decode.", show_default=False)] = None,
    compared: Annotated[
        tuple[Path, Path] | None,
        typer.Option("--diff", metavar="A B", help="Compare two profiles (folders, or their summary.json) instead."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write.", show_default="nsa-profile-MODE, or nsa-profile-MODE-2, ...")
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Run or checkpoint whose model to profile.")] = None,
    batch: Annotated[int, typer.Option(help="Rows.")] = 1,
    tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens of a row: to train on, to prefill, or in the cache.",
            show_default="256; on CUDA 8192, in the cache 65536",
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="Device.", show_default="cuda if there, else cpu")] = None,
    dtype: Annotated[
        DType | None, typer.Option(help="Type of weights and activations.", show_default="bf16 on CUDA, else fp32")
    ] = None,
    compile: Compile = True,
    graph: Annotated[bool, typer.Option("--graph/--no-graph", help="Decode by CUDA graph, on CUDA.")] = True,
    wait: Annotated[int, typer.Option(help="Steps without the profiler, after one that compiles.")] = 1,
    warmup: Annotated[int, typer.Option(help="Steps with the profiler on that are not in the trace.")] = 2,
    active: Annotated[int, typer.Option(help="Steps of the trace.")] = 3,
    memory: Annotated[bool, typer.Option("--memory/--no-memory", help="Trace the memory of a step as well.")] = True,
    attention: Annotated[Attention | None, typer.Option(help="Attention of the model.", show_default="nsa")] = None,
    n_layers: Size = None,
    dim: Size = None,
    n_heads: Size = None,
    n_kv_groups: Size = None,
    d_k: Size = None,
    d_v: Size = None,
    l: Annotated[int | None, typer.Option("--l", show_default=SIZES_SHOWN)] = None,
    d: Annotated[int | None, typer.Option("--d", show_default=SIZES_SHOWN)] = None,
    l_sel: Size = None,
    n_sel: Size = None,
    w: Annotated[int | None, typer.Option("--w", show_default=SIZES_SHOWN)] = None,
    phi: Annotated[str | None, typer.Option(show_default="avg")] = None,
    gate: Annotated[str | None, typer.Option(show_default="softmax")] = None,
    tie_kv: Annotated[bool | None, typer.Option("--tie-kv/--no-tie-kv", show_default="--no-tie-kv")] = None,
    vocab_size: Size = None,
) -> None:
    """Trace training, prefill or decoding: time per branch, launches, gaps, kernels, FLOP/s; files for trace viewers.

    Writes a trace for Perfetto (https://ui.perfetto.dev) or chrome://tracing, the same for TensorBoard's
    torch-tb-profiler, the table of kernels, the memory of a step and a summary. Random weights, or --checkpoint;
    random tokens. On a CPU in one thread.
    """
    console = Console(markup=False, highlight=False)
    if compared is not None:
        if mode is not None:
            raise ValueError(f"diff: expected no mode beside it, got {mode!r}")
        say_diff(console, diff(*(load_summary(path) for path in compared)))
        return
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)} (or --diff A B), got {mode!r}")
    target = find_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    cuda = target.type == "cuda"
    tokens = tokens or ((65536 if mode == "decode" else 8192) if cuda else 256)
    config = ProfileConfig(
        mode=mode, batch=batch, tokens=tokens, dtype=(dtype or (DType.bf16 if cuda else DType.fp32)).value,
        compile=compile and can_compile(console, str(target)), graph=graph, wait=wait, warmup=warmup, active=active,
        memory=memory,
    )  # fmt: skip
    sizes = {
        "n_layers": n_layers, "dim": dim, "n_heads": n_heads, "n_kv_groups": n_kv_groups, "d_k": d_k, "d_v": d_v,
        "l": l, "d": d, "l_sel": l_sel, "n_sel": n_sel, "w": w, "phi": phi, "gate": gate, "tie_kv": tie_kv,
        "vocab_size": vocab_size, "attention": attention.value if attention else None,
    }  # fmt: skip
    given = {name: size for name, size in sizes.items() if size is not None}
    if checkpoint is not None:
        if given:
            raise ValueError(f"checkpoint: expected it without sizes of a model, got {', '.join(given)} as well")
        folder = find_checkpoint(checkpoint) or checkpoint
        make_model = lambda: NSALanguageModel.from_pretrained(folder)  # noqa: E731
    else:
        model_config = NSAConfig(**default_sizes(target) | given)
        make_model = lambda: NSALanguageModel(model_config)  # noqa: E731
    out = out or free_folder(f"nsa-profile-{mode}")
    with nullcontext() if cuda else one_thread():
        summary = run_profile(make_model, config, target, out)
    say_profile(console, summary)
    console.print(f"{out / TRACE_FILE}: open it in https://ui.perfetto.dev", soft_wrap=True)
    console.print(f"{out / TENSORBOARD}: tensorboard --logdir {out / TENSORBOARD}", soft_wrap=True)
    console.print(f"{out}: {', '.join(sorted(path.name for path in out.iterdir()))}", soft_wrap=True)


@app.command()
def info(
    device: Annotated[
        str | None, typer.Option(help="Device to ask about.", show_default="cuda if there, else cpu")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Run or checkpoint whose cache to size.", show_default="the paper's sizes")
    ] = None,
    batch: Annotated[int, typer.Option(help="Rows of the cache.", min=1)] = 1,
    capacity: Annotated[int, typer.Option(help="Tokens per row of the cache.", min=1)] = 65536,
    dtype: Kind = DType.bf16,
) -> None:
    """Print versions, devices, the C++ compiler, which implementation each op uses and why, and a cache's memory."""
    console = Console(markup=False, highlight=False)
    target = find_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    console.print(f"nsa-compile {nsa_compile.__version__}, torch {torch.__version__}, triton {triton_version()}")
    console.print(f"Python {platform.python_version()}, {platform.platform()}", soft_wrap=True)
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        console.print(
            f"cuda:{index} {properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB"
        )
    console.print(f"cpu, {torch.get_num_threads()} threads" + ("" if torch.cuda.is_available() else "; no CUDA device"))
    compiler = cpp_compiler()
    console.print(f"C++ compiler {compiler or 'none: torch.compile cannot compile for the CPU'}", soft_wrap=True)
    table = Table("op", "implementation", "why", title=f"impl='auto' on {target}")
    for op in OPS:
        table.add_row(op, *resolve_impl(op, "auto", target))
    console.print(table)
    config = (
        NSAConfig()
        if checkpoint is None
        else NSAConfig.load((find_checkpoint(checkpoint) or checkpoint) / "config.json")
    )
    say_cache(console, config, batch, capacity, dtype)


def say_cache(console: Console, config: NSAConfig, batch: int, capacity: int, dtype: DType) -> None:
    """A table of the memory that decoding takes, as the config says and with the other kinds of attention."""
    title = (
        f"cache of {batch} x {capacity:,} tokens in {dtype.value}, {config.n_layers} layers, {config.n_kv_groups} "
        f"groups of {config.d_k} + {config.d_v} channels"
    )
    table = Table("attention", "bytes", "GiB", title=title)
    kinds = {
        "nsa": dataclasses.replace(config, attention="nsa", tie_kv=False),
        "nsa, tied keys and values": dataclasses.replace(config, attention="nsa", tie_kv=True),
        "dense": dataclasses.replace(config, attention="dense"),
    }
    for name, changed in kinds.items():
        with torch.device("meta"):
            model = NSALanguageModel(changed)
        size = NSACache.for_model(model, batch, capacity, dtype=DTYPES[dtype.value], device="meta").nbytes()
        table.add_row(name, f"{size:,}", f"{size / 2**30:.2f}")
    console.print(table)


def free_folder(name: str) -> Path:
    """The first of name, name-2, name-3, ... that does not exist."""
    return next(path for n in itertools.count(1) if not (path := Path(name if n == 1 else f"{name}-{n}")).exists())


def find_device(name: str) -> torch.device:
    """The device of that name. Raises ValueError for one that is not there."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # an unknown name, or a torch without this kind of device
        raise ValueError(f"device: expected one that torch can use here, got {name!r}: {error}") from error


def triton_version() -> str:
    """The version of Triton, or "none"."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "none"
