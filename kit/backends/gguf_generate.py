"""Continuous batching over llama.cpp sequences: a finished sample's slot is filled at once.

A new sample copies the longest beginning of its prompt that any slot holds, so shared beginnings
and the n samples of one prompt are evaluated once. Prompts are evaluated one by one, then all
slots decode together: with separate caches, llama.cpp would split a mixed batch anyway.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from kit.backends.base import ActiveSample, Generation, Request, Trunk, samples_of
from kit.backends.gguf import BatchToken, Context, GgufBackend
from kit.core.config import Sampling
from kit.core.errors import KitError


def generate(backend: GgufBackend, requests: Sequence[Request]) -> Iterator[Generation]:
    """Yield each request's result as it finishes; the plan follows from the requests alone.

    A trunk keeps the context for the next call. Its last sequence holds the longest prompt. A
    request that has no memory even alone is an error; the others go on.
    """
    # 1. Refuse prompts that are too long; queue the samples of the others.
    limit = backend.context_tokens
    waiting, errors = samples_of(requests, limit, np.random.default_rng)
    yield from errors
    if not waiting:
        return
    longest = max(sample.active.tokens for sample in waiting)
    # 2. Give samples one token after the other; those that end free their slots.
    running: dict[int, ActiveSample] = {}  # by slot
    spare = int(requests[0].trunk is not None)  # a sequence that keeps the longest prompt
    with Trunk() as own:
        trunk = requests[0].trunk or own
        context = trunk.state
        if context is None or context.tokens < longest:
            trunk.close()
            trunk.state = None
            tokens = max(longest, min(trunk.room_tokens, limit))
            try:
                context = open_context(backend, tokens, len(waiting), spare)
            except KitError as error:
                yield from _without_largest(backend, waiting, str(error))
                return
            trunk.callback(context.close)
            trunk.state = context
        slots = len(context.cached) - spare
        while waiting or running:
            for slot, logits in next_logits(context, slots, running, waiting):
                sample = running[slot]
                sampling = sample.active.request.sampling
                token = draw(logits, sampling, sample.uniform, sample.seen)
                sample.seen[token] = True
                if sample.push(token, backend.tokenizer):
                    del running[slot]
                    yield from sample.active.result()


def _without_largest(
    backend: GgufBackend, waiting: Sequence[ActiveSample], error: str
) -> Iterator[Generation]:
    """Give up the request that needs the most memory, and go on with the others."""
    actives = [sample.active for sample in waiting]
    largest = max(actives, key=lambda active: active.tokens).request
    yield Generation(largest.id, prompt_tokens=len(largest.prompt), error=error)
    others = {active.request.id: active.request for active in actives}
    del others[largest.id]
    if others:
        yield from generate(backend, list(others.values()))


def open_context(backend: GgufBackend, tokens: int, samples: int, spare: int) -> Context:
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
            context = Context(backend, tokens, slots + spare)
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
    context: Context, slots: int, running: dict[int, ActiveSample], waiting: deque[ActiveSample]
) -> Iterator[tuple[int, np.ndarray]]:
    """Start waiting samples where slots are free, else decode all running ones together.

    Moves samples from `waiting` to `running`. Yields (slot, logits (V,)). A sequence after the
    slots keeps the longest prompt.
    """
    free = [slot for slot in range(slots) if slot not in running]
    starting = free[: len(waiting)]
    for slot in starting:
        sample = running[slot] = waiting.popleft()
        logits = _prefill(sample, context, slot)
        prompt = sample.active.request.prompt
        if slots < len(context.cached) and len(prompt) > len(context.cached[slots]):
            context.reuse(slots, prompt)
        yield slot, logits
    if not starting:
        busy = sorted(running)
        tokens = [BatchToken(slot, running[slot].ids[-1], True) for slot in busy]
        yield from zip(busy, context.decode(tokens), strict=True)


def _prefill(sample: ActiveSample, context: Context, slot: int) -> np.ndarray:
    """Evaluate a sample's prompt in a slot; returns logits (V,)."""
    active = sample.active
    prompt = active.request.prompt
    active.begun = active.begun or time.perf_counter()
    # the request's first sample needs logits, and keeps them for the others
    reusable = prompt[:-1] if active.logits is None else prompt
    active.prefill_tokens += len(prompt) - context.reuse(slot, reusable)
    for logits in context.prefill(slot, prompt, {len(prompt) - 1}):
        active.logits = logits.copy()
    sample.seen = np.zeros(len(active.logits), bool)
    sample.seen[list(prompt)] = True
    return active.logits


def draw(
    logits: np.ndarray, sampling: Sampling, uniform: Callable[[], float], seen: np.ndarray
) -> int:
    """Draw one token, filtered as in hf_batch.draw, whose tensors are slower for a CPU's row.

    Args:
        logits: (V,), left as they are.
        sampling: temperature, filters and repetition penalty.
        uniform: gives one number in [0, 1), none at temperature 0.
        seen: (V,) bool, the tokens that the penalty applies to: of prompt and sample.
    """
    scaled = logits.astype(np.float32)
    penalty = np.float32(sampling.repetition_penalty)
    if penalty != 1:
        ids = np.flatnonzero(seen)
        scaled[ids] *= np.where(logits[ids] > 0, 1 / penalty, penalty)
    if sampling.temperature == 0:
        return int(scaled.argmax())
    scaled -= scaled.max()
    scaled /= sampling.temperature
    weights = np.exp(scaled)
    total = weights.sum(dtype=np.float64)
    # Tokens under this floor weigh less than 1 - top_p together, so the nucleus is above it, and
    # few tokens need sorting, and weights in fp64.
    floor = total * max((1 - sampling.top_p) / len(weights), 1e-12)
    ids = np.flatnonzero(weights > floor)
    weights = np.exp(scaled[ids], dtype=np.float64)
    order = np.argsort(-weights, kind="stable")[: sampling.top_k or None]
    weights = weights[order]
    if sampling.top_k:
        total = weights.sum()
    # a token stays if those before it are less than top_p, and if it is not too unlikely itself
    before = np.cumsum(weights) - weights
    kept = (before < sampling.top_p * total) & (weights >= sampling.min_p * weights[0])
    cumulative = np.cumsum(weights * kept)
    chosen = np.searchsorted(cumulative, uniform() * cumulative[-1], "right")
    return int(ids[order[chosen]])
