"""Rows of a file as dicts: JSONL, JSON, CSV, TSV or Parquet, each also gzipped.

Nothing is skipped silently: a damaged file is an error that names the line.
"""

import codecs
import csv
import gzip
import io
import json
import re
from collections.abc import Iterable
from typing import Any

from kit import Json
from kit.core.config import expand, readable
from kit.core.errors import KitError

FORMATS = ("jsonl", "json", "csv", "tsv", "parquet")
IS_FILE = re.compile(rf"[./~].*|.*\.(?:{'|'.join(FORMATS)})(?:\.gz)?", re.DOTALL)
_OTHERS = re.compile(
    r"\.(?:xlsx?|ods|arrow|feather|zip|tar|zst|bz2|xz|pkl|npz?|h5|db|sqlite|ya?ml)$"
)

Rows = list[tuple[str, Json]]  # each with its place: "line 3" or "row 3"


def read_rows(name: str) -> Rows:
    """All rows of a file.

    Args:
        name: its path; `~` is the home folder.

    Raises:
        KitError: no such file, a format that is not read, damage (with its line), or no rows.
    """
    path = expand(name)
    other = _OTHERS.search(path.name)
    if other:
        hint = f"Convert it to one of {', '.join(FORMATS)}; each may be gzipped."
        raise KitError(f"{path}: files of the format {other[0]} are not supported.", hint)
    try:
        content = readable(path).read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
        rows = _parse(content, path.name.removesuffix(".gz"))
    except _DamageError as damage:
        hint = "Each line should hold one object {key: value, ...}. Nothing was done yet."
        raise KitError(f"{path}, {damage}.", hint) from None
    except OSError as error:
        raise KitError(
            f"{path} cannot be read: {error.strerror or error}.", "Fix the path."
        ) from None
    except (ValueError, EOFError) as error:
        raise KitError(f"{path} cannot be read ({error}).", "Check the file.") from None
    if not rows:
        raise KitError(
            f"{path} is empty.", "It should hold objects {key: value, ...}, one per line."
        )
    return rows


class _DamageError(Exception):
    """Where a file is broken, and how."""


def _parse(content: bytes, name: str) -> Rows:
    if name.endswith(".parquet"):
        from pyarrow import parquet

        table = parquet.read_table(io.BytesIO(content))
        return numbered(table.to_pylist())
    content = content.removeprefix(codecs.BOM_UTF8)
    if name.endswith((".csv", ".tsv")):
        return _parse_csv(content, "\t" if name.endswith(".tsv") else ",")
    document = _whole(content)
    if document is None:
        return _parse_lines(content)
    return numbered(document)


def numbered(rows: Iterable[Json]) -> Rows:
    """Rows with their place in a table that has no lines."""
    return [(f"row {number}", row) for number, row in enumerate(rows, 1)]


def _parse_csv(content: bytes, delimiter: str) -> Rows:
    try:
        lines = io.StringIO(content.decode(), newline="")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise _DamageError(f"line {line}: broken text ({error})") from None
    reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
    rows: Rows = []
    try:
        for row in reader:
            if None in row or None in row.values():
                raise csv.Error(
                    f"{len(reader.fieldnames or ())} columns in the header, a different number here"
                )
            rows.append((f"line {reader.line_num}", row))
    except csv.Error as error:
        raise _DamageError(f"line {reader.line_num}: broken table ({error})") from None
    return rows


def _whole(content: bytes) -> list[Json] | None:
    """The rows of a file that is one JSON document; None where it holds one object per line."""
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        return None
    if isinstance(document, dict):
        # {"data": [...]} or {"0": {...}, "1": {...}}
        values = list(document.values())
        document = values[0] if len(values) == 1 else values
    if isinstance(document, list) and document and all(isinstance(row, dict) for row in document):
        return document
    return None


def _parse_lines(content: bytes) -> Rows:
    rows: Rows = []
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode())
        except (ValueError, RecursionError) as error:
            raise _DamageError(f"line {number}: broken JSON ({error})") from None
        if not isinstance(row, dict):
            kind = type(row).__name__
            raise _DamageError(f"line {number}: broken JSON ({kind}, not an object)")
        rows.append((f"line {number}", row))
    return rows


def lookup(value: Any, path: str) -> Any:
    """What a path leads to, its keys in any case: `reward_model.ground_truth`, `choices.0`, or,
    through a list without a number, into each of its items. None: there is none.
    """
    head, _, rest = path.partition(".")
    if isinstance(value, list):
        if not head.isdecimal():
            return [lookup(item, path) for item in value]
        value = dict(enumerate(value)).get(int(head))
        return lookup(value, rest) if rest else value
    if not isinstance(value, dict):
        return None
    for key in value:
        if key.lower() == path.lower():
            return value[key]
    return lookup(lookup(value, head), rest) if rest else None


def keys_of(row: Json) -> str:
    """The keys of a row with the type of each value, for messages."""
    return ", ".join(f"{key!r} ({_kind(value)})" for key, value in row.items()) or "none"


def _kind(value: Any) -> str:
    if value is None:
        return "empty"
    if isinstance(value, list):
        return f"list of {_kind(value[0])}" if value else "empty list"
    names = {str: "text", bool: "truth", int: "number", float: "number", dict: "object"}
    return names.get(type(value), type(value).__name__)
