"""Which boundaries of a trace are asked, and which one is kept (section 3.2 of the paper).

Boundary k is the first k of m sentences. A search is pure: it calls `ask` and knows no model. Every
search assumes that verdicts turn once, from NOT_ENOUGH to ENOUGH; whether they do, only the
`violations` of a scan can tell. A new search is a function here and its name in `SEARCHES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

# ask(k, *ahead): whether the first k sentences suffice; `ahead` is what may be asked next.
Ask = Callable[..., bool]


def binary(m: int, ask: Ask, low: int = 1, kept: int | None = None) -> int | None:
    """Search as the paper does: ENOUGH goes left, NOT_ENOUGH right; about log2(m) questions.

    Args:
        m: the last boundary, at least 1.
        ask: gives the verdict of one boundary.
        low: the first boundary that may be asked.
        kept: what to return where no boundary is judged ENOUGH.

    Returns:
        The smallest boundary judged ENOUGH on the way, else `kept`; None: all were NOT_ENOUGH.
    """
    high = m
    while low <= high:
        middle = (low + high) // 2
        # one step to the left lies within the text just read; to the right, three steps are named
        left = upcoming(low, middle - 1, 1)
        right = upcoming(middle + 1, high, 3)
        if ask(middle, *left, *right):
            kept = middle
            high = middle - 1
        else:
            low = middle + 1
    return kept


def upcoming(low: int, high: int, steps: int) -> list[int]:
    """What `binary` may ask in its next steps over [low, high], the next boundary first."""
    if low > high or steps == 0:
        return []
    middle = (low + high) // 2
    left = upcoming(low, middle - 1, steps - 1)
    right = upcoming(middle + 1, high, steps - 1)
    return [middle, *left, *right]


def gallop(m: int, ask: Ask) -> int | None:
    """Ask 1, 2, 4, ... up to the first ENOUGH, then search before it as `binary` does.

    It never asks past twice the boundary it keeps, which pays where traces are cut early.
    """
    insufficient = 0
    k = 1
    while not ask(k):
        if k == m:
            return None
        insufficient = k
        k = min(2 * k, m)
    return binary(k - 1, ask, insufficient + 1, k)


# What `judge.search` names, besides scan, which asks all boundaries at once and lets `choose` pick.
# uncached asks what binary asks; only its session differs.
SEARCHES = {"binary": binary, "uncached": binary, "gallop": gallop}


def choose(enough: Sequence[bool], rule: str) -> int | None:
    """Pick a boundary from a scan.

    Args:
        enough: the verdicts of all boundaries; enough[k - 1] is boundary k's.
        rule: first (the smallest ENOUGH), stable (the smallest from which on all are ENOUGH), or
            binary (what `binary` finds).

    Returns:
        The boundary; None where there is none.
    """
    if rule == "binary":
        return binary(len(enough), lambda k, *_: enough[k - 1])
    if rule == "first":
        return enough.index(True) + 1 if any(enough) else None
    # stable: walk back from the end over everything that is ENOUGH
    k = len(enough)
    while k > 0 and enough[k - 1]:
        k -= 1
    return k + 1 if k < len(enough) else None


def violations(verdicts: Mapping[int, bool]) -> int:
    """How many boundaries after the first ENOUGH one were judged NOT_ENOUGH."""
    first = min((k for k, enough in verdicts.items() if enough), default=None)
    if first is None:
        return 0
    return sum(k > first and not enough for k, enough in verdicts.items())
