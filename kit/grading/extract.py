r"""The final answer of a text, found (section 4): boxes, `<answer>`, `#### 8`, or a sentence about
the answer.

Only what comes after the last end-of-prefix tag and the thinking counts, so a prefix which already
holds the answer earns nothing. Boxes that only commas, and/or, spacing or labels separate are one
answer: hedging does not pay.

Paper: where a text names no answer, its last expression. Here: there is none
(kit/grading/published.py has that way).
"""

import json
import re
from collections.abc import Iterator

from kit.core.thinking import after_thinking
from kit.grading.normalize import FONTS
from kit.prompts import END

END_TAGS = (END, "<End_of_Draft>")  # the second: in the paper's released outputs
LONGEST = 4000  # characters of an answer that are looked at

_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_BARE_BOX = re.compile(r"\\boxed\s+([^\s{}$]+)")
_BETWEEN_BOXES = re.compile(
    r"(?:[\s,;.&$]|\\[()\[\] ,;!]|\\(?:quad|qquad|text|left|right)\b|[{}]|\*\*|"
    r"\b(?:and|or)\b|[和或且、，]|"
    r"(?:\b[a-zA-Z]\w?(?:_\{?\w+\}?)?|\\[a-z]+)(?:\([a-z]\))?\s*=)*",
    re.IGNORECASE,
)
_TAG = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL | re.IGNORECASE)
_TURN_END = re.compile(
    r"(?:<\|(?!end_of_box)[\w ]{1,40}\|>|<｜[^｜<>]{1,60}｜>|</s>|<eos>|<end_of_turn>)\Z"
)
_HASHES = re.compile(r"^[ \t]*####[ \t]*([^\s#][^\n]*)", re.MULTILINE)
_HEADING = re.compile(r"[^\W\d_]{2,}|\d+[.)]\s+[^\W\d]")

# A sentence about the answer.
_CUE = re.compile(
    r"(?:\banswers?\b|答案|故选|应选|选项?(?=\s*[A-J]\b))(?=([^\n]{0,200}(?:\n[^\n]{0,200}){0,3}))",
    re.IGNORECASE,
)
_CHOICE_CUE = re.compile(r"\b(?:choice|option)\b(?=([^\n]{0,200}))", re.IGNORECASE)
_IS_CORRECT = re.compile(r"(?:^|[\s(])([A-J])\)?\s+is\s+(?:the\s+)?(?:correct|right)\b")
_NEGATED = re.compile(
    r"\b(?:not|never|neither|either|least|most|less|more|than|between|greater|fewer|wrong)\b|"
    r"n['’]t\b",
    re.IGNORECASE,
)
_IS = re.compile(
    r"(?:[\s:]|\bto\s+th(?:e|is)\s+(?:question|problem)|\(\s*in[^()\n]*\))*"
    r"(?:(?:\w+\s+){0,3}?(?:is|are|was|be|of|as|equals|remains|(?:comes|works)(?:\s+out)?\s+to)\b|"
    r"[:=：为是]|(?=\n)|(?<=选))"
    r"[\s:]*(?:(?:therefore|simply|thus|then|just|exactly|indeed|actually|definitely|certainly|"
    r"clearly|obviously|probably|really|still|also|always|only|now|in\s+fact|"
    r"equal\s+to|given\s+by|approximately|roughly|about|the|option|choice|number|final|answer|is)"
    r"[\s,]+:*)*",
    re.IGNORECASE,
)
_NUMBER = (
    r"[-+\u2212]?\s?[$\u20ac\u00a3]?\s?(?:\d+ \d+/\d+|\d[\d,]*\.?\d*|\.\d+)"
    r"(?:[eE][-+]?\d+|\s*(?:\\times|×|\\cdot)\s*10\s*\^\s*(?:\{[-+]?\d+\}|\d))?(?:\s*/\s*\d+)?\s?%?"
    r"(?:\s*(?:hundred|thousand|million|billion|trillion|percent|[ap]\.?m)\b)?"
)
_ONE = (
    r"(?:\$\$.{1,300}?\$\$|\\\[.{1,300}?\\\]|\$[^$\n]{1,200}\$(?!\d)|\\\(.{1,200}?\\\)|"
    r"\([^()\n=]{1,80},[^()\n=]{1,80}\)|"
    rf"(?:[a-zA-Z]\s*=\s*)?(?:{_NUMBER}|-?(?:\\[a-zA-Z]+(?:\[\d\])?(?:\{{[^{{}}\n]*\}})*|π))"
    r"(?![\w^\\*/+=×{<>(-]|\s*[-+*/=^×<>]\s*[\w\\(]|\s+to\s+\d|[,.]\d))"
)
_VALUES = re.compile(
    rf"{_ONE}(?:\s*(?:,\s*(?:and|or)\b|,|;|\band\b|\bor\b)\s*{_ONE})*", re.DOTALL | re.IGNORECASE
)
# A calculation before its result: the answer is 9 * 6 = 54.
_CALCULATION = re.compile(r"(?:[-+*/×÷().,$€£\d\s\u2212]|\\(?:times|cdot|div)\b)*\d[\s)$]*=\s*")
_SENTENCE_END = re.compile(r"[.?!。](?=[\s.?!*]|$)|\n")
# What makes another value of the one before: 5 to 6, 5 plus x, 5 and a half, 5 apples and 6 pears,
# 5 √2, 5 ÷ 2, 3–4, 2 x, 5 choose 2, 3 hours 30 minutes, 2 thirds.
_FURTHER = re.compile(
    r"\s*(?:or|to|plus|minus|over|mod|squared|cubed|factorial|pi|dozen|half|less|more|fewer|"
    r"divided|multiplied|raised|times\s+[^.,;\s])\b|\s*/\s*[A-J]\b|:\d|"
    r"[^.;\n]{0,40}\b(?:and|or)\s+(?:a\b|[-\d$\\])|"
    r"[ \t]*(?:[√÷·⋅±²³⁰-₟]|[\u2212\u2013][ \t]*[\d\\($])|[ \t]+\$?\d+(?![\w-])|[ \t]*\$(?=\\)|"
    r"[ \t]+(?:\\(?:[dt]?frac|sqrt|times|cdot|div|pi|pm|mp|binom|sin|cos|tan|log|ln)\b|"
    r"(?-i:[ixyz])(?=[.,;!?]?(?:\s|$))|"
    r"(?:sqrt|sin|cos|tan|log|ln|choose|lakh|crore|halves|(?:base|modulo)\s+\d|"
    r"(?:third|fifth|sixth|seventh|eighth|ninth|tenth|hundredth|thousandth)s)\b(?!-)|"
    r"(?:hours?|hrs?|minutes?|mins?|feet|foot|ft|pounds?|lbs?|days?|weeks?|months?|years?|dollars?|"
    r"k?m|kg|degrees?)\s+\d)",
    re.IGNORECASE,
)
# Before "the answer": it is only supposed.
_SUPPOSED = re.compile(
    r"\b(?:if|suppose|supposing|assume|assuming|were|whether|unless|imagine)\s+"
    r"(?:that\s+)?(?:the\s+|my\s+)?(?:\w+\s+)?$",
    re.IGNORECASE,
)
_DENIED = re.compile(rf"(?:not|never)\s+({_ONE})", re.DOTALL | re.IGNORECASE)
# An option's letter; in lower case it may be the word "a".
_OPTION = re.compile(r"\W*[A-J]\b|[A-J]{2,}\b|\W*[a-j](?:\W*$|[).:,]|\s+(?:because|since|as|is)\b)")


def find(text: str, verifier: str = "math") -> tuple[str | None, str]:
    """The final answer as written in a text, and its place.

    Returns:
        (answer, boxed | tag | hashes | phrase | bare), or (None, none | oversized).
    """
    for tag in END_TAGS:
        text = text.rpartition(tag)[2]
    answered = after_thinking(text)
    text = text if answered is None else answered
    # where special tokens were kept: the end of the turn, and GLM's box
    text = _without_turn_end(text)
    text = text.replace("<|begin_of_box|>", "<answer>").replace("<|end_of_box|>", "</answer>")
    for place, answer in _candidates(text, verifier):
        if answer:
            return (answer, place) if len(answer) <= LONGEST else (None, "oversized")
    return None, "none"


def _without_turn_end(text: str) -> str:
    """A text without the special tokens that end it; a hundred are enough for anyone."""
    for _ in range(100):
        text = text.rstrip()
        token = _TURN_END.search(text[-80:])
        if token is None:
            break
        text = text[: -len(token[0])]
    return text


def _candidates(text: str, verifier: str) -> Iterator[tuple[str, str | None]]:
    """What each place holds, the surest first."""
    yield "boxed", last_box(text)
    yield "tag", "".join(_TAG.findall(text)[-1:]).strip()
    yield "hashes", _after_hashes(text, verifier)
    yield "phrase", _in_phrase(text, verifier)
    if verifier == "choice" and re.fullmatch(r"[\s(*]*[A-Ja-j][\s).*]*", text):
        yield "bare", text.strip()


def last_box(text: str) -> str | None:
    r"""Content of the last `\boxed{...}`, or of several that only commas, and/or, spacing or labels
    separate.

    Empty boxes do not count. A box that the text's end leaves open counts where there is no other.
    """
    boxes = _boxes(text)
    # \boxed 8
    if not boxes:
        bare = _BARE_BOX.findall(text)
        return bare[-1] if bare else None
    contents = [boxes[-1][2]]
    # from the last box backwards, as long as nothing but separators comes between two
    for place in range(len(boxes) - 1, 0, -1):
        between = text[boxes[place - 1][1] : boxes[place][0]]
        if len(between) > 100 or not _BETWEEN_BOXES.fullmatch(between):
            break
        contents.insert(0, boxes[place - 1][2])
    return ", ".join(dict.fromkeys(contents))


def _boxes(text: str) -> list[tuple[int, int, str]]:
    """(start, end, content) of the outermost boxes whose braces balance, in one pass over the
    text.
    """
    first = re.search(r"\\(?:boxed|fbox)", text)
    if first is None:
        return []
    boxes: list[tuple[int, int, str]] = []
    open_braces: list[re.Match[str]] = []
    for brace in _BRACES.finditer(text, first.start()):
        if brace[0].endswith("{") and brace[0] != "\\{":
            open_braces.append(brace)
        elif brace[0] == "}" and open_braces:
            begin = open_braces.pop()
            content = text[begin.end() : brace.start()].strip()
            if begin[0] == "{" or not content:
                continue
            # a box takes the place of those inside it
            while boxes and boxes[-1][0] > begin.start():
                boxes.pop()
            boxes.append((begin.start(), brace.end(), content))
    return boxes or _unclosed_box(text, open_braces)


def _unclosed_box(text: str, open_braces: list[re.Match[str]]) -> list[tuple[int, int, str]]:
    """The box within which the text ends."""
    unclosed = [brace for brace in open_braces if brace[0] != "{"]
    if not unclosed:
        return []
    content = text[unclosed[-1].end() :].strip().rstrip("$").strip()
    if not content or "\n" in content:
        return []
    return [(unclosed[-1].start(), len(text), content)]


def gold_of(gold: str) -> str:
    """The gold answer itself, where the data gives a whole solution or a list of one or several
    answers.
    """
    boxed = last_box(gold)
    if boxed:
        return boxed
    if gold.startswith('["'):
        try:
            return ", ".join(map(str, json.loads(gold)))
        except ValueError:
            return gold
    return gold.rsplit("####", 1)[-1].strip()


def _after_hashes(text: str, verifier: str) -> str | None:
    """What follows the last `####` that is no heading of a section."""
    for line in reversed(_HASHES.findall(text)[-1000:]):
        line = line.strip()
        if verifier in ("text", "judge") or not _HEADING.match(line):
            return str(line)
    return None


def _in_phrase(text: str, verifier: str) -> str | None:
    """The value that the last sentence about "the answer" names."""
    text = re.sub(r"\*\*|__", "", text)
    text = re.sub("故选|应选", "答案是", text)
    cues = list(_CUE.finditer(text))[-1000:]
    if verifier == "choice":
        cues += [*_CHOICE_CUE.finditer(text), *_IS_CORRECT.finditer(text)][-1000:]
    denied = set()
    for cue in sorted(cues, key=lambda match: match.start(), reverse=True):
        if cue.re is _IS_CORRECT:
            return cue[1]
        if _SUPPOSED.search(text[max(0, cue.start() - 40) : cue.start()]):
            continue
        answer = _named(cue[1], verifier)
        if answer is not None:
            return None if answer in denied else answer
        copula = _IS.match(cue[1])
        not_this = copula and _DENIED.match(cue[1], copula.end())
        if not_this:
            denied.add(not_this[1].strip().rstrip(".,"))
    return None


def _named(rest: str, verifier: str) -> str | None:
    """The answer at the beginning of what follows the word "answer"; None where it is denied or
    there is none, "" where more follows than can be read.
    """
    copula = _IS.match(rest)
    if copula is None or _NEGATED.search(copula[0]):
        return None
    rest = rest[copula.end() :].lstrip()
    if verifier in ("choice", "text", "judge"):
        answer = _SENTENCE_END.split(rest, maxsplit=1)[0].strip() or None
        plain = re.sub(rf"\\{FONTS}(?![a-zA-Z])", "", answer or "")
        return answer if verifier != "choice" or _OPTION.match(plain) else None
    calculation = _CALCULATION.match(rest)
    while calculation:
        rest = rest[calculation.end() :]
        calculation = _CALCULATION.match(rest)
    values = _VALUES.match(rest)
    if values is None:
        return None
    if _FURTHER.match(rest[values.end() :]):
        return "" if re.search(r"\b(?:is|are|was)\b", copula[0]) else None
    return values[0].strip().rstrip(".,")
