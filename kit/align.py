"""align: the student continues from the kept prefix; right answers become training rows (section 3.3, Eq. 9).

Paper: one continuation a prefix, wrong ones dropped. Here: several may be drawn, and a prefix none of
whose continuations is right may be lengthened and tried again; each row says how it was kept.
The baselines' training targets are made here too, so that every method shares this one way out.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from kit.answers import Grader
from kit.backends import Backend, Request, open_backend
from kit.prompts import draft_text, render, solve_text, target_text, text_of
from kit.records import AlignedRow, PrefixRow, RowFile, Sample, TraceRow, TrainRow, digest, write_atomic
from kit.run import Run, stopwatch, work_through
from kit.sentences import ends
from kit.teach import choose, graded_samples, tally

NAME = "aligned.jsonl"
UNCONTINUED = ("long-trace", "label-only", "prefix-only")  # methods that ask the student for nothing here


@dataclass(frozen=True)
class Draft:
    """A prefix under way: the cut of this round and what was drawn so far."""

    row: PrefixRow
    sentences: int
    round: int = 0
    drawn: int = 0
    right: int = 0
    seconds: float = 0.0
    samples: tuple[Sample, ...] = field(default=())

    @property
    def prefix(self) -> str:
        if self.sentences == self.row.sentences:
            return self.row.trace[: self.row.end]
        return self.row.trace[: ends(self.row.trace)[self.sentences - 1]]


def align(run: Run) -> None:
    """The stage: one `AlignedRow` a prefix (several with keep: all), and train.jsonl from the kept ones."""
    method = run.config.method
    drafts = _drafts(run)
    source = digest([draft.row for draft in drafts])
    if not run.begin("align", source, lambda: _output(run)):
        return
    with stopwatch() as seconds, Grader() as grader, Aligner(run, grader) as aligner:
        units = [(draft.row.id, draft) for draft in drafts if not draft.row.rejected]
        work = aligner.take_over if method in UNCONTINUED else aligner.extend
        rows = work_through(run, "align", RowFile(run.path(NAME), AlignedRow), units, aligner.batch_rows, work)
    lines = training_rows(run, rows)
    write_atomic(run.path("train.jsonl"), "".join(json.dumps(r.model_dump(), ensure_ascii=False) + "\n" for r in lines))
    rounds = Counter(row.lengthened for row in rows if not row.rejected)
    run.finish(
        "align",
        _output(run),
        rows_in=len(units),
        rows_out=len(lines),
        seconds=seconds(),
        tokens=sum(sample.tokens for row in rows for sample in row.samples),
        kept_by_round={str(k): v for k, v in sorted(rounds.items())},
        answer_in_prefix=sum(row.answer_in_prefix for row in rows if not row.rejected),
        finishes=dict(Counter(sample.finish for row in rows for sample in row.samples)),
        rejected=dict(Counter(row.rejected for row in rows if row.rejected)),
    )


def training_rows(run: Run, rows: list[AlignedRow]) -> list[TrainRow]:
    """Alpaca rows of what was kept, in order; the target is the method's."""
    method, instruction = run.config.method, text_of(run.config.prompts, "instruction")
    lines = []
    for row in rows:
        if row.rejected:
            continue
        kept = choose(row.samples, run.config.align.keep) if row.samples else ()
        for text in [row.samples[i].text for i in kept] or [row.continuation]:
            lines.append(TrainRow(instruction=instruction, input=row.question, output=target(method, row, text)))
    return lines


def target(method: str, row: AlignedRow, continuation: str) -> str:
    """What the student learns to write under a method.

    Here: prefix-only and label-only end in the boxed gold answer, and so does a long trace that holds no box of its
    own, so that a difference to P-ALIGN is one of reasoning and not of the answer's format.
    """
    boxed = f"\\boxed{{{row.answer}}}"
    if method == "label-only":
        return boxed
    if method == "long-trace":
        return row.prefix if "\\boxed{" in row.prefix else f"{row.prefix}\n\n{boxed}"
    if method == "prefix-only":
        return target_text(row.prefix, boxed)
    return continuation if method == "continuation-only" else target_text(row.prefix, continuation)


class Aligner:
    """Continues a batch of prefixes; loads the student only when it is needed."""

    def __init__(self, run: Run, grader: Grader) -> None:
        self.run, self.grader, self.config = run, grader, run.config.align
        self.backend: Backend | None = None
        self.batch_rows = 4 * run.config.student.parallel

    def extend(self, drafts: list[Draft]) -> Iterator[AlignedRow]:
        """Rows with the student's continuations, each as it is finished; the lengthened ones follow."""
        if self.backend is None:
            self.backend = open_backend(self.run.config.student)
        while drafts:
            by_id = {_request_id(draft): draft for draft in drafts}
            longer: list[Draft] = []
            for generation in self.backend.generate([self._request(draft) for draft in drafts]):
                draft = by_id[generation.id]
                texts = [(c.text, c.finish, len(c.ids)) for c in generation.completions]
                samples = graded_samples(self.grader, texts, draft.row.answer, self.run.config.data.train.verifier)
                right = draft.right + sum(sample.verdict == "correct" for sample in samples)
                drawn, spent = draft.drawn + len(samples), draft.seconds + generation.seconds
                draft = replace(draft, samples=samples, drawn=drawn, right=right, seconds=spent)
                if choose(samples, "first") or generation.error or not self._can_lengthen(draft):
                    yield self._row(draft, generation.error)
                else:
                    longer.append(self._lengthened(draft))
            drafts = sorted(longer, key=lambda draft: list(by_id).index(_request_id(draft, back=1)))

    def take_over(self, drafts: list[Draft]) -> Iterator[AlignedRow]:
        """Rows of the methods that need no continuation."""
        for draft in drafts:
            yield self._row(draft, None)

    def _request(self, draft: Draft) -> Request:
        assert self.backend is not None
        config, student = self.run.config, self.run.config.student
        if self.config.mode == "prefill":
            user, answer = solve_text(config.prompts, draft.row.question), draft.prefix
        else:
            user, answer = draft_text(config.prompts, draft.row.question, draft.prefix), ""
        prompt = render(self.backend.tokenizer, user, student.system, answer, student.thinking)
        return Request(
            id=_request_id(draft), prompt=prompt, sampling=self.config.sampling, n=self.config.samples, seed=config.seed
        )

    def _can_lengthen(self, draft: Draft) -> bool:
        return draft.round < self.config.lengthen and draft.sentences < draft.row.sentences_total

    def _lengthened(self, draft: Draft) -> Draft:
        """The next cut: even steps from the judged one to the whole trace in the last round."""
        row, number = draft.row, draft.round + 1
        step = math.ceil((row.sentences_total - row.sentences) * number / self.config.lengthen)
        return replace(draft, sentences=max(draft.sentences + 1, row.sentences + step), round=number)

    def _row(self, draft: Draft, error: str | None) -> AlignedRow:
        uncontinued = self.run.config.method in UNCONTINUED
        kept = choose(draft.samples, self.config.keep)
        rejected = detail = None
        if error:
            rejected, detail = "generation failed", error
        elif not kept and not uncontinued:
            rejected, detail = "no right continuation", tally(draft.samples)
        how = self.run.config.method if uncontinued else self.config.keep
        return AlignedRow(
            id=draft.row.id,
            question=draft.row.question,
            answer=draft.row.answer,
            prefix=draft.prefix,
            continuation=draft.samples[kept[0]].text if kept else "",
            samples=draft.samples,
            pass_rate=draft.right / draft.drawn if draft.drawn else 0.0,
            kept_by=None if rejected else how + (f"+{draft.round}" if draft.round else ""),
            lengthened=draft.round,
            answer_in_prefix=holds_answer(draft.prefix, draft.row.answer),
            seconds=round(draft.seconds, 3),
            rejected=rejected,
            detail=detail,
        )

    def __enter__(self) -> Aligner:
        return self

    def __exit__(self, *_: object) -> None:
        if self.backend is not None:
            self.backend.close()


def holds_answer(prefix: str, answer: str) -> bool:
    """Whether the gold answer stands in the prefix as a word of its own (a number not inside another number)."""
    return re.search(rf"(?<![\w.]){re.escape(answer)}(?![\w]|\.\d)", prefix) is not None if answer else False


def _drafts(run: Run) -> list[Draft]:
    """What there is to continue. Methods without a cut take the whole trace."""
    method = run.config.method
    if method == "zero-shot":
        return []
    if method not in ("long-trace", "label-only"):
        run.require("truncate")
        return [Draft(row, row.sentences) for row in run.rows("prefixes.jsonl", PrefixRow)]
    run.require("teach")
    return [Draft(row, row.sentences) for trace in run.rows("traces.jsonl", TraceRow) for row in whole(trace)]


def whole(row: TraceRow) -> list[PrefixRow]:
    """A problem's kept traces as prefixes that keep everything; ids as truncate gives them."""
    found = []
    for sample in row.kept:
        trace = row.samples[sample].text
        count = len(ends(trace))
        fields = {"id": row.id if len(row.kept) == 1 else f"{row.id}.{sample}", "trace": trace, "end": len(trace)}
        fields |= {"question": row.question, "answer": row.answer, "sentences": count, "sentences_total": count}
        found.append(PrefixRow(**fields, ratio=1.0, sufficient=True))
    return found


def _request_id(draft: Draft, back: int = 0) -> str:
    number = draft.round - back
    return f"{draft.row.id}+{number}" if number else draft.row.id


def _output(run: Run) -> str:
    """Digest of aligned.jsonl together with train.jsonl, so that either one's loss is seen."""
    train = run.folder / "train.jsonl"
    text = train.read_text(encoding="utf-8") if train.exists() else ""
    mark = AlignedRow(id="train.jsonl", question=text, answer="", prefix="", continuation="")
    return digest([*run.rows(NAME, AlignedRow), mark])


def train_file_rows(run: Run) -> list[TrainRow]:
    """The rows of train.jsonl."""
    text = (run.folder / "train.jsonl").read_text(encoding="utf-8")
    return [TrainRow.model_validate_json(line) for line in text.splitlines() if line.strip()]
