"""Sizes and choices of a model made of Native Sparse Attention, checked where they are written down."""

import dataclasses
import difflib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

PHI = ("avg", "mlp")
GATES = ("softmax", "sigmoid")
ATTENTION = ("nsa", "dense")
IMPLS = ("auto", "reference", "triton", "flash")
MODEL_ONLY = ("n_layers", "vocab_size", "attention", "tie_embeddings", "format_version")


@dataclass(frozen=True, kw_only=True)
class NSAConfig:
    """Arguments of `NSAAttention` and, in the last group, of `NSALanguageModel`; defaults are the paper's.

    Lengths are in tokens. Raises ValueError or TypeError naming the argument, what was expected and what came.
    """

    dim: int = 2560
    """Channels of the residual stream."""
    n_heads: int = 64
    """Query heads, a multiple of n_kv_groups."""
    n_kv_groups: int = 4
    """Key/value heads; the query heads of a group share keys, values and selected blocks."""
    d_k: int = 192
    """Channels of a query and key head, even."""
    d_v: int = 128
    """Channels of a value head."""
    l: int = 32
    """Length of a compression block, a multiple of d."""
    d: int = 16
    """Stride of the compression blocks."""
    l_sel: int = 64
    """Length of a selection block, a multiple of d and at least l."""
    n_sel: int = 16
    """Selected blocks per query, the forced ones included."""
    w: int = 512
    """Length of the sliding window, the query's own token counted."""
    init_blocks: int = 1
    """First blocks that are always selected."""
    local_blocks: int = 2
    """Last blocks up to the query's own that are always selected."""
    phi: str = "avg"
    """Compressor: "avg" (mean of a block) or "mlp" (learnable, equal to "avg" at the start)."""
    gate: str = "softmax"
    """Gate: "softmax" (from the group's mean query) or "sigmoid" (the paper's, from the hidden state)."""
    gate_hidden: int | None = None
    """Hidden width of the gate, default max(1, d_k // 2)."""
    gate_temperature: float = 1.0
    """Temperature of the softmax gate."""
    tie_kv: bool = False
    """Let the three branches share one key and value projection."""
    rope_theta: float = 10000.0
    """Base of the rotary wavelengths."""
    impl: str = "auto"
    """Implementation of the ops: "auto", "reference", "triton", or "flash": compressed and window attention of whole
    sequences by flash-attn, and "auto" for the rest and with a cache."""

    n_layers: int = 30
    """Transformer blocks."""
    vocab_size: int = 256
    """Token ids; 256 for bytes."""
    attention: str = "nsa"
    """Attention of the blocks: "nsa", or "dense" for comparison."""
    tie_embeddings: bool = False
    """Let the output head use the embedding's weights."""
    format_version: int = 1
    """Version of this format, written to config.json."""

    FORMAT_VERSION: ClassVar[int] = 1

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            self._check_type(field.name, getattr(self, field.name), field.type)
        if self.gate_hidden is None:
            object.__setattr__(self, "gate_hidden", max(1, self.d_k // 2))
        at_least_one = ("dim", "n_heads", "n_kv_groups", "d_k", "d_v", "l", "d", "l_sel", "n_sel", "w", "local_blocks")
        for name in (*at_least_one, "gate_hidden", "n_layers", "vocab_size"):
            self._expect(name, getattr(self, name) >= 1, "at least 1")
        self._expect("init_blocks", self.init_blocks >= 0, "at least 0")
        self._expect("n_heads", self.n_heads % self.n_kv_groups == 0, f"a multiple of n_kv_groups = {self.n_kv_groups}")
        self._expect("d_k", self.d_k % 2 == 0, "an even number (RoPE turns pairs of channels)")
        self._expect("l", self.l % self.d == 0, f"a multiple of d = {self.d}")
        self._expect("l_sel", self.l_sel % self.d == 0, f"a multiple of d = {self.d}")
        self._expect("l_sel", self.l_sel >= self.l, f"at least l = {self.l}")
        forced = self.init_blocks + self.local_blocks
        self._expect("n_sel", self.n_sel >= forced, f"at least init_blocks + local_blocks = {forced}")
        self._expect("gate_temperature", self.gate_temperature > 0, "a positive number")
        self._expect("rope_theta", self.rope_theta > 0, "a positive number")
        for name, choices in (("phi", PHI), ("gate", GATES), ("attention", ATTENTION), ("impl", IMPLS)):
            self._expect(name, getattr(self, name) in choices, f"one of {', '.join(map(repr, choices))}")
        self._expect("format_version", self.format_version == self.FORMAT_VERSION, str(self.FORMAT_VERSION))

    def _check_type(self, name: str, value: object, annotation: Any) -> None:
        if annotation is float:
            annotation = int | float
        if not isinstance(value, annotation) or (isinstance(value, bool) and annotation is not bool):
            raise TypeError(f"{name}: expected {getattr(annotation, '__name__', annotation)}, got {value!r}")

    def _expect(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")

    def attention_arguments(self) -> dict[str, Any]:
        """The arguments of `NSAAttention`."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in MODEL_ONLY}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The config written by `dataclasses.asdict`; an unknown name or another format version is a ValueError."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if "model_type" in values:
            raise ValueError(
                "config: expected that of an NSALanguageModel, got one of transformers of model_type "
                f"{str(values['model_type'])[:80]!r} (load_converted loads a converted model, "
                "NsaForCausalLM.from_pretrained one of nsa_compile.hf)"
            )
        if unknown:
            told = ", ".join(name_unknown(name, known) for name in unknown)
            raise ValueError(f"config: expected the names {', '.join(sorted(known))}, got {told}")
        return cls(**values)

    def save(self, path: Path) -> None:
        """Write the config as JSON."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a config written by `save`. Raises ValueError naming the file for any other."""
        try:
            values = json.loads(path.read_text())
            if not isinstance(values, dict):
                raise TypeError(f"expected a dict, got {type(values).__name__}")
            return cls.from_dict(values)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from error


def near_name(name: str, known: Iterable[str], cutoff: float = 0.75) -> str | None:
    """The known name that is most like another one; None if none is near."""
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=cutoff)), None)


def name_unknown(name: str, known: Iterable[str]) -> str:
    """An unknown name for a message, with the known one that it may stand for."""
    near = near_name(name, known, cutoff=0.6)
    return name if near is None else f"{name} (did you mean {near}?)"
