"""Runs side by side: one table, paired tests on the same problems, and a page of the report's kind.

Runs that differ only in their seed form one group: a problem's score in a group is its mean over the group's
runs, so seeds make a problem's own score surer but never count as more problems. Nothing is graded again here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from kit import stats
from kit.config import flat
from kit.errors import KitError
from kit.metrics import Files, numbers
from kit.records import EvalRow, write_atomic
from kit.report import render, visible

DIFFERENT = 6  # problems shown on which runs disagree
Key = tuple[str, str]  # a problem: its id and its question


class Group:
    """Runs that differ only in their seed; `answers` of the trained models: {dataset: {problem: a row of each run}}."""

    def __init__(self, files: list[Files], label: str) -> None:
        self.files, self.label, self.answers = files, label, {}
        for run in files:
            scores = run.summary("eval").get("scores") or []
            last = {score["dataset"]: score for score in sorted(scores, key=lambda s: s["which"] == "after")}
            for dataset, score in last.items():
                rows = self.answers.setdefault(dataset, {})
                for row in run.answers(score):
                    rows.setdefault((row.id, row.question), []).append(row)

    def shares(self, dataset: str) -> dict[Key, float]:
        """Share of right samples of each problem, over all runs of the group that answered it."""
        rows = self.answers.get(dataset, {})
        return {key: mean(_share(row) for row in found) for key, found in rows.items()}

    def score(self, dataset: str) -> dict[str, Any]:
        """Mean accuracy with its interval over problems, and the spread (standard deviation) over seeds."""
        means = list(self.shares(dataset).values())
        rows = list(self.answers.get(dataset, {}).values())
        runs = [mean(_share(found[i]) for found in rows) for i in range(min(map(len, rows), default=0))]
        low, high = stats.interval(means, mean(sum(max(len(r.samples), 1) for r in found) for found in rows))
        spread = stdev(runs) if len(runs) > 1 else None
        found = {"group": self.label, "dataset": dataset, "runs": len(self.files), "n": len(means)}
        return {**found, "accuracy": mean(means), "low": low, "high": high, "by_run": runs, "spread": spread}


def compare(folders: Sequence[Path], out: Path) -> dict[str, Any]:
    """Compare runs and write the page.

    Args:
        folders: run folders, two or more.
        out: the page's file.

    Returns:
        runs (each one's numbers), groups (label, folders, seeds), scores of groups, pairs (b against a on the same
        problems, the fields of `stats.Comparison`), cuts (judges on the same traces), differs {config key: values},
        different (problems on which groups disagree), page.

    Raises:
        KitError: fewer than two folders, or one without a run.
    """
    if len(folders) < 2:
        raise KitError("compare needs two runs or more.", "Name their folders: palign.py compare runs/a runs/b.", 2)
    files = [Files(Path(folder)) for folder in folders]
    runs, settings = [numbers(run) for run in files], [flat(run.config) for run in files]
    groups = _groups(files, settings)
    datasets = list(dict.fromkeys(name for group in groups for name in group.answers))
    differs = {
        key: [flat_config.get(key) for flat_config in settings]
        for key in {k: 0 for s in settings for k in s if k not in ("name", "out")}
    }
    result: dict[str, Any] = {
        "runs": runs,
        "groups": [
            {
                "label": g.label,
                "folders": [str(f.folder) for f in g.files],
                "seeds": [f.config["seed"] for f in g.files],
            }
            for g in groups
        ],
        "scores": [group.score(name) for name in datasets for group in groups if group.answers.get(name)],
        "pairs": [pair for name in datasets for a, b in combinations(groups, 2) if (pair := _pair(a, b, name))],
        "cuts": [cut for a, b in combinations(files, 2) if (cut := _cuts(a, b))],
        "differs": {key: values for key, values in differs.items() if len(set(map(repr, values))) > 1},
        "different": _different(groups, datasets),
        "page": str(out),
    }
    curves = [
        (run["name"], [(p["step"], p["loss"]) for p in f.log]) for run, f in zip(runs, files, strict=True) if f.log
    ]
    write_atomic(Path(out), render("compare.html.j2", found=result, curves=curves))
    return result


def show(result: dict[str, Any]) -> None:
    """Print the table of runs, the paired tests and where the page is."""
    from rich.console import Console
    from rich.table import Table

    runs = Table(box=None, padding=(0, 3, 0, 0))
    for name in ("run", "method", "seed", "rows", "kept", "loss", "before", "after", "n"):
        runs.add_column(name, justify="left" if name in ("run", "method") else "right")
    for run in result["runs"]:
        shares = [run["prefix_ratio_median"], run["accuracy_before"], run["accuracy_after"]]
        ratio, before, after = ("–" if value is None else f"{value:.1%}" for value in shares)
        loss = "–" if run["loss_last"] is None else f"{run['loss_last']:.3f}"
        facts = (run["seed"], run["train_rows"], ratio, loss, before, after, run["n_eval"] or "–")
        runs.add_row(visible(run["name"]), run["method"], *map(str, facts))
    Console().print(runs)
    for pair in result["pairs"]:
        told = f"{pair['difference']:+.1%} [{pair['low']:+.1%} to {pair['high']:+.1%}], p = {pair['p_value']:.3f}"
        Console().print(f"{pair['dataset']}: {pair['b']} against {pair['a']}: {told}, n = {pair['n']}", markup=False)
    Console().print(f"Page: {result['page']}", markup=False)


def _groups(files: list[Files], settings: list[dict[str, Any]]) -> list[Group]:
    """Runs by their config, seed and names aside; labelled by the method, or by the run's name where methods repeat."""
    found: dict[str, list[Files]] = {}
    for run, config in zip(files, settings, strict=True):
        steady = {k: v for k, v in config.items() if k not in ("seed", "name", "out", "stop_after")}
        found.setdefault(repr(sorted(steady.items())), []).append(run)
    methods = [members[0].config["method"] for members in found.values()]
    groups = []
    for members, method in zip(found.values(), methods, strict=True):
        name = method if methods.count(method) == 1 else members[0].config["name"]
        label = name if name not in [g.label for g in groups] else str(members[0].folder)
        groups.append(Group(members, label))
    return groups


def _share(row: EvalRow) -> float:
    return sum(sample.verdict == "correct" for sample in row.samples) / max(len(row.samples), 1)


def _pair(a: Group, b: Group, dataset: str) -> dict[str, Any] | None:
    """b against a on the problems that both answered."""
    first, second = a.shares(dataset), b.shares(dataset)
    both = [key for key in first if key in second]
    if not both:
        return None
    test = stats.compare([first[key] for key in both], [second[key] for key in both])
    return {"dataset": dataset, "a": a.label, "b": b.label, "n": len(both), **asdict(test)}


def _cuts(a: Files, b: Files) -> dict[str, Any] | None:
    """How two judges cut the same traces."""
    first = {(row.id, row.trace): row for row in a.prefixes if row.verdicts}
    both = [(first[row.id, row.trace], row) for row in b.prefixes if row.verdicts and (row.id, row.trace) in first]
    if not both or (a.config["judge"], a.config["method"]) == (b.config["judge"], b.config["method"]):
        return None
    found = {"a": a.config["name"], "b": b.config["name"], "traces": len(both)}
    found |= {"same_cut": sum(one.end == two.end for one, two in both)}
    return {**found, "median_a": median(x.ratio for x, _ in both), "median_b": median(y.ratio for _, y in both)}


def _different(groups: list[Group], datasets: list[str]) -> list[dict[str, Any]]:
    """Problems on which groups disagree most, with one answer of each."""
    found = []
    for name in datasets:
        holders = [group for group in groups if group.answers.get(name)]
        shares = [group.shares(name) for group in holders]
        for key in set.intersection(*(set(share) for share in shares)) if len(holders) > 1 else ():
            gap = max(share[key] for share in shares) - min(share[key] for share in shares)
            if gap:
                found.append((-gap, name, key, holders, [share[key] for share in shares]))
    found.sort(key=lambda item: item[:3])
    return [
        {
            "dataset": name,
            "id": key[0],
            "question": key[1],
            "gold": holders[0].answers[name][key][0].answer,
            "answers": [
                {
                    "group": g.label,
                    "share": s,
                    "text": r.samples[0].text if (r := g.answers[name][key][0]).samples else "",
                }
                for g, s in zip(holders, shares, strict=True)
            ],
        }
        for _, name, key, holders, shares in found[:DIFFERENT]
    ]
