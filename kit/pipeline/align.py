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
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import partial
from typing import Any

from kit.core.config import Config
from kit.core.records import AlignedRow, PrefixRow, TraceRow, TrainRow
from kit.core.run import Run
from kit.core.stages import file_digest, tallies
from kit.core.storage import digest, write_atomic
from kit.judging.sentences import ends
from kit.prompts import draft_text, solve_text, target, text_of
from kit.sampling import FACTS, Sampler, choose, why

NAME, TRAIN = "aligned.jsonl", "train.jsonl"
UNCUT = ("long-trace", "label-only")  # methods that take the whole trace
UNCONTINUED = (*UNCUT, "prefix-only")  # methods that ask the student for nothing here


def align(run: Run) -> None:
    """The stage: one `AlignedRow` a prefix (several with keep: all), and train.jsonl from the kept ones."""
    prefixes = _prefixes(run)
    if not run.begin("align", digest(prefixes), lambda: _output(run)):
        return
    sound = [row for row in prefixes if not row.rejected]
    with Sampler(run, run.config.student, run.config.align) as student:
        work = take_over if run.config.method in UNCONTINUED else extend
        rows = student.sweep("align", NAME, AlignedRow, sound, partial(work, student))
    lines = training_rows(run, rows)
    write_atomic(
        run.path(TRAIN),
        "".join(json.dumps(r.model_dump(), ensure_ascii=False) + "\n" for r in lines),
    )
    run.finish("align", _output(run), len(sound), len(lines), **tallies(rows))


def _prefixes(run: Run) -> list[PrefixRow]:
    """What there is to continue."""
    if run.config.method == "zero-shot":
        return []
    if run.config.method in UNCUT:
        run.require("teach")
        return [row for trace in run.rows("traces.jsonl", TraceRow) for row in trace.whole(ends)]
    run.require("truncate")
    return run.rows("prefixes.jsonl", PrefixRow)


def take_over(student: Sampler, rows: list[PrefixRow]) -> Iterator[AlignedRow]:
    """Rows of the methods that need no continuation."""
    yield from (_row(row, row, continuation="", kept_by=student.run.config.method) for row in rows)


def extend(student: Sampler, rows: list[PrefixRow]) -> Iterator[AlignedRow]:
    """Rows with the student's continuations, each as it is finished; rounds of lengthening follow."""
    config, how = student.run.config, student.run.config.align
    tried, seconds, number = defaultdict(list), Counter(), 0
    while rows:
        drafts, failed = [longer(row, number, how.extend_rounds) for row in rows], set()
        judged = {draft.id: row for draft, row in zip(drafts, rows, strict=True)}
        for draft, samples, done in student.ask(
            drafts, config.data.train.verifier, partial(words, config)
        ):
            row = judged[draft.id]
            tried[row.id] += [sample.verdict == "correct" for sample in samples]
            seconds[row.id] += done.seconds
            kept = choose(samples, how.keep)
            if (
                not kept
                and not done.error
                and number < min(how.extend_rounds, row.sentences_total - row.sentences)
            ):
                failed.add(row.id)
                continue
            outcome = {"kept_by": f"{how.keep}+{number}" if number else how.keep}
            outcome = outcome if kept else why(done, "no right continuation", samples)
            yield _row(
                row,
                draft,
                continuation=samples[kept[0]].text if kept else "",
                samples=samples,
                pass_rate=sum(tried[row.id]) / max(len(tried[row.id]), 1),
                lengthened=number,
                seconds=round(seconds[row.id], 3),
                **outcome,
            )
        rows, number = [row for row in rows if row.id in failed], number + 1


def words(config: Config, draft: PrefixRow) -> tuple[str, str]:
    """What the student is asked, and how its answer begins (align.mode)."""
    prefix = draft.trace[: draft.end]
    if config.align.mode == "prefill":
        return solve_text(config.prompts, draft.question), prefix
    return draft_text(config.prompts, draft.question, prefix), ""


def longer(row: PrefixRow, number: int, rounds: int) -> PrefixRow:
    """The prefix of a round: even steps from the judged cut (0) to the whole trace (the last)."""
    if not number:
        return row
    left = row.sentences_total - row.sentences
    kept = row.sentences + math.ceil(left * number / min(rounds, left))
    return row.model_copy(
        update={"id": f"{row.id}+{number}", "sentences": kept, "end": ends(row.trace)[kept - 1]}
    )


def _row(row: PrefixRow, draft: PrefixRow, **found: Any) -> AlignedRow:
    facts, prefix = row.model_dump(include=FACTS), row.trace[: draft.end]
    return AlignedRow(
        **facts, prefix=prefix, answer_in_prefix=holds_answer(prefix, row.answer), **found
    )


def holds_answer(prefix: str, answer: str) -> bool:
    """Whether the gold answer stands in the prefix as a word of its own (a number not inside another number)."""
    return bool(answer and re.search(rf"(?<![\w.]){re.escape(answer)}(?![\w]|\.\d)", prefix))


def training_rows(run: Run, rows: list[AlignedRow]) -> list[TrainRow]:
    """Alpaca rows of what was kept, in order; the target is the method's."""
    method, instruction, lines = run.config.method, text_of(run.config.prompts, "instruction"), []
    for row in rows:
        kept = [row.samples[i].text for i in choose(row.samples, run.config.align.keep)] or [
            row.continuation
        ]
        for text in [] if row.rejected else kept:
            lines.append(
                TrainRow(
                    instruction=instruction, input=row.question, output=target(method, row, text)
                )
            )
    return lines


def _output(run: Run) -> str:
    """Digest of both files, so that either one's loss is seen."""
    path = run.folder / TRAIN
    train = hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.exists() else "none"
    return f"{file_digest(run, NAME, AlignedRow)} {train}"
