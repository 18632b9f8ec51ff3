"""Searches over given verdicts: what they ask, what they keep, what a scan shows."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kit.judging import search


class Asked:
    """Verdicts given beforehand, and the boundaries asked."""

    def __init__(self, enough: list[bool]) -> None:
        self.enough, self.asked = enough, []

    def __call__(self, k: int) -> bool:
        self.asked.append(k)
        return self.enough[k - 1]


verdicts = st.lists(st.booleans(), min_size=1, max_size=200)
turns = st.integers(1, 300).flatmap(lambda m: st.tuples(st.just(m), st.integers(1, m + 1)))


def test_binary_asks_in_the_papers_order() -> None:
    ask = Asked([False] * 61)
    assert search.binary(61, ask) is None
    assert ask.asked == [31, 46, 54, 58, 60, 61]
    ask = Asked([True] * 61)
    assert search.binary(61, ask) == 1
    assert ask.asked == [31, 15, 7, 3, 1]
    ask = Asked([k >= 12 for k in range(1, 49)])
    assert search.binary(48, ask) == 12
    assert ask.asked == [24, 12, 6, 9, 10, 11]


@given(turns)
def test_every_search_finds_a_single_turn(case: tuple[int, int]) -> None:
    m, turn = case
    enough = [k >= turn for k in range(1, m + 1)]
    want = turn if turn <= m else None
    for find in (search.binary, search.gallop):
        ask = Asked(enough)
        assert find(m, ask) == want
        assert len(ask.asked) == len(set(ask.asked)) and set(ask.asked) <= set(range(1, m + 1))
        assert len(ask.asked) <= 2 * m.bit_length() + 1
    for rule in ("first", "binary", "stable"):
        assert search.choose(enough, rule) == want
    assert search.violations(dict(enumerate(enough, 1))) == 0


@given(verdicts)
def test_any_verdicts_keep_the_smallest_boundary_judged_enough(enough: list[bool]) -> None:
    m = len(enough)
    for find in (search.binary, search.gallop):
        ask = Asked(enough)
        kept = find(m, ask)
        judged = [k for k in ask.asked if enough[k - 1]]
        assert kept == (min(judged) if judged else None)
    assert search.choose(enough, "binary") == search.binary(m, Asked(enough))
    first, stable = search.choose(enough, "first"), search.choose(enough, "stable")
    assert first == (enough.index(True) + 1 if any(enough) else None)
    assert (stable is None) == (not enough[-1])
    if stable is not None:
        assert (
            all(enough[stable - 1 :])
            and (stable == 1 or not enough[stable - 2])
            and first <= stable
        )
    counted = search.violations(dict(enumerate(enough, 1)))
    assert counted == (0 if first is None else enough[first:].count(False))
    assert (counted == 0) == (first == stable or first is None)


@given(turns)
def test_gallop_never_asks_past_twice_what_it_keeps(case: tuple[int, int]) -> None:
    m, turn = case
    ask = Asked([k >= turn for k in range(1, m + 1)])
    kept = search.gallop(m, ask)
    assert kept is None or max(ask.asked) <= max(2 * kept - 2, 1) or max(ask.asked) == kept


def test_violations_are_those_after_the_first_enough() -> None:
    assert search.violations({5: True, 3: False, 8: False, 9: True, 10: False}) == 2
    assert search.violations({}) == 0
