r"""One normal form of an answer, before any comparison (section 4).

What makes no mathematical difference goes: `\displaystyle`, `\left`, fonts, spacing, dashes,
full-width forms. Nothing is computed here, and nothing that could change the value of an answer is
removed.
"""

import functools
import re
import unicodedata
from collections.abc import Callable
from itertools import groupby

from kit.core.bundled import bundled

FONTS = r"(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mathsf|rm|mbox|operatorname|ce)"

MOST_WRAPPERS = 5  # macros around an answer that are looked through

Replacement = str | Callable[[re.Match[str]], str]
# What may enclose a whole answer; text of words is another rule's.
_WRAPPER = re.compile(
    r"(?:\\(?:mathbf|boldsymbol|bm|mathrm|textbf|underline|boxed|fbox|large|Large|LARGE|huge|Huge)\s*)?\{"
)
_PLAIN = re.compile(r"[-+]?(?:\\?\$)?\d[\d.,]*")
# How characters of a kind are written in LaTeX.
_OPENINGS = {"<super": "^{", "<sub": "_{", "<fraction": "\\frac{"}
# Thousands written with spaces: 1\,000\,000  1 000 000
_SPACED_NUMBER = re.compile(r"(?<![\d.,_^])\d{1,3}(?:(?:\\[,;: ]|~|\s)\s*\d{3})+(?![\d.,])")


def _in_latex(text: str) -> str:
    """Raised and lowered characters and fractions of one character as LaTeX: x²³ is x^{23}."""
    parts = []
    for kind, run in groupby(text, _kind):
        characters = "".join(run)
        opening = _OPENINGS.get(kind)
        if opening:
            plain = unicodedata.normalize("NFKD", characters).replace("\u2212", "-")
            characters = opening + plain.replace("\u2044", "}{") + "}"
        parts.append(characters)
    return "".join(parts)


def _kind(character: str) -> str:
    """<super, <sub or <fraction for a raised or lowered character and a fraction; else another."""
    # degrees and ordinals, and a fraction without its denominator
    return "" if character in "ªº⅟" else unicodedata.decomposition(character).partition(">")[0]


@functools.cache
def _rules() -> tuple[dict[int, str], list[tuple[re.Pattern[str], Replacement]]]:
    """The characters and rules of kit/grading/normalize.yaml; full-width forms become plain
    ones.
    """
    loaded = bundled("grading/normalize")
    characters = str.maketrans(loaded["characters"])
    for code in range(0xFF01, 0xFF5F):
        characters[code] = chr(code - 0xFEE0)
    rules: list[tuple[re.Pattern[str], Replacement]] = []
    for pattern, replacement in loaded["rules"]:
        if replacement == "COMMAS":
            replacement = _without_commas
        rules.append((re.compile(pattern.replace("FONT", FONTS)), replacement))
    return characters, rules


def _without_commas(number: re.Match[str]) -> str:
    return number[0].replace(",", "")


def _unwrapped(text: str) -> str:
    r"""What macros of font, size or a box around the whole of an answer enclose: \mathbf{...}"""
    for _ in range(MOST_WRAPPERS):
        opening = _WRAPPER.match(text)
        if opening is None:
            break
        depth = 1
        place = opening.end()
        while depth and place < len(text):
            depth += {"{": 1, "}": -1}.get(text[place], 0) * (text[place - 1] != "\\")
            place += 1
        # {1, 2} is a set
        inner = text[opening.end() : place - 1].strip()
        is_set = opening[0] == "{" and not re.fullmatch(
            r"[(\[].*[)\]]|(?!.*\\[lr]?(?:mid|vert))[^,|:∣]*", inner
        )
        if depth or place < len(text) or is_set or "\\choose" in inner:
            break
        text = inner
    return text


def normalize(text: str) -> str:
    """The normal form of an answer.

    Args:
        text: as written in an output or a gold answer, with or without signs of math mode.
    """
    # most answers are plain numbers
    if _PLAIN.fullmatch(text):
        return text.replace("\\", "").replace("$", "").rstrip(",").removesuffix(".")
    characters, rules = _rules()
    text = unicodedata.normalize("NFC", text).strip().strip("*`").strip()
    text = _unwrapped(text)
    text = _in_latex(text).translate(characters)
    text = _SPACED_NUMBER.sub(lambda number: re.sub(r"\D", "", number[0]), text)
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    text = text.strip(' ,;:"').removesuffix(".").rstrip()
    # a bracket that is opened first and never closed
    if text[:1] in ("(", "[") and not re.search(r"[)\]]", text):
        text = text[1:].strip()
    return text


def comparable(text: str) -> str:
    """A normal form as a string to compare: without case, spaces, fonts, and the marks of a
    subscript.
    """
    text = re.sub(rf"\\{FONTS}(?![a-zA-Z])", "", text)
    text = re.sub(r"(?<![\\a-zA-Z])([A-Z][a-z]?|[a-z])_(\w)", r"\1\2", text)
    text = text.replace("\\{", "<").replace("\\}", ">")
    text = re.sub(r"(?<![_^}a-z\d])\{([^{}]*)\}(?!\{)", r"\1", text)
    # but 1 2 is not 12
    text = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text)
    return text.casefold().strip(',;:"')
