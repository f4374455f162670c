"""Options that several commands share, and what their values stand for."""

import enum
import itertools
import os
from pathlib import Path
from typing import Annotated

import torch
import typer


class DType(enum.StrEnum):
    """Types of weights and activations."""

    fp32 = "fp32"
    bf16 = "bf16"


class Attention(enum.StrEnum):
    """Attention of a model."""

    nsa = "nsa"
    dense = "dense"


Compile = Annotated[bool, typer.Option("--compile/--no-compile", help="Run the model through torch.compile.")]
Device = Annotated[str, typer.Option(help='Device, such as "cpu" or "cuda".')]
Kind = Annotated[DType, typer.Option(help="Type of weights and activations alike.")]

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


def free_folder(name: str) -> Path:
    """The first of name, name-2, name-3, ... that does not exist."""
    return next(path for n in itertools.count(1) if not (path := Path(name if n == 1 else f"{name}-{n}")).exists())


def find_device(name: str) -> torch.device:
    """The device of that name. Raises ValueError for one that is not there, or that does not compute."""
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # an unknown name, or a torch without this kind of device
        reason = str(error).partition(". ")[0]  # of some devices torch says pages
        raise ValueError(f"device: expected one that torch can use here, got {name!r}: {reason}") from error
    if device.type == "meta":
        raise ValueError("device: expected one that computes, got 'meta'")
    return device


def total_memory(device: torch.device) -> int | None:
    """Bytes of memory of a GPU, or of this machine; None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):  # no Linux
        return None
