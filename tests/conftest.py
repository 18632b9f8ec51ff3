"""Settings that every test shares: offline, markers, and the real data where it lies."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
FLAGS = "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync"
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that asks a hub must fail, not wait
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# the test processes share the cores: each with threads for all of them is slower than one thread each
share = (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
os.environ.setdefault("OMP_NUM_THREADS", str(max(share, 1)))
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: minutes long; run with --slow")
    config.addinivalue_line("markers", "gpu: needs a CUDA card")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))
        if "gpu" in item.keywords and not os.environ.get("CUDA_VISIBLE_DEVICES"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA card: set CUDA_VISIBLE_DEVICES"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real inputs."""
    if not SHARED.is_dir():
        pytest.skip("the real inputs (../shared/data) are not here")
    return SHARED


@pytest.fixture(
    scope="module"
)  # no longer: while it is open, this thread counts as inside an event loop
def browser() -> Iterator[Any]:
    """Debian's Chromium. Where it is absent the test skips, in CI it fails."""
    path = shutil.which("chromium")
    if path is None:
        message = "no chromium: install it (apt-get install chromium) to have the pages looked at"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=FLAGS.split())
        yield chromium
        chromium.close()
