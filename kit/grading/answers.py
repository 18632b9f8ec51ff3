r"""Final answers: found in a text, and graded against the gold answer (section 4; Eq. 9's filter).

Found: the last `\boxed{...}` behind the last end-of-prefix tag, so that a prefix which already holds the answer earns
nothing; else what follows the last `####`; else the value that the last sentence about "the answer" names. Graded:
as exact decimals where both are plain numbers, else by math-verify in a killable worker (kit/graders.py).

Paper: math-verify or-ed with an OAT grader, which take the last number of a text that names no answer. Here: such a
text is `unparsed`. Nothing that a text says is executed, and nothing is known here of how it was drawn.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from decimal import Decimal
from functools import cache
from threading import Lock
from typing import NamedTuple

from kit.grading.math_worker import Worker
from kit.prompts import END

END_TAGS = (END, "<End_of_Draft>")  # the second: in the paper's released outputs
LONGEST = 4000  # characters of an answer that are looked at

_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_BARE_BOX = re.compile(r"\\boxed\s+([^\s{}$]+)")
_HASHES = re.compile(r"####[ \t]*([^\s][^\n]*)")
_ANSWER = re.compile(r"\banswers?\b(?=([^\n]{0,160}))", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.?!](?=[\s.?!]|$)")
_VALUE = (
    r"(\$[^$\n]{1,120}\$(?!\d)|\\\(.{1,120}?\\\)|\*\*[^*\n]{1,120}\*\*|"
    r"[-+\u2212]?\s?[$\u20ac\u00a3]?\s?(?:\d[\d,]*\.?\d*|\.\d+)(?:\s*/\s*\d+)?\s?%?)"
)
_IS = r"\W*(?:\w+\s+){0,3}?(?:is|are|was|be|of|as|:)\s*:?\s*(?:[a-z]+\s+){0,2}?"
_NUMERIC = re.compile(
    r"(?!.*(?:\bnot\b|n['\u2019]t\b))(?:.*=\s*|" + _IS + ")" + _VALUE, re.IGNORECASE
)
_SAID = re.compile(r"\W*?(?:is|are|was|:|=)\s*:?\s*(.+)")  # where the answer is no number
_LETTER = re.compile(  # the one option letter, not the first of several
    r"(?![\s(\[]*[a-z][)\].:]*\s*(?:,|/|&|and\b|or\b)\s*[(\[]?[a-z]\b)"
    r"[\s(\[]*(?:option|choice)?[\s(\[]*([a-z])(?:[)\].:,]+(?:\s.*)?|\s*)$",
    re.DOTALL | re.IGNORECASE,
)
_MACRO = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_NUMBER = re.compile(
    r"(?:[$\u20ac\u00a3]\s*)?([-+]?)\s*(?:[$\u20ac\u00a3]\s*)?(\d{1,3}(?:[, ]\d{3})+(?!\d)|\d*)(?:\.(\d*))?(.*)",
    re.DOTALL,
)
_UNIT = re.compile(r"[\s-]*(?:[A-Za-z\u00b0\u00b2\u00b3%'\u2019/.,()\s-]|[a-z]\^\{?[23]\}?)*$")
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_NOT_UNITS = set("pi sqrt and or to plus minus times half dozen over mod e i x y".split())


class Item(NamedTuple):
    """A text to grade: what a model wrote, and the right answer, or a solution that ends in a box or in `#### 8`.

    `verifier` is math, number (grade-school: units in words are allowed), choice (one letter) or text.
    """

    gold: str
    output: str
    verifier: str = "math"


class Grade(NamedTuple):
    """What became of a text.

    `verdict` is correct, wrong, unparsed (no answer, or none that can be read) or timeout (the worker was stopped).
    `how` is none, oversized, or `PLACE:METHOD`: boxed, hashes or phrase, and decimal, math, string (the last resort),
    choice, text, unreadable, time, memory or crash.
    """

    verdict: str
    answer: str | None
    how: str


class Grader:
    """Grades texts; a context manager, for any thread. Its worker starts when an answer needs it, and stays warm.

    `timeout_seconds` is for one answer: the worker is then killed and replaced; `memory_bytes` is its address space.
    """

    def __init__(self, timeout_seconds: float = 5.0, memory_bytes: int = 1 << 30) -> None:
        self._worker, self._lock = Worker(timeout_seconds, memory_bytes), Lock()

    def grade(self, items: Sequence[Item]) -> list[Grade]:
        """Grade texts, in order; equal answers to equal questions are compared once."""
        compare, grades = cache(self._compare), []
        for item in items:
            answer, place = find(item.output, item.verifier)
            if answer is None:
                grades.append(Grade("unparsed", None, place))
            else:
                verdict, method = compare(item.verifier, gold_of(item.gold), answer)
                grades.append(Grade(verdict, answer, f"{place}:{method}"))
        return grades

    def _compare(self, verifier: str, gold: str, answer: str) -> tuple[str, str]:
        """Verdict and method; the worker is asked last."""
        if verifier == "choice":
            right, given = _letter(gold), _letter(answer)
            return (
                "correct" if right == given else "wrong"
            ) if right and given else "unparsed", "choice"
        plain = _plain(gold), _plain(answer)
        if verifier == "text":
            return "correct" if plain[0] == plain[1] else "wrong", "text"
        right, given = (
            decimal(gold, words=verifier == "number"),
            decimal(answer, words=verifier == "number"),
        )
        if (
            right and given and (right[0] == given[0] or right[1] == given[1])
        ):  # 0.2 and 20% are left to math-verify
            return "correct" if right[0] == given[0] else "wrong", "decimal"
        if plain[0] == plain[1]:
            return "correct", "string"
        if not _comparable(*plain):
            return "wrong", "math"
        with self._lock:
            return self._worker.ask(_bare(gold), _bare(answer))

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.close()


def find(text: str, verifier: str = "math") -> tuple[str | None, str]:
    """The final answer as it stands in a text, and where: boxed, hashes, phrase; (None, "none" | "oversized")."""
    text = text[max(text.rfind(tag) + len(tag) if tag in text else 0 for tag in END_TAGS) :]
    if box := last_box(text):
        return (box, "boxed") if len(box) <= LONGEST else (None, "oversized")
    if hashes := _HASHES.findall(text):
        return (hashes[-1].strip(), "hashes") if len(hashes[-1]) <= LONGEST else (None, "oversized")
    for rest in reversed(_ANSWER.findall(text)[-1000:]):
        named = (_SAID if verifier in ("choice", "text") else _NUMERIC).match(
            _SENTENCE_END.split(rest, maxsplit=1)[0]
        )
        if named and (answer := named[1].strip(" *").rstrip(",")):
            return answer, "phrase"
    return None, "none"


def last_box(text: str) -> str | None:
    r"""Content of the last `\boxed{...}` that is not empty and whose braces balance, in one pass over the text."""
    last, start = None, -1
    begins: list[
        int | None
    ] = []  # of the open braces: where a box's content begins, None for any other brace
    for match in _BRACES.finditer(text) if "\\boxed" in text or "\\fbox" in text else ():
        if match[0] == "}":
            begin = begins.pop() if begins else None
            if (
                begin is not None
                and begin > start
                and (content := text[begin : match.start()].strip())
            ):
                last, start = content, begin
        elif match[0][-1] == "{" and match[0] != "\\{":
            begins.append(match.end() if len(match[0]) > 1 else None)
    return last or (_BARE_BOX.findall(text) or [None])[-1]


def gold_of(gold: str) -> str:
    """The gold answer itself, where the data gives a whole solution."""
    return last_box(gold) or gold.rsplit("####", 1)[-1].strip()


def decimal(text: str, words: bool = False) -> tuple[Decimal, bool] | None:
    r"""A plain number as an exact decimal, and whether it is a percentage; None for fractions and expressions.

    Args:
        text: `8,000`, `-3.0`, `\$5.50`, `20\%`, `90^\circ`, `15\text{ cm}`.
        words: allow any words as a unit (`8 apples`), a scale (`2 million`) and what goes before `=` (`x = 8`).
    """
    plain = _bare(
        _MACRO.sub(r" \1", text).replace("\u2212", "-").replace("\\%", "%").replace("{,}", ",")
    )
    plain = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\\degree\b", "\u00b0", plain.replace("\\$", "$"))
    plain = re.sub(r"\\[,!;: ]|~", " ", re.sub(r",\\!\s*", ",", plain)).strip()
    match = _NUMBER.fullmatch(plain.rsplit("=", 1)[-1].strip() if words else plain)
    if match is None or not (match[2] or match[3]) or not _UNIT.fullmatch(match[4]):
        return None
    unit = match[4].strip(" .,-")
    first = re.split(r"[^a-z]", unit.lower(), maxsplit=1)[0]
    if first in _NOT_UNITS or (
        unit not in ("", "%", "\u00b0") and not words and not _MACRO.search(text)
    ):
        return None
    value = Decimal(f"{match[1]}{re.sub('[, ]', '', match[2]) or 0}.{match[3] or 0}")
    return value.scaleb(_SCALES.get(first, 0)), unit.startswith("%") or first == "percent"


def _letter(text: str) -> str | None:
    """The one option letter that an answer names; None for several or none."""
    match = _LETTER.match(_MACRO.sub(r"\1", text).replace("\\", " ").strip(" $*.{}"))
    return match[1].upper() if match else None


def _bare(text: str) -> str:
    """Without Markdown's emphasis, the outer signs of math mode, and a full stop."""
    text = text.strip().strip("*`").strip().removeprefix("\\(").removesuffix("\\)").rstrip(" .,;")
    return (
        text[1:-1].strip()
        if len(text) > 1 and text[0] == text[-1] == "$" and "$" not in text[1:-1]
        else text
    )


def _plain(text: str) -> str:
    """Without what makes no difference: LaTeX's clothes, case, spacing and outer punctuation."""
    text = unicodedata.normalize("NFKC", _MACRO.sub(r"\1", _bare(text))).casefold()
    text = re.sub(r"\\[dt]frac(?![a-z])", r"\\frac", text.replace("\\{", "{").replace("\\}", "}"))
    return re.sub(r"\\(?:left|right)(?![a-z])|\\[,!;: ]|\s+", "", text).strip(".,;:!\"'")


def _comparable(gold: str, answer: str) -> bool:
    """Whether brackets and number bases allow equality: [1,2] is not (1,2), {1,2} neither; 12_5 is not 12_7."""
    kinds = [
        text[0] + text[-1]
        for text in (gold, answer)
        if "," in text and text[0] in "([{" and text[-1] in ")]}"
    ]
    bases = [
        base[1] for text in (gold, answer) if (base := re.fullmatch(r"[\da-z]+_\{?(\d+)\}?", text))
    ]
    return len(set(kinds)) < 2 and len(set(bases)) < 2
