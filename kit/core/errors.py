"""The one exception that users meet. Any other is a defect of ours and keeps its traceback.

Faults of the machine that libraries report in their own ways are told apart from defects here.
"""

import difflib
import re
from collections.abc import Iterable, Sequence

# How libraries without Python's own exceptions name them: safetensors, torch, CUDA.
_DISK = re.compile(
    r"No space left|Disk quota|Read-only file|os error \d+|failed (?:writing|finding)|"
    r"iostream error"
)


class KitError(Exception):
    """A failure that the user can fix, printed as one paragraph.

    Args:
        message: what happened and the value it happened with.
        hint: the next step, in the imperative; printed after the message.
        code: exit code; 1 for a failed run, 2 for bad usage or a bad config.
    """

    def __init__(self, message: str, hint: str = "", code: int = 1) -> None:
        super().__init__(message)
        self.hint = hint
        self.code = code

    def __str__(self) -> str:
        return f"{self.args[0]} {self.hint}".rstrip()


class ConfigError(KitError):
    """A config that is refused (exit 2), with every mistake in it."""

    def __init__(self, where: str, mistakes: Sequence[str]) -> None:
        lines = [f"{where} has {len(mistakes)} problem(s):", *mistakes]
        super().__init__("\n  - ".join(lines), code=2)
        self.mistakes = mistakes


def nearest(name: str, known: Iterable[str]) -> str:
    """What an unknown name may stand for: the nearest of the known names, or all of them."""
    names = sorted(known)
    matches = difflib.get_close_matches(name, names, 1, cutoff=0.5)
    return f"did you mean {matches[0]}?" if matches else f"known: {', '.join(names)}"


def machine_fault(error: BaseException) -> KitError | None:
    """A library's error as one for users where the machine is at fault: no room, file, package.

    Returns:
        None: neither the error nor what it came from says so.
    """
    cause: BaseException | None = error
    while cause:
        text = " ".join(str(cause).split())[:400]
        if isinstance(cause, ImportError) and not str(cause.name).startswith("kit"):
            hint = "Run pip install -r requirements.txt in this environment."
            return KitError(f"A package is missing or broken: {text}.", hint)
        # it needs a package itself, so it comes after missing ones
        from kit.core.memory import is_out_of_memory

        if isinstance(cause, MemoryError) or is_out_of_memory(text):
            hint = "Close other programs, or set a smaller max_num_seqs or model."
            return KitError(f"The memory is used up: {text or type(cause).__name__}.", hint)
        if isinstance(cause, OSError) or _DISK.search(text):
            hint = "Free some space or fix what it names, then run the same command again."
            return KitError(f"A file or a connection failed: {text}.", hint)
        cause = cause.__cause__
    return None
