"""Built-in grade-school word problems, and long traces that wander: runs without any data, and the workshop.

A problem is one of the stories in kit/synthetic.yaml: a quantity and 1 to 4 events that change it. A question is
for training or held out by its own hash, so the two never meet. The wandering imitates what long chains of thought do
(restating, a false start that is caught, checking the result again and again), not how a model phrases it.
"""

from __future__ import annotations

import functools
import hashlib
import random
import re
from pathlib import Path
from typing import Any

import yaml

from kit.core.errors import KitError
from kit.core.records import Problem

LARGEST = 5000  # of any number in a story
_EQUATION = re.compile(
    r"(?<![\d.,])(\d{1,9}) ?([+*/-]) ?([1-9]\d{0,8}) ?= ?\$?(\d{1,9})(?![\d.,]*\d)"
)
_APPLY = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__}
_UNDO = dict(zip("+-*/", "-+/*", strict=True))


@functools.cache
def texts() -> dict[str, Any]:
    """Names, stories and phrases as kit/synthetic.yaml explains them; an event becomes [operation, telling, ...]."""
    path = Path(__file__).with_suffix(".yaml")
    read = yaml.safe_load(path.read_text(encoding="utf-8"))
    for story in read["stories"]:
        story["events"] = [[event[0], *event[2:].split(" | ")] for event in story["events"]]
    return read


def generate(
    count: int,
    seed: int,
    held_out: bool = False,
    steps: tuple[int, int] = (1, 4),
    largest: int = 60,
) -> list[Problem]:
    """Make distinct problems with worked solutions; `level` is the number of steps, `subject` the kind of story.

    Args:
        steps: fewest and most arithmetic steps, each number of them equally likely.
        largest: number that a story begins with or adds; 10 is for the weakest of models.

    Raises:
        KitError: steps outside 1 to 4, or more problems asked for than could be found.
    """
    low, high = steps
    if not 1 <= low <= high <= 4:
        raise KitError(
            f"Built-in problems have 1 to 4 steps, not {low} to {high}.", "Choose within that.", 2
        )
    rng = random.Random(f"problems {seed} {held_out} {low} {high} {largest}")
    found: dict[str, Problem] = {}
    for _ in range(200 * count + 1000):
        problem = _problem(rng, rng.choice(texts()["stories"]), rng.randint(low, high), largest)
        if problem is not None and int(problem.id[-1], 16) % 2 == held_out:
            found.setdefault(problem.id, problem)
        if len(found) == count:
            return list(found.values())
    raise KitError(
        f"Only {len(found)} of {count} built-in problems could be made.", "Ask for fewer."
    )


def _problem(rng: random.Random, story: dict[str, Any], steps: int, largest: int) -> Problem | None:
    """One problem, or None where the numbers do not come out whole."""
    people = {name: who for who in texts()["people"] for name in who["names"].split()}
    hero, friend = rng.sample(list(people), 2)
    words = {"name": hero, "friend": friend, "things": rng.choice(story["things"]), **people[hero]}
    inner, last = ([event for event in story["events"] if len(event) == parts] for parts in (3, 4))
    events = rng.sample(inner, min(steps, len(inner)))
    if rng.random() < 0.5 or len(events) < steps:
        events[steps - 1 :] = [rng.choice(last)]
    value = rng.randint(6, max(6, largest))
    told, worked = (
        [story["begin"].format(a=value, **words)],
        [f"At the start: {value} {words['things']}."],
    )
    for op, tell, note, *_ in events:
        if op == "/":  # a divisor that leaves no rest
            number = rng.choice(
                [d for d in range(2, 13) if value % d == 0 and d < value] or [value + 1]
            )
        else:
            number = rng.randint(
                *{"+": (3, max(3, largest)), "-": (2, max(2, value - 2)), "*": (2, 6)}[op]
            )
        result = _APPLY[op](value, number)
        if not 2 <= result <= LARGEST:
            return None
        sentence = tell.format(b=number, **words)
        told.append(sentence[0].upper() + sentence[1:])
        worked.append(f"{note.format(**words)}: {value} {op} {number} = {result}.")
        value = result
    question = " ".join([*told, [*events[-1], story["ask"]][3].format(**words)])
    solution = "\n".join([*worked, f"The answer is \\boxed{{{value}}}."])
    facts = {
        "answer": str(value),
        "solution": solution,
        "level": str(len(events)),
        "subject": story["name"],
    }
    return Problem(
        id="b" + hashlib.sha256(question.encode()).hexdigest()[:12], question=question, **facts
    )


def wander(problem: Problem, wordiness: float, seed: int) -> str:
    """A long chain of thought over a worked solution: right in the end, essential steps early, then checks upon checks.

    Equations `a op b = c` in the solution, one step a line, are what goes astray and is checked. A wordiness of 0 is
    the bare solution; 1 a trace some eight times as long, 3 some twenty times. KitError without a worked solution.
    """
    if not problem.solution:
        hint = "Use teacher.backend=worked with the built-in problems, GSM8K or MATH, or another teacher."
        raise KitError(f"Problem {problem.id} has no worked solution to make a trace from.", hint)
    if wordiness <= 0:
        return problem.solution
    rng, say = random.Random(f"wander {problem.id} {float(wordiness)} {seed}"), texts()["wander"]
    steps = [
        line for line in problem.solution.splitlines() if line.strip() and "\\boxed" not in line
    ]
    steps = steps or problem.solution.splitlines()
    *told, asked = re.split(r"(?<=[.?!])\s+", problem.question.strip())
    lines = [rng.choice(say["begin"])]
    if told and rng.random() < 0.5 * wordiness:
        lines.append(say["retell"].format(told=" ".join(told)))
    lines.append(say["asked"].format(asked=asked))
    for step in steps:
        if rng.random() < min(0.9, 0.35 * wordiness) and (equations := _equations(step)):
            lines.append(_false_start(rng, equations[0]))
        lines.append(rng.choice(say["step"]).format(step=step))
    lines.append(say["result"].format(answer=problem.answer))
    facts = {"answer": problem.answer, "asked": asked}
    for number in range(round(wordiness * rng.randint(4, 6))):
        opening = rng.choice(say["again"]) if number else say["doubt"]
        lines.append(f"{opening} {_check(rng, facts, steps)}")
    return "\n\n".join([*lines, say["end"].format(answer=problem.answer)])


def _equations(step: str) -> list[dict[str, Any]]:
    """The true equations `a op b = c` of a step."""
    found = []
    for match in _EQUATION.finditer(step):
        a, op, b, c = int(match[1]), match[2], int(match[3]), int(match[4])
        if _APPLY[op](a, b) == c and _APPLY[_UNDO[op]](c, b) == a:
            found.append({"a": a, "op": op, "b": b, "c": c})
    return found


def _false_start(rng: random.Random, known: dict[str, Any]) -> str:
    """A wrong operation or a slip, caught at once."""
    other = rng.choice([op for op in "+-*" if op != known["op"]])
    wrong, kind = _APPLY[other](known["a"], known["b"]), "wrong"
    if rng.random() >= 0.5 or wrong == known["c"]:
        wrong, kind = known["c"] + rng.choice((-10, -2, -1, 1, 2, 10)), "slip"
    return texts()["wander"][kind].format(**known, other=other, wrong=wrong)


def _check(rng: random.Random, facts: dict[str, str], steps: list[str]) -> str:
    """One of several ways to check again what is already known."""
    known, way = [equation for step in steps for equation in _equations(step)], rng.randrange(5)
    way = way if known or way == 3 else 4
    facts = facts | {"step": rng.choice(steps) if way == 4 else ""}
    facts["sums"] = " ".join("{a} {op} {b} = {c}, yes.".format(**equation) for equation in known)
    facts["undone"] = ", ".join(
        f"{e['c']} {_UNDO[e['op']]} {e['b']} = {e['a']}" for e in reversed(known)
    )
    return texts()["wander"]["checks"][way].format(
        **facts, **(rng.choice(known) if way == 2 else {})
    )
