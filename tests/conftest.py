"""Settings and fixtures that every test shares: offline, the markers, real data, a browser."""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Whole public files, where a machine has them; their first rows are in tests/data.
SHARED = ROOT.parent / "shared" / "data"
EXCERPTS = ROOT / "tests" / "data"
BROWSER_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)

sys.path.insert(0, str(ROOT))

# A test that asks a hub must fail, not wait.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# The test processes share the cores: as many threads in each as there are cores is slower.
processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // processes, 1)))

# The tests run on the CPU, also where there is a card; those marked gpu run where one is named.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the long proofs as well")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: a long proof, minutes; run with --slow")
    config.addinivalue_line("markers", "gpu: needs a CUDA card")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="a long proof: run with --slow"))
        if "gpu" in item.keywords and not os.environ["CUDA_VISIBLE_DEVICES"]:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA card: set CUDA_VISIBLE_DEVICES"))


def pytest_collection_finish() -> None:
    """Every stage collects garbage; without this it would visit all modules' objects each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of whole real files where there is one, else of their first rows in tests/data."""
    return SHARED if SHARED.is_dir() else EXCERPTS


@pytest.fixture(scope="session")
def real_traces(real_data: Path) -> list[dict[str, str]]:
    """Real chains of thought, {id, question, long_cot, answer}, shortest first.

    The three shortest are in every clone: tests that take no more prove the same everywhere.
    """
    with open(real_data / "long_cot_aime24.jsonl", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return sorted(rows, key=lambda row: len(row["long_cot"]))


# A module's, not a session's: while it is open, this thread counts as inside an event loop.
@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium. Where it is absent the test skips, in CI it fails."""
    path = shutil.which("chromium")
    if path is None:
        message = "no chromium: install it (apt-get install chromium) to test the pages"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=list(BROWSER_FLAGS))
        yield chromium
        chromium.close()
