"""Problems from the built-in generator, a file or the hub: read, checked, subsets and holdouts taken.

What a row is shows in its keys, in any case:
- GSM8K, hub `openai/gsm8k`: {"question": "Natalia sold ...", "answer": "... <<48/2=24>>24 clips in May.\\n#### 72"}
- MATH, hub `HuggingFaceH4/MATH-500`: {"problem": ..., "solution": ..., "answer": "\\\\left(3,...", ...}
- AIME and AMC: {"problem" or "question": ..., "answer": "204"}, with an "id" where there is one
- s1K, hub `simplescaling/s1K-1.1`: {"question", "solution", "deepseek_thinking_trajectory", ...}
- any other JSONL: `fields: {question: KEY, answer: KEY, id: KEY, trace: KEY}`

A damaged file stops the run, with its line. A row that lacks something and a question's second row are set aside with
the reason. Training and evaluation may share no question, up to case and white space; rewordings are only counted.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import math
import os
import random
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kit.config import Config, Source
from kit.errors import KitError
from kit.records import Problem, digest, sound

NEAR_RATIO = 0.6  # of word 5-grams shared, from which two questions are near-duplicates
S1K_TRACE = "deepseek_thinking_trajectory"
ROLES = {  # what a row may hold, and the keys it is known by, best first
    "id": ("id", "unique_id", "problem_id"),
    "question": ("question", "problem"),
    "answer": ("answer",),
    "solution": ("solution",),
    "trace": ("trace", "long_cot", S1K_TRACE),
    "level": ("level",),
    "subject": ("subject", "type"),
}
Located = list[tuple[str, dict[str, Any]]]  # rows with where they stand ("line 812")


@dataclass(frozen=True)
class Reading:
    """The usable problems of a source, and the rows that were set aside, each as {id, reason, detail}."""

    name: str  # for tables and files
    problems: list[Problem]
    rejected: list[dict[str, str]]


@dataclass(frozen=True)
class Loaded:
    """All problems of a run. `facts` go into the manifest, `rejected` into rejected.jsonl."""

    train: list[Problem]
    evals: dict[str, list[Problem]]
    facts: dict[str, Any]
    rejected: list[dict[str, str]]


def load_traces(config: Config) -> list[Problem]:
    """The training problems. With teacher.backend=file: rows of teacher.path, or data.train's rows, that have a trace.

    A file of traces stands alone: data.train only gives limit, seed and stratify. A question may have many traces.
    """
    source, reading = _train(config)
    return subset(reading.problems, source, config.seed)


def load_all(config: Config) -> Loaded:
    """Everything a run reads, checked against each other; sources of stages that will not run are not read.

    Raises:
        KitError: as `read`; a question in training and in evaluation, two sources of one name, an empty holdout.
    """
    source, whole = _train(config)
    train = subset(whole.problems, source, config.seed)
    loaded = Loaded(train, {}, {"train": _facts(source, whole, train), "evals": {}}, list(whole.rejected))
    for held in config.data.eval if config.stop_after in ("eval", "report") else ():
        if held.path == "holdout":
            held, reading = _holdout(held, source, whole, train, config.seed)
        else:
            reading = read(held, config.seed, held_out=True)
        if reading.name in loaded.evals:
            what = f"Two sources of data.eval are called {reading.name}."
            raise KitError(what, "Name each: {path: ..., name: ...}.", 2)
        problems = loaded.evals[reading.name] = subset(reading.problems, held, config.seed)
        _refuse_overlap(whole.name, train, reading.name, problems)
        near = {"near_duplicates": len(near_duplicates(train, problems))}
        loaded.facts["evals"][reading.name] = _facts(held, reading, problems) | near
        loaded.rejected.extend(reading.rejected)
    return loaded


def read(source: Source, seed: int, held_out: bool = False, traces: bool = False) -> Reading:
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
        reading.problems.extend(_builtin(source, seed, held_out))
        return reading
    is_file = os.path.exists(path) or re.match(r"[./~]|.*\.jsonl?$", path)
    rows = _file_rows(path) if is_file else _hub_rows(source, held_out)
    keys = {**ROLES, **{role: (key,) for role, key in source.fields.items()}}
    found = [(where, {role: _text(row, keys[role]) for role in keys}, row) for where, row in rows]
    marked = any("####" in (values["answer"] or "") for _, values, _ in found)
    seen: dict[str, str] = {}  # where an id stands
    for where, values, row in found:
        lacks = _complete(values, reading.name, marked, S1K_TRACE in row, traces)
        if lacks:
            lacks = f"no {lacks} in {' or '.join(key for key in keys[lacks] if key in row) or f'any key of {[*row]}'}"
        elif values["id"] in seen:
            lacks = f"duplicate id or text: stands in {seen[values['id']]}"
        if lacks:
            detail = f"{path}, {where}: {lacks}"
            reading.rejected.append({"id": values["id"] or where, "reason": lacks.split(":")[0], "detail": detail})
        else:
            seen[str(values["id"])] = where
            reading.problems.append(Problem.model_validate(values))
    if not reading.problems:
        what = f"{path}: none of {len(rows)} rows is usable. The first: {reading.rejected[0]['detail']}."
        raise KitError(what, "Say which key holds what: fields={question: KEY, answer: KEY}.")
    return reading


def subset(problems: list[Problem], source: Source, seed: int) -> list[Problem]:
    """Take the source's `limit` rows: the first, a seeded choice, or a stratified one; in the order of the file.

    A stratum gets its share of the limit, to within one row.
    """
    strata = [getattr(problem, source.stratify or "", None) or "" for problem in problems]
    if source.stratify and not any(strata):
        raise KitError(f"{source.path} has no {source.stratify} to stratify by.", "Map level or subject by fields.", 2)
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
    holders = defaultdict(list)
    for problem in first:
        for gram in _grams(problem.question):
            holders[gram].append(problem.id)
    found = []
    for problem in second:
        grams = _grams(problem.question)
        shared = Counter(id for gram in grams for id in holders.get(gram, ()))
        if max(shared.values(), default=0) >= NEAR_RATIO * len(grams):
            found.append(problem.id)
    return found


def _grams(question: str) -> frozenset[tuple[str, ...]]:
    words = re.findall(r"\w+", question.casefold())
    return frozenset(tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4)))


def _facts(source: Source, reading: Reading, problems: list[Problem]) -> dict[str, Any]:
    """For the manifest: where from, how many, and a fingerprint of the problems."""
    counts = {"rows": len(problems), "rejected": len(reading.rejected)}
    return {"path": source.path, **counts, "fingerprint": digest(problems)}


def _train(config: Config) -> tuple[Source, Reading]:
    """Where training problems come from, and all that is there."""
    source, teacher = config.data.train, config.teacher
    if teacher.backend == "file" and teacher.path:
        asked = source.model_dump(include={"limit", "seed", "stratify", "verifier"})
        source = Source(path=teacher.path, fields=teacher.fields, **asked)
    elif source.path == "holdout" or (teacher.backend == "file" and source.path == "builtin"):
        hint = "Set teacher.path=FILE (JSONL of {id, question, answer, long_cot}), or data.train to a file or hub id."
        raise KitError(f"data.train={source.path} gives nothing for teacher.backend={teacher.backend}.", hint, 2)
    return source, read(source, config.seed, traces=teacher.backend == "file")


def _holdout(held: Source, source: Source, whole: Reading, train: list[Problem], seed: int) -> tuple[Source, Reading]:
    """The rows that training leaves over, for a seeded subset; of built-in problems, the held-out half."""
    seed = seed if held.seed is None else held.seed
    held = held.model_copy(update={"name": held.name or "holdout", "seed": seed})
    if source.path == "builtin":
        held = held.model_copy(update={"path": "builtin", "subset": held.subset or source.subset})
        return held, read(held, seed, held_out=True)
    taken = {normal(problem.question) for problem in train}
    rest = {text: problem for problem in whole.problems if (text := normal(problem.question)) not in taken}
    if not rest:
        what = f"Nothing is left for the holdout: training takes all {len(train)} rows of {whole.name}."
        raise KitError(what, "Set data.train.limit below that, or name another source in data.eval.")
    return held, Reading(str(held.name), list(rest.values()), [])


def _refuse_overlap(train_name: str, train: list[Problem], name: str, problems: list[Problem]) -> None:
    known = {normal(problem.question): problem.id for problem in train}
    both = [(known[text], problem.id) for problem in problems if (text := normal(problem.question)) in known]
    if both:
        shown = "; ".join(f"{a!r} in {train_name} is {b!r} in {name}" for a, b in both[:3])
        what = f"{len(both)} question(s) stand in training and in evaluation: {shown}."
        raise KitError(what, "Take them out of one of the two, or evaluate on `holdout`.")


def _builtin(source: Source, seed: int, held_out: bool) -> list[Problem]:
    from kit.problems import generate

    if not (steps := re.fullmatch(r"(\d)(?:-(\d))?(?: to (\d+))?", source.subset or "1-4")):
        raise KitError(f"subset {source.subset!r} of the built-in problems is no range.", "Like 1-2, or 1-2 to 10.", 2)
    span, seed = (int(steps[1]), int(steps[2] or steps[1])), seed if source.seed is None else source.seed
    return generate(source.limit or 100, seed, held_out, span, int(steps[3] or 60))


def _file_rows(name: str) -> Located:
    """The objects of a file, one a line."""
    path, where, rows = Path(os.path.expanduser(name)), "", []  # pathlib would raise where there is no such user
    try:
        for number, line in enumerate(path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
            where = f"line {number}"
            rows += [(where, json.loads(line.decode()))] if line.strip() else []
    except OSError as error:
        raise KitError(f"{path} cannot be read: {error.strerror}.", "Mend the path.") from None
    except (ValueError, RecursionError) as error:
        raise KitError(f"{path}, {where}: broken JSON ({error}).", "Mend it; nothing was done yet.") from None
    wrong = [f", {where}: {type(row).__name__}, not an object" for where, row in rows if not isinstance(row, dict)]
    if wrong or not rows:
        what = f"{path}{wrong[0] if wrong else ' is empty'}."
        raise KitError(what, "It should hold objects {key: value, ...}, one a line.")
    return rows


def _hub_rows(source: Source, held_out: bool) -> Located:
    import datasets

    options = {"name": source.subset, "split": source.split or ("test" if held_out else "train")}
    try:
        datasets.disable_progress_bars()
        return [(f"row {i}", dict(row)) for i, row in enumerate(datasets.load_dataset(source.path, **options), 1)]
    except Exception as error:  # datasets, pyarrow and the HTTP client raise dozens of types, all of them the source's
        hint = f"Check name, subset and split ({options}); without a network give a downloaded file: data.train=FILE."
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise KitError(f"{source.path} (no such file; asked the hub): {said}", hint) from None


def _complete(values: dict[str, str | None], name: str, marked: bool, s1k: bool, traces: bool) -> str:
    """Fill in a row's answer and id in place; returns the role that it lacks, or nothing.

    `marked`: answers are worked text with the value behind ####. `s1k`: a solution without a box is the answer itself.
    """
    answer, solution = values["answer"], values["solution"]
    if marked and answer:
        worked, mark, last = re.sub("<<[^>]*>>", "", answer).rpartition("####")
        values["answer"] = re.sub(r"(?<=\d),(?=\d{3})", "", last.strip()) if mark else None
        values["solution"] = f"{worked.strip()}\nThe answer is \\boxed{{{values['answer']}}}."
    elif not answer and solution:
        from kit.answers import last_box

        values["answer"] = last_box(solution) or (solution if s1k else None)
    text = f"{normal(values['question'] or '')}\0{values['trace'] if traces else ''}"
    values["id"] = values["id"] or f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"
    return next((role for role in ("question", "answer", "trace")[: 2 + traces] if not values[role]), "")


def _text(row: dict[str, Any], keys: tuple[str, ...]) -> str | None:
    """The first of the keys, in any case, that holds text or a number, as text; None where none does."""
    for value in (row[key] for wanted in keys for key in row if key.lower() == wanted.lower()):
        if type(value) is int or (type(value) is float and math.isfinite(value)):
            return str(value).removesuffix(".0")
        if isinstance(value, str) and value.strip():
            return sound(value)
    return None
