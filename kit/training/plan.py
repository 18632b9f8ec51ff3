"""plan: will it fit, how long will it take; from a model's config alone.

Parameters are counted, and a layer's activations traced, on a model without storage (torch's meta device). What is
taken on trust: RESERVE_BYTES, and that attention keeps no (T, T) matrix (SDPA's fused kernels).
"""

from __future__ import annotations

import json
from bisect import bisect_right
from functools import lru_cache
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from kit.core.config import Config
from kit.core.errors import KitError
from kit.core.memory import limit_bytes, return_at_once
from kit.core.run import Run
from kit.models import hf_folder, kv_elements
from kit.training.loss import LIVE_BYTES

GIB = 1 << 30
CARDS_GIB = (8, 12, 16, 24)
RESERVE_BYTES = int(
    0.6 * GIB
)  # CUDA's context and the allocator's rounding; on a CPU the libraries and their threads
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # a weight, with the scales of double quantization


def plan(config: Config) -> dict[str, Any]:
    """Reckon memory and time before anything is loaded.

    Returns:
        {model, device, rows, tokens: of a forward pass, train_gib: by part and in total, kv_cache_gib: of
        student.max_num_seqs sequences of align's length, free_gib: less a reserve, fits, change: keys that would make it
        fit, longest_tokens: {card: tokens a row that train on it}, times: [{stage, rows, seconds}] at the speed of the
        run in this folder}.

    Raises:
        KitError: an unknown model or architecture.
    """
    settings, student = config.train, config.student
    cuda, limit = _limit()
    parts = training_bytes(config, settings.max_seq_tokens, cuda)
    total, shape = sum(parts.values()), _shape(student.model, settings.rank, 2)
    cached = student.max_num_seqs * min(
        config.align.sampling.max_new_tokens, shape["context_tokens"]
    )
    found = {"model": student.model, "device": "cuda" if cuda else "cpu"}
    found |= {"rows": settings.micro_batch_size, "tokens": settings.max_seq_tokens}
    found["train_gib"] = {
        name: round(size / GIB, 3) for name, size in (parts | {"total": total}).items()
    }
    found["kv_cache_gib"] = round(shape["kv_elements"] * (2 if cuda else 4) * cached / GIB, 3)
    found |= {"free_gib": round(limit / GIB, 3), "fits": total <= limit}
    found["change"] = (
        None if found["fits"] else _change(config, settings.max_seq_tokens, cuda, limit)
    )
    found["longest_tokens"] = {
        f"{size} GB": longest(config, size * GIB - RESERVE_BYTES) for size in CARDS_GIB
    }
    return found | {"times": _times(config)}


def training_bytes(config: Config, tokens: int, cuda: bool) -> dict[str, float]:
    """Bytes of one training step on rows of `tokens`, by part, at its peak.

    With checkpointing each layer keeps its input alone, and one layer at a time is computed anew for its backward pass.
    A slice of the logits and that one layer are never there together: the larger of the two counts.
    """
    settings = config.train
    wide = (
        4 if settings.dtype == "fp32" or not (cuda or settings.dtype == "bf16") else 2
    )  # bytes of an activation
    weight = {"nf4": NF4_BYTES, "int8": 1.0}.get(settings.dtype, wide)
    shape, count = (
        _shape(config.student.model, settings.rank, wide),
        tokens * settings.micro_batch_size,
    )
    eight_bit = settings.optimizer == "paged_adamw_8bit" or (settings.optimizer == "auto" and cuda)
    states = shape["hidden"] * wide * count
    flowing = 3 * shape["widest"] * wide * count + shape["largest"] * wide * (
        weight != wide
    )  # gradients; dequantized
    layers = shape["layers"] * shape["saved_bytes"] * count
    held, once = (
        (shape["layers"] * states, layers / shape["layers"])
        if settings.gradient_checkpointing
        else (layers, 0.0)
    )
    logits = min(settings.logits_bytes, LIVE_BYTES * shape["vocabulary"] * count) + 3 * states
    return {
        "weights": shape["linear"] * weight + shape["other"] * wide,
        "adapter": shape["adapter"] * 8.0,  # fp32 values and gradients
        "optimizer": shape["adapter"] * (2.0 if eight_bit else 8.0),
        "activations": held + max(0.0, once + flowing - logits),
        "logits": float(logits),
    }


def longest(config: Config, limit: float, cuda: bool = True, **keys: Any) -> int:
    """Most tokens a row with which a training step (with `keys` of train) stays within `limit` bytes; 0: none."""
    lengths = range(1, _shape(config.student.model, config.train.rank, 2)["context_tokens"] + 1)
    return bisect_right(lengths, limit, key=lambda tokens: _total(config, tokens, cuda, **keys))


def check_fit(config: Config, run: Run, tokens: int) -> None:
    """Refuse rows of `tokens` that will not fit (KitError), before training starts; warn with train.on_low_memory=warn."""
    cuda, limit = _limit()
    need = _total(config, tokens, cuda)
    if not cuda and _total(config, tokens, cuda, gradient_checkpointing=False) > limit:
        return_at_once()  # malloc hoards about what checkpointing frees: faster, where there is room
    if need <= limit:
        return
    text = f"Training on rows of {tokens} tokens needs about {need / GIB:.1f} GiB; {limit / GIB:.1f} GiB are free."
    if config.train.on_low_memory == "refuse":
        change = _change(config, tokens, cuda, limit)
        raise KitError(text, f"Set {change}; or try all the same with train.on_low_memory=warn.")
    run.progress.warn(f"{text} Tried all the same (train.on_low_memory=warn).")


def _limit() -> tuple[bool, int]:
    cuda, free = limit_bytes()
    return cuda, free - RESERVE_BYTES


def _total(config: Config, tokens: int, cuda: bool, **keys: Any) -> float:
    """Bytes of a step, with other values of some keys of train."""
    config = config.model_copy(update={"train": config.train.model_copy(update=keys)})
    return sum(training_bytes(config, tokens, cuda).values())


def _change(config: Config, tokens: int, cuda: bool, limit: float) -> str:
    """The fewest keys, in the order of what they cost, with which it fits."""
    keys: dict[str, Any] = {}
    slice_bytes = min(config.train.logits_bytes, 1 << 26)
    for key, value in {
        "gradient_checkpointing": True,
        "micro_batch_size": 1,
        "logits_bytes": slice_bytes,
        "dtype": "nf4",
    }.items():
        if getattr(config.train, key) != value:
            keys[key] = value
            if _total(config, tokens, cuda, **keys) <= limit:
                break
    else:
        keys["max_seq_tokens"] = longest(config, limit, cuda, **keys) // 16 * 16
        if not keys["max_seq_tokens"]:
            return "a smaller student.model"
    return ", ".join(f"train.{key}={str(value).lower()}" for key, value in keys.items())


@lru_cache(maxsize=4)
def _shape(name: str, rank: int, wide: int) -> dict[str, int]:
    """What a model's config says of its size, and the bytes a token that a layer keeps for its backward pass."""
    dtype = torch.float32 if wide == 4 else torch.bfloat16
    try:
        model_config = AutoConfig.from_pretrained(hf_folder(name), trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                model_config, dtype=dtype, attn_implementation="sdpa"
            ).train()
    except (OSError, ValueError) as error:
        hint = "It is read from the hub or the model's folder: with no network, set student.model=FOLDER."
        raise KitError(
            f"The config of {name} cannot be read: {str(error).partition(chr(10))[0]}", hint
        ) from error
    text, head = model.config.get_text_config(), model.get_output_embeddings()
    linears = [
        m.weight for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head
    ]
    total, linear = (
        sum(p.numel() for p in model.parameters()),
        sum(weight.numel() for weight in linears),
    )
    lora = LoraConfig(r=rank, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.device("meta"):
        get_peft_model(
            model.requires_grad_(False), lora, autocast_adapter_dtype=False
        )  # changes `model` itself
    short, long = (_saved_bytes(model, tokens) for tokens in (128, 256))
    found = {
        "layers": text.num_hidden_layers,
        "hidden": text.hidden_size,
        "vocabulary": head.weight.shape[0],
    }
    found |= {"context_tokens": text.max_position_embeddings, "kv_elements": kv_elements(text)}
    found |= {
        "linear": linear,
        "other": total - linear,
        "adapter": rank * sum(sum(weight.shape) for weight in linears),
    }
    found |= {
        "largest": max(w.numel() for w in linears),
        "widest": max(max(w.shape) for w in linears),
    }
    # s(T) = aT + bT^2, for without storage attention is traced as if it kept its matrix; a is what is wanted
    return found | {"saved_bytes": (4 * short - long) // (2 * 128 * found["layers"])}


def _saved_bytes(model: Any, tokens: int) -> int:
    """Bytes that a forward pass of the decoder keeps for its backward pass, weights aside."""
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    seen: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        seen[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    like = {"device": "meta", "dtype": model.dtype}
    embedded = torch.zeros(
        1, tokens, model.config.get_text_config().hidden_size, requires_grad=True, **like
    )
    mask = torch.zeros(
        1, 1, tokens, tokens, **like
    )  # given, so that none is made from values that are not there
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.get_decoder()(inputs_embeds=embedded, attention_mask=mask, use_cache=False)
    return sum(storage.nbytes() for key, storage in seen.items() if key not in weights)


def _times(config: Config) -> list[dict[str, Any]]:
    """Each stage's seconds at the speed of the run that lies in this folder, for as many rows as this config asks."""
    path, times = config.folder / "manifest.json", []
    stages = json.loads(path.read_text(encoding="utf-8")).get("stages", {}) if path.exists() else {}
    for stage, entry in stages.items():
        if entry.get("done") and entry.get("rows_in") and entry.get("seconds"):
            rows = (stage == "teach" and config.data.train.limit) or entry["rows_in"]
            times.append(
                {
                    "stage": stage,
                    "rows": rows,
                    "seconds": entry["seconds"] * rows / entry["rows_in"],
                }
            )
    return times
