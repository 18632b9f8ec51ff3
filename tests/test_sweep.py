"""Sweep: the true first sufficient boundary, what it reads for it, and traces over the context."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit.backends import open_backend
from kit.core import config as configs
from kit.core.records import PrefixRow, Problem
from kit.judging import search
from kit.judging import trace as judging
from kit.judging.cut import cut, from_problem
from kit.judging.judge import Judge
from kit.judging.sentences import ends
from kit.judging.trace import TraceJudge
from kit.reporting.metrics import _judging as judging_numbers
from tests.judging_cases import LengthBackend, judge_config, whole_row

# 60 short sentences of different lengths
LONG = "".join(f"Step {i} adds {'one and ' * (i % 4)}two. " for i in range(60))


@pytest.fixture(scope="module")
def student() -> Any:
    backend = open_backend(configs.Config().student)
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def row(real_traces: list[dict[str, str]]) -> PrefixRow:
    """The beginning of a real trace that is in every clone."""
    return as_row(real_traces[0], sentences=12)


def as_row(raw: dict[str, str], sentences: int = 0) -> PrefixRow:
    """A real trace, or its first sentences."""
    fields = {name: raw[name] for name in ("id", "question", "answer")}
    trace = raw["long_cot"]
    return from_problem(Problem(**fields, trace=trace[: ends(trace)[sentences - 1]]))


def judged(judge: Judge, row: PrefixRow, uncached: bool = True) -> dict[int, float]:
    """The margins of all boundaries."""
    trace = TraceJudge(judge, row, judge.backend.session(uncached=uncached))
    for k in range(1, row.sentences_total + 1):
        trace.ask(k)
    return {k: verdict.margin for k, verdict in trace.verdicts.items()}


# --- forced verdicts ---


def swept(enough: list[bool], confirm: int, stretch: int) -> tuple[int | None, int]:
    """What a sweep keeps, and the last boundary that it reads."""
    read: list[int] = []

    def ask_many(boundaries: range) -> list[bool]:
        assert len(boundaries) <= stretch
        read.extend(boundaries)
        return [enough[k - 1] for k in boundaries]

    m = len(enough)
    kept = search.sweep(m, ask_many, lambda first: min(first + stretch - 1, m), confirm)
    assert read == list(range(1, len(read) + 1)), "from the left, each boundary once"
    return kept, len(read)


@pytest.mark.parametrize(
    ("verdicts", "kept"),
    [
        ("1111111111", (1, 1, 1)),  # early
        ("0000011111", (6, 6, 6)),  # middle
        ("0000000001", (10, 10, 10)),  # late: the end confirms it
        ("0000000000", (None, None, None)),  # never
        ("0100110111", (2, 5, 8)),  # not monotone: runs of one, two and three
        ("0100000000", (2, None, None)),  # isolated
        ("0001000011", (4, 9, 9)),  # isolated; then a run that reaches the end
        ("0110000000", (2, 2, None)),
    ],
)
def test_the_first_run_of_enough_is_kept(verdicts: str, kept: tuple[int | None, ...]) -> None:
    enough = [verdict == "1" for verdict in verdicts]
    for confirm, expected in enumerate(kept, 1):
        for stretch in (1, 2, 3, 7, 10):
            assert swept(enough, confirm, stretch)[0] == expected, (confirm, stretch)


@given(
    st.lists(st.booleans(), min_size=1, max_size=60),
    st.integers(1, 5),
    st.integers(1, 20),
)
def test_a_sweep_keeps_what_a_scan_of_all_would_and_reads_no_stretch_more(
    enough: list[bool], confirm: int, stretch: int
) -> None:
    kept, read = swept(enough, confirm, stretch)
    assert kept == search.choose(enough, "first", confirm)
    # by the definition, in other words than the search's
    m = len(enough)
    runs = [k for k in range(1, m + 1) if all(enough[k - 1 : k - 1 + confirm])]
    assert kept == (runs[0] if runs else None)
    if kept:
        needed = min(kept + confirm - 1, m)
        assert needed <= read <= min(-(-needed // stretch) * stretch, m)


# --- real models ---


@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        pytest.param("verbal", "hf", marks=pytest.mark.slow),
        pytest.param("answer", "hf", marks=pytest.mark.slow),
        pytest.param("answer", "gguf", marks=pytest.mark.slow),
    ],
)
def test_a_sweep_finds_the_first_sufficient_boundary_of_a_real_trace(
    kind: str, backend: str, student: Any, row: PrefixRow, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a full uncached scan, with cuts early, in the middle and late."""
    monkeypatch.setattr(judging, "STRETCH_CHARACTERS", 500)
    model, near = student, 1e-3
    if backend == "gguf":
        near = 0.015  # see ROUNDING_NATS in kit/backends/gguf.py
        model = open_backend(configs.ModelConfig(backend="gguf"))
        # what is nearer to the threshold is not asked again here: see test_price.py
        monkeypatch.setattr(type(model), "cache_error", 0.0)
    with Judge(judge_config(kind=kind), model) as judge:
        margins = judged(judge, row)
        m = row.sentences_total
        highest = np.maximum.accumulate(list(margins.values()))
        scan_tokens = cut(judge, row, search="scan").prefill_tokens
        # A threshold between two records: the first boundary over it is known, and no near-tie.
        records = [k for k in range(1, m) if highest[k] > highest[k - 1] + 2 * near]
        for k in {records[0], records[len(records) // 2], records[-1]}:
            judge.threshold = float(highest[k] + highest[k - 1]) / 2
            first = next(k for k, margin in margins.items() if margin >= judge.threshold)
            found = cut(judge, row, search="sweep")
            assert found.sentences == first and found.sufficient
            for verdict in found.verdicts:
                assert verdict.margin == pytest.approx(margins[verdict.sentences], abs=near)
            kept_tokens = len(judge.request(row, row.trace[: found.end]).ids)
            tail_tokens = 20 * 40  # of the stretch that holds the cut: at most 40 boundaries
            assert found.prefill_tokens <= 1.25 * kept_tokens + 128 + tail_tokens
            assert found.prefill_tokens <= scan_tokens
        judge.threshold = float(highest[-1]) + 1
        never = cut(judge, row, search="sweep")
        assert not never.sufficient and never.prefill_tokens <= 1.05 * scan_tokens
    if backend == "gguf":
        model.close()


@pytest.mark.parametrize("name", ["llama", "mistral", "lfm2", "mamba"])
def test_a_sweep_is_exact_on_every_architecture_and_its_fallback_is_named(name: str) -> None:
    from tests.tiny_backend import tiny_backend

    backend = tiny_backend(name)
    prompts = {"judge": "{question} {prefix}"}
    config = configs.resolve({"judge": {"limit_tokens": 2000}, "prompts": prompts}, "test")
    row = from_problem(Problem(id="a", question="q?", answer="9", trace=LONG[:1500]))
    with Judge(config, backend) as judge:
        margins = judged(judge, row)
        judge.threshold = sorted(margins.values())[-4] - 1e-3
        enough = [margin >= judge.threshold for margin in margins.values()]
        found = cut(judge, row, search="sweep")
        assert found.sentences == search.first_run(enough, 1)
        assert 1 < found.sentences < row.sentences_total
    falls_back = name in ("lfm2", "mamba")
    assert any(note.startswith("judging cache: ") for note in backend.notes) == falls_back
    if falls_back:
        # one boundary at a time, and nothing after the cut
        assert len(found.verdicts) == found.sentences
    else:
        assert found.cached_tokens > found.prefill_tokens


# --- traces that are longer than the context ---


def limited(sentences: int, threshold: float = 1e9, **keys: Any) -> tuple[Judge, PrefixRow]:
    """A judge that reads so many of 13 sentences; margins are 0.01 a token of the prompt."""
    whole = whole_row()
    probe = Judge(judge_config(**keys), LengthBackend())
    # the last token that this many sentences take; the next sentence needs more
    prefix = whole.trace[: ends(whole.trace)[sentences - 1]] if sentences else whole.trace[:5]
    tokens = len(probe.request(whole, prefix).ids)
    config = judge_config(limit_tokens=tokens + 3, threshold=threshold, **keys)
    return Judge(config, LengthBackend()), whole


@pytest.mark.parametrize("name", ["binary", "gallop", "sweep", "scan", "uncached"])
def test_a_trace_over_the_limit_is_searched_as_far_as_it_fits(name: str) -> None:
    judge, row = limited(7)
    never = cut(judge, row, search=name)
    assert never.rejected == "nothing sufficient within the context"
    assert "7 of 13 sentences" in never.detail and str(judge.limit_tokens) in never.detail
    assert max(verdict.sentences for verdict in never.verdicts) == 7
    fifth = len(judge.request(row, row.trace[: ends(row.trace)[4]]).ids)
    judge.threshold = 0.01 * fifth - 0.001
    found = cut(judge, row, search=name)
    assert (found.sentences, found.searched_sentences, found.rejected) == (5, 7, None)
    assert found.ratio == 5 / 13 and found.trace == row.trace


def test_what_fits_is_found_without_rendering_every_prompt() -> None:
    row = whole_row("".join(f"Step {i} is done. " for i in range(1000)))
    judge = Judge(judge_config(limit_tokens=9000), LengthBackend())
    rendered = []
    judge.prompt = lambda row, prefix: rendered.append(prefix) or Judge.prompt(judge, row, prefix)
    m = judge.boundaries_within(row)
    fits = [
        len(judge.request(row, row.trace[:end]).ids) <= 9000 for end in ends(row.trace)[m - 1 :]
    ]
    assert fits == [True] + [False] * (1000 - m)
    assert len(rendered) - len(fits) <= 12


def test_a_trace_whose_first_sentence_does_not_fit_has_its_own_reason() -> None:
    judge, row = limited(0)
    assert cut(judge, row).rejected == "no boundary within the context"
    single = whole_row("A single sentence that is longer than the limit is not kept unread.")
    assert cut(judge, single).rejected == "no boundary within the context"


@pytest.mark.slow
def test_real_traces_over_the_context_are_kept_where_a_prefix_within_suffices(
    student: Any, real_traces: list[dict[str, str]]
) -> None:
    """The longest of the file, at two thresholds; the last boundary that fits is asked."""
    longest = as_row(real_traces[-1])
    with Judge(judge_config(limit_tokens=700, threshold=-100.0), student) as judge:
        found = cut(judge, longest)
        assert found.sufficient and found.sentences == 1
        assert 1 < found.searched_sentences < found.sentences_total
        judge.threshold = 100.0
        never = cut(judge, longest)
    last = max(verdict.sentences for verdict in never.verdicts)
    assert never.rejected and last == never.searched_sentences
    assert never.prompt_tokens <= 700
    after = longest.trace[: ends(longest.trace)[last]]
    assert len(judge.request(longest, after).ids) > 700


# --- isolated ENOUGH ---


class Forced(LengthBackend):
    """Margins by boundary: the k-th character of `verdicts`, at the k-th sentence of 13."""

    def __init__(self, verdicts: str) -> None:
        super().__init__()
        self.verdicts = verdicts
        self.asked: list[int] = []

    def session(self, uncached: bool = False) -> Any:
        session = super().session(uncached)
        session.score = self._score
        return session

    def _score(self, requests: Any) -> list[Any]:
        results = []
        for request in requests:
            k = self.tokenizer.decode(request.ids).count(" is done.")
            k = 13 if "boxed{9}" in self.tokenizer.decode(request.ids) else k
            self.asked.append(k)
            results.append([[1.0 if self.verdicts[k - 1] == "1" else -1.0, 0.0]])
        return results


@pytest.mark.parametrize("name", ["binary", "gallop", "sweep", "scan"])
@pytest.mark.parametrize(
    ("verdicts", "isolated"),
    [("0000001000000", True), ("0000001100000", False), ("0000000000001", None)],
)
def test_an_isolated_enough_is_told_by_the_boundary_after_it(
    name: str, verdicts: str, isolated: bool | None
) -> None:
    backend = Forced(verdicts)
    judge = Judge(judge_config(scan_rule="first"), backend)
    row = cut(judge, whole_row(), search=name)
    if not row.sufficient:
        assert row.isolated is None
        return
    assert row.isolated is isolated
    assert {verdict.sentences for verdict in row.verdicts} <= set(backend.asked)


def test_the_uncached_way_asks_no_boundary_more() -> None:
    backend = Forced("0000001000000")
    row = cut(Judge(judge_config(), backend), whole_row(), search="uncached")
    assert row.sentences == 7 and row.isolated is None and 8 not in backend.asked


def test_the_report_counts_isolated_and_over_long_with_their_denominators() -> None:
    def update(**fields: Any) -> PrefixRow:
        return whole_row().model_copy(update={"sufficient": True, **fields})

    whole = {"searched_sentences": 13}
    rows = [
        update(isolated=True, **whole),
        update(isolated=False, **whole),
        update(isolated=None, **whole),
        update(searched_sentences=7, isolated=False),
        update(searched_sentences=4, rejected="nothing sufficient within the context"),
    ]
    result = judging_numbers(rows)
    assert result["isolated_traces"] == {"rows": 1, "of": 3}
    assert result["over_limit_traces"] == 2
