"""Attention over a trunk and the tails that branch off it, for judging many boundaries of one trace at once.

Section 3.2 of the paper asks one boundary after the other. Here every tail sees the trunk up to its own cut
and itself; sliding windows are applied by logical position. Grouped heads are folded into the queries, so
keys are never copied. Features it does not know (softcap, sinks, biases) raise `Unsupported`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from kit.backends.hf_batch import few_tokens

NAME = "palign_tree"
MASK_CELLS = (
    1 << 22
)  # queries by keys of one masked call: bounds memory (4 bytes a cell, times the heads folded)
GROUP_TOKENS = (
    128  # tails that share one masked call on a CPU: fewer see keys in vain, more fill the kernel
)
KNOWN = frozenset(
    {"dropout", "use_cache", "position_ids", "is_causal", "output_attentions", "cache_position"}
)
LAYERS = frozenset({"full_attention", "sliding_attention"})


class Unsupported(Exception):
    """The model's attention does something that this module does not."""


class Layout:
    """Where the tokens of one forward pass stand: pieces behind a trunk of `past` tokens.

    Args:
        cuts: for each piece, the tokens before it that it sees: of the trunk, and of the first piece where a cut lies
            past the trunk (that piece then goes on from the trunk: cuts[0] == past).
        lengths: for each piece, its tokens; (q,) in all.
    """

    def __init__(
        self, past: int, cuts: Sequence[int], lengths: Sequence[int], device: torch.device
    ) -> None:
        self.past, self.tokens, self.device = past, sum(lengths), device
        self.lead = lengths[0] if cuts[0] == past else 0  # tokens of plain causal continuation
        self.cut, self.begin = (
            np.repeat(cuts, lengths),
            np.repeat(np.cumsum([0, *lengths[:-1]]), lengths),
        )  # (q,)
        position = self.cut + np.arange(self.tokens) - self.begin  # (q,)
        self.furthest, self.position = int(position.max()), torch.from_numpy(position).to(device)
        self.masks: dict[tuple[int, int, int | None], torch.Tensor] = {}
        self.calls, self.groups = 0, [0]
        for end in np.cumsum(lengths).tolist():
            if end - self.groups[-1] >= GROUP_TOKENS or end in (self.lead, self.tokens):
                self.groups.append(end)

    def rows(self, whole: bool) -> list[tuple[int, int]]:
        """The pass's queries, [start, end) by [start, end): by whole pieces, or as many as a mask has room for."""
        step = max(16, MASK_CELLS // (self.past + self.tokens))
        stops = self.groups if whole else [*range(0, self.tokens, step), self.tokens]
        return list(itertools.pairwise(stops))

    def keys(self, start: int, end: int) -> tuple[int, slice, slice]:
        """Of queries [start, end), among the keys: what all see, what some see besides, and their own pieces."""
        near, top = int(self.cut[start:end].min()), int(self.cut[start:end].max())
        return near, slice(near, top), slice(self.past + int(self.begin[start]), self.past + end)

    def mask(self, start: int, end: int, window: int | None = None) -> torch.Tensor:
        """What queries [start, end) see of `keys`' two slices (of the whole trunk and tails, where there is a window):
        bool (end - start, keys)."""
        if (start, end, window) not in self.masks:
            _, some, own = self.keys(start, end)
            trunk = torch.arange(0 if window else some.start, some.stop, device=self.device)[None]
            cut, begin = (torch.from_numpy(x).to(self.device) for x in (self.cut, self.begin))
            tails, position = slice(own.start - self.past, end), self.position[start:end, None]
            same = begin[None, tails] == begin[start:end, None]
            seen = torch.cat(
                [trunk < cut[start:end, None], same & (self.position[None, tails] <= position)], 1
            )
            if window:
                seen &= torch.cat([trunk, self.position[None, tails]], 1) > position - window
            self.masks[start, end, window] = seen
        return self.masks[start, end, window]


_layout: ContextVar[Layout | None] = ContextVar("layout", default=None)


@contextmanager
def laid_out(model: Any, layout: Layout) -> Iterator[None]:
    """Run the model's forward passes inside with this module's attention.

    Raises:
        Unsupported: the model did not call it once for a layer, or called it with features it does not know.
    """
    text = model.config.get_text_config()
    other = set(getattr(text, "layer_types", None) or ()) - LAYERS
    if other:  # chunked attention past its chunk would pass a short self-check
        raise Unsupported(f"it has layers of type {', '.join(sorted(other))}")
    configs = list({id(c): c for c in (model.config, text)}.values())
    before = [config._attn_implementation_internal for config in configs]
    token = _layout.set(layout)
    try:
        for config in configs:
            config._attn_implementation_internal = NAME
        with few_tokens(layout.tokens, layout.device):
            yield
    finally:
        _layout.reset(token)
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation_internal = name
    if layout.calls != text.num_hidden_layers:
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
    if (
        layout is None
        or odd
        or attention_mask is not None
        or key.shape[2] != layout.past + query.shape[2]
    ):
        raise Unsupported(f"its attention uses {', '.join(odd) or 'keys of its own'}")
    layout.calls += 1
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    window = sliding_window if sliding_window and sliding_window <= layout.furthest else None
    split = (
        window is None and query.is_cpu and query.shape[2] > 1 and key.shape[-1] == value.shape[-1]
    )
    parts = []
    for start, end in layout.rows(split):
        near, some, own = layout.keys(start, end)
        piece, pairs = (
            query[:, :, start:end],
            ((x[:, :, :near], x[:, :, some], x[:, :, own]) for x in (key, value)),
        )
        if split:
            parts.append(
                _split(
                    piece, *pairs, scale, None if end == layout.lead else layout.mask(start, end)
                )
            )
            continue
        (far, *rest), (far_value, *rest_value) = pairs
        seen = layout.mask(
            start, end, window or layout.furthest + 1
        )  # a window past everything hides nothing
        seen = seen.repeat(query.shape[1] // key.shape[1], 1)[None, None]
        keys, values = torch.cat([far, *rest], 2), torch.cat([far_value, *rest_value], 2)
        out = scaled_dot_product_attention(
            _fold(piece, key.shape[1]), keys, values, attn_mask=seen, scale=scale
        )
        parts.append(out.reshape(*piece.shape[:3], -1))
    return (parts[0] if len(parts) == 1 else torch.cat(parts, 2)).transpose(1, 2), None


def _fold(query: torch.Tensor, heads: int) -> torch.Tensor:
    """(1, H, q, d) -> (1, heads, H / heads * q, d)."""
    return query.reshape(1, heads, -1, query.shape[-1])


_Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _split(
    query: torch.Tensor, keys: _Parts, values: _Parts, scale: float, mask: torch.Tensor | None
) -> torch.Tensor:
    """What every query sees, without a mask; the rest causally (None) or under `mask`; joined by their log-sum-exp.

    A mask over all keys would cost a quarter more, and a chunk behind the first would be a whole rectangle.
    """
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    heads, groups = keys[0].shape[1], query.shape[1] // keys[0].shape[1]
    folded = _fold(query, heads)
    if mask is None:
        key, value = (x[2].repeat_interleave(groups, 1) for x in (keys, values))
        out, total = kernel(query, key, value, 0.0, True, scale=scale)
    else:
        hidden = (
            torch.zeros_like(mask, dtype=query.dtype)
            .masked_fill_(~mask, float("-inf"))
            .repeat(groups, 1)
        )
        key, value = torch.cat(keys[1:], 2), torch.cat(values[1:], 2)
        out, total = kernel(
            folded, key, value, 0.0, False, attn_mask=hidden[None, None], scale=scale
        )
    out, total = out.reshape(query.shape), total.reshape(query.shape[:3])
    if keys[0].shape[2] == 0:
        return out
    far, far_total = kernel(folded, keys[0], values[0], 0.0, False, scale=scale)
    share = torch.sigmoid(far_total.reshape(total.shape) - total).unsqueeze(-1).to(out.dtype)
    return torch.lerp(out, far.reshape(query.shape), share)


AttentionInterface.register(NAME, attend)
