"""A failure and a Ctrl-C at each stage: the message, the page, the exit code.

What a stage raises is put in its place here; test_faults.py has real disks, and the long proof at
the end a real training.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import palign
from kit.core.errors import KitError
from kit.core.stages import STAGE_TABLE
from kit.reporting import report
from kit.reporting.metrics import Files, numbers
from tests.conftest import ROOT
from tests.make_run import make
from tests.test_kills import write_config

# What a stage may raise, the words that must reach the user, and whether it is a defect.
ERRORS: dict[str, tuple[Exception, str, bool]] = {
    "ours": (KitError("The loss of step 3 is not finite.", "Look."), "step 3 is not finite", False),
    "full disk": (OSError(28, "No space left on device", "x.bin"), "No space left", False),
    "full disk in a library": (
        RuntimeError("I/O error: No space left on device (os error 28)"),
        "No space left",
        False,
    ),
    "memory": (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "memory", False),
    "package": (ModuleNotFoundError("No module named 'x'", name="x"), "pip install -r", False),
    "old package": (ImportError("cannot import name 'y'", name="x.y"), "pip install -r", False),
    "import of ours": (ImportError("cannot import name 'y'", name="kit.data"), "'y'", True),
    "defect": (KeyError("surprise"), "surprise", True),
}


def arguments(tmp_path: Path, stage: str) -> list[str]:
    """A run that comes to a stage quickly: scripted up to alignment, then the packaged student."""
    if stage in ("train", "eval"):
        keys = ["method=long-trace", "data.train.limit=4", "train.dtype=fp32", "data.eval.limit=4"]
        return ["configs/workshop.yaml", f"out={tmp_path}/run", *keys]
    return [str(write_config(tmp_path, "palign")), f"out={tmp_path}/run"]


@pytest.mark.parametrize("page_fails", [False, True])
@pytest.mark.parametrize("stage", ["teach", "truncate", "align", "train", "eval"])
def test_the_first_error_is_the_one_that_is_told(
    stage: str,
    page_fails: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(ROOT)
    module, _, name = STAGE_TABLE[stage].entry_point.partition(":")

    def broken(*_: object) -> str:
        raise ValueError("the page is broken")

    if page_fails:
        monkeypatch.setattr(report, "page", broken)
    if stage == "eval":  # not trained here
        monkeypatch.setattr("kit.pipeline.train.train", lambda run: None)
    # Every kind once; elsewhere one for users and a defect.
    kinds = ERRORS if stage == "teach" and not page_fails else ("ours", "defect")
    for error, words, is_defect in map(ERRORS.__getitem__, kinds):

        def fail(run: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(f"{module}.{name}", fail)
        assert palign.main(["run", *arguments(tmp_path, stage)]) == 1
        printed = capsys.readouterr().err
        last = printed.strip().splitlines()[-1]
        assert last.startswith("palign: ") and words in last, printed
        assert ("a defect" in last) == is_defect and "Traceback" not in printed
        assert ("no report: the page is broken" in printed) == page_fails
        assert (tmp_path / "run" / "report.html").exists() != page_fails


@pytest.mark.parametrize(
    ("method", "file"),
    [
        ("palign", "traces.jsonl"),
        ("palign", "prefixes.jsonl"),
        ("palign", "aligned.jsonl"),
        ("zero-shot", "eval/answers.json-base-builtin.jsonl"),
    ],
)
def test_ctrl_c_in_a_stage_and_the_page_after_it(method: str, file: str, tmp_path: Path) -> None:
    config = str(write_config(tmp_path, method))
    keys = [config, f"out={tmp_path}/run", "data.eval.limit=5"]
    interrupt(keys, tmp_path / "run" / file, {"PALIGN_SCRIPT_SECONDS": "0.03"})
    assert palign.main(["report", *keys, "--quiet"]) == 0
    assert "not finished" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    if method == "palign":  # evaluation goes on in the same way, but its grader starts slowly
        assert palign.main(["run", *keys, "--quiet"]) == 0


def interrupt(arguments: list[str], file: Path, environment: dict[str, str]) -> None:
    """Start a run, send SIGINT once a file has a line, and look at how it ends."""
    process = subprocess.Popen(
        [sys.executable, "palign.py", "run", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
    )
    while not (file.exists() and file.read_bytes().count(b"\n")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    printed = process.communicate(timeout=30)[1]
    assert process.returncode == 130, printed
    assert "Interrupted. Finished rows are saved" in printed
    assert "Traceback" not in printed and "a defect" not in printed


@pytest.mark.parametrize("entry", [None, {"keys": {}, "done": False}])
def test_the_page_of_a_training_that_was_stopped(entry: dict | None, tmp_path: Path) -> None:
    folder = make(tmp_path / "run", upto="train")
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["stages"]["train"]
    if entry:
        manifest["stages"]["train"] = entry
    path.write_text(json.dumps(manifest))
    files = Files(folder)
    assert files.log
    page = report.page(files, numbers(files))
    assert "optimizer step" in page
    assert report.render("report.txt.j2", run=numbers(files))


@pytest.mark.slow
def test_ctrl_c_and_a_loss_that_is_not_finite_in_a_real_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    arguments_ = ["configs/workshop.yaml", "method=long-trace", "data.train.limit=8"]
    arguments_ += ["train.epochs=40", "data.eval.limit=4"]
    run = tmp_path / "stopped"
    interrupt([*arguments_, f"out={run}"], run / "train_log.jsonl", {})
    assert palign.main(["report", *arguments_, f"out={run}", "--quiet"]) == 0
    assert "not finished" in (run / "report.html").read_text(encoding="utf-8")

    hot = [*arguments_, f"out={tmp_path}/hot", "train.learning_rate=1e30", "train.warmup_ratio=0"]
    assert palign.main(["run", *hot]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "is not finite" in last and "a defect" not in last
    assert (tmp_path / "hot" / "report.html").exists()


@pytest.mark.parametrize("command", [["run", "configs/smoke.yaml"], ["doctor"]])
def test_without_the_packages_it_says_how_to_install_them(command: list[str]) -> None:
    """-S: Python's own library alone, as on a fresh machine."""
    line = [sys.executable, "-S", "palign.py", *command]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 1
    assert "pip install -r requirements.txt" in done.stderr and "Traceback" not in done.stderr


PLACES = {
    "without docstrings": (["-OO"], {}),
    "safe path": (["-P"], {}),
    "safe path of the environment": ([], {"PYTHONSAFEPATH": "1"}),
    "ascii terminal": ([], {"PYTHONIOENCODING": "ascii"}),
    "no locale": ([], {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
}


@pytest.mark.parametrize("name", PLACES)
def test_it_starts_anywhere(name: str, tmp_path: Path) -> None:
    flags, environment = PLACES[name]
    config = write_config(tmp_path, "palign")
    rows = [{"id": "ü\u2028", "question": "Was ist ½ + 1, – ü?", "answer": "2"}] * 2
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    commands = [["run", str(config), "out=here", f"data.train={data}"]]
    if environment:  # what it prints
        commands += [["data", str(data), "--all"], ["data", str(data), "--all", "--json"]]
    for command in commands:
        done = subprocess.run(
            [sys.executable, *flags, str(ROOT / "palign.py"), *command],
            capture_output=True,
            cwd=tmp_path,
            env={**os.environ, **environment},
            check=False,
        )
        assert done.returncode == 0, done.stderr.decode(errors="replace")
        if "--json" in command:
            assert json.loads(done.stdout)["problems"][0]["question"] == rows[0]["question"]
    assert (tmp_path / "here" / "traces.jsonl").exists()


def test_every_reader_of_lines_sees_the_same_rows(tmp_path: Path) -> None:
    config = write_config(tmp_path, "palign")
    rows = []
    for number in range(40):
        rows.append(
            {"id": f"a{number}", "question": f"{number}\x85 + 0\u2028?\u2029", "answer": "1"}
        )
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = {row["question"]: row["answer"] for row in rows}
    (tmp_path / "answers.json").write_text(json.dumps(answers))
    run = tmp_path / "run"
    keys = [f"out={run}", f"data.train={data}", "--quiet"]
    assert palign.main(["run", str(config), *keys]) == 0
    files = list(run.glob("*.jsonl"))
    assert len(files) == 5
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert len(text.splitlines()) == text.count("\n") > 0, file
        assert all(json.loads(line) for line in text.splitlines())


def test_home_is_expanded_in_keys_and_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path, "palign")
    (tmp_path / "judge.txt").write_text("{question} {prefix}")
    keys = ["out=~/run", "prompts.judge=file:~/judge.txt", "--quiet"]
    assert palign.main(["run", "~/config.yaml", *keys]) == 0
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    compared = ["compare", "~/run", "~/copy", "--out", "~/page.html", "--quiet"]
    assert palign.main(compared) == 0
    assert (tmp_path / "run" / "traces.jsonl").exists() and (tmp_path / "page.html").exists()
    assert not (tmp_path / "~").exists()
