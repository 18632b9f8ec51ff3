"""Cut a chain of thought into sentences without losing a character: "".join(parts) == trace.

The unit of section 3.2's search. Boundaries are offsets into the trace, so a kept prefix is an exact slice of it.
Rules, not a model: English and CJK punctuation, LaTeX, Markdown lists, code. Linear in the text.
"""

from __future__ import annotations

import re
from itertools import pairwise

_NEVER = frozenset(
    "e.g i.e cf vs viz resp approx dr mr mrs ms prof st jr sr thm lem eq eqs fig figs".split()
)
_NUMBERED = frozenset(
    "no nos p pp sec secs ch vol ex prop cor def art par".split()
)  # short for words before a digit
_HEADED = frozenset(
    "step case part method option claim example problem question equation approach lemma".split()
)
_OPENERS = frozenset(  # words that open a sentence behind "point A." or "the U.S."; other capitals there are names
    "a after all also alternatively an and another any are as assume at because both but by can check clearly compute "
    "consider does each finally find first following for from given hence here hmm how however i if in indeed instead "
    "is it its let lets like maybe my next no not note now ok okay on once one or our perhaps same second similarly "
    "since so some still suppose that the their then there therefore these they this those thus to using wait we well "
    "what when where which while why with yes you".split()
)
_TOKEN = re.compile(
    r"^[^\S\n]*(?P<fence>```+|~~~+)(?P<info>[^\n`]*)$|\\(?P<end>begin|end)\{[^{}\n]{1,40}\}|\\[\[\]()]|\\.|\$\$?|`+|"
    r"(?P<blank>\n[^\S\n]*\n)",
    re.DOTALL | re.MULTILINE,
)
_CLOSERS = {"\\[": "\\]", "\\(": "\\)", "$$": "$$"}
_PROSE = re.compile(r"[.?!]\s+[A-Z][a-z ]")  # between two dollars: they are money
_CANDIDATE = (
    re.compile(  # possessive repeats behind a class that excludes itself: no stretch is read twice
        r"(?P<inner>[.?!]\s?(?:\$|\\[\])])\s++)(?=[A-Z])"
        r"|(?<![.!?…])(?P<stop>[.!?…]++)(?P<close>[\"'”’»)\]}*_]*+)(?P<space>\s++|\Z)"
        r"|(?P<full>[。！？｡])[。！？｡]*+[”’」』）》】)\"'*]*+\s*+|(?P<line>[\n\r]\s*+)"
    )
)
_MARKER = re.compile(
    r"[*_#>(\s]*(\d{1,3}|[A-Za-z]|[ivxIVX]{1,4})\Z"
)  # of a list: "1.", "(a)", "**2."


def split(text: str) -> list[str]:
    """Cut any text into sentences, "".join(parts) == text.

    White space belongs to the sentence before it; no part is white space alone unless the whole text is; an empty text
    has no parts.
    """
    return [text[a:b] for a, b in pairwise([0, *ends(text)])]


def ends(text: str) -> list[int]:
    """Where each sentence ends: ascending offsets in characters, the last one len(text); none for an empty text."""
    inside, found = _protected(text), {len(text)}
    for match in _CANDIDATE.finditer(text):
        if match["inner"]:  # "$x = 3.$ Then": the full stop stands inside the formula
            good = inside[match.start()] and not inside[match.end()]
        else:
            rule = _stops if match["stop"] else _unit
            good = not inside[match.start()] and (match["full"] or rule(text, match))
        found |= {match.end()} if good else set()
    cuts: list[int] = []
    for begin, end in pairwise([0, *sorted(found)]):
        if re.compile(r"\w").search(text, begin, end):
            cuts.append(end)
        elif cuts:  # a ruler, a lone bracket: part of what stands before it
            cuts[-1] = end
    return cuts or ([len(text)] if text else [])


def _protected(text: str, begin: int = 0, fences: bool = True) -> bytearray:
    """1 for each character of fenced code, a formula or inline code, in which nothing ends.

    A blank line ends whatever but a fence was open: a lone dollar harms one paragraph. A fence never closed is text.
    """
    inside, start, closer, depth, opened = bytearray(len(text) + 1), 0, "", 0, None
    for token in _TOKEN.finditer(text, begin):
        word, behind, closed = token[0], text[token.end() : token.end() + 1], False
        if opened:
            closed = (
                bool(token["fence"])
                and token["fence"].startswith(opened["fence"])
                and not token["info"].strip()
            )
        elif token["fence"] and fences:
            start, closer, opened = token.start("fence"), "", token
        elif token["blank"]:
            closer, depth = "", 0
        elif closer == "end":  # environments nest
            depth += {"begin": 1, "end": -1}.get(token["end"], 0)
            closed = depth == 0
        elif word == "$" and closer in ("", "$"):
            plain = (
                text[token.start() - 1].isspace()
                or behind.isdigit()
                or _PROSE.search(text, start, token.start())
            )
            closed = bool(closer) and not plain
            start, closer = (
                (start, closer) if closed else (token.start(), "" if behind.isspace() else "$")
            )
        elif closer == word:
            closed = True
        elif closer in ("", "$") and (
            word in _CLOSERS or token["end"] == "begin" or (word[0] == "`" and not closer)
        ):
            start, closer, depth = (
                token.start(),
                "end" if token["end"] else _CLOSERS.get(word, word),
                1,
            )
        if closed:
            inside[start : token.end()] = b"\1" * (token.end() - start)
            closer, opened = "", None
    if opened:
        inside[opened.end() :] = _protected(text, opened.end(), fences=False)[opened.end() :]
    return inside


def _unit(text: str, match: re.Match[str]) -> bool:
    """Whether a line break ends a unit: not behind a comma or colon, a lone list marker, or in hard-wrapped prose."""
    line = re.split(r"[\n\r]", text[max(0, match.start() - 200) : match.start()])[-1].rstrip()
    if line.endswith((",", ":", "，", "：")) or _MARKER.match(line.rstrip(".)*_")):
        return False
    wrapped = len(line) >= 60 and line[-1].isalnum() and match[0].count("\n") < 2
    return not (wrapped and re.match(r"[a-z]{2,}[ ,]", text[match.end() : match.end() + 20]))


def _stops(text: str, match: re.Match[str]) -> bool:
    """Whether a run of . ! ? … with white space behind it ends a sentence."""
    stop, before = match["stop"], text[max(0, match.start() - 60) : match.start()]
    after = text[match.end() : match.end() + 20]
    if stop == "." and _abbreviates(before, after):
        return False
    if "\n" in match["space"] or not after:
        return True
    if stop == "!" and re.search(r"(?:\d|\)|\b[a-zA-Z])\Z", before):  # a factorial
        return re.match(r"[A-Z][a-z]", after) is not None
    if stop[0] == "…" or stop.startswith(".."):  # "x_1 + ... + x_n", "0.333... of it"
        return after[0].isalpha() and not after[0].islower()
    return not (after[0].islower() and any(quote in match["close"] for quote in "\"'”’»"))


def _abbreviates(before: str, after: str) -> bool:
    """Whether the full stop between the two belongs to a list marker, an abbreviation or an initial."""
    line = re.split(r"[\n\r]|(?<=[.!?:])\s", before)[-1]
    head, _, number = line.strip("*_# ").rpartition(" ")
    if _MARKER.match(line) or (head.lower() in _HEADED and number.isdigit()):
        return True
    *_, previous, word = ["", "", *re.findall(r"\S+", before)]
    word = word.lstrip("(\"'“‘[*_")
    low, following = word.lower(), re.match(r"[^\W\d_]*", after)[0]  # type: ignore[index]
    if low in _NUMBERED:
        return after[:1].isdigit()
    if low in _NEVER or low in ("etc", "al", "a.m", "p.m"):
        return low in _NEVER or following[:1].islower()
    if following.lower() in _OPENERS or not re.fullmatch(r"(?:[^\W\d_]\.)*[^\W\d_]", word):
        return False
    named = re.match(r"[A-Z]\.", after) or re.fullmatch(r"|[A-Z]\.|[A-Z][a-z]+", previous)
    return "." in word or bool(
        word.isupper() and following[:1].isupper() and named
    )  # U.S., J. R. Smith
