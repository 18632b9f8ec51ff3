"""Continuous batching over llama.cpp sequences: a finished sample's place is taken at once.

A new sample takes over the longest beginning of its prompt that any place holds, so shared beginnings and the n
samples of one prompt are evaluated once. Prompts go through alone, then all places decode together: with caches
apart, llama.cpp would split a mixed batch anyway.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np

from kit.backends.base import ActiveRequest, Generation, Request, check_stop, sample_seed, too_long
from kit.backends.gguf import Context, GgufBackend
from kit.core.config import Sampling


class Sample:
    """What is being written, or waits for a place."""

    def __init__(self, job: ActiveRequest, number: int) -> None:
        self.job, self.number, request = job, number, job.request
        self.ids: list[int] = []
        self.random = np.random.default_rng(sample_seed(request.seed, request.id, number))

    def begin(self, context: Context, place: int) -> None:
        """Put the prompt into a place and draw the first token."""
        job, prompt = self.job, self.job.request.prompt
        job.begun = job.begun or time.perf_counter()
        kept = context.keep(place, prompt if job.logits is not None else prompt[:-1])
        job.prefill_tokens += len(prompt) - kept
        for _, logits in context.evaluate([(place, prompt[kept:], {len(prompt) - 1})]):
            job.logits = logits.copy()
        self.draw(job.logits)

    def draw(self, logits: np.ndarray) -> None:
        """Write the next token."""
        request = self.job.request
        self.ids.append(draw(logits, request.sampling, self.random, (*request.prompt, *self.ids)))


def generate(backend: GgufBackend, requests: Sequence[Request]) -> Iterator[Generation]:
    """Yield each request's result as it finishes; the plan follows from the list of requests alone."""
    limit, waiting, longest = backend.context_tokens, deque[Sample](), 0
    for request in requests:
        if refused := too_long(request, limit):
            yield refused
            continue
        job = ActiveRequest(
            request, min(request.sampling.max_new_tokens, limit - len(request.prompt))
        )
        waiting += [Sample(job, number) for number in range(request.n)]
        longest = max(longest, len(request.prompt) + request.sampling.max_new_tokens)
    if not waiting:
        return
    slots: list[Sample | None] = [None] * min(backend.engine.max_num_seqs, len(waiting))
    context = Context(backend, min(longest, limit), len(slots), flash_attention=True)
    try:
        while waiting or any(slots):
            busy = [place for place, sample in enumerate(slots) if not sample][: len(waiting)]
            for place in busy:
                slots[place] = waiting.popleft()
                slots[place].begin(context, place)
            if not busy:
                busy = [place for place, sample in enumerate(slots) if sample]
                rows = [
                    (place, slots[place].ids[-1:], {len(context.held[place])}) for place in busy
                ]
                for place, (_, logits) in zip(busy, context.evaluate(rows), strict=True):
                    slots[place].draw(logits)
            for place in busy:
                sample, job = slots[place], slots[place].job
                completion = check_stop(
                    sample.ids, job.limit_tokens, job.request.sampling, backend.tokenizer
                )
                if completion:
                    slots[place] = None
                    if made := job.finish(sample.number, completion):
                        yield made
    finally:
        context.close()


def draw(
    logits: np.ndarray, sampling: Sampling, random: np.random.Generator, seen: Sequence[int]
) -> int:
    """Draw a token from logits (V,), left as they are; the penalty looks at `seen`, the prompt included. Filtered as in
    hf_batch.draw, whose tensors take 3 to 15 times as long on a CPU's row."""
    if sampling.repetition_penalty != 1:
        logits, known = logits.copy(), np.unique(seen)
        factor = np.where(
            logits[known] > 0, 1 / sampling.repetition_penalty, sampling.repetition_penalty
        )
        logits[known] *= factor.astype(np.float32)
    if sampling.temperature == 0:
        return int(logits.argmax())
    weights = np.exp((logits - logits.max()) / sampling.temperature, dtype=np.float64)
    # tokens under this floor weigh less than 1 - top_p together, so the nucleus lies above it and few need sorting
    tokens = np.flatnonzero(
        weights > weights.sum() * max((1 - sampling.top_p) / len(weights), 1e-12)
    )
    tokens = tokens[np.argsort(-weights[tokens], kind="stable")][: sampling.top_k or None]
    total = weights[tokens].sum() if sampling.top_k else weights.sum()
    weights = weights[tokens]
    running = np.cumsum(weights)
    left = (running - weights < sampling.top_p * total) & (weights >= sampling.min_p * weights[0])
    running = np.cumsum(weights * left)
    return int(tokens[np.searchsorted(running, random.random() * running[-1], "right")])
