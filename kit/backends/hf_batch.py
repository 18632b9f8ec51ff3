"""Rows that decode together on a transformers model: their cache, its assembly, the forward pass and the draw.

All rows end at the same cache column and are padded on the left, so rows of any length can join a running batch and
finished ones leave it. Knows ids and tensors only; what is generated, and for whom, is in kit/backends/hf.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import linear, pad
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from kit.core.config import Sampling

ROOM_TOKENS = 64  # free columns that a growing cache is given at a time
CHUNK_TOKENS = 4096  # tokens of one prefill pass: bounds its activations
HEAD = 256  # likeliest tokens looked at before the whole vocabulary is sorted

Part = tuple["DecodeBatch", list[int]]  # a batch and the indices of the rows wanted


class GrowingLayer(DynamicLayer):
    """One layer's keys and values (B, H, T, D) as views of buffers with room at the end.

    transformers' own layer copies everything at every token; this one copies once in `ROOM_TOKENS`.
    """

    buffers: tuple[torch.Tensor, ...] = ()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Write new states (B, H, t, D) behind the old ones; returns all keys and values so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        old, states = self.get_seq_length(), (key_states, value_states)
        new = old + key_states.shape[2]
        if not self.buffers or new > self.buffers[0].shape[2]:
            room = [pad(fresh, (0, 0, 0, ROOM_TOKENS)) for fresh in states]
            self.buffers = tuple(
                torch.cat(both, 2) for both in zip((self.keys, self.values), room, strict=True)
            )
        for buffer, fresh in zip(self.buffers, states, strict=True):
            buffer[:, :, old:new] = fresh
        self.keys, self.values = (buffer[:, :, :new] for buffer in self.buffers)
        return self.keys, self.values


@dataclass
class DecodeBatch:
    """A batch's tensors.

    Args:
        cache: of all rows, `columns` tokens wide.
        starts: (B, 1), the column of each row's first token; what is left of it is padding.
        columns: width of the cache.
        logits: (B, V) of what follows each row.
    """

    cache: Any
    starts: torch.Tensor
    columns: int
    logits: torch.Tensor

    def step(self, model: Any, tokens: Sequence[int]) -> None:
        """Append one token to every row and compute what follows it."""
        ids = torch.tensor(tokens, device=self.starts.device).unsqueeze(-1)
        self.logits = _forward(model, self.cache, ids, self.starts, self.columns)
        self.columns += 1


def supports_continuous_batching(model: Any) -> bool:
    """Whether rows may join a running batch of this model: every layer keeps all keys and values."""
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)


def prefill(model: Any, prompts: Sequence[Sequence[int]]) -> DecodeBatch:
    """Evaluate prompts (token ids, of any lengths) together."""
    columns = max(len(prompt) for prompt in prompts)
    ids = torch.tensor(
        [[0] * (columns - len(prompt)) + list(prompt) for prompt in prompts], device=model.device
    )
    starts = torch.tensor([[columns - len(prompt)] for prompt in prompts], device=model.device)
    cache, chunk = DynamicCache(config=model.config), columns
    if supports_continuous_batching(model):
        cache.layers = [GrowingLayer() for _ in cache.layers]
        chunk = CHUNK_TOKENS
    for begin in range(0, columns, chunk):
        logits = _forward(model, cache, ids[:, begin : begin + chunk], starts, begin)
    return DecodeBatch(cache, starts, columns, logits)


def assemble(parts: Sequence[Part], keep: DecodeBatch | None = None) -> DecodeBatch:
    """One batch of chosen rows of several, in the order given.

    Args:
        parts: what to take; a row may be taken several times. Models whose rows cannot join: one part only.
        keep: a batch that is used again and left as it is; all others are used up, layer by layer, so that there are
            never two whole caches at a time.
    """
    first = parts[0][0]
    starts = torch.cat(
        [rows.starts[chosen] - rows.columns for rows, chosen in parts]
    )  # counted from the end
    logits = torch.cat([rows.logits[chosen] for rows, chosen in parts])
    if not isinstance(first.cache.layers[0], GrowingLayer):
        first.cache.reorder_cache(torch.tensor(parts[0][1], device=starts.device))
        return DecodeBatch(first.cache, starts + first.columns, first.columns, logits)
    columns, cache = -int(starts.min()), DynamicCache()
    cache.layer_class_to_replicate = None
    for index in range(len(first.cache.layers)):
        layer = GrowingLayer()
        layer.lazy_initialization(first.cache.layers[index].keys, first.cache.layers[index].values)
        layer.buffers = tuple(_gather(parts, index, name, columns) for name in ("keys", "values"))
        layer.keys, layer.values = (buffer[:, :, :columns] for buffer in layer.buffers)
        cache.layers.append(layer)
        for rows, _ in parts:
            if rows is not keep:
                rows.cache.layers[index] = None
    return DecodeBatch(cache, starts + columns, columns, logits)


def _gather(parts: Sequence[Part], index: int, name: str, columns: int) -> torch.Tensor:
    """A layer's keys or values of the chosen rows, ends aligned at `columns`, with room behind."""
    tensors = [
        getattr(rows.cache.layers[index], name)[chosen, :, -columns:] for rows, chosen in parts
    ]
    return torch.cat([pad(x, (0, 0, columns - x.shape[2], ROOM_TOKENS)) for x in tensors])


def _forward(
    model: Any, cache: Any, ids: torch.Tensor, starts: torch.Tensor, columns: int
) -> torch.Tensor:
    """Logits (B, V) after the last of ids (B, t), whose states join the cache behind its `columns`."""
    column = torch.arange(columns + ids.shape[1], device=ids.device)[None]
    with few_tokens(ids.numel(), ids.device):
        return model(
            input_ids=ids,
            attention_mask=column >= starts,
            position_ids=(column[:, columns:] - starts).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]


class _Transposed(TorchFunctionMode):
    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is not linear or kwargs:
            return function(*args, **(kwargs or {}))
        shown, weight, *bias = args
        made = (
            (weight @ shown.reshape(-1, shown.shape[-1]).T)
            .T.contiguous()
            .reshape(*shown.shape[:-1], len(weight))
        )
        return made if not bias or bias[0] is None else made + bias[0]


def few_tokens(tokens: int, device: torch.device) -> AbstractContextManager:
    """For a forward pass of few tokens on a CPU: linear layers as (W x^T)^T.

    MKL's x W^T copies W at every call, which at 16 to 48 tokens takes two to three times as long (torch 2.13).
    """
    return _Transposed() if device.type == "cpu" and 4 <= tokens <= 64 else nullcontext()


def draw(
    logits: torch.Tensor,
    sampling: Sampling,
    uniforms: Sequence[float],
    seen: torch.Tensor | None = None,
) -> list[int]:
    """One token id for each row of logits (B, V), which are left as they are, with B numbers `uniforms` in [0, 1);
    `seen` (B, V) bool marks tokens of prompt and sample so far, None without a repetition penalty."""
    logits = logits.float()
    if seen is not None:
        penalty = sampling.repetition_penalty
        logits = torch.where(
            seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits
        )
    if sampling.temperature == 0:
        return logits.argmax(-1).tolist()
    weights, ids = torch.softmax(logits / sampling.temperature, -1), None
    if sampling.top_k or sampling.top_p < 1 or sampling.min_p:
        weights, ids = _filtered(weights, sampling)
    running = weights.double().cumsum(-1)
    at = (
        torch.tensor(uniforms, dtype=torch.float64, device=logits.device)[:, None] * running[:, -1:]
    )
    at = torch.searchsorted(running, at, right=True)
    return (at if ids is None else ids.gather(-1, at))[:, 0].tolist()


def _filtered(weights: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (B, K), likeliest first, those that the filters drop set to zero, and the tokens' ids (B, K)."""
    top_p = (
        sampling.top_p if sampling.top_p < 1 else 2.0
    )  # rounded sums may pass 1 before the last token
    top, ids = weights.topk(min(sampling.top_k or HEAD, weights.shape[-1]))
    if sampling.top_k:
        top = top / top.sum(-1, keepdim=True)
    elif not bool(((top.sum(-1) >= top_p) | (top[:, -1] < sampling.min_p * top[:, 0])).all()):
        top, ids = weights.sort(-1, descending=True)
    dropped = (top.cumsum(-1) - top >= top_p) | (top < sampling.min_p * top[:, :1])
    return top.masked_fill(dropped, 0), ids
