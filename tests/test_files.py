"""`grade FILE`: our own rows, other projects' formats, labels, and the paper's grader beside
ours.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from kit.core.errors import KitError
from kit.grading.files import Source, grade_file
from kit.grading.outputs import Keys
from tests.conftest import ROOT


def write(path, *rows):
    path.write_text(
        "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in rows)
    )
    return path


def test_grade_the_published_outputs(real_data):
    """The paper's own outputs, 90 in the whole file: every released label agreed with."""
    path = real_data / "palign_aime24_published.jsonl"
    labels = [json.loads(line)["label"] for line in path.read_text("utf-8").splitlines()]
    samples = 3 * len(labels)
    accuracy = round(sum(map(sum, labels)) / samples, 4)
    pass_at_3 = round(sum(map(any, labels)) / len(labels), 4)
    assert samples < 90 or (accuracy, pass_at_3) == (0.1778, 0.2667)

    command = [sys.executable, "palign.py", "grade", str(path), "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    graded = json.loads(done.stdout)
    assert (graded["problems"], graded["samples"]) == (len(labels), samples)
    assert graded["accuracy"] == accuracy and graded["pass_at"]["3"] == pass_at_3
    assert graded["agreement"] == {"agree": samples, "of": samples}
    # the paper's way: the same labels
    assert graded["as_published"] == {
        "accuracy": accuracy,
        "pass_at": graded["pass_at"],
        "agreement": graded["agreement"],
    }
    assert graded["differ"] == [] and sum(graded["verdicts"].values()) == samples


def test_grade_reads_our_rows_and_others(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        {"answer": "8", "outputs": [r"\boxed{8}", r"\boxed{9}"], "labels": [1, 1]},
        {"gold": 8, "prediction": r"\boxed{8}", "label": True},
        {
            "answer": "6+2\n#### 8",
            "samples": [{"text": r"\boxed{7}", "verdict": "wrong"}],
            "sha": "x",
        },
    )
    found = grade_file(path)
    assert (found["problems"], found["samples"], found["verdicts"]) == (
        3,
        4,
        {"correct": 2, "wrong": 2},
    )
    assert found["agreement"] == {"agree": 3, "of": 4}
    [differ] = found["differ"]
    assert (differ["line"], differ["sample"], differ["verdict"], differ["answer"]) == (
        1,
        1,
        "wrong",
        "9",
    )
    assert (
        grade_file(
            write(tmp_path / "b.jsonl", {"answer": "B", "response": r"\boxed{(B)}"}), "choice"
        )["accuracy"]
        == 1
    )


@pytest.mark.parametrize(
    "line,words",
    [
        ('{"answer": "8", "outp', "line 2: broken JSON .Unterminated string"),
        ('{"output": "8"}', "line 2, .* no answer; its keys are 'output' .text."),
        (
            '{"answer": "8", "text_": "8"}',
            "line 2, .* no outputs that are text; .*'text_'.*outputs: samples outputs",
        ),
        ('{"answer": "8", "output": [1]}', "line 2, .* no outputs that are text"),
        ('{"answer": " ", "output": "8"}', "line 2, .* no answer"),
        ('{"answer": "8", "output": ["8", "9"], "label": [1]}', "2 outputs and 1 labels"),
        ("[1]", "line 2: .*list, not an object"),
    ],
)
def test_grade_names_the_line(tmp_path, line, words):
    path = write(tmp_path / "a.jsonl", {"answer": "8", "output": "8"}, line)
    with pytest.raises(KitError, match=words):
        grade_file(path)


def test_grade_names_the_file(tmp_path):
    for path in (tmp_path / "absent.jsonl", write(tmp_path / "empty.jsonl"), tmp_path):
        with pytest.raises(KitError, match=str(path)):
            grade_file(path)
    (tmp_path / "binary.jsonl").write_bytes(os.urandom(64) + b"\xff")
    with pytest.raises(KitError, match="binary"):
        grade_file(tmp_path / "binary.jsonl")


# Two problems, one output right and one wrong, as each project writes them.
FORMATS = {
    "lm-evaluation-harness": [
        {
            "doc_id": number,
            "doc": {"question": "Q?", "answer": "#### 8"},
            "target": "4 + 4 = 8\n#### 8",
            "arguments": {"gen_args_0": {"arg_0": "Q?", "arg_1": {"until": []}}},
            "resps": [[f"So it is {text}.\n#### {text}"]],
            "filtered_resps": [text],
            "filter": "strict-match",
            "metrics": ["exact_match"],
            "exact_match": label,
        }
        for number, (text, label) in enumerate((("8", 1.0), ("9", 0.0)))
    ],
    "lighteval": [
        {
            "doc": {"query": "Q?", "choices": ["7", "8"], "gold_index": [1]},
            "model_response": {"text": [f"$\\boxed{{{text}}}$"], "input": "Q?", "logprobs": []},
            "metric": {"extractive_match": label},
        }
        for text, label in (("8", 1.0), ("9", 0.0))
    ],
    "lighteval (old)": [
        {
            "example": "Q?",
            "full_prompt": "Q?",
            "predictions": [f"\\boxed{{{text}}}"],
            "gold": ["8"],
            "gold_index": [0],
            "metrics": {"extractive_match": label},
        }
        for text, label in (("8", 1), ("9", 0))
    ],
    "OpenCompass": {
        str(number): {
            "origin_prompt": [{"role": "HUMAN", "prompt": "Q?"}],
            "prediction": f"\\boxed{{{text}}}",
            "gold": "8",
            "correct": label,
        }
        for number, (text, label) in enumerate((("8", True), ("9", False)))
    },
    "Qwen2.5-Math": [
        {
            "idx": number,
            "question": "Q?",
            "gt_cot": "4 + 4 = 8",
            "gt": "8",
            "code": [f"\\boxed{{{text}}}"],
            "pred": [text],
            "report": [None],
            "score": [label],
        }
        for number, (text, label) in enumerate((("8", True), ("9", False)))
    ],
    "open-r1": [
        {
            "problem": "Q?",
            "solution": "4 + 4",
            "answer": "8",
            "generations": ["<think>\nHm.\n</think>\n\\boxed{8}", "<think>Hm.</think> \\boxed{9}"],
            "correctness_math_verify": [True, False],
            "is_reasoning_complete": [True, True],
        }
    ],
    "verl": [
        {"input": "Q?", "output": f"\\boxed{{{text}}}", "gts": "8", "score": label, "step": 0}
        for text, label in (("8", 1.0), ("9", -1.0))
    ],
    "NeMo-Skills": [
        {
            "problem": "Q?",
            "expected_answer": "8",
            "generation": f"\\boxed{{{text}}}",
            "predicted_answer": text,
            "symbolic_correct": label,
        }
        for text, label in (("8", True), ("9", False))
    ],
}


@pytest.mark.parametrize("name", FORMATS)
def test_files_of_other_projects_are_recognized(tmp_path, name):
    rows = FORMATS[name]
    path = tmp_path / "outputs.json"
    path.write_text(json.dumps(rows))
    graded = grade_file(path)
    assert (graded["samples"], graded["verdicts"]) == (2, {"correct": 1, "wrong": 1})
    assert graded["agreement"] == {"agree": 2, "of": 2}
    if isinstance(rows, list):
        assert grade_file(write(tmp_path / "outputs.jsonl", *rows))["agreement"]["agree"] == 2


def test_lighteval_details_are_read_from_parquet(tmp_path):
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "details.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(FORMATS["lighteval"]), path)
    assert grade_file(path)["agreement"] == {"agree": 2, "of": 2}


def test_vllm_batch_outputs_take_their_golds_from_another_file(tmp_path):
    rows = []
    for number, text in enumerate(("8", "9")):
        message = {"role": "assistant", "content": f"\\boxed{{{text}}}"}
        body = {"id": "chat-1", "choices": [{"index": 0, "message": message}]}
        response = {"status_code": 200, "body": body}
        rows.append({"id": "x", "custom_id": f"q{number}", "response": response, "error": None})
    outputs = write(tmp_path / "batch.jsonl", *rows)
    golds = write(tmp_path / "gold.jsonl", {"id": "q0", "answer": 8}, {"id": "q1", "answer": 8})
    graded = grade_file(Source(outputs, gold=golds, on="custom_id=id"))
    assert graded["verdicts"] == {"correct": 1, "wrong": 1} and graded["agreement"] is None
    with pytest.raises(KitError, match="no row whose custom_id=id is 'q1'"):
        grade_file(Source(outputs, gold=write(golds, {"id": "q0", "answer": 8}), on="custom_id=id"))
    # an answer twice is none too many, two different ones are
    twice = [{"id": "q0", "answer": 8}, {"id": "q1", "answer": 8}, {"id": "q1", "answer": 8}]
    grade_file(Source(outputs, gold=write(golds, *twice), on="custom_id=id"))
    twice[2] = {"id": "q1", "answer": 9}
    with pytest.raises(KitError, match=r"line 3: a second, other answer for id 'q1'"):
        grade_file(Source(outputs, gold=write(golds, *twice), on="custom_id=id"))


def test_keys_may_be_named(tmp_path):
    row = {"meta": {"truth": "8"}, "runs": [{"out": "\\boxed{8}"}, {"out": "8"}], "ok": [1, 0]}
    keys = Keys("meta.truth", "runs.out", "ok")
    graded = grade_file(Source(write(tmp_path / "a.jsonl", row), keys))
    assert graded["verdicts"] == {"correct": 1, "unparsed": 1}
    assert graded["agreement"] == {"agree": 2, "of": 2}


def test_a_missing_verdict_is_no_label_and_a_null_output_stops_nothing(tmp_path):
    rows = [
        {"answer": "8", "samples": [{"text": "\\boxed{8}", "verdict": None}, {"text": None}]},
        {"answer": "8", "output": None},
        {"answer": "8", "output": "\\boxed{8}", "label": 3},
        {"answer": "8", "output": "\\boxed{8}", "label": "right"},
    ]
    graded = grade_file(write(tmp_path / "a.jsonl", *rows))
    assert graded["verdicts"] == {"correct": 3, "unparsed": 2} and graded["agreement"] is None


def test_extracted_answers_need_bare_and_are_asked_for_it(tmp_path):
    path = write(tmp_path / "a.jsonl", {"answer": "1/2", "output": ["\\frac12", "0.4", None]})
    assert "--bare" in grade_file(path)["note"]
    graded = grade_file(Source(path, bare=True))
    assert graded["verdicts"] == {"correct": 1, "wrong": 1, "unparsed": 1} and "note" not in graded


def test_a_row_may_name_its_verifier(tmp_path):
    rows = [
        {"answer": "B", "output": "The answer is B.", "verifier": "choice"},
        {"answer": "Paris", "output": "Answer: Paris", "verifier": "text"},
        {"answer": "8", "output": "Answer: 8"},
    ]
    assert grade_file(write(tmp_path / "a.jsonl", *rows))["accuracy"] == 1


def test_the_papers_grader_takes_the_last_number_and_ours_does_not(tmp_path):
    graded = grade_file(write(tmp_path / "a.jsonl", {"answer": "8", "output": "I tried 7, then 8"}))
    assert (graded["accuracy"], graded["as_published"]["accuracy"]) == (0, 1)
