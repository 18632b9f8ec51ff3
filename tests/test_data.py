"""Loading: each format, each kind of bad input, subsets, holdouts, and what is on both
sides.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from kit import data, formats
from kit.core import config as configs
from kit.core.bundled import bundled
from kit.core.config import Config, DatasetConfig, dump, resolve
from kit.core.errors import KitError
from kit.core.records import Problem
from kit.grading.answers import Grader, Item
from tests.conftest import ROOT

QA = [{"question": f"How much is {i} and {i}?", "answer": str(2 * i)} for i in range(1, 21)]


def write(folder: Path, rows: list[Any], name: str = "rows.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(source: DatasetConfig, seed: int) -> list[Problem]:
    return data.subset(data.read(source, seed).problems, source, seed)


def one(folder: Path, row: dict[str, Any], **source: Any) -> Problem:
    return load(DatasetConfig(path=write(folder, [row]), **source), 0)[0]


def configured(train: Any, evals: Any, **more: Any) -> Config:
    return resolve({"data": {"train": train, "eval": evals}, **more}, "test")


def test_gsm8k(tmp_path: Path) -> None:
    worked = "He has 1,000 * 8 = <<1000*8=8000>>8000.\nThat is all.\n#### 8,000"
    problem = one(tmp_path, {"question": "How many?", "answer": worked})
    assert problem.answer == "8000"
    assert (
        problem.solution == "He has 1,000 * 8 = 8000.\nThat is all.\nThe answer is \\boxed{8000}."
    )


def test_math_takes_the_box_where_there_is_no_answer(tmp_path: Path) -> None:
    row = {
        "problem": "Solve.",
        "solution": "So it is $\\boxed{\\frac{1}{2}}$.",
        "level": 2,
        "type": "Algebra",
    }
    problem = one(tmp_path, row)
    assert (problem.answer, problem.level, problem.subject) == ("\\frac{1}{2}", "2", "Algebra")
    assert one(tmp_path, {**row, "answer": "0.5"}).answer == "0.5"


def test_aime(tmp_path: Path) -> None:
    for key in ("problem", "question", "Problem"):
        problem = one(tmp_path, {"ID": "2024-I-1", key: "Find it.", "Answer": 204})
        assert (problem.id, problem.question, problem.answer) == ("2024-I-1", "Find it.", "204")
    assert one(tmp_path, {"problem": "Find it.", "answer": 27.0}).answer == "27"
    assert one(tmp_path, {"problem": "Find it.", "answer": -0.5}).answer == "-0.5"


def test_s1k(tmp_path: Path) -> None:
    row = {
        "question": "Q?",
        "solution": "144",
        "deepseek_thinking_trajectory": "Okay. So 144.",
        "cot_type": "math",
    }
    problem = one(tmp_path, row)
    assert (problem.answer, problem.trace) == ("144", "Okay. So 144.")
    assert one(tmp_path, {**row, "solution": "Long, then \\boxed{7}."}).answer == "7"


def test_fields_and_unknown_keys(tmp_path: Path) -> None:
    row = {"Frage": "Wie viel?", "gold": "3", "nr": 17, "thinking": "Hm. 3."}
    fields = {"question": "Frage", "answer": "gold", "id": "nr", "trace": "thinking"}
    problem = one(tmp_path, row, fields=fields)
    assert problem == Problem(id="17", question="Wie viel?", answer="3", trace="Hm. 3.")
    with pytest.raises(
        KitError,
        match=r"no question in any key of 'Frage' \(text\), 'gold' \(text\), 'nr' .*fields=",
    ):
        one(tmp_path, row)
    with pytest.raises(
        KitError, match=r"fields.answer names 'golden'.*Did you mean 'gold'\?.*'nr'"
    ):
        one(tmp_path, row, fields={**fields, "answer": "golden"})
    with pytest.raises(KitError, match=r"data\.train\.fields\.antwort.*'question', 'answer'"):
        configured({"path": "x", "fields": {"antwort": "gold"}}, "builtin")


@pytest.mark.parametrize("name", ["gsm8k_train_1000", "gsm8k_test", "math500"])
def test_real_files_load_whole(real_data: Path, name: str) -> None:
    path = real_data / f"{name}.jsonl"
    size = path.read_bytes().count(b"\n")
    reading = data.read(DatasetConfig(path=str(path)), 0)
    assert (reading.name, len(reading.problems), reading.rejected) == (name, size, [])
    assert len({problem.id for problem in reading.problems}) == size >= 3
    assert all("<<" not in str(p.solution) and "####" not in p.answer for p in reading.problems)


def test_real_traces_load_whole(real_data: Path, real_traces: list[dict[str, str]]) -> None:
    source = DatasetConfig(path=str(real_data / "long_cot_aime24.jsonl"))
    reading = data.read(source, 0, traces=True)
    read = {problem.id: problem.trace for problem in reading.problems}
    assert read == {row["id"]: row["long_cot"] for row in real_traces}
    assert min(len(str(trace)) for trace in read.values()) > 900


@pytest.mark.parametrize(
    "mangle",
    [lambda b: b"\xef\xbb\xbf" + b, lambda b: b.replace(b"\n", b"\r\n"), lambda b: b"\n\n" + b],
)
def test_marks_of_other_systems(tmp_path: Path, mangle: Any) -> None:
    path = Path(write(tmp_path, QA))
    plain = load(DatasetConfig(path=str(path)), 0)
    path.write_bytes(mangle(path.read_bytes()))
    assert load(DatasetConfig(path=str(path)), 0) == plain


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (
            b'{"question": "a", "answer": "1"}\n' * 811 + b'{"question": "b", "ans',
            "line 812: broken JSON",
        ),
        (b'{"question": "a", "answer": "1"}\n[1, 2]\n', "line 2: broken JSON .list, not an object"),
        (b'{"question": "a", "answer": "1"}\n\n3\n', "line 3: broken JSON .int, not an object"),
        (b'{"question": "a", "answer": "1"}\n{"question": "\xff"}', "line 2: broken text, not"),
        (b"[" * 100_000, "line 1: broken JSON"),
        (b"[]", "is empty"),
        (b"{}", "is empty"),
        (b'[{"question": "a", "answer": "1"}, null]', "row 2: broken JSON .NoneType"),
        (b'[{"question": "a", "answer": "1"},\n{"question": \x00}]', "line 2: broken JSON"),
        (b'{\n"data": [\n{"question": "a" "answer"}]}', "line 3: broken JSON"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "git lfs pull"),
        (
            b'{"question": "", "answer": "1"}',
            r"none of 1 rows is usable. The first: .*line 1: no question in 'question' .text.",
        ),
    ],
)  # fmt: skip
def test_files_that_cannot_be_used(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(KitError, match=said) as caught:
        load(DatasetConfig(path=str(path)), 0)
    assert "bad.jsonl" in str(caught.value)


@pytest.mark.parametrize(
    "path",
    ["missing.jsonl", "./missing", "/nowhere/x.json", "a b c", "\0", "x" * 5000, "", ".", "~0"],
)
def test_paths_that_lead_nowhere(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KitError):
        load(DatasetConfig(path=path), 0)


def test_hub_out_of_reach_says_what_was_tried() -> None:
    with pytest.raises(
        KitError,
        match=r"openai/gsm8k \(no such file; asked the hub\).*'main'.*'train'.*data.train=FILE",
    ):
        load(DatasetConfig(path="openai/gsm8k", subset="main"), 0)


def test_rows_that_lack_something_are_set_aside(tmp_path: Path) -> None:
    bad: list[dict[str, Any]] = [
        {"question": "No answer?"},
        {"question": "Empty?", "answer": " "},
        {"answer": "1"},
    ]
    bad += [
        {"id": "l", "question": "A list?", "answer": [["1"]]},
        {"question": "Truth?", "answer": True},
    ]
    bad += [
        {"question": "Nan?", "answer": float("nan")},
        {"question": "HOW much  is 1 and 1?", "answer": "2"},
    ]
    bad += [
        {"id": 7, "question": "One seven?", "answer": "7"},
        {"id": "7", "question": "Another?", "answer": "7"},
    ]
    reading = data.read(DatasetConfig(path=write(tmp_path, [*QA, *bad])), 0)
    assert len(reading.problems) == 21
    assert Counter(gone["reason"].split(" in ")[0] for gone in reading.rejected) == {
        "no answer": 5,
        "no question": 1,
        "duplicate id or text": 2,
    }
    assert reading.rejected[3]["id"] == "l" and "line 24" in reading.rejected[3]["detail"]
    assert reading.rejected[-1]["detail"].endswith(
        "line 29: duplicate id or text: already in line 28"
    )
    assert reading.rejected[-2]["detail"].endswith("already in line 1")


def test_lone_surrogates_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"question": "a \\ud83d b \\ud83d\\ude00?", "answer": "1"}\n')
    assert load(DatasetConfig(path=str(path)), 0)[0].question == "a \ufffd b \U0001f600?"


def test_ids_are_stable(tmp_path: Path) -> None:
    here = load(DatasetConfig(path=write(tmp_path, QA), name="set"), 0)
    there = load(DatasetConfig(path=write(tmp_path, QA[::-1], "other.jsonl"), name="set"), 1)
    assert {p.id: p.question for p in here} == {p.id: p.question for p in there}
    assert all(p.id.startswith("set-") for p in here)


def test_subsets(tmp_path: Path) -> None:
    path = write(tmp_path, QA)
    every = load(DatasetConfig(path=path), 0)
    assert load(DatasetConfig(path=path, limit=5), 9) == every[:5]
    chosen = load(DatasetConfig(path=path, limit=5, seed=1), 9)
    assert chosen == load(DatasetConfig(path=path, limit=5, seed=1), 0) != every[:5]
    assert chosen == [p for p in every if p in chosen]
    assert chosen != load(DatasetConfig(path=path, limit=5, seed=2), 9)
    assert len(load(DatasetConfig(path=path, limit=50), 0)) == 20


def test_strata_keep_their_shares(tmp_path: Path) -> None:
    rows = [
        {**QA[0], "question": f"{i}?", "level": "a" if i < 60 else "b" if i < 93 else "c"}
        for i in range(100)
    ]
    path = write(tmp_path, rows)
    for limit, wanted in ((100, (60, 33, 7)), (10, (6, 3, 1)), (20, (12, 7, 1)), (1, (1, 0, 0))):
        taken = load(DatasetConfig(path=path, limit=limit, stratify="level"), 3)
        assert tuple(Counter(p.level for p in taken)[name] for name in "abc") == wanted
    once = load(DatasetConfig(path=path, limit=10, stratify="level"), 3)
    assert once == load(DatasetConfig(path=path, limit=10, stratify="level"), 3)
    assert once != load(DatasetConfig(path=path, limit=10, stratify="level"), 4)
    for wrong in ("subject", "lvl"):
        with pytest.raises(KitError, match=f"no {wrong} to stratify by"):
            load(DatasetConfig(path=path, limit=10, stratify=wrong), 3)


def test_holdout_is_what_training_leaves(tmp_path: Path) -> None:
    path = write(tmp_path, QA)
    loaded = data.load_all(configured({"path": path, "limit": 8}, {"path": "holdout", "limit": 6}))
    train, held = {p.id for p in loaded.train}, {p.id for p in loaded.evals["holdout"]}
    assert (len(train), len(held)) == (8, 6) and not train & held
    again = data.load_all(
        configured({"path": path, "limit": 8}, {"path": "holdout", "limit": 6, "seed": 1})
    )
    assert {p.id for p in again.train} == train and {p.id for p in again.evals["holdout"]} != held
    whole = data.load_all(configured({"path": path, "limit": 8}, "holdout")).evals["holdout"]
    assert len(whole) == 12
    with pytest.raises(KitError, match="Nothing is left for the holdout"):
        data.load_all(configured(path, "holdout"))


def test_builtin_problems_hold_out_by_themselves() -> None:
    train = {"path": "builtin", "limit": 30, "steps": [2, 2]}
    loaded = data.load_all(configured(train, {**train, "limit": 20}))
    assert {p.level for p in loaded.evals["builtin"]} == {"2"} and len(
        loaded.evals["builtin"]
    ) == 20
    assert not {p.question for p in loaded.train} & {p.question for p in loaded.evals["builtin"]}
    with pytest.raises(KitError, match=r"Nothing is left.*data\.eval=builtin"):
        data.load_all(configured(train, "holdout"))
    with pytest.raises(KitError, match="1 to 4 steps"):
        load(DatasetConfig(steps=(0, 2)), 0)


def test_a_question_on_both_sides_is_refused(tmp_path: Path) -> None:
    train = write(
        tmp_path,
        [*QA[:5], {"id": "mine", "question": "What is\n it, then?", "answer": "1"}],
        "train.jsonl",
    )
    held = write(
        tmp_path,
        [*QA[5:9], {"id": "theirs", "question": "what IS it, then? ", "answer": "1"}],
        "held.jsonl",
    )
    with pytest.raises(KitError, match=r"1 question.*'mine' in train is 'theirs' in held"):
        data.load_all(configured(train, held))
    assert data.load_all(configured(train, held, stop_after="train")).evals == {}


def test_near_duplicates_are_counted(tmp_path: Path) -> None:
    text = (
        "Natalia sold {} clips to her friends in April and then she sold half as many of them "
        "in the month of May"
    )
    far = {
        "question": "A train leaves the station at noon and arrives somewhere else in the evening.",
        "answer": "1",
    }
    train = write(
        tmp_path, [{"id": "a", "question": text.format(48), "answer": "1"}, far], "train.jsonl"
    )
    held = write(
        tmp_path,
        [{"id": "b", "question": text.format(50) + "!", "answer": "1"}, QA[0]],
        "held.jsonl",
    )
    assert data.load_all(configured(train, held)).facts["evals"]["held"]["near_duplicates"] == 1


def test_near_duplicates_equal_the_plain_comparison() -> None:
    from kit.synthetic import generate

    first, second = generate(150, 0, steps=(1, 2)), generate(150, 0, held_out=True, steps=(1, 2))
    second += [
        p.model_copy(update={"question": p.question.replace("How many", "So how many")})
        for p in first[:20]
    ]
    grams = {p.id: data._grams(p.question) for p in [*first, *second]}
    plain = [
        b.id
        for b in second
        if any(len(grams[a.id] & grams[b.id]) >= data.NEAR_RATIO * len(grams[b.id]) for a in first)
    ]
    assert len(plain) >= 15 and data.near_duplicates(first, second) == plain


def test_names_of_evaluation_sets_are_unique(tmp_path: Path) -> None:
    held = write(tmp_path, QA, "held out!.jsonl")
    evals = [{"path": held, "limit": 3}, {"path": held, "limit": 4, "name": "a/second"}]
    assert set(data.load_all(configured("builtin", evals)).evals) == {"held-out", "a-second"}
    with pytest.raises(KitError, match=r"Two sources of data\.eval are called held-out"):
        data.load_all(configured("builtin", [held, held]))


def test_facts_are_for_the_manifest(tmp_path: Path) -> None:
    loaded = data.load_all(configured(write(tmp_path, [*QA, {"question": "?"}]), "builtin"))
    assert json.loads(json.dumps(loaded.facts)) == loaded.facts
    assert (
        loaded.facts["train"]["rows"] == 20
        and loaded.facts["train"]["rejected"] == len(loaded.rejected) == 1
    )
    print_ = loaded.facts["train"]["fingerprint"]
    assert (
        data.load_all(configured(write(tmp_path, QA[1:]), "builtin")).facts["train"]["fingerprint"]
        != print_
    )


def test_traces_from_a_file_stand_alone(tmp_path: Path) -> None:
    rows = [{**QA[0], "id": f"t{i}", "long_cot": f"Hm. {i}."} for i in range(4)]
    path = write(tmp_path, [*rows, {**QA[1], "id": "none"}], "traces.jsonl")
    teacher = {"backend": "file", "path": path}
    config = configured({"path": "no/such", "limit": 3}, "builtin", teacher=teacher)
    assert [p.trace for p in data.load_traces(config)] == ["Hm. 0.", "Hm. 1.", "Hm. 2."]
    loaded = data.load_all(config)
    assert loaded.train == data.load_traces(config) and len(loaded.rejected) == 1
    assert loaded.rejected[0]["reason"] == (
        "no trace in any key of 'question' (text), 'answer' (text), 'id' (text)"
    )
    mapped = configured({}, "builtin", teacher={**teacher, "fields": {"trace": "question"}})
    assert data.load_traces(mapped)[0].trace == QA[0]["question"]
    with pytest.raises(KitError, match="appear in both training and evaluation"):
        data.load_all(configured({}, write(tmp_path, QA), teacher=teacher))


def test_traces_of_the_training_source(tmp_path: Path) -> None:
    row = {"question": "Q?", "solution": "144", "deepseek_thinking_trajectory": "Okay. So 144."}
    config = configured(write(tmp_path, [row]), "builtin", teacher={"backend": "file"})
    assert [p.trace for p in data.load_traces(config)] == ["Okay. So 144."]
    with pytest.raises(KitError, match=r"teacher.path=FILE"):
        data.load_traces(configured({}, "builtin", teacher={"backend": "file"}))


def test_a_question_is_made_from_several_keys(tmp_path: Path) -> None:
    row = {"Body": "He has 3 apples.", "Question": "How many?", "Answer": 3.0}
    problem = one(tmp_path, row, fields={"question": "{Body} {Question}"})
    assert (problem.question, problem.answer) == ("He has 3 apples. How many?", "3")
    # half a question is none
    reading = data.read(
        DatasetConfig(
            path=write(tmp_path, [row, {**row, "Body": " ", "Question": "What?"}]),
            fields={"question": "{Body} {Question}"},
        ),
        0,
    )
    assert len(reading.problems) == 1 and "no question" in reading.rejected[0]["reason"]


@pytest.mark.parametrize(
    ("options", "lines"),
    [
        (["red", "blue"], "A) red\nB) blue"),
        ({"A": "red", "B": "blue"}, "A) red\nB) blue"),
        (["A)red", "B)blue"], "A)red\nB)blue"),
        ("A) red B) blue", "A) red B) blue"),
        ({"text": ["red", "blue"], "label": ["A", "B"]}, "A) red\nB) blue"),
    ],
)
def test_options_become_lettered_lines(tmp_path: Path, options: Any, lines: str) -> None:
    row = {"question": "Which?", "options": options, "answer": "B"}
    problem = one(tmp_path, row, fields={"question": "{question}\n{options}"})
    assert (problem.question, problem.answer) == (f"Which?\n{lines}", "B")


def test_an_answer_may_be_an_index_a_list_or_nested(tmp_path: Path) -> None:
    row = {"question": "Which?", "choices": ["red", "blue"], "answer": 1}
    template = {"question": "{question}\n{choices}"}
    assert one(tmp_path, row, fields=template).answer == "B"
    with pytest.raises(KitError, match=r"no answer in 'answer' .number."):
        one(tmp_path, {**row, "answer": 2}, fields=template)
    assert one(tmp_path, {"question": "Q?", "answer": ["$1$", "$2$"]}).answer == "$1$, $2$"
    nested = {"question": "Q?", "reward_model": {"ground_truth": "7"}, "all": [{"x": "8"}]}
    assert one(tmp_path, nested, fields={"answer": "reward_model.ground_truth"}).answer == "7"
    assert one(tmp_path, nested, fields={"answer": "all.0.x"}).answer == "8"


@pytest.mark.parametrize(
    ("answer", "letter"),
    [(1, "B"), ("1", "B"), ("B", "B"), ("(B)", "B"), ("b", "B"), ("blue", "B"), ("A and B", "AB")],
)
def test_the_answer_to_a_choice_is_an_options_letter(
    tmp_path: Path, answer: Any, letter: str
) -> None:
    row = {"question": "Which?", "choices": ["red", "blue"], "answer": answer}
    template = {"question": "{question}\n{choices}"}
    assert one(tmp_path, row, fields=template, verifier="choice").answer == letter


@pytest.mark.parametrize(
    ("choices", "answer", "letter"),
    [
        # ARC: the options have labels of their own, sometimes numbers
        ({"text": ["water", "oxygen", "iron"], "label": ["1", "2", "3"]}, "2", "B"),
        ({"text": ["water", "oxygen", "iron"], "label": ["A", "B", "C"]}, "B", "B"),
        # options that are numbers: the text goes before an index that is out of range
        (["2", "8", "5"], "8", "B"),
        ([4, 8, 16], 8, "B"),
        # MMLU: the index of an option that is text
        (["0", "4", "2", "6"], 1, "B"),
        (["0", "4", "2", "6"], 2, "C"),
        ({"A": "x", "B": "y", "label": 5}, "B", "B"),
        # both at once, by text and by index: nobody can tell
        (["1", "2", "3", "4"], "2", None),
        ([0, 2, 1, 3], 2, None),
        # and where they say the same
        (["0", "1", "2"], "1", "B"),
        ([0, 1, 2], 1, "B"),
    ],
)
def test_an_answer_among_options_that_are_numbers(
    tmp_path: Path, choices: Any, answer: Any, letter: str | None
) -> None:
    row = {"question": "Which?", "choices": choices, "answer": answer}
    template = {"question": "{question}\n{choices}"}
    if letter:
        assert one(tmp_path, row, fields=template, verifier="choice").answer == letter
    else:
        with pytest.raises(KitError, match=r"names none of the options, or two") as caught:
            one(tmp_path, row, fields=template, verifier="choice")
        assert "looks like" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "fields", "said"),
    [
        ({"q": ["One?", "Two?"], "answer": "1"}, {"question": "q"}, "'q' holds 2 values"),
        ({"q": ["One?", "Two?"], "answer": "1"}, {"question": "{q.0} {n}"}, "names 'n'"),
        (
            {"messages": [{"content": "You are."}, {"content": "One?"}], "answer": "1"},
            {"question": "messages.content"},
            "'messages.content' holds 2 values",
        ),
        ({"question": ["One?", "Two?"], "answer": ["1", "2"]}, {}, "'question' holds 2 values"),
    ],
)
def test_several_texts_are_never_glued_into_one(
    tmp_path: Path, row: Any, fields: Any, said: str
) -> None:
    with pytest.raises(KitError, match=said):
        one(tmp_path, row, fields=fields)
    first = {"question": "messages.1.content"} if "messages" in row else {"question": "q.0"}
    if fields:
        assert one(tmp_path, row, fields=first).question == "One?"


def test_openr1s_trace_is_the_first_that_was_found_right(tmp_path: Path) -> None:
    """As in the hub's rows: several generations, of which the first may be wrong or cut off."""
    row = {
        "problem": "7 times 7?",
        "answer": "49",
        "solution": "It is $\\boxed{49}$.",
        "problem_type": "Algebra",
        "uuid": "u1",
        "generations": ["<think>\nSo 3", "<think>\nSo 49.</think>\n\n\\boxed{49}"],
        "correctness_math_verify": [False, True],
    }
    wrong = {**row, "uuid": "u2", "problem": "8 times 8?", "correctness_math_verify": [False, None]}
    source = DatasetConfig(path=write(tmp_path, [row, wrong]), preset="openr1-math")
    reading = data.read(source, 0, traces=True)
    assert [problem.trace for problem in reading.problems] == [row["generations"][1]]
    assert [rejected["id"] for rejected in reading.rejected] == ["u2"]
    # no flags: the first; flags that are no list, or no truths: none
    for flags, trace in ((None, "<think>\nSo 3"), (True, None), (["false", "true"], None)):
        changed = {**row, "uuid": "u0", "correctness_math_verify": flags}
        path = write(tmp_path, [changed, row], "flags.jsonl")
        source = DatasetConfig(path=path, preset="openr1-math")
        traces = [problem.trace for problem in data.read(source, 0, traces=True).problems]
        assert traces == [trace] * bool(trace) + [row["generations"][1]]
    # without the preset its keys are not known, and the message names it
    bare = DatasetConfig(path=source.path)
    with pytest.raises(KitError, match=r"looks like openr1-math.*preset: openr1-math.*trace: KEY"):
        data.read(bare, 0, traces=True)


def test_a_context_may_be_several_texts_and_is_never_left_out(tmp_path: Path) -> None:
    row: dict[str, Any] = {"question": "How many?", "answer": "3", "context": ["He has 3.", "Red."]}
    template = {"question": "{context} {question}"}
    assert one(tmp_path, row, fields=template).question == "He has 3.\nRed. How many?"
    assert one(tmp_path, {**row, "context": None}, fields=template).question == "How many?"
    with pytest.raises(KitError, match="no question: nothing in context"):
        one(tmp_path, {**row, "context": [["He has 3."]]}, fields=template)


def test_braces_in_the_data_are_no_part_of_a_template(tmp_path: Path) -> None:
    row = {"question": "Is $\\bar{A}$ the set $\\sqrt{B}$?", "A": "yes", "B": "no", "answer": "B"}
    template = {"question": "{question}\nA) {A}\nB) {B}"}
    problem = one(tmp_path, row, fields=template, verifier="choice")
    assert problem.question == "Is $\\bar{A}$ the set $\\sqrt{B}$?\nA) yes\nB) no"


def test_the_exact_key_goes_before_another_case(tmp_path: Path) -> None:
    row = {"question": "2 and 2?", "Answer": "Because they make four.", "answer": "4"}
    assert one(tmp_path, row).answer == "4"
    assert one(tmp_path, row, fields={"answer": "Answer"}).answer == row["Answer"]


@pytest.mark.parametrize("mark", ["proof", "notfound", "NaN", "null"])
def test_a_mark_for_no_answer_is_no_answer(tmp_path: Path, mark: str) -> None:
    row = {"question": "Prove it.", "answer": mark}
    with pytest.raises(KitError, match="no answer in 'answer'"):
        one(tmp_path, row)
    assert one(tmp_path, row, verifier="text").answer == mark


def test_rows_set_aside_are_told(tmp_path: Path) -> None:
    rows = [
        {"question": f"{n}?", "answer": "1", "long_cot": "So 1." if n else ""} for n in range(5)
    ]
    path = write(tmp_path, rows)
    config = configured({"path": path}, "builtin", teacher={"backend": "file"})
    [warning] = data.load_all(config).warnings
    assert "1 of 5 rows are set aside, 1 because of: no trace in 'long_cot'" in warning
    # a trace under an unknown key: the role and the section that would name it
    limo = write(tmp_path, [{"question": "1?", "answer": "1", "solution": "So 1."}], "limo.jsonl")
    config = configured("builtin", "builtin", teacher={"backend": "file", "path": limo})
    with pytest.raises(KitError, match=r"teacher\.fields={trace: KEY}") as caught:
        data.load_all(config)
    assert "looks like" not in str(caught.value)


def test_a_choice_without_options_or_with_an_answer_among_none_is_set_aside(tmp_path: Path) -> None:
    whole: dict[str, Any] = {"question": "Which?", "choices": ["red", "blue"], "answer": "B"}
    rows = [whole]
    changes: list[dict[str, Any]] = [{"choices": []}, {"choices": None}]
    changes += [{"answer": "C"}, {"answer": "green"}, {"answer": 2}]
    for number, change in enumerate(changes):
        rows.append({**whole, "question": f"Which, {number}?", **change})
    source = DatasetConfig(
        path=write(tmp_path, rows),
        fields={"question": "{question}\n{choices}"},
        verifier="choice",
    )
    reading = data.read(source, 0)
    assert [problem.answer for problem in reading.problems] == ["B"]
    reasons = [row["reason"] for row in reading.rejected]
    missing = "no question: nothing in choices"
    unknown = "the answer names none of the options, or two of them"
    assert reasons == [missing, missing, unknown, unknown, unknown]
    # mathematics may speak of options without being a choice
    assert one(tmp_path, {"question": "Who?", "answer": "green"}, verifier="text").answer == "green"


ROWS = '{"question": "a?", "answer": "1"}, {"question": "b?", "answer": "2"}'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.json", f"[{ROWS}]".encode()),
        ("rows.json", f'{{"version": 1, "data": [{ROWS}]}}'.encode()),
        ("rows.json", f'{{\n  "version": 1,\n  "data": [\n{ROWS}]\n}}'.encode()),
        ("rows.json", f'{{"aime": [{ROWS}]}}'.encode()),
        ("rows.json", f"[{ROWS}]".replace("{", "{\n  ").encode("utf-16")),
        ("ROWS.JSONL", ROWS.replace("}, {", "}\n{").encode("utf-16")),
        ("rows.jsonl", ROWS.replace("}, {", "}\r\n\r\n{").encode("utf-8-sig")),
        ("rows.json", f'{{"x1": {ROWS}}}'.replace(", {", ', "x2": {').encode()),
        ("rows.csv", b"question,answer,,\na?,1,,\nb?,2,,\n"),
        ("ROWS.CSV", b"question,answer\na?,1\n\nb?,2\n"),
        ("rows.csv", "question,answer\r\na?,1\r\nb?,2\r\n".encode("utf-16")),
        ("rows.TSV", b'"question"\tanswer\n"a?"\t1\n"b?"\t2\n'),
    ],
)  # fmt: skip
def test_layouts_of_others(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    problems = load(DatasetConfig(path=str(tmp_path / name)), 0)
    assert [(problem.question, problem.answer) for problem in problems] == [
        ("a?", "1"),
        ("b?", "2"),
    ]


def test_a_file_of_traces_shows_what_its_traces_are(tmp_path: Path) -> None:
    rows: list[Any] = [
        {"question": "a?", "answer": "1", "long_cot": "So it is 1. " * 20},
        {"question": "b?", "answer": "2", "long_cot": "So 2."},
        {"question": "c?", "answer": "3"},
    ]
    described = data.describe(DatasetConfig(path=write(tmp_path, rows)))
    assert (described["usable"], described["with_trace"]) == (3, 2)
    shown = [problem["trace"] for problem in described["problems"]]
    assert shown[1:] == ["So 2.", None]
    assert shown[0].startswith("So it is 1. So") and shown[0].endswith("... (240 characters)")


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": "user", "value": "a?"}, {"from": "gpt", "value": "1"}]},
        {"question": "a?", "data": [{"x": 1}], "conversations": [{"value": "a?"}, {"value": "1"}]},
        {"question": {"value": "a?"}, "conversations": [{"value": "a?"}, {"value": "1"}]},
    ],
)
def test_one_row_is_a_row_like_others(tmp_path: Path, row: Any) -> None:
    fields = {"question": "conversations.0.value", "answer": "conversations.1.value"}
    assert one(tmp_path, row, fields=fields).question == "a?"
    for key in ("conversations.value", "conversations.7.value", "conversations.0.text"):
        with pytest.raises(KitError, match=r"names|holds 2 values"):
            one(tmp_path, row, fields={**fields, "question": key})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"question,answer,answer\na?,1,2\n", "line 1: .*two columns are called 'answer'"),
        (b"question,answer\na?,1\nquestion,answer\nb?,2\n", "line 3: .*the header again"),
        (b'question,answer\na?,1\n"b" x,3\n', "line 3: broken table"),
        (b"question,answer\na?,1\nb?,2,3\n", "line 3: .*2 columns in the header, 3 here"),
        (b"question,answer\na?\n", "line 2: .*2 columns in the header, 1 here"),
    ],
)
def test_broken_tables(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "bad.csv").write_bytes(content)
    with pytest.raises(KitError, match=said) as caught:
        load(DatasetConfig(path=str(tmp_path / "bad.csv")), 0)
    assert "the header's columns" in str(caught.value)


def test_a_column_may_be_longer_than_the_csv_modules_limit(tmp_path: Path) -> None:
    trace = "So 1. " * 50_000
    (tmp_path / "long.csv").write_text(f"question,answer,trace\na?,1,{trace}\n")
    source = DatasetConfig(path=str(tmp_path / "long.csv"))
    [problem] = data.read(source, 0, traces=True).problems
    assert problem.trace == trace


def test_a_gzip_file_damaged_in_its_middle(tmp_path: Path) -> None:
    import gzip

    content = bytearray(gzip.compress(Path(write(tmp_path, QA)).read_bytes()))
    content[30:40] = b"\xff" * 10
    (tmp_path / "bad.jsonl.gz").write_bytes(content)
    with pytest.raises(KitError, match=r"bad\.jsonl\.gz cannot be read .*decompressing"):
        load(DatasetConfig(path=str(tmp_path / "bad.jsonl.gz")), 0)


def test_an_unused_part_of_a_question_raises_a_warning(tmp_path: Path) -> None:
    rows = [{"question": "How many?", "body": "He has 3.", "choices": None, "answer": "3"}]
    path = write(tmp_path, rows)
    [warning] = data.read(DatasetConfig(path=path), 0).warnings
    assert "body" in warning and 'fields={question: "{body} {question}"}' in warning
    fields = {"question": "{body} {question}"}
    assert data.read(DatasetConfig(path=path, fields=fields), 0).warnings == []
    assert data.load_all(configured(path, "builtin")).warnings == [warning]


def test_a_preset_counts_in_a_resolved_config_too(tmp_path: Path) -> None:
    """A run's own config.yaml sets every key, the preset's among them at their defaults."""
    path = write(tmp_path, [{"ID": "1", "Body": "He has 3.", "Question": "How many?", "Answer": 3}])
    for evals in ({"path": path, "preset": "svamp"}, "gsm8k"):
        config = configured("builtin", evals)
        again = resolve(yaml.safe_load(dump(config)), "test")
        first, second = (formats.with_preset(c.data.eval[0]) for c in (config, again))
        assert first == second and first.verifier == "number"


def test_a_question_with_several_traces_is_one_problem_of_the_holdout(tmp_path: Path) -> None:
    rows = []
    for number in range(12):
        question = f"What is 3 + {number // 3}?"
        row = {"question": question, "answer": str(3 + number // 3), "trace": f"So {number}."}
        rows.append(row)
    path = write(tmp_path, rows)
    train = {"path": path, "limit": 3}
    loaded = data.load_all(configured(train, "holdout", teacher={"backend": "file"}))
    questions = [problem.question for problem in loaded.evals["holdout"]]
    assert len(set(questions)) == len(questions) == 3
    described = data.describe(DatasetConfig(path=path))
    assert (described["usable"], described["with_trace"], described["rejected"]) == (12, 12, [])


def test_a_long_number_is_no_index_and_a_label_without_its_text_is_none(tmp_path: Path) -> None:
    problem = one(tmp_path, {"question": "2^20000?", "answer": "1" * 5000, "verifier": "text"})
    assert problem.answer == "1" * 5000
    fields = {"question": "{q} {choices}", "answer": "key"}
    row = {"q": "?", "choices": {"text": ["a", "b"], "label": ["1", "2", "3"]}, "key": "3"}
    with pytest.raises(KitError, match="none of 1 rows is usable"):
        path = write(tmp_path, [row])
        data.read(DatasetConfig(path=path, fields=fields, verifier="choice"), 0)


def test_the_same_question_with_another_answer_is_set_aside(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "question": "How many?", "answer": "3"},
        {"id": "b", "question": "how  many?", "answer": "4"},
        {"id": "c", "question": "How many?", "answer": "3"},
    ]
    reading = data.read(DatasetConfig(path=write(tmp_path, rows)), 0)
    assert [problem.id for problem in reading.problems] == ["a", "c"]
    assert reading.rejected[0]["reason"] == "same question, different answer"
    assert reading.rejected[0]["detail"].endswith("already in line 1")
    # likewise of traces, of which a question may have many
    traces = [{**row, "trace": f"So {n}."} for n, row in enumerate(rows)]
    reading = data.read(DatasetConfig(path=write(tmp_path, traces)), 0, traces=True)
    assert [problem.id for problem in reading.problems] == ["a", "c"]


def test_other_formats_give_the_same_rows(tmp_path: Path) -> None:
    import csv
    import gzip

    import pyarrow
    from pyarrow import parquet

    text = json.dumps(QA, indent=1)
    (tmp_path / "rows.json").write_text(text)
    (tmp_path / "dict.json").write_text(json.dumps({"data": QA}))
    (tmp_path / "numbered.json").write_text(json.dumps({str(n): row for n, row in enumerate(QA)}))
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(Path(write(tmp_path, QA)).read_bytes()))
    for name, delimiter in (("rows.csv", ","), ("rows.tsv", "\t")):
        with open(tmp_path / name, "w", newline="") as out:
            table = csv.DictWriter(out, ["question", "answer"], delimiter=delimiter)
            table.writeheader()
            table.writerows(QA)
    parquet.write_table(pyarrow.Table.from_pylist(QA), tmp_path / "rows.parquet")
    plain = load(DatasetConfig(path=str(tmp_path / "rows.jsonl"), name="x"), 0)
    for path in sorted(tmp_path.iterdir()):
        assert load(DatasetConfig(path=str(path), name="x"), 0) == plain, path
    (tmp_path / "rows.xlsx").write_bytes(b"PK")
    with pytest.raises(KitError, match=r"format \.xlsx are not supported.*csv"):
        load(DatasetConfig(path=str(tmp_path / "rows.xlsx")), 0)


BENCHMARKS = {
    "svamp.jsonl": ("svamp", "145"),
    "asdiv.jsonl": ("asdiv", "9 (apples)"),
    "aqua.jsonl": ("aqua", "A"),
    "mmlu_stem.jsonl": ("mmlu-stem", "C"),
    "sat_math.jsonl": ("sat-math", "A"),
    "gaokao_math_qa.jsonl": ("gaokao-math-qa", "D"),
    "minerva_math.jsonl": ("minerva", "1.6"),
    "carp_en.jsonl": ("carp", "b ^ { 2 } - 9 a ^ { 2 }"),
    "mawps.jsonl": ("mawps", "43"),
    "amc23.jsonl": ("amc23", "27"),
    "olympiadbench.json": ("olympiadbench", "2"),
    "olympiadbench.jsonl": ("olympiadbench", "2"),
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmark_files_load_whole(real_data: Path, name: str) -> None:
    preset, first_answer = BENCHMARKS[name]
    path = real_data / "benchmarks" / name
    text = path.read_text(encoding="utf-8")
    rows = len(json.loads(text)) if path.suffix == ".json" else text.count("\n")
    source = DatasetConfig(path=str(path), preset=preset)
    described = data.describe(source, everything=True)
    assert (described["rows"], described["usable"], described["rejected"]) == (rows, rows, [])
    assert described["problems"][0]["answer"] == first_answer and "warnings" not in described
    if preset in ("aqua", "mmlu-stem", "sat-math", "gaokao-math-qa"):
        assert all(re.search(r"\bB[).:]", row["question"]) for row in described["problems"])
        assert {problem["answer"] for problem in described["problems"]} <= set("ABCDE")
    # without the preset: all of it, a warning, or an error that names the preset
    try:
        without = data.describe(DatasetConfig(path=source.path))
        assert preset in ("amc23", "minerva") or without["warnings"]
    except KitError as error:
        assert f"preset={preset}" in str(error)


@pytest.mark.parametrize(
    ("name", "verifier"), [("choice", "choice"), ("quantities", "number"), ("free-text", "judge")]
)
def test_the_rows_of_a_domains_config_are_whole_and_their_solutions_right(
    monkeypatch: pytest.MonkeyPatch, name: str, verifier: str
) -> None:
    monkeypatch.chdir(ROOT)
    config = configs.load(f"configs/{name}-mini.yaml")
    reading = data.read(config.data.train, 0)
    assert (len(reading.problems), reading.rejected, reading.warnings) == (96, [], [])
    assert {problem.verifier for problem in reading.problems} == {verifier}
    if verifier == "choice":
        assert all("\nD) " in problem.question for problem in reading.problems)
        assert {problem.answer for problem in reading.problems} == set("ABCD")
    # words are compared exactly where no model is asked
    how = "text" if verifier == "judge" else verifier
    problems = reading.problems
    right = [Item(row.answer, str(row.solution), how) for row in problems]
    wrong = []
    for row, other in pairwise(problems):
        if row.answer != other.answer:
            wrong.append(Item(row.answer, str(other.solution), how))
    with Grader() as grader:
        assert {grade.verdict for grade in grader.grade(right)} == {"correct"}
        assert {grade.verdict for grade in grader.grade(wrong)} == {"wrong"}


def test_a_preset_is_named_or_refused() -> None:
    source = data.with_preset(DatasetConfig(path="svamp"))
    assert (source.path, source.name, source.verifier) == ("ChilleD/SVAMP", "svamp", "number")
    assert data.with_preset(DatasetConfig(path="svamp", verifier="math")).verifier == "math"
    with pytest.raises(KitError, match=r"no preset 'swamp'.*svamp"):
        data.with_preset(DatasetConfig(path="x", preset="swamp"))
    for name, preset in bundled("presets").items():
        DatasetConfig(**preset, name=name)


def test_mutated_files_give_a_clear_message_or_the_right_rows(tmp_path: Path) -> None:
    """Keys renamed, types changed, rows cut, encodings broken: never half a question."""
    import random

    fields = {"question": "{body} {question}"}
    rows = [{**row, "body": f"Body {number}."} for number, row in enumerate(QA)]
    whole = {f"{row['body']} {row['question']}": row["answer"] for row in rows}
    for seed in range(100):
        rng = random.Random(seed)
        changed: list[Any] = [dict(row) for row in rows]
        victim = rng.choice(changed)
        key = rng.choice(["question", "answer", "body"])
        mutation = rng.randrange(4)
        if mutation == 0:
            victim[key + "_"] = victim.pop(key)
        if mutation == 1:
            victim[key] = rng.choice([None, "", [], {}, True, float("nan"), [[1]]])
        text = "".join(json.dumps(row) + "\n" for row in changed).encode()
        if mutation == 2:
            text = text[: rng.randrange(len(text))]
        if mutation == 3:
            place = rng.randrange(len(text))
            text = text[:place] + b"\xff" + text[place + 1 :]
        path = tmp_path / "mutated.jsonl"
        path.write_bytes(text)
        try:
            reading = data.read(DatasetConfig(path=str(path), fields=fields), 0)
        except KitError as error:
            assert "mutated.jsonl" in str(error)
            continue
        for problem in reading.problems:
            assert whole[problem.question] == problem.answer, (seed, problem)


def test_a_row_may_name_its_verifier_and_a_preset_gives_one(tmp_path: Path) -> None:
    rows = [
        {"question": "a?", "answer": "A", "verifier": "choice"},
        {"question": "b?", "answer": "1"},
    ]
    reading = data.read(DatasetConfig(path=str(write(tmp_path, rows)), verifier="number"), 0)
    assert [problem.verifier for problem in reading.problems] == ["choice", "number"]
    source = DatasetConfig(path=str(write(tmp_path, [rows[1]])), preset="gsm8k")
    assert data.read(source, 0).problems[0].verifier == "number"
    assert data.with_preset(source).samples == 1
