"""The rows that pass between stages: what they refuse, and a trace kept whole."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from kit.core.records import PrefixRow, Sample, TraceRow
from kit.core.storage import RowFile
from kit.judging.sentences import ends


def trace_row(kept: tuple[int, ...], *texts: str) -> TraceRow:
    samples = tuple(Sample(text=text, verdict="correct", tokens=5) for text in texts)
    return TraceRow(id="p", question="q", answer="7", samples=samples, kept=kept)


def test_lone_surrogates_in_what_a_model_wrote_are_stored_as_replacement_characters(tmp_path):
    file = RowFile(tmp_path / "t.jsonl", TraceRow)
    wrote = TraceRow(
        id="\ud800",
        question="q",
        answer="7",
        kept=(),
        samples=(Sample(text="so \udc00", verdict="wrong"),),
    )
    file.append(wrote)
    assert file.read() == [wrote] and not file.damaged
    assert (wrote.id, wrote.samples[0].text) == ("\ufffd", "so \ufffd")


def test_a_kept_trace_is_a_prefix_that_keeps_everything():
    [row] = trace_row((1,), "no.", "One. Two.").whole(ends)
    assert (row.id, row.trace, row.end) == ("p", "One. Two.", 9)
    assert (row.sentences, row.sentences_total, row.ratio, row.sufficient) == (2, 2, 1.0, True)


def test_several_kept_traces_of_a_problem_have_ids_of_their_own():
    rows = trace_row((0, 2), "One.", "no.", "Two.").whole(ends)
    assert [(row.id, row.trace) for row in rows] == [("p.0", "One."), ("p.2", "Two.")]


def test_a_row_counts_the_tokens_that_were_generated_or_evaluated_for_it():
    row = trace_row((0,), "One.", "Two.")
    assert row.processed_tokens == 10
    [prefix] = row.whole(ends)
    assert prefix.model_copy(update={"prefill_tokens": 12}).processed_tokens == 12


def test_a_row_is_frozen_and_takes_no_unknown_field():
    row = trace_row((0,), "One.")
    with pytest.raises(ValidationError):
        row.id = "other"
    with pytest.raises(ValidationError, match="brand_new"):
        PrefixRow(**row.whole(ends)[0].model_dump(), brand_new=1)
