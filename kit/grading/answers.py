r"""Final answers graded against the gold answer (section 4; the filter of Eq. 9).

An answer is found (extract.py), put into a normal form (normalize.py), and compared: as a letter,
as words, as a plain number with a unit (quantities.py), by a judge model (opinions.py), or by sympy
in a worker process that can be killed (math_worker.py, expressions.py). No wrong answer may pass:
what cannot be read as a whole is never graded by a part of it.

Nothing that a text says is executed, and nothing is known here of how it was drawn.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from math import gcd
from typing import NamedTuple

from kit.core.errors import KitError
from kit.grading.extract import TAKEN_BACK, find, gold_of, last_box
from kit.grading.math_worker import MathWorker
from kit.grading.normalize import FONTS, comparable, normalize
from kit.grading.opinions import AnswerJudge
from kit.grading.quantities import (
    after_last_equals,
    different_units,
    read_clock,
    read_quantity,
    with_currency,
)

__all__ = ["Grade", "Grader", "Item", "find", "gold_of", "last_box"]

LONGEST = 4000  # characters of an answer that are looked at

# One option letter: (B)  B.  B) 12  option B  B is correct; no first letter of a word.
_LETTER = re.compile(
    r"[\s(\[]*(?:(?:the\s+)?(?:correct\s+|right\s+)?(?:option|choice|answer)(?:\s+is)?)?"
    r"[\s(\[:]*([a-z])"
    r"(?:[)\].:;,]+(?:\s.*)?|\s*|\s+(?:because|since|as)\b.*|\s+(?=[\d\\$=(-]).*|"
    r"\s+is\b(?!.*\b(?:not|never|incorrect|wrong|false)\b).*)",
    re.DOTALL | re.IGNORECASE,
)
_SEVERAL = re.compile(
    r"[\s(\[]*[A-J][)\].:]*(?:\s*(?:,|/|&|;|and\b|or\b|,\s*and\b)\s*[(\[]?[A-J]\b[)\].:]*)+"
    r"\s*|[A-J]{2,}"
)
_SEVERAL_LETTERS = re.compile(r"[\s(\[]*[a-z][)\].:]*\s*(?:,|/|&|and\b|or\b)\s*[(\[]?[a-z]\b", re.I)

# And another one: B - C  B (C)  B) C)  B \\& C  B, but C too
_ANOTHER = re.compile(
    r"\W{0,9}[A-J]\W{0,9}(?:[-&;,/(]|\\(?:cup|or)\b|\bor\b)\W{0,9}(?:text\W{0,9})?(?:(?:or|but)\b\W{0,9})?"
    r"[A-HJ](?=\W*$|\s+(?:too|also|is\s+also|as\s+well)\b)|[\s(\[]*[A-J]\)\s*\(?[A-J]\)\W*$"
)

# A number with its base: 2516_8  x = (2516)_{8}  2516_{\text{eight}}  2516 \text{(base 8)}
_BASED = re.compile(
    r"(?:[a-zA-Z]\s*=\s*)?\(?([\dA-F]+)\)?"
    r"(?:_\s*\{?(?:\\text\s*\{)?\s*(\d+|[a-z]{3,})\s*\}{0,2}|"
    r"\s*(?:\\text\s*\{)?[\s(,]*(?:in\s+)?base\s*(\d+|[a-z]+)[\s)}]*)"
)
_BASE_NAMES = {
    name: str(number)
    for number, name in enumerate("two three four five six seven eight nine ten".split(), 2)
}

_RATIO = re.compile(r"^(\d+)\s*:\s*([1-9]\d*)$")
_TIME = re.compile(r"\d{1,2}:[0-5]\d")
_ELLIPSIS = re.compile(r"\.\.|…|\\[lc]?dots\b")


class Item(NamedTuple):
    """A text to grade: what a model wrote, and the right answer, or a solution that ends in a box
    or in `#### 8`.

    `verifier` is math, number (grade-school: units in words are allowed), choice (option letters),
    text, or judge (a model, which is shown the question too).
    """

    gold: str
    output: str
    verifier: str = "math"
    question: str = ""


class Grade(NamedTuple):
    """What became of a text.

    `verdict` is correct, wrong, unparsed (no answer, or none that can be read), timeout (the worker
    was stopped) or undecided (by the judge model). `how` is none, oversized, or `PLACE:METHOD`:
    boxed, tag, hashes, phrase, bare or given, and decimal, math, string, choice, text, unreadable,
    time, memory, crash, or what `AnswerJudge.compare` says.
    """

    verdict: str
    answer: str | None
    how: str


class Grader:
    """Grades texts; a context manager, for any thread. Its worker starts when an answer needs it,
    and stays warm.

    Args:
        timeout_seconds: of processor time for one answer; the worker is then killed and replaced.
        memory_bytes: the worker's address space.
        judge: grades the answers whose verifier is judge; closed with the grader.
    """

    def __init__(
        self,
        timeout_seconds: float = 5.0,
        memory_bytes: int = 1 << 30,
        judge: AnswerJudge | None = None,
    ) -> None:
        self._worker = MathWorker(timeout_seconds, memory_bytes)
        self._judge = judge

    def grade(self, items: Sequence[Item], bare: bool = False) -> list[Grade]:
        """Grade texts, in order; equal answers to equal questions are compared once.

        Args:
            bare: the outputs are answers that were extracted before.

        Raises:
            KitError: the judge model does not load, or there is none.
        """
        compare = cache(self._compare)
        grades = []
        for item in items:
            answer, place = (item.output, "given") if bare else find(item.output, item.verifier)
            gold = gold_of(item.gold)
            if not answer:
                grades.append(Grade("unparsed", None, "none" if bare else place))
                continue
            # Comparing takes quadratic time, and exact numbers have a limit of digits.
            if max(len(answer), len(gold)) > LONGEST:
                grades.append(Grade("unparsed", None, "oversized"))
                continue
            verdict, method = compare(item.verifier, gold, answer, item.question)
            grades.append(Grade(verdict, answer, f"{place}:{method}"))
        return grades

    def as_published(self, items: Sequence[Item]) -> list[bool]:
        """The paper's own verdicts, as a second opinion; see kit/grading/published.py."""
        return [self._worker.published(gold_of(item.gold), item.output) for item in items]

    def _compare(self, verifier: str, gold: str, answer: str, question: str) -> tuple[str, str]:
        """Verdict and method; the worker is asked last."""
        if verifier == "judge":
            if self._judge is None:
                message = "The verifier judge asks a model, which a run's config names."
                raise KitError(message, "Name another verifier, or evaluate by `palign.py run`.", 2)
            return self._judge.compare(question, gold, answer)
        if verifier == "choice":
            return _compare_letters(gold, answer)
        if verifier == "text":
            return _verdict(same_words(gold, answer)), "text"
        plain = verifier == "number"
        right, given = _ratios(
            normalize(with_currency(gold, plain)), normalize(with_currency(answer, plain))
        )

        # 5... is some number near 5: equal to its own spelling, and else not known
        if _ELLIPSIS.search(answer) and comparable(right) != comparable(given):
            return "unparsed", "unreadable"

        # times of day, then plain numbers
        clock = read_clock(right)
        if clock or read_clock(given):
            return _verdict(clock == read_clock(given)), "string"
        equal = _equal_numbers(right, given, words=plain)
        if equal is not None:
            return _verdict(equal), "decimal"

        # the same string; a single letter in a file of mathematics
        if comparable(right) == comparable(given):
            return "correct", "string"
        if re.fullmatch(r"\(?[A-J]\)?", right) and letters(given) == letters(right):
            return "correct", "choice"
        bases = _bases(right, given)
        if bases is not None:
            return _verdict(bases), "string"
        if plain:
            right, given = map(_last_quantity, (right, given))
        return self._worker.compare(right, given)

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.close()
        if self._judge:
            self._judge.close()


def same_words(gold: str, answer: str) -> bool:
    """Whether two answers are the same text, up to case, spaces and fonts."""
    return comparable(normalize(gold)) == comparable(normalize(answer))


def _verdict(right: bool) -> str:
    return "correct" if right else "wrong"


def _equal_numbers(gold: str, answer: str, words: bool) -> bool | None:
    """Whether two plain numbers are equal; None where one is none, and for 0.2 and 20%, which are
    left to the worker.
    """
    right = read_quantity(gold, words)
    given = read_quantity(answer, words)
    if not right or not given:
        return None
    if right.value == given.value:
        return not different_units(right.unit, given.unit)
    return False if right.percent == given.percent else None


def _ratios(gold: str, answer: str) -> tuple[str, str]:
    """Both with 3:4 as the fraction that it is; 2:30, not in lowest terms, may be a time."""
    if _TIME.fullmatch(gold) and _TIME.fullmatch(answer) and gcd(*map(int, gold.split(":"))) > 1:
        return gold, answer
    return _RATIO.sub(r"\1/\2", gold), _RATIO.sub(r"\1/\2", answer)


def _last_quantity(text: str) -> str:
    """What comes after the last `=`, where that is a number."""
    last = after_last_equals(text)
    return last if read_quantity(last, words=True) else text


def _compare_letters(gold: str, answer: str) -> tuple[str, str]:
    # several letters where one is right name no answer
    right = letters(gold)
    given = letters(answer)
    if not right or not given or len(given) > len(right) == 1:
        return "unparsed", "choice"
    return _verdict(right == given), "choice"


def letters(text: str) -> str:
    """The option letters that an answer names, sorted; "" for none."""
    # (B) in any font
    plain = re.sub(rf"\\{FONTS}\s*\{{([^{{}}]*)\}}", r"\1", text)
    plain = (
        normalize(plain.strip(" $*{}"))
        .replace("\\and", "and")
        .replace("\\or", "or")
        .strip(" $*.{}")
    )
    if _SEVERAL.fullmatch(plain):
        return "".join(sorted(set(re.findall(r"[A-J](?![a-z])", plain))))
    if _SEVERAL_LETTERS.match(plain) or TAKEN_BACK.match(plain) or _ANOTHER.match(plain):
        return ""
    match = _LETTER.fullmatch(plain)
    return match[1].upper() if match else ""


def _bases(gold: str, answer: str) -> bool | None:
    """Whether numbers with a base agree, which the answer may leave out; None where the gold answer
    has none.
    """
    right = _based(gold)
    given = _based(answer)
    if right and not given:
        return right[0] == re.sub(r"^[a-zA-Z]\s*=\s*", "", answer)
    return right == given if given else None


def _based(text: str) -> tuple[str, str] | None:
    """The digits and the base of a number with its base."""
    match = _BASED.fullmatch(text)
    if match is None:
        return None
    base = match[2] or match[3]
    return match[1], _BASE_NAMES.get(base, base)
