"""kit.training.plan: counts equal a real model's, the longest row fits, refusals name the key."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kit.core.errors import KitError
from kit.core.progress import Progress
from kit.core.run import Run
from kit.training import plan as planning
from kit.training.plan import GIB, RESERVE_BYTES, _shape, check_fit, longest, plan, training_bytes
from tests.test_train import settings, tiny  # noqa: F401  (a fixture)


def test_counts_equal_the_real_models(tiny: str, tmp_path: Path) -> None:  # noqa: F811
    from kit.training.trainer import make_model

    model = make_model(settings(tmp_path, tiny, rank=4))
    shape = _shape(tiny, 4, 4)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert shape.adapter == trainable and shape.linear + shape.other == frozen
    parts = training_bytes(settings(tmp_path, tiny, rank=4), 64, cuda=False)
    assert parts.weights == 4 * frozen and parts.adapter == parts.optimizer == 8 * trainable


def test_the_longest_row_fits_and_one_token_more_does_not(tiny: str, tmp_path: Path) -> None:  # noqa: F811
    config = settings(tmp_path, tiny, dtype="nf4")
    limit = sum(training_bytes(config, 700, True))
    assert longest(config, limit) == 700
    assert longest(config, 1000) == 0


def test_what_does_not_fit_is_refused_with_the_key_to_change(
    tiny: str,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = settings(tmp_path / "r", tiny, gradient_checkpointing=False, max_seq_tokens=1024)
    monkeypatch.setattr(planning, "limit_bytes", lambda: (False, RESERVE_BYTES + int(0.03 * GIB)))
    result = plan(config)
    assert not result["fits"] and "train.gradient_checkpointing=true" in result["change"]
    with Run(config, Progress(quiet=True)) as run:
        with pytest.raises(KitError, match="Training on rows of 1024 tokens needs about") as caught:
            check_fit(config, run, 1024)
        assert "train.gradient_checkpointing=true" in caught.value.hint
        ignoring = config.model_copy(
            update={"train": config.train.model_copy(update={"on_low_memory": "warn"})}
        )
        check_fit(ignoring, run, 1024)
        check_fit(config, run, 8)
    assert "Trying anyway" in (tmp_path / "r" / "run.log").read_text()


def test_times_scale_with_the_rows_of_the_run_in_the_folder(tiny: str, tmp_path: Path) -> None:  # noqa: F811
    config = settings(tmp_path, tiny)
    assert plan(config)["times"] == []
    stages = {
        "teach": {"done": True, "rows_in": 4, "seconds": 10.0},
        "align": {"done": False, "rows_in": 4},
    }
    (tmp_path / "manifest.json").write_text(json.dumps({"stages": stages}))
    source = config.data.train.model_copy(update={"limit": 40})
    larger = config.model_copy(update={"data": config.data.model_copy(update={"train": source})})
    assert plan(larger)["times"] == [{"stage": "teach", "rows": 40, "seconds": 100.0}]


STEP = """
import gc, json, sys
from kit.core import memory
from kit.core.config import resolve
from kit.training.plan import torch, training_bytes
from kit.training.trainer import make_model

tokens, keys = int(sys.argv[1]), json.loads(sys.argv[2])
memory.return_at_once()
memory.reset_peak()
before = memory.peak_bytes()
config = resolve({"student": {"model": "smollm2-135m"}, "train": keys}, "test")
model = make_model(config).train()
# off the mapped file, whose pages are the system's to take back
for parameter in model.parameters():
    parameter.data = parameter.data.clone()
gc.collect()
memory.reset_peak()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
ids = torch.randint(0, 49000, (1, tokens), generator=torch.Generator().manual_seed(0))
model(input_ids=ids, labels=ids)["loss"].backward()
optimizer.step()
estimated = sum(training_bytes(config, tokens, False))
print(json.dumps([memory.peak_bytes() - before, estimated]))
"""


@pytest.mark.parametrize(
    ("tokens", "keys"),
    [
        (512, {}),
        pytest.param(2048, {}, marks=pytest.mark.slow),
        pytest.param(1024, {"logits_bytes": 1 << 24}, marks=pytest.mark.slow),
        pytest.param(
            512, {"gradient_checkpointing": False, "dtype": "fp32"}, marks=pytest.mark.slow
        ),
    ],
)
def test_the_estimate_is_within_a_fifth_of_what_a_step_of_the_packaged_model_takes(
    tokens: int, keys: dict[str, object]
) -> None:
    command = [sys.executable, "-c", STEP, str(tokens), json.dumps(keys)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    )
    measured, estimated = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{tokens} tokens {keys}: measured {measured / GIB:.3f} GiB, "
        f"estimated {estimated / GIB:.3f} GiB"
    )
    assert 0.8 * measured < estimated < 1.2 * measured


def test_where_memory_is_short_freed_blocks_go_back_at_once(
    tiny: str,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called: list[int] = []
    monkeypatch.setattr(planning, "return_at_once", lambda: called.append(1))
    config = settings(tmp_path / "r", tiny)
    without_checkpoints = planning._with(config, gradient_checkpointing=False)
    whole = planning._total(without_checkpoints, 512, False)
    with Run(config, Progress(quiet=True)) as run:
        for room, times in ((whole + 1, 0), (whole - 1, 1)):
            monkeypatch.setattr(
                planning, "limit_bytes", lambda room=room: (False, RESERVE_BYTES + room)
            )
            check_fit(config, run, 512)
            assert len(called) == times


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

    from kit.training.trainer import make_model

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
    torch.cuda.set_per_process_memory_fraction(
        card * GIB / torch.cuda.get_device_properties(0).total_memory
    )
    model = make_model(settings(tmp_path, str(tmp_path), dtype="nf4", logits_bytes=1 << 26)).train()
    ids = torch.randint(5, 1000, (1, tokens), device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        model(input_ids=ids, labels=ids)["loss"].backward()
    assert torch.cuda.max_memory_reserved() <= card * GIB
