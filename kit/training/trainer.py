"""train: QLoRA on the training rows (section 3.4, Eq. 2), on transformers' Trainer.

Paper: LoRA on 16-bit weights. Here: the same adapter on an NF4 base, unless train.dtype says
otherwise. Rows become token ids in sft_data.py; memory is estimated in plan.py. Of a checkpoint
nothing is unpickled but what torch's `weights_only` admits: tensors, numbers and their containers.
"""

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
from peft import (
    LoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

from kit import Json
from kit.core.card import half_dtype
from kit.core.config import Config, expand
from kit.core.errors import KitError
from kit.core.fingerprints import BASE
from kit.core.memory import is_out_of_memory, peak_bytes, reset_peak
from kit.core.run import Run, trained_adapter
from kit.core.storage import write_atomic
from kit.core.threads import watch
from kit.models import adapted_layers, check_base, content_of, load_model
from kit.prompts import template_hash
from kit.training import trackers
from kit.training.gradient_check import check_gradient, lost_gradient_is_an_error
from kit.training.loss import IGNORED, attach
from kit.training.plan import accumulation_steps, as_keys, savers, uses_8_bit_optimizer
from kit.training.sft_data import Example, collate, order

MARK = "complete"  # the file that a whole checkpoint has
FIXED_ROWS = 4  # rows whose loss is read before and after
LEAST_STEPS = 4  # with a warm-up
CHECKED_TOKENS = 64  # of the target, on which the gradient is checked
FIRST_SCALE = 2.0**10  # of the loss in fp16; torch's own, 2^16, overflows in the gradient check


def make_model(config: Config) -> Any:
    """The student with a fresh adapter, or with that of `train.init`, ready for the `attach`ed
    loss.

    Raises:
        KitError: an adapter of another base or shape to go on from.
    """
    settings = config.train
    base = load_model(config.student.model, dtype=settings.dtype, for_training=True)
    base.requires_grad_(False)
    if settings.gradient_checkpointing:
        base.activation_checkpointing_enable({"use_reentrant": False})
        # else no gradient crosses the frozen embeddings into a checkpoint
        base.enable_input_require_grads()
    attach(base, settings.logits_bytes)
    lora = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=adapted_layers(base),
        task_type="CAUSAL_LM",
    )
    set_seed(config.seed)  # the adapter's values do not depend on what loading drew
    model = get_peft_model(base, lora)
    if settings.init == "last" and config.student.adapter:
        _take_weights(model, trained_adapter(expand(config.student.adapter)), config)
    watch(model)
    return model


def _take_weights(model: Any, adapter: Path, config: Config) -> None:
    """Give a fresh adapter the weights of a trained one."""
    check_base(adapter, config.student.model)
    saved = json.loads((adapter / "adapter_config.json").read_bytes())
    shape = {"r": config.train.rank, "lora_alpha": config.train.alpha}
    for key, value in shape.items():
        if saved[key] != value:
            message = f"{adapter} has {key} {saved[key]}, and the config trains {value}."
            raise KitError(message, "Set train.rank and train.alpha to it, or train.init=fresh.")
    tensors = load_file(adapter / "adapter_model.safetensors")
    odd = get_peft_model_state_dict(model, save_embedding_layers=False).keys() ^ tensors.keys()
    if odd:
        message = f"{adapter} is on other layers than are trained now: {min(odd)}."
        raise KitError(message, "Set train.init=fresh.")
    set_peft_model_state_dict(model, tensors)


class AdapterTrainer(Trainer):
    """A Trainer with a token mean over the step, checks before updates, and whole checkpoints."""

    loss_is_scaled_for_ga = True

    def __init__(self, run: Run, model: Any, examples: Sequence[Example]) -> None:
        lengths = [len(example.ids) for example in examples]
        rows = [examples[index] for index in order(lengths, run.config)]
        arguments = _arguments(run)
        # a warm-up begins at a rate of zero: of few steps, one would be lost
        if math.ceil(len(rows) / run.config.train.batch_size) < LEAST_STEPS:
            arguments.warmup_steps = 0
        super().__init__(model, arguments, data_collator=collate, train_dataset=rows)
        self.rows = rows
        self.model_accepts_loss_kwargs = True
        self.remove_callback(PrinterCallback)  # standard output is for --json
        self.run = run
        self.bar: Any = None
        self.step_began = time.perf_counter()
        self.saved_seconds = 0.0  # of training since the last checkpoint, over all processes
        self.step_examples: list[Example] = []
        self.is_checked = False  # the gradient, by this process
        if self.accelerator.scaler:
            self.accelerator.scaler = torch.amp.GradScaler(init_scale=FIRST_SCALE)

    def training_step(self, model: Any, inputs: Json, num_items_in_batch=None) -> Any:
        """A micro-batch's forward and backward pass; before the first, the gradient is checked."""
        if not self.is_checked:
            self._check_gradient(model)
            self.is_checked = True
            self.step_began = time.perf_counter()
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self, model: Any, inputs: Json, return_outputs=False, num_items_in_batch=None
    ) -> torch.Tensor:
        """The micro-batch's summed loss over the step's supervised tokens; KitError: not finite."""
        examples = inputs.pop("examples")
        self.step_examples += examples
        loss: Any = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        if not torch.isfinite(loss):
            raise self._not_finite("loss", examples)
        return loss

    def _check_gradient(self, model: Any) -> None:
        """Compare the gradient of this very loop with the loss's slope, on the shortest row."""
        shortest = min(self.rows, key=lambda example: len(example.ids))
        example = replace(shortest, ids=shortest.ids[: shortest.prompt_tokens + CHECKED_TOKENS])
        batch = self._prepare_inputs(collate([example]))
        ids = batch["input_ids"]
        labels = batch["labels"]

        def backward() -> None:
            """Add the batch's gradient to the weights', as a training step does."""
            # every process has this row, and the tokens of all of them are counted
            total = (labels != IGNORED).sum() * self.accelerator.num_processes
            super(AdapterTrainer, self).training_step(model, dict(batch), total)
            if self.accelerator.scaler:
                for weight in model.parameters():
                    if weight.grad is not None:
                        weight.grad /= self.accelerator.scaler.get_scale()

        def loss() -> torch.Tensor:
            """The batch's mean loss per supervised token, nothing changed."""
            return model(input_ids=ids, labels=labels)["loss"]

        slopes = check_gradient(model, backward, loss)
        self.step_examples.clear()
        self.run.record(gradient_check=[slope._asdict() for slope in slopes])
        numbers = "; ".join(map(str, slopes))
        self.run.progress.say(
            f"train: gradient equals the loss's slope ({example.name}): {numbers}"
        )

    def _clip_grad_norm(self, model: Any) -> Any:
        """Clip; the last moment before the update, so this is where a bad gradient is found."""
        norm = super()._clip_grad_norm(model)
        scaler = self.accelerator.scaler
        # in fp16 an overflow is expected: the scaler skips this update and halves its scale
        overflow_is_expected = scaler and scaler.get_scale() > 1
        if not math.isfinite(norm) and not overflow_is_expected:
            raise self._not_finite("gradient", self.step_examples)
        return norm

    def _not_finite(self, quantity: str, examples: Sequence[Example]) -> KitError:
        names = ", ".join(example.name for example in examples)
        return KitError(
            f"The {quantity} of step {self.state.global_step + 1} is not finite; the weights were "
            f"not updated. Rows: {names}.",
            "Look at these rows; then try a lower train.learning_rate, train.dtype=bf16 or "
            "train.micro_batch_size=1. Training then starts over.",
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """One line of train_log.jsonl per step; a checkpoint's state has them all."""
        now = time.perf_counter()
        seconds = now - self.step_began
        self.step_began = now
        tokens = sum(len(example.ids) for example in self.step_examples)
        self.step_examples = []
        # sums over all processes, so that they agree on when to save
        sums = torch.tensor([tokens, seconds], device=self.args.device)
        all_tokens, all_seconds = self.accelerator.reduce(sums).tolist()
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)
        if "loss" not in logs:  # the Trainer's own summary
            return
        self.saved_seconds += all_seconds / self.accelerator.num_processes
        if self.saved_seconds >= 60 * self.run.config.train.save_minutes:
            self.control.should_save = True
            self.saved_seconds = 0.0
        self.state.log_history.append(
            {
                "step": self.state.global_step,
                "loss": logs["loss"],
                "learning_rate": logs["learning_rate"],
                "grad_norm": logs["grad_norm"],
                "tokens": int(all_tokens),
                "tokens_per_second": round(all_tokens / seconds, 1),
                "seconds": round(seconds, 3),
                "peak_bytes": peak_bytes(),
            }
        )
        if self.run.is_main_process:
            lines = [json.dumps(row, sort_keys=True) + "\n" for row in self.state.log_history]
            write_atomic(self.run.folder / "train_log.jsonl", "".join(lines))
            self.bar.advance(tokens=int(all_tokens))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save, then mark as whole: without its mark a checkpoint counts as half-written."""
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            (folder / "training_args.bin").unlink()  # pickled objects, which nobody needs
            # a power cut must not leave the mark alone
            for path in folder.iterdir():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
            write_atomic(folder / MARK, "")


def fit(run: Run, tokenizer: Any, examples: Sequence[Example]) -> Json:
    """Train, save the adapter, and return the stage's summary for the manifest."""
    config = run.config
    student = config.student
    run.record(template_hash=template_hash(tokenizer, config.prompts, student))
    reset_peak()
    model = make_model(config)
    trainer = AdapterTrainer(run, model, examples)
    fixed = examples[:FIXED_ROWS]

    # train, from the last checkpoint where there is one
    checkpoint = _last_checkpoint(run)
    steps = math.ceil(len(trainer.rows) / config.train.batch_size)
    done = 0
    if checkpoint:
        done = _step(checkpoint)
        run.progress.say(f"train: resuming from step {done} of {steps}")
    with (
        lost_gradient_is_an_error(),
        run.progress.bar("train", steps, "steps", done=done) as trainer.bar,
    ):
        try:
            # what training does to the loss of some of its rows
            before = _mean_loss(model, fixed)
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise _out_of_memory(trainer) from error

    after = _mean_loss(model, fixed)
    if run.is_main_process:
        save_adapter(model, run.folder / "adapter", student.model)
    trainer.accelerator.free_memory()
    log = trainer.state.log_history
    tokens = sum(row["tokens"] for row in log)
    seconds = sum(row["seconds"] for row in log)
    return {
        "gradient_check": run.manifest.get("gradient_check"),
        "fixed_batch_before": before,
        "fixed_batch_after": after,
        "fixed_batch_rows": len(fixed),
        "processes": trainer.accelerator.num_processes,
        "peak_bytes": max(row["peak_bytes"] for row in log),
        "tokens_per_second": round(tokens / seconds, 1),
    }


def save_adapter(model: Any, folder: Path, base: str) -> None:
    """Save an adapter, and beside it what its base is by name and content."""
    adapter = model.peft_config["default"]
    # a set has another order in every process, and equal adapters have equal files
    adapter.target_modules = sorted(adapter.target_modules)
    model.save_pretrained(folder)
    write_atomic(folder / BASE, json.dumps({"model": base, **content_of(base)}, indent=1))


def _out_of_memory(trainer: AdapterTrainer) -> KitError:
    longest = max(len(example.ids) for example in trainer.rows)
    changes = {**savers(trainer.run.config.train), "max_seq_tokens": longest * 3 // 4}
    return KitError(
        f"Training ran out of memory in step {trainer.state.global_step + 1}; its rows have up to "
        f"{longest} tokens, its peak was {peak_bytes() / 2**30:.1f} GiB.",
        f"Set some of {as_keys(changes)}; `palign.py plan CONFIG` estimates each. Changing "
        "gradient_checkpointing or logits_bytes, or closing what else uses the memory, resumes "
        "from the last checkpoint; changing another key starts the training anew.",
    )


def _mean_loss(model: Any, examples: Sequence[Example]) -> float:
    """Mean loss of the examples' supervised tokens; leaves the model in evaluation mode."""
    model.eval()
    losses = []
    for example in examples:
        batch = collate([example])
        ids = batch["input_ids"].to(model.device)
        with torch.no_grad():
            losses.append(model(input_ids=ids, labels=batch["labels"].to(model.device))["losses"])
    return torch.cat(losses).mean().item()


def _last_checkpoint(run: Run) -> Path | None:
    """The newest whole checkpoint; half-written ones are deleted."""
    folders = run.path("checkpoints/.").glob("checkpoint-*")
    for folder in sorted(folders, key=_step, reverse=True):
        if (folder / MARK).exists():
            return folder
        # one process deletes for all
        if run.is_main_process:
            run.progress.warn(f"{folder.name} is half-written; deleted")
            shutil.rmtree(folder)
    return None


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


class OneDevice(TrainingArguments):
    """One process trains on one device; for more, start one process each (accelerate launch)."""

    @property
    def n_gpu(self) -> int:
        """At most 1: the Trainer would split each batch over all visible cards (DataParallel)."""
        return min(1, super().n_gpu)


def _arguments(run: Run) -> TrainingArguments:
    settings = run.config.train
    # where the Trainer's own callback writes, which takes no argument
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(run.folder / trackers.FOLDER)
    if os.environ.get("ACCELERATE_USE_FSDP"):
        message = "FSDP shards the gradients and the adapter, which training reads whole."
        raise KitError(message, "Run accelerate launch without it: each card has the base.", 2)
    cuda = torch.cuda.is_available()
    same = {"learning_rate", "weight_decay", "max_grad_norm"}
    autocasts = cuda and settings.dtype != "fp32"
    half = half_dtype(settings.dtype)
    return OneDevice(
        str(run.folder / "checkpoints"),
        **settings.model_dump(include=same),
        lr_scheduler_type=settings.lr_scheduler.replace("constant", "constant_with_warmup"),
        warmup_steps=settings.warmup_ratio,
        optim="paged_adamw_8bit" if uses_8_bit_optimizer(settings, cuda) else "adamw_torch",
        per_device_train_batch_size=settings.micro_batch_size,
        gradient_accumulation_steps=accumulation_steps(settings),
        num_train_epochs=1,  # `order` lays all epochs out in one
        train_sampling_strategy="sequential",
        seed=run.config.seed,
        bf16=autocasts and half == torch.bfloat16,
        fp16=autocasts and half == torch.float16,
        use_cpu=not cuda,
        dataloader_pin_memory=cuda,
        logging_steps=1,
        save_steps=1 << 30,  # `log` says when; the last step is always saved
        report_to=list(settings.report_to),
        run_name=run.config.name,
        project=trackers.PROJECT,
        disable_tqdm=True,
        save_total_limit=2,
        remove_unused_columns=False,
    )
