"""Config keys and values of palign 0.1, read once more with a warning that names the new one.

Only configs are translated. The rows of an old run folder are refused by its format number (kit/core/run.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

MODEL_KEYS = {
    "parallel": "max_num_seqs",
    "memory_gib": "kv_cache_gib",
    "threads": "n_threads",
    "gpu_layers": "n_gpu_layers",
}
KEYS: dict[str, dict[str, str]] = {
    "teacher": MODEL_KEYS,
    "student": MODEL_KEYS,
    "eval": {**MODEL_KEYS, "before": "base"},
    "judge": {"read": "answer_scoring", "rule": "scan_rule"},
    "align": {"lengthen": "extend_rounds"},
    "train": {
        "batch_rows": "batch_size",
        "micro_rows": "micro_batch_size",
        "cutoff_tokens": "max_seq_tokens",
        "over_cutoff": "on_too_long",
        "checkpointing": "gradient_checkpointing",
        "overfit": "on_low_memory",
        "schedule": "lr_scheduler",
    },
    "prompts": {"forced": "answer_cue"},
}
VALUES = {
    ("judge", "search"): {"fresh": "uncached"},
    ("teacher", "backend"): {"worked": "reference"},
    ("train", "on_too_long"): {"cut": "truncate"},
    ("train", "on_low_memory"): {"ignore": "warn"},
}
_BUILTIN_SUBSET = re.compile(r"(\d)(?:-(\d))?(?: to (\d+))?")


def upgrade(raw: dict[str, Any], warn: Callable[[str], None]) -> None:
    """Rename old keys and values of a config in place; `warn` gets a sentence for each."""
    for section, renamed in KEYS.items():
        keys = raw.get(section)
        if not isinstance(keys, dict):
            continue
        for old, new in renamed.items():
            if old in keys and new not in keys:
                keys[new] = keys.pop(old)
                warn(f"{section}.{old} is now called {section}.{new}")
    for (section, key), renamed in VALUES.items():
        keys = raw.get(section)
        value = keys.get(key) if isinstance(keys, dict) else None
        if isinstance(value, str) and value in renamed:
            keys[key] = renamed[value]
            warn(f"{section}.{key}={value} is now called {renamed[value]}")
    for where, dataset in _datasets(raw.get("data")):
        subset = _BUILTIN_SUBSET.fullmatch(str(dataset.get("subset")))
        if dataset.get("path", "builtin") == "builtin" and subset:
            del dataset["subset"]
            fewest, most, largest = subset.groups()
            dataset["steps"] = [int(fewest), int(most or fewest)]
            dataset["max_number"] = int(largest or 60)
            warn(f"{where}.subset of built-in problems is now called steps and max_number")


def _datasets(data: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every dataset of a config's `data` section that is written as keys."""
    if not isinstance(data, dict):
        return
    for key in ("train", "eval"):
        listed = data.get(key) if isinstance(data.get(key), list) else [data.get(key)]
        for dataset in listed:
            if isinstance(dataset, dict):
                yield f"data.{key}", dataset
