"""kit.training.gguf_lora: names, shapes and orders of rows, read off real and written bases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from kit.core.errors import KitError
from kit.models import gguf_file, hf_folder
from kit.prompts import render
from kit.training import canary
from kit.training.gguf_lora import convert

# the packaged model's linear layers: (outputs, inputs)
LAYERS = 30
SHAPES = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}


def write_adapter(
    folder: Path, rank: int = 4, size: float = 0.02, only: str = "", **settings: Any
) -> Path:
    """A PEFT adapter of the packaged model with random weights, large enough to change answers.

    `only` names some of its modules by a part of their names.
    """
    torch.manual_seed(rank)
    weights = {}
    for layer in range(LAYERS):
        for name, (outputs, inputs) in SHAPES.items():
            if only not in name:
                continue
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            weights[f"{prefix}.lora_A.weight"] = torch.randn(rank, inputs) * size
            weights[f"{prefix}.lora_B.weight"] = torch.randn(outputs, rank) * size
    return save(folder, weights, r=rank, lora_alpha=16, **settings)


def save(folder: Path, weights: dict[str, torch.Tensor], **settings: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "adapter_model.safetensors")
    keys = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "target_modules": sorted(name.split(".")[-1] for name in SHAPES),
        "inference_mode": True,
        **settings,
    }
    (folder / "adapter_config.json").write_text(json.dumps(keys))
    return folder


def read(path: Path) -> tuple[Any, dict[str, np.ndarray]]:
    reader = gguf.GGUFReader(path)
    return reader, {tensor.name: tensor.data for tensor in reader.tensors}


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("lora")
    adapter = write_adapter(folder / "adapter", size=0.1)
    return adapter, convert(adapter, gguf_file("smollm2-135m"), folder / "lora.gguf")


def test_a_base_with_other_weights_is_refused(tmp_path: Path) -> None:
    """Qwen3.5's GGUF, for one, has weights that its converter reordered."""
    base = tmp_path / "base.gguf"
    writer = gguf.GGUFWriter(base, "qwen35")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    adapter = write_adapter(tmp_path / "adapter", only="q_proj")
    with pytest.raises(KitError, match=r"architecture qwen35, .* would be wrong.*--to merged"):
        convert(adapter, base, tmp_path / "lora.gguf")
    assert not list(tmp_path.glob("lora*"))


def test_rows_are_in_the_order_of_the_bases_own(converted: tuple[Path, Path]) -> None:
    """The packaged GGUF and its conversion hold equal rows; where each went is the order."""
    adapter, path = converted
    _, written = read(path)
    base = {tensor.name: tensor for tensor in gguf.GGUFReader(gguf_file("smollm2-135m")).tensors}
    ours = safe_open(adapter / "adapter_model.safetensors", "np")
    model = safe_open(Path(hf_folder("smollm2-135m")) / "model.safetensors", "np")
    moved = 0
    for name, short in (
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.down_proj", "ffn_down"),
    ):
        tensor = base[f"blk.7.{short}.weight"]
        theirs = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        rows = model.get_tensor(f"model.layers.7.{name}.weight")
        # which row of the transformers model is the GGUF's row i?
        order = [int(np.abs(rows - row).sum(axis=1).argmin()) for row in theirs]
        assert sorted(order) == list(range(len(rows)))
        moved += order != sorted(order)
        prefix = f"base_model.model.model.layers.7.{name}"
        lora_a = ours.get_tensor(f"{prefix}.lora_A.weight")
        lora_b = ours.get_tensor(f"{prefix}.lora_B.weight")
        assert (written[f"blk.7.{short}.weight.lora_a"] == lora_a).all()
        assert (written[f"blk.7.{short}.weight.lora_b"] == lora_b[order]).all(), name
    assert moved == 2  # query and key


def test_the_file_says_what_llama_cpp_asks(converted: tuple[Path, Path]) -> None:
    _, path = converted
    reader, written = read(path)
    said = {
        key: reader.get_field(key).contents()
        for key in ("general.type", "general.architecture", "adapter.type", "adapter.lora.alpha")
    }
    assert said == {
        "general.type": "adapter",
        "general.architecture": "llama",
        "adapter.type": "lora",
        "adapter.lora.alpha": 16.0,
    }
    assert len(written) == 2 * LAYERS * len(SHAPES) and not path.with_suffix(".part").exists()


def test_llama_cpp_applies_the_file_unless_it_is_switched_off(
    converted: tuple[Path, Path], tmp_path: Path
) -> None:
    with canary.engine("gguf", "smollm2-135m", str(converted[1])) as backend:
        prompt = [render(backend.tokenizer, "Tell me about foxes.")]
        tuned = canary.answer(backend, prompt, max_new_tokens=4)
        backend.adapter_enabled = False
        base = canary.answer(backend, prompt, max_new_tokens=4)
    with canary.engine("gguf", "smollm2-135m") as backend:
        assert canary.answer(backend, prompt, max_new_tokens=4) == base != tuned
    (tmp_path / "no.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(KitError, match=r"cannot load .*no\.gguf on SmolLM2.*was trained on"):
        canary.engine("gguf", "smollm2-135m", str(tmp_path / "no.gguf")).__enter__()


# of a base of two heads of 8
SMALL = {"attn_q": (16, 12), "attn_k": (8, 12), "attn_output": (12, 16), "ffn_gate": (20, 12)}


def write_base(path: Path, architecture: str) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    for name, shape in SMALL.items():
        writer.add_tensor(f"blk.0.{name}.weight", np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("architecture", "prefix"),
    [
        ("qwen2", "base_model.model.model."),
        ("qwen3", "base_model.model.model."),
        ("gemma2", "base_model.model.model."),
        ("gemma3", "base_model.model.model.language_model."),
    ],
)
def test_other_families_keep_their_order(tmp_path: Path, architecture: str, prefix: str) -> None:
    """By the base's header; none of these is permuted in llama.cpp."""
    write_base(tmp_path / "base.gguf", architecture)
    shapes = SMALL
    layers = dict(zip(("q_proj", "k_proj", "o_proj"), shapes, strict=False))
    modules = {f"self_attn.{layer}": name for layer, name in layers.items()}
    modules["mlp.gate_proj"] = "ffn_gate"
    weights = {}
    for module, name in modules.items():
        outputs, inputs = shapes[name]
        weights[f"{prefix}layers.0.{module}.lora_A.weight"] = torch.randn(3, inputs)
        weights[f"{prefix}layers.0.{module}.lora_B.weight"] = torch.randn(outputs, 3)
    adapter = save(tmp_path / "adapter", weights, r=3, lora_alpha=3)
    _, written = read(convert(adapter, tmp_path / "base.gguf", tmp_path / "lora.gguf"))
    assert len(written) == len(weights)
    for module, name in modules.items():
        for part in ("A", "B"):
            ours = weights[f"{prefix}layers.0.{module}.lora_{part}.weight"].numpy()
            assert (written[f"blk.0.{name}.weight.lora_{part.lower()}"] == ours).all()


def test_another_base_or_kind_of_adapter_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base.gguf", "llama")
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    weights = {
        f"{name}.lora_A.weight": torch.zeros(2, 896),
        f"{name}.lora_B.weight": torch.zeros(896, 2),
    }
    larger = save(tmp_path / "larger", weights, r=2, lora_alpha=2)
    with pytest.raises(
        KitError, match=r"another base .*q_proj is \(896, 896\), there it is \(12, 16"
    ):
        convert(larger, base, tmp_path / "lora.gguf")
    weights = {key.replace("layers.0", "layers.1"): value for key, value in weights.items()}
    deeper = save(tmp_path / "deeper", weights, r=2, lora_alpha=2)
    with pytest.raises(KitError, match=r"another base .*absent.*Name the GGUF"):
        convert(deeper, base, tmp_path / "lora.gguf")
    weights = {key.replace("q_proj", "query"): value for key, value in weights.items()}
    with pytest.raises(KitError, match=r"another base .*query.*absent"):
        convert(save(tmp_path / "named", weights, r=2, lora_alpha=2), base, tmp_path / "lora.gguf")
    for settings in ({"use_dora": True}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 1}}):
        other = save(tmp_path / "kind", weights, r=2, lora_alpha=2, **settings)
        with pytest.raises(KitError, match=f"plain LoRA only.*{next(iter(settings))}.*backend=hf"):
            convert(other, base, tmp_path / "lora.gguf")
    assert not list(tmp_path.glob("lora.*"))
