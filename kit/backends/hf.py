"""A transformers model in this process, in bf16, fp32, int8 or NF4, with or without an adapter.

One card or a CPU. Generation (sections 3.1 and 3.3 of the paper) is in hf_generate.py, judging
(section 3.2) in hf_session.py; both load torch only when they are used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from kit.backends.base import Generation, Request, ScoringSession, slug
from kit.core.config import ModelConfig
from kit.core.memory import FREE_RATIO, limit_bytes, release
from kit.core.threads import watch
from kit.models import load_model, load_tokenizer, lora_layers

if TYPE_CHECKING:
    import torch

    from kit.backends.hf_graphs import GraphDecoder

MOST_LOST_RATIO = 0.05  # of an adapter's update, by its norm


class HfBackend:
    """A loaded model.

    Args:
        engine: names the model, its dtype and the limits.
        adapter: a PEFT adapter's folder, applied to the model.

    Raises:
        KitError: the model or the adapter does not load; see kit.models.
    """

    cache_error = 0.0

    def __init__(self, engine: ModelConfig, adapter: str | None = None) -> None:
        self.engine = engine
        self.name = slug(engine.model)
        self.notes: list[str] = []
        self.cache_kind: str | None = None  # set by the first judging session, see hf_session
        self.tokenizer = load_tokenizer(engine.model)
        on_cpu = engine.n_gpu_layers == 0
        self.model: Any = load_model(engine.model, engine.dtype, adapter, on_cpu=on_cpu)
        if adapter is not None:
            lean_adapter(self.model)
        watch(self.model, engine.n_threads)
        self.device: torch.device = self.model.device
        self.max_rows = engine.rows(on_card=self.device.type == "cuda")
        # that a batch's cache may hold; set once memory ran out
        self.most_tokens: int | None = None
        text_config = self.model.config.get_text_config()
        trained_tokens = getattr(text_config, "max_position_embeddings", None) or 4096
        self.context_tokens = min(engine.context_tokens or trained_tokens, trained_tokens)
        rope = getattr(text_config, "rope_parameters", None) or {}
        if rope.get("rope_type") == "longrope":
            # It rotates all positions of a pass otherwise if one is beyond these: what is cached or
            # side by side would not fit together.
            short_tokens = rope["original_max_position_embeddings"]
            if short_tokens < self.context_tokens:
                self.context_tokens = short_tokens
                self.notes.append(f"{engine.model}: LongRoPE, at most {short_tokens} tokens here.")

    def generate(self, requests: Sequence[Request]) -> Iterator[Generation]:
        """Yield each request's samples as they finish; prompts without room come first, as errors.

        Running out of memory halves the tokens that rows may hold together, and a note says so.
        """
        from kit.backends.hf_generate import Scheduler

        return Scheduler(self, requests).run()

    def merge_adapter(self) -> None:
        """Add the adapter to the weights, which halves the operations of a step, if little is lost.

        In fp32, logits change by rounding. In 16 bits an update may round away: then, and beside
        weights of 4 or 8 bits, the adapter stays apart.
        """
        if getattr(self.model, "hf_quantizer", None) is not None:
            return
        lost_ratio = merging_loss(self.model)
        if lost_ratio > MOST_LOST_RATIO:
            note = f"Merging would round {lost_ratio:.0%} of the adapter away: it stays apart."
            self.notes.append(note)
            return
        self.model = self.model.merge_and_unload()
        watch(self.model, self.engine.n_threads)

    def session(self, uncached: bool = False) -> ScoringSession:
        """Open a judging session; uncached=True evaluates every prompt from its first token."""
        from kit.backends.hf_session import open_session

        return open_session(self, uncached)

    def close(self) -> None:
        """Drop the weights, so that the next model has their memory."""
        self.model = None
        release()

    def graphs(self) -> GraphDecoder | None:
        """What replays decoding steps; None: each is computed, as always on a CPU."""
        from kit.backends.hf_graphs import GraphDecoder

        if self.engine.cuda_graphs and self.device.type == "cuda":
            return GraphDecoder(self.model)
        return None

    def cache_tokens(self) -> int:
        """Tokens that a batch's cache may hold: the config's budget, or a share of free memory."""
        from kit.shape import shape_in

        budget_bytes = limit_bytes()[1] * FREE_RATIO
        if self.engine.kv_cache_gib:
            budget_bytes = self.engine.kv_cache_gib * 2**30
        token_bytes = shape_in(self.model.config).cached * self.model.dtype.itemsize
        tokens = int(budget_bytes) // token_bytes
        return min(tokens, self.most_tokens or tokens)


def lean_adapter(model: Any) -> None:
    """Give LoRA layers a forward pass without PEFT's bookkeeping.

    For inference with one adapter that is always on. The numbers are PEFT's; only beside 4-bit
    weights in bf16, it rounds the update once more.
    """
    from torch.nn import functional

    def forward(layer: Any, down: torch.Tensor, up: torch.Tensor, inputs: Any) -> torch.Tensor:
        outputs = layer.base_layer(inputs)
        hidden = functional.linear(inputs.to(down.dtype), down)
        update = functional.linear(hidden, up) * layer.scaling["default"]
        return (outputs + update).to(outputs.dtype)

    for layer in lora_layers(model):
        if hasattr(layer, "parameter_name"):
            continue  # on fused experts, whose forward pass is PEFT's own
        down = layer.lora_A["default"].weight
        up = layer.lora_B["default"].weight
        layer.forward = partial(forward, layer, down, up)


def merging_loss(model: Any) -> float:
    """How much of an adapter's update the weights' precision would round away, by its norm."""
    lost = 0.0
    total = 0.0
    for layer in lora_layers(model):
        is_fused = hasattr(layer, "parameter_name")
        weight = layer.get_param() if is_fused else layer.base_layer.weight
        update = layer.get_delta_weight("default").float()
        merged = (weight.float() + update).to(weight.dtype)
        lost += (merged.float() - weight.float() - update).square().sum().item()
        total += update.square().sum().item()
    return (lost / total) ** 0.5 if total else 0.0
