"""Judges held against success: the numbers, the files they make, and what refuses them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import palign
from kit.core import config as configs
from kit.core.errors import KitError
from kit.core.progress import Progress
from kit.grading.stats import auc
from kit.judging.judge import Judge
from kit.reporting.validate import assess, measure, validate
from tests.browser import check
from tests.judging_cases import TRACE, LengthBackend, whole_row
from tests.test_success import Student

SECTIONS = ("short", "margins", "cuts", "numbers")


def judge_of(threshold: float = 0.0, generates: bool = False) -> Any:
    """As much of a judge as numbers are made from."""
    settings = SimpleNamespace(success_rate=0.5)
    return SimpleNamespace(settings=settings, threshold=threshold, generates_verdicts=generates)


def generated(informative: bool, count: int = 40) -> list[dict[str, Any]]:
    """Traces whose success depends on the margin, or not."""
    rng = random.Random(7)
    traces = []
    for _ in range(count):
        margins = [round(rng.gauss(0, 2), 1) for _ in range(6)]
        rates = []
        for margin in margins:
            chance = 1 / (1 + np.exp(-margin)) if informative else 0.4
            rates.append(sum(rng.random() < chance for _ in range(4)) / 4)
        traces.append(
            {
                "of": 13,
                "sentences": [2, 4, 6, 8, 10, 12],
                "verbal": margins,
                "rate": rates,
                "enough": [rate >= 0.75 for rate in rates],
            }
        )
    return traces


def test_auc_counts_pairs() -> None:
    rng = random.Random(1)
    for _ in range(20):
        scores = np.array([rng.randint(0, 5) for _ in range(15)])
        labels = np.array([rng.random() < 0.4 for _ in range(15)])
        won = [
            (a > b) + (a == b) / 2
            for a, positive in zip(scores, labels, strict=True)
            for b, other in zip(scores, labels, strict=True)
            if positive and not other
        ]
        assert auc(scores, labels) == pytest.approx(sum(won) / len(won) if won else 0.5)
    assert auc(np.array([1.0, 2.0]), np.array([True, True])) == 0.5


def test_brier_threshold_and_cuts_equal_slow_ones() -> None:
    traces = generated(informative=True)
    found = assess("verbal", judge_of(), traces)
    pairs = [p for t in traces for p in zip(t["verbal"], t["rate"], strict=True)]
    distances = []
    for margin, rate in pairs:
        stated = 1 / (1 + np.exp(-margin))
        distances += [(stated - 1) ** 2] * round(4 * rate) + [stated**2] * round(4 - 4 * rate)
    assert found["brier"] == pytest.approx(np.mean(distances))

    # An isotonic fit crosses a rate where the sum of what lies above it is largest.
    def gain(threshold: float) -> float:
        return sum(rate - 0.5 for margin, rate in pairs if margin >= threshold)

    best = max(gain(margin) for margin, _ in pairs)
    assert gain(found["threshold"]) == pytest.approx(best) and best > 0
    assert found["threshold"] == pytest.approx(0.0, abs=1.0)
    margins = sorted({margin for margin, _ in pairs})
    assert found["threshold"] not in margins, "between two margins"
    fitted = {(point[0], point[3]) for point in found["points"]}
    assert len(fitted) == len(margins), "equal margins have one rate"
    assert 0.5 < found["auc_low"] < found["auc"] < found["auc_high"] < 1

    cuts = []
    for trace in traces:
        true = [k for k, rate in zip(trace["sentences"], trace["rate"], strict=True) if rate > 0.7]
        cut = [k for k, m in zip(trace["sentences"], trace["verbal"], strict=True) if m >= 0]
        if true:
            cuts.append((true[0], cut[0] if cut else 13))
    assert found["cuts"] == cuts and 0 < len(cuts) <= 40
    assert found["mean_cut_error_sentences"] == pytest.approx(np.mean([b - a for a, b in cuts]))
    # what is kept of a trace and succeeds, before and after calibration
    for threshold, kept in ((0.0, found["kept"]), (found["threshold"], found["kept_calibrated"])):
        ratios = []
        rates = []
        for trace in traces:
            enough = [i for i, margin in enumerate(trace["verbal"]) if margin >= threshold]
            ratios.append(trace["sentences"][enough[0]] / 13 if enough else 1.0)
            rates.append(trace["rate"][enough[0] if enough else -1])
        assert kept == pytest.approx([np.mean(ratios), np.mean(rates)])

    # a judge that calls nothing enough keeps the whole trace
    assert {cut for _, cut in assess("verbal", judge_of(99), traces)["cuts"]} == {13}


def test_a_margin_that_says_nothing_gets_no_threshold_and_no_nan() -> None:
    chance = assess("verbal", judge_of(), generated(informative=False))
    assert chance["auc_low"] <= 0.5 <= chance["auc_high"] and chance["threshold"] is None
    constant = [{**trace, "verbal": [1.5] * 6} for trace in generated(informative=True)]
    found = assess("verbal", judge_of(), constant)
    assert found["auc"] == 0.5 and found["threshold"] is None
    never = [{**t, "rate": [0.0] * 6, "enough": [False] * 6} for t in generated(informative=True)]
    found = assess("verbal", judge_of(), never)
    assert found["threshold"] is None and found["mean_cut_error_sentences"] is None
    assert "NaN" not in json.dumps([chance, found])
    labels = []
    for trace in generated(informative=True):
        labels.append({**trace, "answer-greedy": list(map(float, trace["enough"]))})
    assert assess("answer-greedy", judge_of(generates=True), labels)["threshold"] is None


class ValidatedStudent(Student):
    """Right from a sentence on; its log-odds rise with the prefix."""

    def close(self) -> None:
        pass


@pytest.fixture
def validated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The command on five traces, with a student that succeeds from the sixth sentence on."""
    monkeypatch.setattr("kit.reporting.validate.open_backend", lambda _: ValidatedStudent(6))
    rows = []
    for number in range(5):
        question = f"<b>Question</b> {number}?"
        rows.append({"id": f"t{number}", "question": question, "answer": "9", "trace": TRACE})
    file = tmp_path / "traces.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    overrides = ["teacher.backend=file", f"teacher.path={file}", "student.model=<i>model</i>"]
    result = validate(configs.load(None, overrides), tmp_path / "out", Progress(quiet=True))
    return {**result, "folder": tmp_path / "out", "file": file}


def test_the_command_measures_every_judge_at_the_same_boundaries(validated: Any) -> None:
    assert validated["traces"] == 5 and validated["boundaries"] == 30
    assert [judge["kind"] for judge in validated["judges"]] == ["verbal", "answer", "answer-greedy"]
    # boundaries 3, 5, 7, 9, 11 and 13 of 13: the first that is enough is the seventh sentence's
    assert all(true == 7 for judge in validated["judges"] for true, _ in judge["cuts"])
    verbal = validated["judges"][0]
    assert verbal["auc"] == 1.0 and verbal["threshold"] is not None
    assert verbal["mean_cut_error_sentences"] == -4.0  # it calls every boundary enough


def test_the_page_fits_and_shows_text_as_text(browser: Any, validated: Any) -> None:
    check(browser, Path(validated["page"]), SECTIONS)
    assert "<i>model" not in Path(validated["page"]).read_text()


def test_a_calibration_sets_the_threshold_of_the_judge_it_was_made_for(
    validated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = validated["folder"] / "calibration.json"
    base = ["student.model=<i>model</i>", f"judge.calibration={path}"]
    config = configs.load(None, base)
    threshold = validated["judges"][0]["threshold"]
    with Judge(config, LengthBackend()) as judge:
        assert judge.threshold == threshold
    # the resolved config holds the content, so a changed file is a changed key
    again = configs.load(None, ["student.model=<i>model</i>"]).model_dump()
    again["judge"] = config.model_dump()["judge"]
    assert configs.resolve(again, "test").judge == config.judge
    for override, named in (
        ("student.model=other", "student.model"),
        ("prompts.judge={question} {prefix}", "prompts.judge"),
        ("judge.labels=[YES, NO]", "judge.labels"),
        ("student.system=Be brief", "student.system"),
        ("judge.decode=generate", "generated verdicts, which have no margin"),
    ):
        with pytest.raises(KitError, match=named) as refused:
            Judge(configs.load(None, [*base, override]), LengthBackend())
        assert refused.value.code == 2
    backend = LengthBackend()
    monkeypatch.setattr(backend.tokenizer, "template", "{{ messages[0].content }}")
    with pytest.raises(KitError, match="chat template"):
        Judge(config, backend)
    with pytest.raises(KitError, match="set success_rate"):
        configs.load(None, [*base, "judge.kind=success"])


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        "not json",
        "[]",
        '{"setup": {}, "thresholds": {"a": "b"}}',
        '{"setup": {}, "thresholds": {}, "accuracy_after": 0.5}',
    ],
)
def test_a_file_that_is_no_calibration_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "c.json"
    path.write_text(content)
    for name in (path, tmp_path / "absent.json"):
        with pytest.raises(KitError, match=r"judge\.calibration"):
            configs.load(None, [f"judge.calibration={name}"])
    with pytest.raises(KitError, match=r"there is no file .*absent"):
        configs.load(None, [f"judge.calibration={tmp_path / 'absent.json'}"])
    with pytest.raises(KitError, match="unknown key"):
        configs.load(None, ["judge.calibration={setup: {}, thresholds: {}, more: 1}"])


def test_no_boundary_within_the_context_is_measured_as_nothing() -> None:
    config = configs.load(None, ["judge.limit_tokens=8"])
    with Judge(config, LengthBackend()) as judge:
        assert measure({"success": judge}, whole_row()) == []


def test_a_stopped_validation_goes_on_and_another_setup_begins_anew(
    validated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traces that were measured are not asked again; with another seed they are."""
    folder = validated["folder"]
    files = {path: path.read_text() for path in (folder / "measured").iterdir()}
    assert len(files) == 5
    for path in list(files)[:2]:
        path.unlink()
    opened: list[Student] = []

    def open_student(_: Any) -> Student:
        opened.append(ValidatedStudent(6))
        return opened[-1]

    monkeypatch.setattr("kit.reporting.validate.open_backend", open_student)
    overrides = ["teacher.backend=file", f"teacher.path={validated['file']}"]
    config = configs.load(None, [*overrides, "student.model=<i>model</i>"])
    again = validate(config, folder, Progress(quiet=True))
    assert again["judges"] == validated["judges"]
    assert len({id.split("@")[0] for id, _ in opened[0].drawn}) == 2
    assert {path: path.read_text() for path in (folder / "measured").iterdir()} == files

    seeded = config.model_copy(update={"seed": 1})
    validate(seeded, folder, Progress(quiet=True))
    assert len({id.split("@")[0] for id, _ in opened[1].drawn}) == 5


def test_validate_is_an_option_of_judge() -> None:
    args = palign.parser().parse_args(["judge", "f.jsonl", "--validate", "--calibration", "none"])
    assert args.validate and args.out == Path("validation")
