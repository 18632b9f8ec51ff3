"""Measurements: side by side in one run, ratios against a named baseline, medians of repeats.

Numbers of different runs or machines are not compared here; nothing is asserted about speed in tests.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from kit.errors import KitError
from kit.progress import Progress


def run(args: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """Measure one subject. Returns {subject, rows: [...], ...}, rows as each bench module documents them."""
    if args.subject == "judge":
        from tests.bench.judge import bench as judge

        if not args.traces:
            raise KitError("bench judge measures on traces.", "Name a JSONL with --traces FILE.", 2)
        return judge(
            Path(args.traces), args.limit, args.backend, args.model, args.verdicts, args.repeats, progress=progress
        )
    if args.subject == "generate":
        from tests.bench.generate import bench as generate

        return generate(args.limit or 32, args.new_tokens, args.repeats, args.model)
    if args.subject == "train":
        from tests.bench.train import bench as train

        return train(args.tokens, args.repeats, args.model)
    from tests.bench.grade import bench as grade

    return grade(args.repeats)


def show(result: dict[str, Any]) -> None:
    """Print the rows as a table and the other numbers below it."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"bench {result.get('subject', '')}".strip())
    names = list(dict.fromkeys(key for row in result["rows"] for key in row))
    for name in names:
        table.add_column(name, justify="left" if name == "name" else "right")
    for row in result["rows"]:
        table.add_row(*(f"{v:.4g}" if isinstance(v := row.get(name, ""), float) else str(v) for name in names))
    console = Console()
    console.print(table)
    for key, value in result.items():
        if not isinstance(value, (list, dict)):
            console.print(f"{key}: {value}", highlight=False)
