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

    A trunk keeps the context for the next call. Its last sequence holds the longest prompt.
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
        longest = max(longest, size + active.limit_tokens)
        for number in range(request.n):
            seed = sample_seed(request.seed, request.id, number)
            waiting.append(Sample(active, number, np.random.default_rng(seed)))
    if not waiting:
        return
    # 2. Give samples one token after the other; those that end free their slots.
    slots = min(backend.engine.max_num_seqs, len(waiting))
    running: dict[int, Sample] = {}  # by slot
    kept = requests[0].trunk
    with Trunk() as own:
        trunk = kept or own
        context = trunk.state
        if context is None or context.tokens < longest:
            trunk.close()
            tokens = max(longest, min(trunk.room_tokens, limit))
            context = Context(backend, tokens, slots + bool(kept), flash_attention=True)
            trunk.callback(context.close)
            trunk.state = context
        if kept:
            slots = len(context.cached) - 1
        while waiting or running:
            for slot, logits in next_logits(context, slots, running, waiting):
                sample = running[slot]
                completion = sample.push(logits, backend.tokenizer)
                if completion:
                    del running[slot]
                    result = sample.active.finish(sample.number, completion)
                    if result:
                        yield result


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
    if sampling.repetition_penalty != 1:
        penalty = sampling.repetition_penalty
        ids = np.flatnonzero(seen)
        factors = np.where(logits[ids] > 0, np.float32(1 / penalty), np.float32(penalty))
        logits = logits.copy()
        logits[ids] *= factors
    if sampling.temperature == 0:
        return int(logits.argmax())
    weights = np.exp((logits - logits.max()) / sampling.temperature, dtype=np.float64)
    total = weights.sum()
    # Tokens under this floor weigh less than 1 - top_p together, so the nucleus is above it, and
    # few tokens need sorting.
    ids = np.flatnonzero(weights > total * max((1 - sampling.top_p) / len(weights), 1e-12))
    ids = ids[np.argsort(-weights[ids], kind="stable")]
    if sampling.top_k:
        ids = ids[: sampling.top_k]
        total = weights[ids].sum()
    weights = weights[ids]
    # a token stays if those before it are less than top_p, and if it is not too unlikely itself
    before = np.cumsum(weights) - weights
    kept = (before < sampling.top_p * total) & (weights >= sampling.min_p * weights[0])
    cumulative = np.cumsum(weights * kept)
    chosen = np.searchsorted(cumulative, random.random() * cumulative[-1], "right")
    return int(ids[chosen])
