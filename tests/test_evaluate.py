"""The evaluation stage on the scripted stand-in, and scores from rows."""

from __future__ import annotations

import json

import pytest

from kit.backends.scripted import ByteTokenizer
from kit.core import config as configs
from kit.core.errors import KitError
from kit.core.progress import Progress
from kit.core.records import EvalRow, Sample
from kit.core.run import Run
from kit.core.stages import file_name
from kit.grading.scores import compare_rows, loops, score
from kit.pipeline.evaluate import evaluate
from kit.prompts import template_hash


def row(id, verdicts, finish_reason="stop", text="x", tokens=10, **fields):
    samples = [
        Sample(text=text, verdict=verdict, finish_reason=finish_reason, tokens=tokens)
        for verdict in verdicts
    ]
    return EvalRow(id=id, question="q", answer="1", samples=tuple(samples), **fields)


@pytest.fixture
def settings(tmp_path):
    """A config of one dataset of 12 problems for the scripted stand-in; made into a run by `opened`."""
    problems = [
        {
            "id": f"p{n}",
            "question": f"What is {n} plus {n}, for number {n}?",
            "answer": str(2 * n),
            "level": n % 3,
        }
        for n in range(12)
    ]
    data, answers = tmp_path / "sums.jsonl", tmp_path / "answers.json"
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


def trained(run, template=None):
    """Give a run a finished training with the prompts of now, or of another template."""
    run.begin("train", "rows", lambda: "adapter-1")
    run.finish("train", "adapter-1", 1, 1)
    run.record(
        template_hash=template or template_hash(ByteTokenizer(), run.config.prompts, None, False)
    )


def test_zero_shot_grades_the_base_model(settings):
    with opened(settings, method="zero-shot") as run:
        evaluate(run)
        stage = run.manifest["stages"]["eval"]
        summary = json.loads(json.dumps(stage["summary"]))
        [found] = summary["scores"]
        assert (found["which"], found["dataset"], found["n"], found["samples"]) == (
            "base",
            "sums",
            12,
            36,
        )
        rows = run.rows(file_name(run.config.eval.model, "base", "sums"), EvalRow)
        right = sum(sample.verdict == "correct" for r in rows for sample in r.samples)
        assert found["accuracy"] == pytest.approx(right / 36, abs=1e-4) and 0 < right < 36
        assert (
            set(found["verdicts"]) == {"correct", "wrong", "unparsed"}
            and sum(found["verdicts"].values()) == 36
        )
        assert found["ci_low"] < found["accuracy"] < found["ci_high"] and list(
            found["pass_at"]
        ) == ["1", "2", "3"]
        assert 0 < found["truncated_ratio"] < 1 and summary["comparisons"] == []
        assert (stage["rows_in"], stage["rows_out"], stage["done"]) == (12, 12, True)


def test_before_and_after_are_compared(settings):
    with opened(settings) as run:
        trained(run)
        evaluate(run)
        summary = run.manifest["stages"]["eval"]["summary"]
        assert [found["which"] for found in summary["scores"]] == ["base", "tuned"]
        [compared] = summary["comparisons"]
        assert (
            compared["n"] == 12 and compared["difference"] == 0
        )  # the stand-in is the same model twice
        assert (
            compared["p_value"] == 1
            and compared["ci_low"] < 0 < compared["ci_high"]
            and 0 < compared["min_detectable_difference"] <= 1
        )
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
        run.finish("train", "adapter-2", 1, 1)
        evaluate(run)
        assert all(path.stat().st_mtime_ns != before for path, before in files.items())


def test_another_grader_redoes_it(settings):
    for kind, redone in (("math", True), ("math", False), ("number", True), ("number", False)):
        settings["data"]["eval"][0]["verifier"] = kind
        with opened(settings, method="zero-shot") as run:
            begun = []
            run.finish = lambda *args, finish=run.finish, begun=begun, **told: (
                begun.append(args),
                finish(*args, **told),
            )
            evaluate(run)
            assert bool(begun) is redone


def test_a_deleted_row_is_made_again_alike(settings):
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
        now = template_hash(ByteTokenizer(), run.config.prompts, None, False)
        with pytest.raises(KitError, match=f"0123456789abcdef.*{now}"):
            evaluate(run)
        assert not any((run.folder / "eval").glob("*.jsonl"))


def test_training_is_required(settings):
    with opened(settings) as run, pytest.raises(KitError, match="no finished stage train"):
        evaluate(run)


def test_prompts_too_long_are_set_aside_one_by_one(settings, monkeypatch):
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
        [found] = stage["summary"]["scores"]
        assert found["n"] == 12 and found["rejected"] == 1 and found["samples"] == 33
        rows = {
            r.id: r for r in run.rows(file_name(run.config.eval.model, "base", "sums"), EvalRow)
        }
        assert "99 tokens" in rows["p3"].detail


def test_score_counts_what_it_says():
    rows = [
        row("a", ["correct", "wrong"], level="1", subject="x"),
        row("b", ["correct", "correct"], level="1", tokens=30),
        row("c", ["unparsed", "timeout"], finish_reason="length", level="2"),
        row("d", [], rejected="generation failed"),
    ]
    found = score(rows)
    assert (found["n"], found["samples"], found["rejected"]) == (4, 6, 1)
    assert found["accuracy"] == pytest.approx((0.5 + 1 + 0 + 0) / 4)
    assert found["pass_at"] == {"1": 0.375, "2": 0.5}
    assert found["verdicts"] == {"correct": 3, "wrong": 1, "unparsed": 1, "timeout": 1}
    assert found["truncated_ratio"] == pytest.approx(1 / 3, abs=1e-4) and found["loop_ratio"] == 0
    assert found["mean_tokens"] == pytest.approx(100 / 6, abs=1e-3)
    assert found["accuracy_completed"] == 0.75
    assert {name: group["accuracy"] for name, group in found["by_level"].items()} == {
        "1": 0.75,
        "2": 0.0,
    }
    assert list(found["by_subject"]) == ["x"] and found["by_subject"]["x"]["n"] == 1
    assert json.loads(json.dumps(found)) == found


def test_score_of_nothing_says_so():
    found = score([])
    assert (found["n"], found["ci_low"], found["ci_high"], found["accuracy_completed"]) == (
        0,
        0.0,
        1.0,
        None,
    )


def test_loops_are_seen_in_text_without_spaces():
    assert loops(Sample(text="so 3/24" + "=3/24" * 40, verdict="unparsed", finish_reason="length"))
    assert not loops(
        Sample(text="so 3/24" + "=3/24" * 40, verdict="unparsed", finish_reason="stop")
    )
    assert not loops(
        Sample(text=" ".join(map(str, range(500))), verdict="unparsed", finish_reason="length")
    )
    assert loops(Sample(text="x", verdict="unparsed", finish_reason="loop"))


def test_models_are_compared_on_shared_problems_only():
    a = [row("1", ["correct"]), row("2", ["wrong"]), row("3", ["wrong"])]
    b = [row("3", ["correct"]), row("2", ["correct"]), row("9", ["correct"])]
    assert compare_rows(a, b)["difference"] == 1.0 and compare_rows(a, b)["n"] == 2
    assert compare_rows(a, [row("7", ["correct"])]) == {"n": 0}


def test_backend_is_loaded_only_for_work(settings, monkeypatch):
    with opened(settings, method="zero-shot") as run:
        evaluate(run)
        first = run.manifest["stages"]["eval"]
        run.manifest["stages"]["eval"] = {**first, "done": False}  # killed behind its last row
        monkeypatch.setattr(
            "kit.sampling.open_backend", lambda *_, **__: pytest.fail("a model was loaded")
        )
        evaluate(run)
        again = run.manifest["stages"]["eval"]
        assert again["done"] and again["output"] == first["output"]
