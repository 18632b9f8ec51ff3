"""Rows of a file as dicts: JSONL, JSON, CSV, TSV or Parquet, each also gzipped.

Nothing is skipped silently: a damaged file is an error that names the line.
"""

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable
from typing import Any

from kit import Json
from kit.core.config import expand, readable
from kit.core.errors import KitError

FORMATS = ("jsonl", "json", "csv", "tsv", "parquet")
IS_FILE = re.compile(rf"[./~].*|.*\.(?:{'|'.join(FORMATS)})(?:\.gz)?", re.DOTALL | re.IGNORECASE)
_OTHERS = re.compile(
    r"\.(?:xlsx?|ods|arrow|feather|zip|tar|tgz|zst|bz2|xz|pkl|npz?|h5|db|sqlite|ya?ml)(?:\.gz)?$"
)
_LFS_POINTER = b"version https://git-lfs"
# What is one object's own list, and no list of rows.
_LISTS_OF_A_ROW = ("conversations", "messages")
_WHOLE_COLUMN = 2**31 - 1  # characters: a trace is longer than the csv module's 131,072

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
        rows = _parse(content, path.name.lower().removesuffix(".gz"))
        for where, row in rows:
            if not isinstance(row, dict):
                raise _DamageError(f"{where}: broken JSON ({type(row).__name__}, not an object)")
    except _DamageError as damage:
        raise KitError(f"{path}, {damage}.", damage.hint) from None
    except (OSError, ValueError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise KitError(f"{path} cannot be read ({reason}).", "Fix the path, or the file.") from None
    if not rows:
        raise KitError(
            f"{path} is empty.", "It should hold objects {key: value, ...}, one per line."
        )
    return rows


class _DamageError(Exception):
    """Where a file is broken, and how; `hint` says what it should be like."""

    hint = "Each line should hold one object {key: value, ...}. Nothing was done yet."


class _TableDamageError(_DamageError):
    hint = "Each line should have the header's columns, or be quoted. Nothing was done yet."


def _parse(content: bytes, name: str) -> Rows:
    if content.startswith(_LFS_POINTER):
        raise ValueError("a pointer of Git LFS, not the file itself: run `git lfs pull`")
    if name.endswith(".parquet"):
        from pyarrow import parquet

        table = parquet.read_table(io.BytesIO(content))
        return numbered(table.to_pylist())
    text = _decode(content)
    if name.endswith((".csv", ".tsv")):
        return _parse_csv(text, "\t" if name.endswith(".tsv") else ",")
    return _parse_json(text)


def _decode(content: bytes) -> str:
    """The text of a file: UTF-8, or UTF-16 where its first bytes say so."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise _DamageError(f"line {line}: broken text, not UTF-8 ({error})") from None


def numbered(rows: Iterable[Json]) -> Rows:
    """Rows with their place in a table that has no lines."""
    return [(f"row {number}", row) for number, row in enumerate(rows, 1)]


def _parse_csv(text: str, delimiter: str) -> Rows:
    csv.field_size_limit(_WHOLE_COLUMN)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: Rows = []
    try:
        header = next(reader, [])
        twice = [name for name, times in Counter(header).items() if name and times > 1]
        if twice:
            raise csv.Error(f"two columns are called {twice[0]!r}")
        for values in reader:
            if values == header:
                raise csv.Error("the header again, as where files were put together")
            if values and len(values) != len(header):
                raise csv.Error(f"{len(header)} columns in the header, {len(values)} here")
            if values:
                rows.append((f"line {reader.line_num}", dict(zip(header, values, strict=True))))
    except csv.Error as error:
        message = f"line {reader.line_num}: broken table ({error})"
        raise _TableDamageError(message) from None
    return rows


def _parse_json(text: str) -> Rows:
    """The rows of one JSON document, or of one object per line."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        if not _is_document(text):
            return _parse_lines(text)
        line = getattr(error, "lineno", 1)
        raise _DamageError(f"line {line}: broken JSON ({error})") from None
    rows = _rows_of(document)
    return [("line 1", document)] if rows == [document] else numbered(rows)


def _is_document(text: str) -> bool:
    """Whether a text that is no valid JSON was meant as one document, not as one object per line:
    it is a list, or neither of its first lines is an object.
    """
    begin = text.lstrip()[:1]
    lines = [line for line in text.split("\n", 20) if line.strip()][:2]
    return begin == "[" or (begin == "{" and not any(map(_is_object, lines)))


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _rows_of(document: Any) -> list[Any]:
    """The rows of one JSON document: a list, {"data": [...]}, {"0": {...}, "1": {...}}, or one."""
    if isinstance(document, list):
        return document
    if not isinstance(document, dict) or not document:
        return [document] if document else []
    lists = {}
    for key, value in document.items():
        is_list = isinstance(value, list) and value and key.lower() not in _LISTS_OF_A_ROW
        if is_list and _are_objects(value):
            lists[key] = value
    if len(document) == len(lists) == 1:
        return next(iter(lists.values()))
    if "data" in lists and not {"question", "problem"}.intersection(map(str.lower, document)):
        return lists["data"]
    values = list(document.values())
    if not _are_objects(values):
        return [document]
    # rows share a key, and not a number, as columns in pandas' layout do
    shared = set(values[0]).intersection(*values)
    return [document] if all(map(str.isdigit, shared)) else values


def _are_objects(values: list[Any]) -> bool:
    return all(isinstance(value, dict) for value in values)


def _parse_lines(text: str) -> Rows:
    rows: Rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _DamageError(f"line {number}: broken JSON ({error})") from None
        rows.append((f"line {number}", row))
    return rows


def lookup(value: Any, path: str) -> Any:
    """What a path leads to: `reward_model.ground_truth`, `choices.0`, or, through a list without a
    number, into each of its items. Keys may be in any case; the exact one goes first. None: there
    is none.
    """
    head, _, rest = path.partition(".")
    if isinstance(value, list):
        if not head.isdecimal():
            found = [lookup(item, path) for item in value]
            return None if all(item is None for item in found) else found
        value = dict(enumerate(value)).get(int(head))
        return lookup(value, rest) if rest else value
    if not isinstance(value, dict):
        return None
    if path in value:
        return value[path]
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
