"""Runs side by side: one table, paired tests on the same problems, and a page of the report's kind.

Runs that differ only in their seed form one group: a problem's score in a group is its mean over the group's
runs, so seeds make a problem's own score surer but never count as more problems. Nothing is graded again here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, combinations
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from kit.config import flat
from kit.errors import KitError
from kit.evaluate import accuracy, compare_rows, file_name, shares
from kit.metrics import Files, numbers
from kit.records import EvalRow, write_atomic
from kit.report import render

DIFFERENT = 6  # problems shown on which runs disagree
NAMES = {"name", "out", "stop_after"}  # keys that change no number


def compare(folders: Sequence[Path], out: Path, judge: Callable[..., Any] | None = None) -> dict[str, Any]:
    """Compare runs and write the page `out`.

    Args:
        judge: compares two runs' eval rows by their reasoning (`kit.quality`); asked of the first two groups.

    Returns:
        runs (numbers), groups, scores (of groups), pairs (b against a), cuts (two judges on the same traces), differs
        {config key: values}, different (problems on which groups disagree), quality {dataset: judged}, page.

    Raises:
        KitError: fewer than two folders, or one without a run.
    """
    if len(folders) < 2:
        raise KitError("compare needs two runs or more.", "Name their folders: palign.py compare runs/a runs/b.", 2)
    files = [Files(Path(folder)) for folder in folders]
    settings, labelled = [flat(run.config) for run in files], _groups(files)
    found: dict[str, Any] = {"runs": [numbers(run) for run in files], "page": str(out)}
    found["groups"] = [{"label": label, "seeds": [run.config["seed"] for run in runs]} for label, runs in labelled]
    found |= {"scores": [], "pairs": [], "different": [], "quality": {}}
    answers = {label: _answers(runs) for label, runs in labelled}
    for name in dict.fromkeys(name for of in answers.values() for name in of):
        groups = {label: of[name] for label, of in answers.items() if name in of}
        pooled = {label: list(chain.from_iterable(runs)) for label, runs in groups.items()}
        found["scores"] += [{"group": label, "dataset": name, **_score(runs)} for label, runs in groups.items()]
        for (a, first), (b, second) in combinations(pooled.items(), 2):
            test = compare_rows(first, second)
            found["pairs"] += [{"dataset": name, "a": a, "b": b, **test}] if test["n"] else []
        found["different"] += _different(pooled, name)
        if judge and len(groups) > 1:
            (a, first), (b, second) = list(groups.items())[:2]
            found["quality"][name] = {"a": a, "b": b, **judge(first[0], second[0])}
    found["cuts"] = [cut for a, b in combinations(files, 2) for cut in _cuts(a, b)]
    values = {key: [one.get(key) for one in settings] for one in settings for key in one if key not in NAMES}
    found["differs"] = {key: row for key, row in values.items() if any(value != row[0] for value in row)}
    curves = [(run.config["name"], [(line["step"], line["loss"]) for line in run.log]) for run in files if run.log]
    write_atomic(Path(out), render("compare.html.j2", found=found, curves=curves))
    return found


def show(found: dict[str, Any]) -> None:
    """Print what was found for a person."""
    print(render("compare.txt.j2", found=found))


def _groups(files: list[Files]) -> list[tuple[str, list[Files]]]:
    """Runs by their config, seed and names aside; labelled by the method, and by a run's name where methods repeat."""
    found: dict[str, list[Files]] = {}
    for run in files:
        steady = {key: value for key, value in flat(run.config).items() if key not in NAMES | {"seed"}}
        found.setdefault(repr(steady), []).append(run)
    methods = [runs[0].config["method"] for runs in found.values()]
    names = [runs[0].config["name"] for runs in found.values()]
    labels = [m if methods.count(m) == 1 else f"{m} ({name})" for m, name in zip(methods, names, strict=True)]
    return list(zip(labels, found.values(), strict=True))


def _answers(runs: list[Files]) -> dict[str, list[list[EvalRow]]]:
    """What each run's last model (the trained one, where there is one) answered, by data."""
    found: dict[str, list[list[EvalRow]]] = {}
    for run in runs:
        last = {score["dataset"]: score for score in run.told["eval"].get("scores") or []}  # before stands before after
        for name, score in last.items():
            if rows := run.rows(file_name(score["model"], score["which"], name), EvalRow):
                found.setdefault(name, []).append(rows)
    return found


def _score(runs: list[list[EvalRow]]) -> dict[str, Any]:
    """Accuracy over the runs' problems; `spread` is the standard deviation of the runs' own."""
    by_run = [mean(shares(rows).values()) for rows in runs]
    spread = stdev(by_run) if len(by_run) > 1 else None
    return {"runs": len(runs), "by_run": by_run, "spread": spread, **accuracy(list(chain.from_iterable(runs)))}


def _cuts(a: Files, b: Files) -> list[dict[str, Any]]:
    """How two different judges cut the same traces; nothing without any."""
    first = {(row.id, row.trace): row for row in a.prefixes if row.verdicts}
    both = [(first[row.id, row.trace], row) for row in b.prefixes if row.verdicts and (row.id, row.trace) in first]
    if not both or a.config["judge"] == b.config["judge"]:
        return []
    found = {"a": a.config["name"], "b": b.config["name"], "traces": len(both)}
    found |= {"median_a": median(one.ratio for one, _ in both), "median_b": median(two.ratio for _, two in both)}
    return [{**found, "same_cut": sum(one.end == two.end for one, two in both)}]


def _different(groups: dict[str, list[EvalRow]], dataset: str) -> list[dict[str, Any]]:
    """Problems on which groups disagree most, with one answer of each."""
    every = {label: shares(rows) for label, rows in groups.items()}
    both = set.intersection(*(set(one) for one in every.values()))
    gaps = {key: max(one[key] for one in every.values()) - min(one[key] for one in every.values()) for key in both}
    found = []
    for key in sorted((key for key in both if gaps[key]), key=lambda key: (-gaps[key], key))[:DIFFERENT]:
        rows = {label: next(row for row in rows if (row.id, row.question) == key) for label, rows in groups.items()}
        answers = [
            {"group": label, "share": every[label][key], "text": row.samples[0].text if row.samples else ""}
            for label, row in rows.items()
        ]
        gold = next(iter(rows.values())).answer
        found.append({"dataset": dataset, "id": key[0], "question": key[1], "gold": gold, "answers": answers})
    return found
