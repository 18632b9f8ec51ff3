r"""The marks around a model's thinking: where it ends, and whether a text is still inside it.

Models write them in many ways: `<think>`, `[THINK]`, `<seed:think>`, `◁think▷`, channels. What
comes after the last end mark is the answer. Nothing here knows a model or a template.
"""

import re

_BEGIN = (
    r"<(?:\w+:)?think(?:ing|:\w+)?>|\[think\]|◁think▷|<\|channel\|>analysis<\|message\|>|"
    r"<\|channel>thought|<\|begin_of_thought\|>|<(?:reasoning|thought)>|<\|start_thinking\|>|"
    r"<\|inner_prefix\|>"
)
# harmony, its special tokens left out: analysis...assistantfinal...
_END = (
    r"</(?:\w+:)?think(?:ing|:\w+)?>|\[/think\]|◁/think▷|<\|channel\|>final<\|message\|>|"
    r"<channel\|>|<\|end_of_thought\|>|</(?:reasoning|thought)>|<\|end_thinking\|>|"
    r"<\|inner_suffix\|>|\[begin final response\]|(?<=[^\w\s])\s*assistantfinal"
)
_OPENING = re.compile(rf"\s*(?:{_BEGIN})\s*", re.IGNORECASE)
_OPEN_AT_END = re.compile(rf"(?:{_BEGIN})\s*\Z", re.IGNORECASE)
_CLOSING = re.compile(rf".*(?:{_END})", re.IGNORECASE | re.DOTALL)


def after_thinking(text: str) -> str | None:
    """What follows the last end mark (thinking may speak of one); None where there is none."""
    # most texts have none, and are not searched from every place
    closing = _CLOSING.match(text)
    return text[closing.end() :] if closing else None


def without_opening(text: str) -> str:
    """A text without the mark that its thinking begins with."""
    opening = _OPENING.match(text)
    return text[opening.end() :] if opening else text


def is_left_open(text: str) -> bool:
    """Whether a text ends in the mark that begins thinking."""
    return bool(_OPEN_AT_END.search(text))
