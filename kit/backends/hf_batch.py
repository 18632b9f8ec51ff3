"""Rows that decode together on a transformers model: prefill, assemble, step and draw.

Rows are padded on the left and end at the same column of the cache, so rows of any length can join
a running batch: in the place of a finished row, or in a new batch. Knows token ids and tensors
only: what is generated, and for whom, is in hf_generate.py. Serves every stage that generates
(sections 3.1, 3.3).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from kit.core.config import Sampling

ROOM_TOKENS = 64  # free columns that a growing cache gets at a time
CHUNK_TOKENS = 4096  # tokens of one prefill pass: bounds its activations
SMALL_WEIGHT = 1 << 16  # numbers: a matrix up to this size is copied faster than it is turned
HEAD_TOKENS = 256  # likeliest tokens looked at before the whole vocabulary is sorted

_linear = functional.linear


class GrowingLayer(DynamicLayer):
    """One layer's keys and values (B, H, T, D), as views of buffers with room at the end.

    transformers' own layer copies everything at every token; this one once in `ROOM_TOKENS`.
    """

    room_tokens = ROOM_TOKENS
    buffers: tuple[torch.Tensor, ...] = ()

    def reserve(
        self, rows: int, columns: int, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> None:
        """Allocate zeros (rows, H, columns + room, D), with H, D and dtype of these states."""
        self.lazy_initialization(key_states, value_states)
        buffers = []
        for states in (key_states, value_states):
            heads, _, size = states.shape[1:]
            buffers.append(states.new_zeros(rows, heads, columns + self.room_tokens, size))
        self.buffers = tuple(buffers)
        self.show(columns)

    def show(self, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Make the first columns of the buffers the keys and values, and return them."""
        self.keys, self.values = (buffer.narrow(2, 0, columns) for buffer in self.buffers)
        return self.keys, self.values

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new states (B, H, t, D) after the old ones; returns all keys and values so far."""
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        if not self.buffers or end > self.buffers[0].shape[2]:
            old: tuple[Any, ...] = (self.keys, self.values) if start else ()
            self.reserve(len(key_states), end, key_states, value_states)
            for buffer, states in zip(self.buffers, old, strict=False):
                buffer.narrow(2, 0, start).copy_(states)
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer.narrow(2, start, end - start).copy_(states)
        return self.show(end)


@dataclass
class DecodeBatch:
    """B rows whose cache is `columns` tokens wide."""

    cache: Any  # transformers' DynamicCache
    starts: torch.Tensor  # (B, 1), the column of a row's first token; before it is padding
    columns: int = 0
    logits: Any = None  # tensor (B, V), after each row; set by prefill and step

    def __post_init__(self) -> None:
        self.is_padded = bool(self.starts.any())

    def step(self, model: Any, tokens: Sequence[int]) -> None:
        """Append one token to every row and compute the logits after it."""
        ids = torch.tensor(tokens, device=model.device)
        self.forward(model, ids[:, None])

    def forward(self, model: Any, ids: torch.Tensor) -> None:
        """Append ids (B, t) and compute the logits after the last of them."""
        width = self.columns + ids.shape[1]
        column = torch.arange(width, device=ids.device)[None]
        position_ids = (column - self.starts).clamp(min=0)
        seen = column >= self.starts
        mask: torch.Tensor | None = seen
        takes_any_mask = getattr(model, "_supports_attention_backend", False)
        is_growing = isinstance(self.cache.layers[0], GrowingLayer)
        if ids.shape[1] == 1 and takes_any_mask and is_growing:
            # transformers would make the same mask, but wait for the card at every step.
            mask = seen[:, None, None] if self.is_padded else None
        with few_tokens(ids.numel(), ids.device):
            output = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=position_ids[:, self.columns :],
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self.columns = width
        self.logits = output.logits[:, -1]

    @property
    def free_columns(self) -> int | None:
        """Steps until the whole cache must be copied to a larger place; None: it has no buffers."""
        layer = self.cache.layers[0]
        if not isinstance(layer, GrowingLayer):
            return None
        return layer.buffers[0].shape[2] - self.columns

    def vacate(self, places: Sequence[int]) -> None:
        """Empty places. Each goes on with tokens that nobody reads and that see no older ones."""
        self.starts[list(places)] = self.columns
        self.is_padded = True

    def put(self, places: Sequence[int], part: "Part") -> None:
        """Write rows, none of them longer than `columns`, into empty places."""
        for layer, other in zip(self.cache.layers, part.batch.cache.layers, strict=True):
            _write(layer, places, other, part)
        self.starts[list(places)] = self.columns - part.lengths
        self.is_padded = True


class Part(NamedTuple):
    """Rows to take from a batch; a row may be taken several times."""

    batch: DecodeBatch
    rows: list[int]

    @property
    def lengths(self) -> torch.Tensor:
        """(B, 1), tokens of each row."""
        return self.batch.columns - self.batch.starts[self.rows]


def supports_continuous_batching(model: Any) -> bool:
    """Whether rows can join a running batch: every layer keeps all keys and values."""
    layers = DynamicCache(config=model.config).layers
    return all(type(layer) is DynamicLayer for layer in layers)


def prefill(
    model: Any, prompts: Sequence[Sequence[int]], trunk: Sequence[Any] = (), shared_tokens: int = 0
) -> DecodeBatch:
    """Evaluate prompts (token ids, of any lengths) together, one row each.

    Args:
        trunk: layers of an earlier prompt, for a single prompt that begins like it; not changed.
        shared_tokens: how many of its first tokens are taken from there.
    """
    rows = [torch.tensor(prompt) for prompt in prompts]
    ids = pad_sequence(rows, batch_first=True, padding_side="left").to(model.device)
    lengths = torch.tensor([[len(row)] for row in rows], device=model.device)
    chunk_tokens = ids.shape[1]
    cache: Any = DynamicCache(config=model.config)
    if supports_continuous_batching(model):
        chunk_tokens = CHUNK_TOKENS
        cache.layers = [GrowingLayer() for _ in cache.layers]
    if shared_tokens:
        for layer, old in zip(cache.layers, trunk, strict=True):
            layer.update(old.keys[:, :, :shared_tokens], old.values[:, :, :shared_tokens])
    batch = DecodeBatch(cache, ids.shape[1] - lengths, shared_tokens)
    for chunk in ids[:, shared_tokens:].split(chunk_tokens, 1):
        batch.forward(model, chunk)
    return batch


def assemble(
    parts: Sequence[Part], keep: DecodeBatch | None = None, room_tokens: int = ROOM_TOKENS
) -> DecodeBatch:
    """One batch of the rows of several, in the order given.

    Args:
        parts: what to take. Of models without continuous batching: one part only.
        keep: a batch that is used again and stays unchanged. All others are used up layer by layer,
            so that there are never two whole caches at a time.
        room_tokens: free columns of the new batch.
    """
    batch, rows = parts[0]
    if not isinstance(batch.cache.layers[0], GrowingLayer):
        order: Any = torch.tensor(rows, device=batch.starts.device)
        batch.cache.reorder_cache(order)
        return DecodeBatch(batch.cache, batch.starts[rows], batch.columns)

    lengths = torch.cat([part.lengths for part in parts])
    columns = int(lengths.max())
    cache = DynamicCache()
    for index, old in enumerate(batch.cache.layers):
        layer = GrowingLayer()
        layer.room_tokens = room_tokens
        layer.reserve(len(lengths), columns, old.keys, old.values)
        begin = 0
        for part in parts:
            end = begin + len(part.rows)
            _write(layer, range(begin, end), part.batch.cache.layers[index], part)
            begin = end
        for part in parts:
            if part.batch is not keep:
                part.batch.cache.layers[index] = None
        cache.layers.append(layer)
    return DecodeBatch(cache, columns - lengths, columns)


def _write(layer: Any, places: Sequence[int], other: Any, part: Part) -> None:
    """Copy rows' keys and values of another layer, so that they end at the same column."""
    for own, source in ((layer.keys, other.keys), (layer.values, other.values)):
        width = min(own.shape[2], source.shape[2])
        for place, row in zip(places, part.rows, strict=True):
            own[place, :, own.shape[2] - width :] = source[row, :, source.shape[2] - width :]


def _transposed_linear(
    inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """A linear layer of inputs (..., I), computed as (W x^T)^T if the weights are not small."""
    if weight.numel() < SMALL_WEIGHT:
        return _linear(inputs, weight, bias)
    flat = inputs.reshape(-1, inputs.shape[-1])
    outputs = torch.mm(weight, flat.t()).t().contiguous()
    if bias is not None:
        outputs += bias
    return outputs.view(*inputs.shape[:-1], weight.shape[0])


@contextmanager
def few_tokens(tokens: int, device: torch.device) -> Iterator[None]:
    """For a forward pass of 4 to 64 tokens on a CPU: linear layers as (W x^T)^T.

    MKL's x W^T copies W at every call, which takes two to three times as long at 16 to 48 tokens
    (torch 2.13). A TorchFunctionMode would do the same, and cost as much as small layers do.
    """
    if device.type == "cpu" and 4 <= tokens <= 64:
        functional.linear = _transposed_linear  # type: ignore[assignment]
    try:
        yield
    finally:
        functional.linear = _linear


def draw(
    logits: torch.Tensor,
    sampling: Sampling,
    uniforms: Sequence[float],
    seen: torch.Tensor | None = None,
) -> list[int]:
    """Draw one token id for each row.

    Args:
        logits: (B, V); left unchanged.
        uniforms: B numbers in [0, 1), one for each row.
        seen: (B, V) bool, tokens of prompt and sample; None without a repetition penalty.
    """
    logits = logits.float()
    if seen is not None:
        penalty = sampling.repetition_penalty
        penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
        logits = torch.where(seen, penalized, logits)
    if sampling.temperature == 0:
        return logits.argmax(-1).tolist()

    # A number in [0, 1) picks the token in whose stretch of the cumulative weights it falls.
    weights = torch.softmax(logits / sampling.temperature, -1)
    ids = None
    if sampling.top_k or sampling.top_p < 1 or sampling.min_p:
        weights, ids = _filtered(weights, sampling)
    cumulative = weights.double().cumsum(-1)
    uniform = torch.tensor(uniforms, dtype=torch.float64, device=logits.device)
    choice = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
    if ids is not None:
        choice = ids.gather(-1, choice)
    return choice[:, 0].tolist()


def _filtered(weights: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply top-k, top-p and min-p.

    Returns:
        Weights (B, K), likeliest first, zero where a filter drops the token; and token ids (B, K).
    """
    # Rounded sums may pass 1 before the last token, so a top_p of 1 must be out of their reach.
    top_p = sampling.top_p if sampling.top_p < 1 else 2.0
    top, ids = weights.topk(min(sampling.top_k or HEAD_TOKENS, weights.shape[-1]))
    if sampling.top_k:
        top = top / top.sum(-1, keepdim=True)
    else:
        # The likeliest tokens serve, if the filters drop all others in every row.
        by_top_p = top.sum(-1) >= top_p
        by_min_p = top[:, -1] < sampling.min_p * top[:, 0]
        if not (by_top_p | by_min_p).all():
            top, ids = weights.sort(-1, descending=True)
    dropped = (top.cumsum(-1) - top >= top_p) | (top < sampling.min_p * top[:, :1])
    return top.masked_fill(dropped, 0), ids
