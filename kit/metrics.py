"""The numbers of a run, read from its folder: what the report, the terminal's table and `compare` show.

Every share comes with what it is a share of. Nothing is written and no row is mended here, so a run in
progress can be looked at; what it has not reached yet is None or empty. The diagnosis applies the rules of
configs/findings.yaml, which hold its thresholds, sentences and advice.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from kit.config import STAGES
from kit.errors import KitError
from kit.records import AlignedRow, EvalRow, PrefixRow, Row, RowFile, TraceRow

RULES = Path(__file__).parents[1] / "configs" / "findings.yaml"
PAPER = {  # retention: 966 of 1,000 released rows; lengths: percentiles 10, 50, 90 of these
    "retention": 0.966,
    "prefix_characters": (875, 1538, 5450),
    "continuation_characters": (2612, 4791, 9550),
    "prefix_share": (None, 0.254, None),
}


class Files:
    """A run folder's content, read once and left as it is. Raises KitError where there is no run."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.damaged = folder, []
        try:
            self.manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            self.config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise KitError(f"{folder} holds no run that can be read ({error}).", "Name a folder under runs/.") from None
        self.stages: dict[str, dict[str, Any]] = self.manifest.get("stages", {})
        self.traces = self.rows("traces.jsonl", TraceRow)
        self.prefixes = self.rows("prefixes.jsonl", PrefixRow)
        self.aligned = self.rows("aligned.jsonl", AlignedRow)
        self.train, self.log = self._lines("train.jsonl"), self._lines("train_log.jsonl")

    def rows(self, name: str, kind: type[Row]) -> list[Any]:
        """A stage file's sound rows; damaged lines are named in `damaged` and stay where they are."""
        file = RowFile(self.folder / name, kind)
        rows = file.read(mend=False)
        self.damaged += file.damaged
        return rows

    def answers(self, score: dict[str, Any]) -> list[EvalRow]:
        """The graded answers behind a score."""
        from kit.evaluate import file_name

        return self.rows(file_name(score["model"], score["which"], score["dataset"]), EvalRow)

    def summary(self, stage: str) -> dict[str, Any]:
        """What a finished stage said of itself."""
        return self.stages.get(stage, {}).get("summary", {})

    def _lines(self, name: str) -> list[dict[str, Any]]:
        path, found = self.folder / name, []
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n") if path.exists() else (), 1):
            try:
                found += [json.loads(line)] if line.strip() else []
            except ValueError:
                self.damaged.append(f"{name} line {number}: cut off or not JSON")
        return found


def collect(folder: Path) -> dict[str, Any]:
    """All numbers of a run, which may have stopped after any stage.

    Returns:
        A JSON-able mapping; ratios in [0, 1], lengths in characters.

    Raises:
        KitError: there is no run in the folder.
    """
    return numbers(Files(Path(folder)))


def numbers(files: Files) -> dict[str, Any]:
    """As `collect`, from files already read."""
    config, train = files.config, files.summary("train")
    scores, comparisons = (files.summary("eval").get(name) or [] for name in ("scores", "comparisons"))
    first = {score["which"]: score for score in scores if score["dataset"] == scores[0]["dataset"]}
    before, after = first.get("before", {}), first.get("after", {})
    stages = [(name, files.stages[name]) for name in STAGES[:-1] if name in files.stages]
    found = {
        "name": config["name"],
        "folder": str(files.folder),
        "method": config["method"],
        "seed": config["seed"],
        "stages": [
            {"name": name, **{k: entry.get(k) for k in ("rows_in", "rows_out", "seconds")}, "done": entry["done"]}
            for name, entry in stages
        ],
        **_judging(files),
        **_rows(files),
        "loss_first": files.log[0]["loss"] if files.log else None,
        "loss_last": files.log[-1]["loss"] if files.log else None,
        "train": train,
        "accuracy_before": before.get("accuracy"),
        "accuracy_after": after.get("accuracy"),
        "n_eval": (after or before).get("n"),
        "scores": scores,
        "comparisons": comparisons,
        "damaged": files.damaged,
        "notes": files.summary("truncate").get("notes") or [],
    }
    return {**found, "findings": findings(found, config)}


def findings(found: dict[str, Any], config: dict[str, Any]) -> list[dict[str, str]]:
    """What a reader should notice, as {level: warning | note, what, evidence, try}, warnings first.

    A rule of configs/findings.yaml speaks where its `when` holds: once for the run, or for each item of `each`.
    """
    from jinja2 import Environment

    page, spoken = Environment(autoescape=False), []  # noqa: S701 (plain text; the page escapes it)
    page.filters |= {"share": lambda part, of: f"{part:,} of {of:,}" + (f" ({part / of:.0%})" if of else "")}
    page.filters |= {"percent": lambda value, digits=1, sign="": f"{value:{sign}.{digits}%}"}
    for rule in yaml.safe_load(RULES.read_text(encoding="utf-8")):
        for item in found[rule["each"]] if "each" in rule else [None]:
            fields = {**found, "config": config, "item": item}
            if page.compile_expression(rule["when"])(fields):
                texts = {
                    k: page.from_string(rule.get(k, "")).render(fields).strip() for k in ("what", "evidence", "try")
                }
                spoken.append({"level": rule["level"], **texts})
    return sorted(spoken, key=lambda finding: finding["level"] != "warning")


def percentiles(values: Sequence[float]) -> dict[str, float | int | None]:
    """{p10, p50, p90, n}, linear between neighbours; None without values."""
    import numpy as np

    found = [round(float(v), 4) for v in np.percentile(values, (10, 50, 90))] if values else (None, None, None)
    return {**dict(zip(("p10", "p50", "p90"), found, strict=True)), "n": len(values)}


def _judging(files: Files) -> dict[str, Any]:
    """Where traces were cut, and what asking cost."""
    cut = [row for row in files.prefixes if not row.rejected]
    ratio, told = percentiles([row.ratio for row in cut]), files.summary("truncate")
    return {
        "prefix_ratio_median": ratio["p50"],
        "prefix_ratio": ratio,
        "verdicts_asked": sum(len(row.verdicts) for row in cut),
        "verdicts_unparsed": sum(v.label == "UNPARSED" for row in cut for v in row.verdicts),
        "judged_traces": sum(bool(row.verdicts) for row in cut),
        "insufficient_traces": sum(not row.sufficient for row in cut),
        "violating_traces": sum(row.violations > 0 for row in cut),
        "evaluated_tokens": sum(row.evaluated_tokens for row in cut),
        "reused_tokens": sum(row.reused_tokens for row in cut),
        "degenerate": told.get("degenerate"),
    }


def _rows(files: Files) -> dict[str, Any]:
    """Rows lost and kept, their lengths, and what became of the samples they were made from."""
    kept = [row for row in files.aligned if not row.rejected]
    continued = [row for row in kept if row.continuation]
    traces = len(files.prefixes) or sum(len(row.kept) for row in files.traces)
    lost = Counter(("data", row.get("reason", "")) for row in files.manifest.get("rejected", ()))
    stages = {"teach": files.traces, "truncate": files.prefixes, "align": files.aligned}
    lost.update((stage, row.rejected) for stage, rows in stages.items() for row in rows if row.rejected)
    lost.update({("train", why): len(names) for why, names in (files.summary("train").get("dropped") or {}).items()})
    entered = {"train": len(files.train), **{stage: len(rows) for stage, rows in stages.items()}}
    lengths = {
        "prefix_characters": [len(row.prefix) for row in kept],
        "continuation_characters": [len(row.continuation) for row in continued],
        "prefix_share": [len(row.prefix) / len(row.prefix + row.continuation) for row in continued],
    }
    return {
        "rejections": [{"stage": s, "reason": why, "rows": n, "of": entered.get(s)} for (s, why), n in lost.items()],
        "train_rows": len(files.train),
        "retention": {
            "rows": len(kept),
            "of": traces,
            "ratio": len(kept) / traces if traces and files.aligned else None,
            "paper": PAPER["retention"],
        },
        "lengths": {name: {**percentiles(values), "paper": PAPER[name]} for name, values in lengths.items()},
        "samples": {stage: _tally(stages[stage]) for stage in ("teach", "align")},
        "answer_in_prefix": sum(row.answer_in_prefix for row in kept),
    }


def _tally(rows: Sequence[Any]) -> dict[str, Any]:
    """Samples by verdict, and how many ended at the token limit or in a loop."""
    samples = [sample for row in rows for sample in row.samples]
    capped = Counter(sample.verdict == "correct" for sample in samples if sample.finish == "length")
    return {
        "samples": len(samples),
        "verdicts": dict(Counter(sample.verdict for sample in samples)),
        "cap_hits": capped.total(),
        "cap_hits_not_right": capped[False],
        "loops": sum(sample.finish == "loop" for sample in samples),
        "tokens": sum(sample.tokens for sample in samples),
    }
