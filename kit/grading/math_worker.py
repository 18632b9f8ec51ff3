"""The grading worker: sympy in a process that can be killed.

sympy can hang or eat the machine on an innocent-looking answer, inside C code that no signal
handler interrupts. So a pool of one process (pebble) kills it at its limit, and the process bounds
its own address space and arms kernel timers that end it even when the parent is gone. The
caller's signals are never touched: any thread may grade, and Ctrl-C leaves no process. A guard
against accidents of computation, no sandbox: nothing here runs an answer's code.
"""

import contextlib
import logging
import os
import re
import resource
import signal
import sys
from collections.abc import Callable
from concurrent.futures import TimeoutError
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import SpawnContext, SpawnProcess
from threading import Lock
from types import ModuleType
from typing import Any

from pebble import ProcessExpired, ProcessPool

WALL_TIMES = 6  # how much longer than its processor time it may take, on a busy machine
GRACE_SECONDS = 1.0  # the worker's own timer, after the parent's


class _Process(SpawnProcess):
    """A process that does not run the caller's own script again, as spawning does otherwise."""

    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        script = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            return SpawnProcess._Popen(process_obj)
        finally:
            sys.modules["__main__"] = script


class _Context(SpawnContext):
    """Spawning, with such processes."""

    Process = _Process


class MathWorker:
    """The parent's side of the process; started when first asked, replaced after a kill.

    Args:
        timeout_seconds: of processor time for one answer; WALL_TIMES as long on the clock.
        memory_bytes: of its address space.
    """

    def __init__(self, timeout_seconds: float, memory_bytes: int) -> None:
        self.timeout_seconds = timeout_seconds
        self.memory_bytes = memory_bytes
        self._pool: ProcessPool | None = None
        self._lock = Lock()

    def compare(self, gold: str, answer: str) -> tuple[str, str]:
        """Verdict and method; ("timeout", "time" | "memory" | "crash") when the worker did not live
        to reply.

        Args:
            gold: in normal form (kit/grading/normalize.py), as the answer.
        """
        verdict, method = self._ask(_compare, gold, answer)
        return verdict, method

    def published(self, gold: str, output: str) -> bool:
        """Whether the paper's grader accepts a whole output; no if it does not end."""
        return self._ask(_published, gold, output) is True

    def close(self) -> None:
        """End the process at once."""
        pool = self._pool
        self._pool = None
        if pool is not None:
            pool.stop()
            pool.join()

    def _ask(self, function: Callable[..., Any], gold: str, answer: str) -> Any:
        with self._lock:
            if self._pool is None:
                self._pool = ProcessPool(
                    max_workers=1,
                    initializer=_prepare,
                    initargs=(self.memory_bytes,),
                    context=_Context(),
                )
            arguments = (function, gold, answer, self.timeout_seconds)
            limit = WALL_TIMES * self.timeout_seconds
            try:
                task = self._pool.schedule(_timed, args=arguments, timeout=limit)
                return task.result()
            except TimeoutError:
                return "timeout", "time"
            except MemoryError:
                return "timeout", "memory"
            except ProcessExpired as error:
                timers = (-signal.SIGALRM, -signal.SIGPROF)
                return "timeout", "time" if error.exitcode in timers else "crash"
            except (BrokenProcessPool, RuntimeError):  # it ended while it had nothing to do
                self.close()
                return "timeout", "crash"
            except BaseException:  # Ctrl-C: a reply that is still to come is dropped
                self.close()
                raise


def _prepare(memory_bytes: int) -> None:
    """In the process, before its first task."""
    # what a library prints must not appear in the output of --json
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    logging.disable(logging.CRITICAL)
    # the libraries are loaded, and the parser has parsed, before memory and time are bounded
    from kit.grading import expressions, published

    expressions.same("\\frac{x}{2} + 1", "\\sqrt{x}")
    published.accepts("1", "2")
    with contextlib.suppress(ValueError):  # macOS refuses a limit of memory
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # the parent's kill and the kernel's timer end it even inside C code
    for number in (signal.SIGTERM, signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, signal.SIG_DFL)


def _timed(function: Callable[..., Any], gold: str, answer: str, seconds: float) -> Any:
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, WALL_TIMES * seconds + GRACE_SECONDS)
    try:
        return function(gold, answer)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _compare(gold: str, answer: str) -> tuple[str, str]:
    """Verdict and method: math, string (not both are mathematics) or unreadable."""
    from kit.grading import expressions

    try:
        return ("correct" if expressions.same(gold, answer) else "wrong"), "math"
    except (ValueError, RecursionError):  # UnreadableError, or numbers of thousands of digits
        is_latex = re.search(r"\\(?!and\b|or\b)|[{}^_]", answer)
        return ("unparsed", "unreadable") if is_latex else ("wrong", "string")


def _published(gold: str, output: str) -> bool:
    from kit.grading import published

    return published.accepts(gold, output)
