"""The whole pipeline on the real model, by the command line; killed in every stage, resumed."""

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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from kit.core.config import STAGES
from kit.core.records import PrefixRow
from kit.core.storage import RowFile
from tests.browser import REPORT, check
from tests.conftest import ROOT
from tests.test_kills import steady
from tests.test_train import tiny  # noqa: F401  (a fixture)

# Question, gold answer, trace.
TRACES = [
    (
        "Tom has 3 apples and buys 4 more. How many apples does he have now?",
        "7",
        "Tom starts with 3 apples. He buys 4 more. So he has 3 + 4 = 7 apples. "
        "Let me check: 7 - 4 = 3. The answer is \\boxed{7}.",
    ),
    (
        "A shelf holds 9 books. 5 of them are taken. How many books are left?",
        "4",
        "There are 9 books at first. 5 are taken away. So 9 - 5 = 4 books are left. "
        "Going back: 4 + 5 = 9. The answer is \\boxed{4}.",
    ),
    (
        "Mia has 2 boxes of 5 pens. How many pens does she have?",
        "10",
        "Mia has 2 boxes. Each one holds 5 pens. So 2 * 5 = 10 pens. "
        "Half of 10 is 5, that fits. The answer is \\boxed{10}.",
    ),
]
CONFIG = """
name: tiny
data:
  train: {limit: 2}
  eval: {path: builtin, steps: [1, 1], max_number: 10, limit: 2, seed: 2}
teacher: {backend: file, path: TRACES}
student: {model: smollm2-135m, max_num_seqs: 2}
align: {samples: 2, extend_rounds: 1, sampling: {temperature: 0.6, max_new_tokens: 24}}
train:
  dtype: fp32  # on a CPU three times as fast as nf4, which test_train and test_gradient_check have
  max_seq_tokens: 1024  # longer ones need more memory than a laptop has
  gradient_checkpointing: false
  batch_size: 1
  max_steps: 2
  learning_rate: 1.0e-3
  warmup_ratio: 0
  save_minutes: 0
eval: {sampling: {temperature: 0, max_new_tokens: 12}}
prompts:
  instruction: 'Solve the problem and end with the answer in a box, like \\boxed{7}.'
"""
FILES_OF_A_RUN = (
    "config.yaml",
    "manifest.json",
    "train_log.jsonl",
    "metrics.json",
    "report.html",
    "run.log",
)
KILLED_STAGES = ("truncate", "align", "train", "eval")
COMMANDS = (
    *STAGES,
    "run",
    "grade",
    "judge",
    "bench",
    "compare",
    "sweep",
    "plan",
    "doctor",
    "export",
    "prompt",
)


def write_config(folder: Path, changes: dict[str, Any]) -> Path:
    """A config of short traces and a few steps of everything, and its file of traces."""
    with open(folder / "traces.jsonl", "w", encoding="utf-8") as file:
        for number, (question, answer, trace) in enumerate(TRACES):
            row = {"id": f"t{number}", "question": question, "answer": answer, "long_cot": trace}
            file.write(json.dumps(row) + "\n")
    path = folder / "tiny.yaml"
    text = CONFIG.replace("TRACES", str(folder / "traces.jsonl"))
    path.write_text(yaml.safe_dump({**yaml.safe_load(text), **changes}))
    return path


def of_tiny(model: str) -> dict[str, Any]:
    """Changes for a random model, which never continues correctly: its rows are prefixes alone."""
    train = {
        "dtype": "fp32",
        "batch_size": 1,
        "max_steps": 3,
        "learning_rate": 5e-3,
        "warmup_ratio": 0,
        "save_minutes": 0,
    }
    student = {"model": model, "max_num_seqs": 2}
    return {"method": "prefix-only", "student": student, "train": train}


@pytest.fixture(scope="module", params=["tiny", pytest.param("packaged", marks=pytest.mark.slow)])
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes = {}
    if request.param == "tiny":
        changes = of_tiny(request.getfixturevalue("tiny"))
    return write_config(tmp_path_factory.mktemp("pipeline"), changes)


def run_command(config: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "palign.py", "run", str(config), f"out={out}", "--json"]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.fixture(scope="module")
def whole(config: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """An uninterrupted run's folder, and the object that it printed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    finished = run_command(config, out)
    assert finished.returncode == 0, finished.stderr
    return out, json.loads(finished.stdout)


def adapter_weights(folder: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(folder / "adapter" / "adapter_model.safetensors")


def assert_same_run(out: Path, reference: Path) -> None:
    """Rows equal, volatile fields aside; the adapter equal bit for bit."""
    assert steady(out) == steady(reference)
    weights = adapter_weights(out)
    expected = adapter_weights(reference)
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        assert np.array_equal(weights[name], value), name


def test_one_object_says_what_every_stage_did(whole: tuple[Path, dict[str, Any]]) -> None:
    folder, numbers = whole
    rows_in = {stage["name"]: stage["rows_in"] for stage in numbers["stages"]}
    rows_out = {stage["name"]: stage["rows_out"] for stage in numbers["stages"]}
    assert rows_in["teach"] == rows_out["teach"] == 2
    assert rows_in["truncate"] == rows_out["truncate"] == 2
    assert 0 < rows_out["align"] <= 2
    assert rows_out["train"] == rows_out["align"]
    assert numbers["n_eval"] == 2
    assert 0 < numbers["prefix_ratio_median"] <= 1
    assert 0 <= numbers["accuracy_before"] <= 1
    assert 0 <= numbers["accuracy_after"] <= 1
    assert all(stage["seconds"] >= 0 for stage in numbers["stages"])
    for name in FILES_OF_A_RUN:
        assert (folder / name).stat().st_size > 0, name


def test_prefixes_are_exact_slices_of_their_traces(whole: tuple[Path, dict[str, Any]]) -> None:
    traces = {question: trace for question, _, trace in TRACES}
    for row in RowFile(whole[0] / "prefixes.jsonl", PrefixRow).read():
        assert row.trace == traces[row.question]
        assert row.trace[: row.end].strip()
        assert row.verdicts


def test_the_adapter_has_learned(whole: tuple[Path, dict[str, Any]]) -> None:
    folder, numbers = whole
    assert numbers["train"]["fixed_batch_after"] < numbers["train"]["fixed_batch_before"]
    # LoRA's B starts at zero
    weights = adapter_weights(folder)
    assert any(value.any() for name, value in weights.items() if "lora_B" in name)


def test_the_report_of_a_real_run_in_a_browser(
    whole: tuple[Path, dict[str, Any]], browser: Any
) -> None:
    check(browser, whole[0] / "report.html", REPORT)


class ForkServer:
    """`palign.py` in forked children of a process that has imported everything: quick starts.

    The parent never computes, so that the children's OpenMP starts in order.
    """

    CODE = """
import json, os, sys
import bitsandbytes, datasets, peft, torch, transformers
import palign, kit.pipeline.align, kit.pipeline.evaluate, kit.pipeline.truncate
import kit.pipeline.teach, kit.pipeline.train, kit.backends.hf_session, kit.reporting.report
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            sink = os.open(os.devnull, os.O_WRONLY)
            os.dup2(sink, 1)
            os.dup2(sink, 2)
            code = palign.main(json.loads(line))
        finally:
            os._exit(code)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.CODE],
            cwd=ROOT,
            bufsize=1,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def run(self, args: list[str], should_kill: Callable[[], bool] = lambda: False) -> int:
        """Its exit code; killed (-9) once `should_kill` says so, if it has not ended by then."""
        print(json.dumps(args), file=self.process.stdin, flush=True)
        pid = int(self.process.stdout.readline())
        while not select.select([self.process.stdout], [], [], 0.02)[0]:
            if should_kill():
                os.kill(pid, signal.SIGKILL)
                break
        return int(self.process.stdout.readline())


@pytest.fixture
def fork_server() -> Iterator[ForkServer]:
    server = ForkServer()
    yield server
    server.process.kill()


def active_stage(out: Path) -> str | None:
    """The stage that a run is in."""
    path = out / "manifest.json"
    if not path.exists():
        return None
    for name, entry in json.loads(path.read_text())["stages"].items():
        if not entry["done"]:
            return name
    return None


def seconds_into(out: Path, stage: str, seconds: float) -> Callable[[], bool]:
    """Whether a run has been in a stage, or past it, for so long."""
    first_seen: list[float] = []

    def has_passed() -> bool:
        now = active_stage(out)
        if now and STAGES.index(now) >= STAGES.index(stage) and not first_seen:
            first_seen.append(time.monotonic())
        return bool(first_seen) and time.monotonic() - first_seen[0] > seconds

    return has_passed


def run_with_kills(
    server: ForkServer,
    config: Path,
    reference: Path,
    folder: Path,
    kills: list[str],
    latest_seconds: float,
) -> Counter[str]:
    """Kill runs at a random moment of each stage in `kills`, resuming each until it ends.

    The moment is up to `latest_seconds` after the stage began, and may lie in a later stage.

    Every run that ends is compared with the reference.

    Returns:
        How often a run was killed in which stage.
    """
    draw = random.Random(0)
    waiting = list(kills)
    killed: Counter[str] = Counter()
    ended = 0
    while waiting or not ended:
        out = folder / f"killed{ended}"
        args = ["run", str(config), f"out={out}", "--quiet"]
        code = None
        while code != 0:
            if waiting:
                code = server.run(
                    args, seconds_into(out, waiting[0], draw.uniform(0, latest_seconds))
                )
            else:
                code = server.run(args)
            if code != 0:
                assert code == -signal.SIGKILL
                killed[active_stage(out) or "between stages"] += 1
                waiting.pop(0)
        ended += 1
        assert_same_run(out, reference)
    return killed


def test_killed_in_its_stages_a_run_of_a_tiny_student_ends_as_if_it_had_not_been(
    tiny: str,  # noqa: F811
    fork_server: ForkServer,
    tmp_path: Path,
) -> None:
    config = write_config(tmp_path, of_tiny(tiny))
    reference = tmp_path / "whole"
    assert fork_server.run(["run", str(config), f"out={reference}", "--quiet"]) == 0
    kills = ["truncate", "train", "eval"]
    killed = run_with_kills(fork_server, config, reference, tmp_path, kills, latest_seconds=1)
    assert killed.total() == len(kills)

    # a finished run is skipped
    again = run_command(config, tmp_path / "killed0")
    for stage in STAGES[:5]:
        assert f"{stage}: already done, skipped" in again.stderr


@pytest.mark.slow
@pytest.mark.parametrize("config", ["packaged"], indirect=True)
def test_killed_twenty_times_the_run_ends_as_if_it_had_not_been(
    config: Path,
    whole: tuple[Path, dict[str, Any]],
    fork_server: ForkServer,
    tmp_path: Path,
) -> None:
    kills = [stage for stage in KILLED_STAGES for _ in range(5)]
    killed = run_with_kills(fork_server, config, whole[0], tmp_path, kills, latest_seconds=4)
    assert killed.total() >= 20
    assert set(killed) >= set(KILLED_STAGES), killed


@pytest.mark.parametrize("name", COMMANDS)
def test_help_imports_nothing_heavy(name: str) -> None:
    """--help answers at once. Shown by what it does not import: a shared machine keeps no time."""
    code = (
        f"import sys; sys.argv = ['palign.py', {name!r}, '--help']; import palign\n"
        "try: palign.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'pydantic', 'rich', 'numpy', 'llama_cpp'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert finished.returncode == 0, finished.stderr
    assert "usage" in finished.stdout
