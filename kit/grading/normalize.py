r"""One normal form of an answer, before any comparison (section 4).

What makes no mathematical difference goes: `\displaystyle`, `\left`, fonts, spacing, dashes,
full-width forms. Nothing is computed here, and nothing that could change the value of an answer is
removed.
"""

import functools
import re
import unicodedata

from kit.core.bundled import bundled

FONTS = r"(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mathsf|rm|mbox|operatorname|ce)"

_PLAIN = re.compile(r"[-+]?(?:\\?\$)?\d[\d.,]*")
# Thousands written with spaces: 1\,000\,000  1 000 000
_SPACED_NUMBER = re.compile(r"(?<![\d.,_^])\d{1,3}(?:(?:\\[,;: ]|~|\s)\s*\d{3})+(?![\d.,])")


@functools.cache
def _rules() -> tuple[dict[int, str], list[tuple[re.Pattern[str], str]]]:
    """The characters and rules of kit/grading/normalize.yaml; full-width forms become plain
    ones.
    """
    loaded = bundled("grading/normalize")
    characters = str.maketrans(loaded["characters"])
    for code in range(0xFF01, 0xFF5F):
        characters[code] = chr(code - 0xFEE0)
    rules = []
    for pattern, replacement in loaded["rules"]:
        rules.append((re.compile(pattern.replace("FONT", FONTS)), replacement))
    return characters, rules


def normalize(text: str) -> str:
    """The normal form of an answer.

    Args:
        text: as written in an output or a gold answer, with or without signs of math mode.
    """
    # most answers are plain numbers
    if _PLAIN.fullmatch(text):
        return text.replace("\\", "").replace("$", "").rstrip(",").removesuffix(".")
    characters, rules = _rules()
    text = unicodedata.normalize("NFC", text).strip().strip("*`").strip().translate(characters)
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
