"""Rows and a backend of known margins, for the tests of judging and of the stages around it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from kit.backends.base import Completion, Generation, ScoreRequest, TokenUsage
from kit.backends.scripted import ScriptedBackend
from kit.core import config as configs
from kit.core.progress import Progress
from kit.core.records import PrefixRow, Problem, Sample, TraceRow
from kit.core.run import Run
from kit.core.storage import RowFile
from kit.judging.cut import from_problem

# 13 sentences
TRACE = "".join(f"Step {i} is done. " for i in range(1, 13)) + "So it is \\boxed{9}."


def judge_config(**keys: Any) -> configs.Config:
    """The default config with these keys of `judge`."""
    return configs.resolve({"judge": keys}, "test")


def whole_row(text: str = TRACE) -> PrefixRow:
    """A whole trace, as `cut` takes it."""
    return from_problem(Problem(id="a", question="Question a?", answer="9", trace=text))


def trace_row(id: str = "a", text: str = TRACE, kept: tuple[int, ...] = (0,)) -> TraceRow:
    """A row of the stage teach with as many samples as `kept` needs."""
    samples = tuple(Sample(text=text, verdict="correct") for _ in range(max(kept, default=0) + 1))
    return TraceRow(id=id, question=f"Question {id}?", answer="9", samples=samples, kept=kept)


def run_with_traces(folder: Path, traces: list[TraceRow], **keys: Any) -> Run:
    """An open run of a scripted student, whose traces.jsonl holds these rows."""
    raw = {"out": str(folder), "student": {"backend": "scripted", "model": "none"}, **keys}
    run = Run(configs.resolve(raw, "test"), Progress(quiet=True))
    (folder / "traces.jsonl").unlink(missing_ok=True)
    RowFile(run.path("traces.jsonl"), TraceRow).append(*traces)
    return run


class LengthBackend(ScriptedBackend):
    """Its log-odds are 0.01 times the prompt's length in tokens; it generates one fixed text."""

    def __init__(self, text: str = "") -> None:
        super().__init__(configs.ModelConfig(backend="hf", model="none"))
        self.text = text

    def session(self, uncached: bool = False) -> Any:
        def score(requests: list[ScoreRequest]) -> list[Any]:
            return [
                [
                    [0.01 * len(request.ids), 0.0][: len(candidates)]
                    for _, candidates in request.reads
                ]
                for request in requests
            ]

        return SimpleNamespace(
            score=score, cost=TokenUsage(1, 0), uncached=uncached, close=lambda: None
        )

    def generate(self, requests: Any) -> Any:
        for request in requests:
            completions = (Completion(self.text, (), "stop"),)
            tokens = len(request.prompt)
            yield Generation(request.id, completions, tokens, tokens)
