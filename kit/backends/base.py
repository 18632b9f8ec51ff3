"""The protocol of a backend: what it is asked and what it answers.

A backend generates text (sections 3.1 and 3.3 of the paper: traces and continuations) and reads
log-probabilities (section 3.2: verdicts). It knows nothing of prefixes, verdicts or grades.

Batch shape moves the last bits of logits, so outputs of different batch plans are equal up to the
first near-tie of two tokens. One sequence at a time (`max_num_seqs: 1`) is exact.
"""

from __future__ import annotations

import hashlib
import re
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import ceil
from typing import Any, Literal, Protocol

import numpy as np

from kit.core.config import Sampling

Ids = tuple[int, ...]  # token ids
FinishReason = Literal["stop", "length", "loop", "error"]
Logprobs = list[list[float]]  # of one ScoreRequest: natural logarithms, [read][candidate]
MAX_TAILS = 31  # of one pass: sequences that a llama.cpp context has room for
LOOP_EVERY_TOKENS = 8  # how often a running sample is searched for a loop


# --- Generation: a Request goes in, a Generation of n Completions comes out ---


class Trunk(ExitStack):
    """The states of the longest prompt so far, kept from one call of `generate` to the next.

    Prompts that begin alike are evaluated from where they part. Leaving the context frees them. A
    server has a prefix cache of its own.

    Args:
        room_tokens: of the longest prompt to come and its answer.
    """

    def __init__(self, room_tokens: int = 0) -> None:
        super().__init__()
        self.room_tokens = room_tokens
        self.ids: Ids = ()  # hf: the prompt
        self.state: Any = None  # hf: the cache's layers; gguf: a context


@dataclass(frozen=True)
class Request:
    """A prompt and how many samples to draw after it. Filled by the caller.

    The samples share one prefill. Each draws from a generator of its own, see `sample_seed`.
    """

    id: str
    prompt: Ids  # token ids, special tokens included, from `prompts.render`
    sampling: Sampling
    n: int = 1
    seed: int = 0
    trunk: Trunk | None = None  # the same for all requests of a call


@dataclass(frozen=True)
class Completion:
    """One sample. Filled by `check_stop`, or by the server's answer."""

    text: str  # up to a stop string
    ids: Ids  # without the end token
    finish_reason: FinishReason


@dataclass(frozen=True)
class Generation:
    """All samples of one request. Filled by the backend."""

    id: str  # the request's
    completions: tuple[Completion, ...] = ()
    prompt_tokens: int = 0
    prefill_tokens: int = 0  # prompt tokens evaluated; fewer than all where a cache was reused
    seconds: float = 0.0
    error: str | None = None  # why there are no samples, e.g. a prompt that is too long


@dataclass(eq=False)
class ActiveRequest:
    """A request that is running in this process (hf, gguf)."""

    request: Request
    limit_tokens: int  # most new tokens of a sample; set by the backend, whose context is finite
    begun: float = 0.0  # time.perf_counter(), set at the first prefill
    prefill_tokens: int = 0  # counted at each prefill
    logits: Any = None  # (V,) after the prompt; set where they serve all samples
    done: dict[int, Completion] = field(default_factory=dict)  # by sample

    @property
    def tokens(self) -> int:
        """Most tokens of a sample and its prompt."""
        return len(self.request.prompt) + self.limit_tokens

    def result(self) -> list[Generation]:
        """The request's result, once all its samples are done."""
        if len(self.done) < self.request.n:
            return []
        completions = tuple(self.done[number] for number in range(self.request.n))
        prompt_tokens = len(self.request.prompt)
        seconds = time.perf_counter() - self.begun
        return [
            Generation(self.request.id, completions, prompt_tokens, self.prefill_tokens, seconds)
        ]


@dataclass(eq=False)
class ActiveSample:
    """One sample of an active request, waiting or running."""

    active: ActiveRequest
    number: int  # among the samples of its request
    uniform: Callable[[], float]  # numbers in [0, 1), from a generator of its own
    ids: list[int] = field(default_factory=list)  # drawn so far
    seen: Any = None  # (V,) bool, the tokens of prompt and sample; set by the backend

    @property
    def tokens(self) -> Ids:
        """The prompt and what was drawn so far."""
        return (*self.active.request.prompt, *self.ids)

    def push(self, token: int, tokenizer: Tokenizer) -> bool:
        """Add a drawn token; whether it ends the sample, which is then done."""
        self.ids.append(token)
        active = self.active
        completion = check_stop(self.ids, active.limit_tokens, active.request.sampling, tokenizer)
        if completion is None:
            return False
        active.done[self.number] = completion
        return True


def samples_of(
    requests: Sequence[Request], context_tokens: int, generator: Callable[[int], Any]
) -> tuple[deque[ActiveSample], deque[Generation]]:
    """The samples of all requests, in order, and the errors of prompts without room.

    Args:
        generator: makes a sample's random generator from its seed.
    """
    samples: deque[ActiveSample] = deque()
    errors: deque[Generation] = deque()
    for request in requests:
        error = too_long(request, context_tokens)
        if error:
            errors.append(error)
            continue
        room_tokens = context_tokens - len(request.prompt)
        active = ActiveRequest(request, min(room_tokens, request.sampling.max_new_tokens))
        for number in range(request.n):
            seed = sample_seed(request.seed, request.id, number)
            samples.append(ActiveSample(active, number, generator(seed).random))
    return samples, errors


# --- Scoring: a ScoreRequest goes in, Logprobs come out ---


@dataclass(frozen=True)
class ScoreRequest:
    """Log-probabilities to read along one sequence. Filled by the judge."""

    ids: Ids  # (T,) token ids
    # by ascending p in [0, T): (p, candidate tokens that may follow ids[: p + 1])
    reads: tuple[tuple[int, Ids], ...]

    def prompts(self) -> list[tuple[Ids, Ids]]:
        """Each read on its own: (the ids before the candidates, the candidates)."""
        return [(self.ids[: p + 1], candidates) for p, candidates in self.reads]


@dataclass
class TokenUsage:
    """Prompt tokens by where their states came from. Filled by the session."""

    prefill_tokens: int = 0  # went through the model
    cached_tokens: int = 0  # taken from a cache

    def add(self, other: TokenUsage) -> None:
        """Add another usage to this one, in place."""
        self.prefill_tokens += other.prefill_tokens
        self.cached_tokens += other.cached_tokens


# --- What every backend provides ---


class Tokenizer(Protocol):
    """Text to ids and back, and the model's chat template."""

    template: str | None  # Jinja; None: the model has none
    bos: str  # text of the BOS token, "" if none
    eos: str
    eos_ids: frozenset[int]  # every token that ends a turn
    special: tuple[str, ...]  # the texts of all special tokens

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Ids of a text, no BOS or EOS added; special=False keeps special tokens' names text."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens by their names."""


class ScoringSession(Protocol):
    """Scores of requests that share a beginning, like all judging prompts of one trace.

    The longest cached token prefix is reused; each request sees only its own tokens.
    """

    cost: TokenUsage  # of everything scored so far
    uncached: bool  # every request is evaluated from its first token

    def score(self, requests: Sequence[ScoreRequest], /) -> list[Logprobs]:
        """Read log-probabilities, in the order of the requests."""

    def close(self) -> None:
        """Free the cache."""


class Backend(Protocol):
    """A loaded model."""

    name: str  # see `slug`
    tokenizer: Tokenizer
    context_tokens: int  # prompt and new tokens together
    notes: list[str]  # what the user must know: fallbacks, measured hit rates, self-checks
    # nats by which a cached margin may be off an uncached one: verdicts that are nearer to the
    # threshold are asked again without a cache
    cache_error: float

    def generate(self, requests: Sequence[Request]) -> Iterator[Generation]:
        """Yield each request's result as it finishes; a prompt that is too long is an error."""

    def session(self, uncached: bool = False) -> ScoringSession:
        """Open a judging session; uncached=True evaluates every prompt from its first token."""

    def close(self) -> None:
        """Free the model."""


@dataclass(frozen=True)
class Tail(ScoreRequest):
    """A stretch of a request: its tokens from `cut` on. Those before are the trunk's."""

    cut: int = 0
    number: int = 0  # of the request, among those scored together


def stretch(request: ScoreRequest, start: int, end: int | None = None, number: int = 0) -> Tail:
    """Tokens [start, end) of a request, with the reads that lie there."""
    ids = request.ids[start:end]
    reads = []
    for position, candidates in request.reads:
        if start <= position < start + len(ids):
            reads.append((position - start, candidates))
    return Tail(ids, tuple(reads), start, number)


class TrunkSession(ABC):
    """Scores requests by a trunk and the tails that branch off it (hf, gguf).

    The trunk is the longest request so far, or a later one that leaves it early; it stays in the
    cache. It grows piece by piece. After each piece come the tails that branch off by then, many in
    one pass: so a tail attends to little more of the trunk than it sees, and no pass is so short
    that reading the weights takes longest. A backend says how tokens are evaluated.

    Args:
        piece_tokens: of one pass, at most.
        uncached: evaluate every request from its first token: the slow, obvious way that the trunk
            is tested against.
    """

    def __init__(self, piece_tokens: int, uncached: bool = False) -> None:
        self.piece_tokens = piece_tokens
        self.uncached = uncached
        self.cost = TokenUsage()
        self.trunk = np.empty(0, np.int64)  # token ids (T,)

    def score(self, requests: Sequence[ScoreRequest]) -> list[Logprobs]:
        """Read log-probabilities; see ScoringSession."""
        if self.uncached:
            self.cost.prefill_tokens += sum(len(request.ids) for request in requests)
            return list(map(self._score_uncached, requests))

        # 1. The longest request becomes the trunk, if it is longer or leaves it for over a pass.
        results: dict[int, Logprobs] = {}
        longest = int(np.argmax([len(request.ids) for request in requests]))
        request = requests[longest]
        shared = self._shared(request)
        start = len(self.trunk)
        if len(request.ids) > start or len(request.ids) - shared > self.piece_tokens:
            self._cut_cache(shared)
            start = shared
            self.trunk = np.asarray(request.ids)
            results[longest] = []
            self.cost.add(TokenUsage(len(request.ids) - start, start))

        # 2. Every other request is a tail, or leaves the trunk so early that it follows alone.
        waiting: list[Tail] = []
        apart = []
        for number, other in enumerate(requests):
            if number in results:
                continue
            tail = stretch(other, self._shared(other), number=number)
            if len(tail.ids) > self.piece_tokens:
                apart.append(number)
            else:
                waiting.append(tail)
        waiting.sort(key=lambda tail: tail.cut)

        # 3. From left to right: a piece of the trunk, then the tails that branch off by its end.
        for end in self._stops(start):
            if end > start:
                results[longest] += self._extend(stretch(request, start, end))
                start = end
            ready = [tail for tail in waiting if tail.cut <= end]
            waiting = waiting[len(ready) :]
            for group in self._groups(ready):
                for tail, logprobs in zip(group, self._score_tails(group), strict=True):
                    self.cost.add(TokenUsage(len(tail.ids), tail.cut))
                    results[tail.number] = logprobs
        for number in apart:
            [results[number]] = self.score([requests[number]])
        return [results[number] for number in range(len(requests))]

    @abstractmethod
    def _score_uncached(self, request: ScoreRequest) -> Logprobs:
        """Evaluate a request from its first token."""

    @abstractmethod
    def _cut_cache(self, tokens: int) -> None:
        """Keep the cache's first tokens, so many, and drop the others."""

    @abstractmethod
    def _extend(self, piece: Tail) -> Logprobs:
        """Evaluate a piece that follows the cache's tokens, and keep it there."""

    @abstractmethod
    def _score_tails(self, tails: Sequence[Tail]) -> list[Logprobs]:
        """Evaluate tails after the trunk's tokens up to their cuts, and drop them again."""

    def _shared(self, request: ScoreRequest) -> int:
        """How many of a request's tokens are the trunk's.

        Never those whose logits are read, nor the last two: a single token is evaluated by other
        kernels, which moved logits by up to 0.4 in llama.cpp.
        """
        reads = [position for position, _ in request.reads]
        evaluated = max(0, min([*reads, len(request.ids) - 2]))
        return min(common_prefix_len(self.trunk, request.ids), evaluated)

    def _stops(self, start: int) -> list[int]:
        """Where the pieces end, all about as long, that evaluate the trunk from `start` on."""
        tokens = len(self.trunk) - start
        count = max(1, ceil(tokens / self.piece_tokens))
        return [start + tokens * piece // count for piece in range(1, count + 1)]

    def _groups(self, tails: Sequence[Tail]) -> Iterator[list[Tail]]:
        """Tails in order, in groups of one pass."""
        group: list[Tail] = []
        tokens = 0
        for tail in tails:
            is_full = len(group) == MAX_TAILS or tokens + len(tail.ids) > self.piece_tokens
            if group and is_full:
                yield group
                group = []
                tokens = 0
            group.append(tail)
            tokens += len(tail.ids)
        if group:
            yield group


# --- Shared by the backends ---


def sample_seed(seed: int, request: str, sample: int) -> int:
    """A 31-bit seed of one sample's own generator; independent of batch, order and machine."""
    text = f"{seed}\0{request}\0{sample}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:4], "big") & 0x7FFFFFFF


def slug(model: str) -> str:
    """A model's name for tables and files: letters, digits, dots and dashes."""
    return re.sub(r"[^\w.-]+", "-", model.removesuffix(".gguf")).strip("-")


def too_long(request: Request, context_tokens: int) -> Generation | None:
    """The error of a request whose prompt is empty or leaves no room for an answer, else None."""
    size = len(request.prompt)
    if 0 < size < context_tokens:
        return None
    error = f"The prompt has {size} tokens, but the context is {context_tokens}."
    return Generation(request.id, prompt_tokens=size, error=error)


def check_stop(
    ids: Sequence[int], limit_tokens: int, sampling: Sampling, tokenizer: Tokenizer
) -> Completion | None:
    """The completion, if the last of a sample's ids ends it.

    Its text ends before the first stop string; its ids leave out the end token.
    """
    finish_reason = _finish_reason(ids, limit_tokens, sampling, tokenizer)
    if finish_reason is None:
        return None
    kept = ids[:-1] if ids[-1] in tokenizer.eos_ids else ids
    text = tokenizer.decode(kept)
    ends = [text.find(stop) for stop in sampling.stop if stop in text]
    return Completion(text[: min(ends, default=None)], tuple(kept), finish_reason)


def _finish_reason(
    ids: Sequence[int], limit_tokens: int, sampling: Sampling, tokenizer: Tokenizer
) -> FinishReason | None:
    if ids[-1] in tokenizer.eos_ids:
        return "stop"
    if sampling.stop:
        # a token is at least one byte, so a stop string that just ended lies in these last tokens
        longest_bytes = max(len(stop.encode()) for stop in sampling.stop)
        recent = tokenizer.decode(ids[-longest_bytes - 4 :])
        if any(stop in recent for stop in sampling.stop):
            return "stop"
    if sampling.stop_loops and len(ids) % LOOP_EVERY_TOKENS == 0 and looping(ids):
        return "loop"
    if len(ids) >= limit_tokens:
        return "length"
    return None


def check_requests(vocabulary: int, length: int) -> list[ScoreRequest]:
    """Random tokens cut at six places, each with a closing turn: cached and uncached scores of
    them are compared when a model's first session opens.

    Args:
        vocabulary: token ids in the upper half of it are drawn.
        length: tokens of the longest request, its closing turn of 4 to 6 apart.
    """
    rng = np.random.default_rng(0)
    ids = rng.integers(vocabulary // 2, size=length + 6).tolist()
    candidates = tuple(range(min(vocabulary, 512)))
    requests = []
    for number, ratio in enumerate((1 / 2, 1, 3 / 4, 1 / 3, 5 / 9, 7 / 8)):
        prompt = (*ids[: int(length * ratio)], *ids[length + number % 3 :])
        last = len(prompt) - 1
        requests.append(ScoreRequest(prompt, ((last - 1, candidates), (last, candidates))))
    return requests


def looping(ids: Sequence[int]) -> bool:
    """Whether a sample ends in an n-gram that repeats at least 4 times and over 24 tokens.

    Tries n of 1 to 64 tokens. Cheap: each n fails at its first differing token.
    """
    for n in range(1, 65):
        span = n * max(4, -(-24 // n))
        if len(ids) >= span and all(ids[-i] == ids[-i - n] for i in range(1, span - n + 1)):
            return True
    return False


def common_prefix_len(a: Sequence[int] | np.ndarray, b: Sequence[int] | np.ndarray) -> int:
    """Length of the longest common beginning of two sequences of token ids."""
    size = min(len(a), len(b))
    equal = np.asarray(a[:size]) == np.asarray(b[:size])
    return size if equal.all() else int(equal.argmin())
