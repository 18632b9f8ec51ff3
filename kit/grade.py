"""grade FILE: the outputs in any JSONL graded, and compared with the file's own labels where it has some.

Reads the paper's released format ({answer, output: [...], label: [...]}), our eval/*.jsonl, and any rows with an
answer and one or more outputs. Labels are only compared with, never used.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kit.answers import Grader, Item
from kit.errors import KitError
from kit.evaluate import score
from kit.records import EvalRow, Sample

NAMES = {  # keys that are looked for, the first first
    "answer": "answer gold target expected_answer ground_truth".split(),
    "output": "samples outputs output responses response completions completion predictions prediction generations "
    "generation text".split(),
    "label": "labels label correct is_correct".split(),
}


def grade_file(path: Path, verifier: str = "math") -> dict[str, Any]:
    """Grade every output of a file.

    Returns:
        problems, samples, accuracy (mean over samples) with low and high, pass_at {k: ratio}, verdicts {verdict:
        samples}, found {boxed, hashes, phrase, none: samples}: where answers stood; agreement {agree, of} with the
        file's labels (None: it has none) and differ: [{line, sample, label, verdict, answer, gold, how}].

    Raises:
        KitError: no such file, a line that is not JSON, or a row without an answer or outputs, by file and line.
    """
    rows = list(_read(path))
    if not rows:
        raise KitError(f"{path} holds no rows.", "Give a JSONL with an answer and outputs in each row.")
    with Grader() as grader:
        grades = grader.grade([Item(gold, text, verifier) for _, gold, outputs, _ in rows for text in outputs])
    graded, differ, rest, labelled = [], [], iter(grades), 0
    for line, gold, outputs, labels in rows:
        mine = [next(rest) for _ in outputs]
        samples = [Sample(text="", verdict=given.verdict, answer=given.answer) for given in mine]
        graded.append(EvalRow(id=str(line), question="", answer=gold, samples=tuple(samples)))
        labelled += len(labels)
        for number, (label, given) in enumerate(zip(labels, mine, strict=bool(labels))):
            if (given.verdict == "correct") != label:
                differ.append({"line": line, "sample": number, "label": label, **asdict(given), "gold": gold})
    scored = score(graded)
    return {
        "file": str(path),
        "problems": scored["n"],
        **{key: scored[key] for key in ("samples", "accuracy", "low", "high", "pass_at", "verdicts")},
        "found": dict(Counter(grade.how.partition(":")[0] for grade in grades)),
        "agreement": {"agree": labelled - len(differ), "of": labelled} if labelled else None,
        "differ": differ,
    }


def show(result: dict[str, Any]) -> None:
    """Print a result for a person."""
    verdicts, found = (", ".join(f"{n} {name}" for name, n in result[key].items()) for key in ("verdicts", "found"))
    print(f"{result['file']}: {result['problems']} problems, {result['samples']} samples")
    print(f"accuracy {result['accuracy']:.4f} (95% over problems: {result['low']:.3f} to {result['high']:.3f})")
    print(", ".join(f"pass@{k} {ratio:.4f}" for k, ratio in result["pass_at"].items()))
    print(f"verdicts: {verdicts}; the answer stood: {found}")
    if result["agreement"]:
        print(f"labels: {result['agreement']['agree']} of {result['agreement']['of']} agree")
    for row in result["differ"]:
        words = "  line {line}, sample {sample}: label {label}, {verdict} ({how}): {answer!r} against {gold!r}"
        print(words.format_map(row))


def _read(path: Path) -> Iterator[tuple[int, str, list[str], list[bool]]]:
    """(line, gold, outputs, labels) of each row; no labels where the row has none."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise KitError(f"{path} cannot be read: {error}", "Give a JSONL file in UTF-8.") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield number, *_fields(json.loads(line))
            except ValueError as error:  # one of json's too
                what = f"is not JSON: {error}" if isinstance(error, json.JSONDecodeError) else str(error)
                raise KitError(f"{path} line {number} {what}.", "Mend that line, or leave it out.") from None


def _fields(row: Any) -> tuple[str, list[str], list[bool]]:
    if not isinstance(row, dict):
        raise ValueError(f"holds a {type(row).__name__}, not an object")
    found = [next((row[n] for n in names if row.get(n) is not None), None) for names in NAMES.values()]
    for (what, names), value in zip(NAMES.items(), found, strict=True):
        if value is None and what != "label":
            raise ValueError(f"has no {what} (any of {', '.join(names)}); its keys: {', '.join(row)}")
    gold, outputs, labels = found
    outputs = outputs if isinstance(outputs, list) else [outputs]
    if outputs and all(isinstance(item, dict) for item in outputs):  # our own rows, graded before
        labels = [item.get("verdict") == "correct" for item in outputs]
        outputs = [item.get("text") for item in outputs]
    if not isinstance(gold, (str, int, float)) or not str(gold).strip() or not all(isinstance(t, str) for t in outputs):
        raise ValueError("has an answer or an output that is not text")
    labels = labels if isinstance(labels, list) else [] if labels is None or isinstance(labels, str) else [labels]
    if labels and len(labels) != len(outputs):
        raise ValueError(f"has {len(outputs)} outputs and {len(labels)} labels")
    return str(gold), outputs, [bool(label) for label in labels]
