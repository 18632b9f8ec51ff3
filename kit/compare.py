"""Runs side by side: one table, paired tests on the same problems, and a page of the report's kind.

Runs that differ only in their seed form one group: a problem's score in a group is its mean over the group's
runs, so seeds make a problem's own score surer but never count as more problems. Nothing is graded again here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from kit import stats
from kit.config import flat
from kit.errors import KitError
from kit.evaluate import file_name, shares
from kit.metrics import Files, numbers
from kit.records import EvalRow, write_atomic
from kit.report import render

DIFFERENT = 6  # problems shown on which runs disagree
NAMES = {"name", "out", "stop_after"}  # keys that change no number


class Group:
    """Runs that differ only in their seed; `answers` of the trained models: {dataset: {problem: a row of each run}}."""

    def __init__(self, files: list[Files], label: str) -> None:
        self.files, self.label, self.answers = files, label, {}
        for run in files:
            scores = sorted(run.told["eval"].get("scores") or [], key=lambda score: score["which"] == "after")
            for name, last in {score["dataset"]: score for score in scores}.items():
                for row in run.rows(file_name(last["model"], last["which"], name), EvalRow):
                    problem = (row.id, row.question)  # the same id with another question is another problem
                    self.answers.setdefault(name, {}).setdefault(problem, []).append(row)

    def shares(self, dataset: str) -> dict[tuple[str, str], float]:
        """Share of right samples of each problem, over all runs of the group that answered it."""
        return {problem: mean(shares(rows)) for problem, rows in self.answers.get(dataset, {}).items()}

    def score(self, dataset: str) -> dict[str, Any]:
        """Mean accuracy with its interval over problems; `spread` is the standard deviation over seeds."""
        problems, means = self.answers[dataset].values(), list(self.shares(dataset).values())
        by_run = [mean(shares(rows)) for rows in zip(*problems, strict=False)]
        low, high = stats.interval(means, mean(sum(max(len(row.samples), 1) for row in rows) for rows in problems))
        found = {"group": self.label, "dataset": dataset, "runs": len(self.files), "n": len(means), "by_run": by_run}
        spread = stdev(by_run) if len(by_run) > 1 else None
        return {**found, "accuracy": mean(means), "low": low, "high": high, "spread": spread}


def compare(folders: Sequence[Path], out: Path, judge: Callable[..., Any] | None = None) -> dict[str, Any]:
    """Compare runs and write the page `out`.

    Args:
        judge: compares two groups' answers by their reasoning (`kit.quality`); asked of the first two groups.

    Returns:
        runs (numbers), groups, scores (of groups), pairs (b against a), cuts (two judges on the same traces), differs
        {config key: values}, different (problems on which groups disagree), quality {dataset: judged}, page.

    Raises:
        KitError: fewer than two folders, or one without a run.
    """
    if len(folders) < 2:
        raise KitError("compare needs two runs or more.", "Name their folders: palign.py compare runs/a runs/b.", 2)
    files = [Files(Path(folder)) for folder in folders]
    groups, settings = _groups(files), [flat(run.config) for run in files]
    found: dict[str, Any] = {"runs": [numbers(run) for run in files], "page": str(out)}
    found["groups"] = [{"label": g.label, "seeds": [run.config["seed"] for run in g.files]} for g in groups]
    found |= {"scores": [], "pairs": [], "different": [], "quality": {}}
    for name in dict.fromkeys(name for group in groups for name in group.answers):
        some = [group for group in groups if name in group.answers]
        found["scores"] += [group.score(name) for group in some]
        found["pairs"] += [pair for a, b in combinations(some, 2) for pair in _pair(a, b, name)]
        found["different"] += _different(some, name)
        if judge and len(some) > 1:
            first, second = ([rows[0] for rows in group.answers[name].values()] for group in some[:2])
            found["quality"][name] = {"a": some[0].label, "b": some[1].label, **judge(first, second)}
    found["cuts"] = [cut for a, b in combinations(files, 2) for cut in _cuts(a, b)]
    keys = {key: 0 for one in settings for key in one if key not in NAMES}
    values = {key: [one.get(key) for one in settings] for key in keys}
    found["differs"] = {key: row for key, row in values.items() if any(value != row[0] for value in row)}
    curves = [(f.config["name"], [(line["step"], line["loss"]) for line in f.log]) for f in files if f.log]
    write_atomic(Path(out), render("compare.html.j2", found=found, curves=curves))
    return found


def show(found: dict[str, Any]) -> None:
    """Print the table of runs, the paired tests and where the page is."""
    print(render("compare.txt.j2", found=found))


def _groups(files: list[Files]) -> list[Group]:
    """Runs by their config, seed and names aside; labelled by the method, and by a run's name where methods repeat."""
    found: dict[str, list[Files]] = {}
    for run in files:
        steady = {key: value for key, value in flat(run.config).items() if key not in NAMES | {"seed"}}
        found.setdefault(repr(steady), []).append(run)
    methods = [runs[0].config["method"] for runs in found.values()]
    return [
        Group(runs, method if methods.count(method) == 1 else f"{method} ({runs[0].config['name']})")
        for method, runs in zip(methods, found.values(), strict=True)
    ]


def _pair(a: Group, b: Group, dataset: str) -> list[dict[str, Any]]:
    """b against a on the problems that both answered; nothing without any."""
    first, second = a.shares(dataset), b.shares(dataset)
    if not (both := [key for key in first if key in second]):
        return []
    test = stats.compare([first[key] for key in both], [second[key] for key in both])
    return [{"dataset": dataset, "a": a.label, "b": b.label, "n": len(both), **asdict(test)}]


def _cuts(a: Files, b: Files) -> list[dict[str, Any]]:
    """How two different judges cut the same traces; nothing without any."""
    first = {(row.id, row.trace): row for row in a.prefixes if row.verdicts}
    both = [(first[row.id, row.trace], row) for row in b.prefixes if row.verdicts and (row.id, row.trace) in first]
    if not both or a.config["judge"] == b.config["judge"]:
        return []
    found = {"a": a.config["name"], "b": b.config["name"], "traces": len(both)}
    found |= {"median_a": median(one.ratio for one, _ in both), "median_b": median(two.ratio for _, two in both)}
    return [{**found, "same_cut": sum(one.end == two.end for one, two in both)}]


def _different(groups: list[Group], dataset: str) -> list[dict[str, Any]]:
    """Problems on which groups disagree most, with one answer of each."""
    every = {group.label: group.shares(dataset) for group in groups}
    both = set.intersection(*map(set, every.values()))
    gaps = {key: max(one[key] for one in every.values()) - min(one[key] for one in every.values()) for key in both}
    found = []
    for key in sorted((key for key in both if gaps[key]), key=lambda key: (-gaps[key], key))[:DIFFERENT]:
        rows = [(group.label, every[group.label][key], group.answers[dataset][key][0]) for group in groups]
        texts = [{"group": g, "share": s, "text": r.samples[0].text if r.samples else ""} for g, s, r in rows]
        facts = {"dataset": dataset, "id": key[0], "question": key[1], "gold": rows[0][2].answer}
        found.append({**facts, "answers": texts})
    return found
