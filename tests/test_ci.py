"""What CI, the hooks and the README run is one thing: .ci/run. The workflow for others' projects in
configs/ is run command by command, the compilation of llama.cpp aside.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from kit.reporting.metrics import Files, numbers
from tests.conftest import ROOT
from tests.make_run import make

TEST_COMMAND = "pip install -r tests/requirements.txt && python -m pytest tests"


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_hooks_run_what_ci_runs() -> None:
    script = read(".ci/run")
    hooks = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"][0]["hooks"]
    assert {hook["id"] for hook in hooks} >= {"ruff-check", "ruff-format", "mypy", "tests"}
    for hook in hooks:
        assert hook["entry"] in script, hook["id"]


def test_the_workflow_runs_the_script() -> None:
    steps = yaml.safe_load(read(".github/workflows/ci.yml"))["jobs"]["ci"]["steps"]
    assert "bash .ci/run" in [step.get("run") for step in steps]


def test_the_script_runs_the_readmes_test_command() -> None:
    assert TEST_COMMAND in read("README.md")
    assert f"'{TEST_COMMAND}' README.md" in read(".ci/run")


def test_the_image_builds_and_tests_itself_without_a_card() -> None:
    text = read("Dockerfile")
    [flags] = re.findall(r'CMAKE_ARGS="(.*?)"', text)
    options = dict(flag.removeprefix("-D").split("=", 1) for flag in shlex.split(flags))
    assert options["GGML_CUDA"] == "on"
    # native architectures are those of a card that the builder lacks: T4 to RTX 50 are named
    assert options["GGML_NATIVE"] == "off"
    architectures = options["CMAKE_CUDA_ARCHITECTURES"].split(";")
    assert set(architectures) >= {"75", "80", "86", "89", "90", "120"}
    # llama.cpp is linked with the driver's library: without --gpus, the toolkit's stub of it
    stubs = "/usr/local/cuda/lib64/stubs"
    assert f"LIBRARY_PATH={stubs}" in text and f"ln -s libcuda.so {stubs}/libcuda.so.1" in text
    comment = text.split("FROM")[0]
    command = comment[comment.rindex("docker run") :]
    assert TEST_COMMAND in command and f":{stubs} " in command and "--gpus" not in command


# --- configs/github-workflow.yml ---


def steps() -> dict[str, dict[str, Any]]:
    """The steps of the workflow for others, by name or action."""
    job = yaml.safe_load(read("configs/github-workflow.yml"))["jobs"]["smoke"]
    return {step.get("name", step.get("uses")): step for step in job["steps"]}


def run_step(name: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a step as the runner does: a file for the shell that it names."""
    step = steps()[name]
    script = folder / "step"
    script.write_text(step["run"], encoding="utf-8")
    shells = {
        "python": [sys.executable],
        "bash": ["bash", "--noprofile", "--norc", "-eo", "pipefail"],
    }
    command = [*shells[step.get("shell", "bash")], str(script)]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, **step.get("env", {})}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_the_readme_names_the_workflow_and_its_cache_is_the_installs() -> None:
    assert "configs/github-workflow.yml" in read("README.md")
    wheels = steps()["actions/cache@v4"]["with"]
    assert wheels["path"] == "wheels" and "hashFiles('requirements.txt')" in wheels["key"]
    assert "--find-links wheels -r requirements.txt" in steps()["Install"]["run"]


def test_a_cached_wheel_is_not_compiled_again(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "llama_cpp_python-0-py3-none-any.whl").write_text("")
    done = run_step("Compile llama.cpp where it is not in the cache", tmp_path)
    assert done.returncode == 0 and not done.stderr


def spoil_stage(run: dict[str, Any]) -> None:
    run["stages"][1]["rows_out"] = 0


def spoil_judge(run: dict[str, Any]) -> None:
    run["verdicts_unparsed"] = 3


def spoil_training(run: dict[str, Any]) -> None:
    run["train"]["fixed_batch_after"] = run["train"]["fixed_batch_before"]


def spoil_scores(run: dict[str, Any]) -> None:
    run["scores"] = run["scores"][:1]


def spoil_rows(run: dict[str, Any]) -> None:
    run["train_rows"] = 0


@pytest.mark.parametrize(
    "spoil", [None, spoil_stage, spoil_judge, spoil_training, spoil_scores, spoil_rows]
)
def test_the_workflows_check_passes_a_whole_run_and_no_other(
    tmp_path: Path, spoil: Callable[[dict[str, Any]], None] | None
) -> None:
    result = numbers(Files(make(tmp_path / "run")))
    result["verdicts_unparsed"] = 0  # the made-up run has some
    result["train"] = {"fixed_batch_before": 2.5, "fixed_batch_after": 1.25}
    for score in result["scores"]:
        score["rejected"] = 0
    if spoil:
        spoil(result)
    (tmp_path / "smoke.json").write_text(json.dumps(result))
    done = run_step("Check what came out", tmp_path)
    assert done.returncode == (1 if spoil else 0), done.stderr
    assert ("AssertionError" in done.stderr) == bool(spoil)


@pytest.mark.slow
def test_the_workflows_commands_run_in_a_checkout(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in ("palign.py", "requirements.txt"):
        shutil.copy(ROOT / name, checkout)
    for name in ("kit", "configs"):
        shutil.copytree(ROOT / name, checkout / name)
    for name in ("Run every stage on the packaged model", "Check what came out"):
        done = run_step(name, checkout)
        assert done.returncode == 0, done.stderr
    assert "tuned" in done.stdout
    assert (checkout / steps()["actions/upload-artifact@v4"]["with"]["path"]).exists()
