"""What CI, the hooks and the README run is one thing: .ci/run."""

from __future__ import annotations

import yaml

from tests.conftest import ROOT

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
