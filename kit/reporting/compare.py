"""Runs side by side: one table, paired tests on the same problems, and a page of the report's kind.

Runs that differ only in their seed form one group: a problem's score in a group is its mean over the group's
runs, so seeds make a problem's own score surer but never count as more problems. Nothing is graded again here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, combinations, zip_longest
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from kit.core.config import flat
from kit.core.errors import KitError
from kit.core.records import EvalRow
from kit.core.stages import file_name
from kit.core.storage import write_atomic
from kit.grading.scores import accuracy_by_problem, compare_rows, score
from kit.judging.sentences import ends
from kit.prompts import target
from kit.reporting.metrics import Files, numbers
from kit.reporting.report import pieces, render

DIFFERENT = 6  # problems shown on which runs disagree
BUDGETS = 80  # points of a curve
SCORE = (
    "n",
    "accuracy",
    "ci_low",
    "ci_high",
    "truncated_ratio",
    "accuracy_completed",
    "mean_tokens",
)
NAMES = {"name", "out", "stop_after"}  # keys that change no number


def compare(
    folders: Sequence[Path], out: Path, judge: Callable[..., Any] | None = None
) -> dict[str, Any]:
    """Compare runs and write the page `out`.

    Args:
        judge: compares two runs' eval rows by their reasoning (`kit.quality`); asked of the first two groups.

    Returns:
        runs (numbers), groups, scores (of groups), pairs (b against a), cuts (two judges on the same traces), differs
        {config key: values}, budget (tokens of an answer), student and teacher (of the first run), within
        {dataset: see `_within`}, different (problems on which groups disagree), quality {dataset: judged}, lesson
        (see `_lesson`), page.

    Raises:
        KitError: fewer than two folders, or one without a run.
    """
    if len(folders) < 2:
        raise KitError(
            "compare needs two runs or more.",
            "Name their folders: palign.py compare runs/a runs/b.",
            2,
        )
    files = [Files(Path(folder)) for folder in folders]
    labelled, settings = _groups(files), [flat(run.config) for run in files]
    found: dict[str, Any] = {"runs": [numbers(run) for run in files], "page": str(out)}
    found["groups"] = [
        {"label": label, "seeds": [run.config["seed"] for run in runs]} for label, runs in labelled
    ]
    found |= {"scores": [], "pairs": [], "different": [], "within": {}, "quality": {}}
    answers: dict[
        str, dict[str, list[list[EvalRow]]]
    ] = {}  # by data, then by group: each run's rows
    for label, runs in labelled:
        for run in runs:
            for name, rows in _answers(run):
                answers.setdefault(name, {}).setdefault(label, []).append(rows)
    for name, groups in answers.items():
        pooled = {label: list(chain.from_iterable(runs)) for label, runs in groups.items()}
        for label, runs in groups.items():
            by_run = [mean(accuracy_by_problem(rows).values()) for rows in runs]
            spread = stdev(by_run) if len(by_run) > 1 else None  # over seeds
            about = {
                "group": label,
                "dataset": name,
                "runs": len(runs),
                "by_run": by_run,
                "spread": spread,
            }
            whole_score = score(pooled[label])
            found["scores"].append(about | {name: whole_score[name] for name in SCORE})
        for (a, first), (b, second) in combinations(pooled.items(), 2):
            test = compare_rows(first, second)
            found["pairs"] += (
                [{"dataset": name, "a": a, "b": b, **test, "words": _words(a, b, test)}]
                if test["n"]
                else []
            )
        found["different"] += _different(pooled, name)
        found["within"][name] = _within(pooled)
        if judge and len(groups) > 1:
            a, b, *_ = groups
            found["quality"][name] = {"a": a, "b": b, **judge(groups[a][0], groups[b][0])}
    found["lesson"] = _lesson(labelled)
    found["cuts"] = [cut for a, b in combinations(files, 2) for cut in _cuts(a, b)]
    values = {
        key: [one.get(key) for one in settings]
        for one in settings
        for key in one
        if key not in NAMES
    }
    found |= {
        "budget": settings[0]["eval.sampling.max_new_tokens"],
        "student": settings[0]["student.model"],
    }
    found["teacher"] = settings[0]["teacher.path"] or settings[0]["teacher.backend"]
    if found["teacher"] in ("hf", "gguf", "http"):
        found["teacher"] = settings[0]["teacher.model"]
    found["differs"] = {
        key: row for key, row in values.items() if any(value != row[0] for value in row)
    }
    curves = [
        (name, [(line["step"], line["loss"]) for line in run.log])
        for name, (run, *_) in labelled
        if run.log
    ]
    write_atomic(Path(out), render("compare.html.j2", found=found, curves=curves))
    return found


def show(found: dict[str, Any]) -> None:
    """Print what was found for a person."""
    print(render("compare.txt.j2", found=found))


def _words(a: str, b: str, test: dict[str, Any]) -> str:
    """What a paired test of b against a says."""
    if test["p_value"] >= 0.05 or test["ci_low"] <= 0 <= test["ci_high"]:
        return "within the noise"
    ahead = b if test["difference"] > 0 else a
    return (
        f"{ahead} is better"
        if abs(test["difference"]) >= test["min_detectable_difference"]
        else f"{ahead} is ahead, barely"
    )


def _groups(files: list[Files]) -> list[tuple[str, list[Files]]]:
    """Runs by their config, seed and names aside; labelled by the method, and by a run's name where methods repeat."""
    found: dict[str, list[Files]] = {}
    for run in files:
        steady = {
            key: value for key, value in flat(run.config).items() if key not in NAMES | {"seed"}
        }
        found.setdefault(repr(steady), []).append(run)
    firsts = [(runs[0].config["method"], runs[0].config["name"]) for runs in found.values()]
    methods = [method for method, _ in firsts]
    labels = [
        method if methods.count(method) == 1 else f"{method} ({name})" for method, name in firsts
    ]
    return list(zip(labels, found.values(), strict=True))


def _answers(run: Files) -> Iterator[tuple[str, list[EvalRow]]]:
    """What a run's last model (the trained one, where there is one) answered, by data."""
    last = {
        told["dataset"]: told for told in run.told["eval"].get("scores") or []
    }  # before stands before after
    for name, told in last.items():
        if rows := run.rows(file_name(told["model"], told["which"], name), EvalRow):
            yield name, rows


def _lesson(labelled: list[tuple[str, list[Files]]]) -> dict[str, Any] | None:
    """What each group's first run learned: {targets: [{group, method, rows, characters: median}]}, and of a problem
    that all learned from question, gold, trace, shown {group: target} and search, how the first group that judged it
    cut it: {group, judge, threshold, lengthened, row, and what `pieces` gives}. None where none learned."""
    found: dict[str, Any] = {"targets": [], "shown": {}}
    learned: dict[str, dict[tuple[str, str], str]] = {}  # by the trace that a target was made of
    for label, (run, *_) in labelled:
        if run.train:
            method, traces = (
                run.config["method"],
                {row.id: row for trace in run.traces for row in trace.whole(ends)},
            )
            kept = [row for row in run.aligned if not row.rejected and row.id in traces]
            learned[label] = {
                (row.id, traces[row.id].trace): target(method, row, row.continuation)
                for row in kept
            }
            about = {"group": label, "method": method, "rows": len(run.train)}
            found["targets"].append(
                about | {"characters": median(len(row["output"]) for row in run.train)}
            )
    shared = (
        sorted(set.intersection(*map(set, learned.values())), key=lambda at: (len(at[1]), at))
        if learned
        else []
    )
    cuts = {
        (cut.id, cut.trace): (by, run, cut)
        for by, (run, *_) in reversed(labelled)
        for cut in run.prefixes
        if cut.verdicts
    }
    judged = sorted((at for at in shared if at in cuts), key=lambda at: cuts[at][2].ratio)
    if (
        shared
    ):  # a typical one: of the median cut where there was a judge, else of the median length
        key = (judged or shared)[len(judged or shared) // 2]
        row = next(row for _, (run, *_) in labelled for row in run.aligned if row.id == key[0])
        found |= {"question": row.question, "gold": row.answer, "trace": key[1], "search": None}
        found["shown"] = {label: targets[key] for label, targets in learned.items()}
    if judged:
        label, run, cut = cuts[key]
        more = max((one.lengthened for one in run.aligned if one.id == cut.id), default=0)
        told = {
            "group": label,
            "judge": run.config["judge"],
            "threshold": run.told["truncate"].get("threshold"),
        }
        found["search"] = told | {"lengthened": more, "row": cut.model_dump(), **pieces(cut)}
    return found if learned else None


def _cuts(a: Files, b: Files) -> Iterator[dict[str, Any]]:
    """How two different judges cut the same traces; nothing without any."""
    first = {(row.id, row.trace): row for row in a.prefixes if row.verdicts}
    both = [
        (first[row.id, row.trace], row)
        for row in b.prefixes
        if row.verdicts and (row.id, row.trace) in first
    ]
    if both and a.config["judge"] != b.config["judge"]:
        found = {"a": a.config["name"], "b": b.config["name"], "traces": len(both)}
        found |= {
            "median_a": median(one.ratio for one, _ in both),
            "median_b": median(two.ratio for _, two in both),
        }
        yield found | {"same_cut": sum(one.end == two.end for one, two in both)}


def _within(groups: dict[str, list[EvalRow]]) -> list[tuple[str, list[tuple[int, float]]]]:
    """Each group's accuracy by token budget, [(group, [(tokens, accuracy), ...])]: a right answer counts from the token
    at which it ended on, though it may have named its result before; every problem weighs the same."""
    longest = max(
        (sample.tokens for rows in groups.values() for row in rows for sample in row.samples),
        default=0,
    )
    budgets = sorted({round(longest * i / BUDGETS) for i in range(BUDGETS + 1)})
    found = []
    for label, rows in groups.items():
        asked = Counter((row.id, row.question) for row in rows)
        right = [
            (sample.tokens, 1 / len(row.samples) / asked[row.id, row.question] / len(asked))
            for row in rows
            for sample in row.samples
            if sample.verdict == "correct"
        ]
        share = [sum(part for tokens, part in right if tokens <= budget) for budget in budgets]
        found.append((label, list(zip(budgets, share, strict=True))))
    return found


def _different(groups: dict[str, list[EvalRow]], dataset: str) -> list[dict[str, Any]]:
    """Problems on which groups disagree most, with one answer of each."""
    every = {label: accuracy_by_problem(rows) for label, rows in groups.items()}
    rows = {
        label: {(row.id, row.question): row for row in reversed(rows)}
        for label, rows in groups.items()
    }
    gaps = {}
    for key in set.intersection(*map(set, every.values())):
        values = [one[key] for one in every.values()]
        gaps[key] = min(values) - max(values)
    found = []
    ahead: dict[str, list[Any]] = {
        label: [] for label in groups
    }  # in turn from where each is ahead
    for key in sorted((key for key in gaps if gaps[key]), key=lambda key: (gaps[key], key)):
        ahead[max(every, key=lambda label: every[label][key])].append(key)
    turns = [key for turn in zip_longest(*ahead.values()) for key in turn if key]
    for key in turns[:DIFFERENT]:
        shown = {label: rows[label][key].samples[:1] for label in groups}
        answers = [
            {
                "group": label,
                "share": every[label][key],
                "sample": some[0].model_dump() if some else None,
            }
            for label, some in shown.items()
        ]
        gold = next(iter(rows.values()))[key].answer
        found.append(
            {"dataset": dataset, "id": key[0], "question": key[1], "gold": gold, "answers": answers}
        )
    return found
