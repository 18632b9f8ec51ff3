"""teach: a trace for every problem, from a model, a file, or the problem's own worked solution (section 3.1).

Paper: one DeepSeek-R1 trace a question, taken as it is. Here: a teacher that we run is sampled, and only
traces that reach the gold answer go on; traces from a file are graded for the record and all go on.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence

from kit.answers import Grader, Item
from kit.backends import Backend, Request, open_backend
from kit.prompts import render, solve_text
from kit.records import Problem, RowFile, Sample, TraceRow, digest
from kit.run import Run, file_digest, stopwatch, work_through

NAME = "traces.jsonl"


def teach(run: Run) -> None:
    """The stage: one `TraceRow` a problem."""
    problems = run.data.train
    if not run.begin("teach", digest(problems), lambda: file_digest(run, NAME, TraceRow)):
        return
    units = [(problem.id, problem) for problem in problems]
    file = RowFile(run.path(NAME), TraceRow)
    with stopwatch() as seconds, Grader() as grader, Teacher(run, grader) as writer:
        rows = work_through(run, "teach", file, units, writer.batch_rows, writer.write)
    kept = sum(len(row.kept) for row in rows)
    run.finish(
        "teach",
        digest(rows),
        rows_in=len(problems),
        rows_out=kept,
        seconds=seconds(),
        samples=sum(len(row.samples) for row in rows),
        verdicts=dict(Counter(sample.verdict for row in rows for sample in row.samples)),
        tokens=sum(sample.tokens for row in rows for sample in row.samples),
        rejected=dict(Counter(row.rejected for row in rows if row.rejected)),
    )


class Teacher:
    """Writes traces for a batch of problems; loads a model only when one is needed."""

    def __init__(self, run: Run, grader: Grader) -> None:
        self.run, self.grader, self.config = run, grader, run.config.teacher
        self.given = self.config.backend in ("file", "worked")
        self.batch_rows = 64 if self.given else 4 * self.config.parallel
        self.backend: Backend | None = None

    def write(self, problems: list[Problem]) -> Iterator[TraceRow]:
        """A row for each problem, as its traces are finished."""
        if self.given:
            for problem in problems:
                begun = time.perf_counter()
                samples = self._graded(problem, [(self._trace(problem), "stop", 0)])
                kept = tuple(i for i, sample in enumerate(samples) if sample.text.strip())
                yield self._row(problem, samples, kept, "empty trace", None, time.perf_counter() - begun)
            return
        if self.backend is None:
            self.backend = open_backend(self.config)
        by_id = {problem.id: problem for problem in problems}
        for generation in self.backend.generate([self._request(problem) for problem in problems]):
            problem = by_id[generation.id]
            samples = self._graded(problem, [(c.text, c.finish, len(c.ids)) for c in generation.completions])
            kept = choose(samples, self.config.keep)
            reason = "generation failed" if generation.error else "no right trace"
            yield self._row(problem, samples, kept, reason, generation.error, generation.seconds)

    def _trace(self, problem: Problem) -> str:
        if self.config.backend == "file":
            return problem.trace or ""
        from kit.problems import wander

        return wander(problem, self.config.wordiness, self.run.config.seed)

    def _request(self, problem: Problem) -> Request:
        assert self.backend is not None
        config, teacher = self.run.config, self.config
        user = solve_text(config.prompts, problem.question)
        prompt = render(self.backend.tokenizer, user, teacher.system, thinking=teacher.thinking)
        return Request(problem.id, prompt, teacher.sampling, n=teacher.samples, seed=config.seed)

    def _graded(self, problem: Problem, texts: Sequence[tuple[str, str, int]]) -> tuple[Sample, ...]:
        return graded_samples(self.grader, texts, problem.answer, self.run.config.data.train.verifier)

    def _row(
        self,
        problem: Problem,
        samples: tuple[Sample, ...],
        kept: tuple[int, ...],
        reason: str,
        error: str | None,
        s: float,
    ) -> TraceRow:
        why = {} if kept else {"rejected": reason, "detail": error or tally(samples)}
        fields = {"id": problem.id, "question": problem.question, "answer": problem.answer}
        return TraceRow(**fields, samples=samples, kept=kept, seconds=round(s, 3), **why)

    def __enter__(self) -> Teacher:
        return self

    def __exit__(self, *_: object) -> None:
        if self.backend is not None:
            self.backend.close()


def graded_samples(
    grader: Grader, texts: Sequence[tuple[str, str, int]], gold: str, verifier: str
) -> tuple[Sample, ...]:
    """Grade the samples of one problem, given as (text, finish, tokens)."""
    grades = grader.grade([Item(gold=gold, output=text, verifier=verifier) for text, _, _ in texts])
    return tuple(
        Sample(text=text, verdict=grade.verdict, answer=grade.answer, finish=finish, tokens=tokens)
        for (text, finish, tokens), grade in zip(texts, grades, strict=True)
    )


def choose(samples: tuple[Sample, ...], keep: str) -> tuple[int, ...]:
    """Indices of the right samples that are kept; one that ended by itself goes before one that was cut off.

    Args:
        keep: first, shortest (in characters), or all.
    """
    right = [i for i, sample in enumerate(samples) if sample.verdict == "correct" and sample.text.strip()]
    if keep == "all":
        return tuple(right)
    length = (lambda i: len(samples[i].text)) if keep == "shortest" else (lambda i: i)
    return tuple(sorted(right, key=lambda i: (samples[i].finish != "stop", length(i)))[:1])


def tally(samples: tuple[Sample, ...]) -> str:
    """What became of samples, in words: '0 of 4 right: 3 wrong, 1 unparsed; 2 cut off at the token limit'."""
    counts = Counter(sample.verdict for sample in samples)
    capped = sum(sample.finish == "length" for sample in samples)
    parts = ", ".join(f"{n} {verdict}" for verdict, n in counts.most_common() if verdict != "correct")
    cut = f"; {capped} cut off at the token limit" if capped else ""
    return f"{counts['correct']} of {len(samples)} right: {parts or 'none'}{cut}"
