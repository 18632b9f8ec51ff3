"""Grading workers: math-verify in processes that can be killed, spoken to in JSON lines.

sympy can hang or eat the machine on an innocent-looking answer, inside C code that no signal interrupts. So each
worker bounds its own address space, arms a kernel timer that ends it even when its parent is gone, and is killed by
the parent at the limit. The caller's signals are never touched, so any thread may grade. Nothing is pickled.
It protects from accidents of computation; it is no sandbox against hostile code (math-verify evaluates none).
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
import time
from typing import Any

START_SECONDS = 120.0  # for importing math-verify on a busy machine
GRACE_SECONDS = 2.0  # the worker's own timer, behind the parent's


class Worker:
    """The parent's side of one worker process; started when first asked, replaced after a kill.

    Args:
        timeout_seconds: for one answer.
        memory_bytes: its address space.
    """

    def __init__(self, timeout_seconds: float, memory_bytes: int) -> None:
        self.timeout_seconds, self.memory_bytes = timeout_seconds, memory_bytes
        self.process: subprocess.Popen[bytes] | None = None
        self._buffer = b""

    def ask(self, gold: str, answer: str) -> tuple[str, str]:
        """Compare one answer with the gold one.

        Returns:
            (verdict, method); ("timeout", "time" | "memory" | "crash") when the worker did not live to reply.
        """
        if self.process is None:
            self._start()
        reply = self._talk({"gold": gold, "answer": answer}, self.timeout_seconds)
        if reply is None:
            return "timeout", self._end()
        if reply["how"] == "memory":
            self.close()  # what it could not allocate may be half built
        return reply["verdict"], reply["how"]

    def close(self) -> None:
        """End the process at once."""
        process, self.process, self._buffer = self.process, None, b""
        if process is not None:
            process.kill()
            process.communicate()

    def _start(self) -> None:
        command = [sys.executable, "-P", __file__, str(self.timeout_seconds + GRACE_SECONDS), str(self.memory_bytes)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C reaches the parent, which ends its workers itself
        )
        if self._talk({}, START_SECONDS) is None:
            self.close()
            raise RuntimeError("a grading worker did not start: is math-verify installed, and its memory limit enough?")

    def _talk(self, message: dict[str, Any], seconds: float) -> dict[str, Any] | None:
        """Send a line and wait for one; None when time is up or the worker is gone."""
        process = self.process
        assert process is not None and process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(message).encode() + b"\n")
            process.stdin.flush()
        except OSError:
            return None
        deadline = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([process.stdout], [], [], max(deadline - time.monotonic(), 0.0))
            piece = os.read(process.stdout.fileno(), 65536) if ready else b""
            if not piece:
                return None
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    def _end(self) -> str:
        """Kill a worker that did not reply, and say why it did not."""
        code: int | None = None
        if self.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):  # its pipe closes a moment before it is gone
                code = self.process.wait(0.2)
        self.close()
        return "time" if code in (None, -signal.SIGALRM) else "memory" if code == -signal.SIGKILL else "crash"


def serve(timeout_seconds: float, memory_bytes: int) -> None:
    """The worker's side: one JSON line in, one out, until standard input ends."""
    import resource

    out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what a library prints must not look like a reply
    compare = Comparer()
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for line in sys.stdin.buffer:
        message = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, timeout_seconds if message else 0)
        try:
            verdict, how = compare(message["gold"], message["answer"]) if message else ("", "ready")
            if verdict in ("wrong", "unparsed") and _peak_bytes() > 0.9 * memory_bytes:
                verdict, how = "timeout", "memory"  # math-verify takes any exception for "not equal"
        except MemoryError:
            verdict, how = "timeout", "memory"
        signal.setitimer(signal.ITIMER_REAL, 0)
        out.write(json.dumps({"verdict": verdict, "how": how}).encode() + b"\n")


def _peak_bytes() -> int:
    """Largest address space this process has had; 0 where the system does not tell."""
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii") as status:
        return next((int(line.split()[1]) * 1024 for line in status if line.startswith("VmPeak")), 0)
    return 0


class Comparer:
    """math-verify, gold first, its own alarms off, with the strictness it lacks."""

    def __init__(self) -> None:
        import logging

        import math_verify

        logging.disable(logging.CRITICAL)
        self.verifier = math_verify
        self.kinds = [math_verify.LatexExtractionConfig(boxed_match_priority=0), math_verify.ExprExtractionConfig()]

    def __call__(self, gold: str, answer: str) -> tuple[str, str]:
        """Verdict and method (math, string, unreadable)."""
        gold, answer = tidy(gold), tidy(answer)
        if squeeze(gold) == squeeze(answer):
            return "correct", "string"
        right, given = self._parse(gold), self._parse(answer)
        if right and given:
            same = brackets_agree(gold, answer) and self.verifier.verify(right, given, timeout_seconds=None)
            return ("correct" if same else "wrong"), "math"
        if not given and re.search(r"[\\{}^_$]", answer):
            return "unparsed", "unreadable"
        return "wrong", "string"

    def _parse(self, text: str) -> list[Any]:
        """Expressions alone, without math-verify's fall-back strings."""
        found = self.verifier.parse(f"\\boxed{{{text}}}", self.kinds, parsing_timeout=None)
        return [item for item in found if not isinstance(item, str)]


def tidy(text: str) -> str:
    """Markdown's emphasis and outer dollars removed."""
    text = text.strip().strip("*`").strip().rstrip(".,;")
    return text[1:-1].strip() if len(text) > 1 and text[0] == text[-1] == "$" and "$" not in text[1:-1] else text


def squeeze(text: str) -> str:
    """A text without the LaTeX that does not change its meaning."""
    text = re.sub(r"\\(?:text|textbf|mathrm|mbox)\s*\{([^{}]*)\}", r"\1", text).replace("\\dfrac", "\\frac")
    return re.sub(r"\\left(?![a-z])|\\right(?![a-z])|\\[,!;: ]|\s+", "", text.replace("\\tfrac", "\\frac"))


def brackets_agree(gold: str, answer: str) -> bool:
    """Whether bracket kinds and number bases allow equality: [1,2] is not (1,2), {1,2} is not (1,2), 12_5 not 12_7."""
    right, given = squeeze(gold), squeeze(answer)
    kinds = [
        (text[:1], text[-1:])
        for text in (right.replace("\\{", "{").replace("\\}", "}"), given.replace("\\{", "{").replace("\\}", "}"))
    ]
    bracketed = [kind for kind in kinds if kind[0] in "([{" and kind[1] in ")]}" and kind[0]]
    if len(bracketed) == 2 and "," in right and "," in given and kinds[0] != kinds[1]:
        return False
    bases = [re.search(r"^[\dA-Z]+_\{?(\d+)\}?$", text) for text in (right, given)]
    return not (bases[0] and bases[1] and bases[0][1] != bases[1][1])


if __name__ == "__main__":
    serve(float(sys.argv[1]), int(sys.argv[2]))
