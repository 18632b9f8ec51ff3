"""align: the student continues from the kept prefix; correct answers become training rows (Eq. 9).

Section 3.3. Paper: one continuation per prefix, wrong ones dropped. Here: several may be drawn, and
a prefix without a correct continuation may be extended and tried again; each row says how it was
kept. The baselines' training rows are made here too, so that all methods end alike.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from kit import Json
from kit.backends.base import Generation
from kit.core.fingerprints import file_hash
from kit.core.methods import method_of
from kit.core.records import AlignedRow, PrefixRow, Sample, TrainRow
from kit.core.run import Run
from kit.core.stages import file_digest, tallies
from kit.core.storage import as_line, digest, write_atomic
from kit.judging.baselines import holds_answer
from kit.judging.cut import keep
from kit.pipeline.truncate import whole_traces
from kit.prompts import draft_turns, target, text_of
from kit.sampling import (
    PROBLEM_FIELDS,
    Sampled,
    Sampler,
    choose,
    model_fingerprints,
    rejection,
)

NAME = "aligned.jsonl"
TRAIN = "train.jsonl"


def align(run: Run) -> None:
    """The stage: one `AlignedRow` per prefix, and train.jsonl from the kept ones."""
    config = run.config
    prefixes = _prefixes(run)
    work = pass_through
    models: Callable[[], Json] = dict
    if method_of(config.method).continued:
        work = continue_prefixes
        models = partial(model_fingerprints, config, "student", prefixes)
    if not run.begin("align", digest(prefixes), lambda: _output(run), models):
        return
    prefixes = [row for row in prefixes if not row.rejected]
    with Sampler(run, config.student, config.align) as student:
        rows = student.write_rows("align", NAME, AlignedRow, prefixes, partial(work, student))
    train_rows = training_rows(run, rows)
    # as LLaMA-Factory reads it: no digest in the lines
    text = "".join(as_line(row.model_dump_json()) for row in train_rows)
    path = run.path(TRAIN)
    if path.exists() and path.read_bytes() != text.encode():
        run.set_aside([path])
        run.progress.warn(
            f"align: {TRAIN} was not what {NAME} gives now; moved to stale/, and written anew"
        )
    write_atomic(path, text)
    run.finish("align", len(prefixes), len(train_rows), **tallies(rows))


def _prefixes(run: Run) -> list[PrefixRow]:
    """What there is to continue."""
    rule = method_of(run.config.method).cut
    if rule == "none":
        return []
    if rule == "whole":
        run.require("teach")
        return whole_traces(run)
    run.require("truncate")
    return run.rows("prefixes.jsonl", PrefixRow)


def pass_through(student: Sampler, rows: list[PrefixRow]) -> Iterator[AlignedRow]:
    """Rows of the methods that need no continuation."""
    for row in rows:
        yield _aligned(row, row, kept_by=student.run.config.method)


def continue_prefixes(student: Sampler, rows: list[PrefixRow]) -> Iterator[AlignedRow]:
    """Rows with the student's continuations, each as it is finished.

    A prefix without a correct continuation comes again in the next round, with a longer prefix, as
    long as there are rounds and sentences left.
    """
    config = student.run.config
    settings = config.align
    # by row id, over all rounds
    earlier: dict[str, tuple[Sample, ...]] = defaultdict(tuple)
    seconds: dict[str, float] = defaultdict(float)
    for round_number in range(settings.extend_rounds + 1):
        # 1. Ask the student to continue from every prefix that is still open.
        drafts = []
        row_of_draft = {}
        for row in rows:
            draft = longer(row, round_number, settings.extend_rounds)
            drafts.append(draft)
            row_of_draft[draft.id] = row
        failed = set()
        for draft, samples, generation in _continued(student, drafts):
            row = row_of_draft[draft.id]
            seconds[row.id] += generation.seconds

            # 2. No correct continuation: the next round tries a longer prefix.
            kept = choose(samples, settings.keep)
            rounds = min(settings.extend_rounds, row.sentences_total - row.sentences)
            if not kept and not generation.error and round_number < rounds:
                failed.add(row.id)
                earlier[row.id] += tuple(samples)
                continue

            # 3. A row, kept or given up.
            if kept:
                kept_by = f"{settings.keep}+{round_number}" if round_number else settings.keep
                outcome = {"continuation": samples[kept[0]].text, "kept_by": kept_by}
            else:
                outcome = rejection(generation, "no right continuation", samples)
            verdicts = [sample.verdict for sample in (*earlier[row.id], *samples)]
            yield _aligned(
                row,
                draft,
                samples=samples,
                drawn_by_judge=bool(draft.samples),
                earlier_samples=earlier[row.id],
                pass_rate=verdicts.count("correct") / max(len(verdicts), 1),
                lengthened=round_number,
                seconds=round(seconds[row.id], 3),
                **outcome,
            )
        rows = [row for row in rows if row.id in failed]
        if not rows:
            return


def _continued(student: Sampler, drafts: list[PrefixRow]) -> Iterator[Sampled]:
    """Each draft with its samples: those that the judge drew at its cut, or new ones."""
    config = student.run.config

    def turns(draft: PrefixRow) -> tuple[str, str]:
        return draft_turns(config, draft.question, draft.prefix)

    undrawn = []
    for draft in drafts:
        if draft.samples:
            yield draft, draft.samples, Generation(draft.id)
        else:
            undrawn.append(draft)
    # without drafts, no model is opened
    if undrawn:
        yield from student.sample(undrawn, turns)


def longer(row: PrefixRow, round_number: int, rounds: int) -> PrefixRow:
    """The prefix of a round: even steps from the judged cut (0) to the whole trace (the last)."""
    if round_number == 0:
        return row
    left = row.sentences_total - row.sentences
    added = math.ceil(left * round_number / min(rounds, left))
    return keep(row, row.sentences + added, id=f"{row.id}+{round_number}")


def _aligned(row: PrefixRow, draft: PrefixRow, continuation: str = "", **fields: Any) -> AlignedRow:
    return AlignedRow(
        **row.model_dump(include=PROBLEM_FIELDS),
        prefix=draft.prefix,
        continuation=continuation,
        answer_in_prefix=holds_answer(draft.prefix, row.answer),
        **fields,
    )


def training_rows(run: Run, rows: list[AlignedRow]) -> list[TrainRow]:
    """Alpaca rows of what was kept, in order; with keep: all, one per correct continuation."""
    config = run.config
    instruction = text_of(config.prompts, "instruction")
    lines = []
    for row in rows:
        if row.rejected:
            continue
        kept = choose(row.samples, config.align.keep)
        texts = [row.samples[index].text for index in kept]
        # methods that draw no samples have an empty continuation
        for text in texts or [row.continuation]:
            output = target(config.method, row, text)
            lines.append(TrainRow(instruction=instruction, input=row.question, output=output))
    return lines


def _output(run: Run) -> str:
    """Digest of both files, so that either one's loss is noticed."""
    path = run.folder / TRAIN
    train_digest = file_hash(path)[:16] if path.exists() else "none"
    return f"{file_digest(run, NAME, AlignedRow)} {train_digest}"
