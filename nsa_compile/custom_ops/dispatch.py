"""Which implementation an op runs on a device, and why."""

from typing import NamedTuple

import torch

IMPLS = ("auto", "reference", "triton", "flash")


class Choice(NamedTuple):
    """The implementation that runs and the reason in one phrase."""

    impl: str
    why: str


def resolve_impl(op: str, impl: str, device: torch.device | str) -> Choice:
    """The implementation of `op` that `impl` ("auto", "reference", "triton", "flash") means on `device`.

    Raises ValueError for an unknown name and for an explicit choice that cannot run, with the reason.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl: expected one of {', '.join(map(repr, IMPLS))}, got {impl!r}")
    kind = torch.device(device).type
    if impl in ("triton", "flash"):
        raise ValueError(
            f"impl: expected 'auto' or 'reference' for {op} on {kind}, got {impl!r}: it has no {impl} kernel"
        )
    if impl == "reference":
        return Choice("reference", "asked for")
    return Choice("reference", f"the only implementation of {op} on {kind}")
