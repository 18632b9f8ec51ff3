r"""Final answers: found in a text, and graded against the gold answer (section 4; Eq. 9's filter).

Found: the last `\boxed{...}` with balanced braces behind the last end-of-prefix tag, so that a prefix that already
holds the answer earns nothing; else what follows the last `####`; else the value that the last sentence about "the
answer" names. Graded: as exact decimals where both sides are plain numbers, as option letters or as text where the
data asks for it, and by math-verify in killable workers (kit/graders.py) otherwise. `Grade.how` says which.

Paper: math-verify or-ed with an OAT grader, which read the last number of a text that named no answer. Here: a text
that names no answer is `unparsed`. This module executes nothing that a text says, and knows nothing of sampling.
"""

from __future__ import annotations

import re
import threading
import unicodedata
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal
from types import TracebackType

from kit.graders import Worker
from kit.prompts import END

END_TAGS = (END, "<End_of_Draft>")  # the second: in the paper's released outputs
LONGEST = 4000  # characters of an answer that is still looked at
SHOWN = 200  # characters of an answer over that which are recorded

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_BOX_BARE = re.compile(r"\\boxed\s+([^\s{}$]+)")
_HASHES = re.compile(r"####[ \t]*([^\n]+)")
_ANSWER = re.compile(r"\banswers?\b([^\n]{0,160})", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.?!](?=[\s.?!]|$)")
_VALUE = (
    r"(\$[^$\n]{1,120}\$(?!\d)|\\\(.{1,120}?\\\)|\*\*[^*\n]{1,120}\*\*|"
    r"[-+\u2212]?\s?[$\u20ac\u00a3]?\s?(?:\d[\d,]*\.?\d*|\.\d+)(?:\s*/\s*\d+)?\s?%?)"
)
_EQUALS = re.compile(r".*=\s*" + _VALUE, re.DOTALL)
_NAMES = re.compile(r"\W*(?:\w+\s+){0,3}?(?:is|are|was|be|of|as|:)\s*:?\s*(?:[a-z]+\s+){0,2}?" + _VALUE, re.IGNORECASE)
_LETTER_NAMED = re.compile(r"\W*(?:is|:|=)?[\s*:]*(?:option|choice)?[\s*$]*(?:\\text(?:bf)?\{)?[\s(\[*]*([A-Z])\b")
_TEXT_NAMED = re.compile(r"\W*?(?:is|are|was|:)\s*:?\s*(.+)", re.DOTALL)
_LETTER = re.compile(
    r"[\s(\[]*(?:option|choice)?[\s(\[]*([A-Za-z])(?:[)\].:,]+(?:\s.*)?|\s*)$", re.DOTALL | re.IGNORECASE
)
_ALSO = re.compile(r"^[\s(\[]*[A-Za-z][)\].:]*\s*(?:,|/|&|and\b|or\b)\s*[(\[]?[A-Za-z]\b", re.IGNORECASE)
_MACRO = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_NUMBER = re.compile(
    r"([-+]?)\s*(?:[$\u20ac\u00a3\u00a5]\s*)?([-+]?)(\d{1,3}(?:[, ]\d{3})+(?!\d)|\d*)(?:\.(\d*))?(.*)", re.DOTALL
)
_UNIT = re.compile(r"[\s-]*(?:[A-Za-z\u00b0\u00b2\u00b3%'\u2019/.,()\s-]|\^\{?[23]\}?)*$")
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_NOT_UNITS = {
    "pi",
    "sqrt",
    "and",
    "or",
    "to",
    "plus",
    "minus",
    "times",
    "half",
    "dozen",
    "over",
    "mod",
    "e",
    "i",
    "x",
    "y",
}


@dataclass(frozen=True)
class Item:
    """A text to grade.

    Args:
        gold: the right answer; a solution that ends in `#### 8` or in a box stands for that.
        output: what a model wrote.
        verifier: math, number, choice or text.
    """

    gold: str
    output: str
    verifier: str = "math"


@dataclass(frozen=True)
class Grade:
    """What became of a text.

    `verdict` is correct, wrong, unparsed (no answer, or none that can be read) or timeout (the worker was stopped).
    `answer` is the text as found. `how` is `PLACE:METHOD`, PLACE boxed, hashes or phrase, METHOD decimal, math,
    string, choice, text, oversized, unreadable, time, memory or crash; or it is `none`.
    """

    verdict: str
    answer: str | None
    how: str


def extract(text: str, verifier: str = "math") -> str | None:
    """The final answer as it stands in a text, or None."""
    return find(text, verifier)[0]


def find(text: str, verifier: str = "math") -> tuple[str | None, str]:
    """The final answer and where it stood: boxed, hashes, phrase; (None, "none") where there is none."""
    text = text[max(text.rfind(tag) + len(tag) if tag in text else 0 for tag in END_TAGS) :]
    answer = last_box(text)
    if answer is not None:
        return answer, "boxed"
    hashes = _HASHES.findall(text)
    if hashes and hashes[-1].strip():
        return hashes[-1].strip(), "hashes"
    for match in reversed(list(_ANSWER.finditer(text))):
        answer = _named(match[1], verifier)
        if answer:
            return answer, "phrase"
    return None, "none"


def last_box(text: str) -> str | None:
    r"""Content of the last non-empty `\boxed{...}` whose braces balance, in one pass over the text."""
    found: tuple[int, str] | None = None
    open_braces: list[int | None] = []  # where a box's content begins; None for any other brace
    for match in _BOX.finditer(
        text, max(text.find("\\boxed"), 0) if "\\boxed" in text else text.find("\\fbox") % (len(text) + 1)
    ):
        token = match[0]
        if token == "}":
            start = open_braces.pop() if open_braces else None
            if start is not None and (found is None or start > found[0]) and text[start : match.start()].strip():
                found = (start, text[start : match.start()].strip())
        elif token.endswith("{") and token != "\\{":
            open_braces.append(match.end() if len(token) > 1 else None)
    bare = _BOX_BARE.findall(text) if found is None else []
    return found[1] if found else bare[-1] if bare else None


def decimal(text: str, words: bool = False) -> tuple[Decimal, bool] | None:
    r"""A plain number as an exact decimal, and whether it is a percentage.

    Args:
        text: `8,000`, `-3.0`, `\$5.50`, `20\%`, `90^\circ`, `15\text{ cm}`; None for fractions and expressions.
        words: accept any words as a unit (`8 apples`, `x = 8`), and a scale (`2 million`).
    """
    plain = _plain(text)
    if words and "=" in plain:
        plain = plain.rsplit("=", 1)[1].strip()
    match = _NUMBER.fullmatch(plain)
    if match is None or not (match[3] or match[4]) or (match[1] and match[2]) or not _UNIT.fullmatch(match[5]):
        return None
    unit = match[5].strip(" .,-")
    if unit and not words and not (unit in ("%", "\u00b0") or _MACRO.search(text)):
        return None
    first = re.split(r"[^a-z]", unit.lower(), maxsplit=1)[0]
    if first in _NOT_UNITS:
        return None
    value = Decimal(f"{match[1]}{match[2]}{re.sub('[, ]', '', match[3]) or 0}.{match[4] or 0}")
    return value.scaleb(_SCALES.get(first, 0)), unit.startswith("%") or first == "percent"


def letter(text: str) -> str | None:
    """The one option letter that an answer names; None for several or none."""
    plain = _MACRO.sub(r"\1", text).replace("\\", " ").strip(" $*.{}")
    match = _LETTER.match(plain)
    return match[1].upper() if match and not _ALSO.match(plain) else None


def normal_text(text: str) -> str:
    """Text as compared word for word: case, spacing, LaTeX text macros and outer punctuation aside."""
    text = unicodedata.normalize("NFKC", _MACRO.sub(r"\1", text)).casefold()
    return " ".join(text.replace("\\ ", " ").split()).strip(" .,;:!\"'$*`")


class Grader:
    """Grades texts; a context manager. Workers start when the first answer needs one, and stay warm.

    Args:
        workers: processes that run math-verify.
        timeout_seconds: for one answer; its worker is then killed and replaced.
        memory_bytes: address space of a worker.
    """

    def __init__(self, workers: int = 2, timeout_seconds: float = 5.0, memory_bytes: int = 1 << 30) -> None:
        self.workers = [Worker(timeout_seconds, memory_bytes) for _ in range(workers)]
        self._lock = threading.Lock()

    def grade(self, items: Sequence[Item]) -> list[Grade]:
        """Grade texts, in order. May be called from any thread."""
        grades: list[Grade | None] = []
        asked: dict[tuple[str, str], list[tuple[int, str, str]]] = {}
        for index, item in enumerate(items):
            answer, place = find(item.output, item.verifier)
            grade = _at_once(item, answer, place)
            grades.append(grade)
            if grade is None and answer is not None:
                asked.setdefault((gold_of(item.gold), answer), []).append((index, answer, place))
        with self._lock:
            replies = self._ask(list(asked))
        for places, (verdict, how) in zip(asked.values(), replies, strict=True):
            for index, answer, place in places:
                grades[index] = Grade(verdict, answer, f"{place}:{how}")
        return [grade for grade in grades if grade is not None]

    def _ask(self, pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """Verdicts of math-verify; each worker takes the next pair when it is free."""
        if len(pairs) < 2:
            return [self.workers[0].ask(*pair) for pair in pairs]
        replies: list[tuple[str, str]] = [("unparsed", "none")] * len(pairs)
        rest = iter(range(len(pairs)))
        turn = threading.Lock()

        def work(worker: Worker) -> None:
            while True:
                with turn:
                    index = next(rest, None)
                if index is None:
                    return
                replies[index] = worker.ask(*pairs[index])

        with ThreadPoolExecutor(len(self.workers)) as pool:
            try:
                for done in [pool.submit(work, worker) for worker in self.workers[: len(pairs)]]:
                    done.result()
            except BaseException:  # Ctrl-C: nobody waits for the rest
                rest = iter(())
                self.close()
                raise
        return replies

    def close(self) -> None:
        """End the workers."""
        for worker in self.workers:
            worker.close()

    def __enter__(self) -> Grader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def gold_of(gold: str) -> str:
    """The gold answer itself, where the data gives a whole solution."""
    box = last_box(gold) if "\\boxed" in gold else None
    return box or gold.rsplit("####", 1)[-1].strip()


def _at_once(item: Item, answer: str | None, place: str) -> Grade | None:
    """The grade where no worker is needed, else None."""
    gold = gold_of(item.gold)
    if answer is None:
        return Grade("unparsed", None, "none")
    if len(answer) > LONGEST:
        return Grade("unparsed", answer[:SHOWN] + "...", f"{place}:oversized")
    if item.verifier == "choice":
        given, right = letter(answer), letter(gold)
        return _verdict(given == right if given and right else None, answer, f"{place}:choice")
    if item.verifier == "text":
        return _verdict(normal_text(answer) == normal_text(gold), answer, f"{place}:text")
    words = item.verifier == "number"
    given_number, right_number = decimal(answer, words), decimal(gold, words)
    if given_number is None or right_number is None:
        return None
    if given_number[0] == right_number[0] or given_number[1] == right_number[1]:
        return _verdict(given_number[0] == right_number[0], answer, f"{place}:decimal")
    return None  # 0.2 against 20%


def _verdict(right: bool | None, answer: str, how: str) -> Grade:
    return Grade("unparsed" if right is None else "correct" if right else "wrong", answer, how)


def _named(rest: str, verifier: str) -> str | None:
    """What the words behind "answer" name, up to the sentence's end."""
    clause = _SENTENCE_END.split(rest, maxsplit=1)[0]
    if verifier == "choice":
        match = _LETTER_NAMED.match(clause)
    elif verifier == "text":
        match = _TEXT_NAMED.match(clause)
    else:
        if re.search(r"\bnot\b|n['\u2019]t\b", clause):
            return None
        match = _EQUALS.match(clause) or _NAMES.match(clause)
    return match[1].strip(" *").rstrip(",") if match else None


def _plain(text: str) -> str:
    """A number without LaTeX's and Markdown's clothes."""
    text = text.strip().strip("*`").replace("\u2212", "-").replace("\\%", "%").replace("\\$", "$").replace("{,}", ",")
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\\degree\b", "\u00b0", _MACRO.sub(r" \1", text))
    text = re.sub(r",\\!\s*", ",", text)
    text = re.sub(r"\\[,!;: ]|~", " ", text).strip()
    if len(text) > 1 and text.startswith("$") and text.endswith("$"):
        text = text[1:-1]
    return text.removeprefix("\\(").removesuffix("\\)").strip(" .,;")
