"""grade FILE: the outputs in any file graded, and compared with the file's own labels where it has
some.

Beside the kit's own verdicts stand those of the paper's grader (published.py), so that published
numbers can be reproduced. Labels are only compared with, never used.
"""

from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from kit import Json
from kit.core.bundled import bundled
from kit.core.errors import KitError
from kit.core.records import EvalRow, Sample
from kit.core.table import keys_of, lookup, read_rows
from kit.grading.answers import Grader, Item
from kit.grading.outputs import Keys, OutputRow, read_gold, read_output_row
from kit.grading.scores import score


class Source(NamedTuple):
    """A file of outputs, and where its gold answers are."""

    path: Path
    keys: Keys = Keys()
    gold: Path | None = None  # another file with the gold answers
    # the key that both files share; OUTPUT_KEY=GOLD_KEY where the names differ
    on: str | None = None
    bare: bool = False  # the outputs are extracted answers


def grade_file(source: Source | Path, verifier: str = "math") -> Json:
    """Grade every output of a file.

    Returns:
        file, problems, samples, accuracy (mean over samples) with ci_low and ci_high, pass_at {k:
        ratio}, verdicts {verdict: samples}, agreement {agree, of} with the file's labels (None: it
        has none), as_published {accuracy, pass_at, agreement} by the paper's grader, differ:
        [{line, sample, label, gold, verdict, answer, how}], and a note where no output holds an
        answer.

    Raises:
        KitError: no such file, a damaged one, or a row without an answer or outputs, by file and
            line.
    """
    if isinstance(source, Path):
        source = Source(source)
    rows: list[EvalRow] = []
    differ = []
    agreed = []  # of each label, whether our verdict is the same
    published_agreed = []  # and that of the paper's grader
    with Grader() as grader:
        for where, row in _read(source):
            items = [Item(row.gold, output, row.verifier or verifier) for output in row.outputs]
            grades = grader.grade(items, source.bare)
            # the paper's grader reads whole outputs
            if source.bare:
                items = [item._replace(output=f"\\boxed{{{item.output}}}") for item in items]
            published = grader.as_published(items)
            samples = tuple(Sample(text="", verdict=grade.verdict) for grade in grades)
            fields = {"id": str(len(rows)), "question": "", "answer": row.gold}
            rows.append(EvalRow(**fields, samples=samples, published=tuple(published)))
            # beside the file's own labels
            for number, label in enumerate(row.labels):
                if label is None:
                    continue
                grade = grades[number]
                is_agreed = label == (grade.verdict == "correct")
                agreed.append(is_agreed)
                published_agreed.append(label == published[number])
                if not is_agreed:
                    line = int(where.split()[-1])
                    about = {"line": line, "sample": number, "label": label, "gold": row.gold}
                    differ.append({**about, **grade._asdict()})
    scores = asdict(score(rows))
    result = {
        "file": str(source.path),
        "problems": scores["n"],
        **{name: scores[name] for name in _FIGURES},
        "agreement": _agreement(agreed),
        "as_published": {
            **(scores["as_published"] or {}),
            "agreement": _agreement(published_agreed),
        },
        "differ": differ,
    }
    # extracted answers, graded as whole outputs
    if set(scores["verdicts"]) == {"unparsed"}:
        result["note"] = "No output holds an answer. If they are extracted answers, add --bare."
    return result


_FIGURES = ("samples", "accuracy", "ci_low", "ci_high", "pass_at", "verdicts")


def _read(source: Source) -> list[tuple[str, OutputRow]]:
    golds = _read_golds(source) if source.gold else {}
    own_key = (source.on or "").split("=")[0]
    rows = []
    for where, row in read_rows(str(source.path)):
        try:
            gold = None
            if source.gold:
                shared = lookup(row, own_key)
                gold = golds.get(str(shared))
                if gold is None:
                    raise ValueError(f"{source.gold} has no row whose {source.on} is {shared!r}")
            rows.append((where, read_output_row(row, source.keys, gold)))
        except ValueError as error:
            any_file = bundled("grading/outputs")[-1]
            hint = "Name the keys by --answer, --outputs and --labels. Without them, the first of: "
            for role in Keys._fields:
                hint += f"{role}: {' '.join(any_file[role])}. "
            message = f"{source.path}, {where}, cannot be graded: {error}."
            raise KitError(message, hint) from None
    return rows


def _read_golds(source: Source) -> dict[str, str]:
    """The gold answers of another file by the shared key."""
    key = (source.on or "").split("=")[-1]
    golds: dict[str, str] = {}
    for where, row in read_rows(str(source.gold)):
        answer = read_gold(row, source.keys)
        if lookup(row, key) is None or not answer:
            message = f"{source.gold}, {where}: no {key or 'shared key'} or no answer."
            raise KitError(message, f"Name them by --on and --answer. Its keys: {keys_of(row)}.", 2)
        shared = str(lookup(row, key))
        if golds.setdefault(shared, answer) != answer:
            message = f"{source.gold}, {where}: a second, other answer for {key} {shared!r}."
            raise KitError(message, "Keep one of the two rows.", 2)
    return golds


def _agreement(agreed: list[bool]) -> dict[str, int] | None:
    return {"agree": sum(agreed), "of": len(agreed)} if agreed else None
