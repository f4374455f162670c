"""nsa-compile: train a small model on text, generate from it, see what runs where."""

import dataclasses
import importlib.metadata
import platform
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

import nsa_compile
from nsa_compile.bench.command import bench_command
from nsa_compile.config import NSAConfig
from nsa_compile.convert.command import convert_command
from nsa_compile.custom_ops import flash
from nsa_compile.custom_ops.dispatch import explain_thresholds, resolve_impl
from nsa_compile.data import load_tokenizer, open_shards, unigram_entropy
from nsa_compile.demo import run_demo
from nsa_compile.generate import generate
from nsa_compile.graphs.cache import NSACache
from nsa_compile.model import NSALanguageModel
from nsa_compile.options import Attention, Compile, Device, DType, Kind, find_device, free_folder
from nsa_compile.profile.command import profile_command
from nsa_compile.terminal import (
    TextStream,
    build_with_progress,
    can_compile,
    cpp_compiler,
    one_thread,
    say_corpus,
    say_model,
    train_with_progress,
)  # fmt: skip
from nsa_compile.train import (
    DATA_FOLDER,
    DTYPES,
    METRICS_FILE,
    TrainConfig,
    checkpoint_to_resume,
    find_checkpoint,
)

OPS = (
    "compress_mean", "compressed_attention", "select_blocks", "selected_attention", "window_attention", "gated_sum",
    "decode_attention",
)  # fmt: skip


class ErrorLine(TyperGroup):
    """Commands whose errors about input are one line on stderr and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except (ValueError, OSError, FloatingPointError, ImportError) as error:
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
        help="Text file, .jsonl, .jsonl.gz or .parquet, or folder of them; may be given several times. "
        "Default: the sources of Python's standard library on this machine."
    ),
]
TokenizerFile = Annotated[
    Path | None, typer.Option(help="File of the package tokenizers (tokenizer.json).", show_default="bytes")
]
EndToken = Annotated[
    str | None, typer.Option(help="The tokenizer's token after each document.", show_default="<|endoftext|> or alike")
]
Field = Annotated[str, typer.Option(help="Where JSON Lines and Parquet have the text.")]
Workers = Annotated[int | None, typer.Option(help="Processes that tokenize.", show_default="by CPUs and text")]


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


@app.command()
def tokenize(
    text: Annotated[
        list[Path] | None,
        typer.Argument(help="Text files, .jsonl, .jsonl.gz, .parquet, or folders of them.", show_default="as in train"),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the shards.")] = Path("nsa-data"),
    tokenizer: TokenizerFile = None,
    end_token: EndToken = None,
    field: Field = "text",
    held_out: Annotated[float, typer.Option(help="Share of the documents to hold out.")] = 0.05,
    shard_tokens: Annotated[int, typer.Option(help="Tokens of a shard.")] = 2**28,
    workers: Workers = None,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Replace what shards --out holds.")] = False,
) -> None:
    """Turn text into memory-mapped token shards for `train --data`, in several processes.

    Shards of the same text and settings are taken as they are, after a look at every byte.
    """
    console = Console(markup=False, highlight=False)
    corpus = build_with_progress(
        console, text or [], out, tokenizer=load_tokenizer(tokenizer, end_token=end_token), field=field,
        held_out=held_out, shard_tokens=shard_tokens, workers=workers, rebuild=rebuild,
    )  # fmt: skip
    for part in (corpus.train, corpus.validation):
        part.verify()
    say_corpus(console, corpus)
    n_shards = len(corpus.train.shards) + len(corpus.validation.shards)
    console.print(f"{n_shards} shards in {out}, vocabulary of {corpus.vocab_size:,}, left out {corpus.n_skipped} "
                  "documents that are empty or no text", soft_wrap=True)  # fmt: skip


@app.command("train")
def train_command(
    text: Text = None,
    data: Annotated[
        Path | None, typer.Option(help="Token shards of `tokenize`, in place of --text.", show_default="OUT/data")
    ] = None,
    tokenizer: TokenizerFile = None,
    end_token: EndToken = None,
    field: Field = "text",
    workers: Workers = None,
    out: Annotated[Path, typer.Option(help="Folder for checkpoints and metrics.")] = Path("nsa-run"),
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out: same text and options.")] = False,
    steps: Annotated[int, typer.Option(help="Updates.")] = 1000,
    seq_len: Annotated[int, typer.Option(help="Tokens of a row.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Rows of an update.")] = 8,
    packed: Annotated[
        bool, typer.Option("--packed/--joined", help="Keep attention within documents, or let it cross them in a row.")
    ] = True,
    max_documents: Annotated[
        int | None, typer.Option(help="Most documents in a row, if packed.", show_default="as many as there are")
    ] = None,
    lr: Annotated[float, typer.Option(help="Highest learning rate, after warm-up; then a cosine.")] = 1e-3,
    warmup: Annotated[int, typer.Option(help="Steps of linear warm-up.")] = 50,
    clip: Annotated[float, typer.Option(help="Largest norm of the gradient.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of weights and of the order of the rows.")] = 0,
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
    """Train a model on text: AdamW, warm-up and cosine, clipping; token shards, checkpoints and metrics in --out.

    Ctrl-C ends the run after the step at hand and saves; --resume continues it exactly. A loss that is not finite
    stops the run before it changes the weights.
    """
    console = Console(markup=False, highlight=False)
    target = find_device(device)
    config = TrainConfig(
        steps=steps, seq_len=seq_len, batch_size=batch_size, lr=lr, warmup=warmup, clip=clip, seed=seed,
        dtype=dtype.value, compile=compile and can_compile(console, device), eval_every=eval_every,
        eval_batches=eval_batches, save_every=save_every, packed=packed, max_documents=max_documents,
    )  # fmt: skip
    model_config = NSAConfig(
        dim=dim, n_heads=n_heads, n_kv_groups=n_kv_groups, d_k=d_k, d_v=d_v, l=l, d=d, l_sel=l_sel, n_sel=n_sel, w=w,
        phi=phi, gate=gate, n_layers=n_layers, vocab_size=256, attention=attention.value,
    )  # fmt: skip
    checkpoint_to_resume(out, resume)
    if data is not None:
        if text or tokenizer or end_token:
            raise ValueError("data: expected token shards alone, got --text, --tokenizer or --end-token beside them")
        corpus = open_shards(data)
    else:
        corpus = build_with_progress(
            console, text or [], out / DATA_FOLDER, tokenizer=load_tokenizer(tokenizer, end_token=end_token),
            field=field, workers=workers,
        )  # fmt: skip
    model_config = dataclasses.replace(model_config, vocab_size=corpus.vocab_size)
    say_corpus(console, corpus)
    torch.manual_seed(seed)
    model = NSALanguageModel(model_config).to(target)
    say_model(console, model, config)
    result = train_with_progress(console, model, corpus, config, out, resume=resume)
    if result.val_loss is not None:
        entropy = unigram_entropy(corpus.train)
        console.print(
            f"loss on held-out text {result.val_loss:.3f} nats/{corpus.unit}; entropy of single {corpus.unit}s "
            f"{entropy:.3f} nats/{corpus.unit}",
            soft_wrap=True,
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


app.command("bench")(bench_command)
app.command("convert")(convert_command)
app.command("profile")(profile_command)


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
        choice, more = resolve_impl(op, "auto", target), explain_thresholds(op, target)
        table.add_row(op, choice.impl, f"{choice.why}; {more}" if more else choice.why)
    console.print(table)
    say_flash(console, target)
    config = (
        NSAConfig()
        if checkpoint is None
        else NSAConfig.load((find_checkpoint(checkpoint) or checkpoint) / "config.json")
    )
    say_cache(console, config, batch, capacity, dtype)


def say_flash(console: Console, device: torch.device) -> None:
    """Which versions of flash-attn are there, and whether `impl="flash"` can run them on the device."""
    found = ", ".join(f"{flash.PACKAGES[version]} {text}" for version, text in flash.installed().items())
    q = torch.empty(1, 1, 2, 128, dtype=torch.bfloat16, device=device)
    pick = flash.pick_version(q, q[:, :, :1], q_start=None)
    runs = f"runs flash-attn {pick.version}" if pick.version else f"cannot run: {pick.why_not}"
    console.print(f"flash-attn: {found or 'not installed'}; impl='flash' on {device} {runs}", soft_wrap=True)


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


def triton_version() -> str:
    """The version of Triton, or "none"."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "none"
