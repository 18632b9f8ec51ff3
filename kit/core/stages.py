"""The stages: their order, what each depends on and writes, and the loop that makes their rows.

A stage is known by the config keys it depends on, a digest of its input and the fingerprints of its
models; kit/core/run.py compares them with the manifest. Nothing here loads a model.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from kit import Json
from kit.core.errors import KitError
from kit.core.records import AlignedRow, EvalRow, Outcome, PrefixRow, Row, TraceRow
from kit.core.storage import RowFile, digest

if TYPE_CHECKING:
    from kit.core.run import Run

Item = TypeVar("Item", bound=Row)
R = TypeVar("R", bound=Outcome)

STUDENTS_ADAPTER = "adapter of student.model"  # a fingerprint, see kit.models.fingerprints
# Config keys that change no row: only where, how fast or how safely it is made. Another
# max_num_seqs may decide a near-tie of two tokens in the rows that are still to come.
NEUTRAL = {
    "n_threads",
    "timeout_seconds",
    "retries",
    "url",
    "api_key_env",
    "kv_cache_gib",
    "cuda_graphs",
    "save_minutes",
    "max_num_seqs",
    "on_low_memory",
    "gradient_checkpointing",
    "logits_bytes",
    "served_adapter",
    "report_to",
    "matched_run",
}


@dataclass(frozen=True)
class Stage:
    """One stage of a run."""

    entry_point: str  # module:function, imported when the stage runs; it takes the run
    keys: tuple[str, ...] = ()  # config keys and sections that its rows depend on
    success_keys: tuple[str, ...] = ()  # likewise, where judge.kind is success
    input: str = ""  # what else they depend on, in words
    rows: Mapping[str, type[Outcome]] = field(default_factory=dict)  # files it writes: row type
    files: tuple[str, ...] = ()  # other files and folders it writes

    def dependencies(self, config: Mapping[str, Any]) -> Json:
        """Those of a config's dotted keys that the stage's rows depend on."""
        names = self.keys
        if config.get("judge.kind") == "success":
            names += self.success_keys
        sections = tuple(f"{name}." for name in names)
        return {
            key: value
            for key, value in config.items()
            if f"{key}.".startswith(sections) and key.split(".")[-1] not in NEUTRAL
        }

    def changes(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
        """What of the dependencies of now was different before, in words; empty: nothing."""
        changes = []
        added = []
        for key, new in sorted(now.items()):
            old = before.get(key)
            # "weights of student.model": a fingerprint. None: the model was not on this machine.
            is_fingerprint = " of " in key
            if old == new or (is_fingerprint and None in (old, new)):
                continue
            # its folder may have moved: the content tells
            content = now.get(STUDENTS_ADAPTER)
            if key == "student.adapter" and content and content == before.get(STUDENTS_ADAPTER):
                continue
            if is_fingerprint:
                changes.append(f"the {key} changed")
            elif key == "input":
                changes.append(f"{self.input} changed")
            elif key in before:
                changes.append(f"{key} changed from {old!s:.40} to {new!s:.40}")
            else:
                added.append(f"{key} now affects this stage")
        # a section's value that has become a single one, like a calibration: its keys are gone
        gone = before.keys() - now.keys()
        for section in sorted(now):
            if any(key.startswith(f"{section}.") for key in gone):
                changes.append(f"{section} changed")
        # Another judge or method brings keys of its own: it is what changed.
        return ", ".join(changes or added)


# The order of a run, and what each stage depends on and writes.
STAGE_TABLE = {
    "teach": Stage(
        "kit.pipeline.teach:teach",
        keys=("teacher", "answer_judge", "prompts.instruction", "prompts.grade", "seed"),
        input="the training problems",
        rows={"traces.jsonl": TraceRow},
    ),
    "truncate": Stage(
        "kit.pipeline.truncate:truncate",
        keys=(
            "method",
            "student",
            "answer_judge",
            "judge",
            "prompts.grade",
            "prompts.judge",
            "prompts.instruction",
            "prompts.answer_cue",
        ),
        success_keys=("align.mode", "align.sampling", "prompts.draft", "seed"),
        input="traces.jsonl",
        rows={"prefixes.jsonl": PrefixRow},
    ),
    "align": Stage(
        "kit.pipeline.align:align",
        keys=(
            "method",
            "student",
            "answer_judge",
            "align",
            "prompts.grade",
            "prompts.instruction",
            "prompts.draft",
            "seed",
        ),
        input="the prefixes",
        rows={"aligned.jsonl": AlignedRow},
        files=("train.jsonl",),
    ),
    "train": Stage(
        "kit.pipeline.train:train",
        keys=(
            "method",
            "student.model",
            "student.adapter",
            "student.system",
            "student.thinking",
            "train",
            "prompts.instruction",
            "seed",
        ),
        input="train.jsonl",
        files=("adapter", "checkpoints", "train_log.jsonl"),
    ),
    "eval": Stage(
        "kit.pipeline.evaluate:evaluate",
        keys=("method", "answer_judge", "eval", "prompts.instruction", "prompts.grade", "seed"),
        input="the evaluation problems",
        rows={"eval/*.jsonl": EvalRow},
    ),
    "report": Stage("kit.reporting.report:report"),
}
STAGES = tuple(STAGE_TABLE)


def work_through(
    run: Run,
    stage: str,
    file: RowFile[R],
    items: Sequence[Item],
    size: int | None,
    work: Callable[[list[Item]], Iterator[R]],
    at_once: int = 1,
) -> list[R]:
    """Make one row for every item, of the same id, resuming where the file ends.

    Batches are planned from all items, so that a resumed batch has the neighbours it would have
    had: a batch with a missing row runs whole, and rows that are already written stay as they are.

    Args:
        file: where each row is appended as soon as it is finished.
        size: items per batch; None: one batch of all items without a row.
        work: yields the rows of a batch's items in any order.
        at_once: items that it works on at a time, for the time left.

    Returns:
        All rows, in the order of `items`.

    Raises:
        KitError: two items have one id.
    """
    ids = [item.id for item in items]
    check_ids(ids)
    rows = _written_before(run, file, ids)
    planned = items if size else [item for item in items if item.id not in rows]
    size = size or max(1, len(planned))
    with run.progress.bar(stage, len(items), done=len(rows), at_once=at_once) as bar:
        for start in range(0, len(planned), size):
            batch = list(planned[start : start + size])
            # Complete batches are skipped, others run whole.
            if all(item.id in rows for item in batch):
                continue
            for row in work(batch):
                if row.id not in rows:
                    file.append(row)
                    rows[row.id] = row
                    bar.advance(row.processed_tokens, row.rejected or "kept")
    ordered = [rows[id] for id in ids]
    if list(rows) != ids:
        # rows that were made again, or finished early, stand at their place; training goes by it
        file.write_all(ordered)
    return ordered


def _written_before(run: Run, file: RowFile[R], ids: list[str]) -> dict[str, R]:
    """What an earlier session wrote, by id; rows of another run's input are set aside."""
    name = file.path.relative_to(run.folder).as_posix()
    rows = {row.id: row for row in run.rows(name, file.kind)}
    strangers = rows.keys() - set(ids)
    if strangers:
        run.progress.warn(
            f"{name} had {len(strangers)} rows that are of nothing in its input: {min(strangers)}; "
            "the file was moved to stale/, the others are kept"
        )
        run.set_aside([file.path])
        rows = {id: row for id, row in rows.items() if id not in strangers}
        file.write_all(rows.values())
    return rows


def check_ids(ids: Iterable[str]) -> None:
    """Refuse (KitError) two rows of one id: ids name rows, so that they would share one."""
    for id, times in Counter(ids).items():
        if times > 1:
            message = f"Two rows would be called {id!r}."
            raise KitError(message, "Rename one of the problems in the data.")


def tallies(rows: Sequence[Any]) -> Json:
    """For a stage's summary: tokens generated, and how many rows were rejected for which reason."""
    return {
        "tokens": sum(row.processed_tokens for row in rows),
        "rejected": dict(Counter(row.rejected for row in rows if row.rejected)),
    }


def file_digest(run: Run, name: str, kind: type[R]) -> str:
    """Digest of a stage file's rows as they are now."""
    return digest(run.rows(name, kind))


def file_name(model: str, which: str, dataset: str) -> str:
    """A score's file in the run's folder, e.g. eval/smollm2-135m-base-gsm8k.jsonl."""
    model_name, dataset_name = (
        re.sub(r"[^\w.-]+", "-", Path(name).name).strip("-.") for name in (model, dataset)
    )
    return f"eval/{model_name}-{which}-{dataset_name}.jsonl"
