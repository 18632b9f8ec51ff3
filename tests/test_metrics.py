"""A run's numbers and its diagnosis."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import yaml

from kit.core.errors import KitError
from kit.core.records import AlignedRow, PrefixRow
from kit.core.storage import RowFile
from kit.reporting import metrics, report
from tests.make_run import make


def numbers_of(folder: Path) -> dict[str, Any]:
    return metrics.numbers(metrics.Files(folder))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("runs") / "whole")


@pytest.fixture(scope="module")
def run(folder: Path) -> dict[str, Any]:
    """The numbers of a whole run."""
    return numbers_of(folder)


def test_numbers_are_those_of_the_files(folder: Path, run: dict[str, Any]) -> None:
    prefixes = RowFile(folder / "prefixes.jsonl", PrefixRow).read()
    aligned = RowFile(folder / "aligned.jsonl", AlignedRow).read()
    log = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    names = [stage["name"] for stage in run["stages"]]
    assert names == ["teach", "truncate", "align", "train", "eval"]
    ratios = [row.ratio for row in prefixes]
    assert run["prefix_ratio_median"] == pytest.approx(median(ratios), abs=1e-4)
    assert run["verdicts_asked"] == sum(len(row.verdicts) for row in prefixes) > 50
    assert run["prefill_tokens"] == sum(row.prefill_tokens for row in prefixes)
    assert (run["loss_first"], run["loss_last"]) == (log[0]["loss"], log[-1]["loss"])
    kept = [row for row in aligned if not row.rejected]
    ratio = len(kept) / 24
    assert run["retention"] == {"rows": len(kept), "of": 24, "ratio": ratio, "paper": 0.966}
    assert run["n_eval"] == 60
    assert run["accuracy_before"] == run["scores"][0]["accuracy"] != run["accuracy_after"]
    lengths = [len(row.prefix) for row in kept]
    assert run["lengths"]["prefix_characters"]["p50"] == pytest.approx(median(lengths), abs=1)


def test_numbers_are_json_as_they_are(run: dict[str, Any]) -> None:
    assert json.loads(json.dumps(run)) == run


def test_the_funnel_adds_up(run: dict[str, Any]) -> None:
    """Rows in are rows out and rows lost, for every stage whose rows are one to one."""
    for stage in run["stages"][:4]:
        lost = sum(row["rows"] for row in run["rejections"] if row["stage"] == stage["name"])
        assert stage["rows_in"] == stage["rows_out"] + lost, stage["name"]
    assert {"stage": "data", "reason": "no answer", "rows": 1, "of": None} in run["rejections"]
    teach = {"stage": "teach", "reason": "no right trace", "rows": 1, "of": 25}
    assert teach in run["rejections"]


@pytest.mark.parametrize("upto", ["teach", "truncate", "align", "train"])
def test_a_run_that_stopped_early_has_no_later_numbers(tmp_path: Path, upto: str) -> None:
    run = numbers_of(make(tmp_path / "run", upto=upto))
    assert run["accuracy_after"] is None and run["n_eval"] is None
    assert (run["loss_last"] is None) == (upto != "train")
    assert (run["retention"]["ratio"] is None) == (upto in ("teach", "truncate"))


def test_reading_changes_nothing_and_names_damage(tmp_path: Path) -> None:
    folder = make(tmp_path / "run", upto="align")
    path = folder / "aligned.jsonl"
    path.write_bytes(path.read_bytes()[:-30])  # the last line, cut off
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    run = numbers_of(folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert "aligned.jsonl line 24" in run["damaged"][0]
    assert run["findings"][0]["level"] == "warning" and "damaged" in run["findings"][0]["what"]


def test_a_torn_training_log_is_damage_and_no_traceback(tmp_path: Path) -> None:
    folder = make(tmp_path / "run", upto="train")
    path = folder / "train_log.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    assert numbers_of(folder)["damaged"] == ["train_log.jsonl: cut off or not JSON"]


def test_what_align_lengthened_is_told_apart_from_the_cut(tmp_path: Path) -> None:
    """The kept share is the cut's; from where `align` lengthened it, another was learned from."""
    folder = make(tmp_path / "run")
    file = RowFile(folder / "aligned.jsonl", AlignedRow)
    traces = {row.id: row.trace for row in RowFile(folder / "prefixes.jsonl", PrefixRow).read()}
    rows = file.read()
    kept = [row.id for row in rows if not row.rejected]
    shares = [len(row.prefix) / len(traces[row.id]) for row in rows if not row.rejected]
    before = numbers_of(folder)
    assert before["lengthened"] == 0
    assert before["lengths"]["used_share"]["p50"] == pytest.approx(median(shares), abs=1e-4)

    # most rows are learned from with the whole trace
    changed = []
    for row in rows:
        if row.id in kept[:-3]:
            row = row.model_copy(update={"prefix": traces[row.id], "lengthened": 2})
        changed.append(row)
    (folder / "aligned.jsonl").unlink()
    file = RowFile(folder / "aligned.jsonl", AlignedRow)
    file.append(*changed)
    after = numbers_of(folder)
    assert after["prefix_ratio_median"] == before["prefix_ratio_median"]
    assert after["lengthened"] == len(kept) - 3 and after["lengths"]["used_share"]["p50"] == 1
    page = report.page(metrics.Files(folder), after)
    assert f"{len(kept) - 3} of {len(kept)} training rows continue a longer prefix" in page


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (None, 1, "–"),
        (0, 0, "0%"),
        (1, 1, "100.0%"),
        (0.9967, 0, ">99%"),
        (0.9996, 1, ">99.9%"),
        (0.002, 0, "<1%"),
        (0.0002, 1, "<0.1%"),
        (0.302, 1, "30.2%"),
    ],
)
def test_only_all_is_100_percent_and_only_none_is_0(
    value: float | None, digits: int, text: str
) -> None:
    assert metrics.percent(value, digits) == text


def test_a_difference_is_in_points() -> None:
    shown = [metrics.points(value) for value in (0.0933, -0.0751, -0.0004, None)]
    assert shown == ["+9.3", "-7.5", "+0.0", "–"] and metrics.points(0.101, "") == "10.1"


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KitError, match="no run"):
        numbers_of(tmp_path)


def inconspicuous(run: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a run in which no rule finds anything."""
    result = copy.deepcopy(run)
    result.update(
        train_rows=900,
        answer_in_prefix=0,
        damaged=[],
        notes=[],
        insufficient_traces=0,
        isolated_traces={"rows": 0, "of": 20},
        over_limit_traces=0,
        retention={"rows": 900, "of": 920, "ratio": 0.978, "paper": 0.966},
    )
    result["samples"]["align"].update(
        samples=1000, verdicts={"correct": 950, "wrong": 50}, truncated_not_correct=2
    )
    result["train"].update(dropped={}, fixed_batch_before=2.0, fixed_batch_after=1.0)
    for score in result["scores"]:
        score.update(truncated_ratio=0.0, loop_ratio=0.0, verdicts={"correct": 30, "wrong": 30})
    for pair in result["comparisons"]:
        pair.update(ci_low=0.02, ci_high=0.2)
    return result


CONFIG = {"judge": {"kind": "verbal"}, "eval": {"sampling": {"max_new_tokens": 4096}}}
NO_GAIN = {
    "round": 2,
    "pays": False,
    "gain": {"difference": 0.01, "ci_low": -0.03, "ci_high": 0.05, "n": 60},
    "score": {"mean_tokens": 90.0},
}
TROUBLES = [
    ({"retention": {"rows": 580, "of": 1000, "ratio": 0.58, "paper": 0.966}}, "580 of 1,000 (58%)"),
    ({"train_rows": 12}, "12 training rows"),
    ({"answer_in_prefix": 500}, "the prefix already contains the gold answer"),
    ({"degenerate": "It hardly distinguishes: 23 of 24. Try another."}, "hardly distinguishes"),
    ({"lengthened": 400}, "continue a longer prefix than the cut"),
    ({"insufficient_traces": 20}, "never judged sufficient"),
    ({"violating_traces": 10}, "comes after an ENOUGH"),
    ({"isolated_traces": {"rows": 5, "of": 20}}, "5 of 20 (25%) cuts are at an isolated ENOUGH"),
    ({"over_limit_traces": 3}, "3 traces are longer than the judge reads"),
    ({"verdicts_unparsed": 3}, "could not be parsed"),
    ({"near_duplicates": [{"dataset": "held", "n": 27, "of": 200}]}, "27 of 200 (14%) problems of"),
    ({"notes": ["the cache cannot be cut"]}, "the cache cannot be cut"),
    ({"rounds": [NO_GAIN]}, "Round 2 no longer pays"),
]
# (a list or mapping of the numbers, what changes in its first item, the words of the finding)
NESTED_TROUBLES = [
    ("scores", {"truncated_ratio": 0.46}, "cut off at 4,096 tokens"),
    ("scores", {"loop_ratio": 0.17}, "end in a loop"),
    (
        "scores",
        {"verdicts": {"correct": 20, "unparsed": 39, "timeout": 1}, "samples": 60},
        "could not be graded",
    ),
    (
        "scores",
        {"judge_agreement": {"of": 30, "undecided": 20}},
        "left 20 of 50 (40%) answers",
    ),
    ("comparisons", {"ci_low": -0.03}, "within the noise"),
    ("train", {"fixed_batch_after": 2.0}, "did not lower the loss"),
    (
        "train",
        {"dropped": {"over the cutoff": ["a", "b"]}},
        "2 of 900 (0%) training rows were dropped",
    ),
    (
        "stages",
        {"name": "teach", "rows_in": 12, "rows_out": 0, "done": True},
        "only 0 of 12 (0%) problems",
    ),
    ("stages", {"name": "align", "done": False}, "align is not finished"),
]


@pytest.mark.parametrize(("change", "words"), TROUBLES)
def test_each_trouble_is_named(run: dict[str, Any], change: dict[str, Any], words: str) -> None:
    assert metrics.findings(inconspicuous(run), CONFIG) == []
    [finding] = metrics.findings({**inconspicuous(run), **change}, CONFIG)
    assert words in finding["what"]


def test_several_traces_of_a_problem_are_one_problem(run: dict[str, Any]) -> None:
    changed = inconspicuous(run)
    changed["stages"][0].update(name="teach", rows_in=20, rows_out=9, done=True)
    changed["rejections"] = [{"stage": "teach", "reason": "none", "rows": 14, "of": 20}]
    [finding] = metrics.findings(changed, CONFIG)
    assert "only 6 of 20 (30%) problems" in finding["what"]


@pytest.mark.parametrize(("part", "change", "words"), NESTED_TROUBLES)
def test_each_trouble_in_a_list_is_named_once(
    run: dict[str, Any], part: str, change: dict[str, Any], words: str
) -> None:
    changed = inconspicuous(run)
    target = changed[part][0] if isinstance(changed[part], list) else changed[part]
    target.update(change)
    [finding] = metrics.findings(changed, CONFIG)
    assert words in finding["what"]


def test_one_finding_covers_the_base_and_the_tuned_model(run: dict[str, Any]) -> None:
    changed = inconspicuous(run)
    for score in changed["scores"]:
        score.update(truncated_ratio=0.46)
    [finding] = metrics.findings(changed, CONFIG)
    assert "base 46%" in finding["evidence"] and "tuned 46%" in finding["evidence"]


def test_every_rule_is_tried_here() -> None:
    """A rule that no test triggers may never apply."""
    # and two more: damage above, continuations cut off below
    tried = len(TROUBLES) + len(NESTED_TROUBLES) + 2
    assert len(yaml.safe_load(metrics.RULES.read_text(encoding="utf-8"))) == tried


def test_continuations_that_are_cut_off_are_named(run: dict[str, Any]) -> None:
    assert any("cut off at the token limit" in finding["what"] for finding in run["findings"])
