"""Settings that every test shares: offline, markers, and the real data where it lies."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that asks a hub must fail, not wait
os.environ["TOKENIZERS_PARALLELISM"] = "false"
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
