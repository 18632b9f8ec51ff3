"""Progress for people: rich bars with rates and time left on a terminal, plain lines elsewhere.

Everything said also goes, plain, to the run's log file. Nothing here computes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

PLAIN_EVERY_SECONDS = 10.0
_BAD = re.compile(
    r"[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff]"
)


class Bar:
    """One stage's progress; `advance` as units finish. `tell` is given the count and its rate, in words."""

    def __init__(self, total: int, done: int, tell: Callable[[int, str], None]) -> None:
        self.total, self.skipped, self.done, self.tokens, self.tell = total, done, done, 0, tell
        self.begun = time.monotonic()

    def advance(self, tokens: int = 0) -> None:
        """Count a finished unit, and tokens for the rate."""
        self.done, self.tokens, seconds = (
            self.done + 1,
            self.tokens + tokens,
            time.monotonic() - self.begun,
        )
        left = (self.total - self.done) * seconds / (self.done - self.skipped)
        rate = f"{self.tokens / max(seconds, 1e-9):.0f} tokens/s, " if self.tokens else ""
        self.tell(self.done, rate + (f"{left:.0f} s left" if left else f"{seconds:.0f} s"))


class Progress:
    """Where a run speaks. Standard output stays free for `--json`: all of this goes to standard error."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.log: Path | None = None  # a run sets its own

    def say(self, text: str, log: bool = True, always: bool = False) -> None:
        """One line for the user, with --quiet only in the log."""
        text = visible(text)
        if always or not self.quiet:
            print(text, file=sys.stderr, flush=True)
        if self.log and log:
            with (
                contextlib.suppress(OSError),
                open(self.log, "a", encoding="utf-8", errors="replace") as out,
            ):
                out.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def warn(self, text: str) -> None:
        """One line that is shown even with --quiet."""
        self.say(f"note: {text}", always=True)

    @contextlib.contextmanager
    def bar(self, name: str, total: int, unit: str = "rows", done: int = 0) -> Iterator[Bar]:
        """A bar over `total` units, of which `done` were there before."""
        if self.quiet or os.environ.get("CI") or not sys.stderr.isatty():
            told = time.monotonic()

            def plain(count: int, rate: str) -> None:
                nonlocal told
                if count >= total or time.monotonic() - told >= PLAIN_EVERY_SECONDS:
                    told = time.monotonic()
                    self.say(f"{name}: {count}/{total} {unit}, {rate}", log=False)

            yield Bar(total, done, plain)
            return
        from rich import progress as rich
        from rich.console import Console

        columns = (
            "{task.description}",
            rich.BarColumn(),
            rich.MofNCompleteColumn(),
            "{task.fields[rate]}",
        )
        elapsed = rich.TimeElapsedColumn()
        with rich.Progress(*columns, elapsed, console=Console(stderr=True), transient=True) as live:
            task = live.add_task(name, total=total, completed=done, rate="")
            yield Bar(
                total, done, lambda count, rate: live.update(task, completed=count, rate=rate)
            )


def visible(text: str) -> str:
    """Control characters, text-direction marks and lone surrogates as their names: harmless, and seen."""
    return _BAD.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", text)


def tame_libraries(verbose: bool = False) -> None:
    """Quiet the libraries' own chatter; called before any of them is imported."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not verbose:
        quiet = {
            "TRANSFORMERS_VERBOSITY": "error",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "BITSANDBYTES_NOWELCOME": "1",
        }
        os.environ.update({**quiet, **os.environ})
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        warnings.filterwarnings(
            "ignore", category=FutureWarning
        )  # the libraries' word to each other
