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
from kit.core.errors import KitError
from kit.core.memory import is_out_of_memory

GRAPH_ROOM_TOKENS = 128  # steps that one recording serves at most
LEAST_STEPS = 16  # recording takes as long as a few computed steps


class LengthAsked(Exception):
    """A model reads the cache's length, which a recording would keep for all later steps."""


class FixedLayer(DynamicLayer):
    """The whole buffers of a layer, (B, H, W, D); one column is written at a time."""

    def __init__(self, layer: GrowingLayer, column: torch.Tensor) -> None:
        super().__init__()
        self.buffers = layer.buffers
        self.column = column
        self.is_initialized = True

    def get_seq_length(self) -> int:
        raise LengthAsked

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

    Serves until the batch has no free column. Rows may come and go in between: their starts and
    their states change in place.
    """

    def __init__(self, model: Any, batch: DecodeBatch) -> None:
        self.model = model
        self.starts = batch.starts
        self.column = torch.tensor([batch.columns], device=batch.starts.device)
        self.ids = torch.zeros_like(batch.starts)
        self.layers: list[GrowingLayer] = batch.cache.layers
        self.width = self.layers[0].buffers[0].shape[2]  # columns, the free ones included
        self.cache = DynamicCache()
        self.cache.layers = [FixedLayer(layer, self.column) for layer in self.layers]
        self.logits: Any = None  # (B, V); a replay overwrites them
        self.graph: Any = None

    def run(self, batch: DecodeBatch, tokens: list[int]) -> None:
        """Append one token to every row of the batch and compute the logits after it."""
        self.ids.copy_(torch.tensor(tokens)[:, None])
        # The first step is computed, which loads the kernels.
        if self.graph is None and self.logits is not None and self.ids.is_cuda:
            self.graph = self._record()
        if self.graph is None:
            self._compute()
        else:
            self.graph.replay()
        batch.columns += 1
        batch.logits = self.logits
        for layer in self.layers:
            layer.show(batch.columns)

    def _record(self) -> Any:
        """A graph of the step; nothing is computed.

        Raises:
            KitError: the model asks the card for a value. What a broken recording leaves behind is
                not to be computed with.
        """
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._compute()
        except RuntimeError as error:
            # Ending a broken recording may fail, too, and hide why it broke.
            for reason in (error, error.__context__):
                if isinstance(reason, RuntimeError) and is_out_of_memory(reason):
                    raise reason from None
            raise KitError(
                f"The steps of this model cannot be recorded as CUDA graphs: {error}",
                "Set student.cuda_graphs=false; rows that are written stay.",
            ) from error
        return graph

    def _compute(self) -> None:
        columns = torch.arange(self.width, device=self.ids.device)[None]
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

    `drop` comes before a batch is assembled anew.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.fixed: FixedStep | None = None
        self.works = can_be_recorded(model)

    def drop(self) -> None:
        """Forget the recording, which holds its batch's cache."""
        self.fixed = None

    def step(self, batch: DecodeBatch, tokens: list[int], most_steps: int) -> None:
        """As `DecodeBatch.step`; at most so many steps of these rows will follow."""
        free = batch.free_columns or 0
        if not free:
            self.drop()  # the cache moves to a larger place
        elif self.fixed is None and self.works and min(free, most_steps) >= LEAST_STEPS:
            self.fixed = FixedStep(self.model, batch)
        if self.fixed is not None:
            try:
                self.fixed.run(batch, tokens)
                return
            except LengthAsked:
                self.works = False
                self.fixed = None
        batch.step(self.model, tokens)


def can_be_recorded(model: Any) -> bool:
    """Whether a step takes any mask and, as far as is known, asks the card for no value.

    LLM.int8() looks for outliers in every layer, and a dynamic RoPE at the length.
    """
    takes_any_mask = getattr(model, "_supports_attention_backend", False)
    in_8_bits = getattr(model, "is_loaded_in_8bit", False)
    rope = str(getattr(model.config.get_text_config(), "rope_parameters", None))
    return takes_any_mask and not in_8_bits and "dynamic" not in rope
