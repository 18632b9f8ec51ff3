"""Problems from the built-in generator, a file or the hub: read, checked, subsets and holdouts taken.

Where they are (a hub id or a file of the same rows; `auto` tells the formats apart by their keys):
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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kit.config import Config, Source
from kit.errors import KitError
from kit.records import Problem, digest

NEAR_RATIO = 0.6  # of word 5-grams shared, from which two questions are near-duplicates
HUB = {  # dataset: (subset, split of training, split of evaluation), where the config names none
    "openai/gsm8k": ("main", "train", "test"),
    "HuggingFaceH4/MATH-500": (None, "test", "test"),
    "simplescaling/s1K-1.1": (None, "train", "train"),
}
ROLES = {  # what a row may hold, and the keys it is known by, best first, in any case
    "id": ("id", "unique_id", "problem_id"),
    "question": ("question", "problem"),
    "answer": ("answer",),
    "solution": ("solution",),
    "trace": ("trace", "long_cot", "deepseek_thinking_trajectory"),
    "level": ("level",),
    "subject": ("subject", "type"),
}
_SUFFIX = re.compile(r"\.(?:jsonl?|ndjson|(parquet|csv))$", re.IGNORECASE)
Keys = dict[str, tuple[str, ...]]  # role: keys of the source at hand
Located = list[tuple[str, dict[str, Any]]]  # rows with where they stand ("line 812")


@dataclass(frozen=True)
class Rejection:
    """A row that was set aside while reading, and why."""

    id: str
    reason: str
    detail: str


@dataclass
class Reading:
    """What reading one source gave."""

    name: str
    source: Source
    format: str
    problems: list[Problem] = field(default_factory=list)
    rejected: list[Rejection] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.name = re.sub(r"[^\w.-]+", "-", self.name).strip("-.") or "data"  # it becomes part of a file's name

    def facts(self) -> dict[str, Any]:
        """For the manifest: where from, how many, and a fingerprint of the problems."""
        counts = {"rows": len(self.problems), "rejected": len(self.rejected), "fingerprint": digest(self.problems)}
        return {"path": self.source.path, "format": self.format, **counts, "notes": self.notes}


@dataclass(frozen=True)
class Loaded:
    """All problems of a run. `facts` go into the manifest, `rejected` into rejected.jsonl."""

    train: list[Problem]
    evals: dict[str, list[Problem]]
    facts: dict[str, Any]
    rejected: list[Rejection]


def load(source: Source, seed: int) -> list[Problem]:
    """The problems of one source for training, its subset taken; arguments and errors are those of `read`."""
    return subset(read(source, seed), seed).problems


def load_traces(config: Config) -> list[Problem]:
    """Problems with traces, for teacher.backend=file: the rows of teacher.path, or data.train's rows that have one.

    A file of traces stands alone: data.train only gives limit, seed and stratify. A question may have many traces.
    """
    return _train(config)[0].problems


def load_all(config: Config) -> Loaded:
    """Everything a run reads, checked against each other; sources of stages that will not run are not read.

    Raises:
        KitError: as `read`; a question in training and in evaluation, two sources of one name, an empty holdout.
    """
    train, whole = _train(config)
    loaded = Loaded(train.problems, {}, {"train": train.facts(), "evals": {}}, list(train.rejected))
    for source in config.data.eval if config.stop_after in ("eval", "report") else ():
        own = source.path != "holdout"
        rows = read(source, config.seed, held_out=True) if own else _holdout(train, whole, source, config.seed)
        reading = subset(rows, config.seed)
        if reading.name in loaded.evals:
            raise KitError(
                f"Two sources of data.eval are called {reading.name}.", "Name each: {path: ..., name: ...}.", 2
            )
        loaded.facts["evals"][reading.name] = {**reading.facts(), **_compare(train, reading)}
        loaded.evals[reading.name] = reading.problems
        loaded.rejected.extend(reading.rejected)
    return loaded


def read(source: Source, seed: int, held_out: bool = False, traces: bool = False) -> Reading:
    """All rows of a source, before any subset (built-in problems aside: they are as many as asked for).

    Args:
        source: the config section. Built-in problems take their number of steps from `subset` ("1-2").
        seed: of built-in problems and subsets, where the source has none of its own.
        held_out: for evaluation: built-in problems of the held-out half; a hub dataset's evaluation split.
        traces: rows need a trace, and a question may come more than once.

    Raises:
        KitError: no such file or dataset, broken JSON (with its line), no key that is known for question or answer,
            two rows of one id, or not one usable row.
    """
    path = source.path
    if path == "builtin":
        return _builtin(source, seed, held_out)
    suffix = _SUFFIX.search(path)
    is_file = os.path.exists(path) or re.match(r"[./~]", path) or suffix
    rows = _file_rows(path) if is_file and not (suffix and suffix[1]) else _dataset_rows(source, held_out)
    rows = [(where, {key.lower(): value for key, value in row.items()}) for where, row in rows]
    format_, keys = _keys(source, [row for _, row in rows])
    reading = Reading(source.name or _SUFFIX.sub("", Path(path).name), source, format_)
    known: dict[tuple[str, str], str] = {}
    for where, row in rows:
        problem, lacks = _problem(row, keys, reading, traces)
        own_id, text = _text(row, keys["id"]), problem and (problem.id if traces else normal(problem.question))
        if problem and ("id", own_id) in known:
            what = f"{path}: {known['id', own_id]} and {where} have the same id {own_id!r}."
            raise KitError(what, "Give each row an id of its own, or none: ids are then made from the text.")
        if problem and ("text", text) in known:
            lacks = f"duplicate {'row' if traces else 'question'}"
            where += f": stands already in {known['text', text]}"
        if lacks:
            reading.rejected.append(Rejection(problem.id if problem else own_id or where, lacks, f"{path}, {where}"))
        else:
            known["id", problem.id] = known["text", text] = where
            reading.problems.append(problem)
    if not reading.problems:
        first = next((f" The first: {gone.reason} ({gone.detail})." for gone in reading.rejected), "")
        raise KitError(f"{path}: none of {len(rows)} rows is usable.{first}", "Mend them, or map keys by fields.")
    if broken := sum(problem.digest_text().count("\ufffd") for problem in reading.problems):
        reading.notes.append(f"{broken} broken characters (lone surrogates become U+FFFD)")
    return reading


def subset(reading: Reading, seed: int) -> Reading:
    """Take the source's `limit` rows: the first, a seeded choice, or a stratified one; in the order of the file.

    A stratum gets its share of the limit, to within one row.
    """
    problems, source = reading.problems, reading.source
    strata = [getattr(problem, source.stratify or "", None) or "" for problem in problems]
    if source.stratify and not any(strata):
        raise KitError(f"{source.path} has no {source.stratify} to stratify by.", "Map level or subject by fields.", 2)
    if source.limit and source.limit > len(problems):
        reading.notes.append(f"limit {source.limit}, but there are {len(problems)} rows")
    if source.limit is None or source.limit >= len(problems):
        return reading
    order = list(range(len(problems)))
    if source.seed is not None or source.stratify:
        random.Random(f"subset {seed if source.seed is None else source.seed}").shuffle(order)
    if source.stratify:  # at even distances along the strata
        order.sort(key=strata.__getitem__)
        order = [order[(2 * i + 1) * len(order) // (2 * source.limit)] for i in range(source.limit)]
    return replace(reading, problems=[problems[i] for i in sorted(order[: source.limit])])


def normal(question: str) -> str:
    """A question up to case and white space: what makes two questions the same."""
    return " ".join(question.casefold().split())


def near_duplicates(first: Sequence[Problem], second: Sequence[Problem]) -> list[tuple[str, str, float]]:
    """Pairs (id in first, id in second, ratio) of questions that share NEAR_RATIO of their word 5-grams (Jaccard)."""
    grams, holders = [_grams(problem.question) for problem in first], defaultdict(list)
    for gram, index in ((gram, index) for index, found in enumerate(grams) for gram in found):
        holders[gram].append(index)
    pairs = []
    for problem in second:
        mine = _grams(problem.question)
        shared = Counter(index for gram in mine for index in holders.get(gram, ()))
        ratios = ((i, n / (len(mine) + len(grams[i]) - n)) for i, n in sorted(shared.items()))
        pairs += [(first[i].id, problem.id, round(ratio, 3)) for i, ratio in ratios if ratio >= NEAR_RATIO]
    return pairs


def _grams(question: str) -> frozenset[tuple[str, ...]]:
    words = re.findall(r"\w+", question.casefold())
    return frozenset(tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4)))


def _train(config: Config) -> tuple[Reading, Reading]:
    """Training problems: the subset, and everything it was taken from."""
    source, teacher = config.data.train, config.teacher
    if teacher.backend == "file" and teacher.path:
        asked = {name: getattr(source, name) for name in ("limit", "seed", "stratify", "verifier")}
        source = Source(path=teacher.path, fields=teacher.fields, **asked)
    elif source.path == "holdout" or (teacher.backend == "file" and source.path == "builtin"):
        hint = "Set teacher.path=FILE (JSONL of {id, question, answer, long_cot}), or data.train to a file or hub id."
        raise KitError(f"data.train={source.path} gives nothing for teacher.backend={teacher.backend}.", hint, 2)
    whole = read(source, config.seed, traces=teacher.backend == "file")
    return subset(whole, config.seed), whole


def _holdout(train: Reading, whole: Reading, source: Source, seed: int) -> Reading:
    """The rows that training leaves over, for a seeded subset; of built-in problems, the held-out half."""
    source = source.model_copy(
        update={"name": source.name or "holdout", "seed": seed if source.seed is None else source.seed}
    )
    if whole.format == "builtin":
        return _builtin(source.model_copy(update={"subset": source.subset or whole.source.subset}), seed, True)
    taken = {normal(problem.question) for problem in train.problems}
    rest = {text: problem for problem in whole.problems if (text := normal(problem.question)) not in taken}
    if not rest:
        what = f"Nothing is left for the holdout: training takes all {len(whole.problems)} rows of {whole.name}."
        raise KitError(what, "Set data.train.limit below that, or name another source in data.eval.")
    return Reading(source.name or "", source, whole.format, list(rest.values()))


def _compare(train: Reading, held_out: Reading) -> dict[str, Any]:
    """Refuse questions that stand on both sides; count those that nearly do."""
    known = {normal(problem.question): problem.id for problem in train.problems}
    both = [(known[text], p.id) for p in held_out.problems if (text := normal(p.question)) in known]
    if both:
        shown = "; ".join(f"{a!r} in {train.name} is {b!r} in {held_out.name}" for a, b in both[:3])
        what = f"{len(both)} question(s) stand in training and in evaluation: {shown}."
        raise KitError(what, "Take them out of one of the two, or evaluate on `holdout`.")
    near = near_duplicates(train.problems, held_out.problems)
    return {"near_duplicates": len({b for _, b, _ in near}), "near_examples": [list(pair) for pair in near[:5]]}


def _builtin(source: Source, seed: int, held_out: bool) -> Reading:
    from kit.problems import generate

    if not (steps := re.fullmatch(r"(\d)(?:-(\d))?(?: to (\d+))?", source.subset or "1-4")):
        raise KitError(f"subset {source.subset!r} of the built-in problems is no range.", "Like 1-2, or 1-2 to 10.", 2)
    span, seed = (int(steps[1]), int(steps[2] or steps[1])), seed if source.seed is None else source.seed
    made = generate(source.limit or 100, seed, held_out, span, int(steps[3] or 60))
    return Reading(source.name or "builtin", source, "builtin", made)


def _file_rows(name: str) -> Located:
    """The objects of a .jsonl or .json file."""
    path, where, rows = Path(os.path.expanduser(name)), "", []  # pathlib would raise where there is no such user
    try:
        data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
        whole = path.suffix.lower() == ".json"
        for i, line in enumerate([data] if whole else data.split(b"\n"), 1):
            where = "" if whole else f", line {i}"
            rows += [(where[2:], json.loads(line.decode()))] if line.strip() else []
    except OSError as error:
        raise KitError(f"{path} cannot be read: {error.strerror}.", "Mend the path.") from None
    except (ValueError, RecursionError) as error:
        raise KitError(f"{path}{where}: broken JSON ({error}).", "Mend it; nothing was done yet.") from None
    if whole and rows:  # a list, or an object with one inside
        inside = rows[0][1].values() if isinstance(rows[0][1], dict) else [rows[0][1]]
        listed = next((value for value in inside if isinstance(value, list)), [rows[0][1]])
        rows = [(f"row {i}", row) for i, row in enumerate(listed, 1)]
    wrong = next(
        (f", {where}: {type(row).__name__}, not an object" for where, row in rows if type(row) is not dict), ""
    )
    if wrong or not rows:
        raise KitError(f"{path}{wrong or ' is empty'}.", "It should hold objects {key: value, ...}, one a line.")
    return rows


def _dataset_rows(source: Source, held_out: bool) -> Located:
    """Rows of a hub dataset or of a table file."""
    import datasets

    if table := _SUFFIX.search(source.path):
        path, where, options = table[1].lower(), "", {"data_files": source.path, "split": "train"}
    else:
        path, where = source.path, " (no such file; asked the hub)"
        subset_name, *splits = HUB.get(path, (None, "train", "test"))
        options = {"name": source.subset or subset_name, "split": source.split or splits[held_out]}
    try:
        datasets.disable_progress_bars()
        return [(f"row {i}", dict(row)) for i, row in enumerate(datasets.load_dataset(path, **options), 1)]
    except Exception as error:  # datasets, pyarrow and the HTTP client raise dozens of types, all of them the source's
        hint = f"Check name, subset and split ({options}); without a network give a downloaded file: data.train=FILE."
        said = f"{source.path}{where}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise KitError(said, hint) from None


def _keys(source: Source, rows: list[dict[str, Any]]) -> tuple[str, Keys]:
    """The format, and which keys hold which role."""
    if unknown := set(source.fields) - set(ROLES):
        raise KitError(f"fields: unknown {', '.join(sorted(unknown))}.", f"A row may hold {', '.join(ROLES)}.", 2)
    seen = {key: None for row in rows for key in row}
    mapped = {role: (key.lower(),) for role, key in source.fields.items()}
    keys: Keys = {**(dict.fromkeys(ROLES, ()) if source.format == "fields" else ROLES), **mapped}
    has = {role for role in keys if not seen.keys().isdisjoint(keys[role])}
    needed = {"question", *mapped, *(["answer"] if "solution" not in has else [])}
    if lacks := [f"{role} ({' or '.join(keys[role])})" for role in keys if role in needed - has]:
        hint = f"Its keys: {', '.join(seen) or 'none'}. Say which is which with fields: {{question: KEY, answer: KEY}}."
        raise KitError(f"{source.path} has no key for {' and '.join(lacks)}.", hint)
    marked = any("####" in str(row.get(key)) for row in rows[:50] for key in keys["answer"])
    guess = "s1k" if ROLES["trace"][-1] in seen else "gsm8k" if marked else "math" if "solution" in has else "aime"
    return guess if source.format == "auto" else source.format, keys


def _problem(row: dict[str, Any], keys: Keys, reading: Reading, traces: bool) -> tuple[Problem | None, str]:
    """One row, or what it lacks."""
    value = {role: _text(row, keys[role]) for role in ROLES}
    answer, solution = value["answer"], value["solution"]
    if reading.format == "gsm8k" and answer:
        worked, mark, last = re.sub("<<[^>]*>>", "", answer).rpartition("####")
        value["answer"] = re.sub(r"(?<=\d),(?=\d{3})", "", last.strip()) if mark else None
        value["solution"] = f"{worked.strip()}\nThe answer is \\boxed{{{value['answer']}}}."
    elif not answer and solution:
        from kit.answers import last_box

        value["answer"] = last_box(solution) or (solution if reading.format == "s1k" else None)
    for role in ("question", "answer", *(["trace"] if traces else [])):
        if not value[role]:
            return None, f"no {role} in {' or '.join(key for key in keys[role] if key in row) or 'any key'}"
    text = f"{value['question']}\0{value['trace']}" if traces else str(value["question"])
    made = f"{reading.name}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"
    return Problem.model_validate({**value, "id": value["id"] or made}), ""


def _text(row: dict[str, Any], keys: tuple[str, ...]) -> str | None:
    """The first of the keys that holds text or a number, as text; None where none does."""
    for value in map(row.get, keys):
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            return str(int(value) if value == int(value) else value)
        if isinstance(value, str) and value.strip():
            return re.sub("[\ud800-\udfff]", "\ufffd", value)  # no tokenizer takes lone surrogates
    return None
