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
    """How long each call of one way took, and what it returned."""

    all_seconds: list[float]
    results: list[Any]

    @property
    def seconds(self) -> float:
        """The median."""
        return median(self.all_seconds)


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
    ways: Mapping[str, Callable[..., Any]], repeats: int, progress: Progress, *args: Any
) -> dict[str, Timing]:
    """Call every way once per round, with `args`; the order turns around from round to round."""
    timings = {name: Timing([], []) for name in ways}
    names = list(ways)
    for number in range(1, repeats + 1):
        for name in names:
            started = time.perf_counter()
            timings[name].results.append(ways[name](*args))
            seconds = time.perf_counter() - started
            timings[name].all_seconds.append(seconds)
            progress.say(f"round {number} of {repeats}: {name} {seconds:.1f} s")
        names.reverse()
    return timings
