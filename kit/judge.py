"""truncate: the untrained student judges where a trace may be cut (section 3.2 of the paper).

Paper: every verdict is a generation of up to 256 tokens over a prompt prefilled anew. Here: all prompts of a
trace share one cache, and a verdict is read from log-probabilities at the token where the two labels part;
`judge.decode: generate` asks the paper's way. Which boundaries to ask is kit/search.py's, how a backend
reuses its cache is the backend's.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, closing
from statistics import median_high
from typing import Any

from kit import search
from kit.align import whole
from kit.answers import Grader, Item, gold_of
from kit.backends import Backend, Cost, Probe, Readings, Request, Session, open_backend
from kit.calibrate import degenerate, share_threshold
from kit.config import Config, Sampling
from kit.errors import KitError
from kit.progress import Progress
from kit.prompts import fill, render, solve_text, text_of
from kit.records import Label, PrefixRow, Problem, RowFile, Sample, TraceRow, Verdict, digest
from kit.run import Run, file_digest, work_through
from kit.sentences import ends

NAME = "prefixes.jsonl"
Force = Callable[[int], bool] | None
THRESHOLD = {"verbal": 0.0, "answer": -1.0}  # nats; answer: a gold token more likely than exp(-1) on average
AHEAD = 6  # what may be asked next is read along where that makes a pass longer by at most a sixth of what was read
SUMS = ("evaluated_tokens", "reused_tokens", "sufficient", "violations")
_BOXED = re.compile(r"((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})+)\}")  # up to the brace that closes the forced box


class Judge:
    """What is asked about a prefix of one backend, and how the answer is read; see `part` for what it raises."""

    def __init__(self, config: Config, backend: Backend) -> None:
        self.config, self.keys, self.backend = config, config.judge, backend
        verbal = self.keys.kind == "verbal"
        self.generates = self.keys.decode == "generate" if verbal else self.keys.read == "greedy"
        self.limit_tokens = min(self.keys.limit_tokens or backend.context_tokens, backend.context_tokens)
        self.limit_tokens -= 16 * self.generates  # room for a generated label
        self.threshold = THRESHOLD[self.keys.kind] if self.keys.threshold is None else self.keys.threshold
        labels = (tuple(backend.tokenizer.encode(label, special=False)) for label in self.keys.labels)
        self.common, self.parting = part(*labels)
        self.held = ExitStack()
        self.grader = self.held.enter_context(Grader()) if self.generates and not verbal else None

    def probe(self, row: PrefixRow, prefix: str) -> Probe:
        """The question about a prefix, and where its verdict is read: the labels' parting, or the gold answer."""
        student, prompts, answer = self.config.student, self.config.prompts, ""
        if self.keys.kind == "verbal":
            user = fill(text_of(prompts, "judge"), question=row.question, prefix=prefix)
        else:
            user, answer = solve_text(prompts, row.question), prefix + text_of(prompts, "forced")
        ids = render(self.backend.tokenizer, user, student.system, answer, student.thinking)
        if self.generates:
            return Probe(ids, ())
        if self.keys.kind == "verbal":
            return Probe(ids + self.common, ((len(ids + self.common) - 1, self.parting),))
        gold = self.backend.tokenizer.encode(gold_of(row.answer), special=False)
        return Probe((*ids, *gold[:-1]), tuple((len(ids) - 1 + i, (token,)) for i, token in enumerate(gold)))

    def margin(self, readings: Readings) -> float:
        """Log-odds of the first label (verbal), or mean log-likelihood of a gold token (answer)."""
        if self.keys.kind == "verbal":
            return readings[0][0] - readings[0][1]
        return sum(values[0] for values in readings) / len(readings)

    def label(self, margin: float) -> Label:
        """ENOUGH from the threshold on."""
        return "ENOUGH" if margin >= self.threshold else "NOT_ENOUGH"

    def close(self) -> None:
        """End the graders, if any; the backend stays open."""
        self.held.close()


class Asking:
    """One trace under judgement: asks boundaries, keeps verdicts and what they cost.

    Args:
        force: measurements only: steers the search, while the verdicts are asked all the same.
    """

    def __init__(self, judge: Judge, row: PrefixRow, session: Session, force: Force = None) -> None:
        self.judge, self.row, self.session, self.force = judge, row, session, force
        self.verdicts: dict[int, Verdict] = {}
        self.margins: dict[int, float] = {}  # of what was asked, or read ahead
        self.cost, self.prompt_tokens, self.base, self.ends = Cost(), 0, 0.0, ends(row.trace)
        if judge.keys.calibration == "content-free" and not judge.generates:
            self.base = judge.margin(session.read([judge.probe(row, "")])[0])

    def ask(self, k: int, *ahead: int) -> bool:
        """Whether the first k sentences suffice. What may be asked next is read along where that costs little."""
        return self.ask_many([k], ahead)[0]

    def ask_many(self, boundaries: Sequence[int], ahead: Sequence[int] = ()) -> list[bool]:
        """Ask several boundaries together."""
        probes = {k: self._probe(k) for k in boundaries}
        self.prompt_tokens = max(self.prompt_tokens, *(len(probe.ids) for probe in probes.values()))
        if self.judge.generates:
            found = self._generated(probes)
        else:
            self._read(probes, ahead)
            found = {k: self._verdict(k) for k in probes}
        self.verdicts |= {k: found[k] for k in boundaries}
        return [self.force(k) if self.force else found[k].label == "ENOUGH" for k in boundaries]

    def _probe(self, k: int) -> Probe:
        return self.judge.probe(self.row, self.row.trace[: self.ends[k - 1]])

    def _read(self, probes: dict[int, Probe], ahead: Sequence[int]) -> None:
        unread = {k: probe for k, probe in probes.items() if k not in self.margins}
        near = getattr(self.session, "ahead_tokens", 0)
        if unread and near:
            more = {k: self._probe(k) for k in ahead if k not in self.margins}
            longest = max(len(probe.ids) for probe in probes.values())
            reach = longest + max(near, longest // AHEAD)
            if longest < self.prompt_tokens or any(len(probe.ids) > reach for probe in more.values()):
                reach, ahead = self.prompt_tokens, ahead[:2]  # one step, and only where the text is cached already
            unread |= {k: probe for k, probe in more.items() if k in ahead and len(probe.ids) <= reach}
        for k, readings in zip(unread, self.session.read([*unread.values()]) if unread else [], strict=True):
            self.margins[k] = self.judge.margin(readings) - self.base

    def _verdict(self, k: int) -> Verdict:
        return Verdict(sentences=k, label=self.judge.label(self.margins[k]), margin=round(self.margins[k], 6))

    def _generated(self, probes: dict[int, Probe]) -> dict[int, Verdict]:
        """Verdicts by greedy generation; what is neither label is UNPARSED, and counts as not enough in the search."""
        sampling = Sampling(temperature=0, top_p=1, max_new_tokens=self.judge.keys.max_new_tokens)
        asked = [Request(str(k), probe.ids, sampling) for k, probe in probes.items()]
        found = {}
        for made in self.judge.backend.generate(asked):
            if made.error:
                raise KitError(f"{self.row.id}: no verdict on {made.id} sentences: {made.error}", "Run again to go on.")
            self.cost.add(Cost(made.evaluated_tokens, made.prompt_tokens - made.evaluated_tokens))
            label = self._parsed(made.completions[0].text)
            found[int(made.id)] = Verdict(sentences=int(made.id), label=label, margin=None)
        return found

    def _parsed(self, text: str) -> Label:
        if self.judge.grader is None:
            return label_in(text, self.judge.keys.labels)
        if (boxed := _BOXED.match(text)) is None:
            return "UNPARSED"
        item = Item(self.row.answer, f"\\boxed{{{boxed[1]}}}", self.judge.config.data.train.verifier)
        [grade] = self.judge.grader.grade([item])
        return {"correct": "ENOUGH", "wrong": "NOT_ENOUGH"}.get(grade.verdict, "UNPARSED")  # type: ignore[return-value]


def cut(judge: Judge, row: PrefixRow, force: Force = None, how: str | None = None) -> PrefixRow:
    """Judge one trace and cut it.

    Args:
        row: a whole trace, as `kit.align.whole` gives it; one of a single sentence is kept.
        force: see `Asking`.
        how: a search other than the config's. fresh asks what binary asks, without a cache.

    Returns:
        The row with its kept prefix, verdicts in the order asked, and costs; or rejected, where the trace is empty or
        its prompt is longer than the judge reads.
    """
    begun, how, m = time.perf_counter(), how or judge.keys.search, row.sentences_total
    tokens = len(judge.probe(row, row.trace).ids)
    if tokens > judge.limit_tokens:
        return _rejected(row, "prompt too long", f"{tokens} tokens to judge, the limit is {judge.limit_tokens}")
    if m <= 1:
        return _fixed(row)
    session = judge.backend.session(fresh=how == "fresh")
    if hasattr(session, "chunk_tokens"):
        session.chunk_tokens = judge.keys.chunk_tokens
    asking = Asking(judge, row, session, force)
    if how == "scan":
        kept = search.choose(asking.ask_many(range(1, m + 1)), judge.keys.rule)
    else:
        kept = (search.gallop if how == "gallop" else search.binary)(m, asking.ask)
    asking.cost.add(session.cost)
    session.close()
    judged = {k: verdict.label == "ENOUGH" for k, verdict in asking.verdicts.items()}
    found = {"sufficient": kept is not None, "verdicts": tuple(asking.verdicts.values()), **vars(asking.cost)}
    found |= {"violations": search.violations(judged), "prompt_tokens": asking.prompt_tokens}
    return _kept(row, kept or m).model_copy(update=found | {"seconds": round(time.perf_counter() - begun, 3)})


def truncate(run: Run) -> None:
    """The stage: one `PrefixRow` a kept trace."""
    rows = [row for trace in run.rows("traces.jsonl", TraceRow) for row in whole(trace)]
    if run.config.method in ("zero-shot", "long-trace", "label-only"):
        rows = []
    if not run.begin("truncate", digest(rows), lambda: file_digest(run, NAME, PrefixRow)):
        return
    with ExitStack() as held:
        cutter = Cutter(run, rows, held)
        units = [(row.id, row) for row in rows]
        made = work_through(run, "truncate", RowFile(run.path(NAME), PrefixRow), units, cutter.size, cutter.work)
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


class Cutter:
    """Cuts batches of traces; opens the student only when there is a trace to judge."""

    def __init__(self, run: Run, rows: Sequence[PrefixRow], held: ExitStack) -> None:
        self.run, self.rows, self.config, self.held = run, rows, run.config, held
        self.size = self.config.student.parallel if self.config.student.backend == "http" else 1
        self.judge: Judge | None = None

    def work(self, rows: list[PrefixRow]) -> Iterator[PrefixRow]:
        """A cut row for each, as they are finished."""
        if self.config.method not in ("palign", "prefix-only", "continuation-only"):
            yield from (_fixed(row, self.config.ratio) for row in rows)
            return
        judge = self.judge = self.judge or self._open()
        with ThreadPoolExecutor(len(rows)) as pool:
            for done in as_completed([pool.submit(cut, judge, row) for row in rows]):
                yield done.result()

    def _open(self) -> Judge:
        judge, run = open_judge(self.config, self.held), self.run
        if judge.keys.calibration == "share":
            stage, known = run.manifest["stages"]["truncate"]["keys"], run.manifest.get("judge_threshold", {})
            if known.get("keys") != stage:
                run.progress.say("truncate: reading every whole trace once, to choose the threshold")
                known = {"keys": stage, "value": share_threshold(judge, self.rows)}
                run.record(judge_threshold=known)
            judge.threshold = known["value"]
        return judge


def open_judge(config: Config, held: ExitStack) -> Judge:
    """Open the student and a judge on it; both are closed with `held`."""
    backend = open_backend(config.student)
    held.callback(backend.close)
    return held.enter_context(closing(Judge(config, backend)))


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
            bar.advance(tokens=done[-1].evaluated_tokens)
    told = {"model": config.student.model, "search": judge.keys.search, "kind": judge.keys.kind}
    told |= {"threshold": judge.threshold, "degenerate": degenerate(done), "notes": list(judge.backend.notes)}
    return told | {"traces": [shown(row) for row in done]}


def part(first: tuple[int, ...], second: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, int]]:
    """The common beginning of two labels' tokens, and the two tokens where they part."""
    for i, pair in enumerate(zip(first, second, strict=False)):
        if pair[0] != pair[1]:
            return first[:i], pair
    why = f"One label's tokens begin the other's: {list(first)} and {list(second)}."
    raise KitError(why, "Set judge.labels to two texts of which neither starts with the other.", 2)


def label_in(text: str, labels: tuple[str, str]) -> Label:
    """The label that stands first in a generated text (the longer one, where one holds the other)."""
    found = [
        (text.find(label), -len(label), name) for label, name in zip(labels, ("ENOUGH", "NOT_ENOUGH"), strict=True)
    ]
    return min((x for x in found if x[0] >= 0), default=(0, 0, "UNPARSED"))[2]  # type: ignore[return-value]


def from_problem(problem: Problem) -> PrefixRow:
    """A problem's own trace, whole, as `cut` takes it."""
    fields = {name: getattr(problem, name) for name in ("id", "question", "answer")}
    return whole(TraceRow(**fields, samples=(Sample(text=problem.trace or "", verdict="unparsed"),), kept=(0,)))[0]


def _fixed(row: PrefixRow, ratio: float | None = None) -> PrefixRow:
    """Cut at a share of the sentences, at least one (the ratio-X baselines); None keeps all."""
    if not row.trace.strip():
        return _rejected(row, "empty trace", "there is nothing to cut")
    return _kept(row, max(1, round(row.sentences_total * (1 if ratio is None else ratio))))


def _kept(row: PrefixRow, k: int) -> PrefixRow:
    return row.model_copy(update={"sentences": k, "ratio": k / row.sentences_total, "end": ends(row.trace)[k - 1]})


def _rejected(row: PrefixRow, reason: str, detail: str) -> PrefixRow:
    return row.model_copy(update={"rejected": reason, "detail": detail, "sufficient": False})


def shown(row: PrefixRow) -> dict[str, Any]:
    """{id, sentences, kept, sufficient, verdicts: [{sentences, label, margin}], and what it cost}."""
    names = ("id", "sufficient", "prompt_tokens", "evaluated_tokens", "reused_tokens", "seconds", "rejected", "detail")
    found = {"sentences": row.sentences_total, "kept": row.sentences if row.rejected is None else None}
    found |= {"verdicts": [verdict.model_dump() for verdict in row.verdicts]}
    return {name: getattr(row, name) for name in names} | found


def show(result: dict[str, Any]) -> None:
    """Print each trace's verdict curve: the margin's distance from the threshold by position, the cut in words."""
    from kit.report import render

    print(render("judge.txt.j2", **result))
