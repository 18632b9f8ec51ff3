"""Kill -9 at random moments, then the same command: the files equal an uninterrupted run's.

Here the real stage code runs on the scripted, torch-free stand-in, in forked children, many times;
tests/test_pipeline.py does the same with the real model.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest

from kit.core.storage import VOLATILE
from tests.conftest import ROOT

STAGE_FILES = ("traces.jsonl", "prefixes.jsonl", "aligned.jsonl", "train.jsonl", "rejected.jsonl")
QUICK_KILLS = 24
KILLS = 90


def steady(folder: Path) -> dict[str, list[str]]:
    """Every row of every stage file, volatile fields and digests aside, by file."""

    def strip(value):
        if isinstance(value, dict):
            return {k: strip(v) for k, v in value.items() if k not in VOLATILE | {"sha"}}
        return [strip(v) for v in value] if isinstance(value, list) else value

    names = [
        *STAGE_FILES,
        *(str(p.relative_to(folder)) for p in sorted(folder.glob("eval/*.jsonl"))),
    ]
    return {
        name: sorted(
            json.dumps(strip(json.loads(line))) for line in (folder / name).read_text().splitlines()
        )
        for name in names
        if (folder / name).exists()  # a stage without rows leaves no file
    }


def launch(args: list[str], seconds_an_answer: float) -> int:
    """`palign.py ARGS` in a forked child: all is imported, so a start costs milliseconds."""
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            os.environ["PALIGN_SCRIPT_SECONDS"] = str(seconds_an_answer)
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            import palign

            code = palign.main(args)
        finally:
            os._exit(code)
    return pid


def write_config(folder: Path, method: str) -> Path:
    """A run of 24 built-in problems, everything scripted."""
    from kit.core.config import DatasetConfig
    from kit.data import read

    train = read(DatasetConfig(limit=24, seed=1), 0).problems
    held_out = read(DatasetConfig(limit=24, seed=2), 0, held_out=True).problems
    answers = folder / "answers.json"
    answers.write_text(json.dumps({p.question: p.answer for p in [*train, *held_out]}))
    model = {"backend": "scripted", "model": str(answers), "max_num_seqs": 2}
    config = {
        "method": method,
        "stop_after": "align" if method == "palign" else "report",
        "data": {"train": {"limit": 24, "seed": 1}, "eval": {"limit": 24, "seed": 2}},
        "teacher": {**model, "samples": 2},
        "student": model,
        "align": {"samples": 2, "extend_rounds": 1},
        "eval": {"samples": 2},
    }
    path = folder / "config.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    return path


@pytest.mark.parametrize("most_kills", [QUICK_KILLS, pytest.param(KILLS, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("method", "seconds_an_answer"), [("palign", 0.004), ("zero-shot", 0.015)])
def test_a_run_killed_over_and_over_equals_an_uninterrupted_one(
    tmp_path, method, seconds_an_answer, most_kills
):
    sys.path.insert(0, str(ROOT))
    config = write_config(tmp_path, method)
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    _, status = os.waitpid(launch(["run", str(config), f"out={whole}", "--quiet"], 0.0), 0)
    assert os.waitstatus_to_exitcode(status) == 0
    draw, kills, ended = random.Random(method), 0, False
    while not ended:
        pid = launch(["run", str(config), f"out={torn}", "--quiet"], seconds_an_answer)
        time.sleep(draw.uniform(0.02, 0.25))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        ended = os.waitstatus_to_exitcode(status) == 0
        kills += not ended
        assert os.waitstatus_to_exitcode(status) in (0, -signal.SIGKILL)
        if kills >= most_kills:
            break
    _, status = os.waitpid(launch(["run", str(config), f"out={torn}", "--quiet"], 0.0), 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert steady(torn) == steady(whole)
    assert sum(map(len, steady(torn).values())) >= 24
    assert kills >= 20, "the run was interrupted often enough to mean something"
