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

ANSWERS = ("answer", "gold", "target", "expected_answer", "ground_truth")
OUTPUTS = ("samples", "outputs", "output", "responses", "response", "completions", "completion", "predictions")
OUTPUTS += ("prediction", "generations", "generation", "text")
LABELS = ("labels", "label", "correct", "is_correct")


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
    items = [Item(gold, text, verifier) for _, gold, outputs, _ in rows for text in outputs]
    with Grader() as grader:
        grades = grader.grade(items)
    rest = iter(grades)
    graded, differ, agree, labelled = [], [], 0, 0
    for line, gold, outputs, labels in rows:
        mine = [next(rest) for _ in outputs]
        samples = [Sample(text="", verdict=g.verdict, answer=g.answer) for g in mine]  # type: ignore[arg-type]
        graded.append(EvalRow(id=str(line), question="", answer=gold, samples=tuple(samples)))
        for number, (label, given) in enumerate(zip(labels or [], mine, strict=bool(labels))):
            labelled, same = labelled + 1, (given.verdict == "correct") == label
            agree += same
            if not same:
                facts = {"line": line, "sample": number, "label": label, "verdict": given.verdict}
                differ.append({**facts, "answer": given.answer, "gold": gold, "how": given.how})
    scored = score(graded)
    kept = ("samples", "accuracy", "low", "high", "pass_at", "verdicts")
    return {
        "file": str(path),
        "problems": scored["n"],
        **{key: scored[key] for key in kept},
        "found": dict(Counter(grade.how.partition(":")[0] for grade in grades)),
        "agreement": {"agree": agree, "of": labelled} if labelled else None,
        "differ": differ,
    }


def show(result: dict[str, Any]) -> None:
    """Print a result for a person."""
    counts = [", ".join(f"{n} {name}" for name, n in result[key].items()) for key in ("verdicts", "found")]
    print(f"{result['file']}: {result['problems']} problems, {result['samples']} samples")
    print(f"accuracy {result['accuracy']:.4f} (95% over problems: {result['low']:.3f} to {result['high']:.3f})")
    print(", ".join(f"pass@{k} {ratio:.4f}" for k, ratio in result["pass_at"].items()))
    print(f"verdicts: {counts[0]}; the answer stood: {counts[1]}")
    if result["agreement"]:
        print(f"labels: {result['agreement']['agree']} of {result['agreement']['of']} agree")
    for row in result["differ"]:
        print(
            f"  line {row['line']}, sample {row['sample']}: label {row['label']}, {row['verdict']} ({row['how']})",
            end="",
        )
        print(f": {row['answer']!r} against {row['gold']!r}")


def _read(path: Path) -> Iterator[tuple[int, str, list[str], list[bool] | None]]:
    """(line, gold, outputs, labels) of each row."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise KitError(f"{path} cannot be read: {error}", "Give a JSONL file in UTF-8.") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise KitError(f"{where} is not JSON: {error.msg} at column {error.colno}.", "Mend that line.") from None
        if not isinstance(row, dict):
            raise KitError(f"{where} holds a {type(row).__name__}, not an object.", "Write one object a line.")
        gold = _pick(row, ANSWERS, where, "answer")
        outputs = _pick(row, OUTPUTS, where, "output")
        outputs = outputs if isinstance(outputs, list) else [outputs]
        texts = [item.get("text") if isinstance(item, dict) else item for item in outputs]
        if isinstance(gold, (dict, list, bool)) or not str(gold).strip() or not all(isinstance(t, str) for t in texts):
            raise KitError(f"{where}: the answer or an output is not text.", "Give text, or a list of texts.")
        yield number, str(gold), texts, _labels(row, outputs, where)


def _pick(row: dict[str, Any], names: tuple[str, ...], where: str, what: str) -> Any:
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise KitError(f"{where} has no {what}; its keys: {', '.join(row)}.", f"Call it one of {', '.join(names)}.")


def _labels(row: dict[str, Any], outputs: list[Any], where: str) -> list[bool] | None:
    if all(isinstance(item, dict) and "verdict" in item for item in outputs):
        return [item["verdict"] == "correct" for item in outputs]
    found = next((row[name] for name in LABELS if row.get(name) is not None), None)
    if found is None or isinstance(found, str):
        return None
    labels = found if isinstance(found, list) else [found]
    if len(labels) != len(outputs):
        raise KitError(f"{where} has {len(outputs)} outputs and {len(labels)} labels.", "Give one label an output.")
    return [bool(label) for label in labels]
