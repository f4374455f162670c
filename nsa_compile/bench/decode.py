"""One layer's attention of a decode step, and dense attention's, as things to check and to time."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nsa_compile.bench.beside import flash_attn, sdpa, sdpa_backends
from nsa_compile.bench.cases import OPS, TOLERANCE, Case, Inputs, Sampled, Work, implementations, relative_error
from nsa_compile.custom_ops.window import window_attention
from nsa_compile.graphs.cache import NSACache
from nsa_compile.graphs.capture import new_pool, prepare
from nsa_compile.module import NSAAttention


class Given(nn.Module):
    """Stands for a layer whose output is known."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, *_: Tensor) -> Tensor:
        """The value, whatever comes."""
        return self.value


def given_layer(x: Inputs, new: dict[str, Tensor], impl: str) -> NSAAttention:
    """A layer whose projections and gate give `new`, so that what runs is its attention alone."""
    config = x.options.config(x.n)
    layer = NSAAttention(**config.attention_arguments() | {"impl": impl})
    for name, value in new.items():
        layer.add_module(name, Given(value))
    layer.out = nn.Identity()  # type: ignore[assignment]
    return layer


def decode_cases(x: Inputs, cold_bytes: int) -> list[Case]:
    """One layer's attention of a decode step, from new queries and keys to the mixed branches.

    On CUDA a graph holds as many layers, with caches of their own, as read `cold_bytes`: a layer's cache has left the
    L2 when its turn comes again.
    """
    o = x.options
    g, h = o.groups, x.n // o.groups
    token = g * (o.d_k + o.d_v) * x.q.element_size()
    nominal = o.batch * (x.t // o.d + min(o.n_sel * o.l_sel, x.t) + min(o.w, x.t)) * token
    layers = max(1, min(32, -(-cold_bytes // nominal)))
    return [_decode_case(x, impl, runs, layers, token, h) for impl, runs in implementations(x, OPS["decode"])]


def _decode_case(x: Inputs, impl: str, runs: str, layers: int, token: int, h: int) -> Case:
    o, context = x.options, x.t

    def new(seed: int) -> dict[str, Tensor]:
        names = ("W_Q", *(f"W_{kv}_{p}" for p in ("cmp", "sel", "win") for kv in "KV"))
        width = {"Q": x.n * o.d_k, "K": o.groups * o.d_k, "V": o.groups * o.d_v}
        drawn = {name: x.draw(100 * seed + i, o.batch, 1, width[name[2]]).detach() for i, name in enumerate(names)}
        return drawn | {"gate": x.gates[:, :1].detach().contiguous()}

    def fill(cache: NSACache) -> None:
        generator = torch.Generator(x.device).manual_seed(0)
        for layer in cache.layers:
            for buffer in layer.buffers.values():
                buffer.normal_(generator=generator)

    def model_of(impl: str, inputs: list[dict[str, Tensor]], dtype: torch.dtype) -> tuple[nn.ModuleList, NSACache]:
        attention = [given_layer(x, values, impl) for values in inputs]
        model = nn.ModuleList([*attention, nn.Linear(1, 1)])  # a cache asks for some parameter
        cache = NSACache.for_model(model, o.batch, context + 8, dtype=dtype, device=x.device)
        return model, cache

    def rewind(cache: NSACache) -> None:
        for layer in cache.layers:
            layer.positions.fill_(context)

    inputs = [new(seed) for seed in range(1, layers + 1)]
    model, cache = model_of(impl, inputs, x.dtype)
    fill(cache)
    rewind(cache)
    hidden = torch.zeros(o.batch, 1, 1, dtype=x.dtype, device=x.device)

    def step() -> None:
        for layer in model[:-1]:
            layer(hidden, cache=cache)

    def check() -> Sampled:
        exact, copy = model_of("reference", [{name: y.float() for name, y in inputs[0].items()}], torch.float32)
        for name, buffer in copy.layers[0].buffers.items():
            buffer.copy_(cache.layers[0].buffers[name])
        with torch.no_grad():
            rewind(cache)
            rewind(copy)
            got, want = model[0](hidden, cache=cache), exact[0](hidden.float(), cache=copy)
            rewind(cache)
        # a group may break a near tie of blocks otherwise: a quarter of them may be far off
        got, want = (y.view(o.batch * o.groups, -1) for y in (got, want))
        errors = sorted(relative_error([a], [b]) for a, b in zip(got, want, strict=True))
        return Sampled(errors[max(0, -(-3 * len(errors) // 4) - 1)], TOLERANCE[x.dtype][0])

    with torch.no_grad():
        step()
    cmp, _, _, total = cache.layers[0].actual_reads.sum((0, 1)).tolist()
    rewind(cache)
    flops = 2 * h * (total * (o.d_k + o.d_v) + cmp * o.d_k)

    def capture() -> Callable[[], None]:
        rewind(cache)
        return prepare(step, model, x.device, None, new_pool(x.device))

    return Case(
        "decode", impl, step, (Work(flops, total * token / o.groups), None), check=check, runs=runs, op=OPS["decode"],
        before=partial(rewind, cache), layers=layers, capture=capture,
    )  # fmt: skip


def dense_decode_cases(x: Inputs, cold_bytes: int) -> list[Case]:
    """One query per row over all tokens of a dense cache; on CUDA a graph over caches of `cold_bytes`."""
    o, s = x.options, x.t + 1
    token = o.groups * (o.d_k + o.d_v) * x.q.element_size()
    layers = max(1, min(64, -(-cold_bytes // (o.batch * s * token))))
    functions: dict[str, Callable[..., Any]] = {
        name: partial(sdpa, backend, causal=False) for name, backend in sdpa_backends(x).items()
    }
    functions |= {name: partial(function, causal=False) for name, function in flash_attn(x).items()}
    if not functions:
        return []
    caches = [
        tuple(x.draw(1000 + 10 * i + j, o.batch, s, o.groups, c).detach() for j, c in enumerate((o.d_k, o.d_v)))
        for i in range(layers)
    ]
    q = x.draw(999, o.batch, 1, x.n, o.d_k).detach()
    work = Work(2 * o.batch * x.n * s * (o.d_k + o.d_v), o.batch * s * token)
    cases = []
    for name, function in functions.items():

        def steps(function: Callable[..., Any] = function) -> None:
            for cache in caches:
                function(q, *cache)

        def check(function: Callable[..., Any] = function) -> Sampled:
            last = torch.full((o.batch,), s - 1, dtype=torch.int32, device=x.device)
            want, _ = window_attention(q.float(), *(y.float() for y in caches[0]), w=s, q_start=last, impl="reference")
            return Sampled(relative_error([function(q, *caches[0])], [want]), TOLERANCE[x.dtype][0])

        def replay(steps: Callable[[], None] = steps) -> Callable[[], None]:
            return prepare(steps, torch.nn.Identity(), x.device, None, new_pool(x.device))

        cases.append(
            Case(
                "dense decode", name, steps, (work, None), check=check, layers=layers, ours=False, capture=replay,
            )
        )  # fmt: skip
    return cases
