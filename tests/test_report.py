"""The pages, in a real browser, and the table for the terminal."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from jinja2 import Environment, FileSystemLoader

from kit.core import config
from kit.core.progress import Progress
from kit.core.records import PrefixRow
from kit.core.run import Run
from kit.core.storage import RowFile
from kit.reporting import compare, report
from kit.reporting.metrics import Files, numbers
from tests.browser import COMPARISON, REPORT, Opened, check
from tests.make_run import HOSTILE, make

TEN = (
    "palign",
    "long-trace",
    "ratio-0.5",
    "post-think",
    "first-correct",
    "binary-cut",
    "step-entropy",
    "no-verify",
    "mix-long-short",
    "fixed-prefix-matched",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, real_data: Path) -> Path:
    return make(tmp_path_factory.mktemp("runs") / "whole", real_data, seed=3)


@pytest.fixture(scope="module")
def pages(folder: Path, real_data: Path) -> dict[str, Path]:
    """The pages of four kinds of run.

    One is whole, one stopped at once, one has only hostile traces, and one compares several.
    """
    root = folder.parent
    hostile = make(root / "hostile", upto="align")
    file = RowFile(hostile / "prefixes.jsonl", PrefixRow)
    rows = [row for row in file.read() if row.id.startswith("bad")]
    assert len(rows) == len(HOSTILE)
    file.write_all(rows)
    runs = {
        "whole": Files(folder),
        "short": Files(make(root / "short", upto="teach")),
        "hostile": Files(hostile),
    }
    runs["hostile"].config["name"] = "<script>alert('name')</script>"
    paths = {}
    for name, files in runs.items():
        paths[name] = root / f"{name}.html"
        paths[name].write_text(report.page(files, numbers(files)), encoding="utf-8")
    folders = [
        folder,
        make(root / "other", real_data, seed=4),
        make(root / "long", real_data, seed=3, method="long-trace"),
        make(root / "bare", upto="truncate"),
    ]
    paths["compare"] = root / "compare.html"
    compare.compare(folders, paths["compare"])
    return paths


@pytest.fixture(scope="module")
def ten(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Ten methods side by side, the first one with two seeds; made up as all of these runs."""
    root = tmp_path_factory.mktemp("ten")
    folders = [make(root / method, seed=1, method=method) for method in TEN]
    folders.insert(1, make(root / "again", seed=2, method=TEN[0]))
    return compare.compare(folders, root / "compare.html")


def test_ten_methods_are_one_table_one_forest_plot_and_one_scatter(
    browser: Any, ten: dict[str, Any]
) -> None:
    check(browser, Path(ten["page"]), COMPARISON)
    page = Opened(browser, Path(ten["page"]), 1440).page
    assert page.locator("#scores table").count() == 1
    forests = page.locator("#short svg.chart")
    scatters = page.locator("#scores svg.chart:has(circle)")
    assert forests.count() == scatters.count() == len(ten["within"]) == 2
    for number, dataset in enumerate(ten["within"]):
        # a row for each method but the reference, the best on top
        rows = forests.nth(number).locator("text.label").all_text_contents()
        wanted = [
            pair for pair in ten["pairs"] if (pair["a"], pair["dataset"]) == (TEN[0], dataset)
        ]
        wanted.sort(key=lambda pair: -pair["difference"])
        assert [row.strip() for row in rows] == [pair["b"] for pair in wanted] and len(rows) == 9
        assert scatters.nth(number).locator("circle").count() == 10
    shown = page.locator("#lesson .col").all_inner_texts()
    assert [text.split(",")[0] for text in shown] == list(ten["lesson"]["shown"]) == list(TEN)
    # what is long is closed at first: the words, the runs, the pairs, the curves, the answers
    assert page.locator("details[open] summary").count() == 0
    page.close()


@pytest.mark.parametrize(
    ("name", "sections"),
    [("whole", REPORT), ("short", ()), ("hostile", ()), ("compare", COMPARISON)],
)
def test_page_is_quiet_and_fits(
    browser: Any, pages: dict[str, Path], name: str, sections: tuple[str, ...]
) -> None:
    check(browser, pages[name], sections)


def test_charts_and_texts_are_there(browser: Any, pages: dict[str, Path]) -> None:
    page = Opened(browser, pages["whole"], 1440).page
    assert page.locator("svg.chart").count() >= 6  # histogram, four traces, training
    assert page.locator(".col").count() >= 9
    assert "96.6%" in page.locator(".tiles").inner_text()
    training = page.locator("section", has=page.locator("#training-h")).inner_text()
    assert "Gradient, layers 10-19" in training and "slope of the loss 1.52" in training
    scores = page.locator("section", has=page.locator("#scores-h")).inner_text()
    assert "posterior" in scores and "1 = 1.7 points" in scores
    page.close()


def test_hostile_text_is_shown_and_harmless(browser: Any, pages: dict[str, Path]) -> None:
    opened = Opened(browser, pages["hostile"])
    page = opened.page
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    text = page.locator("body").inner_text()
    assert HOSTILE[0].split(" So")[0] in text
    assert page.locator("h1").inner_text() == "<script>alert('name')</script>"
    assert "⟨U+202E⟩ reversed" in text and "⟨U+0000⟩" in text and "{{ 7 * 7 }}" in text
    assert "characters left out" in text and "x" * 5000 not in text
    html = pages["hostile"].read_text(encoding="utf-8")
    assert not set(html) & set("\x00\x07\x1b\u202e\u2066\u200f")
    assert not any(0xD800 <= ord(character) < 0xE000 for character in html)
    assert opened.trouble == []
    page.close()


def test_the_policy_stops_what_slips_through(
    browser: Any, pages: dict[str, Path], tmp_path: Path
) -> None:
    """Were a script or a picture from elsewhere ever in the page, the browser would refuse it."""
    slipped = tmp_path / "slipped.html"
    html = pages["short"].read_text(encoding="utf-8")
    bad = "<script>document.title = 'ran'</script><img src='https://example.org/pixel.png'>"
    slipped.write_text(html.replace("</main>", bad + "</main>"), encoding="utf-8")
    opened = Opened(browser, slipped)
    assert opened.page.title() != "ran"
    assert any("Content Security Policy" in line for line in opened.trouble)
    assert opened.failed == ["csp"]
    opened.page.close()


def test_keyboard_and_paper(browser: Any, pages: dict[str, Path]) -> None:
    page = Opened(browser, pages["whole"]).page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    closed = page.locator("#verdicts details:not([open]) .text").first
    assert not closed.is_visible()
    page.emulate_media(media="print")
    assert closed.bounding_box()["height"] > 20  # paper cannot be unfolded
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(browser: Any, pages: dict[str, Path], scheme: str) -> None:
    """WCAG AA (4.5) for text, soft text, links and tags on what they stand on."""
    page = Opened(browser, pages["whole"], color_scheme=scheme).page
    colours = page.evaluate(
        """() => Object.fromEntries(
            ['paper', 'ink', 'soft', 'tint', 'a', 'a-tint', 'b', 'b-tint'].map(name => {
                const element = document.createElement('i');
                element.style.color = `var(--${name})`;
                document.body.append(element);
                return [name, getComputedStyle(element).color.match(/\\d+/g).map(Number)];
            }))"""
    )
    page.close()

    def light(name: str) -> float:
        """Relative luminance of an sRGB colour."""
        luminance = 0.0
        for weight, channel in zip((0.2126, 0.7152, 0.0722), colours[name], strict=True):
            value = channel / 255
            linear = value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
            luminance += weight * linear
        return luminance

    pairs = {
        "paper": ("ink", "soft", "a", "b"),
        "tint": ("ink", "soft"),
        "a-tint": ("ink",),
        "b-tint": ("b",),
    }
    for front, back in [(front, back) for back, fronts in pairs.items() for front in fronts]:
        low, high = sorted((light(front), light(back)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (front, back)


def test_size_is_bounded(pages: dict[str, Path]) -> None:
    assert all(path.stat().st_size < 400_000 for path in pages.values())


def test_pieces_are_the_trace(folder: Path) -> None:
    for row in RowFile(folder / "prefixes.jsonl", PrefixRow).read():
        parts = report.pieces(row)
        assert "".join(text for text, _ in parts["kept"]) == row.trace[: row.end]
        assert "".join(text for text, _ in parts["rest"]) == row.trace[row.end :]
        verdicts = [verdict for _, verdict in parts["kept"] + parts["rest"] if verdict]
        judged = [verdict["sentences"] for verdict in verdicts]
        assert judged == sorted({verdict.sentences for verdict in row.verdicts})


def test_text_is_shortened_with_a_count() -> None:
    shown = report.clip("a" * 30_000 + "<b>" + "c" * 20_000, 900)
    assert "49,103 characters left out" in shown and "<b>" not in shown and len(shown) < 1000
    assert report.clip("short <b>", 900) == "short <b>"  # escaped where it is put in
    assert report.visible("a\ud800b\u202ec\td\n") == "a⟨U+D800⟩b⟨U+202E⟩c\td\n"


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0, 7), (-4.6, 1.8), (0.71, 0.74), (3, 3), (0, 32768), (-1e-3, 0)]
)
def test_ticks_span_the_data(low: float, high: float) -> None:
    ticks = report.ticks(low, high)
    assert ticks[0] <= low + 1e-9 and ticks[-1] >= high - 1e-9 and 2 <= len(ticks) <= 8
    assert len({round(b - a, 9) for a, b in pairwise(ticks)}) == 1


@pytest.mark.parametrize("high", [1, 2, 3, 7, 36, 61, 520, 32768])
def test_ticks_of_a_count_end_with_it(high: int) -> None:
    ticks = report.ticks(0, high, whole=True)
    assert ticks[0] == 0 and ticks[-1] == high and 2 <= len(ticks) <= 8
    assert all(isinstance(tick, int) for tick in ticks) and ticks == sorted(set(ticks))


def difference(low: float, middle: float, high: float) -> dict[str, float]:
    return {"ci_low": low, "difference": middle, "ci_high": high}


def test_a_picture_of_differences_reaches_to_all_but_very_wide_intervals() -> None:
    assert report.reach([difference(-0.02, 0.0, 0.02)]) == 0.06
    assert report.reach([difference(-0.9, 0.05, 0.95)]) == 1
    narrow = [difference(-0.1, 0.0, 0.1), difference(-0.3, -0.2, -0.1), difference(0.2, 0.3, 0.4)]
    assert report.reach(narrow) == 0.4
    assert report.reach([*narrow, difference(-0.55, -0.2, 0.15)]) == 0.6
    assert report.reach([*narrow, difference(-0.9, 0.05, 0.95)]) == 0.6
    assert report.reach([*narrow, difference(0.4, 0.7, 1.0)]) == 1


def test_an_interval_wider_than_its_picture_ends_in_arrowheads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [make(tmp_path / method, seed=1, method=method) for method in TEN[:5]]
    page = tmp_path / "page.html"
    arrowhead = ("An arrowhead: the interval goes on.", 'class="low high"', "M384 ")
    compare.compare(folders, page)
    assert not any(mark in page.read_text(encoding="utf-8") for mark in arrowhead)

    real = compare.compare_rows

    def with_one_wide(*rows: Any) -> Any:
        test = real(*rows)
        monkeypatch.setattr(compare, "compare_rows", real)
        return replace(test, ci_low=-0.9, ci_high=0.95)

    monkeypatch.setattr(compare, "compare_rows", with_one_wide)
    compare.compare(folders, page)
    assert all(mark in page.read_text(encoding="utf-8") for mark in arrowhead)


def test_table_is_plain_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report.show(numbers(Files(folder)))
    text = capsys.readouterr().out
    assert "\x1b" not in text and "<" not in text and max(map(len, text.splitlines())) <= 110
    for words in ("truncate", "median prefix ratio", "verdicts", "computed", "cached"):
        assert words in text, words
    assert "training loss" in text and "n = 60" in text
    report.show(numbers(Files(make(folder.parent / "begun", upto="teach"))))
    assert "begun" in capsys.readouterr().out


@pytest.mark.parametrize("columns", [80, 140])
def test_the_terminals_width_is_kept(
    folder: Path, columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    report.show(numbers(Files(folder)))
    longest = max(map(len, capsys.readouterr().out.splitlines()))
    assert min(columns, 100) - 20 < longest <= min(columns, 100)
    other = make(folder.parent / "at_80", seed=5)
    compare.show(compare.compare([folder, other], folder.parent / "at_80.html"))
    table = capsys.readouterr().out.split("\n\n")[0]
    assert max(map(len, table.splitlines())) <= 80


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(None, "–"), (0.44, "0.4 s"), (200, "3 min 20 s"), (599.7, "10 min"), (7500, "125 min")],
)
def test_duration(seconds: float | None, words: str) -> None:
    times = Environment(loader=FileSystemLoader(report.TEMPLATES)).get_template("time.j2").module
    assert times.duration(seconds).strip() == words  # type: ignore[attr-defined]


def test_the_stage_writes_the_same_again(tmp_path: Path) -> None:
    folder = make(tmp_path / "run", upto="align")
    settings = config.resolve(yaml.safe_load((folder / "config.yaml").read_text()), "config.yaml")
    with Run(settings, Progress(quiet=True)) as run:
        report.report(run)
        pages = [(folder / name).read_bytes() for name in ("report.html", "metrics.json")]
        assert numbers(Files(folder)) == json.loads(pages[1])
        (folder / "report.html").write_text("gone")
        report.report(run)
    assert [(folder / name).read_bytes() for name in ("report.html", "metrics.json")] == pages
