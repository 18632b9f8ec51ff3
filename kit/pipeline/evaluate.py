"""eval: the student before and after training, on problems it never saw (section 4).

Every score comes with its denominator, an interval over problems, and how many samples ran into the token limit or
into a loop, without which a score says little. A problem that could not be asked, a sample that could not be read and
one that took too long to grade earn nothing and are counted by name. Nothing is trained or drawn here.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from kit.core.errors import KitError
from kit.core.records import EvalRow, Problem
from kit.core.run import Run
from kit.core.stages import file_digest, file_name, tallies
from kit.core.storage import digest
from kit.data import problems_of
from kit.grading.scores import compare_rows, score
from kit.prompts import template_hash
from kit.sampling import PROBLEM_FIELDS, Sampler, rejection


def evaluate(run: Run) -> None:
    """The stage: `eval/MODEL-WHICH-DATASET.jsonl`, one `EvalRow` a problem; WHICH is base or tuned.

    The stage's summary in the manifest holds `scores`, each `score(...)` with {model, dataset, which}, and
    `comparisons` of tuned against base, each {dataset, a, b} with `compare_rows(...)`.

    Raises:
        KitError: no finished training, or prompts rendered in another way than the adapter was trained with.
    """
    engine, trained = run.config.eval, run.config.method != "zero-shot"
    datasets, verifiers = problems_of(run).evals, [data.verifier for data in run.config.data.eval]
    if not datasets:
        raise KitError(
            "There is nothing to evaluate on.",
            "Name data.eval, and let stop_after be eval or report.",
            2,
        )
    if trained:
        run.require("train")
    source = digest([problem for problems in datasets.values() for problem in problems])
    source += "".join(
        f" {name}:{kind}" for name, kind in zip(datasets, verifiers, strict=True) if kind != "math"
    )
    source += f" {run.manifest['stages']['train']['output'] if trained else None}"
    # tuned comes first: an adapter that cannot be used is found before anything is spent on the base model
    sides = ["tuned"] * trained + ["base"] * (engine.base or not trained)
    files = {
        (which, name): file_name(engine.model, which, name) for which in sides for name in datasets
    }
    if not run.begin(
        "eval", source, lambda: " ".join(file_digest(run, name, EvalRow) for name in files.values())
    ):
        return
    rows: dict[tuple[str, str], list[EvalRow]] = {}
    for which in sides:
        adapter = str(run.folder / "adapter") if which == "tuned" else None
        with Sampler(run, engine, engine, adapter) as student:
            for (name, problems), verifier in zip(datasets.items(), verifiers, strict=True):
                work = partial(answers, student, verifier)
                rows[which, name] = student.sweep(
                    "eval", files[which, name], EvalRow, problems, work
                )
    scores, comparisons = [], []
    for name in datasets:
        for which in reversed(sides):
            about = {"model": engine.model, "dataset": name, "which": which}
            scores.append(about | score(rows[which, name]))
        if len(sides) == 2:
            found = compare_rows(rows["base", name], rows["tuned", name])
            comparisons.append({"dataset": name, "a": "base", "b": "tuned", **found})
    every = [row for found in rows.values() for row in found]
    lost = tallies(every)["rejected"]
    told = {"scores": scores, "comparisons": comparisons, "rejected": lost}
    output = " ".join(digest(found) for found in rows.values())
    run.finish("eval", output, len(every), len(every) - sum(lost.values()), **told)


def answers(student: Sampler, verifier: str, problems: list[Problem]) -> Iterator[EvalRow]:
    """Graded rows of a batch of problems, as they are finished, from a model that is asked as it was trained."""
    config, engine = student.run.config, student.engine
    now = template_hash(student.backend.tokenizer, config.prompts, engine.system, engine.thinking)
    trained = student.run.manifest.get("template_hash")
    if config.method != "zero-shot" and trained not in (None, now):
        raise KitError(
            f"The adapter was trained on prompts of template {trained}; evaluation would ask with {now}.",
            "Make eval.system, eval.thinking, eval.model and prompts.instruction those of training, or train anew.",
        )
    for problem, samples, done in student.sample(problems, verifier):
        facts = problem.model_dump(include=PROBLEM_FIELDS | {"level", "subject"})
        facts |= rejection(done, "", samples) if done.error else {}
        yield EvalRow(
            **facts,
            samples=samples,
            prompt_tokens=done.prompt_tokens,
            seconds=round(done.seconds, 3),
        )
