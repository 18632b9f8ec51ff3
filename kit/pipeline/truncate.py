"""truncate: each trace is cut at the shortest prefix that the untrained student judges sufficient (section 3.2).

Which boundaries are asked, and how, is in kit/judging; `judge_file` does the same for the command `judge FILE`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from statistics import median_high
from typing import Any

from kit.core.config import Config
from kit.core.progress import Progress
from kit.core.records import PrefixRow, TraceRow
from kit.core.run import Run
from kit.core.stages import file_digest, work_through
from kit.core.storage import RowFile, digest
from kit.judging.calibration import share_threshold
from kit.judging.judge import Judge, cut, fixed, from_problem, open_judge
from kit.judging.sentences import ends
from kit.reporting.metrics import degenerate

NAME = "prefixes.jsonl"


SUMS = ("prefill_tokens", "cached_tokens", "sufficient", "violations")


def truncate(run: Run) -> None:
    """The stage: one `PrefixRow` a kept trace."""
    rows = [row for trace in run.rows("traces.jsonl", TraceRow) for row in trace.whole(ends)]
    if run.config.method in ("zero-shot", "long-trace", "label-only"):
        rows = []
    if not run.begin("truncate", digest(rows), lambda: file_digest(run, NAME, PrefixRow)):
        return
    with ExitStack() as held:
        cutter = TruncateWorker(run, rows, held)
        units = [(row.id, row) for row in rows]
        made = work_through(
            run, "truncate", RowFile(run.path(NAME), PrefixRow), units, cutter.size, cutter.work
        )
    sound = [row for row in made if row.rejected is None]
    labels, judge = Counter(v.label for row in sound for v in row.verdicts), cutter.judge
    told = {
        "verdicts": dict(labels),
        "median_ratio": median_high(row.ratio for row in sound) if sound else None,
        "degenerate": degenerate(sound),
        "rejected": dict(Counter(row.rejected for row in made if row.rejected)),
        "notes": list(judge.backend.notes) if judge else [],
        **{name: sum(getattr(row, name) for row in sound) for name in SUMS},
        **({"threshold": judge.threshold} if judge else {}),
    }
    if told["degenerate"]:
        run.progress.warn(told["degenerate"])
    run.finish("truncate", digest(made), len(rows), len(sound), **told)


class TruncateWorker:
    """Cuts batches of traces; opens the student only when there is a trace to judge."""

    def __init__(self, run: Run, rows: Sequence[PrefixRow], held: ExitStack) -> None:
        self.run, self.rows, self.config, self.held = run, rows, run.config, held
        self.size = self.config.student.max_num_seqs if self.config.student.backend == "http" else 1
        self.judge: Judge | None = None

    def work(self, rows: list[PrefixRow]) -> Iterator[PrefixRow]:
        """A cut row for each, as they are finished."""
        if self.config.method not in ("palign", "prefix-only", "continuation-only"):
            yield from (fixed(row, self.config.ratio) for row in rows)
            return
        judge = self.judge = self.judge or self._open()
        with ThreadPoolExecutor(len(rows)) as pool:
            for done in as_completed([pool.submit(cut, judge, row) for row in rows]):
                yield done.result()

    def _open(self) -> Judge:
        judge, run = open_judge(self.config, self.held), self.run
        if judge.keys.calibration == "share":
            stage, known = (
                run.manifest["stages"]["truncate"]["keys"],
                run.manifest.get("judge_threshold", {}),
            )
            if known.get("keys") != stage:
                run.progress.say(
                    "truncate: reading every whole trace once, to choose the threshold"
                )
                known = {"keys": stage, "value": share_threshold(judge, self.rows)}
                run.record(judge_threshold=known)
            judge.threshold = known["value"]
        return judge


def judge_file(config: Config, progress: Progress) -> dict[str, Any]:
    """Judge the traces that `config.teacher.path` names.

    Returns:
        {model, search, kind, threshold, degenerate, notes, traces: [see `shown`]}; kept is None where a trace left
        without being judged, for the reason in rejected.
    """
    from kit.data import load_traces

    rows, done = [from_problem(problem) for problem in load_traces(config)], []
    with ExitStack() as held, progress.bar("judge", len(rows), "traces") as bar:
        judge = open_judge(config, held)
        if judge.keys.calibration == "share":
            judge.threshold = share_threshold(judge, rows)
        for row in rows:
            done.append(cut(judge, row))
            bar.advance(tokens=done[-1].prefill_tokens)
    told = {"model": config.student.model, "search": judge.keys.search, "kind": judge.keys.kind}
    told |= {
        "threshold": judge.threshold,
        "degenerate": degenerate(done),
        "notes": list(judge.backend.notes),
    }
    return told | {"traces": [shown(row) for row in done]}


def shown(row: PrefixRow) -> dict[str, Any]:
    """{id, sentences, kept, sufficient, verdicts: [{sentences, label, margin}], and what it cost}."""
    names = (
        "id",
        "sufficient",
        "prompt_tokens",
        "prefill_tokens",
        "cached_tokens",
        "seconds",
        "rejected",
        "detail",
    )
    found = {
        "sentences": row.sentences_total,
        "kept": row.sentences if row.rejected is None else None,
    }
    found |= {"verdicts": [verdict.model_dump() for verdict in row.verdicts]}
    return {name: getattr(row, name) for name in names} | found
