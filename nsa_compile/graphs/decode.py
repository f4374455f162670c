"""Decode steps of a whole model, embedding to sampled token, as one CUDA graph over rows that come and go."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from nsa_compile.custom_ops.decode import STEP
from nsa_compile.graphs.cache import NSACache, check_cache
from nsa_compile.graphs.capture import new_pool, plain_tensors, prepare
from nsa_compile.ops.checks import check_int, check_tensor, has_shape, values_are_visible
from nsa_compile.ops.sampling import check_sampling, sample

LOG = 64
"""Steps whose tokens the device keeps until the host looks at them."""
NONE = -1


class RowUpdate(NamedTuple):
    """What a row drew since the last look."""

    row: int
    tokens: list[int]
    """Drawn tokens, without the stop token."""
    finished: bool
    """Whether the row ended, by its stop token or its number of tokens; it is idle then."""
    stopped: bool
    """Whether it ended by its stop token."""


@dataclass
class _Row:
    """What the host knows of a row that decodes."""

    left: int
    """Tokens it may still draw."""
    stop_token: int
    sampled: bool
    new: list[int]
    unread: int
    """Steps before it that the host has not looked at."""
    stopped: bool = False
    full: bool = False
    """Whether it came to the capacity before its end: it held more than the host was told."""


class DecodeGraph:
    """Steps of a model over the rows of a cache, each one CUDA graph from embedding to sampled token.

    A step feeds every decoding row its last token and draws the next; idle rows stay as they are. Rows start and end
    at any step without a new capture, and what a row draws depends on nothing but the row. The device decides when a
    row ends; the host looks at the tokens whenever `collect` is called, and waits for nothing in between.

    With `drafts`, a step verifies that many guessed tokens per row besides: those that equal what would have been drawn
    are taken, so a step yields 1 … drafts + 1 tokens, the same ones that steps without drafts yield.

    The weights of a layer's projections are laid one after the other in memory (`pack_projections`), so that a step
    takes them in one product; they stay the parameters they were.

    Where nothing can be captured (on a CPU, or a model compiled with `mode="reduce-overhead"`), a step is a call of the
    model.

    Args:
        model: as in `generate`; with `drafts` it must also give the logits of all tokens, [b, t, vocab], when called
            with `last_only=False`.
        cache: of as many rows as decode at a time. All its rows are idle at first.
        drafts: guessed tokens per row and step, 0 … 7.
        capture: False to go without a CUDA graph; default: with one where possible.

    Raises: ValueError or TypeError naming the argument, what was expected and what came.
    """

    def __init__(self, model: nn.Module, cache: NSACache, *, drafts: int = 0, capture: bool | None = None) -> None:
        check_int("drafts", drafts, 0, STEP - 1)
        self.model, self.cache, self.width = model, check_cache("cache", cache), drafts + 1
        for module in cache.modules:
            if hasattr(module, "pack_projections"):
                cast(Any, module).pack_projections()
        self._device = device = cache.positions.device
        b = cache.batch
        with plain_tensors():
            self._token = torch.zeros(b, dtype=torch.int64, device=device)
            self._drafts = torch.full((b, drafts), NONE, dtype=torch.int64, device=device)
            self._active = torch.zeros(b, dtype=torch.bool, device=device)
            self._left = torch.zeros(b, dtype=torch.int32, device=device)
            self._stop_token = torch.full((b,), NONE, dtype=torch.int64, device=device)
            self._temperature = torch.zeros(b, dtype=torch.float32, device=device)
            self._top_p = torch.ones(b, dtype=torch.float32, device=device)
            self._seed = torch.zeros(b, dtype=torch.int64, device=device)
            self._log = torch.full((LOG, b, self.width), NONE, dtype=torch.int64, device=device)
            self._step = torch.zeros(1, dtype=torch.int64, device=device)
            self._host_log = torch.empty_like(self._log, device="cpu", pin_memory=device.type == "cuda")
        self._rows: dict[int, _Row] = {}
        self._unread = 0
        self.vocab_size = 0  # from the warm-up on
        self._replays: dict[bool, Callable[[], None]] = {}
        pool = new_pool(device)
        for sampled in (False, True):
            self._replays[sampled] = prepare(partial(self._work, sampled), model, device, capture, pool)
        self._step.zero_()

    @property
    def idle(self) -> list[int]:
        """Rows that may start."""
        return [row for row in range(self.cache.batch) if row not in self._rows]

    def start(
        self, row: int, token: int, *, max_new_tokens: int, temperature: float = 0.0, top_p: float = 1.0,
        seed: int = 0, stop_token: int | None = None,
    ) -> None:  # fmt: skip
        """Let an idle row decode from the next step on.

        Args:
            row: of the cache, which holds the prompt but for its last token, as counted by the cache's `reserve` or by
                what calls it: `PrefillGraph`, `copy_row`.
            token: the prompt's last token.
            max_new_tokens: tokens to draw at most.
            temperature, top_p, seed: as in `sample`.
            stop_token: the id that ends the row.

        Raises: ValueError or TypeError before anything is written, also if prompt and new tokens would pass the
            capacity.
        """
        check_int("row", row, 0)
        if row not in self.idle:
            raise ValueError(f"row: expected one of the idle rows {self.idle}, got {row}")
        check_int("token", token, 0, self.vocab_size - 1)
        check_int("max_new_tokens", max_new_tokens)
        if stop_token is not None:
            check_int("stop_token", stop_token, 0, self.vocab_size - 1)
        length = self.cache.host_lengths[row] + 1
        positions = self.cache.positions
        if values_are_visible(positions) and positions[row] != length - 1:
            raise ValueError(
                f"row: expected {length - 1} tokens in row {row} of the cache, as it was told by reserve, "
                f"got {positions[row].item()}"
            )
        if length + max_new_tokens > self.cache.capacity:
            raise ValueError(
                f"max_new_tokens: expected what row {row} holds and max_new_tokens = {max_new_tokens} to be at most "
                f"{self.cache.capacity} tokens (the cache's capacity), got {length + max_new_tokens}"
            )
        check_sampling(temperature=temperature, top_p=top_p, seed=seed)
        stop_token = NONE if stop_token is None else stop_token
        values = (
            (self._token, token), (self._left, max_new_tokens), (self._stop_token, stop_token),
            (self._temperature, temperature), (self._top_p, top_p), (self._seed, seed), (self._active, True),
        )  # fmt: skip
        for tensor, value in values:
            tensor[row : row + 1].fill_(value)  # unlike an assignment, without a stop of the host
        self._rows[row] = _Row(max_new_tokens, stop_token, temperature > 0, [], self._unread)

    def cancel(self, row: int) -> None:
        """End a row that decodes; `collect` gives what it has drawn. Its cache holds all of its tokens but the last."""
        check_int("row", row, 0)
        if row not in self._rows:
            raise ValueError(f"row: expected one of the decoding rows {sorted(self._rows)}, got {row}")
        self._drain()
        self._active[row : row + 1].fill_(False)
        self._rows[row].left = 0

    def step(self, n: int = 1, *, drafts: Tensor | None = None) -> None:
        """Make n steps. The host waits for none of them, but looks at the tokens once in 64.

        drafts: int64 [b, drafts] on the cache's device, the tokens guessed to follow each row's last one in the first
            of these steps; -1, the default, where nothing is guessed.

        Raises: ValueError or TypeError before anything is written.
        """
        check_int("n", n, 0)
        if drafts is not None:
            if (
                not has_shape(check_tensor("drafts", drafts), *self._drafts.shape)
                or drafts.dtype != torch.int64
                or drafts.device != self._device
            ):
                raise ValueError(
                    f"drafts: expected int64 {tuple(self._drafts.shape)} on {self._device}, "
                    f"got {drafts.dtype} {tuple(drafts.shape)} on {drafts.device}"
                )
            if (
                values_are_visible(drafts)
                and drafts.numel()
                and not -1 <= drafts.min() <= drafts.max() < self.vocab_size
            ):
                low, high = (int(x) for x in drafts.aminmax())
                raise ValueError(f"drafts: expected values in -1 … {self.vocab_size - 1}, got {low} … {high}")
            self._drafts.copy_(drafts)
        replay = self._replays[any(row.sampled for row in self._rows.values())]
        with plain_tensors():
            for _ in range(n):
                if self._unread == LOG:
                    self._drain()
                replay()
                self._unread += 1

    def collect(self) -> list[RowUpdate]:
        """Wait for the steps made and return what each decoding row has drawn since the last look.

        Raises: ValueError if a row came to the capacity before its end, since it held more tokens than the cache's
            `reserve` was told when it started; such rows are idle then, and the next call returns what the others drew.
        """
        self._drain()
        full = {row: state for row, state in sorted(self._rows.items()) if state.full and state.left}
        for row in full:
            self._active[row : row + 1].fill_(False)
            del self._rows[row]
        if full:
            row, state = next(iter(full.items()))
            raise ValueError(
                f"row: expected all tokens that row {row} held when it started to be counted by the cache's reserve, "
                f"got one that came to the capacity of {self.cache.capacity} with {state.left} tokens left to draw"
            )
        updates = []
        for row, state in sorted(self._rows.items()):
            finished = state.stopped or state.left == 0
            updates.append(RowUpdate(row, state.new, finished, state.stopped))
            state.new = []
            if finished:
                del self._rows[row]
        return updates

    def _drain(self) -> None:
        """Take the tokens that are on the device, and count in the cache what the rows have appended."""
        if not self._unread:
            return
        self._host_log.copy_(self._log, non_blocking=True)
        self._step.zero_()
        if self._device.type == "cuda":
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self._device))
            event.synchronize()
        log = self._host_log[: self._unread].tolist()
        self._unread = 0
        for row, state in self._rows.items():
            taken = [[token for token in step[row] if token != NONE] for step in log]
            drawn = [token for tokens in taken for token in tokens]
            state.left -= len(drawn)
            state.stopped = state.stopped or state.stop_token in drawn
            state.new += drawn[:-1] if state.stop_token in drawn else drawn
            # every step draws a token for a row until its end, or until it has no room
            state.full = not state.stopped and state.left > 0 and not all(taken[state.unread :])
            state.unread = 0
            self.cache.count(row, self.cache.host_lengths[row] + len(drawn), ahead=self.width - 1)

    def _work(self, sampled: bool) -> None:
        """One step on the device."""
        m, positions = self.width, self.cache.positions
        start = positions.clone()  # of each row's last token; the first one drawn stands after it
        room = self.cache.capacity - start  # less than is left only where the host was not told of all tokens
        count = torch.where(self._active, torch.minimum(self._left, room).clamp(0, m), 0)
        guesses = self._drafts.clamp(0, max(0, self.vocab_size - 1))  # an id that does not exist is a wrong guess
        ids = torch.cat((self._token[:, None], guesses), 1)
        logits = self.model(ids, cache=self.cache, lengths=count, last_only=m == 1)
        self.vocab_size = logits.shape[-1]
        offset = torch.arange(m, device=self._device)
        drawn = self._draw(logits, start[:, None] + 1 + offset, sampled)

        guessed = torch.cat((torch.ones_like(self._active)[:, None], drawn[:, :-1] == self._drafts), 1)
        stops = drawn == self._stop_token[:, None]
        # a token counts if the ones before it were guessed right and none of them was the stop token
        going = torch.cat((guessed[:, :1], guessed[:, 1:] & ~stops[:, :-1]), 1)
        taken = (going.cumsum(1) > offset) & (offset < count[:, None])
        n = taken.sum(1)
        if m > 1:
            ends = (start + n).to(positions.dtype)
            for layer in self.cache.layers:
                layer.positions.copy_(ends)
            self._drafts.fill_(NONE)
        last = drawn.gather(1, (n - 1).clamp_min(0)[:, None])[:, 0]
        self._token.copy_(torch.where(self._active, last, self._token))
        self._left.sub_(n)
        self._active.logical_and_((self._left > 0) & ~(taken & stops).any(1))
        self._log.index_copy_(0, self._step, torch.where(taken, drawn, NONE)[None])
        self._step.add_(1)

    def _draw(self, logits: Tensor, position: Tensor, sampled: bool) -> Tensor:
        """The tokens int64 [b, m] for logits [b, m, vocab] that will stand at positions [b, m]."""
        if not sampled:
            return logits.argmax(-1)
        m = self.width
        rows = (x.repeat_interleave(m, output_size=len(x) * m) for x in (self._temperature, self._top_p, self._seed))
        temperature, top_p, seed = rows
        tokens = sample(
            logits.flatten(0, 1), temperature=temperature, top_p=top_p, seed=seed, position=position.flatten()
        )
        return tokens.view(-1, m)
