"""The typed rows that pass between stages, and their resumable JSONL files.

Every unit of work leaves exactly one row in its stage's file, a rejected one too (with the reason), so
the funnel adds up by construction. A line carries a digest of its fields: an edited row and a line cut
off by a power failure are found when the file is read, set aside, and made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from kit.errors import KitError

VOLATILE = {"seconds"}  # fields in which equal runs may differ

Label = Literal["ENOUGH", "NOT_ENOUGH", "UNPARSED"]


def sound(text: str) -> str:
    """Text with U+FFFD for lone surrogates, which neither UTF-8 nor any tokenizer takes."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


class Part(BaseModel):
    """A frozen piece of a row; its texts are sound."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _sound(cls, value: Any) -> Any:
        return sound(value) if isinstance(value, str) else value


class Row(Part):
    """A question with its gold answer; what every row has. Several traces of one question have ids of their own."""

    id: str
    question: str
    answer: str


class Problem(Row):
    """A question as the data has it."""

    solution: str | None = None  # a worked solution
    trace: str | None = None  # a long chain of thought
    level: str | None = None
    subject: str | None = None


class Sample(Part):
    """One generated text and what became of it."""

    text: str
    verdict: Literal["correct", "wrong", "unparsed", "timeout"]
    answer: str | None = None  # as extracted
    finish: Literal["stop", "length", "loop", "error"] = "stop"
    tokens: int = 0  # generated


class Outcome(Row):
    """What every stage's row has: what it took, and, where it left here, why."""

    seconds: float = 0.0
    rejected: str | None = None
    detail: str | None = None


class TraceRow(Outcome):
    """teach: one problem, its sampled traces, and which of them go on."""

    samples: tuple[Sample, ...]
    kept: tuple[int, ...]  # indices into samples


class Verdict(Part):
    """The judge's answer at one boundary: the first `sentences` sentences of the trace were shown."""

    sentences: int
    label: Label
    margin: float | None  # log-odds of ENOUGH (verbal) or log-likelihood a token (answer); None: generated


class PrefixRow(Outcome):
    """truncate: where one trace is cut. prefix == trace[:end], exactly."""

    trace: str
    end: int  # characters
    sentences: int  # kept
    sentences_total: int
    ratio: float  # sentences / sentences_total
    sufficient: bool
    verdicts: tuple[Verdict, ...] = ()
    violations: int = 0  # NOT_ENOUGH at a boundary behind an ENOUGH one
    prompt_tokens: int = 0  # of the longest judging prompt asked
    evaluated_tokens: int = 0
    reused_tokens: int = 0


class AlignedRow(Outcome):
    """align: the student's continuation from one prefix, graded."""

    prefix: str
    continuation: str
    samples: tuple[Sample, ...] = ()  # of the last round
    pass_rate: float = 0.0  # over all rounds
    kept_by: str | None = None  # first, shortest, all; with +N after N lengthening rounds
    lengthened: int = 0
    answer_in_prefix: bool = False


class EvalRow(Outcome):
    """eval: one held-out problem and a model's graded samples."""

    level: str | None = None
    subject: str | None = None
    samples: tuple[Sample, ...] = ()
    prompt_tokens: int = 0


class TrainRow(Part):
    """One alpaca row; opens in LLaMA-Factory as it is."""

    instruction: str
    input: str
    output: str


R = TypeVar("R", bound=Row)


class RowFile(Generic[R]):
    """Rows of one type in a JSONL file, which need not exist yet; appended one by one and flushed."""

    def __init__(self, path: Path, kind: type[R]) -> None:
        self.path, self.kind = path, kind
        self.damaged: list[str] = []  # what `read` found, in words

    def read(self, mend: bool = True) -> list[R]:
        """All sound rows, in file order. Damaged lines are named in `damaged`; `mend` moves them to NAME.damaged."""
        rows: dict[str, R] = {}
        bad, self.damaged = b"", []
        for number, line in enumerate(self.path.read_bytes().split(b"\n") if self.path.exists() else (), 1):
            try:
                if line.strip():
                    row = self._parse(line)
                    rows.setdefault(row.id, row)
            except ValueError as error:
                self.damaged.append(f"{self.path.name} line {number}: {error}")
                bad += line + b"\n"
        if bad and mend:
            _append(self.path.with_name(self.path.name + ".damaged"), bad)
            self.write_all(rows.values())
        return list(rows.values())

    def append(self, *new: R) -> None:
        """Add rows in one write and flush them to the disk."""
        _append(self.path, "".join(map(line_of, new)).encode())

    def write_all(self, rows: Iterable[R]) -> None:
        """Replace the file's content at once."""
        write_atomic(self.path, "".join(map(line_of, rows)))

    def _parse(self, line: bytes) -> R:
        try:
            raw = json.loads(line)
            sha = raw.pop("sha")
        except (ValueError, RecursionError, AttributeError, TypeError, LookupError):
            raise ValueError("cut off or no row of ours") from None
        if sha != _sha(_canonical(raw)):
            raise ValueError(f"row {raw.get('id')!r} was edited: its digest differs")
        try:
            return self.kind.model_validate(raw)
        except ValidationError as error:
            raise ValueError(f"row {raw.get('id')!r} is of another format ({error.errors()[0]['msg']})") from None


def line_of(row: Row) -> str:
    """A row as its JSON line, digest last."""
    raw = row.model_dump(mode="json")
    return json.dumps({**raw, "sha": _sha(_canonical(raw))}, ensure_ascii=False) + "\n"


def write_atomic(path: Path, text: str) -> None:
    """Write a whole file through a neighbour and a rename, so that no reader ever sees half of it."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with _disk(path, undo=beside.unlink):
        _write(beside, "wb", text.encode(errors="backslashreplace"))
        os.replace(beside, path)


def digest(rows: Iterable[Row]) -> str:
    """One hash over rows, volatile fields and order aside: equal for an interrupted and an uninterrupted run."""
    return _sha("".join(sorted(_canonical(row.model_dump(mode="json", exclude=VOLATILE)) for row in rows)), 16)


@contextlib.contextmanager
def _disk(path: Path, undo: Callable[[], Any]) -> Iterator[None]:
    """What to say, once what was begun is undone, when the disk is full, read-only or gone."""
    try:
        yield
    except OSError as error:
        with contextlib.suppress(OSError):
            undo()
        hint = "Every finished row is safe. Make room or mend the folder, then run the same command again."
        raise KitError(f"{path} could not be written: {error.strerror}.", hint) from None


def _append(path: Path, data: bytes) -> None:
    """Append all of the data, or nothing: a torn row would swallow the next one."""
    size = path.stat().st_size if path.exists() else 0
    with _disk(path, undo=lambda: os.truncate(path, size)):
        _write(path, "ab", data)


def _write(path: Path, mode: str, data: bytes) -> None:
    with open(path, mode) as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())


def _canonical(raw: Any) -> str:
    return json.dumps(raw, ensure_ascii=False, sort_keys=True)


def _sha(text: str, digits: int = 12) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:digits]
