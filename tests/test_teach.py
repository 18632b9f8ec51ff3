"""Which traces go on: correct ones of a model, all but empty ones of a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kit.core import config as configs
from kit.core.progress import Progress
from kit.core.records import TraceRow
from kit.core.run import Run
from kit.pipeline.teach import teach


def taught(folder: Path, train: Any = None, **teacher: Any) -> list[TraceRow]:
    """The rows of the stage, over built-in problems unless the teacher brings its own."""
    raw = {
        "out": str(folder / "run"),
        "teacher": teacher,
        "data": {"train": train or {"limit": 12}},
        "stop_after": "teach",
    }
    with Run(configs.resolve(raw, "test"), Progress(quiet=True)) as run:
        teach(run)
        return run.rows("traces.jsonl", TraceRow)


def test_traces_of_a_file_all_go_on_but_empty_ones(tmp_path: Path) -> None:
    texts = {"a": "So it is \\boxed{9}.", "b": "So it is \\boxed{8}.", "c": "No idea."}
    path = tmp_path / "traces.jsonl"
    lines = []
    for id, text in texts.items():
        problem = {"id": id, "question": f"Question {id}?", "answer": "9", "long_cot": text}
        lines.append(json.dumps(problem) + "\n")
    lines.append(json.dumps({"id": "d", "question": "Question d?", "answer": "9"}) + "\n")
    path.write_text("".join(lines))
    rows = {row.id: row for row in taught(tmp_path, backend="file", path=str(path))}
    verdicts = {id: rows[id].samples[0].verdict for id in texts}
    assert verdicts == {"a": "correct", "b": "wrong", "c": "unparsed"}
    assert all(rows[id].kept == (0,) and rows[id].samples[0].text == texts[id] for id in texts)
    assert [row.rejected for id, row in rows.items() if id not in texts] in ([], ["empty trace"])


def test_reference_solutions_become_correct_traces(tmp_path: Path) -> None:
    rows = taught(tmp_path, backend="reference")
    assert len(rows) == 12 and all(row.kept == (0,) for row in rows)
    assert {row.samples[0].verdict for row in rows} == {"correct"}


def test_only_correct_traces_of_a_model_go_on(tmp_path: Path) -> None:
    rows = taught(tmp_path, backend="scripted", model="none", samples=3)
    for row in rows:
        assert len(row.samples) == 3
        assert all(row.samples[index].verdict == "correct" for index in row.kept)
        assert (row.rejected == "no right trace") == (not row.kept)
    assert any(row.rejected for row in rows)


def test_an_attempt_of_the_data_belongs_to_its_own_traces_only(tmp_path: Path) -> None:
    path = tmp_path / "s1k.jsonl"
    row = {"question": "What is 4 + 5?", "answer": "9", "deepseek_attempt": "It is \\boxed{9}."}
    path.write_text(json.dumps({**row, "deepseek_thinking_trajectory": "4 + 5 = 9."}) + "\n")
    [existing] = taught(tmp_path / "file", backend="file", path=str(path))
    assert existing.attempt == row["deepseek_attempt"]
    train = {"path": str(path)}
    [sampled] = taught(tmp_path / "model", train, backend="scripted", model="none")
    assert sampled.attempt is None
