"""Drawing the next token for many rows at once, each with a random number of its own.

Filters in the order of transformers: repetition penalty, temperature, top_k, top_p, min_p. Every operation runs over
all rows, but a row's draw depends on its own logits and number alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kit.config import Sampling

if TYPE_CHECKING:
    import torch

HEAD = 256  # likeliest tokens looked at before the whole vocabulary is sorted


def draw(
    logits: torch.Tensor, sampling: Sampling, uniforms: Sequence[float], seen: torch.Tensor | None = None
) -> list[int]:
    """One token id for each row of logits (B, V), which are left as they are, with B numbers `uniforms` in [0, 1);
    `seen` (B, V) bool marks tokens of prompt and sample so far, None without a repetition penalty."""
    import torch

    logits = logits.float()
    if seen is not None:
        penalty = sampling.repetition_penalty
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    if sampling.temperature == 0:
        return logits.argmax(-1).tolist()
    weights, ids = torch.softmax(logits / sampling.temperature, -1), None
    if sampling.top_k or sampling.top_p < 1 or sampling.min_p:
        weights, ids = _filtered(weights, sampling)
    running = weights.double().cumsum(-1)
    at = torch.tensor(uniforms, dtype=torch.float64, device=logits.device)[:, None] * running[:, -1:]
    at = torch.searchsorted(running, at, right=True)
    return (at if ids is None else ids.gather(-1, at))[:, 0].tolist()


def _filtered(weights: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (B, K), likeliest first, those that the filters drop set to zero, and the tokens' ids (B, K)."""
    top_p = sampling.top_p if sampling.top_p < 1 else 2.0  # rounded sums may pass 1 before the last token
    top, ids = weights.topk(min(sampling.top_k or HEAD, weights.shape[-1]))
    if sampling.top_k:
        top = top / top.sum(-1, keepdim=True)
    elif not bool(((top.sum(-1) >= top_p) | (top[:, -1] < sampling.min_p * top[:, 0])).all()):
        top, ids = weights.sort(-1, descending=True)
    dropped = (top.cumsum(-1) - top >= top_p) | (top < sampling.min_p * top[:, :1])
    return top.masked_fill(dropped, 0), ids
