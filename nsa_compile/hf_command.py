"""Models of transformers on the command line: text from a converted model (or an `NsaForCausalLM`), and its cache."""

import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from nsa_compile.config import NSAConfig
from nsa_compile.convert.model import build_empty, import_classes, load_complete
from nsa_compile.ops.checks import check_int
from nsa_compile.ops.sampling import check_sampling
from nsa_compile.terminal import TextStream

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def is_of_transformers(folder: Path) -> bool:
    """Whether a folder's config.json is one of transformers, of whatever model."""
    try:
        return "model_type" in json.loads((folder / "config.json").read_text())
    except (OSError, ValueError, TypeError):  # which its reader names
        return False


def model_types() -> list[str]:
    """The types of models of NSA, known to transformers from now on. Raises ImportError without it."""
    classes = import_classes()
    from transformers.utils import logging

    from nsa_compile.hf import NsaConfig

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return [NsaConfig.model_type, *(config.model_type for _, config in classes.CONVERTED.values())]


def read_config(folder: Path) -> Any:
    """An `NSAConfig`, or the config of a converted model. Raises ValueError for a folder of another model."""
    config = build_empty(folder, model_types()).config
    return config.sizes() if config.model_type == "nsa" else config


def continue_text(
    folder: Path, prompt: str, *, max_new_tokens: int, temperature: float, top_p: float, seed: int,
    device: torch.device, dtype: torch.dtype, compile: bool,
) -> None:  # fmt: skip
    """Stream the continuation of a prompt to stdout, by the tokenizer in the folder; bytes if there is none.

    Raises: ImportError without transformers; ValueError naming the argument, before anything is generated.
    """
    check_int("max_new_tokens", max_new_tokens)
    check_sampling(temperature=temperature, top_p=top_p, seed=seed)
    if compile and device.type == "cpu":
        raise ValueError("compile: expected --no-compile on a CPU, where transformers' generate does not compile")
    config = build_empty(folder, model_types()).config
    tokenizer = find_tokenizer(folder, config.vocab_size)
    ids = list(prompt.encode()) if tokenizer is None else tokenizer(prompt).input_ids
    if not ids or max(ids) >= config.vocab_size:
        raise ValueError(f"prompt: expected tokens below vocab_size = {config.vocab_size}, got {ids or 'none'}")
    model = load_complete(folder, dtype=dtype).to(device).eval()
    options: dict[str, Any] = {"do_sample": temperature > 0, "num_beams": 1, "disable_compile": not compile}
    if temperature > 0:
        options |= {"temperature": temperature, "top_p": top_p, "top_k": 0}
    if compile and config.model_type != "nsa":
        options["cache_implementation"] = "static"
    stop = model.generation_config.eos_token_id
    if stop is None:
        stop = 0 if tokenizer is None else tokenizer.eos_token_id
    stops = [] if stop is None else [stop] if isinstance(stop, int) else list(stop)
    tokens = torch.tensor([ids], device=device)
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        torch.manual_seed(seed)
        model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=max_new_tokens, eos_token_id=stops or None,
            pad_token_id=stops[0] if stops else 0, streamer=Streamer(tokenizer, stops), **options,
        )  # fmt: skip


def find_tokenizer(folder: Path, vocab_size: int) -> Any:
    """The tokenizer in a folder; None if there is none and the model is one over bytes, ValueError if it is not."""
    from transformers import AutoTokenizer

    if any((folder / name).is_file() for name in TOKENIZER_FILES):
        try:
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # transformers and tokenizers have no one type for it
            raise ValueError(f"checkpoint: expected a tokenizer that loads in {folder}, got: {error}") from error
    if vocab_size != 256:
        raise ValueError(
            f"checkpoint: expected tokenizer files, such as tokenizer.json, in {folder}, or a model over bytes "
            f"(vocab_size 256), got none and a vocab_size of {vocab_size}"
        )
    return None


class Streamer:
    """A streamer for transformers' `generate` that shows text as `TextStream` does: no control characters.

    Args:
        tokenizer: None for bytes.
        stops: tokens that are not shown.
    """

    def __init__(self, tokenizer: Any, stops: list[int]) -> None:
        self.tokenizer, self.stops, self.stream = tokenizer, stops, TextStream()
        self.waiting: list[int] = []
        self.shown = 0
        self.begun = False

    def put(self, value: Tensor) -> None:
        """Take the prompt, which is not shown, then a token at a time."""
        if self.begun:
            for token in value.flatten().tolist():
                if token not in self.stops:
                    self._add(token)
        self.begun = True

    def _add(self, token: int) -> None:
        if self.tokenizer is None:
            self.stream.write(token)
            return
        self.waiting.append(token)
        text = self._decode()
        if text.endswith("\N{REPLACEMENT CHARACTER}"):  # a character that is not whole yet
            return
        self.stream.show(text[self.shown :])
        self.shown = len(text)
        if text.endswith("\n"):  # the tokens of a line are decoded together
            self.waiting, self.shown = [], 0

    def _decode(self) -> str:
        return self.tokenizer.decode(self.waiting, skip_special_tokens=True)

    def end(self) -> None:
        """Show what is left, and end the line."""
        if self.waiting:
            self.stream.show(self._decode()[self.shown :])
        self.stream.close()


def say_converted_cache(console: Console, config: Any, batch: int, capacity: int, dtype: torch.dtype) -> None:
    """A table of the memory that the transformers cache of a converted model takes, and that of the dense one."""
    classes = import_classes()
    settings, width = config.nsa, classes.head_dim(config)
    per_token = batch * config.num_key_value_heads * 2 * width * dtype.itemsize
    dense = converted = 0
    for index in range(config.num_hidden_layers):
        length = min(capacity, classes.sliding_window(config, index) or capacity)
        dense += per_token * length
        branches = 3 if index in settings["layers"] and not settings.get("tie_kv", NSAConfig.tie_kv) else 1
        converted += per_token * length * branches
    title = (
        f"cache of {batch} x {capacity:,} tokens in {str(dtype).partition('.')[2]}, {config.num_hidden_layers} layers, "
        f"{config.num_key_value_heads} groups of {width} + {width} channels"
    )
    table = Table("attention", "bytes", "GiB", title=title)
    tied = "shared" if settings.get("tie_kv", NSAConfig.tie_kv) else "separate"
    name = f"converted, {tied} keys and values in {len(settings['layers'])} layers"
    for row, size in ((name, converted), ("dense", dense)):
        table.add_row(row, f"{size:,}", f"{size / 2**30:.2f}")
    console.print(table)
