"""How fast grading is: 1,000 grade-school answers and 500 of MATH, worker start included.

Every other answer is the problem's before, so that half of them are wrong and cost a whole
comparison; those of MATH are rewritten, so that correct ones are not equal as strings. The data is
read from ../shared/data.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from kit.bench import measure
from kit.core.errors import KitError
from kit.core.progress import Progress
from kit.grading.answers import Grade, Grader, Item, gold_of

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
NUMBERS = ("\\boxed{%s}", "The answer is %s.", "So:\n#### $%s", "\\boxed{\\$%s.00}")
# File, rows, verifier, and the texts that hold an answer.
SETS = {
    "gsm8k": ("gsm8k_test.jsonl", 1000, "number", NUMBERS),
    "math": ("math500.jsonl", 500, "math", ("\\boxed{%s + 0}",)),
}
BY_WORKER = (":math", ":string", ":unreadable", ":time")  # how a grade that asked a worker ends


def bench(options: Namespace, progress: Progress) -> dict[str, Any]:
    """Grade both sets.

    Returns:
        {rows: [{name: gsm8k | math, rows_per_second, seconds (median of the repeats), answers,
        asked (how many of them asked a worker), verdicts: {verdict: count}}]}.
    """
    ways = {name: partial(_grade, _items(*source)) for name, source in SETS.items()}
    rows = []
    for name, timing in measure(ways, options.repeats, progress).items():
        grades = timing.results[0]
        row = {
            "name": name,
            "rows_per_second": len(grades) / timing.seconds,
            "seconds": timing.seconds,
            "answers": len(grades),
            "asked": sum(grade.how.endswith(BY_WORKER) for grade in grades),
            "verdicts": dict(Counter(grade.verdict for grade in grades)),
        }
        rows.append(row)
    return {"rows": rows}


def _grade(items: list[Item]) -> list[Grade]:
    with Grader() as grader:
        return grader.grade(items)


def _items(name: str, count: int, verifier: str, styles: tuple[str, ...]) -> list[Item]:
    path = DATA / name
    if not path.exists():
        hint = "Put the public test data next to the project, in ../shared/data."
        raise KitError(f"{path} does not exist.", hint)
    lines = path.read_text(encoding="utf-8").splitlines()[:count]
    golds = [gold_of(json.loads(line)["answer"]) for line in lines]
    items = []
    for number, gold in enumerate(golds):
        answer = golds[number - number % 2]
        items.append(Item(gold, styles[number % len(styles)] % answer, verifier))
    return items
