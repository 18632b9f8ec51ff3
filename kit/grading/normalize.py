r"""One normal form of an answer, before any comparison (section 4).

What makes no mathematical difference goes: `\displaystyle`, `\left`, fonts, spacing, dashes, full-width forms.
Nothing is computed here, and nothing that could change the value of an answer is removed.
"""

from __future__ import annotations

import re
import unicodedata

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

# Thousands written with spaces: 1\,000\,000  1 000 000
_SPACED_NUMBER = re.compile(r"(?<![\d.,_^])\d{1,3}(?:(?:\\[,;: ]|~|\s)\s*\d{3})+(?![\d.,])")

# (pattern, replacement), in order: a later rule relies on the earlier ones.
_RULES = (
    # signs of math mode, but not the line ends of a matrix
    (r"(?<!\\)\\[()\[\]]|\\?\$|[€£¥]", " "),
    # spacing and size
    (r",\\!\s*|\{,\}", ","),
    (r"(?<!\\)\\[,;:! ]|~", " "),
    (r"\\(?:quad|qquad|displaystyle|textstyle|limits|left|right|middle)(?![a-zA-Z])", " "),
    (r"\\[bB]igg?[lrm]?(?![a-zA-Z])|\\[hv]space\*?\{[^{}]*\}", " "),
    # degrees are a unit like any other
    (r"(?:\{\})?(?:\^\s*\{?\s*\\circ\s*\}?|\^?\s*\\degree(?![a-zA-Z]))", r"\\text{degrees}"),
    # one name for each relation and operation
    (r"\\(?:leqslant|leqq|le)(?![a-zA-Z])|<=", r"\\leq "),
    (r"\\(?:geqslant|geqq|ge)(?![a-zA-Z])|>=", r"\\geq "),
    (r"\\lt(?![a-zA-Z])", "<"),
    (r"\\gt(?![a-zA-Z])", ">"),
    (r"\\(?:not\s*=|ne(?![a-zA-Z]))|!=", r"\\neq "),
    (r"\\(?:mid|vert|lvert|rvert)(?![a-zA-Z])", "|"),
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (r"\\(?:backslash|smallsetminus)(?![a-zA-Z])", r"\\setminus "),
    (r"\\varnothing(?![a-zA-Z])", r"\\emptyset "),
    (r"\\(?:(?:mathbb|mathbf)\s*\{?\s*R\s*\}?|R(?![a-zA-Z]))", r"\\mathbb{R}"),
    (r"\*\*", "^"),
    # plain text's functions: sqrt(3)  pi
    (r"√", r"\\sqrt "),
    (r"(?<![\\a-zA-Z])(sqrt|pi|sin|cos|tan|cot|sec|csc|log|ln|exp)(?![a-z])", r"\\\1 "),
    (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"\\sqrt\s+(\d+|[a-zA-Z])", r"\\sqrt{\1}"),
    # one letter in another font, and chemistry: \mathrm{e}  \text{H}_2\text{O}  \ce{H2O}
    (rf"\\{FONTS}\s*\{{\s*([a-zA-Z])\s*\}}", r"\1"),
    (r"\\(?:mathrm|ce)\s*\{\s*((?:[A-Z][a-z]?|_?\{?\d\}?)+)\s*\}", r"\1"),
    # words between answers, and before one: \text{ or }  \text{The answer is }
    (rf"\\{FONTS}\s*\{{\s*,?\s*(and|or)\s*\}}", r" \1 "),
    (r"\s*,?\s*(?<![a-zA-Z])(and|or)(?![a-zA-Z])", r" \\\1 "),
    (r"[和且]", r" \\and "),
    (r"或", r" \\or "),
    (r"\\(?:vee|lor)(?![a-zA-Z])", r"\\or "),
    (r"\\(?:wedge|land)(?![a-zA-Z])", r"\\and "),
    (rf"\\{FONTS}\s*\{{([^{{}}]*\w)\s+(and|or)\s*\}}", r"\\text{\1} \\\2 "),
    (rf"^\s*\\{FONTS}\s*\{{[^{{}}]*\b(?:is|are)\s*:?\s*\}}", ""),
    (rf"^\s*\\{FONTS}\s*\{{[^{{}}]*\}}\s*=", ""),
    (r"^\s*(?:\\approx|=)", ""),
    (rf"^\s*\\{FONTS}\s*\{{([^{{}}]*)\}}\s*$", r"\1"),
    # an environment that only arranges
    (r"\\(?:begin|end)\{(?:aligned|align|gathered|equation|split)\*?\}", " "),
    (r"\(?\s*\\begin\{array\}\s*\{[^{}]*\}", r"\\begin{matrix}"),
    (r"\\end\{array\}\s*\)?", r"\\end{matrix}"),
    (r"\(?\s*\\begin\{[pb]?matrix\}", r"\\begin{matrix}"),
    (r"\\end\{[pb]?matrix\}\s*\)?", r"\\end{matrix}"),
    # groups of one: x^{2}  E_{1}
    (r"([_^])\s*\{\s*(\w)\s*\}", r"\1\2"),
    (r"(?<!\\)\{\}", ""),
    # 4.5e33  1.2 x 10^3  -3.
    (r"(?<![\w.])(\d+\.?\d*|\.\d+)[eE]([-+]?)0*(\d{1,4})(?!\w)", r"\1\\times 10^{\2\3}"),
    (r"(?<=\d)\s*[xX*]\s*(?=10\s*\^)", r"\\times "),
    (r"(?<=\d)\.(?![\d\w\\])", ""),
    # a mixed number: 3 1/2
    (r"(?<![\w.^\\}])(\d+)\s+(\d+)/(\d+)(?![\d.])", r"\1\\frac{\2}{\3}"),
    # sets in words, and with the braces of plain text
    (r"^\s*(?i:all real numbers|all reals)\s*$", r"\\mathbb{R}"),
    (r"^\s*(?i:no (?:real )?solutions?|none)\s*$", r"\\emptyset"),
    (r"^\s*\{([^{}]*[,|:][^{}]*)\}\s*$", r"\\{\1\\}"),
    (r"\s+", " "),
)  # fmt: skip
_COMPILED = [(re.compile(pattern), replacement) for pattern, replacement in _RULES]


def normalize(text: str) -> str:
    """The normal form of an answer.

    Args:
        text: as it stands in an output or a gold answer, with or without signs of math mode.
    """
    text = unicodedata.normalize("NFC", text).strip().strip("*`").strip().translate(_CHARACTERS)
    text = _SPACED_NUMBER.sub(lambda number: re.sub(r"\D", "", number[0]), text)
    for pattern, replacement in _COMPILED:
        text = pattern.sub(replacement, text)
    text = text.lstrip(" ,;:\"'").rstrip(" .,;:\"'")
    # a bracket that is opened first and never closed
    if text[:1] in ("(", "[") and not re.search(r"[)\]]", text):
        text = text[1:].strip()
    return text


def comparable(text: str) -> str:
    """A normal form as a string to compare: without case, spaces, fonts, and the marks of a subscript."""
    text = re.sub(rf"\\{FONTS}(?![a-zA-Z])", "", text)
    text = re.sub(r"(?<![\\a-zA-Z])([A-Z][a-z]?|[a-z])_(\w)", r"\1\2", text)
    text = text.replace("\\{", "<").replace("\\}", ">")
    text = re.sub(r"(?<![_^}a-z])\{([^{}]*)\}(?!\{)", r"\1", text)
    return re.sub(r"\s+", "", text).casefold().strip(",;:\"'")
