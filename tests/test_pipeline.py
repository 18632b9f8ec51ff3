"""The whole pipeline on the real model, through the command line, killed in every stage and resumed."""

from __future__ import annotations

import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from kit.core.config import STAGES
from kit.core.records import PrefixRow
from kit.core.storage import RowFile
from tests.browser import REPORT, check
from tests.conftest import ROOT
from tests.test_kills import steady

TRACES = [
    ("Tom has 3 apples and buys 4 more. How many apples does he have now?", "7", "Tom starts with 3 apples. "
     "He buys 4 more. So he has 3 + 4 = 7 apples. Let me check: 7 - 4 = 3. The answer is \\boxed{7}."),
    ("A shelf holds 9 books. 5 of them are taken. How many books are left?", "4", "There are 9 books at first. "
     "5 are taken away. So 9 - 5 = 4 books are left. Going back: 4 + 5 = 9. The answer is \\boxed{4}."),
    ("Mia has 2 boxes of 5 pens. How many pens does she have?", "10", "Mia has 2 boxes. Each one holds 5 pens. "
     "So 2 * 5 = 10 pens. Half of 10 is 5, that fits. The answer is \\boxed{10}."),
]  # fmt: skip
CONFIG = """
name: tiny
data: {train: {limit: 3}, eval: {path: builtin, steps: [1, 1], max_number: 10, limit: 3, seed: 2}}
teacher: {backend: file, path: TRACES}
student: {model: smollm2-135m, max_num_seqs: 2}
align: {samples: 3, extend_rounds: 1, sampling: {temperature: 0.6, max_new_tokens: 40}}
train: {batch_size: 1, max_steps: 3, learning_rate: 1.0e-3, warmup_ratio: 0, save_steps: 1}
eval: {sampling: {temperature: 0, max_new_tokens: 24}}
prompts: {instruction: 'Solve the problem and end with the answer in a box, like \\boxed{7}.'}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    rows = [
        {"id": f"t{i}", "question": q, "answer": a, "long_cot": t}
        for i, (q, a, t) in enumerate(TRACES)
    ]
    (folder / "traces.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tiny.yaml").write_text(CONFIG.replace("TRACES", str(folder / "traces.jsonl")))
    return folder / "tiny.yaml"


def command(config: Path, out: Path) -> list[str]:
    return [sys.executable, "palign.py", "run", str(config), f"out={out}", "--json"]


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory) -> tuple[Path, dict]:
    """An uninterrupted run and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    done = subprocess.run(
        command(config, out), capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout)


def adapter(folder: Path) -> dict:
    from safetensors.numpy import load_file

    return load_file(folder / "adapter" / "adapter_model.safetensors")


def test_one_object_tells_what_every_stage_did(whole):
    folder, told = whole
    rows = {stage["name"]: (stage["rows_in"], stage["rows_out"]) for stage in told["stages"]}
    assert rows["teach"] == (3, 3) and rows["truncate"] == (3, 3) and 0 < rows["align"][1] <= 3
    assert rows["train"][1] == rows["align"][1] and told["n_eval"] == 3
    assert 0 < told["prefix_ratio_median"] <= 1 and all(
        0 <= told[k] <= 1 for k in ("accuracy_before", "accuracy_after")
    )
    assert all(stage["seconds"] >= 0 for stage in told["stages"])
    for name in (
        "config.yaml",
        "manifest.json",
        "train_log.jsonl",
        "metrics.json",
        "report.html",
        "run.log",
    ):
        assert (folder / name).stat().st_size > 0, name


def test_prefixes_are_exact_slices_and_the_adapter_has_learnt(whole):
    folder, told = whole
    for row in RowFile(folder / "prefixes.jsonl", PrefixRow).read():
        given = next(trace for question, _, trace in TRACES if question == row.question)
        assert row.trace == given and given[: row.end].strip() and row.verdicts
    assert told["train"]["fixed_batch_after"] < told["train"]["fixed_batch_before"]
    assert any(value.any() for name, value in adapter(folder).items() if "lora_B" in name), (
        "B starts at zero"
    )


def test_its_report_in_a_browser(whole, browser):
    check(browser, whole[0] / "report.html", REPORT)


class Nursery:
    """`palign.py run` in forked children of a process that has imported everything: a start costs no imports.

    The parent never computes, so that the children's OpenMP starts sound.
    """

    CODE = """
import json, os, sys
import bitsandbytes, datasets, peft, torch, transformers
import palign, kit.pipeline.align, kit.pipeline.evaluate, kit.pipeline.truncate, kit.reporting.report
import kit.pipeline.teach, kit.pipeline.train, kit.backends.hf_session
for line in sys.stdin:
    if not (pid := os.fork()):
        code = 70
        try:
            sink = os.open(os.devnull, os.O_WRONLY)
            os.dup2(sink, 1), os.dup2(sink, 2)
            code = palign.main(json.loads(line))
        finally:
            os._exit(code)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""

    def __init__(self) -> None:
        pipes = {
            "stdin": subprocess.PIPE,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.DEVNULL,
            "text": True,
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.CODE], cwd=ROOT, bufsize=1, **pipes
        )

    def run(self, args: list[str], moment: Callable[[], bool] = lambda: False) -> int:
        """Its exit code; killed (-9) at the moment given, if it has not ended by then."""
        print(json.dumps(args), file=self.process.stdin, flush=True)
        pid = int(self.process.stdout.readline())
        while not select.select([self.process.stdout], [], [], 0.02)[0]:
            if moment():
                os.kill(pid, signal.SIGKILL)
                break
        return int(self.process.stdout.readline())


def active(out: Path) -> str | None:
    """The stage that a run is in."""
    path = out / "manifest.json"
    stages = json.loads(path.read_text())["stages"] if path.exists() else {}
    return next((name for name, entry in stages.items() if not entry["done"]), None)


def inside(out: Path, stage: str, seconds: float) -> Callable[[], bool]:
    """So long after a run has come to a stage, or past it."""
    begun: list[float] = []

    def moment() -> bool:
        now = active(out)
        if now and STAGES.index(now) >= STAGES.index(stage):
            begun.append(time.monotonic())
        return bool(begun) and time.monotonic() - begun[0] > seconds

    return moment


def test_killed_twenty_times_the_run_ends_as_if_it_had_not_been(config, whole, tmp_path):
    """At random moments in every stage; rows equal the uninterrupted run's, the adapter bit for bit."""
    import numpy as np

    draw, nursery, killed, ended = random.Random(0), Nursery(), Counter(), 0
    wanted = [stage for stage in ("truncate", "align", "train", "eval") for _ in range(5)]
    try:
        while wanted or not ended:
            out = tmp_path / f"torn{ended}"
            args = ["run", str(config), f"out={out}", "--quiet"]
            while code := nursery.run(
                args, inside(out, wanted[0], draw.uniform(0, 4)) if wanted else lambda: False
            ):
                assert code == -signal.SIGKILL
                killed[active(out) or "between stages"] += 1
                wanted.pop(0)
            ended += 1
            assert steady(out) == steady(whole[0])
            first, second = adapter(whole[0]), adapter(out)
            assert first.keys() == second.keys() and all(
                np.array_equal(first[k], second[k]) for k in first
            )
    finally:
        nursery.process.kill()
    assert killed.total() >= 20 and {*killed} >= {"truncate", "align", "train", "eval"}, killed

    again = subprocess.run(
        command(config, out), capture_output=True, text=True, check=False, cwd=ROOT
    )
    for stage in STAGES[:5]:
        assert f"{stage}: done before, skipped" in again.stderr


@pytest.mark.parametrize("name", ["run", "teach", "truncate", "align", "train", "eval", "report", "grade", "judge",
                                  "bench", "compare", "plan", "doctor", "export", "prompt"])  # fmt: skip
def test_help_imports_nothing_heavy(name):
    """--help within half a second, shown by what it does not import; a time is not asserted on shared machines."""
    code = (
        f"import sys; sys.argv = ['palign.py', {name!r}, '--help']; import palign\n"
        "try: palign.main()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'pydantic', 'rich', 'numpy', 'llama_cpp'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0 and "usage" in done.stdout, done.stderr
