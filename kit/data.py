"""Problems from files, the hub, or the built-in generator, as typed rows with stable ids.

Where they are (a hub id or a file of the same rows; `auto` tells the formats apart by their keys):
- GSM8K, hub `openai/gsm8k` (main): {"question": "Natalia sold clips to 48 of her friends in April, ...", "answer":
  "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\\n ... #### 72"}
- MATH, hub `HuggingFaceH4/MATH-500` (test): {"problem": "Convert the point $(0,3)$ ...", "solution": "We have ...",
  "answer": "\\\\left( 3, \\\\frac{\\\\pi}{2} \\\\right)", "subject": "Precalculus", "level": 2}
- AIME and AMC: {"problem" or "question": ..., "answer": "204"}, with an "id" where there is one
- s1K, hub `simplescaling/s1K-1.1` (train): {"question", "solution", "deepseek_thinking_trajectory", ...}
- any other JSONL: `fields: {question: KEY, answer: KEY, id: KEY, trace: KEY}`

A damaged file stops the run, with file and line. A row that lacks something is set aside with its reason, and so is
a question's second row. Questions are compared up to case and white space only; rewordings show as near-duplicates.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kit.config import STAGES, Config, Source
from kit.errors import KitError
from kit.records import Problem, digest

BUILTIN_ROWS = 100  # of a built-in source without a limit
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
Keys = dict[str, tuple[str, ...]]  # role: keys of the source at hand
Located = Iterator[tuple[str, dict[str, Any]]]  # a row with where it stands ("line 812")


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

    def facts(self) -> dict[str, Any]:
        """For the manifest: where from, how many, and a fingerprint of the problems."""
        counts = {"rows": len(self.problems), "rejected": len(self.rejected)}
        return {"path": self.source.path, "format": self.format, **counts, "fingerprint": digest(self.problems)} | (
            {"notes": self.notes} if self.notes else {}
        )


@dataclass(frozen=True)
class Loaded:
    """All problems of a run. `facts` go into the manifest, `rejected` into rejected.jsonl."""

    train: list[Problem]
    evals: dict[str, list[Problem]]
    facts: dict[str, Any]
    rejected: list[Rejection]


def load(source: Source, seed: int, held_out: bool = False) -> list[Problem]:
    """The problems of one source, its subset taken.

    Args:
        source: the config section. Built-in problems take their number of steps from `subset` ("1-2").
        seed: of built-in problems and stratified subsets, where the source has none of its own.
        held_out: for evaluation: built-in problems of the held-out half; a hub dataset's evaluation split.

    Raises:
        KitError: see `read`.
    """
    return subset(read(source, seed, held_out), seed).problems


def load_traces(config: Config) -> list[Problem]:
    """Problems with traces, for teacher.backend=file: the rows of teacher.path, or data.train's rows that have one.

    A file of traces stands alone: data.train then only gives limit, seed and stratify. One question may have many
    traces, each a row with an id of its own.
    """
    return _train(config)[0].problems


def load_all(config: Config) -> Loaded:
    """Everything a run reads, checked against each other; sources of stages that will not run are not read.

    Raises:
        KitError: see `read`; also a question that stands in training and in evaluation, two sources of one name,
            nothing left for a holdout.
    """
    train, whole = _train(config)
    facts: dict[str, Any] = {"train": train.facts(), "evals": {}}
    rejected, evals = list(train.rejected), {}
    evaluates = STAGES.index(config.stop_after) >= STAGES.index("eval")
    for source in config.data.eval if evaluates else ():
        if source.path == "holdout":
            reading = _holdout(train, whole, source, config.seed)
        else:
            reading = subset(read(source, config.seed, held_out=True), config.seed)
        if reading.name in evals:
            hint = "Give each a name of its own: {path: ..., name: ...}."
            raise KitError(f"Two sources of data.eval are called {reading.name}.", hint, 2)
        facts["evals"][reading.name] = {**reading.facts(), **_compare(train, reading)}
        evals[reading.name] = reading.problems
        rejected += reading.rejected
    return Loaded(train.problems, evals, facts, rejected)


def read(source: Source, seed: int, held_out: bool = False, traces: bool = False) -> Reading:
    """All rows of a source, before any subset (built-in problems aside: they are as many as asked for).

    Args:
        traces: rows need a trace, and a question may come more than once.

    Raises:
        KitError: no such file or dataset, broken JSON (with its line), no key that is known for question or answer,
            two rows of one id, or not one usable row.
    """
    if source.path == "builtin":
        return _builtin(source, seed, held_out)
    path = source.path
    is_file = os.path.exists(path) or re.match(r"[./~]", path) or re.search(r"(?i)\.(jsonl?|ndjson|parquet|csv)$", path)
    rows = [(where, _clean(row)) for where, row in (_file_rows(Path(path)) if is_file else _hub_rows(source, held_out))]
    format_, keys = _keys(source, [row for _, (row, _) in rows])
    stem = re.sub(r"(?i)\.(jsonl?|ndjson|parquet|csv)$", "", Path(path).name)
    reading = Reading(source.name or re.sub(r"[^\w.-]+", "-", stem).strip("-.") or "data", source, format_)
    if replaced := sum(count for _, (_, count) in rows):
        reading.notes.append(f"{replaced} lone surrogates (broken characters) replaced")
    ids: dict[str, str] = {}
    known: dict[str, str] = {}
    for where, (row, _) in rows:
        own_id = _text(row, keys["id"])
        try:
            problem = _problem(row, keys, reading, traces)
        except ValueError as error:
            reading.rejected.append(Rejection(own_id or where, str(error), f"{path}, {where}"))
            continue
        if own_id and own_id in ids:
            hint = "Give each row an id of its own, or none: ids are then made from the text."
            raise KitError(f"{path}: {ids[own_id]} and {where} have the same id {own_id!r}.", hint)
        text = problem.id if traces else normal(problem.question)
        if text in known:
            what = "duplicate row" if traces else "duplicate question"
            reading.rejected.append(Rejection(problem.id, what, f"{path}, {where}: stands already in {known[text]}"))
            continue
        ids[problem.id] = known[text] = where
        reading.problems.append(problem)
    if not reading.problems:
        first = next((f" The first: {gone.reason} ({gone.detail})." for gone in reading.rejected), "")
        raise KitError(
            f"{path}: none of {len(rows)} rows is usable.{first}", "Mend the file, or map its keys by fields."
        )
    return reading


def subset(reading: Reading, seed: int) -> Reading:
    """Take the source's `limit` rows: the first, a seeded choice, or a stratified one; in the order of the file.

    A stratum gets its share of the limit; what rounding leaves goes to the largest remainders.
    """
    problems, source = reading.problems, reading.source
    if source.stratify and not any(getattr(problem, source.stratify, None) for problem in problems):
        hint = "Stratify by level or subject, and map its key by fields."
        raise KitError(f"{source.path} has no {source.stratify} to stratify by.", hint, 2)
    if source.limit is None or source.limit >= len(problems):
        if source.limit and source.limit > len(problems):
            reading.notes.append(f"limit {source.limit}, but there are {len(problems)} rows")
        return reading
    order = list(range(len(problems)))
    if source.seed is not None or source.stratify:
        random.Random(f"subset {seed if source.seed is None else source.seed}").shuffle(order)
    if source.stratify:
        order = _stratified(order, [getattr(problem, source.stratify) or "" for problem in problems], source.limit)
    return replace(reading, problems=[problems[i] for i in sorted(order[: source.limit])])


def normal(question: str) -> str:
    """A question up to case and white space: what makes two questions the same."""
    return " ".join(question.casefold().split())


def near_duplicates(first: Sequence[Problem], second: Sequence[Problem]) -> list[tuple[str, str, float]]:
    """Pairs (id in first, id in second, ratio) of questions whose word 5-grams overlap by NEAR_RATIO (Jaccard) or more.

    Only the rarest grams of a question are looked up: two sets that overlap that much share one of them.
    """
    grams = [_grams(problem.question) for problem in first]
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for index, found in enumerate(grams):
        for gram in found:
            holders[gram].append(index)
    pairs = []
    for problem in second:
        mine = _grams(problem.question)
        rarest = sorted(mine, key=lambda gram: (len(holders.get(gram, ())), gram))
        for index in sorted(
            {i for gram in rarest[: int((1 - NEAR_RATIO) * len(mine)) + 1] for i in holders.get(gram, ())}
        ):
            ratio = len(mine & grams[index]) / len(mine | grams[index])
            if ratio >= NEAR_RATIO:
                pairs.append((first[index].id, problem.id, round(ratio, 3)))
    return pairs


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
    """A seeded subset of the rows that training leaves over; of built-in problems, the held-out half."""
    update = {"name": source.name or "holdout", "seed": seed if source.seed is None else source.seed}
    source = source.model_copy(update=update)
    if whole.format == "builtin":
        return _builtin(source.model_copy(update={"subset": source.subset or whole.source.subset}), seed, True)
    taken = {normal(problem.question) for problem in train.problems}
    left = {normal(problem.question): problem for problem in reversed(whole.problems)}
    rest = [problem for text, problem in reversed(left.items()) if text not in taken]
    if not rest:
        raise KitError(
            f"Nothing is left for the holdout: training takes all {len(whole.problems)} rows of {whole.name}.",
            "Set data.train.limit below that, or name another source in data.eval.",
        )
    return subset(Reading(source.name or "holdout", source, whole.format, rest), seed)


def _compare(train: Reading, held_out: Reading) -> dict[str, Any]:
    """Refuse questions that stand on both sides; count those that nearly do."""
    known = {normal(problem.question): problem.id for problem in train.problems}
    both = [(known[text], p.id) for p in held_out.problems if (text := normal(p.question)) in known]
    if both:
        shown = "; ".join(f"{a!r} in {train.name} is {b!r} in {held_out.name}" for a, b in both[:3])
        raise KitError(
            f"{len(both)} question(s) stand in training and in evaluation: {shown}.",
            "Take them out of one of the two, or evaluate on `holdout`.",
        )
    near = near_duplicates(train.problems, held_out.problems)
    return {"near_duplicates": len({b for _, b, _ in near}), "near_examples": [list(pair) for pair in near[:5]]}


def _builtin(source: Source, seed: int, held_out: bool) -> Reading:
    from kit.problems import generate

    match = re.fullmatch(r"([1-4])(?:-([1-4]))?", source.subset or "1-4")
    if not match:
        raise KitError(f"subset {source.subset!r} of the built-in problems is no range of steps.", "Like 1-2.", 2)
    steps = (int(match[1]), int(match[2] or match[1]))
    chosen = seed if source.seed is None else source.seed
    problems = generate(source.limit or BUILTIN_ROWS, chosen, held_out, steps)
    return Reading(source.name or "builtin", source, "builtin", problems)


def _file_rows(path: Path) -> Located:
    if path.suffix.lower() in (".parquet", ".csv"):
        yield from _dataset_rows(path.suffix.lower()[1:], str(path), data_files=str(path), split="train")
        return
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise KitError(f"{path}, line {line}: not UTF-8 text.", "Save the file as UTF-8.") from None
    except OSError as error:
        raise KitError(f"{path} cannot be read: {error.strerror}.", "Mend the path.") from None
    if not text.strip():
        raise KitError(f"{path} is empty.", "It should hold one JSON object a line.")
    if path.suffix.lower() == ".json":
        whole = _json(text, str(path))
        lists = [value for value in whole.values() if isinstance(value, list)] if isinstance(whole, dict) else [whole]
        rows = [
            (f"row {i}", row) for i, row in enumerate(lists[0] if lists and isinstance(lists[0], list) else [whole], 1)
        ]
    else:
        lines = ((f"line {i}", line) for i, line in enumerate(text.split("\n"), 1) if line.strip())
        rows = [(where, _json(line, f"{path}, {where}")) for where, line in lines]
    for where, row in rows:
        if not isinstance(row, dict):
            raise KitError(f"{path}, {where}: {type(row).__name__}, not an object.", "Each row is {key: value, ...}.")
        yield where, row


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise KitError(f"{where}: broken JSON ({error}).", "Mend or delete that line; nothing was done yet.") from None


def _hub_rows(source: Source, held_out: bool) -> Located:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source.path):
        raise KitError(f"{source.path!r} is neither a file nor a hub id.", "Write builtin, a file, or OWNER/NAME.")
    name, train_split, eval_split = HUB.get(source.path, (None, "train", "test"))
    split = source.split or (eval_split if held_out else train_split)
    yield from _dataset_rows(source.path, f"{source.path} (no such file; hub)", name=source.subset or name, split=split)


def _dataset_rows(path: str, shown: str, **options: Any) -> Located:
    import datasets

    datasets.disable_progress_bars()
    try:
        rows = [dict(row) for row in datasets.load_dataset(path, **options)]
    except Exception as error:  # datasets, pyarrow and the HTTP client raise dozens of types, all of them the source's
        hint = f"Check name, subset and split ({options}); without a network give a downloaded file: data.train=FILE."
        raise KitError(f"{shown}: {type(error).__name__}: {' '.join(str(error).split())[:300]}", hint) from None
    yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))


def _clean(row: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Lower-case keys, text without lone surrogates (no tokenizer takes them), and how many those were."""
    broken = re.compile("[\ud800-\udfff]")
    pairs = {
        key.lower(): broken.subn("\ufffd", value) if isinstance(value, str) else (value, 0)
        for key, value in row.items()
    }
    return {key: value for key, (value, _) in pairs.items()}, sum(count for _, count in pairs.values())


def _keys(source: Source, rows: list[dict[str, Any]]) -> tuple[str, Keys]:
    """The format, and which keys hold which role."""
    seen = {key: None for row in rows for key in row}
    shown = f"Its keys: {', '.join(seen) or 'none'}."
    if wrong := sorted(set(source.fields) - set(ROLES)):
        raise KitError(f"fields: unknown {', '.join(wrong)}.", f"A row may hold {', '.join(ROLES)}.", 2)
    if absent := [f"{role}: {key}" for role, key in source.fields.items() if key.lower() not in seen]:
        raise KitError(f"{source.path} has no key for fields {{{', '.join(absent)}}}.", shown)
    keys: Keys = dict.fromkeys(ROLES, ()) if source.format == "fields" else dict(ROLES)
    keys |= {role: (key.lower(),) for role, key in source.fields.items()}
    has = {role for role in keys if set(keys[role]) & set(seen)}
    missing = [
        role for role in ("question", "answer") if not has & {role, *(("solution",) if role == "answer" else ())}
    ]
    if missing:
        hint = f"{shown} Say which is which with fields: {{question: KEY, answer: KEY}}."
        raise KitError(f"{source.path} has no key that is known for {' and '.join(missing)}.", hint)
    if source.format != "auto":
        return source.format, keys
    if "deepseek_thinking_trajectory" in seen:
        return "s1k", keys
    marked = any("####" in str(row.get(key)) for row in rows[:50] for key in keys["answer"])
    return "gsm8k" if marked else "math" if "solution" in has else "aime", keys


def _problem(row: dict[str, Any], keys: Keys, reading: Reading, traces: bool) -> Problem:
    """One row; ValueError says what it lacks."""
    value = {role: _text(row, keys[role]) for role in ROLES}
    question, answer, solution = value["question"], value["answer"], value["solution"]
    if reading.format == "gsm8k" and answer:
        worked, mark, last = answer.rpartition("####")
        answer = re.sub(r"(?<=\d),(?=\d{3})", "", last.strip()) if mark else None
        solution = f"{re.sub('<<[^>]*>>', '', worked).strip()}\nThe answer is \\boxed{{{answer}}}."
    elif not answer and solution:
        from kit.answers import last_box

        answer = last_box(solution) or (solution if reading.format == "s1k" else None)
    for role, text in {"question": question, "answer": answer, **({"trace": value["trace"]} if traces else {})}.items():
        if not text:
            raise ValueError(f"no {role} in {' or '.join(key for key in keys[role] if key in row) or 'any key'}")
    text = f"{question}\0{value['trace']}" if traces else str(question)
    made = f"{reading.name}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"
    return Problem.model_validate({**value, "id": value["id"] or made, "answer": answer, "solution": solution})


def _text(row: dict[str, Any], keys: tuple[str, ...]) -> str | None:
    """The first of the keys that holds text or a number, as text; None where none does."""
    for key in keys:
        value = row.get(key)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value == value:
            value = repr(value)
        if isinstance(value, str) and value.strip():
            return value
    return None


def _stratified(order: list[int], strata: list[str], limit: int) -> list[int]:
    """Indices, `limit` in all, that keep each stratum's share."""
    members: dict[str, list[int]] = defaultdict(list)
    for index in order:
        members[strata[index]].append(index)
    shares = {name: limit * len(rows) / len(order) for name, rows in members.items()}
    counts = {name: int(share) for name, share in shares.items()}
    for name in sorted(shares, key=lambda name: (counts[name] - shares[name], name))[: limit - sum(counts.values())]:
        counts[name] += 1
    return [index for name, rows in members.items() for index in rows[: counts[name]]]


def _grams(question: str) -> frozenset[tuple[str, ...]]:
    words = re.findall(r"\w+", question.casefold())
    return frozenset(tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4)))
