"""Measurements: side by side in one run, ratios against a named baseline, medians of repeats.

Numbers of different runs or machines are not compared here; nothing is asserted about speed in tests.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from kit.core.errors import KitError
from kit.core.progress import Progress


def run(args: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """Measure one subject. Returns {subject, rows: [...], ...}, rows as each bench module documents them."""
    if args.subject == "judge":
        from kit.bench.judge import bench as judge

        if not args.traces:
            raise KitError("bench judge measures on traces.", "Name a JSONL with --traces FILE.", 2)
        return judge(
            Path(args.traces),
            args.limit,
            args.backend,
            args.model,
            args.verdicts,
            args.repeats,
            progress=progress,
        )
    if args.subject == "generate":
        from kit.bench.generate import bench as generate

        return generate(args.limit or 32, args.new_tokens, args.repeats, args.model)
    if args.subject == "train":
        from kit.bench.train import bench as train

        return train(args.tokens, args.repeats, args.model)
    from kit.bench.grade import bench as grade

    return grade(args.repeats)
