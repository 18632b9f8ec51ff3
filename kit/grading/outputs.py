"""Rows of other people's outputs: the gold answer, the outputs and the labels of each, by the
format's own keys.

Known by their keys: lm-evaluation-harness sample logs, lighteval details (old and new), OpenCompass
predictions, Qwen2.5-Math outputs, open-r1 generations, verl and NeMo-Skills rows, vLLM batch files,
this kit's eval/*.jsonl and the paper's released files. Anything else is read by keys that the
caller names.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from kit.core.table import keys_of, lookup

# Keys that are looked for in any other file, in order of preference.
ANSWERS = ("answer", "gold", "target", "expected_answer", "ground_truth", "gt", "gts")
OUTPUTS = (
    "samples", "outputs", "output", "responses", "response", "completions", "completion",
    "predictions", "prediction", "generations", "generation", "text",
)  # fmt: skip
LABELS = ("labels", "label", "correct", "is_correct")
VERIFIERS = ("math", "number", "choice", "text")


@functools.cache
def formats() -> list[dict[str, Any]]:
    """The formats of kit/grading/outputs.yaml."""
    path = Path(__file__).with_suffix(".yaml")
    loaded: list[dict[str, Any]] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return loaded


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


def read_output_row(row: dict[str, Any], keys: Keys, gold: str | None = None) -> OutputRow:
    """The gold answer, outputs and labels of a row.

    Args:
        keys: what the caller names.
        gold: the answer from another file.

    Raises:
        ValueError: no answer or no outputs, with the keys there are; as many labels as outputs are
            needed.
    """
    known = _format(row)
    answer_paths = (keys.answer,) if keys.answer else (known.get("answer", ""), *ANSWERS)
    output_paths = (keys.outputs,) if keys.outputs else (known.get("outputs", ""), *OUTPUTS)
    label_paths = (keys.labels,) if keys.labels else known.get("labels", LABELS)
    # the gold answer and what was written
    answer = gold if gold is not None else _gold(row, answer_paths)
    outputs = _first(row, output_paths)
    outputs = outputs if isinstance(outputs, list) else [outputs]
    labels = _first(row, label_paths)
    if outputs and all(isinstance(output, dict) and "text" in output for output in outputs):
        # this kit's own rows, graded before
        labels = [output.get("verdict") for output in outputs]
        labels = [None if verdict is None else verdict == "correct" for verdict in labels]
        outputs = [output["text"] for output in outputs]
    texts = _flat(outputs)
    has_outputs = any(_has(row, path) for path in output_paths)
    if not has_outputs or not all(text is None or isinstance(text, str) for text in texts):
        raise ValueError(f"no outputs that are text; its keys are {keys_of(row)}")
    if not answer.strip():
        raise ValueError(f"no answer; its keys are {keys_of(row)}")
    verdicts = [
        _verdict(label) for label in _flat(labels if isinstance(labels, list) else [labels])
    ]
    if all(verdict is None for verdict in verdicts):
        verdicts = [None] * len(texts)
    if len(verdicts) != len(texts):
        raise ValueError(f"it has {len(texts)} outputs and {len(verdicts)} labels")
    verifier = row.get("verifier") if row.get("verifier") in VERIFIERS else None
    return OutputRow(answer, [text or "" for text in texts], verdicts, verifier)


def _format(row: dict[str, Any]) -> dict[str, Any]:
    """The format whose keys a row has; {} for none."""
    for known in formats():
        if all(_pick(row, path) is not None for path in known["needs"]):
            return known
    return {}


def _gold(row: dict[str, Any], paths: tuple[str, ...]) -> str:
    """The gold answer as text; of several choices the one that `gold_index` names; "" for none."""
    value = _first(row, paths)
    if isinstance(value, list):
        index = lookup(row, "doc.gold_index")
        index = index[0] if isinstance(index, list) and index else index
        chosen = [value[index]] if isinstance(index, int) and index < len(value) else value
        return ", ".join(str(item) for item in chosen)
    return "" if value is None or isinstance(value, dict) else str(value)


def _first(row: dict[str, Any], paths: tuple[str, ...]) -> Any:
    """The first value that there is."""
    values = (_pick(row, path) for path in paths)
    return next((value for value in values if value is not None), None)


def _pick(value: Any, path: str) -> Any:
    """What a path leads to, in every item of a list on its way; None where it ends."""
    if isinstance(value, list):
        return [_pick(item, path) for item in value]
    if not isinstance(value, dict):
        return None
    whole = lookup(value, path)
    head, _, rest = path.partition(".")
    if whole is not None or not rest:
        return whole
    return _pick(lookup(value, head), rest)


def _has(row: dict[str, Any], path: str) -> bool:
    """Whether a row has a key, even if its value is null."""
    head = path.split(".")[0].lower()
    return any(key.lower() in (head, path.lower()) for key in row)


def _flat(values: list[Any]) -> list[Any]:
    flat: list[Any] = []
    for value in values:
        flat.extend(_flat(value) if isinstance(value, list) else [value])
    return flat


def _verdict(label: Any) -> bool | None:
    """A label that is a verdict: true or false, 1 or 0, 1 or -1; None for anything else."""
    is_verdict = isinstance(label, (bool, int, float)) and label in (-1, 0, 1)
    return label > 0 if is_verdict else None
