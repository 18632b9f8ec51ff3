"""Verdicts: cached equal to uncached on real traces and the packaged model; labels, calibration, and the stage."""

from __future__ import annotations

import json
import random
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kit.backends import open_backend
from kit.backends.base import Completion, Generation, ScoreRequest
from kit.backends.hf_session import common_prefix_len
from kit.backends.scripted import ByteTokenizer, ScriptedBackend
from kit.core import config as configs
from kit.core.errors import KitError
from kit.core.progress import Progress
from kit.core.records import PrefixRow, Problem, Sample, TraceRow, Verdict
from kit.core.run import Run
from kit.core.storage import RowFile, digest
from kit.judging import judge as judging
from kit.judging import search
from kit.judging.calibration import share_threshold
from kit.judging.judge import Judge, TraceJudge, cut, from_problem, label_in, part
from kit.judging.sentences import ends
from kit.pipeline.truncate import show, truncate
from kit.reporting.metrics import degenerate

NEAR = 1e-3  # margins closer to the threshold than this may give another label: counted


def config_of(**keys: Any) -> configs.Config:
    return configs.resolve({"judge": keys}, "test")


@pytest.fixture(scope="module")
def student() -> Any:
    backend = open_backend(configs.Config().student)
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def traces(shared: Path) -> list[PrefixRow]:
    lines = (shared / "long_cot_aime24.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    given = [
        {"id": row["id"], "question": row["question"], "answer": row["answer"]} for row in rows
    ]
    return [
        from_problem(Problem(**g, trace=row["long_cot"]))
        for g, row in zip(given, rows, strict=True)
    ]


def short(judge: Judge, traces: list[PrefixRow], count: int) -> list[PrefixRow]:
    """The first traces whose whole prompt has under 1,500 tokens, shortest first."""
    sized = sorted(
        (len(judge.probe(row, row.trace).ids), row.id) for row in traces if len(row.trace) < 6000
    )
    by_id = {row.id: row for row in traces}
    return [by_id[id] for tokens, id in sized if tokens < 1500][:count]


def read_fresh(judge: Judge, row: PrefixRow, boundaries: list[int]) -> dict[int, float]:
    """Uncached margins, one prompt after the other."""
    session, cuts = judge.backend.session(uncached=True), ends(row.trace)
    probes = [judge.probe(row, row.trace[: cuts[k - 1]]) for k in boundaries]
    return {k: judge.margin(session.score([p])[0]) for k, p in zip(boundaries, probes, strict=True)}


def compare(verdicts: tuple[Verdict, ...], fresh: dict[int, float], threshold: float) -> int:
    """Check cached verdicts against uncached margins; returns the near-ties."""
    near = 0
    for verdict in verdicts:
        margin = fresh[verdict.sentences]
        assert verdict.margin == pytest.approx(margin, abs=1e-3)
        near += abs(margin - threshold) < NEAR
        assert (verdict.label == "ENOUGH") == (margin >= threshold) or abs(
            margin - threshold
        ) < NEAR
    return near


@pytest.mark.parametrize(("kind", "count"), [("verbal", 6), ("answer", 1)])
def test_searches_equal_fresh_at_every_boundary(
    kind: str, count: int, student: Any, traces: list[PrefixRow]
) -> None:
    """Thresholds at the margins' median and above all of them give both labels, and cuts in the middle."""
    judge = Judge(config_of(kind=kind), student)
    middle, near = 0, 0
    chosen = short(judge, traces, count)
    assert len(chosen) == count
    for number, row in enumerate(chosen):
        m = row.sentences_total
        fresh = read_fresh(judge, row, list(range(1, m + 1)))
        ordered = sorted(fresh.values())
        judge.threshold = (ordered[m // 2] + ordered[m // 2 - 1]) / 2
        rows = {how: cut(judge, row, how=how) for how in ("binary", "gallop", "scan")}
        enough = [fresh[k] >= judge.threshold for k in range(1, m + 1)]
        assert len(set(enough)) == 2
        near += sum(compare(found.verdicts, fresh, judge.threshold) for found in rows.values())
        if all(abs(margin - judge.threshold) > NEAR for margin in ordered):
            want = search.binary(m, lambda k, *_, enough=enough: enough[k - 1])
            assert rows["binary"].sentences == rows["scan"].sentences == (want or m)
            assert rows["gallop"].sentences == (
                search.gallop(m, lambda k, *_, enough=enough: enough[k - 1]) or m
            )
            assert rows["scan"].violations == search.violations(dict(enumerate(enough, 1)))
        middle += sum(1 < found.sentences < m for found in rows.values())
        for found in rows.values():
            assert found.trace[: found.end] == "".join(
                found.trace[: ends(row.trace)[found.sentences - 1]]
            )
        if number == 0:
            judge.threshold = ordered[-1] + 1
            never = cut(judge, row)
            assert not never.sufficient and never.sentences == m and never.end == len(row.trace)
            compare(never.verdicts, fresh, judge.threshold)
    assert middle > 0, "no cut was in the middle"
    print(f"{kind}: near-ties {near}")


@pytest.mark.slow
def test_seeded_boundaries_of_longer_traces(student: Any, traces: list[PrefixRow]) -> None:
    """12 traces, 8 boundaries each: scan and one-by-one questions against uncached margins."""
    judge, draw = Judge(config_of(), student), random.Random(5)
    fitting = [row for row in traces if len(judge.probe(row, row.trace).ids) <= 5000]
    for row in draw.sample(fitting, 12):
        boundaries = draw.sample(range(1, row.sentences_total + 1), min(8, row.sentences_total))
        fresh = read_fresh(judge, row, boundaries)
        many = TraceJudge(judge, row, student.session())
        many.ask_many(boundaries)
        single = TraceJudge(judge, row, student.session())
        for k in boundaries:
            single.ask(k)
        assert len(many.verdicts) == len(single.verdicts) == len(boundaries)
        compare(tuple(many.verdicts.values()), fresh, judge.threshold)
        compare(tuple(single.verdicts.values()), fresh, judge.threshold)


def test_a_cut_inside_a_word_merges_tokens(student: Any, traces: list[PrefixRow]) -> None:
    judge = Judge(config_of(), student)
    row = short(judge, traces, 1)[0]
    import numpy as np

    whole = judge.probe(row, row.trace)
    marks = [i for i in range(200, 700) if row.trace[i - 1].isalpha() and row.trace[i].isalpha()][
        :40:8
    ]
    probes = [judge.probe(row, row.trace[:i]) for i in marks]
    tails = len(judge.probe(row, "").ids) - len(judge.probe(row, "x").ids) + 9
    merged = [
        p
        for p in probes
        if common_prefix_len(np.asarray(p.ids), np.asarray(whole.ids)) < len(p.ids) - max(tails, 1)
    ]
    assert merged, "no cut changed a token before it"
    fresh, cached = student.session(uncached=True), student.session()
    cached.score([whole])
    for probe, scanned in zip(probes, student.session().score(probes), strict=True):
        want = judge.margin(fresh.score([probe])[0])
        assert judge.margin(cached.score([probe])[0]) == pytest.approx(want, abs=1e-3)
        assert judge.margin(scanned) == pytest.approx(want, abs=1e-3)


def test_traces_past_the_context_leave_with_their_reason(
    student: Any, traces: list[PrefixRow]
) -> None:
    judge = Judge(config_of(), student)
    assert judge.limit_tokens == 8192
    longest = sorted(traces, key=lambda row: -len(row.trace))[:12]
    long = [row for row in longest if len(judge.probe(row, row.trace).ids) > 8192]
    left = [cut(judge, row) for row in long]
    assert [row.rejected for row in left] == ["prompt too long"] * 7
    assert all("the limit is 8192" in row.detail for row in left)


def test_generated_labels(student: Any, traces: list[PrefixRow]) -> None:
    """The paper's way: what is neither label is an outcome of its own."""
    judge = Judge(config_of(decode="generate", max_new_tokens=3), student)
    row = short(judge, traces, 1)[0]
    found = cut(judge, row)
    assert {v.label for v in found.verdicts} <= {"ENOUGH", "NOT_ENOUGH", "UNPARSED"}
    assert (
        all(v.margin is None for v in found.verdicts) and found.prefill_tokens > found.prompt_tokens
    )
    greedy = Judge(config_of(kind="answer", read="greedy", max_new_tokens=8), student)
    assert cut(greedy, row).verdicts
    greedy.close()


def test_labels_part_after_their_common_tokens() -> None:
    assert part((1, 2, 3), (1, 4)) == ((1,), (2, 4))
    with pytest.raises(KitError, match=r"begin the other"):
        part((1, 2), (1, 2, 3))


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("[ENOUGH]", "ENOUGH"),
        ("I say [NOT_ENOUGH], not [ENOUGH].", "NOT_ENOUGH"),
        ("well", "UNPARSED"),
        ("ENOUGH", "UNPARSED"),
    ],
)
def test_label_in_text(text: str, label: str) -> None:
    assert label_in(text, ("[ENOUGH]", "[NOT_ENOUGH]")) == label


def test_label_inside_the_other() -> None:
    assert label_in("it is INSUFFICIENT", ("SUFFICIENT", "INSUFFICIENT")) == "NOT_ENOUGH"


class Fixed(ScriptedBackend):
    """Log-odds that grow with the prompt's length, by a slope; greedy text by a function of the prompt."""

    def __init__(self, slope: float = 0.01, text: str = "") -> None:
        super().__init__(configs.ModelConfig(backend="hf", model="none"))
        self.slope, self.text, self.opened = slope, text, []

    def session(self, uncached: bool = False) -> Any:
        cost = SimpleNamespace(prefill_tokens=1, cached_tokens=0)
        self.opened.append(uncached)

        def score(probes: list[ScoreRequest]) -> list[Any]:
            return [[[self.slope * len(p.ids), 0.0][: len(c)] for _, c in p.reads] for p in probes]

        return SimpleNamespace(score=score, cost=cost, close=lambda: None)

    def generate(self, requests: Any) -> Any:
        for request in requests:
            yield Generation(
                request.id,
                (Completion(self.text, (), "stop"),),
                len(request.prompt),
                len(request.prompt),
            )


TEXT = "".join(f"Step {i} is done. " for i in range(1, 13)) + "So it is \\boxed{9}."


def trace_row(id: str = "a", text: str = TEXT, kept: tuple[int, ...] = (0,)) -> TraceRow:
    samples = tuple(Sample(text=text, verdict="correct") for _ in range(max(kept, default=0) + 1))
    return TraceRow(id=id, question=f"Question {id}?", answer="9", samples=samples, kept=kept)


def row_of(text: str = TEXT) -> PrefixRow:
    return from_problem(Problem(id="a", question="Question a?", answer="9", trace=text))


@pytest.mark.parametrize("turn", [1, 2, 40, 64, 65, 100, 126, 127, 128])
def test_reading_ahead_saves_passes_changes_no_verdict_and_stays_near(turn: int) -> None:
    """The bound: a sixth of the furthest question, or 64 tokens, past it."""
    row, passes = row_of("It is a step ok. " * 128), {}
    rows = {}
    for ahead in (0, 64):
        judge = Judge(config_of(), Fixed())
        session, passes[ahead] = judge.backend.session(), []
        session.ahead_tokens, read = ahead, session.read
        session.read = lambda probes, read=read, seen=passes[ahead]: (
            seen.append([len(p.ids) for p in probes]),
            read(probes),
        )[1]
        asking = TraceJudge(judge, row, session, lambda k: k >= turn)
        assert search.binary(128, asking.ask) == turn
        rows[ahead] = [*asking.verdicts.values()]
    assert rows[0] == rows[64] and len(passes[0]) == len(rows[0])
    assert len(passes[64]) < len(passes[0]) - 1
    furthest = 0
    for asked, *ahead in passes[64]:
        reach = asked + max(64, asked // 6)
        assert max([0, *ahead]) <= max(reach if asked >= furthest else 0, furthest, asked)
        furthest = max(furthest, asked, *ahead)


def test_only_a_kept_text_is_read_ahead(student: Any, traces: list[PrefixRow]) -> None:
    """Without a cache every question read ahead would be a prefill of its own: only what is asked is evaluated."""
    judge = Judge(config_of(search="uncached"), student)
    found = cut(judge, short(judge, traces, 1)[0])
    asked = [
        judge.probe(found, found.trace[: ends(found.trace)[v.sentences - 1]])
        for v in found.verdicts
    ]
    assert (
        found.prefill_tokens == sum(len(probe.ids) for probe in asked) and not found.cached_tokens
    )


def test_content_free_margin_is_subtracted() -> None:
    plain = Judge(config_of(threshold=1e9), Fixed())
    calibrated = Judge(config_of(threshold=1e9, calibration="content-free"), Fixed())
    empty = 0.01 * len(plain.probe(row_of(), "").ids)
    for a, b in zip(cut(plain, row_of()).verdicts, cut(calibrated, row_of()).verdicts, strict=True):
        assert b.margin == pytest.approx(a.margin - empty, abs=1e-5)


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_share_of_whole_traces_is_sufficient(share: float) -> None:
    rows = [row_of("Word. " * n) for n in (10, 40, 20, 30)]
    judge = Judge(config_of(share=share), Fixed())
    judge.threshold = share_threshold(judge, rows)
    enough = [0.01 * len(judge.probe(row, row.trace).ids) >= judge.threshold - 1e-9 for row in rows]
    assert sum(enough) == share * 4


def test_answer_judge_grades_a_greedy_answer() -> None:
    for text, label in (("9} and more", "ENOUGH"), ("8}.", "NOT_ENOUGH"), ("", "UNPARSED")):
        judge = Judge(config_of(kind="answer", read="greedy"), Fixed(text=text))
        assert {v.label for v in cut(judge, row_of()).verdicts} == {label}
        judge.close()


def test_degenerate_judges_are_named_with_evidence() -> None:
    def rows(kept: int, label: str, sufficient: bool) -> list[PrefixRow]:
        verdicts = (Verdict(sentences=1, label=label, margin=1.5),)
        update = {"sentences": kept, "sufficient": sufficient, "verdicts": verdicts}
        return [row_of().model_copy(update=update)] * 10

    low, high = degenerate(rows(1, "ENOUGH", True)), degenerate(rows(13, "NOT_ENOUGH", False))
    assert (
        low
        and "10 of 10 traces were cut to one sentence" in low
        and "10 of 10 verdicts are ENOUGH" in low
    )
    assert high and "10 of 10 traces were kept whole" in high and "judge.kind=answer" in high
    assert degenerate(rows(5, "ENOUGH", True)) is None
    assert degenerate(rows(1, "ENOUGH", True)[:2]) is None


def make_run(folder: Path, rows: list[TraceRow], **keys: Any) -> Run:
    raw = {"out": str(folder), "student": {"backend": "scripted", "model": "none"}, **keys}
    run = Run(configs.resolve(raw, "test"), Progress(quiet=True))
    (folder / "traces.jsonl").unlink(missing_ok=True)
    RowFile(run.path("traces.jsonl"), TraceRow).append(*rows)
    return run


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    opened: list[Any] = []

    def opening(engine: configs.ModelConfig) -> ScriptedBackend:
        opened.append(ScriptedBackend(engine))
        return opened[-1]

    monkeypatch.setattr(judging, "open_backend", opening)
    return opened


def test_stage_cuts_resumes_and_skips(tmp_path: Path, scripted: list[Any]) -> None:
    traces = [
        trace_row("a"),
        trace_row("b", kept=(0, 1)),
        trace_row("c", "One sentence."),
        trace_row("d", "  "),
    ]
    traces.append(trace_row("e", kept=()))
    with make_run(tmp_path, traces) as run:
        truncate(run)
        rows = {row.id: row for row in run.rows("prefixes.jsonl", PrefixRow)}
        assert list(rows) == ["a", "b.0", "b.1", "c", "d"]
        assert rows["d"].rejected == "empty trace"
        assert rows["c"].sentences == 1 and rows["c"].sufficient and not rows["c"].verdicts
        assert rows["a"].trace[: rows["a"].end] == "".join(
            TEXT[: ends(TEXT)[rows["a"].sentences - 1]]
        )
        told = run.manifest["stages"]["truncate"]
        assert told["rows_in"] == 5 and told["rows_out"] == 4
        assert sum(told["summary"]["verdicts"].values()) == sum(
            len(row.verdicts) for row in rows.values()
        )
        whole = digest(rows.values())
        lines = (tmp_path / "prefixes.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "prefixes.jsonl").write_text("".join(lines[:2]))
        truncate(run)
        assert digest(run.rows("prefixes.jsonl", PrefixRow)) == whole
        assert len(scripted) == 2
        truncate(run)
        assert len(scripted) == 2  # done: no model is opened


@pytest.mark.parametrize(
    ("method", "kept"), [("ratio-0.25", 3), ("no-search", 13), ("ratio-0.01", 1)]
)
def test_baselines_are_cut_without_a_judge(
    method: str, kept: int, tmp_path: Path, scripted: list[Any]
) -> None:
    with make_run(tmp_path, [trace_row()], method=method) as run:
        truncate(run)
        [row] = run.rows("prefixes.jsonl", PrefixRow)
    assert (row.sentences, row.sentences_total, scripted) == (kept, 13, [])
    assert row.ratio == kept / 13 and TEXT.startswith(row.trace[: row.end])


def test_share_threshold_is_kept_for_a_resume(tmp_path: Path, scripted: list[Any]) -> None:
    with make_run(
        tmp_path, [trace_row(x) for x in "abcd"], judge={"calibration": "share", "share": 0.5}
    ) as run:
        truncate(run)
        first = run.manifest["judge_threshold"]["value"]
        assert run.manifest["stages"]["truncate"]["summary"]["threshold"] == first
        (tmp_path / "prefixes.jsonl").unlink()
        run.manifest["judge_threshold"]["value"] = first - 1  # what is kept is used, not made again
        truncate(run)
        assert run.manifest["stages"]["truncate"]["summary"]["threshold"] == first - 1


def test_threads_give_the_same_rows(tmp_path: Path, scripted: list[Any]) -> None:
    config = config_of()
    rows = [row_of().model_copy(update={"id": str(i)}) for i in range(6)]
    run = SimpleNamespace(config=config, progress=Progress(quiet=True))
    cutter = judging.TruncateWorker(run, rows, ExitStack())
    together = {row.id: digest([row]) for row in cutter.work(rows)}
    assert together == {row.id: digest([row]) for one in rows for row in cutter.work([one])}


def test_curve_marks_the_cut_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    judge = Judge(config_of(threshold=0.01 * 1000), Fixed())
    row = cut(judge, row_of(), how="scan")
    show(
        {
            "threshold": judge.threshold,
            "degenerate": None,
            "notes": ["a note"],
            "traces": [judging.shown(row)],
        }
    )
    out = capsys.readouterr().out
    assert (
        out.count("<- kept") == (1 if row.sufficient else 0)
        and f"kept {row.sentences} of 13" in out
    )
    assert out.count("ENOUGH") == 13 and "a note" in out
    assert ByteTokenizer().decode(judge.common) == "["
