"""configs/palign.ipynb runs from top to bottom, and what is committed is one such execution.

`python -m tests.test_notebook` executes it and writes its outputs, after any change of a cell.
"""

import ast
import base64
import copy
import hashlib
import json
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kit.core import config as configs
from kit.training.plan import plan
from tests.conftest import ROOT

NOTEBOOK = ROOT / "configs" / "palign.ipynb"
MAX_BYTES = 200_000
PICTURES = 2
AGAIN = "execute it again: python -m tests.test_notebook"

Cells = list[dict[str, Any]]


def read() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return loaded


def code(cells: Cells) -> Cells:
    return [cell for cell in cells if cell["cell_type"] == "code"]


def source(cell: dict[str, Any]) -> str:
    """Its text, which a file has as lines and a kernel's client as one string."""
    return "".join(cell["source"])


def digest(cells: Cells) -> str:
    """Of what is executed."""
    return hashlib.sha256("\0".join(map(source, code(cells))).encode()).hexdigest()


def printed(cell: dict[str, Any]) -> str:
    texts = ["".join(output["text"]) for output in cell["outputs"] if "text" in output]
    return "".join(texts)


def cell_with(cells: Cells, text: str) -> dict[str, Any]:
    [cell] = [cell for cell in code(cells) if text in source(cell)]
    return cell


def constant(cells: Cells, name: str) -> Any:
    """The value that a cell gives to a name."""
    for statement in ast.walk(ast.parse("\n".join(map(source, code(cells))))):
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == name:
            return ast.literal_eval(statement.value)
    raise AssertionError(f"no cell assigns {name}")


def check_execution(notebook: dict[str, Any]) -> None:
    """What holds for any execution: of these cells, in order, without an error, with pictures."""
    cells = code(notebook["cells"])
    assert notebook["metadata"]["executed"] == digest(cells), AGAIN
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)), AGAIN
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert "error" not in {output["output_type"] for output in outputs}
    pictures = [output["data"]["image/png"] for output in outputs if "image/png" in str(output)]
    headers = [base64.b64decode(picture)[:24] for picture in pictures]
    assert all(header.startswith(b"\x89PNG") for header in headers)
    sizes = [struct.unpack(">II", header[16:]) for header in headers]
    assert len(sizes) == PICTURES and min(map(min, sizes)) > 200
    # each section came to its end
    assert re.search(r"teach +\d+ rows in, +\d+ out", printed(cell_with(cells, "stop_after=align")))
    assert "-------- cut here --------" in printed(cell_with(cells, "axvspan"))
    compared = printed(cell_with(cells, '"compare"'))
    assert re.search(r"palign +\d+% of \d+", compared) and "against long-trace" in compared
    assert "srcdoc=" in str(cell_with(cells, "srcdoc")["outputs"])


def check_plan(cells: Cells) -> None:
    """The T4's memory is what `plan` says now."""
    config = configs.load(ROOT / "configs" / "qwen2.5-1.5b-8gb.yaml", constant(cells, "t4"))
    result = plan(config)
    expected = f"A training step needs {result['train_gib']['total']:.1f} GiB"
    assert expected in printed(cell_with(cells, "t4 =")), AGAIN


def test_the_committed_outputs_are_of_one_execution_of_these_cells() -> None:
    check_execution(read())


def test_the_committed_file_is_small_and_names_no_machine() -> None:
    assert NOTEBOOK.stat().st_size < MAX_BYTES
    cells = code(read()["cells"])
    # pictures are not text
    text = re.sub(r"'image/png': '[^']*'", "", str([cell["outputs"] for cell in cells]))
    assert not re.findall(r"(?<![\w.])/(?:root|home|tmp|work|mnt|usr|opt|Users)/\S*", text)


def test_its_t4_section_says_what_plan_says() -> None:
    check_plan(read()["cells"])


def test_its_smoke_setting_is_the_smoke_config_made_smaller() -> None:
    small = constant(read()["cells"], "small")
    smoke = configs.load(ROOT / "configs" / "smoke.yaml", [])
    smaller = configs.load(ROOT / "configs" / "smoke.yaml", small)
    assert smaller.data.train.limit < smoke.data.train.limit
    assert smaller.data.eval[0].limit < smoke.data.eval[0].limit
    assert smaller.student.model == smoke.student.model == "smollm2-135m"
    assert smaller.method == "palign" and smaller.out == smoke.out


def spoil_source(notebook: dict[str, Any]) -> None:
    cell = cell_with(notebook["cells"], "small =")
    cell["source"] = [line.replace("limit=5", "limit=7") for line in cell["source"]]


def spoil_order(notebook: dict[str, Any]) -> None:
    first, second = code(notebook["cells"])[:2]
    first["execution_count"], second["execution_count"] = 2, 1


def spoil_picture(notebook: dict[str, Any]) -> None:
    cell = cell_with(notebook["cells"], "axvspan")
    cell["outputs"] = [output for output in cell["outputs"] if "data" not in output]


def spoil_section(notebook: dict[str, Any]) -> None:
    cell_with(notebook["cells"], '"compare"')["outputs"] = []


def spoil_outcome(notebook: dict[str, Any]) -> None:
    error = {"output_type": "error", "ename": "SystemExit", "evalue": "1", "traceback": []}
    cell_with(notebook["cells"], "srcdoc")["outputs"].append(error)


@pytest.mark.parametrize(
    "spoil", [spoil_source, spoil_order, spoil_picture, spoil_section, spoil_outcome]
)
def test_an_execution_of_other_cells_or_of_some_is_seen(
    spoil: Callable[[dict[str, Any]], None],
) -> None:
    notebook = copy.deepcopy(read())
    spoil(notebook)
    with pytest.raises(AssertionError):
        check_execution(notebook)


def test_a_plan_of_other_settings_is_seen() -> None:
    cells = read()["cells"]
    cell = cell_with(cells, "t4 =")
    cell["source"] = [line.replace("tokens=8192", "tokens=16384") for line in cell["source"]]
    with pytest.raises(AssertionError, match="execute it again"):
        check_plan(cells)


def execute(notebook: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run all cells in a fresh kernel.

    Args:
        notebook: its outputs are not looked at; it is not changed.
        folder: where the kernel starts.

    Returns:
        The notebook with the outputs of this execution, and the digest of what was executed.
    """
    nbclient = pytest.importorskip("nbclient", reason="pip install -r tests/requirements.txt")
    import nbformat

    node = nbformat.reads(json.dumps(notebook), as_version=4)
    for cell in code(node.cells):
        cell.update(outputs=[], execution_count=None)
    node.metadata["executed"] = digest(node.cells)
    client = nbclient.NotebookClient(
        node,
        timeout=1100,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        coalesce_streams=True,
    )
    client.execute()
    # without the machine's version of Python
    node.metadata["language_info"] = {"name": "python"}
    written: dict[str, Any] = json.loads(nbformat.writes(node))
    return written


def checkout(folder: Path) -> Path:
    """A copy of what a user has before the first run."""
    for name in ("palign.py", "requirements.txt"):
        shutil.copy(ROOT / name, folder)
    for name in ("kit", "configs"):
        shutil.copytree(ROOT / name, folder / name)
    return folder


def test_without_the_kit_the_first_cell_says_what_to_do(tmp_path: Path) -> None:
    nbclient = pytest.importorskip("nbclient", reason="pip install -r tests/requirements.txt")
    notebook = read()
    notebook["cells"] = code(notebook["cells"])[:1]
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="Set KIT to the git address"):
        execute(notebook, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_it_runs_from_top_to_bottom(tmp_path: Path) -> None:
    """On the CPU, in a checkout without runs; what no machine changes is as committed."""
    committed = read()
    executed = execute(committed, checkout(tmp_path))
    check_execution(executed)
    check_plan(executed["cells"])
    assert (tmp_path / "runs" / "notebook-compare.html").exists()
    for text in ("axvspan", "t4 ="):
        fresh, old = (cell_with(each["cells"], text) for each in (executed, committed))
        assert printed(fresh) == printed(old), AGAIN


if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory() as scratch:
        result = execute(read(), checkout(Path(scratch)))
    NOTEBOOK.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
