"""Config keys and values of palign 0.1, read once more with a note that names the new one.

The names are in kit/core/old_keys.yaml. Only configs are translated: an old run folder's rows are
refused by its format (kit/core/run.py).
"""

import re
from typing import Any

from kit.core.bundled import bundled

BUILTIN_SUBSET = re.compile(r"(\d)(?:-(\d))?(?: to (\d+))?")  # "1 to 10", "1-3"


def upgrade(raw: dict[str, Any]) -> list[str]:
    """Rename old keys and values of a config in place. Returns a note about each."""
    notes = []
    old = bundled("core/old_keys")
    for name, new in old["keys"].items():
        section, key = name.split(".")
        keys = _section(raw, section)
        if key not in keys:
            continue
        value = keys.pop(key)
        if " " in new:
            notes.append(f"{name} is no longer a key: {new}")
        else:
            keys.setdefault(new, value)
            notes.append(f"{name} is now called {section}.{new}")
    for name, values in old["values"].items():
        section, key = name.split(".")
        keys = _section(raw, section)
        value = str(keys.get(key))
        if value in values:
            keys[key] = values[value]
            notes.append(f"{name}={value} is now called {values[value]}")

    # The subset of built-in problems, e.g. "1-3 to 60".
    for key, datasets in _section(raw, "data").items():
        for dataset in datasets if isinstance(datasets, list) else [datasets]:
            if isinstance(dataset, dict) and _upgrade_subset(dataset):
                notes.append(f"data.{key}.subset is now called steps and max_number")
    return notes


def _section(raw: dict[str, Any], name: str) -> dict[str, Any]:
    """The keys that a config has in a section."""
    keys = raw.get(name)
    return keys if isinstance(keys, dict) else {}


def _upgrade_subset(dataset: dict[str, Any]) -> bool:
    """Split a subset in place. Returns whether there was one."""
    subset = BUILTIN_SUBSET.fullmatch(str(dataset.get("subset")))
    if dataset.get("path", "builtin") != "builtin" or not subset:
        return False
    del dataset["subset"]
    fewest, most, largest = subset.groups()
    dataset["steps"] = [int(fewest), int(most or fewest)]
    dataset["max_number"] = int(largest or 60)
    return True
