"""configs/palign.ipynb runs from top to bottom; what was committed is such an execution."""

from __future__ import annotations

import base64
import json
import shutil
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

NOTEBOOK = ROOT / "configs" / "palign.ipynb"
MAX_BYTES = 200_000
PICTURES = 2


def read() -> list[dict[str, Any]]:
    """Its cells."""
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def outputs(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [output for cell in cells for output in cell.get("outputs", ())]


def pictures(cells: list[dict[str, Any]]) -> list[bytes]:
    """The PNG files in its outputs."""
    every = [output.get("data", {}).get("image/png") for output in outputs(cells)]
    return [base64.b64decode(text) for text in every if text]


def check_outputs(cells: list[dict[str, Any]]) -> None:
    """What holds for any execution: in order, without an error, pictures of a sensible size."""
    counts = [cell["execution_count"] for cell in cells if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert "error" not in {output["output_type"] for output in outputs(cells)}
    sizes = [struct.unpack(">II", picture[16:24]) for picture in pictures(cells)]
    assert len(sizes) == PICTURES and min(map(min, sizes)) > 200
    text = json.dumps(outputs(cells))
    for part in ("cut here", "held-out problems", "palign against long-trace", "srcdoc="):
        assert part in text or part in json.dumps(cells)
    assert "A training step needs" in text


def test_the_committed_outputs_are_of_one_execution_and_small() -> None:
    assert NOTEBOOK.stat().st_size < MAX_BYTES
    cells = read()
    check_outputs(cells)
    text = json.dumps(outputs(cells))
    assert not [place for place in ("/root", "/home", "/tmp", "/work", "/mnt") if place in text]


def execute(cells: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Run cells in a fresh kernel; the cells with their outputs."""
    nbclient = pytest.importorskip("nbclient", reason="pip install -r tests/requirements.txt")
    import nbformat

    notebook = nbformat.from_dict({**json.loads(NOTEBOOK.read_text()), "cells": cells})
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.update(outputs=[], execution_count=None)
    where = {"metadata": {"path": str(folder)}}
    client = nbclient.NotebookClient(notebook, timeout=1100, kernel_name="python3", resources=where)
    client.execute()
    return notebook.cells


def test_a_cell_that_fails_says_what_to_do(tmp_path: Path) -> None:
    nbclient = pytest.importorskip("nbclient", reason="pip install -r tests/requirements.txt")
    first = next(cell for cell in read() if cell["cell_type"] == "code")
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="Set KIT to the git address"):
        execute([first], tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_it_runs_from_top_to_bottom(tmp_path: Path) -> None:
    """In a checkout without runs, on the CPU."""
    for name in ("palign.py", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("kit", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    begun = time.perf_counter()
    cells = execute(read(), tmp_path)
    print(f"{time.perf_counter() - begun:.0f} s")
    check_outputs(cells)
    assert (tmp_path / "runs" / "notebook-compare.html").exists()
