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
from decimal import Decimal
from itertools import chain
from string import ascii_uppercase
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
# Parts that are text; a list under any other key of a template holds options.
CONTEXTS = ("context", "passage")  # a question may do without them
TEXT_PARTS = ("question", "problem", "body", *CONTEXTS)
PLACE = re.compile(r"\{([^{}]+)\}")  # a key in a template
# Where several values stand for one, as OlympiadBench's answers do. Two texts of any other role
# are two texts: messages, samples, a column.
MAY_BE_SEVERAL = ("answer", "solution", "level", "subject")
# What stands in the answer's column where there is no answer: NuminaMath's marks, a table's blank.
NO_ANSWER = ("proof", "notfound", "nan", "null")


def with_preset(source: DatasetConfig) -> DatasetConfig:
    """A source with the keys of its preset; what the config sets itself stays.

    Raises:
        KitError: no preset of that name, with the nearest one.
    """
    presets = bundled("presets")
    if source.preset is None and (source.path not in presets or os.path.exists(source.path)):
        return source
    name = source.preset or source.path
    if name not in presets:
        raise KitError(f"There is no preset {name!r}; {nearest(name, presets)}", code=2)
    preset = presets[name]
    # What the config sets itself goes first. A resolved config sets every key.
    is_resolved = source.model_fields_set == DatasetConfig.model_fields.keys()
    given = source.model_dump(exclude_unset=not is_resolved, exclude_defaults=is_resolved)
    if source.preset is None:
        given = {"name": name, **given, "path": preset["path"]}
    fields = {**preset.get("fields", {}), **source.fields}
    return DatasetConfig(**{**preset, **given, "fields": fields})


def fitting_preset(row: Json, role: str) -> str | None:
    """The preset whose keys a row has, with one for this role; the one with the most keys."""
    fitting = []
    for name, preset in bundled("presets").items():
        fields = preset.get("fields", {})
        keys = set(chain.from_iterable(map(_named_keys, fields.values()))).difference(CONTEXTS)
        if role in fields and all(lookup(row, key) is not None for key in keys):
            fitting.append((len(keys), name))
    return max(fitting)[1] if fitting else None


def keys_by_role(source: DatasetConfig, rows: Rows) -> Keys:
    """The keys or the template of each role.

    Raises:
        KitError: a key that `fields` names and no row has.
    """
    # every key that the config names must be there
    keys: Keys = dict(bundled("formats"))
    for role, named in source.fields.items():
        keys[role] = (named,)
        for key in _named_keys(named):
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


def _named_keys(named: str) -> list[str]:
    """The keys of a value of `fields`: of a template, of `texts where flags`, or the one."""
    return PLACE.findall(named) or named.split(" where ")


def values_of(row: Json, keys: Keys, verifier: Verifier) -> Json:
    """What a row holds, by role; `verifier` where it names none of its own."""
    values: Json = {}
    for role, names in keys.items():
        values[role] = _first_text(row, names, role in MAY_BE_SEVERAL)
    if values["verifier"] not in get_args(Verifier):
        values["verifier"] = verifier
    if values["verifier"] == "math" and (values["answer"] or "").casefold() in NO_ANSWER:
        values["answer"] = None
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
        values["answer"] = _choice(row, keys, answer, values["verifier"])
    return values


def _choice(row: Json, keys: Keys, answer: str, verifier: str) -> str | None:
    """The letter of an answer that is an option's own label (ARC has 1 to 4), its index from 0 or,
    for the verifier choice, its text; any other answer as it is. None where it names no option, or
    one by its text and another by its index.
    """
    options, letter_of_label = _question_options(row, keys)
    if answer in letter_of_label:
        return letter_of_label[answer]
    is_number = any(type(lookup(row, name)) in (int, float) for name in keys["answer"])
    by_index = {str(index): letter for index, letter in enumerate(options)}.get(answer)
    if verifier != "choice":
        return by_index if options and is_number else answer
    by_text = _equal_option(options, answer, is_number)
    if by_index and by_text and by_index != by_text:
        return None
    named = by_text or by_index or letters(answer)
    return named if not options or options.keys() >= set(named) else None


def _equal_option(options: Json, answer: str, is_number: bool) -> str | None:
    # MMLU: 2 among options that are text is an index, whatever they say
    if is_number and any(isinstance(option, str) for option in options.values()):
        return None
    return next((letter for letter, option in options.items() if str(option) == answer), None)


def _question_options(row: Json, keys: Keys) -> tuple[Json, dict[str, str]]:
    """The options that the question's template shows, by letter, and the letter of each label."""
    for key in PLACE.findall(keys["question"][0]):
        value = lookup(row, key)
        options = _by_letter(value)
        if options:
            labels = value.get("label") if isinstance(value, dict) else None
            if not isinstance(labels, list):
                labels = []
            return options, dict(zip(map(str, labels), options, strict=False))
    return {}, {}


def _first_text(row: Json, names: Sequence[str], several: bool) -> str | None:
    """The first of the keys or templates, in any case, that gives text; None where none does.

    Args:
        several: a list of values is one text, with commas.
    """
    for name in names:
        if PLACE.findall(name):
            text = _fill(row, name)
        else:
            value = _value(row, name)
            is_several = isinstance(value, list) and len(value) > 1
            text = None if is_several and not several else _text(value)
        if text:
            return text
    return None


def _value(row: Json, name: str) -> Any:
    """What a key leads to; of `texts where flags`, the first with a true flag (OpenR1-Math), or the
    first of all where there are no flags.
    """
    name, _, flags_name = name.partition(" where ")
    value = lookup(row, name)
    if not flags_name:
        return value
    if not isinstance(value, list) or not value:
        return None
    flags = lookup(row, flags_name)
    if flags is None:
        return value[0]
    flagged = zip(value, flags, strict=False) if isinstance(flags, list) else ()
    return next((text for text, flag in flagged if flag is True), None)


def _fill(row: Json, template: str) -> str | None:
    """A template with the values of a row; None where a part other than a context is missing,
    never half a question.
    """
    parts = {}
    for key in PLACE.findall(template):
        part = _part(row, key)
        if part is None and (key.lower() not in CONTEXTS or lookup(row, key)):
            return None
        if part and key.lower() in ("body", *CONTEXTS) and part[-1].isalnum():
            part += "."
        parts[key] = part or ""
    # at once: a value may hold braces of its own, as \sqrt{B} does
    return PLACE.sub(lambda match: parts[match[1]], template).strip()


def _part(row: Json, key: str) -> str | None:
    value = lookup(row, key)
    if not isinstance(value, list) or key.lower() not in TEXT_PARTS:
        return _options(value)
    # a question is one text, a context may be several
    if len(value) > 1 and key.lower() not in CONTEXTS:
        return None
    return _joined(value, "\n")


def _by_letter(value: Any) -> Json | None:
    """Options by their letters: of a list, a mapping, or ARC's {text: list, label: list}."""
    if isinstance(value, dict) and isinstance(value.get("text"), list):
        value = value["text"]
    if isinstance(value, list):
        return dict(zip(ascii_uppercase, value, strict=False))
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
    if type(value) in (int, float, Decimal) and abs(value) < float("inf"):  # not True, not NaN
        return str(value).removesuffix(".0")
    return _joined(value, ", ") if isinstance(value, list) else None


def _joined(values: list[Any], separator: str) -> str | None:
    """Texts as one; None where one of them is none, or a list itself."""
    texts = []
    for value in values:
        text = None if isinstance(value, list) else _text(value)
        if text is None:
            return None
        texts.append(text)
    return separator.join(texts) or None


def missing_role(values: Json, needed: Sequence[str]) -> str | None:
    """The first role that a row lacks; None where it has all."""
    return next((role for role in needed if not values[role]), None)


def why_missing(row: Json, role: str, keys: Keys, verifier: str) -> str:
    """What is wrong with the keys of a role that a row lacks."""
    names = [name.lower() for name in keys[role]]
    present = {key: value for key, value in row.items() if key.lower() in names}
    if role == "answer" and verifier == "choice" and any(present.values()):
        return "the answer names none of the options, or two of them"
    parts = chain.from_iterable(map(PLACE.findall, keys[role]))
    missing = [part for part in parts if _part(row, part) is None]
    if missing:
        return f"no {role}: nothing in {', '.join(missing)}"
    for name in keys[role]:
        value = _value(row, name)
        if isinstance(value, list) and len(value) > 1 and role not in MAY_BE_SEVERAL:
            return f"no {role}: {name!r} holds {len(value)} values (name one of them by its number)"
    return f"no {role} in {keys_of(present) if present else f'any key of {keys_of(row)}'}"


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
