"""Progress for people: rich bars with rates and time left on a terminal, plain lines elsewhere.

Everything said also goes, plain, to the run's log file. Nothing here computes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PLAIN_EVERY_SECONDS = 10.0


class Bar:
    """One stage's progress; `advance` as units finish."""

    def __init__(self, progress: Progress, name: str, total: int, unit: str, done: int = 0) -> None:
        self.progress, self.name, self.total, self.unit = progress, name, total, unit
        self.done, self.skipped, self.tokens = done, done, 0
        self.begun = self.told = time.monotonic()
        self.task: Any = None

    def advance(self, units: int = 1, tokens: int = 0) -> None:
        """Count finished units (and tokens, for the rate)."""
        self.done += units
        self.tokens += tokens
        now = time.monotonic()
        if self.task is not None:
            self.progress.live.update(self.task, completed=self.done, rate=self._rate(now))
        elif now - self.told >= PLAIN_EVERY_SECONDS or self.done >= self.total:
            self.told = now
            self.progress.say(f"{self.name}: {self.done}/{self.total} {self.unit}, {self._rate(now)}", log=False)

    def _rate(self, now: float) -> str:
        seconds = max(now - self.begun, 1e-9)
        fresh = self.done - self.skipped
        left = (self.total - self.done) * seconds / fresh if fresh else 0.0
        tokens = f"{self.tokens / seconds:.0f} tokens/s, " if self.tokens else ""
        return f"{tokens}{left:.0f} s left" if fresh and left else f"{tokens}{seconds:.0f} s"


class Progress:
    """Where a run speaks. Standard output stays free for `--json`: all of this goes to standard error."""

    def __init__(self, quiet: bool = False, verbose: bool = False, log: Path | None = None) -> None:
        self.quiet, self.verbose, self.log = quiet, verbose, log
        self.fancy = sys.stderr.isatty() and not os.environ.get("CI") and not quiet
        self.live: Any = None

    def say(self, text: str, log: bool = True) -> None:
        """One line for the user."""
        if not self.quiet:
            self._print(text)
        if log:
            self._log(text)

    def warn(self, text: str) -> None:
        """One line that is shown even with --quiet."""
        self._print(f"note: {text}")
        self._log(f"note: {text}")

    def detail(self, text: str) -> None:
        """One line for --verbose and the log."""
        if self.verbose:
            self._print(text)
        self._log(text)

    @contextlib.contextmanager
    def bar(self, name: str, total: int, unit: str = "rows", done: int = 0) -> Iterator[Bar]:
        """A bar over `total` units, of which `done` were there before."""
        bar = Bar(self, name, total, unit, done)
        if not self.fancy:
            yield bar
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Live

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
        )
        with Live(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True) as self.live:
            bar.task = self.live.add_task(name, total=total, completed=done, rate="")
            yield bar
        self.live = None

    def _print(self, text: str) -> None:
        if self.live is not None:
            self.live.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def _log(self, text: str) -> None:
        if self.log is not None:
            with contextlib.suppress(OSError), open(self.log, "a", encoding="utf-8") as out:
                out.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")


def tame_libraries(verbose: bool = False) -> None:
    """Quiet the libraries' own chatter; called before any of them is imported."""
    if not verbose:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", category=FutureWarning)  # the libraries' word to each other
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
