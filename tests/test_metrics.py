"""A run's numbers and its diagnosis."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import yaml

from kit.core.errors import KitError
from kit.core.records import AlignedRow, PrefixRow
from kit.core.storage import RowFile
from kit.reporting import metrics
from tests.make_run import make


def collect(folder: Path) -> dict:
    return metrics.numbers(metrics.Files(folder))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("runs") / "whole")


@pytest.fixture(scope="module")
def found(folder: Path) -> dict:
    return collect(folder)


def test_numbers_are_those_of_the_files(folder: Path, found: dict) -> None:
    cut = RowFile(folder / "prefixes.jsonl", PrefixRow).read()
    rows = RowFile(folder / "aligned.jsonl", AlignedRow).read()
    log = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    assert json.loads(json.dumps(found)) == json.loads(
        json.dumps(found, default=str)
    )  # JSON as it is
    assert [stage["name"] for stage in found["stages"]] == [
        "teach",
        "truncate",
        "align",
        "train",
        "eval",
    ]
    assert found["prefix_ratio_median"] == pytest.approx(
        sorted(r.ratio for r in cut)[11:13] @ Mean(), abs=1e-4
    )
    assert found["verdicts_asked"] == sum(len(row.verdicts) for row in cut) > 50
    assert found["prefill_tokens"] == sum(row.prefill_tokens for row in cut)
    assert (found["loss_first"], found["loss_last"]) == (log[0]["loss"], log[-1]["loss"])
    kept = [row for row in rows if not row.rejected]
    assert found["retention"] == {
        "rows": len(kept),
        "of": 24,
        "ratio": len(kept) / 24,
        "paper": 0.966,
    }
    assert found["n_eval"] == 60
    assert found["accuracy_before"] == found["scores"][0]["accuracy"] != found["accuracy_after"]
    assert found["lengths"]["prefix_characters"]["p50"] == pytest.approx(
        sorted(len(row.prefix) for row in kept) @ Mean(), abs=1
    )


class Mean:
    """`values @ Mean()` is the median of sorted values: computed apart from the code under test."""

    def __rmatmul__(self, values: list[float]) -> float:
        middle = len(values) // 2
        return values[middle] if len(values) % 2 else (values[middle - 1] + values[middle]) / 2


def test_the_funnel_adds_up(found: dict) -> None:
    """What went in is what came out and what was lost, for every stage whose rows are one to one."""
    for stage in found["stages"][:4]:
        lost = sum(row["rows"] for row in found["rejections"] if row["stage"] == stage["name"])
        assert stage["rows_in"] == stage["rows_out"] + lost, stage["name"]
    assert {"stage": "data", "reason": "no answer", "rows": 1, "of": None} in found["rejections"]


@pytest.mark.parametrize("upto", ["teach", "truncate", "align", "train"])
def test_a_run_that_stopped_early(tmp_path: Path, upto: str) -> None:
    found = collect(make(tmp_path / "run", upto=upto))
    assert found["accuracy_after"] is None and found["n_eval"] is None
    assert (found["loss_last"] is None) == (upto != "train")
    assert (found["retention"]["ratio"] is None) == (upto in ("teach", "truncate"))


def test_reading_changes_nothing_and_names_damage(tmp_path: Path) -> None:
    folder = make(tmp_path / "run", upto="align")
    path = folder / "aligned.jsonl"
    path.write_bytes(path.read_bytes()[:-30])  # the last line, cut off
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    found = collect(folder)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    assert "aligned.jsonl line 24" in found["damaged"][0]
    assert found["findings"][0]["level"] == "warning" and "damaged" in found["findings"][0]["what"]


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(KitError, match="no run"):
        collect(tmp_path)


def quiet(found: dict) -> dict:
    """The numbers of a run of which there is nothing to say."""
    calm = copy.deepcopy(found)
    calm |= {
        "train_rows": 900,
        "answer_in_prefix": 0,
        "damaged": [],
        "notes": [],
        "insufficient_traces": 0,
    }
    calm["retention"] = {"rows": 900, "of": 920, "ratio": 0.978, "paper": 0.966}
    calm["samples"]["align"] |= {
        "samples": 1000,
        "verdicts": {"correct": 950, "wrong": 50},
        "truncated_not_correct": 2,
    }
    calm["train"] |= {"dropped": {}, "fixed_batch_before": 2.0, "fixed_batch_after": 1.0}
    for score in calm["scores"]:
        score |= {
            "truncated_ratio": 0.0,
            "loop_ratio": 0.0,
            "verdicts": {"correct": 30, "wrong": 30},
        }
    for pair in calm["comparisons"]:
        pair |= {"ci_low": 0.02, "ci_high": 0.2}
    return calm


TROUBLES = [
    ({"retention": {"rows": 580, "of": 1000, "ratio": 0.58, "paper": 0.966}}, "580 of 1,000 (58%)"),
    ({"train_rows": 12}, "12 training rows"),
    ({"answer_in_prefix": 500}, "the gold answer already stands in the prefix"),
    ({"degenerate": "23 of 24 prefixes are one sentence"}, "hardly tells"),
    ({"insufficient_traces": 20}, "never judged sufficient"),
    ({"violating_traces": 10}, "stands behind an ENOUGH"),
    ({"verdicts_unparsed": 3}, "could not be read"),
    (
        {"near_duplicates": [{"dataset": "held", "n": 27, "of": 200}]},
        "27 of 200 (14%) problems of held",
    ),
    ({"notes": ["the cache cannot be cut"]}, "the cache cannot be cut"),
]


@pytest.mark.parametrize(("change", "words"), TROUBLES)
def test_each_trouble_is_named(found: dict, change: dict, words: str) -> None:
    config = {"judge": {"kind": "verbal"}, "eval": {"sampling": {"max_new_tokens": 4096}}}
    assert metrics.findings(quiet(found), config) == []
    spoken = metrics.findings({**quiet(found), **change}, config)
    assert len(spoken) == 1 and words in spoken[0]["what"]


def test_troubles_inside_lists_are_named(found: dict) -> None:
    config = {"judge": {"kind": "answer"}, "eval": {"sampling": {"max_new_tokens": 4096}}}

    def spoken(part: str, **change: object) -> str:
        calm = quiet(found)
        target = calm[part][0] if isinstance(calm[part], list) else calm[part]
        target |= change
        return " ".join(f"{f['what']} {f['evidence']}" for f in metrics.findings(calm, config))

    assert "cut off at 4,096 tokens" in spoken("scores", truncated_ratio=0.46)
    assert "end in a loop" in spoken("scores", loop_ratio=0.17)
    assert "could not be graded" in spoken(
        "scores", verdicts={"correct": 20, "unparsed": 39, "timeout": 1}, samples=60
    )
    assert "within the noise" in spoken("comparisons", ci_low=-0.03)
    assert "did not lower the loss" in spoken("train", fixed_batch_after=2.0)
    assert "2 of 900 (0%) training rows were dropped" in spoken(
        "train", dropped={"over the cutoff": ["a", "b"]}
    )
    few = {"name": "teach", "rows_in": 12, "rows_out": 0, "done": True}
    assert "0 of 12 (0%) problems only" in spoken("stages", **few)
    assert "align is not finished" in spoken("stages", name="align", done=False)


def test_every_rule_is_tried_here() -> None:
    """A rule that no test makes speak may never speak."""
    tried = len(TROUBLES) + 8 + 2  # above, and damage and continuations cut off
    assert len(yaml.safe_load(metrics.RULES.read_text(encoding="utf-8"))) == tried


def test_continuations_cut_off(found: dict) -> None:
    assert any("cut off at the token limit" in f["what"] for f in found["findings"])
