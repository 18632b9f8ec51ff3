"""plan: will it fit, how long will it take; from a model's config alone.

Parameters are counted, and a layer's activations traced, on a model without storage (torch's meta device). What is
taken on trust: a card's own needs (RESERVE_BYTES), and that attention keeps no (T, T) matrix (SDPA's fused kernels).
"""

from __future__ import annotations

import json
from bisect import bisect_right
from functools import lru_cache
from typing import Any

from kit.config import Config
from kit.errors import KitError
from kit.run import Run

GIB = 1 << 30
CARDS_GIB = (8, 12, 16, 24)
RESERVE_BYTES = int(0.6 * GIB)  # CUDA's context and the allocator's rounding
SMALLER = "a smaller student.model"
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # a weight, with the scales of double quantization


def plan(config: Config) -> dict[str, Any]:
    """Reckon memory and time before anything is loaded.

    Returns:
        {model, device, train: {weights, adapter, optimizer, activations, logits, total: GiB; tokens, rows}, kv_cache:
        GiB of student.parallel sequences of align's length, limit: GiB this machine has, fits, change: the key that
        would make it fit, longest_tokens: {card: tokens a row of NF4 training with train.micro_rows rows}, times:
        [{stage, rows, seconds}] scaled from the run in this folder}.

    Raises:
        KitError: an unknown model or architecture.
    """
    from kit.memory import limit_bytes  # torch is loaded late: --help answers at once

    cuda, limit = limit_bytes()
    settings, student = config.train, config.student
    parts = training_bytes(config, settings.cutoff_tokens, cuda)
    parts["total"] = sum(parts.values())
    shape = _shape(student.model, settings.rank, 2)
    length = min(config.align.sampling.max_new_tokens, shape["context_tokens"])
    fits = parts["total"] <= limit
    sizes: dict[str, float] = {name: round(size / GIB, 3) for name, size in parts.items()}
    return {
        "model": student.model,
        "device": "cuda" if cuda else "cpu",
        "train": sizes | {"tokens": settings.cutoff_tokens, "rows": settings.micro_rows},
        "kv_cache": round(shape["kv_elements"] * (2 if cuda else 4) * length * student.parallel / GIB, 3),
        "limit": round(limit / GIB, 2),
        "fits": fits,
        "change": None if fits else _change(config, settings.cutoff_tokens, cuda, limit),
        "longest_tokens": {f"{n} GB": longest(config, n * GIB - RESERVE_BYTES) for n in CARDS_GIB},
        "times": _times(config),
    }


def training_bytes(config: Config, tokens: int, cuda: bool) -> dict[str, float]:
    """Bytes of one training step on rows of `tokens`, by part; the interpreter's and CUDA's own are not in it."""
    settings = config.train
    wide = 4 if settings.dtype == "fp32" or not (cuda or settings.dtype == "bf16") else 2  # of an activation
    weight = {"nf4": NF4_BYTES, "int8": 1.0}.get(settings.dtype, wide)
    shape = _shape(config.student.model, settings.rank, wide)
    eight_bit = settings.optimizer == "paged_adamw_8bit" or (settings.optimizer == "auto" and cuda)
    count = tokens * settings.micro_rows
    slice_bytes = min(settings.logits_bytes, 4 * count * shape["vocabulary"])
    layer = shape["saved_bytes"] * count
    flowing = 3 * shape["widest"] * wide * count + shape["largest"] * wide * (weight != wide)  # gradients; dequantized
    if settings.checkpointing:
        held, once = shape["layers"] * shape["hidden"] * wide * count, layer + flowing
    else:
        held, once = shape["layers"] * layer, flowing
    logits = slice_bytes * (1 if wide == 4 else 2) + shape["hidden"] * wide * count * 3
    return {
        "weights": shape["linear"] * weight + shape["other"] * wide,
        "adapter": shape["adapter"] * 8.0,  # fp32 values and gradients
        "optimizer": shape["adapter"] * (2.0 if eight_bit else 8.0),
        "activations": held + max(0.0, once - logits),  # logits and a layer's backward are never there together
        "logits": float(logits),
    }


def longest(config: Config, limit: float, cuda: bool = True) -> int:
    """Most tokens a row with which a training step stays within `limit` bytes; 0: none."""
    lengths = range(1, _shape(config.student.model, config.train.rank, 2)["context_tokens"] + 1)
    return bisect_right(lengths, limit, key=lambda tokens: _total(config, tokens, cuda))


def check_fit(config: Config, run: Run, tokens: int) -> None:
    """Refuse, before training starts, rows of `tokens` that will not fit; with train.overfit=ignore, say so.

    Raises:
        KitError: with the sum, what there is, and the key to change.
    """
    from kit.memory import limit_bytes

    cuda, limit = limit_bytes()
    need = _total(config, tokens, cuda)
    if need <= limit:
        return
    text = f"Training on rows of {tokens} tokens needs about {need / GIB:.1f} GiB; {limit / GIB:.1f} GiB are free."
    if config.train.overfit == "refuse":
        change = _change(config, tokens, cuda, limit) or SMALLER
        raise KitError(text, f"Set {change}; or try all the same with train.overfit=ignore.")
    run.progress.warn(f"{text} Tried all the same (train.overfit=ignore).")


def show(result: dict[str, Any]) -> None:
    """Print a plan as a few lines."""
    train = result["train"]
    parts = ", ".join(f"{key} {train[key]:.2f}" for key in ("weights", "adapter", "optimizer", "activations", "logits"))
    print(f"{result['model']} on {result['device']}, {train['rows']} rows of {train['tokens']} tokens at a time")
    print(f"  training: {train['total']:.2f} GiB ({parts}); KV cache while aligning: {result['kv_cache']:.2f} GiB")
    fits = "fits" if result["fits"] else f"does not fit; what would: {result['change'] or SMALLER}"
    print(f"  free here: {result['limit']:.2f} GiB: {fits}")
    cards = ", ".join(f"{card} {tokens or 'none'}" for card, tokens in result["longest_tokens"].items())
    print(f"  longest row by card: {cards}")
    for row in result["times"]:
        print(f"  {row['stage']}: about {row['seconds']:.0f} s for {row['rows']} rows, at the speed of the run here")


def _change(config: Config, tokens: int, cuda: bool, limit: float) -> str | None:
    """The fewest keys, in the order of what they cost, with which it fits."""
    chosen: dict[str, Any] = {}
    logits_bytes = min(config.train.logits_bytes, 1 << 26)
    smaller = config
    for key, value in {"checkpointing": True, "micro_rows": 1, "logits_bytes": logits_bytes, "dtype": "nf4"}.items():
        if getattr(config.train, key) != value:
            chosen[key] = value
            smaller = config.model_copy(update={"train": config.train.model_copy(update=chosen)})
            if _total(smaller, tokens, cuda) <= limit:
                break
    else:
        chosen["cutoff_tokens"] = longest(smaller, limit, cuda) // 16 * 16
        if not chosen["cutoff_tokens"]:
            return None
    return ", ".join(f"train.{key}={str(value).lower()}" for key, value in chosen.items())


def _total(config: Config, tokens: int, cuda: bool) -> float:
    return sum(training_bytes(config, tokens, cuda).values())


@lru_cache(maxsize=4)
def _shape(name: str, rank: int, wide: int) -> dict[str, int]:
    """What a model's config says of its size, and the bytes a token that a layer keeps for its backward pass."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    from kit.models import hf_folder

    dtype = torch.float32 if wide == 4 else torch.bfloat16
    try:
        model_config = AutoConfig.from_pretrained(hf_folder(name), trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config, dtype=dtype, attn_implementation="sdpa").train()
    except (OSError, ValueError) as error:
        raise KitError(f"The config of {name} cannot be read: {error}", "Name a model transformers knows.") from error
    text, head = model.config.get_text_config(), model.get_output_embeddings()
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    total, linear = sum(p.numel() for p in model.parameters()), sum(m.weight.numel() for m in linears)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    model.requires_grad_(False)
    lora = LoraConfig(r=rank, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.device("meta"):
        peft = get_peft_model(model, lora, autocast_adapter_dtype=False)
    short, long = (_saved_bytes(model, tokens) for tokens in (128, 256))
    return {
        "layers": text.num_hidden_layers,
        "hidden": text.hidden_size,
        "vocabulary": head.weight.shape[0],
        "context_tokens": text.max_position_embeddings,
        "linear": linear,
        "other": total - linear,
        "largest": max(m.weight.numel() for m in linears),
        "widest": max(max(m.weight.shape) for m in linears),
        "adapter": sum(p.numel() for p in peft.parameters() if p.requires_grad),
        "kv_elements": 2 * text.num_hidden_layers * heads * width,
        # s(T) = aT + bT^2, for without storage attention is traced as if it kept its matrix; a is what is wanted
        "saved_bytes": (4 * short - long) // (2 * 128 * text.num_hidden_layers),
    }


def _saved_bytes(model: Any, tokens: int) -> int:
    """Bytes that a forward pass of the decoder keeps for its backward pass, weights aside."""
    import torch

    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    seen: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            seen[storage._cdata] = storage
        return tensor

    like = {"device": "meta", "dtype": model.dtype}
    embedded = torch.zeros(1, tokens, model.config.get_text_config().hidden_size, requires_grad=True, **like)
    mask = torch.zeros(1, 1, tokens, tokens, **like)  # given, so that none is made from values that are not there
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.get_decoder()(inputs_embeds=embedded, attention_mask=mask, use_cache=False)
    return sum(storage.nbytes() for storage in seen.values())


def _times(config: Config) -> list[dict[str, Any]]:
    """Each stage's seconds at the speed of the run that lies in this folder, for as many rows as this config asks."""
    path = config.folder / "manifest.json"
    stages = json.loads(path.read_text(encoding="utf-8")).get("stages", {}) if path.exists() else {}
    times = []
    for stage, entry in stages.items():
        if entry.get("done") and entry.get("rows_in") and entry.get("seconds"):
            rows = (config.data.train.limit or entry["rows_in"]) if stage == "teach" else entry["rows_in"]
            times.append({"stage": stage, "rows": rows, "seconds": entry["seconds"] * rows / entry["rows_in"]})
    return times
