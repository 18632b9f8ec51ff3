"""Continuing, keeping, extending, and what each method trains on, with a scripted student."""

from __future__ import annotations

import json
from contextlib import contextmanager

import pytest

from kit.backends.base import Completion, Generation
from kit.backends.scripted import ScriptedBackend
from kit.core import config as configs
from kit.core.progress import Progress
from kit.core.records import AlignedRow, PrefixRow, Sample, TraceRow, TrainRow
from kit.core.run import Run
from kit.core.storage import RowFile
from kit.judging.sentences import ends
from kit.pipeline.align import align, continue_prefixes, holds_answer, longer, training_rows
from kit.prompts import BEGIN, END, target
from kit.sampling import Sampler

TRACE = (
    "We look at 12 ducks. Three fly off. That leaves 9 of them. Check: 9 + 3 = 12. "
    "So it is \\boxed{9}."
)


CONCLUDED = (
    "post-think",
    "first-correct",
    "binary-cut",
    "step-entropy",
    "no-verify",
    "mix-long-short",
)


def sample(verdict="correct", text="x", finish_reason="stop"):
    return Sample(text=text, verdict=verdict, finish_reason=finish_reason)


def prefix_row(id="a", kept=1, trace=TRACE, answer="9"):
    cuts = ends(trace)
    return PrefixRow(
        id=id,
        question=f"Question {id}?",
        answer=answer,
        trace=trace,
        end=cuts[kept - 1],
        sentences=kept,
        sentences_total=len(cuts),
        ratio=kept / len(cuts),
        sufficient=True,
    )


def make_run(folder, prefixes=(), **keys):
    raw = {"out": str(folder), "student": {"backend": "scripted", "model": "none"}, **keys}
    run = Run(configs.resolve(raw, "test"), Progress(quiet=True))
    if prefixes:
        run.begin("truncate", "input", lambda: "")
        RowFile(run.path("prefixes.jsonl"), PrefixRow).append(*prefixes)
        run.finish("truncate", len(prefixes), len(prefixes))
    return run


@contextmanager
def continuing(folder, right_from=0, **keys):
    """The student of a run, answering rightly from a round on."""
    with (
        make_run(folder, align=keys) as run,
        Sampler(run, run.config.student, run.config.align) as student,
    ):
        student.backend = Recorder(run.config.student, right_from)
        yield student


def trained_on(run):
    return [
        TrainRow.model_validate_json(line)
        for line in run.path("train.jsonl").read_bytes().splitlines()
    ]


class Recorder(ScriptedBackend):
    """Answers rightly from a given round on; keeps the prompts it was asked."""

    def __init__(self, engine, right_from=0, gold="9"):
        super().__init__(engine)
        self.right_from, self.gold, self.prompts = right_from, gold, {}

    def generate(self, requests):
        for request in requests:
            self.prompts[request.id] = self.tokenizer.decode(request.prompt)
            number = int(request.id.split("+")[1]) if "+" in request.id else 0
            answer = self.gold if number >= self.right_from else "-1"
            completions = tuple(
                Completion(f" sample {j} \\boxed{{{answer}}}", (1, 2), "stop")
                for j in range(request.n)
            )
            tokens = len(request.prompt)
            yield Generation(request.id, completions, tokens, tokens)


def test_extending_moves_the_cut_to_the_whole_trace_and_records_it(tmp_path):
    with continuing(tmp_path, right_from=2, extend_rounds=2, samples=3) as student:
        (row,) = continue_prefixes(student, [prefix_row()])
    cuts = ends(TRACE)
    assert (row.kept_by, row.lengthened, row.pass_rate) == ("first+2", 2, 3 / 9)
    # what the rounds before generated counts as well
    assert [sample.verdict for sample in row.earlier_samples] == ["wrong"] * 6
    assert row.processed_tokens == 9 * 2
    assert row.prefix == TRACE and sorted(student.backend.prompts) == ["a", "a+1", "a+2"]
    middle = student.backend.prompts["a+1"]
    assert TRACE[: cuts[2]] in middle and TRACE[: cuts[3]] not in middle, "even steps"


@pytest.mark.parametrize("kept", [1, 2, 4, 5])
@pytest.mark.parametrize("rounds", [1, 2, 3, 9])
def test_every_round_shows_more_and_the_last_one_all(kept, rounds):
    row = prefix_row(kept=kept)
    last = min(rounds, row.sentences_total - kept)
    cuts = [longer(row, number, rounds) for number in range(last + 1)]
    assert cuts[0] == row and [c.end for c in cuts] == sorted({c.end for c in cuts})
    assert not last or cuts[-1].end == len(TRACE)


def test_a_row_is_given_up_with_its_reason_and_never_kept_wrong(tmp_path):
    with continuing(tmp_path, right_from=99, extend_rounds=1, samples=2) as student:
        rows = list(continue_prefixes(student, [prefix_row("a"), prefix_row("b", kept=5)]))
    assert {row.id: row.lengthened for row in rows} == {"a": 1, "b": 0}, (
        "a whole trace cannot be lengthened"
    )
    assert all(
        r.rejected == "no right continuation" and "0 of 2 right" in r.detail and not r.continuation
        for r in rows
    )


@pytest.mark.parametrize("mode", ["prompt", "prefill"])
def test_the_draft_stands_in_the_prompt_unchanged(tmp_path, mode):
    with continuing(tmp_path, mode=mode) as student:
        (row,) = continue_prefixes(student, [prefix_row(kept=3)])
    prompt = student.backend.prompts["a"]
    assert TRACE.startswith(row.prefix) and row.prefix in prompt
    assert prompt.endswith(row.prefix) == (mode == "prefill"), (
        "prefilled to the last space; in the user turn otherwise"
    )


def test_the_stage_writes_alpaca_rows_and_every_row_has_one_outcome(tmp_path):
    answers = tmp_path / "answers.json"
    prefixes = [prefix_row(f"p{i}") for i in range(12)]
    answers.write_text(json.dumps({row.question: "9" for row in prefixes}))
    student = {"backend": "scripted", "model": str(answers)}
    with make_run(tmp_path / "run", prefixes, student=student) as run:
        align(run)
        rows = run.rows("aligned.jsonl", AlignedRow)
        lines = trained_on(run)
        stage = run.manifest["stages"]["align"]
    kept = [row for row in rows if not row.rejected]
    assert 0 < len(kept) < 12 and len(rows) == 12 and stage["rows_out"] == len(kept) == len(lines)
    for row, line in zip(kept, lines, strict=True):
        assert row.samples[0].verdict == "correct" and line.input == row.question
        assert line.output == f"{BEGIN}{row.prefix}{END}\n{row.continuation}" and TRACE.startswith(
            row.prefix
        )
    rejected = [
        json.loads(text) for text in (tmp_path / "run/rejected.jsonl").read_text().splitlines()
    ]
    assert {r["id"] for r in rejected} == {row.id for row in rows if row.rejected}
    assert all(r["reason"] and r["stage"] == "align" for r in rejected)


def test_an_edited_train_file_is_set_aside_and_told(tmp_path, capsys):
    with make_run(tmp_path, [prefix_row("a"), prefix_row("b")], method="prefix-only") as run:
        align(run)
        path = run.path("train.jsonl")
        whole = path.read_bytes()
        path.write_bytes(b"".join(whole.splitlines(keepends=True)[:1]))
        run.progress.quiet = False
        align(run)
        assert path.read_bytes() == whole
        [aside] = run.folder.glob("stale/*-train.jsonl")
    assert aside.read_bytes() == whole.splitlines(keepends=True)[0]
    assert (
        "train.jsonl was not what aligned.jsonl gives now; moved to stale/"
        in capsys.readouterr().err
    )


def test_keep_all_trains_on_each_right_continuation(tmp_path):
    with continuing(tmp_path, keep="all", samples=3) as student:
        lines = training_rows(student.run, list(continue_prefixes(student, [prefix_row()])))
    assert [line.output.split("\n")[1] for line in lines] == [
        f" sample {j} \\boxed{{9}}" for j in range(3)
    ]


@pytest.mark.parametrize(
    ("method", "wanted"),
    [
        ("palign", f"{BEGIN}pre{END}\ncont"),
        ("ratio-0.5", f"{BEGIN}pre{END}\ncont"),
        ("no-search", f"{BEGIN}pre{END}\ncont"),
        ("continuation-only", "cont"),
        ("prefix-only", f"{BEGIN}pre{END}\n\\boxed{{9}}"),
        ("label-only", "\\boxed{9}"),
        ("long-trace", "pre\n\n\\boxed{9}"),
        ("fixed-prefix-matched", f"{BEGIN}pre{END}\ncont"),
        *[(method, "pre\n\n\\boxed{9}") for method in CONCLUDED],
    ],
)
def test_each_method_has_its_own_target(method, wanted):
    row = AlignedRow(id="a", question="q", answer="9", prefix="pre", continuation="cont")
    assert target(method, row, "cont") == wanted


def test_a_kept_text_with_another_box_still_ends_in_the_gold_answer():
    row = AlignedRow(id="a", question="q", answer="9", prefix="In \\boxed{}: ", continuation="")
    assert target("no-verify", row, "") == "In \\boxed{}:\n\n\\boxed{9}"
    done = row.model_copy(update={"prefix": "So \\boxed{9}. "})
    assert target("no-verify", done, "") == "So \\boxed{9}. "


@pytest.mark.parametrize("method", ["label-only", "long-trace"])
def test_methods_without_a_cut_read_the_traces(tmp_path, method):
    row = TraceRow(
        id="t", question="q", answer="9", samples=(sample(text=TRACE), sample("wrong")), kept=(0,)
    )
    with make_run(tmp_path, method=method) as run:
        run.begin("teach", "input", lambda: "")
        RowFile(run.path("traces.jsonl"), TraceRow).append(row)
        run.finish("teach", 1, 1)
        align(run)
        (line,) = trained_on(run)
    assert line.output == ("\\boxed{9}" if method == "label-only" else TRACE)


def test_an_answer_in_the_prefix_is_a_word_of_its_own():
    assert (
        holds_answer("so 9.", "9")
        and holds_answer("it is $9$", "9")
        and holds_answer("x = \\frac{1}{2}!", "\\frac{1}{2}")
    )
    assert (
        not holds_answer("19 and 9.5 and 90", "9")
        and not holds_answer("", "9")
        and not holds_answer("x", "")
    )
