"""The numbers of a run, read from its folder: what the report, the terminal's table and `compare` show.

Every share comes with what it is a share of. Nothing is written and no row is mended here, so a run in
progress can be looked at; what it has not reached yet is None or empty. The diagnosis applies the rules of
templates/findings.yaml, which hold its thresholds, sentences and advice.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from kit.core.config import STAGES
from kit.core.errors import KitError
from kit.core.records import AlignedRow, PrefixRow, Row, TraceRow
from kit.core.run import check_format
from kit.core.storage import RowFile

RULES = Path(__file__).parent / "templates" / "findings.yaml"
NEARLY_ALL, FEW = (
    0.9,
    4,
)  # a share, and traces (or sentences of one) below which nothing is said of a judge
PARTS = ("what", "evidence", "try")  # of a finding
PAPER_RETENTION = 0.966  # 966 of 1,000 released rows


class Files:
    """A run folder's content, read once and left as it is. Raises KitError where there is no run."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.damaged = folder, []
        try:
            self.manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            self.config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise KitError(
                f"{folder} holds no run that can be read ({error}).", "Name a folder under runs/."
            ) from None
        check_format(folder, self.manifest)
        self.stages = {
            name: entry for name in STAGES[:-1] if (entry := self.manifest["stages"].get(name))
        }
        self.told: dict[str, Any] = {
            name: self.stages.get(name, {}).get("summary", {}) for name in STAGES
        }
        self.traces = self.rows("traces.jsonl", TraceRow)
        self.prefixes = self.rows("prefixes.jsonl", PrefixRow)
        self.aligned = self.rows("aligned.jsonl", AlignedRow)
        self.train, self.log = self._lines("train.jsonl"), self._lines("train_log.jsonl")

    def rows(self, name: str, kind: type[Row]) -> list[Any]:
        """A stage file's sound rows; damaged lines are named in `damaged` and stay where they are."""
        file = RowFile(self.folder / name, kind)
        rows = file.read(repair=False)
        self.damaged += file.damaged
        return rows

    def _lines(self, name: str) -> list[dict[str, Any]]:
        path = self.folder / name
        try:
            return (
                [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
                if path.exists()
                else []
            )
        except ValueError:
            self.damaged.append(f"{name}: cut off or not JSON")
            return []


def numbers(files: Files) -> dict[str, Any]:
    """All numbers of a run that may have stopped after any stage: ratios in [0, 1], lengths in characters."""
    told, log, cut = files.told, files.log, [row for row in files.prefixes if not row.rejected]
    scores = told["eval"].get("scores") or []
    first = {
        score["which"]: score["accuracy"]
        for score in scores
        if score["dataset"] == scores[0]["dataset"]
    }
    labels = Counter(verdict.label for row in cut for verdict in row.verdicts)
    entry, ratios = (
        ("rows_in", "rows_out", "seconds", "done"),
        percentiles([row.ratio for row in cut]),
    )
    found = {key: files.config[key] for key in ("name", "method", "seed")} | {
        "folder": str(files.folder)
    }
    found["stages"] = [
        {"name": name, **{key: e.get(key) for key in entry}} for name, e in files.stages.items()
    ]
    found |= {"accuracy_before": first.get("base"), "accuracy_after": first.get("tuned")}
    found |= {"n_eval": scores[0]["n"] if scores else None, "scores": scores}
    found |= {"comparisons": told["eval"].get("comparisons") or [], "train": told["train"]}
    found |= {
        "loss_first": log[0]["loss"] if log else None,
        "loss_last": log[-1]["loss"] if log else None,
    }
    found |= {"prefix_ratio": ratios, "prefix_ratio_median": ratios["p50"]}
    found |= {"verdicts_asked": labels.total(), "verdicts_unparsed": labels["UNPARSED"]}
    found |= {
        key: sum(getattr(row, key) for row in cut) for key in ("prefill_tokens", "cached_tokens")
    }
    found |= {"judged_traces": sum(bool(row.verdicts) for row in cut)}
    found |= {"insufficient_traces": sum(not row.sufficient for row in cut)}
    found |= {"violating_traces": sum(row.violations > 0 for row in cut)}
    found |= {
        "degenerate": told["truncate"].get("degenerate"),
        "notes": told["truncate"].get("notes") or [],
    }
    held = files.manifest.get("data", {}).get("evals", {}).items()
    found["near_duplicates"] = [
        {"dataset": k, "n": v.get("near_duplicates", 0), "of": v["rows"]} for k, v in held
    ]
    found |= {**_rows(files), "damaged": files.damaged}
    return {**found, "findings": findings(found, files.config)}


def findings(found: dict[str, Any], config: dict[str, Any]) -> list[dict[str, str]]:
    """What a reader should notice by the rules of findings.yaml, as {level: warning | note, what, evidence, try},
    warnings first."""
    from jinja2 import Environment

    texts, spoken = Environment(), []  # noqa: S701 (plain text; the page escapes it)
    texts.filters["share"] = lambda part, of: (
        f"{part:,} of {of:,}" + (f" ({part / of:.0%})" if of else "")
    )
    texts.filters["percent"] = percent
    for rule in yaml.safe_load(RULES.read_text(encoding="utf-8")):
        for item in found[rule["each"]] if "each" in rule else [None]:
            fields = {**found, "config": config, "item": item}
            if texts.compile_expression(rule["when"])(fields):
                parts = [
                    texts.from_string(rule.get(key, "")).render(fields).strip() for key in PARTS
                ]
                spoken.append({"level": rule["level"], **dict(zip(PARTS, parts, strict=True))})
    return sorted(spoken, key=lambda finding: finding["level"] != "warning")


def percent(value: float | None, digits: int = 1, sign: str = "") -> str:
    """A share as per cent; a dash for none."""
    return "–" if value is None else f"{value:{sign}.{digits}%}"


def percentiles(values: Sequence[float]) -> dict[str, float | int | None]:
    """{p10, p50, p90, n}, linear between neighbours; None without values."""
    import numpy as np

    p10, p50, p90 = (
        (round(float(v), 4) for v in np.percentile(values, (10, 50, 90))) if values else (None,) * 3
    )
    return {"p10": p10, "p50": p50, "p90": p90, "n": len(values)}


def _rows(files: Files) -> dict[str, Any]:
    """Rows lost and kept, their lengths, and what became of the samples they were made from."""
    stages = {
        "teach": files.traces,
        "truncate": files.prefixes,
        "align": files.aligned,
        "train": files.train,
    }
    lost = Counter(("data", row["reason"]) for row in files.manifest.get("rejected", ()))
    lost.update((name, row.rejected) for name in STAGES[:3] for row in stages[name] if row.rejected)
    lost.update(
        {
            ("train", why): len(names)
            for why, names in (files.told["train"].get("dropped") or {}).items()
        }
    )
    of = {name: len(rows) for name, rows in stages.items()}
    kept = [row for row in files.aligned if not row.rejected]
    texts = [(len(row.prefix), len(row.continuation)) for row in kept]
    lengths = {"prefix_characters": [prefix for prefix, _ in texts]}
    lengths["continuation_characters"] = [continuation for _, continuation in texts if continuation]
    lengths["prefix_share"] = [
        prefix / (prefix + continuation) for prefix, continuation in texts if continuation
    ]
    traces = of["truncate"] or sum(len(row.kept) for row in files.traces)
    ratio = len(kept) / traces if traces and files.aligned else None
    return {
        "rejections": [
            {"stage": s, "reason": why, "rows": n, "of": of.get(s)} for (s, why), n in lost.items()
        ],
        "train_rows": of["train"],
        "retention": {"rows": len(kept), "of": traces, "ratio": ratio, "paper": PAPER_RETENTION},
        "lengths": {name: percentiles(values) for name, values in lengths.items()},
        "samples": {stage: _tally(stages[stage]) for stage in ("teach", "align")},
        "answer_in_prefix": sum(row.answer_in_prefix for row in kept),
    }


def _tally(rows: Sequence[Any]) -> dict[str, Any]:
    """Samples by verdict, and how many ended at the token limit."""
    samples = [sample for row in rows for sample in row.samples]
    capped = [sample.verdict == "correct" for sample in samples if sample.finish_reason == "length"]
    found = {
        "samples": len(samples),
        "verdicts": dict(Counter(sample.verdict for sample in samples)),
    }
    found |= {"truncated": len(capped), "truncated_not_correct": capped.count(False)}
    return found | {"tokens": sum(sample.tokens for sample in samples)}


def degenerate(rows: Sequence[PrefixRow]) -> str | None:
    """Whether a judge is degenerate, in words with the evidence and what to try; None: no sign of it."""
    judged = [row for row in rows if row.verdicts and row.sentences_total >= FEW]
    short = sum(row.sentences == 1 for row in judged)
    long = sum(row.sentences == row.sentences_total for row in judged)
    if len(judged) < FEW or max(short, long) < NEARLY_ALL * len(judged):
        return None
    labels = Counter(verdict.label for row in judged for verdict in row.verdicts)
    margins = [v.margin for row in judged for v in row.verdicts if v.margin is not None]
    [(label, most)] = labels.most_common(1)
    between = f", margins from {min(margins):+.2f} to {max(margins):+.2f}" if margins else ""
    return (
        f"The judge hardly tells one prefix from another: {max(short, long)} of {len(judged)} traces were "
        f"{'cut to one sentence' if short >= long else 'kept whole'}, {most} of {labels.total()} verdicts are {label}"
        f"{between}. Try judge.kind=answer, judge.calibration=content-free or share, or a stronger student."
    )
