"""Built-in grade-school word problems, and long traces that wander: runs without any data, and the
workshop.

A problem is one of the stories in kit/synthetic.yaml: a quantity and 1 to 4 events that change it.
A question is for training or held out by its own hash, so the two never meet. The wandering
imitates what long chains of thought do (restating, a false start that is caught, checking the
result again and again), not how a model phrases it.
"""

import random
import re

from kit import Json
from kit.core.bundled import bundled
from kit.core.config import Derives
from kit.core.errors import KitError
from kit.core.records import Problem
from kit.core.storage import text_digest

LARGEST = 5000  # of any number in a story
MOST = 100_000  # problems: seconds to make
_EQUATION = re.compile(
    r"(?<![\d.,])(\d{1,9}) ?([+*/-]) ?([1-9]\d{0,8}) ?= ?\$?(\d{1,9})(?![\d.,]*\d)"
)
_APPLY = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__}
_UNDO = dict(zip("+-*/", "-+/*", strict=True))


def generate(
    count: int,
    seed: int,
    held_out: bool = False,
    steps: tuple[int, int] = (1, 4),
    largest: int = 60,
) -> list[Problem]:
    """Make distinct problems with worked solutions; `level` is the number of steps, `subject` the
    kind of story.

    Args:
        steps: fewest and most arithmetic steps, each number of them equally likely.
        largest: number that a story begins with or adds, at least 6; 10 is for the weakest models.

    Raises:
        KitError: steps outside 1 to 4, or more problems asked for than could be found.
    """
    low, high = steps
    if not 1 <= low <= high <= 4:
        raise KitError(
            f"Built-in problems have 1 to 4 steps, not {low} to {high}.", "Choose within that.", 2
        )
    if count > MOST:
        raise KitError(f"Built-in problems are at most {MOST:,}, not {count:,}.", "Lower limit.", 2)
    # the two halves, training and held out, differ in the id's last digit
    rng = random.Random(f"problems {seed} {held_out} {low} {high} {largest}")
    problems: dict[str, Problem] = {}
    for _ in range(200 * count + 1000):
        story = rng.choice(bundled("synthetic")["stories"])
        problem = _problem(rng, story, rng.randint(low, high), largest)
        if problem is not None and int(problem.id[-1], 16) % 2 == held_out:
            problems.setdefault(problem.id, problem)
        if len(problems) == count:
            return list(problems.values())
    raise KitError(
        f"Only {len(problems)} of {count} built-in problems could be made.", "Ask for fewer."
    )


def _problem(rng: random.Random, story: Json, steps: int, largest: int) -> Problem | None:
    """One problem, or None where the numbers do not come out whole."""
    # who, what, and what happens
    groups = bundled("synthetic")["people"]
    people = {name: group for group in groups for name in group["names"].split()}
    hero, friend = rng.sample(list(people), 2)
    words = {"name": hero, "friend": friend, "things": rng.choice(story["things"]), **people[hero]}
    events = _choose_events(rng, story, steps)

    # the story and its solution, event by event
    value = rng.randint(6, largest)
    sentences = [story["begin"].format(a=value, **words)]
    solution = [f"At the start: {value} {words['things']}."]
    for operation, telling, note, *_ in events:
        number = _operand(rng, operation, value, largest)
        result = _APPLY[operation](value, number)
        if not 2 <= result <= LARGEST:
            return None
        sentence = telling.format(b=number, **words)
        sentences.append(sentence[0].upper() + sentence[1:])
        solution.append(f"{note.format(**words)}: {value} {operation} {number} = {result}.")
        value = result
    [ask] = events[-1][3:] or [story["ask"]]
    question = " ".join([*sentences, ask.format(**words)])
    return Problem(
        id=f"b{text_digest(question)}",
        question=question,
        answer=str(value),
        solution="\n".join([*solution, f"The answer is \\boxed{{{value}}}."]),
        level=str(len(events)),
        subject=story["name"],
    )


def _choose_events(rng: random.Random, story: Json, steps: int) -> list[list[str]]:
    """Events of a story; one with a question of its own can only come last."""
    inner = [event for event in story["events"] if len(event) == 3]
    last = [event for event in story["events"] if len(event) == 4]
    events = rng.sample(inner, min(steps, len(inner)))
    if rng.random() < 0.5 or len(events) < steps:
        events[steps - 1 :] = [rng.choice(last)]
    return events


def _operand(rng: random.Random, operation: str, value: int, largest: int) -> int:
    """The second number of an operation; a divisor leaves no remainder, or makes the result too
    small.
    """
    if operation == "/":
        divisors = [number for number in range(2, min(13, value)) if value % number == 0]
        return rng.choice(divisors or [value + 1])
    ranges = {"+": (3, largest), "-": (2, max(2, value - 2)), "*": (2, 6)}
    return rng.randint(*ranges[operation])


def wander(
    problem: Problem,
    wordiness: float,
    seed: int,
    derives: Derives = "early",
    dead_ends: int = 0,
) -> str:
    """A long chain of thought over a worked solution: right in the end, with much that it does not
    need before or after the steps that derive the answer.

    Equations `a op b = c` in the solution, one step per line, are what goes astray and is checked.

    Args:
        wordiness: 0 is the bare solution; 1 a trace some eight times as long, 3 some twenty times.
        derives: where the deriving steps stand. early: before all checks; late: as many paragraphs
            that derive nothing come first, and no check follows; spread: so many of them as the
            trace's own seed says, and checks for the rest.
        dead_ends: abandoned approaches before the deriving steps.

    Raises:
        KitError: the problem has no worked solution.
    """
    if not problem.solution:
        hint = "Use teacher.backend=reference with problems that have one, or another teacher."
        raise KitError(f"Problem {problem.id} has no worked solution to make a trace from.", hint)
    if wordiness <= 0:
        return problem.solution
    rng = random.Random(f"wander {problem.id} {float(wordiness)} {seed}")
    phrases = bundled("synthetic")["wander"]
    lines_of_solution = problem.solution.splitlines()
    steps = [line for line in lines_of_solution if line.strip() and "\\boxed" not in line]
    steps = steps or lines_of_solution
    equations = [equation for step in steps for equation in _equations(step)]
    *story, asked = re.split(r"(?<=[.?!])\s+", problem.question.strip())

    # the question is retold
    lines = [rng.choice(phrases["begin"])]
    if story and rng.random() < 0.5 * wordiness:
        lines.append(phrases["retell"].format(told=" ".join(story)))
    lines.append(phrases["asked"].format(asked=asked))

    deriving = []
    for step in steps:
        if rng.random() < min(0.9, 0.35 * wordiness):
            # some come after a false start
            deriving += [_false_start(rng, equation) for equation in _equations(step)[:1]]
        deriving.append(rng.choice(phrases["step"]).format(step=step))
    deriving.append(phrases["result"].format(answer=problem.answer))

    # what is known already, checked again and again
    checks = []
    for number in range(round(wordiness * rng.randint(4, 6))):
        opening = rng.choice(phrases["again"]) if number else phrases["doubt"]
        checks.append(f"{opening} {_check(rng, problem.answer, asked, steps, equations)}")

    # Late steps come after delays in place of checks. The generator is one of its own, so that
    # early traces stay as they were.
    place = random.Random(f"place {problem.id} {derives} {dead_ends} {seed}")
    delays = {"early": 0, "late": len(checks), "spread": place.randint(0, len(checks))}[derives]
    lines += _underived(place, phrases["dead_ends"], dead_ends, problem.question, equations)
    lines += _underived(place, phrases["delays"], delays, problem.question, equations)
    lines += deriving + checks[: len(checks) - delays]
    return "\n\n".join([*lines, phrases["end"].format(answer=problem.answer)])


def _underived(
    rng: random.Random, phrases: list[str], count: int, question: str, equations: list[Json]
) -> list[str]:
    """Paragraphs that derive nothing and name no result; a phrase repeats only after all others."""
    if not equations:
        phrases = [phrase for phrase in phrases if "{a}" not in phrase]
    shuffled = rng.sample(phrases, len(phrases))
    paragraphs = []
    for number in range(count):
        values = {"asked": question.split(". ")[-1], "question": question}
        if equations:
            equation = rng.choice(equations)
            values = {**values, **equation, "other": _other_operation(rng, equation)}
        paragraphs.append(shuffled[number % len(shuffled)].format(**values))
    return paragraphs


def _other_operation(rng: random.Random, equation: Json) -> str:
    return rng.choice([operation for operation in "+-*" if operation != equation["op"]])


def _equations(step: str) -> list[Json]:
    """The true equations `a op b = c` of a step."""
    equations = []
    for match in _EQUATION.finditer(step):
        a, b, c = (int(match[group]) for group in (1, 3, 4))
        operation = match[2]
        undo = _UNDO[operation]
        if _APPLY[operation](a, b) == c and _APPLY[undo](c, b) == a:
            equations.append({"a": a, "op": operation, "b": b, "c": c, "undo": undo})
    return equations


def _false_start(rng: random.Random, equation: Json) -> str:
    """A wrong operation or a slip, caught at once."""
    other = _other_operation(rng, equation)
    wrong = _APPLY[other](equation["a"], equation["b"])
    kind = "wrong"
    if rng.random() >= 0.5 or wrong == equation["c"]:
        wrong = equation["c"] + rng.choice((-10, -2, -1, 1, 2, 10))
        kind = "slip"
    return str(bundled("synthetic")["wander"][kind].format(**equation, other=other, wrong=wrong))


def _check(
    rng: random.Random, answer: str, asked: str, steps: list[str], equations: list[Json]
) -> str:
    """One of several ways to check again what is already known; the first three need an
    equation.
    """
    way = rng.randrange(5)
    if not equations and way != 3:
        way = 4
    sums = ["{a} {op} {b} = {c}, yes.".format(**equation) for equation in equations]
    undone = ["{c} {undo} {b} = {a}".format(**equation) for equation in reversed(equations)]
    facts = {"answer": answer, "asked": asked, "sums": " ".join(sums), "undone": ", ".join(undone)}
    if way == 2:
        facts.update(rng.choice(equations))
    if way == 4:
        facts["step"] = rng.choice(steps)
    return str(bundled("synthetic")["wander"]["checks"][way].format(**facts))
