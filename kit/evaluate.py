"""eval: the student before and after training, on problems it never saw (section 4).

Every score comes with its denominator, an interval over problems, and how many samples ran into the token limit or
into a loop, without which a score says little. A problem that could not be asked, a sample that could not be read and
one that took too long to grade earn nothing and are counted by name. Nothing is trained or drawn here.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

from kit import stats
from kit.answers import Grader
from kit.backends import Backend, Request, looping, open_backend
from kit.errors import KitError
from kit.prompts import render, solve_text, template_hash
from kit.records import EvalRow, Problem, RowFile, Sample, digest
from kit.run import Run, stopwatch, work_through
from kit.teach import graded_samples


def evaluate(run: Run) -> None:
    """The stage: `eval/MODEL-WHICH-DATASET.jsonl`, one `EvalRow` a problem; WHICH is before or after.

    The stage's summary in the manifest holds `scores`, each `score(...)` with {model, dataset, which}, and
    `comparisons` of after against before, each {dataset, a, b} with `compare_rows(...)`.

    Raises:
        KitError: no finished training, or prompts rendered in another way than the adapter was trained with.
    """
    engine, datasets, trained = run.config.eval, run.data.evals, run.config.method != "zero-shot"
    if not datasets:
        raise KitError("There is nothing to evaluate on.", "Name data.eval, and let stop_after be eval or report.", 2)
    if trained:
        run.require("train")
    source = digest([problem for problems in datasets.values() for problem in problems])
    source += f" {run.manifest['stages']['train']['output'] if trained else None}"
    # after comes first: an adapter that cannot be used is found before anything is spent on the base model
    sides = ["after"] * trained + ["before"] * (engine.before or not trained)
    files = {(which, name): file_name(engine.model, which, name) for which in sides for name in datasets}
    if not run.begin("eval", source, lambda: " ".join(digest(run.rows(name, EvalRow)) for name in files.values())):
        return
    rows: dict[tuple[str, str], list[EvalRow]] = {}
    with stopwatch() as seconds, Grader() as grader:
        for which in sides:
            with ExitStack() as held:
                student = _Student(run, which, grader, held)
                for (name, problems), asked in zip(datasets.items(), run.config.data.eval, strict=True):
                    file = RowFile(run.path(files[which, name]), EvalRow)
                    units = [(problem.id, (problem, asked.verifier)) for problem in problems]
                    rows[which, name] = work_through(run, "eval", file, units, 4 * engine.parallel, student.answer)
    scores, comparisons, level = [], [], engine.confidence
    for name in datasets:
        for which in reversed(sides):
            about = {"model": engine.model, "dataset": name, "which": which}
            scores.append(about | score(rows[which, name], level))
        if len(sides) == 2:
            found = compare_rows(rows["before", name], rows["after", name], level)
            comparisons.append({"dataset": name, "a": "before", "b": "after", **found})
    lost = Counter(row.rejected for found in rows.values() for row in found if row.rejected)
    output, count = " ".join(digest(found) for found in rows.values()), sum(map(len, rows.values()))
    told = {"scores": scores, "comparisons": comparisons, "rejected": dict(lost)}
    run.finish("eval", output, count, count - lost.total(), seconds(), **told)


class _Student:
    """The model before or after training, loaded when its first answer is missing; `held` closes it."""

    def __init__(self, run: Run, which: str, grader: Grader, held: ExitStack) -> None:
        self.run, self.grader, self.held = run, grader, held
        self.adapter = str(run.folder / "adapter") if which == "after" else None

    @cached_property
    def backend(self) -> Backend:
        """The model, if it is asked as it was trained."""
        config = self.run.config
        backend = self.held.enter_context(closing(open_backend(config.eval, adapter=self.adapter)))
        now = template_hash(backend.tokenizer, config.prompts, config.eval.system, config.eval.thinking)
        trained = self.run.manifest.get("template_hash")
        if config.method != "zero-shot" and trained not in (None, now):
            raise KitError(
                f"The adapter was trained on prompts of template {trained}; evaluation would ask with {now}.",
                "Make eval.system, eval.thinking, eval.model and prompts.instruction those of training, or train anew.",
            )
        return backend

    def answer(self, asked: list[tuple[Problem, str]]) -> Iterator[EvalRow]:
        """Graded rows of a batch of problems, each with its verifier, as they are finished."""
        config, engine = self.run.config, self.run.config.eval
        by_id, requests = {problem.id: (problem, verifier) for problem, verifier in asked}, []
        for problem, _ in asked:
            user = solve_text(config.prompts, problem.question)
            prompt = render(self.backend.tokenizer, user, engine.system, thinking=engine.thinking)
            requests.append(Request(problem.id, prompt, engine.sampling, n=engine.samples, seed=config.seed))
        for done in self.backend.generate(requests):
            problem, verifier = by_id[done.id]
            facts = problem.model_dump(include={"id", "question", "answer", "level", "subject"})
            facts |= {"rejected": "generation failed", "detail": done.error} if done.error else {}
            texts = [(c.text, c.finish, len(c.ids)) for c in done.completions]
            samples = graded_samples(self.grader, texts, problem.answer, verifier)
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


def accuracy(rows: Sequence[EvalRow], confidence: float = 0.95) -> dict[str, Any]:
    """{n (problems), accuracy, low, high}: every problem weighs the same, however many rows and samples it has."""
    means = list(shares(rows).values())
    ends = stats.interval(means, sum(len(row.samples) or 1 for row in rows) / max(len(means), 1), confidence)
    low, high = (round(float(end), 4) for end in ends)
    return {"n": len(means), "accuracy": _mean(means), "low": low, "high": high}


def score(rows: Sequence[EvalRow], confidence: float = 0.95) -> dict[str, Any]:
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
    found = accuracy(rows, confidence) | {
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
        names = sorted({getattr(row, field) for row in rows} - {None})
        groups = {name: [row for row in rows if getattr(row, field) == name] for name in names}
        found[f"by_{field}"] = {name: accuracy(group, confidence) for name, group in groups.items()}
    return found


def compare_rows(a: Iterable[EvalRow], b: Iterable[EvalRow], confidence: float = 0.95) -> dict[str, Any]:
    """b against a on the problems that both answered: `stats.compare`, or {n: 0} without any."""
    first, second = shares(a), shares(b)
    both = sorted(first.keys() & second.keys())
    return stats.compare([first[problem] for problem in both], [second[problem] for problem in both], confidence)


def loops(sample: Sample) -> bool:
    """Whether a sample was ended as a loop, or ran to the limit repeating itself."""
    words = re.findall(r"\w+|[^\w\s]", sample.text[-20000:])[:-1] if sample.finish == "length" else []
    return sample.finish == "loop" or looping(words)  # type: ignore[arg-type]  # any tokens that compare do


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 4) if values else 0.0
