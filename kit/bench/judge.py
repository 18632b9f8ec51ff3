"""What judging a trace costs, against one prefill of the whole trace in the same run.

Names: prefill (one uncached forward pass over the whole trace's prompt), reference-256 and reference-16
(the paper's loop: every question of the binary search prefilled anew and answered by greedy generation of
up to that many tokens, ended by the end token), fresh (the same questions, uncached, labels constrained),
binary, gallop, scan. Rounds are interleaved; a figure is the median over rounds, a ratio is a trace's own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from kit.backends import open_backend
from kit.backends.base import Backend, Request
from kit.core.config import Sampling, resolve
from kit.core.progress import Progress
from kit.core.records import PrefixRow
from kit.data import load_traces
from kit.judging.judge import Judge, cut, from_problem
from kit.judging.sentences import ends

SEARCHES = ("uncached", "binary", "gallop", "scan")
REFERENCES = {"reference-256": 256, "reference-16": 16}


def bench(
    traces: Path,
    limit: int | None = None,
    backend: str = "hf",
    model: str = "smollm2-135m",
    verdicts: str | None = None,
    repeats: int = 3,
    names: tuple[str, ...] = ("prefill", *REFERENCES, *SEARCHES),
    references: int = 1,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure.

    Args:
        verdicts: early, middle or late steers the searches to keep 1, half or all of the sentences; the model's work
            is done all the same. None: the model's own verdicts.
        references: traces on which the reference loops run, once each, for they take minutes.

    Returns:
        {subject, rows: [{name, seconds, ratio, worst, traces}], max_margin_difference, skipped, traces: [{id, tokens,
        sentences, kept, seconds: {name: s}, ratio: {name: r}}]}; ratios are to prefill, seconds medians over traces.
    """
    raw = {
        "student": {"backend": backend, "model": model},
        "teacher": {"backend": "file", "path": str(traces)},
    }
    config = resolve(raw, "the command line")
    progress = progress or Progress()
    opened = open_backend(config.student)
    judge = Judge(config, opened)
    rows = [from_problem(problem) for problem in load_traces(config)]
    fits = [row for row in rows if len(judge.request(row, row.trace).ids) <= judge.limit_tokens][
        :limit
    ]
    found, worst = [], 0.0
    with progress.bar("bench", len(fits), "traces") as bar:
        for number, row in enumerate(fits):
            chosen = [name for name in names if name not in REFERENCES or number < references]
            trace, difference = _trace(judge, row, verdicts, repeats, chosen, progress.say)
            found.append(trace)
            worst = max(worst, difference)
            bar.advance()
            progress.say(
                f"{row.id}: {trace['tokens']} tokens, kept {trace['kept']}, ratios {trace['ratio']}"
            )
    opened.close()
    return {
        "subject": "judge",
        "rows": [_row(name, found) for name in names],
        "max_margin_difference": worst,
        "verdicts": verdicts or "the model's own",
        "skipped": len(rows) - len(fits),
        "traces": found,
        "notes": list(opened.notes),
    }


def _trace(
    judge: Judge,
    row: PrefixRow,
    verdicts: str | None,
    repeats: int,
    names: list[str],
    say: Callable[[str], None],
) -> tuple[Any, float]:
    m = row.sentences_total
    turn = {"early": 1, "middle": (m + 1) // 2, "late": m}.get(verdicts or "")
    force = None if turn is None else lambda k: k >= turn
    whole = judge.request(row, row.trace)
    asked = cut(judge, row, force, "binary")  # warms up, and gives the reference its questions
    kept: dict[str, PrefixRow] = {"binary": asked}

    def work(name: str) -> None:
        if name == "prefill":
            session = judge.backend.session(uncached=True)
            session.score([whole])
            session.close()
        elif name in REFERENCES:
            for verdict in asked.verdicts:
                prefix = row.trace[: ends(row.trace)[verdict.sentences - 1]]
                prompt = judge.prompt(row, prefix)
                _generate(judge.backend, prompt, REFERENCES[name])
        else:
            kept[name] = cut(judge, row, force, name)

    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn_number in range(repeats):
        for name in names:
            if turn_number == 0 or name not in REFERENCES:
                seconds[name].append(_timed(lambda name=name: work(name)))
                say(
                    f"{row.id}, round {turn_number + 1} of {repeats}: {name} {seconds[name][-1]:.1f} s"
                )
    medians = {name: median(times) for name, times in seconds.items()}
    ratio = {name: round(s / medians["prefill"], 4) for name, s in medians.items()}
    shown = {
        "id": row.id,
        "tokens": len(whole.ids),
        "sentences": m,
        "kept": kept["binary"].sentences,
    }
    shown |= {"seconds": {k: round(v, 3) for k, v in medians.items()}, "ratio": ratio}
    return shown, _difference(kept)


def _difference(kept: dict[str, PrefixRow]) -> float:
    """Largest distance of a cached margin from the uncached one at the same boundary."""
    fresh = {v.sentences: v.margin for v in kept["uncached"].verdicts} if "uncached" in kept else {}
    pairs = [
        (v.margin, fresh[v.sentences])
        for row in kept.values()
        for v in row.verdicts
        if v.sentences in fresh
    ]
    return max((abs(a - b) for a, b in pairs if a is not None and b is not None), default=0.0)


def _generate(backend: Backend, prompt: tuple[int, ...], tokens: int) -> None:
    if backend.__class__.__name__ != "HfBackend":
        list(
            backend.generate(
                [Request("reference", prompt, Sampling(temperature=0, max_new_tokens=tokens))]
            )
        )
        return
    import torch

    shown = torch.tensor([prompt], device=backend.device)  # type: ignore[attr-defined]
    mask = torch.ones_like(shown)
    backend.model.generate(shown, attention_mask=mask, do_sample=False, max_new_tokens=tokens)  # type: ignore[attr-defined]


def _timed(work: Callable[[], None]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def _row(name: str, traces: list[dict[str, Any]]) -> dict[str, Any]:
    measured = [trace for trace in traces if name in trace["seconds"]]
    if not measured:
        return {"name": name, "seconds": None, "ratio": None, "worst": None, "traces": 0}
    ratios = [trace["ratio"][name] for trace in measured]
    seconds = median(trace["seconds"][name] for trace in measured)
    return {
        "name": name,
        "seconds": round(seconds, 3),
        "ratio": round(median(ratios), 4),
        "worst": max(ratios),
        "traces": len(measured),
    }
