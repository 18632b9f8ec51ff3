"""eval: the student before and after training, on problems it never saw (section 4).

Every score comes with its denominator, an interval over problems, and how many samples ran into the token limit or
into a loop, without which a score says little. A problem that could not be asked, a sample that could not be read and
one that took too long to grade earn nothing and are counted by name. Nothing is trained or drawn here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

from kit.answers import Grader
from kit.backends import Backend, Request, looping, open_backend
from kit.errors import KitError
from kit.prompts import render, solve_text, template_hash
from kit.records import EvalRow, Problem, RowFile, Sample, digest
from kit.run import Run, stopwatch, work_through
from kit.stats import compare, interval, pass_at
from kit.teach import graded_samples


def evaluate(run: Run) -> None:
    """The stage: `eval/MODEL-WHICH-DATASET.jsonl`, one `EvalRow` a problem; WHICH is before or after.

    The stage's summary in the manifest holds `scores`, each `score(...)` with {model, dataset, which}, and
    `comparisons` of after against before, each {dataset, a, b, n} with the fields of `stats.Comparison`.

    Raises:
        KitError: no finished training, or prompts rendered in another way than the adapter was trained with.
    """
    config, datasets = run.config, run.data.evals
    if not datasets:
        raise KitError("There is nothing to evaluate on.", "Name data.eval, and let stop_after be eval or report.", 2)
    trained, adapter = config.method != "zero-shot", None
    if trained:
        run.require("train")
        adapter = run.manifest["stages"]["train"]["output"]
    # after comes first: an adapter that cannot be used is found before anything is spent on the base model
    sides = ["after"] * trained + ["before"] * (config.eval.before or not trained)
    files = {(which, name): file_name(config.eval.model, which, name) for which in sides for name in datasets}
    source = f"{digest([problem for problems in datasets.values() for problem in problems])} {adapter}"
    if not run.begin("eval", source, lambda: " ".join(digest(run.rows(name, EvalRow)) for name in files.values())):
        return
    rows: dict[tuple[str, str], list[EvalRow]] = {}
    with stopwatch() as seconds, Grader() as grader:
        for which in sides:
            with ExitStack() as stack:
                opened = cache(partial(_open, run, which, stack))  # loaded when its first answer is missing
                for (name, problems), asked in zip(datasets.items(), config.data.eval, strict=True):
                    file = RowFile(run.path(files[which, name]), EvalRow)
                    units = [(problem.id, problem) for problem in problems]
                    work = partial(_write, run, grader, opened, asked.verifier)
                    rows[which, name] = work_through(run, "eval", file, units, 4 * config.eval.parallel, work)
    every = [row for found in rows.values() for row in found]
    scores, comparisons = [], []
    for which, name in sorted(rows, key=lambda key: key[0] == "after"):
        about = {"model": config.eval.model, "dataset": name, "which": which}
        scores.append(about | score(rows[which, name], config.eval.confidence))
        if which == "after" and ("before", name) in rows:
            compared = compare_rows(rows["before", name], rows["after", name], config.eval.confidence)
            comparisons.append({"dataset": name, "a": "before", "b": "after", **compared})
    run.finish(
        "eval",
        " ".join(digest(found) for found in rows.values()),
        rows_in=len(every),
        rows_out=sum(not row.rejected for row in every),
        seconds=seconds(),
        scores=scores,
        comparisons=comparisons,
        tokens=sum(sample.tokens for row in every for sample in row.samples),
        rejected=dict(Counter(row.rejected for row in every if row.rejected)),
    )


def _open(run: Run, which: str, stack: ExitStack) -> Backend:
    """The model before or after training, if it is asked as it was trained; `stack` closes it."""
    config = run.config
    adapter = str(run.folder / "adapter") if which == "after" else None
    backend = stack.enter_context(closing(open_backend(config.eval, adapter=adapter)))
    now = template_hash(backend.tokenizer, config.prompts, config.eval.system, config.eval.thinking)
    trained = run.manifest.get("template_hash")
    if config.method != "zero-shot" and trained not in (None, now):
        raise KitError(
            f"The adapter was trained on prompts of template {trained}; evaluation would ask with {now}.",
            "Make eval.system, eval.thinking, eval.model and prompts.instruction those of training, or train anew.",
        )
    return backend


def _write(
    run: Run, grader: Grader, opened: Callable[[], Backend], verifier: str, problems: list[Problem]
) -> Iterator[EvalRow]:
    """Graded rows of a batch, each as it is finished."""
    config, engine, backend = run.config, run.config.eval, opened()
    by_id = {problem.id: problem for problem in problems}
    requests = []
    for id, problem in by_id.items():
        user = solve_text(config.prompts, problem.question)
        prompt = render(backend.tokenizer, user, engine.system, thinking=engine.thinking)
        requests.append(Request(id, prompt, engine.sampling, n=engine.samples, seed=config.seed))
    for done in backend.generate(requests):
        facts = by_id[done.id].model_dump(include={"id", "question", "answer", "level", "subject"})
        facts |= {"rejected": "generation failed", "detail": done.error} if done.error else {}
        texts = [(c.text, c.finish, len(c.ids)) for c in done.completions]
        samples = graded_samples(grader, texts, facts["answer"], verifier)
        yield EvalRow(**facts, samples=samples, prompt_tokens=done.prompt_tokens, seconds=round(done.seconds, 3))


def file_name(model: str, which: str, dataset: str) -> str:
    """A score's file in the run's folder, e.g. eval/smollm2-135m-before-gsm8k.jsonl."""
    safe = [re.sub(r"[^\w.-]+", "-", Path(part).name).strip("-.") for part in (model, dataset)]
    return f"eval/{safe[0]}-{which}-{safe[1]}.jsonl"


def shares(rows: Sequence[EvalRow]) -> list[float]:
    """Share of right samples of each problem; 0 where there are none."""
    return [sum(s.verdict == "correct" for s in row.samples) / max(len(row.samples), 1) for row in rows]


def score(rows: Sequence[EvalRow], confidence: float = 0.95) -> dict[str, Any]:
    """What rows say about a model.

    Returns:
        n (problems), samples, rejected (problems without samples), accuracy (every problem weighs the same) with low
        and high, pass_at {k: ratio}, verdicts {verdict: samples}, cap_hit_ratio and loop_ratio of samples,
        mean_tokens, accuracy_completed of the samples that ended by themselves (None: none did), and by_level and
        by_subject {name: {n, accuracy, low, high}}.
    """
    samples = [sample for row in rows for sample in row.samples]
    completed = [sample.verdict == "correct" for sample in samples if sample.finish == "stop"]
    most = max((len(row.samples) for row in rows), default=0)
    counts = [(sum(s.verdict == "correct" for s in row.samples), len(row.samples) or most) for row in rows]
    found = _accuracy(rows, confidence) | {
        "samples": len(samples),
        "rejected": sum(not row.samples for row in rows),
        "pass_at": {str(k): round(ratio, 4) for k, ratio in pass_at(counts).items()},
        "verdicts": dict(Counter(sample.verdict for sample in samples)),
        "cap_hit_ratio": _mean([sample.finish == "length" for sample in samples]),
        "loop_ratio": _mean([loops(sample) for sample in samples]),
        "mean_tokens": _mean([sample.tokens for sample in samples]),
        "accuracy_completed": _mean(completed) if completed else None,
    }
    for field in ("level", "subject"):
        groups: dict[str, list[EvalRow]] = {}
        for row in rows:
            groups.setdefault(getattr(row, field), []).append(row)
        found[f"by_{field}"] = {k: _accuracy(groups[k], confidence) for k in sorted(groups.keys() - {None})}
    return found


def compare_rows(a: Sequence[EvalRow], b: Sequence[EvalRow], confidence: float = 0.95) -> dict[str, Any]:
    """b against a on the problems that both answered: n and the fields of `stats.Comparison`; {n: 0} without any."""
    first, second = ({row.id: share for row, share in zip(rows, shares(rows), strict=True)} for rows in (a, b))
    shared = [id for id in first if id in second]
    if not shared:
        return {"n": 0}
    return {"n": len(shared)} | asdict(compare(*([side[id] for id in shared] for side in (first, second)), confidence))


def loops(sample: Sample) -> bool:
    """Whether a sample was ended as a loop, or ran to the limit repeating itself."""
    words = re.findall(r"\w+|[^\w\s]", sample.text[-20000:])[:-1] if sample.finish == "length" else []
    return sample.finish == "loop" or looping(words)  # type: ignore[arg-type]  # any tokens that compare do


def _accuracy(rows: Sequence[EvalRow], confidence: float) -> dict[str, Any]:
    means = shares(rows)
    samples = _mean([len(row.samples) for row in rows if row.samples])
    low, high = interval(means, samples, confidence)
    return {"n": len(rows), "accuracy": _mean(means), "low": round(float(low), 4), "high": round(float(high), 4)}


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 4) if values else 0.0
