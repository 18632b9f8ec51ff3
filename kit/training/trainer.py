"""train: QLoRA on the training rows (section 3.4, Eq. 2), on transformers' Trainer.

Paper: LoRA on 16-bit weights. Here: the same adapter on an NF4 base, unless train.dtype says otherwise.
Rows become token ids in kit/examples.py; memory is reckoned in kit/plan.py. Of a checkpoint nothing is unpickled but
what torch's `weights_only` lets through: tensors, numbers and their containers.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import Trainer, TrainingArguments, set_seed

from kit.core.config import Config
from kit.core.errors import KitError
from kit.core.memory import peak_bytes, reset_peak
from kit.core.run import Run
from kit.core.storage import write_atomic
from kit.models import load_model
from kit.prompts import template_hash
from kit.training.gradient_check import check_gradient, lost_gradient_is_an_error
from kit.training.loss import IGNORED, attach
from kit.training.sft_data import Example, collate, order

WEIGHTS, MARK = "adapter_model.safetensors", "complete"
FIXED_ROWS = 4  # rows whose loss is read before and after
CHECKED_TOKENS = 64  # of the target, on which the gradient is checked


def make_model(config: Config) -> Any:
    """The student with a fresh adapter on all linear layers but the head, ready for `attach`ed loss."""
    settings = config.train
    base = load_model(config.student.model, dtype=settings.dtype, for_training=True).requires_grad_(
        False
    )
    if settings.gradient_checkpointing:
        base.activation_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()  # else no gradient crosses the frozen embeddings into a checkpoint
    attach(base, settings.logits_bytes)
    set_seed(config.seed)  # the adapter's values do not depend on what loading drew
    shape = {"r": settings.rank, "lora_alpha": settings.alpha, "lora_dropout": settings.dropout}
    return get_peft_model(
        base, LoraConfig(**shape, target_modules="all-linear", task_type="CAUSAL_LM")
    )


class AdapterTrainer(Trainer):
    """A Trainer with a token mean over the whole step, guards before each update, and checkpoints that are whole."""

    loss_is_scaled_for_ga = True

    def __init__(self, run: Run, model: Any, examples: Sequence[Example]) -> None:
        plan = [examples[i] for i in order([len(e.ids) for e in examples], run.config)]
        super().__init__(model, _arguments(run), data_collator=collate, train_dataset=plan)
        self.model_accepts_loss_kwargs = True
        self.run, self.bar, self.told = run, None, time.perf_counter()
        self.seen: list[Example] = []  # in the step under way
        self.is_checked = False  # the gradient, in this process

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch=None) -> Any:
        """A micro-batch's forward and backward pass; the first time, the gradient is checked."""
        if not self.is_checked:
            self._check_gradient(model)
            self.is_checked = True
            self.told = time.perf_counter()
        return super().training_step(model, inputs, num_items_in_batch)

    def _check_gradient(self, model: Any) -> None:
        """Compare the gradient of this very loop with the loss's slope, on the shortest row."""
        shortest = min(self.train_dataset, key=lambda example: len(example.ids))
        end = shortest.prompt_tokens + CHECKED_TOKENS
        example = replace(shortest, ids=shortest.ids[:end])
        batch = self._prepare_inputs(collate([example]))
        del batch["examples"]
        count = (batch["labels"] != IGNORED).sum()

        def backward() -> None:
            # the step's denominator counts the tokens of all processes, which here have the same row
            total = count * self.accelerator.num_processes
            super(AdapterTrainer, self).training_step(
                model, {**batch, "examples": [example]}, total
            )

        def loss() -> torch.Tensor:
            return model(**batch, denominator=count)["loss"]

        slopes = check_gradient(model, backward, loss)
        self.seen.clear()
        self.run.record(gradient_check=[slope._asdict() for slope in slopes])
        numbers = "; ".join(map(str, slopes))
        self.run.progress.say(
            f"train: gradient equals the loss's slope ({example.name}): {numbers}"
        )

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch=None,
    ):
        """The micro-batch's summed loss over the step's supervised tokens; stops where it is not finite."""
        examples = inputs.pop("examples")
        self.seen += examples
        loss = model(**inputs, denominator=num_items_in_batch)["loss"]
        if not torch.isfinite(loss):
            self._stop("loss", examples)
        return loss * self.accelerator.num_processes  # DDP takes the mean of what is to be summed

    def _clip_grad_norm(self, model: Any) -> Any:
        """Clip; the last moment before the update, so this is where a bad gradient is found."""
        norm = super()._clip_grad_norm(model)
        if not math.isfinite(norm):
            self._stop("gradient", self.seen)
        return norm

    def _stop(self, what: str, examples: Sequence[Example]) -> None:
        told = f"The {what} of step {self.state.global_step + 1} is not finite; the weights were not updated. Rows: "
        hint = "Look at these rows; then try a lower train.learning_rate, train.dtype=bf16 or train.micro_batch_size=1."
        raise KitError(
            f"{told}{', '.join(e.name for e in examples)}.",
            f"{hint} The last checkpoint will be taken up.",
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """One line of train_log.jsonl a step. The Trainer's state keeps them, so that a checkpoint holds its past."""
        tokens, self.seen = (
            torch.tensor(sum(len(example.ids) for example in self.seen), device=self.args.device),
            [],
        )
        tokens = int(self.accelerator.reduce(tokens))  # over all processes
        if "loss" not in logs:  # the Trainer's own summary
            return
        now = time.perf_counter()
        seconds, self.told = now - self.told, now
        row = {
            "step": self.state.global_step,
            **{key: logs[key] for key in ("loss", "learning_rate", "grad_norm")},
        }
        row |= {
            "tokens": tokens,
            "tokens_per_second": round(tokens / seconds, 1),
            "seconds": round(seconds, 3),
        }
        self.state.log_history.append(row | {"peak_bytes": peak_bytes()})
        if self.run.is_main_process:
            lines = [json.dumps(row, sort_keys=True) + "\n" for row in self.state.log_history]
            write_atomic(self.run.folder / "train_log.jsonl", "".join(lines))
            self.bar.advance(tokens=tokens)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save, then mark as whole: without its mark a checkpoint counts as half-written by a kill or a power cut."""
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            (folder / "training_args.bin").unlink()  # pickled objects, which nobody needs
            for path in folder.iterdir():  # a power cut must not leave the mark alone
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
            write_atomic(folder / MARK, _about(self.model))


def fit(run: Run, tokenizer: Any, examples: Sequence[Example]) -> dict[str, Any]:
    """Train, save the adapter, and say what changed."""
    config, student = run.config, run.config.student
    run.record(
        template_hash=template_hash(tokenizer, config.prompts, student.system, student.thinking)
    )
    reset_peak()
    model = make_model(config)
    trainer = AdapterTrainer(run, model, examples)
    checkpoint, step = _last_checkpoint(run, _about(model))
    steps = math.ceil(len(trainer.train_dataset) / config.train.batch_size)
    if step:
        run.progress.say(f"train: going on from step {step} of {steps}")
    with (
        lost_gradient_is_an_error(),
        run.progress.bar("train", steps, "steps", done=step) as trainer.bar,
    ):
        trainer.told = time.perf_counter()
        trainer.train(resume_from_checkpoint=checkpoint)
    after = _mean_loss(model, examples[:FIXED_ROWS])
    with model.disable_adapter():  # an untrained adapter adds exactly nothing
        before = _mean_loss(model, examples[:FIXED_ROWS])
    if run.is_main_process:
        model.save_pretrained(run.folder / "adapter")
    log, weights = trainer.state.log_history, get_peft_model_state_dict(model)
    grown = [
        value.float().square().sum().item() for name, value in weights.items() if "lora_B" in name
    ]
    return {
        "gradient_check": run.manifest.get("gradient_check"),
        "kernels": kernels(model),
        "adapter_change": math.sqrt(sum(grown)),  # norm of all B, which are zero before
        "fixed_batch_before": before,
        "fixed_batch_after": after,
        "fixed_batch_rows": min(FIXED_ROWS, len(examples)),
        "processes": trainer.accelerator.num_processes,
        "peak_bytes": max(row["peak_bytes"] for row in log),
        "tokens_per_second": round(
            sum(row["tokens"] for row in log) / sum(row["seconds"] for row in log), 1
        ),
    }


def kernels(model: Any) -> dict[str, Any]:
    """What computed: CPU features by torch, and 4-bit layers that take bitsandbytes' repacked path."""
    switches = [getattr(m, "support_avx512bf16_for_cpu", False) for m in model.modules()]
    return {
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "avx512_bf16": torch.cpu.get_capabilities().get("avx512_bf16", False),
        "repacking_layers": sum(switches),
    }


def _mean_loss(model: Any, examples: Sequence[Example]) -> float:
    """Loss a supervised token of examples, one at a time; leaves the model in evaluation mode."""
    model.eval()
    with torch.no_grad():
        batches = [collate([example]) for example in examples]
        inputs = [
            {key: batch[key].to(model.device) for key in ("input_ids", "labels")}
            for batch in batches
        ]
        return torch.cat([model(**one)["losses"] for one in inputs]).mean().item()


def _last_checkpoint(run: Run, about: str) -> tuple[str | None, int]:
    """The newest whole checkpoint and its step; half-written ones are deleted. KitError: it is of another adapter."""
    found = run.path("checkpoints/.").glob("checkpoint-*")
    for folder in sorted(found, key=lambda path: -int(path.name.split("-")[1])):
        if not (folder / MARK).exists():
            run.progress.warn(f"{folder.name} is half-written; deleted")
            shutil.rmtree(folder)
        elif (told := (folder / MARK).read_text(encoding="utf-8")) != about:
            what = f"{folder} holds an adapter of {told}; the config's is one of {about}."
            raise KitError(
                what, "Set the keys or the student back, or delete checkpoints/ to train anew."
            )
        else:
            return str(folder), int(folder.name.split("-")[1])
    return None, 0


def _about(model: Any) -> str:
    """What must be the same for a checkpoint to be gone on from."""
    adapter, weights = model.peft_config["default"], model.get_nb_trainable_parameters()[0]
    return f"rank {adapter.r}, alpha {adapter.lora_alpha}, dropout {adapter.lora_dropout}, {weights} weights"


class OneDevice(TrainingArguments):
    """One process trains on one device: with more, start one process for each (accelerate launch)."""

    @property
    def n_gpu(self) -> int:
        """The Trainer would split each batch over all visible cards otherwise (DataParallel)."""
        return min(1, super().n_gpu)


def _arguments(run: Run) -> TrainingArguments:
    settings, cuda = run.config.train, torch.cuda.is_available()
    together = settings.micro_batch_size * int(os.environ.get("WORLD_SIZE", "1"))
    if settings.batch_size % together:
        what = f"train.batch_size={settings.batch_size} is no multiple of train.micro_batch_size={settings.micro_batch_size}"
        raise KitError(f"{what} times the processes.", "Change one of them.", 2)
    paged = settings.optimizer == "paged_adamw_8bit" or (settings.optimizer == "auto" and cuda)
    return OneDevice(
        str(run.folder / "checkpoints"),
        **settings.model_dump(
            include={"learning_rate", "weight_decay", "max_grad_norm", "save_steps"}
        ),
        lr_scheduler_type=settings.lr_scheduler.replace("constant", "constant_with_warmup"),
        warmup_steps=settings.warmup_ratio,
        optim="paged_adamw_8bit" if paged else "adamw_torch",
        per_device_train_batch_size=settings.micro_batch_size,
        gradient_accumulation_steps=settings.batch_size // together,
        num_train_epochs=1,  # `order` lays all epochs out in one
        train_sampling_strategy="sequential",
        seed=run.config.seed,
        bf16=cuda and settings.dtype != "fp32",
        use_cpu=not cuda,
        dataloader_pin_memory=cuda,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        save_total_limit=2,
        remove_unused_columns=False,
    )
