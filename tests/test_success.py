"""Sufficiency by behaviour: what is drawn, what it costs, and that `align` takes it over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from kit.backends import open_backend
from kit.backends.base import Completion, Generation
from kit.core import config as configs
from kit.core.errors import KitError
from kit.core.records import AlignedRow, PrefixRow, Problem, Sample
from kit.judging.cut import cut, from_problem
from kit.judging.judge import Judge
from kit.judging.sentences import ends
from kit.judging.success import missing_draws, success_probability
from kit.judging.trace import TraceJudge
from kit.pipeline.align import align
from kit.pipeline.truncate import truncate
from tests.judging_cases import LengthBackend, judge_config, run_with_traces, trace_row, whole_row

SUCCESS = {"kind": "success"}
# One in a few continuations of a built-in problem is correct with the packaged model.
QUESTION = "Tom has 3 apples and buys 4. How many apples does he have?"
WORKED = (
    "Tom starts with 3 apples. Then he buys 4 more apples. So we add the two numbers. "
    "3 + 4 = 7, so he has 7 apples. The answer is \\boxed{7}."
)


def config_of(samples: int = 4, new_tokens: int = 24, **keys: Any) -> configs.Config:
    judge = {**SUCCESS, "samples": samples, **keys}
    sampling = {"temperature": 0.8, "top_p": 0.95, "max_new_tokens": new_tokens}
    return configs.resolve({"judge": judge, "align": {"sampling": sampling}}, "test")


# --- the posterior ---


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.75])
def test_the_posterior_is_scipys_beta(rate: float) -> None:
    for drawn in range(9):
        for correct in range(drawn + 1):
            expected = stats.beta(1 + correct, 1 + drawn - correct).sf(rate)
            assert success_probability(correct, drawn, rate) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("grades", "draws", "enough"),
    [("11", 2, True), ("00", 2, False), ("1011", 4, True), ("0111", 4, True), ("100", 3, False)],
)
def test_drawing_stops_as_soon_as_it_is_decided(grades: str, draws: int, enough: bool) -> None:
    """Defaults: 2 of 2 or 3 of 4 are enough; after two wrong ones that cannot be reached."""
    settings = config_of().judge
    drawn = 0
    while missing := missing_draws(grades[:drawn].count("1"), drawn, settings):
        drawn += missing
    assert drawn == draws
    correct = grades[:drawn].count("1")
    assert (success_probability(correct, drawn, 0.5) >= settings.confidence) == enough


def test_a_long_row_of_wrong_ones_ends_before_the_last_sample() -> None:
    settings = config_of(samples=64).judge
    assert missing_draws(0, 0, settings) == 2 and missing_draws(0, 2, settings) == 0


# --- bad input ---


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"samples": 0}, "greater than 0"),
        ({"confidence": 1.0}, "less than 1"),
        ({"confidence": 0.0}, "greater than 0"),
        ({"success_rate": 1.2}, "less than 1"),
        ({"confidence": 0.5}, "before anything is drawn"),
        ({"success_rate": 0.9, "confidence": 0.85}, "set it above 0.9"),
        ({"confidence": 0.99}, "set more samples"),
        ({"threshold": 0.3}, "set success_rate and confidence"),
        ({"calibration": "content-free"}, "set success_rate and confidence"),
    ],
)
def test_impossible_settings_are_refused_with_what_to_set(keys: Any, says: str) -> None:
    with pytest.raises(KitError, match=says):
        judge_config(kind="success", **keys)
    if "more" in says:
        judge_config(kind="success", samples=6, **keys)


@pytest.mark.parametrize("kind", ["answer", "success"])
def test_a_row_without_a_gold_answer_is_rejected_with_the_reason(kind: str) -> None:
    row = whole_row().model_copy(update={"answer": " "})
    found = cut(Judge(judge_config(kind=kind), LengthBackend()), row)
    assert found.rejected == "no gold answer" and kind in found.detail
    assert cut(Judge(judge_config(), LengthBackend()), row).rejected is None


def test_a_judging_prompt_leaves_room_for_what_is_drawn() -> None:
    """All of a continuation, but no more than a quarter of the context."""
    context_tokens = LengthBackend().context_tokens
    for new_tokens, room in ((40, 40), (2 * context_tokens, context_tokens // 4)):
        with Judge(config_of(new_tokens=new_tokens), LengthBackend()) as judge:
            assert judge.limit_tokens == context_tokens - room
    with Judge(judge_config(), LengthBackend()) as judge:
        assert judge.limit_tokens == context_tokens


# --- searches, with a student whose success is given ---


class Student(LengthBackend):
    """Right from a boundary on, of 13 sentences; keeps what it was asked."""

    def __init__(self, turn: int) -> None:
        super().__init__()
        self.turn = turn
        self.drawn: list[tuple[str, int]] = []

    def generate(self, requests: Any) -> Any:
        for request in requests:
            self.drawn.append((request.id, request.n))
            text = self.tokenizer.decode(request.prompt)
            k = 13 if text.count("boxed{9}") else text.count(" is done.")
            answer = "9" if k >= self.turn else "8"
            texts = [f"{request.id}: sample {j} \\boxed{{{answer}}}" for j in range(request.n)]
            completions = tuple(Completion(text, (1, 2, 3), "stop") for text in texts)
            yield Generation(request.id, completions, len(request.prompt), len(request.prompt))


@pytest.mark.parametrize("name", ["binary", "gallop", "sweep", "scan", "uncached"])
@pytest.mark.parametrize("turn", [1, 6, 13, 14])
def test_every_search_finds_the_turn_and_brings_its_samples(name: str, turn: int) -> None:
    backend = Student(turn)
    with Judge(config_of(), backend) as judge:
        row = cut(judge, whole_row(), search=name)
    assert row.sufficient == (turn <= 13) and row.sentences == min(turn, 13)
    assert len({id for id, _ in backend.drawn}) == len(backend.drawn), "one request a round"
    assert all(n == 2 for _, n in backend.drawn), "two of two decide"
    assert row.generated_tokens == 3 * 2 * len(backend.drawn)
    assert {sample.verdict for sample in row.samples} == {"correct" if turn <= 13 else "wrong"}
    assert row.samples[0].text.startswith(f"a@{row.sentences}+0")
    margins = {verdict.margin for verdict in row.verdicts}
    assert margins <= {0.875, 0.125}
    # binary never keeps a boundary before one that it knows to be wrong, so it cannot tell
    assert row.isolated in ((None, False) if name in ("sweep", "scan") else (None,))
    if name == "sweep":
        # max_num_seqs is 8: two boundaries of four samples at a time
        assert len(row.verdicts) <= min(turn, 13) + 1


def test_the_stage_align_takes_the_samples_over_and_generates_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Student] = []

    def open_student(engine: Any, adapter: Any = None) -> Student:
        opened.append(Student(6))
        return opened[-1]

    monkeypatch.setattr("kit.judging.judge.open_backend", open_student)
    monkeypatch.setattr("kit.sampling.open_backend", open_student)
    traces = [trace_row("a"), trace_row("b")]
    with run_with_traces(tmp_path, traces, judge=SUCCESS) as run:
        truncate(run)
        align(run)
        prefixes = {row.id: row for row in run.rows("prefixes.jsonl", PrefixRow)}
        rows = run.rows("aligned.jsonl", AlignedRow)
        assert run.manifest["stages"]["align"]["summary"]["tokens"] == 0
        keys = run.manifest["stages"]["truncate"]["keys"]
    assert len(opened) == 1, "align opens no student"
    for row in rows:
        assert row.drawn_by_judge and row.samples == prefixes[row.id].samples
        assert row.continuation == row.samples[0].text and "@6+0" in row.continuation
        assert row.prefix == prefixes[row.id].trace[: prefixes[row.id].end]
    # what is drawn depends on how align draws; other judges do not
    assert {"align.sampling.temperature", "align.mode", "prompts.draft", "seed"} <= keys.keys()
    with run_with_traces(tmp_path / "verbal", traces) as run:
        truncate(run)
        assert not {"align.mode", "seed"} & run.manifest["stages"]["truncate"]["keys"].keys()


# --- sharing, on real models ---


@pytest.fixture(scope="module", params=[pytest.param("hf", marks=pytest.mark.slow), "gguf"])
def student(request: pytest.FixtureRequest) -> Any:
    backend = open_backend(configs.ModelConfig(backend=request.param))
    yield backend
    backend.close()


def same_up_to_near_ties(a: tuple[Sample, ...], b: tuple[Sample, ...]) -> int:
    """How many samples are equal; the others must begin alike."""
    assert len(a) == len(b)
    return sum(x.text == y.text for x, y in zip(a, b, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["prompt", "prefill"])
def test_the_trunk_is_evaluated_once_for_all_boundaries_and_samples(
    student: Any, mode: str
) -> None:
    """Tokens, and the samples of the uncached way for the same seeds."""
    row = from_problem(Problem(id="tom", question=QUESTION, answer="7", trace=WORKED))
    config = config_of()
    config = config.model_copy(
        update={"align": config.align.model_copy(update={"mode": mode, "samples": 1})}
    )
    equal = total = 0
    with Judge(config, student) as judge:
        cuts = ends(row.trace)
        sizes = [len(judge.prompt(row, row.trace[:end])) for end in cuts]
        with_trunk = TraceJudge(judge, row, student.session())
        without = TraceJudge(judge, row, student.session())
        from kit.backends.base import Trunk

        with Trunk(sizes[-1] + 24) as trunk:
            with_trunk.trunk = trunk
            # the furthest first, then others in any order, one of them twice
            counts = ({5: 2}, {2: 2}, {3: 1}, {3: 2}, {1: 1, 4: 2})
            for wanted in counts:
                with_trunk.draw(wanted)
                without.draw(wanted)
        for k in range(1, 6):
            equal += same_up_to_near_ties(with_trunk.samples[k], without.samples[k])
            total += len(with_trunk.samples[k])
        # a closing turn and what a cut changes, and one token of a prompt that comes again
        tail = sizes[0] - len(judge.prompt(row, "")) if mode == "prefill" else 12
        spent = with_trunk.session.cost.prefill_tokens
        assert spent <= sizes[-1] + 5 * max(tail, 12)
        asked = [size for wanted in counts for size in (sizes[k - 1] for k in wanted)]
        # Without it a call shares at most among its own prompts, as llama.cpp does.
        alone = without.session.cost
        assert alone.prefill_tokens + alone.cached_tokens == sum(asked)
        assert spent < alone.prefill_tokens
        assert spent + with_trunk.session.cost.cached_tokens == sum(asked)
    # llama.cpp's quantized kernels round by the pass's size, on AVX512 more than on AVX2
    others = 3 if type(student).__name__ == "GgufBackend" else 1
    assert equal >= total - others, f"{equal} of {total} samples are equal"
    # seeded by row, boundary and number: no two boundaries, rounds or samples draw alike
    texts = [sample.text for samples in with_trunk.samples.values() for sample in samples]
    assert len(set(texts)) > 1


@pytest.mark.slow
def test_searches_draw_what_the_uncached_way_draws(student: Any) -> None:
    """The same seeds at the same boundaries, so the same verdicts, up to near-ties."""
    row = from_problem(Problem(id="tom", question=QUESTION, answer="7", trace=WORKED))
    with Judge(config_of(), student) as judge:
        uncached = cut(judge, row, search="uncached")
        margins = {verdict.sentences: verdict.margin for verdict in uncached.verdicts}
        differing = 0
        for name in ("binary", "sweep", "scan"):
            found = cut(judge, row, search=name)
            for verdict in found.verdicts:
                differing += verdict.margin != margins.get(verdict.sentences, verdict.margin)
            assert found.prefill_tokens < uncached.prefill_tokens
        assert differing <= 1
        assert uncached.generated_tokens > 0


@pytest.mark.parametrize("name", ["llama", "mistral", "lfm2", "qwen3-next"])
def test_every_architecture_draws_the_same_and_names_its_fallback(name: str) -> None:
    from tests.tiny_backend import tiny_backend

    backend = tiny_backend(name)
    row = from_problem(Problem(id="a", question="q?", answer="9", trace="One two. " * 9))
    with Judge(config_of(new_tokens=8), backend) as judge:
        found = cut(judge, row, search="binary")
        uncached = cut(judge, row, search="uncached")
    assert [verdict.sentences for verdict in found.verdicts] == [5, 7, 8, 9]
    assert same_up_to_near_ties(found.samples, uncached.samples) >= 1
    falls_back = name != "llama"
    assert any("every prompt is prefilled whole" in note for note in backend.notes) == falls_back
    assert (found.prefill_tokens < uncached.prefill_tokens) == (not falls_back)
