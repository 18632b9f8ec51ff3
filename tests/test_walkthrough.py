"""The walkthrough prints what the kit does: sentences, verdicts, cut, grades, training row."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
import runpy

import pytest

import palign
from kit import prompts, walkthrough
from kit.core.bundled import bundled
from kit.core.config import Prompts
from kit.core.records import AlignedRow
from kit.grading.answers import Grader, Item
from kit.judging.sentences import split
from kit.models import HfTokenizer, load_tokenizer
from tests.conftest import ROOT

VERDICT = re.compile(r"first (\d+) of (\d+) sentences: log-odds ([+-][\d.]+) -> (\w+)")
CUT = re.compile(r"4\. The kept prefix: (\d+) of (\d+) sentences")


@pytest.fixture(scope="module")
def printed() -> dict[str, str]:
    """What `python -m kit.walkthrough` prints, by the number of the step."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        runpy.run_module("kit.walkthrough", run_name="__main__")
    text = output.getvalue()
    parts = re.split(r"\n=== (\d)\. .*? ===\n\n", text)
    steps = dict(zip(parts[1::2], parts[2::2], strict=True))
    cut = CUT.search(text)
    assert cut is not None
    steps["kept"] = cut[1]
    return steps


@pytest.fixture(scope="module")
def problem(printed: dict[str, str]) -> dict[str, str]:
    """A row for `palign.py judge`: question, gold answer and trace, as they were printed."""
    question, gold, trace = printed["1"].split("\n\n", 2)
    return {
        "id": "w",
        "question": question,
        "answer": gold.removeprefix("Gold answer: "),
        "long_cot": trace.removesuffix("\n"),
    }


@pytest.fixture(scope="module")
def judged(problem: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What the kit's own judge says about the same trace, by the command line."""
    folder = tmp_path_factory.mktemp("judge")
    (folder / "trace.jsonl").write_text(json.dumps(problem) + "\n")
    threshold = f"--threshold={walkthrough.THRESHOLD}"
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        code = palign.main(["judge", str(folder / "trace.jsonl"), threshold, "--json"])
    assert code == 0
    [trace] = json.loads(output.getvalue())["traces"]
    return trace


@pytest.mark.slow
def test_its_verdicts_and_its_cut_are_the_kits(printed: dict[str, str], judged: dict) -> None:
    verdicts = VERDICT.findall(printed["3"])
    assert [int(k) for k, *_ in verdicts] == [v["sentences"] for v in judged["verdicts"]]
    assert [label for *_, label in verdicts] == [v["label"] for v in judged["verdicts"]]
    for (_, _, margin, _), verdict in zip(verdicts, judged["verdicts"], strict=True):
        assert float(margin) == pytest.approx(verdict["margin"], abs=1e-3)
    assert int(printed["kept"]) == judged["kept"]
    assert int(verdicts[0][1]) == judged["sentences"]


@pytest.mark.slow
def test_it_shows_both_labels_and_a_cut_inside_the_trace(judged: dict) -> None:
    assert {verdict["label"] for verdict in judged["verdicts"]} == {"ENOUGH", "NOT_ENOUGH"}
    assert 1 < judged["kept"] < judged["sentences"]


@pytest.mark.slow
def test_its_sentences_are_the_kits(printed: dict[str, str], problem: dict[str, str]) -> None:
    lines = printed["2"].strip().splitlines()
    shown = [line.split(maxsplit=1)[1] for line in lines]
    assert shown == [sentence.strip() for sentence in split(problem["long_cot"])]


def test_its_prompts_are_the_kits() -> None:
    words = bundled("prompts")
    fields = {"question": "What is {3} + 4?", "prefix": "First, \\boxed{3} + 4."}
    assert walkthrough.JUDGE.format(**fields) == prompts.fill(words["judge"], **fields)

    ours = Prompts(instruction=walkthrough.INSTRUCTION)
    draft = walkthrough.DRAFT.format(instruction=walkthrough.INSTRUCTION, **fields)
    assert draft == prompts.draft_text(ours, **fields)


def test_its_prompt_ids_are_the_kits() -> None:
    tokenizer: HfTokenizer = load_tokenizer("smollm2-135m")
    text = walkthrough.JUDGE.format(question="What is 3 + 4?", prefix="We add.\n\nSo 3 + 4 = 7. ")
    ids = walkthrough.prompt_ids(tokenizer.inner, text)
    assert tuple(ids) == prompts.render(tokenizer, text)


@pytest.mark.slow
def test_its_grades_are_the_kits(printed: dict[str, str], problem: dict[str, str]) -> None:
    grades = re.findall(r"^(correct|wrong): +(.+)$", printed["6"], flags=re.MULTILINE)
    assert {grade for grade, _ in grades} == {"correct", "wrong"}
    with Grader() as grader:
        for grade, text in grades:
            [own] = grader.grade([Item(problem["answer"], ast.literal_eval(text))])
            # The kit also takes an answer that a sentence names, without a box.
            if own.how.startswith("boxed"):
                assert (own.verdict == "correct") == (grade == "correct")
            else:
                assert grade == "wrong"


@pytest.mark.slow
def test_its_training_row_is_the_kits(
    printed: dict[str, str], problem: dict[str, str], judged: dict
) -> None:
    row = json.loads(printed["7"])
    assert row["instruction"] == walkthrough.INSTRUCTION
    assert row["input"] == problem["question"]

    prefix = "".join(split(problem["long_cot"])[: judged["kept"]])
    correct = re.search(r"^correct: (.+)$", printed["6"], flags=re.MULTILINE)
    assert correct is not None
    continuation = ast.literal_eval(correct[1])
    fields = {"id": "w", "question": problem["question"], "answer": problem["answer"]}
    aligned = AlignedRow(**fields, prefix=prefix, continuation=continuation)
    assert row["output"] == prompts.target("palign", aligned, continuation)


@pytest.mark.slow
def test_one_step_lowers_the_loss(printed: dict[str, str]) -> None:
    losses = re.search(r"loss before ([\d.]+), after ([\d.]+)", printed["8"])
    assert losses is not None
    assert 0 < float(losses[2]) < float(losses[1])


def test_of_the_kit_it_imports_only_the_data_and_the_converted_model() -> None:
    tree = ast.parse((ROOT / "kit" / "walkthrough.py").read_text(encoding="utf-8"))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("kit"):
            imported.add(node.module)
    assert imported == {"kit.models", "kit.synthetic"}
