"""Problems from the built-in generator, a file or the hub: read, checked, subsets and holdouts taken.

What a row is shows in its keys, in any case:
- GSM8K, hub `openai/gsm8k`: {"question": "Natalia sold ...", "answer": "... <<48/2=24>>24 clips in May.\\n#### 72"}
- MATH, hub `HuggingFaceH4/MATH-500`: {"problem": ..., "solution": ..., "answer": "\\\\left(3,...", ...}
- AIME and AMC: {"problem" or "question": ..., "answer": "204"}, with an "id" where there is one
- s1K, hub `simplescaling/s1K-1.1`: {"question", "solution", "deepseek_thinking_trajectory", ...}
- any other JSONL: `fields: {question: KEY, answer: KEY, id: KEY, trace: KEY}`

A damaged file stops the run, with its line. A row that lacks something, or whose id or text stood before, is set aside.
Training and evaluation may share no question, up to case and white space; rewordings are only counted.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import random
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from kit.core.config import Config, DatasetConfig
from kit.core.errors import KitError
from kit.core.records import Problem, replace_surrogates
from kit.core.run import Run
from kit.core.storage import digest

NEAR_RATIO = 0.6  # of word 5-grams shared, from which two questions are near-duplicates
S1K_TRACE = "deepseek_thinking_trajectory"
ROLES = {
    "id": ("id", "unique_id", "problem_id"),
    "question": ("question", "problem"),
    "answer": ("answer",),
}
ROLES |= {"solution": ("solution",), "trace": ("trace", "long_cot", S1K_TRACE)}
ROLES |= {
    "level": ("level",),
    "subject": ("subject", "type"),
}  # what a row may hold, and its keys, best first


class Reading(NamedTuple):
    """The usable problems of a source, and the rows that were set aside, each as {id, reason, detail}."""

    name: str  # for tables and files
    problems: list[Problem]
    rejected: list[dict[str, str]]


class Loaded(NamedTuple):
    """All problems of a run. `facts` go into the manifest, `rejected` into rejected.jsonl."""

    train: list[Problem]
    evals: dict[str, list[Problem]]
    facts: dict[str, Any]
    rejected: list[dict[str, str]]


def load_traces(config: Config) -> list[Problem]:
    """The training problems alone, as `load_all` gives them."""
    source, reading = _train(config)
    return subset(reading.problems, source, config.seed)


@lru_cache(maxsize=1)
def problems_of(run: Run) -> Loaded:
    """A run's problems, read once; their fingerprints go into its manifest."""
    loaded = load_all(run.config)
    run.record(data=loaded.facts, rejected=loaded.rejected)
    return loaded


def load_all(config: Config) -> Loaded:
    """Everything a run reads, checked against each other; sources of stages that will not run are not read.

    Raises:
        KitError: as `read`; a question in training and in evaluation, two sources of one name, an empty holdout.
    """
    source, whole = _train(config)
    train = subset(whole.problems, source, config.seed)
    taken = {normal(problem.question): problem.id for problem in train}
    found = Loaded(
        train, {}, {"train": _facts(source, whole, train), "evals": {}}, list(whole.rejected)
    )
    for held in config.data.eval if config.stop_after in ("eval", "report") else ():
        if held.path == "holdout":
            rest = [problem for problem in whole.problems if normal(problem.question) not in taken]
            reading = Reading(held.name or "holdout", rest, [])
        else:
            reading = read(held, config.seed, held_out=True)
        if not reading.problems:
            what = f"Nothing is left for the holdout: training takes all {len(taken)} questions of {whole.name}."
            raise KitError(
                what,
                "Set data.train.limit below that, or name another source, like data.eval=builtin.",
            )
        if reading.name in found.evals:
            what = f"Two sources of data.eval are called {reading.name}."
            raise KitError(what, "Name each: {path: ..., name: ...}.", 2)
        problems = found.evals[reading.name] = subset(reading.problems, held, config.seed)
        both = [
            (taken[text], problem.id)
            for problem in problems
            if (text := normal(problem.question)) in taken
        ]
        if both:
            shown = "; ".join(
                f"{a!r} in {whole.name} is {b!r} in {reading.name}" for a, b in both[:3]
            )
            what = f"{len(both)} question(s) stand in training and in evaluation: {shown}."
            raise KitError(what, "Take them out of one of the two, or evaluate on `holdout`.")
        near = {"near_duplicates": len(near_duplicates(train, problems))}
        found.facts["evals"][reading.name] = _facts(held, reading, problems) | near
        found.rejected.extend(reading.rejected)
    return found


def read(source: DatasetConfig, seed: int, held_out: bool = False, traces: bool = False) -> Reading:
    """All rows of a source, before any subset (built-in problems aside: they are as many as asked for).

    Args:
        seed: of built-in problems, where the source has none of its own.
        held_out: for evaluation: built-in problems of the held-out half; a hub dataset's split `test`.
        traces: rows need a trace, and a question may come more than once.

    Raises:
        KitError: no such file or dataset, broken JSON (with its line), or not one usable row.
    """
    path, name = source.path, source.name or re.sub(r"\.jsonl?$", "", Path(source.path).name)
    reading = Reading(re.sub(r"[^\w.-]+", "-", name).strip("-.") or "data", [], [])
    if path == "builtin":
        return reading._replace(problems=_builtin(source, seed, held_out))
    is_file = os.path.exists(path) or re.match(r"[./~]|.*\.jsonl?$", path)
    rows = _file_rows(path) if is_file else _hub_rows(source, held_out)
    keys = {**ROLES, **{role: (key,) for role, key in source.fields.items()}}
    seen: dict[str, str] = {}  # where an id stands
    for where, row in rows:
        values = _values(row, keys)
        text = f"{normal(values['question'] or '')}\0{values['trace'] if traces else ''}"
        id = values["id"] = (
            values["id"] or f"{reading.name}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"
        )
        lacks = [role for role in ("question", "answer", "trace")[: 2 + traces] if not values[role]]
        if lacks or id in seen:
            held = [key for key in row if lacks and key.lower() in map(str.lower, keys[lacks[0]])]
            why = (
                f"no {lacks[0]} in {' or '.join(held) or f'any key of {[*row]}'}"
                if lacks
                else "duplicate id or text"
            )
            detail = f"{path}, {where}: {why}" + ("" if lacks else f": stands in {seen[id]}")
            reading.rejected.append({"id": id, "reason": why, "detail": detail})
        else:
            seen[id] = where
            reading.problems.append(Problem.model_validate(values))
    if not reading.problems:
        what = f"{path}: none of {len(rows)} rows is usable. The first: {reading.rejected[0]['detail']}."
        raise KitError(what, "Say which key holds what: fields={question: KEY, answer: KEY}.")
    return reading


def subset(problems: list[Problem], source: DatasetConfig, seed: int) -> list[Problem]:
    """The source's `limit` rows: the first, a seeded choice, or a stratified one (each stratum gets its share to within
    one row); in the order of the file."""
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
    """Ids in second of questions that share NEAR_RATIO of their word 5-grams with one question of first."""
    holders, found = defaultdict(list), []
    for problem in first:
        for gram in _grams(problem.question):
            holders[gram].append(problem.id)
    for problem in second:
        grams = _grams(problem.question)
        shared = Counter(id for gram in grams for id in holders.get(gram, ()))
        if max(shared.values(), default=0) >= NEAR_RATIO * len(grams):
            found.append(problem.id)
    return found


def _grams(question: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", question.casefold())
    return {tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))}


def _facts(source: DatasetConfig, reading: Reading, problems: list[Problem]) -> dict[str, Any]:
    counts = {"rows": len(problems), "rejected": len(reading.rejected)}
    return {"path": source.path, **counts, "fingerprint": digest(problems)}


def _train(config: Config) -> tuple[DatasetConfig, Reading]:
    """Where training problems come from, and all that is there. A file of traces stands alone: of data.train only
    limit, seed and stratify count."""
    source, teacher = config.data.train, config.teacher
    if teacher.backend == "file" and teacher.path:
        source = source.model_copy(
            update={"path": teacher.path, "fields": teacher.fields, "name": None}
        )
    elif source.path == "holdout" or (teacher.backend == "file" and source.path == "builtin"):
        hint = "Set teacher.path=FILE (JSONL of {id, question, answer, long_cot}), or data.train to a file or hub id."
        raise KitError(
            f"data.train={source.path} gives nothing for teacher.backend={teacher.backend}.",
            hint,
            2,
        )
    return source, read(source, config.seed, traces=teacher.backend == "file")


def _builtin(source: DatasetConfig, seed: int, held_out: bool) -> list[Problem]:
    from kit.synthetic import generate

    seed = seed if source.seed is None else source.seed
    return generate(source.limit or 100, seed, held_out, source.steps, source.max_number)


def _file_rows(name: str) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a file, one a line, each with where it stands."""
    path, where, rows = (
        Path(os.path.expanduser(name)),
        "its path",
        [],
    )  # pathlib would raise for an unknown ~user
    try:
        for number, line in enumerate(
            path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n"), 1
        ):
            where = f"line {number}"
            rows += [(where, json.loads(line.decode()))] if line.strip() else []
            if rows and not isinstance(rows[-1][1], dict):
                raise ValueError(f"{type(rows[-1][1]).__name__}, not an object")
    except OSError as error:
        raise KitError(f"{path} cannot be read: {error.strerror}.", "Mend the path.") from None
    except (ValueError, RecursionError) as error:
        hint = "Each line should hold one object {key: value, ...}. Nothing was done yet."
        raise KitError(f"{path}, {where}: broken JSON ({error}).", hint) from None
    if not rows:
        raise KitError(f"{path} is empty.", "It should hold objects {key: value, ...}, one a line.")
    return rows


def _hub_rows(source: DatasetConfig, held_out: bool) -> list[tuple[str, dict[str, Any]]]:
    import datasets

    options = {"name": source.subset, "split": source.split or ("test" if held_out else "train")}
    try:
        datasets.disable_progress_bars()
        return [
            (f"row {i}", dict(row))
            for i, row in enumerate(datasets.load_dataset(source.path, **options), 1)
        ]
    except Exception as error:  # datasets, pyarrow and the HTTP client raise dozens of types, all of them the source's
        hint = f"Check name, subset and split ({options}); without a network give a downloaded file: data.train=FILE."
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise KitError(f"{source.path} (no such file; asked the hub): {said}", hint) from None


def _values(row: dict[str, Any], keys: dict[str, tuple[str, ...]]) -> dict[str, str | None]:
    """What a row holds, by role. GSM8K's answers are worked text with the value behind ####."""
    values = {role: _text(row, names) for role, names in keys.items()}
    answer, solution = values["answer"], values["solution"]
    if answer and "####" in answer:
        worked, _, last = re.sub("<<[^>]*>>", "", answer).rpartition("####")
        values["answer"] = re.sub(r"(?<=\d),(?=\d{3})", "", last.strip())
        values["solution"] = f"{worked.strip()}\nThe answer is \\boxed{{{values['answer']}}}."
    elif not answer and solution:
        from kit.grading.answers import last_box

        values["answer"] = last_box(solution) or (solution if S1K_TRACE in row else None)
    return values


def _text(row: dict[str, Any], names: tuple[str, ...]) -> str | None:
    """The first of the keys, in any case, that holds text or a finite number, as text; None where none does."""
    for value in (row[key] for name in names for key in row if key.lower() == name.lower()):
        if isinstance(value, str) and value.strip():
            return replace_surrogates(value)
        if type(value) in (int, float) and abs(value) < float("inf"):  # neither True nor NaN
            return str(value).removesuffix(".0")
    return None
