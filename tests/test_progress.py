"""What a run prints: harmless text, plain progress lines, quiet runs, and the log."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from kit.core import progress
from kit.core.progress import Progress, visible
from tests.conftest import ROOT


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


def test_the_time_left_counts_what_is_on_its_way(monkeypatch):
    """100 of 200 rows at a time, each 100 s: the first ends when the others nearly do too."""
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    told = []
    bar = progress.Bar(200, 0, lambda done, rate: told.append(rate), at_once=100)
    clock[0] = 90.0
    bar.advance()
    assert told == ["266 s left"]  # 149.5 rows at 50.5 in 90 s; not 17910
    for _ in range(198):
        bar.advance()
    clock[0] = 200.0
    bar.advance()
    assert told[-1] == "200 s"
    # one at a time: as it was
    one = progress.Bar(4, 0, lambda done, rate: told.append(rate))
    clock[0] = 210.0
    one.advance()
    assert told[-1] == "30 s left"


LONG_RUN = """
import time
from kit.core.progress import Progress
progress = Progress(stages=6, stages_done=2)
progress.started -= 3720
with progress.bar("truncate", 1000, done=120) as bar:
    time.sleep(0.5)
    bar.advance(1234, "no correct continuation")
"""


def on_a_terminal(command: list[str], width: int) -> list[str]:
    """Run Python with its errors on a terminal; the lines of every picture that it drew there."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 30, width, 0, 0))
    environment = {**os.environ, "TERM": "xterm"}
    for name in ("CI", "COLUMNS", "NO_COLOR"):
        environment.pop(name, None)
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=its,
    )
    os.close(its)
    drawn = b""
    # the end of a pseudo-terminal is an error
    with contextlib.suppress(OSError):
        while part := os.read(ours, 65536):
            drawn += part
    os.close(ours)
    assert process.wait() == 0
    plain = re.sub(r"\x1b\[[\d;]*m", "", drawn.decode())
    lines = [line.strip() for line in re.split(r"\x1b\[[?\d]*[A-Za-z]|[\r\n]", plain)]
    return [line for line in lines if line]


@pytest.mark.parametrize(("width", "whole"), [(50, False), (80, False), (140, True)])
def test_on_a_terminal_a_bar_over_the_whole_run_is_above_and_no_number_is_cut(
    width: int, whole: bool
) -> None:
    lines = on_a_terminal(["-c", LONG_RUN], width)
    run, stage = [line for line in lines if line.startswith(("run ", "truncate "))][-2:]
    assert re.match(r"run .* 2/6 +stages +1:02:\d\d$", run) and len(run) == len(stage) == width
    assert re.match(r"truncate .* 121/1000 \d+ tokens/s.* 0:00:0\d$", stage)
    assert ("no correct continuation" in stage) == whole


def test_a_run_counts_its_stages_on_a_terminal_and_a_stage_alone_does_not(tmp_path: Path) -> None:
    """A method that loads no model: teach, truncate, align and the report."""
    keys = ["teacher.backend=reference", "method=long-trace", f"out={tmp_path / 'r'}"]
    command = ["palign.py", "run", "configs/smoke.yaml", *keys, "stop_after=align"]
    lines = on_a_terminal(command, 80)
    counts = [
        re.findall(r" (\d/\d) +stages ", above)[0]
        for above, line in itertools.pairwise(lines)
        if line.startswith(("teach ", "align "))
    ]
    assert list(dict.fromkeys(counts)) == ["0/4", "2/4"]
    lines = on_a_terminal(["palign.py", "teach", *command[2:], "seed=1"], 80)
    assert [line for line in lines if line.startswith("teach ")]
    assert not [line for line in lines if line.startswith("run ")]


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
