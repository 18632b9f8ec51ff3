"""Which boundaries of a trace are asked, and which one is kept (section 3.2 of the paper).

Boundary k is the first k of m sentences. A search knows no model, only `ask`.
`binary` and `gallop` assume that verdicts turn once, from NOT_ENOUGH to ENOUGH; whether they do,
only the `violations` of a scan can tell. `sweep` assumes nothing. A new search is a function here,
and its name in `TraceJudge.search`, in config.py and in palign.py.
"""

from collections.abc import Callable, Mapping, Sequence

Ask = Callable[[int], bool]  # ask(k): whether the first k sentences suffice


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
        if ask(middle):
            kept = middle
            high = middle - 1
        else:
            low = middle + 1
    return kept


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
    return binary(k - 1, ask, low=insufficient + 1, kept=k)


def sweep(
    m: int,
    ask_many: Callable[[range], Sequence[bool]],
    stretch_end: Callable[[int], int],
    confirm: int,
) -> int | None:
    """Ask from the left, a stretch at a time, until the first ENOUGH is confirmed.

    Args:
        m: the last boundary.
        ask_many: gives the verdicts of the boundaries of a stretch.
        stretch_end: the last boundary, at most m, of the stretch that begins with a boundary.
        confirm: how many ENOUGH in a row it takes, the first one included.

    Returns:
        The first boundary of the first such run, the same as `first_run` finds among all verdicts.
    """
    enough: list[bool] = []
    kept = None
    # At the edge of what is read, a run may still break off.
    while len(enough) < m and (kept is None or len(enough) < kept + confirm - 1):
        first = len(enough) + 1
        enough += ask_many(range(first, stretch_end(first) + 1))
        kept = first_run(enough, confirm)
    return kept


def first_run(enough: Sequence[bool], confirm: int) -> int | None:
    """The first boundary that so many ENOUGH in a row begin with.

    A shorter run that reaches the last boundary counts too: nothing after it speaks against it.
    """
    run = 0
    for k, verdict in enumerate(enough, 1):
        run = run + 1 if verdict else 0
        if run == confirm:
            return k - run + 1
    return len(enough) - run + 1 if run else None


def choose(enough: Sequence[bool], rule: str, confirm: int = 1) -> int | None:
    """Pick a boundary from a scan.

    Args:
        enough: the verdicts of all boundaries; enough[k - 1] is boundary k's.
        rule: first (the smallest ENOUGH that begins a run of `confirm`), stable (the smallest from
            which on all are ENOUGH), or binary (what `binary` finds).
        confirm: see `first_run`.

    Returns:
        The boundary; None where there is none.
    """
    if rule == "binary":
        return binary(len(enough), lambda k: enough[k - 1])
    # stable: a run that only the end confirms
    return first_run(enough, confirm if rule == "first" else len(enough))


def violations(verdicts: Mapping[int, bool]) -> int:
    """How many boundaries after the first ENOUGH one were judged NOT_ENOUGH."""
    first = min((k for k, enough in verdicts.items() if enough), default=None)
    if first is None:
        return 0
    return sum(k > first and not enough for k, enough in verdicts.items())
