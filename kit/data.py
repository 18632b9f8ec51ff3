"""Problems from the built-in generator, a file or the hub: read, checked, subsets and holdouts
taken.

A damaged file stops the run, with its line. A row that is missing something, or whose id or text
came before, is set aside. Training and evaluation may share no question, up to case and white
space; rewordings are only counted. What the keys of a row mean is known in kit/formats.py.
"""

import os
import random
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, NoReturn

from kit import Json
from kit.core.config import Config, DatasetConfig
from kit.core.errors import KitError
from kit.core.records import Problem
from kit.core.run import Run
from kit.core.storage import digest, text_digest
from kit.core.table import IS_FILE, Rows, numbered, read_rows
from kit.formats import (
    Keys,
    fitting_preset,
    keys_by_role,
    missing_role,
    unused_parts,
    values_of,
    why_missing,
    with_preset,
)
from kit.grading.answers import same_words
from kit.models import leave_out_dead_hub
from kit.synthetic import generate

SHOWN_TRACE = 100  # characters of a trace that `palign.py data` shows
NEAR_RATIO = 0.6  # of word 5-grams shared, from which two questions are near-duplicates


class Reading(NamedTuple):
    """The usable problems of a source, and the rows that were set aside, each as {id, reason,
    detail}.
    """

    name: str  # for tables and files
    problems: list[Problem]
    rejected: list[dict[str, str]]
    warnings: list[str]


class Loaded(NamedTuple):
    """All problems of a run. `facts` go into the manifest, `rejected` into rejected.jsonl."""

    train: list[Problem]
    evals: dict[str, list[Problem]]
    facts: Json
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
    facts: Json = {"train": _facts(train_source, everything, train), "evals": {}}
    loaded = Loaded(train, {}, facts, everything.rejected, everything.warnings, {})
    sources = config.data.eval if config.stop_after in ("eval", "report") else ()
    for source in sources:
        reading = _read_eval(source, everything, train, config.seed)
        if reading.name in loaded.evals:
            message = f"Two sources of data.eval are called {reading.name}."
            raise KitError(message, "Name each: {path: ..., name: ...}.", 2)
        problems = subset(reading.problems, source, config.seed)
        _refuse_overlap(train, problems, everything.name, reading.name)
        facts["evals"][reading.name] = {
            **_facts(source, reading, problems),
            "near_duplicates": len(near_duplicates(train, problems)),
        }
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
    fields_key = "data.train.fields"
    if from_file and teacher.path:
        fields_key = "teacher.fields"
        changes = {"path": teacher.path, "fields": teacher.fields, "name": None, "preset": None}
        source = source.model_copy(update=changes)
    elif source.path == "holdout" or (from_file and source.path == "builtin"):
        message = f"data.train={source.path} has no traces for teacher.backend={teacher.backend}."
        hint = (
            "Set teacher.path=FILE (JSONL of {id, question, answer, long_cot}), "
            "or data.train to a file or hub id."
        )
        raise KitError(message, hint, 2)
    return source, read(source, config.seed, traces=from_file, fields_key=fields_key)


def _read_eval(
    source: DatasetConfig, everything: Reading, train: list[Problem], seed: int
) -> Reading:
    """A source of evaluation; `holdout` is what training leaves of its own."""
    if source.path != "holdout":
        return read(source, seed, held_out=True)
    taken = {normal(problem.question) for problem in train}
    # of several traces of one question, one is its problem
    rest: dict[str, Problem] = {}
    for problem in everything.problems:
        question = normal(problem.question)
        if question not in taken:
            rest.setdefault(question, problem)
    if not rest:
        message = (
            f"Nothing is left for the holdout: training takes all {len(train)} questions "
            f"of {everything.name}."
        )
        hint = "Set data.train.limit below that, or name another source, like data.eval=builtin."
        raise KitError(message, hint)
    return Reading(source.name or "holdout", list(rest.values()), [], [])


def _refuse_overlap(
    train: list[Problem], problems: list[Problem], train_name: str, eval_name: str
) -> None:
    ids = {normal(problem.question): problem.id for problem in train}
    twins = []
    for problem in problems:
        twin = ids.get(normal(problem.question))
        if twin:
            twins.append(f"{twin!r} in {train_name} is {problem.id!r} in {eval_name}")
    if twins:
        examples = "; ".join(twins[:3])
        message = f"{len(twins)} question(s) appear in both training and evaluation: {examples}."
        raise KitError(message, "Take them out of one of the two, or evaluate on `holdout`.")


def read(
    source: DatasetConfig,
    seed: int,
    held_out: bool = False,
    traces: bool = False,
    fields_key: str = "fields",
) -> Reading:
    """All rows of a source, before any subset (built-in problems aside: they are as many as asked
    for).

    Args:
        seed: of built-in problems, where the source has none of its own.
        held_out: for evaluation: built-in problems of the held-out half; a hub dataset's split
            `test`.
        traces: rows need a trace, and a question may come more than once.
        fields_key: the config key of the source's `fields`, for messages.

    Raises:
        KitError: no such file or dataset, damage (with its line), a key of `fields` that no row
            has, or not one usable row.
    """
    source = with_preset(source)
    name = source.name or re.split(r"\.(?:jsonl?|csv|tsv|parquet)\b", Path(source.path).name)[0]
    reading = Reading(re.sub(r"[^\w.-]+", "-", name).strip("-.") or "data", [], [], [])
    if source.path == "builtin":
        seed = seed if source.seed is None else source.seed
        limit = source.limit or 100
        problems = generate(limit, seed, held_out, source.steps, source.max_number)
        return reading._replace(problems=problems)

    is_file = os.path.exists(source.path) or IS_FILE.fullmatch(source.path)
    rows = read_rows(source.path) if is_file else _hub_rows(source, held_out)
    keys = keys_by_role(source, rows)
    needed = ("question", "answer", "trace") if traces else ("question", "answer")
    _sort_out(reading, source, rows, keys, needed)
    if not reading.problems:
        _refuse_unusable(source, rows, keys, reading, needed, fields_key)
    if reading.rejected:
        [(reason, times)] = Counter(row["reason"] for row in reading.rejected).most_common(1)
        reading.warnings.append(
            f"{source.path}: {len(reading.rejected)} of {len(rows)} rows are set aside, "
            f"{times} because of: {reason}."
        )
    warning = unused_parts(keys, rows)
    if warning:
        reading.warnings.append(f"{source.path} {warning}")
    return reading


def _refuse_unusable(
    source: DatasetConfig,
    rows: Rows,
    keys: Keys,
    reading: Reading,
    needed: tuple[str, ...],
    fields_key: str,
) -> NoReturn:
    """Say why the first row of a file without a usable one is none, and which keys would help."""
    role = missing_role(values_of(rows[0][1], keys, source.verifier), needed) or "question"
    named = "trace: KEY" if role == "trace" else "question: KEY, answer: KEY"
    keys_to_name = f"the keys: {fields_key}={{{named}}}."
    hint = f"Name {keys_to_name}"
    # where the keys are named, they are not what is wrong
    fitting = None if source.fields else fitting_preset(rows[0][1], role)
    if fitting:
        preset = f"preset={fitting}"
        if "trace" in needed:
            preset = f"data.train={{path: {source.path}, preset: {fitting}}} without teacher.path"
        hint = f"It looks like {fitting}: set {preset}. Or name {keys_to_name}"
    first = reading.rejected[0]["detail"]
    message = f"{source.path}: none of {len(rows)} rows is usable. The first: {first}."
    raise KitError(message, hint)


def _sort_out(
    reading: Reading, source: DatasetConfig, rows: Rows, keys: Keys, needed: tuple[str, ...]
) -> None:
    """Add every row to the problems, or to the rejected ones with its reason."""
    places: dict[str, str] = {}  # of each id
    first: dict[str, Problem] = {}  # by question
    for where, row in rows:
        values = values_of(row, keys, source.verifier)
        question = normal(values["question"] or "")
        text = f"{question}\0{values['trace'] if 'trace' in needed else ''}"
        id = values["id"] or f"{reading.name}-{text_digest(text, 10)}"
        twin = first.get(question)
        role = missing_role(values, needed)
        place = None
        if role:
            reason = why_missing(row, role, keys, values["verifier"])
        elif twin and not same_words(twin.answer, values["answer"]):
            reason = "same question, different answer"
            place = places[twin.id]
        elif id in places:
            reason = "duplicate id or text"
            place = places[id]
        else:
            problem = Problem.model_validate({**values, "id": id})
            places[id] = where
            first.setdefault(question, problem)
            reading.problems.append(problem)
            continue
        detail = f"{source.path}, {where}: {reason}"
        if place:
            detail = f"{detail}: already in {place}"
        reading.rejected.append({"id": id, "reason": reason, "detail": detail})


def describe(source: DatasetConfig, everything: bool = False) -> Json:
    """What a source becomes, for `palign.py data`.

    Returns:
        rows, usable, rejected: [{reason, rows}], problems: [{id, question, answer}] (the first
        three, or all), warnings where there are any. Of a file with traces also with_trace (rows)
        and each problem's trace, its beginning.
    """
    reading = read(source, seed=0)
    if all(problem.trace for problem in reading.problems):
        # traces, of which a question may have several
        reading = read(source, seed=0, traces=True)
    traces = sum(problem.trace is not None for problem in reading.problems)
    problems = []
    for problem in reading.problems[: None if everything else 3]:
        shown = problem.model_dump(include={"id", "question", "answer"})
        if traces:
            shown["trace"] = _beginning(problem.trace)
        problems.append(shown)
    reasons = Counter(row["reason"] for row in reading.rejected)
    description: Json = {
        "rows": len(reading.problems) + len(reading.rejected),
        "usable": len(reading.problems),
        "rejected": [{"reason": reason, "rows": rows} for reason, rows in reasons.most_common()],
        "problems": problems,
    }
    if traces:
        description["with_trace"] = traces
    if reading.warnings:
        description["warnings"] = [{"warning": warning} for warning in reading.warnings]
    return description


def _beginning(trace: str | None) -> str | None:
    if trace is None or len(trace) <= SHOWN_TRACE:
        return trace
    return f"{trace[:SHOWN_TRACE]}... ({len(trace)} characters)"


def subset(problems: list[Problem], source: DatasetConfig, seed: int) -> list[Problem]:
    """The source's `limit` rows: the first, a seeded choice, or a stratified one (each stratum gets
    its share to within one row); in the order of the file.
    """
    strata = [getattr(problem, source.stratify or "", None) or "" for problem in problems]
    if source.stratify and not any(strata):
        message = f"{source.path} has no {source.stratify} to stratify by."
        raise KitError(message, "Map level or subject by fields.", 2)
    limit = source.limit
    if limit is None or limit >= len(problems):
        return problems
    order = list(range(len(problems)))
    if source.seed is not None or source.stratify:
        random.Random(f"subset {seed if source.seed is None else source.seed}").shuffle(order)
    # each stratum's rows are together, and rows are taken at even distances
    if source.stratify:
        order.sort(key=strata.__getitem__)
        order = [order[(2 * i + 1) * len(order) // (2 * limit)] for i in range(limit)]
    return [problems[i] for i in sorted(order[:limit])]


def normal(question: str) -> str:
    """A question up to case and white space: what makes two questions the same."""
    return " ".join(question.casefold().split())


def near_duplicates(first: Sequence[Problem], second: Sequence[Problem]) -> list[str]:
    """Ids in second of questions that share NEAR_RATIO of their word 5-grams with one question of
    first.
    """
    # which questions hold a 5-gram
    holders = defaultdict(list)
    ids = []
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


def _facts(source: DatasetConfig, reading: Reading, problems: list[Problem]) -> Json:
    return {
        "path": source.path,
        "rows": len(problems),
        "rejected": len(reading.rejected),
        "fingerprint": digest(problems),
    }


def _hub_rows(source: DatasetConfig, held_out: bool) -> Rows:
    leave_out_dead_hub()
    import datasets

    options = {"name": source.subset, "split": source.split or ("test" if held_out else "train")}
    try:
        datasets.disable_progress_bars()
        rows = datasets.load_dataset(source.path, **options)
        return numbered(map(dict, rows))
    # datasets, pyarrow and the HTTP client raise dozens of types, all of them about the source
    except Exception as error:
        cause = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        message = f"{source.path} (no such file; asked the hub): {cause}"
        hint = (
            f"Check name, subset and split ({options}); "
            "without a network give a downloaded file: data.train=FILE."
        )
        raise KitError(message, hint) from None
