"""grade FILE: the outputs in any JSONL graded, and compared with the file's own labels where it has some.

Reads the paper's released format ({answer, output: [...], label: [...]}), our eval/*.jsonl, and any rows with an
answer and one or more outputs. Labels are only compared with, never used.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kit.core.errors import KitError
from kit.core.records import EvalRow, Sample
from kit.grading.answers import Grader, Item
from kit.grading.scores import score

ANSWER = (
    "answer gold target expected_answer ground_truth"  # keys that are looked for, the first first
)
LABELS = "labels label correct is_correct"
OUTPUTS = "samples outputs output responses response completions completion predictions prediction generations text"


def grade_file(path: Path, verifier: str = "math") -> dict[str, Any]:
    """Grade every output of a file.

    Returns:
        file, problems, samples, accuracy (mean over samples) with ci_low and ci_high, pass_at {k: ratio}, verdicts {verdict:
        samples}, agreement {agree, of} with the file's labels (None: it has none) and differ: [{line, sample, label,
        gold, verdict, answer, how}].

    Raises:
        KitError: no such file, a line that is not JSON, or a row without an answer or outputs, by file and line.
    """
    scored, differ, labelled, line = [], [], 0, 0
    try:
        with Grader() as grader:
            for line, text in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
                if not text.strip():
                    continue
                gold, outputs, labels = _fields(json.loads(text))
                grades = grader.grade([Item(gold, output, verifier) for output in outputs])
                samples = tuple(Sample(text="", verdict=grade.verdict) for grade in grades)
                scored.append(EvalRow(id=str(line), question="", answer=gold, samples=samples))
                labelled += len(labels)
                for number, (label, grade) in enumerate(zip(labels, grades, strict=False)):
                    if (grade.verdict == "correct") != label:
                        facts = {"line": line, "sample": number, "label": label, "gold": gold}
                        differ.append({**facts, **grade._asdict()})
        if not scored:
            raise ValueError("there are no rows")
    except OSError as error:
        raise KitError(f"{path} cannot be read: {error.strerror}.", "Mend the path.") from None
    except ValueError as error:
        hint = f"Keys that are read, the first first: answer: {ANSWER}. outputs: {OUTPUTS}. labels: {LABELS}."
        raise KitError(
            f"{path}{f' line {line}' if line else ''} cannot be graded: {error}.", hint
        ) from None
    found = vars(score(scored))
    told = {
        key: found[key]
        for key in ("samples", "accuracy", "ci_low", "ci_high", "pass_at", "verdicts")
    }
    agreement = {"agree": labelled - len(differ), "of": labelled} if labelled else None
    return {
        "file": str(path),
        "problems": found["n"],
        **told,
        "agreement": agreement,
        "differ": differ,
    }


def _fields(row: Any) -> tuple[str, list[str], list[bool]]:
    """(answer, outputs, labels) of a row; no labels where it has none."""
    if not isinstance(row, dict):
        raise ValueError(f"it holds a {type(row).__name__}, not an object")
    gold, outputs, labels = (
        next((row[name] for name in names.split() if row.get(name) is not None), None)
        for names in (ANSWER, OUTPUTS, LABELS)
    )
    outputs, labels = (found if isinstance(found, list) else [found] for found in (outputs, labels))
    if all(isinstance(output, dict) for output in outputs):  # our own rows, graded before
        outputs, labels = (
            [o.get("text") for o in outputs],
            [o.get("verdict") == "correct" for o in outputs],
        )
    labels = [bool(label) for label in labels if isinstance(label, int)]  # words are no labels
    if gold is None or not str(gold).strip() or not all(isinstance(t, str) for t in outputs):
        raise ValueError(
            f"it lacks an answer or outputs that are text; its keys are {', '.join(row)}"
        )
    if labels and len(labels) != len(outputs):
        raise ValueError(f"it has {len(outputs)} outputs and {len(labels)} labels")
    return str(gold), outputs, labels
