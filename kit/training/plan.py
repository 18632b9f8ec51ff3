"""plan: will it fit, how long will it take; from a model's config alone.

Parameters are counted, and a layer's activations traced, on a model without storage (torch's meta
device). Assumed, not computed: RESERVE_BYTES, and that attention keeps no (T, T) matrix (SDPA's
fused kernels).
"""

from __future__ import annotations

import json
from bisect import bisect_right
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from kit.core.config import Config, Train
from kit.core.errors import KitError
from kit.core.memory import limit_bytes, return_at_once
from kit.core.run import Run
from kit.models import hf_folder
from kit.training.loss import LIVE_BYTES
from kit.training.trainer import lora_config, uses_8_bit_optimizer

GIB = 1 << 30
CARDS_GIB = (8, 12, 16, 24)
# CUDA's context and the allocator's rounding; on a CPU the libraries and their threads
RESERVE_BYTES = int(0.6 * GIB)
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # a weight, with the scales of double quantization


class ModelShape(NamedTuple):
    """What a model's config says about its size; counts of numbers unless the name says bytes."""

    layers: int
    hidden: int
    vocabulary: int
    context_tokens: int
    linear: int  # weights of the linear layers, which are quantized
    other: int  # all other weights
    adapter: int
    largest: int  # weights of the largest linear layer
    widest: int  # its longer side, over all linear layers
    saved_bytes: int  # that a layer keeps for its backward pass, per token


class StepBytes(NamedTuple):
    """Bytes of one training step at its peak, by part."""

    weights: float
    adapter: float
    optimizer: float
    activations: float
    logits: float


def plan(config: Config) -> dict[str, Any]:
    """Estimate memory and time before anything is loaded.

    Returns:
        {model, device, rows, tokens: of a forward pass, train_gib: by part and in total,
        free_gib: less a reserve, fits, change: keys that would make it fit, longest_tokens: {card:
        tokens of the longest row that trains on it}, times: [{stage, rows, seconds}] at the speed
        of the run in this folder}.

    Raises:
        KitError: an unknown model or architecture.
    """
    settings = config.train
    cuda, limit = _limit()
    parts = training_bytes(config, settings.max_seq_tokens, cuda)
    total = sum(parts)
    sizes = {**parts._asdict(), "total": total}
    return {
        "model": config.student.model,
        "device": "cuda" if cuda else "cpu",
        "rows": settings.micro_batch_size,
        "tokens": settings.max_seq_tokens,
        "train_gib": {name: round(size / GIB, 3) for name, size in sizes.items()},
        "free_gib": round(limit / GIB, 3),
        "fits": total <= limit,
        "change": None if total <= limit else _change(config, settings.max_seq_tokens, cuda, limit),
        "longest_tokens": {
            f"{size} GB": longest(config, size * GIB - RESERVE_BYTES) for size in CARDS_GIB
        },
        "times": _times(config),
    }


def training_bytes(config: Config, tokens: int, cuda: bool) -> StepBytes:
    """Bytes of one training step on rows of `tokens`, by part, at its peak.

    With checkpointing each layer keeps its input alone, and one layer at a time is recomputed for
    its backward pass. A slice of the logits and that one layer are never there together: the larger
    of the two counts.
    """
    settings = config.train
    computes_in_bf16 = settings.dtype != "fp32" and (cuda or settings.dtype == "bf16")
    number_bytes = 2 if computes_in_bf16 else 4
    weight_bytes = {"nf4": NF4_BYTES, "int8": 1.0}.get(settings.dtype, number_bytes)
    shape = _shape(config.student.model, settings.rank, number_bytes)
    count = tokens * settings.micro_batch_size

    # what lives from the forward to the backward pass, and what one layer's backward pass adds
    states = shape.hidden * number_bytes * count
    layer = shape.saved_bytes * count
    kept = shape.layers * (states if settings.gradient_checkpointing else layer)
    passing = 3 * shape.widest * number_bytes * count  # gradients
    if settings.gradient_checkpointing:
        passing += layer
    if weight_bytes != number_bytes:
        passing += shape.largest * number_bytes  # dequantized

    logits = min(settings.logits_bytes, LIVE_BYTES * shape.vocabulary * count) + 3 * states
    return StepBytes(
        weights=shape.linear * weight_bytes + shape.other * number_bytes,
        adapter=shape.adapter * 8.0,  # fp32 values and gradients
        optimizer=shape.adapter * (2.0 if uses_8_bit_optimizer(settings, cuda) else 8.0),
        activations=kept + max(0.0, passing - logits),
        logits=float(logits),
    )


def longest(config: Config, limit: float, cuda: bool = True) -> int:
    """Most tokens of a row with which a training step stays within `limit` bytes; 0: none."""
    context_tokens = _shape(config.student.model, config.train.rank, 2).context_tokens
    lengths = range(1, context_tokens + 1)
    return bisect_right(lengths, limit, key=lambda tokens: _total(config, tokens, cuda))


def check_fit(config: Config, run: Run, tokens: int) -> None:
    """Refuse rows of `tokens` that will not fit (KitError); warn with train.on_low_memory=warn."""
    cuda, limit = _limit()
    need = _total(config, tokens, cuda)
    # malloc keeps about what checkpointing frees: faster, where there is room
    without_checkpoints = _with(config, gradient_checkpointing=False)
    if not cuda and _total(without_checkpoints, tokens, cuda) > limit:
        return_at_once()
    if need <= limit:
        return
    text = (
        f"Training on rows of {tokens} tokens needs about {need / GIB:.1f} GiB; "
        f"{limit / GIB:.1f} GiB are free."
    )
    if config.train.on_low_memory == "refuse":
        change = _change(config, tokens, cuda, limit)
        raise KitError(text, f"Set {change}; or override with train.on_low_memory=warn.")
    run.progress.warn(f"{text} Trying anyway (train.on_low_memory=warn).")


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
    savers = {
        "gradient_checkpointing": True,
        "micro_batch_size": 1,
        "logits_bytes": min(config.train.logits_bytes, 1 << 26),
        "dtype": "nf4",
    }
    changes: dict[str, Any] = {}
    for key, value in savers.items():
        if getattr(config.train, key) != value:
            changes[key] = value
            if _total(_with(config, **changes), tokens, cuda) <= limit:
                break
    else:
        changes["max_seq_tokens"] = longest(_with(config, **changes), limit, cuda) // 16 * 16
        if not changes["max_seq_tokens"]:
            return "a smaller student.model"
    return ", ".join(f"train.{key}={str(value).lower()}" for key, value in changes.items())


@lru_cache(maxsize=4)
def _shape(name: str, rank: int, number_bytes: int) -> ModelShape:
    """Count and trace the model of that name, computing in numbers of 2 or 4 bytes."""
    dtype = torch.float32 if number_bytes == 4 else torch.bfloat16
    try:
        model_config = AutoConfig.from_pretrained(hf_folder(name), trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                model_config, dtype=dtype, attn_implementation="sdpa"
            )
    except (OSError, ValueError) as error:
        raise KitError(
            f"The config of {name} cannot be read: {str(error).splitlines()[0]}",
            "It is read from the hub or the model's folder: offline, set student.model=FOLDER.",
        ) from error
    text = model.config.get_text_config()
    head = model.get_output_embeddings()
    linears = [
        module.weight
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    ]
    linear = sum(weight.numel() for weight in linears)
    total = sum(weight.numel() for weight in model.parameters())
    model.train().requires_grad_(False)
    with torch.device("meta"):  # get_peft_model changes `model` itself
        get_peft_model(model, lora_config(Train(rank=rank)), autocast_adapter_dtype=False)
    # without storage attention is traced as if it kept its matrix: aT + bT^2, and a is wanted
    short = _saved_bytes(model, 128)
    long = _saved_bytes(model, 256)
    return ModelShape(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        vocabulary=head.weight.shape[0],
        context_tokens=text.max_position_embeddings,
        linear=linear,
        other=total - linear,
        adapter=rank * sum(sum(weight.shape) for weight in linears),
        largest=max(weight.numel() for weight in linears),
        widest=max(max(weight.shape) for weight in linears),
        saved_bytes=(4 * short - long) // (2 * 128 * text.num_hidden_layers),
    )


def _saved_bytes(model: Any, tokens: int) -> int:
    """Bytes that a forward pass of the decoder keeps for its backward pass, weights aside."""
    weights = {weight.untyped_storage()._cdata for weight in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage
        return tensor

    hidden = model.config.get_text_config().hidden_size
    with torch.device("meta"):
        embedded = torch.zeros(1, tokens, hidden, dtype=model.dtype, requires_grad=True)
        # passed in, since making one would read values that are not there
        mask = torch.zeros(1, 1, tokens, tokens, dtype=model.dtype)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.get_decoder()(inputs_embeds=embedded, attention_mask=mask, use_cache=False)
    return sum(storage.nbytes() for key, storage in saved.items() if key not in weights)


def _times(config: Config) -> list[dict[str, Any]]:
    """Each stage's seconds for this config's rows, at the speed of the run in this folder."""
    path = config.folder / "manifest.json"
    if not path.exists():
        return []
    times = []
    for stage, entry in json.loads(path.read_text(encoding="utf-8")).get("stages", {}).items():
        if entry.get("done") and entry.get("rows_in") and entry.get("seconds"):
            rows = (stage == "teach" and config.data.train.limit) or entry["rows_in"]
            seconds = entry["seconds"] * rows / entry["rows_in"]
            times.append({"stage": stage, "rows": rows, "seconds": seconds})
    return times
