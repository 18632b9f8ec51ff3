"""eval: the student before and after training, on problems it never saw (section 4).

Every score comes with its denominator, an interval over problems, and how many samples ran into the token limit or
into a loop, without which a score says little. A problem that could not be asked, a sample that could not be read and
one that took too long to grade earn nothing and are counted by name. Nothing is trained or drawn here.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from kit import stats
from kit.backends import looping
from kit.errors import KitError
from kit.prompts import template_hash
from kit.records import EvalRow, Problem, Sample, digest
from kit.run import Run, file_digest, tallies
from kit.teach import FACTS, Asker, why


def evaluate(run: Run) -> None:
    """The stage: `eval/MODEL-WHICH-DATASET.jsonl`, one `EvalRow` a problem; WHICH is before or after.

    The stage's summary in the manifest holds `scores`, each `score(...)` with {model, dataset, which}, and
    `comparisons` of after against before, each {dataset, a, b} with `compare_rows(...)`.

    Raises:
        KitError: no finished training, or prompts rendered in another way than the adapter was trained with.
    """
    engine, trained = run.config.eval, run.config.method != "zero-shot"
    datasets, verifiers = run.data.evals, [data.verifier for data in run.config.data.eval]
    if not datasets:
        raise KitError("There is nothing to evaluate on.", "Name data.eval, and let stop_after be eval or report.", 2)
    if trained:
        run.require("train")
    source = digest([problem for problems in datasets.values() for problem in problems])
    source += "".join(f" {name}:{kind}" for name, kind in zip(datasets, verifiers, strict=True) if kind != "math")
    source += f" {run.manifest['stages']['train']['output'] if trained else None}"
    # after comes first: an adapter that cannot be used is found before anything is spent on the base model
    sides = ["after"] * trained + ["before"] * (engine.before or not trained)
    files = {(which, name): file_name(engine.model, which, name) for which in sides for name in datasets}
    if not run.begin("eval", source, lambda: " ".join(file_digest(run, name, EvalRow) for name in files.values())):
        return
    rows: dict[tuple[str, str], list[EvalRow]] = {}
    for which in sides:
        adapter = str(run.folder / "adapter") if which == "after" else None
        with Asker(run, engine, engine, adapter) as student:
            for (name, problems), verifier in zip(datasets.items(), verifiers, strict=True):
                work = partial(answers, student, verifier)
                rows[which, name] = student.sweep("eval", files[which, name], EvalRow, problems, work)
    scores, comparisons = [], []
    for name in datasets:
        for which in reversed(sides):
            about = {"model": engine.model, "dataset": name, "which": which}
            scores.append(about | score(rows[which, name]))
        if len(sides) == 2:
            found = compare_rows(rows["before", name], rows["after", name])
            comparisons.append({"dataset": name, "a": "before", "b": "after", **found})
    every = [row for found in rows.values() for row in found]
    lost = tallies(every)["rejected"]
    told = {"scores": scores, "comparisons": comparisons, "rejected": lost}
    output = " ".join(digest(found) for found in rows.values())
    run.finish("eval", output, len(every), len(every) - sum(lost.values()), **told)


def answers(student: Asker, verifier: str, problems: list[Problem]) -> Iterator[EvalRow]:
    """Graded rows of a batch of problems, as they are finished, from a model that is asked as it was trained."""
    config, engine = student.run.config, student.engine
    now = template_hash(student.backend.tokenizer, config.prompts, engine.system, engine.thinking)
    trained = student.run.manifest.get("template_hash")
    if config.method != "zero-shot" and trained not in (None, now):
        raise KitError(
            f"The adapter was trained on prompts of template {trained}; evaluation would ask with {now}.",
            "Make eval.system, eval.thinking, eval.model and prompts.instruction those of training, or train anew.",
        )
    for problem, samples, done in student.ask(problems, verifier):
        facts = problem.model_dump(include=FACTS | {"level", "subject"})
        facts |= why(done, "", samples) if done.error else {}
        yield EvalRow(**facts, samples=samples, prompt_tokens=done.prompt_tokens, seconds=round(done.seconds, 3))


def file_name(model: str, which: str, dataset: str) -> str:
    """A score's file in the run's folder, e.g. eval/smollm2-135m-before-gsm8k.jsonl."""
    safe = [re.sub(r"[^\w.-]+", "-", Path(part).name).strip("-.") for part in (model, dataset)]
    return f"eval/{safe[0]}-{which}-{safe[1]}.jsonl"


def shares(rows: Iterable[EvalRow]) -> dict[tuple[str, str], float]:
    """Share of right samples of each problem (id, question), over its rows; 0 where it has no samples."""
    found = defaultdict(list)
    for row in rows:
        found[row.id, row.question].append(sum(s.verdict == "correct" for s in row.samples) / max(len(row.samples), 1))
    return {problem: mean(values) for problem, values in found.items()}


def accuracy(rows: Sequence[EvalRow]) -> dict[str, Any]:
    """{n (problems), accuracy, low, high}: every problem weighs the same, however many rows and samples it has."""
    means = list(shares(rows).values())
    samples = sum(len(row.samples) or 1 for row in rows) / max(len(means), 1)
    low, high = (round(float(end), 4) for end in stats.interval(means, samples))
    return {"n": len(means), "accuracy": _mean(means), "low": low, "high": high}


def score(rows: Sequence[EvalRow]) -> dict[str, Any]:
    """What rows say about a model.

    Returns:
        n, accuracy, low and high; samples, rejected (problems without samples), pass_at {k: ratio}, verdicts
        {verdict: samples}; of the samples: cap_hit_ratio, loop_ratio, mean_tokens, and accuracy_completed of those that
        ended by themselves (None: none did); by_level and by_subject {name: {n, accuracy, low, high}}.
    """
    samples = [sample for row in rows for sample in row.samples]
    completed = [sample.verdict == "correct" for sample in samples if sample.finish == "stop"]
    most = max((len(row.samples) for row in rows), default=0)
    counts = [(sum(s.verdict == "correct" for s in row.samples), len(row.samples) or most) for row in rows]
    found = accuracy(rows) | {
        "samples": len(samples),
        "rejected": sum(not row.samples for row in rows),
        "pass_at": {str(k): round(ratio, 4) for k, ratio in stats.pass_at(counts).items()},
        "verdicts": dict(Counter(sample.verdict for sample in samples)),
        "cap_hit_ratio": _mean([sample.finish == "length" for sample in samples]),
        "loop_ratio": _mean([loops(sample) for sample in samples]),
        "mean_tokens": _mean([sample.tokens for sample in samples]),
        "accuracy_completed": _mean(completed) if completed else None,
    }
    for field in ("level", "subject"):
        groups = defaultdict(list)
        for row in rows:
            groups[getattr(row, field)].append(row)
        found[f"by_{field}"] = {name: accuracy(groups[name]) for name in sorted({*groups} - {None})}
    return found


def compare_rows(a: Iterable[EvalRow], b: Iterable[EvalRow]) -> dict[str, Any]:
    """b against a on the problems that both answered: `stats.compare`, or {n: 0} without any."""
    first, second = shares(a), shares(b)
    both = sorted(first.keys() & second.keys())
    return stats.compare([first[problem] for problem in both], [second[problem] for problem in both])


def loops(sample: Sample) -> bool:
    """Whether a sample was ended as a loop, or ran to the limit repeating itself."""
    words = re.findall(r"\w+|[^\w\s]", sample.text[-20000:])[:-1] if sample.finish == "length" else []
    return sample.finish == "loop" or looping(words)  # type: ignore[arg-type]  # any tokens that compare do


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 4) if values else 0.0
