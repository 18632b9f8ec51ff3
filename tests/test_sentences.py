"""Splitting: lossless for any string, and cut where a reader would cut."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kit.judging.sentences import ends, split

CASES = {  # a text with | where a sentence ends and another begins
    "plain": "Okay, let me see. |We have 3 apples! |Is that right? |Yes.",
    "decimals": "Pi is 3.14 or 3.1416. |Then 2.5 * 2 = 5.0. |Done.",
    "abbreviations": (
        "Use e.g. sin x, i.e. this, cf. Fig. 3 and eq. (4). |Dr. Li vs. Mr. Ito, etc. are in. |Ok."
    ),
    "etc may end": "We have apples, pears, etc. |Now count them.",
    "no": "See no. 5 and p. 12 for it. |Is it prime? |no. |Then we go on.",
    "initials": (
        "It is by J. R. Smith and George W. Bush. "
        "|Then point A. |So we go to B. |Now U.S. Army. |Ok."
    ),
    "clock": "We meet at 9 a.m. sharp. |We leave at 5 p.m. |Then we rest.",
    "markers": "1. First do this. |2. Then do that.\n|3. Last.",
    "marked lines": (
        "a) One thing\n|b) Two\n|(ii) A third\n|**4.** Bold\n|Step 2. Compute it.\n|- item\n|* item"
    ),
    "a number ends": "The answer is 2. |So we stop at 10. |Good.",
    "quotes": 'He said "stop." |Then "why?" he asked. |(It was late.) |Fine.',
    "ellipsis": "Hmm... maybe not. |Hmm... |Maybe so… |Yes.",
    "sums": "Add x_1 + ... + x_n, so 14... 20 or (a, ..., b) and 1/3 = 0.33... (about). |Good.",
    "factorial": "Now 5! = 120 and n! is large. |What a sum! |Next.",
    "paragraphs": "We get x = 3\n\n|y = 4\n\n|So x + y = 7",
    "colon goes on": "We set up:\n\nx + y = 3,\nand so on.\n\n|Next",
    "wrapped": (
        "This line of prose is long enough to have been wrapped by an editor at\n"
        "the eightieth column. |Next."
    ),
    "inline math": "Let $x = 3. Y$ be so. |Then \\(a. B\\) holds. |Ok.",
    "stop inside math": "We get $r = 3.$  |Also it holds. |So $x$. |Yes.",
    "display": "We have\n|\\[ a = b. \n C = d. \\]\n|and $$x. Y. Z$$ done. |Ok.",
    "environment": (
        "\\begin{align} a. B \\\\[2pt] \\begin{cases} C. D \\end{cases} E. F \\end{align}\n|Then."
    ),
    "money": "It costs $5. |Then she pays $6. |That is $11. |A tip of 2$. |Fine.",
    "lone dollar": "It is $x. \n\n|Then A. |So it is. |Yes $y$. |Ok.",
    "code": (
        "Run this:\n```python\nx = 1. \nprint(x)\n\ny = 2. Z\n```\n|It prints 1. |Ok, `a. B` too."
    ),
    "open fence": "```\nHello. |World. |Bye.",
    "chinese": "我们先看题目。|然后计算3.14的值！|对吗？|“是的。”|好",
    "mixed": "答案是5。|So the answer is 5. |完",
    "ruler": "Done. \n---\n\n|Next part.\n***\n",
    "url": "See https://a.b/c.html?x=1.2 and kit.data.py there. |Ok.",
}


@pytest.mark.parametrize("name", CASES)
def test_cuts_where_a_reader_would(name: str) -> None:
    parts = CASES[name].split("|")
    assert split("".join(parts)) == parts


def test_texts_of_nothing_but_marks_are_one_part() -> None:
    assert split("") == [] and ends("") == []
    for text in (" ", "\n\n", "x", ".", "\ud800", "...", "$", "```", "\\begin{a}", "。", "\r\n"):
        assert split(text) == [text]
    assert ends("One. Two.") == [5, 9]


PIECES = "$$ \\[ \\] \\( \\) \\begin{x} \\end{x} ``` ```py Dr. e.g. 1. So 3.5 \u2028 ~~~".split()
LETTERS = "aBz1 \n\r\t.!?…。！？,:;-*#()[]{}\"'”$`\\|~é\ud800\u2028\x1c"
ALPHABET = st.sampled_from([*LETTERS, *PIECES, "\n\n", "\n```\n", ". "])
UNITS = (
    ". |a. |$|$ |$x |`|``` \n|```\n|\\[ |\\( |\\begin{a}|\n| |\n\n|。"
    '|."|1. |A. |So, |!?|\\|((|~~~\n|$5. |\r|…|.'
).split("|")


def check(text: str) -> None:
    """The promises that hold for any string."""
    parts, offsets = split(text), ends(text)
    assert "".join(parts) == text
    assert (
        offsets == sorted(set(offsets))
        and (not text or offsets[-1] == len(text))
        and len(offsets) == len(parts)
    )
    for before, part in zip(["x", *parts], parts, strict=False):
        assert part.strip() or part == text
        assert not part[:1].isspace() or before == "x"


@settings(max_examples=150, deadline=None)
@given(st.lists(ALPHABET, max_size=60).map("".join) | st.text(st.characters(), max_size=80))
def test_lossless_for_any_string(text: str) -> None:
    check(text)


def seconds(text: str) -> float:
    """This thread's own time for one text, the best of three."""
    times = []
    for _ in range(3):
        begun = time.thread_time()
        check(text)
        times.append(time.thread_time() - begun)
    return min(times)


@pytest.mark.parametrize("unit", [*UNITS, "x" * 50 + "\n"])
def test_the_time_is_linear_in_the_text(unit: str) -> None:
    """Four times the text takes about four times as long; under a quadratic rule sixteen times."""
    short, long = (seconds(unit * (size // len(unit))) for size in (5_000, 20_000))
    assert long < 10 * short + 0.01


def test_real_chains_of_thought_are_cut_losslessly_and_sanely(
    real_traces: list[dict[str, str]],
) -> None:
    """Lossless, and of a sane size (some hundred characters, none huge)."""
    traces = [row["long_cot"] for row in real_traces]
    cut = [split(trace) for trace in traces]
    assert ["".join(parts) for parts in cut] == traces
    lengths = sorted(len(part) for parts in cut for part in parts)
    assert 40 < lengths[len(lengths) // 2] < 120
    assert lengths[-1] < 1500 and all(part.strip() for parts in cut for part in parts)
