"""Profiler ranges around the bodies of ops, one per branch, and the branches of kernels that run without an op."""

import functools
from collections.abc import Callable
from typing import Any

import torch

RANGE = "nsa/"
"""What the names of ranges begin with: nsa/cmp, nsa/win backward, ..."""

BRANCHES = ("cmp", "choice", "slc", "win", "gates", "cache")

KERNEL_PARTS = {
    "_compress_mean_": "cmp",
    "_group_probabilities_": "choice",
    "_top_blocks_": "choice",
    "_union_": "slc",
    "_selected_": "slc",
    "_inverse_": "slc",
    "_sum_items_": "slc",
    "_gated_sum_": "gates",
    "_interval_": "cmp or win",
    "_places_": "attention",
    "_compressed_ends_": "cmp",
    "_delta_": "attention",
    "attend_kernel": "attention",
    "sum_queries_kernel": "attention",
    "sum_keys_kernel": "attention",
    "_cache_": "cache",
    "_decode_append_": "cache",
    "_decode_scan_": "cmp + win",
    "_decode_scores_": "choice",
    "_decode_choice_": "choice",
    "_decode_selected_": "slc",
    "_decode_merge_": "gates",
}
"""What the names of our kernels begin with, and the branch: a CUDA graph launches kernels without the ops."""


def in_range(part: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Let an op's body run in the profiler range `nsa/<part>`, in eager and compiled code alike.

    Without a profiler this costs a function call.
    """

    def decorate(body: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(body)
        def run(*args: Any) -> Any:
            if not torch.autograd._profiler_enabled():
                return body(*args)
            with torch.profiler.record_function(RANGE + part):
                return body(*args)

        return run

    return decorate


def kernel_part(kernel: str) -> str | None:
    """The branch of one of our kernels by its name; None for other kernels."""
    return next((part for prefix, part in KERNEL_PARTS.items() if kernel.startswith(prefix)), None)
