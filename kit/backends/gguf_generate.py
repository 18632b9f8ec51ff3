"""Continuous batching over llama.cpp sequences: a finished sample's place is taken at once.

A new sample takes over the longest beginning of its prompt that any place holds, so shared beginnings and the n
samples of one prompt are evaluated once. Prompts go through alone, then all places decode together: with caches
apart, llama.cpp would split a mixed batch anyway.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from kit.backends import Completion, Finish, Generation, Request, looping, sample_seed
from kit.backends.gguf import Context
from kit.config import Sampling

if TYPE_CHECKING:
    from kit.backends.gguf import GgufBackend

STOP_WINDOW = 64  # last tokens searched for a stop string


@dataclass
class Job:
    """A request under way."""

    request: Request
    begun: float = 0.0
    started: int = 0  # samples that have or had a place
    evaluated_tokens: int = 0
    logits: np.ndarray | None = None  # after the prompt, for all of its samples
    done: dict[int, Completion] = field(default_factory=dict)


@dataclass
class Sample:
    """What is being written at one place."""

    job: Job
    number: int
    random: np.random.Generator
    ids: list[int] = field(default_factory=list)


def generate(backend: GgufBackend, requests: Sequence[Request]) -> Iterator[Generation]:
    """Yield each request's result as it finishes; the plan follows from the list of requests alone."""
    waiting: list[Job] = []
    for request in requests:
        length = len(request.prompt)
        if 0 < length < backend.context_tokens:
            waiting.append(Job(request))
        else:
            why = f"the prompt has {length} tokens, the model's context {backend.context_tokens}"
            yield Generation(request.id, prompt_tokens=length, error=why)
    if not waiting:
        return
    longest = max(len(job.request.prompt) + job.request.sampling.max_new_tokens for job in waiting)
    places: list[Sample | None] = [None] * min(backend.engine.parallel, sum(job.request.n for job in waiting))
    context = Context(backend, min(longest, backend.context_tokens), len(places), flash_attention=True)
    try:
        while waiting or any(places):
            drawn = []
            for place in range(len(places)):
                if places[place] is None and waiting:
                    sample = places[place] = _start(context, place, waiting)
                    drawn.append((place, draw(sample.job.logits, sample)))
            if not drawn:
                busy = [place for place, sample in enumerate(places) if sample]
                rows = [(place, places[place].ids[-1:], {len(context.held[place])}) for place in busy]
                drawn = [(busy[row], draw(logits, places[busy[row]])) for row, _, logits in context.evaluate(rows)]
            for place, token in drawn:
                sample = places[place]
                completion = _append(backend, sample, token)
                if completion:
                    places[place], job = None, sample.job
                    job.done[sample.number] = completion
                    if len(job.done) == job.request.n:
                        yield _result(job)
    finally:
        context.close()


def _start(context: Context, place: int, waiting: list[Job]) -> Sample:
    """Put the next sample's prompt into a place; the request leaves `waiting` with its last sample."""
    job = waiting[0]
    request = job.request
    job.begun = job.begun or time.perf_counter()
    sample = Sample(job, job.started, np.random.default_rng(sample_seed(request.seed, request.id, job.started)))
    job.started += 1
    if job.started == request.n:
        waiting.pop(0)
    kept = context.keep(place, request.prompt if job.logits is not None else request.prompt[:-1])
    if kept < len(request.prompt):
        job.evaluated_tokens += len(request.prompt) - kept
        for _, _, logits in context.evaluate([(place, request.prompt[kept:], {len(request.prompt) - 1})]):
            job.logits = logits.copy()
    return sample


def _append(backend: GgufBackend, sample: Sample, token: int) -> Completion | None:
    """Add a token to a sample; the completion where it ends. A stop string and what follows it are left out."""
    request, ids, tokenizer = sample.job.request, sample.ids, backend.tokenizer
    sampling = request.sampling
    finish: Finish | None = None
    if token in tokenizer.eos_ids:
        return Completion(tokenizer.decode(ids), tuple(ids), "stop")
    ids.append(token)
    if sampling.stop and any(stop in tokenizer.decode(ids[-STOP_WINDOW:]) for stop in sampling.stop):
        text = tokenizer.decode(ids)
        return Completion(text[: min(text.find(s) for s in sampling.stop if s in text)], tuple(ids), "stop")
    if sampling.stop_loops and looping(ids):
        finish = "loop"
    elif len(ids) >= sampling.max_new_tokens or len(request.prompt) + len(ids) >= backend.context_tokens:
        finish = "length"
    return Completion(tokenizer.decode(ids), tuple(ids), finish) if finish else None


def _result(job: Job) -> Generation:
    request = job.request
    completions = tuple(job.done[number] for number in range(request.n))
    seconds = time.perf_counter() - job.begun
    return Generation(request.id, completions, len(request.prompt), job.evaluated_tokens, seconds)


def draw(logits: np.ndarray, sample: Sample) -> int:
    """Draw a sample's next token: penalty, temperature, top-k, top-p, min-p, in the order of transformers.

    Args:
        logits: (V,), left as they are.
        sample: its sampling settings, what it has written, and its generator (one number a token is taken).
    """
    sampling = sample.job.request.sampling
    if sampling.repetition_penalty != 1.0:
        logits, seen = logits.copy(), np.unique([*sample.job.request.prompt, *sample.ids])
        factor = np.where(logits[seen] > 0, 1 / sampling.repetition_penalty, sampling.repetition_penalty)
        logits[seen] *= factor.astype(np.float32)
    if sampling.temperature == 0:
        return int(logits.argmax())
    return _sampled(logits, sampling, sample.random)


def _sampled(logits: np.ndarray, sampling: Sampling, random: np.random.Generator) -> int:
    weights = np.exp((logits - logits.max()) / sampling.temperature, dtype=np.float64)
    # tokens under this floor weigh less than 1 - top_p together, so the nucleus lies above it and few need sorting
    floor = weights.sum() * max((1 - sampling.top_p) / len(weights), 1e-12)
    tokens = np.flatnonzero(weights > floor)
    tokens = tokens[np.argsort(-weights[tokens], kind="stable")][: sampling.top_k or None]
    total = weights[tokens].sum() if sampling.top_k else weights.sum()
    before = np.cumsum(weights[tokens]) - weights[tokens]
    tokens = tokens[(before < sampling.top_p * total) & (weights[tokens] >= sampling.min_p * weights[tokens[0]])]
    running = np.cumsum(weights[tokens])
    return int(tokens[np.searchsorted(running, random.random() * running[-1], "right")])
