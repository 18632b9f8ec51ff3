"""Problems from the built-in generator, a file or the hub: read, checked, subsets and holdouts
taken.

What a row is shows in its keys, in any case: GSM8K, MATH, AIME, AMC and s1K are known by them.
Other files of the field have a preset (kit/presets.yaml), and any file can be read by `fields:
{question: KEY, answer: KEY, ...}`, where a key may be nested (`reward_model.ground_truth`) and
a question be a template (`"{Body} {Question}"`, `"{question} {options}"`).

A damaged file stops the run, with its line. A row that is missing something, or whose id or text
came before, is set aside. Training and evaluation may share no question, up to case and white
space; rewordings are only counted.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import os
import random
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, get_args

import yaml

from kit.core.config import Config, DatasetConfig
from kit.core.errors import KitError
from kit.core.records import Problem, Verifier, replace_surrogates
from kit.core.run import Run
from kit.core.storage import digest
from kit.core.table import IS_FILE, Rows, keys_of, lookup, read_rows

NEAR_RATIO = 0.6  # of word 5-grams shared, from which two questions are near-duplicates
S1K_TRACE = "deepseek_thinking_trajectory"
# What a row may hold, and its keys, best first.
ROLES = {
    "id": ("id", "unique_id", "problem_id"),
    "question": ("question", "problem"),
    "answer": ("answer",),
    "solution": ("solution",),
    "trace": ("trace", "long_cot", S1K_TRACE),
    "level": ("level",),
    "subject": ("subject", "type"),
    "verifier": ("verifier",),
}
# Keys that belong to a question: a row that has one which is not used has only half of it.
PARTS_OF_QUESTIONS = ("body", "context", "passage", "options", "choices")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Reading(NamedTuple):
    """The usable problems of a source, and the rows that were set aside, each as {id, reason,
    detail}.
    """

    name: str  # for tables and files
    problems: list[Problem]
    rejected: list[dict[str, str]]
    warnings: tuple[str, ...] = ()


class Loaded(NamedTuple):
    """All problems of a run. `facts` go into the manifest, `rejected` into rejected.jsonl."""

    train: list[Problem]
    evals: dict[str, list[Problem]]
    facts: dict[str, Any]
    rejected: list[dict[str, str]]
    warnings: list[str]
    samples: dict[str, int | None]  # answers per problem of each evaluation dataset


def load_traces(config: Config) -> list[Problem]:
    """The training problems alone, as `load_all` gives them."""
    source, reading = _read_train(config)
    return subset(reading.problems, source, config.seed)


@lru_cache(maxsize=1)
def problems_of(run: Run) -> Loaded:
    """A run's problems, read once; their fingerprints go into its manifest."""
    loaded = load_all(run.config)
    run.record(data=loaded.facts, rejected=loaded.rejected)
    for warning in loaded.warnings:
        run.progress.warn(warning)
    return loaded


def load_all(config: Config) -> Loaded:
    """Everything a run reads, checked against each other; sources of stages that will not run are
    not read.

    Raises:
        KitError: as `read`; a question in training and in evaluation, two sources of one name, an
            empty holdout.
    """
    train_source, everything = _read_train(config)
    train = subset(everything.problems, train_source, config.seed)
    facts: dict[str, Any] = {"train": _facts(train_source, everything, train), "evals": {}}
    loaded = Loaded(train, {}, facts, list(everything.rejected), list(everything.warnings), {})
    sources = config.data.eval if config.stop_after in ("eval", "report") else ()
    for source in sources:
        reading = _read_eval(source, everything, train, config.seed)
        if reading.name in loaded.evals:
            message = f"Two sources of data.eval are called {reading.name}."
            raise KitError(message, "Name each: {path: ..., name: ...}.", 2)
        problems = subset(reading.problems, source, config.seed)
        _refuse_overlap(train, problems, everything.name, reading.name)
        eval_facts = _facts(source, reading, problems)
        eval_facts["near_duplicates"] = len(near_duplicates(train, problems))
        facts["evals"][reading.name] = eval_facts
        loaded.evals[reading.name] = problems
        loaded.samples[reading.name] = with_preset(source).samples
        loaded.rejected.extend(reading.rejected)
        loaded.warnings.extend(reading.warnings)
    return loaded


def _read_train(config: Config) -> tuple[DatasetConfig, Reading]:
    """Where training problems come from, and all that is there.

    A file of traces stands alone: of data.train only limit, seed and stratify count.
    """
    source = config.data.train
    teacher = config.teacher
    from_file = teacher.backend == "file"
    if from_file and teacher.path:
        changes = {"path": teacher.path, "fields": teacher.fields, "name": None}
        source = source.model_copy(update=changes)
    elif source.path == "holdout" or (from_file and source.path == "builtin"):
        message = f"data.train={source.path} gives nothing for teacher.backend={teacher.backend}."
        hint = (
            "Set teacher.path=FILE (JSONL of {id, question, answer, long_cot}), "
            "or data.train to a file or hub id."
        )
        raise KitError(message, hint, 2)
    return source, read(source, config.seed, traces=from_file)


def _read_eval(
    source: DatasetConfig, everything: Reading, train: list[Problem], seed: int
) -> Reading:
    """A source of evaluation; `holdout` is what training leaves of its own."""
    if source.path == "holdout":
        taken = {normal(problem.question) for problem in train}
        rest = [problem for problem in everything.problems if normal(problem.question) not in taken]
        reading = Reading(source.name or "holdout", rest, [])
    else:
        reading = read(source, seed, held_out=True)
    if not reading.problems:
        message = (
            f"Nothing is left for the holdout: training takes all {len(train)} questions "
            f"of {everything.name}."
        )
        hint = "Set data.train.limit below that, or name another source, like data.eval=builtin."
        raise KitError(message, hint)
    return reading


def _refuse_overlap(
    train: list[Problem], problems: list[Problem], train_name: str, eval_name: str
) -> None:
    ids = {normal(problem.question): problem.id for problem in train}
    both = [problem for problem in problems if normal(problem.question) in ids]
    if not both:
        return
    examples = "; ".join(
        f"{ids[normal(problem.question)]!r} in {train_name} is {problem.id!r} in {eval_name}"
        for problem in both[:3]
    )
    message = f"{len(both)} question(s) appear in both training and evaluation: {examples}."
    raise KitError(message, "Take them out of one of the two, or evaluate on `holdout`.")


def read(source: DatasetConfig, seed: int, held_out: bool = False, traces: bool = False) -> Reading:
    """All rows of a source, before any subset (built-in problems aside: they are as many as asked
    for).

    Args:
        seed: of built-in problems, where the source has none of its own.
        held_out: for evaluation: built-in problems of the held-out half; a hub dataset's split
            `test`.
        traces: rows need a trace, and a question may come more than once.

    Raises:
        KitError: no such file or dataset, damage (with its line), a key of `fields` that no row
            has, or not one usable row.
    """
    preset = presets().get(source.preset or source.path, {})
    source = with_preset(source)
    name = source.name or re.sub(
        r"\.(?:jsonl?|csv|tsv|parquet)(?:\.gz)?$", "", Path(source.path).name
    )
    reading = Reading(re.sub(r"[^\w.-]+", "-", name).strip("-.") or "data", [], [])
    if source.path == "builtin":
        return reading._replace(problems=_builtin(source, seed, held_out))
    # the rows, and which key holds what
    is_file = os.path.exists(source.path) or IS_FILE.fullmatch(source.path)
    rows = read_rows(source.path) if is_file else _hub_rows(source, held_out)
    keys = _keys(source, rows)
    needed = ("question", "answer", "trace") if traces else ("question", "answer")

    # every row becomes a problem, or is set aside with its reason
    ids: dict[str, str] = {}  # where each is
    questions: dict[str, Problem] = {}  # the first one with a text
    for where, row in rows:
        values = _values(row, keys)
        question = normal(values["question"] or "")
        text = f"{question}\0{values['trace'] if traces else ''}"
        id = values["id"] or f"{reading.name}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"
        missing = [role for role in needed if not values[role]]
        twin = questions.get(question)
        if missing:
            reason = _reason(row, keys, missing[0])
            detail = reason
        elif twin and twin.answer != values["answer"] and not traces:
            reason = "same question, different answer"
            detail = f"{reason}: already in {ids[twin.id]}"
        elif id in ids:
            reason = "duplicate id or text"
            detail = f"{reason}: already in {ids[id]}"
        else:
            ids[id] = where
            verifier = values.pop("verifier")
            if verifier not in get_args(Verifier):
                verifier = source.verifier
            problem = Problem.model_validate({**values, "id": id, "verifier": verifier})
            questions.setdefault(question, problem)
            reading.problems.append(problem)
            continue
        detail = f"{source.path}, {where}: {detail}"
        reading.rejected.append({"id": id, "reason": reason, "detail": detail})
    if not reading.problems:
        first = reading.rejected[0]["detail"]
        message = f"{source.path}: none of {len(rows)} rows is usable. The first: {first}."
        fitting = _fitting_preset(rows[0][1])
        hint = f"It looks like {fitting}: set preset={fitting}. Or name" if fitting else "Name"
        raise KitError(message, f"{hint} the keys: fields={{question: KEY, answer: KEY}}.")
    warnings = _unused_parts(source, keys, rows) + _other_copy(source, preset, reading.problems)
    return reading._replace(warnings=warnings)


def _reason(row: dict[str, Any], keys: dict[str, tuple[str, ...]], role: str) -> str:
    """What is wrong with the keys that should hold a role."""
    present = [key for key in row if key.lower() in [name.lower() for name in keys[role]]]
    if present:
        return f"no {role} in {keys_of({key: row[key] for key in present})}"
    return f"no {role} in any key of {keys_of(row)}"


def describe(source: DatasetConfig, everything: bool = False) -> dict[str, Any]:
    """What a source becomes, for `palign.py data`.

    Returns:
        rows, usable, rejected: [{reason, rows}], problems: [{id, question, answer}] (the first
        three, or all), warnings where there are any.
    """
    reading = read(source, seed=0)
    reasons = Counter(row["reason"] for row in reading.rejected)
    shown = reading.problems if everything else reading.problems[:3]
    description: dict[str, Any] = {
        "rows": len(reading.problems) + len(reading.rejected),
        "usable": len(reading.problems),
        "rejected": [{"reason": reason, "rows": rows} for reason, rows in reasons.most_common()],
        "problems": [problem.model_dump(include={"id", "question", "answer"}) for problem in shown],
    }
    if reading.warnings:
        description["warnings"] = [{"warning": warning} for warning in reading.warnings]
    return description


@functools.cache
def presets() -> dict[str, dict[str, Any]]:
    """The field's files by name, as kit/presets.yaml explains them."""
    path = Path(__file__).with_name("presets.yaml")
    loaded: dict[str, dict[str, Any]] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return loaded


def with_preset(source: DatasetConfig) -> DatasetConfig:
    """A source with the keys of its preset; what the config sets itself stays.

    Raises:
        KitError: no preset of that name, with the nearest one.
    """
    name = source.preset or source.path
    preset = presets().get(name)
    if preset is None or (source.preset is None and os.path.exists(name)):
        if source.preset is None:
            return source
        nearest = ", ".join(difflib.get_close_matches(name, presets(), 1) or presets())
        raise KitError(f"There is no preset {name!r}.", f"Did you mean {nearest}?", 2)
    # what the config sets itself goes first
    changes: dict[str, Any] = {}
    for key in ("subset", "split", "verifier", "samples"):
        if key in preset and key not in source.model_fields_set:
            changes[key] = preset[key]
    changes["fields"] = {**preset.get("fields", {}), **source.fields}
    if source.preset is None:
        changes.update(path=preset["path"], name=source.name or name)
    return source.model_copy(update=changes)


def _fitting_preset(row: dict[str, Any]) -> str | None:
    """The preset whose keys a row has."""
    for name, preset in presets().items():
        keys = set(re.findall(r"[\w.]+", " ".join(preset.get("fields", {}).values())))
        keys -= {"context", "passage"}
        if keys and all(lookup(row, key) is not None for key in keys):
            return name
    return None


def _keys(source: DatasetConfig, rows: Rows) -> dict[str, tuple[str, ...]]:
    """The keys or the template of each role.

    Raises:
        KitError: a key that `fields` names and no row has.
    """
    # every key that the config names must be there
    keys: dict[str, tuple[str, ...]] = dict(ROLES)
    for role, named in source.fields.items():
        keys[role] = (named,)
        for key in _template_keys(named) or [named]:
            if any(_has(row, key) for _, row in rows):
                continue
            nearest = difflib.get_close_matches(key, rows[0][1], 1, cutoff=0.3)
            hint = f"Did you mean {nearest[0]!r}? " if nearest else ""
            message = f"{source.path}: fields.{role} names {key!r}, a key that no row has."
            raise KitError(message, f"{hint}The first row's keys are {keys_of(rows[0][1])}.", 2)
    return keys


def _has(row: dict[str, Any], path: str) -> bool:
    """Whether a row has a key, empty or not."""
    return any(key.lower() == path.lower() for key in row) or lookup(row, path) is not None


def _template_keys(named: str) -> list[str]:
    return re.findall(r"\{([^{}]+)\}", named)


def _unused_parts(
    source: DatasetConfig, keys: dict[str, tuple[str, ...]], rows: Rows
) -> tuple[str, ...]:
    """A warning for keys that belong to a question and are not used."""
    used = re.findall(r"\w+", str(list(keys.values())).lower())
    unused = []
    for key in rows[0][1]:
        is_part = key.lower() in PARTS_OF_QUESTIONS and key.lower() not in used
        if is_part and any(row.get(key) for _, row in rows):
            unused.append(key)
    if not unused:
        return ()
    # contexts come before the question, options after it
    question = next((key for key in rows[0][1] if key.lower() in keys["question"]), "KEY")
    template = f"{{{question}}}"
    for key in unused:
        is_options = key.lower() in ("options", "choices")
        template = f"{template}\\n{{{key}}}" if is_options else f"{{{key}}} {template}"
    return (
        f"{source.path}: not used, though part of the question: {', '.join(unused)}. "
        f'Write fields={{question: "{template}"}}.',
    )


def _other_copy(
    source: DatasetConfig, preset: dict[str, Any], problems: list[Problem]
) -> tuple[str, ...]:
    """A warning where a set that is known by its answers has others: copies of AIME differ."""
    if "answers" not in preset:
        return ()
    expected = Counter(map(str, preset["answers"]))
    answers = Counter(problem.answer.lstrip("0") or "0" for problem in problems)
    missing = expected - answers
    extra = answers - expected
    if not missing and not extra:
        return ()
    return (
        f"{source.path} is another copy of this set: of {expected.total()} answers "
        f"{missing.total()} are missing and {extra.total()} are different "
        f"({', '.join([*missing, *extra][:6])}).",
    )


def subset(problems: list[Problem], source: DatasetConfig, seed: int) -> list[Problem]:
    """The source's `limit` rows: the first, a seeded choice, or a stratified one (each stratum gets
    its share to within one row); in the order of the file.
    """
    # each stratum's rows are together, and every n-th row is taken
    strata = [getattr(problem, source.stratify or "", None) or "" for problem in problems]
    if source.stratify and not any(strata):
        raise KitError(
            f"{source.path} has no {source.stratify} to stratify by.",
            "Map level or subject by fields.",
            2,
        )
    if source.limit is None or source.limit >= len(problems):
        return problems
    order = list(range(len(problems)))
    if source.seed is not None or source.stratify:
        random.Random(f"subset {seed if source.seed is None else source.seed}").shuffle(order)
    if source.stratify:  # at even distances along the strata
        order.sort(key=strata.__getitem__)
        order = [order[(2 * i + 1) * len(order) // (2 * source.limit)] for i in range(source.limit)]
    return [problems[i] for i in sorted(order[: source.limit])]


def normal(question: str) -> str:
    """A question up to case and white space: what makes two questions the same."""
    return " ".join(question.casefold().split())


def near_duplicates(first: Sequence[Problem], second: Sequence[Problem]) -> list[str]:
    """Ids in second of questions that share NEAR_RATIO of their word 5-grams with one question of
    first.
    """
    # which questions hold a 5-gram
    holders, ids = defaultdict(list), []
    for problem in first:
        for gram in _grams(problem.question):
            holders[gram].append(problem.id)
    for problem in second:
        grams = _grams(problem.question)
        shared = Counter(id for gram in grams for id in holders.get(gram, ()))
        if max(shared.values(), default=0) >= NEAR_RATIO * len(grams):
            ids.append(problem.id)
    return ids


def _grams(question: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", question.casefold())
    return {tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))}


def _facts(source: DatasetConfig, reading: Reading, problems: list[Problem]) -> dict[str, Any]:
    return {
        "path": source.path,
        "rows": len(problems),
        "rejected": len(reading.rejected),
        "fingerprint": digest(problems),
    }


def _builtin(source: DatasetConfig, seed: int, held_out: bool) -> list[Problem]:
    from kit.synthetic import generate

    seed = seed if source.seed is None else source.seed
    return generate(source.limit or 100, seed, held_out, source.steps, source.max_number)


def _hub_rows(source: DatasetConfig, held_out: bool) -> Rows:
    import datasets

    options = {"name": source.subset, "split": source.split or ("test" if held_out else "train")}
    try:
        datasets.disable_progress_bars()
        rows = datasets.load_dataset(source.path, **options)
        return [(f"row {number}", dict(row)) for number, row in enumerate(rows, 1)]
    except (
        Exception
    ) as error:  # datasets, pyarrow and the HTTP client raise dozens of types, all the source's
        cause = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        message = f"{source.path} (no such file; asked the hub): {cause}"
        hint = (
            f"Check name, subset and split ({options}); "
            "without a network give a downloaded file: data.train=FILE."
        )
        raise KitError(message, hint) from None


def _values(row: dict[str, Any], keys: dict[str, tuple[str, ...]]) -> dict[str, str | None]:
    """What a row holds, by role."""
    values = {role: _first_text(row, names) for role, names in keys.items()}
    answer = values["answer"]
    solution = values["solution"]
    if answer and "####" in answer:
        # GSM8K: worked text with the value after ####
        worked, _, last = re.sub("<<[^>]*>>", "", answer).rpartition("####")
        values["answer"] = re.sub(r"(?<=\d),(?=\d{3})", "", last.strip())
        values["solution"] = f"{worked.strip()}\nThe answer is \\boxed{{{values['answer']}}}."
    elif not answer and solution:
        from kit.grading.extract import last_box

        values["answer"] = last_box(solution) or (solution if S1K_TRACE in row else None)
    elif answer and answer.isdigit() and keys["question"][0].count("{") > 1:
        values["answer"] = _letter_of_index(row, keys["question"][0], int(answer))
    return values


def _letter_of_index(row: dict[str, Any], template: str, index: int) -> str | None:
    """The letter of an answer that is an index into the options of the question, from 0."""
    for key in _template_keys(template):
        options = lookup(row, key)
        if isinstance(options, list):
            return LETTERS[index] if index < min(len(options), len(LETTERS)) else None
    return str(index)


def _first_text(row: dict[str, Any], names: tuple[str, ...]) -> str | None:
    """The first of the keys or templates, in any case, that gives text; None where none does."""
    for name in names:
        text = _fill(row, name) if _template_keys(name) else _text(lookup(row, name))
        if text:
            return text
    return None


def _fill(row: dict[str, Any], template: str) -> str | None:
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


def _options(value: Any) -> str | None:
    """Options as lettered lines; any other value as text."""
    if isinstance(value, dict):
        lines = [f"{letter}) {option}" for letter, option in value.items() if option is not None]
    elif isinstance(value, list):
        lettered = all(re.match(r"\(?[A-Z][).:]", str(option)) for option in value)
        pairs = zip(LETTERS, value, strict=False)
        lines = [str(option) if lettered else f"{letter}) {option}" for letter, option in pairs]
    else:
        return _text(value)
    return replace_surrogates("\n".join(lines)) or None


def _text(value: Any) -> str | None:
    """Text, a finite number, or a list of these, as text; None for anything else."""
    if isinstance(value, str) and value.strip():
        return replace_surrogates(value)
    if type(value) in (int, float) and abs(value) < float("inf"):  # neither True nor NaN
        return str(value).removesuffix(".0")
    if isinstance(value, list):
        texts = [None if isinstance(item, list) else _text(item) for item in value]
        return ", ".join(map(str, texts)) if texts and all(texts) else None
    return None
