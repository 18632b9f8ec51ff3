"""Pairwise comparison of reasoning: both orders, ties, flips and position bias."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict

import pytest

from kit.backends.scripted import ByteTokenizer, ScriptedBackend, ScriptedSession
from kit.core.config import ModelConfig, Prompts
from kit.core.errors import KitError
from kit.core.records import EvalRow, Sample
from kit.core.storage import RowFile
from kit.reporting import pairwise
from tests.conftest import ROOT
from tests.make_run import make


class Opinion(ScriptedSession):
    """Scores A, B and T by a rule on the two solutions shown."""

    def __init__(self, rule):
        super().__init__(0.0)
        self.rule = rule

    def score(self, requests):
        logprobs = []
        for request in requests:
            text = ByteTokenizer().decode(request.ids)
            first, second = text.split("Solution A:\n")[1].rstrip("\n").split("\n\nSolution B:\n")
            label = self.rule(first, second)
            [(position, candidates)] = request.reads
            assert position == len(request.ids) - 1
            logprobs.append([[0.0 if chr(c) == label else -2.5 for c in candidates]])
        return logprobs


class Judge(ScriptedBackend):
    def __init__(self, rule, context=None):
        super().__init__(ModelConfig(backend="scripted", model="none", context_tokens=context))
        self.rule = rule

    def session(self, uncached=False):
        return Opinion(self.rule)


def shorter(first, second):
    if len(first) == len(second):
        return "T"
    return "A" if len(first) < len(second) else "B"


def row(id, *texts, question="q?"):
    return EvalRow(
        id=id,
        question=question,
        answer="1",
        samples=tuple(Sample(text=t, verdict="correct") for t in texts),
    )


def compare_reasoning(judge, prompts, pairs):
    """Judge (id, first, second) triples."""
    first = [row(id, text) for id, text, _ in pairs]
    second = [row(id, text) for id, _, text in pairs]
    return pairwise.compare_reasoning(judge, prompts, first, second)


PAIRS = [
    ("p1", "short", "a good deal longer"),
    ("p2", "short", "longer too"),
    ("p3", "far too long", "short"),
    ("p4", "equal", "alike"),
]


def test_a_fair_judge_has_wins_and_ties_and_no_bias():
    test = compare_reasoning(Judge(shorter), Prompts(), PAIRS)
    assert test.pairs == 4
    assert (test.first, test.second, test.ties, test.flips) == (2, 1, 1, 0)
    assert test.first_shown_ratio == 0.5 and test.p_value == 1.0
    pair = {"id": "p1", "winner": "first", "verdicts": ("A", "B"), "margins": [2.5, 2.5]}
    assert asdict(test.rows[0]) == pair


def test_a_judge_that_always_takes_the_first_shown_wins_nothing_for_anyone():
    pairs = [(f"p{n}", "one", "two") for n in range(12)]
    test = compare_reasoning(Judge(lambda first, second: "A"), Prompts(), pairs)
    assert (test.first, test.second, test.flips) == (0, 0, 12)
    assert test.first_shown_ratio == 1.0 and test.position_p_value < 1e-6
    assert test.p_value == 1.0


def test_a_clear_preference_is_significant():
    pairs = [(f"p{n}", "x", "longer") for n in range(12)]
    test = compare_reasoning(Judge(shorter), Prompts(), pairs)
    assert test.first == 12 and test.p_value == pytest.approx(2 / 2**12)


def test_long_pairs_are_left_out_by_name():
    pairs = [*PAIRS, ("long", "x" * 3000, "y")]
    test = compare_reasoning(Judge(shorter, context=1000), Prompts(), pairs)
    assert test.too_long == ["long"] and test.pairs == 4


def test_no_pairs_is_no_preference():
    test = compare_reasoning(Judge(shorter), Prompts(), [])
    assert (test.pairs, test.first_shown_ratio, test.p_value) == (0, 0.5, 1.0)


def test_labels_must_differ_in_their_first_token():
    judge = Judge(shorter)
    judge.tokenizer = type(
        "Same", (ByteTokenizer,), {"encode": lambda self, text, special=True: [7]}
    )()
    with pytest.raises(KitError, match="begin with the same token"):
        compare_reasoning(judge, Prompts(), PAIRS)


def test_pairs_are_of_shared_problems():
    """The first answers to the same question under the same id, whatever the order of the rows."""
    first = [
        row("a", "x", "other"),
        row("b", "y"),
        row("c"),
        row("d", "x", question="another?"),
        row("e", "x"),
    ]
    second = [row("e"), row("d", "z"), row("b", "yy"), row("a", "x"), row("c", "v")]
    test = pairwise.compare_reasoning(Judge(shorter), Prompts(), first, second)
    assert [(pair.id, pair.winner) for pair in test.rows] == [("a", "ties"), ("b", "first")]


def test_compare_asks_a_real_judge(tmp_path):
    """SmolLM2-135M through llama.cpp and the command line: its own margins, shown on the page."""
    runs = [make(tmp_path / "a", seed=1), make(tmp_path / "b", seed=1, method="no-search")]
    # One problem of one dataset; the other file has lost its rows.
    for path in tmp_path.glob("*/eval/*.jsonl"):
        file = RowFile(path, EvalRow)
        file.write_all(file.read()[:1] if "builtin" in path.name else [])
    for path in tmp_path.glob("*/manifest.json"):
        manifest = json.loads(path.read_text())
        for score in manifest["stages"]["eval"]["summary"]["scores"]:
            score["n"] = int(score["dataset"] == "builtin")
        path.write_text(json.dumps(manifest))
    config = tmp_path / "judge.yaml"
    page = tmp_path / "page.html"
    config.write_text(
        "teacher: {backend: gguf, max_num_seqs: 1, context_tokens: 1024, n_threads: 2}\n"
    )
    command = [
        sys.executable,
        "palign.py",
        "compare",
        *runs,
        "--pairwise-judge",
        config,
        "--out",
        page,
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    [(name, test)] = json.loads(done.stdout)["quality"].items()
    assert name == "builtin" and test["pairs"] == 1
    assert test["first"] + test["second"] + test["ties"] + test["flips"] == 1
    assert all(margin > 0 for margin in test["rows"][0]["margins"])
    assert "Reasoning compared" in page.read_text(encoding="utf-8")
