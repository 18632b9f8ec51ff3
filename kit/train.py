"""train: QLoRA on the training rows (section 3.4, Eq. 2), on transformers' Trainer.

Paper: LoRA on 16-bit weights. Here: the same adapter on an NF4 base, unless train.dtype says otherwise.
Prompt ids come from the function that evaluation uses; only the target and the token that ends the turn are learned.
Several GPUs are `accelerate launch`'s business; memory is reckoned in kit/plan.py.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

from kit.config import Config
from kit.errors import KitError
from kit.examples import Example, collate, order, prepare, read_rows
from kit.loss import attach
from kit.memory import peak_bytes, reset_peak
from kit.models import load_model, load_tokenizer
from kit.plan import check_fit
from kit.prompts import template_hash
from kit.records import write_atomic
from kit.run import Run, stopwatch

LOG, WEIGHTS, MARK = "train_log.jsonl", "adapter_model.safetensors", "complete"
FIXED_ROWS = 4  # rows whose loss is read before and after


def train(run: Run) -> None:
    """The stage: train.jsonl in; adapter/, checkpoints/ and train_log.jsonl out.

    Raises:
        KitError: no rows, an instruction other than evaluation's, a loss or gradient that is not finite, a model that
            does not fit.
    """
    if run.config.method == "zero-shot":
        if run.begin("train", "zero-shot", lambda: ""):
            run.finish("train", "", rows_in=0, rows_out=0, seconds=0.0)
        return
    path = run.folder / "train.jsonl"
    if not path.exists():
        raise KitError(f"{path} is not there.", "Run the stages before it: palign.py run CONFIG.")
    if not run.begin("train", _file_hash(path), lambda: _adapter_hash(run.folder)):
        return
    with stopwatch() as seconds:
        rows = read_rows(path)
        tokenizer = load_tokenizer(run.config.student.model)
        examples, dropped, cut = prepare(rows, tokenizer, run.config)
        lost = [*dropped.items(), *([("cut, without their answers", cut)] if cut else [])]
        for why, names in lost:
            run.progress.warn(f"train: {len(names)} of {len(rows)} rows {why}: {'; '.join(names[:8])}")
        check_fit(run.config, run, max(len(e.ids) for e in examples))
        summary = _fit(run, tokenizer, examples)
    summary |= {"rows": len(examples), "dropped": dropped, "cut": cut}
    summary["supervised_tokens"] = sum(len(e.ids) - e.prompt_tokens for e in examples)
    run.finish("train", _adapter_hash(run.folder), len(rows), len(examples), seconds(), **summary)


def make_model(config: Config) -> Any:
    """The student with a fresh adapter on all linear layers but the head, ready for `attach`ed loss."""
    settings = config.train
    set_seed(config.seed)
    base = load_model(config.student.model, dtype=settings.dtype, for_training=True)
    base.requires_grad_(False)
    if settings.checkpointing:
        base.activation_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()  # else no gradient crosses the frozen embeddings into a checkpoint
    attach(base, settings.logits_bytes)
    set_seed(config.seed)  # the adapter's values do not depend on what loading drew
    shape = {"r": settings.rank, "lora_alpha": settings.alpha, "lora_dropout": settings.dropout}
    return get_peft_model(base, LoraConfig(**shape, target_modules="all-linear", task_type="CAUSAL_LM"))


class AdapterTrainer(Trainer):
    """A Trainer with a token mean over the whole step, guards before each update, and checkpoints that are whole."""

    def __init__(self, run: Run, model: Any, examples: Sequence[Example]) -> None:
        self.run, self.names = run, {e.line: e for e in examples}
        self.parts: list[tuple[list[int], torch.Tensor]] = []  # of the step under way: lines and their position losses
        plan = [examples[i] for i in order([len(e.ids) for e in examples], run.config)]
        super().__init__(model, _arguments(run), data_collator=collate, train_dataset=plan)
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True
        self.bar: Any = None
        self.told = time.perf_counter()

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch=None):
        """The micro-batch's summed loss over the step's supervised tokens; stops where it is not finite."""
        lines = inputs.pop("lines").tolist()
        if num_items_in_batch is None or num_items_in_batch == 0:
            raise KitError(f"Step {self.state.global_step + 1} has no supervised token: {self._named(lines)}.")
        out = model(**inputs, denominator=num_items_in_batch)
        self.parts.append((lines, out["losses"]))
        if not torch.isfinite(out["loss"]):
            self._stop("loss")
        loss = out["loss"] * self.accelerator.num_processes  # DDP takes the mean of what is to be summed
        return (loss, out) if return_outputs else loss

    def _clip_grad_norm(self, model: Any) -> Any:
        """Clip; the last moment before the update, so this is where a bad gradient is found."""
        norm = super()._clip_grad_norm(model)
        if not math.isfinite(norm):
            self._stop("gradient")
        if self.state.global_step == 0 and not norm > 0:
            raise KitError(
                "The adapter's gradient is zero at the first step: nothing would be learned.",
                "Try train.checkpointing=false; if that helps, the model does not support checkpointing as it is.",
            )
        return norm

    def _stop(self, what: str) -> None:
        step = self.state.global_step + 1
        lines = [
            line for part, losses in self.parts for line in part if what == "gradient" or not losses.isfinite().all()
        ]
        raise KitError(
            f"The {what} of step {step} is not finite; the weights were not updated. Rows: {self._named(lines)}.",
            "Look at these rows; then try a lower train.learning_rate, a higher precision (train.dtype=bf16), or "
            "train.micro_rows=1. The same command goes on from the last checkpoint.",
        )

    def _named(self, lines: Sequence[int]) -> str:
        shown = ", ".join(self.names[line].name for line in lines[:8])
        return shown + (f" and {len(lines) - 8} more" if len(lines) > 8 else "")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """One line of train_log.jsonl a step. The Trainer's state keeps them, so that a checkpoint holds its past."""
        lines = [line for part, _ in self.parts for line in part]
        self.parts.clear()
        if "loss" not in logs or not self.is_world_process_zero():
            return
        now = time.perf_counter()
        seconds, self.told = now - self.told, now
        tokens = sum(len(self.names[line].ids) for line in lines)
        row = {"step": self.state.global_step, **{key: logs[key] for key in ("loss", "learning_rate", "grad_norm")}}
        row |= {"tokens": tokens, "tokens_per_second": round(tokens / seconds, 1), "seconds": round(seconds, 3)}
        self.state.log_history.append(row | {"peak_bytes": peak_bytes()})
        write_atomic(
            self.run.folder / LOG, "".join(json.dumps(row, sort_keys=True) + "\n" for row in self.state.log_history)
        )
        if self.bar is not None:
            self.bar.advance(tokens=tokens)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save, then mark as whole: without its mark a checkpoint counts as half-written by a kill or a power cut."""
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            for path in folder.iterdir():  # a power cut must not leave the mark alone
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
            (folder / MARK).touch()


def _fit(run: Run, tokenizer: Any, examples: Sequence[Example]) -> dict[str, Any]:
    """Train, save the adapter, and say what changed."""
    config, student = run.config, run.config.student
    run.record(template_hash=template_hash(tokenizer, config.prompts, student.system, student.thinking))
    reset_peak()
    model = make_model(config)
    start = {key: value.clone() for key, value in get_peft_model_state_dict(model).items()}
    trainer, fixed = AdapterTrainer(run, model, examples), examples[:FIXED_ROWS]
    checkpoint, step = last_checkpoint(run)
    steps = math.ceil(len(trainer.train_dataset) / config.train.batch_rows)
    if step:
        run.progress.say(f"train: going on from step {step} of {steps}")
    with run.progress.bar("train", steps, "steps", done=step) as trainer.bar:
        trainer.told = time.perf_counter()
        trainer.train(resume_from_checkpoint=checkpoint)
    after = mean_loss(model, fixed)
    with model.disable_adapter():  # an untrained adapter adds exactly nothing
        before = mean_loss(model, fixed)
    model.save_pretrained(run.folder / "adapter")
    log, end = trainer.state.log_history, get_peft_model_state_dict(model)
    tokens, seconds = (sum(row[key] for row in log) for key in ("tokens", "seconds"))
    return {
        "steps": len(log),
        "loss_first": log[0]["loss"],
        "loss_last": log[-1]["loss"],
        "adapter_change": math.sqrt(sum((end[k].float() - v.float()).square().sum().item() for k, v in start.items())),
        "fixed_batch_before": before,
        "fixed_batch_after": after,
        "fixed_batch_rows": len(fixed),
        "peak_bytes": max(row["peak_bytes"] for row in log),
        "tokens": tokens,
        "tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
    }


def mean_loss(model: Any, examples: Sequence[Example]) -> float:
    """Loss a supervised token of examples, one at a time; leaves the model in evaluation mode."""
    model.eval()
    losses = []
    with torch.no_grad():
        for example in examples:
            batch = collate([example])
            out = model(input_ids=batch["input_ids"].to(model.device), labels=batch["labels"].to(model.device))
            losses.append(out["losses"])
    return torch.cat(losses).mean().item()


def last_checkpoint(run: Run) -> tuple[str | None, int]:
    """The newest whole checkpoint and its step; half-written and newer ones are deleted, and that is said."""
    folders = sorted(run.path("checkpoints/.").glob("checkpoint-*"), key=lambda p: -int(p.name.split("-")[1]))
    for folder in folders:
        if (folder / MARK).exists():
            return str(folder), int(folder.name.split("-")[1])
        run.progress.warn(f"{folder.name} is half-written; deleted")
        shutil.rmtree(folder)
    return None, 0


def _arguments(run: Run) -> TrainingArguments:
    settings, cuda = run.config.train, torch.cuda.is_available()
    together = settings.micro_rows * int(os.environ.get("WORLD_SIZE", "1"))
    if settings.batch_rows % together:
        what = f"train.batch_rows={settings.batch_rows} is no multiple of train.micro_rows={settings.micro_rows}"
        raise KitError(f"{what} times the processes ({together // settings.micro_rows}).", "Change one of them.", 2)
    paged = settings.optimizer == "paged_adamw_8bit" or (settings.optimizer == "auto" and cuda)
    return TrainingArguments(
        str(run.folder / "checkpoints"),
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        lr_scheduler_type=settings.schedule.replace("constant", "constant_with_warmup"),
        warmup_steps=settings.warmup_ratio,
        max_grad_norm=settings.max_grad_norm,
        optim="paged_adamw_8bit" if paged else "adamw_torch",
        per_device_train_batch_size=settings.micro_rows,
        gradient_accumulation_steps=settings.batch_rows // together,
        num_train_epochs=1,  # `order` lays all epochs out in one
        train_sampling_strategy="sequential",
        seed=run.config.seed,
        bf16=cuda and settings.dtype != "fp32",
        use_cpu=not cuda,
        dataloader_pin_memory=cuda,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        save_steps=settings.save_steps,
        save_total_limit=2,
        remove_unused_columns=False,
    )


def _adapter_hash(folder: Path) -> str:
    path = folder / "adapter" / WEIGHTS
    return _file_hash(path) if path.exists() else ""


def _file_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
