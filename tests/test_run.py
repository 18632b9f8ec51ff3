"""The run's folder: what is skipped, resumed, rerun and refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from kit.core import config as configs
from kit.core.errors import KitError
from kit.core.progress import Progress
from kit.core.records import Problem, TraceRow
from kit.core.run import Run
from kit.core.stages import work_through
from kit.core.storage import RowFile, digest
from kit.reporting.metrics import Files
from tests.conftest import ROOT


def open_run(folder, **keys):
    config = configs.resolve({"out": str(folder), **keys}, "test")
    return Run(config, Progress(quiet=True))


def trace_row(problem):
    return TraceRow(
        id=problem.id, question=problem.question, answer=problem.answer, samples=(), kept=()
    )


PROBLEMS = [Problem(id=f"p{i}", question=f"q{i}", answer=str(i)) for i in range(7)]


def sweep(run, calls, upto=None, size=3):
    """A stage of batches of `size`; `upto` rows then a crash."""
    done = 0

    def work(batch):
        nonlocal done
        calls.append([p.id for p in batch])
        for problem in batch:
            if upto is not None and done == upto:
                raise RuntimeError("crash")
            done += 1
            yield trace_row(problem)

    file = RowFile(run.path("traces.jsonl"), TraceRow)
    return work_through(run, "teach", file, PROBLEMS, size, work)


def begin(run):
    """Open the stage of `sweep`, which is known by its rows."""
    return run.begin("teach", "input", lambda: digest(run.rows("traces.jsonl", TraceRow)))


def test_a_done_stage_is_skipped_and_a_changed_key_is_named_and_reruns_it(tmp_path, capsys):
    def stage(**keys):
        with open_run(tmp_path, **keys) as run:
            run.progress.quiet = False
            work = begin(run)
            if work:
                sweep(run, [])
                run.finish("teach", 7, 7)
            return work, capsys.readouterr().err

    assert stage()[0] is True
    assert stage()[0] is False
    work, said = stage(teacher={"samples": 3})
    assert work and "rerunning teach: teacher.samples changed from 1 to 3" in said
    assert list((tmp_path / "stale").glob("*-traces.jsonl")), (
        "the rows made before are set aside, not lost"
    )
    assert stage(teacher={"samples": 3, "n_threads": 2})[0] is False, (
        "a key that changes no row reruns nothing"
    )


def test_rows_stand_in_the_order_of_their_input_whenever_they_were_made(tmp_path):
    """Training goes by the file's order: a row that was made again must not stand last."""
    path = tmp_path / "traces.jsonl"
    with open_run(tmp_path) as run:
        run.begin("teach", "input", lambda: "")
        sweep(run, [])
        whole = path.read_bytes()
        lines = whole.splitlines(keepends=True)
        path.write_bytes(b"".join([lines[4], lines[0][:-9] + b"\n", *lines[1:4], *lines[5:]]))
        calls = []
        sweep(run, calls, size=0)
    assert calls == [["p0"]] and path.read_bytes() == whole


def test_rows_of_another_run_are_set_aside_and_told(tmp_path, capsys):
    path = tmp_path / "traces.jsonl"
    with open_run(tmp_path) as run:
        run.progress.quiet = False
        run.begin("teach", "input", lambda: "")
        sweep(run, [])
        whole = path.read_bytes()
        other = Problem(id="other", question="q", answer="1")
        RowFile(path, TraceRow).append(trace_row(other))
        rows = sweep(run, [])
    assert [row.id for row in rows] == [problem.id for problem in PROBLEMS]
    assert path.read_bytes() == whole
    said = capsys.readouterr().err
    assert "traces.jsonl had 1 rows that are of nothing in its input: other" in said
    assert b'"other"' in next((tmp_path / "stale").glob("*-traces.jsonl")).read_bytes()


def test_a_rerun_says_in_words_that_the_input_changed(tmp_path, capsys):
    for source in ("rows", "other rows"):
        with open_run(tmp_path) as run:
            run.progress.quiet = False
            assert run.begin("truncate", source, lambda: "")
            run.finish("truncate", 0, 0)
    printed = capsys.readouterr().err
    assert "rerunning truncate: traces.jsonl changed\n" in printed and "other rows" not in printed


def test_rejected_rows_of_every_stage_are_listed_with_their_reason(tmp_path):
    with open_run(tmp_path) as run:
        run.record(rejected=[{"id": "d", "reason": "no answer", "detail": "line 3"}])
        run.begin("teach", "input", lambda: "")
        lost = {"rejected": "no correct trace", "detail": "0 of 1 correct"}
        rows = [trace_row(PROBLEMS[0]), trace_row(PROBLEMS[1]).model_copy(update=lost)]
        RowFile(run.path("traces.jsonl"), TraceRow).append(*rows)
        run.finish("teach", 2, 1)
    lines = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert lines == [
        {"stage": "data", "id": "d", "reason": "no answer", "detail": "line 3"},
        {"stage": "teach", "id": "p1", "reason": "no correct trace", "detail": "0 of 1 correct"},
    ]


def test_what_a_row_depends_on_besides_the_stages_own_keys(tmp_path):
    """The words in a prompt's file; keys unknown to an older kit had defaults."""
    words = tmp_path / "words.txt"
    words.write_text("Solve it.")

    def works(**keys):
        with open_run(tmp_path / "run", prompts={"instruction": f"file:{words}"}, **keys) as run:
            work = begin(run)
            if work:
                sweep(run, [])
                run.finish("teach", 7, 7)
            return work, run.manifest["stages"]["teach"]["keys"]

    assert works()[0]
    work, keys = works()
    assert not work and keys["prompts.instruction"] == "Solve it."
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    del manifest["stages"]["teach"]["keys"]["teacher.samples"]
    (tmp_path / "run/manifest.json").write_text(json.dumps(manifest))
    assert not works()[0]
    words.write_text("Solve it well.")
    assert works()[0]


def test_a_deleted_or_edited_stage_file_is_regenerated(tmp_path, capsys):
    with open_run(tmp_path) as run:
        begin(run)
        sweep(run, [])
        run.finish("teach", 7, 7)
    path = tmp_path / "traces.jsonl"
    for damage in (
        path.unlink,
        lambda: path.write_text(path.read_text().replace('"question": "q4"', '"question": "Q4"')),
    ):
        damage()
        with open_run(tmp_path) as run:
            assert begin(run)
            calls: list[list[str]] = []
            rows = sweep(run, calls)
            assert digest(rows) == run.manifest["stages"]["teach"]["output"]
            run.finish("teach", 7, 7)
        assert "output missing or modified; regenerating" in capsys.readouterr().err
    assert calls == [["p3", "p4", "p5"]], "only the batch with the edited row ran again"


def test_files_that_are_not_in_the_manifest_never_mix_with_new_rows(tmp_path):
    RowFile(tmp_path / "traces.jsonl", TraceRow).append(
        trace_row(Problem(id="old", question="", answer=""))
    )
    with open_run(tmp_path) as run:
        assert run.begin("teach", "input", lambda: "") and not (tmp_path / "traces.jsonl").exists()


def test_a_second_run_on_one_folder_is_refused_by_process(tmp_path):
    with open_run(tmp_path), pytest.raises(KitError, match=rf"palign run, process {os.getpid()}"):
        open_run(tmp_path)
    with open_run(tmp_path):
        pass


def test_several_processes_may_only_train(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(KitError, match=r"accelerate launch palign\.py train"):
        open_run(tmp_path)


def test_a_newer_format_is_refused_by_version(tmp_path):
    with open_run(tmp_path):
        pass
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "format": 99, "palign": "9.9"}))
    with pytest.raises(KitError, match=r"palign 9\.9"):
        open_run(tmp_path)


def finish(run, stage):
    if run.begin(stage, "input", lambda: "output"):
        run.finish(stage, 1, 1, made_by=run.config.seed)


def test_what_stands_on_rows_made_anew_is_not_of_the_run_until_its_stage_has_looked(tmp_path):
    with open_run(tmp_path) as run:
        for stage in ("teach", "truncate", "align", "train", "eval"):
            finish(run, stage)
    assert Files(tmp_path).summary("eval") == {"made_by": 0}
    changed = {"judge": {"search": "scan"}}
    with open_run(tmp_path, **changed) as run:
        finish(run, "truncate")
    assert Files(tmp_path).summary("truncate") and not Files(tmp_path).summary("eval")
    with open_run(tmp_path, **changed) as run:
        with pytest.raises(KitError, match="no finished stage align yet"):
            run.require("align")
        # their input may be what it was
        for stage in ("align", "train", "eval"):
            finish(run, stage)
        run.require("align")
    assert Files(tmp_path).summary("eval") == {"made_by": 0}


def test_a_stage_of_another_config_is_not_gone_on_from(tmp_path):
    with open_run(tmp_path) as run:
        finish(run, "teach")
        finish(run, "truncate")
    with open_run(tmp_path, judge={"threshold": 50.0}) as run:
        with pytest.raises(KitError, match=r"truncate is of another config: judge\.threshold"):
            run.require("truncate")
        run.require("teach")
    with open_run(tmp_path, student={"max_num_seqs": 3, "model": "moved/elsewhere"}) as run:
        run.require("truncate")
    # a calibration that was taken away leaves no key of its own
    calibrated = {"calibration": {"setup": {"model": "m"}, "thresholds": {"verbal": 2.5}}}
    with open_run(tmp_path, judge=calibrated) as run:
        finish(run, "truncate")
        run.require("truncate")
    changed = r"another config: judge\.calibration changed"
    with open_run(tmp_path) as run, pytest.raises(KitError, match=changed):
        run.require("truncate")


def test_figures_of_another_config_are_not_shown(tmp_path):
    """A stage that is skipped writes the config all the same: what it does not fit is not read."""
    with open_run(tmp_path) as run:
        for stage in ("teach", "truncate", "align", "train"):
            finish(run, stage)
    with open_run(tmp_path, align={"samples": 2}) as run:
        finish(run, "teach")
    files = Files(tmp_path)
    assert list(files.manifest["stages"]) == ["teach", "truncate"]
    with open_run(tmp_path) as run:
        finish(run, "teach")
    assert list(Files(tmp_path).manifest["stages"]) == ["teach", "truncate", "align", "train"]


def test_a_folder_keeps_its_config_until_a_stage_begins(tmp_path):
    with open_run(tmp_path) as run:
        finish(run, "teach")
    with open_run(tmp_path, seed=9, method="long-trace"):
        pass
    config = configs.load(tmp_path / "config.yaml")
    assert (config.seed, config.method) == (0, "palign")
    assert Files(tmp_path).manifest["seed"] == 0
    with open_run(tmp_path, seed=9) as run:
        finish(run, "teach")
    assert configs.load(tmp_path / "config.yaml").seed == 9 == Files(tmp_path).manifest["seed"]


def test_a_run_of_the_old_format_is_refused_with_what_to_do(tmp_path):
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "config.yaml").write_text(json.dumps({"out": str(folder)}))
    manifest = {"format": 1, "palign": "0.1", "machine": {}, "stages": {}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    shutil.copytree(folder, tmp_path / "copy")
    for command in (
        ["eval", str(folder / "config.yaml")],
        ["compare", str(folder), str(tmp_path / "copy"), "--out", str(folder / "compare")],
        ["export", str(folder)],
    ):
        done = subprocess.run(
            [sys.executable, "palign.py", *command], capture_output=True, text=True, cwd=ROOT
        )
        assert done.returncode == 1, done.stderr
        assert "run format 1" in done.stderr and "out=NEW" in done.stderr


def test_a_damaged_manifest_is_reported_with_what_to_do_and_loses_no_row(tmp_path, capsys):
    with open_run(tmp_path) as run:
        run.begin("teach", "input", lambda: "")
        sweep(run, [])
        run.finish("teach", 7, 7)
    rows = (tmp_path / "traces.jsonl").read_bytes()
    (tmp_path / "manifest.json").write_text('{"stages": ')
    with pytest.raises(KitError, match=r"manifest\.json is no run's .* moved to stale/"):
        open_run(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with open_run(tmp_path) as run:
        assert run.begin("teach", "input", lambda: "")
    assert "files not in the manifest" in capsys.readouterr().err
    assert next((tmp_path / "stale").glob("*-traces.jsonl")).read_bytes() == rows


def test_an_unwritable_folder_is_an_error_with_a_next_step(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(KitError, match="out=DIR"):
        open_run(tmp_path / "file" / "run")


@pytest.mark.parametrize(
    "args", [["run"], ["run", "no.yaml"], ["run", "configs/smoke.yaml", "x=1"], ["nothing"]]
)
def test_bad_usage_exits_with_2_and_no_traceback(args):
    done = subprocess.run(
        [sys.executable, "palign.py", *args], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert (
        done.returncode == 2
        and "Traceback" not in done.stderr
        and done.stderr.strip()
        and not done.stdout
    )
