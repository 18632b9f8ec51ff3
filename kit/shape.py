"""A model's sizes, from its config.json, and what its layers keep for a backward pass.

The weights are counted on a model without memory. What a layer keeps is arithmetic over a dense
decoder with grouped attention and a gated MLP.
"""

from functools import lru_cache
from typing import Any, NamedTuple

from kit.core.bundled import bundled
from kit.core.errors import KitError
from kit.models import FILE_ERRORS, adapted_layers, hf_folder

GIB = 1 << 30
# Of a card whose free memory is not known: CUDA's context, which `mem_get_info` has taken off.
CONTEXT_BYTES = int(0.4 * GIB)
# the allocator's rounding; on a CPU the libraries and their threads
RESERVE_BYTES = int(0.2 * GIB)
# per logit in a slice's backward pass: the fp32 logit, its log-softmax and the gradients of both
LIVE_BYTES = 16
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # a weight, with the scales of double quantization


class ModelShape(NamedTuple):
    """The sizes in a model's config.json; widths are numbers per token."""

    layers: int
    hidden: int
    inner: int  # width of the MLP
    heads: int
    query: int  # width of all query heads
    key: int  # width of all key heads, and of all value heads
    vocabulary: int
    context_tokens: int
    # numbers of weights, which `shape_of` counts
    linear: int = 0  # of the linear layers but the head: those that are quantized
    other: int = 0  # all others: embeddings, head, norms, fused experts
    adapter: int = 0  # of an adapter of rank 1: both sides of every layer that gets one

    @property
    def cached(self) -> int:
        """Numbers that a token puts into the KV cache."""
        return 2 * self.layers * self.key

    def saved_bytes(self, number: int, mask: int, rank: int) -> int:
        """Bytes that one layer keeps for its backward pass, per token.

        Args:
            number: bytes of a number that is computed with.
            mask: bytes of a number of a dropout mask.
            rank: of the adapter.
        """
        # both norms keep their input in fp32
        norms = 2 * 4 * self.hidden
        # the adapters of q, k, v, gate, up and of o, down keep their input after dropout, the mask
        # and what lies between A and B
        adapters = (number + mask) * (5 * self.hidden + self.query + self.inner) + number * 7 * rank
        gated = 3 * number * self.inner  # gate, its SiLU, up
        # q, k, v, the output, and in fp32 the log-sum of every head
        attention = number * (2 * self.query + 2 * self.key) + 4 * self.heads
        return norms + adapters + gated + attention


# Those of the bundled configs.
SHAPES = {name: ModelShape(**sizes) for name, sizes in bundled("shapes").items()}


def card_limit(size_gib: float) -> int:
    """Bytes that an otherwise idle card of that size has for one process."""
    return int(size_gib * GIB) - CONTEXT_BYTES - RESERVE_BYTES


@lru_cache(maxsize=4)
def shape_of(name: str) -> ModelShape:
    """A model's shape, from the table above or its config.json.

    Raises:
        KitError: no such model, one that transformers cannot build, or one with nothing to adapt.
    """
    if name in SHAPES:
        return SHAPES[name]
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(hf_folder(name), trust_remote_code=False)
        return shape_in(config)._replace(**_weights(config))
    except (*FILE_ERRORS, StopIteration) as error:
        reason = str(error).strip().partition("\n")[0]
        raise KitError(
            f"The config of {name} cannot be used: {reason:.300}",
            "It is read from the hub or the model's folder: offline, set student.model=FOLDER.",
        ) from error


def _weights(model_config: Any) -> dict[str, int]:
    """The numbers of weights of a model with this config, by their fields of `ModelShape`."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        # whatever type its file has, which is not computed with
        causal = AutoModelForCausalLM.from_config(model_config, dtype=torch.float32)
    head = causal.get_output_embeddings()
    # what bitsandbytes quantizes: fused experts are none of it
    linear = sum(
        module.weight.numel()
        for module in causal.modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
    )
    other = sum(weight.numel() for weight in causal.parameters()) - linear
    adapted = map(causal.get_submodule, adapted_layers(causal))
    adapter = sum(sum(module.weight.shape) for module in adapted)
    return {"linear": linear, "other": other, "adapter": adapter}


def _largest(text: Any, name: str) -> int:
    """A number of a model's config; the largest where layers have their own (Gemma 3n, 4)."""
    try:
        value = getattr(text, name, None) or 0
    except RuntimeError:
        value = [getattr(layer, name) for layer in text.per_layer_config]
    return max(value) if isinstance(value, list | tuple) else value


def shape_in(model_config: Any) -> ModelShape:
    """The shape that transformers' config of a model describes, its weights not counted.

    Raises:
        KitError: it has no attention.
    """
    text = model_config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    if not heads:
        raise KitError(
            f"{text.model_type} has no attention; "
            "the transformers backend supports only models with it.",
            "Run it as a GGUF or on a server: student.backend=gguf or http.",
            2,
        )
    key_heads = _largest(text, "num_key_value_heads") or heads
    head_width = _largest(text, "head_dim") or text.hidden_size // heads
    return ModelShape(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        inner=_largest(text, "intermediate_size") or 4 * text.hidden_size,
        heads=heads,
        query=heads * head_width,
        key=key_heads * head_width,
        vocabulary=text.vocab_size,
        context_tokens=getattr(text, "max_position_embeddings", None) or 4096,
    )
