"""Measurements: named ways of doing one thing, side by side in one run, medians over repeats.

Numbers of different runs or machines are not compared here; tests assert nothing about speed.
"""

import subprocess
import sys
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
        {subject, rows: [...], ...}, rows as each module of kit.bench documents them. With
        `neighbour`, each also has busy_seconds, beside a process that keeps a core busy, and
        busy_speed_ratio: the speed there over the quiet one.
    """
    bench = resolve_name(f"kit.bench.{options.subject}:bench")
    result = {"subject": options.subject, **bench(options, progress)}
    if options.neighbour:
        neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        try:
            beside = bench(options, progress)["rows"]
        finally:
            neighbour.kill()
            neighbour.wait()
        for row, busy in zip(result["rows"], beside, strict=True):
            row["busy_seconds"] = busy["seconds"]
            row["busy_speed_ratio"] = row["seconds"] / busy["seconds"]
    return result


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
