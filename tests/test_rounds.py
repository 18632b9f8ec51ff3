"""Rounds: the trained student judges the same traces anew; each round is a run of its own."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import palign
from kit.backends.hf import HfBackend
from kit.core.config import Config, ModelConfig, resolve
from kit.core.errors import ConfigError, KitError
from kit.core.fingerprints import adapter_hash
from kit.core.progress import Progress
from kit.core.records import PrefixRow, TraceRow
from kit.core.run import Run, read_manifest, trained_adapter
from kit.core.storage import RowFile
from kit.judging.cut import cut
from kit.judging.judge import Judge
from kit.pipeline.rounds import run_rounds
from kit.training.trainer import make_model
from tests.browser import REPORT, check
from tests.conftest import ROOT
from tests.make_run import make
from tests.test_kills import steady
from tests.test_train import tiny  # noqa: F401  (a fixture)


def keys_of(out: Path, model: str, **changes: Any) -> dict[str, Any]:
    """Two rounds of a method whose training rows need no correct continuation."""
    builtin = {"path": "builtin", "steps": [1, 1], "max_number": 10}
    return {
        "out": str(out),
        "method": "prefix-only",
        "rounds": 2,
        "data": {
            "train": {**builtin, "limit": 4, "seed": 1},
            "eval": {**builtin, "limit": 3, "seed": 2},
        },
        "teacher": {"backend": "reference", "wordiness": 0.3},
        "student": {"model": model, "max_num_seqs": 2},
        "train": {
            "dtype": "fp32",
            "batch_size": 2,
            "max_steps": 4,
            "learning_rate": 5e-3,
            "warmup_ratio": 0,
            "save_minutes": 0,
        },
        "eval": {"sampling": {"temperature": 0, "max_new_tokens": 8}},
        **changes,
    }


def carry_out(config: Config) -> dict[str, Any]:
    return run_rounds(config, Progress(quiet=True), palign._run_stages)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny: str) -> tuple[Config, dict[str, Any]]:  # noqa: F811
    """Two rounds of the tiny student, and what the command prints of them."""
    out = tmp_path_factory.mktemp("rounds") / "run"
    config = resolve(keys_of(out, tiny), "test")
    return config, carry_out(config)


def prefixes(folder: Path) -> list[PrefixRow]:
    return RowFile(folder / "prefixes.jsonl", PrefixRow).read()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def test_a_round_takes_over_the_traces_and_judges_by_the_trained_student(finished: Any) -> None:
    config, _ = finished
    later = config.round(2)
    assert later.folder == config.folder / "round-2"
    traces = [RowFile(run.folder / "traces.jsonl", TraceRow).read() for run in (config, later)]
    assert traces[0] == traces[1]
    assert "teach: already done" in (later.folder / "run.log").read_text()

    # The margins are the trained student's: as PEFT computes them, unmerged.
    first = prefixes(config.folder)
    second = prefixes(later.folder)
    assert [row.trace for row in first] == [row.trace for row in second]
    assert [row.verdicts for row in first] != [row.verdicts for row in second]
    engine = ModelConfig(model=config.student.model)
    adapter = str(config.folder / "adapter")
    with closing(HfBackend(engine, adapter)) as backend, Judge(config, backend) as judge:
        for row in second:
            whole = row.model_copy(update={"end": len(row.trace), "verdicts": ()})
            expected = [verdict.margin for verdict in cut(judge, whole).verdicts]
            assert [v.margin for v in row.verdicts] == pytest.approx(expected, abs=1e-3)


def test_the_report_has_the_curve_and_says_which_round_paid(finished: Any, browser: Any) -> None:
    config, numbers = finished
    rounds = numbers["rounds"]
    assert [entry["round"] for entry in rounds] == [1, 2]
    assert [Path(entry["folder"]).name for entry in rounds] == ["run", "round-2"]
    for entry, folder in zip(rounds, (config.folder, config.round(2).folder), strict=True):
        [tuned] = [
            score
            for score in read_manifest(folder)["stages"]["eval"]["summary"]["scores"]
            if score["which"] == "tuned"
        ]
        assert entry["score"] == tuned
        assert 0 < entry["prefix_ratio_median"] <= 1 and entry["retention"]["ratio"] == 1
    # nobody is right, so nothing was gained
    assert rounds[0]["gain"] is None and rounds[1]["gain"]["difference"] == 0
    assert [entry["pays"] for entry in rounds] == [True, False]
    assert "Round 2 no longer pays" in str(numbers["findings"])
    assert json.loads((config.folder / "metrics.json").read_text())["rounds"] == rounds
    page = (config.folder / "report.html").read_text(encoding="utf-8")
    assert 'id="rounds"' in page and "Round 2 no longer pays" in page
    check(browser, config.folder / "report.html", REPORT)
    # a round's own report has no curve
    assert 'id="rounds"' not in (config.round(2).folder / "report.html").read_text()


def test_rounds_whose_folder_was_moved_are_skipped(finished: Any, tmp_path: Path) -> None:
    """A later round names the adapter of the one before by its folder, and knows it by content."""
    config, numbers = finished
    shutil.copytree(config.folder, tmp_path / "moved")
    moved = carry_out(config.model_copy(update={"out": str(tmp_path / "moved")}))
    assert [entry["score"] for entry in moved["rounds"]] == [
        entry["score"] for entry in numbers["rounds"]
    ]
    # (align, which copies prefixes here, asks no model whose content it could know)
    said = "".join(log.read_text() for log in tmp_path.glob("moved/**/run.log"))
    assert "rerunning truncate" not in said and "rerunning train" not in said


def test_finished_rounds_are_skipped(finished: Any) -> None:
    config, numbers = finished
    folders = (config.folder, config.round(2).folder)
    before = [read_manifest(folder)["stages"] for folder in folders]
    assert carry_out(config) == numbers
    assert [read_manifest(folder)["stages"] for folder in folders] == before


@pytest.mark.slow
def test_other_traces_of_the_first_round_are_those_of_the_second(
    tmp_path: Path,
    tiny: str,  # noqa: F811
) -> None:
    keys = keys_of(tmp_path / "run", tiny)
    config = resolve(keys, "test")
    carry_out(config)
    other = resolve({**keys, "teacher": {"backend": "reference", "wordiness": 0}}, "test")
    carry_out(other)
    folders = (other.folder, other.round(2).folder)
    traces = [RowFile(folder / "traces.jsonl", TraceRow).read() for folder in folders]
    assert traces[0] == traces[1]
    assert [row.trace for row in prefixes(folders[1])] == [row.samples[0].text for row in traces[0]]


@pytest.mark.parametrize("init", ["fresh", "last"])
def test_a_round_trains_a_fresh_adapter_or_the_last_one_at_its_own_rate(
    finished: Any, tmp_path: Path, init: str
) -> None:
    """At a rate of next to nothing, an adapter stays where it began."""
    config, _ = finished
    first = weights(config.folder)
    keys = {
        **keys_of(tmp_path / "run", config.student.model),
        "student": {"model": config.student.model, "adapter": str(config.folder)},
        "rounds": 1,
        "stop_after": "train",
    }
    keys["train"] = {**keys["train"], "init": init, "learning_rate": 1e-12}
    later = resolve(keys, "test")
    carry_out(later)
    after = weights(later.folder)
    distance = max((after[name] - first[name]).abs().max().item() for name in first)
    assert (distance < 1e-6) == (init == "last")
    # the loss before it is that of the adapter it begins with
    losses = []
    for folder in (config.folder, later.folder):
        summary = json.loads((folder / "manifest.json").read_text())["stages"]["train"]["summary"]
        losses.append((summary["fixed_batch_before"], summary["fixed_batch_after"]))
    (_, first_after), (before, last_after) = losses
    assert before == pytest.approx(last_after, abs=1e-6)
    assert (before == pytest.approx(first_after, abs=1e-6)) == (init == "last")


def test_each_round_has_its_rate_and_only_the_first_evaluates_the_base(tmp_path: Path) -> None:
    keys = keys_of(tmp_path, "m", rounds=4, round_learning_rates=[2e-4, 1e-4])
    config = resolve(keys, "test")
    rates = [config.round(number).train.learning_rate for number in (2, 3, 4)]
    assert rates == [2e-4, 1e-4, 5e-3]
    adapters = [Path(str(config.round(number).student.adapter)).name for number in (2, 3, 4)]
    assert adapters == [tmp_path.name, "round-2", "round-3"]
    assert config.round(3).folder == tmp_path / "round-3" and config.round(3).rounds == 1
    assert config.eval.base and not config.round(2).eval.base


def test_the_evaluated_student_has_no_adapter_of_another_run() -> None:
    config = resolve({"student": {"model": "m", "adapter": "runs/x"}}, "test")
    assert config.eval.model == "m" and not hasattr(config.eval, "adapter")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"method": "zero-shot"}, "asks the student nothing"),
        ({"method": "long-trace"}, "asks the student nothing"),
        ({"stop_after": "align"}, "rounds need a training"),
        ({"student": {"adapter": "runs/x", "backend": "gguf"}}, "needs backend hf"),
        ({"student": {"backend": "gguf"}}, "rounds need student.backend hf"),
        ({"rounds": 0}, "rounds"),
    ],
)
def test_rounds_that_cannot_be_are_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refusal:
        resolve({"rounds": 2, **keys}, "test")
    assert "{" not in str(refusal.value)  # not the whole config, in which nobody finds the reason


def refused(config: Config, capsys: pytest.CaptureFixture[str]) -> str:
    """What `run` says of a config that it refuses before any stage."""
    path = Path(str(config.out)).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert palign.main(["run", str(path)]) in (1, 2)
    assert not (config.folder / "traces.jsonl").exists()
    return capsys.readouterr().err


def test_a_round_on_a_run_that_never_trained_is_refused_at_once(
    tmp_path: Path,
    tiny: str,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    for source in (tmp_path / "nowhere", make(tmp_path / "untrained", upto="align")):
        student = {"model": tiny, "adapter": str(source)}
        config = resolve(keys_of(tmp_path / "run", tiny, rounds=1, student=student), "test")
        assert "has never trained an adapter" in refused(config, capsys)


def test_an_adapter_of_another_base_or_one_that_was_changed_is_refused_at_once(
    finished: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    done, _ = finished
    other = tmp_path / "other"
    model = AutoModelForCausalLM.from_pretrained(done.student.model)
    model.model.embed_tokens.weight.data += 1
    model.save_pretrained(other)
    for path in Path(done.student.model).glob("*token*"):
        (other / path.name).write_bytes(path.read_bytes())
    student = {"model": str(other), "adapter": str(done.folder)}
    config = resolve(keys_of(tmp_path / "run", str(other), rounds=1, student=student), "test")
    assert "was trained on another model" in refused(config, capsys)

    # a copy of the run, with one byte of its adapter changed
    copy = tmp_path / "copy"
    (copy / "adapter").mkdir(parents=True)
    (copy / "manifest.json").write_bytes((done.folder / "manifest.json").read_bytes())
    for path in (done.folder / "adapter").iterdir():
        (copy / "adapter" / path.name).write_bytes(path.read_bytes())
    assert trained_adapter(copy) == copy / "adapter"
    damaged = bytearray((copy / "adapter" / "adapter_model.safetensors").read_bytes())
    damaged[-1] ^= 1
    (copy / "adapter" / "adapter_model.safetensors").write_bytes(damaged)
    with pytest.raises(KitError, match="is not the adapter"):
        trained_adapter(copy)


def test_going_on_from_an_adapter_of_another_shape_is_refused(
    finished: Any, tmp_path: Path
) -> None:
    done, _ = finished
    student = {"model": done.student.model, "adapter": str(done.folder)}
    for key in ("rank", "alpha"):
        keys = keys_of(tmp_path / "run", done.student.model, rounds=1, student=student)
        keys["train"] = {**keys["train"], "init": "last", key: 4}
        with pytest.raises(KitError, match=r"has .* 16, and the config trains 4"):
            make_model(resolve(keys, "test"))


@pytest.mark.slow
def test_another_adapter_judges_and_trains_again(finished: Any, tmp_path: Path) -> None:
    """By content: the same path with another adapter in it is another student."""
    done, _ = finished
    source = tmp_path / "source"
    keys = keys_of(source, done.student.model, rounds=1, stop_after="train")
    carry_out(resolve(keys, "test"))
    student = {"model": done.student.model, "adapter": str(source)}
    later = keys_of(
        tmp_path / "later", done.student.model, rounds=1, stop_after="train", student=student
    )
    carry_out(resolve(later, "test"))
    before = read_manifest(tmp_path / "later")["stages"]
    carry_out(resolve({**keys, "seed": 5}, "test"))
    carry_out(resolve(later, "test"))
    after = read_manifest(tmp_path / "later")["stages"]
    assert after["teach"] == before["teach"]
    assert "rerunning truncate: the adapter of student.model changed" in (
        (tmp_path / "later" / "run.log").read_text()
    )
    assert after["train"]["output"] != before["train"]["output"]


@pytest.mark.slow
def test_rounds_killed_in_every_stage_of_the_second_equal_uninterrupted_ones(
    tmp_path: Path,
    tiny: str,  # noqa: F811
) -> None:
    whole = resolve(keys_of(tmp_path / "whole", tiny), "test")
    carry_out(whole)
    torn = resolve(keys_of(tmp_path / "torn", tiny), "test")
    path = tmp_path / "torn.yaml"
    path.write_text(yaml.safe_dump(keys_of(tmp_path / "torn", tiny)))
    command = [sys.executable, "palign.py", "run", str(path), "--quiet"]
    second = torn.round(2).folder
    for name in ("traces.jsonl", "prefixes.jsonl", "checkpoints/checkpoint-*", "eval/*.jsonl"):
        with subprocess.Popen(command, cwd=ROOT) as process:
            while not list(second.glob(name)) and process.poll() is None:
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
        assert process.returncode in (-signal.SIGKILL, 0)
        kept = steady(second)
        assert set(kept) <= set(steady(whole.round(2).folder))
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0
    for ours, theirs in ((torn, whole), (torn.round(2), whole.round(2))):
        assert steady(ours.folder) == steady(theirs.folder)
        mine, other = weights(ours.folder), weights(theirs.folder)
        assert all(torch.equal(mine[name], other[name]) for name in other)
        assert adapter_hash(ours.folder / "adapter")
    with Run(torn, Progress(quiet=True)):
        pass
