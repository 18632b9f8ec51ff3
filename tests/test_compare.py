"""Runs compared: groups, paired tests, what each run learned from, and the page."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import palign
from kit.core.errors import KitError
from kit.core.records import EvalRow, Sample
from kit.core.storage import RowFile
from kit.grading import stats
from kit.grading.scores import accuracy
from kit.reporting import compare
from kit.reporting.pairwise import ReasoningTest
from tests.make_run import make

LABELS = ["palign (kind=verbal)", "long-trace", "palign (kind=answer)"]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two seeds of palign, a long trace, and another judge's run that stopped before training."""
    root = tmp_path_factory.mktemp("runs")
    runs = [
        make(root / "p1", seed=1),
        make(root / "p2", seed=2),
        make(root / "long", seed=1, method="long-trace"),
        make(root / "answer", seed=1, judge__kind="answer", upto="truncate"),
    ]
    return compare.compare(runs, root / "out.html")


@pytest.fixture(scope="module")
def scores(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The first dataset's scores by group."""
    return {score["group"]: score for score in reversed(result["scores"])}


def test_runs_that_differ_only_in_the_seed_are_one_group(result: dict[str, Any]) -> None:
    assert [group["seeds"] for group in result["groups"]] == [[1, 2], [1], [1]]
    assert [group["label"] for group in result["groups"]] == LABELS


def test_seeds_whose_runs_stand_on_runs_of_their_own_are_one_group(tmp_path: Path) -> None:
    """A second round has its own first round's adapter on, a matched cut its own judged run's
    length; a second round on another setting's first one is another group.
    """
    runs = []
    for seed in (1, 2):
        itself = tmp_path / "s{seed}"
        first = make(tmp_path / f"s{seed}", seed=seed, rounds=2, baseline__matched_run=itself)
        second = make(
            tmp_path / f"s{seed}" / "round-2", seed=seed, name="again", student__adapter=first
        )
        matched = make(
            tmp_path / f"matched-{seed}",
            seed=seed,
            method="fixed-prefix-matched",
            baseline__matched_run=itself if seed == 1 else first,
        )
        runs += [first, second, matched]
    other = make(tmp_path / "other", seed=1, judge__kind="answer")
    runs.append(make(tmp_path / "third", seed=3, name="again", student__adapter=other))
    groups = compare.compare(runs, tmp_path / "out.html")["groups"]
    assert [group["seeds"] for group in groups] == [[1, 2], [1, 2], [1, 2], [3]]


def test_a_groups_score_is_the_mean_of_its_runs(result: dict[str, Any], scores: Any) -> None:
    palign = scores["palign (kind=verbal)"]
    each = [run["accuracy_after"] for run in result["runs"][:2]]
    assert palign["by_run"] == pytest.approx(each, abs=1e-4)
    assert palign["accuracy"] == pytest.approx(sum(each) / 2, abs=1e-4)
    assert palign["spread"] == pytest.approx(abs(each[0] - each[1]) / 2**0.5, abs=1e-4)
    assert scores["long-trace"]["spread"] is None


def test_groups_are_tested_on_the_same_problems(result: dict[str, Any], scores: Any) -> None:
    pair = result["pairs"][0]
    difference = scores["long-trace"]["accuracy"] - scores["palign (kind=verbal)"]["accuracy"]
    assert pair["n"] == 60 and pair["difference"] == pytest.approx(difference, abs=2e-4)
    assert pair["ci_low"] <= pair["difference"] <= pair["ci_high"]
    # two seeds on one side: their distance is in the interval
    accuracies = scores["palign (kind=verbal)"]["by_run"], scores["long-trace"]["by_run"]
    variance, _ = stats.seed_noise(*accuracies, is_paired=False)
    assert pair["method"] == "Student's t over problems and training runs"
    assert pair["ci_high"] - pair["ci_low"] > 2 * 1.96 * variance**0.5
    cautious = {"within the noise"}
    cautious |= {f"{pair[side]} is slightly ahead" for side in ("a", "b")}
    is_small = abs(pair["difference"]) < pair["min_detectable_difference"]
    assert (pair["words"] in cautious) == (is_small or pair["p_value"] >= 0.05)


def test_the_reference_is_the_first_group_whatever_the_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [make(tmp_path / name, seed=1, method=name) for name in ("palign", "long-trace")]
    args = ["compare", *map(str, runs), "--out", str(tmp_path / "page.html"), "--json"]
    for reference, other in (runs, runs[::-1]):
        assert palign.main([*args, "--reference", str(reference)]) == 0
        result = json.loads(capsys.readouterr().out)
        assert [group["label"] for group in result["groups"]] == [reference.name, other.name]
        assert {(pair["a"], pair["b"]) for pair in result["pairs"]} == {
            (reference.name, other.name)
        }


def test_config_keys_that_differ_are_named(result: dict[str, Any]) -> None:
    assert set(result["differs"]) == {"seed", "method", "judge.kind"}


def test_disagreements_are_shown_in_turn_from_each_side(result: dict[str, Any]) -> None:
    ahead = set()
    for problem in result["different"]:
        shares = {answer["group"]: answer["share"] for answer in problem["answers"]}
        assert len(set(shares.values())) > 1
        ahead.add(max(shares, key=lambda label: shares[label]))
    assert result["pairs"][0]["better"] and result["pairs"][0]["worse"]
    assert ahead >= {"palign (kind=verbal)", "long-trace"}


def test_accuracy_by_token_budget_ends_at_the_accuracy(result: dict[str, Any], scores: Any) -> None:
    for label, points in result["within"]["builtin"]:
        ratios = [ratio for _, ratio in points]
        assert ratios == sorted(ratios) and points[0][0] == 0
        assert ratios[-1] == pytest.approx(scores[label]["accuracy"], abs=1e-4)


def test_every_method_is_shown_on_the_same_trace(result: dict[str, Any]) -> None:
    lesson = result["lesson"]
    # The run that stopped early trained no student.
    assert [target["group"] for target in lesson["targets"]] == LABELS[:2] == [*lesson["shown"]]
    for text in lesson["shown"].values():
        prefix = text.removeprefix("<Begin_of_Prefix>").split("<End_of_Prefix>")[0]
        beginning = prefix.split("\\boxed")[0].rstrip()
        assert beginning and lesson["trace"].startswith(beginning)


def test_the_search_shown_is_the_cut_of_the_trace_shown(result: dict[str, Any]) -> None:
    lesson = result["lesson"]
    search = lesson["search"]
    end = search["row"]["end"]
    assert search["group"] == LABELS[0] and search["row"]["trace"] == lesson["trace"]
    assert lesson["question"] == search["row"]["question"]
    assert lesson["gold"] == search["row"]["answer"]
    kept = "".join(text for text, _ in search["kept"])
    assert kept == lesson["trace"][:end]
    assert kept + "".join(text for text, _ in search["rest"]) == lesson["trace"]
    target = lesson["shown"][LABELS[0]]
    assert target.startswith("<Begin_of_Prefix>" + lesson["trace"][:end].rstrip())


def test_the_page_shows_the_tuned_models_interval(result: dict[str, Any]) -> None:
    page = Path(result["page"])
    assert page.stat().st_size > 10_000
    table = page.read_text(encoding="utf-8").split('id="runs"')[1].split("</section>")[0]
    for run in result["runs"][:3]:
        base, tuned = run["scores"][:2]
        assert f"{tuned['ci_low']:.1%} to {tuned['ci_high']:.1%}" in table
        assert f"{base['ci_low']:.1%} to {base['ci_high']:.1%}" not in table


def test_the_table_is_plain_text(result: dict[str, Any], capsys: Any) -> None:
    compare.show(result)
    text = capsys.readouterr().out
    assert "\x1b" not in text and "<" not in text.replace("< 0.001", "")
    assert "builtin: long-trace against palign (kind=verbal)" in text and "page: " in text


def test_accuracy_by_token_budget_counts_problems_not_rows() -> None:
    def row(id: str, *samples: tuple[str, int]) -> EvalRow:
        graded = []
        for verdict, tokens in samples:
            graded.append(Sample(text="", verdict=verdict, tokens=tokens))
        return EvalRow(id=id, question=id, answer="1", samples=tuple(graded))

    rows = [
        row("a", ("correct", 10)),
        row("a", ("wrong", 5)),
        row("b", ("correct", 40), ("unparsed", 80)),
        row("c"),
    ]
    [(label, points)] = compare.accuracy_within({"palign": rows})
    assert label == "palign" and points[0] == (0, 0) and len(points) == 81
    at = dict(points)
    assert (at[9], at[10], at[39]) == pytest.approx((0, 1 / 6, 1 / 6))
    assert at[40] == at[80] == pytest.approx(1 / 3)
    assert at[80] == pytest.approx(accuracy(rows).accuracy, abs=1e-4)


def change_questions(folder: Path) -> None:
    for path in (folder / "eval").glob("*.jsonl"):
        file = RowFile(path, EvalRow)
        rows = []
        for row in file.read():
            rows.append(row.model_copy(update={"question": row.question + " Other."}))
        file.write_all(rows)


def test_other_questions_under_the_same_ids_are_never_paired(tmp_path: Path) -> None:
    runs = [make(tmp_path / "a", seed=1), make(tmp_path / "b", seed=1, method="no-search")]
    change_questions(runs[1])
    assert compare.compare(runs, tmp_path / "out.html")["pairs"] == []


def test_runs_that_learned_from_other_traces_have_a_page(tmp_path: Path) -> None:
    """Nothing is shared to show, and the page says what each run learned from all the same."""
    runs = [make(tmp_path / "a", seed=1), make(tmp_path / "b", seed=1, method="no-search")]
    for name in ("traces.jsonl", "aligned.jsonl", "prefixes.jsonl"):
        (runs[1] / name).unlink()
    lesson = compare.compare(runs, tmp_path / "out.html")["lesson"]
    assert len(lesson["targets"]) == 2 and lesson["shown"] == {} and lesson["search"] is None


def test_undecided_and_looping_answers_are_shown_as_what_they_are(tmp_path: Path) -> None:
    """A judge model's undecided answers, and answers that neither ended nor were cut off."""
    runs = [make(tmp_path / "a", seed=1), make(tmp_path / "b", seed=1, method="no-search")]
    endings = ["stop", "stop", "length", "loop"]
    for folder, right in zip(runs, ("correct", "undecided"), strict=True):
        for path in (folder / "eval").glob("*.jsonl"):
            file = RowFile(path, EvalRow)
            rows = []
            for number, row in enumerate(file.read()):
                ending = endings[number % 4]
                verdict = "wrong" if ending == "loop" else right
                sample = Sample(text="7", tokens=9, verdict=verdict, finish_reason=ending)
                rows.append(row.model_copy(update={"samples": (sample,)}))
            file.write_all(rows)
    result = compare.compare(runs, tmp_path / "out.html")
    page = (tmp_path / "out.html").read_text()
    assert "undecided by the judge model" in page
    for score in result["scores"]:
        is_right = "palign" in score["group"]
        count = len(range(2, score["n"], 4)) if is_right else 0
        assert score["truncated_correct_ratio"] == pytest.approx(count / score["n"], abs=1e-4)
    assert not re.search(r"-\d+%\s+of all correct", page)


def test_compare_needs_two_runs(tmp_path: Path) -> None:
    with pytest.raises(KitError, match="two runs"):
        compare.compare([tmp_path], tmp_path / "out.html")
    with pytest.raises(KitError, match="no run"):
        compare.compare([tmp_path, tmp_path / "other"], tmp_path / "out.html")
    # one run by two names is one
    run = make(tmp_path / "a", seed=1)
    with pytest.raises(KitError, match="two runs"):
        compare.compare([run, run.parent / "." / "x" / ".." / "a"], tmp_path / "out.html")
    other = make(tmp_path / "b", seed=1, method="no-search")
    with pytest.raises(KitError, match="is a folder"):
        compare.compare([run, other], tmp_path)


def test_a_copy_of_a_run_is_no_further_seed(tmp_path: Path) -> None:
    runs = [make(tmp_path / "a", seed=1), make(tmp_path / "b", seed=1, method="no-search")]
    before = compare.compare(runs, tmp_path / "out.html")["pairs"][0]
    shutil.copytree(runs[0], tmp_path / "copy")
    result = compare.compare([*runs, tmp_path / "copy"], tmp_path / "out.html")
    assert result["pairs"][0]["p_value"] == before["p_value"]
    assert result["scores"][0]["runs"] == 2 and result["scores"][0]["spread"] is None


def test_keys_that_change_no_number_part_no_seeds(tmp_path: Path) -> None:
    runs = [make(tmp_path / f"s{seed}", seed=seed, student__max_num_seqs=seed) for seed in (1, 2)]
    runs.append(make(tmp_path / "b", seed=1, method="no-search"))
    assert len(compare.compare(runs, tmp_path / "out.html")["groups"]) == 2


def test_answers_that_were_edited_are_not_compared(tmp_path: Path) -> None:
    runs = [make(tmp_path / "a", seed=1), make(tmp_path / "b", seed=1, method="no-search")]
    [*_, file] = sorted((runs[1] / "eval").glob("*tuned*.jsonl"))
    file.write_text(file.read_text().replace('"correct"', '"wrong"', 5))
    with pytest.raises(KitError, match=r"has \d+ of the 60 problems that were scored"):
        compare.compare(runs, tmp_path / "out.html")


def test_reasoning_is_judged_on_both_runs_answers(tmp_path: Path) -> None:
    """The judge gets one answer per problem from each of the first two groups, and is shown."""
    runs = [make(tmp_path / "a", seed=1), make(tmp_path / "b", seed=1, method="no-search")]

    def judge(first: list[EvalRow], second: list[EvalRow]) -> ReasoningTest:
        assert [row.id for row in first] == [row.id for row in second] and len(first) == 60
        return ReasoningTest(
            judge="a judge",
            pairs=60,
            first=10,
            second=30,
            ties=15,
            flips=5,
            first_shown_ratio=0.61,
            position_p_value=0.1,
            p_value=0.002,
            too_long=[],
            rows=[],
        )

    result = compare.compare(runs, tmp_path / "out.html", judge)
    quality = result["quality"]["builtin"]
    assert quality["second"] == 30 and quality["b"] == "no-search"
    html = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert "Reasoning compared" in html and "a judge" in html and "61%" in html
    compare.show(result)
