"""truncate: the untrained student judges where a trace may be cut (section 3.2 of the paper).

Paper: every verdict is a generation of up to 256 tokens over a prompt prefilled anew. Here: all prompts of a
trace share one cache, and a verdict is read from log-probabilities at the token where the two labels part;
`judge.decode: generate` asks the paper's way. Which boundaries to ask is kit/search.py's, how a backend
reuses its cache is the backend's.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kit import search
from kit.align import whole
from kit.answers import Grader, Item, gold_of, last_box
from kit.backends import Backend, Cost, Probe, Readings, Request, Session, open_backend
from kit.calibrate import degenerate, share_threshold
from kit.config import Config, Sampling
from kit.errors import KitError
from kit.prompts import fill, render, solve_text, text_of
from kit.records import Label, PrefixRow, Problem, RowFile, Sample, TraceRow, Verdict, digest
from kit.run import Run, file_digest, stopwatch, work_through
from kit.sentences import ends

if TYPE_CHECKING:
    from kit.progress import Progress

NAME = "prefixes.jsonl"
THRESHOLD = {"verbal": 0.0, "answer": -1.0}  # nats; answer: a gold token more likely than exp(-1) on average


class Judge:
    """Asks one backend about prefixes.

    Args:
        config: its `judge`, `prompts`, `student` and `method` sections are used.
        backend: the student.

    Raises:
        KitError: the labels cannot be told apart by one token.
    """

    def __init__(self, config: Config, backend: Backend) -> None:
        self.config, self.keys, self.backend = config, config.judge, backend
        self.limit_tokens = min(self.keys.limit_tokens or backend.context_tokens, backend.context_tokens)
        self.generates = self.keys.decode == "generate" if self.keys.kind == "verbal" else self.keys.read == "greedy"
        if self.generates:
            self.limit_tokens -= min(16, self.limit_tokens // 2)
        given = self.keys.threshold
        self.threshold = given if given is not None else THRESHOLD[self.keys.kind]
        self.common, self.parting = part(*(tuple(backend.tokenizer.encode(x, special=False)) for x in self.keys.labels))
        self.grader = Grader() if self.keys.kind == "answer" and self.generates else None
        self.rechecked = self.flips = 0

    def probe(self, row: PrefixRow, prefix: str) -> Probe:
        """The question about a prefix, and where its verdict is read: the labels' parting, or the gold answer."""
        tokenizer, student, prompts = self.backend.tokenizer, self.config.student, self.config.prompts
        if self.keys.kind == "verbal":
            user, answer = fill(text_of(prompts, "judge"), question=row.question, prefix=prefix), ""
        else:
            user, answer = solve_text(prompts, row.question), prefix + text_of(prompts, "forced")
        ids = render(tokenizer, user, student.system, answer, student.thinking)
        if self.generates:
            return Probe(ids, ())
        if self.keys.kind == "verbal":
            ids += self.common
            return Probe(ids, ((len(ids) - 1, self.parting),))
        gold = tokenizer.encode(gold_of(row.answer), special=False)
        return Probe((*ids, *gold[:-1]), tuple((len(ids) - 1 + i, (token,)) for i, token in enumerate(gold)))

    def margin(self, readings: Readings) -> float:
        """Log-odds of the first label (verbal), or mean log-likelihood of a gold token (answer)."""
        if self.keys.kind == "verbal":
            return readings[0][0] - readings[0][1]
        return sum(values[0] for values in readings) / len(readings)

    def close(self) -> None:
        """End the graders, if any."""
        if self.grader:
            self.grader.close()


@dataclass
class Asking:
    """One trace under judgement: asks boundaries, remembers verdicts and what they cost."""

    judge: Judge
    row: PrefixRow
    session: Session
    force: Callable[[int], bool] | None = None  # measurements: steer the search, the work being done all the same
    verdicts: dict[int, Verdict] = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)
    prompt_tokens: int = 0
    base: float = 0.0

    def __post_init__(self) -> None:
        self.ends = ends(self.row.trace)
        if self.judge.keys.calibration == "content-free" and not self.judge.generates:
            probe = self.judge.probe(self.row, "")
            self.base = self.judge.margin(self.session.read([probe])[0])

    def ask(self, k: int) -> bool:
        """Whether the first k sentences suffice."""
        return self.ask_many([k])[0]

    def ask_many(self, boundaries: Sequence[int]) -> list[bool]:
        """Ask several boundaries together."""
        probes = [self.judge.probe(self.row, self.row.trace[: self.ends[k - 1]]) for k in boundaries]
        self.prompt_tokens = max(self.prompt_tokens, *(len(probe.ids) for probe in probes))
        if self.judge.generates:
            found = self._generated(boundaries, probes)
        else:
            found = []
            for k, probe, readings in zip(boundaries, probes, self.session.read(probes), strict=True):
                margin = self.judge.margin(readings) - self.base
                found.append(Verdict(sentences=k, label=self._label(k, probe, margin), margin=round(margin, 6)))
        self.verdicts |= {verdict.sentences: verdict for verdict in found}
        enough = [verdict.label == "ENOUGH" for verdict in found]
        return enough if self.force is None else [self.force(k) for k in boundaries]

    def _label(self, k: int, probe: Probe, margin: float) -> Label:
        """The label of a margin; a near-tie's is read again without a cache."""
        enough = margin >= self.judge.threshold
        if abs(margin - self.judge.threshold) < self.judge.keys.recheck:
            fresh = self.judge.backend.session(fresh=True)
            again = self.judge.margin(fresh.read([probe])[0]) - self.base >= self.judge.threshold
            self.cost.add(fresh.cost)
            fresh.close()
            self.judge.rechecked += 1
            self.judge.flips += again != enough
            enough = again
        return "ENOUGH" if enough else "NOT_ENOUGH"

    def _generated(self, boundaries: Sequence[int], probes: Sequence[Probe]) -> list[Verdict]:
        """Verdicts by greedy generation; what is neither label is UNPARSED, and counts as not enough in the search."""
        sampling = Sampling(temperature=0, top_p=1, max_new_tokens=self.judge.keys.max_new_tokens)
        asked = [Request(str(k), probe.ids, sampling) for k, probe in zip(boundaries, probes, strict=True)]
        found = {}
        for made in self.judge.backend.generate(asked):
            if made.error:
                raise KitError(f"{self.row.id}: no verdict on {made.id} sentences: {made.error}", "Run again to go on.")
            self.cost.add(Cost(made.evaluated_tokens, made.prompt_tokens - made.evaluated_tokens))
            label = self._parsed(made.completions[0].text)
            found[int(made.id)] = Verdict(sentences=int(made.id), label=label, margin=None)
        return [found[k] for k in boundaries]

    def _parsed(self, text: str) -> Label:
        if self.judge.grader is None:
            return label_in(text, self.judge.keys.labels)
        boxed = last_box(f"\\boxed{{{text[: closing(text)]}}}")
        if boxed is None:
            return "UNPARSED"
        verifier = self.judge.config.data.train.verifier
        [grade] = self.judge.grader.grade([Item(self.row.answer, f"\\boxed{{{boxed}}}", verifier)])
        return {"correct": "ENOUGH", "wrong": "NOT_ENOUGH"}.get(grade.verdict, "UNPARSED")  # type: ignore[return-value]


def cut(judge: Judge, row: PrefixRow, force: Callable[[int], bool] | None = None, how: str | None = None) -> PrefixRow:
    """Judge one trace and cut it.

    Args:
        row: a whole trace, as `kit.align.whole` gives it.
        force: replaces the verdicts that steer the search (measurements only).
        how: a search other than the config's.

    Returns:
        The row with its kept prefix, verdicts in the order asked, and costs; or rejected, where the trace is empty or
        its prompt is longer than the judge reads.
    """
    begun, how, m = time.perf_counter(), how or judge.keys.search, row.sentences_total
    if not row.trace.strip():
        return _rejected(row, "empty trace", "there is nothing to cut")
    tokens = len(judge.probe(row, row.trace).ids)
    if tokens > judge.limit_tokens:
        return _rejected(row, "prompt too long", f"{tokens} tokens to judge, the limit is {judge.limit_tokens}")
    if m == 1:
        return row
    session = judge.backend.session(fresh=how == "fresh")
    if hasattr(session, "chunk_tokens"):
        session.chunk_tokens = judge.keys.chunk_tokens
    asking = Asking(judge, row, session, force)
    if how == "scan":
        kept = search.choose(asking.ask_many(range(1, m + 1)), judge.keys.rule)
    else:
        kept = search.gallop(m, asking.ask) if how == "gallop" else search.binary(m, asking.ask)
    asking.cost.add(session.cost)
    session.close()
    judged = {k: verdict.label == "ENOUGH" for k, verdict in asking.verdicts.items()}
    k = kept or m
    found: dict[str, Any] = {"end": asking.ends[k - 1], "sentences": k, "ratio": k / m, "sufficient": kept is not None}
    found |= {"verdicts": tuple(asking.verdicts.values()), "violations": search.violations(judged)}
    found |= {"prompt_tokens": asking.prompt_tokens, "seconds": round(time.perf_counter() - begun, 3)}
    return row.model_copy(update=found | vars(asking.cost))


def truncate(run: Run) -> None:
    """The stage: one `PrefixRow` a kept trace."""
    traces = run.rows("traces.jsonl", TraceRow)
    rows = [row for trace in traces for row in whole(trace)]
    method = run.config.method
    if method in ("zero-shot", "long-trace", "label-only"):
        rows = []
    if not run.begin("truncate", digest(rows), lambda: file_digest(run, NAME, PrefixRow)):
        return
    with stopwatch() as seconds, Cutter(run, rows) as cutter:
        units = [(row.id, row) for row in rows]
        cut_rows = work_through(run, "truncate", RowFile(run.path(NAME), PrefixRow), units, cutter.size, cutter.work)
    told = summary(cut_rows) | cutter.facts()
    if told["degenerate"]:
        run.progress.warn(told["degenerate"])
    kept = sum(row.rejected is None for row in cut_rows)
    run.finish("truncate", digest(cut_rows), len(rows), kept, seconds(), **told)


def summary(rows: Sequence[PrefixRow]) -> dict[str, Any]:
    """What judging came to."""
    sound = [row for row in rows if row.rejected is None]
    labels = Counter(verdict.label for row in sound for verdict in row.verdicts)
    ratios = sorted(row.ratio for row in sound)
    return {
        "verdicts": dict(labels),
        "evaluated_tokens": sum(row.evaluated_tokens for row in sound),
        "reused_tokens": sum(row.reused_tokens for row in sound),
        "median_ratio": ratios[len(ratios) // 2] if ratios else None,
        "sufficient": sum(row.sufficient for row in sound),
        "violations": sum(row.violations for row in sound),
        "degenerate": degenerate(sound),
        "rejected": dict(Counter(row.rejected for row in rows if row.rejected)),
    }


class Cutter:
    """Cuts batches of traces; opens the student only when there is a trace to judge."""

    def __init__(self, run: Run, rows: Sequence[PrefixRow]) -> None:
        self.run, self.rows, self.config = run, rows, run.config
        self.size = self.config.student.parallel if self.config.student.backend == "http" else 1
        self.judged = self.config.method in ("palign", "prefix-only", "continuation-only")
        self.judge: Judge | None = None

    def work(self, rows: list[PrefixRow]) -> Iterator[PrefixRow]:
        """A cut row for each, as they are finished."""
        if not self.judged:
            yield from (_fixed(row, self.config.ratio) for row in rows)
            return
        judge = self.judge = self.judge or self._open()
        if len(rows) == 1:
            yield cut(judge, rows[0])
            return
        with ThreadPoolExecutor(len(rows)) as pool:
            for done in as_completed([pool.submit(cut, judge, row) for row in rows]):
                yield done.result()

    def facts(self) -> dict[str, Any]:
        """What the report must know of the judge, beside its rows."""
        if self.judge is None:
            return {"notes": []}
        judge = self.judge
        found: dict[str, Any] = {"threshold": judge.threshold, "notes": list(judge.backend.notes)}
        return found | ({"rechecked": judge.rechecked, "flips": judge.flips} if judge.keys.recheck else {})

    def _open(self) -> Judge:
        judge = Judge(self.config, open_backend(self.config.student))
        if self.config.judge.calibration == "share":
            stage = self.run.manifest["stages"]["truncate"]["keys"]
            known = self.run.manifest.get("judge_threshold", {})
            if known.get("keys") != stage:
                self.run.progress.say("truncate: reading every whole trace once, to choose the threshold")
                known = {"keys": stage, "value": share_threshold(judge, self.rows, self.config.judge.share)}
                self.run.record(judge_threshold=known)
            judge.threshold = known["value"]
        return judge

    def __enter__(self) -> Cutter:
        return self

    def __exit__(self, *_: object) -> None:
        if self.judge is not None:
            self.judge.close()
            self.judge.backend.close()


def judge_file(config: Config, progress: Progress) -> dict[str, Any]:
    """Judge the traces that `config.teacher.path` names.

    Returns:
        {model, search, kind, threshold, degenerate, notes, traces: [{id, sentences, kept, sufficient, verdicts:
        [{sentences, label, margin}], prompt_tokens, evaluated_tokens, reused_tokens, seconds, rejected}]}; kept is
        None where a trace left without being judged, for the reason in rejected.
    """
    from kit.data import load_traces

    rows = [from_problem(problem) for problem in load_traces(config)]
    judge = Judge(config, open_backend(config.student))
    done = []
    try:
        if config.judge.calibration == "share":
            judge.threshold = share_threshold(judge, rows, config.judge.share)
        with progress.bar("judge", len(rows), "traces") as bar:
            for row in rows:
                done.append(cut(judge, row))
                bar.advance(tokens=done[-1].evaluated_tokens)
    finally:
        judge.close()
        judge.backend.close()
    told = {"model": config.student.model, "search": config.judge.search, "kind": config.judge.kind}
    told |= {"threshold": judge.threshold, "degenerate": degenerate(done), "notes": list(judge.backend.notes)}
    return told | {"traces": [_shown(row) for row in done]}


def part(first: tuple[int, ...], second: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, int]]:
    """The common beginning of two labels' tokens, and the two tokens where they part."""
    same = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
    if same is None:
        raise KitError(
            f"One label's tokens begin the other's: {list(first)} and {list(second)}.",
            "Set judge.labels to two texts of which neither starts with the other.",
            2,
        )
    return first[:same], (first[same], second[same])


def label_in(text: str, labels: tuple[str, str]) -> Label:
    """The label that stands first in a generated text (the longer one, where one holds the other)."""
    found = [
        (text.find(label), -len(label), name) for label, name in zip(labels, ("ENOUGH", "NOT_ENOUGH"), strict=True)
    ]
    return min((x for x in found if x[0] >= 0), default=(0, 0, "UNPARSED"))[2]  # type: ignore[return-value]


def closing(text: str) -> int:
    """Where the brace that was open before `text` is closed; len(text) where it is not."""
    depth = 1
    for i, letter in enumerate(text):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return i
    return len(text)


def from_problem(problem: Problem) -> PrefixRow:
    """A problem's own trace, whole, as `cut` takes it."""
    sample = Sample(text=problem.trace or "", verdict="unparsed")
    fields = {"id": problem.id, "question": problem.question, "answer": problem.answer}
    return whole(TraceRow(**fields, samples=(sample,), kept=(0,)))[0]


def _fixed(row: PrefixRow, ratio: float | None) -> PrefixRow:
    """Cut at a share of the sentences (the ratio-X baselines); None keeps all."""
    if not row.trace.strip():
        return _rejected(row, "empty trace", "there is nothing to cut")
    m = row.sentences_total
    k = m if ratio is None else min(m, max(1, round(m * ratio)))
    return row.model_copy(update={"end": ends(row.trace)[k - 1], "sentences": k, "ratio": k / m})


def _rejected(row: PrefixRow, reason: str, detail: str) -> PrefixRow:
    return row.model_copy(update={"rejected": reason, "detail": detail, "sufficient": False})


def _shown(row: PrefixRow) -> dict[str, Any]:
    names = ("sufficient", "prompt_tokens", "evaluated_tokens", "reused_tokens", "seconds", "rejected", "detail")
    kept = row.sentences if row.rejected is None else None
    found = {"id": row.id, "sentences": row.sentences_total, "kept": kept}
    return found | {"verdicts": [v.model_dump() for v in row.verdicts]} | {name: getattr(row, name) for name in names}


def show(result: dict[str, Any], width: int = 40) -> None:
    """Print each trace's verdict curve: margin against position, the kept cut marked in words."""
    from rich.console import Console

    console = Console(highlight=False)
    for trace in result["traces"]:
        verdicts = sorted(trace["verdicts"], key=lambda v: v["sentences"])
        kept = trace["detail"] if trace["kept"] is None else f"kept {trace['kept']} of {trace['sentences']} sentences"
        unsure = "" if trace["sufficient"] or trace["kept"] is None else ", never judged sufficient"
        spent = (
            f"{trace['evaluated_tokens']} tokens evaluated, {trace['reused_tokens']} reused, {trace['seconds']:.1f} s"
        )
        console.print(f"\n{trace['id']}: {kept}{unsure} ({spent})", markup=False)
        widest = max((abs(v["margin"] - result["threshold"]) for v in verdicts if v["margin"] is not None), default=1.0)
        for v in verdicts:
            gap = 0.0 if v["margin"] is None else (v["margin"] - result["threshold"]) / (widest or 1.0)
            size = round(abs(gap) * width / 2)
            bar = ("#" * size).rjust(width // 2) + "|" if gap < 0 else " " * (width // 2) + "|" + "#" * size
            margin = "   none" if v["margin"] is None else f"{v['margin']:+7.2f}"
            mark = "  <- kept" if v["sentences"] == trace["kept"] and trace["sufficient"] else ""
            style = "green" if v["label"] == "ENOUGH" else "yellow"
            line = f"{v['sentences']:5d} {margin} {bar:<{width + 1}} {v['label']}{mark}"
            console.print(line, style=style, markup=False)
    for text in filter(None, [result["degenerate"], *result["notes"]]):
        console.print(f"note: {text}", markup=False)
