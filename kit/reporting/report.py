"""The report of a run: one self-contained HTML page, metrics.json next to it, a table to print.

All are templates in templates/, charts included. A page has no network and no script; model text in
it is escaped and its control characters are shown. The numbers come from kit/reporting/metrics.py;
several runs are compared in kit/reporting/compare.py.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median_low
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from kit.core.config import flat
from kit.core.methods import learns
from kit.core.progress import visible
from kit.core.records import PrefixRow
from kit.core.run import Run
from kit.core.storage import write_atomic
from kit.judging.sentences import ends
from kit.reporting.metrics import Files, Json, numbers, percent, points

TEMPLATES = Path(__file__).parent / "templates"


def report(run: Run) -> None:
    """The stage: metrics.json and report.html from whatever the run holds, rewritten each time."""
    run.write_rejected()
    files = Files(run.folder)
    result = numbers(files)
    write_atomic(run.path("metrics.json"), json.dumps(result, indent=1) + "\n")
    write_atomic(run.path("report.html"), page(files, result))
    run.progress.say(f"report: {run.path('report.html')}")


def page(files: Files, run: Json) -> str:
    """The page of a run, from its rows and its numbers."""
    kept = [row for row in files.aligned if not row.rejected]
    kept.sort(key=lambda row: len(row.prefix))
    return render("report.html.j2", run=run, files=files, kept=kept)


def show(run: Json) -> None:
    """Print a run's numbers for a person."""
    print(render("report.txt.j2", run=run))


def show_judged(result: Json) -> None:
    """Print each trace's verdict curve: its margins around the threshold, and the cut in words."""
    print(render("judge.txt.j2", **result))


def render(template: str, **fields: Any) -> str:
    """A page (its texts escaped) or a table from a template; control characters are shown."""
    environment = Environment(
        autoescape=".html" in template,  # noqa: S701 (what is not a page is plain text)
        undefined=StrictUndefined,
        loader=FileSystemLoader(TEMPLATES),
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    environment.filters.update(
        percent=percent,
        points=points,
        clip=clip,
        count=lambda number: "–" if number is None else f"{number:,}",
        basename=os.path.basename,
    )
    # A terminal's lines break at its width.
    columns = min(100, shutil.get_terminal_size().columns)
    environment.globals.update(
        ticks=ticks,
        scale=scale,
        reach=reach,
        flat=flat,
        pieces=pieces,
        columns=columns,
        learns=learns,
    )
    return environment.get_template(template).render(fields)


def clip(text: str, limit: int) -> str:
    """A text's beginning and end, with the count of the characters that were left out between."""
    if len(text) <= limit + 80:
        return visible(text)
    head = text[: limit * 2 // 3]
    tail = text[-(limit // 3) :]
    # Markup.format escapes what is filled in.
    gap = Markup('{} <span class="gap">… {:,} characters left out …</span> {}')
    return gap.format(visible(head), len(text) - len(head) - len(tail), visible(tail))


def pieces(row: PrefixRow) -> Json:
    """A trace cut at the boundaries that were asked, in its kept part and the rest.

    Returns:
        {kept, rest}: lists of (text, the verdict after it or None).
    """
    # Where to divide the text, and the verdict to show there.
    boundaries = ends(row.trace)
    marks: dict[int, Json | None] = {0: None, row.end: None, len(row.trace): None}
    for verdict in row.verdicts:
        marks[boundaries[verdict.sentences - 1]] = verdict.model_dump()
    parts: Json = {"kept": [], "rest": []}
    for start, end in pairwise(sorted(marks)):
        part = "kept" if end <= row.end else "rest"
        parts[part].append((row.trace[start:end], marks[end]))
    return parts


def ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """About four round numbers that span [low, high]; of a count (`whole`) `high` is the last."""
    # The step is the smallest of 1, 2, 2.5 and 5 times a power of ten that needs four of it.
    span = high - low or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = min(m * power for m in (1, 2, 2.5, 5, 10) if 4.004 * m * power >= span)
    if whole:
        return [*range(int(low), math.ceil(0.9 * high), max(math.ceil(step), 1)), high]
    first = math.floor(low / step + 1e-9)
    last = max(math.ceil(high / step - 1e-9), first + 1)
    return [round(i * step, 10) for i in range(first, last + 1)]


def reach(pairs: Sequence[Json]) -> float:
    """How far a picture of paired differences goes to both sides of 0, in round numbers.

    One very wide interval would squeeze all others, so no end counts for more than twice the median
    width beyond its difference.
    """
    most = 2 * median_low(pair["ci_high"] - pair["ci_low"] for pair in pairs)
    needs = [0.05]
    for pair in pairs:
        end = max(pair["ci_high"], -pair["ci_low"])
        needs.append(min(end, abs(pair["difference"]) + most))
    return ticks(0, max(needs))[-1]


def scale(values: Sequence[float], start: float, end: float) -> Callable[[float], float]:
    """A function from data to picture: the first value lies at `start`, the last at `end`."""
    steps = (end - start) / (values[-1] - values[0])
    return lambda value: round(start + (value - values[0]) * steps, 1)
