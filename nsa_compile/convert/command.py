"""The command `nsa-compile convert`."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from nsa_compile.convert.model import convert_folder, import_classes


def convert_command(
    source: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder of a dense model, as save_pretrained writes it.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the converted one, new or empty.")],
    layers: Annotated[
        str | None, typer.Option(help="Layers to convert, from 0, such as 0,2-5.", show_default="all")
    ] = None,
    tie_kv: Annotated[
        bool,
        typer.Option("--tie/--copy", help="Share keys and values between the branches, or give each a copy of them."),
    ] = True,
    l: Annotated[int, typer.Option("--l", help="Length of a compression block.")] = 32,
    d: Annotated[int, typer.Option("--d", help="Stride of the compression blocks.")] = 16,
    l_sel: Annotated[int, typer.Option(help="Length of a selection block.")] = 64,
    n_sel: Annotated[int, typer.Option(help="Blocks selected per query.")] = 16,
    w: Annotated[int, typer.Option("--w", help="Length of the sliding window.")] = 512,
    phi: Annotated[str, typer.Option(help='Compressor: "avg" or "mlp".')] = "avg",
    gate: Annotated[str, typer.Option(help='Gate: "softmax" or "sigmoid".')] = "softmax",
) -> None:
    """Turn a dense Llama, Qwen2, Qwen3 or Mistral checkpoint of transformers into one with NSA.

    Up to min(w, n_sel*l_sel) tokens the new model's logits are the dense one's; beyond that, train it for a while on
    long text. Load it with nsa_compile.load_converted. Tokenizer files are copied.
    """
    console = Console(markup=False, highlight=False)
    import_classes()
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    options: dict[str, Any] = {"l": l, "d": d, "l_sel": l_sel, "n_sel": n_sel, "w": w, "phi": phi, "gate": gate}
    model = convert_folder(
        source, out, layers=None if layers is None else parse_layers(layers), tie_kv=tie_kv, **options
    )
    settings = model.config.nsa
    n, exact = len(settings["layers"]), min(w, n_sel * l_sel)
    console.print(
        f"{out}: {type(model).__name__}, NSA in {n} of {model.config.num_hidden_layers} layers, "
        f"{'shared' if tie_kv else 'separate'} keys and values; logits as before up to {exact} tokens",
        soft_wrap=True,
    )


def parse_layers(text: str) -> Iterator[int]:
    """Numbers and ranges such as "0,2-5". Raises ValueError for anything else."""
    ranges: list[range] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or max(len(first), len(last)) > 18:
            raise ValueError(f"layers: expected numbers and ranges such as 0,2-5, got {text[:80]!r}")
        ranges.append(range(int(first), int(last if dash else first) + 1))
        if not ranges[-1]:
            raise ValueError(f"layers: expected ranges that ascend, got {part[:80]!r}")
    return itertools.chain.from_iterable(ranges)
