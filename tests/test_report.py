"""The pages, in a real browser, and the terminal's table."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from jinja2 import Environment, FileSystemLoader

from kit.core import config
from kit.core.errors import KitError
from kit.core.progress import Progress
from kit.core.records import EvalRow, PrefixRow, Sample
from kit.core.run import Run
from kit.core.storage import RowFile
from kit.grading.scores import accuracy
from kit.reporting import compare, report
from kit.reporting.metrics import Files, numbers
from tests.browser import COMPARISON, REPORT, Opened, check
from tests.conftest import SHARED
from tests.make_run import HOSTILE, make


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("runs") / "whole", SHARED, seed=3)


@pytest.fixture(scope="module")
def pages(folder: Path) -> dict[str, Path]:
    """The pages of a whole run, of one that stopped at once, of only hostile traces, and of a comparison."""
    root, files = folder.parent, Files(folder)
    short = Files(make(root / "short", upto="teach"))
    hostile = make(root / "hostile", upto="align")
    rows = [
        row
        for row in RowFile(hostile / "prefixes.jsonl", PrefixRow).read()
        if row.id.startswith("bad")
    ]
    assert len(rows) == len(HOSTILE)
    RowFile(hostile / "prefixes.jsonl", PrefixRow).write_all(rows)
    bad = Files(hostile)
    bad.config["name"] = "<script>alert('name')</script>"
    made = {name: root / f"{name}.html" for name in ("whole", "short", "hostile", "compare")}
    for name, found in (("whole", files), ("short", short), ("hostile", bad)):
        made[name].write_text(report.page(found, numbers(found)), encoding="utf-8")
    runs = [
        folder,
        make(root / "other", SHARED, seed=4),
        make(root / "long", SHARED, seed=3, method="long-trace"),
    ]
    compare.compare([*runs, make(root / "bare", upto="truncate")], made["compare"])
    return made


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
    page.close()


def test_hostile_text_is_shown_and_harmless(browser: Any, pages: dict[str, Path]) -> None:
    opened = Opened(browser, pages["hostile"])
    page = opened.page
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    text = page.locator("body").inner_text()
    assert (
        "<script>alert('trace')</script></style></title></svg><img src=x onerror=alert(1)>" in text
    )
    assert page.locator("h1").inner_text() == "<script>alert('name')</script>"
    assert "⟨U+202E⟩ reversed" in text and "⟨U+0000⟩" in text and "{{ 7 * 7 }}" in text
    assert "characters left out" in text and "x" * 5000 not in text
    html = pages["hostile"].read_text(encoding="utf-8")
    assert not any(
        ord(c) in (0, 7, 0x1B, 0x202E, 0x2066, 0x200F) or 0xD800 <= ord(c) < 0xE000 for c in html
    )
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
        """() => Object.fromEntries(['paper','ink','soft','tint','a','a-tint','b','b-tint'].map(n => {
            const d = document.createElement('i'); d.style.color = `var(--${n})`; document.body.append(d);
            return [n, getComputedStyle(d).color.match(/\\d+/g).map(Number)] }))"""
    )
    page.close()

    def light(name: str) -> float:
        linear = [
            (c / 255 / 12.92) if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4
            for c in colours[name]
        ]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    on = [
        ("ink", "paper"),
        ("soft", "paper"),
        ("a", "paper"),
        ("b", "paper"),
        ("ink", "a-tint"),
        ("b", "b-tint"),
    ]
    for front, back in [*on, ("ink", "tint"), ("soft", "tint")]:
        high, low = sorted((light(front), light(back)), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5, (front, back)


def test_size_is_bounded(pages: dict[str, Path]) -> None:
    assert all(path.stat().st_size < 400_000 for path in pages.values())


def test_pieces_are_the_trace(folder: Path) -> None:
    for row in RowFile(folder / "prefixes.jsonl", PrefixRow).read():
        parts = report.pieces(row)
        assert "".join(text for text, _ in parts["kept"]) == row.trace[: row.end]
        assert "".join(text for text, _ in parts["rest"]) == row.trace[row.end :]
        asked = [verdict["sentences"] for part in parts.values() for _, verdict in part if verdict]
        assert asked == sorted({v.sentences for v in row.verdicts})


def test_text_is_shortened_with_a_count() -> None:
    shown = report.clip("a" * 30_000 + "<b>" + "c" * 20_000, 900)
    assert "49,103 characters left out" in shown and "<b>" not in shown and len(shown) < 1000
    assert report.clip("short <b>", 900) == "short <b>"  # escaped where it is put in
    assert report.visible("a\ud800b\u202ec\td\n") == "a⟨U+D800⟩b⟨U+202E⟩c\td\n"


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0, 7), (-4.6, 1.8), (0.71, 0.74), (3, 3), (0, 32768), (-1e-3, 0)]
)
def test_ticks_span_the_data(low: float, high: float) -> None:
    found = report.ticks(low, high)
    assert found[0] <= low + 1e-9 and found[-1] >= high - 1e-9 and 2 <= len(found) <= 8
    assert len({round(b - a, 9) for a, b in pairwise(found)}) == 1


@pytest.mark.parametrize("high", [1, 2, 3, 7, 36, 61, 520, 32768])
def test_ticks_of_a_count_end_with_it(high: int) -> None:
    found = report.ticks(0, high, whole=True)
    assert found[0] == 0 and found[-1] == high and 2 <= len(found) <= 8
    assert all(isinstance(tick, int) for tick in found) and found == sorted(set(found))


def test_table_is_plain_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report.show(numbers(Files(folder)))
    text = capsys.readouterr().out
    assert "\x1b" not in text and "<" not in text and max(map(len, text.splitlines())) <= 110
    for words in (
        "truncate",
        "median prefix ratio",
        "verdicts asked",
        "evaluated",
        "reused",
        "training loss",
        "n = 60",
    ):
        assert words in text, words
    report.show(numbers(Files(make(folder.parent / "begun", upto="teach"))))
    assert "begun" in capsys.readouterr().out


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


def test_compare_pairs_and_groups(tmp_path: Path) -> None:
    runs = [make(tmp_path / f"p{seed}", seed=seed) for seed in (1, 2)]
    runs.append(make(tmp_path / "long", seed=1, method="long-trace"))
    runs.append(make(tmp_path / "answer", seed=1, judge__kind="answer", upto="truncate"))
    found = compare.compare(runs, tmp_path / "out.html")
    assert [group["seeds"] for group in found["groups"]] == [[1, 2], [1], [1]]
    labels = ["palign (p1)", "long-trace", "palign (answer)"]
    assert [group["label"] for group in found["groups"]] == labels
    palign, long = (next(s for s in found["scores"] if s["group"] == label) for label in labels[:2])
    each = [run["accuracy_after"] for run in found["runs"]]
    assert palign["by_run"] == pytest.approx(each[:2], abs=1e-4)
    assert palign["accuracy"] == pytest.approx(sum(each[:2]) / 2, abs=1e-4)
    assert (
        palign["spread"] == pytest.approx(abs(each[0] - each[1]) / 2**0.5, abs=1e-4)
        and long["spread"] is None
    )
    pair = found["pairs"][0]
    assert pair["n"] == 60 and pair["difference"] == pytest.approx(
        long["accuracy"] - palign["accuracy"], abs=2e-4
    )
    assert pair["ci_low"] <= pair["difference"] <= pair["ci_high"]
    assert set(found["differs"]) == {"seed", "method", "judge.kind"}
    assert all(len({a["share"] for a in item["answers"]}) > 1 for item in found["different"])
    best = {max(item["answers"], key=lambda a: a["share"])["group"] for item in found["different"]}
    assert (
        pair["better"] and pair["worse"] and best >= {"palign (p1)", "long-trace"}
    )  # shown in turn from each side
    told = pair["words"] in (
        "within the noise",
        f"{pair['b']} is ahead, barely",
        f"{pair['a']} is ahead, barely",
    )
    assert told == (
        abs(pair["difference"]) < pair["min_detectable_difference"] or pair["p_value"] >= 0.05
    )
    assert [(cut["b"], cut["traces"]) for cut in found["cuts"]] == [("answer", 24)] * 3
    for label, points in next(
        iter(found["within"].values())
    ):  # with all the room that there was: the accuracy itself
        ratios = [ratio for _, ratio in points]
        assert ratios == sorted(ratios) and points[0][0] == 0
        assert ratios[-1] == pytest.approx(
            palign["accuracy"] if label == labels[0] else long["accuracy"], abs=1e-4
        )
    lesson = found["lesson"]  # the run that stopped early taught nobody
    assert [target["group"] for target in lesson["targets"]] == labels[:2] == [*lesson["shown"]]
    for text in lesson["shown"].values():  # all of them were made of the trace beside them
        begin = (
            text.removeprefix("<Begin_of_Prefix>")
            .split("<End_of_Prefix>")[0]
            .split("\\boxed")[0]
            .rstrip()
        )
        assert begin and lesson["trace"].startswith(begin)
    search = lesson["search"]  # the cut of the very trace that is shown, by the group that is named
    assert search["group"] == labels[0] and search["row"]["trace"] == lesson["trace"]
    assert "".join(text for text, _ in search["kept"]) == lesson["trace"][: search["row"]["end"]]
    assert "".join(text for text, _ in search["kept"] + search["rest"]) == lesson["trace"]
    assert lesson["shown"][labels[0]].startswith(
        "<Begin_of_Prefix>" + lesson["trace"][: search["row"]["end"]].rstrip()
    )
    assert (tmp_path / "out.html").stat().st_size > 10_000
    compare.show(found)


def test_accuracy_by_token_budget_counts_problems_not_rows() -> None:
    def row(id: str, *samples: tuple[str, int]) -> EvalRow:
        made = tuple(Sample(text="", verdict=verdict, tokens=tokens) for verdict, tokens in samples)
        return EvalRow(id=id, question=id, answer="1", samples=made)

    rows = [
        row("a", ("correct", 10)),
        row("a", ("wrong", 5)),
        row("b", ("correct", 40), ("unparsed", 80)),
        row("c"),
    ]
    [(label, points)] = compare._within({"palign": rows})
    assert label == "palign" and points[0] == (0, 0) and len(points) == 81
    at = dict(points)
    assert (at[9], at[10], at[39]) == pytest.approx((0, 1 / 6, 1 / 6)) and at[40] == at[
        80
    ] == pytest.approx(1 / 3)
    assert at[80] == pytest.approx(accuracy(rows)["accuracy"], abs=1e-4)


def test_compare_tells_other_problems_apart(tmp_path: Path) -> None:
    """The same ids with other questions are other problems: never paired."""
    from kit.core.records import EvalRow

    runs = [make(tmp_path / "a", seed=1), make(tmp_path / "b", seed=1, method="no-search")]
    for path in (runs[1] / "eval").glob("*.jsonl"):
        file = RowFile(path, EvalRow)
        file.write_all(
            [row.model_copy(update={"question": row.question + " Other."}) for row in file.read()]
        )
    assert compare.compare(runs, tmp_path / "out.html")["pairs"] == []


def test_compare_needs_two_runs(tmp_path: Path) -> None:
    with pytest.raises(KitError, match="two runs"):
        compare.compare([tmp_path], tmp_path / "out.html")
    with pytest.raises(KitError, match="no run"):
        compare.compare([tmp_path, tmp_path], tmp_path / "out.html")


def test_reasoning_is_judged_on_both_runs_answers(tmp_path: Path) -> None:
    """The judge is given one answer a problem of each of the first two groups; what it says stands on the page."""
    runs = [make(tmp_path / "a", seed=1), make(tmp_path / "b", seed=1, method="no-search")]

    def judge(first: list[Any], second: list[Any]) -> dict[str, Any]:
        assert [row.id for row in first] == [row.id for row in second] and len(first) == 60
        told = {"judge": "a judge", "pairs": 60, "first": 10, "second": 30, "ties": 15, "flips": 5}
        return {**told, "p_value": 0.002, "first_shown_ratio": 0.61}

    found = compare.compare(runs, tmp_path / "out.html", judge)
    assert (
        found["quality"]["builtin"]["second"] == 30
        and found["quality"]["builtin"]["b"] == "no-search"
    )
    html = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert "Reasoning compared" in html and "a judge" in html and "61%" in html
    compare.show(found)
