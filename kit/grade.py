"""grade FILE: the outputs in any JSONL graded, and compared with the file's own labels where it has some.

Reads the paper's released format ({answer, output: [...], label: [...]}), our eval/*.jsonl, and any rows with an
answer and one or more outputs. Labels are only compared with, never used.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kit.answers import Grader, Item
from kit.errors import KitError
from kit.evaluate import score
from kit.records import EvalRow, Sample

NAMES = {  # keys that are looked for, the first first
    "answer": "answer gold target expected_answer ground_truth",
    "outputs": "samples outputs output responses response completions completion predictions prediction generations "
    "generation text",
    "labels": "labels label correct is_correct",
}


def grade_file(path: Path, verifier: str = "math") -> dict[str, Any]:
    """Grade every output of a file.

    Returns:
        problems, samples, accuracy (mean over samples) with low and high, pass_at {k: ratio}, verdicts {verdict:
        samples}, found {boxed, hashes, phrase, none: samples}: where answers stood; agreement {agree, of} with the
        file's labels (None: it has none) and differ: [{line, sample, label, verdict, answer, how, gold}].

    Raises:
        KitError: no such file, a line that is not JSON, or a row without an answer or outputs, by file and line.
    """
    scored, differ, labelled, places = [], [], 0, Counter()
    with Grader() as grader:
        for line, gold, texts, labels in _read(path):
            grades = grader.grade([Item(gold, text, verifier) for text in texts])
            samples = tuple(Sample(text="", verdict=grade.verdict) for grade in grades)
            scored.append(EvalRow(id=str(line), question="", answer=gold, samples=samples))
            places.update(grade.how.partition(":")[0] for grade in grades)
            labelled += len(labels)
            for number, (label, grade) in enumerate(zip(labels, grades, strict=bool(labels))):
                if (grade.verdict == "correct") != label:
                    facts = {"line": line, "sample": number, "label": label, "gold": gold}
                    differ.append({**facts, **grade._asdict()})
    found = score(scored)
    told = {key: found[key] for key in ("samples", "accuracy", "low", "high", "pass_at", "verdicts")}
    agreement = {"agree": labelled - len(differ), "of": labelled} if labelled else None
    about = {"file": str(path), "problems": found["n"], **told, "found": dict(places)}
    return {**about, "agreement": agreement, "differ": differ}


def _read(path: Path) -> Iterator[tuple[int, str, list[str], list[bool]]]:
    """(line, answer, outputs, labels) of each row; no labels where the row has none."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise KitError(f"{path} cannot be read: {error}", "Give a JSONL file in UTF-8.") from None
    if not any(line.strip() for line in lines):
        raise KitError(f"{path} holds no rows.", "Give a JSONL with an answer and outputs in each row.")
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                yield number, *_fields(json.loads(line))
        except json.JSONDecodeError as error:
            raise KitError(f"{path} line {number} is not JSON: {error}.", "Mend that line, or leave it out.") from None
        except ValueError as error:
            names = ". ".join(f"{what}: {keys}" for what, keys in NAMES.items())
            raise KitError(f"{path} line {number} {error}.", f"Keys that are read, the first first: {names}.") from None


def _fields(row: Any) -> tuple[str, list[str], list[bool]]:
    if not isinstance(row, dict):
        raise ValueError(f"holds a {type(row).__name__}, not an object")
    gold, outputs, labels = (
        next((row[name] for name in names.split() if row.get(name) is not None), None) for names in NAMES.values()
    )
    outputs, labels = (found if isinstance(found, list) else [found] for found in (outputs, labels))
    if all(isinstance(output, dict) for output in outputs):  # our own rows, graded before
        outputs, labels = [o.get("text") for o in outputs], [o.get("verdict") == "correct" for o in outputs]
    labels = [bool(label) for label in labels if isinstance(label, int)]  # words are no labels
    if gold is None or not str(gold).strip() or not all(isinstance(t, str) for t in outputs):
        raise ValueError(f"lacks an answer or outputs that are text; its keys are {', '.join(row)}")
    if labels and len(labels) != len(outputs):
        raise ValueError(f"has {len(outputs)} outputs and {len(labels)} labels")
    return str(gold), outputs, labels
