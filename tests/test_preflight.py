"""Preflight: each broken thing is found by `check`, and `run` stops before a stage wrote a row."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import palign
from kit import preflight
from kit.core.config import resolve
from kit.core.progress import Progress
from kit.core.run import Run
from kit.models import fingerprints, gguf_file, hf_folder
from tests.conftest import ROOT
from tests.test_kills import write_config
from tests.test_train import tiny  # noqa: F401  (a fixture)

PROBLEMS = [
    {"id": "a", "question": "What is 1 + 1?", "answer": "2"},
    {"id": "a.1", "question": "What is 1 + 2?", "answer": "3"},
]
WHOLE = ["stop_after=report"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config that runs, and the files that the broken ones name."""
    folder = tmp_path_factory.mktemp("preflight")
    write_config(folder, "palign")
    lines = [json.dumps(row) + "\n" for row in PROBLEMS]
    (folder / "rows.jsonl").write_text("".join(lines))
    (folder / "torn.jsonl").write_text("".join(lines) + '{"id": "b", "quest')
    (folder / "words.txt").write_text("Is it enough?")
    for name, text in (("config.yaml", "name: mine"), ("manifest.json", '{"name": "a web page"}')):
        (folder / f"has-{name}").mkdir()
        (folder / f"has-{name}" / name).write_text(text)
    (folder / "empty-model").mkdir()
    (folder / "empty-model" / "config.json").write_text("{}")
    return folder


def closed_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


DEAD = f"url=http://127.0.0.1:{closed_port()}/v1"
JUDGED = ["data.train={base}/rows.jsonl", "data.train.verifier=judge"]
# Overrides that break one thing ({base}: the folder), the key and the words that name it.
BROKEN: list[tuple[list[str], str, str]] = [
    (["prompts.judge=file:{base}/none.txt"], "config", "cannot be read"),
    (["prompts.judge=file:{base}/words.txt"], "config", "{question} is missing"),
    (["seed=-1"], "config", "seed"),
    (["seed=4294967296"], "config", "seed"),
    (["train.learning_rate=.inf"], "config", "finite"),
    (["teacher.wordiness=1e9"], "config", "wordiness"),
    (["student.api_key_env=sk-pasted"], "config", "environment variable"),
    (["student.url=http://me:secret@host/v1"], "config", "environment variable"),
    (["data.train={base}/none.jsonl"], "data", "cannot be read"),
    (["data.train={base}/torn.jsonl"], "data", "line 3"),
    (["data.train={base}/rows.jsonl", *WHOLE, "data.eval={base}/rows.jsonl"], "data", "both"),
    (["data.train={base}/rows.jsonl", *WHOLE, "data.eval=holdout"], "data", "holdout"),
    (["data.train={base}/rows.jsonl", "data.train.stratify=level"], "data", "stratify"),
    (["data.train={base}/rows.jsonl", "teacher.keep=all"], "data", "would be called 'a.1'"),
    (["data.train={base}/rows.jsonl", "teacher.backend=reference"], "data", "worked solution"),
    (["data.train.limit=1000000000"], "data", "problems"),
    (["teacher.backend=file", "teacher.path={base}/rows.jsonl"], "data", "no trace"),
    ([*WHOLE, "data.eval=[]"], "data", "nothing to evaluate"),
    ([*WHOLE, f"data.eval={{path: builtin, name: {'x' * 250}}}"], "data", "too long"),
    ([*WHOLE, "data.eval=[builtin, {path: builtin}]"], "data", "Two sources"),
    (["out={base}/rows.jsonl/run"], "out", "cannot be written"),
    (["out={base}/has-config.yaml"], "out", "not written by a run"),
    (["out={base}/has-manifest.json"], "out", "no run's"),
    (["teacher.backend=http", f"teacher.{DEAD}"], "teacher", "does not answer"),
    (["student.backend=http", f"student.{DEAD}"], "student", "does not answer"),
    (["teacher.backend=gguf", "teacher.model={base}/none.gguf"], "teacher", "no model"),
    (["student.backend=hf", "student.model={base}"], "student", "no model"),
    (["student.backend=hf", "student.model={base}/empty-model"], "student", "no weights"),
    (["student.adapter={base}/none"], "student.adapter", "has never trained"),
    ([*JUDGED, "answer_judge.backend=http", f"answer_judge.{DEAD}"], "data", "does not answer"),
    ([*JUDGED, "answer_judge.model={base}"], "data", "no model"),
    (["judge.labels=[same, same]"], "student", "label"),
    ([*WHOLE, "train.batch_size=5", "train.micro_batch_size=2"], "train.micro_batch_size", "5"),
    ([*WHOLE, "eval.backend=gguf", "eval.model={base}"], "eval", "no model"),
    ([*WHOLE, "eval.backend=http", f"eval.{DEAD}"], "eval", "does not answer"),
    (WHOLE, "student.model", "not a GGUF file"),
    ([*WHOLE, "eval.system=Be brief."], "eval", "another system message"),
]


def filled(base: Path, overrides: list[str]) -> list[str]:
    return [text.replace("{base}", str(base)) for text in overrides]


@pytest.mark.parametrize(("overrides", "key", "words"), BROKEN, ids=lambda value: str(value)[:50])
def test_a_broken_thing_is_found_at_once_and_no_stage_starts(
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    overrides: list[str],
    key: str,
    words: str,
) -> None:
    keys = filled(base, [f"out={tmp_path}/run", *overrides])
    assert palign.main(["check", str(base / "config.yaml"), *keys, "--json"]) == 2
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert not result["ok"] and "secret" not in printed.out + printed.err
    assert [
        problem
        for problem in result["problems"]
        if problem["key"] == key and words in problem["message"] + problem["fix"]
    ], result
    assert not (tmp_path / "run").exists(), "check writes nothing"

    assert palign.main(["run", str(base / "config.yaml"), *keys]) in (1, 2)
    error = capsys.readouterr().err
    assert words in error and "a defect" not in error and "Traceback" not in error
    assert not list(base.rglob("traces.jsonl")) and not list(tmp_path.rglob("traces.jsonl"))


@pytest.mark.parametrize(
    ("command", "override", "words"),
    [
        ("teach", "data.train={base}/none.jsonl", "none.jsonl"),
        ("truncate", "judge.labels=[same, same]", "label"),
        ("train", "train.micro_batch_size=5", "micro_batch_size"),
        ("eval", "eval.backend=gguf", "not a GGUF file"),
    ],
)
def test_the_command_of_one_stage_looks_at_what_that_stage_needs(
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    override: str,
    words: str,
) -> None:
    [key] = filled(base, [override])
    config = [str(base / "config.yaml"), f"out={tmp_path}/run"]
    assert palign.main([command, *config, key]) == 2
    assert words in capsys.readouterr().err
    if command == "train":  # its rows are there: those count, not the longest that are allowed
        keys = ["student.backend=hf", "student.model=smollm2-135m", "train.micro_batch_size=4096"]
        assert palign.main(["train", *config, *keys, "train.batch_size=4096"]) == 1
        assert "train.jsonl does not exist" in capsys.readouterr().err
    if command != "teach":
        assert palign.main(["teach", *config, key, "--quiet", "--json"]) == 0


def test_a_stage_whose_weights_were_replaced_is_still_to_do(
    tiny: str,  # noqa: F811
    tmp_path: Path,
) -> None:
    shutil.copytree(tiny, tmp_path / "model")
    raw = {"out": str(tmp_path / "run"), "student": {"model": str(tmp_path / "model")}}
    config = resolve(raw, "test")
    with Run(config, Progress(quiet=True)) as run:
        for stage in ("teach", "truncate", "align", "train", "eval"):
            section = {"teach": "teacher", "eval": "eval"}.get(stage, "student")
            content = partial(fingerprints, section, getattr(config, section))
            run.begin(stage, "", str, content)
            run.finish(stage, 0, 0)
    assert preflight._todo(config) == []
    (tmp_path / "model" / "model.safetensors").write_bytes(b"others")
    assert preflight._todo(config) == ["truncate", "align", "train", "eval"]
    assert preflight._todo(config, "teach") == [] and preflight._todo(config, "eval") == ["eval"]


def test_a_copy_for_transformers_that_cannot_be_cached_is_found(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PALIGN_CACHE", str(base / "rows.jsonl" / "cache"))
    keys = [f"out={tmp_path}/run", "student.backend=hf", "student.model=smollm2-135m"]
    [problem] = preflight.check(str(base / "config.yaml"), keys)["problems"]
    assert "cache cannot be written" in problem["message"] and "PALIGN_CACHE" in problem["fix"]
    copied = tmp_path / "mine.gguf"
    copied.symlink_to(gguf_file("smollm2-135m"))
    monkeypatch.delenv("PALIGN_CACHE")
    lengths = ["align.sampling.max_new_tokens=300", "train.max_seq_tokens=200"]
    result = preflight.check(
        str(base / "config.yaml"), [*keys[:2], f"student.model={copied}", *WHOLE, *lengths]
    )
    told = " ".join(result["warnings"])
    assert "is not checked for a GGUF" in told, result
    assert "align may write 300 tokens, but rows over train.max_seq_tokens=200" in told


def test_a_check_without_a_card_loads_no_torch(tmp_path: Path) -> None:
    """It takes longer to import than all the rest of the check."""
    script = (
        "import sys, palign\n"
        "from kit.core.memory import may_have_card\n"
        "card = may_have_card()\n"
        "assert palign.main(['check', 'configs/smoke.yaml', f'out={sys.argv[1]}/run']) == 0\n"
        "assert card or 'torch' not in sys.modules\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_hub_that_does_not_answer_is_asked_once(tmp_path: Path) -> None:
    """Its packages would ask again and again, for each file."""
    command = [sys.executable, "palign.py", "check", "configs/gsm8k-mini.yaml", f"out={tmp_path}/r"]
    dead = DEAD.removeprefix("url=").removesuffix("/v1")
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": dead}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "openai/gsm8k (no such file; asked the hub)" in done.stdout
    assert "Retrying" not in done.stderr


def test_all_problems_are_listed_at_once(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = [f"data.train={base}/none.jsonl", "teacher.backend=http", f"teacher.{DEAD}"]
    keys += ["judge.labels=[same, same]", f"out={base}/rows.jsonl/run"]
    assert palign.main(["check", str(base / "config.yaml"), *keys]) == 2
    printed = capsys.readouterr().out
    for words in ("none.jsonl", "does not answer", "label", "cannot be written"):
        assert words in printed


def test_a_run_that_is_done_asks_for_nothing_again(base: Path, tmp_path: Path) -> None:
    config = str(base / "config.yaml")
    assert palign.main(["run", config, f"out={tmp_path}/run", "--quiet"]) == 0
    # The server of a finished stage may be gone; url and time-outs change no row.
    assert preflight.check(config, [f"out={tmp_path}/run"])["ok"]
    assert preflight._todo(preflight.load(config, [f"out={tmp_path}/run"])) == []
    changed = preflight.load(config, [f"out={tmp_path}/run", "judge.search=scan"])
    assert preflight._todo(changed) == ["truncate", "align"]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name
)
def test_every_bundled_config_is_checked(path: Path, tmp_path: Path) -> None:
    """What is on every machine passes; of the others each missing thing is named with its fix."""
    result = preflight.check(str(path), [f"out={tmp_path}/run"])
    bundled = path.name in ("smoke.yaml", "workshop.yaml", "adaptivity.yaml")
    assert result["ok"] == bundled or not bundled, result
    for problem in result["problems"]:
        keys = ("data", "student", "student.model", "eval", "teacher", "train.max_seq_tokens")
        assert problem["key"] in keys, problem
        assert problem["fix"] and "a defect" not in problem["message"]
        absent = ("no such file", "No such file", "could not be fetched", "no model", "needs about")
        assert any(words in problem["message"] for words in absent), problem


def test_a_template_that_fails_and_a_memory_that_is_too_small(tmp_path: Path) -> None:
    folder = Path(hf_folder("smollm2-135m"))
    broken = tmp_path / "model"
    broken.mkdir()
    for file in folder.glob("*.json"):
        shutil.copy(file, broken)
    (broken / "model.safetensors").write_bytes(b"")
    (broken / "chat_template.jinja").write_text("{{ raise_exception('no chat') }}")
    keys: list[Any] = ["student.backend=hf", f"student.model={broken}", f"out={tmp_path}/run"]
    config = write_config(tmp_path, "palign")
    [problem] = preflight.check(str(config), keys)["problems"]
    assert problem["key"] == "student" and "no chat" in problem["message"], problem
    (broken / "chat_template.jinja").write_text("{{ messages[-1].content }}")
    [problem] = preflight.check(str(config), [*keys, "student.system=Be brief."])["problems"]
    assert "leaves out the system message" in problem["message"], problem
    (broken / "chat_template.jinja").write_text("{{ messages[-1].content }}<think>")
    [note] = [n for n in preflight.check(str(config), keys)["warnings"] if "think" in n]
    assert f"{broken} thinks though thinking=false" in note
    keys = [f"out={tmp_path}/run", "train.batch_size=4096", "train.micro_batch_size=4096"]
    [problem] = preflight.check(str(ROOT / "configs" / "workshop.yaml"), keys)["problems"]
    assert "Training on rows of 1024 tokens needs about" in problem["message"], problem
    assert problem["fix"], problem
