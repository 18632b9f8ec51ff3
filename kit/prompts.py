"""The prompts (solve, judge, continue, compare) and the one function that renders chat to token ids.

The words are in kit/prompts.yaml, replaceable from the config, so that the paper's can stand here. Training,
evaluation and generation all go through `render`, so their prompt ids are equal by construction.
Text from data never becomes a special token: `<|im_end|>` in a trace stays text.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import yaml

from kit.backends.base import Tokenizer
from kit.core.config import Prompts
from kit.core.errors import KitError
from kit.core.records import AlignedRow

BEGIN, END = "<Begin_of_Prefix>", "<End_of_Prefix>"  # plain text, no added tokens


@cache
def words() -> dict[str, str]:
    """Our own texts, by name."""
    return yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))


def text_of(prompts: Prompts, name: str) -> str:
    """The config's text of a prompt, else ours."""
    return getattr(prompts, name) or words()[name]


def fill(template: str, **fields: str) -> str:
    """Put fields in their {places} in one pass: braces in data stay as they are."""
    return re.sub(r"\{(\w+)\}", lambda m: fields.get(m[1], m[0]), template)


def solve_text(prompts: Prompts, question: str) -> str:
    """The user turn of teaching, training and evaluation: instruction, newline, question (as LLaMA-Factory joins)."""
    return f"{text_of(prompts, 'instruction')}\n{question}"


def draft_text(prompts: Prompts, question: str, prefix: str) -> str:
    """The user turn of alignment, the kept prefix inside it."""
    instruction = text_of(prompts, "instruction")
    return fill(
        text_of(prompts, "draft"), instruction=instruction, question=question, prefix=prefix
    )


def target_text(prefix: str, continuation: str) -> str:
    """What the student learns to write."""
    return f"{BEGIN}{prefix}{END}\n{continuation}"


def render(
    tokenizer: Tokenizer,
    user: str,
    system: str | None = None,
    answer: str = "",
    thinking: bool = False,
) -> tuple[int, ...]:
    """Chat to token ids (T,), up to where the assistant goes on writing.

    Special tokens come from the template alone; their names inside `user`, `system` or `answer` are tokenized as text.

    Args:
        tokenizer: the model's; without a chat template the user's text stands alone, with a newline after it.
        system: a system message; folded into the user turn where the template refuses the role.
        answer: the beginning of the assistant's answer, kept to the last space.
        thinking: the template's switch, where it has one.
    """
    taken, marks = f"{user}{system}{answer}", (f"\ue000{n}\ue001" for n in itertools.count())
    names = sorted(
        (name for name in tokenizer.special if name and name in taken), key=len, reverse=True
    )
    hidden = dict(
        zip(names, (mark for mark in marks if mark not in taken), strict=False)
    )  # no template touches them
    shown = {mark: name for name, mark in hidden.items()}
    user, system, answer = (_replace(text, hidden) for text in (user, system or "", answer))
    text, ids = render_text(tokenizer, user, system, thinking) + answer, []
    for piece in re.split(f"({_any(shown)})", text) if shown else [text]:
        ids += tokenizer.encode(shown.get(piece, piece), special=piece not in shown)
    return tuple(ids)


def render_text(
    tokenizer: Tokenizer, user: str, system: str | None = None, thinking: bool = False
) -> str:
    """The rendered chat as text, up to where the assistant begins."""
    if not tokenizer.template:
        return f"{tokenizer.bos}{system or ''}{chr(10) if system else ''}{user}\n"
    import jinja2
    from transformers.utils.chat_template_utils import (
        _compile_jinja_template,
    )  # sandboxed, cached, the reference

    messages = ([{"role": "system", "content": system}] if system else []) + [
        {"role": "user", "content": user}
    ]
    fields = {
        "bos_token": tokenizer.bos,
        "eos_token": tokenizer.eos,
        "enable_thinking": thinking,
        "tools": None,
    }
    today = {
        "strftime_now": lambda _format: "2026-01-01"
    }  # Here: fixed, so that prompts do not change with the day
    try:
        template = _compile_jinja_template(tokenizer.template)
        return template.render(messages=messages, add_generation_prompt=True, **fields, **today)
    except jinja2.TemplateError as error:
        if (
            system
        ):  # Gemma's and Mistral's templates raise on the role: the words go before the question
            return render_text(tokenizer, f"{system}\n\n{user}", None, thinking)
        raise KitError(
            f"The model's chat template fails: {error}", "Use a model whose template works."
        ) from None


def template_hash(
    tokenizer: Tokenizer, prompts: Prompts, system: str | None, thinking: bool
) -> str:
    """Hash of everything that shapes a solving prompt. Evaluation refuses an adapter trained under another."""
    parts = [tokenizer.template, text_of(prompts, "instruction"), system, thinking, BEGIN, END]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _replace(text: str, by: dict[str, str]) -> str:
    """Each key of `by` as its value, in one pass, so that no value is searched again."""
    return re.sub(_any(by), lambda match: by[match[0]], text) if by else text


def _any(texts: Iterable[str]) -> str:
    return "|".join(map(re.escape, texts))


def target(method: str, row: AlignedRow, continuation: str) -> str:
    """What the student learns to write under a method.

    Here: prefix-only and label-only end in the boxed gold answer, and so does a long trace that holds no box of its
    own, so that a difference to P-ALIGN is one of reasoning and not of the answer's format.
    """
    boxed = f"\\boxed{{{row.answer}}}"
    targets = {
        "label-only": boxed,
        "long-trace": row.prefix if "\\boxed{" in row.prefix else f"{row.prefix}\n\n{boxed}",
        "prefix-only": target_text(row.prefix, boxed),
        "continuation-only": continuation,
    }
    return targets.get(method) or target_text(row.prefix, continuation)
