"""plan: will it fit, how long will it take; from a model's shape alone.

A step's memory is added up here from a layer's (shape.py). Assumed: a reserve, and that attention
keeps no (T, T) matrix (SDPA's fused kernels). Hours are in hours.py.
"""

import os
from bisect import bisect_right
from typing import Any, NamedTuple

from kit import Json
from kit.core.config import Config, Train
from kit.core.errors import KitError
from kit.core.memory import limit_bytes, return_at_once
from kit.core.run import Run
from kit.shape import GIB, LIVE_BYTES, NF4_BYTES, RESERVE_BYTES, card_limit, shape_of
from kit.training.hours import (
    THIS_RUN,
    assumptions,
    card_hours,
    in_hours,
    measured_seconds,
    rows_of,
)

CARDS_GIB = (8, 12, 16, 24)
LEAST_LOGITS = 1 << 26  # bytes of a slice; smaller ones reread the head too often


class StepBytes(NamedTuple):
    """Bytes of one training step at its peak, by part."""

    weights: float
    adapter: float
    optimizer: float
    activations: float
    logits: float


def plan(config: Config) -> Json:
    """Estimate memory and time before anything is loaded.

    Returns:
        {model, device, rows, tokens: of a forward pass, train_gib: by part and in total,
        free_gib: less a reserve, fits, change: keys that would make it fit, longest_tokens: {card:
        tokens of the longest row that trains on it}, hours: {card: {backend: {stage: hours,
        total}}}, with a card "this run" at the speed of the run in this folder, assumptions: in
        words}.

    Raises:
        KitError: an unknown model.
    """
    settings = config.train
    cuda, limit = _limit()
    parts = training_bytes(config, settings.max_seq_tokens, cuda)
    total = sum(parts)
    sizes = {**parts._asdict(), "total": total}
    hours = card_hours(config, shape_of(config.student.model))
    measured = measured_seconds(config)
    if measured:
        hours[THIS_RUN] = {config.student.backend: in_hours(measured)}
    return {
        "model": config.student.model,
        "device": "cuda" if cuda else "cpu",
        "rows": settings.micro_batch_size,
        "tokens": settings.max_seq_tokens,
        "train_gib": {name: round(size / GIB, 3) for name, size in sizes.items()},
        "free_gib": round(limit / GIB, 3),
        "fits": total <= limit,
        "change": None if total <= limit else _change(config, settings.max_seq_tokens, cuda, limit),
        "longest_tokens": {f"{size} GB": longest(config, card_limit(size)) for size in CARDS_GIB},
        "hours": hours,
        "assumptions": assumptions(config),
    }


def in_words(result: Json) -> Json:
    """A result of `plan` as it is printed: what is of this machine, and what of named cards."""
    total = result["train_gib"]["total"]
    verdict = "fits" if result["fits"] else f"does not fit; with {result['change']} it does"
    return {
        "student": result["model"],
        "training on this machine": f"{total:.1f} GiB for rows of {result['tokens']} tokens, "
        f"{result['rows']} at a time; {result['free_gib']:.1f} GiB are free "
        f"({result['device']}): {verdict}",
        "GiB by part": result["train_gib"],
        "longest row in tokens that trains on a card of": result["longest_tokens"],
        "hours on cards, estimated (this run: measured)": rows_of(result["hours"]),
        "hours assume": result["assumptions"],
    }


def accumulation_steps(settings: Train) -> int:
    """Forward passes that each process makes for an optimizer step.

    Raises:
        KitError: the rows of a step cannot be shared out evenly.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    steps, left_over = divmod(settings.batch_size, settings.micro_batch_size * processes)
    if left_over:
        raise KitError(
            f"train.batch_size={settings.batch_size} is not a multiple of "
            f"train.micro_batch_size={settings.micro_batch_size} times {processes} processes.",
            "Change one of them.",
            2,
        )
    return steps


def uses_8_bit_optimizer(settings: Train, cuda: bool) -> bool:
    """Whether the optimizer's states are paged and in 8 bits (train.optimizer)."""
    return settings.optimizer == "paged_adamw_8bit" or (settings.optimizer == "auto" and cuda)


def training_bytes(config: Config, tokens: int, cuda: bool) -> StepBytes:
    """Bytes of one training step on rows of `tokens`, by part, at its peak.

    With checkpointing each layer keeps its input alone, and one layer at a time is recomputed for
    its backward pass. A slice of the logits and that one layer are never there together: the larger
    of the two counts.
    """
    settings = config.train
    computes_in_16_bits = settings.dtype != "fp32" and (cuda or settings.dtype == "bf16")
    number_bytes = 2 if computes_in_16_bits else 4
    weight_bytes = {"nf4": NF4_BYTES, "int8": 1.0}.get(settings.dtype, number_bytes)
    shape = shape_of(config.student.model)
    count = tokens * settings.micro_batch_size
    adapter = settings.rank * shape.adapter

    # what lives from the forward to the backward pass; a card's dropout masks are bytes
    states = shape.hidden * number_bytes * count
    mask_bytes = 1 if cuda else number_bytes
    layer = shape.saved_bytes(number_bytes, mask_bytes, settings.rank) * count
    kept = shape.layers * (states if settings.gradient_checkpointing else layer)
    # what one layer's backward pass adds: gradients of its input, gate, SiLU and up
    passing = states + 3 * shape.inner * number_bytes * count
    if settings.gradient_checkpointing:
        passing += layer
    if weight_bytes != number_bytes:
        passing += shape.hidden * shape.inner * number_bytes  # a dequantized matrix

    logits = min(settings.logits_bytes, LIVE_BYTES * shape.vocabulary * count) + 3 * states
    return StepBytes(
        weights=shape.linear * weight_bytes + shape.other * number_bytes,
        adapter=adapter * 8.0,  # fp32 values and gradients
        optimizer=adapter * (2.0 if uses_8_bit_optimizer(settings, cuda) else 8.0),
        activations=kept + max(0.0, passing - logits),
        logits=float(logits),
    )


def longest(config: Config, limit: float, cuda: bool = True) -> int:
    """Most tokens of a row with which a training step stays within `limit` bytes; 0: none."""
    lengths = range(1, shape_of(config.student.model).context_tokens + 1)
    return bisect_right(lengths, limit, key=lambda tokens: _total(config, tokens, cuda))


def check_longest(config: Config) -> None:
    """Refuse (KitError) rows as long as train.max_seq_tokens allows, where they will not fit."""
    context_tokens = shape_of(config.student.model).context_tokens
    _refuse(config, min(config.train.max_seq_tokens, context_tokens))


def check_fit(run: Run, tokens: int) -> None:
    """Refuse rows of `tokens` that will not fit (KitError); warn with train.on_low_memory=warn."""
    cuda, limit = _limit()
    without_checkpoints = _with(run.config, gradient_checkpointing=False)
    # malloc keeps about what checkpointing frees: faster, where there is room
    if not cuda and _total(without_checkpoints, tokens, cuda) > limit:
        return_at_once()
    lack = _refuse(run.config, tokens)
    if lack:
        run.progress.warn(f"{lack} Trying anyway (train.on_low_memory=warn).")


def _refuse(config: Config, tokens: int) -> str:
    """Refuse rows of `tokens` that will not fit (KitError), or return what to say; "": they do."""
    cuda, limit = _limit()
    need = _total(config, tokens, cuda)
    if need <= limit:
        return ""
    lack = (
        f"Training on rows of {tokens} tokens needs about {need / GIB:.1f} GiB; "
        f"{limit / GIB:.1f} GiB are free."
    )
    if config.train.on_low_memory == "refuse":
        change = _change(config, tokens, cuda, limit)
        raise KitError(lack, f"Set {change}; or override with train.on_low_memory=warn.")
    return lack


def _limit() -> tuple[bool, int]:
    cuda, free = limit_bytes()
    return cuda, free - RESERVE_BYTES


def _total(config: Config, tokens: int, cuda: bool) -> float:
    return sum(training_bytes(config, tokens, cuda))


def _with(config: Config, **keys: Any) -> Config:
    """The config with other values of some keys of train."""
    return config.model_copy(update={"train": config.train.model_copy(update=keys)})


def _change(config: Config, tokens: int, cuda: bool, limit: float) -> str:
    """The fewest keys, in the order of what they cost, with which it fits."""
    changes: Json = {}
    for key, value in savers(config.train).items():
        changes[key] = value
        if _total(_with(config, **changes), tokens, cuda) <= limit:
            break
    else:
        changes["max_seq_tokens"] = longest(_with(config, **changes), limit, cuda) // 16 * 16
        if not changes["max_seq_tokens"]:
            return "a smaller student.model"
    return as_keys(changes)


def savers(settings: Train) -> Json:
    """Keys of train with values that take less memory, in the order of what they cost."""
    values = {
        "gradient_checkpointing": True,
        "micro_batch_size": 1,
        "logits_bytes": min(settings.logits_bytes, LEAST_LOGITS),
        "dtype": "nf4",
    }
    return {key: value for key, value in values.items() if getattr(settings, key) != value}


def as_keys(changes: Json) -> str:
    """Keys of train with other values, as a user writes them."""
    return ", ".join(f"train.{key}={str(value).lower()}" for key, value in changes.items())
