r"""One normal form of an answer, before any comparison (section 4).

What makes no mathematical difference goes: `\displaystyle`, `\left`, fonts, spacing, dashes,
full-width forms. Nothing is computed here, and nothing that could change the value of an answer is
removed.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from pathlib import Path

import yaml

FONTS = r"(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mathsf|rm|mbox|operatorname|ce)"

# Single characters: full-width forms, then typographic ones.
_CHARACTERS = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
_CHARACTERS.update({ord(dash): "-" for dash in "\u2010\u2011\u2012\u2013\u2014\u2212"})
_CHARACTERS.update({ord(space): " " for space in "\u00a0\u2002\u2003\u2009\u202f\u3000"})
_SYMBOLS = {
    "×": r"\times ", "·": r"\cdot ", "÷": r"\div ", "π": r"\pi ", "∞": r"\infty ", "≤": r"\leq ",
    "⩽": r"\leq ", "≥": r"\geq ", "⩾": r"\geq ", "≠": r"\neq ", "≈": r"\approx ", "±": r"\pm ",
    "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "ℝ": r"\mathbb{R}",
    "°": r"^\circ ", "²": "^2", "³": "^3", "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}",
    "¾": r"\frac{3}{4}", "、": ",", "。": ".", "’": "'", "“": '"', "”": '"', "∣": "|",
}  # fmt: skip
_CHARACTERS.update({ord(character): latex for character, latex in _SYMBOLS.items()})

_PLAIN = re.compile(r"[-+]?(?:\\?\$)?\d[\d.,]*")
# Thousands written with spaces: 1\,000\,000  1 000 000
_SPACED_NUMBER = re.compile(r"(?<![\d.,_^])\d{1,3}(?:(?:\\[,;: ]|~|\s)\s*\d{3})+(?![\d.,])")


@functools.cache
def _rules() -> list[tuple[re.Pattern[str], str]]:
    """The rules of kit/grading/normalize.yaml, in order."""
    path = Path(__file__).with_suffix(".yaml")
    rules = yaml.safe_load(path.read_text(encoding="utf-8"))
    return [(re.compile(pattern.replace("FONT", FONTS)), rule) for pattern, rule in rules]


def normalize(text: str) -> str:
    """The normal form of an answer.

    Args:
        text: as it stands in an output or a gold answer, with or without signs of math mode.
    """
    # most answers are plain numbers
    if _PLAIN.fullmatch(text):
        return text.replace("\\", "").replace("$", "").rstrip(".,")
    text = unicodedata.normalize("NFC", text).strip().strip("*`").strip().translate(_CHARACTERS)
    text = _SPACED_NUMBER.sub(lambda number: re.sub(r"\D", "", number[0]), text)
    for pattern, replacement in _rules():
        text = pattern.sub(replacement, text)
    text = text.lstrip(" ,;:\"'").rstrip(" .,;:\"'")
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
    text = re.sub(r"(?<![_^}a-z])\{([^{}]*)\}(?!\{)", r"\1", text)
    return re.sub(r"\s+", "", text).casefold().strip(",;:\"'")
