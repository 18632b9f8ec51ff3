"""Decoding steps that a card replays without waiting for Python (CUDA graphs).

A step of a 7B model launches some 500 kernels, and in Python that takes longer than they run. A
graph is a recorded step: it does the same operations on the same memory each time. So the cache
does not grow (`DecodeBatch` allocates it with room at the end), attention goes over all of it with
the free columns masked, and the column to write is a number on the card.
"""

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from kit.backends.hf_batch import DecodeBatch, GrowingLayer, few_tokens
from kit.core.memory import is_out_of_memory

GRAPH_ROOM_TOKENS = 128  # steps that one recording serves; recording takes as long as a few steps
LEAST_STEPS = 8  # fewer are not worth a recording


class FixedLayer(DynamicLayer):
    """The whole buffers of a layer, (B, H, W, D); one column is written at a time."""

    def __init__(self, layer: GrowingLayer, column: torch.Tensor) -> None:
        super().__init__()
        self.buffers = layer.buffers
        self.column = column
        self.is_initialized = True

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write states (B, H, 1, D) into the column; returns all keys and values, free ones too."""
        keys, values = self.buffers
        return (
            keys.index_copy_(2, self.column, key_states),
            values.index_copy_(2, self.column, value_states),
        )


class FixedStep:
    """A batch's step as a graph: recorded once on a card, computed each time on a CPU.

    Serves until the batch gets other buffers. Rows may come and go in between: their starts and
    their states change in place.
    """

    def __init__(self, model: Any, batch: DecodeBatch) -> None:
        self.model = model
        self.starts = batch.starts
        self.column = torch.tensor([batch.columns], device=batch.starts.device)
        self.ids = torch.zeros_like(batch.starts)
        self.layers: list[GrowingLayer] = batch.cache.layers
        self.buffer = self.layers[0].buffers[0]
        self.cache = DynamicCache()
        self.cache.layers = [FixedLayer(layer, self.column) for layer in self.layers]
        self.logits: Any = None  # (B, V); a replay overwrites them
        self.graph: Any = None
        self.steps = 0

    def serves(self, batch: DecodeBatch) -> bool:
        """Whether the batch still has the memory that this step reads and writes."""
        return self.starts is batch.starts and self.buffer is batch.cache.layers[0].buffers[0]

    def run(self, batch: DecodeBatch, tokens: list[int]) -> None:
        """Append one token to every row of the batch and compute the logits after it."""
        self.ids.copy_(torch.tensor(tokens)[:, None])
        if self.graph is None and self.steps and self.ids.is_cuda:
            # The first step was computed: it loaded the kernels. Recording computes nothing.
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self._compute()
        if self.graph is None:
            self._compute()
        else:
            self.graph.replay()
        self.steps += 1
        batch.columns += 1
        batch.logits = self.logits
        for layer in self.layers:
            layer.show(batch.columns)

    def _compute(self) -> None:
        columns = torch.arange(self.buffer.shape[2], device=self.ids.device)[None]
        seen = (columns >= self.starts) & (columns <= self.column)
        with few_tokens(self.ids.numel(), self.ids.device):
            output = self.model(
                input_ids=self.ids,
                attention_mask=seen[:, None, None],
                position_ids=(self.column - self.starts).clamp(min=0),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self.logits = output.logits[:, -1]
        self.column += 1


class GraphDecoder:
    """Steps of one batch after another: replayed where that pays, else computed.

    Args:
        notes: gets a sentence where the model cannot be recorded; every step is computed then.
    """

    def __init__(self, model: Any, notes: list[str]) -> None:
        self.model = model
        self.notes = notes
        self.fixed: FixedStep | None = None
        self.works = getattr(model, "_supports_attention_backend", False)

    def drop(self) -> None:
        """Forget the recording, which holds its batch's cache: before another takes its place."""
        self.fixed = None

    def step(self, batch: DecodeBatch, tokens: list[int]) -> None:
        """As `DecodeBatch.step`."""
        if self.fixed is not None and not self.fixed.serves(batch):
            self.fixed = None
        free = batch.free_columns or 0
        if self.fixed is None and self.works and free >= LEAST_STEPS:
            self.fixed = FixedStep(self.model, batch)
        if self.fixed is None or not free:
            batch.step(self.model, tokens)
            return
        try:
            self.fixed.run(batch, tokens)
        except RuntimeError as error:
            # A step that asks the card for a value cannot be recorded.
            if is_out_of_memory(error) or "captur" not in str(error):
                raise
            self.works = False
            self.fixed = None
            self.notes.append("This model's steps cannot be recorded as CUDA graphs.")
            batch.step(self.model, tokens)
