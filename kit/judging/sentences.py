r"""Cut a chain of thought into sentences without losing a character: "".join(parts) == trace.

A sentence is the unit of section 3.2's search. Boundaries are offsets into the trace, so a kept
prefix is an exact slice of it. Rules, not a model: English and CJK punctuation, LaTeX, Markdown
lists, code. The time is linear in the text. What a sentence means is not looked at.
"""

import re
from collections.abc import Iterator
from itertools import pairwise

# Abbreviations after which a sentence goes on, whatever follows.
_ABBREVIATIONS = frozenset(
    "e.g i.e cf vs viz resp approx dr mr mrs ms prof st jr sr thm lem eq eqs fig figs".split()
)
# These also end sentences; they go on before a small letter.
_MAY_END = frozenset("etc al a.m p.m".split())
# Short for a word before a number: "no. 5", but "no. Then".
_NUMBERED = frozenset("no nos p pp sec secs ch vol ex prop cor def art par".split())
# Words before a number that is a heading, not the end of a sentence: "Step 2. Compute it."
_HEADED = frozenset(
    "step case part method option claim example problem question equation approach lemma".split()
)
# Words that open a sentence after "point A." or "the U.S."; other capitals there are names.
_OPENERS = frozenset(
    """
    a after all also alternatively an and another any are as assume at because both but by can check
    clearly compute consider does each finally find first following for from given hence here hmm
    how however i if in indeed instead is it its let lets like maybe my next no not note now ok okay
    on once one or our perhaps same second similarly since so some still suppose that the their then
    there therefore these they this those thus to using wait we well what when where which while why
    with yes you
    """.split()
)

# What opens or closes a stretch in which nothing ends: a line of a code fence, \begin and \end,
# marks of math and code; an escaped character, which is skipped; a blank line: it ends formulas.
_TOKEN = re.compile(
    r"^[^\S\n]*(?P<fence>```+|~~~+)(?P<info>[^\n`]*)$"
    r"|\\(?P<environment>begin|end)\{[^{}\n]{1,40}\}"
    r"|\\[\[\]()]|\\.|\$\$?|`+"
    r"|(?P<blank>\n[^\S\n]*\n)",
    re.DOTALL | re.MULTILINE,
)
_CLOSERS = {"\\[": "\\]", "\\(": "\\)", "$$": "$$"}
_PROSE = re.compile(r"[.?!]\s+[A-Z][a-z ]")  # between two dollars: they are money

# Where a sentence may end: a formula's own full stop ("$x = 3.$ Then"), western marks before white
# space, CJK marks, a line break. Repeats are possessive: no stretch of text is read twice.
_CANDIDATE = re.compile(
    r"(?P<inner>[.?!]\s?(?:\$|\\[\])])\s++)(?=[A-Z])"
    r"|(?<![.!?…])(?P<stop>[.!?…]++)(?P<close>[\"'”’»)\]}*_]*+)(?P<space>\s++|\Z)"
    r"|(?P<full>[。！？｡])[。！？｡]*+[”’」』）》】)\"'*]*+\s*+"
    r"|(?P<line>[\n\r]\s*+)"
)
_MARKER = re.compile(r"[*_#>(\s]*(\d{1,3}|[A-Za-z]|[ivxIVX]{1,4})\Z")  # of a list: "1.", "(a)"


def split(text: str) -> list[str]:
    """Cut any text into sentences, "".join(parts) == text.

    White space belongs to the sentence before it; no part is white space alone unless the whole
    text is; an empty text has no parts.
    """
    return [text[begin:end] for begin, end in pairwise([0, *ends(text)])]


def ends(text: str) -> list[int]:
    """Where each sentence ends.

    Returns:
        Ascending offsets in characters, the last one len(text); none for an empty text.
    """
    protected = bytearray(len(text) + 1)  # 1 for each character at which nothing ends
    for start, end in _protected(text):
        protected[start:end] = b"\1" * (end - start)
    candidates = {len(text)}
    for match in _CANDIDATE.finditer(text):
        if _ends_sentence(text, match, protected):
            candidates.add(match.end())

    # A part without a word, like a ruler or a lone bracket, belongs to what comes before it.
    offsets: list[int] = []
    for begin, end in pairwise([0, *sorted(candidates)]):
        if re.search(r"\w", text[begin:end]):
            offsets.append(end)
        elif offsets:
            offsets[-1] = end
    return offsets if offsets or not text else [len(text)]


def _ends_sentence(text: str, match: re.Match[str], protected: bytearray) -> bool:
    inside = protected[match.start()]
    if match["inner"]:
        return bool(inside and not protected[match.end()])
    if inside:
        return False
    if match["stop"]:
        return _stop_ends(text, match)
    return bool(match["full"]) or _line_ends(text, match)


def _protected(text: str, begin: int = 0, fences: bool = True) -> Iterator[tuple[int, int]]:
    """Stretches (start, end) of fenced code, formulas and inline code.

    A blank line ends whatever but a fence was open, so that a lone dollar harms one paragraph.

    Args:
        begin: where reading starts.
        fences: whether code fences count; after one that is never closed they do not.
    """
    start = 0
    closer = ""  # what closes the open formula or code: "end" for an environment, "" none is open
    depth = 0  # of environments
    fence = None  # the line that opened a code block
    for token in _TOKEN.finditer(text, begin):
        word = token[0]
        if fence:
            # closed by a line whose fence is no shorter, with nothing after it
            is_long_enough = (token["fence"] or "").startswith(fence["fence"])
            if is_long_enough and not token["info"].strip():
                yield fence.start("fence"), token.end()
                fence = None
        elif token["fence"] and fences:
            fence = token
            closer = ""
        elif token["blank"]:
            closer = ""
        elif closer == "end":
            depth += {"begin": 1, "end": -1}.get(token["environment"], 0)
            if depth == 0:
                yield start, token.end()
                closer = ""
        elif closer == word and not _is_money(text, start, token):
            yield start, token.end()
            closer = ""
        elif closer in ("", "$"):
            # a lone dollar never hides what opens after it
            opened = _closer_of(text, token, closer)
            if opened is not None:
                start = token.start()
                closer = opened
                depth = 1
    if fence:
        yield from _protected(text, fence.end(), fences=False)


def _closer_of(text: str, token: re.Match[str], closer: str) -> str | None:
    """What closes the stretch that a token opens; None: it opens none, "": it stands for money."""
    word = token[0]
    if word == "$":
        return "" if text[token.end() : token.end() + 1].isspace() else "$"
    if token["environment"] == "begin":
        return "end"
    if word[0] == "`" and not closer:
        return word
    return _CLOSERS.get(word)


def _is_money(text: str, start: int, token: re.Match[str]) -> bool:
    """Whether a dollar closes no formula: after a space, before a digit, or after prose."""
    if token[0] != "$":
        return False
    around = text[token.start() - 1 : token.end() + 1]
    is_apart = re.match(r"\s|.\$\d", around, re.DOTALL) is not None
    return is_apart or _PROSE.search(text, start, token.start()) is not None


def _line_ends(text: str, match: re.Match[str]) -> bool:
    """Whether a line break ends a sentence.

    Not after a comma, a colon or a lone list marker, and not in hard-wrapped prose.
    """
    before = text[max(0, match.start() - 200) : match.start()]
    line = re.split(r"[\n\r]", before)[-1].rstrip()
    if line.endswith((",", ":", "，", "：")) or _MARKER.match(line.rstrip(".)*_")):
        return False
    wrapped = len(line) >= 60 and line[-1].isalnum() and match[0].count("\n") < 2
    return not (wrapped and re.match(r"[a-z]{2,}[ ,]", text[match.end() : match.end() + 20]))


def _stop_ends(text: str, match: re.Match[str]) -> bool:
    """Whether a run of . ! ? … with white space after it ends a sentence."""
    stop = match["stop"]
    before = text[max(0, match.start() - 60) : match.start()]
    after = text[match.end() : match.end() + 20]
    if stop == "." and _abbreviates(before, after):
        return False
    if "\n" in match["space"] or not after:
        return True
    # a factorial
    if stop == "!" and re.search(r"(?:\d|\)|\b[a-zA-Z])\Z", before):
        return re.match(r"[A-Z][a-z]", after) is not None
    # "x_1 + ... + x_n", "0.333... of it"
    if stop[0] == "…" or stop.startswith(".."):
        return after[0].isalpha() and not after[0].islower()
    # 'then "why?" he asked'
    return not (after[0].islower() and re.search("[\"'”’»]", match["close"]))


def _abbreviates(before: str, after: str) -> bool:
    """Whether the full stop between the two belongs to a list marker, abbreviation or initial."""
    line = re.split(r"[\n\r]|(?<=[.!?:])\s", before)[-1]
    head, _, number = line.strip("*_# ").rpartition(" ")
    if _MARKER.match(line) or (head.lower() in _HEADED and number.isdigit()):
        return True

    *_, previous, last = ["", "", *re.findall(r"\S+", before)]
    last = last.lstrip("(\"'“‘[*_")
    word = last.lower()
    if word in _NUMBERED:
        return after[:1].isdigit()
    if word in _ABBREVIATIONS:
        return True
    if word in _MAY_END:
        return after[:1].islower()

    # initials and their like: "U.S. Army", "J. R. Smith", but "point A. So"
    following = re.split(r"[\W\d_]", after)[0]
    if following.lower() in _OPENERS or not re.fullmatch(r"(?:[^\W\d_]\.)*[^\W\d_]", last):
        return False
    if "." in last:
        return True
    in_name = re.match(r"[A-Z]\.", after) or re.fullmatch(r"|[A-Z]\.|[A-Z][a-z]+", previous)
    return bool(last.isupper() and following[:1].isupper() and in_name)
