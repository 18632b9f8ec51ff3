"""teach: a trace for every problem, from a model, a file, or the problem's own worked solution (section 3.1).

Paper: one DeepSeek-R1 trace a question, taken as it is. Here: a teacher that we run is sampled, and only
traces that reach the gold answer go on; traces from a file are graded for the record and all go on.
`Asker` is how every stage draws and grades samples.
"""

from __future__ import annotations

from collections.abc import Iterator

from kit.backends.base import Completion, Generation
from kit.core.records import Problem, TraceRow
from kit.core.run import Run
from kit.core.stages import file_digest, tallies
from kit.core.storage import digest
from kit.data import problems_of
from kit.sampling import FACTS, Sampler, choose, why

NAME = "traces.jsonl"


def teach(run: Run) -> None:
    """The stage: one `TraceRow` a problem."""
    config = run.config.teacher
    problems = [] if run.config.method == "zero-shot" else problems_of(run).train
    if not run.begin("teach", digest(problems), lambda: file_digest(run, NAME, TraceRow)):
        return
    with Sampler(run, config, config) as teacher:
        rows = teacher.sweep(
            "teach", NAME, TraceRow, problems, lambda batch: traces(teacher, batch)
        )
    kept = sum(len(row.kept) for row in rows)
    run.finish("teach", digest(rows), len(problems), kept, **tallies(rows))


def traces(teacher: Sampler, problems: list[Problem]) -> Iterator[TraceRow]:
    """A row a problem: of sampled traces only right ones are kept, of given ones all that are not empty."""
    config, given = teacher.run.config, teacher.engine.backend in ("file", "reference")
    verifier, reason = config.data.train.verifier, "empty trace" if given else "no right trace"
    drawn = (
        teacher.grade(problems, _given(teacher, problems), verifier)
        if given
        else teacher.ask(problems, verifier)
    )
    for problem, samples, done in drawn:
        kept = (
            (0,) * bool(samples[0].text.strip()) if given else choose(samples, config.teacher.keep)
        )
        lost = {} if kept else why(done, reason, samples)
        facts = problem.model_dump(include=FACTS)
        yield TraceRow(**facts, samples=samples, kept=kept, seconds=round(done.seconds, 3), **lost)


def _given(teacher: Sampler, problems: list[Problem]) -> Iterator[Generation]:
    """The traces that problems come with."""
    from kit.synthetic import wander

    config, worked = teacher.run.config, teacher.engine.backend == "reference"
    for problem in problems:
        text = (
            wander(problem, config.teacher.wordiness, config.seed)
            if worked
            else problem.trace or ""
        )
        yield Generation(problem.id, (Completion(text, (), "stop"),))
