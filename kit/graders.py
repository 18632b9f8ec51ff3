"""Grading workers: math-verify in processes that can be killed, spoken to in JSON lines.

sympy can hang or eat the machine on an innocent-looking answer, inside C code that no signal handler interrupts. So
the parent kills a worker at its limit, and the worker bounds its own address space and arms a kernel timer that ends
it even when the parent is gone. The caller's signals are never touched, so any thread may grade; nothing is pickled.
This protects from accidents of computation and is no sandbox against hostile code: math-verify runs none.
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
    """The parent's side of one worker process; started when first asked, replaced after a kill."""

    def __init__(self, timeout_seconds: float, memory_bytes: int) -> None:
        self.timeout_seconds, self.memory_bytes = timeout_seconds, memory_bytes
        self.process: subprocess.Popen[bytes] | None = None

    def ask(self, gold: str, answer: str) -> tuple[str, str]:
        """Verdict and method; ("timeout", "time" | "memory" | "crash") when the worker did not live to reply."""
        if self.process is None:
            limits = [str(self.timeout_seconds + GRACE_SECONDS), str(self.memory_bytes)]
            command = [sys.executable, "-P", __file__, *limits]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            # in a session of its own: Ctrl-C reaches the parent, which ends its workers itself
            self.process = subprocess.Popen(command, start_new_session=True, **pipes)
            if self._talk(None, START_SECONDS) is None:
                self.close()
                raise RuntimeError("a grading worker did not start: is math-verify there, and its memory limit enough?")
        reply = self._talk([gold, answer], self.timeout_seconds)
        if reply is not None and reply[1] != "memory":
            return reply[0], reply[1]
        died = self.close() not in (-signal.SIGKILL, -signal.SIGALRM)
        return "timeout", "memory" if reply else "crash" if died else "time"

    def close(self) -> int | None:
        """End the process at once. Returns its exit code, which is its own where it was ending already."""
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.communicate()
        return process and process.returncode

    def _talk(self, message: Any, seconds: float) -> list[str] | None:
        """Send one line and wait for one; None when time is up or the worker is gone."""
        process = self.process
        assert process is not None and process.stdin is not None and process.stdout is not None
        with contextlib.suppress(OSError):
            process.stdin.write(json.dumps(message).encode() + b"\n")
            process.stdin.flush()
            if select.select([process.stdout], [], [], seconds)[0]:
                line = os.read(process.stdout.fileno(), 4096)  # a reply is short, and written at once
                return json.loads(line) if line else None
        return None


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
    for line in sys.stdin.buffer:
        message, reply = json.loads(line), ("timeout", "memory")
        signal.setitimer(signal.ITIMER_REAL, timeout_seconds if message else 0)
        with contextlib.suppress(MemoryError):
            found = compare(math_verify, *message) if message else ("", "ready")
            # math-verify takes any exception for "not equal", a lack of memory as well
            reply = found if found[0] == "correct" or _peak_bytes() < 0.5 * memory_bytes else reply
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.write(out, json.dumps(reply).encode() + b"\n")


def compare(library: Any, gold: str, answer: str) -> tuple[str, str]:
    """Verdict and method (math, string, unreadable) by math-verify, with the strictness it lacks."""
    plain = squeezed(gold), squeezed(answer)
    if plain[0] == plain[1]:
        return "correct", "string"
    kinds = [library.LatexExtractionConfig(boxed_match_priority=0), library.ExprExtractionConfig()]
    parsed = [library.parse(f"\\boxed{{{text}}}", kinds, parsing_timeout=None) for text in (gold, answer)]
    right, given = ([item for item in found if not isinstance(item, str)] for found in parsed)  # strings: unread
    if right and given:
        same = comparable(*plain) and library.verify(right, given, timeout_seconds=None)
        return ("correct" if same else "wrong"), "math"
    unreadable = not given and re.search(r"[\\{}^_$]", answer)
    return ("unparsed", "unreadable") if unreadable else ("wrong", "string")


def squeezed(text: str) -> str:
    """A text without the LaTeX that does not change its meaning."""
    text = re.sub(r"\\(?:text|textbf|mathrm|mbox)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\[dt]frac(?![a-z])", r"\\frac", text.replace("\\{", "{").replace("\\}", "}"))
    return re.sub(r"\\(?:left|right)(?![a-z])|\\[,!;: ]|\s+", "", text)


def comparable(gold: str, answer: str) -> bool:
    """Whether brackets and number bases allow equality: [1,2] is not (1,2), {1,2} neither; 12_5 is not 12_7."""
    kinds = [text[0] + text[-1] for text in (gold, answer) if "," in text and text[0] in "([{" and text[-1] in ")]}"]
    bases = [base[1] for text in (gold, answer) if (base := re.fullmatch(r"[\dA-Z]+_\{?(\d+)\}?", text))]
    return len(set(kinds)) < 2 and len(set(bases)) < 2


def _peak_bytes() -> int:
    """Largest address space this process has had; 0 where the system does not tell."""
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii") as status:
        return next((int(line.split()[1]) * 1024 for line in status if line.startswith("VmPeak")), 0)
    return 0


if __name__ == "__main__":
    serve(float(sys.argv[1]), int(sys.argv[2]))
