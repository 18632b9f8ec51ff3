"""A deterministic, torch-free stand-in for a model: for tests of stage logic (kills, resumes, faults) only.

It answers from a JSON file {question: answer} named by `model`, rightly or wrongly by a hash of the
request, and judges by a hash of the prompt. It measures nothing and is named in the manifest as what it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from kit.backends.base import (
    Completion,
    Generation,
    Logprobs,
    Request,
    ScoreRequest,
    TokenUsage,
    sample_seed,
)
from kit.core.config import ModelConfig


class ByteTokenizer:
    """One token a UTF-8 byte; no template."""

    template, bos, eos, eos_ids, special = None, "", "", frozenset({256}), ()

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Bytes of the text."""
        return list(text.encode("utf-8", "replace"))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of bytes."""
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")


class ScriptedBackend:
    """See the module. PALIGN_SCRIPT_SECONDS makes each answer take that long."""

    def __init__(self, engine: ModelConfig, adapter: str | None = None) -> None:
        self.name, self.tokenizer, self.concurrent = "scripted", ByteTokenizer(), 1
        self.context_tokens = engine.context_tokens or 1 << 20
        self.notes = ["a scripted stand-in, no model: for tests of the stages only"]
        path = Path(engine.model)
        self.answers: dict[str, str] = (
            json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        )
        self.seconds = float(os.environ.get("PALIGN_SCRIPT_SECONDS", "0"))

    def generate(self, requests: Sequence[Request]) -> Iterator[Generation]:
        """Right, wrong, unparsable or over-long answers, by hash."""
        for request in requests:
            time.sleep(self.seconds)
            text = self.tokenizer.decode(request.prompt)
            gold = next((a for q, a in self.answers.items() if q in text), "0")
            done = tuple(
                self._answer(sample_seed(request.seed, request.id, j), gold)
                for j in range(request.n)
            )
            yield Generation(
                request.id, done, len(request.prompt), len(request.prompt), self.seconds
            )

    def _answer(self, seed: int, gold: str) -> Completion:
        said = {0: "1" + gold, 1: None}.get(seed % 5, gold)
        text = f"First, look at it ({seed}). Then count. " + (
            f"So it is \\boxed{{{said}}}." if said else "No idea."
        )
        return Completion(
            text, tuple(self.tokenizer.encode(text)), "length" if seed % 7 == 0 else "stop"
        )

    def session(self, uncached: bool = False) -> ScriptedSession:
        """Judging by hash."""
        return ScriptedSession(self.seconds)

    def close(self) -> None:
        """Nothing is held."""


class ScriptedSession:
    """Log-probabilities by hash of what was shown."""

    def __init__(self, seconds: float) -> None:
        self.cost, self.seconds = TokenUsage(), seconds

    def score(self, probes: Sequence[ScoreRequest]) -> list[Logprobs]:
        """One number a candidate, between -4 and 0."""
        return [
            [[self._score(p.ids[: at + 1], c) for c in cands] for at, cands in p.reads]
            for p in probes
        ]

    def _score(self, ids: tuple[int, ...], candidate: int) -> float:
        time.sleep(self.seconds)
        self.cost.prefill_tokens += len(ids)
        key = hashlib.sha256(repr((ids, candidate)).encode()).digest()
        return -int.from_bytes(key[:2], "big") / 16384

    def close(self) -> None:
        """Nothing is held."""
