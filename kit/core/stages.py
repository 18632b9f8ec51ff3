"""The stages: their order, what each depends on and writes, and the loop that makes a row for every unit of work.

A stage is known by the config keys it depends on and by a digest of its input rows (see kit/core/run.py).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from kit.core.errors import KitError
from kit.core.records import AlignedRow, EvalRow, PrefixRow, Row, TraceRow
from kit.core.storage import RowFile, digest

if TYPE_CHECKING:
    from kit.core.run import Run

R = TypeVar("R", bound=Row)


KEYS = {  # what each stage's rows depend on, besides its input
    "teach": ("teacher", "data.train.verifier", "prompts.instruction", "seed"),
    "truncate": (
        "method",
        "student",
        "judge",
        "data.train.verifier",
        "prompts.judge",
        "prompts.answer_cue",
    ),
    "align": (
        "method",
        "student",
        "align",
        "data.train.verifier",
        "prompts.instruction",
        "prompts.draft",
        "seed",
    ),
    "train": (
        "method",
        "student.model",
        "student.system",
        "student.thinking",
        "train",
        "prompts.instruction",
        "seed",
    ),
    "eval": ("method", "eval", "prompts.instruction", "seed"),
}


NEUTRAL = {
    "n_threads",
    "timeout_seconds",
    "retries",
    "url",
    "api_key_env",
    "kv_cache_gib",
    "save_steps",
    "on_low_memory",
}


FILES: dict[str, dict[str, type[Row] | None]] = {  # what each stage writes, and what its rows are
    "teach": {"traces.jsonl": TraceRow},
    "truncate": {"prefixes.jsonl": PrefixRow},
    "align": {"aligned.jsonl": AlignedRow, "train.jsonl": None},
    "train": {"adapter": None, "checkpoints": None, "train_log.jsonl": None},
    "eval": {"eval/*.jsonl": EvalRow},
}


T = TypeVar("T")


def work_through(
    run: Run,
    stage: str,
    file: RowFile[R],
    units: Sequence[tuple[str, T]],
    size: int,
    work: Callable[[list[T]], Iterator[R]],
) -> list[R]:
    """Make one row for every unit (row id, item), resuming where the file ends; all rows, in the order of `units`.

    Batches of `size` are planned from all units, so that a resumed batch has the neighbours it would have had: a batch
    with a missing row runs whole, and rows that are already written stay as they are. `work` yields each row as it is
    finished, its id among the batch's.
    """
    if twice := [id for id, times in Counter(id for id, _ in units).items() if times > 1]:
        raise KitError(
            f"{stage}: two rows would be called {twice[0]!r}.",
            "Rename one of the problems in the data.",
        )
    rows = {
        row.id: row for row in run.rows(file.path.relative_to(run.folder).as_posix(), file.kind)
    }
    with run.progress.bar(stage, len(units), done=sum(id in rows for id, _ in units)) as bar:
        for start in range(0, len(units), size):
            batch = units[start : start + size]
            if all(id in rows for id, _ in batch):
                continue
            for row in work([item for _, item in batch]):
                if row.id not in rows:
                    file.append(row)
                    rows[row.id] = row
                    samples = sum(sample.tokens for sample in getattr(row, "samples", ()))
                    bar.advance(tokens=samples or getattr(row, "prefill_tokens", 0))
    return [rows[id] for id, _ in units]


def tallies(rows: Sequence[Any]) -> dict[str, Any]:
    """For a stage's summary: tokens generated, and how many rows left for which reason."""
    tokens = sum(sample.tokens for row in rows for sample in row.samples)
    return {
        "tokens": tokens,
        "rejected": dict(Counter(row.rejected for row in rows if row.rejected)),
    }


def file_digest(run: Run, name: str, kind: type[R]) -> str:
    """Digest of a stage file's rows as they stand."""
    return digest(run.rows(name, kind))


def file_name(model: str, which: str, dataset: str) -> str:
    """A score's file in the run's folder, e.g. eval/smollm2-135m-base-gsm8k.jsonl."""
    safe = [re.sub(r"[^\w.-]+", "-", Path(part).name).strip("-.") for part in (model, dataset)]
    return f"eval/{safe[0]}-{which}-{safe[1]}.jsonl"
