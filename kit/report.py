"""The report of a run: one self-contained HTML page, metrics.json beside it, and a table for the terminal.

The page is configs/report.html.j2, charts included: no network, no script, model text escaped and its control
characters shown. Here its material is chosen; the numbers are kit/metrics.py's, several runs are kit/compare.py's.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from kit.metrics import Files, numbers
from kit.records import PrefixRow, write_atomic
from kit.run import Run, stopwatch
from kit.sentences import ends

TEMPLATES = Path(__file__).parents[1] / "configs"
CURVES, EXAMPLES, CHIPS = 4, 3, 24  # traces with their verdicts, rows to read, verdicts marked in a text
_HIDDEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff]"
)


def report(run: Run) -> None:
    """The stage: metrics.json and report.html from whatever the run holds."""
    others = {name: entry.get("output") for name, entry in run.manifest["stages"].items() if name != "report"}
    pages = "".join(path.read_text(encoding="utf-8") for path in sorted(TEMPLATES.glob("*.j2")))
    source = hashlib.sha256(json.dumps([others, run.config.model_dump(mode="json"), pages]).encode()).hexdigest()[:16]
    written = [run.path("metrics.json"), run.path("report.html")]

    def output() -> str:
        return hashlib.sha256(b"".join(p.read_bytes() for p in written if p.exists())).hexdigest()[:16]

    if not run.begin("report", source, output):
        return
    with stopwatch() as seconds:
        files = Files(run.folder)
        found = numbers(files)
        write_atomic(written[0], json.dumps(found, indent=1) + "\n")
        write_atomic(written[1], page(files, found))
    run.finish("report", output(), rows_in=len(files.traces), rows_out=len(files.train), seconds=seconds())
    run.progress.say(f"report: {written[1]}")


def page(files: Files, found: dict[str, Any]) -> str:
    """The run's page.

    Args:
        files: the run's rows.
        found: its numbers.
    """
    traces = {row.id: row.trace for row in files.prefixes}
    kept = sorted((row for row in files.aligned if not row.rejected), key=lambda row: len(row.prefix))
    lost = [row for row in files.aligned if row.rejected][:1]
    judged = sorted((row for row in files.prefixes if row.verdicts), key=lambda row: row.ratio)
    return render(
        "report.html.j2",
        run=found,
        files=files,
        ratios=[row.ratio for row in files.prefixes if not row.rejected],
        curves=[{"row": row, **pieces(row)} for row in spread(judged, CURVES)],
        examples=[{"row": row, "trace": traces.get(row.id, row.prefix)} for row in spread(kept, EXAMPLES) + lost],
        loss_points=[(line["step"], line["loss"]) for line in files.log],
        config=yaml.safe_dump(files.config, sort_keys=False, allow_unicode=True),
    )


def render(template: str, **fields: Any) -> str:
    """A page from a template in configs/; every text is escaped, its control characters are shown."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols"],
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    environment.filters |= {"percent": percent, "clip": clip, "count": lambda n: "–" if n is None else f"{n:,}"}
    environment.filters |= {"duration": duration, "tojson_plain": lambda value: json.dumps(value, ensure_ascii=False)}
    environment.globals |= {"ticks": ticks, "scale": scale, "upto": upto}
    return environment.get_template(template).render(**fields)


def visible(text: str) -> str:
    """Control characters, text-direction marks and lone surrogates as their names: harmless, and seen."""
    return _HIDDEN.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", text)


def clip(text: str, limit: int) -> Any:
    """A text's beginning and end as markup, with the count of what was left out between."""
    from markupsafe import Markup

    if len(text) <= limit + 80:
        return visible(text)
    head, tail = text[: limit * 2 // 3], text[-(limit // 3) :]
    gap = Markup('{} <span class="gap">… {:,} characters left out …</span> {}')
    return gap.format(visible(head), len(text) - len(head) - len(tail), visible(tail))


def percent(value: float | None, digits: int = 1, sign: str = "") -> str:
    """A share as per cent; a dash for none."""
    return "–" if value is None else f"{value:{sign}.{digits}%}"


def duration(seconds: float | None) -> str:
    """'0.4 s', '3 min 20 s', '2 h 5 min'."""
    if seconds is None or seconds < 100:
        return "–" if seconds is None else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 100 else f"{minutes} min {rest} s"


def spread(rows: Sequence[Any], count: int) -> list[Any]:
    """At most `count` rows, evenly spaced, the first and the last among them."""
    if len(rows) <= count:
        return list(rows)
    return [rows[round(i * (len(rows) - 1) / (count - 1))] for i in range(count)]


def pieces(row: PrefixRow) -> dict[str, Any]:
    """A trace between the boundaries that were asked: {kept, rest}, lists of (text, the verdict behind it or None)."""
    places = ends(row.trace)
    marked = spread(sorted(row.verdicts, key=lambda v: v.sentences), CHIPS)
    marks = {places[v.sentences - 1]: v for v in marked if 0 < v.sentences <= len(places)}
    parts: dict[str, list[Any]] = {"kept": [], "rest": []}
    start = 0
    for end in sorted({*marks, row.end, len(row.trace)}):
        if end > start:
            parts["kept" if end <= row.end else "rest"].append((row.trace[start:end], marks.get(end)))
        start = end
    return parts


def ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """About four round numbers that span [low, high]."""
    span = high - low or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= span / 4 * 0.999)
    step = max(math.ceil(step), 1) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, max(last, first + 1) + 1)]


def upto(high: int) -> list[float]:
    """Ticks of a count from 0, the last one `high` itself."""
    return [tick for tick in ticks(0, high, whole=True) if tick < 0.9 * high] + [high]


def scale(values: Sequence[float], start: float, end: float) -> Callable[[float], float]:
    """From data to picture: the first of `values` lies at `start`, the last at `end`."""
    return lambda value: round(start + (value - values[0]) / (values[-1] - values[0]) * (end - start), 1)


def show(found: dict[str, Any]) -> None:
    """Print a run's numbers."""
    from rich.console import Console

    Console().print(table(found))


def table(found: dict[str, Any]) -> Any:
    """A run's numbers for the terminal: rows of each stage, what judging cost, loss, accuracy, what to notice."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    stages = Table(title=f"{found['name']} ({found['method']})", title_justify="left", box=None, padding=(0, 3, 0, 0))
    stages.add_column("stage")
    for name in ("rows in", "rows out", "time"):
        stages.add_column(name, justify="right")
    for stage in found["stages"]:
        rows = [str(stage[key]) if stage["done"] else "–" for key in ("rows_in", "rows_out")]
        stages.add_row(stage["name"], *rows, duration(stage["seconds"]))
    facts = Table(box=None, show_header=False, padding=(0, 3, 0, 0))
    ratio, cost = found["prefix_ratio"], found["evaluated_tokens"] + found["reused_tokens"]
    if ratio["n"]:
        facts.add_row("median prefix ratio", f"{percent(ratio['p50'])} of the sentences, {ratio['n']} traces")
    if found["verdicts_asked"]:
        facts.add_row("verdicts asked", f"{found['verdicts_asked']} on {found['judged_traces']} traces")
        reused = f"{found['reused_tokens']:,} reused ({found['reused_tokens'] / max(cost, 1):.0%})"
        facts.add_row("judging tokens", f"{found['evaluated_tokens']:,} evaluated, {reused}")
    if found["loss_first"] is not None:
        facts.add_row("training loss", f"{found['loss_first']:.4f} first, {found['loss_last']:.4f} last step")
    for score in found["scores"]:
        told = f"{percent(score['accuracy'])} [{percent(score['low'])} to {percent(score['high'])}], n = {score['n']}"
        facts.add_row(f"accuracy {score['which']}, {score['dataset']}", told)
    notes = [
        Text(f"{'!' if f['level'] == 'warning' else '-'} {visible(' '.join(filter(None, (f['what'], f['try']))))}")
        for f in found["findings"]
    ]
    return Group("", stages, "", facts, "", *notes)
