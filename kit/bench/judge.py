"""What judging a trace costs, against one prefill of the whole trace in the same run.

Names: prefill (one uncached forward pass over the whole trace's prompt), reference-256 and
reference-16 (the paper's loop: every question of the binary search prefilled again and answered by
greedy generation of up to that many tokens, ended by the end token), uncached (the same questions,
uncached, labels constrained), and every other value of `judge.search`.
"""

from argparse import Namespace
from contextlib import closing
from functools import partial
from statistics import median
from typing import get_args

from kit import Json
from kit.backends import open_backend
from kit.bench import Timing, measure
from kit.bench.generate import kit_generate, transformers_generate
from kit.core import config as configs
from kit.core.config import resolve
from kit.core.errors import KitError
from kit.core.progress import Progress
from kit.core.records import PrefixRow
from kit.judging.cut import cut, traces_in_file
from kit.judging.judge import Judge
from kit.judging.sentences import ends

NAMES = get_args(configs.Judge.model_fields["search"].annotation)
# Uncached comes first: its margins are the ones to compare with.
SEARCHES = ["uncached", *(name for name in NAMES if name != "uncached")]
OWN = "the model's own"  # verdicts that nothing steers
FIGURES = ("seconds", "ratio", "token_ratio", "price")
REFERENCES = {"reference-256": 256, "reference-16": 16}  # new tokens per question


def bench(options: Namespace, progress: Progress) -> Json:
    """Measure every trace that fits the model; the reference loops on the first one, and once.

    `verdicts` early, middle, late, or several of them: searches are steered to keep 1, half or all
    of the sentences, the model's work done all the same. The reference loops are then left out.

    Returns:
        {rows: [{verdicts, name, seconds, ratio, token_ratio, price, traces}],
        max_margin_difference, skipped, traces: [{id, verdicts, tokens, sentences, kept, rows: [as
        above, of this trace], margin_difference}], notes}; ratios (of seconds, and of tokens
        evaluated) are a trace's own, to its prefill; a price is the first over the second; a row's
        figures are medians over traces.

    Raises:
        KitError: no traces are named, or none fits the model.
    """
    if not options.traces:
        raise KitError("bench judge measures on traces.", "Name a JSONL with --traces FILE.", 2)
    student = {"backend": options.backend, "model": options.model}
    teacher = {"backend": "file", "path": str(options.traces)}
    config = resolve({"student": student, "teacher": teacher}, "the command line")
    backend = open_backend(config.student)
    judge = Judge(config, backend)
    # of one sentence there is nothing to search
    rows = [row for row in traces_in_file(config) if row.sentences_total > 1]
    fitting = [row for row in rows if len(judge.request(row, row.trace).ids) <= judge.limit_tokens]
    # A prompt longer than the context cannot be judged.
    if not fitting:
        raise KitError(
            f"No trace of {options.traces} with several sentences fits the model.",
            "Use shorter traces.",
        )
    measured = fitting[: options.limit]
    traces = []
    medians = []
    for verdicts in options.verdicts or [OWN]:
        alike: list[Json] = []
        for row in measured:
            references = REFERENCES if verdicts == OWN and not alike else {}
            timings = _measure(judge, row, verdicts, references, options.repeats, progress)
            alike.append({"verdicts": verdicts, **_trace(row, timings)})
            progress.say(f"{row.id}: {alike[-1]}")
        medians += [_row(first["name"], alike) for first in alike[0]["rows"]]
        traces += alike
    backend.close()
    return {
        "rows": medians,
        "max_margin_difference": max(trace["margin_difference"] for trace in traces),
        "skipped": len(rows) - len(measured),
        "traces": traces,
        "notes": list(backend.notes),
    }


def _measure(
    judge: Judge,
    row: PrefixRow,
    verdicts: str,
    references: dict[str, int],
    repeats: int,
    progress: Progress,
) -> dict[str, Timing]:
    """Time the prefill and every search on one trace, and the reference loops once."""
    total = row.sentences_total
    first_enough = {"early": 1, "middle": (total + 1) // 2, "late": total}.get(verdicts)
    steer = first_enough.__le__ if first_enough else None
    # Warms up, and gives the reference loops their questions.
    judged = cut(judge, row, steer, "binary")
    ways = {name: partial(cut, judge, row, steer, name) for name in SEARCHES}
    timings = measure({"prefill": partial(_prefill, judge, row), **ways}, repeats, progress)
    # Minutes long, so they are timed once.
    loops = {name: partial(_ask, judge, judged, size) for name, size in references.items()}
    return {**timings, **measure(loops, 1, progress)}


def _prefill(judge: Judge, row: PrefixRow) -> int:
    """Evaluate the whole prompt; returns its tokens."""
    with closing(judge.backend.session(uncached=True)) as session:
        session.score([judge.request(row, row.trace)])
    return session.cost.prefill_tokens


def _ask(judge: Judge, judged: PrefixRow, new_tokens: int) -> int:
    """The paper's loop over the questions that a search asked; returns the tokens evaluated."""
    is_hf = judge.config.student.backend == "hf"
    generate = transformers_generate if is_hf else kit_generate
    tokens = 0
    for verdict in judged.verdicts:
        prefix = judged.trace[: ends(judged.trace)[verdict.sentences - 1]]
        prompt = judge.prompt(judged, prefix)
        tokens += len(prompt)
        tokens += generate(judge.backend, [prompt], new_tokens)
    return tokens


def _trace(row: PrefixRow, timings: dict[str, Timing]) -> Json:
    """One trace's measurements, and the largest distance of a cached margin from the uncached."""
    uncached: dict[int, float] = {}
    differences = [0.0]
    for name in SEARCHES:
        for verdict in timings[name].results[0].verdicts:
            margin = uncached.setdefault(verdict.sentences, verdict.margin)
            differences.append(abs(verdict.margin - margin))
    prefill = timings["prefill"]
    rows = []
    for name, timing in timings.items():
        result = timing.results[0]
        tokens = result.prefill_tokens if isinstance(result, PrefixRow) else result
        ratio = timing.seconds / prefill.seconds
        token_ratio = tokens / prefill.results[0]
        price = ratio / token_ratio
        figures = {"ratio": ratio, "token_ratio": token_ratio, "price": price}
        rows.append({"name": name, "seconds": timing.seconds, **figures})
    return {
        "id": row.id,
        "tokens": prefill.results[0],
        "sentences": row.sentences_total,
        "kept": timings["binary"].results[0].sentences,
        "rows": rows,
        "margin_difference": max(differences),
    }


def _row(name: str, traces: list[Json]) -> Json:
    """The medians of one way over traces, as far as it was measured."""
    rows = [row for trace in traces for row in trace["rows"] if row["name"] == name]
    medians = {}
    for key in FIGURES:
        medians[key] = median([row[key] for row in rows])
    return {"verdicts": traces[0]["verdicts"], "name": name, **medians, "traces": len(rows)}
