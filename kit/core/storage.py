"""Resumable JSONL files of typed rows, and whole files that are replaced at once.

A line carries a digest of its fields: an edited row and a line cut off by a power failure are found
when the file is read, set aside, and made again. Nothing here knows what a row means.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError

from kit.core.errors import KitError
from kit.core.records import Row

# Characters that some readers of lines take for a line's end; all others JSON escapes itself.
LINE_ENDS = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}
# Fields in which equal runs may differ, and one that older runs lack.
VOLATILE = {"seconds", "earlier_samples"}
R = TypeVar("R", bound=Row)


@dataclass
class RowFile(Generic[R]):
    """Rows of one type in a JSONL file, which need not exist; appended one by one and flushed."""

    path: Path
    kind: type[R]
    damaged: list[str] = field(default_factory=list)  # what `read` could not use, in words

    def read(self, repair: bool = True) -> list[R]:
        """All intact rows, in file order; of two rows with one id, the first.

        Args:
            repair: move damaged lines, which `damaged` names, to NAME.damaged.
        """
        rows: dict[str, R] = {}
        damaged_lines: list[bytes] = []
        self.damaged = []
        content = self.path.read_bytes() if self.path.exists() else b""
        for number, line in enumerate(content.split(b"\n"), 1):
            if not line.strip():
                continue
            try:
                row = self._parse(line)
            except ValueError as error:
                self.damaged.append(f"{self.path.name} line {number}: {error}")
                damaged_lines.append(line + b"\n")
            else:
                rows.setdefault(row.id, row)
        if damaged_lines and repair:
            # Keep them for a person to look at; their rows will be made again.
            _append(self.path.with_name(f"{self.path.name}.damaged"), b"".join(damaged_lines))
            self.write_all(rows.values())
        return list(rows.values())

    def append(self, *rows: R) -> None:
        """Add rows in one write and flush them to the disk."""
        _append(self.path, "".join(map(line_of, rows)).encode())

    def write_all(self, rows: Iterable[R]) -> None:
        """Replace the file's rows at once."""
        write_atomic(self.path, "".join(map(line_of, rows)))

    def _parse(self, line: bytes) -> R:
        # The digest shows an edit, the row's own type a field that it does not know.
        try:
            raw = json.loads(line)
            recorded = raw.pop("sha")
        except (ValueError, RecursionError, AttributeError, TypeError, LookupError):
            raise ValueError("incomplete, or not a row of this kit") from None
        if recorded != text_digest(_canonical(raw)):
            raise ValueError(f"row {raw.get('id')!r} was edited: its digest differs")
        try:
            return self.kind.model_validate(raw)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise ValueError(f"row {raw.get('id')!r} is of another format ({reason})") from None


def line_of(row: Row) -> str:
    """A row as its JSON line, digest last."""
    raw = row.model_dump(mode="json")
    raw["sha"] = text_digest(_canonical(raw))
    return as_line(json.dumps(raw, ensure_ascii=False))


def as_line(text: str) -> str:
    """A JSON text as a line that every reader of lines sees as one."""
    return text.translate(LINE_ENDS) + "\n"


def digest(rows: Iterable[BaseModel]) -> str:
    """One hash of rows, order and volatile fields aside.

    It is equal for an interrupted and an uninterrupted run.
    """
    lines = [_canonical(row.model_dump(mode="json", exclude=VOLATILE)) for row in rows]
    return text_digest("".join(sorted(lines)), 16)


def write_atomic(path: Path, text: str) -> None:
    """Write a whole file next to `path` and rename it, so that no reader ever sees half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with _disk_errors(path, undo=temporary.unlink):
        _write(temporary, "wb", text.encode(errors="backslashreplace"))
        temporary.replace(path)


def _append(path: Path, data: bytes) -> None:
    """Append all of the data, or nothing: a torn row would swallow the next one."""
    size = path.stat().st_size if path.exists() else 0
    if size and not _ends_line(path):
        # an editor's last line, or one that was torn off: it takes no row with it
        data = b"\n" + data
    with _disk_errors(path, undo=lambda: os.truncate(path, size)):
        _write(path, "ab", data)


def _ends_line(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _write(path: Path, mode: str, data: bytes) -> None:
    with open(path, mode) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _disk_errors(path: Path, undo: Callable[[], Any]) -> Iterator[None]:
    """Undo a failed write and name the reason: the disk is full, read-only or gone."""
    try:
        yield
    except OSError as error:
        with contextlib.suppress(OSError):
            undo()
        hint = (
            "Every finished row is safe. Free some space or fix the folder's permissions, "
            "then run the same command again."
        )
        raise KitError(f"{path} could not be written: {error.strerror}.", hint) from None


def _canonical(raw: Any) -> str:
    return json.dumps(raw, ensure_ascii=False, sort_keys=True)


def text_digest(text: str, digits: int = 12) -> str:
    """SHA-256 of a text, its first hex digits."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:digits]
