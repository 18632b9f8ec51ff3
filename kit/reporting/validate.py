"""Does a verdict mean anything? Cheap judges held against what the student can do (section 3.2).

At some boundaries of each trace continuations are drawn and graded (judge.kind success), and every
cheap judge is asked there too. Paper: a verdict is taken as it is. Here: its threshold can be put
where the success rate reaches `judge.success_rate`. The rate over the margin is fitted by isotonic
regression, which assumes only that it does not fall: nothing is known of a curve's shape.
"""

import json
import random
from contextlib import ExitStack, closing
from math import ceil
from pathlib import Path
from statistics import fmean

import numpy as np
from scipy.optimize import isotonic_regression
from scipy.special import expit

from kit.backends import open_backend
from kit.core.config import Calibration, Config, resolve
from kit.core.errors import KitError
from kit.core.progress import Progress
from kit.core.records import PrefixRow
from kit.core.storage import digest, write_atomic
from kit.grading.stats import auc
from kit.judging.calibration import setup_of
from kit.judging.cut import traces_in_file
from kit.judging.judge import Judge
from kit.judging.trace import open_trace
from kit.reporting.metrics import Json
from kit.reporting.report import render

BOUNDARIES = 6  # of a trace, evenly spread up to the last one
# The keys of `judge` that make each judge. What the last one finds, the others are held against.
JUDGES = {
    "verbal": {"kind": "verbal", "decode": "constrained"},
    "answer": {"kind": "answer", "answer_scoring": "likelihood"},
    "answer-greedy": {"kind": "answer", "answer_scoring": "greedy"},
    "success": {"kind": "success"},
}


def validate(config: Config, folder: Path, progress: Progress) -> Json:
    """Hold the cheap judges against success; write calibration.json and validate.html.

    What is measured of a trace is kept there as well: the same command goes on where it stopped.

    Returns:
        model; judges [see `assess`]; success_rate and samples: the config's; traces; skipped: those
        of which no boundary fits the context; boundaries; page

    Raises:
        KitError: no boundary fits the context.
    """
    raw = config.model_dump()
    uncalibrated = {**raw["judge"], "threshold": None, "calibration": "none"}
    rows = traces_in_file(config)
    (folder / "measured").mkdir(parents=True, exist_ok=True)
    traces = []
    judges = {}
    with ExitStack() as stack:
        backend = stack.enter_context(closing(open_backend(config.student)))
        for name, keys in JUDGES.items():
            judge_config = resolve({**raw, "judge": {**uncalibrated, **keys}}, "--validate")
            judges[name] = stack.enter_context(Judge(judge_config, backend))
        setup = setup_of(judges["success"])
        bar = stack.enter_context(progress.bar("validate", len(rows), "traces"))
        # A file's name is a hash of the trace and of all that verdicts depend on.
        asked = Calibration(setup={**setup, "seed": str(config.seed)}, thresholds={})
        sections = (config.student, config.judge, config.align, config.prompts, config.answer_judge)
        for row in rows:
            name = digest([asked, *sections, row])
            file = folder / "measured" / f"{name}.json"
            if not file.exists():
                write_atomic(file, json.dumps(measure(judges, row)))
            traces += json.loads(file.read_bytes())
            bar.advance()
    if not traces:
        message = f"No boundary of {len(rows)} traces fits the student's context."
        raise KitError(message, "Name shorter traces, or set student.context_tokens.")

    del judges["success"]
    assessed = [assess(name, judge, traces) for name, judge in judges.items()]
    result = {
        "model": config.student.model,
        "judges": assessed,
        "success_rate": config.judge.success_rate,
        "samples": config.judge.samples,
        "traces": len(traces),
        "skipped": len(rows) - len(traces),
        "boundaries": sum(len(trace["enough"]) for trace in traces),
        "page": str(folder / "validate.html"),
    }
    thresholds = {judge["kind"]: judge["threshold"] for judge in assessed}
    calibration = json.dumps({"setup": setup, "thresholds": thresholds}, indent=1)
    write_atomic(folder / "calibration.json", calibration)
    page = render("validate.html.j2", result=result, traces=traces)
    write_atomic(folder / "validate.html", page)
    return result


def show(result: Json) -> None:
    """Print the judges' figures for a person."""
    print(render("validate.txt.j2", **result))


def measure(judges: dict[str, Judge], row: PrefixRow) -> list[Json]:
    """Ask all judges about some boundaries of a whole trace.

    Args:
        judges: by the names of `JUDGES`, on one backend.

    Returns:
        One {of: the trace's sentences; at each boundary: sentences; each judge's margin, 1 or 0
        where it generates its verdict; enough: by success; rate: correct share of up to
        `judge.samples` continuations}. None where no boundary fits.
    """
    furthest = min(judge.boundaries_within(row) for judge in judges.values())
    if not furthest:
        return []
    boundaries = sorted({ceil(furthest * i / BOUNDARIES) for i in range(1, BOUNDARIES + 1)})
    measured: Json = {"of": row.sentences_total, "sentences": boundaries, "rate": []}
    for name, judge in judges.items():
        with open_trace(judge, row, furthest) as trace:
            trace.ask_many(boundaries)
        enough = [trace.verdicts[k].label == "ENOUGH" for k in boundaries]
        margins = [trace.verdicts[k].margin for k in boundaries]
        scores = enough if None in margins else margins
        measured[name] = np.asarray(scores, dtype=float).tolist()
    # The last judge was success.
    measured["enough"] = enough
    for k in boundaries:
        measured["rate"].append(fmean(sample.verdict == "correct" for sample in trace.samples[k]))
    return [measured]


def assess(name: str, judge: Judge, traces: list[Json]) -> Json:
    """Hold one judge's margins against the success rates.

    Args:
        traces: see `measure`; they are not changed.

    Returns:
        kind; auc: does the margin tell sufficient boundaries from others, with its 95% interval
        auc_low, auc_high (a bootstrap over traces); brier: mean squared distance of the stated
        probability from each continuation's 1 or 0; usual: the threshold without calibration;
        threshold: the calibrated one, None where the margins do not tell; cuts [(the first
        sufficient boundary, the judge's first or else the whole trace)] of the traces with a
        sufficient one, and their mean_cut_error_sentences; kept [mean kept ratio, mean success rate
        at the cut] at the usual threshold, and kept_calibrated likewise, or None; points [(margin,
        stated probability, success rate, fitted rate)] of all boundaries by margin
    """
    # 1. Does it tell boundaries apart?
    margins = _pooled(traces, name)
    rates = _pooled(traces, "rate")
    separation = auc(margins, _pooled(traces, "enough"))
    low, high = _auc_interval(traces, name)

    # 2. The success rate over the margin. Equal margins get falling rates, which the fit levels.
    order = np.lexsort((-rates, margins))
    margins = margins[order]
    rates = rates[order]
    stated = {"verbal": expit, "answer": np.exp}.get(name, np.asarray)(margins)
    fitted = isotonic_regression(rates).x
    first = int(np.searchsorted(fitted, judge.settings.success_rate - 1e-9))
    threshold = None
    if low > 0.5 and 0 < first < len(margins) and not judge.generates_verdicts:
        threshold = float(margins[first - 1 : first + 1].mean())

    # 3. Where it cuts, beside the first boundary that is enough.
    usual = 1.0 if judge.generates_verdicts else judge.threshold
    kept = [cut_at(trace, name, usual) for trace in traces]
    kept_calibrated = None
    if threshold is not None:
        calibrated = [cut_at(trace, name, threshold)[1:] for trace in traces]
        kept_calibrated = np.mean(calibrated, 0).tolist()
    cuts = []
    for trace, (cut, _, _) in zip(traces, kept, strict=True):
        if any(trace["enough"]):
            true = trace["sentences"][trace["enough"].index(True)]
            cuts.append((true, cut))
    return {
        "kind": name,
        "auc": separation,
        "auc_low": low,
        "auc_high": high,
        "brier": float(np.mean(stated**2 - 2 * stated * rates + rates)),
        "usual": usual,
        "threshold": threshold,
        "cuts": cuts,
        "mean_cut_error_sentences": fmean(cut - true for true, cut in cuts) if cuts else None,
        "kept": np.mean(kept, 0)[1:].tolist(),
        "kept_calibrated": kept_calibrated,
        "points": np.column_stack([margins, stated, rates, fitted]).tolist(),
    }


def _pooled(traces: list[Json], key: str) -> np.ndarray:
    return np.concatenate([trace[key] for trace in traces])


def _auc_interval(traces: list[Json], name: str) -> tuple[float, float]:
    """A 95% interval by bootstrap. A trace's boundaries hang together, so traces are drawn."""
    rng = random.Random(0)
    values = []
    for _ in range(1000):
        drawn = rng.choices(traces, k=len(traces))
        values.append(auc(_pooled(drawn, name), _pooled(drawn, "enough")))
    low, high = np.quantile(values, (0.025, 0.975)).tolist()
    return low, high


def cut_at(trace: Json, name: str, threshold: float) -> tuple[int, float, float]:
    """Where a threshold cuts a measured trace: (sentences, kept ratio, success rate there).

    A trace without any boundary at the threshold is kept whole; the furthest one's rate counts.
    """
    rate = 0.0
    for k, margin, rate in zip(trace["sentences"], trace[name], trace["rate"], strict=True):
        if margin >= threshold:
            return k, k / trace["of"], rate
    return trace["of"], 1.0, rate
