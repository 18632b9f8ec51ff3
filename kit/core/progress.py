"""Progress for people: rich bars with rates and time left on a terminal, plain lines elsewhere.

Every line also goes, plain, to the run's log file. Nothing here computes.
"""

import contextlib
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

PLAIN_EVERY_SECONDS = 10.0
# Control characters, marks of text direction and width, lone surrogates.
_INVISIBLE = re.compile(
    r"[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e"
    r"\u2060-\u206f\ud800-\udfff\ufeff]"
)


@dataclass
class Bar:
    """One stage's progress: `show` is given the finished units and their rate, in words."""

    total: int
    done: int
    show: Callable[[int, str], None]
    every_seconds: float = 0.0  # between two calls of `show`
    at_once: int = 1  # units that are worked on at a time: the others are half done, on average

    def __post_init__(self) -> None:
        self.skipped = self.done
        self.tokens = 0
        self.started = self.shown = time.monotonic()

    def advance(self, tokens: int = 0, outcome: str = "") -> None:
        """Count a finished unit, tokens for the rate, and say what became of it."""
        self.done += 1
        self.tokens += tokens
        now = time.monotonic()
        if self.done < self.total and now - self.shown < self.every_seconds:
            return
        self.shown = now
        seconds = now - self.started
        half_done = min(self.at_once - 1, self.total - self.done) / 2
        rest = self.total - self.done - half_done
        left = rest * seconds / (self.done - self.skipped + half_done)
        rate = f"{left:.0f} s left" if left else f"{seconds:.0f} s"
        if self.tokens:
            rate = f"{self.tokens / max(seconds, 1e-9):.0f} tokens/s, {rate}"
        self.show(self.done, f"{rate}, last row {outcome}" if outcome else rate)


@dataclass
class Progress:
    """Where a run reports. All of it goes to standard error: standard output is for `--json`."""

    quiet: bool = False
    log: Path | None = None  # a run sets its own
    stages: int = 0  # of the whole run, and how many of them are done
    stages_done: int = 0
    started: float = field(default_factory=time.monotonic)
    told: set[str] = field(default_factory=set)

    def say(self, text: str, always: bool = False) -> None:
        """One line for the user and the log; with --quiet only in the log."""
        text = visible(text)
        if always or not self.quiet:
            print(text, file=sys.stderr, flush=True)
        if self.log:
            # A log that cannot be written stops no run.
            with contextlib.suppress(OSError), open(self.log, "a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def warn(self, text: str) -> None:
        """One line that is shown even with --quiet."""
        self.say(f"note: {text}", always=True)

    def tell(self, notes: Iterable[str]) -> None:
        """Warn of each note once: a model's grow while it works."""
        for note in notes:
            if note not in self.told:
                self.told.add(note)
                self.warn(note)

    @contextlib.contextmanager
    def bar(
        self, name: str, total: int, unit: str = "rows", done: int = 0, at_once: int = 1
    ) -> Iterator[Bar]:
        """A bar over `total` units, of which `done` were finished before and `at_once` are worked
        on at a time; on a terminal below one over the whole run, without a time left: no stage
        tells how long the next will take.
        """
        if self.quiet or os.environ.get("CI") or not sys.stderr.isatty():

            def print_line(count: int, rate: str) -> None:
                self.say(f"{name}: {count}/{total} {unit}, {rate}")

            yield Bar(total, done, print_line, PLAIN_EVERY_SECONDS, at_once)
            return
        from rich import progress as rich
        from rich.console import Console
        from rich.table import Column

        # On a narrow terminal the bar and the words give way, never a number.
        with rich.Progress(
            "{task.description}",
            rich.BarColumn(None, table_column=Column(ratio=1)),
            rich.MofNCompleteColumn(),
            rich.TextColumn("{task.fields[rate]}", table_column=Column(ratio=3, no_wrap=True)),
            rich.TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
            expand=True,
        ) as live:
            if self.stages > 1:
                live.add_task("run", total=self.stages, completed=self.stages_done, rate="stages")
                live.tasks[0].start_time = self.started
            task = live.add_task(name, total=total, completed=done, rate="")

            def move(count: int, rate: str) -> None:
                live.update(task, completed=count, rate=rate)

            yield Bar(total, done, move, at_once=at_once)


def visible(text: str) -> str:
    """Replace control characters, text-direction marks and lone surrogates by their names."""
    return _INVISIBLE.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", text)


def tame_libraries(verbose: bool = False) -> None:
    """Silence the libraries' own messages; called before any of them is imported."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Rows of many lengths would otherwise leave a card's memory in pieces.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if verbose:
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # Meant for each other's developers, not for users.
    warnings.filterwarnings("ignore", category=FutureWarning)
