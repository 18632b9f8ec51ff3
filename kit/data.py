"""The problems of a run: subsets, the holdout, and the check that training and evaluation share no question.

Questions are compared up to case and white space only; rewordings show as near-duplicates, counted and named. How
rows are read, and from where: kit/sources.py.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from kit.config import STAGES, Config, Source
from kit.errors import KitError
from kit.records import Problem
from kit.sources import Reading, Rejection, normal, read

NEAR_RATIO = 0.6  # of word 5-grams shared, from which two questions are near-duplicates


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
        probes = rarest[: int((1 - NEAR_RATIO) * len(mine) + 1e-9) + 1]
        for index in sorted({i for gram in probes for i in holders.get(gram, ())}):
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
        update = {"path": "builtin", "subset": source.subset or whole.source.subset}
        return read(source.model_copy(update=update), seed, held_out=True)
    taken = {normal(problem.question) for problem in train.problems}
    rest = list({text: p for p in whole.problems if (text := normal(p.question)) not in taken}.values())
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
