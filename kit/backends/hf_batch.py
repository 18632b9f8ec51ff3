"""Rows that decode together on a transformers model: their cache, its assembly and the forward pass.

All rows of a batch end at the same cache column and are padded on the left, so rows of any length can join a running
batch and finished ones leave it. Knows ids and tensors only; what is generated, and for whom, is in kit/backends/hf.py.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

ROOM_TOKENS = 64  # free columns that a growing cache is given at a time
CHUNK_TOKENS = 8192  # tokens of one prefill pass: bounds its activations


class GrowingLayer(DynamicLayer):
    """One layer's keys and values (B, H, T, D) in buffers with room at the end.

    transformers' own layer copies everything at every token; this one copies once in `ROOM_TOKENS`.
    """

    buffers: tuple[torch.Tensor, ...] = ()

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Write new states (B, H, t, D) behind the old ones; returns all keys and values so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        old = self.get_seq_length()
        new = old + key_states.shape[-2]
        if not self._has_room(new):
            grown = []
            for past, fresh in ((self.keys, key_states), (self.values, value_states)):
                room = fresh.new_empty((*fresh.shape[:2], new + ROOM_TOKENS, fresh.shape[-1]))
                if old:
                    room[:, :, :old] = past
                grown.append(room)
            self.buffers = tuple(grown)
        for buffer, fresh in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, old:new] = fresh
        self.keys, self.values = (buffer[:, :, :new] for buffer in self.buffers)
        return self.keys, self.values

    def _has_room(self, columns: int) -> bool:
        """Whether the buffers still hold the keys (they do not after a reorder) and as many columns."""
        return (
            bool(self.buffers)
            and self.keys.data_ptr() == self.buffers[0].data_ptr()
            and columns <= self.buffers[0].shape[-2]
        )


@dataclass
class Rows:
    """A batch's tensors.

    Args:
        cache: of all rows, `columns` wide.
        lengths: tokens of each row in the cache; a row's first `columns - length` columns are padding.
        columns: width of the cache in tokens.
        logits: (B, V) of what follows each row.
    """

    cache: Any
    lengths: list[int]
    columns: int
    logits: torch.Tensor
    mask: torch.Tensor | None = None  # (B, columns + room) bool, made when first needed

    def step(self, model: Any, tokens: Sequence[int]) -> None:
        """Append one token to every row and compute what follows it."""
        device = self.logits.device
        self.columns += 1
        positions = torch.tensor(self.lengths, device=device).unsqueeze(-1)
        self.lengths = [length + 1 for length in self.lengths]
        mask = None
        if min(self.lengths) < self.columns:
            if self.mask is None or self.mask.shape[1] < self.columns:
                self.mask = _mask(self.lengths, self.columns, self.columns + ROOM_TOKENS, device)
            mask = self.mask[:, : self.columns]
        ids = torch.tensor(tokens, device=device).unsqueeze(-1)
        self.logits = _forward(model, self.cache, ids, mask, positions)


def joins(model: Any) -> bool:
    """Whether rows may join a running batch of this model: every layer keeps all keys and values."""
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)


def prefill(model: Any, prompts: Sequence[Sequence[int]]) -> Rows:
    """Evaluate prompts (token ids, of any lengths) together."""
    device, lengths = model.device, [len(prompt) for prompt in prompts]
    columns = max(lengths)
    ids = torch.tensor([[0] * (columns - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = _mask(lengths, columns, columns, device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    chunk = columns
    if joins(model):
        cache.layers = [GrowingLayer() for _ in cache.layers]
        chunk = max(256, CHUNK_TOKENS // len(prompts))
    for begin in range(0, columns, chunk):
        end = min(begin + chunk, columns)
        shown = None if min(lengths) == columns else mask[:, :end]
        logits = _forward(model, cache, ids[:, begin:end], shown, positions[:, begin:end])
    return Rows(cache, lengths, columns, logits)


def assemble(parts: Sequence[tuple[Rows, list[int]]], keep: bool = False) -> Rows:
    """One batch of chosen rows of several.

    Args:
        parts: batches with the indices of the rows wanted; an index may occur several times.
        keep: the last part is used again: leave it as it is. All others are used up.

    Returns:
        the rows in the order given. Models whose rows cannot join take one part only.
    """
    lengths = [rows.lengths[i] for rows, chosen in parts for i in chosen]
    logits = torch.cat([rows.logits[chosen] for rows, chosen in parts])
    first = parts[0][0]
    if not isinstance(first.cache.layers[0], GrowingLayer):
        (only,) = parts
        cache = copy.deepcopy(first.cache) if keep else first.cache
        cache.reorder_cache(torch.tensor(only[1], device=logits.device))
        return Rows(cache, lengths, first.columns, logits)
    columns = max(lengths)
    cache = DynamicCache()
    cache.layer_class_to_replicate = None
    for index in range(len(first.cache.layers)):
        layers = [rows.cache.layers[index] for rows, _ in parts]
        layer = GrowingLayer()
        layer.lazy_initialization(layers[0].keys, layers[0].values)
        layer.buffers = tuple(
            _gather([getattr(old, name) for old in layers], parts, columns) for name in ("keys", "values")
        )
        layer.keys, layer.values = (buffer[:, :, :columns] for buffer in layer.buffers)
        cache.layers.append(layer)
        for old in layers[: len(layers) - keep]:  # freed layer by layer: never two whole caches at a time
            old.keys = old.values = old.buffers = None
    return Rows(cache, lengths, columns, logits)


def _gather(tensors: Sequence[torch.Tensor], parts: Sequence[tuple[Rows, list[int]]], columns: int) -> torch.Tensor:
    """Chosen rows of several (B, H, T, D), ends aligned at `columns`, padding zero."""
    count = sum(len(chosen) for _, chosen in parts)
    shape = tensors[0].shape
    out = tensors[0].new_zeros((count, shape[1], columns + ROOM_TOKENS, shape[3]))
    at = 0
    for tensor, (rows, chosen) in zip(tensors, parts, strict=True):
        width = max(rows.lengths[i] for i in chosen)
        wanted = torch.tensor(chosen, device=tensor.device)
        out[at : at + len(chosen), :, columns - width : columns] = tensor[
            :, :, rows.columns - width : rows.columns
        ].index_select(0, wanted)
        at += len(chosen)
    return out


def _mask(lengths: Sequence[int], columns: int, width: int, device: torch.device) -> torch.Tensor:
    """(B, width) bool: a row's tokens and everything after column `columns`."""
    starts = torch.tensor([columns - length for length in lengths], device=device)
    return torch.arange(width, device=device) >= starts.unsqueeze(-1)


def _forward(model: Any, cache: Any, ids: torch.Tensor, mask: Any, positions: torch.Tensor) -> torch.Tensor:
    """Logits (B, V) after the last of ids (B, t), whose states join the cache."""
    return model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]
