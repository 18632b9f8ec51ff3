"""Faults of the machine on the real command line: Ctrl-C, full and read-only disks, a lost folder.

The scripted stand-in answers; the disks are small tmpfs mounts, which only root can make.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT
from tests.test_kills import steady, write_config

SECONDS = 10  # for a process to end; generous, for busy machines


def start(config, out, seconds=0.0):
    return subprocess.Popen(
        [sys.executable, "palign.py", "run", str(config), f"out={out}", "stop_after=align"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PALIGN_SCRIPT_SECONDS": str(seconds)},
    )


def check_stop(process, code, timeout=120):
    """What a process printed, which must have ended with this code and no traceback."""
    printed = process.communicate(timeout=timeout)[1]
    assert process.returncode == code, printed
    assert "Traceback" not in printed and "a defect" not in printed, printed
    return printed


def rows(folder):
    path = folder / "traces.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def wait_for_rows(process, folder):
    while len(rows(folder)) < 3:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A config, and the run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("faults")
    config = write_config(folder, "palign")
    check_stop(start(config, folder / "whole"), 0)
    return config, folder / "whole"


@pytest.fixture
def mount(tmp_path):
    """A tmpfs of 4 MB; skipped where it cannot be mounted, which CI takes for a failure."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True
    )
    if done.returncode:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(
            f"no tmpfs can be mounted: {done.stderr.decode()}"
        )
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_ctrl_c_ends_a_stage_and_says_how_to_go_on(whole, tmp_path):
    process = start(whole[0], tmp_path / "run", 0.1)
    wait_for_rows(process, tmp_path / "run")
    process.send_signal(signal.SIGINT)
    assert "run the same command again to resume" in check_stop(process, 130, SECONDS)
    kept = rows(tmp_path / "run")
    check_stop(start(whole[0], tmp_path / "run"), 0)
    assert 3 <= len(kept) < 24 and rows(tmp_path / "run")[: len(kept)] == kept
    assert steady(tmp_path / "run") == steady(whole[1])


@pytest.mark.parametrize(("patience", "presses"), [(0.2, 1), (600, 2)])
def test_code_that_swallows_ctrl_c_ends_when_patience_does_or_at_the_second(patience, presses):
    code = (
        "from kit.core import interrupts\n"
        "import time\n"
        f"interrupts.PATIENCE_SECONDS = {patience}\n"
        "interrupts.watch()\n"
        "while True:\n"
        " try:\n"
        "  print('working', flush=True)\n"
        "  time.sleep(600)\n"
        " except KeyboardInterrupt:\n"
        "  pass\n"
    )
    run = [sys.executable, "-c", code]
    process = subprocess.Popen(
        run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    for _ in range(presses):
        assert process.stdout.readline() == "working\n"
        process.send_signal(signal.SIGINT)
    assert "Interrupted" in check_stop(process, 130, SECONDS)


def test_a_full_disk_is_reported_loses_no_row_and_goes_on_when_there_is_room(whole, mount):
    ballast = mount / "ballast"
    ballast.write_bytes(bytes(4 * 2**20 - 96 * 1024))
    printed = check_stop(start(whole[0], mount / "run"), 1)
    assert "could not be written: No space left on device. Every finished row is safe." in printed
    assert printed.strip().splitlines()[-1].startswith("palign: ")
    kept = rows(mount / "run")
    ballast.unlink()
    check_stop(start(whole[0], mount / "run"), 0)
    assert (
        kept
        and rows(mount / "run")[: len(kept)] == kept
        and steady(mount / "run") == steady(whole[1])
    )


def test_a_disk_that_is_full_from_the_start(whole, mount):
    (mount / "ballast").write_bytes(bytes(4 * 2**20 - 4096))
    assert "No space left on device" in check_stop(start(whole[0], mount / "run"), 1)


def test_a_read_only_disk_is_reported_at_once(whole, mount):
    check_stop(start(whole[0], mount / "run"), 0)
    subprocess.run(["mount", "-o", "remount,ro", str(mount)], check=True)
    assert "cannot be written: Read-only file system. Choose another with out=DIR" in check_stop(
        start(whole[0], mount / "run"), 1
    )


def test_a_folder_that_vanishes_is_reported_and_goes_on_when_it_is_back(whole, tmp_path):
    process = start(whole[0], tmp_path / "run", 0.1)
    wait_for_rows(process, tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "gone")
    assert "could not be written: No such file or directory" in check_stop(process, 1)
    (tmp_path / "gone").rename(tmp_path / "run")
    check_stop(start(whole[0], tmp_path / "run"), 0)
    assert steady(tmp_path / "run") == steady(whole[1])
