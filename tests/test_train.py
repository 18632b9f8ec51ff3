"""kit.training: what is learned, what is refused, and that a killed training resumes unharmed."""

from __future__ import annotations

import gc
import itertools
import json
import math
import os
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    TrainingArguments,
)

from kit.core.bundled import bundled
from kit.core.config import Config, ModelConfig, dump, resolve
from kit.core.errors import KitError
from kit.core.progress import Progress
from kit.core.records import PrefixRow, Problem, TrainRow
from kit.core.run import Run, read_manifest
from kit.core.storage import RowFile
from kit.judging.cut import from_problem, reject
from kit.models import hf_folder, load_tokenizer
from kit.pipeline import train as stage
from kit.prompts import render, solve_text, template_hash
from kit.training import trackers
from kit.training import trainer as training
from kit.training.sft_data import CUT, Example, collate, end_of_turn, order, prepare, read_rows

ROOT = Path(__file__).resolve().parents[1]


def save_student(folder: Path, kind: type[PreTrainedConfig], **sizes: Any) -> str:
    """A two-layer model with random weights and the packaged model's tokenizer; its folder."""
    tokenizer = load_tokenizer("smollm2-135m").inner
    torch.manual_seed(0)
    config = kind(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
        **sizes,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Llama."""
    folder = tmp_path_factory.mktemp("tiny")
    return save_student(folder, LlamaConfig, intermediate_size=64, tie_word_embeddings=True)


def settings(out: Path, model: str, **train) -> Config:
    keys = {
        "dtype": "fp32",
        "batch_size": 4,
        "epochs": 3,
        "learning_rate": 5e-3,
        "save_minutes": 0,
        "dropout": 0.1,
    }
    return resolve(
        {"out": str(out), "student": {"model": model}, "train": {**keys, **train}}, "test"
    )


def rows(count: int = 8) -> list[TrainRow]:
    return [
        TrainRow(
            instruction=bundled("prompts")["instruction"],
            input=f"Ann has {i} pens and buys {i % 3} more. How many has she?",
            output=(
                f"<Begin_of_Prefix>{i} + {i % 3}.{' So it goes.' * (i % 4)}<End_of_Prefix>\n"
                f"\\boxed{{{i + i % 3}}}"
            ),
        )
        for i in range(count)
    ]


def write_rows(out: Path, lines: list[TrainRow]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "train.jsonl").write_text(
        "".join(row.model_dump_json() + "\n" for row in lines), encoding="utf-8"
    )


def run_stage(config: Config, lines: list[TrainRow] | None = None) -> dict:
    write_rows(config.folder, rows() if lines is None else lines)
    with Run(config, Progress(quiet=True)) as run:
        stage.train(run)
        return run.manifest


def logged(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in logged(out)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny: str) -> Config:
    """An uninterrupted training of six steps."""
    config = settings(tmp_path_factory.mktemp("whole") / "r", tiny)
    run_stage(config)
    return config


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory, tiny: str) -> tuple[Config, dict]:
    """One of twelve steps, and its manifest."""
    config = settings(tmp_path_factory.mktemp("learned") / "r", tiny, epochs=6)
    return config, run_stage(config)


@pytest.mark.parametrize("steps", [1, 3])
def test_each_of_few_steps_learns(steps: int, tmp_path: Path, tiny: str) -> None:
    """A warm-up begins at a rate of zero: that step would change nothing."""
    run_stage(settings(tmp_path / "run", tiny, epochs=steps, warmup_ratio=0.4), rows(4))
    rates = [row["learning_rate"] for row in logged(tmp_path / "run")]
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert len(rates) == steps and all(rate > 0 for rate in rates)
    assert all(weight.norm() > 0 for name, weight in saved.items() if "lora_B" in name)


def test_a_mixture_of_experts_trains_with_dropout(tmp_path: Path) -> None:
    """Its experts change with a small step: the gradient check looks at a smaller one."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    model = save_student(tmp_path / "moe", Qwen3MoeConfig, head_dim=8, **experts)
    run_stage(settings(tmp_path / "run", model, dropout=0.05))
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert saved and all("self_attn" in name for name in saved)
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]


def test_the_stage_learns_and_says_what_it_did(learned: tuple[Config, dict], tiny: str) -> None:
    config, manifest = learned
    summary = manifest["stages"]["train"]["summary"]
    assert summary["fixed_batch_after"] < summary["fixed_batch_before"] - 0.1
    assert summary["rows"] == 8 and summary["peak_bytes"] > 0
    saved = load_file(config.folder / "adapter" / "adapter_model.safetensors")
    assert all(weight.norm() > 0 for name, weight in saved.items() if "lora_B" in name)
    log = logged(config.folder)
    assert [row["step"] for row in log] == list(range(1, 13))
    assert {
        "loss",
        "learning_rate",
        "grad_norm",
        "tokens",
        "tokens_per_second",
        "peak_bytes",
        "seconds",
    } <= log[0].keys()
    assert (config.folder / "adapter" / "adapter_model.safetensors").exists()
    assert len(list((config.folder / "checkpoints").iterdir())) <= 2
    assert not list(
        config.folder.rglob("*.bin")
    )  # nothing pickled, in adapter/ and in checkpoints/
    hash_now = template_hash(load_tokenizer(tiny), config.prompts, ModelConfig())
    assert manifest["template_hash"] == hash_now
    again = run_stage(config)  # done before: nothing is trained again
    assert again["stages"]["train"] == manifest["stages"]["train"]


def test_an_evaluation_in_this_process_merges_the_adapter(
    learned: tuple[Config, dict], tiny: str
) -> None:
    """A step of a merged model is half as many operations."""
    from kit.models import lora_layers
    from kit.sampling import Sampler

    config, _ = learned
    with Run(config, Progress(quiet=True)) as run:
        adapter = str(run.folder / "adapter")
        with Sampler(run, config.eval, config.eval, adapter) as sampler:
            assert not lora_layers(sampler.backend.model)


def test_labels_shifted_by_one_do_not_teach_the_fixed_batch(
    tmp_path: Path, tiny: str, learned: tuple[Config, dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = training.AdapterTrainer.compute_loss

    def shifted(trainer, model, inputs, *more, **options):
        return real(
            trainer,
            model,
            {**inputs, "labels": torch.roll(inputs["labels"], 1, dims=1)},
            *more,
            **options,
        )

    right = learned[1]["stages"]["train"]["summary"]
    monkeypatch.setattr(training.AdapterTrainer, "compute_loss", shifted)
    with pytest.raises(KitError, match="The gradient is not the slope of the loss: layers 0-0"):
        run_stage(settings(tmp_path / "refused", tiny, epochs=6))
    assert not (tmp_path / "refused" / "adapter").exists()
    assert losses_or_none(tmp_path / "refused") == []
    monkeypatch.setattr(training, "check_gradient", lambda *_: [])
    wrong = run_stage(settings(tmp_path / "wrong", tiny, epochs=6))["stages"]["train"]["summary"]
    gain = right["fixed_batch_before"] - right["fixed_batch_after"]
    assert gain > 0.1
    assert wrong["fixed_batch_before"] - wrong["fixed_batch_after"] < gain / 2


def test_the_step_loss_is_the_token_mean_over_all_its_rows(tmp_path: Path, tiny: str) -> None:
    config = settings(
        tmp_path / "r", tiny, epochs=1, dropout=0.0, batch_size=8, group_by_length=False
    )
    run_stage(config)
    model = AutoModelForCausalLM.from_pretrained(tiny).eval()
    examples, _ = prepare(rows(), load_tokenizer(tiny), config)
    total, count = 0.0, 0
    for example in examples:
        logits = model(torch.tensor([example.ids])).logits[0].float()
        picked = torch.log_softmax(logits, -1)[range(len(example.ids) - 1), list(example.ids[1:])]
        total -= picked[example.prompt_tokens - 1 :].sum().item()
        count += len(example.ids) - example.prompt_tokens
    assert losses(config.folder)[0] == pytest.approx(total / count, abs=1e-5)


@pytest.mark.slow
def test_two_processes_learn_as_one(tmp_path: Path, tiny: str) -> None:
    """As accelerate launch starts them: the same steps, tokens and losses, and one writer."""
    alone = settings(tmp_path / "one", tiny, dropout=0)
    summary = run_stage(alone)["stages"]["train"]["summary"]
    assert (summary["rows"], summary["processes"]) == (8, 1)

    together = settings(tmp_path / "two", tiny, dropout=0)
    write_rows(together.folder, rows())
    path = tmp_path / "two.yaml"
    path.write_text(dump(together), encoding="utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command = [*launch, "palign.py", "train", str(path), "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)["train"]
    assert (summary["rows"], summary["processes"]) == (8, 2)

    for one, two in zip(logged(alone.folder), logged(together.folder), strict=True):
        assert (one["step"], one["tokens"]) == (two["step"], two["tokens"])
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-4)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-2)


def test_kill_and_resume_equals_an_uninterrupted_training(
    tmp_path: Path, tiny: str, whole: Config
) -> None:
    broken = settings(tmp_path / "broken", tiny)
    write_rows(broken.folder, rows())
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\nfrom kit.core import config\nfrom kit.pipeline import train\n"
        "from kit.training import trainer\nfrom kit.core.progress import Progress\n"
        "from kit.core.run import Run\nimport os, signal\n"
        "real = trainer.AdapterTrainer.log\n"
        "def log(self, logs, start_time=None):\n"
        "    real(self, logs, start_time)\n"
        "    if self.state.global_step == 5: os.kill(os.getpid(), signal.SIGKILL)\n"
        "trainer.AdapterTrainer.log = log\n"
        "with Run(config.load(sys.argv[2]), Progress(quiet=True)) as run: train.train(run)\n"
    )
    from kit.core.config import dump

    path = tmp_path / "config.yaml"
    path.write_text(dump(broken))
    done = subprocess.run(
        [sys.executable, "-c", script, str(ROOT), str(path)], capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    killed = logged(broken.folder)
    assert len(killed) == 5
    run_stage(broken)
    assert (
        logged(broken.folder)[:3] == killed[:3]
    )  # seconds and all: these steps were not trained again
    assert losses(broken.folder) == losses(whole.folder)  # bit for bit, dropout included
    ours, theirs = (
        (c.folder / "adapter" / "adapter_model.safetensors").read_bytes() for c in (broken, whole)
    )
    assert ours == theirs


def test_checkpoints_are_saved_by_time(
    tmp_path: Path, tiny: str, whole: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    real = training.AdapterTrainer._save_checkpoint

    def spy(trainer, *more):
        saved.append(trainer.state.global_step)
        return real(trainer, *more)

    monkeypatch.setattr(training.AdapterTrainer, "_save_checkpoint", spy)
    # only at the end, and in between where the steps since the last one took long enough
    for minutes in (60.0, 0.003):
        saved.clear()
        config = settings(tmp_path / str(minutes), tiny, save_minutes=minutes)
        run_stage(config)
        seconds, expected = 0.0, []
        for row in logged(config.folder):
            seconds += row["seconds"]
            if seconds >= 60 * minutes or row["step"] == 6:
                expected.append(row["step"])
                seconds = 0.0
        assert saved == expected
        # when it is saved changes nothing
        assert losses(config.folder) == losses(whole.folder)


def with_scaler(monkeypatch: pytest.MonkeyPatch, first_scale: float) -> None:
    """Let the next training compute as on a card without bf16: fp16 and a gradient scaler."""
    real = training.Trainer.__init__

    def init(trainer, *more, **options):
        real(trainer, *more, **options)
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=first_scale)
        trainer.accelerator.native_amp = True
        trainer.accelerator.state._mixed_precision = "fp16"

    monkeypatch.setattr(training.Trainer, "__init__", init)
    real_scaler = torch.amp.GradScaler
    monkeypatch.setattr(
        torch.amp,
        "GradScaler",
        lambda *_, init_scale: real_scaler("cpu", init_scale=first_scale),
    )


@pytest.fixture
def fp32_again():
    """accelerate's state is the process's."""
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()


def test_fp16_with_a_gradient_scaler_learns_the_same_and_passes_the_gradient_check(
    tmp_path: Path,
    tiny: str,
    whole: Config,
    monkeypatch: pytest.MonkeyPatch,
    fp32_again: None,
) -> None:
    with_scaler(monkeypatch, training.FIRST_SCALE)
    config = settings(tmp_path / "r", tiny)
    manifest = run_stage(config)
    assert losses(config.folder) == pytest.approx(losses(whole.folder), rel=0.01)
    in_fp32 = read_manifest(whole.folder)["gradient_check"]
    for one, other in zip(manifest["gradient_check"], in_fp32, strict=True):
        assert one["gradient"] == pytest.approx(other["gradient"], rel=0.05)


@pytest.mark.parametrize(
    ("capability", "dtype", "halves"),
    [((7, 5), "nf4", ["fp16"]), ((8, 0), "nf4", ["bf16"]), ((7, 5), "fp32", [])],
)
def test_a_training_takes_the_half_precision_that_its_card_has(
    capability: tuple[int, int],
    dtype: str,
    halves: list[str],
    tmp_path: Path,
    tiny: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """fp16 with a gradient scaler, which the Trainer then makes; no card is asked for anything."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    # counts emulation
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(training, "OneDevice", lambda folder, **keys: keys)
    with Run(settings(tmp_path / "r", tiny, dtype=dtype), Progress(quiet=True)) as run:
        keys = training._arguments(run)
    assert [name for name in ("fp16", "bf16") if keys[name]] == halves
    assert keys["use_cpu"] is False and keys["optim"] == "paged_adamw_8bit"


def test_an_overflow_under_a_gradient_scaler_is_skipped_not_refused(
    tmp_path: Path,
    tiny: str,
    monkeypatch: pytest.MonkeyPatch,
    fp32_again: None,
) -> None:
    with_scaler(monkeypatch, 2.0**127)
    monkeypatch.setattr(training, "check_gradient", lambda *_: [])
    config = settings(tmp_path / "r", tiny)
    run_stage(config)
    norms = [row["grad_norm"] for row in logged(config.folder)]
    assert not math.isfinite(norms[0]) and len(norms) == 6
    assert all(map(math.isfinite, losses(config.folder)))
    saved = load_file(config.folder / "adapter" / "adapter_model.safetensors")
    assert all(weight.norm() == 0 for name, weight in saved.items() if "lora_B" in name)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: not enough memory"),
    ],
)
def test_running_out_of_memory_names_the_keys_to_change(
    error: Exception, tmp_path: Path, tiny: str, whole: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = training.AdapterTrainer.compute_loss

    def failing(trainer, *more, **options):
        if trainer.state.global_step == 1:
            raise error
        return real(trainer, *more, **options)

    monkeypatch.setattr(training.AdapterTrainer, "compute_loss", failing)
    config = settings(tmp_path / "r", tiny, gradient_checkpointing=False)
    with pytest.raises(
        KitError, match=r"ran out of memory in step 2; its rows have up to"
    ) as caught:
        run_stage(config)
    hint = caught.value.hint
    for key in ("gradient_checkpointing=true", "logits_bytes=67108864", "max_seq_tokens="):
        assert f"train.{key}" in hint
    assert "micro_batch_size" not in hint
    # what it had is kept, and with keys that only save memory the training goes on
    first = logged(config.folder)
    assert len(first) == 1
    monkeypatch.setattr(training.AdapterTrainer, "compute_loss", real)
    run_stage(settings(tmp_path / "r", tiny, logits_bytes=1 << 26))
    assert logged(config.folder)[:1] == first  # seconds and all
    assert losses(config.folder) == losses(whole.folder)


def test_another_error_in_a_training_stays_what_it_is(
    tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(training.AdapterTrainer, "compute_loss", failing)
    monkeypatch.setattr(training, "check_gradient", lambda *_: [])
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        run_stage(settings(tmp_path / "r", tiny))


def models_alive() -> int:
    return sum(isinstance(thing, PreTrainedModel) for thing in gc.get_objects())


def test_no_model_is_alive_after_training_nor_when_the_next_is_loaded(
    tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without any collection but the stages' own."""
    from kit import models
    from kit.pipeline.evaluate import evaluate

    raw = settings(tmp_path / "r", tiny).model_dump()
    raw["eval"]["sampling"]["max_new_tokens"] = 4
    raw["data"]["eval"] = [{"path": "builtin", "limit": 1, "seed": 3}]
    config = resolve(raw, "test")
    gc.collect()
    before = models_alive()
    counted: list[int] = []
    real = models.load_model

    def spy(*more, **options):
        counted.append(models_alive() - before)
        return real(*more, **options)

    monkeypatch.setattr("kit.backends.hf.load_model", spy)
    gc.disable()
    try:
        run_stage(config)
        counted.append(models_alive() - before)
        with Run(config, Progress(quiet=True)) as run:
            evaluate(run)
        counted.append(models_alive() - before)
    finally:
        gc.enable()
    # after training, before the tuned and the base model, after both
    assert counted == [0, 0, 0, 0]


def test_a_half_written_checkpoint_is_skipped(tmp_path: Path, tiny: str, whole: Config) -> None:
    shutil.copytree(whole.folder, tmp_path / "r")
    whole = settings(tmp_path / "r", tiny)
    checkpoints = sorted((whole.folder / "checkpoints").iterdir())
    assert [p.name for p in checkpoints] == ["checkpoint-5", "checkpoint-6"]
    before = losses(whole.folder)
    (whole.folder / "adapter" / "adapter_model.safetensors").unlink()
    torn = checkpoints[1] / "optimizer.pt"
    torn.write_bytes(torn.read_bytes()[:-100])  # as a kill leaves it: the mark comes last
    (checkpoints[1] / "complete").unlink()
    with Run(whole, Progress(quiet=True)) as run:
        stage.train(run)
    assert losses(whole.folder) == before
    assert "half-written" in (whole.folder / "run.log").read_text()


def test_one_process_of_several_deletes_half_written_checkpoints(tmp_path: Path) -> None:
    half = tmp_path / "checkpoints" / "checkpoint-3"
    half.mkdir(parents=True)
    progress = Progress(quiet=True)
    run = SimpleNamespace(path=tmp_path.joinpath, progress=progress, is_main_process=False)
    assert training._last_checkpoint(run) is None and half.exists()
    run.is_main_process = True
    assert training._last_checkpoint(run) is None and not half.exists()


def test_a_loss_that_is_not_finite_stops_before_the_update_and_names_the_row(
    tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = rows()
    lines[5] = lines[5].model_copy(update={"input": "How many zebras?"})
    marked = load_tokenizer(tiny).encode(" zebras")[0]
    real, seen = training.make_model, []

    def poisoned(config):
        model = real(config)
        model.get_input_embeddings().register_forward_hook(
            lambda _module, ids, out: out.masked_fill((ids[0] == marked)[..., None], float("nan"))
        )
        seen.append(model)
        return model

    monkeypatch.setattr(training, "make_model", poisoned)
    with pytest.raises(
        KitError, match=r"loss of step \d is not finite.*line 6 \(How many zebras\?\)"
    ) as caught:
        run_stage(settings(tmp_path / "r", tiny), lines)
    assert "line 1 " not in str(caught.value)
    assert all(p.isfinite().all() for n, p in seen[0].named_parameters() if "lora" in n)
    assert not (tmp_path / "r" / "adapter").exists()


def test_a_gradient_that_is_not_finite_stops_before_the_update(
    tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = training.make_model, []

    def poisoned(config):
        model = real(config)
        parameter = next(p for n, p in model.named_parameters() if "lora_B" in n)
        calls = itertools.count()  # the first two backward passes are the gradient check's
        parameter.register_hook(lambda grad: grad * float("inf") if next(calls) > 1 else grad)
        seen.append(parameter)
        return model

    monkeypatch.setattr(training, "make_model", poisoned)
    with pytest.raises(KitError, match="gradient of step 1 is not finite"):
        run_stage(settings(tmp_path / "r", tiny))
    assert seen[0].abs().max() == 0  # B as it was made
    assert losses_or_none(tmp_path / "r") == []


def losses_or_none(out: Path) -> list[float]:
    return losses(out) if (out / "train_log.jsonl").exists() else []


def test_an_adapter_without_gradient_is_found_at_the_first_step(
    tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = training.make_model

    def severed(config):
        model = real(config)
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.register_hook(torch.zeros_like)
        return model

    monkeypatch.setattr(training, "make_model", severed)
    with pytest.raises(KitError, match="not the slope of the loss: 14 of 14 adapters get none"):
        run_stage(settings(tmp_path / "r", tiny))


def test_the_gradient_check_of_a_training_is_logged_and_kept(
    learned: tuple[Config, dict], tiny: str
) -> None:
    config, manifest = learned
    summary = manifest["stages"]["train"]["summary"]
    assert [one["layers"] for one in summary["gradient_check"]] == ["0-0", "0-1", "1-1"]
    for one in summary["gradient_check"]:
        assert one["slope"] == pytest.approx(one["gradient"], rel=0.05)
    assert summary["gradient_check"] == manifest["gradient_check"]
    assert "gradient equals the loss's slope (line " in (config.folder / "run.log").read_text(
        encoding="utf-8"
    )


def test_a_resumed_training_checks_its_gradient_too(
    tmp_path: Path, tiny: str, whole: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(whole.folder, tmp_path / "r")
    shutil.rmtree(tmp_path / "r" / "checkpoints" / "checkpoint-6")
    (tmp_path / "r" / "adapter" / "adapter_model.safetensors").unlink()
    norms = []
    real = training.check_gradient

    def spy(model, *passes):
        norms.append(sum(w.norm() for n, w in model.named_parameters() if "lora_B" in n).item())
        return real(model, *passes)

    monkeypatch.setattr(training, "check_gradient", spy)
    with Run(settings(tmp_path / "r", tiny), Progress(quiet=True)) as run:
        stage.train(run)
    assert len(norms) == 1 and norms[0] > 0, "checked once, with the checkpoint's weights"
    assert losses(tmp_path / "r") == losses(whole.folder)


def test_two_visible_cards_do_not_split_a_batch(
    tmp_path: Path, tiny: str, whole: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    config = settings(tmp_path / "r", tiny)
    run_stage(config)
    assert losses(config.folder) == losses(whole.folder)


def test_prompt_ids_are_evaluations_and_only_the_target_is_learned(tiny: str) -> None:
    config, tokenizer = settings(Path("unused"), tiny), load_tokenizer(tiny)
    row = rows()[3].model_copy(update={"output": "see <|im_end|> as text \\boxed{3}"})
    (example,), _ = prepare([row], tokenizer, config)
    prompt = render(tokenizer, solve_text(config.prompts, row.input))
    assert example.ids[: example.prompt_tokens] == prompt
    target = example.ids[example.prompt_tokens :]
    assert list(target[:-1]) == tokenizer.encode(row.output, special=False)
    assert target[-1] == end_of_turn(tokenizer) == tokenizer.encode("<|im_end|>")[0]
    assert target.count(target[-1]) == 1  # the name in the text stayed text
    batch = collate([example, Example("line 2", example.ids[:-3], example.prompt_tokens)])
    for i, length in enumerate((len(example.ids), len(example.ids) - 3)):
        learned = (batch["labels"][i] != -100).nonzero().flatten().tolist()
        assert learned == list(range(example.prompt_tokens, length))
        assert batch["labels"][i, learned].tolist() == list(
            example.ids[example.prompt_tokens : length]
        )


def test_rows_over_the_cutoff_are_dropped_or_cut_and_named(tiny: str) -> None:
    tokenizer = load_tokenizer(tiny)
    lines = [*rows(3), rows()[0].model_copy(update={"output": "word " * 200})]
    kept, lost = prepare(lines, tokenizer, settings(Path("unused"), tiny, max_seq_tokens=150))
    assert len(kept) == 3 and [*lost] == ["dropped, over train.max_seq_tokens"]
    assert lost["dropped, over train.max_seq_tokens"][0].startswith("line 4 (Ann has 0 pens")
    config = settings(Path("unused"), tiny, max_seq_tokens=150, on_too_long="truncate")
    kept, lost = prepare(lines, tokenizer, config)
    assert len(kept) == 4 and [*lost] == [CUT] and len(lost[CUT]) == 1 and len(kept[3].ids) == 150
    assert kept[3].ids[-1] != end_of_turn(tokenizer)
    long_prompt = [*rows(3), rows()[0].model_copy(update={"input": "word " * 200})]
    kept, lost = prepare(long_prompt, tokenizer, config)  # a prompt is never cut
    assert len(kept) == 3 and [len(names) for names in lost.values()] == [1] and CUT not in lost


def test_rows_with_nothing_to_learn_are_counted_and_none_left_is_refused(
    tmp_path: Path, tiny: str
) -> None:
    empty = rows()[0].model_copy(update={"output": "  "})
    config, tokenizer = settings(tmp_path / "r", tiny), load_tokenizer(tiny)
    kept, lost = prepare([*rows(2), empty], tokenizer, config)
    assert len(kept) == 2 and [*lost] == ["dropped, nothing to learn"]
    assert lost["dropped, nothing to learn"][0].startswith(
        "line 3 (Ann has 0 pens and buys 0 more. How many has she?)"
    )
    with pytest.raises(
        KitError, match=r"None of 2 training rows.*2 dropped, nothing to learn: line 1"
    ):
        prepare([empty, empty], tokenizer, config)
    with pytest.raises(KitError, match="None of 0 training rows"):
        prepare([], tokenizer, config)


def test_where_no_row_is_left_the_reasons_are_named(tmp_path: Path, tiny: str) -> None:
    config = settings(tmp_path / "r", tiny)
    config.folder.mkdir()
    lost = RowFile(config.folder / "prefixes.jsonl", PrefixRow)
    for number in range(2):
        row = from_problem(Problem(id=f"p{number}", question="1 + 1?", answer="2", trace="2."))
        lost.append(reject(row, "no attempt", "the teacher wrote nothing"))
    with pytest.raises(KitError, match=r"No row is left to train on: 2 no attempt \(truncate\)"):
        run_stage(config, [])


def test_a_step_whose_labels_are_all_masked_is_refused(
    tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = training.collate
    masked = {"labels"}
    monkeypatch.setattr(
        training,
        "collate",
        lambda examples: {
            k: torch.full_like(v, -100) if k in masked else v for k, v in real(examples).items()
        },
    )
    with pytest.raises(KitError, match=r"loss of step 1 is not finite.*Rows: line \d"):
        run_stage(settings(tmp_path / "r", tiny))


def test_another_instruction_than_evaluations_is_refused(tiny: str) -> None:
    odd = rows()[0].model_copy(update={"instruction": bundled("prompts")["instruction"] + "\n"})
    with pytest.raises(KitError, match="line 1 asks"):
        prepare([odd], load_tokenizer(tiny), settings(Path("unused"), tiny))


def test_batches_of_unequal_rows_have_no_cross_talk(tiny: str) -> None:
    tokenizer = load_tokenizer(tiny)
    examples, _ = prepare(rows(), tokenizer, settings(Path("unused"), tiny))
    batch = collate(examples)
    assert len({len(e.ids) for e in examples}) > 2
    for name in (tiny, hf_folder("smollm2-135m")):
        model = AutoModelForCausalLM.from_pretrained(name).eval()
        with torch.no_grad():
            together = model(batch["input_ids"]).logits
            for i, example in enumerate(examples[:4]):
                alone = model(torch.tensor([example.ids])).logits[0]
                assert (together[i, : len(example.ids)] - alone).abs().max() < 1e-3


def test_every_epoch_holds_every_row_once_and_steps_are_sorted_within(tiny: str) -> None:
    lengths = [5, 9, 1, 7, 3, 8, 2, 6, 4, 10]
    config = settings(Path("unused"), tiny, epochs=2, batch_size=4)
    plan = order(lengths, config)
    loose = order(
        lengths,
        config.model_copy(
            update={"train": config.train.model_copy(update={"group_by_length": False})}
        ),
    )
    assert sorted(loose[:10]) == sorted(loose[10:]) == list(range(10)) and loose[:10] != loose[10:]
    for i in range(0, 20, 4):
        assert sorted(plan[i : i + 4]) == sorted(loose[i : i + 4])
        assert [lengths[j] for j in plan[i : i + 4]] == sorted(
            (lengths[j] for j in plan[i : i + 4]), reverse=True
        )
    assert plan == order(lengths, config)
    assert len(order(lengths, settings(Path("unused"), tiny, max_steps=7, batch_size=4))) == 28


def test_fsdp_is_refused_with_what_to_run(
    tmp_path: Path,
    tiny: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # as accelerate launch --use_fsdp sets it
    with pytest.raises(KitError, match=r"FSDP shards .*Run accelerate launch without it"):
        run_stage(settings(tmp_path / "r", tiny))


def test_broken_lines_and_uneven_batches_are_named(tmp_path: Path, tiny: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"instruction": "a", "input": "b", "output": "c"}\n{"instruction": 1}\n')
    with pytest.raises(KitError, match="line 2"):
        read_rows(path)
    path.write_text(
        '{"instruction": "a", "input": "b\u2028b\x85b", "output": "c"}\n\n', encoding="utf-8"
    )
    assert [row.input for row in read_rows(path)] == ["b\u2028b\x85b"], (
        "what Unicode calls a line end is none in JSONL"
    )
    with pytest.raises(
        KitError, match=r"batch_size=4 is not a multiple of train.micro_batch_size=3"
    ):
        run_stage(settings(tmp_path / "r", tiny, micro_batch_size=3))


def test_zero_shot_trains_nothing(tmp_path: Path, tiny: str) -> None:
    config = settings(tmp_path / "r", tiny).model_copy(update={"method": "zero-shot"})
    with Run(config, Progress(quiet=True)) as run:
        stage.train(run)
        assert run.manifest["stages"]["train"]["done"]
    assert not (config.folder / "adapter").exists()


@pytest.mark.slow  # tests/test_pipeline.py trains the packaged model in NF4, too
def test_nf4_on_the_packaged_model_learns(tmp_path: Path) -> None:
    config = settings(
        tmp_path / "r", "smollm2-135m", dtype="nf4", max_steps=3, batch_size=2, learning_rate=2e-3
    )
    summary = run_stage(config, rows(2))["stages"]["train"]["summary"]
    assert summary["fixed_batch_after"] < summary["fixed_batch_before"] - 0.3


def test_a_tracker_that_takes_nothing_is_an_error_before_the_run(
    tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(tmp_path / "r", tiny, report_to="tensorboard")
    assert config.train.report_to == ("tensorboard",)
    with Run(config, Progress(quiet=True)) as run:
        (tmp_path / "r" / "tensorboard").write_text("a file in the folder's place")
        monkeypatch.setattr(trackers, "find_spec", lambda name: None)
        with pytest.raises(KitError, match=r"tensorboard, which is not installed\. pip install"):
            trackers.send(run, {"seed": 0})
        monkeypatch.undo()
        pytest.importorskip("tensorboard")
        with pytest.raises(KitError, match=r"tensorboard rejected the numbers.*fix the folder"):
            trackers.send(run, {"seed": 0})


TRACKERS = ("tensorboard", "wandb", "trackio")
SECRET = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory, tiny: str) -> Path:
    """The folder of a run of all stages, watched offline by every tracker that is installed.

    In a process of its own: trackers are global.
    """
    folder = tmp_path_factory.mktemp("tracked")
    installed = [name for name in TRACKERS if find_spec(name)]
    keys = f"""
        teacher.backend=reference method=long-trace student.model={tiny} out={folder / "r"}
        data.train.limit=4 data.eval.limit=3 eval.sampling.max_new_tokens=4
        train.dtype=fp32 train.batch_size=2 train.epochs=2 train.report_to=[{",".join(installed)}]
    """
    own = {f"WANDB_{name}_DIR": str(folder / "wandb") for name in ("CONFIG", "CACHE", "DATA")}
    environment = {
        **os.environ,
        **own,
        "TRACKIO_DIR": str(folder / "trackio"),
        "WANDB_MODE": "offline",
        "WANDB_API_KEY": SECRET,
        "HF_TOKEN": f"hf_{SECRET}",
    }
    done = subprocess.run(
        [sys.executable, "palign.py", "run", "configs/smoke.yaml", *keys.split(), "--json"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["scores"]  # and nothing else on standard output
    return folder


def tensorboard_values(folder: Path) -> dict[str, list[float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "r" / "tensorboard")).Reload()
    return {key: [e.value for e in events.Scalars(key)] for key in events.Tags()["scalars"]}


def wandb_records(path: Path) -> Iterator[bytes]:
    """What an offline run's file holds: LevelDB's log format, after seven bytes of its own."""
    data, place, record = path.read_bytes(), 7, b""
    assert data.startswith(b":W&B")
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:  # no header fits into the rest of a block
            place += left
            continue
        size, kind = struct.unpack_from("<HB", data, place + 4)
        record += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or its last part
            yield record
            record = b""


def wandb_values(folder: Path) -> dict[str, list[float]]:
    from wandb.proto.wandb_internal_pb2 import Record

    [path] = (folder / "r" / "wandb").glob("offline-run-*/*.wandb")
    assert len(list((folder / "r" / "wandb").glob("offline-run-*"))) == 1
    records = list(map(Record.FromString, wandb_records(path)))
    assert [r.exit.exit_code for r in records if r.HasField("exit")] == [0]
    values: dict[str, list[float]] = {}
    for record in records:
        for item in record.history.item:
            key = item.key or "/".join(item.nested_key)
            values.setdefault(key, []).append(json.loads(item.value_json))
    return values


def trackio_values(folder: Path) -> dict[str, list[float]]:
    [database] = (folder / "trackio").glob("palign*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select metrics, run_name from metrics order by id").fetchall()
    assert {name for _, name in rows} == {"smoke"}
    values: dict[str, list[float]] = {}
    for metrics, _ in rows:
        for key, value in json.loads(metrics).items():
            values.setdefault(key, []).append(value)
    return values


@pytest.mark.parametrize("name", TRACKERS)
def test_what_a_tracker_wrote_offline_are_the_runs_own_curves_and_numbers(
    tracked: Path, name: str
) -> None:
    pytest.importorskip(name, reason=f"pip install {name} to test it")
    read_back = {
        "tensorboard": tensorboard_values,
        "wandb": wandb_values,
        "trackio": trackio_values,
    }
    values = read_back[name](tracked)
    log = logged(tracked / "r")
    assert len({row["loss"] for row in log}) > 2 and values["seed"] == [0]
    for key in ("loss", "grad_norm", "learning_rate"):
        assert values[f"train/{key}"] == pytest.approx([row[key] for row in log], rel=1e-5)
    stages = read_manifest(tracked / "r")["stages"]
    assert list(stages) == ["teach", "truncate", "align", "train", "eval"]
    for stage_name, entry in stages.items():
        for key in {"rows_in", "rows_out", "seconds"} & entry.keys():
            assert values[f"{stage_name}/{key}"] == pytest.approx([entry[key]], rel=1e-5)
    before = stages["train"]["summary"]["fixed_batch_before"]
    assert values["train/fixed_batch_before"] == pytest.approx([before], rel=1e-5)
    scores = stages["eval"]["summary"]["scores"]
    assert {score["which"] for score in scores} == {"base", "tuned"}
    for score in scores:
        key = f"eval/{score['dataset']}/{score['which']}"
        assert values[key] == pytest.approx([score["accuracy"]])


def test_no_key_is_written_by_a_run_that_is_watched(tracked: Path) -> None:
    files = [path for path in tracked.rglob("*") if path.is_file()]
    assert not [path for path in files if SECRET[:20].encode() in path.read_bytes()]
