"""Built-in grade-school word problems, and long traces that wander: runs without any data, and the workshop.

A problem is a story from one of the templates below: a quantity and 1 to 4 events that change it. Training and
held-out problems are disjoint by construction: a question belongs to the side that its own hash names.
Nothing here is from a dataset; the wandering imitates what long chains of thought do (restating, a false start
that is caught, checking the result again and again), not how a model phrases it.
"""

from __future__ import annotations

import hashlib
import random
import re
from typing import NamedTuple

from kit.errors import KitError
from kit.records import Problem

LARGEST = 5000  # of any number in a story
_SHE = "Amara Bianca Chen Dalia Elif Freya Grace Hana Ingrid Jana Keiko Lucia Mina Nadia Olga Priya Rosa Salma Zoe"
_HE = "Adam Bruno Carlos Deniz Emil Felix Goran Hugo Ivan Jonas Kofi Liam Mateo Nils Omar Pavel Rafael Samir Tomas"
_EQUATION = re.compile(r"(?<![\d.,])(\d{1,9}) ?([+*/-]) ?([1-9]\d{0,8}) ?= ?\$?(\d{1,9})(?![\d.,]*\d)")
_APPLY = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__}
_UNDO = {"+": "-", "-": "+", "*": "/", "/": "*"}
_AGAIN = (
    *("Hmm, let me make sure.", "Wait.", "Let me double-check this once more.", "Alternatively, another look."),
    *("But hold on.", "I want to be certain here.", "Let me go over it again."),
)
# A story: "= KIND: THINGS", then "BEGINNING | QUESTION", then its events, "OPERATION TELLING | WHAT THE SOLUTION SAYS".
# An event with a third part, a question of its own, can only come last.
_STORIES = """
= harvest: apples, pears, plums, lemons, peaches, tomatoes, figs
{name} picks {a} {things} in the garden. | How many {things} does {name} have now?
+ {They} finds {b} more behind the shed. | With those from behind the shed
- {They} gives {b} of the {things} to {friend}. | After the gift
- {They} throws away {b} {things} that went bad. | Without the bad ones
* Then {they} goes on picking until {they} has {b} times as many. | After more picking
/ {They} puts all of the {things} into {b} equal bags. | In one bag | How many {things} are in each bag?
* {They} sells each of the {things} for {b} coins. | For all of them | How many coins does {name} get?
= bakery: rolls, muffins, pies, buns, cookies, pretzels
A bakery has {a} {things} on its shelf when it opens. | How many {things} are on the shelf now?
+ The oven brings out {b} fresh ones. | With the fresh ones
- Before noon {b} of the {things} are sold. | After the morning's sales
- {name} drops a tray, and {b} {things} are lost. | After the accident
* For a feast the bakers raise the number of {things} to {b} times what it is. | For the feast
/ All of the {things} are packed into {b} equal boxes. | In one box | How many {things} does each box hold?
* At the end every one of the {things} is sold for {b} coins. | Coins earned | How many coins is that?
= library: novels, comics, atlases, magazines, dictionaries
A small library owns {a} {things}. | How many {things} stand in the library now?
+ {name} donates {b} {things} to it. | With the donation
- Readers borrow {b} of the {things}. | After the borrowing
+ The postman brings {b} new {things}. | With the delivery
* A larger library gives so many {things} that there are {b} times as many. | After the large gift
/ The {things} are put on {b} shelves, the same number on each. | On one shelf | How many {things} stand on each shelf?
= savings: coins, dollars, euros, francs
{name} has saved {a} {things}. | How many {things} does {name} have in the end?
+ {They} earns {b} {things} by washing cars. | With the earnings
- {They} spends {b} {things} on a book. | After buying the book
+ {Their} aunt sends {b} {things} for {their} birthday. | With the birthday money
- {They} lends {friend} {b} {things}. | After the loan
* {Their} parents raise {their} savings to {b} times what they are. | After the parents' help
/ {They} spreads the money evenly over {b} weeks. | For one week | How many {things} is that a week?
= walk: kilometers, miles, blocks
On Monday {name} walks {a} {things}. | How many {things} is that in all?
+ On Tuesday {they} walks {b} {things} more and adds them to the sum. | With Tuesday
+ On Wednesday {friend} joins in and they add another {b} {things}. | With Wednesday
- The counter was wrong, so {b} {things} have to be taken off again. | After the correction
* By the end of the month the distance is {b} times as long. | By the end of the month
/ {They} splits the whole distance evenly over {b} days. | On one day | How many {things} is that a day?
= farm: hens, ducks, goats, sheep, geese, rabbits
{name} keeps {a} {things} on a farm. | How many {things} are on the farm now?
+ In spring {b} young {things} are born. | With the young ones
- {They} sells {b} of the {things} at the market. | After the market
+ {They} buys {b} {things} from {friend}. | With the bought ones
- During a storm {b} of the {things} run away. | After the storm
* After some years there are {b} times as many {things}. | After some years
/ {They} divides the {things} equally among {b} pens. | In one pen | How many {things} live in each pen?
* Each of the {things} needs {b} buckets of feed a month. | Buckets for all | How many buckets is that a month?
= bus: passengers, tourists, students, hikers
A train leaves the station with {a} {things} on board. | How many {things} are on the train now?
+ At the first stop {b} {things} get on. | After the first stop
- At the bridge {b} {things} get off. | After the bridge
+ In the next town {name} gets on with a group, {b} {things} in all. | After the next town
* In the capital the number of {things} on board becomes {b} times as large. | After the capital
/ The {things} sit down in {b} cars, the same number in each. | In one car | How many {things} sit in each car?
* Every one of the {things} on board pays {b} coins. | Coins paid | How many coins do they pay together?
= collection: stamps, marbles, stickers, shells, postcards, buttons
{name} has a collection of {a} {things}. | How many {things} are in the collection now?
+ {friend} gives {name} {b} {things}. | With those from {friend}
- {They} trades away {b} {things} for a poster. | After the trade
+ At a fair {they} buys {b} {things}. | With those from the fair
- {They} loses {b} {things} on the way home. | After the loss
* Over the summer the collection grows to {b} times its size. | After the summer
/ {They} puts the {things} on {b} pages, equally many on each. | On one page | How many {things} are on a page?
= tank: liters, gallons, buckets
A tank holds {a} {things} of water. | How many {things} of water are in the tank now?
+ Rain adds {b} {things}. | With the rain
- {name} uses {b} {things} for the garden. | After the watering
- A leak lets {b} {things} run out. | After the leak
+ {friend} pours in {b} {things}. | After the pouring
* A pump then fills it up to {b} times as much water. | After the pump has run
/ The water is poured into {b} equal barrels. | In one barrel | How many {things} does each barrel get?
= workshop: chairs, lamps, kites, baskets, toys, clocks
A workshop makes {a} {things} in its first week. | How many {things} are ready now?
+ In the second week it makes {b} more. | After the second week
- A customer buys {b} of the {things}. | After the sale
- {name} tests the {things} and throws away {b}. | After the test
+ {name} makes {b} {things} alone over the weekend. | After the weekend
* With a new machine the stock of {things} grows to {b} times its size. | With the new machine
* Painting one of the {things} takes {b} minutes. | Minutes for all | How many minutes does painting all of them take?
= game: points, stars, gems, tokens
{name} begins a game with {a} {things}. | How many {things} does {name} have at the end?
+ In the first round {they} wins {b} {things}. | After winning
- A trap costs {them} {b} {things}. | After the trap
+ {friend} hands over {b} {things}. | With those from {friend}
- {They} pays {b} {things} for a hint. | After paying for the hint
* A lucky card leaves {name} with {b} times as many {things}. | After the lucky card
/ The {b} players of the team share the {things} equally. | For one player | How many {things} does each get?
= reading: pages, chapters, stories, poems
{name} plans to read {a} {things} during the holidays. | How many {things} are left to read?
- In the first week {they} reads {b} {things}. | After the first week
- On a rainy day {they} reads {b} more {things}. | After the rainy day
+ Then {friend} puts {b} further {things} on the list. | With those from {friend}
* A teacher makes the list {b} times as long. | After the teacher's change
/ {They} spreads the rest evenly over {b} days. | On one day | How many {things} is that a day?
* Each of the {things} takes {b} minutes to read. | Minutes for all | How many minutes will that take?
"""


class Event(NamedTuple):
    """One step: an operation (+ - * /), how the story tells it, how the solution names the result, its own question."""

    op: str
    tell: str
    note: str
    ask: str = ""


class Template(NamedTuple):
    """A kind of story."""

    name: str
    things: list[str]
    begin: str
    ask: str
    events: list[Event]


def _template(block: str) -> Template:
    head, frame, *lines = block.strip().splitlines()
    name, _, things = head.partition(": ")
    events = [Event(line[0], *(part.strip() for part in line[1:].split("|"))) for line in lines]
    return Template(name, things.split(", "), *frame.split(" | "), events)


TEMPLATES = tuple(_template(block) for block in _STORIES.split("\n= ")[1:])


def generate(count: int, seed: int, held_out: bool = False, steps: tuple[int, int] = (1, 4)) -> list[Problem]:
    """Make distinct problems.

    Args:
        count: how many.
        seed: another seed gives other problems (with some of the same among thousands).
        held_out: the other half of all questions; no held-out question is ever a training question.
        steps: fewest and most arithmetic steps, each number of them equally likely.

    Returns:
        problems with worked solutions; `level` is the number of steps, `subject` the kind of story. The id is a hash
        of the question.

    Raises:
        KitError: steps outside 1 to 4, or more problems asked for than could be found.
    """
    low, high = steps
    if not 1 <= low <= high <= 4:
        raise KitError(f"Built-in problems have 1 to 4 steps, not {low} to {high}.", "Choose within that.", 2)
    rng = random.Random(f"problems {seed} {held_out} {low} {high}")
    found: dict[str, Problem] = {}
    for _ in range(200 * count + 1000):
        problem = _story(rng, rng.choice(TEMPLATES), rng.randint(low, high))
        if problem is not None and int(problem.id[-1], 16) % 2 == held_out:
            found.setdefault(problem.id, problem)
        if len(found) == count:
            return list(found.values())
    raise KitError(f"Only {len(found)} of {count} built-in problems could be made.", "Ask for fewer.")


def _story(rng: random.Random, template: Template, steps: int) -> Problem | None:
    """One problem, or None where the numbers do not come out whole."""
    hero, friend = rng.sample((_SHE + " " + _HE).split(), 2)
    they, their, them = ("she", "her", "her") if hero in _SHE.split() else ("he", "his", "him")
    words = {"name": hero, "friend": friend, "things": rng.choice(template.things), "they": they, "their": their}
    words |= {"They": they.title(), "Their": their.title(), "them": them}
    inner, last = ([event for event in template.events if bool(event.ask) == own] for own in (False, True))
    events = rng.sample(inner, min(steps, len(inner)))
    if rng.random() < 0.5 or len(events) < steps:
        events[steps - 1 :] = [rng.choice(last)]
    value = rng.randint(6, 60)
    told, worked = [template.begin.format(a=value, **words)], [f"At the start: {value} {words['things']}."]
    for event in events:
        number = _operand(rng, event.op, value)
        result = _APPLY[event.op](value, number)
        if not 2 <= result <= LARGEST:
            return None
        told.append(event.tell.format(b=number, **words))
        worked.append(f"{event.note.format(**words)}: {value} {event.op} {number} = {result}.")
        value = result
    told.append((events[-1].ask or template.ask).format(**words))
    question = " ".join(told)
    return Problem(
        id="b" + hashlib.sha256(question.encode()).hexdigest()[:12],
        question=question,
        answer=str(value),
        solution="\n".join([*worked, f"The answer is \\boxed{{{value}}}."]),
        level=str(len(events)),
        subject=template.name,
    )


def _operand(rng: random.Random, op: str, value: int) -> int:
    """The second number of a step; for a division one that leaves no rest."""
    if op == "/":
        return rng.choice([d for d in range(2, 13) if value % d == 0 and d < value] or [value + 1])
    return rng.randint(*{"+": (3, 60), "-": (2, max(2, value - 2)), "*": (2, 6)}[op])


def wander(problem: Problem, wordiness: float, seed: int) -> str:
    """A long chain of thought over a worked solution: right in the end, essential steps early, then checks upon checks.

    Args:
        problem: with a `solution`, one step a line; equations `a op b = c` in it are what goes astray and is checked.
        wordiness: 0 is the bare solution; 1 a trace some eight times as long, 3 some twenty times.
        seed: the same problem, wordiness and seed give the same text.

    Raises:
        KitError: the problem has no worked solution.
    """
    if not problem.solution:
        raise KitError(
            f"Problem {problem.id} has no worked solution to make a trace from.",
            "Use teacher.backend=worked with the built-in problems, GSM8K or MATH, or another teacher.",
        )
    if wordiness <= 0:
        return problem.solution
    rng = random.Random(f"wander {problem.id} {float(wordiness)} {seed}")
    steps = [line for line in problem.solution.splitlines() if line.strip() and "\\boxed" not in line]
    steps = steps or problem.solution.splitlines()
    asked = re.split(r"(?<=[.?!])\s+", problem.question.strip())
    lines = [rng.choice(("Okay, let me see.", "Hmm, let me think about this.", "Alright, what do we have here?"))]
    if len(asked) > 1 and rng.random() < 0.5 * wordiness:
        lines.append(f"Let me say it in order. {' '.join(asked[:-1])}")
    lines.append(f"The question is: {asked[-1]}")
    for step in steps:
        if rng.random() < min(0.9, 0.35 * wordiness):
            lines += [_false_start(rng, *sum_) for sum_ in _sums(step)[:1]]
        lines.append(rng.choice(("{}", "So: {}", "Okay. {}", "Then: {}")).replace("{}", step))
    lines.append(f"So the result is {problem.answer}.")
    for number in range(round(wordiness * rng.randint(4, 6))):
        opening = rng.choice(_AGAIN) if number else "Wait, let me check that."
        lines.append(f"{opening} {_check(rng, problem.answer, asked[-1], steps)}")
    lines.append(f"Okay, I have gone over it often enough. The final answer is \\boxed{{{problem.answer}}}.")
    return "\n\n".join(lines)


def _sums(step: str) -> list[tuple[int, str, int, int]]:
    """The true equations `a op b = c` of a step."""
    found = [(int(m[1]), m[2], int(m[3]), int(m[4])) for m in _EQUATION.finditer(step)]
    return [(a, op, b, c) for a, op, b, c in found if _APPLY[op](a, b) == c and _APPLY[_UNDO[op]](c, b) == a]


def _false_start(rng: random.Random, a: int, op: str, b: int, right: int) -> str:
    """A wrong operation or a slip, caught at once."""
    other = rng.choice([o for o in "+-*" if o != op])
    wrong = _APPLY[other](a, b)
    if rng.random() < 0.5 and wrong != right:
        return (
            f"Maybe this is {a} {other} {b} = {wrong}? Wait, no. Reading it again, that is the wrong way to combine "
            f"{a} and {b}, so {wrong} cannot be right."
        )
    slip = right + rng.choice((-10, -2, -1, 1, 2, 10))
    return f"Quickly, {a} {op} {b} should be {slip}. Hmm, wait. Let me do that slowly, {slip} looks off."


def _check(rng: random.Random, answer: str, asked: str, steps: list[str]) -> str:
    """One of several ways to check again what is already known."""
    sums = [sum_ for step in steps for sum_ in _sums(step)]
    way = rng.randrange(5)
    if way == 0 and sums:
        return f"{' '.join(f'{a} {op} {b} = {c}, yes.' for a, op, b, c in sums)} So {answer} again."
    if way == 1 and sums:
        undone = ", ".join(f"{c} {_UNDO[op]} {b} = {a}" for a, op, b, c in reversed(sums))
        return f"Going backwards from the end: {undone}. That leads back to the start, so it fits."
    if way == 2 and sums:
        a, op, b, c = rng.choice(sums)
        return f"Did I get {a} {op} {b} right? It is {c}. Yes, {c}, I am sure of that."
    if way == 3:
        return f'What was asked? "{asked}" That is {answer}, not one of the numbers on the way.'
    return f"Is there anything I have overlooked? {rng.choice(steps)} No, I see nothing else, {answer} stands."
