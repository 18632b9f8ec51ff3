"""The numbers of a run, read from its folder, for metrics.json, the report and `compare`.

Every ratio comes with its denominator. Nothing is written and no row is fixed here, so a run in
progress can be read; what it has not reached yet is None or empty. The diagnosis applies the rules
of templates/findings.yaml, which hold its thresholds, sentences and advice.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment

from kit import Json
from kit.core.config import Config, load
from kit.core.errors import KitError
from kit.core.records import AlignedRow, EvalRow, PrefixRow, Row, TraceRow
from kit.core.run import other_config, read_manifest
from kit.core.stages import STAGES, STUDENTS_ADAPTER, file_name
from kit.core.storage import RowFile
from kit.grading.scores import compare_rows
from kit.judging.sentences import ends

RULES = Path(__file__).parent / "templates" / "findings.yaml"
STAGE_KEYS = ("rows_in", "rows_out", "seconds", "done")
PAPER_RETENTION = 0.966  # 966 of 1,000 released rows
DEGENERATE_RATIO = 0.9  # of the traces cut alike, from which a judge is called degenerate
MIN_JUDGED = 4  # traces, and sentences of one, that such a judgement needs


class Files:
    """A run folder's content, read once and left as it is.

    Raises:
        KitError: the folder holds no run.
    """

    def __init__(self, folder: Path, config: Config | None = None) -> None:
        self.folder = folder
        self.damaged: list[str] = []
        self.manifest = read_manifest(folder)
        if not self.manifest:
            raise KitError(f"{folder} holds no run.", "Name a folder under runs/.")
        self.resolved = load(folder / "config.yaml")
        self.config = self.resolved.model_dump(mode="json")
        own = self.resolved.student.adapter
        if config and own:
            # a round's, which is known by its content: the folder may have moved
            student = config.student.model_copy(update={"adapter": own})
            config = config.model_copy(update={"student": student})
        stages = self._current(config or self.resolved)
        outdated = self.manifest["stages"].keys() - stages
        self.manifest["stages"] = stages
        self.traces = self.rows("traces.jsonl", TraceRow) if "teach" not in outdated else []
        self.prefixes = self.rows("prefixes.jsonl", PrefixRow) if "truncate" not in outdated else []
        self.aligned = self.rows("aligned.jsonl", AlignedRow) if "align" not in outdated else []
        self.train = self._lines("train.jsonl") if "align" not in outdated else []
        self.log = self._lines("train_log.jsonl") if "train" not in outdated else []
        self.rejected = self._lines("rejected.jsonl")

    def rows(self, name: str, kind: type[Row]) -> list[Any]:
        """A stage file's valid rows; damaged lines are named in `damaged` and left in place."""
        file = RowFile(self.folder / name, kind)
        rows = file.read(repair=False)
        self.damaged += file.damaged
        return rows

    def _current(self, config: Config) -> Json:
        """The stages that still count: of this config, on rows that were not made anew since."""
        current = {}
        for name in STAGES:
            entry = self.entry(name)
            if entry.get("keys") and other_config(name, entry, config):
                break
            if entry and not entry.get("is_outdated"):
                current[name] = entry
        return current

    def entry(self, stage: str) -> Json:
        """What the manifest says of a stage; empty before it."""
        return self.manifest["stages"].get(stage, {})

    def summary(self, stage: str) -> Json:
        """What a stage reported when it finished; empty before."""
        return self.entry(stage).get("summary", {})

    def keys(self, stage: str) -> Json:
        """What a stage's rows depend on: config keys and fingerprints; empty before it."""
        return self.entry(stage).get("keys", {})

    @property
    def teacher(self) -> str:
        """What the traces come from: a file, a model, or `reference` (the problems' solutions)."""
        teacher = self.config["teacher"]
        source = "backend" if teacher["backend"] == "reference" else "model"
        return teacher["path"] or teacher[source]

    def _lines(self, name: str) -> list[Json]:
        path = self.folder / name
        if not path.exists():
            return []
        try:
            return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
        except ValueError:
            self.damaged.append(f"{name}: cut off or not JSON")
            return []


def numbers(files: Files) -> Json:
    """The content of metrics.json, of a run that may have stopped after any stage.

    Returns:
        name, method, seed, folder; stages [{name, rows_in, rows_out, seconds, done}]
        accuracy_before, accuracy_after, n_eval: of the first evaluation dataset
        scores [{model, dataset, which, and a `Score`}]; comparisons [{dataset, a, b, and a
            `PairedTest`}]; near_duplicates [{dataset, n, of}]
        train: the stage's own summary; loss_first, loss_last; train_rows
        prefix_ratio {p10, p50, p90, n} and prefix_ratio_median: kept share of the sentences
        verdicts_asked, verdicts_unparsed, prefill_tokens, cached_tokens, generated_tokens: of all
            judging
        isolated_traces {rows, of}: cut before a boundary that is not ENOUGH, of those where the
            verdict after the cut is known; over_limit_traces: searched in part
        judged_traces, insufficient_traces (never judged sufficient), violating_traces (NOT_ENOUGH
            after an ENOUGH), degenerate, notes
        rejections [{stage, reason, rows, of}]; retention {rows, of, ratio, paper}
        lengths {part: percentiles}, in characters, prefix_share of the target and used_share of the
            trace as ratios; samples {stage: see `_tally`}
        lengthened: training rows that continue a longer prefix than the cut (align.extend_rounds)
        rounds: see `_rounds`
        answer_in_prefix: training rows; damaged: lines of files; findings: see `findings`
    """
    log = files.log
    judging = files.summary("truncate")
    evaluation = files.summary("eval")
    scores = evaluation.get("scores", [])
    # Of each model the first dataset's score, which is read last.
    accuracies = {score["which"]: score["accuracy"] for score in reversed(scores)}
    # Evaluation problems that are worded like a training problem.
    near = []
    for name, data in files.manifest.get("data", {}).get("evals", {}).items():
        near.append({"dataset": name, "n": data.get("near_duplicates", 0), "of": data["rows"]})
    result = {
        "name": files.config["name"],
        "method": files.config["method"],
        "seed": files.config["seed"],
        "folder": str(files.folder),
        **_funnel(files),
        "accuracy_before": accuracies.get("base"),
        "accuracy_after": accuracies.get("tuned"),
        "n_eval": scores[0]["n"] if scores else None,
        "scores": scores,
        "comparisons": evaluation.get("comparisons", []),
        "near_duplicates": near,
        "train": files.summary("train"),
        "loss_first": log[0]["loss"] if log else None,
        "loss_last": log[-1]["loss"] if log else None,
        **_judging(files.prefixes),
        "degenerate": judging.get("degenerate"),
        "notes": judging.get("notes", []),
        "rounds": _rounds(files),
        "damaged": files.damaged,
    }
    return {**result, "findings": findings(result, files.config)}


def findings(run: Json, config: Json) -> list[dict[str, str]]:
    """What a reader should notice in a run's numbers, by the rules of findings.yaml.

    Returns:
        {level: warning or note, what, evidence, try}; warnings first.
    """
    texts = Environment()  # noqa: S701 (plain text; the page escapes it)
    texts.filters.update(percent=percent, points=points, share=_share)
    result = []
    # A rule is tried once, or on every item of the list that it names.
    for rule in yaml.safe_load(RULES.read_text(encoding="utf-8")):
        for item in run[rule["each"]] if "each" in rule else [None]:
            fields = {**run, "config": config, "item": item}
            if texts.compile_expression(rule["when"])(fields):
                finding = {"level": rule["level"]}
                for part in ("what", "evidence", "try"):
                    text = texts.from_string(rule.get(part, ""))
                    finding[part] = text.render(fields).strip()
                result.append(finding)
    return sorted(result, key=lambda finding: finding["level"] != "warning")


def percent(value: float | None, digits: int = 1, sign: str = "") -> str:
    """A ratio in percent; a dash for None. Only none is 0%, and only all is 100%."""
    if value is None:
        return "–"
    text = f"{value:{sign}z.{digits}%}"
    if not sign and 0 < value < 1:
        least = f"{0.1**digits / 100:.{digits}%}"
        most = f"{1 - 0.1**digits / 100:.{digits}%}"
        text = {f"{0:.{digits}%}": f"<{least}", f"{1:.{digits}%}": f">{most}"}.get(text, text)
    return text


def points(difference: float | None, sign: str = "+") -> str:
    """A difference of two ratios in percentage points, to a tenth; a dash for None."""
    return "–" if difference is None else f"{100 * difference:{sign}z.1f}"


def _share(part: int, of: int) -> str:
    """A count, its denominator and, where there is one, the percentage."""
    return f"{part:,} of {of:,}" + (f" ({part / of:.0%})" if of else "")


def percentiles(values: Sequence[float]) -> Json:
    """{p10, p50, p90, n}, linear between neighbours; None without values."""
    p10, p50, p90 = np.percentile(values, (10, 50, 90)).round(4).tolist() if values else [None] * 3
    return {"p10": p10, "p50": p50, "p90": p90, "n": len(values)}


def degenerate(rows: Sequence[PrefixRow]) -> str | None:
    """A warning with its evidence where a judge cuts nearly all traces alike; None otherwise."""
    judged = [row for row in rows if row.verdicts and row.sentences_total >= MIN_JUDGED]
    short = sum(row.sentences == 1 for row in judged)
    whole = sum(row.sentences == row.sentences_total for row in judged)
    alike, cut = max((short, "cut to one sentence"), (whole, "kept whole"))
    if len(judged) < MIN_JUDGED or alike < DEGENERATE_RATIO * len(judged):
        return None
    labels = Counter(verdict.label for row in judged for verdict in row.verdicts)
    [(label, count)] = labels.most_common(1)
    return (
        f"The judge hardly distinguishes one prefix from another: {alike} of {len(judged)} traces "
        f"were {cut}, {count} of {labels.total()} verdicts are {label}. Try judge.kind=answer, "
        "judge.calibration=content-free, or a stronger student."
    )


def _funnel(files: Files) -> Json:
    """Rows kept and lost, their lengths, and the samples that they were made from."""
    stages = []
    for name, entry in files.manifest["stages"].items():
        stages.append({"name": name, **{key: entry.get(key) for key in STAGE_KEYS}})
    kept = [row for row in files.aligned if not row.rejected]
    # where nothing was cut, the traces are whole
    prefixes = files.prefixes or [row for trace in files.traces for row in trace.whole(ends)]
    return {
        "stages": stages,
        "rejections": _rejections(files),
        "train_rows": len(files.train),
        "retention": {
            "rows": len(kept),
            "of": len(prefixes),
            "ratio": len(kept) / len(prefixes) if prefixes and files.aligned else None,
            "paper": PAPER_RETENTION,
        },
        "lengths": _lengths(kept, prefixes),
        "lengthened": sum(row.lengthened > 0 for row in kept),
        "samples": {"teach": _tally(files.traces), "align": _tally(files.aligned)},
        "answer_in_prefix": sum(row.answer_in_prefix for row in kept),
    }


def _lengths(kept: Sequence[AlignedRow], prefixes: Sequence[PrefixRow]) -> Json:
    """Percentiles of what the kept rows have of prefix, continuation and trace."""
    continued = [row for row in kept if row.continuation]
    shares = [len(row.prefix) / len(row.prefix + row.continuation) for row in continued]
    # align may lengthen a prefix beyond the cut: what was learned from, as a share of the trace
    whole = {row.id: row.trace for row in prefixes if row.kept_text is None}
    used = [len(row.prefix) / len(whole[row.id]) for row in kept if whole.get(row.id)]
    return {
        "prefix_characters": percentiles([len(row.prefix) for row in kept]),
        "continuation_characters": percentiles([len(row.continuation) for row in continued]),
        "prefix_share": percentiles(shares),
        "used_share": percentiles(used),
    }


def _rejections(files: Files) -> list[Json]:
    """How many rows each stage lost for each reason, of how many that it took."""
    shown = {"data", *files.manifest["stages"]}
    lost = Counter((row["stage"], row["reason"]) for row in files.rejected if row["stage"] in shown)
    # Training drops rows on its own; all others are in rejected.jsonl.
    for reason, names in files.summary("train").get("dropped", {}).items():
        lost["train", reason] = len(names)
    rejections = []
    for (stage, reason), rows in lost.items():
        of = files.entry(stage).get("rows_in")
        rejections.append({"stage": stage, "reason": reason, "rows": rows, "of": of})
    return rejections


def _judging(rows: Sequence[PrefixRow]) -> Json:
    """How much of each trace was kept, and what the verdicts were and cost."""
    kept = [row for row in rows if not row.rejected]
    ratio = percentiles([row.ratio for row in kept])
    labels = Counter(verdict.label for row in rows for verdict in row.verdicts)
    isolated = [row.isolated for row in kept if row.isolated is not None]
    return {
        "prefix_ratio": ratio,
        "prefix_ratio_median": ratio["p50"],
        "verdicts_asked": labels.total(),
        "verdicts_unparsed": labels["UNPARSED"],
        "prefill_tokens": sum(row.prefill_tokens for row in rows),
        "cached_tokens": sum(row.cached_tokens for row in rows),
        "generated_tokens": sum(row.generated_tokens for row in rows),
        "isolated_traces": {"rows": sum(isolated), "of": len(isolated)},
        "over_limit_traces": sum(0 < row.searched_sentences < row.sentences_total for row in rows),
        "judged_traces": sum(bool(row.verdicts) for row in rows),
        "insufficient_traces": sum(not row.sufficient for row in kept),
        "violating_traces": sum(row.violations > 0 for row in kept),
    }


def _rounds(files: Files) -> list[Json]:
    """What the rounds of a run came to, as far as they are done; empty where there is only one.

    Returns:
        [{round, folder, prefix_ratio_median, retention, score: of the first evaluation dataset,
        gain: `PairedTest` against the round before, pays: whether accuracy rose beyond the noise}]
    """
    rounds: list[Json] = []
    before: list[EvalRow] = []
    adapter = None
    run = files
    last = files.config["rounds"]
    for number in range(1, last + 1) if last > 1 else ():
        if number > 1:
            folder = files.folder / f"round-{number}"
            if not read_manifest(folder):
                break
            run = Files(folder, files.resolved.round(number))
            # it was made with the adapter that the round before has now
            if run.keys("truncate").get(STUDENTS_ADAPTER) not in (None, adapter):
                break
        adapter = run.entry("train").get("output")
        scores = run.summary("eval").get("scores", [])
        tuned = [score for score in scores if score["which"] == "tuned"]
        if not tuned:
            break
        rows = run.rows(file_name(tuned[0]["model"], "tuned", tuned[0]["dataset"]), EvalRow)
        gain = compare_rows(before, rows)
        before = rows
        rounds.append(
            {
                "round": number,
                "folder": str(run.folder),
                "prefix_ratio_median": _judging(run.prefixes)["prefix_ratio_median"],
                "retention": _funnel(run)["retention"],
                "score": tuned[0],
                "gain": gain and asdict(gain),
                "pays": gain is None or bool(gain.ci_low > 0),
            }
        )
    return rounds


def _tally(rows: Sequence[Any]) -> Json:
    """A stage's samples by verdict, and how many of them ended at the token limit."""
    samples = [sample for row in rows for sample in row.samples]
    truncated = [sample.verdict for sample in samples if sample.finish_reason == "length"]
    return {
        "samples": len(samples),
        "verdicts": Counter(sample.verdict for sample in samples),
        "truncated": len(truncated),
        "truncated_not_correct": len(truncated) - truncated.count("correct"),
        "tokens": sum(row.processed_tokens for row in rows),
    }
