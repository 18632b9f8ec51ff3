"""Continuous batching over llama.cpp sequences: a finished sample's place is taken at once.

Each place is a sequence with a cache of its own. A new sample takes over the longest beginning that
any place holds: its own leftover or a copy, so shared prompt beginnings and the n samples of one
prompt are evaluated once. Prompts go through alone, then all places decode together: on a CPU a
mixed batch costs the sum of its parts.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from kit.backends import Completion, Finish, Generation, Request, looping, sample_seed
from kit.backends.gguf import Context, Piece
from kit.config import Sampling
from kit.errors import KitError

if TYPE_CHECKING:
    from kit.backends.gguf import GgufBackend

WORTH_TOKENS = 8  # a shared beginning shorter than this is not copied
STOP_WINDOW = 64  # tokens of text searched for a stop string


@dataclass
class Job:
    """A request under way: its samples share the logits after the prompt."""

    request: Request
    started: int = 0  # samples that have a place
    evaluated_tokens: int = 0
    logits: np.ndarray | None = None
    begun: float = 0.0
    done: dict[int, Completion] = field(default_factory=dict)


@dataclass
class Place:
    """One sequence: the tokens its cache holds, and the sample that is being written."""

    held: list[int] = field(default_factory=list)
    job: Job | None = None
    sample: int = 0
    ids: list[int] = field(default_factory=list)
    random: np.random.Generator | None = None


def generate(backend: GgufBackend, requests: Sequence[Request]) -> Iterator[Generation]:
    """Yield each request's result as it finishes; the plan depends on the list of requests alone."""
    room = backend.context_tokens
    fitting = []
    for request in requests:
        length = len(request.prompt)
        if 0 < length < room:
            fitting.append(request)
            continue
        why = "the prompt is empty" if not length else f"the prompt has {length} tokens, the context {room}"
        yield Generation(request.id, prompt_tokens=length, error=why)
    if fitting:
        yield from _Writer(backend, fitting).run()


class _Writer:
    def __init__(self, backend: GgufBackend, requests: list[Request]) -> None:
        self.backend, self.tokenizer = backend, backend.tokenizer
        self.waiting = [Job(request) for request in requests]
        longest = max(len(r.prompt) + r.sampling.max_new_tokens for r in requests)
        self.limit = min(longest, backend.context_tokens)
        count = min(backend.engine.parallel, sum(r.n for r in requests))
        self.context, count = self._open(count)
        self.places = [Place() for _ in range(count)]

    def _open(self, count: int) -> tuple[Context, int]:
        """A context for as many sequences as memory allows."""
        while True:
            try:
                return Context(self.backend, self.limit, count, unified=False, flash_attention=-1), count
            except KitError:
                if count == 1:
                    raise
                count //= 2
                self.backend.notes.append(f"no memory for more: {count} sequences of {self.limit} tokens at a time")

    def run(self) -> Iterator[Generation]:
        try:
            while self.waiting or any(place.job for place in self.places):
                for number, place in enumerate(self.places):
                    while place.job is None and self.waiting:  # a sample may end with its first token
                        yield from self._start(number, place)
                yield from self._step()
        finally:
            self.context.close()

    def _start(self, number: int, place: Place) -> Iterator[Generation]:
        """Give a free place the next sample: prompt in its cache, first token drawn."""
        job = self.waiting[0]
        prompt = job.request.prompt
        job.begun = job.begun or time.perf_counter()
        place.job, place.sample, place.ids = job, job.started, []
        place.random = np.random.default_rng(sample_seed(job.request.seed, job.request.id, job.started))
        job.started += 1
        if job.started >= job.request.n:
            self.waiting.pop(0)
        keep = self._take_over(number, place, prompt if job.logits is not None else prompt[:-1])
        if keep < len(prompt):
            place.held = list(prompt)
            job.evaluated_tokens += len(prompt) - keep
            for _, _, logits in self.context.evaluate([Piece(number, keep, prompt[keep:], [len(prompt) - 1])]):
                job.logits = logits.copy()
        yield from self._write(place, job.logits)

    def _take_over(self, number: int, place: Place, prompt: Sequence[int]) -> int:
        """Make a place hold the longest beginning of a prompt that any place has; returns its length."""
        shared = [common(other.held, prompt) for other in self.places]
        best = int(np.argmax(shared))
        if shared[best] < shared[number] + WORTH_TOKENS:
            best = number
        keep = shared[best] if shared[best] >= WORTH_TOKENS else 0
        if not self.context.fork(best, number, keep):
            keep = 0
        place.held = list(prompt[:keep])
        return keep

    def _step(self) -> Iterator[Generation]:
        """One token for every place."""
        busy = [(number, place) for number, place in enumerate(self.places) if place.job]
        pieces = []
        for number, place in busy:
            pieces.append(Piece(number, len(place.held), place.ids[-1:], [len(place.held)]))
            place.held.append(place.ids[-1])
        for index, _, logits in self.context.evaluate(pieces):
            yield from self._write(busy[index][1], logits)

    def _write(self, place: Place, logits: np.ndarray) -> Iterator[Generation]:
        """Draw one token, and finish the sample where it ends; the last sample yields the request's result."""
        job = place.job
        sampling = job.request.sampling
        token = draw(logits, sampling, place.random, (job.request.prompt, place.ids))
        finish: Finish | None = None
        text = None
        if token in self.tokenizer.eos_ids:
            finish = "stop"
        else:
            place.ids.append(token)
            text = self._stopped(place.ids, sampling.stop) if sampling.stop else None
            if text is not None:
                finish = "stop"
            elif sampling.stop_loops and looping(place.ids):
                finish = "loop"
            elif len(place.ids) >= sampling.max_new_tokens or len(place.held) >= self.backend.context_tokens:
                finish = "length"
        if finish is None:
            return
        text = self.tokenizer.decode(place.ids) if text is None else text
        job.done[place.sample] = Completion(text, tuple(place.ids), finish)
        place.job = None
        request = job.request
        if len(job.done) == request.n:
            completions = tuple(job.done[sample] for sample in range(request.n))
            seconds = time.perf_counter() - job.begun
            yield Generation(request.id, completions, len(request.prompt), job.evaluated_tokens, seconds)

    def _stopped(self, ids: list[int], stops: Sequence[str]) -> str | None:
        """The text before the first stop string, once one is complete."""
        tail = self.tokenizer.decode(ids[-STOP_WINDOW:])
        if not any(stop in tail for stop in stops):
            return None
        text = self.tokenizer.decode(ids)
        return text[: min(text.find(stop) for stop in stops if stop in text)]


def draw(
    logits: np.ndarray, sampling: Sampling, random: np.random.Generator | None, seen: Sequence[Sequence[int]] = ()
) -> int:
    """Draw a token: repetition penalty, temperature, top-k, top-p, min-p, in the order of transformers.

    Args:
        logits: (V,), left as they are.
        sampling: temperature 0 takes the best token.
        random: the sample's own generator; one number is taken a token.
        seen: token lists that the penalty looks at.
    """
    if sampling.repetition_penalty != 1.0:
        logits = logits.copy()
        known = np.unique(np.concatenate([np.asarray(ids, np.int64) for ids in seen]))
        there = logits[known]
        logits[known] = np.where(there > 0, there / sampling.repetition_penalty, there * sampling.repetition_penalty)
    if sampling.temperature == 0:
        return int(logits.argmax())
    weights = np.exp((logits - logits.max()) / sampling.temperature)
    # tokens below this floor weigh less than 1 - top_p together: the nucleus lies above, and few need sorting
    floor = weights.sum(dtype=np.float64) * max((1 - sampling.top_p) / len(weights), 1e-12)
    tokens = np.flatnonzero(weights > floor)
    tokens = tokens[np.argsort(-weights[tokens], kind="stable")]
    if sampling.top_k:
        tokens = tokens[: sampling.top_k]
    total = weights.sum(dtype=np.float64) if not sampling.top_k else weights[tokens].sum(dtype=np.float64)
    running = np.cumsum(weights[tokens], dtype=np.float64)
    if sampling.top_p < 1:
        tokens = tokens[: int(np.searchsorted(running, sampling.top_p * total)) + 1]
    tokens = tokens[weights[tokens] >= sampling.min_p * weights[tokens[0]]]
    running = running[: len(tokens)]
    return int(tokens[min(int(np.searchsorted(running, random.random() * running[-1], "right")), len(tokens) - 1)])


def common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    n = min(len(first), len(second))
    differ = np.flatnonzero(np.asarray(first[:n]) != np.asarray(second[:n]))
    return int(differ[0]) if len(differ) else n
