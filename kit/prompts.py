"""The prompts (solve, judge, draft, compare) and the one function that renders a chat to token ids.

Our own texts (sections 3.2 and 3.3) are in kit/prompts.yaml, each replaceable from the config.
Training, evaluation and generation go through `render`: their prompt ids are equal by construction.
Text from data never becomes a special token: `<|im_end|>` in a trace stays text. No model runs.
"""

import contextlib
import json
import re
from collections.abc import Callable
from datetime import date
from typing import Any

from kit.backends.base import Ids, Tokenizer
from kit.core.bundled import bundled
from kit.core.config import Config, ModelConfig, Prompts
from kit.core.errors import KitError
from kit.core.methods import method_of
from kit.core.records import AlignedRow
from kit.core.storage import text_digest
from kit.core.thinking import is_left_open
from kit.models import FILE_ERRORS

# The tags around a prefix in training targets: plain text, no added tokens.
BEGIN = "<Begin_of_Prefix>"
END = "<End_of_Prefix>"
PLAIN = ModelConfig()  # has neither a system message nor thinking
MARK = "\ue000"  # of Unicode's private use area; see `render`
# Where texts are cut for `PrefixEncoder`: at a single space between words, every so many
# characters. Two texts must be equal for some characters past a cut to be cut there alike.
SPLIT = re.compile(r"(?<=\S) (?=\S)")
SPLIT_CHARACTERS = 200
PAST_SPLIT_CHARACTERS = 16


def text_of(prompts: Prompts, name: str) -> str:
    """The config's text of a prompt, else ours."""
    return getattr(prompts, name) or bundled("prompts")[name]


def fill(template: str, **fields: str) -> str:
    """Put fields in their {places} in one pass: braces in data stay as they are."""
    return re.sub(r"\{(\w+)\}", lambda m: fields.get(m[1], m[0]), template)


def solve_text(prompts: Prompts, question: str) -> str:
    """The user turn of teaching, training and evaluation, joined as LLaMA-Factory does."""
    return f"{text_of(prompts, 'instruction')}\n{question}"


def draft_text(prompts: Prompts, question: str, prefix: str) -> str:
    """The user turn of alignment, the kept prefix inside it."""
    instruction = text_of(prompts, "instruction")
    template = text_of(prompts, "draft")
    return fill(template, instruction=instruction, question=question, prefix=prefix)


def draft_turns(config: Config, question: str, prefix: str) -> tuple[str, str]:
    """The user's turn for a prefix, and how the answer begins (align.mode)."""
    if config.align.mode == "prefill":
        return solve_text(config.prompts, question), prefix
    return draft_text(config.prompts, question, prefix), ""


def judge_text(prompts: Prompts, question: str, prefix: str) -> str:
    """The user turn that asks whether a prefix is sufficient."""
    return fill(text_of(prompts, "judge"), question=question, prefix=prefix)


class PrefixEncoder:
    """Encodes texts that begin alike, like the prompts of one trace: of each only what is new.

    The longest text so far is encoded whole, and once more in stretches. If both give the same ids,
    a later text takes them over up to the last split before it differs. That is exact for BPE, with
    or without a pre-tokenizer: ids are the encoding of their text if every two neighbours are, and
    the two at the split are neighbours in the longest text too (checked). Where stretches give
    other ids (a tokenizer that puts a space before every text), every text is encoded whole.

    Args:
        encode: ids of a whole text.
    """

    def __init__(self, encode: Callable[[str], list[int]]) -> None:
        self.encode_whole = encode
        self.is_exact = True  # until stretches of a text give other ids
        self.longest = ""
        self.ids: list[int] = []
        self.splits: list[tuple[int, int]] = []  # (characters, ids) before each split of `longest`

    def encode(self, text: str) -> list[int]:
        """The ids of a text, equal to `encode_whole`'s."""
        for characters, tokens in reversed(self.splits):
            if text.startswith(self.longest[: characters + PAST_SPLIT_CHARACTERS]):
                rest = self.encode_whole(text[characters:])
                if rest[0] == self.ids[tokens]:
                    return self.ids[:tokens] + rest
        ids = self.encode_whole(text)
        if self.is_exact and len(text) > len(self.longest):
            self._remember(text, ids)
        return ids

    def _remember(self, text: str, ids: list[int]) -> None:
        """Cut a text into stretches, and keep it if they give its ids."""
        splits = []
        joined: list[int] = []
        begin = 0
        for match in SPLIT.finditer(text):
            if match.start() - begin >= SPLIT_CHARACTERS:
                joined += self.encode_whole(text[begin : match.start()])
                begin = match.start()
                splits.append((begin, len(joined)))
        joined += self.encode_whole(text[begin:])
        self.is_exact = joined == ids
        if self.is_exact:
            self.longest = text
            self.ids = ids
            self.splits = splits


def render(
    tokenizer: Tokenizer,
    user: str,
    engine: ModelConfig = PLAIN,
    answer: str = "",
    encode: Callable[[str], list[int]] | None = None,
) -> Ids:
    r"""Render a chat to token ids (T,), up to where the assistant goes on writing.

    Special tokens come from the template alone. While it is rendered, a numbered mark stands for
    each special token's name in the texts (here [1], really a private character around the number):

        user        What does <|im_end|> mean?
        marked      What does [1] mean?
        rendered    <|im_start|>user\nWhat does [1] mean?<|im_end|>\n<|im_start|>assistant\n
        split       <|im_start|>user\nWhat does   |  1  |   mean?<|im_end|>\n<|im_start|>assistant\n
        tokenized   with special tokens  |  the name, as plain text  |  with special tokens

    Args:
        tokenizer: the model's; without a chat template the user's text is alone, with a newline
            after it.
        user: the user's turn.
        engine: has the system message, which is folded into the user's turn where the template
            refuses the role, and the template's switch for thinking, where it has one.
        answer: the beginning of the assistant's answer, kept to the last space.
        encode: encodes what is not a name, if not the tokenizer: see `PrefixEncoder`.
    """
    encode = encode or tokenizer.encode
    # A mark that occurs in the data is a name as well, so that it comes back as data.
    # Longest first: a name may begin another one.
    names = sorted(filter(None, (*tokenizer.special, MARK)), key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, names)))

    def marked(text: str) -> str:
        return pattern.sub(lambda match: f"{MARK}{names.index(match[0])}{MARK}", text)

    system = marked(engine.system or "")
    text = render_text(tokenizer, marked(user), system, engine.thinking) + marked(answer)
    ids: list[int] = []
    # Every second piece is between two marks: it is the number of a name.
    for position, piece in enumerate(text.split(MARK)):
        if position % 2:
            ids += encode_after(tokenizer, names[int(piece)])
        else:
            ids += encode(piece)
    return tuple(ids)


def encode_after(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text that goes on after other text; special tokens' names stay text.

    Tokenizers of the Llama 2 kind put a space before whatever they encode, and nobody would write
    it there: so the text is encoded after a newline, which is then taken off.
    """
    newline = tokenizer.encode("\n", special=False)
    ids = tokenizer.encode(f"\n{text}", special=False)
    if ids[: len(newline)] == newline:
        return ids[len(newline) :]
    # a tokenizer that joins newlines adds no space
    return tokenizer.encode(text, special=False)


def encode_answer(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text that begins the assistant's turn.

    After a template's newline it goes on as text; after its [/INST] it is a word of its own.
    """
    if render_text(tokenizer, "?")[-1:].isspace():
        return encode_after(tokenizer, text)
    return tokenizer.encode(text, special=False)


def render_text(
    tokenizer: Tokenizer, user: str, system: str | None = None, thinking: bool = False
) -> str:
    """Render a chat as text, up to where the assistant begins; arguments as in `render`.

    Raises:
        KitError: the template fails, or leaves out the question or the system message.
    """
    if not tokenizer.template:
        before = f"{system}\n" if system else ""
        return f"{tokenizer.bos}{before}{user}\n"
    # the reference's own: sandboxed and cached
    from transformers.utils.chat_template_utils import _compile_jinja_template

    def rendered(content: Any, thinking: bool) -> str:
        """One user turn, and the opening of the answer."""
        messages = [{"role": "user", "content": content}]
        if system:
            messages.insert(0, {"role": "system", "content": system})
        return _compile_jinja_template(tokenizer.template).render(
            messages=messages,
            add_generation_prompt=True,
            bos_token=tokenizer.bos,
            eos_token=tokenizer.eos,
            # the switch has one name or the other
            enable_thinking=thinking,
            thinking=thinking,
            tools=None,
            # Here: a fixed day, so that prompts do not change with it
            strftime_now=date(2026, 1, 1).strftime,
        )

    try:
        text = rendered(user, thinking)
        if user.strip() not in text:
            # of models that see images: a turn is a list of parts
            text = rendered([{"type": "text", "text": user}], thinking)
    except FILE_ERRORS as error:
        # Gemma's and Mistral's templates raise on the role: its words go before the question
        if system:
            return render_text(tokenizer, f"{system}\n\n{user}", None, thinking)
        message = f"The model's chat template fails: {error}"
        hint = "Use a model whose template works."
        with contextlib.suppress(*FILE_ERRORS):
            rendered(user, not thinking)
            hint = f"Set thinking={str(not thinking).lower()}, for which it works."
        raise KitError(message, hint) from None
    if user.strip() not in text:
        message = "The model's chat template leaves out the question, or alters it."
        raise KitError(message, "Use a model whose template works.")
    # some templates take these words out, and think or not
    words = re.sub(r"/(?:no_)?think\b", "", system or "").strip()
    if words not in text and (system or "").strip() not in text:
        raise KitError(
            "The model's chat template leaves out the system message, or alters it.",
            "Put its words into prompts.instruction, and remove the key system.",
        )
    return text


def template_notes(tokenizer: Tokenizer, engine: ModelConfig) -> list[str]:
    """What a user should know of a model's chat template before a run relies on it."""
    if not tokenizer.template:
        return [f"{engine.model} has no chat template: it gets the plain text, as a base model."]
    notes = []
    # a template that fails is an error elsewhere
    with contextlib.suppress(KitError):
        prompt = render_text(tokenizer, "?", engine.system, engine.thinking)
        if engine.thinking and prompt == render_text(tokenizer, "?", engine.system):
            notes.append(f"thinking=true changes nothing in the prompts of {engine.model}.")
        if not engine.thinking and is_left_open(prompt):
            notes.append(
                f"{engine.model} thinks though thinking=false, since its chat template begins it: "
                "verdicts and answers come after that only where they are generated."
            )
        if "<|message|>" in tokenizer.special and not prompt.endswith("<|message|>"):
            notes.append(
                f"{engine.model} begins an answer with a header that the kit does not write: "
                "labels, prefixes and training targets stand before it."
            )
    return notes


def template_hash(tokenizer: Tokenizer, prompts: Prompts, engine: ModelConfig) -> str:
    """Hash of all that shapes a solving prompt; an adapter is evaluated only under its own."""
    instruction = text_of(prompts, "instruction")
    parts = [tokenizer.template, instruction, engine.system, engine.thinking, BEGIN, END]
    return text_digest(json.dumps(parts), 16)


def target(method: str, row: AlignedRow, continuation: str) -> str:
    """What the student learns to write under a method, see kit/core/methods.py."""
    boxed = f"\\boxed{{{row.answer}}}"
    trace = row.prefix if "\\boxed{" in row.prefix else f"{row.prefix}\n\n{boxed}"
    concluded = row.prefix if boxed in row.prefix else f"{row.prefix.rstrip()}\n\n{boxed}"
    tagged = f"{BEGIN}{row.prefix}{END}"
    return fill(
        method_of(method).target,
        tagged=tagged,
        trace=trace,
        concluded=concluded,
        boxed=boxed,
        continuation=continuation,
    )
