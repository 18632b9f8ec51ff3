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
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
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
    "gsm8k": ("main", "train", "test"),
    "HuggingFaceH4/MATH-500": (None, "test", "test"),
    "simplescaling/s1K-1.1": (None, "train", "train"),
    "Maxwell-Jia/AIME_2024": (None, "train", "train"),
    "HuggingFaceH4/aime_2024": (None, "train", "train"),
    "math-ai/aime25": (None, "test", "test"),
}
ROLES = ("id", "question", "answer", "solution", "trace", "level", "subject")
_TRACE = ("trace", "long_cot", "deepseek_thinking_trajectory")
_COMMON = {
    "id": ("id", "unique_id", "problem_id"),
    "level": ("level",),
    "subject": ("subject", "type"),
    "trace": _TRACE,
}
_KEYS: dict[str, dict[str, tuple[str, ...]]] = {  # format: role: keys in order of preference
    "gsm8k": {"question": ("question",), "answer": ("answer",)},
    "math": {"question": ("problem", "question"), "answer": ("answer",), "solution": ("solution",)},
    "aime": {"question": ("problem", "question"), "answer": ("answer",), "solution": ("solution",)},
    "s1k": {"question": ("question", "problem"), "answer": ("answer",), "solution": ("solution",)},
    "fields": {},
}


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
    format: str
    problems: list[Problem] = field(default_factory=list)
    rejected: list[Rejection] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def facts(self, source: Source) -> dict[str, Any]:
        """For the manifest."""
        return {
            "path": source.path,
            "format": self.format,
            "rows": len(self.problems),
            "rejected": len(self.rejected),
            "fingerprint": digest(self.problems),
            "notes": self.notes,
        }


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
        source: the config section. Built-in problems take their steps from `subset` ("1-2").
        seed: of built-in problems and stratified subsets, where the source has no seed of its own.
        held_out: for evaluation: built-in problems of the held-out half; a hub dataset's evaluation split.

    Raises:
        KitError: see `read`.
    """
    return subset(read(source, seed, held_out), source, seed).problems


def load_traces(config: Config) -> list[Problem]:
    """Problems with traces, for teacher.backend=file: the rows of teacher.path, or data.train's rows that have one.

    A file of traces stands alone: data.train then only gives limit, seed and stratify. One question may have many
    traces; each row needs an id of its own, or gets one from its text.
    """
    return _train(config)[0].problems


def load_all(config: Config) -> Loaded:
    """Everything a run reads, checked against each other; sources of stages that will not run are not read.

    Raises:
        KitError: see `read`; also a question that stands in training and in evaluation, two sources of one name,
            nothing left for a holdout.
    """
    train, whole, source = _train(config)
    facts: dict[str, Any] = {"train": train.facts(source), "evals": {}}
    rejected, evals = list(train.rejected), {}
    evaluates = STAGES.index(config.stop_after) >= STAGES.index("eval")
    for wanted in config.data.eval if evaluates else ():
        if wanted.path == "holdout" and source.path != "builtin":
            reading = _holdout(train, whole, wanted, config.seed)
        else:
            wanted_path = wanted.model_copy(update={"path": "builtin", "name": wanted.name or "holdout"})
            wanted = wanted_path if wanted.path == "holdout" else wanted
            reading = subset(read(wanted, config.seed, held_out=True), wanted, config.seed)
        if reading.name in evals:
            raise KitError(
                f"Two sources of data.eval are called {reading.name}.", "Give each a name: {path: ..., name: ...}.", 2
            )
        near = _compare(train, reading)
        facts["evals"][reading.name] = {**reading.facts(wanted), **near}
        evals[reading.name] = reading.problems
        rejected += reading.rejected
    return Loaded(train.problems, evals, facts, rejected)


def read(source: Source, seed: int, held_out: bool = False, traces: bool = False) -> Reading:
    """All rows of a source, before any subset (built-in problems aside: they are as many as asked for).

    Args:
        traces: rows need a trace, and a question may come more than once.

    Raises:
        KitError: no such file or dataset, broken JSON (with its line), keys of no known format, two rows of one id,
            or not one usable row.
    """
    if source.path == "builtin":
        return _builtin(source, seed, held_out)
    path = Path(source.path)
    rows = _file_rows(path) if path.exists() or _looks_like_file(source.path) else _hub_rows(source, held_out)
    name = source.name or re.sub(r"[^\w.-]+", "-", path.stem if path.suffix else path.name).strip("-.") or "data"
    raw = [(where, _clean(row)) for where, row in rows]
    keys = _role_keys(source, [row for _, (row, _) in raw])
    reading = Reading(name, keys.pop("format")[0])
    replaced = sum(count for _, (_, count) in raw)
    if replaced:
        reading.notes.append(f"{replaced} lone surrogates (broken characters) were replaced")
    seen_ids: dict[str, str] = {}
    seen_questions: dict[str, str] = {}
    for where, (row, _) in raw:
        try:
            problem = _problem(row, keys, reading, traces)
        except ValueError as error:
            shown = _text(row, keys["id"]) or where
            reading.rejected.append(Rejection(shown, str(error), f"{source.path}, {where}"))
            continue
        earlier = seen_ids.get(problem.id)
        if earlier and _text(row, keys["id"]):
            raise KitError(
                f"{source.path}: {earlier} and {where} have the same id {problem.id!r}.",
                "Give each row an id of its own, or leave ids out: they are then made from the text.",
            )
        same = problem.id if traces else normal(problem.question)
        if same in seen_questions or earlier:
            detail = f"{source.path}, {where}: stands already in {seen_questions.get(same, earlier)}"
            reading.rejected.append(Rejection(problem.id, "duplicate row" if traces else "duplicate question", detail))
            continue
        seen_ids[problem.id] = seen_questions[same] = where
        reading.problems.append(problem)
    if not reading.problems:
        why = f" The first: {reading.rejected[0].reason} ({reading.rejected[0].detail})." if reading.rejected else ""
        raise KitError(f"{source.path} has {len(raw)} rows and none is usable.{why}", "Mend the file or data.*.fields.")
    return reading


def subset(reading: Reading, source: Source, seed: int) -> Reading:
    """Take `limit` rows: the first, a seeded choice, or a stratified one; in the order of the file.

    A stratum gets its share of the limit, what rounding leaves going to the largest remainders.
    """
    problems = reading.problems
    if source.limit is None or source.limit >= len(problems):
        if source.limit and source.limit > len(problems):
            reading.notes.append(f"limit {source.limit}, but there are {len(problems)} rows")
        return reading
    chosen_seed = source.seed if source.seed is not None or not source.stratify else seed
    order = list(range(len(problems)))
    if chosen_seed is not None:
        random.Random(f"subset {chosen_seed}").shuffle(order)
    if source.stratify:
        order = _stratified(problems, order, source)
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
        probes = rarest[: len(mine) - int(NEAR_RATIO * len(mine)) + 1]
        for index in sorted({i for gram in probes for i in holders.get(gram, ())}):
            ratio = len(mine & grams[index]) / len(mine | grams[index])
            if ratio >= NEAR_RATIO:
                pairs.append((first[index].id, problem.id, round(ratio, 3)))
    return pairs


def _train(config: Config) -> tuple[Reading, Reading, Source]:
    """Training problems: the subset, everything it was taken from, and its source."""
    source, traces = config.data.train, config.teacher.backend == "file"
    if traces and config.teacher.path:
        fields = {**source.fields, **config.teacher.fields} if source.path != "builtin" else config.teacher.fields
        update = {"path": config.teacher.path, "format": "auto", "fields": fields, "subset": None, "split": None}
        source = source.model_copy(update=update)
    elif traces and source.path == "builtin":
        raise KitError(
            "teacher.backend=file needs a file of traces.",
            "Set teacher.path=FILE (JSONL of {id, question, answer, long_cot}), or data.train to s1K rows.",
            2,
        )
    if source.path == "holdout":
        raise KitError("data.train.path cannot be holdout.", "Name a file, a hub id, or builtin.", 2)
    whole = read(source, config.seed, traces=traces)
    return subset(whole, source, config.seed), whole, source


def _holdout(train: Reading, whole: Reading, wanted: Source, seed: int) -> Reading:
    """A seeded subset of the rows that training leaves over."""
    taken = {normal(problem.question) for problem in train.problems}
    left: dict[str, Problem] = {}
    for problem in whole.problems:
        if normal(problem.question) not in taken:
            left.setdefault(normal(problem.question), problem)
    if not left:
        raise KitError(
            f"Nothing is left for the holdout: training takes all {len(whole.problems)} rows of its source.",
            "Set data.train.limit below that, or name another source in data.eval.",
        )
    reading = Reading(wanted.name or "holdout", whole.format, list(left.values()))
    seeded = wanted.model_copy(update={"seed": seed if wanted.seed is None else wanted.seed})
    return subset(reading, seeded, seed)


def _compare(train: Reading, held_out: Reading) -> dict[str, Any]:
    """Refuse questions that stand on both sides; count those that nearly do."""
    known = {normal(problem.question): problem.id for problem in train.problems}
    both = [(known[key], p.id) for p in held_out.problems if (key := normal(p.question)) in known]
    if both:
        shown = "; ".join(f"{a!r} in {train.name} is {b!r} in {held_out.name}" for a, b in both[:3])
        raise KitError(
            f"{len(both)} question(s) stand in training and in evaluation: {shown}.",
            "Take them out of one of the two, or evaluate on `holdout`.",
        )
    near = near_duplicates(train.problems, held_out.problems)
    return {"near_duplicates": len({b for _, b, _ in near}), "near_examples": near[:5]}


def _builtin(source: Source, seed: int, held_out: bool) -> Reading:
    from kit.problems import generate

    match = re.fullmatch(r"([1-4])(?:-([1-4]))?", source.subset or "1-4")
    if not match:
        raise KitError(f"subset {source.subset!r} of built-in problems is not a range of steps.", "Like 1-2.", 2)
    steps = (int(match[1]), int(match[2] or match[1]))
    chosen = seed if source.seed is None else source.seed
    problems = generate(source.limit or BUILTIN_ROWS, chosen, held_out, steps)
    return Reading(source.name or "builtin", "builtin", problems)


def _looks_like_file(path: str) -> bool:
    return path.startswith((".", "/", "~")) or bool(re.search(r"\.(jsonl?|ndjson|parquet|csv)$", path, re.IGNORECASE))


def _file_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows with where they stand ("line 812")."""
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
        raise KitError(f"{path} cannot be read: {error.strerror}.", "Check data.*.path (or teacher.path).") from None
    if not text.strip():
        raise KitError(f"{path} is empty.", "It should hold one JSON object a line.")
    if path.suffix.lower() == ".json" and not re.match(r"\s*\{.*\}\s*\n\s*\{", text):
        whole = _json(text, f"{path}")
        lists = [value for value in whole.values() if isinstance(value, list)] if isinstance(whole, dict) else [whole]
        numbered = ((f"row {i}", row) for i, row in enumerate(lists[0] if lists else [whole], 1))
    else:
        lines = ((i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip())
        numbered = ((f"line {i}", _json(line, f"{path}, line {i}")) for i, line in lines)
    for where, row in numbered:
        if not isinstance(row, dict):
            raise KitError(f"{path}, {where}: {type(row).__name__}, not an object.", "Each row is {{key: value, ...}}.")
        yield where, row


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        what = str(error) or type(error).__name__
        raise KitError(f"{where}: broken JSON ({what}).", "Mend or delete that line; nothing was read.") from None


def _hub_rows(source: Source, held_out: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source.path):
        raise KitError(f"{source.path!r} is neither a file nor a hub id.", "Write builtin, a file, or OWNER/NAME.")
    subset_name, train_split, eval_split = HUB.get(source.path, (None, "train", "test"))
    split = source.split or (eval_split if held_out else train_split)
    yield from _dataset_rows(source.path, source.path, name=source.subset or subset_name, split=split)


def _dataset_rows(path: str, shown: str, **options: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    import datasets

    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(path, **options)
    except Exception as error:  # datasets, pyarrow and the HTTP client below raise dozens of types; all are named here
        what = " ".join(str(error).split())[:300]
        kind = "" if "data_files" in options else f"no such file, and the hub (split {options['split']}) gave "
        raise KitError(
            f"{shown}: {kind}{type(error).__name__}: {what}",
            "Check the name, subset and split; without a network give a downloaded file: data.train=FILE.jsonl.",
        ) from None
    for number, row in enumerate(rows, 1):
        yield f"row {number}", dict(row)


def _clean(row: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Lower-case keys, and text without lone surrogates, which no tokenizer takes; how many there were."""
    count, cleaned = 0, {}
    for key, value in row.items():
        if isinstance(value, str):
            count += len(re.findall("[\ud800-\udfff]", value))
            value = re.sub("[\ud800-\udfff]", "\ufffd", value)
        cleaned[key.lower()] = value
    return cleaned, count


def _role_keys(source: Source, rows: list[dict[str, Any]]) -> dict[str, tuple[str, ...]]:
    """Which keys hold which role, best first, and the format."""
    seen = {key: None for row in rows for key in row}
    shown = ", ".join(seen) or "none"
    wrong = sorted(set(source.fields) - set(ROLES))
    if wrong:
        raise KitError(f"fields: {', '.join(wrong)} unknown.", f"Roles are {', '.join(ROLES)}.", 2)
    absent = [f"{role}: {key}" for role, key in source.fields.items() if key.lower() not in seen]
    if absent:
        raise KitError(f"{source.path} has no key for fields {{{', '.join(absent)}}}.", f"Its keys: {shown}.")
    format_ = source.format if source.format != "auto" else _detect(seen, rows)
    keys = {**_COMMON, "solution": (), **_KEYS[format_ or "fields"]}
    keys |= {role: (key.lower(),) for role, key in source.fields.items()}
    missing = [role for role in ("question", "answer") if not set(keys.get(role, ())) & set(seen)]
    if "answer" in missing and set(keys["solution"]) & set(seen):
        missing.remove("answer")
    if missing:
        raise KitError(
            f"{source.path}: no key for {' and '.join(missing)}" + (f" (format {format_})." if format_ else "."),
            f"Its keys: {shown}. Say which is which with fields: {{question: KEY, answer: KEY}}.",
        )
    return {**keys, "answer": keys.get("answer", ()), "format": (format_ or "fields",)}


def _detect(seen: Iterable[str], rows: list[dict[str, Any]]) -> str | None:
    keys = set(seen)
    if "deepseek_thinking_trajectory" in keys:
        return "s1k"
    if {"question", "answer"} <= keys and any("####" in str(row.get("answer")) for row in rows[:50]):
        return "gsm8k"
    if "problem" in keys and "solution" in keys:
        return "math"
    return "aime" if keys & {"problem", "question"} and "answer" in keys else None


def _problem(row: dict[str, Any], keys: dict[str, tuple[str, ...]], reading: Reading, traces: bool) -> Problem:
    """One row; ValueError says what it lacks."""
    value = {role: _text(row, keys[role]) for role in ROLES}
    question, answer, solution = value["question"], value["answer"], value["solution"]
    if not question:
        raise ValueError(f"no question (key {' or '.join(keys['question'])})")
    if reading.format == "gsm8k" and answer is not None:
        worked, mark, answer = answer.rpartition("####")
        answer = re.sub(r"(?<=\d),(?=\d{3})", "", answer.strip()) if mark else None
        solution = f"{re.sub('<<[^>]*>>', '', worked).strip()}\nThe answer is \\boxed{{{answer}}}."
    elif not answer and solution:
        from kit.answers import last_box

        answer = last_box(solution) or (solution if reading.format == "s1k" else None)
    if not answer:
        raise ValueError(f"no answer (key {' or '.join(keys['answer'] or keys['solution'])})")
    if traces and not value["trace"]:
        raise ValueError(f"no trace (key {' or '.join(keys['trace'])})")
    text = question + (f"\0{value['trace']}" if traces else "")
    made = f"{reading.name}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"
    return Problem(**{**value, "id": value["id"] or made, "answer": answer, "solution": solution})


def _text(row: dict[str, Any], keys: tuple[str, ...]) -> str | None:
    """The first of the keys that holds something, as text; numbers are written out. None: nothing there."""
    for key in keys:
        value = row.get(key)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value == value:
            return str(value)
        if isinstance(value, str) and value.strip():
            return value
        if isinstance(value, (list, dict, bool)):
            raise ValueError(f"{key} is {type(value).__name__}, not text or a number")
    return None


def _stratified(problems: list[Problem], order: list[int], source: Source) -> list[int]:
    """Indices, `limit` in all, that keep each stratum's share."""
    if source.stratify not in ("level", "subject"):
        raise KitError(f"stratify: {source.stratify!r} is neither level nor subject.", "Choose one of them.", 2)
    strata: dict[str, list[int]] = defaultdict(list)
    for index in order:
        strata[getattr(problems[index], source.stratify) or ""].append(index)
    if set(strata) == {""}:
        raise KitError(f"{source.path} has no {source.stratify} to stratify by.", f"Map it: fields.{source.stratify}.")
    shares = {name: source.limit * len(rows) / len(problems) for name, rows in strata.items()}
    counts = {name: int(share) for name, share in shares.items()}
    by_remainder = sorted(shares, key=lambda name: (counts[name] - shares[name], name))
    for name in by_remainder[: source.limit - sum(counts.values())]:
        counts[name] += 1
    return [index for name, rows in strata.items() for index in rows[: counts[name]]]


def _grams(question: str) -> frozenset[tuple[str, ...]]:
    words = re.findall(r"\w+", question.casefold())
    return frozenset(tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4)))
