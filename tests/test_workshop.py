"""kit.reporting.workshop: the pages, and exercises that only their solutions solve.

The quick tests make pages of made-up runs. The slow one runs the exercises' commands on real runs,
as the leader's page prints them.
"""

from __future__ import annotations

import html
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kit.core.errors import KitError
from kit.core.records import PrefixRow
from kit.core.storage import RowFile
from kit.judging.sentences import split
from kit.reporting import workshop
from kit.reporting.metrics import Files
from tests.browser import Opened, check
from tests.conftest import ROOT
from tests.make_run import make

LEADER = ("before", "plan", "cut", "first", "wordy", "broken", "beat", "scores", "questions")
PARTICIPANT = ("cut", "first", "wordy", "broken", "beat", "check")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, real_data: Path) -> list[Path]:
    """Made-up runs: P-ALIGN and a fixed cut."""
    root = tmp_path_factory.mktemp("workshop")
    palign = make(root / "w-palign", real_data)
    return [palign, make(root / "w-ratio-0.5", real_data, method="ratio-0.5")]


@pytest.fixture(scope="module")
def pages(runs: list[Path]) -> dict[str, Any]:
    out = runs[0].parent / "pages"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workshop, "_walkthrough", lambda: "=== 3. Verdicts ===")
        return workshop.workshop(runs, out, 3)


def test_the_pages_are_quiet_and_fit(browser: Any, pages: dict[str, Any]) -> None:
    check(browser, Path(pages["leader"]), LEADER)
    assert len(pages["participants"]) == 3
    for page in pages["participants"]:
        check(browser, Path(page), PARTICIPANT)


def test_participants_get_a_trace_and_no_cut(
    browser: Any, runs: list[Path], pages: dict[str, Any]
) -> None:
    rows = Files(runs[0]).prefixes
    questions = set()
    for page in pages["participants"]:
        opened = Opened(browser, Path(page), 1440).page
        question = opened.locator("#cut .q").inner_text()
        # a problem may have several traces
        traces = [row.trace for row in rows if row.question[:40] == question[:40]]
        assert opened.locator("#cut ol li").count() in [len(split(trace)) for trace in traces]
        text = opened.locator("main").inner_text()
        assert "Solution" not in text and "-1000" not in text
        questions.add(question)
    assert len(questions) == 3
    leader = Opened(browser, Path(pages["leader"]), 1440).page
    assert leader.locator("#cut table tbody tr").count() == 3
    assert leader.locator("main").inner_text().count("Solution.") == 4
    assert "=== 3. Verdicts ===" in (leader.locator("#first pre").last.text_content() or "")


def test_its_minutes_follow_each_other_and_name_sections_of_the_page(
    browser: Any, pages: dict[str, Any]
) -> None:
    page = Opened(browser, Path(pages["leader"]), 1440).page
    rows = page.locator("#plan tbody tr")
    ends = ["0"]
    for number in range(rows.count()):
        start, end = rows.nth(number).locator("th").inner_text().split(" to ")
        assert start == ends[-1]
        ends.append(end)
        anchor = rows.nth(number).locator("a").get_attribute("href")
        assert page.locator(anchor).count() == 1
    assert ends[-1] == "90"


def test_runs_that_are_missing_are_named(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(KitError, match=r"of the method ratio-.*method=ratio-0\.5 out="):
        workshop.workshop(runs[:1], tmp_path / "out", 1)
    with pytest.raises(KitError, match="of the method palign"):
        workshop.check(runs[1:], runs)
    with pytest.raises(KitError, match="holds no run"):
        workshop.check(runs, [tmp_path])
    early = make(tmp_path / "early", upto="teach")
    with pytest.raises(KitError, match=r"has no judged trace.*end first"):
        workshop.workshop([early, runs[1]], tmp_path / "out", 1)
    assert not (tmp_path / "out").exists()


def solved(checked: dict[str, Any]) -> set[tuple[str, str]]:
    """Which runs solve which exercises."""
    every = checked["checked"]
    return {(Path(c["run"]).name, c["exercise"]) for c in every if c["solved"]}


def test_another_key_than_the_exercises_does_not_solve_it(runs: list[Path], tmp_path: Path) -> None:
    """Made-up earlier cuts of wordier traces; with a second key changed they count for nothing."""
    wordy = make(tmp_path / "wordy", upto="truncate", teacher__wordiness=3)
    also = make(tmp_path / "also", upto="truncate", teacher__wordiness=3, student__dtype="fp32")
    for folder in (wordy, also):
        file = RowFile(folder / "prefixes.jsonl", PrefixRow)
        rows = []
        for row in file.read():
            first = {"sentences": 1, "ratio": 1 / row.sentences_total}
            rows.append(row if row.rejected else row.model_copy(update=first))
        file.write_all(rows)
    checked = workshop.check(runs, [wordy, also])
    assert solved(checked) == {("wordy", "turn wordiness")}
    [other] = [
        c["other_keys"]
        for c in checked["checked"]
        if c["run"].endswith("also") and c["exercise"] == "turn wordiness"
    ]
    assert other == ["student.dtype", "eval.dtype"]


def commands(page: Path, start: str) -> list[str]:
    """What a page tells people to type."""
    text = page.read_text(encoding="utf-8")
    blocks = [html.unescape(block) for block in re.findall(r"<pre>(.*?)</pre>", text, re.DOTALL)]
    return [block for block in blocks if block.startswith(start)]


def palign(command: str, folder: Path) -> str:
    """Run a printed command in a folder that has the kit; its standard output."""
    words = shlex.split(command)
    assert words[0] == "python"
    done = subprocess.run(
        [sys.executable, *words[1:]], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_solutions_on_the_leaders_page_solve_the_exercises(tmp_path: Path) -> None:
    """Real runs of few problems: the first two exercises, and an answer to the third."""
    for name in ("palign.py", "kit", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    small = "data.train.limit=8 data.eval.limit=12 train.epochs=1 eval.sampling.max_new_tokens=60"
    for method, out in (("palign", "w-palign"), ("ratio-0.5", "w-half")):
        command = (
            f"python palign.py run configs/workshop.yaml method={method} out=runs/{out} {small}"
        )
        palign(command, tmp_path)
    runs = "runs/w-palign runs/w-half"
    palign(f"python palign.py workshop {runs} --participants 2", tmp_path)
    leader = tmp_path / "workshop" / "leader.html"
    text = re.sub(r"\s+", " ", html.unescape(leader.read_text(encoding="utf-8")))
    assert "=== 8. One step of LoRA ===" in text
    wordy, broken, _ = commands(leader, "python palign.py run runs/w-palign")
    [value] = re.findall(r"<code>teacher\.wordiness=([\d.]+)</code>", text)
    palign(wordy.replace("VALUE", value), tmp_path)
    [threshold, other] = re.findall(r"<code>judge\.threshold=(-?\d+)</code>", text)
    palign(broken.replace("KEY=VALUE", f"threshold={threshold}"), tmp_path)
    again = broken.replace("leader-broken", "leader-other").replace(
        "KEY=VALUE", f"threshold={other}"
    )
    palign(again, tmp_path)
    folders = "runs/leader-wordy runs/leader-broken runs/leader-other runs/w-palign"
    checked = palign(f"python palign.py workshop {runs} --check {folders} --json", tmp_path)
    result = json.loads(checked)
    print(json.dumps(result, indent=1))
    right = {
        ("leader-wordy", "turn wordiness"),
        ("leader-broken", "break the judge"),
        ("leader-other", "break the judge"),
    }
    assert solved(result) - {("w-palign", "beat the fixed cut")} == right
    [beat] = [
        c for c in result["checked"] if c["run"].endswith("w-palign") and "beat" in c["exercise"]
    ]
    assert "correct within 48 tokens" in beat["numbers"] and "on 12 problems" in beat["numbers"]
    shutil.rmtree(tmp_path / "runs")
