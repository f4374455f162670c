"""nsa-compile: train a small model on text, generate from it, see what runs where."""

import dataclasses
import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch.torch_version import TorchVersion
from typer.core import TyperGroup

import nsa_compile
from nsa_compile.bench.command import bench_command
from nsa_compile.checkpoints import find_checkpoint
from nsa_compile.config import NSAConfig
from nsa_compile.convert.command import convert_command
from nsa_compile.custom_ops import flash
from nsa_compile.custom_ops.dispatch import explain_thresholds, resolve_impl
from nsa_compile.data import load_tokenizer, open_shards
from nsa_compile.demo import run_demo
from nsa_compile.generate import generate
from nsa_compile.graphs.cache import NSACache
from nsa_compile.hf_command import continue_text, is_of_transformers, read_config, say_converted_cache
from nsa_compile.launch import SaidElsewhere, rank
from nsa_compile.model import NSALanguageModel
from nsa_compile.options import (
    Compile,
    Device,
    DType,
    EndToken,
    Field,
    Kind,
    Text,
    TokenizerFile,
    Workers,
    find_device,
    free_folder,
)
from nsa_compile.profile.command import profile_command
from nsa_compile.terminal import TextStream, build_with_progress, can_compile, cpp_compiler, one_thread, say_corpus
from nsa_compile.train import DTYPES
from nsa_compile.train_command import export_command, train_command

OPS = (
    "compress_mean", "compressed_attention", "select_blocks", "selected_attention", "window_attention", "gated_sum",
    "selected_mixture", "decode_attention", "cache_append", "cache_recall", "cache_write",
)  # fmt: skip
"""The ops that have kernels; the others are of torch's own operations everywhere."""
OLDEST_TORCH, OLDEST_TRITON = "2.11", "3.6"

USAGE_ERROR: Any = typer.BadParameter.__mro__[1]
"""click's UsageError, wherever this version of typer has it from."""


class ErrorLine(TyperGroup):
    """Commands whose errors about input are one line on stderr and exit code 2."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the options before the command; without anything that is the help."""
        with error_line(ctx if args else None):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        with error_line(ctx):
            return super().invoke(ctx)


@contextmanager
def error_line(ctx: Any) -> Iterator[None]:
    """End the process with an error about input in one line; without a context, or if asked, with a traceback."""
    try:
        yield
    except USAGE_ERROR as error:
        if ctx is None:
            raise
        if not rank():
            command = (error.ctx or ctx).command_path
            say_error(f"{error.format_message().rstrip('.')}; {command} --help lists what is accepted")
        raise typer.Exit(2) from error
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        if ctx is None or ctx.params.get("traceback"):
            raise
        if not isinstance(error, SaidElsewhere):
            say_error(str(error))
        raise typer.Exit(2) from error
    except (MemoryError, RuntimeError) as error:
        if ctx is None or ctx.params.get("traceback") or not out_of_memory(error):
            raise
        why = (str(error).splitlines() or [""])[0] or "none left"
        say_error(f"memory: expected enough for these sizes, got: {why}; smaller ones take less")
        raise typer.Exit(2) from error


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that there is no more memory, of the machine or of a GPU."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
        words in str(error)
        for words in ("can't allocate memory", "Storage size calculation overflowed", "out of memory")
    )


def say_error(message: str) -> None:
    """One line on stderr."""
    print(f"error (rank {rank()}):" if rank() else "error:", " ".join(message.split()), file=sys.stderr)


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
    verify: Annotated[
        bool, typer.Option("--verify", help="Instead read the shards in TEXT (or --out) and compare their checksums.")
    ] = False,
) -> None:
    """Turn text into memory-mapped token shards for `train --data`, in several processes.

    Shards of the same text and settings are taken as they are, after a look at every byte; `tokenize --verify FOLDER`
    looks at those of a folder, whatever they were made of.
    """
    console = Console(markup=False, highlight=False)
    if verify:
        if rebuild:
            raise ValueError("verify: expected it without --rebuild, got both")
        for folder in text or [out]:
            corpus = open_shards(folder, verify=True)
            n_shards, n_tokens = (
                sum(len(part.shards) for part in (corpus.train, corpus.validation)),
                corpus.train.n_tokens + corpus.validation.n_tokens,
            )
            console.print(f"{folder}: {n_shards} shards, {n_tokens:,} {corpus.unit}s, every byte as it was built",
                          soft_wrap=True)  # fmt: skip
        return
    corpus = build_with_progress(
        console, text or [], out, tokenizer=load_tokenizer(tokenizer, end_token=end_token), field=field,
        held_out=held_out, shard_tokens=shard_tokens, workers=workers, rebuild=rebuild, verify=True,
    )  # fmt: skip
    say_corpus(console, corpus)
    n_shards = len(corpus.train.shards) + len(corpus.validation.shards)
    console.print(f"{n_shards} shards in {out}, vocabulary of {corpus.vocab_size:,}, left out {corpus.n_skipped} "
                  "documents that are empty or no text", soft_wrap=True)  # fmt: skip


app.command("train")(train_command)
app.command("export")(export_command)


@app.command("generate")
def generate_command(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a run, of a checkpoint, or of a converted model.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Bytes (or tokens) to generate at most.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest byte.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Share of probability to draw from, in (0, 1].")] = 0.95,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    device: Device = "cpu",
    dtype: Kind = DType.fp32,
    compile: Compile = False,
) -> None:
    """Continue a prompt with a model that `train`, `demo` or `convert` left, streaming the text."""
    console = Console(stderr=True, markup=False, highlight=False)
    target = find_device(device)
    if is_of_transformers(checkpoint):
        continue_text(
            checkpoint, prompt, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed,
            device=target, dtype=DTYPES[dtype.value], compile=compile,
        )  # fmt: skip
        return
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
    batch: Annotated[int, typer.Option(help="Rows of the cache.", min=1, max=65535)] = 1,
    capacity: Annotated[int, typer.Option(help="Tokens per row of the cache.", min=1, max=2**31 - 1)] = 65536,
    dtype: Kind = DType.bf16,
) -> None:
    """Print versions, devices, the C++ compiler, which implementation each op uses and why, and a cache's memory.

    Where something is missing for the whole package to run, it says what to do.
    """
    console = Console(markup=False, highlight=False)
    target = find_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    config = NSAConfig() if checkpoint is None else load_config(checkpoint)
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
    for line in advise(target, compiler):
        console.print(f"to do: {line}", soft_wrap=True)
    table = Table("op", "implementation", "why", title=f"impl='auto' on {target}")
    for op in OPS:
        choice, more = resolve_impl(op, "auto", target), explain_thresholds(op, target)
        table.add_row(op, choice.impl, f"{choice.why}; {more}" if more else choice.why)
    console.print(table)
    say_flash(console, target)
    say_cache(console, config, batch, capacity, dtype)


def load_config(checkpoint: Path) -> Any:
    """The config of a run's newest checkpoint, or of a folder of one. Raises ValueError where there is none."""
    path = (find_checkpoint(checkpoint) or checkpoint) / "config.json"
    if not path.is_file():
        raise ValueError(f"checkpoint: expected a run, a checkpoint or an exported model, got {checkpoint}")
    return read_config(checkpoint) if is_of_transformers(checkpoint) else NSAConfig.load(path)


def advise(device: torch.device, compiler: str | None) -> list[str]:
    """What to do about what keeps this machine from running all of the package, a sentence each."""
    found = []
    if TorchVersion(torch.__version__) < OLDEST_TORCH:
        found.append(f"install torch {OLDEST_TORCH} or newer: it has the interfaces that the ops are registered by")
    if torch.version.cuda is None and torch.version.hip is None:
        found.append(
            "for the kernels install a build of torch with CUDA, on a machine with an NVIDIA GPU of compute capability "
            "8.0 or newer; without one every op runs its reference: right, but slow, for small sizes and tests"
        )
    elif torch.version.hip is not None:
        found.append("use an NVIDIA GPU for the kernels: they are not for ROCm, where every op runs its reference")
    elif not torch.cuda.is_available():
        found.append(
            "torch is built with CUDA but finds no GPU: see whether nvidia-smi lists one, whether its driver is new "
            f"enough for CUDA {torch.version.cuda}, and whether CUDA_VISIBLE_DEVICES hides it"
        )
    elif device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            found.append(
                "use a GPU of compute capability 8.0 or newer (A100, L4, RTX 30 and later): on this one of "
                f"{major}.{minor} every op runs its reference, which is slow"
            )
        elif c_compiler() is None:
            found.append(
                "install a C compiler (gcc or clang; CC, if set, must name one): Triton builds launchers with it"
            )
    if torch.version.cuda is not None:
        version = triton_version()
        if version == "none":
            found.append(f"install triton {OLDEST_TRITON} or newer: every op runs its reference without it")
        elif TorchVersion(version) < OLDEST_TRITON:
            found.append(f"install triton {OLDEST_TRITON} or newer, the one that comes with torch; this is {version}")
    if compiler is None:
        found.append(
            "install a C++ compiler (g++ or clang++; CXX, if set, must name one) to compile for the CPU; until then "
            "run the commands with --no-compile and models without torch.compile"
        )
    return found


def say_flash(console: Console, device: torch.device) -> None:
    """Which versions of flash-attn are there, and whether `impl="flash"` can run them on the device."""
    found = ", ".join(f"{flash.PACKAGES[version]} {text}" for version, text in flash.installed().items())
    q = torch.empty(1, 1, 2, 128, dtype=torch.bfloat16, device=device)
    pick = flash.pick_version(q, q[:, :, :1], q_start=None)
    runs = f"runs flash-attn {pick.version}" if pick.version else f"cannot run: {pick.why_not}"
    console.print(f"flash-attn: {found or 'not installed'}; impl='flash' on {device} {runs}", soft_wrap=True)


def say_cache(console: Console, config: Any, batch: int, capacity: int, dtype: DType) -> None:
    """A table of the memory that decoding takes, as the config says and with the other kinds of attention."""
    if not isinstance(config, NSAConfig):
        say_converted_cache(console, config, batch, capacity, DTYPES[dtype.value])
        return
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


def c_compiler() -> str | None:
    """The C compiler that Triton would use, None if there is none."""
    names = (os.environ["CC"],) if "CC" in os.environ else ("gcc", "clang")
    return next((path for name in names if (path := shutil.which(name))), None)


def triton_version() -> str:
    """The version of Triton, or "none"."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "none"
