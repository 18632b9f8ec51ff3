"""Rows on the disk: whole or not at all, and any damage is reported."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import textwrap

import pytest

from kit.core.errors import KitError
from kit.core.records import PrefixRow, Verdict
from kit.core.storage import RowFile, digest, line_of, write_atomic
from tests.conftest import ROOT


def row(id: str, **more) -> PrefixRow:
    fields = {
        "question": "q",
        "answer": "7",
        "trace": "a. b.",
        "end": 3,
        "sentences": 1,
        "sentences_total": 2,
    }
    return PrefixRow(id=id, **{**fields, "ratio": 0.5, "sufficient": True, **more})


def test_a_last_line_without_its_end_takes_no_row_with_it(tmp_path):
    file = RowFile(tmp_path / "p.jsonl", PrefixRow)
    file.append(row("a"))
    file.path.write_text(file.path.read_text().rstrip("\n"))
    file.append(row("b"))
    assert [r.id for r in file.read()] == ["a", "b"] and not file.damaged
    file.path.write_text(file.path.read_text()[:-9])
    file.append(row("c"))
    assert [r.id for r in file.read(repair=False)] == ["a", "c"] and len(file.damaged) == 1


def test_rows_come_back_equal(tmp_path):
    file = RowFile(tmp_path / "p.jsonl", PrefixRow)
    rows = [
        row("a", verdicts=(Verdict(sentences=1, label="ENOUGH", margin=0.1),)),
        row("b", trace="汉字\u2028 \x00é"),
    ]
    file.append(rows[0])
    file.append(rows[1])
    assert file.read() == rows and not file.damaged


def test_a_cut_off_line_is_set_aside_and_nothing_else_is_lost(tmp_path):
    path = tmp_path / "p.jsonl"
    file = RowFile(path, PrefixRow)
    file.append(row("a"), row("b"))
    path.write_bytes(path.read_bytes()[:-9])
    assert [r.id for r in file.read()] == ["a"] and "line 2" in file.damaged[0]
    assert (tmp_path / "p.jsonl.damaged").exists()
    file.append(row("b"))  # after a whole line, not into the torn one
    assert [r.id for r in RowFile(path, PrefixRow).read()] == ["a", "b"]


def test_an_edited_row_is_named(tmp_path):
    path = tmp_path / "p.jsonl"
    file = RowFile(path, PrefixRow)
    file.append(row("a"), row("b"))
    path.write_text(
        path.read_text().replace('"id": "b", "question": "q"', '"id": "b", "question": "Q"')
    )
    assert [r.id for r in file.read()] == ["a"] and "'b' was edited" in file.damaged[0]


def test_a_row_of_another_format_is_named(tmp_path):
    raw = json.loads(line_of(row("a")))
    raw.pop("sha")
    path = tmp_path / "p.jsonl"
    raw["brand_new"] = 1
    sha = hashlib.sha256(json.dumps(raw, ensure_ascii=False, sort_keys=True).encode()).hexdigest()[
        :12
    ]
    path.write_text(json.dumps({**raw, "sha": sha}) + "\n")
    file = RowFile(path, PrefixRow)
    assert file.read() == [] and "another format" in file.damaged[0]


def test_the_digest_ignores_order_and_times_and_nothing_else():
    a, b = row("a", seconds=1.0), row("b", seconds=2.0)
    assert digest([a, b]) == digest([b.model_copy(update={"seconds": 9.0}), a])
    assert digest([a, b]) != digest([a, b.model_copy(update={"end": 4})])


def test_a_full_disk_is_an_error_that_keeps_what_was_written(tmp_path):
    code = textwrap.dedent(
        f"""
        import resource, signal, sys
        sys.path.insert(0, {str(ROOT)!r})
        from pathlib import Path
        from kit.core.records import PrefixRow
        from kit.core.storage import RowFile
        from kit.core.errors import KitError
        from tests.test_storage import row
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        file = RowFile(Path({str(tmp_path)!r}) / "p.jsonl", PrefixRow)
        file.append(row("a"))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
        try:
            file.append(row("b", trace="x" * 5000))
        except KitError as error:
            print("reported:", error)
        """
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "reported:" in done.stdout and "p.jsonl could not be written" in done.stdout, (
        done.stdout + done.stderr
    )
    assert (tmp_path / "p.jsonl").read_bytes().endswith(b"}\n"), "the torn half row is taken back"
    assert [r.id for r in RowFile(tmp_path / "p.jsonl", PrefixRow).read()] == ["a"]


def test_a_folder_that_is_gone_is_an_error_with_a_next_step(tmp_path):
    with pytest.raises(KitError, match="run the same command again"):
        RowFile(tmp_path / "gone" / "p.jsonl", PrefixRow).append(row("a"))


def test_a_whole_file_can_hold_a_path_that_is_not_text(tmp_path):
    write_atomic(tmp_path / "about.json", json.dumps({"path": "/data/\udcff"}, ensure_ascii=False))
    assert json.loads((tmp_path / "about.json").read_text()) == {"path": "/data/\udcff"}
