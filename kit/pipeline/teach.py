"""teach: a trace for every problem, from a model, a file, or its own solution (section 3.1).

Paper: one DeepSeek-R1 trace per question, taken as it is. Here: a teacher that we run is sampled,
and only traces that reach the gold answer go on; traces from a file are graded for the record and
all go on. Nothing is cut here.
"""

from collections.abc import Iterator
from functools import partial

from kit.backends.base import Completion, Generation
from kit.core.records import Problem, TraceRow
from kit.core.run import Run
from kit.core.stages import file_digest, tallies
from kit.core.storage import digest
from kit.data import problems_of
from kit.sampling import (
    PROBLEM_FIELDS,
    Sampled,
    Sampler,
    choose,
    grade_samples,
    model_fingerprints,
    rejection,
)
from kit.synthetic import wander

NAME = "traces.jsonl"


def teach(run: Run) -> None:
    """The stage: one `TraceRow` per problem."""
    config = run.config.teacher
    problems = [] if run.config.method == "zero-shot" else problems_of(run).train
    model = partial(model_fingerprints, run.config, "teacher", problems)
    if not run.begin("teach", digest(problems), lambda: file_digest(run, NAME, TraceRow), model):
        return
    with Sampler(run, config, config) as teacher:
        rows = teacher.write_rows(
            "teach", NAME, TraceRow, problems, lambda batch: traces(teacher, batch)
        )
    kept = sum(len(row.kept) for row in rows)
    run.finish("teach", len(problems), kept, **tallies(rows))


def traces(teacher: Sampler, problems: list[Problem]) -> Iterator[TraceRow]:
    """One row per problem; of sampled traces the correct ones are kept, of existing ones all."""
    config = teacher.run.config
    engine = teacher.engine.backend
    exists = engine in ("file", "reference")
    if exists:
        sampled = existing_traces(teacher, problems)
    else:
        sampled = teacher.sample(problems)
    for problem, samples, generation in sampled:
        kept = choose(samples, config.teacher.keep)
        reason = "no right trace"
        # an existing trace goes on whether it is right or wrong
        if exists:
            kept = (0,) if samples[0].text.strip() else ()
            reason = "empty trace"
        yield TraceRow(
            **problem.model_dump(include=PROBLEM_FIELDS),
            samples=samples,
            kept=kept,
            # the data's, or the solution without the wandering; a model's is in its trace
            attempt={"file": problem.attempt, "reference": problem.solution}.get(engine),
            seconds=round(generation.seconds, 3),
            **({} if kept else rejection(generation, reason, samples)),
        )


def existing_traces(teacher: Sampler, problems: list[Problem]) -> Iterator[Sampled]:
    """Traces that problems come with, or their solutions as traces; yields what `sample` does."""
    config = teacher.run.config
    for problem in problems:
        text = problem.trace or ""
        if teacher.engine.backend == "reference":
            text = wander(
                problem,
                config.teacher.wordiness,
                config.seed,
                config.teacher.derives,
                config.teacher.dead_ends,
            )
        completion = Completion(text, (), "stop")
        samples = grade_samples(teacher.grader, [completion], problem)
        yield problem, samples, Generation(problem.id, (completion,))
