"""Config keys and values of palign 0.1, read once more with a note that names the new one.

Only configs are translated. An old run folder's rows are refused by its format (kit/core/run.py).
"""

from __future__ import annotations

import re
from typing import Any

MODEL_KEYS = {
    "parallel": "max_num_seqs",
    "memory_gib": "kv_cache_gib",
    "threads": "n_threads",
    "gpu_layers": "n_gpu_layers",
}
# Section: {old key: new key, or None where it is gone}
KEYS: dict[str, dict[str, str | None]] = {
    "teacher": {**MODEL_KEYS},
    "student": {**MODEL_KEYS},
    "eval": {**MODEL_KEYS, "before": "base"},
    "judge": {
        "read": "answer_scoring",
        "rule": "scan_rule",
        "chunk_tokens": None,
    },
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
# (section, key, old value): new value
VALUES = {
    ("judge", "search", "fresh"): "uncached",
    ("teacher", "backend", "worked"): "reference",
    ("train", "on_too_long", "cut"): "truncate",
    ("train", "on_low_memory", "ignore"): "warn",
}
BUILTIN_SUBSET = re.compile(r"(\d)(?:-(\d))?(?: to (\d+))?")  # "1 to 10", "1-3"


def upgrade(raw: dict[str, Any]) -> list[str]:
    """Rename old keys and values of a config in place. Returns a note about each."""
    notes = []
    sections = {name: keys for name, keys in raw.items() if isinstance(keys, dict)}
    for name, renamed in KEYS.items():
        keys = sections.get(name, {})
        for old, new in renamed.items():
            if old not in keys:
                continue
            value = keys.pop(old)
            if new is None:
                notes.append(f"{name}.{old} is no longer a key")
            else:
                keys.setdefault(new, value)
                notes.append(f"{name}.{old} is now called {name}.{new}")
    for (name, key, old), new in VALUES.items():
        keys = sections.get(name, {})
        if keys.get(key) == old:
            keys[key] = new
            notes.append(f"{name}.{key}={old} is now called {new}")
    for key, datasets in sections.get("data", {}).items():
        for dataset in datasets if isinstance(datasets, list) else [datasets]:
            if isinstance(dataset, dict) and _upgrade_subset(dataset):
                notes.append(f"data.{key}.subset is now called steps and max_number")
    return notes


def _upgrade_subset(dataset: dict[str, Any]) -> bool:
    """Split the subset of built-in problems, e.g. "1-3 to 60". Returns whether there was one."""
    subset = BUILTIN_SUBSET.fullmatch(str(dataset.get("subset")))
    if dataset.get("path", "builtin") != "builtin" or not subset:
        return False
    del dataset["subset"]
    fewest, most, largest = subset.groups()
    dataset["steps"] = [int(fewest), int(most or fewest)]
    dataset["max_number"] = int(largest or 60)
    return True
