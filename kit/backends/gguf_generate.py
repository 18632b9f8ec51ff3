"""Continuous batching over llama.cpp sequences: a finished sample's place is taken at once.

A new sample takes over the longest beginning of its prompt that any place holds, so shared beginnings and the n
samples of one prompt are evaluated once. Prompts go through alone, then all places decode together: with caches
apart, llama.cpp would split a mixed batch anyway.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from kit.backends import Completion, Finish, Generation, Request, looping, sample_seed
from kit.backends.gguf import Context, GgufBackend
from kit.config import Sampling

STOP_WINDOW = 64  # last tokens searched for a stop string


@dataclass
class Job:
    """A request under way; `logits` (V,), after the prompt, serve all of its samples."""

    request: Request
    begun: float = 0.0
    started: int = 0
    evaluated_tokens: int = 0
    logits: np.ndarray | None = None
    done: dict[int, Completion] = field(default_factory=dict)


@dataclass
class Sample:
    """What is being written at one place."""

    job: Job
    number: int
    random: np.random.Generator
    ids: list[int] = field(default_factory=list)

    def draw(self, logits: np.ndarray) -> None:
        """Write the next token."""
        request = self.job.request
        self.ids.append(draw(logits, request.sampling, self.random, (*request.prompt, *self.ids)))


def generate(backend: GgufBackend, requests: Sequence[Request]) -> Iterator[Generation]:
    """Yield each request's result as it finishes; the plan follows from the list of requests alone."""
    limit = backend.context_tokens
    for request in requests:
        if not 0 < len(request.prompt) < limit:
            why = f"the prompt has {len(request.prompt)} tokens, the model's context {limit}"
            yield Generation(request.id, prompt_tokens=len(request.prompt), error=why)
    waiting = [Job(request) for request in requests if 0 < len(request.prompt) < limit]
    if not waiting:
        return
    places: list[Sample | None] = [None] * min(backend.engine.parallel, sum(job.request.n for job in waiting))
    longest = max(len(job.request.prompt) + job.request.sampling.max_new_tokens for job in waiting)
    context = Context(backend, min(longest, limit), len(places), flash_attention=True)
    try:
        while waiting or any(places):
            free = [place for place, sample in enumerate(places) if sample is None] if waiting else []
            for place in free[: sum(job.request.n - job.started for job in waiting)]:
                places[place] = _start(context, place, waiting)
            if not free:
                busy = [place for place, sample in enumerate(places) if sample]
                rows = [(place, places[place].ids[-1:], {len(context.held[place])}) for place in busy]
                for row, _, logits in context.evaluate(rows):
                    places[busy[row]].draw(logits)
            for place in free or busy:
                sample = places[place]
                if not sample or not (completion := _ended(backend, sample)):
                    continue
                places[place], job = None, sample.job
                job.done[sample.number] = completion
                if len(job.done) == job.request.n:
                    completions = tuple(done for _, done in sorted(job.done.items()))
                    lengths = len(job.request.prompt), job.evaluated_tokens
                    yield Generation(job.request.id, completions, *lengths, time.perf_counter() - job.begun)
    finally:
        context.close()


def _start(context: Context, place: int, waiting: list[Job]) -> Sample:
    """Put the next sample's prompt into a place and draw its first token."""
    job, request, prompt = waiting[0], waiting[0].request, waiting[0].request.prompt
    job.begun = job.begun or time.perf_counter()
    sample = Sample(job, job.started, np.random.default_rng(sample_seed(request.seed, request.id, job.started)))
    job.started += 1
    if job.started == request.n:
        waiting.pop(0)
    kept = context.keep(place, prompt if job.logits is not None else prompt[:-1])
    job.evaluated_tokens += len(prompt) - kept
    for _, _, logits in context.evaluate([(place, prompt[kept:], {len(prompt) - 1})]):
        job.logits = logits.copy()
    sample.draw(job.logits)
    return sample


def _ended(backend: GgufBackend, sample: Sample) -> Completion | None:
    """The completion, if the last token ended it: its text stops before a stop string, its ids before an end token."""
    request, ids, decode = sample.job.request, sample.ids, backend.tokenizer.decode
    stops: Sequence[str] = request.sampling.stop
    finish: Finish | None = None
    if ids[-1] in backend.tokenizer.eos_ids:
        return Completion(decode(ids[:-1]), tuple(ids[:-1]), "stop")
    if stops and any(stop in decode(ids[-STOP_WINDOW:]) for stop in stops):
        finish = "stop"
    elif request.sampling.stop_loops and looping(ids):
        finish = "loop"
    elif len(request.prompt) + len(ids) >= backend.context_tokens or len(ids) >= request.sampling.max_new_tokens:
        finish = "length"
    if not finish:
        return None
    text = decode(ids)
    return Completion(text[: min((text.find(s) for s in stops if s in text), default=None)], tuple(ids), finish)


def draw(logits: np.ndarray, sampling: Sampling, random: np.random.Generator, seen: Sequence[int]) -> int:
    """Draw a token, filtered as in kit/backends/sampling.py, whose tensors take 3 to 15 times as long on a CPU's row.

    Args:
        logits: (V,), left as they are.
        sampling: temperature 0 takes the best token.
        random: the sample's own; gives one number a token.
        seen: what the penalty looks at, the prompt included.
    """
    if sampling.repetition_penalty != 1:
        logits, known = logits.copy(), np.unique(seen)
        factor = np.where(logits[known] > 0, 1 / sampling.repetition_penalty, sampling.repetition_penalty)
        logits[known] *= factor.astype(np.float32)
    if sampling.temperature == 0:
        return int(logits.argmax())
    weights = np.exp((logits - logits.max()) / sampling.temperature, dtype=np.float64)
    # tokens under this floor weigh less than 1 - top_p together, so the nucleus lies above it and few need sorting
    tokens = np.flatnonzero(weights > weights.sum() * max((1 - sampling.top_p) / len(weights), 1e-12))
    tokens = tokens[np.argsort(-weights[tokens], kind="stable")][: sampling.top_k or None]
    total = weights[tokens].sum() if sampling.top_k else weights.sum()
    weights = weights[tokens]
    running = np.cumsum(weights)
    left = (running - weights < sampling.top_p * total) & (weights >= sampling.min_p * weights[0])
    running = np.cumsum(weights * left)
    return int(tokens[np.searchsorted(running, random.random() * running[-1], "right")])
