"""The one exception that users meet. Any other is a defect of ours and keeps its traceback."""

from __future__ import annotations


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
