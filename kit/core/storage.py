"""Resumable JSONL files of typed rows, and whole files that are replaced at once.

A line carries a digest of its fields: an edited row and a line cut off by a power failure are found when the
file is read, set aside, and made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import ValidationError

from kit.core.errors import KitError
from kit.core.records import Row

VOLATILE = {"seconds"}  # fields in which equal runs may differ


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
        for number, line in enumerate(
            self.path.read_bytes().split(b"\n") if self.path.exists() else (), 1
        ):
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
            raise ValueError(
                f"row {raw.get('id')!r} is of another format ({error.errors()[0]['msg']})"
            ) from None


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
    return _sha(
        "".join(sorted(_canonical(row.model_dump(mode="json", exclude=VOLATILE)) for row in rows)),
        16,
    )


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
