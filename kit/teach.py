"""teach: a trace for every problem, from a model, a file, or the problem's own worked solution (section 3.1).

Paper: one DeepSeek-R1 trace a question, taken as it is. Here: a teacher that we run is sampled, and only
traces that reach the gold answer go on; traces from a file are graded for the record and all go on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from functools import cached_property

from kit.answers import Grader, Item
from kit.backends import Backend, Request, open_backend
from kit.prompts import render, solve_text
from kit.records import Problem, RowFile, Sample, TraceRow, digest
from kit.run import Run, file_digest, stopwatch, tallies, work_through

NAME = "traces.jsonl"
Texts = Sequence[tuple[str, str, int]]  # (text, finish, tokens) of samples


def teach(run: Run) -> None:
    """The stage: one `TraceRow` a problem."""
    problems = run.data.train
    if not run.begin("teach", digest(problems), lambda: file_digest(run, NAME, TraceRow)):
        return
    given = run.config.teacher.backend in ("file", "worked")
    units, file = [(problem.id, problem) for problem in problems], RowFile(run.path(NAME), TraceRow)
    with stopwatch() as seconds, Grader() as grader, ExitStack() as held:
        teacher = Teacher(run, grader, held)
        work, size = (teacher.take, 64) if given else (teacher.write, 4 * run.config.teacher.parallel)
        rows = work_through(run, "teach", file, units, size, work)
    kept = sum(len(row.kept) for row in rows)
    run.finish("teach", digest(rows), len(problems), kept, seconds(), **tallies(rows))


class Teacher:
    """Makes rows for a batch of problems; a model is loaded when it is first needed, and closed with `held`."""

    def __init__(self, run: Run, grader: Grader, held: ExitStack) -> None:
        self.run, self.grader, self.config, self.held = run, grader, run.config.teacher, held

    @cached_property
    def backend(self) -> Backend:
        """The teacher's model."""
        return self.held.enter_context(closing(open_backend(self.config)))

    def take(self, problems: list[Problem]) -> Iterator[TraceRow]:
        """Rows of the traces that the problems have, right or wrong."""
        from kit.problems import wander

        for problem in problems:
            worked = self.config.backend == "worked"
            text = wander(problem, self.config.wordiness, self.run.config.seed) if worked else problem.trace or ""
            with stopwatch() as seconds:
                samples = self._graded(problem, [(text, "stop", 0)])
            why = {} if text.strip() else {"rejected": "empty trace", "detail": tally(samples)}
            yield self._row(problem, samples, (0,) if text.strip() else (), seconds(), why)

    def write(self, problems: list[Problem]) -> Iterator[TraceRow]:
        """Rows of sampled traces, each as it is finished; only right ones are kept."""
        run, teacher, requests = self.run.config, self.config, []
        for problem in problems:
            user = solve_text(run.prompts, problem.question)
            prompt = render(self.backend.tokenizer, user, teacher.system, thinking=teacher.thinking)
            requests.append(Request(problem.id, prompt, teacher.sampling, n=teacher.samples, seed=run.seed))
        by_id = {problem.id: problem for problem in problems}
        for done in self.backend.generate(requests):
            problem = by_id[done.id]
            samples = self._graded(problem, [(c.text, c.finish, len(c.ids)) for c in done.completions])
            kept = choose(samples, teacher.keep)
            reason = "generation failed" if done.error else "no right trace"
            why = {} if kept else {"rejected": reason, "detail": done.error or tally(samples)}
            yield self._row(problem, samples, kept, done.seconds, why)

    def _graded(self, problem: Problem, texts: Texts) -> tuple[Sample, ...]:
        return graded_samples(self.grader, texts, problem.answer, self.run.config.data.train.verifier)

    def _row(
        self, problem: Problem, samples: tuple[Sample, ...], kept: tuple[int, ...], seconds: float, why: dict[str, str]
    ) -> TraceRow:
        fields = problem.model_dump(include={"id", "question", "answer"})
        return TraceRow(**fields, samples=samples, kept=kept, seconds=round(seconds, 3), **why)


def graded_samples(grader: Grader, texts: Texts, gold: str, verifier: str) -> tuple[Sample, ...]:
    """Grade the samples of one problem."""
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
