"""One trace walked through as plain text and by keys, and a prompt as the model sees it."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

import palign
from kit.core.config import Config, resolve
from kit.core.errors import KitError
from kit.interactive import prompt, walk
from kit.prompts import render
from tests.conftest import ROOT
from tests.test_train import tiny  # noqa: F401  (a fixture)

TRACE = (
    "Ann has 3 pens. She buys 4 more. So it is 3 + 4 = 7. Let me check that. Yes, 7. So \\boxed{7}."
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def configured(folder: Path, model: str, *rows: dict[str, str]) -> Config:
    path = folder / "traces.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return resolve(
        {
            "student": {"model": model},
            "teacher": {"backend": "file", "path": str(path)},
            "align": {"sampling": {"max_new_tokens": 8}},
        },
        "test",
    )


@pytest.fixture
def config(tmp_path: Path, tiny: str) -> Config:  # noqa: F811
    return configured(
        tmp_path, tiny, {"id": "a", "question": "How many pens?", "answer": "7", "long_cot": TRACE}
    )


def test_without_a_terminal_every_step_is_plain_text(
    config: Config, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert walk(config) == 0
    shown = capsys.readouterr().out
    steps = shown.split("--- ")[1:]
    assert [text.split(".")[0] for text in steps] == [
        str(number) for number in range(1, len(steps) + 1)
    ]
    assert "How many pens?" in steps[0] and "gold answer: 7" in steps[0]
    assert "   3  So it is 3 + 4 = 7." in steps[1] and "   6  So \\boxed{7}." in steps[1]
    assert "Question 1 of the binary search: are the first 3 of 6 sentences enough?" in steps[2]
    assert "The student says" in steps[2] and "threshold +0.00" in steps[2]
    for said, text in zip(
        ("The cut: ", "The student continues from there", "The grader: "), steps[-3:], strict=True
    ):
        assert said in text
    assert "\033" not in shown


@pytest.mark.slow
def test_a_config_says_how_the_student_is_asked(
    config: Config,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its judge, and align.mode: a prefill begins the answer, a draft is in the question."""
    asked = []
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(
        "kit.interactive.render", lambda *args: asked.append(args[1:]) or render(*args)
    )
    keys = {
        "student": {"model": config.student.model},
        "judge": {"kind": "answer"},
        "align": {"mode": "prefill", "sampling": {"max_new_tokens": 8}},
    }
    (tmp_path / "workshop.yaml").write_text(json.dumps(keys))
    arguments = [
        "judge",
        str(config.teacher.path),
        "--interactive",
        "--config",
        str(tmp_path / "workshop.yaml"),
    ]
    assert palign.main(arguments) == 0
    assert "threshold -1.00" in capsys.readouterr().out
    user, _, begun = asked.pop()
    assert begun and TRACE.startswith(begun) and begun not in user
    assert palign.main([*arguments, "--kind", "verbal"]) == 0  # a key given overrules the config's
    assert "threshold +0.00" in capsys.readouterr().out


def test_on_a_terminal_a_step_is_made_when_it_is_wanted(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quit after the second step: the student is never loaded."""
    monkeypatch.setattr(sys, "stdin", Terminal("\nq\n"))
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setattr("kit.interactive.open_judge", lambda *_: pytest.fail("it was loaded"))
    walk(config)
    shown = sys.stdout.getvalue()  # type: ignore[attr-defined]
    assert [part[:3] for part in shown.split("--- ")[1:]] == ["1. ", "2. "]
    assert shown.count("[enter: next, q: quit]") == 2


def on_a_terminal(args: list[str], keys: bytes = b"", **environment: str) -> str:
    """What a command shows on a real pseudo-terminal on which these keys are pressed."""
    ours, theirs = pty.openpty()
    os.write(ours, keys)
    env = {name: value for name, value in os.environ.items() if name not in ("CI", "NO_COLOR")}
    env |= {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24", **environment}
    done = subprocess.Popen(
        [sys.executable, *args], cwd=ROOT, env=env, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 4096):
            shown += part
    except OSError:  # Linux's word for the end of a terminal
        pass
    assert done.wait() == 0, shown
    return shown.decode()


def test_on_a_real_terminal_a_hostile_trace_moves_no_cursor(tmp_path: Path, tiny: str) -> None:  # noqa: F811
    hostile = {
        "id": "a",
        "question": "How \x1b]0;owned\x07many?",
        "answer": "7",
        "long_cot": f"\x1b[2J{TRACE}",
    }
    path = configured(tmp_path, tiny, hostile).teacher.path
    shown = on_a_terminal(
        ["palign.py", "judge", str(path), "--model", tiny, "--interactive"], b"\nq\n"
    )
    first, second = shown.split("--- 1. ")[1].split("--- 2. ")
    assert "\x1b" not in first + second and "How ⟨U+001B⟩]0;owned⟨U+0007⟩many?" in first
    assert "⟨U+001B⟩[2JAnn has 3 pens." in second


@pytest.mark.parametrize(("environment", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_a_bar_on_a_terminal_has_colours_unless_arguments_not_to(
    environment: dict[str, str], coloured: bool
) -> None:
    code = (
        "from kit.core.progress import Progress\n"
        "with Progress().bar('judge', 3) as bar: [bar.advance(9) for _ in '123']"
    )
    shown = on_a_terminal(["-c", code], **environment)
    assert "judge" in shown and "3/3" in shown and ("\x1b[3" in shown) is coloured


def test_a_file_without_a_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KitError):
        walk(
            configured(
                tmp_path, "smollm2-135m", {"id": "a", "question": "How many?", "answer": "7"}
            )
        )


def test_a_prompt_is_shown_as_the_model_sees_it(config: Config) -> None:
    shown = {of: prompt(config, of) for of in ("solve", "judge", "draft")}
    for of, result in shown.items():
        assert (
            result["of"] == of
            and "How many pens?" in result["text"]
            and result["tokens"] > result["special"] > 2
        )
        assert result["text"].startswith("<|im_start|>")
    assert "Ann has 3 pens." in shown["judge"]["text"] and "So it is" not in shown["judge"]["text"]
    assert "Ann has" not in shown["solve"]["text"]


def test_a_file_to_judge_is_named_as_it_was_typed() -> None:
    """./x is a file; x may be a dataset of the hub."""
    arguments = palign.parser().parse_args(["judge", "./nothing"])
    assert vars(arguments)["teacher.path"] == "./nothing"
