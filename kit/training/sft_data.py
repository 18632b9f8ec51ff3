"""Training rows to token ids, their order, and their batches (section 3.4 of the paper).

Prompt ids come from the function that evaluation uses (`prompts.render`); only the target and the
token that ends the turn are learned. Nothing here knows of a model's weights.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from kit.core.config import Config
from kit.core.errors import KitError
from kit.core.records import TrainRow
from kit.models import HfTokenizer, turn_ends
from kit.prompts import encode_answer, render, text_of
from kit.training.loss import IGNORED

CUT = "cut, without their answers"


@dataclass(frozen=True)
class Example:
    """A tokenized training row. `name`: its line in train.jsonl and its question's beginning."""

    name: str
    ids: tuple[int, ...]  # (T,): the prompt, then what is learned
    prompt_tokens: int


def read_rows(path: Path) -> list[TrainRow]:
    """The rows of train.jsonl, without blank lines.

    Raises:
        KitError: a line that is no alpaca row, by its number.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        try:
            if line.strip():
                rows.append(TrainRow.model_validate_json(line))
        except ValueError as error:
            raise KitError(
                f"{path} line {number} is not an {{instruction, input, output}} row: {error}"
            ) from None
    return rows


def prepare(
    rows: Sequence[TrainRow], tokenizer: HfTokenizer, config: Config
) -> tuple[list[Example], dict[str, list[str]]]:
    """Tokenize rows and set aside those that cannot be learned from.

    A cut row keeps its prompt and the beginning of its target, as LLaMA-Factory cuts; it loses its
    answer and the token that ends the turn, which is why `on_too_long: drop` is the default.

    Returns:
        (examples, names of the rows that were dropped, or under CUT shortened, by the reason).

    Raises:
        KitError: rows with another instruction than evaluation will use; no row is left.
    """
    limit = config.train.max_seq_tokens
    end = end_of_turn(tokenizer)
    instruction = text_of(config.prompts, "instruction")
    examples: list[Example] = []
    lost: dict[str, list[str]] = {}
    for line, row in enumerate(rows, 1):
        if row.instruction != instruction:
            raise KitError(
                f"train.jsonl line {line} asks {row.instruction!r}, but evaluation will ask "
                f"{instruction!r}.",
                "Set prompts.instruction to the rows' own, or run align again.",
            )
        question = f"{row.instruction}\n{row.input}"
        prompt = render(tokenizer, question, config.student)
        ids = (*prompt, *encode_answer(tokenizer, row.output), end)
        name = f"line {line} ({' '.join(row.input.split())[:60]})"

        # what becomes of the row
        reason = None
        if not row.output.strip():
            reason = "dropped, nothing to learn"
        elif len(ids) > limit:
            reason = "dropped, over train.max_seq_tokens"
            if config.train.on_too_long == "truncate" and len(prompt) < limit:
                reason = CUT
        if reason:
            lost.setdefault(reason, []).append(f"{name}, {len(ids)} tokens")
        if reason in (None, CUT):
            examples.append(Example(name, ids[:limit], len(prompt)))
    if not examples:
        counts = [f"{len(names)} {reason}: {names[0]}" for reason, names in lost.items()]
        raise KitError(
            f"None of {len(rows)} training rows can be trained on "
            f"({'; '.join(counts) or 'train.jsonl is empty'}).",
            "Raise train.max_seq_tokens for rows too long; rejected.jsonl lists rows lost earlier.",
        )
    return examples, lost


def order(lengths: Sequence[int], config: Config) -> list[int]:
    """Which example comes when, for the whole training.

    Epochs, each shuffled by its own seed, follow without a gap: every step but the last has
    `batch_size` rows. With `group_by_length` a step's rows are sorted longest first: like lengths
    share a batch, and a card too small shows at once.
    """
    settings = config.train
    count = len(lengths)
    total = max(1, round(settings.epochs * count))
    if settings.max_steps:
        total = settings.max_steps * settings.batch_size
    # the epochs in a row, up to the last step
    plan: list[int] = []
    for epoch in range(math.ceil(total / count)):
        generator = torch.Generator().manual_seed(config.seed + epoch)
        plan.extend(torch.randperm(count, generator=generator).tolist())
    plan = plan[:total]
    if settings.group_by_length:
        for start in range(0, total, settings.batch_size):
            step = slice(start, start + settings.batch_size)
            plan[step] = sorted(plan[step], key=lambda index: -lengths[index])
    return plan


def collate(examples: Sequence[Example]) -> dict[str, Any]:
    """Right-padded input_ids and labels (B, T), and the examples.

    No mask: causal attention never looks right, and a mask would cost the fast attention path.
    """
    ids = [torch.tensor(example.ids) for example in examples]
    labels = [one.clone() for one in ids]
    for one, example in zip(labels, examples, strict=True):
        one[: example.prompt_tokens] = IGNORED
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        "examples": list(examples),
    }


def end_of_turn(tokenizer: HfTokenizer) -> int:
    """The token that the chat template writes after an answer, else EOS.

    Raises:
        KitError: there is neither, and a student could never stop.
    """
    ends = turn_ends(tokenizer.inner) or {tokenizer.inner.eos_token_id} - {None}
    if not ends:
        raise KitError(
            "The student's tokenizer has no token that ends a turn.",
            "Choose an instruction-tuned student.",
        )
    return min(ends)
