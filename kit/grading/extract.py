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
    r"(?:\b(?:answers?|ans(?!\s*=))\b|答案|选项?(?=\s*[A-J]\b))"
    r"(?=([^\n]{0,200}(?:\n[^\n]{0,200}){0,5}))",
    re.IGNORECASE,
)
_CHOICE_CUE = re.compile(r"\b(?:choice|option)\b(?=([^\n]{0,200}))", re.IGNORECASE)
_IS_CORRECT = re.compile(r"(?:^|[\s(])([A-J])\)?\s+is\s+(?:the\s+)?(?:correct|right)\b")
_IS_ANSWER = re.compile(r"(?:^|[\s(])([A-J])\)?\s+is\s+the\s+(?:best\s+)?answer\b")
_ALTHOUGH = re.compile(r"\b(?:although|though|even\s+if)\b", re.IGNORECASE)
# Between "the answer" and a value: it is another number, or only a possible one.
_NEGATED = re.compile(
    r"\b(?:not|never|neither|either|least|most|less|more|than|between|greater|fewer|wrong|"
    r"incorrect|"
    r"cannot|could|might|(?<!for )(?<!in )may|mod(?:ulo)?(?!\s+1000\b)|minus|plus|divided|times|"
    r"(?<!feet )(?<!meters )(?:squared|cubed))\b|n['’]t\b",
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
    r"[-+\u2212]?\s?(?:\\?\$|[\u20ac\u00a3])?\s?(?:\d+ \d+/\d+|\d+(?:,\d+)*(?:\.\d+)?|\.\d+)"
    r"(?:[eE][-+]?\d+|\s*(?:\\times|×|\\cdot)\s*10\s*\^\s*(?:\{[-+]?\d+\}|\d))?(?:\s*/\s*\d+)?\s?%?"
    r"(?:\s*(?:hundred|thousand|million|billion|trillion|percent|[ap]\.?m)\b)?"
)
_ONE = (
    r"(?:\$\$.{1,300}?\$\$|\\\[.{1,300}?\\\]|\$(?:\\.|[^$\\\n]){1,200}\$(?!\d)|\\\(.{1,200}?\\\)|"
    r"\([^()\n=]{1,80},[^()\n=]{1,80}\)|"
    rf"(?:[a-zA-Z]\s*=\s*)?(?:{_NUMBER}|-?(?:\\[a-zA-Z]+(?:\[\d\])?(?:\{{[^{{}}\n]*\}})*|π))"
    r"(?![\w^\\*/+=×{<>(-]|\s*[-+*/=^×<>]\s*[\w\\(]|\s+to\s+\d|[,.]\d))"
)
_VALUES = re.compile(
    rf"{_ONE}(?:\s*(?:,\s*(?:and|or)\b|,|;|\band\b|\bor\b)\s*{_ONE})*", re.DOTALL | re.IGNORECASE
)
# A calculation before its result: the answer is 9 * 6 = 54.
_CALCULATION = re.compile(
    r"(?>(?:[-+*/×÷().,$€£\d\s\u2212]|\\(?:times|cdot|div)\b)*\d[\s)$]*=\s*)*+"
)
# Units that others follow: 3 hours 30 minutes.
_PART = (
    r"(?:hours?|hrs?|h|minutes?|mins?|feet|foot|ft|yards?|yd|pounds?|lbs?|days?|weeks?|months?|"
    r"years?|"
    r"dollars?|gallons?|quarts?|k?m|[cm]m|kg|degrees?)"
)
_SENTENCE_END = re.compile(r"[.?!。](?=[\s.?!*]|$)|\n")
# What makes another value of the one before.
_FURTHER = re.compile(
    # 5 to 6, 5 plus x, 5 and a half, 5 apples and 6 pears, 5 times the radius
    r"\s*,?\s*or\b(?!\s*(?:equivalently|option|in\s+(?:decimal|other|fraction|percent)))|"
    r"\s*(?:to|plus|minus|over|mod|squared|cubed|factorial|pi|dozen|half|less|more|fewer|"
    r"divided|multiplied|raised|remainder)\b|\s*times\s+(?:the\b|\w\b|[\d$\\(])|\s*r\s*\d|"
    r"[^.;\n]{0,40}\b(?:and|or)\s+(?:a\b|[-\d$\\])|"
    rf"\s*(?:{_PART}\s+)?and\s+(?:one|two|three|half)\b|"
    r"\s*,?\s*(?:if|when|for)\b[^.\n]{0,120}\botherwise\b|\s*of\s+[\d$]|\s*(?:in\s+)?(?:base|"
    r"modulo)\s+(?:\d|two\b|eight\b|ten\b)|"
    # 5 √2, 5 ÷ 2, 5 ≤ x, 5 → 6, 3–4, 5 + $6$, 5 / A, 5:30, 5..6, 5'6", 5~6, 5 |x|
    r"[ \t]*(?:[+^±²³¹¼-¾·×÷⁰-₟⅐-↏∀-∍∏-∳∶-⋿…]|[ \t]*[←-⇿][ \t]*[\d\\$]|\.\.[\d.]|'\d|"
    r"[-\u2013~][ \t]*[\d\\($]|<[ \t=\d]|[|]\w{1,2}[|])|"
    r"\s*/\s*(?:[A-J]\b|[\d\\$(])|:\d|"
    # 5 6, 5 $x$, 5 \leq x, 5 (x+1), 2 x, 2 θ; but 5 10-dollar bills, 5 \text{cm}, 5 m, 5 a day
    r"[ \t]+\$?\d+(?![\w-])|[ \t]*\$(?=\d|\\(?!text|mathrm)|\(|[a-zA-Z](?![a-zA-Z]))|"
    r"[ \t]*\\(?!(?:text(?:rm|bf|it)?|math(?:rm|bf)|mbox|rm|q?quad|checkmark|blacksquare|square|"
    r"newline|hfill|degree)(?![a-zA-Z])|\\(?:\s|$)|"
    r"\([a-z]{2}|\(\s*\\(?:text|mathrm|blacksquare|square)|[,;:! )\]$%])|"
    r"[ \t]*(?-i:\(\s*-?[a-z]\s*(?:[-+*/^][^()=\n]{0,40})?\)(?<!\([a-j]\)))|"
    r"[ \t]+(?-i:[α-ωi-knp-rw-z]|[a-zA-Z](?=\s+[-+*]|\^))(?![\w']|\.\w)|"
    # 5 choose 2, 2 thirds
    r"[ \t]+(?:(?:sqrt|sin|cos|tan|log|ln|choose|lakh|crore|halves|"
    r"(?:third|fifth|sixth|seventh|eighth|ninth|tenth|hundredth|thousandth)s)\b(?!-)|"
    # 3 hours 30 minutes, 5 ft. 6 in., 5 cm × 6 cm, 5 by 6
    rf"{_PART}(?:[ \t]+|(?:(?<=ft|hr|in|lb|yd)|(?<=min|hrs|lbs))\.[ \t]+|"
    rf",[ \t]+)\d[\d.]*(?![\d.]|[ \t]*[-+*/=×]|,?[ \t]+(?:\w+[ \t]+)?(?:more|less|fewer)\b)|"
    rf"(?:{_PART}\s+)?(?:[×x]|by)\s+\d)",
    re.IGNORECASE,
)
# After a value: what is said of it.
_REFUSED = re.compile(
    r"\s*(?:is|was|would\s+be)\s+(?:wrong|incorrect|not\s+(?:the\s+)?(?:correct|right|answer|"
    r"it))\b",
    re.IGNORECASE,
)
# Before "the answer": it is only supposed.
_SUPPOSED = re.compile(
    r"\b(?:if|suppose|supposing|assume|assuming|were|whether|unless|imagine)\s+"
    r"(?:that\s+)?(?:the\s+|my\s+)?(?:\w+\s+)?$",
    re.IGNORECASE,
)
# Before "the answer": what is named is another number, or another's.
_OF_ANOTHER = re.compile(
    r"(?<!value )(?<!form )(?<!part )(?<!letter )(?<!format )(?<!version )(?<!magnitude )\b(?:of|"
    r"half|twice)\s+(?:the|our|my)\s+(?:final\s+)?$|"
    r"\b(?:wrong|incorrect)\s+(?:final\s+)?$",
    re.IGNORECASE,
)
# After a box: it is taken back.
_CORRECTED = re.compile(
    r"\bwait\b(?=\s*[,!.…—-])|\bI\s+made\s+an?\s+(?:mistake|error)|\b(?:that|this|it|"
    r"which)\s+is\s+(?:wrong|incorrect)|"
    r"^\W*is\s+(?:wrong|incorrect)|\bcorrection\b",
    re.IGNORECASE,
)
# An option's letter that another takes the place of: A. Actually B  A, then B
TAKEN_BACK = re.compile(
    r"\W*([a-zA-Z])(?:\W+(?i:actually|wait|sorry|correction)|\s*,\s*then)\W+"
    r"(?:(?i:it|is|s|no|the|option|choice|answer|correct|should|be|I|mean|meant|think|must|"
    r"maybe)\W+){0,5}"
    r"(?!\1\b)[B-HJ]\b(?!\s*=|\s+(?:and|(?:is|was)\s+(?:not|wrong|incorrect|excluded|"
    r"impossible))\b)"
)
_DENIED = re.compile(rf"(?:not|never)\s+({_ONE})", re.DOTALL | re.IGNORECASE)
# A whole text that is an option: B  (b)  B) 12
_BARE_OPTION = re.compile(
    r"[\s(*]*(?:[A-Ja-j][\s).*]*|[A-J][).][ \t]{1,9}(?!.*\b(?:[B-HJ]|wrong|"
    r"incorrect)\b)(?=\S)[^\n]{1,100}(?<![.:;,]))"
)
# An option's letter; in lower case it may be the word "a".
_OPTION = re.compile(r"\W*[A-J]\b|[A-J]{2,}\b|\W*[a-j](?:\W*$|[).:,]|\s+(?:because|since|as|is)\b)")


def find(text: str, verifier: str = "math") -> tuple[str | None, str]:
    """The final answer as written in a text, and its place.

    Returns:
        (answer, boxed | tag | hashes | phrase | bare), or (None, none).
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
            return answer, place
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
    boxes = _boxes(text)
    after = text[boxes[-1][1] :] if boxes else ""
    corrected = _CORRECTED.search(after)
    if corrected:
        after = after[corrected.end() :]
        if re.search(
            r"\b(?:answer|choice|option)\s+(?:is|should\s+be|must\s+be)\b(?![^.\n]*\?)", after
        ):
            yield "phrase", _in_phrase(after, verifier)
    yield "boxed", last_box(text)
    yield "tag", "".join(_TAG.findall(text)[-1:]).strip()
    yield "hashes", _after_hashes(text, verifier)
    yield "phrase", _in_phrase(text, verifier)
    if verifier == "choice" and _BARE_OPTION.fullmatch(text):
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
    contents: list[str] = []
    last_end = 0
    for start, end, content in boxes:
        # whatever is more than a separator begins a new answer
        between = text[last_end:start]
        if len(between) > 100 or not _BETWEEN_BOXES.fullmatch(between):
            contents = []
        contents.append(content)
        last_end = end
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
    text = re.sub(r"\*\*|__|`", "", text)
    text = re.sub("故选|应选", "答案是", text)
    cues = list(_CUE.finditer(text))[-1000:]
    if verifier == "choice":
        cues += [*_CHOICE_CUE.finditer(text), *_IS_CORRECT.finditer(text)][-1000:]
    denied = set()
    for cue in sorted(cues, key=re.Match.start, reverse=True):
        before = text[max(0, cue.start() - 200) : cue.start()]
        if _SUPPOSED.search(before) or (cue[0] == "answer" and _OF_ANOTHER.search(before)):
            continue
        if cue.re is _IS_CORRECT:
            if _is_aside(before):
                continue
            return cue[1]
        answer = _named(cue[1], verifier)
        if answer is not None:
            return None if answer in denied else answer
        copula = _IS.match(cue[1])
        not_this = copula and _DENIED.match(cue[1], copula.end())
        if not_this:
            denied.add(not_this[1].strip().rstrip(".,"))
    return _called_the_answer(text) if verifier == "choice" else None


def _is_aside(before: str) -> bool:
    """Whether "B is correct" is said beside an answer: the answer is C, although B is correct."""
    sentence = _SENTENCE_END.split(before)[-1]
    answers = [_named(cue[1], "choice") for cue in _CUE.finditer(sentence)]
    return any(answers) and _ALTHOUGH.search(sentence) is not None


def _called_the_answer(text: str) -> str | None:
    """The letter of the last "B is the answer" that is not only supposed."""
    letter = None
    for match in _IS_ANSWER.finditer(text):
        if not _SUPPOSED.search(text[: match.start() + 1][-200:]):
            letter = match[1]
    return letter


def _named(rest: str, verifier: str) -> str | None:
    """The answer at the beginning of what follows the word "answer"; None where it is denied or
    there is none, "" where more follows than can be read.
    """
    copula = _IS.match(rest)
    if copula is None or _NEGATED.search(copula[0]):
        return None
    rest = rest[copula.end() :].lstrip()
    if verifier in ("choice", "text", "judge"):
        if verifier == "choice" and TAKEN_BACK.match(rest):
            return ""
        answer = _SENTENCE_END.split(rest, maxsplit=1)[0].strip() or None
        plain = re.sub(rf"\\{FONTS}(?![a-zA-Z])", "", answer or "")
        return answer if verifier != "choice" or _OPTION.match(plain) else None
    rest = _CALCULATION.sub("", rest, count=1)
    values = _VALUES.match(rest)
    if values is None:
        return None
    if _REFUSED.match(rest, values.end()):
        return None
    base = re.match(r"\s*(?:in\s+)?base\s+\$?(\d+|two|eight|ten)\b", rest[values.end() :])
    if base:
        value = values[0].strip(" $.,")
        return value if "_" in value else f"{value}_{{{base[1]}}}"
    if _FURTHER.match(rest[values.end() :]):
        return "" if re.search(r"\b(?:is|are|was)\b", copula[0]) else None
    return values[0].strip().rstrip(".,")
