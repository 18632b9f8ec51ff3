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
_GREEK = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau "
    "upsilon phi chi psi omega"
).split()
# Greek letters that are units: 5 μm, 3 Ω.
_UNIT_LETTERS = re.compile(r"(?:[μµ](?=[a-zA-Z])|Ω)")
# Thousands written with spaces: 1\,000\,000  1 000 000
_SPACED_NUMBER = re.compile(r"(?<![\d.,_^])\d{1,3}(?:(?:\\[,;: ]|~|\s)\s*\d{3})+(?![\d.,])")


@functools.cache
def _marked_characters() -> dict[str, tuple[str, str]]:
    """Raised and lowered characters and fractions of one character: (super | sub | fraction, the
    plain characters).
    """
    marked = {}
    # blocks: Latin-1, modifier letters, phonetic extensions, super- and subscripts, number forms
    for start, end in ((0xB2, 0xBF), (0x2B0, 0x2E5), (0x1D2C, 0x1DC0), (0x2070, 0x2190)):
        for character in map(chr, range(start, end)):
            kind, _, codes = unicodedata.decomposition(character).partition("> ")
            plain = "".join(chr(int(code, 16)) for code in codes.split())
            is_fraction = kind == "<fraction" and len(plain) > 2
            if is_fraction or (kind in ("<super", "<sub") and character not in "ªº"):
                marked[character] = kind[1:], plain.replace("\u2212", "-")
    return marked


def _in_latex(text: str) -> str:
    r"""Raised and lowered characters, fractions of one character and Greek letters as LaTeX: x²³ is
    x^{23}.
    """
    if text.isascii():
        return text
    marked = _marked_characters()
    parts = []
    for kind, run in groupby(text, key=lambda character: marked.get(character, ("", ""))[0]):
        characters = "".join(run)
        plain = "".join(marked[character][1] for character in characters) if kind else characters
        if kind == "fraction":
            plain = "\\frac{" + plain.replace("\u2044", "}{") + "}"
        parts.append({"super": f"^{{{plain}}}", "sub": f"_{{{plain}}}"}.get(kind, plain))
    return re.sub("[Α-Ωα-ωϑϕ]", _greek, "".join(parts))


def _greek(letter: re.Match[str]) -> str:
    if _UNIT_LETTERS.match(letter.string, letter.start()):
        return letter[0]
    # GREEK SMALL LETTER THETA, GREEK PHI SYMBOL
    words = unicodedata.name(letter[0]).lower().replace("lamda", "lambda").split()
    name = next((word for word in words if word in _GREEK), None)
    if name is None:
        return letter[0]
    return f"\\{name.title() if 'capital' in words else name} "


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
        made = _without_commas if replacement == "COMMAS" else replacement
        rules.append((re.compile(pattern.replace("FONT", FONTS)), made))
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
        if depth or text[place:].strip() or is_set or "\\choose" in inner:
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
