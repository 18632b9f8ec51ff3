"""sweep: many runs from one config, traces shared, killed and resumed, compared at the end.

The stages run on the scripted, torch-free stand-in, as in tests/test_kills.py; the slow proof takes
the real model through training and evaluation.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import palign
from kit.core.errors import KitError
from kit.core.records import PrefixRow
from kit.core.storage import RowFile
from kit.pipeline.sweep import plan
from tests.conftest import ROOT
from tests.test_kills import launch, steady, write_config

QUICK = ["method=palign,no-verify", "seed=1"]
WHOLE = [
    "method=palign,ratio-0.5,long-trace,no-verify,mix-long-short,fixed-prefix-matched",
    "seed=1,2",
]


def folders_of(root: Path) -> list[Path]:
    return sorted(path.parent for path in root.glob("*/manifest.json"))


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run_json(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, dict[str, Any]]:
    code = palign.main([*args, "--json", "--quiet"])
    return code, json.loads(capsys.readouterr().out)


def test_runs_are_planned_by_seed_and_the_matched_cut_comes_last() -> None:
    configs = plan(
        "configs/smoke.yaml",
        ["method=fixed-prefix-matched,palign", "seed=2,1", "align.samples=3", "out=runs/x"],
    )
    names = [config.name for config in configs]
    assert names == [
        "palign-seed2",
        "fixed-prefix-matched-seed2",
        "palign-seed1",
        "fixed-prefix-matched-seed1",
    ]
    assert all(config.align.samples == 3 for config in configs)
    assert all(str(config.folder) == f"runs/x/{config.name}" for config in configs)
    # equal for all seeds, so that they are one group of the comparison
    assert {config.baseline.matched_run for config in configs} == {"runs/x/palign-seed{seed}"}
    assert [config.name for config in plan("configs/smoke.yaml", [])] == ["palign-seed0"]
    with pytest.raises(KitError, match="method"):
        plan("configs/smoke.yaml", ["method=palign,nonsense"])


def test_traces_are_made_once_for_each_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, "palign")
    out = tmp_path / "sweep"
    axes = ["method=palign,post-think,long-trace,zero-shot", "seed=1,2"]
    code, result = run_json(capsys, "sweep", str(config), *axes, f"out={out}")
    assert code == 0
    by_name = {Path(run["folder"]).name: run for run in result["runs"]}
    assert list(by_name) == [
        f"{method}-seed{seed}" for seed in (1, 2) for method in axes[0][7:].split(",")
    ]
    assert all(
        run.keys() == {"method", "seed", "folder", "accuracy", "n", "error"}
        for run in result["runs"]
    )
    for seed in (1, 2):
        logs = {}
        for method in ("palign", "post-think", "long-trace"):
            folder = out / f"{method}-seed{seed}"
            logs[method] = (folder / "run.log").read_text()
            traces = (folder / "traces.jsonl").read_bytes()
            assert traces == (out / f"palign-seed{seed}" / "traces.jsonl").read_bytes()
        assert "teach: already done" not in logs.pop("palign")
        assert all("teach: already done, skipped" in log for log in logs.values())
    rejected = (out / "post-think-seed1" / "rejected.jsonl").read_text()
    assert "the teacher wrote nothing after its thinking" in rejected
    assert result["compare"]["page"] == str(out / "compare.html")


def test_a_run_that_fails_is_named_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(write_config(tmp_path, "palign"))
    axes = ["method=palign,zero-shot", "seed=1,2", "stop_after=report"]
    # nobody can train the scripted student
    code, result = run_json(capsys, "sweep", config, *axes, f"out={tmp_path / 'sweep'}")
    assert code == 1
    for run in result["runs"]:
        assert bool(run["error"]) == (run["method"] == "palign") == (run["accuracy"] is None)
        assert run["n"] == (None if run["error"] else 24)
    assert [group["seeds"] for group in result["compare"]["groups"]] == [[1, 2]]


def test_a_fault_of_the_machine_fails_one_run_and_its_siblings_do_not_mind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(write_config(tmp_path, "palign"))
    out = tmp_path / "sweep"
    # a folder where a run writes its traces, and a manifest that is none
    (out / "long-trace-seed1" / "traces.jsonl").mkdir(parents=True)
    axes = ["method=palign,long-trace,ratio-0.5", "seed=1", f"out={out}"]
    code, result = run_json(capsys, "sweep", config, *axes)
    assert code == 1 and [bool(run["error"]) for run in result["runs"]] == [False, True, False]
    (out / "palign-seed1" / "manifest.json").write_text("{")
    (out / "ratio-0.5-seed1" / "manifest.json").unlink()
    axes = ["method=palign,ratio-0.5", "seed=1", f"out={out}"]
    code, result = run_json(capsys, "sweep", config, *axes)
    # one is left: nothing is compared, and the list of runs says why
    assert code == 1 and result["compare"] is None
    assert [bool(run["error"]) for run in result["runs"]] == [True, False]
    assert palign.main(["sweep", config, "method=palign", "seed=1,01", f"out={out}", "--json"]) == 2
    assert "two runs or more" in capsys.readouterr().err


def test_a_run_of_other_traces_makes_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is taken over is looked at like a run's own: here the teacher changed in between."""
    config = str(write_config(tmp_path, "palign"))
    out = f"out={tmp_path / 'sweep'}"
    run_json(capsys, "sweep", config, "method=palign,long-trace", "seed=1", out)
    axes = ["method=palign,long-trace,ratio-0.5", "seed=1", "teacher.samples=1"]
    run_json(capsys, "sweep", config, *axes, out)
    first, *others = (
        (folder / "traces.jsonl").read_bytes() for folder in folders_of(tmp_path / "sweep")
    )
    assert others == [first, first]
    assert len(json.loads(first.splitlines()[0])["samples"]) == 1


@pytest.mark.parametrize(
    ("axes", "runs", "kills"), [(QUICK, 2, 8), pytest.param(WHOLE, 12, 40, marks=pytest.mark.slow)]
)
def test_a_sweep_killed_over_and_over_equals_an_uninterrupted_one(
    tmp_path: Path, axes: list[str], runs: int, kills: int
) -> None:
    sys.path.insert(0, str(ROOT))
    config = str(write_config(tmp_path, "palign"))
    whole = tmp_path / "whole"
    torn = tmp_path / "torn"
    assert exit_code(launch(["sweep", config, *axes, f"out={whole}"], 0.0)) == 0
    draw = random.Random(0)
    killed = 0
    for _ in range(kills):
        pid = launch(["sweep", config, *axes, f"out={torn}"], 0.003)
        time.sleep(draw.uniform(0.02, 0.6))
        os.kill(pid, signal.SIGKILL)
        code = exit_code(pid)
        assert code in (0, -signal.SIGKILL)
        killed += code != 0
    assert killed >= 4, "it was interrupted often enough to mean something"
    assert exit_code(launch(["sweep", config, *axes, f"out={torn}"], 0.0)) == 0
    names = [folder.name for folder in folders_of(whole)]
    assert len(names) == runs and names == [folder.name for folder in folders_of(torn)]
    for name in names:
        assert steady(torn / name) == steady(whole / name), name
    assert (torn / "compare.html").exists()


REAL = {
    "data": {
        "train": {"path": "builtin", "steps": [1, 1], "max_number": 10, "limit": 6},
        "eval": {"path": "builtin", "steps": [1, 1], "max_number": 10, "limit": 4, "seed": 9},
    },
    "teacher": {"backend": "reference", "wordiness": 0.3},
    "student": {"backend": "hf", "model": "smollm2-135m", "n_threads": 1},
    "judge": {"kind": "answer"},
    "align": {
        "mode": "prefill",
        "samples": 3,
        "extend_rounds": 2,
        "sampling": {"max_new_tokens": 32},
    },
    "train": {
        "dtype": "fp32",
        "dropout": 0,
        "gradient_checkpointing": False,
        "max_steps": 2,
        "batch_size": 2,
        "max_seq_tokens": 512,
        "save_minutes": 0,
    },
    "eval": {"base": False, "sampling": {"temperature": 0, "max_new_tokens": 16}},
}


@pytest.mark.slow
def test_a_real_sweep_killed_twice_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    """The packaged model judged, read for entropies, trained and evaluated."""
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(REAL))
    command = [sys.executable, "palign.py", "sweep", str(config), "--json", "--quiet"]
    command += ["method=long-trace,step-entropy,post-think,palign,fixed-prefix-matched"]

    def start(out: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*command, f"out={out}"], cwd=ROOT, stdout=subprocess.PIPE)

    whole = tmp_path / "whole"
    torn = tmp_path / "torn"
    done = start(whole)
    result = json.loads(done.communicate()[0])
    for trigger in ("long-trace-seed0/checkpoints/*", "step-entropy-seed0/eval/*.jsonl"):
        killed = start(torn)
        while killed.poll() is None and not list(torn.glob(trigger)):
            time.sleep(0.05)
        killed.send_signal(signal.SIGKILL)
        assert killed.wait() == -signal.SIGKILL, f"it was to be killed at {trigger}"
    again = start(torn)
    assert json.loads(again.communicate()[0])["compare"]["pairs"] == result["compare"]["pairs"]

    for folder in folders_of(whole):
        other = torn / folder.name
        assert steady(other) == steady(folder), folder.name
        weights = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
        assert (other / "adapter" / "adapter_model.safetensors").read_bytes() == weights
    entropy = RowFile(whole / "step-entropy-seed0" / "prefixes.jsonl", PrefixRow).read()
    assert len(entropy) == 6 and all("[SKIP]" in row.prefix for row in entropy)
