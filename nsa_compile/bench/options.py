"""What to time, at which sizes, on which device."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Self

import torch

from nsa_compile.config import NSAConfig
from nsa_compile.custom_ops.dispatch import IMPLS

WHAT = ("compress", "compressed", "choice", "selected", "window", "gated_sum", "nsa", "decode")
BESIDE = ("sdpa", "flex", "flash-attn")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FIXED = ("batch", "groups", "d_k", "d_v", "l", "d", "l_sel", "n_sel", "w")
"""Sizes of which a run has one each."""
ON_CUDA: dict[str, Any] = {"tokens": (8192, 32768, 65536), "repeats": 20, "dtypes": ("bf16",), "beside": BESIDE}
ON_CPU: dict[str, Any] = {
    "tokens": (256, 512), "repeats": 5, "dtypes": ("fp32",), "beside": ("sdpa",), "heads": (4,), "groups": 2,
    "d_k": 32, "d_v": 32, "n_sel": 4, "w": 128,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Options:
    """One run of the benchmark. Raises ValueError naming the option, what was expected and what came."""

    device: str
    what: tuple[str, ...] = WHAT
    tokens: tuple[int, ...] = (8192,)
    """Tokens per row, of decode the context."""
    heads: tuple[int, ...] = (64,)
    """Query heads."""
    groups: int = 4
    d_k: int = 128
    d_v: int = 128
    l: int = 32
    d: int = 16
    l_sel: int = 64
    n_sel: int = 16
    w: int = 512
    dtypes: tuple[str, ...] = ("bf16",)
    batch: int = 1
    backward: bool = True
    """Time forward and backward together, besides forward alone."""
    repeats: int = 20
    """Timed calls of each case."""
    impls: tuple[str, ...] | None = None
    """Implementations of our ops; None: "auto", and on CUDA "flash" where an op has it."""
    beside: tuple[str, ...] = ("sdpa",)
    """Alternatives to time in the same rounds."""

    @classmethod
    def on(cls, device: str, **given: Any) -> Self:
        """Options for a device: what is given (not None), else what suits the device."""
        suited = ON_CUDA if torch.device(device).type == "cuda" else ON_CPU
        wanted = {name: tuple(x) if isinstance(x, list) else x for name, x in given.items() if x is not None}
        return cls(device=device, **suited | wanted)

    def __post_init__(self) -> None:
        for name, known in (("what", WHAT), ("dtypes", tuple(DTYPES)), ("beside", BESIDE)):
            for value in getattr(self, name):
                if value not in known:
                    raise ValueError(f"{name}: expected some of {', '.join(map(repr, known))}, got {value!r}")
        for impl in self.impls or ():
            if impl not in IMPLS:
                raise ValueError(f"impl: expected one of {', '.join(map(repr, IMPLS))}, got {impl!r}")
        for name in ("what", "tokens", "heads", "dtypes"):
            if len(set(getattr(self, name))) != max(1, len(getattr(self, name))):
                raise ValueError(f"{name}: expected at least one, and none twice, got {getattr(self, name)}")
        for name, value, least in (
            ("batch", self.batch, 1), ("repeats", self.repeats, 2), ("tokens", min(self.tokens), self.l),
        ):  # fmt: skip
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        for heads in self.heads:
            self.config(heads)

    def config(self, heads: int) -> NSAConfig:
        """The sizes as a checked config of a layer."""
        sizes = {name: getattr(self, name) for name in ("d_k", "d_v", "l", "d", "l_sel", "n_sel", "w")}
        return NSAConfig(dim=1, n_heads=heads, n_kv_groups=self.groups, **sizes)

    def as_dict(self) -> dict[str, Any]:
        """All options, for a record."""
        return dataclasses.asdict(self)


def doublings(device_type: str) -> list[int]:
    """Lengths of a sweep in which thresholds are looked for."""
    return [2**n for n in (range(9, 17) if device_type == "cuda" else range(7, 10))]
