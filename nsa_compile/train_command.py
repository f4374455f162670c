"""`nsa-compile train` and `export`: options, processes, text, and the loop."""

import dataclasses
import enum
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console
from torch.distributed.device_mesh import DeviceMesh

from nsa_compile.checkpoints import find_checkpoint
from nsa_compile.config import NSAConfig
from nsa_compile.data import Corpus, load_tokenizer, open_shards, unigram_entropy
from nsa_compile.data.shards import read_manifest
from nsa_compile.launch import World, launched, local_rank, process_group, rank, together
from nsa_compile.metrics import METRICS_FILE
from nsa_compile.model import NSALanguageModel
from nsa_compile.options import (
    Attention,
    Device,
    DType,
    EndToken,
    Field,
    Kind,
    Text,
    TokenizerFile,
    Workers,
    find_device,
    total_memory,
)
from nsa_compile.parallel import make_mesh
from nsa_compile.storage import check_folder
from nsa_compile.terminal import build_with_progress, can_compile, say_corpus, say_model, train_with_progress
from nsa_compile.train import DATA_FOLDER, DTYPES, TrainConfig, check_mesh, checkpoint_to_resume, run_lock

TERMINATED = 143
"""Exit code of a run that SIGTERM ended, after its checkpoint is written."""
TIMEOUT = 1800.0
INPUT_ERRORS = (ValueError, TypeError, OSError, ImportError)


class CompileWhat(enum.StrEnum):
    """What torch.compile makes one graph of."""

    model = "model"
    block = "block"
    none = "none"


class Recompute(enum.StrEnum):
    """What blocks keep for the backward pass."""

    none = "none"
    matmuls = "matmuls"
    selective = "selective"
    full = "full"


def train_command(
    text: Text = None,
    data: Annotated[
        Path | None, typer.Option(help="Token shards of `tokenize`, in place of --text.", show_default="OUT/data")
    ] = None,
    verify: Annotated[
        bool,
        typer.Option(help="Read shards of --data whose files are new here or changed, and compare their checksums."),
    ] = True,
    tokenizer: TokenizerFile = None,
    end_token: EndToken = None,
    field: Field = "text",
    workers: Workers = None,
    out: Annotated[Path, typer.Option(help="Folder for checkpoints and metrics.")] = Path("nsa-run"),
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out: same text and options.")] = False,
    auto_resume: Annotated[
        bool, typer.Option("--auto-resume", help="Continue the run in --out if there is one, else start it.")
    ] = False,
    steps: Annotated[int, typer.Option(help="Updates.")] = 1000,
    seq_len: Annotated[int, typer.Option(help="Tokens of a row.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Rows of an update, on all processes together.")] = 8,
    accumulate: Annotated[int, typer.Option(help="Parts of an update that a process computes in turn.")] = 1,
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
    keep: Annotated[int, typer.Option(help="Checkpoints to keep.")] = 1,
    eval_every: Annotated[int, typer.Option(help="Steps between losses on held-out text.")] = 200,
    eval_batches: Annotated[int, typer.Option(help="Batches of held-out text.")] = 8,
    stats_every: Annotated[int, typer.Option(help="Steps between statistics of gates and selection.")] = 200,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write metrics for TensorBoard too.")] = False,
    peak_tflops: Annotated[
        float | None,
        typer.Option(help="TFLOP/s of a device, for its utilisation.", show_default="data sheet, if known"),
    ] = None,
    device: Device = "cpu",
    dtype: Annotated[DType, typer.Option(help="Type to compute in; weights stay in fp32.")] = DType.fp32,
    compile: Annotated[
        CompileWhat | None,
        typer.Option(help="What becomes one graph.", show_default="model; block with torchrun"),
    ] = None,
    no_compile: Annotated[bool, typer.Option("--no-compile", help="The same as --compile none.")] = False,
    checkpointing: Annotated[
        Recompute, typer.Option(help="What the backward pass computes anew: nothing, … all of a block.")
    ] = Recompute.none,
    dp: Annotated[
        int | None, typer.Option(help="Processes that read other rows.", show_default="those that are left")
    ] = None,
    cp: Annotated[int, typer.Option(help="Processes that share the tokens of a row.")] = 1,
    tp: Annotated[int, typer.Option(help="Processes that share the heads of a layer.")] = 1,
    timeout: Annotated[
        float | None,
        typer.Option(help="Seconds without progress that end the run.", show_default="1800 with torchrun, else none"),
    ] = None,
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

    Ctrl-C ends the run after the step at hand and saves (exit code 0), SIGTERM too (143); --resume continues it
    exactly. A loss that is not finite stops the run before it changes the weights (2), a hang after --timeout seconds,
    with the stacks of every process (70). Many processes, with restarts:

    torchrun --nproc-per-node 8 --max-restarts 3 -m nsa_compile train --device cuda --auto-resume …
    """
    console = Console(markup=False, highlight=False, quiet=rank() > 0)
    with first_speaks():
        target = find_device(device)
        if no_compile and compile not in (None, CompileWhat.none):
            raise ValueError(f"compile: expected it without --no-compile, got {compile.value!r}")
        what = CompileWhat.none if no_compile else compile or (CompileWhat.block if launched() else CompileWhat.model)
        if what != CompileWhat.none and not can_compile(console, device):
            what = CompileWhat.none
        config = TrainConfig(
            steps=steps, seq_len=seq_len, batch_size=batch_size, accumulate=accumulate, lr=lr, warmup=warmup, clip=clip,
            seed=seed, dtype=dtype.value, compile=what.value, checkpointing=checkpointing.value, eval_every=eval_every,
            eval_batches=eval_batches, stats_every=stats_every, save_every=save_every, keep=keep, packed=packed,
            max_documents=max_documents, tensorboard=tensorboard, peak_tflops=peak_tflops,
            timeout=TIMEOUT if timeout is None and launched() else timeout,
        )  # fmt: skip
        model_config = NSAConfig(
            dim=dim, n_heads=n_heads, n_kv_groups=n_kv_groups, d_k=d_k, d_v=d_v, l=l, d=d, l_sel=l_sel, n_sel=n_sel,
            w=w, phi=phi, gate=gate, n_layers=n_layers, vocab_size=256, attention=attention.value,
        )  # fmt: skip
        if data is not None and text:
            raise ValueError("data: expected token shards alone, got --text beside them")
        if not launched() and (sizes := (1 if dp is None else dp, cp, tp)) != (1, 1, 1):
            raise ValueError("dp, cp, tp: expected 1 each without torchrun, got {}, {} and {}".format(*sizes))
        check_folder("out", out)
        check_memory(model_config, target)

    def build() -> Corpus:
        if data is not None:
            return open_data(data, tokenizer, end_token, verify, partial(console.print, soft_wrap=True))
        return build_with_progress(
            console, text or [], out / DATA_FOLDER, tokenizer=load_tokenizer(tokenizer, end_token=end_token),
            field=field, workers=workers,
        )  # fmt: skip

    with ExitStack() as stack:
        world = stack.enter_context(process_group(target, config.timeout))
        how: bool | Literal["auto"] = "auto" if auto_resume else resume

        def begin() -> DeviceMesh | None:
            mesh = make_mesh(dp=dp, cp=cp, tp=tp, device=target.type) if launched() else None
            check_mesh(config, model_config, None if mesh is None else tuple(mesh.shape))
            checkpoint_to_resume(out, how)
            if world.first:
                stack.enter_context(run_lock(out))  # before text is written there
            return mesh

        mesh = together(begin)
        # the first process of a machine looks at the copy that is there
        compare = None if verify and local_rank() == 0 else False
        corpus = world.by_first(build, lambda: open_shards(data or out / DATA_FOLDER, verify=compare))
        model_config = dataclasses.replace(model_config, vocab_size=corpus.vocab_size)
        say_corpus(console, corpus)
        torch.manual_seed(seed)
        model = NSALanguageModel(model_config).to(world.device)
        say_model(console, model, config)
        say_world(console, world, mesh)
        with first_speaks((FloatingPointError,)):
            result = train_with_progress(console, model, corpus, config, out, resume=how, mesh=mesh, lock=False)
        if result.val_loss is not None and world.first:
            entropy = unigram_entropy(corpus.train)
            console.print(
                f"loss on held-out text {result.val_loss:.3f} nats/{corpus.unit}; entropy of single {corpus.unit}s "
                f"{entropy:.3f} nats/{corpus.unit}",
                soft_wrap=True,
            )
        console.print(f"checkpoint {result.checkpoint}, metrics {out / METRICS_FILE}", soft_wrap=True)
    if result.signal == "SIGTERM":
        raise typer.Exit(TERMINATED)


def export_command(
    run: Annotated[Path, typer.Argument(help="Folder of a run, or of one checkpoint in it.")],
    out: Annotated[Path, typer.Argument(help="Folder for config.json and model.safetensors.")],
    dtype: Kind = DType.fp32,
) -> None:
    """Write a run's newest weights as safetensors, as `NSALanguageModel.from_pretrained` reads them."""
    check_folder("out", out)
    checkpoint = find_checkpoint(run) or run
    NSALanguageModel.from_pretrained(checkpoint, dtype=DTYPES[dtype.value]).save_pretrained(out)
    Console(markup=False, highlight=False).print(f"{checkpoint} as safetensors in {out}", soft_wrap=True)


@contextmanager
def first_speaks(errors: tuple[type[Exception], ...] = INPUT_ERRORS) -> Iterator[None]:
    """Let processes but the first leave errors, by default all about input, unspoken: all processes have the same."""
    try:
        yield
    except errors as error:
        if rank():
            raise typer.Exit(2) from error
        raise


def open_data(
    data: Path, tokenizer: Path | None, end_token: str | None, verify: bool, say: Callable[[str], None]
) -> Corpus:
    """Open shards. Raises ValueError if they were made by another tokenizer than that of a file, where one is given."""
    corpus = open_shards(data, verify=None if verify else False, say=say)
    if tokenizer is not None or end_token is not None:
        given = load_tokenizer(tokenizer, end_token=end_token).digest
        made = read_manifest(data)["settings"]["tokenizer"]
        if given != made:
            raise ValueError(
                f"tokenizer: expected the one that made the shards in {data} ({made}), got {tokenizer} ({given})"
            )
    return corpus


def check_memory(config: NSAConfig, device: torch.device) -> None:
    """Raise ValueError for a model whose training takes more than all memory: before text is read, or the system ends
    the process without a word.

    Weights, gradients and AdamW's two moments are fp32, over all processes; each makes whole weights at its start.
    """
    try:
        with torch.device("meta"):
            n = sum(p.numel() for p in NSALanguageModel(config).parameters())
    except RuntimeError as error:  # sizes that overflow
        raise ValueError(f"model: expected sizes that torch can hold, got {str(error).splitlines()[0]}") from error
    needed, there = n * (4 if launched() else 16), total_memory(device)
    if there is not None and needed > there:
        raise ValueError(
            f"model: expected one that fits in the memory of {device}, {there / 2**30:,.1f} GiB, got {n:,} parameters, "
            f"which take {needed / 2**30:,.1f} GiB to train; a smaller dim or fewer layers take less"
        )


def say_world(console: Console, world: World, mesh: DeviceMesh | None) -> None:
    """One line about the processes, if there are several."""
    if mesh is not None:
        sizes = ", ".join(f"{name} {size}" for name, size in zip(mesh.mesh_dim_names or (), mesh.shape, strict=True))
        console.print(f"{world.size} processes on {world.device.type}: {sizes}")
