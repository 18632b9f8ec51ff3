"""Attention over a trunk and the tails that branch off it, for judging many boundaries of one trace at once.

Section 3.2 of the paper asks one boundary after the other. Here every tail sees the trunk up to its own cut
and itself; sliding windows are applied by logical position. Grouped heads are folded into the queries, so
keys are never copied. Features it does not know (softcap, sinks, biases) raise `Unsupported`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, Cache
from transformers.cache_utils import DynamicLayer

NAME = "palign_tree"
MASK_CELLS = 1 << 22  # queries by keys of one masked call: bounds memory (4 bytes a cell, times the heads folded)
KNOWN = frozenset({"dropout", "use_cache", "position_ids", "is_causal", "output_attentions", "cache_position"})
LAYERS = frozenset({"full_attention", "sliding_attention"})


class Unsupported(Exception):
    """The model's attention does something that this function does not."""


class Layout:
    """Where the tokens of one forward pass stand: tails behind a trunk of `past` tokens.

    Args:
        cuts: for each tail, the trunk tokens that it sees.
        lengths: for each tail, its tokens. One tail with cut == past is plain causal continuation.
        past: trunk tokens visible to the widest tail; `near` is what every tail sees.
    """

    def __init__(self, cuts: Sequence[int], lengths: Sequence[int], past: int, device: torch.device) -> None:
        self.past, self.tokens, self.causal = past, sum(lengths), len(cuts) == 1 and cuts[0] == past
        self.calls, self.near = 0, min(cuts)
        size = torch.tensor(lengths)
        self.tail = torch.repeat_interleave(torch.arange(len(cuts)), size).to(device)  # (q,)
        self.cut = torch.repeat_interleave(torch.tensor(cuts), size).to(device)  # (q,)
        starts = torch.repeat_interleave(size.cumsum(0) - size, size)
        self.position = self.cut + (torch.arange(self.tokens) - starts).to(device)  # (q,)
        self.masks: dict[tuple[int, int, int | None], torch.Tensor] = {}

    def mask(self, start: int, end: int, window: int | None) -> torch.Tensor:
        """What queries [start, end) see: bool (end - start, past + end)."""
        key = (start, end, window)
        if key not in self.masks:
            position, cut, tail = (x[start:end, None] for x in (self.position, self.cut, self.tail))
            trunk = torch.arange(self.past, device=self.cut.device)[None]
            seen = torch.cat(
                [trunk < cut, (self.tail[None, :end] == tail) & (self.position[None, :end] <= position)], 1
            )
            if window is not None:
                seen &= torch.cat([trunk, self.position[None, :end]], 1) > position - window
            self.masks[key] = seen
        return self.masks[key]


_layout: ContextVar[Layout | None] = ContextVar("layout", default=None)


class TrunkCache(Cache):
    """Keys and values of a trunk in buffers that tails may borrow. `length` is what the next forward pass sees."""

    def __init__(self, layers: int) -> None:
        super().__init__(layers=[_TrunkLayer(self) for _ in range(layers)])
        self.length = self.room = 0

    def save(self, start: int, end: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Copies of [start, end) of every layer, to be put back when a tail that overwrote them is done with."""
        return [(x.keys[:, :, start:end].clone(), x.values[:, :, start:end].clone()) for x in self.layers if x.ready]

    def restore(self, start: int, saved: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Put saved tokens back."""
        for layer, (keys, values) in zip((x for x in self.layers if x.ready), saved, strict=True):
            layer.keys[:, :, start : start + keys.shape[2]] = keys
            layer.values[:, :, start : start + keys.shape[2]] = values


class _TrunkLayer(DynamicLayer):
    def __init__(self, cache: TrunkCache) -> None:
        super().__init__()
        self.cache = cache

    @property
    def ready(self) -> bool:
        return self.keys is not None

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        start, end = self.cache.length, self.cache.length + keys.shape[2]
        if not self.ready or self.keys.shape[2] < end:
            self.keys, self.values = (
                self._grow(old, new, end) for old, new in ((self.keys, keys), (self.values, values))
            )
            self.is_initialized = True
        self.keys[:, :, start:end], self.values[:, :, start:end] = keys, values
        return self.keys[:, :, :end], self.values[:, :, :end]

    def _grow(self, old: torch.Tensor | None, new: torch.Tensor, end: int) -> torch.Tensor:
        grown = new.new_empty(*new.shape[:2], max(end, self.cache.room), new.shape[3])
        if old is not None:
            grown[:, :, : self.cache.length] = old[:, :, : self.cache.length]
        return grown

    def get_seq_length(self) -> int:
        return self.cache.length


@contextmanager
def laid_out(model: Any, layout: Layout) -> Iterator[None]:
    """Run the model's forward passes inside with this module's attention.

    Raises:
        Unsupported: the model did not call it once for a layer, or called it with features it does not know.
    """
    other = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - LAYERS
    if other:  # chunked attention past its chunk would pass a short self-check
        raise Unsupported(f"it has layers of type {', '.join(sorted(other))}")
    configs = {id(c): c for c in (model.config, model.config.get_text_config())}.values()
    before = [config._attn_implementation_internal for config in configs]
    token = _layout.set(layout)
    try:
        for config in configs:
            config._attn_implementation_internal = NAME
        yield
    finally:
        _layout.reset(token)
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation_internal = name
    if layout.calls != model.config.get_text_config().num_hidden_layers:
        raise Unsupported(f"{layout.calls} of its layers are attention that can be masked")


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **features: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query (1, H, q, d), key and value (1, H / g, past + q, d) -> (1, q, H, d)."""
    layout = _layout.get()
    odd = [name for name, given in features.items() if given is not None and name not in KNOWN]
    if layout is None or odd or attention_mask is not None or key.shape[2] != layout.past + query.shape[2]:
        raise Unsupported(f"its attention uses {', '.join(odd) or 'keys of its own'}")
    layout.calls += 1
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    window = sliding_window if sliding_window and sliding_window < int(layout.position.max()) + 1 else None
    if layout.causal and window is None and layout.past == 0 and query.shape[2] > 1:
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (key, value))
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale).transpose(1, 2), None
    split = window is None and query.is_cpu and query.shape[2] > 1 and layout.near and key.shape[-1] == value.shape[-1]
    if split and layout.causal:
        return _split(query, key, value, layout.near, scale).transpose(1, 2), None
    rows, parts = max(16, MASK_CELLS // key.shape[2]), []
    for start in range(0, query.shape[2], rows):
        end = min(start + rows, query.shape[2])
        seen, piece = layout.mask(start, end, window), query[:, :, start:end]
        keys, values = key[:, :, : seen.shape[1]], value[:, :, : seen.shape[1]]
        if split:
            parts.append(_split(piece, keys, values, layout.near, scale, seen[:, layout.near :]))
        else:
            seen = seen.repeat(query.shape[1] // key.shape[1], 1)[None, None]
            out = scaled_dot_product_attention(_fold(piece, key.shape[1]), keys, values, attn_mask=seen, scale=scale)
            parts.append(out.reshape(*piece.shape[:3], -1))
    return (parts[0] if len(parts) == 1 else torch.cat(parts, 2)).transpose(1, 2), None


def _fold(query: torch.Tensor, heads: int) -> torch.Tensor:
    """(1, H, q, d) -> (1, heads, H / heads * q, d)."""
    return query.reshape(1, heads, -1, query.shape[-1])


def _split(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    near: int,
    scale: float,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Keys before `near`, which every query sees, without a mask; the rest causally or under `mask` (q, k - near).

    The two are joined by their log-sum-exp. A mask over all keys would cost a quarter more, and a chunk behind the
    first would be computed as a whole rectangle.
    """
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    heads, groups = key.shape[1], query.shape[1] // key.shape[1]
    far, far_sum = kernel(_fold(query, heads), key[:, :, :near], value[:, :, :near], 0.0, False, scale=scale)
    key, value = key[:, :, near:], value[:, :, near:]
    if mask is None:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        out, out_sum = kernel(query, key, value, 0.0, True, scale=scale)
    else:
        hidden = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, float("-inf")).repeat(groups, 1)
        folded = _fold(query, heads)
        out, out_sum = kernel(folded, key, value, 0.0, False, attn_mask=hidden[None, None], scale=scale)
    share = torch.sigmoid(far_sum.reshape(query.shape[:3]) - out_sum.reshape(query.shape[:3]))
    return torch.lerp(out.reshape(query.shape), far.reshape(query.shape), share.unsqueeze(-1).to(out.dtype))


AttentionInterface.register(NAME, attend)
