"""A PEFT adapter as a GGUF LoRA, which llama.cpp loads beside the base's GGUF without a merge.

The base's own header gives names and shapes, so an adapter of another base is refused here. Only
plain LoRA on linear layers is converted: no DoRA, no saved modules, no layers with an alpha of
their own.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kit.core.errors import KitError

# Architectures whose GGUF has the rows of query and key in another order: llama.cpp rotates
# neighbours where transformers rotates halves.
PERMUTED = {"llama", "llama-embed", "smollm3", "arcee", "granite", "granitemoe", "minicpm", "olmo"}
# Architectures whose GGUF has weights reordered or scaled in ways that are not undone here.
OTHER_WEIGHTS = {"qwen3next", "qwen35", "qwen35moe", "falcon-h1", "granitehybrid", "mistral3"}
UNSUPPORTED = (
    "use_dora",
    "use_rslora",
    "lora_bias",
    "fan_in_fan_out",
    "alpha_pattern",
    "modules_to_save",
)


def convert(adapter: Path, base: Path, out: Path) -> Path:
    """Write an adapter as a GGUF LoRA of a base.

    Args:
        adapter: a PEFT folder.
        base: the model's GGUF, in any quantization.
        out: the file; it appears when it is complete.

    Returns:
        `out`.

    Raises:
        KitError: an adapter of another base, of a kind that llama.cpp does not have, or no room.
    """
    import gguf

    settings = json.loads((adapter / "adapter_config.json").read_bytes())
    unsupported = [key for key in UNSUPPORTED if settings.get(key)]
    if settings["peft_type"] != "LORA" or unsupported:
        raise KitError(
            f"llama.cpp loads plain LoRA only; {adapter} is {settings['peft_type']} with "
            f"{', '.join(unsupported) or 'nothing else'}.",
            "Evaluate it with eval.backend=hf, or export it with --to merged.",
        )
    reader = gguf.GGUFReader(base)
    architecture = _field(reader, "general.architecture")
    if architecture in OTHER_WEIGHTS:
        raise KitError(
            f"{base} is of the architecture {architecture}, whose GGUF has other weights than the "
            "model that was trained: an adapter beside it would be wrong.",
            "Evaluate it with eval.backend=hf, or export it with --to merged or gguf.",
        )
    part = out.with_suffix(".part")
    try:
        writer = gguf.GGUFWriter(part, architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, settings["lora_alpha"])
        for name, tensor in _tensors(adapter, reader, architecture):
            writer.add_tensor(name, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        part.rename(out)
    except OSError as error:
        raise KitError(f"{out} cannot be written: {error}", "Free some space.") from None
    return out


def _tensors(adapter: Path, reader: Any, architecture: str) -> Iterator[tuple[str, np.ndarray]]:
    """A PEFT folder's tensors as llama.cpp has them, by name.

    To a weight W it adds the product of W.lora_b (out, rank), rows in the GGUF's order, and
    W.lora_a (rank, in).

    Raises:
        KitError: the base whose GGUF is read has no such layer.
    """
    import gguf
    from safetensors.torch import load_file

    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    blocks = _field(reader, f"{architecture}.block_count")
    names = gguf.get_tensor_name_map(numbers[architecture], blocks)
    shapes = {tensor.name: tuple(map(int, tensor.shape)) for tensor in reader.tensors}
    heads = {}  # of the layers whose rows are permuted
    if architecture in PERMUTED:
        heads["attn_q"] = _field(reader, f"{architecture}.attention.head_count")
        heads["attn_k"] = _field(reader, f"{architecture}.attention.head_count_kv")
    weights = load_file(adapter / "adapter_model.safetensors")
    for key in sorted(key for key in weights if key.endswith(".lora_A.weight")):
        module = key.removesuffix(".lora_A.weight")
        a = weights[key].float().numpy()
        b = weights[f"{module}.lora_B.weight"].float().numpy()
        layer = module.removeprefix("base_model.model.").replace("language_model.", "")
        name = f"{names.get_name(layer)}.weight"
        shape = (a.shape[1], b.shape[0])
        if shapes.get(name) != shape:
            raise KitError(
                f"{adapter} is of another base than the GGUF: its {layer} is {shape}, there it is "
                f"{shapes.get(name, 'absent')}.",
                "Name the GGUF of the model that it was trained on.",
            )
        kind = name.split(".")[-2]
        if kind in heads:
            rows = b.reshape(heads[kind], 2, -1, b.shape[1])
            b = rows.swapaxes(1, 2).reshape(b.shape)
        yield f"{name}.lora_a", a
        yield f"{name}.lora_b", b


def _field(reader: Any, key: str) -> Any:
    return reader.get_field(key).contents()
