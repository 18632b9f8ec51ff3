"""The evaluation stage on the scripted backend, and `grade FILE`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kit.backends.scripted import ByteTokenizer
from kit.core import config as configs
from kit.core.config import ModelConfig
from kit.core.errors import KitError
from kit.core.fingerprints import adapter_hash
from kit.core.progress import Progress
from kit.core.records import EvalRow
from kit.core.run import Run
from kit.core.stages import file_name
from kit.pipeline.evaluate import evaluate
from kit.prompts import template_hash


@pytest.fixture
def settings(tmp_path):
    """A config with one dataset of 12 problems for the scripted backend; `opened` runs it."""
    problems = []
    for n in range(12):
        question = f"What is {n} plus {n}, for number {n}?"
        problems.append({"id": f"p{n}", "question": question, "answer": str(2 * n), "level": n % 3})
    data = tmp_path / "sums.jsonl"
    answers = tmp_path / "answers.json"
    data.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    answers.write_text(json.dumps({problem["question"]: problem["answer"] for problem in problems}))
    fields = {"question": "question", "answer": "answer", "id": "id"}
    engine = {"backend": "scripted", "model": str(answers), "max_num_seqs": 1}
    return {
        "out": str(tmp_path / "run"),
        "student": engine,
        "eval": {**engine, "samples": 3},
        "data": {"eval": [{"path": str(data), "fields": fields, "name": "sums"}]},
    }


def opened(settings, **keys):
    return Run(configs.resolve({**settings, **keys}, "test"), Progress(quiet=True))


def trained(run, template=None, weights="adapter-1"):
    """Give a run a finished training with the prompts of now, or of another template."""
    run.begin("train", "rows", lambda: adapter_hash(run.folder / "adapter"))
    run.path("adapter/adapter_model.safetensors").write_text(weights)
    run.finish("train", 1, 1)
    run.record(
        template_hash=template or template_hash(ByteTokenizer(), run.config.prompts, ModelConfig())
    )


def test_zero_shot_grades_the_base_model(settings):
    with opened(settings, method="zero-shot") as run:
        evaluate(run)
        stage = run.manifest["stages"]["eval"]
        summary = json.loads(json.dumps(stage["summary"]))
        [score] = summary["scores"]
        assert (score["which"], score["dataset"]) == ("base", "sums")
        assert (score["n"], score["samples"]) == (12, 36)
        rows = run.rows(file_name(run.config.eval.model, "base", "sums"), EvalRow)
        correct = sum(sample.verdict == "correct" for row in rows for sample in row.samples)
        assert score["accuracy"] == pytest.approx(correct / 36, abs=1e-4) and 0 < correct < 36
        assert set(score["verdicts"]) == {"correct", "wrong", "unparsed"}
        assert sum(score["verdicts"].values()) == 36
        assert score["ci_low"] < score["accuracy"] < score["ci_high"]
        assert list(score["pass_at"]) == ["1", "2", "3"]
        assert 0 < score["truncated_ratio"] < 1 and summary["comparisons"] == []
        assert (stage["rows_in"], stage["rows_out"], stage["done"]) == (12, 12, True)


def test_base_and_tuned_are_compared(settings):
    with opened(settings) as run:
        trained(run)
        evaluate(run)
        summary = run.manifest["stages"]["eval"]["summary"]
        assert [score["which"] for score in summary["scores"]] == ["base", "tuned"]
        [compared] = summary["comparisons"]
        assert (compared["dataset"], compared["a"], compared["b"]) == ("sums", "base", "tuned")
        # The scripted backend is the same model twice.
        assert compared["n"] == 12 and compared["difference"] == 0 and compared["p_value"] == 1
        assert compared["ci_low"] < 0 < compared["ci_high"]
        assert 0 < compared["min_detectable_difference"] <= 1
        assert {path.name for path in (run.folder / "eval").iterdir()} == {
            "answers.json-base-sums.jsonl",
            "answers.json-tuned-sums.jsonl",
        }


def test_a_second_call_is_skipped_and_a_new_adapter_is_not(settings):
    with opened(settings) as run:
        trained(run)
        evaluate(run)
        files = {path: path.stat().st_mtime_ns for path in (run.folder / "eval").iterdir()}
        evaluate(run)
        assert {path: path.stat().st_mtime_ns for path in (run.folder / "eval").iterdir()} == files
        trained(run, weights="adapter-2")
        evaluate(run)
        assert all(path.stat().st_mtime_ns != before for path, before in files.items())


def test_two_datasets_that_change_places_are_evaluated_again(settings, tmp_path):
    """Together they have the same problems, and each has other ones."""
    [first] = settings["data"]["eval"]
    lines = Path(first["path"]).read_text().splitlines(keepends=True)
    for name, part in (("x", lines[:4]), ("y", lines[4:])):
        (tmp_path / name).write_text("".join(part))
    for paths, sizes in ((("x", "y"), [4, 8]), (("y", "x"), [8, 4]), (("y", "x"), [8, 4])):
        settings["data"]["eval"] = [
            {**first, "path": str(tmp_path / path), "name": name}
            for name, path in zip(("one", "two"), paths, strict=True)
        ]
        with opened(settings, method="zero-shot") as run:
            evaluate(run)
            scores = run.manifest["stages"]["eval"]["summary"]["scores"]
            assert [(score["dataset"], score["n"]) for score in scores] == list(
                zip(("one", "two"), sizes, strict=True)
            )


def test_another_verifier_evaluates_again(settings):
    for kind, redone in (("math", True), ("math", False), ("number", True), ("number", False)):
        settings["data"]["eval"][0]["verifier"] = kind
        with opened(settings, method="zero-shot") as run:
            before = run.manifest["stages"].get("eval")
            evaluate(run)
            assert (run.manifest["stages"]["eval"] != before) is redone


def test_a_deleted_row_is_regenerated_equal(settings):
    with opened(settings, method="zero-shot") as run:
        evaluate(run)
        path = run.folder / file_name(run.config.eval.model, "base", "sums")
        lines = path.read_text().splitlines(keepends=True)
        first = run.manifest["stages"]["eval"]
        path.write_text("".join(lines[:7]))
        evaluate(run)
        assert len(path.read_text().splitlines()) == 12
        again = run.manifest["stages"]["eval"]
        assert again["output"] == first["output"] and again["summary"] == first["summary"]


def test_another_template_is_refused_before_anything_is_asked(settings):
    with opened(settings) as run:
        trained(run, template="0123456789abcdef")
        now = template_hash(ByteTokenizer(), run.config.prompts, ModelConfig())
        with pytest.raises(KitError, match=f"0123456789abcdef.*{now}"):
            evaluate(run)
        assert not any((run.folder / "eval").glob("*.jsonl"))


def test_training_is_required(settings):
    with opened(settings) as run, pytest.raises(KitError, match="no finished stage train"):
        evaluate(run)


def test_a_prompt_that_is_too_long_is_rejected_alone(settings, monkeypatch):
    from kit.backends.base import Generation
    from kit.backends.scripted import ScriptedBackend

    real = ScriptedBackend.generate

    def short(self, requests):
        for request in requests:
            if request.id == "p3":
                yield Generation(request.id, error="the prompt has 99 tokens, the context 64")
            else:
                yield from real(self, [request])

    monkeypatch.setattr(ScriptedBackend, "generate", short)
    with opened(settings, method="zero-shot") as run:
        evaluate(run)
        stage = run.manifest["stages"]["eval"]
        assert stage["summary"]["rejected"] == {"generation failed": 1} and stage["rows_out"] == 11
        [score] = stage["summary"]["scores"]
        assert score["n"] == 12 and score["rejected"] == 1 and score["samples"] == 33
        answered = run.rows(file_name(run.config.eval.model, "base", "sums"), EvalRow)
        rows = {row.id: row for row in answered}
        assert "99 tokens" in rows["p3"].detail


def test_backend_is_loaded_only_for_work(settings, monkeypatch):
    with opened(settings, method="zero-shot") as run:
        evaluate(run)
        first = run.manifest["stages"]["eval"]
        run.manifest["stages"]["eval"] = {**first, "done": False}  # killed after its last row
        monkeypatch.setattr(
            "kit.sampling.open_backend", lambda *_, **__: pytest.fail("a model was loaded")
        )
        evaluate(run)
        again = run.manifest["stages"]["eval"]
        assert again["done"] and again["output"] == first["output"]
