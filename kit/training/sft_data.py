"""Training rows to token ids, their order, and their batches.

Prompt ids come from the function that evaluation uses (`prompts.render`); only the target and the token that ends the
turn are learned. Nothing here knows of a model's weights.
"""

from __future__ import annotations

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
from kit.prompts import render, text_of
from kit.training.loss import IGNORED

CUT = "cut, without their answers"


@dataclass(frozen=True)
class Example:
    """A tokenized training row. `name`: its line in train.jsonl and its question's beginning."""

    name: str
    ids: tuple[int, ...]  # (T,): the prompt, then what is learned
    prompt_tokens: int


def read_rows(path: Path) -> list[TrainRow]:
    """The rows of train.jsonl, without blank lines; KitError: a line that is no alpaca row, by its number."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        try:
            rows += [TrainRow.model_validate_json(line)] if line.strip() else []
        except ValueError as error:
            raise KitError(
                f"{path} line {number} is no {{instruction, input, output}} row: {error}"
            ) from None
    return rows


def prepare(
    rows: Sequence[TrainRow], tokenizer: HfTokenizer, config: Config
) -> tuple[list[Example], dict[str, list[str]]]:
    """Tokenize rows and set aside those that cannot be learned from.

    A cut row keeps its prompt and the beginning of its target, as LLaMA-Factory cuts; it loses its answer and the
    token that ends the turn, which is why `on_too_long: drop` is the default.

    Returns:
        (examples, names of the rows that were dropped, or under CUT shortened, by the reason).

    Raises:
        KitError: rows with another instruction than evaluation will use; no row is left.
    """
    limit, end = config.train.max_seq_tokens, end_of_turn(tokenizer)
    student, instruction = config.student, text_of(config.prompts, "instruction")
    examples: list[Example] = []
    lost: dict[str, list[str]] = {}
    for line, row in enumerate(rows, 1):
        if row.instruction != instruction:
            what = f"train.jsonl line {line} asks {row.instruction!r}, but evaluation will ask {instruction!r}."
            raise KitError(what, "Set prompts.instruction to the rows' own, or run align again.")
        prompt = render(
            tokenizer, f"{row.instruction}\n{row.input}", student.system, thinking=student.thinking
        )
        ids = (*prompt, *tokenizer.encode(row.output, special=False), end)
        name, why = f"line {line} ({' '.join(row.input.split())[:60]})", None
        if not row.output.strip():
            why = "dropped, nothing to learn"
        elif len(ids) > limit:
            cut = config.train.on_too_long == "truncate" and len(prompt) < limit
            why = CUT if cut else "dropped, over train.max_seq_tokens"
        if why:
            lost.setdefault(why, []).append(f"{name}, {len(ids)} tokens")
        if why in (None, CUT):
            examples.append(Example(name, ids[:limit], len(prompt)))
    if not examples:
        why = "; ".join(f"{len(names)} {reason}: {names[0]}" for reason, names in lost.items())
        what = f"None of {len(rows)} training rows can be trained on ({why or 'train.jsonl is empty'})."
        raise KitError(
            what,
            "Raise train.max_seq_tokens for rows too long; rejected.jsonl has those lost before.",
        )
    return examples, lost


def order(lengths: Sequence[int], config: Config) -> list[int]:
    """Which example stands where, for the whole training.

    Epochs, each shuffled by its own seed, follow without a gap: every step but the last has `batch_size` rows. With
    `group_by_length` a step's rows stand longest first: like lengths share a batch, a card too small shows at once.
    """
    settings, count = config.train, len(lengths)
    total = (
        settings.max_steps * settings.batch_size
        if settings.max_steps
        else max(1, round(settings.epochs * count))
    )
    seeds = [
        torch.Generator().manual_seed(config.seed + epoch)
        for epoch in range(math.ceil(total / count))
    ]
    plan = [i for seed in seeds for i in torch.randperm(count, generator=seed).tolist()][:total]
    if settings.group_by_length:
        steps = [
            plan[i : i + settings.batch_size] for i in range(0, len(plan), settings.batch_size)
        ]
        plan = [i for step in steps for i in sorted(step, key=lambda i: -lengths[i])]
    return plan


def collate(examples: Sequence[Example]) -> dict[str, Any]:
    """Right-padded ids and labels (B, T), and the examples. No mask: causal attention never looks right, and a mask
    would cost the fast attention path."""
    ids = [torch.tensor(example.ids) for example in examples]
    labels = [
        torch.tensor((IGNORED,) * e.prompt_tokens + e.ids[e.prompt_tokens :]) for e in examples
    ]
    padded = pad_sequence(labels, batch_first=True, padding_value=IGNORED)
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "labels": padded,
        "examples": list(examples),
    }


def end_of_turn(tokenizer: HfTokenizer) -> int:
    """The token that the chat template writes behind an answer, else EOS; KitError: a student could never stop."""
    ends = turn_ends(tokenizer.inner) or {tokenizer.inner.eos_token_id} - {None}
    if not ends:
        raise KitError(
            "The student's tokenizer has no token that ends a turn.",
            "Choose an instruction-tuned student.",
        )
    return min(ends)
