"""Training rows to token ids, their order, and their batches.

Prompt ids come from the function that evaluation uses (`prompts.render`); only the target and the token that ends the
turn are learned. Nothing here knows of a model's weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kit.config import Config
from kit.errors import KitError
from kit.loss import IGNORED
from kit.models import HfTokenizer, turn_ends
from kit.prompts import render, text_of
from kit.records import TrainRow


@dataclass(frozen=True)
class Example:
    """A tokenized training row. `ids` (T,): the prompt, then what is learned."""

    line: int  # in train.jsonl, from 1
    head: str  # of the question, to name the row
    ids: tuple[int, ...]
    prompt_tokens: int

    @property
    def name(self) -> str:
        return f"line {self.line} ({self.head})"


def read_rows(path: Path) -> list[TrainRow]:
    """The rows of train.jsonl, without blank lines; KitError: a line that is no alpaca row, by its number."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows += [TrainRow.model_validate_json(line)] if line.strip() else []
        except ValueError as error:
            raise KitError(f"{path} line {number} is no {{instruction, input, output}} row: {error}") from None
    return rows


def prepare(
    rows: Sequence[TrainRow], tokenizer: HfTokenizer, config: Config
) -> tuple[list[Example], dict[str, list[str]], list[str]]:
    """Tokenize rows and set aside those that cannot be learned from.

    A cut row keeps its prompt and the beginning of its target, as LLaMA-Factory cuts; it loses its answer and the
    token that ends the turn, which is why `over_cutoff: drop` is the default.

    Returns:
        (examples, names of dropped rows by reason, names of cut rows).

    Raises:
        KitError: rows with another instruction than evaluation will use; no row is left.
    """
    limit, end = config.train.cutoff_tokens, end_of_turn(tokenizer)
    student, instruction = config.student, text_of(config.prompts, "instruction")
    examples: list[Example] = []
    dropped: dict[str, list[str]] = {}
    cut: list[str] = []
    for line, row in enumerate(rows, 1):
        if row.instruction != instruction:
            raise KitError(
                f"train.jsonl line {line} asks {row.instruction!r}, but evaluation will ask {instruction!r}.",
                "Set prompts.instruction to the rows' own, or run align again.",
            )
        prompt = render(tokenizer, f"{row.instruction}\n{row.input}", student.system, thinking=student.thinking)
        ids = (*prompt, *tokenizer.encode(row.output, special=False), end)
        example = Example(line, " ".join(row.input.split())[:60], ids, len(prompt))
        if not row.output.strip():
            dropped.setdefault("dropped, nothing to learn", []).append(example.name)
        elif len(ids) <= limit:
            examples.append(example)
        elif config.train.over_cutoff == "cut" and len(prompt) < limit:
            cut.append(example.name)
            examples.append(Example(line, example.head, ids[:limit], len(prompt)))
        else:
            dropped.setdefault("dropped, over train.cutoff_tokens", []).append(f"{example.name}, {len(ids)} tokens")
    if not examples:
        why = "; ".join(f"{len(names)} {reason}: {names[0]}" for reason, names in dropped.items())
        raise KitError(
            f"None of {len(rows)} training rows can be trained on" + (f" ({why})." if why else "."),
            "See rejected.jsonl for rows that did not get here; raise train.cutoff_tokens for rows too long.",
        )
    return examples, dropped, cut


def order(lengths: Sequence[int], config: Config) -> list[int]:
    """Which example stands where, for the whole training.

    Epochs are shuffled each by its own seed and follow one another without a gap: every step but the last has
    `batch_rows` rows. With `group_by_length` a step's rows are sorted, longest first: rows of like length are padded
    together, and a card that is too small shows at once.
    """
    settings, count = config.train, len(lengths)
    total = settings.max_steps * settings.batch_rows if settings.max_steps else max(1, round(settings.epochs * count))
    seeds = [torch.Generator().manual_seed(config.seed + epoch) for epoch in range(math.ceil(total / count))]
    plan = [i for seed in seeds for i in torch.randperm(count, generator=seed).tolist()][:total]
    if settings.group_by_length:
        steps = [plan[i : i + settings.batch_rows] for i in range(0, len(plan), settings.batch_rows)]
        plan = [i for step in steps for i in sorted(step, key=lambda i: -lengths[i])]
    return plan


def collate(examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """Right-padded ids and labels (B, T), without a mask: causal attention never looks right, and a mask would cost
    the fast attention path. `lines` (B,) names the rows."""
    longest = max(len(e.ids) for e in examples)
    ids = torch.zeros(len(examples), longest, dtype=torch.long)
    labels = torch.full_like(ids, IGNORED)
    for i, example in enumerate(examples):
        ids[i, : len(example.ids)] = torch.tensor(example.ids)
        labels[i, example.prompt_tokens : len(example.ids)] = ids[i, example.prompt_tokens : len(example.ids)]
    return {"input_ids": ids, "labels": labels, "lines": torch.tensor([e.line for e in examples])}


def end_of_turn(tokenizer: HfTokenizer) -> int:
    """The token that the chat template writes behind an answer, else EOS; KitError: a student could never stop."""
    ends = turn_ends(tokenizer.inner) or {tokenizer.inner.eos_token_id} - {None}
    if not ends:
        raise KitError("The student's tokenizer has no token that ends a turn.", "Choose an instruction-tuned student.")
    return min(ends)
