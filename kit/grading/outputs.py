"""Rows of other people's outputs: the gold answer, the outputs and the labels of each, by the
format's own keys.

Known by their keys: lm-evaluation-harness sample logs, lighteval details (old and new), OpenCompass
predictions, Qwen2.5-Math outputs, open-r1 generations, verl and NeMo-Skills rows, vLLM batch files,
this kit's eval/*.jsonl and the paper's released files. Anything else is read by keys that the
caller names.
"""

from typing import Any, NamedTuple, get_args

from kit import Json
from kit.core.bundled import bundled
from kit.core.records import Verifier
from kit.core.table import keys_of, lookup

VERDICTS = {"correct": True, "wrong": False, "unparsed": False, "timeout": False}  # our own labels


class Keys(NamedTuple):
    """Paths that the caller names; None: recognized."""

    answer: str | None = None
    outputs: str | None = None
    labels: str | None = None


class OutputRow(NamedTuple):
    """One problem's outputs. `labels` has None where the file holds no verdict."""

    gold: str
    outputs: list[str]
    labels: list[bool | None]
    verifier: str | None


def read_output_row(row: Json, keys: Keys, gold: str | None) -> OutputRow:
    """The gold answer, outputs and labels of a row.

    Args:
        keys: what the caller names.
        gold: the answer from another file; None: the row's own.

    Raises:
        ValueError: no answer or no outputs, with the keys there are; as many labels as outputs are
            needed.
    """
    paths = _paths(row, keys)
    answer = read_gold(row, keys) if gold is None else gold
    texts = _flat(_first_value(row, paths["outputs"]))
    has_outputs = any(_has(row, path) for path in paths["outputs"])
    if not has_outputs or not all(text is None or isinstance(text, str) for text in texts):
        raise ValueError(f"no outputs that are text; its keys are {keys_of(row)}")
    if not answer.strip():
        raise ValueError(f"no answer; its keys are {keys_of(row)}")

    # one label for each output, or none at all
    labels = list(map(_verdict, _flat(_first_value(row, paths["labels"]))))
    if not _is_there(labels):
        labels = [None] * len(texts)
    if len(labels) != len(texts):
        raise ValueError(f"it has {len(texts)} outputs and {len(labels)} labels")
    verifier = row.get("verifier")
    if verifier not in get_args(Verifier):
        verifier = None
    return OutputRow(answer, [text or "" for text in texts], labels, verifier)


def _paths(row: Json, keys: Keys) -> dict[str, list[str]]:
    """Where a row has its answer, outputs and labels: as the caller says, else by its format."""
    # the last is any other file's
    for known in bundled("grading/outputs"):
        if all(_is_there(lookup(row, path)) for path in known["needs"]):
            break
    paths = {}
    for role, named in keys._asdict().items():
        paths[role] = [named] if named else known[role]
    return paths


def _is_there(value: Any) -> bool:
    return any(item is not None for item in _flat(value))


def read_gold(row: Json, keys: Keys) -> str:
    """The gold answer as text; of several choices the one that `gold_index` names; "" for none."""
    value = _first_value(row, _paths(row, keys)["answer"])
    if isinstance(value, list):
        index = lookup(row, "doc.gold_index")
        index = index[0] if isinstance(index, list) and index else index
        chosen = [value[index]] if isinstance(index, int) and index < len(value) else value
        return ", ".join(str(item) for item in chosen)
    return "" if value is None or isinstance(value, dict) else str(value)


def _first_value(row: Json, paths: list[str]) -> Any:
    """The first value that there is."""
    for path in paths:
        value = lookup(row, path)
        if value is not None:
            return value
    return None


def _has(row: Json, path: str) -> bool:
    """Whether a row has a key, even if its value is null."""
    head = path.split(".")[0].lower()
    return any(key.lower() in (head, path.lower()) for key in row)


def _flat(value: Any) -> list[Any]:
    """The items of a list, lists in it flattened; anything else alone."""
    if not isinstance(value, list):
        return [value]
    flat = []
    for item in value:
        flat.extend(_flat(item))
    return flat


def _verdict(label: Any) -> bool | None:
    """A label that is a verdict: ours, true or false, 1 or 0, 1 or -1; None for anything else."""
    if isinstance(label, str):
        return VERDICTS.get(label)
    is_verdict = isinstance(label, (bool, int, float)) and label in (-1, 0, 1)
    return label > 0 if is_verdict else None
