"""A deterministic stand-in for a model, for tests of stage logic (kills, resumes, faults) only.

It answers from a JSON file {question: answer} named by `model`, rightly or wrongly by a hash of the
request, and judges by a hash of the prompt. It measures nothing and needs no torch. The manifest
names it as what it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from itertools import starmap
from pathlib import Path

from kit.backends.base import (
    Completion,
    Generation,
    Ids,
    Logprobs,
    Request,
    ScoreRequest,
    TokenUsage,
    sample_seed,
)
from kit.core.config import ModelConfig


class ByteTokenizer:
    """One token for each UTF-8 byte; no template."""

    template = None
    bos = ""
    eos = ""
    eos_ids = frozenset({256})
    special = ()

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Bytes of the text."""
        return list(text.encode("utf-8", "replace"))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of bytes."""
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")


class ScriptedBackend:
    """See the module. PALIGN_SCRIPT_SECONDS makes each answer take that long."""

    name = "scripted"
    tokenizer = ByteTokenizer()
    cache_error = 0.0

    def __init__(self, engine: ModelConfig, adapter: str | None = None) -> None:
        self.context_tokens = engine.context_tokens or 1 << 20
        self.notes = ["a scripted stand-in, no model: for tests of the stages only"]
        self.seconds = float(os.environ.get("PALIGN_SCRIPT_SECONDS", "0"))
        path = Path(engine.model)
        self.answers = json.loads(path.read_bytes()) if path.is_file() else {}

    def generate(self, requests: Sequence[Request]) -> Iterator[Generation]:
        """Right, wrong, unparsable or over-long answers, by hash."""
        for request in requests:
            time.sleep(self.seconds)
            text = self.tokenizer.decode(request.prompt)
            gold = next((self.answers[key] for key in self.answers if key in text), "0")
            seeds = [sample_seed(request.seed, request.id, j) for j in range(request.n)]
            completions = tuple(self._answer(seed, gold) for seed in seeds)
            size = len(request.prompt)
            yield Generation(request.id, completions, size, size, self.seconds)

    def _answer(self, seed: int, gold: str) -> Completion:
        endings = {0: f"So it is \\boxed{{1{gold}}}.", 1: "No idea."}
        ending = endings.get(seed % 5, f"So it is \\boxed{{{gold}}}.")
        text = f"First, look at it ({seed}). Then count. {ending}"
        ids = tuple(self.tokenizer.encode(text))
        return Completion(text, ids, "length" if seed % 7 == 0 else "stop")

    def session(self, uncached: bool = False) -> ScriptedSession:
        """Judging by hash."""
        return ScriptedSession(self.seconds)

    def merge_adapter(self) -> None:
        """Nothing is merged."""

    def close(self) -> None:
        """Nothing is held."""


class ScriptedSession:
    """Log-probabilities by a hash of the prompt."""

    uncached = False

    def __init__(self, seconds: float) -> None:
        self.cost = TokenUsage()
        self.seconds = seconds

    def score(self, requests: Sequence[ScoreRequest]) -> list[Logprobs]:
        """Numbers between -4 and 0."""
        return [list(starmap(self._score, request.prompts())) for request in requests]

    def _score(self, ids: Ids, candidates: Ids) -> list[float]:
        logprobs = []
        for candidate in candidates:
            time.sleep(self.seconds)
            self.cost.prefill_tokens += len(ids)
            digest = hashlib.sha256(repr((ids, candidate)).encode()).digest()
            logprobs.append(-int.from_bytes(digest[:2], "big") / 16384)
        return logprobs

    def close(self) -> None:
        """Nothing is held."""
