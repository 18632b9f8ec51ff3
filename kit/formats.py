"""What the rows of a file hold: the question, the answer and whatever else a problem has.

What a row is shows in its keys, in any case: GSM8K, MATH, AIME, AMC and s1K are known by them.
Other files of the field have a preset (kit/presets.yaml), and any file can be read by `fields:
{question: KEY, answer: KEY, ...}`, where a key may be nested (`reward_model.ground_truth`) and
a question be a template (`"{Body} {Question}"`, `"{question} {options}"`). No file is opened here.
"""

import difflib
import os
import re
from collections.abc import Sequence
from itertools import chain
from typing import Any, get_args

from kit import Json
from kit.core.bundled import bundled
from kit.core.config import DatasetConfig
from kit.core.errors import KitError, nearest
from kit.core.records import Verifier, replace_surrogates
from kit.core.table import Rows, keys_of, lookup
from kit.grading.answers import letters
from kit.grading.extract import last_box

Keys = dict[str, Sequence[str]]  # of each role: the keys or the template that may hold it

S1K_TRACE = "deepseek_thinking_trajectory"
# Keys that belong to a question: a row that has one which is not used has only half of it.
PARTS_OF_QUESTIONS = ("body", "context", "passage", "options", "choices")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def with_preset(source: DatasetConfig) -> DatasetConfig:
    """A source with the keys of its preset; what the config sets itself stays.

    Raises:
        KitError: no preset of that name, with the nearest one.
    """
    name = source.preset or source.path
    preset = bundled("presets").get(name)
    if preset is None or (source.preset is None and os.path.exists(name)):
        if source.preset is None:
            return source
        suggestion = nearest(name, bundled("presets"))
        raise KitError(f"There is no preset {name!r}; {suggestion}", code=2)
    # what the config sets itself goes first
    given = source.model_dump(exclude_unset=True)
    if source.preset is None:
        given = {"name": name, **given, "path": preset["path"]}
    fields = {**preset.get("fields", {}), **source.fields}
    return DatasetConfig(**{**preset, **given, "fields": fields})


def fitting_preset(row: Json) -> str | None:
    """The preset whose keys a row has."""
    for name, preset in bundled("presets").items():
        keys = set(re.findall(r"[\w.]+", " ".join(preset.get("fields", {}).values())))
        keys -= {"context", "passage"}
        if keys and all(lookup(row, key) is not None for key in keys):
            return name
    return None


def keys_by_role(source: DatasetConfig, rows: Rows) -> Keys:
    """The keys or the template of each role.

    Raises:
        KitError: a key that `fields` names and no row has.
    """
    # every key that the config names must be there
    keys: Keys = dict(bundled("formats"))
    for role, named in source.fields.items():
        keys[role] = (named,)
        for key in _template_keys(named) or [named]:
            if any(_has(row, key) for _, row in rows):
                continue
            matches = difflib.get_close_matches(key, rows[0][1], 1, cutoff=0.3)
            hint = f"Did you mean {matches[0]!r}? " if matches else ""
            message = f"{source.path}: fields.{role} names {key!r}, a key that no row has."
            raise KitError(message, f"{hint}The first row's keys are {keys_of(rows[0][1])}.", 2)
    return keys


def _has(row: Json, path: str) -> bool:
    """Whether a row has a key, empty or not."""
    return any(key.lower() == path.lower() for key in row) or lookup(row, path) is not None


def _template_keys(named: str) -> list[str]:
    return re.findall(r"\{([^{}]+)\}", named)


def values_of(row: Json, keys: Keys, verifier: Verifier) -> Json:
    """What a row holds, by role; `verifier` where it names none of its own."""
    values: Json = {role: _first_text(row, names) for role, names in keys.items()}
    if values["verifier"] not in get_args(Verifier):
        values["verifier"] = verifier
    answer = values["answer"]
    solution = values["solution"]
    if answer and "####" in answer:
        # GSM8K: worked text with the value after ####
        worked, _, last = re.sub("<<[^>]*>>", "", answer).rpartition("####")
        values["answer"] = re.sub(r"(?<=\d),(?=\d{3})", "", last.strip())
        values["solution"] = f"{worked.strip()}\nThe answer is \\boxed{{{values['answer']}}}."
    elif not answer and solution:
        values["answer"] = last_box(solution) or (solution if S1K_TRACE in row else None)
    elif answer:
        values["answer"] = _letter(row, keys["question"][0], answer, values["verifier"])
    return values


def _letter(row: Json, template: str, answer: str, verifier: str) -> str | None:
    """The letter of an answer that is an index into the question's options, from 0, or (verifier
    choice) the text of one of them; any other answer as it is. Empty where it names no option.
    """
    options: Json = {}
    for key in _template_keys(template):
        options = options or _by_letter(lookup(row, key)) or {}
    if options and answer.isdigit():
        return dict(enumerate(options)).get(int(answer))
    if verifier != "choice":
        return answer
    equal = [letter for letter, option in options.items() if str(option) == answer]
    named = "".join(equal[:1]) or letters(answer)
    return named if not options or options.keys() >= set(named) else None


def _first_text(row: Json, names: Sequence[str]) -> str | None:
    """The first of the keys or templates, in any case, that gives text; None where none does."""
    for name in names:
        text = _fill(row, name) if _template_keys(name) else _text(lookup(row, name))
        if text:
            return text
    return None


def _fill(row: Json, template: str) -> str | None:
    """A template with the values of a row; None where a part other than a context is missing,
    never half a question.
    """
    text = template
    for key in _template_keys(template):
        part = _options(lookup(row, key))
        if part is None and key.lower() not in ("context", "passage"):
            return None
        if part and key.lower() in ("body", "context", "passage") and part[-1].isalnum():
            part += "."
        text = text.replace(f"{{{key}}}", part or "")
    return text.strip()


def _by_letter(value: Any) -> Json | None:
    """Options by their letters: of a list, a mapping, or ARC's {text: list, label: list}."""
    if isinstance(value, dict) and isinstance(value.get("text"), list):
        value = value["text"]
    if isinstance(value, list):
        return dict(zip(LETTERS, value, strict=False))
    return value if isinstance(value, dict) else None


def _options(value: Any) -> str | None:
    """Options as lettered lines; any other value as text."""
    options = _by_letter(value)
    if options is None:
        return _text(value)
    is_lettered = all(re.match(r"\(?[A-Z][).:]", str(option)) for option in options.values())
    lines = []
    for letter, option in options.items():
        if option is not None:
            lines.append(str(option) if is_lettered else f"{letter}) {option}")
    return replace_surrogates("\n".join(lines)) or None


def _text(value: Any) -> str | None:
    """Text, a finite number, or a list of these, as text; None for anything else."""
    if isinstance(value, str) and value.strip():
        return replace_surrogates(value)
    if type(value) in (int, float) and abs(value) < float("inf"):  # neither True nor NaN
        return str(value).removesuffix(".0")
    if not isinstance(value, list):
        return None
    texts = []
    for item in value:
        text = None if isinstance(item, list) else _text(item)
        if text is None:
            return None
        texts.append(text)
    return ", ".join(texts) or None


def missing_role(row: Json, values: Json, keys: Keys, needed: Sequence[str]) -> str | None:
    """What is wrong with the keys of the first role that a row lacks; None where it has all."""
    for role in needed:
        if values[role]:
            continue
        names = [name.lower() for name in keys[role]]
        present = {key: value for key, value in row.items() if key.lower() in names}
        if role == "answer" and values["verifier"] == "choice" and any(present.values()):
            return "the answer names none of the options"
        parts = chain.from_iterable(map(_template_keys, keys[role]))
        missing = [part for part in parts if _options(lookup(row, part)) is None]
        if missing:
            return f"no {role}: nothing in {', '.join(missing)}"
        return f"no {role} in {keys_of(present) if present else f'any key of {keys_of(row)}'}"
    return None


def unused_parts(keys: Keys, rows: Rows) -> str | None:
    """A warning for keys that belong to a question and are not used."""
    used = re.findall(r"\w+", str(list(keys.values())).lower())
    unused = []
    for key in rows[0][1]:
        is_part = key.lower() in PARTS_OF_QUESTIONS and key.lower() not in used
        if is_part and any(row.get(key) for _, row in rows):
            unused.append(key)
    if not unused:
        return None
    # contexts come before the question, options after it
    question = next((key for key in rows[0][1] if key.lower() in keys["question"]), "KEY")
    template = f"{{{question}}}"
    for key in unused:
        is_options = key.lower() in ("options", "choices")
        template = f"{template}\\n{{{key}}}" if is_options else f"{{{key}}} {template}"
    return (
        f"has parts of the question that are not used: {', '.join(unused)}. "
        f'Write fields={{question: "{template}"}}.'
    )
