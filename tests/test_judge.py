"""Verdicts: cached ones equal uncached ones on real traces and the packaged model; labels."""

from __future__ import annotations

import random
from typing import Any

import pytest

from kit.backends import open_backend
from kit.backends.base import common_prefix_len
from kit.backends.scripted import ByteTokenizer
from kit.core import config as configs
from kit.core.errors import KitError
from kit.core.records import PrefixRow, Problem, Verdict
from kit.judging import search
from kit.judging.cut import cut, from_problem
from kit.judging.judge import Judge, first_label, split_labels
from kit.judging.sentences import ends
from kit.judging.trace import TraceJudge
from tests.judging_cases import LengthBackend, judge_config, whole_row

NEAR = 1e-3  # margins closer to the threshold than this may give another label: counted


@pytest.fixture(scope="module")
def student() -> Any:
    backend = open_backend(configs.Config().student)
    yield backend
    backend.close()


def row_of(raw: dict[str, str], copies: int = 1) -> PrefixRow:
    """A real trace, or several copies of it in a row, as `cut` takes it."""
    fields = {name: raw[name] for name in ("id", "question", "answer")}
    return from_problem(Problem(**fields, trace=raw["long_cot"] * copies))


@pytest.fixture(scope="module")
def traces(real_traces: list[dict[str, str]]) -> list[PrefixRow]:
    """Real traces, shortest first: three in every clone."""
    return [row_of(raw) for raw in real_traces]


def uncached_margins(judge: Judge, row: PrefixRow, boundaries: list[int]) -> dict[int, float]:
    """Margins without a cache, one prompt after the other."""
    session = judge.backend.session(uncached=True)
    margins = {}
    for k in boundaries:
        request = judge.request(row, row.trace[: ends(row.trace)[k - 1]])
        margins[k] = judge.margin(session.score([request])[0])
    return margins


def compare(verdicts: tuple[Verdict, ...], uncached: dict[int, float], threshold: float) -> int:
    """Check cached verdicts against uncached margins; returns the near-ties."""
    near_ties = 0
    for verdict in verdicts:
        margin = uncached[verdict.sentences]
        is_near = abs(margin - threshold) < NEAR
        assert verdict.margin == pytest.approx(margin, abs=1e-3)
        assert (verdict.label == "ENOUGH") == (margin >= threshold) or is_near
        near_ties += is_near
    return near_ties


@pytest.fixture(scope="module")
def beginning(traces: list[PrefixRow]) -> PrefixRow:
    """The first eight sentences of a real trace: enough to cut, and quick to judge."""
    row = traces[0]
    fields = row.model_dump(include={"id", "question", "answer"})
    return from_problem(Problem(**fields, trace=row.trace[: ends(row.trace)[7]]))


def test_a_trace_without_memory_is_an_outcome_and_other_errors_are_raised(
    student: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = Judge(configs.Config(), student)
    row = whole_row()

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(student, "session", fail)
    error: Exception = RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
    rejected = cut(judge, row)
    assert rejected.rejected == "out of memory" and "2 GiB" in rejected.detail
    assert rejected.sufficient is False and not rejected.verdicts
    error = RuntimeError("a defect")
    with pytest.raises(RuntimeError, match="a defect"):
        cut(judge, row)


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("verbal", 0),
        pytest.param("answer", 0, marks=pytest.mark.slow),
        pytest.param("verbal", 6, marks=pytest.mark.slow),
        pytest.param("answer", 1, marks=pytest.mark.slow),
    ],
)
def test_searches_equal_uncached_ones_at_every_boundary(
    kind: str, count: int, student: Any, beginning: PrefixRow, traces: list[PrefixRow]
) -> None:
    """Thresholds at the margins' median and above all give both labels, and cuts in the middle.

    On so many whole traces; 0: on a trace's beginning.
    """
    judge = Judge(judge_config(kind=kind), student)
    middle_cuts = 0
    near_ties = 0
    for number, row in enumerate(traces[:count] or [beginning]):
        m = row.sentences_total
        uncached = uncached_margins(judge, row, list(range(1, m + 1)))
        ordered = sorted(uncached.values())
        judge.threshold = (ordered[m // 2] + ordered[m // 2 - 1]) / 2
        rows = {name: cut(judge, row, search=name) for name in ("binary", "gallop", "scan")}
        enough = [uncached[k] >= judge.threshold for k in range(1, m + 1)]
        assert len(set(enough)) == 2
        near_ties += sum(
            compare(found.verdicts, uncached, judge.threshold) for found in rows.values()
        )
        if all(abs(margin - judge.threshold) > NEAR for margin in ordered):
            binary = search.binary(m, lambda k, *_, enough=enough: enough[k - 1])
            gallop = search.gallop(m, lambda k, *_, enough=enough: enough[k - 1])
            assert rows["binary"].sentences == rows["scan"].sentences == (binary or m)
            assert rows["gallop"].sentences == (gallop or m)
            assert rows["scan"].violations == search.violations(dict(enumerate(enough, 1)))
        middle_cuts += sum(1 < found.sentences < m for found in rows.values())
        for found in rows.values():
            prefix = found.trace[: found.end]
            assert prefix == "".join(found.trace[: ends(row.trace)[found.sentences - 1]])
        if number == 0:
            judge.threshold = ordered[-1] + 1
            never = cut(judge, row)
            assert not never.sufficient and never.sentences == m and never.end == len(row.trace)
            compare(never.verdicts, uncached, judge.threshold)
    # The answer's likelihood falls from the first sentence on in that beginning.
    if count or kind == "verbal":
        assert middle_cuts > 0, "no cut was in the middle"
    print(f"{kind}: near-ties {near_ties}")


@pytest.mark.slow
def test_seeded_boundaries_of_longer_traces_equal_uncached_ones(
    student: Any, traces: list[PrefixRow], real_traces: list[dict[str, str]]
) -> None:
    """4 traces, 5 boundaries each: scan and one-by-one questions against uncached margins.

    Where there are the three short traces only, they are repeated to a length of several thousand
    characters.
    """
    judge = Judge(judge_config(), student)
    draw = random.Random(5)
    if len(traces) == 3:
        traces = [row_of(raw, copies) for raw in real_traces for copies in (2, 3, 4)]
    fitting = [row for row in traces if len(judge.request(row, row.trace).ids) <= 2500]
    for row in draw.sample(fitting, 4):
        boundaries = draw.sample(range(1, row.sentences_total + 1), min(5, row.sentences_total))
        uncached = uncached_margins(judge, row, boundaries)
        many = TraceJudge(judge, row, student.session())
        many.ask_many(boundaries)
        single = TraceJudge(judge, row, student.session())
        for k in boundaries:
            single.ask(k)
        assert len(many.verdicts) == len(single.verdicts) == len(boundaries)
        compare(tuple(many.verdicts.values()), uncached, judge.threshold)
        compare(tuple(single.verdicts.values()), uncached, judge.threshold)


@pytest.mark.slow
def test_a_cut_inside_a_word_merges_tokens(student: Any, traces: list[PrefixRow]) -> None:
    judge = Judge(judge_config(), student)
    row = traces[0]
    whole = judge.request(row, row.trace)
    in_words = [i for i in range(200, 700) if row.trace[i - 1].isalpha() and row.trace[i].isalpha()]
    requests = [judge.request(row, row.trace[:i]) for i in in_words[:40:8]]
    tail = len(judge.request(row, "").ids) - len(judge.request(row, "x").ids) + 9
    merged = [
        request
        for request in requests
        if common_prefix_len(request.ids, whole.ids) < len(request.ids) - max(tail, 1)
    ]
    assert merged, "no cut changed a token before it"
    uncached = student.session(uncached=True)
    cached = student.session()
    cached.score([whole])
    for request, scanned in zip(requests, student.session().score(requests), strict=True):
        margin = judge.margin(uncached.score([request])[0])
        assert judge.margin(cached.score([request])[0]) == pytest.approx(margin, abs=1e-3)
        assert judge.margin(scanned) == pytest.approx(margin, abs=1e-3)


def test_generated_labels_have_no_margin_and_may_be_unparsed(
    student: Any, beginning: PrefixRow
) -> None:
    """The paper's way: what is neither label is an outcome of its own."""
    judge = Judge(judge_config(decode="generate", max_new_tokens=3), student)
    row = cut(judge, beginning)
    assert {verdict.label for verdict in row.verdicts} <= {"ENOUGH", "NOT_ENOUGH", "UNPARSED"}
    assert all(verdict.margin is None for verdict in row.verdicts)
    assert row.prefill_tokens > row.prompt_tokens
    keys = {"kind": "answer", "answer_scoring": "greedy", "max_new_tokens": 8}
    with Judge(judge_config(**keys), student) as greedy:
        assert cut(greedy, beginning).verdicts


def test_a_label_in_the_models_thinking_is_no_verdict(
    beginning: PrefixRow, monkeypatch: pytest.MonkeyPatch
) -> None:
    thinks = "<think>[ENOUGH] or [NOT_ENOUGH]?"
    backend = LengthBackend()
    judge = Judge(judge_config(decode="generate"), backend)
    assert judge.label_in_text(f"{thinks}</think> [NOT_ENOUGH]", beginning) == "NOT_ENOUGH"
    assert judge.label_in_text(thinks, beginning) == "UNPARSED"
    assert judge.label_in_text("[ENOUGH]", beginning) == "ENOUGH"
    # the prompt ends in thinking, so that no text begins it
    monkeypatch.setattr(backend.tokenizer, "template", "{{ messages[0].content }}<think>\n")
    judge = Judge(judge_config(decode="generate"), backend)
    assert judge.label_in_text("[ENOUGH] or [NOT_ENOUGH]?", beginning) == "UNPARSED"
    assert judge.label_in_text("Hm, [ENOUGH]?</think>[NOT_ENOUGH]", beginning) == "NOT_ENOUGH"


def test_labels_part_after_their_common_tokens() -> None:
    assert split_labels(ByteTokenizer(), ("[A", "[B")) == ((ord("["),), (ord("A"), ord("B")))
    with pytest.raises(KitError, match=r"begin the other"):
        split_labels(ByteTokenizer(), ("YES", "YES!"))
    assert ByteTokenizer().decode(Judge(judge_config(), LengthBackend()).shared_label_tokens) == "["


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("[ENOUGH]", "ENOUGH"),
        ("I say [NOT_ENOUGH], not [ENOUGH].", "NOT_ENOUGH"),
        ("well", "UNPARSED"),
        ("ENOUGH", "UNPARSED"),
    ],
)
def test_the_first_label_in_a_text_counts(text: str, label: str) -> None:
    assert first_label(text, ("[ENOUGH]", "[NOT_ENOUGH]")) == label


def test_a_label_inside_the_other_is_the_other() -> None:
    assert first_label("it is INSUFFICIENT", ("SUFFICIENT", "INSUFFICIENT")) == "NOT_ENOUGH"


def test_without_a_cache_only_what_is_asked_is_evaluated(
    student: Any, beginning: PrefixRow
) -> None:
    judge = Judge(judge_config(search="uncached"), student)
    row = cut(judge, beginning)
    tokens = 0
    for verdict in row.verdicts:
        prefix = row.trace[: ends(row.trace)[verdict.sentences - 1]]
        tokens += len(judge.request(row, prefix).ids)
    assert row.prefill_tokens == tokens and not row.cached_tokens


def test_the_content_free_margin_is_subtracted() -> None:
    plain = Judge(judge_config(threshold=1e9), LengthBackend())
    calibrated = Judge(judge_config(threshold=1e9, calibration="content-free"), LengthBackend())
    offset = 0.01 * len(plain.request(whole_row(), "").ids)
    verdicts = cut(plain, whole_row()).verdicts
    for before, after in zip(verdicts, cut(calibrated, whole_row()).verdicts, strict=True):
        assert after.margin == pytest.approx(before.margin - offset, abs=1e-5)


@pytest.mark.parametrize(
    ("text", "label"), [("9} and more", "ENOUGH"), ("8}.", "NOT_ENOUGH"), ("", "UNPARSED")]
)
def test_the_answer_judge_grades_a_greedy_answer(text: str, label: str) -> None:
    config = judge_config(kind="answer", answer_scoring="greedy")
    with Judge(config, LengthBackend(text)) as judge:
        assert {verdict.label for verdict in cut(judge, whole_row()).verdicts} == {label}
