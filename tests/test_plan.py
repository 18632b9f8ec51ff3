"""kit.plan: counts equal a real model's, the longest row fits and one token more does not, refusals name the key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kit import memory
from kit.errors import KitError
from kit.plan import GIB, _shape, check_fit, longest, plan, training_bytes
from kit.progress import Progress
from kit.run import Run
from tests.test_train import settings, tiny  # noqa: F401  (a fixture)


def test_counts_equal_the_real_models(tiny: str, tmp_path: Path) -> None:  # noqa: F811
    from kit.train import make_model

    model = make_model(settings(tmp_path, tiny, rank=4))
    shape = _shape(tiny, 4, 4)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert shape["adapter"] == trainable and shape["linear"] + shape["other"] == frozen
    parts = training_bytes(settings(tmp_path, tiny, rank=4), 64, cuda=False)
    assert parts["weights"] == 4 * frozen and parts["adapter"] == parts["optimizer"] == 8 * trainable


def test_the_longest_row_fits_and_one_token_more_does_not(tiny: str, tmp_path: Path) -> None:  # noqa: F811
    config = settings(tmp_path, tiny, dtype="nf4")
    limit = sum(training_bytes(config, 700, True).values())
    assert longest(config, limit) == 700
    assert longest(config, 1000) == 0


def test_what_does_not_fit_is_refused_with_the_key_to_change(
    tiny: str,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = settings(tmp_path / "r", tiny, checkpointing=False, cutoff_tokens=1024)
    monkeypatch.setattr(memory, "limit_bytes", lambda: (False, int(0.03 * GIB)))
    result = plan(config)
    assert not result["fits"] and "train.checkpointing=true" in result["change"]
    with Run(config, Progress(quiet=True)) as run:
        with pytest.raises(KitError, match="Training on rows of 1024 tokens needs about") as caught:
            check_fit(config, run, 1024)
        assert "train.checkpointing=true" in caught.value.hint
        ignoring = config.model_copy(update={"train": config.train.model_copy(update={"overfit": "ignore"})})
        check_fit(ignoring, run, 1024)
        check_fit(config, run, 8)
    assert "Tried all the same" in (tmp_path / "r" / "run.log").read_text()


def test_times_scale_with_the_rows_of_the_run_in_the_folder(tiny: str, tmp_path: Path) -> None:  # noqa: F811
    config = settings(tmp_path, tiny)
    assert plan(config)["times"] == []
    stages = {"teach": {"done": True, "rows_in": 4, "seconds": 10.0}, "align": {"done": False, "rows_in": 4}}
    (tmp_path / "manifest.json").write_text(json.dumps({"stages": stages}))
    source = config.data.train.model_copy(update={"limit": 40})
    larger = config.model_copy(update={"data": config.data.model_copy(update={"train": source})})
    assert plan(larger)["times"] == [{"stage": "teach", "rows": 40, "seconds": 100.0}]


GPU_SHAPES = {  # shape, tokens a row, card
    "7b-24": (3584, 18944, 28, 4, 152064, 32768, 24),
    "7b-12": (3584, 18944, 28, 4, 152064, 8192, 12),
    "1.5b-8": (1536, 8960, 12, 2, 151936, 8192, 8),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", GPU_SHAPES)
def test_a_step_on_random_weights_fits_the_card(name: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    from kit.train import make_model

    hidden, inner, heads, shared_heads, vocabulary, tokens, card = GPU_SHAPES[name]
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=28,
        num_attention_heads=heads,
        num_key_value_heads=shared_heads,
        max_position_embeddings=32768,
        tie_word_embeddings=hidden == 1536,
        dtype="bfloat16",
    )
    with torch.device("cuda"):
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(card * GIB / torch.cuda.get_device_properties(0).total_memory)
    model = make_model(settings(tmp_path, str(tmp_path), dtype="nf4", logits_bytes=1 << 26)).train()
    ids = torch.randint(5, 1000, (1, tokens), device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        model(input_ids=ids, labels=ids)["loss"].backward()
    assert torch.cuda.max_memory_reserved() <= card * GIB
