"""The table of stages, what makes one stale, and the loop that makes its rows."""

from __future__ import annotations

import inspect
from pkgutil import resolve_name

import pytest

import palign
from kit.core.config import Config, flat, resolve
from kit.core.errors import KitError
from kit.core.records import TraceRow
from kit.core.stages import STAGE_TABLE, STAGES, file_name, tallies, work_through
from kit.core.storage import RowFile
from tests.test_run import PROBLEMS, open_run, sweep, trace_row


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_has_a_function_that_takes_the_run(name):
    assert [*inspect.signature(resolve_name(STAGE_TABLE[name].entry_point)).parameters] == ["run"]


def test_the_command_line_has_a_command_per_stage_in_their_order():
    assert tuple(palign.STAGE_COMMANDS) == ("run", *STAGES)


@pytest.mark.parametrize("name", STAGES)
def test_every_key_that_a_stage_depends_on_exists(name):
    keys = flat(Config())
    for prefix in STAGE_TABLE[name].keys:
        assert any(f"{key}.".startswith(f"{prefix}.") for key in keys), prefix


def test_a_stage_depends_on_its_sections_but_not_on_keys_that_change_no_row():
    keys = STAGE_TABLE["truncate"].dependencies(flat(Config()))
    assert {"student.model", "judge.search", "method"} <= keys.keys()
    # the words of every kind of judging prompt
    assert {"prompts.judge", "prompts.instruction", "prompts.answer_cue"} <= keys.keys()
    neutral = {"student.n_threads", "student.url", "student.max_num_seqs", "student.kv_cache_gib"}
    assert not {*neutral, "train.rank", "name", "seed"} & keys.keys()
    keys = STAGE_TABLE["train"].dependencies(flat(Config()))
    assert {"train.rank", "train.batch_size", "train.dtype"} <= keys.keys()
    neutral = {"save_minutes", "gradient_checkpointing", "logits_bytes", "on_low_memory"}
    assert not {f"train.{key}" for key in neutral} & keys.keys()


def test_changes_are_named_by_key_and_a_changed_input_in_words():
    stage = STAGE_TABLE["truncate"]
    before = {**stage.dependencies(flat(Config())), "input": "a"}
    scan = flat(resolve({"judge": {"search": "scan"}}, "test"))
    now = {**stage.dependencies(scan), "input": "a"}
    assert stage.changes(before, now) == "judge.search changed from binary to scan"
    assert stage.changes(before, {**now, "seed": 3}) == "judge.search changed from binary to scan"
    assert stage.changes(now, {**now, "seed": 3}) == "seed now affects this stage"
    assert stage.changes(before, {**before, "input": "b"}) == "traces.jsonl changed"
    assert stage.changes(before, before) == ""
    # a calibration that was read from a file, and is not any more
    calibration = {"setup": {"model": "m"}, "thresholds": {"verbal": 2.5}}
    calibrated = flat(resolve({"judge": {"calibration": calibration}}, "test"))
    was = {**before, **stage.dependencies(calibrated)}
    assert stage.changes(was, before) == "judge.calibration changed"
    # an adapter whose folder was moved, and one of other content
    on = {**before, "student.adapter": "runs/a", "adapter of student.model": "x"}
    assert stage.changes(on, {**on, "student.adapter": "runs/m"}) == ""
    other = {**on, "student.adapter": "runs/m", "adapter of student.model": "y"}
    assert "student.adapter changed from runs/a to runs/m" in stage.changes(on, other)
    unknown = {**before, "student.adapter": "runs/a"}
    assert "student.adapter" in stage.changes(unknown, {**unknown, "student.adapter": "runs/m"})
    # a key of an older kit that is no key any more
    assert stage.changes({**before, "judge.words": 3}, before) == ""


@pytest.mark.parametrize(
    ("hashes", "reruns"),
    [
        ([{"weights": "a"}, {"weights": "a"}, {"weights": "b"}], [True, False, True]),
        # not on this machine for a while
        ([{"weights": "a"}, {}, {"weights": "a"}, {"weights": "b"}], [True, False, False, True]),
        # a run of an older kit, or a model that was fetched meanwhile
        ([{}, {"weights": "a"}, {"weights": "b"}], [True, False, True]),
    ],
)
def test_a_model_of_other_content_reruns_a_stage_and_an_unknown_one_does_not(
    tmp_path, hashes, reruns, capsys
):
    for known, rerun in zip(hashes, reruns, strict=True):
        named = {f"{part} of student.model": value for part, value in known.items()}
        with open_run(tmp_path) as run:
            run.progress.quiet = False
            assert run.begin("truncate", "rows", lambda: "out", lambda n=named: n) is rerun
            if rerun:
                run.finish("truncate", 0, 0)
    assert capsys.readouterr().err.count("the weights of student.model changed") == 1


@pytest.mark.parametrize("upto", range(7))
def test_a_killed_sweep_resumes_with_the_batches_it_would_have_had(tmp_path, upto):
    calls: list[list[str]] = []
    with open_run(tmp_path / "whole") as run:
        whole = sweep(run, [])
    with open_run(tmp_path / "torn") as run:
        with pytest.raises(RuntimeError):
            sweep(run, [], upto)
        assert sweep(run, calls) == whole
    assert (tmp_path / "torn/traces.jsonl").read_bytes() == (
        tmp_path / "whole/traces.jsonl"
    ).read_bytes()
    planned = [["p0", "p1", "p2"], ["p3", "p4", "p5"], ["p6"]]
    assert calls == planned[upto // 3 :]


def test_without_a_size_one_batch_has_every_unit_that_has_no_row(tmp_path):
    calls: list[list[str]] = []
    with open_run(tmp_path) as run:
        with pytest.raises(RuntimeError):
            sweep(run, calls, upto=2, size=None)
        rows = sweep(run, calls, size=None)
        assert sweep(run, calls, size=None) == rows
    every = [problem.id for problem in PROBLEMS]
    assert calls == [every, every[2:]]
    assert [row.id for row in rows] == every


def test_two_rows_of_one_name_are_refused(tmp_path):
    with open_run(tmp_path) as run, pytest.raises(KitError, match=r"'a\.0'"):
        work_through(
            run,
            "teach",
            RowFile(run.path("traces.jsonl"), TraceRow),
            [PROBLEMS[0].model_copy(update={"id": "a.0"})] * 2,
            3,
            iter,
        )


def test_tallies_count_generated_tokens_and_reasons():
    rows = [trace_row(PROBLEMS[0]), trace_row(PROBLEMS[1]).model_copy(update={"rejected": "why"})]
    assert tallies(rows) == {"tokens": 0, "rejected": {"why": 1}}


def test_a_scores_file_is_named_after_model_side_and_dataset():
    name = file_name("/models/Qwen 2.5.gguf", "tuned", "data/math500.jsonl")
    assert name == "eval/Qwen-2.5.gguf-tuned-math500.jsonl.jsonl"
