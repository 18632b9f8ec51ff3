"""truncate: each trace is cut at the shortest prefix judged sufficient (section 3.2 of the paper).

The judge is the untrained student. How it is asked is in kit/judging; here are the stage, and
`judge_file`, which does the same for the command `judge FILE` and keeps nothing.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from functools import partial
from itertools import chain
from statistics import median_high

from kit import Json
from kit.core.config import Config
from kit.core.methods import Method, method_of
from kit.core.progress import Progress
from kit.core.records import PrefixRow, TraceRow
from kit.core.run import Run
from kit.core.stages import file_digest, work_through
from kit.core.storage import RowFile, digest
from kit.judging.baselines import long_and_short, matched_ratio, open_rule
from kit.judging.cut import Cut, cut, cut_at_answer, cut_at_ratio, traces_in_file
from kit.judging.judge import Judge, open_judge
from kit.judging.sentences import ends
from kit.models import fingerprints
from kit.reporting.metrics import degenerate
from kit.sampling import model_fingerprints

NAME = "prefixes.jsonl"
SUMS = ("prefill_tokens", "cached_tokens", "generated_tokens", "sufficient", "violations")
SHOWN = {
    "id",
    "sufficient",
    "verdicts",
    "prompt_tokens",
    "prefill_tokens",
    "cached_tokens",
    "generated_tokens",
    "searched_sentences",
    "isolated",
    "seconds",
    "rejected",
    "detail",
}


def truncate(run: Run) -> None:
    """The stage: one `PrefixRow` per kept trace."""
    config = run.config
    method = method_of(config.method)
    traces = []
    if method.cut not in ("whole", "none"):
        # traces.jsonl may have been brought along, without a stage that wrote it
        if "teach" in run.manifest["stages"] or not run.path("traces.jsonl").exists():
            run.require("teach")
        traces = whole_traces(run)
    if method.cut == "mix-long-short":
        traces = list(chain(*map(long_and_short, traces)))
    depends_on = partial(_depends_on, config, method, traces) if traces else dict
    output = partial(file_digest, run, NAME, PrefixRow)
    if not run.begin("truncate", digest(traces), output, depends_on):
        return

    # 1. Cut.
    rows, judge = _cut_all(run, method, traces)

    # 2. Count what became of them.
    summary = _summary(rows, judge)
    if summary["degenerate"]:
        run.progress.warn(summary["degenerate"])
    kept = sum(row.rejected is None for row in rows)
    run.finish("truncate", len(traces), kept, **summary)


def _cut_all(
    run: Run, method: Method, traces: list[PrefixRow]
) -> tuple[list[PrefixRow], Judge | None]:
    """Cut every trace; the rows, and the judge where there was something to judge."""
    config = run.config
    judge = None
    cut_one: Cut = cut_at_ratio
    with ExitStack() as stack:
        if traces and method.is_judged:
            judge = stack.enter_context(open_judge(config))
            cut_one = partial(cut_at_answer if method.cut == "binary-cut" else cut, judge)
        elif traces:
            cut_one = stack.enter_context(open_rule(config))
        # a server judges several traces at once; in this process one after the other is as fast
        is_served = judge is not None and config.student.backend == "http"
        batch_traces = config.student.rows() if is_served else 1
        file = RowFile(run.path(NAME), PrefixRow)
        notes = judge.backend.notes if judge and not is_served else []
        work = partial(cut_batch, cut_one, tell=partial(run.progress.tell, notes))
        return work_through(run, "truncate", file, traces, batch_traces, work), judge


def _depends_on(config: Config, method: Method, traces: list[PrefixRow]) -> Json:
    """What a method's rows depend on besides the stage's keys: models, and keys of its own."""
    if method.is_judged:
        return model_fingerprints(config, "student", traces)
    if method.cut == "step-entropy":
        return {
            "baseline.drop_ratio": config.baseline.drop_ratio,
            "baseline.skip_marker": config.baseline.skip_marker,
            **fingerprints("student", config.student.on_hf),
        }
    if method.cut == "fixed-prefix-matched":
        return {"share of baseline.matched_run": matched_ratio(config)}
    if method.is_graded and any(trace.verifier == "judge" for trace in traces):
        return fingerprints("answer_judge", config.answer_judge)
    return {}


def _summary(rows: list[PrefixRow], judge: Judge | None) -> Json:
    """What the manifest keeps of the rows, and of the judge where there was one."""
    cut_rows = [row for row in rows if row.rejected is None]
    summary: Json = {
        "verdicts": Counter(verdict.label for row in cut_rows for verdict in row.verdicts),
        "median_ratio": median_high(row.ratio for row in cut_rows) if cut_rows else None,
        "degenerate": degenerate(cut_rows),
        "rejected": Counter(row.rejected for row in rows if row.rejected),
        "notes": judge.backend.notes if judge else [],
        "threshold": judge.threshold if judge else None,
    }
    for name in SUMS:
        summary[name] = sum(getattr(row, name) for row in rows)
    return summary


def whole_traces(run: Run) -> list[PrefixRow]:
    """The kept traces of the stage teach, each as a prefix that keeps everything."""
    return [row for trace in run.rows("traces.jsonl", TraceRow) for row in trace.whole(ends)]


def cut_batch(
    cut_one: Cut, traces: list[PrefixRow], tell: Callable[[], None] = lambda: None
) -> Iterator[PrefixRow]:
    """Cut traces side by side; yields each row as it is finished, after calling `tell`."""
    with ThreadPoolExecutor(len(traces)) as pool:
        futures = [pool.submit(cut_one, trace) for trace in traces]
        for future in as_completed(futures):
            row = future.result()
            tell()
            yield row


def judge_file(config: Config, progress: Progress) -> Json:
    """Judge the traces that `config.teacher.path` names.

    Returns:
        {model, search, kind, threshold, degenerate, notes, traces}; each trace as `summary_of` it.
    """
    traces = traces_in_file(config)
    rows = []
    with open_judge(config) as judge, progress.bar("judge", len(traces), "traces") as bar:
        for trace in traces:
            row = cut(judge, trace)
            rows.append(row)
            bar.advance(tokens=row.prefill_tokens)
    return {
        "model": config.student.model,
        "search": config.judge.search,
        "kind": config.judge.kind,
        "threshold": judge.threshold,
        "degenerate": degenerate(rows),
        "notes": list(judge.backend.notes),
        "traces": [summary_of(row) for row in rows],
    }


def summary_of(row: PrefixRow) -> Json:
    """One judged trace for people and `--json`.

    Returns:
        The fields `SHOWN`, sentences (of the whole trace) and kept (of them; None: rejected).
    """
    kept = row.sentences if row.rejected is None else None
    return {**row.model_dump(include=SHOWN), "sentences": row.sentences_total, "kept": kept}
