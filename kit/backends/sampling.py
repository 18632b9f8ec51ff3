"""Drawing the next token for many rows at once, each from its own random number.

Order of the filters: repetition penalty, temperature, top_k, top_p, min_p, as in transformers. Everything over the
vocabulary is one tensor operation for all rows; a row's randomness is one uniform number that it brings along, so its
draw does not depend on its neighbours.
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
    """One token a row.

    Args:
        logits: (B, V), any float type.
        sampling: shared by these rows; temperature 0 takes the likeliest token.
        uniforms: B numbers in [0, 1), one a row; unused when greedy.
        seen: (B, V) bool, tokens of prompt and sample so far; None without a repetition penalty.

    Returns:
        B token ids.
    """
    import torch

    logits = logits.float()
    if seen is not None and sampling.repetition_penalty != 1:
        penalty = sampling.repetition_penalty
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    if sampling.temperature == 0:
        return logits.argmax(-1).tolist()
    weights, ids = _candidates(logits / sampling.temperature, sampling)
    cumulative = weights.double().cumsum(-1)
    where = torch.tensor(uniforms, dtype=torch.float64, device=logits.device).unsqueeze(-1) * cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, where, right=True).clamp(max=weights.shape[-1] - 1)
    return (chosen if ids is None else ids.gather(-1, chosen)).squeeze(-1).tolist()


def _candidates(logits: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weights (B, K) of the tokens that the filters leave, else zero, and their ids (None: K is the vocabulary)."""
    import torch

    size = logits.shape[-1]
    if not sampling.top_k and sampling.top_p == 1 and not sampling.min_p:
        return torch.softmax(logits, -1), None
    top, ids = logits.topk(min(sampling.top_k or HEAD, size))
    total = torch.logsumexp(top if sampling.top_k else logits, -1, keepdim=True)
    weights = torch.exp(top - total)
    if not sampling.top_k and weights.shape[-1] < size:
        enough = weights[:, -1] < sampling.min_p * weights[:, 0]
        if sampling.top_p < 1:
            enough |= weights.sum(-1) >= sampling.top_p
        if not bool(enough.all()):
            top, ids = logits.sort(-1, descending=True)
            weights = torch.exp(top - total)
    dropped = weights < sampling.min_p * weights[:, :1]
    if sampling.top_p < 1:
        dropped |= weights.cumsum(-1) - weights >= sampling.top_p
    dropped[:, 0] = False
    return weights.masked_fill(dropped, 0), ids
