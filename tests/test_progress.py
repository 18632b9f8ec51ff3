"""What a run prints: harmless text, plain progress lines, quiet runs, and the log."""

from __future__ import annotations

import os
import re

import pytest

from kit.core import progress
from kit.core.progress import Progress, visible


def test_control_characters_and_direction_marks_are_shown_by_name():
    assert visible("a\x1b[2J\u202eb\ud800\tc\n") == "a⟨U+001B⟩[2J⟨U+202E⟩b⟨U+D800⟩\tc\n"


@pytest.mark.parametrize(
    ("quiet", "printed"), [(False, "done\nnote: look\n"), (True, "note: look\n")]
)
def test_quiet_prints_only_warnings_and_the_log_has_every_line(tmp_path, capsys, quiet, printed):
    run = Progress(quiet, tmp_path / "run.log")
    run.say("done")
    run.warn("look")
    assert capsys.readouterr().err == printed
    lines = (tmp_path / "run.log").read_text().splitlines()
    assert [line[20:] for line in lines] == ["done", "note: look"]


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path, capsys):
    Progress(log=tmp_path / "gone" / "run.log").say("done")
    assert capsys.readouterr().err == "done\n"


def test_without_a_terminal_a_bar_is_a_line_at_the_end_with_what_was_done_before(capsys):
    with Progress().bar("teach", 5, done=2) as bar:
        for _ in range(3):
            bar.advance(tokens=7)
    assert re.fullmatch(r"teach: 5/5 rows, \d+ tokens/s, 0 s\n", capsys.readouterr().err)


def test_without_a_terminal_lines_come_every_few_seconds(capsys, monkeypatch):
    monkeypatch.setattr(progress, "PLAIN_EVERY_SECONDS", 0.0)
    with Progress().bar("teach", 2, "traces") as bar:
        bar.advance()
        bar.advance()
    first, second = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"teach: 1/2 traces, \d+ s left", first) and second.startswith("teach: 2/2")
    with Progress().bar("align", 2) as bar:
        bar.advance(outcome="no right continuation")
    assert capsys.readouterr().err.endswith("s left, last row no right continuation\n")


def test_the_cards_allocator_is_told_before_torch_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    for users in (None, "max_split_size_mb:128"):
        # set first, so that both are as before afterwards
        for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        if users:
            monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", users)
        progress.tame_libraries(verbose=True)
        expected = None if users else "expandable_segments:True"
        assert os.environ.get("PYTORCH_ALLOC_CONF") == expected
