"""kit.step and kit.look: one trace stepped through as plain text and by keys, and a prompt as the model sees it."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from kit.config import Config, resolve
from kit.errors import KitError
from kit.look import prompt
from kit.step import step
from tests.test_train import tiny  # noqa: F401  (a fixture)

TRACE = "Ann has 3 pens. She buys 4 more. So it is 3 + 4 = 7. Let me check that. Yes, 7. So \\boxed{7}."


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def configured(folder: Path, model: str, *rows: dict[str, str]) -> Config:
    path = folder / "traces.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return resolve({"student": {"model": model}, "teacher": {"backend": "file", "path": str(path)}}, "test")


@pytest.fixture
def config(tmp_path: Path, tiny: str) -> Config:  # noqa: F811
    return configured(tmp_path, tiny, {"id": "a", "question": "How many pens?", "answer": "7", "long_cot": TRACE})


def test_without_a_terminal_every_step_is_plain_text(
    config: Config, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert step(config) == 0
    shown = capsys.readouterr().out
    steps = shown.split("--- ")[1:]
    assert [text.split(".")[0] for text in steps] == [str(number) for number in range(1, len(steps) + 1)]
    assert "How many pens?" in steps[0] and "gold answer: 7" in steps[0]
    assert "   3  So it is 3 + 4 = 7." in steps[1] and "   6  So \\boxed{7}." in steps[1]
    assert "Question 1 of the binary search: are the first 3 of 6 sentences enough?" in steps[2]
    assert "The student says" in steps[2] and "threshold +0.00" in steps[2]
    for said, text in zip(("The cut: ", "The student continues from there", "The grader: "), steps[-3:], strict=True):
        assert said in text
    assert "\033" not in shown


def test_keys_go_on_and_back(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal("\nb\nb\n\n"))  # and the end of the input is a q
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("LINES", "9")
    monkeypatch.setenv("COLUMNS", "40")
    step(config)
    screens = sys.stdout.getvalue().split("\033[2J\033[H")[1:]  # type: ignore[attr-defined]
    assert [screen.startswith("--- 1. ") for screen in screens] == [True, False, True, True, False]
    assert screens[1].startswith("--- 2. ") and "(more)" in screens[1]
    assert all(len(screen.splitlines()) <= 9 for screen in screens)


def test_a_file_without_a_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KitError):
        step(configured(tmp_path, "smollm2-135m", {"id": "a", "question": "How many?", "answer": "7"}))


def test_a_prompt_is_shown_as_the_model_sees_it(config: Config) -> None:
    shown = {of: prompt(config, of) for of in ("solve", "judge", "draft")}
    for of, result in shown.items():
        assert result["of"] == of and "How many pens?" in result["text"] and result["tokens"] > result["special"] > 2
        assert result["text"].startswith("<|im_start|>")
    assert "Ann has 3 pens." in shown["judge"]["text"] and "So it is" not in shown["judge"]["text"]
    assert "Ann has" not in shown["solve"]["text"]
