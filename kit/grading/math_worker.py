"""The grading worker: math-verify in a process that can be killed, spoken to in JSON lines.

sympy can hang or eat the machine on an innocent-looking answer, inside C code that no signal handler interrupts. So
the parent kills the worker at its limit, and the worker bounds its own address space and arms a kernel timer that ends
it even when the parent is gone. No thread is started and the caller's signals are never touched: any thread may grade,
and Ctrl-C leaves nothing behind. A guard against accidents of computation, no sandbox: math-verify runs no code.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
from typing import Any

START_SECONDS = 120.0  # for importing math-verify on a busy machine
GRACE_SECONDS = 1.0  # the worker's own timer, behind the parent's


class Worker:
    """The parent's side of the process; started when first asked, replaced after a kill."""

    def __init__(self, timeout_seconds: float, memory_bytes: int) -> None:
        self.timeout_seconds, self.memory_bytes = timeout_seconds, memory_bytes
        self.process: subprocess.Popen[str] | None = None

    def ask(self, gold: str, answer: str) -> tuple[str, str]:
        """Verdict and method; ("timeout", "time" | "memory" | "crash") when the worker did not live to reply."""
        try:
            if self.process is None:
                self._start()
            reply = self._talk([gold, answer], self.timeout_seconds)
        except (
            BaseException
        ):  # Ctrl-C too: a reply that is still to come must not answer the next question
            self.close()
            raise
        if reply[0] == "timeout":
            self.close()
        return reply

    def close(self) -> None:
        """End the process at once."""
        if self.process is not None:
            self.process.kill()
            with contextlib.suppress(OSError):  # what could not be sent to it any more
                self.process.communicate()
            self.process = None

    def _start(self) -> None:
        limits = [str(self.timeout_seconds + GRACE_SECONDS), str(self.memory_bytes)]
        pipes: dict[str, Any] = {
            "stdin": subprocess.PIPE,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.DEVNULL,
        }
        # in a session of its own: Ctrl-C reaches the parent, which ends its worker itself
        command = [sys.executable, "-P", __file__, *limits]
        self.process = subprocess.Popen(command, start_new_session=True, text=True, **pipes)
        if self._talk(None, START_SECONDS)[1] != "ready":
            raise RuntimeError(
                "the grading worker did not start: is math-verify there, and its memory limit enough?"
            )

    def _talk(self, message: Any, seconds: float) -> tuple[str, str]:
        """Send one line and wait for one."""
        assert self.process is not None and self.process.stdout is not None
        with contextlib.suppress(OSError):  # it has died: then there is nothing to read
            print(json.dumps(message), file=self.process.stdin, flush=True)
        if not select.select([self.process.stdout], [], [], seconds)[0]:
            return "timeout", "time"
        if not (line := self.process.stdout.readline()):  # a reply is short, and written at once
            return "timeout", "time" if self.process.wait() == -signal.SIGALRM else "crash"
        verdict, method = json.loads(line)
        return verdict, method


def serve(timeout_seconds: float, memory_bytes: int) -> None:
    """The worker's side: one JSON line in, one out, until standard input ends."""
    import logging
    import resource

    out = os.dup(1)
    os.dup2(2, 1)  # what a library prints must not look like a reply
    import math_verify

    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for line in sys.stdin:
        message, reply = json.loads(line), ("timeout", "memory")
        signal.setitimer(signal.ITIMER_REAL, timeout_seconds)
        with contextlib.suppress(MemoryError):
            found = verify(math_verify, *message) if message else ("", "ready")
            # math-verify takes any exception for "not equal", a lack of memory as well
            reply = (
                found
                if found[0] in ("", "correct") or _peak_bytes() < 0.5 * memory_bytes
                else reply
            )
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.write(out, json.dumps(reply).encode() + b"\n")


def verify(library: Any, gold: str, answer: str) -> tuple[str, str]:
    """Verdict and method by math-verify: math, string (not both are mathematics) or unreadable."""
    kinds = [library.LatexExtractionConfig(boxed_match_priority=0), library.ExprExtractionConfig()]
    parsed = [
        library.parse(f"\\boxed{{{text}}}", kinds, parsing_timeout=None) for text in (gold, answer)
    ]
    right, given = (
        [item for item in found if not isinstance(item, str)] for found in parsed
    )  # strings: unread
    if right and given:
        return (
            "correct" if library.verify(right, given, timeout_seconds=None) else "wrong"
        ), "math"
    unreadable = not given and re.search(r"[\\{}^_$]", answer)
    return ("unparsed", "unreadable") if unreadable else ("wrong", "string")


def _peak_bytes() -> int:
    """Largest address space this process has had; 0 where the system does not tell."""
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmPeak"))
    return 0


if __name__ == "__main__":
    serve(float(sys.argv[1]), int(sys.argv[2]))
