"""Cut a chain of thought into sentences without losing a character: "".join(parts) == trace.

The unit of section 3.2's search. Boundaries are offsets into the trace, so a kept prefix is an exact slice
of it. Rules, not a model: English and CJK punctuation, LaTeX, Markdown lists, code. Linear in the text.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from itertools import pairwise

_NEVER = frozenset("e.g i.e cf vs viz resp approx dr mr mrs ms prof st jr sr thm lem eq eqs fig figs".split())
_NUMBERED = frozenset("no nos p pp sec secs ch vol ex prop cor def art par".split())  # short for words before a digit
_HEADED = frozenset("step case part method option claim example problem question equation approach lemma".split())
_OPENERS = frozenset(  # words that open a sentence behind "point A." or "the U.S.": tells them from initials
    "a after all also alternatively an and another any are as assume at because both but by can check clearly compute "
    "consider does each finally find first following for from given hence here hmm how however i if in indeed instead "
    "is it its let lets like maybe my next no not note now ok okay on once one or our perhaps same second similarly "
    "since so some still suppose that the their then there therefore these they this those thus to using wait we well "
    "what when where which while why with yes you".split()
)
_TOKEN = re.compile(r"\\(begin|end)\{([^{}\n]{1,40})\}|\\[\[\]()]|\\.|\$\$?|`+|\n[^\S\n]*\n", re.DOTALL)
_FENCE = re.compile(r"^[^\S\n]*(```+|~~~+)([^\n`]*)$", re.MULTILINE)
_CANDIDATE = re.compile(  # possessive repeats behind a class that excludes itself: no stretch is read twice
    r"(?<![.!?…])(?P<stop>[.!?…]++)(?P<close>[\"'”’»)\]}*_]*+)(?P<space>\s++|\Z)"
    r"|(?P<full>[。！？｡])[。！？｡]*+[”’」』）》】)\"'*]*+\s*+|(?P<line>[\n\r]\s*+)"
)
_MARKER = re.compile(r"[*_#>(\s]*(\d{1,3}|[A-Za-z]|[ivxIVX]{1,4})\Z")  # of a list: "1.", "(a)", "**2."
_CLOSERS = {"\\[": "\\]", "\\(": "\\)", "$$": "$$"}
_SOLID = re.compile(r"\w")


def split(text: str) -> list[str]:
    """Cut a text into sentences.

    Args:
        text: any string.

    Returns:
        parts whose concatenation is `text`. White space belongs to the sentence before it; no part is white space
        alone unless the whole text is; an empty text has no parts.
    """
    return [text[a:b] for a, b in pairwise([0, *ends(text)])]


def ends(text: str) -> list[int]:
    """Where each sentence ends: ascending offsets in characters, the last one len(text); none for an empty text."""
    spans = _protected(text)
    starts = [start for start, _ in spans]
    found = {len(text)}
    for match in _CANDIDATE.finditer(text):
        near = bisect_right(starts, match.start()) - 1
        if near >= 0 and match.start() < spans[near][1]:
            continue
        if match["full"] or (match["line"] and _unit(text, match)) or (match["stop"] and _stops(text, match)):
            found.add(match.end())
    for start, end in spans:
        inner = re.compile(r"[.?!]\s?(?:\$|\\[\])])").search(text, max(start, end - 5), end)
        after = re.compile(r"\s+(?=[A-Z])").match(text, end)
        if inner and after:  # "$x = 3.$ Then": the full stop stands inside the formula
            found.add(after.end())
    cuts: list[int] = []
    for begin, end in pairwise([0, *sorted(found)]):
        if _SOLID.search(text, begin, end):
            cuts.append(end)
        elif cuts:  # a ruler, a lone bracket: part of what stands before it
            cuts[-1] = end
    return cuts or ([len(text)] if text else [])


def _protected(text: str) -> list[tuple[int, int]]:
    """Spans in which nothing ends: fenced code, formulas, inline code. What is never closed is plain text."""
    fences: list[tuple[int, int]] = []
    opened: re.Match[str] | None = None
    for fence in _FENCE.finditer(text):
        if opened is None:
            opened = fence
        elif fence[1].startswith(opened[1]) and not fence[2].strip():
            fences.append((opened.start(1), fence.end()))
            opened = None
    spans, last = [], 0
    for start, end in fences:
        spans += [*_formulas(text, last, start), (start, end)]
        last = end
    return spans + _formulas(text, last, len(text))


def _formulas(text: str, begin: int, stop: int) -> list[tuple[int, int]]:
    """Formulas and inline code between two offsets. A blank line ends what is open: a lone dollar harms one paragraph."""
    spans: list[tuple[int, int]] = []
    start, closer, depth = 0, "", 0
    for token in _TOKEN.finditer(text, begin, stop):
        word = token[0]
        if word[0] == "\n":
            closer, depth = "", 0
        elif closer == "end":  # environments nest
            depth += {"begin": 1, "end": -1}.get(token[1], 0)
            if depth == 0:
                spans.append((start, token.end()))
                closer = ""
        elif word == "$" and closer in ("", "$"):
            opens, money = (
                not text[token.end() : token.end() + 1].isspace(),
                text[token.end() : token.end() + 1].isdigit(),
            )
            if closer and not money and not text[token.start() - 1].isspace():
                spans.append((start, token.end()))
                closer = ""
            else:
                start, closer = token.start(), "$" if opens else ""
        elif word == closer:
            spans.append((start, token.end()))
            closer = ""
        elif word in _CLOSERS and closer in ("", "$"):
            start, closer = token.start(), _CLOSERS[word]
        elif token[1] == "begin" and closer in ("", "$"):
            start, closer, depth = token.start(), "end", 1
        elif word[0] == "`" and not closer:
            start, closer = token.start(), word
    return spans


def _unit(text: str, match: re.Match[str]) -> bool:
    """Whether a line break ends a unit: not behind a comma or colon, a lone list marker, or in hard-wrapped prose."""
    line = re.split(r"[\n\r]", text[max(0, match.start() - 200) : match.start()])[-1].rstrip()
    if line.endswith((",", ":", "，", "：")) or _MARKER.match(line.rstrip(".)*_")):
        return False
    wrapped = len(line) >= 60 and line[-1].isalnum() and match[0].count("\n") < 2
    return not (wrapped and re.match(r"[a-z]{2,}[ ,]", text[match.end() : match.end() + 20]))


def _stops(text: str, match: re.Match[str]) -> bool:
    """Whether a run of . ! ? … with white space behind it ends a sentence."""
    stop, after = match["stop"], text[match.end() : match.end() + 20]
    before = text[max(0, match.start() - 60) : match.start()]
    if stop == "." and (_marks(before) or _abbreviates(before, after)):
        return False
    if "\n" in match["space"] or not after:
        return True
    if stop == "!" and re.search(r"(?:\d|\)|\b[a-zA-Z])\Z", before):  # a factorial
        return re.match(r"[A-Z][a-z]", after) is not None
    runs_on = stop[0] == "…" or stop.startswith("..") or any(c in "\"'”’»" for c in match["close"])
    return not (runs_on and after[0].islower())


def _marks(before: str) -> bool:
    """Whether the full stop behind `before` belongs to a list marker ("1.", "Step 2.")."""
    line = re.split(r"[\n\r]|(?<=[.!?:])\s", before)[-1]
    word, _, number = line.strip("*_# ").rpartition(" ")
    return bool(_MARKER.match(line)) or (word.lower() in _HEADED and number.isdigit())


def _abbreviates(before: str, after: str) -> bool:
    """Whether the full stop between the two belongs to an abbreviation or an initial and ends nothing."""
    words = re.findall(r"\S+", before)[-2:]
    word = words[-1].lstrip("(\"'“‘[*_") if words else ""
    low, following = word.lower(), re.match(r"[^\W\d_]*", after)[0]  # type: ignore[index]
    if low in _NEVER:
        return True
    if low in _NUMBERED:
        return after[:1].isdigit()
    if low in ("etc", "al", "a.m", "p.m"):
        return following[:1].islower()
    opens = following.lower() in _OPENERS
    if re.fullmatch(r"(?:[^\W\d_]\.)+[^\W\d_]", word):  # U.S.
        return not opens
    initial = len(word) == 1 and word.isupper() and following[:1].isupper() and not opens
    return initial and (len(words) < 2 or re.fullmatch(r"[A-Z]\.|[A-Z][a-z]+", words[0]) is not None)
