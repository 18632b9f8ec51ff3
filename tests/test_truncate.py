"""The stage truncate on the scripted student: cuts, resumes, baselines; and `judge FILE`."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from kit.backends.scripted import ScriptedBackend
from kit.core import config as configs
from kit.core.errors import KitError
from kit.core.progress import Progress
from kit.core.records import PrefixRow, TraceRow, Verdict
from kit.core.run import Run
from kit.core.storage import RowFile, digest
from kit.judging.cut import cut
from kit.judging.judge import Judge, open_judge
from kit.judging.sentences import ends
from kit.pipeline.truncate import cut_batch, judge_file, summary_of, truncate
from kit.reporting.metrics import degenerate
from kit.reporting.report import show_judged
from tests.judging_cases import (
    TRACE,
    LengthBackend,
    judge_config,
    run_with_traces,
    trace_row,
    whole_row,
)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The students that were opened for judging, all of them scripted."""
    backends: list[Any] = []

    def open_scripted(engine: configs.ModelConfig) -> ScriptedBackend:
        backends.append(ScriptedBackend(engine))
        return backends[-1]

    monkeypatch.setattr("kit.judging.judge.open_backend", open_scripted)
    return backends


def test_the_stage_cuts_resumes_and_skips(tmp_path: Path, opened: list[Any]) -> None:
    traces = [
        trace_row("a"),
        trace_row("b", kept=(0, 1)),
        trace_row("c", "One sentence."),
        trace_row("d", "  "),
        trace_row("e", kept=()),
    ]
    with run_with_traces(tmp_path, traces) as run:
        truncate(run)
        rows = {row.id: row for row in run.rows("prefixes.jsonl", PrefixRow)}
        assert list(rows) == ["a", "b.0", "b.1", "c", "d"]
        assert rows["d"].rejected == "empty trace"
        assert rows["c"].sentences == 1 and rows["c"].sufficient and not rows["c"].verdicts
        assert rows["a"].end == ends(TRACE)[rows["a"].sentences - 1]
        stage = run.manifest["stages"]["truncate"]
        assert stage["rows_in"] == 5 and stage["rows_out"] == 4
        asked = sum(len(row.verdicts) for row in rows.values())
        assert sum(stage["summary"]["verdicts"].values()) == asked

        # cut off after two rows, it makes the others again
        whole = digest(rows.values())
        lines = (tmp_path / "prefixes.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "prefixes.jsonl").write_text("".join(lines[:2]))
        truncate(run)
        assert digest(run.rows("prefixes.jsonl", PrefixRow)) == whole
        assert len(opened) == 2

        # done: no model is opened
        truncate(run)
        assert len(opened) == 2


@pytest.mark.parametrize(
    ("method", "kept"), [("ratio-0.25", 3), ("no-search", 13), ("ratio-0.01", 1)]
)
def test_baselines_are_cut_without_a_judge(
    method: str, kept: int, tmp_path: Path, opened: list[Any]
) -> None:
    with run_with_traces(tmp_path, [trace_row()], method=method) as run:
        truncate(run)
        [row] = run.rows("prefixes.jsonl", PrefixRow)
    assert (row.sentences, row.sentences_total, opened) == (kept, 13, [])
    assert row.ratio == kept / 13 and TRACE.startswith(row.trace[: row.end])


def test_traces_of_an_unfinished_or_other_teaching_are_not_cut(tmp_path: Path) -> None:
    keys = {"out": str(tmp_path), "method": "ratio-0.5"}
    with Run(configs.resolve(keys, "test"), Progress(quiet=True)) as run:
        with pytest.raises(KitError, match="no finished stage teach"):
            truncate(run)
        run.begin("teach", "input", lambda: "")
        RowFile(run.path("traces.jsonl"), TraceRow).append(trace_row())
        with pytest.raises(KitError, match="no finished stage teach"):
            truncate(run)
        run.finish("teach", 1, 1)
        truncate(run)
    other = {**keys, "teacher": {"samples": 2}}
    with (
        Run(configs.resolve(other, "test"), Progress(quiet=True)) as run,
        pytest.raises(KitError, match=r"another config: teacher\.samples"),
    ):
        truncate(run)


def test_threads_give_the_same_rows(opened: list[Any]) -> None:
    rows = [whole_row().model_copy(update={"id": str(i)}) for i in range(6)]
    with open_judge(judge_config()) as judge:
        cut_one = partial(cut, judge)
        together = {row.id: digest([row]) for row in cut_batch(cut_one, rows)}
        alone = {row.id: digest([cut_one(row)]) for row in rows}
    assert together == alone and len(opened) == 1


def test_a_judged_file_names_its_judge_and_each_trace(tmp_path: Path, opened: list[Any]) -> None:
    path = tmp_path / "traces.jsonl"
    problem = {"id": "a", "question": "Question a?", "answer": "9", "long_cot": TRACE}
    path.write_text(json.dumps(problem) + "\n")
    keys = {"teacher": {"backend": "file", "path": str(path)}, "judge": {"search": "scan"}}
    result = json.loads(json.dumps(judge_file(configs.resolve(keys, "test"), Progress(quiet=True))))
    names = {"model", "search", "kind", "threshold", "degenerate", "notes", "traces"}
    assert set(result) == names and result["search"] == "scan" and result["kind"] == "verbal"
    [trace] = result["traces"]
    tokens = {"prompt_tokens", "prefill_tokens", "cached_tokens", "seconds"}
    tokens |= {"generated_tokens"}
    outcome = {"id", "sentences", "kept", "sufficient", "verdicts", "rejected", "detail"}
    outcome |= {"searched_sentences", "isolated"}
    assert set(trace) == tokens | outcome
    assert trace["sentences"] == 13 and 1 <= trace["kept"] <= 13
    assert [verdict["sentences"] for verdict in trace["verdicts"]] == list(range(1, 14))
    assert {*trace["verdicts"][0]} == {"sentences", "label", "margin"}


def test_degenerate_judges_are_named_with_evidence() -> None:
    def rows(kept: int, label: str, sufficient: bool) -> list[PrefixRow]:
        verdicts = (Verdict(sentences=1, label=label, margin=1.5),)
        update = {"sentences": kept, "sufficient": sufficient, "verdicts": verdicts}
        return [whole_row().model_copy(update=update)] * 10

    low = degenerate(rows(1, "ENOUGH", True))
    high = degenerate(rows(13, "NOT_ENOUGH", False))
    assert low and "10 of 10 traces were cut to one sentence" in low
    assert "10 of 10 verdicts are ENOUGH" in low
    assert high and "10 of 10 traces were kept whole" in high and "judge.kind=answer" in high
    assert degenerate(rows(5, "ENOUGH", True)) is None
    assert degenerate(rows(1, "ENOUGH", True)[:2]) is None


def test_the_curve_marks_the_cut_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    judge = Judge(judge_config(threshold=0.01 * 1000), LengthBackend())
    row = cut(judge, whole_row(), search="scan")
    result = {
        "threshold": judge.threshold,
        "degenerate": None,
        "notes": ["a note"],
        "traces": [summary_of(row)],
    }
    show_judged(result)
    out = capsys.readouterr().out
    assert out.count("<- kept") == (1 if row.sufficient else 0)
    assert f"kept {row.sentences} of 13" in out
    assert out.count("ENOUGH") == 13 and "a note" in out
