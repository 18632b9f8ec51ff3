"""Rows of one source, from a file, the hub or the built-in generator, as typed problems with stable ids.

Where they are (a hub id or a file of the same rows; `auto` tells the formats apart by their keys):
- GSM8K, hub `openai/gsm8k` (main): {"question": "Natalia sold clips to 48 of her friends in April, ...", "answer":
  "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\\n ... #### 72"}
- MATH, hub `HuggingFaceH4/MATH-500` (test): {"problem": "Convert the point $(0,3)$ ...", "solution": "We have ...",
  "answer": "\\\\left( 3, \\\\frac{\\\\pi}{2} \\\\right)", "subject": "Precalculus", "level": 2}
- AIME and AMC: {"problem" or "question": ..., "answer": "204"}, with an "id" where there is one
- s1K, hub `simplescaling/s1K-1.1` (train): {"question", "solution", "deepseek_thinking_trajectory", ...}
- any other JSONL: `fields: {question: KEY, answer: KEY, id: KEY, trace: KEY}`

A damaged file stops the run, with file and line. A row that lacks something is set aside with its reason, and so is
a question's second row. No subset is taken here, and no two sources are compared: see kit/data.py.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kit.config import Source
from kit.errors import KitError
from kit.records import Problem, digest

BUILTIN_ROWS = 100  # of a built-in source without a limit
HUB = {  # dataset: (subset, split of training, split of evaluation), where the config names none
    "openai/gsm8k": ("main", "train", "test"),
    "HuggingFaceH4/MATH-500": (None, "test", "test"),
    "simplescaling/s1K-1.1": (None, "train", "train"),
}
_SUFFIX = re.compile(r"\.(jsonl?|ndjson|parquet|csv)$", re.IGNORECASE)
_TABLE = re.compile(r"\.(parquet|csv)$", re.IGNORECASE)
ROLES = {  # what a row may hold, and the keys it is known by, best first, in any case
    "id": ("id", "unique_id", "problem_id"),
    "question": ("question", "problem"),
    "answer": ("answer",),
    "solution": ("solution",),
    "trace": ("trace", "long_cot", "deepseek_thinking_trajectory"),
    "level": ("level",),
    "subject": ("subject", "type"),
}
Keys = dict[str, tuple[str, ...]]  # role: keys of the source at hand
Located = list[tuple[str, dict[str, Any]]]  # rows with where they stand ("line 812")


@dataclass(frozen=True)
class Rejection:
    """A row that was set aside while reading, and why."""

    id: str
    reason: str
    detail: str


@dataclass
class Reading:
    """What reading one source gave."""

    name: str
    source: Source
    format: str
    problems: list[Problem] = field(default_factory=list)
    rejected: list[Rejection] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.name = re.sub(r"[^\w.-]+", "-", self.name).strip("-.") or "data"  # it becomes part of a file's name

    def facts(self) -> dict[str, Any]:
        """For the manifest: where from, how many, and a fingerprint of the problems."""
        counts = {"rows": len(self.problems), "rejected": len(self.rejected), "fingerprint": digest(self.problems)}
        return {"path": self.source.path, "format": self.format, **counts, "notes": self.notes}


def read(source: Source, seed: int, held_out: bool = False, traces: bool = False) -> Reading:
    """All rows of a source, before any subset (built-in problems aside: they are as many as asked for).

    Args:
        traces: rows need a trace, and a question may come more than once.

    Raises:
        KitError: no such file or dataset, broken JSON (with its line), no key that is known for question or answer,
            two rows of one id, or not one usable row.
    """
    if source.path == "builtin":
        return _builtin(source, seed, held_out)
    path = source.path
    is_file = os.path.exists(path) or re.match(r"[./~]", path) or _SUFFIX.search(path)
    rows = _file_rows(source) if is_file and not _TABLE.search(path) else _dataset_rows(source, held_out)
    rows = [(where, {key.lower(): value for key, value in row.items()}) for where, row in rows]
    format_, keys = _keys(source, [row for _, row in rows])
    reading = Reading(source.name or _SUFFIX.sub("", Path(path).name), source, format_)
    ids: dict[str, str] = {}
    known: dict[str, str] = {}
    for where, row in rows:
        own_id = _text(row, keys["id"])
        try:
            problem = _problem(row, keys, reading, traces)
        except ValueError as error:
            reading.rejected.append(Rejection(own_id or where, str(error), f"{path}, {where}"))
            continue
        if own_id and own_id in ids:
            hint = "Give each row an id of its own, or none: ids are then made from the text."
            raise KitError(f"{path}: {ids[own_id]} and {where} have the same id {own_id!r}.", hint)
        text = problem.id if traces else normal(problem.question)
        if text in known:
            what = "duplicate row" if traces else "duplicate question"
            reading.rejected.append(Rejection(problem.id, what, f"{path}, {where}: stands already in {known[text]}"))
            continue
        ids[problem.id] = known[text] = where
        reading.problems.append(problem)
    if not reading.problems:
        first = next((f" The first: {gone.reason} ({gone.detail})." for gone in reading.rejected), "")
        raise KitError(f"{path}: none of {len(rows)} rows is usable.{first}", "Mend them, or map keys by fields.")
    texts = [text for problem in reading.problems for text in problem.model_dump().values() if text]
    if broken := sum(text.count("\ufffd") for text in texts):
        reading.notes.append(f"{broken} broken characters (lone surrogates become U+FFFD)")
    return reading


def normal(question: str) -> str:
    """A question up to case and white space: what makes two questions the same."""
    return " ".join(question.casefold().split())


def _builtin(source: Source, seed: int, held_out: bool) -> Reading:
    from kit.problems import generate

    steps = re.fullmatch(r"(\d)(?:-(\d))?", source.subset or "1-4")
    if not steps:
        raise KitError(f"subset {source.subset!r} of the built-in problems is no range of steps.", "Like 1-2.", 2)
    chosen, span = seed if source.seed is None else source.seed, (int(steps[1]), int(steps[2] or steps[1]))
    made = generate(source.limit or BUILTIN_ROWS, chosen, held_out, span)
    return Reading(source.name or "builtin", source, "builtin", made)


def _file_rows(source: Source) -> Located:
    """The objects of a .jsonl or .json file."""
    path = Path(os.path.expanduser(source.path))  # pathlib would raise where there is no such user
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise KitError(f"{path}, line {line}: not UTF-8 text.", "Save the file as UTF-8.") from None
    except OSError as error:
        raise KitError(f"{path} cannot be read: {error.strerror}.", "Mend the path.") from None
    if not text.strip():
        raise KitError(f"{path} is empty.", "It should hold one JSON object a line.")
    if path.suffix.lower() == ".json":  # a list, or an object with one inside
        whole = _json(text, str(path))
        inside = [value for value in whole.values() if isinstance(value, list)] if isinstance(whole, dict) else []
        listed = whole if isinstance(whole, list) else inside[0] if inside else [whole]
        rows = [(f"row {i}", row) for i, row in enumerate(listed, 1)]
    else:
        lines = ((f"line {i}", line) for i, line in enumerate(text.split("\n"), 1) if line.strip())
        rows = [(where, _json(line, f"{path}, {where}")) for where, line in lines]
    for where, row in rows:
        if not isinstance(row, dict):
            raise KitError(f"{path}, {where}: {type(row).__name__}, not an object.", "Each row is {key: value, ...}.")
    return rows


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise KitError(f"{where}: broken JSON ({error}).", "Mend or delete that line; nothing was done yet.") from None


def _dataset_rows(source: Source, held_out: bool) -> Located:
    """Rows of a hub dataset or of a table file."""
    import datasets

    path, name, options = source.path, source.path, {}
    if table := _TABLE.search(path):
        path, options = table[1].lower(), {"data_files": path, "split": "train"}
    elif not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
        raise KitError(f"{path!r} is neither a file nor a hub id.", "Write builtin, a file, or OWNER/NAME.")
    else:
        subset_name, *splits = HUB.get(path, (None, "train", "test"))
        options = {"name": source.subset or subset_name, "split": source.split or splits[held_out]}
        name = f"{path} (no such file; asked the hub)"
    try:
        datasets.disable_progress_bars()
        return [(f"row {i}", dict(row)) for i, row in enumerate(datasets.load_dataset(path, **options), 1)]
    except Exception as error:  # datasets, pyarrow and the HTTP client raise dozens of types, all of them the source's
        hint = f"Check name, subset and split ({options}); without a network give a downloaded file: data.train=FILE."
        raise KitError(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}", hint) from None


def _keys(source: Source, rows: list[dict[str, Any]]) -> tuple[str, Keys]:
    """The format, and which keys hold which role."""
    seen = {key: None for row in rows for key in row}
    shown = f"Its keys: {', '.join(seen) or 'none'}."
    if wrong := sorted(set(source.fields) - set(ROLES)):
        raise KitError(f"fields: unknown {', '.join(wrong)}.", f"A row may hold {', '.join(ROLES)}.", 2)
    if absent := [f"{role}: {key}" for role, key in source.fields.items() if key.lower() not in seen]:
        raise KitError(f"{source.path} has no key for fields {{{', '.join(absent)}}}.", shown)
    keys: Keys = dict.fromkeys(ROLES, ()) if source.format == "fields" else dict(ROLES)
    keys |= {role: (key.lower(),) for role, key in source.fields.items()}
    has = {role for role in keys if set(keys[role]) & set(seen)}
    missing = sorted({"question", "answer"} - has - ({"answer"} if "solution" in has else set()), reverse=True)
    if missing:
        hint = f"{shown} Say which is which with fields: {{question: KEY, answer: KEY}}."
        raise KitError(f"{source.path} has no key that is known for {' and '.join(missing)}.", hint)
    if source.format != "auto":
        return source.format, keys
    if "deepseek_thinking_trajectory" in seen:
        return "s1k", keys
    marked = any("####" in str(row.get(key)) for row in rows[:50] for key in keys["answer"])
    return "gsm8k" if marked else "math" if "solution" in has else "aime", keys


def _problem(row: dict[str, Any], keys: Keys, reading: Reading, traces: bool) -> Problem:
    """One row; ValueError says what it lacks."""
    value = {role: _text(row, keys[role]) for role in ROLES}
    question, answer, solution = value["question"], value["answer"], value["solution"]
    if reading.format == "gsm8k" and answer:
        worked, mark, last = answer.rpartition("####")
        answer = re.sub(r"(?<=\d),(?=\d{3})", "", last.strip()) if mark else None
        solution = f"{re.sub('<<[^>]*>>', '', worked).strip()}\nThe answer is \\boxed{{{answer}}}."
    elif not answer and solution:
        from kit.answers import last_box

        answer = last_box(solution) or (solution if reading.format == "s1k" else None)
    for role, text in {"question": question, "answer": answer, **({"trace": value["trace"]} if traces else {})}.items():
        if not text:
            raise ValueError(f"no {role} in {' or '.join(key for key in keys[role] if key in row) or 'any key'}")
    text = f"{question}\0{value['trace']}" if traces else str(question)
    made = f"{reading.name}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"
    return Problem.model_validate({**value, "id": value["id"] or made, "answer": answer, "solution": solution})


def _text(row: dict[str, Any], keys: tuple[str, ...]) -> str | None:
    """The first of the keys that holds text or a number, as text; None where none does."""
    for key in keys:
        value = row.get(key)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            return str(int(value) if value == int(value) else value)
        if isinstance(value, str) and value.strip():
            return re.sub("[\ud800-\udfff]", "\ufffd", value)  # no tokenizer takes lone surrogates
    return None
