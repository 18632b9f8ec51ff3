"""The built-in problems: right, distinct, never on both sides; and traces that wander to the right
end.
"""

from __future__ import annotations

import re
from collections import Counter

import pytest

from kit.core.bundled import bundled
from kit.core.config import Derives
from kit.core.errors import KitError
from kit.core.records import Problem
from kit.grading.answers import last_box
from kit.judging.sentences import split
from kit.synthetic import generate, wander

EQUATION = re.compile(r"(\d+) ([+*/-]) (\d+) = (\d+)\.")


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    return generate(1500, seed=0)


def test_solutions_add_up(problems: list[Problem]) -> None:
    for problem in problems:
        equations = EQUATION.findall(problem.solution or "")
        assert len(equations) == int(problem.level or 0)
        value = int(re.search(r"\d+", problem.question)[0])  # type: ignore[index]
        for a, op, b, result in equations:
            assert int(a) == value and re.search(rf"\b{b}\b", problem.question)
            value = {
                "+": value + int(b),
                "-": value - int(b),
                "*": value * int(b),
                "/": value / int(b),
            }[op]
            assert value == int(result) and value > 1
        assert str(int(value)) == problem.answer == last_box(problem.solution or "")


def test_variety(problems: list[Problem]) -> None:
    stories = [story["name"] for story in bundled("synthetic")["stories"]]
    assert len(set(stories)) == len(stories) >= 12
    assert {problem.subject for problem in problems} == set(stories)
    levels = Counter(problem.level for problem in problems)
    assert set(levels) == {"1", "2", "3", "4"} and min(levels.values()) > 1500 / 6
    assert not any(
        re.search(r"(?<!boxed){", problem.question + (problem.solution or ""))
        for problem in problems
    )
    assert len({problem.id for problem in problems}) == len({p.question for p in problems}) == 1500


def test_training_and_held_out_never_meet(problems: list[Problem]) -> None:
    train = {p.question for p in problems} | {
        p.question for p in generate(1500, seed=7, steps=(1, 1))
    }
    for seed in (0, 1, 7):
        for steps in ((1, 4), (1, 1)):
            assert not train & {
                p.question for p in generate(1500, seed, held_out=True, steps=steps)
            }


def test_same_seed_same_problems() -> None:
    assert generate(50, seed=3) == generate(50, seed=3) == generate(80, seed=3)[:50]
    assert generate(50, seed=3) != generate(50, seed=4)


def test_steps_are_a_setting() -> None:
    assert {p.level for p in generate(60, seed=0, steps=(2, 3))} == {"2", "3"}
    with pytest.raises(KitError, match="1 to 4 steps"):
        generate(1, seed=0, steps=(0, 2))


def test_wandering_is_long_right_and_repeatable(problems: list[Problem]) -> None:
    sizes = {}
    for wordiness in (0, 1, 3):
        traces = [wander(problem, wordiness, seed=0) for problem in problems[:200]]
        assert traces == [wander(problem, wordiness, seed=0) for problem in problems[:200]]
        assert [last_box(trace) for trace in traces] == [
            problem.answer for problem in problems[:200]
        ]
        assert all(trace.count("\\boxed") == 1 for trace in traces)
        sizes[wordiness] = sum(map(len, traces)) / 200
    assert wander(problems[0], 0, 0) == problems[0].solution
    assert wander(problems[0], 1, 0) != wander(problems[0], 1, 1)
    assert 4 * sizes[0] < sizes[1] and 2 * sizes[1] < sizes[3]


def test_the_deriving_steps_stand_where_the_config_says(problems: list[Problem]) -> None:
    """The same lines derive the answer wherever they stand, and no result is named before them."""
    places: dict[Derives, list[float]] = {"early": [], "late": [], "spread": []}
    for problem in problems[:200]:
        lengths = set()
        for derives, shares in places.items():
            parts = wander(problem, 1, 0, derives).split("\n\n")
            lengths.add(len(parts))
            known = next(i for i, part in enumerate(parts) if part.startswith("So the result is"))
            shares.append((known + 1) / len(parts))
            solution = (problem.solution or "").splitlines()[:-1]
            assert all(line in "".join(parts[:known]) for line in solution)
            # nothing but the steps themselves says what comes out
            first = next(i for i, part in enumerate(parts) if solution[0] in part)
            assert not any("=" in part for part in parts[:first])
        assert len(lengths) == 1
    early, late, spread = ([min(shares), max(shares)] for shares in places.values())
    assert max(places["early"]) < 1 and min(places["late"]) > 0.7
    assert spread[0] < 0.5 and spread[1] > 0.9
    assert early[0] < 0.5 < late[0]


def test_dead_ends_come_before_the_steps_and_derive_nothing(problems: list[Problem]) -> None:
    for problem in problems[:100]:
        straight = wander(problem, 1, 0)
        lost = wander(problem, 1, 0, dead_ends=3)
        added = [part for part in lost.split("\n\n") if part not in straight]
        assert len(lost.split("\n\n")) == len(straight.split("\n\n")) + 3
        assert added and not any("=" in part for part in added)
        assert last_box(lost) == problem.answer
    prose = Problem(id="p", question="Why?", answer="7", solution="It is seven.\n\\boxed{7}")
    assert last_box(wander(prose, 2, 0, "spread", dead_ends=2)) == "7"


def test_what_is_essential_comes_early(problems: list[Problem]) -> None:
    """Most of a wandering trace comes after the point where the result is, so that there is
    something to cut.
    """
    accuracy_by_problem = []
    for problem in problems[:200]:
        parts = split(wander(problem, 1, seed=0))
        known = next(i for i, part in enumerate(parts) if part.startswith("So the result is"))
        essential = "".join(parts[:known])
        assert all(line in essential for line in (problem.solution or "").splitlines()[:-1])
        accuracy_by_problem.append((known + 1) / len(parts))
    assert sum(accuracy_by_problem) / len(accuracy_by_problem) < 0.5


def test_false_starts_are_caught_and_checks_are_true(problems: list[Problem]) -> None:
    caught = 0
    for problem in problems[:200]:
        for line in wander(problem, 2, seed=1).split("\n\n"):
            if line.startswith(("Maybe this is", "Quickly,")):
                assert "Wait, no." in line or "Hmm, wait." in line
                caught += 1
                continue
            for a, op, b, result in re.findall(r"(?<!\d)(\d+) ([+*/-]) (\d+) = (\d+)", line):
                right = {
                    "+": int(a) + int(b),
                    "-": int(a) - int(b),
                    "*": int(a) * int(b),
                    "/": int(a) / int(b),
                }[op]
                assert right == int(result)
    assert caught > 100


def test_wandering_over_other_solutions() -> None:
    gsm = Problem(
        id="g", question="How much is it? Say.", answer="7", solution="3+4 = $7 in all\n\\boxed{7}"
    )
    assert last_box(wander(gsm, 2, 0)) == "7"
    prose = Problem(
        id="p",
        question="Is it {so}?",
        answer="{}",
        solution="It is {so}, for 12 + 3 * 4 = 24 and 1.5 + 2 = 3.",
    )
    assert "yes." not in wander(prose, 3, 0) and "It is {so}" in wander(prose, 3, 0)
    with pytest.raises(KitError, match="no worked solution"):
        wander(Problem(id="n", question="q", answer="1"), 1, 0)
