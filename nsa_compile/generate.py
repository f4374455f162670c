"""Text from a model: prompts into its cache, then decode steps."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nsa_compile.graphs.cache import NSACache, check_cache, check_memory
from nsa_compile.graphs.decode import DecodeGraph
from nsa_compile.graphs.prefill import prefill
from nsa_compile.ops.checks import check_int
from nsa_compile.ops.sampling import check_sampling

LOOK_EVERY = 16
"""Steps between two looks at the tokens where nothing else needs one."""


class Generation(NamedTuple):
    """What `generate` made of each row."""

    tokens: list[list[int]]
    """Generated tokens, without the prompt and without the stop token."""
    stopped: list[bool]
    """Whether the row ended by its stop token."""


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]] | Tensor,
    *,
    max_new_tokens: int,
    temperature: float | Sequence[float] | Tensor = 0.0,
    top_p: float | Sequence[float] | Tensor = 1.0,
    seed: int | Sequence[int] | Tensor = 0,
    stop_token: int | None = None,
    prefill_chunk: int | None = None,
    cache: NSACache | None = None,
    graph: DecodeGraph | None = None,
    on_token: Callable[[int, list[int | None]], None] | None = None,
) -> Generation:
    """Continue prompts token by token.

    Args:
        model: an `NSALanguageModel`, `torch.compile` of one, or any module of `NSAAttention` layers with its call,
            `model(ids, cache=cache, lengths=lengths, last_only=True) -> [b, 1, vocab]`. Where it has a `config`, token
            ids are held against `config.vocab_size`.
        prompts: token ids, a sequence (list, bytes, ...) per row, of any lengths of at least 1; or int [b, t].
        max_new_tokens: tokens to generate per row at most.
        temperature, top_p: as in `sample`, for all rows or per row.
        seed: per row, or one from which row r gets `seed + r`. A draw depends on the row's seed and its position only.
        stop_token: the id that ends a row. A finished row is idle in the steps that follow: its cache stays as it is.
        prefill_chunk: tokens of every prefill call, the last one padded, so that all have one shape; default: calls of
            128, 256, … 8192 tokens, so that prompts of any lengths make few shapes.
        cache: from `NSACache.for_model(model, b, capacity)`; prompts continue what it holds. Default: a new one of
            the needed size, refused where there is no memory for it. Afterwards it holds prompts and generated tokens,
            but for the last of a row that did not stop.
        graph: a `DecodeGraph` of the model with idle rows, to decode with it and its cache; they are idle again
            afterwards. Default: a new one; on CUDA that captures the model's decode step as a CUDA graph.
        on_token: called after each step with its number (from 0) and each row's new token, None once it has stopped.
            With it the host waits for each step's tokens; without it, it looks at them every 16 steps.

    Raises: ValueError or TypeError naming the argument, what was expected and what came, before anything is written.
    """
    if graph is not None and not isinstance(graph, DecodeGraph):
        raise TypeError(f"graph: expected a DecodeGraph, got {type(graph).__name__}")
    if not callable(model):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    vocab_size = getattr(getattr(model, "config", None), "vocab_size", None) if graph is None else graph.vocab_size
    rows = _check_prompts(prompts)
    _check_ids(rows, stop_token, 2**63 if vocab_size is None else vocab_size)
    b, lengths = len(rows), [len(row) for row in rows]
    check_int("max_new_tokens", max_new_tokens)
    if prefill_chunk is not None:
        check_int("prefill_chunk", prefill_chunk)
    if on_token is not None and not callable(on_token):
        raise TypeError(f"on_token: expected a function, got {type(on_token).__name__}")
    if isinstance(seed, Tensor):
        seed = seed.tolist()
    if isinstance(seed, int) and not isinstance(seed, bool):
        seed = [seed + row for row in range(b)]
    values = {"temperature": temperature, "top_p": top_p, "seed": seed}
    per_row = {name: _per_row(name, value, b) for name, value in values.items()}
    drawing = [dict(zip(per_row, row, strict=True)) for row in zip(*per_row.values(), strict=True)]
    for arguments in drawing:
        check_sampling(**arguments)
    if graph is not None:
        if cache is not None:
            raise ValueError("cache: expected None together with graph, which has its own, got both")
        if len(graph.idle) != graph.cache.batch:
            raise ValueError("graph: expected one whose rows are all idle, got one that decodes")
        cache = graph.cache
    if cache is None:
        capacity = max(lengths) + max_new_tokens
        check_memory(model, b, capacity, argument=("max_new_tokens", max_new_tokens))
        cache = NSACache.for_model(model, b, capacity)
    if check_cache("cache", cache).batch != b:
        raise ValueError(f"cache: expected one for {b} rows as prompts has, got {cache.batch}")
    held = list(cache.host_lengths)
    needed = max(h + n for h, n in zip(held, lengths, strict=True)) + max_new_tokens
    if needed > cache.capacity:
        raise ValueError(
            f"max_new_tokens: expected what the cache holds, the prompt and max_new_tokens = {max_new_tokens} to be at "
            f"most {cache.capacity} tokens (its capacity), got {needed}"
        )

    if graph is None:
        graph = DecodeGraph(model, cache)
        _check_ids(rows, stop_token, graph.vocab_size)
    if max(lengths) > 1:
        prefill(model, [row[:-1] for row in rows], cache, chunk=prefill_chunk)
    for row, (ids, arguments) in enumerate(zip(rows, drawing, strict=True)):
        graph.start(row, ids[-1], max_new_tokens=max_new_tokens, stop_token=stop_token, **arguments)
    tokens: list[list[int]] = [[] for _ in rows]
    stopped = [False] * b
    try:
        for step in range(0, max_new_tokens, 1 if on_token is not None else LOOK_EVERY):
            graph.step(1 if on_token is not None else min(LOOK_EVERY, max_new_tokens - step))
            new: list[int | None] = [None] * b
            for update in graph.collect():
                tokens[update.row] += update.tokens
                stopped[update.row] = update.stopped
                new[update.row] = next(iter(update.tokens), None)
            if on_token is not None:
                on_token(step, new)
            if len(graph.idle) == b:
                break
    finally:  # on_token may raise
        for row in {*range(b)} - {*graph.idle}:
            graph.cancel(row)
        graph.collect()
    return Generation(tokens, stopped)


def _check_prompts(prompts: Sequence[Sequence[int]] | Tensor) -> list[list[int]]:
    if isinstance(prompts, Tensor):
        if prompts.ndim != 2 or prompts.is_floating_point() or prompts.dtype == torch.bool:
            raise ValueError(f"prompts: expected integers [b, t], got {prompts.dtype} {tuple(prompts.shape)}")
        prompts = prompts.tolist()
    if not isinstance(prompts, Sequence):
        raise TypeError(f"prompts: expected a sequence of token ids per row, got {type(prompts).__name__}")
    if isinstance(prompts, (str, bytes)) or not all(
        isinstance(x, Iterable) and not isinstance(x, str) for x in prompts
    ):
        raise TypeError("prompts: expected a sequence of token ids per row, got text or a single row")
    rows = [list(row) for row in prompts]
    if not rows:
        raise ValueError("prompts: expected at least 1 row, got an empty batch")
    for number, row in enumerate(rows):
        if not row:
            raise ValueError(f"prompts: expected at least 1 token in every row, got none in row {number}")
    return rows


def _check_ids(rows: list[list[int]], stop_token: int | None, vocab_size: int) -> None:
    for number, row in enumerate(rows):
        if {*map(type, row)} == {int} and min(row) >= 0 and max(row) < vocab_size:  # a prompt is long
            continue
        for token in row:
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
                raise ValueError(f"prompts: expected token ids in 0 … {vocab_size - 1}, got {token!r} in row {number}")
    if stop_token is not None:
        check_int("stop_token", stop_token, 0, vocab_size - 1)


def _per_row(name: str, value: object, b: int) -> list:
    values = value.tolist() if isinstance(value, Tensor) else value
    values = list(values) if isinstance(values, Sequence) else [values] * b
    if len(values) != b:
        raise ValueError(f"{name}: expected one number or {b}, one per row, got {len(values)}")
    return values
