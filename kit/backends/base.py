"""One protocol for whatever runs a model: hf (transformers), gguf (llama.cpp), http (a server).

A backend generates text and reads log-probabilities; it knows nothing of prefixes, verdicts or grades.
Batch shape moves the last bits of logits, so outputs of different batch plans are equal up to the first
near-tie of two tokens; one sequence at a time (`max_num_seqs: 1`) is exact.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from kit.core.config import Sampling

Finish = Literal["stop", "length", "loop", "error"]
LOOP_EVERY_TOKENS = 8


@dataclass(frozen=True)
class Request:
    """n samples of one prompt, which share its prefill. Each has a generator of its own, whatever runs beside it."""

    id: str
    prompt: tuple[int, ...]  # token ids, special tokens included, as `prompts.render` made them
    sampling: Sampling
    n: int = 1
    seed: int = 0


@dataclass(frozen=True)
class Completion:
    """One sample. `ids` are its tokens without the end token; `text` is their decoding up to a stop string."""

    text: str
    ids: tuple[int, ...]
    finish_reason: Finish


@dataclass(frozen=True)
class Generation:
    """All samples of one request. `error` says why there are none: a prompt too long, one that a server refuses."""

    id: str
    completions: tuple[Completion, ...] = ()
    prompt_tokens: int = 0
    prefill_tokens: int = (
        0  # prompt tokens that went through the model; fewer when a beginning was reused
    )
    seconds: float = 0.0
    error: str | None = None


@dataclass(eq=False)
class ActiveRequest:
    """A request under way in this process; each of its samples may have `limit_tokens` new tokens."""

    request: Request
    limit_tokens: int
    begun: float = 0.0
    prefill_tokens: int = 0
    logits: Any = None  # (V,) after the prompt, where they serve all samples
    done: dict[int, Completion] = field(default_factory=dict)

    def finish(self, sample: int, completion: Completion) -> Generation | None:
        """Keep a finished sample; the last one makes the result."""
        self.done[sample] = completion
        if len(self.done) < self.request.n:
            return None
        samples, prompt_tokens = (
            tuple(one for _, one in sorted(self.done.items())),
            len(self.request.prompt),
        )
        seconds = round(time.perf_counter() - self.begun, 3)
        return Generation(self.request.id, samples, prompt_tokens, self.prefill_tokens, seconds)


@dataclass(frozen=True)
class ScoreRequest:
    """Log-probabilities to read along one sequence of token ids (T,): of candidates to stand after ids[:p+1]."""

    ids: tuple[int, ...]
    reads: tuple[tuple[int, tuple[int, ...]], ...]  # (p in [0, T), candidates), by ascending p


Logprobs = list[list[float]]  # of one probe: natural-log probabilities, [read][candidate]


@dataclass
class TokenUsage:
    """Tokens that went through the model and tokens taken from a cache."""

    prefill_tokens: int = 0
    cached_tokens: int = 0

    def add(self, other: TokenUsage) -> None:
        """Add another cost to this one."""
        self.prefill_tokens += other.prefill_tokens
        self.cached_tokens += other.cached_tokens


class Tokenizer(Protocol):
    """Text to ids and back, and the model's chat template. `encode` adds no BOS or EOS of its own; with special=False
    a special token's name in the text stays text."""

    template: str | None  # Jinja chat template; None: the model has none
    bos: str  # text of the BOS token, "" if none
    eos: str
    eos_ids: frozenset[int]  # every token that ends a turn
    special: tuple[str, ...]  # the texts of all special tokens

    def encode(self, text: str, special: bool = True) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


class ScoringSession(Protocol):
    """Reads of many probes that share a beginning: what one trace's judging is made of. `read` reuses the longest token
    prefix that is cached; each probe sees only its own prefix."""

    cost: TokenUsage  # of everything read so far

    def score(self, probes: Sequence[ScoreRequest]) -> list[Logprobs]: ...
    def close(self) -> None: ...


class Backend(Protocol):
    """A loaded model. `generate` yields each request's result as it finishes, an over-long prompt's as an error;
    `session(uncached=True)` evaluates every probe from its first token, without any cache."""

    name: str  # see `slug`
    tokenizer: Tokenizer
    context_tokens: int
    notes: list[str]  # what the user must know: fallbacks, measured hit rates, self-check results

    def generate(self, requests: Sequence[Request]) -> Iterator[Generation]: ...
    def session(self, uncached: bool = False) -> ScoringSession: ...
    def close(self) -> None: ...


def sample_seed(seed: int, request: str, sample: int) -> int:
    """A 31-bit seed of one sample's own generator; does not depend on batch, order or machine."""
    text = f"{seed}\0{request}\0{sample}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:4], "big") & 0x7FFFFFFF


def slug(model: str) -> str:
    """A model's name for tables and files: letters, digits, dots and dashes."""
    return re.sub(r"[^\w.-]+", "-", model.removesuffix(".gguf")).strip("-")


def too_long(request: Request, context_tokens: int) -> Generation | None:
    """The result of a request whose prompt is empty or leaves no room for an answer."""
    size = len(request.prompt)
    why = f"The prompt has {size} tokens, the context {context_tokens}."
    return (
        None if 0 < size < context_tokens else Generation(request.id, prompt_tokens=size, error=why)
    )


def check_stop(
    ids: Sequence[int], limit_tokens: int, sampling: Sampling, tokenizer: Tokenizer
) -> Completion | None:
    """The completion, if the last of a sample's ids ends it. A stop string and what follows it are not in its text."""
    finish_reason: Finish | None = None
    tail = 4 + max(
        (len(stop.encode()) for stop in sampling.stop), default=0
    )  # a token is a byte or more
    if ids[-1] in tokenizer.eos_ids:
        finish_reason, ids = "stop", ids[:-1]
    elif sampling.stop and any(stop in tokenizer.decode(ids[-tail:]) for stop in sampling.stop):
        finish_reason = "stop"
    elif sampling.stop_loops and len(ids) % LOOP_EVERY_TOKENS == 0 and looping(ids):
        finish_reason = "loop"
    elif len(ids) >= limit_tokens:
        finish_reason = "length"
    if finish_reason is None:
        return None
    text = tokenizer.decode(ids)
    return Completion(
        text[: min((text.find(s) for s in sampling.stop if s in text), default=None)],
        tuple(ids),
        finish_reason,
    )


def looping(ids: Sequence[int], longest: int = 64) -> bool:
    """Whether a sample ends in an n-gram repeated to no end: n of 1 to `longest` tokens, at least 4 times and over
    24 tokens. Cheap: each n fails at its first differing token."""
    for n in range(1, longest + 1):
        span = n * max(4, -(-24 // n))
        if len(ids) >= span and all(ids[-i] == ids[-i - n] for i in range(1, span - n + 1)):
            return True
    return False


def common_prefix_len(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common beginning of two prompts' token ids."""
    n = min(len(a), len(b))
    different = np.flatnonzero(np.asarray(a[:n]) != np.asarray(b[:n]))
    return int(different[0]) if len(different) else n
