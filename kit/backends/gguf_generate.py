"""Continuous batching over llama.cpp sequences: a finished sample's slot is filled at once.

A new sample copies the longest beginning of its prompt that any slot holds, so shared beginnings
and the n samples of one prompt are evaluated once. Prompts are evaluated one by one, then all
slots decode together: with separate caches, llama.cpp would split a mixed batch anyway.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from kit.backends.base import (
    ActiveRequest,
    Completion,
    Generation,
    Request,
    Tokenizer,
    Trunk,
    check_stop,
    sample_seed,
    too_long,
)
from kit.backends.gguf import BatchToken, Context, GgufBackend
from kit.core.config import Sampling
from kit.core.errors import KitError

ROUNDING = 1e-5  # more than the relative error of a sum of fp32 exponentials


@dataclass(eq=False)
class Sample:
    """One sample, waiting for a slot or running in one."""

    active: ActiveRequest
    number: int  # among the samples of its request
    random: np.random.Generator
    ids: list[int] = field(default_factory=list)  # drawn so far
    seen: Any = None  # (V,) bool, the tokens of the prompt and of `ids`; set by `prefill`

    def prefill(self, context: Context, slot: int) -> np.ndarray:
        """Evaluate the prompt in a slot; returns logits (V,)."""
        active = self.active
        prompt = active.request.prompt
        active.begun = active.begun or time.perf_counter()
        # the request's first sample needs logits, and keeps them for the others
        reusable = prompt[:-1] if active.logits is None else prompt
        active.prefill_tokens += len(prompt) - context.reuse(slot, reusable)
        for logits in context.prefill(slot, prompt, {len(prompt) - 1}):
            active.logits = logits.copy()
        self.seen = np.zeros(len(active.logits), bool)
        self.seen[list(prompt)] = True
        return active.logits

    def push(self, logits: np.ndarray, tokenizer: Tokenizer) -> Completion | None:
        """Draw the next token from logits (V,); returns the completion if that ends it."""
        sampling = self.active.request.sampling
        token = draw(logits, sampling, self.random, self.seen)
        self.seen[token] = True
        self.ids.append(token)
        return check_stop(self.ids, self.active.limit_tokens, sampling, tokenizer)


def generate(backend: GgufBackend, requests: Sequence[Request]) -> Iterator[Generation]:
    """Yield each request's result as it finishes; the plan follows from the requests alone.

    A trunk keeps the context for the next call. Its last sequence holds the longest prompt. A
    request that has no memory even alone is an error; the others go on.
    """
    # 1. Refuse prompts that are too long; queue the samples of the others.
    limit = backend.context_tokens
    waiting: deque[Sample] = deque()
    longest = 0
    for request in requests:
        error = too_long(request, limit)
        if error:
            yield error
            continue
        size = len(request.prompt)
        active = ActiveRequest(request, min(request.sampling.max_new_tokens, limit - size))
        longest = max(longest, active.tokens)
        for number in range(request.n):
            seed = sample_seed(request.seed, request.id, number)
            waiting.append(Sample(active, number, np.random.default_rng(seed)))
    if not waiting:
        return
    # 2. Give samples one token after the other; those that end free their slots.
    running: dict[int, Sample] = {}  # by slot
    kept = requests[0].trunk
    with Trunk() as own:
        trunk = kept or own
        context = trunk.state
        if context is None or context.tokens < longest:
            trunk.close()
            trunk.state = None
            tokens = max(longest, min(trunk.room_tokens, limit))
            try:
                context = open_context(backend, tokens, len(waiting), spare=int(bool(kept)))
            except KitError as error:
                yield from _without_largest(backend, waiting, str(error))
                return
            trunk.callback(context.close)
            trunk.state = context
        slots = len(context.cached) - int(bool(kept))
        while waiting or running:
            for slot, logits in next_logits(context, slots, running, waiting):
                sample = running[slot]
                completion = sample.push(logits, backend.tokenizer)
                if completion:
                    del running[slot]
                    result = sample.active.finish(sample.number, completion)
                    if result:
                        yield result


def _without_largest(
    backend: GgufBackend, waiting: Sequence[Sample], error: str
) -> Iterator[Generation]:
    """Give up the request that needs the most memory, and go on with the others."""
    actives = [sample.active for sample in waiting]
    largest = max(actives, key=lambda active: active.tokens).request
    yield Generation(largest.id, prompt_tokens=len(largest.prompt), error=error)
    others = {active.request.id: active.request for active in actives}
    del others[largest.id]
    if others:
        yield from generate(backend, list(others.values()))


def open_context(backend: GgufBackend, tokens: int, samples: int, spare: int = 0) -> Context:
    """A context of as many slots as there are samples, `max_num_seqs` and memory allow.

    Args:
        tokens: room of each sequence.
        spare: further sequences, which no sample takes.

    Raises:
        KitError: no memory for one.
    """
    slots = wanted = min(backend.max_rows, samples)
    while True:
        try:
            context = Context(backend, tokens, slots + spare, flash_attention=True)
            break
        except KitError:
            if slots == 1:
                raise
        slots //= 2
    if slots < wanted:
        backend.max_rows = slots
        backend.notes.append(f"Out of memory: going on with {slots} rows at a time.")
    return context


def next_logits(
    context: Context, slots: int, running: dict[int, Sample], waiting: deque[Sample]
) -> Iterator[tuple[int, np.ndarray]]:
    """Start waiting samples where slots are free, else decode all running ones together.

    Moves samples from `waiting` to `running`. Yields (slot, logits (V,)). A sequence after the
    slots keeps the longest prompt.
    """
    free = [slot for slot in range(slots) if slot not in running]
    starting = free[: len(waiting)]
    for slot in starting:
        running[slot] = waiting.popleft()
        logits = running[slot].prefill(context, slot)
        prompt = running[slot].active.request.prompt
        if slots < len(context.cached) and len(prompt) > len(context.cached[slots]):
            context.reuse(slots, prompt)
        yield slot, logits
    if not starting:
        busy = sorted(running)
        tokens = [BatchToken(slot, running[slot].ids[-1], True) for slot in busy]
        yield from zip(busy, context.decode(tokens), strict=True)


def draw(
    logits: np.ndarray, sampling: Sampling, random: np.random.Generator, seen: np.ndarray
) -> int:
    """Draw one token, filtered as in hf_batch.draw, whose tensors are slower for a CPU's row.

    Args:
        logits: (V,), left as they are.
        sampling: temperature, filters and repetition penalty.
        random: gives one number, none at temperature 0.
        seen: (V,) bool, the tokens that the penalty applies to: of prompt and sample.
    """
    scaled, rough = _workspace(len(logits))
    np.copyto(scaled, logits)
    if sampling.repetition_penalty != 1:
        penalty = sampling.repetition_penalty
        ids = np.flatnonzero(seen)
        factors = np.where(logits[ids] > 0, np.float32(1 / penalty), np.float32(penalty))
        scaled[ids] *= factors
    if sampling.temperature == 0:
        return int(scaled.argmax())
    scaled -= scaled.max()
    scaled /= sampling.temperature
    uniform = random.random()
    token = None
    # In fp32 first, which takes a fifth of the time, and decides unless rounding could.
    if sampling.top_p < 1 and not sampling.top_k:
        token = choose(scaled, np.exp(scaled, out=rough), sampling, uniform, ROUNDING)
    if token is None:
        weights = np.exp(scaled, dtype=np.float64)
        token = choose(scaled, weights, sampling, uniform, 0.0)
    assert token is not None
    return token


@cache
def _workspace(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Arrays (size,) of fp32 that every draw overwrites: new ones cost page faults."""
    return np.empty(size, np.float32), np.empty(size, np.float32)


def choose(
    scaled: np.ndarray,
    weights: np.ndarray,
    sampling: Sampling,
    uniform: float,
    rounding: float,
) -> int | None:
    """The token that a number in [0, 1) picks among those that the filters leave.

    Args:
        scaled: (V,) logits over temperature, the largest 0.
        weights: (V,) their exponentials; only their sum and which are tiny is taken from them.
        rounding: how far the sum may be off, relative. None is returned where that could matter.
    """
    total = weights.sum(dtype=np.float64)
    # Tokens under this floor weigh less than 1 - top_p together, so the nucleus is above it, and
    # few tokens need sorting.
    floor = total * max((1 - sampling.top_p) / len(weights), 1e-12)
    ids = np.flatnonzero(weights > floor * (1 - rounding))
    weights = np.exp(scaled[ids], dtype=np.float64)
    order = np.argsort(-weights, kind="stable")
    ids = ids[order]
    weights = weights[order]
    if sampling.top_k:
        ids = ids[: sampling.top_k]
        weights = weights[: sampling.top_k]
        total = weights.sum()
    # a token stays if those before it are less than top_p, and if it is not too unlikely itself
    before = np.cumsum(weights) - weights
    nucleus = sampling.top_p * total
    if (np.abs(before - nucleus) < rounding * nucleus).any():
        return None
    kept = (before < nucleus) & (weights >= sampling.min_p * weights[0])
    cumulative = np.cumsum(weights * kept)
    chosen = np.searchsorted(cumulative, uniform * cumulative[-1], "right")
    return int(ids[chosen])
