"""align: the student continues from the kept prefix; right answers become training rows (section 3.3, Eq. 9).

Paper: one continuation a prefix, wrong ones dropped. Here: several may be drawn, and a prefix none of
whose continuations is right may be lengthened and tried again; each row says how it was kept.
The baselines' training targets are made here too, so that every method shares this one way out.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import cached_property

from kit.answers import Grader
from kit.backends import Backend, Request, open_backend
from kit.prompts import draft_text, render, solve_text, target_text, text_of
from kit.records import AlignedRow, PrefixRow, RowFile, Sample, TraceRow, TrainRow, digest, write_atomic
from kit.run import Run, stopwatch, tallies, work_through
from kit.sentences import ends
from kit.teach import choose, graded_samples, tally

NAME = "aligned.jsonl"
UNCONTINUED = ("long-trace", "label-only", "prefix-only")  # methods that ask the student for nothing here


def align(run: Run) -> None:
    """The stage: one `AlignedRow` a prefix (several with keep: all), and train.jsonl from the kept ones."""
    drafts = [Draft(row, row.sentences) for row in _prefixes(run)]
    if not run.begin("align", digest([draft.row for draft in drafts]), lambda: _output(run)):
        return
    units = [(draft.row.id, draft) for draft in drafts if not draft.row.rejected]
    with stopwatch() as seconds, Grader() as grader, ExitStack() as held:
        aligner = Aligner(run, grader, held)
        work = aligner.take_over if run.config.method in UNCONTINUED else aligner.extend
        file = RowFile(run.path(NAME), AlignedRow)
        rows = work_through(run, "align", file, units, 4 * run.config.student.parallel, work)
    lines = training_rows(run, rows)
    write_atomic(run.path("train.jsonl"), "".join(json.dumps(r.model_dump(), ensure_ascii=False) + "\n" for r in lines))
    run.finish("align", _output(run), len(units), len(lines), seconds(), **tallies(rows))


def training_rows(run: Run, rows: list[AlignedRow]) -> list[TrainRow]:
    """Alpaca rows of what was kept, in order; the target is the method's."""
    method, instruction, lines = run.config.method, text_of(run.config.prompts, "instruction"), []
    for row in rows:
        kept = [row.samples[i].text for i in choose(row.samples, run.config.align.keep)] or [row.continuation]
        for text in [] if row.rejected else kept:
            lines.append(TrainRow(instruction=instruction, input=row.question, output=target(method, row, text)))
    return lines


def target(method: str, row: AlignedRow, continuation: str) -> str:
    """What the student learns to write under a method.

    Here: prefix-only and label-only end in the boxed gold answer, and so does a long trace that holds no box of its
    own, so that a difference to P-ALIGN is one of reasoning and not of the answer's format.
    """
    boxed = f"\\boxed{{{row.answer}}}"
    targets = {
        "label-only": boxed,
        "long-trace": row.prefix if "\\boxed{" in row.prefix else f"{row.prefix}\n\n{boxed}",
        "prefix-only": target_text(row.prefix, boxed),
        "continuation-only": continuation,
    }
    return targets.get(method) or target_text(row.prefix, continuation)


@dataclass(frozen=True)
class Draft:
    """A prefix under way: the cut of this round and what was drawn so far."""

    row: PrefixRow
    sentences: int
    round: int = 0
    drawn: int = 0
    right: int = 0
    seconds: float = 0.0
    samples: tuple[Sample, ...] = ()

    @property
    def id(self) -> str:
        """Of the request: a round's samples have their own seeds."""
        return f"{self.row.id}+{self.round}" if self.round else self.row.id

    @property
    def prefix(self) -> str:
        """The trace up to the cut."""
        judged = self.sentences == self.row.sentences
        return self.row.trace[: self.row.end if judged else ends(self.row.trace)[self.sentences - 1]]

    def longer(self, rounds: int) -> Draft | None:
        """The next round's: even steps from the judged cut to the whole trace in the last; None behind that."""
        left, number = self.row.sentences_total - self.row.sentences, self.round + 1
        if number > rounds or self.sentences >= self.row.sentences_total:
            return None
        cut = max(self.sentences + 1, self.row.sentences + math.ceil(left * number / rounds))
        return replace(self, sentences=cut, round=number)


class Aligner:
    """Makes rows for a batch of drafts; the student is loaded when it is first needed, and closed with `held`."""

    def __init__(self, run: Run, grader: Grader, held: ExitStack) -> None:
        self.run, self.grader, self.config, self.held = run, grader, run.config.align, held

    @cached_property
    def backend(self) -> Backend:
        """The student."""
        return self.held.enter_context(closing(open_backend(self.run.config.student)))

    def take_over(self, drafts: list[Draft]) -> Iterator[AlignedRow]:
        """Rows of the methods that need no continuation."""
        yield from (self._row(draft, None, self.run.config.method) for draft in drafts)

    def extend(self, drafts: list[Draft]) -> Iterator[AlignedRow]:
        """Rows with the student's continuations, each as it is finished; the lengthened ones follow."""
        verifier = self.run.config.data.train.verifier
        while drafts:
            by_id = {draft.id: draft for draft in drafts}
            longer: dict[str, Draft] = {}
            for done in self.backend.generate([self._request(draft) for draft in drafts]):
                draft = by_id[done.id]
                texts = [(c.text, c.finish, len(c.ids)) for c in done.completions]
                samples = graded_samples(self.grader, texts, draft.row.answer, verifier)
                right = draft.right + sum(sample.verdict == "correct" for sample in samples)
                drawn, spent = draft.drawn + len(samples), draft.seconds + done.seconds
                draft = replace(draft, samples=samples, drawn=drawn, right=right, seconds=spent)
                again = None if choose(samples, "first") or done.error else draft.longer(self.config.lengthen)
                if again:
                    longer[done.id] = again
                else:
                    yield self._row(draft, done.error, self.config.keep)
            drafts = [longer[id] for id in by_id if id in longer]

    def _request(self, draft: Draft) -> Request:
        config, student, question = self.run.config, self.run.config.student, draft.row.question
        if self.config.mode == "prefill":
            user, answer = solve_text(config.prompts, question), draft.prefix
        else:
            user, answer = draft_text(config.prompts, question, draft.prefix), ""
        prompt = render(self.backend.tokenizer, user, student.system, answer, student.thinking)
        return Request(draft.id, prompt, self.config.sampling, n=self.config.samples, seed=config.seed)

    def _row(self, draft: Draft, error: str | None, how: str) -> AlignedRow:
        kept, why = choose(draft.samples, self.config.keep), {}
        if error:
            why = {"rejected": "generation failed", "detail": error}
        elif not kept and how not in UNCONTINUED:
            why = {"rejected": "no right continuation", "detail": tally(draft.samples)}
        return AlignedRow(
            **draft.row.model_dump(include={"id", "question", "answer"}),
            prefix=draft.prefix,
            continuation=draft.samples[kept[0]].text if kept else "",
            samples=draft.samples,
            pass_rate=draft.right / draft.drawn if draft.drawn else 0.0,
            kept_by=None if why else how + (f"+{draft.round}" if draft.round else ""),
            lengthened=draft.round,
            answer_in_prefix=holds_answer(draft.prefix, draft.row.answer),
            seconds=round(draft.seconds, 3),
            **why,
        )


def holds_answer(prefix: str, answer: str) -> bool:
    """Whether the gold answer stands in the prefix as a word of its own (a number not inside another number)."""
    return bool(answer and re.search(rf"(?<![\w.]){re.escape(answer)}(?![\w]|\.\d)", prefix))


def _prefixes(run: Run) -> list[PrefixRow]:
    """What there is to continue. Methods without a cut take the whole trace."""
    if run.config.method == "zero-shot":
        return []
    if run.config.method in ("long-trace", "label-only"):
        run.require("teach")
        return [row for trace in run.rows("traces.jsonl", TraceRow) for row in whole(trace)]
    run.require("truncate")
    return run.rows("prefixes.jsonl", PrefixRow)


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


def _output(run: Run) -> str:
    """Digest of aligned.jsonl together with train.jsonl, so that either one's loss is seen."""
    path = run.folder / "train.jsonl"
    train = hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.exists() else "none"
    return f"{digest(run.rows(NAME, AlignedRow))} {train}"
