"""The report of a run: one self-contained HTML page, metrics.json beside it, and a table for the terminal.

All are templates in configs/, charts included. A page has no network and no script; model text in it is escaped
and its control characters are shown. The numbers are kit/metrics.py's; several runs are kit/compare.py's.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from markupsafe import Markup

from kit.core.config import flat
from kit.core.progress import visible
from kit.core.records import PrefixRow
from kit.core.run import Run
from kit.core.storage import write_atomic
from kit.judging.sentences import ends
from kit.reporting.metrics import Files, numbers, percent

TEMPLATES = Path(__file__).parent / "templates"
CURVES, EXAMPLES, CHIPS = (
    4,
    3,
    24,
)  # traces with their verdicts, rows to read, verdicts marked in a text


def report(run: Run) -> None:
    """The stage: metrics.json and report.html from whatever the run holds, made anew each time."""
    files = Files(run.folder)
    found = numbers(files)
    write_atomic(run.path("metrics.json"), json.dumps(found, indent=1) + "\n")
    write_atomic(run.path("report.html"), page(files, found))
    run.progress.say(f"report: {run.path('report.html')}")


def page(files: Files, found: dict[str, Any]) -> str:
    """The page of a run, from its rows and its numbers."""
    traces = {row.id: row.trace for row in files.prefixes}
    kept = sorted(
        (row for row in files.aligned if not row.rejected), key=lambda row: len(row.prefix)
    )
    lost = [row for row in files.aligned if row.rejected][:1]
    judged = sorted((row for row in files.prefixes if row.verdicts), key=lambda row: row.ratio)
    examples = [
        {"row": row, "trace": traces.get(row.id, row.prefix)}
        for row in spread(kept, EXAMPLES) + lost
    ]
    curves = [{"row": row, **pieces(row)} for row in spread(judged, CURVES)]
    return render("report.html.j2", run=found, files=files, curves=curves, examples=examples)


def show(found: dict[str, Any]) -> None:
    """Print a run's numbers for a person."""
    print(render("report.txt.j2", run=found))


def show_judged(result: dict[str, Any]) -> None:
    """Print each trace's verdict curve: the margin's distance from the threshold by position, the cut in words."""
    print(render("judge.txt.j2", **result))


def render(template: str, **fields: Any) -> str:
    """A page (its texts escaped) or a table from a template in configs/; control characters are shown."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    page = Environment(autoescape=".html" in template, undefined=StrictUndefined)  # noqa: S701 (the others are plain)
    page.loader, page.trim_blocks, page.lstrip_blocks = FileSystemLoader(TEMPLATES), True, True
    page.finalize = lambda value: visible(value) if type(value) is str else value
    page.filters |= {
        "percent": percent,
        "clip": clip,
        "count": lambda n: "–" if n is None else f"{n:,}",
    }
    page.filters["basename"] = os.path.basename
    page.globals |= {"ticks": ticks, "scale": scale, "flat": flat}
    return page.get_template(template).render(**fields)


def clip(text: str, limit: int) -> Any:
    """A text's beginning and end as markup, with the count of what was left out between."""
    if len(text) <= limit + 80:
        return visible(text)
    head, tail = text[: limit * 2 // 3], text[-(limit // 3) :]
    gap = Markup('{} <span class="gap">… {:,} characters left out …</span> {}')
    return gap.format(visible(head), len(text) - len(head) - len(tail), visible(tail))


def spread(rows: Sequence[Any], count: int) -> list[Any]:
    """At most `count` rows, evenly spaced, the first and the last among them."""
    last = len(rows) - 1
    return (
        list(rows) if last < count else [rows[round(i * last / (count - 1))] for i in range(count)]
    )


def pieces(row: PrefixRow) -> dict[str, Any]:
    """A trace between the boundaries that were asked: {kept, rest}, lists of (text, the verdict behind it or None)."""
    places = ends(row.trace)
    asked = spread(sorted(row.verdicts, key=lambda v: v.sentences), CHIPS)
    marks = {places[v.sentences - 1]: v.model_dump() for v in asked}
    cuts = sorted({0, *marks, row.end, len(row.trace)})
    parts = [
        (end <= row.end, row.trace[start:end], marks.get(end)) for start, end in pairwise(cuts)
    ]
    return {
        name: [(text, v) for kept, text, v in parts if kept == (name == "kept")]
        for name in ("kept", "rest")
    }


def ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """About four round numbers that span [low, high]; of a count (`whole`) the last is `high` itself."""
    span = high - low or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= span / 4 * 0.999)
    if whole:
        return [*range(low, math.ceil(0.9 * high), max(math.ceil(step), 1)), high]
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, max(last, first + 1) + 1)]


def scale(values: Sequence[float], start: float, end: float) -> Any:
    """A function from data to picture: the first of `values` lies at `start`, the last at `end`."""
    return lambda value: round(
        start + (value - values[0]) / (values[-1] - values[0]) * (end - start), 1
    )
