"""Measurements: named ways of doing one thing, side by side in one run, medians over repeats.

Numbers of different runs or machines are not compared here; tests assert nothing about speed.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from pkgutil import resolve_name
from statistics import median
from typing import Any, NamedTuple

from kit.core.progress import Progress


class Timing(NamedTuple):
    """One way's median duration, and what its calls returned."""

    seconds: float
    results: list[Any]


def run(options: Namespace, progress: Progress) -> dict[str, Any]:
    """Measure one subject.

    Args:
        options: of palign.py bench: subject, traces, limit, backend, model, verdicts, repeats, ...

    Returns:
        {subject, rows: [...], ...}, rows as each module of kit.bench documents them.
    """
    bench = resolve_name(f"kit.bench.{options.subject}:bench")
    return {"subject": options.subject, **bench(options, progress)}


def measure(
    ways: Mapping[str, Callable[[], Any]], repeats: int, progress: Progress
) -> dict[str, Timing]:
    """Call every way once per round; the order turns around from one round to the next."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    results: dict[str, list[Any]] = {name: [] for name in ways}
    names = list(ways)
    for number in range(repeats):
        for name in names:
            started = time.perf_counter()
            results[name].append(ways[name]())
            seconds[name].append(time.perf_counter() - started)
            progress.say(f"round {number + 1} of {repeats}: {name} {seconds[name][-1]:.1f} s")
        names.reverse()
    return {name: Timing(median(seconds[name]), results[name]) for name in ways}
