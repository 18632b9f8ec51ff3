"""How fast grading is: 1,000 grade-school answers and 500 of MATH, worker start included.

Every gold answer is taken once as it is and once exchanged for a neighbour's, so that half the answers are wrong and
cost a whole comparison; right ones of MATH are rewritten, so that they are not equal as strings.
"""

from __future__ import annotations

import json
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

from kit.core.errors import KitError
from kit.grading.answers import Grader, Item, gold_of

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
STYLES = ("\\boxed{%s}", "The answer is %s.", "So:\n#### $%s", "\\boxed{\\$%s.00}")


def bench(repeats: int = 3) -> dict[str, Any]:
    """Grade both sets.

    Returns:
        rows: [{name: gsm8k | math, rows_per_second, seconds (median of the repeats), answers, asked (of them, a
        worker), verdicts}].
    """
    sets = {"gsm8k": _gsm8k(1000), "math": _math(500)}
    return {
        "subject": "grade",
        "rows": [_measure(name, items, repeats) for name, items in sets.items()],
    }


def _measure(name: str, items: list[Item], repeats: int) -> dict[str, Any]:
    times = []
    for _ in range(max(repeats, 1)):
        begun = time.perf_counter()
        with Grader() as grader:
            grades = grader.grade(items)
        times.append(time.perf_counter() - begun)
    seconds = statistics.median(times)
    asked = sum(
        grade.how.endswith((":math", ":string", ":unreadable", ":time")) for grade in grades
    )
    facts = {
        "name": name,
        "rows_per_second": round(len(items) / seconds, 1),
        "seconds": round(seconds, 3),
    }
    return {
        **facts,
        "answers": len(items),
        "asked": asked,
        "verdicts": dict(Counter(g.verdict for g in grades)),
    }


def _gsm8k(count: int) -> list[Item]:
    golds = [gold_of(row["answer"]) for row in _rows("gsm8k_test.jsonl", count)]
    given = [golds[(n + n % 2) % len(golds)] for n in range(len(golds))]
    return [
        Item(gold, STYLES[n % 4] % given[n].replace(",", ""), "number")
        for n, gold in enumerate(golds)
    ]


def _math(count: int) -> list[Item]:
    golds = [row["answer"] for row in _rows("math500.jsonl", count)]
    given = [
        golds[(n + 1) % len(golds)] if n % 2 else f"{gold} + 0" for n, gold in enumerate(golds)
    ]
    return [Item(gold, f"\\boxed{{{answer}}}") for gold, answer in zip(golds, given, strict=True)]


def _rows(name: str, count: int) -> list[dict[str, Any]]:
    path = DATA / name
    if not path.exists():
        raise KitError(
            f"{path} is not there.",
            "Put the public test data beside the project, in ../shared/data.",
        )
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:count]]
