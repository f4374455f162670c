"""Sampling and the decode loop over a model and its cache."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nsa_compile.graphs.cache import NSACache

LOOK_EVERY = 16
"""Steps between two looks at the device for finished rows, where nothing else needs one."""
MASK = 0xFFFFFFFF


class Generation(NamedTuple):
    """What `generate` made of each row."""

    tokens: list[list[int]]
    """Generated tokens, without the prompt and without the stop token."""
    stopped: list[bool]
    """Whether the row ended by its stop token."""


def sample(logits: Tensor, *, temperature: Tensor, top_p: Tensor, seed: Tensor, position: Tensor) -> Tensor:
    """Draw each row's next token; a row's draw depends on its own arguments only.

    Args:
        logits: [b, vocab] float.
        temperature: [b] float; 0 takes the likeliest token.
        top_p: [b] float in (0, 1]: only the likeliest tokens with less than this probability before them count; the
            first one always does.
        seed: [b] int64.
        position: [b] int, where in its row the drawn token will stand.

    Returns: int64 [b]. Compiles to one graph; reads nothing on the host.
    """
    logits = logits.float()
    greedy = temperature == 0
    scale = torch.where(greedy, 1.0, temperature.float())[:, None]
    probability, token = torch.softmax((logits - logits.amax(-1, keepdim=True)) / scale, dim=-1).sort(
        dim=-1, descending=True, stable=True
    )
    upto, top_p = probability.cumsum(-1), top_p.float()[:, None]
    kept = (upto - probability < top_p) | (top_p >= 1) | (torch.arange(logits.shape[-1], device=logits.device) == 0)
    mass = torch.where(kept, upto, 0.0).amax(-1)  # of the kept tokens
    draw = uniform(seed, position) * mass
    index = ((upto <= draw[:, None]) & kept).sum(-1).clamp_max(kept.sum(-1) - 1)
    drawn = token.gather(-1, index[:, None]).squeeze(-1)
    return torch.where(greedy, logits.argmax(-1), drawn)


def uniform(seed: Tensor, position: Tensor) -> Tensor:
    """A number in [0, 1) with 24 random bits that is a function of (seed, position): int [b], int [b] → fp32 [b]."""
    seed, position = seed.long(), position.long()
    x = mix_bits((seed & MASK) ^ 0x9E3779B9)
    x = mix_bits(x ^ ((seed >> 32) & MASK) ^ 0x85EBCA6B)
    x = mix_bits(x ^ (position & MASK) ^ 0xC2B2AE35)
    return (x >> 8).float() * 2.0**-24


def mix_bits(x: Tensor) -> Tensor:
    """A bijection of 32-bit numbers held in int64 in which every input bit moves every output bit (lowbias32)."""
    x = multiply_bits(x ^ (x >> 16), 0x7FEB352D)
    x = multiply_bits(x ^ (x >> 15), 0x846CA68B)
    return x ^ (x >> 16)


def multiply_bits(x: Tensor, factor: int) -> Tensor:
    """x · factor mod 2^32 for 32-bit numbers held in int64; in halves, so that nothing passes 2^63."""
    return ((x & 0xFFFF) * factor + ((((x >> 16) * factor) & 0xFFFF) << 16)) & MASK


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
        prefill_chunk: tokens of every prefill call, the last one padded, so that all have one shape; default: one
            call as long as the longest prompt.
        cache: from `NSACache.for_model(model, b, capacity)`; prompts continue what it holds. Default: a new one of
            the needed size. Afterwards it holds prompts and generated tokens, but for the last of a row that did
            not stop.
        on_token: called after each step with its number (from 0) and each row's new token, None once it has stopped.
            With it the host waits for each step's tokens; without it, it looks at them at the end, and every few
            steps where there is a stop token.

    Raises: ValueError or TypeError naming the argument, what was expected and what came, before anything is written.
    """
    rows = _check_prompts(prompts, getattr(getattr(model, "config", None), "vocab_size", None))
    b, lengths = len(rows), [len(row) for row in rows]
    for name, number in (("max_new_tokens", max_new_tokens), ("prefill_chunk", prefill_chunk)):
        if number is not None and number < 1:
            raise ValueError(f"{name}: expected at least 1, got {number}")
    temperatures = _per_row("temperature", temperature, b, "a finite number >= 0", lambda x: 0 <= x < math.inf)
    top_ps = _per_row("top_p", top_p, b, "a number in (0, 1]", lambda x: 0 < x <= 1)
    if isinstance(seed, int):
        seed = [seed + row for row in range(b)]
    seeds = _per_row("seed", seed, b, "an int64 number", lambda x: isinstance(x, int) and -(2**63) <= x < 2**63)
    if cache is None:
        cache = NSACache.for_model(model, b, max(lengths) + max_new_tokens)
    if cache.batch != b:
        raise ValueError(f"cache: expected one for {b} rows as prompts has, got {cache.batch}")
    held = list(cache.host_lengths)
    needed = max(h + n for h, n in zip(held, lengths, strict=True)) + max_new_tokens
    if needed > cache.capacity:
        raise ValueError(
            f"max_new_tokens: expected what the cache holds, the prompt and max_new_tokens = {max_new_tokens} to be at "
            f"most {cache.capacity} tokens (its capacity), got {needed}"
        )

    device = cache.positions.device
    with torch.no_grad():  # not inference_mode: whoever compiled the model under no_grad keeps that graph
        position = torch.tensor([h + n for h, n in zip(held, lengths, strict=True)], device=device)
        arguments = {
            "temperature": torch.tensor(temperatures, dtype=torch.float32, device=device),
            "top_p": torch.tensor(top_ps, dtype=torch.float32, device=device),
            "seed": torch.tensor(seeds, dtype=torch.int64, device=device),
        }
        greedy = not any(temperatures)
        finished = torch.zeros(b, dtype=torch.bool, device=device)
        out = torch.full((b, max_new_tokens), -1, dtype=torch.int64, device=device)
        logits = prefill(model, rows, cache, chunk=prefill_chunk)
        for step in range(max_new_tokens):
            if step:
                cache.reserve(1)
                idle = finished[:, None]
                ids = out[:, step - 1 : step].masked_fill(idle, 0)
                logits = model(ids, cache=cache, lengths=(~finished).int(), last_only=True)[:, 0]
            token = logits.argmax(-1) if greedy else sample(logits, position=position + step, **arguments)
            if stop_token is not None:
                finished = finished | (token == stop_token)
            out[:, step] = token.masked_fill(finished, -1)
            if on_token is not None:
                on_token(step, [None if token < 0 else token for token in out[:, step].tolist()])
            looks = on_token is not None or step % LOOK_EVERY == LOOK_EVERY - 1
            if stop_token is not None and looks and bool(finished.all()):
                break
        tokens = [[token for token in row if token >= 0] for row in out.tolist()]
    cache.host_lengths = [  # finished rows grew by less than the loop reserved
        h + n + min(len(new), max_new_tokens - 1) for h, n, new in zip(held, lengths, tokens, strict=True)
    ]
    return Generation(tokens, finished.tolist())


def prefill(model: nn.Module, rows: Sequence[Sequence[int]], cache: NSACache, *, chunk: int | None = None) -> Tensor:
    """Append rows of token ids, each of at least one, to a cache; returns the logits [b, vocab] after each row's last.

    `chunk` is the number of tokens of every call, padding included; by default that of the longest row. Goes without
    gradients. Raises ValueError before anything is written if a row would pass the cache's capacity.
    """
    device = cache.positions.device
    longest = max(len(row) for row in rows)
    width = longest if chunk is None else min(chunk, cache.capacity)
    n_chunks = -(-longest // width)
    padded = torch.zeros(len(rows), n_chunks * width, dtype=torch.int64)
    for row, ids in enumerate(rows):
        padded[row, : len(ids)] = torch.tensor(list(ids))
    padded, lengths = padded.to(device), torch.tensor([len(row) for row in rows], dtype=torch.int32, device=device)
    cache.reserve([len(row) for row in rows])
    last: Tensor | None = None
    with torch.no_grad():
        for ids in padded.split(width, dim=1):
            here = lengths.clamp(0, width)
            logits = model(ids.contiguous(), cache=cache, lengths=here, last_only=True)[:, 0]
            last = logits.clone() if last is None else torch.where((here > 0)[:, None], logits, last)
            lengths = lengths - here
    assert last is not None
    return last


def _check_prompts(prompts: Sequence[Sequence[int]] | Tensor, vocab_size: int | None) -> list[list[int]]:
    if isinstance(prompts, Tensor):
        if prompts.ndim != 2 or prompts.is_floating_point() or prompts.dtype == torch.bool:
            raise ValueError(f"prompts: expected integers [b, t], got {prompts.dtype} {tuple(prompts.shape)}")
        prompts = prompts.tolist()
    if isinstance(prompts, (str, bytes)) or any(isinstance(row, (str, int)) for row in prompts):
        raise TypeError("prompts: expected a sequence of token ids per row, got text or a single row")
    rows = [list(row) for row in prompts]
    if not rows:
        raise ValueError("prompts: expected at least 1 row, got an empty batch")
    limit = 2**63 if vocab_size is None else vocab_size
    for number, row in enumerate(rows):
        if not row:
            raise ValueError(f"prompts: expected at least 1 token in every row, got none in row {number}")
        for token in row:
            if not isinstance(token, int) or not 0 <= token < limit:
                raise ValueError(f"prompts: expected token ids in 0 … {limit - 1}, got {token!r} in row {number}")
    return rows


def _per_row(name: str, value: object, b: int, expected: str, holds: Callable) -> list:
    values = value.tolist() if isinstance(value, Tensor) else value
    values = list(values) if isinstance(values, Sequence) else [values] * b
    if len(values) != b:
        raise ValueError(f"{name}: expected one number or {b}, one per row, got {len(values)}")
    for x in values:
        if isinstance(x, bool) or not isinstance(x, (int, float)) or not holds(x):
            raise ValueError(f"{name}: expected {expected}, got {x!r}")
    return values
