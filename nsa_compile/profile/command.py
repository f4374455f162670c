"""The command `nsa-compile profile`."""

from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from nsa_compile.checkpoints import find_checkpoint
from nsa_compile.config import NSAConfig
from nsa_compile.model import NSALanguageModel
from nsa_compile.options import Attention, Compile, DType, find_device, free_folder
from nsa_compile.profile.run import MODES, TENSORBOARD, TRACE_FILE, ProfileConfig, default_sizes, run_profile
from nsa_compile.profile.summary import diff, load_summary, say_diff, say_profile
from nsa_compile.terminal import can_compile, one_thread

SIZES_SHOWN = "small on a CPU, the paper's on CUDA"
Size = Annotated[int | None, typer.Option(show_default=SIZES_SHOWN)]


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
    if tokens is None:
        tokens = (65536 if mode == "decode" else 8192) if cuda else 256
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
    install = "" if find_spec("torch_tb_profiler") else ", after pip install 'nsa-compile[profile]'"
    console.print(f"{out / TENSORBOARD}: tensorboard --logdir {out / TENSORBOARD}{install}", soft_wrap=True)
    console.print(f"{out}: {', '.join(sorted(path.name for path in out.iterdir()))}", soft_wrap=True)
