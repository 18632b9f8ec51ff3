"""What judging a trace costs, against one prefill of the whole trace in the same run.

Names: prefill (one uncached forward pass over the whole trace's prompt), reference-256 and
reference-16 (the paper's loop: every question of the binary search prefilled again and answered by
greedy generation of up to that many tokens, ended by the end token), uncached (the same questions,
uncached, labels constrained), and every other value of `judge.search`.
"""

from __future__ import annotations

from argparse import Namespace
from contextlib import closing
from functools import partial
from statistics import median
from typing import Any, get_args

from kit.backends import open_backend
from kit.backends.base import Request
from kit.bench import Timing, measure
from kit.bench.generate import transformers_generate
from kit.core import config as configs
from kit.core.config import Sampling, resolve
from kit.core.errors import KitError
from kit.core.progress import Progress
from kit.core.records import PrefixRow
from kit.data import load_traces
from kit.judging.judge import Judge, cut, from_problem
from kit.judging.sentences import ends

NAMES = get_args(configs.Judge.model_fields["search"].annotation)
# Uncached comes first: its margins are the ones to compare with.
SEARCHES = ["uncached", *(name for name in NAMES if name != "uncached")]
REFERENCES = {"reference-256": 256, "reference-16": 16}  # new tokens per question


def bench(options: Namespace, progress: Progress) -> dict[str, Any]:
    """Measure every trace that fits the model; the reference loops on the first one, and once.

    `verdicts` early, middle or late steers the searches to keep 1, half or all of the sentences;
    the model's work is done all the same.

    Returns:
        {rows: [{name, seconds, ratio, token_ratio, price, worst, traces}], max_margin_difference,
        verdicts, skipped, traces: [{id, tokens, sentences, kept, seconds: {name: s}, ratio: {name:
        r}, token_ratio: {name: r}, margin_difference}], notes}; ratios (of seconds, and of tokens
        evaluated) are a trace's own, to its prefill; a price is the first over the second; a row's
        figures are medians over traces, `worst` its largest ratio.

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
    rows = [from_problem(problem) for problem in load_traces(config)]
    fitting = [row for row in rows if len(judge.request(row, row.trace).ids) <= judge.limit_tokens]
    # A prompt longer than the context cannot be judged.
    if not fitting:
        raise KitError(f"No trace of {options.traces} fits the model.", "Use shorter traces.")
    traces: list[dict[str, Any]] = []
    for row in fitting[: options.limit]:
        timings = _measure(judge, row, options, progress, references=not traces)
        traces.append(_trace(judge, row, timings))
        progress.say(f"{row.id}: {traces[-1]}")
    backend.close()
    return {
        "rows": [_row(name, traces) for name in ("prefill", *REFERENCES, *SEARCHES)],
        "max_margin_difference": max(trace["margin_difference"] for trace in traces),
        "verdicts": options.verdicts or "the model's own",
        "skipped": len(rows) - len(traces),
        "traces": traces,
        "notes": list(backend.notes),
    }


def _measure(
    judge: Judge, row: PrefixRow, options: Namespace, progress: Progress, references: bool
) -> dict[str, Timing]:
    """Time the prefill and every search on one trace, and the reference loops once."""
    total = row.sentences_total
    first_enough = {"early": 1, "middle": (total + 1) // 2, "late": total}.get(options.verdicts)
    steer = first_enough.__le__ if first_enough else None
    # Warms up, and gives the reference loops their questions.
    judged = cut(judge, row, steer, "binary")
    ways = {name: partial(cut, judge, row, steer, name) for name in SEARCHES}
    timings = measure({"prefill": partial(_prefill, judge, row), **ways}, options.repeats, progress)
    # Minutes long, so they are timed once.
    if references:
        loops = {name: partial(_ask, judge, judged, size) for name, size in REFERENCES.items()}
        timings.update(measure(loops, 1, progress))
    return timings


def _prefill(judge: Judge, row: PrefixRow) -> int:
    """Evaluate the whole prompt; returns its tokens."""
    with closing(judge.backend.session(uncached=True)) as session:
        session.score([judge.request(row, row.trace)])
    return session.cost.prefill_tokens


def _ask(judge: Judge, judged: PrefixRow, new_tokens: int) -> int:
    """The paper's loop over the questions that a search asked; returns the tokens evaluated."""
    tokens = 0
    for verdict in judged.verdicts:
        prefix = judged.trace[: ends(judged.trace)[verdict.sentences - 1]]
        prompt = judge.prompt(judged, prefix)
        tokens += len(prompt)
        if judge.config.student.backend == "hf":
            tokens += transformers_generate(judge.backend, [prompt], new_tokens)
        else:
            greedy = Sampling(temperature=0, max_new_tokens=new_tokens)
            [generation] = judge.backend.generate([Request("reference", prompt, greedy)])
            tokens += len(generation.completions[0].ids)
    return tokens


def _trace(judge: Judge, row: PrefixRow, timings: dict[str, Timing]) -> dict[str, Any]:
    """One trace's measurements, and the largest distance of a cached margin from the uncached."""
    uncached: dict[int, float] = {}
    differences = []
    for name in SEARCHES:
        for verdict in timings[name].results[0].verdicts:
            margin = uncached.setdefault(verdict.sentences, verdict.margin)
            differences.append(abs(verdict.margin - margin))
    prefill = timings["prefill"].seconds
    tokens = {}
    for name, timing in timings.items():
        result = timing.results[0]
        tokens[name] = result.prefill_tokens if isinstance(result, PrefixRow) else result
    return {
        "id": row.id,
        "tokens": len(judge.request(row, row.trace).ids),
        "sentences": row.sentences_total,
        "kept": timings["binary"].results[0].sentences,
        "seconds": {name: timing.seconds for name, timing in timings.items()},
        "ratio": {name: timing.seconds / prefill for name, timing in timings.items()},
        "token_ratio": {name: count / tokens["prefill"] for name, count in tokens.items()},
        "margin_difference": max(differences, default=0.0),
    }


def _row(name: str, traces: list[dict[str, Any]]) -> dict[str, Any]:
    measured = [trace for trace in traces if name in trace["seconds"]]
    ratios = [trace["ratio"][name] for trace in measured]
    token_ratios = [trace["token_ratio"][name] for trace in measured]
    prices = [ratio / tokens for ratio, tokens in zip(ratios, token_ratios, strict=True)]
    return {
        "name": name,
        "seconds": median(trace["seconds"][name] for trace in measured),
        "ratio": median(ratios),
        "token_ratio": median(token_ratios),
        "price": median(prices),
        "worst": max(ratios),
        "traces": len(measured),
    }
