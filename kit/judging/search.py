"""Which boundaries of a trace to ask, and which one to keep (section 3.2): pure, over a callable.

A boundary k is the first k of m sentences. Every search assumes that verdicts turn once, from
NOT_ENOUGH to ENOUGH; only `violations` over a scan can tell whether they do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

Ask = Callable[
    ..., bool
]  # ask(k, *ahead): whether the first k sentences suffice; ahead: what may be asked next


def binary(m: int, ask: Ask, low: int = 1, kept: int | None = None) -> int | None:
    """The paper's search over [low, m]: ENOUGH goes left, NOT_ENOUGH right; about log2(m) questions.

    Returns:
        The smallest boundary judged ENOUGH on the way (or `kept`, if none); None: the whole trace is insufficient.
    """
    high = m
    while low <= high:
        middle = (low + high) // 2
        if ask(
            middle, *_next(low, middle - 1, 1), *_next(middle + 1, high, 3)
        ):  # what may be next, then beyond
            kept, high = middle, middle - 1
        else:
            low = middle + 1
    return kept


def _next(low: int, high: int, steps: int) -> list[int]:
    """What `binary` may ask in its next steps over [low, high]."""
    middle = (low + high) // 2
    if low > high or not steps:
        return []
    return [middle, *_next(low, middle - 1, steps - 1), *_next(middle + 1, high, steps - 1)]


def gallop(m: int, ask: Ask) -> int | None:
    """1, 2, 4, ... up to the first ENOUGH, then binary before it: never asks past twice the boundary it keeps."""
    below, k = 0, 1
    while not ask(k):
        if k == m:
            return None
        below, k = k, min(2 * k, m)
    return binary(k - 1, ask, below + 1, k)


def choose(enough: Sequence[bool], rule: str) -> int | None:
    """Pick from a scan: enough[k - 1] is boundary k's verdict.

    Args:
        rule: first (smallest ENOUGH), stable (smallest from which all are ENOUGH), or binary (what `binary` finds).
    """
    m = len(enough)
    if rule == "binary":
        return binary(m, lambda k, *_: enough[k - 1])
    if rule == "first":
        return next((k for k in range(1, m + 1) if enough[k - 1]), None)
    last = max((k for k in range(1, m + 1) if not enough[k - 1]), default=0)
    return last + 1 if last < m else None


def violations(verdicts: Mapping[int, bool]) -> int:
    """Boundaries judged NOT_ENOUGH behind one judged ENOUGH."""
    first = min((k for k, enough in verdicts.items() if enough), default=None)
    return 0 if first is None else sum(k > first and not enough for k, enough in verdicts.items())
