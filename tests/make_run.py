"""A run's folder for tests of what reads it, written with the real records.

Its texts are real traces and hostile ones. Verdicts, grades and losses in it are made up by a
seeded generator: they test the reading, they measure nothing.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kit.core import config as configs
from kit.core.records import (
    AlignedRow,
    EvalRow,
    Outcome,
    PrefixRow,
    Sample,
    TraceRow,
    TrainRow,
    Verdict,
)
from kit.core.stages import file_name
from kit.core.storage import RowFile
from kit.grading.scores import compare_rows, score
from kit.judging.sentences import ends

HOSTILE = [
    "<script>alert('trace')</script></style></title></svg><img src=x onerror=alert(1)> "
    "So the answer is \\boxed{7}. ",
    "Direction: \u202e reversed \u2066 isolated \u200f mark. NUL \x00 and bell \x07 and escape "
    "\x1b[31m. Next. ",
    "x" * 50_000 + ". Then done. ",
    "{{ 7 * 7 }} {% for x in y %} &lt;b&gt; <!-- <b> --> ]]> javascript:alert(2) "
    "https://example.org/pixel.png. ",
    "مرحبا، الجواب سبعة. שלום, התשובה שבע. 答えは七です。まず数えます。 ",
]
PLAIN = (
    "First we count the apples. There are 3. Then 4 more come. Let me check that again. "
    "So 3 + 4 = 7. "
)


def problems(data: Path | None, count: int) -> list[dict[str, str]]:
    """Problems with traces: the hostile ones, the real ones of a folder of data, made-up ones."""
    items = []
    for number, text in enumerate(HOSTILE):
        items.append(
            {
                "id": f"bad<{number}>&\"'",
                "question": f"What is 3 + 4? {text[:200]}",
                "answer": "7",
                "long_cot": text if len(text) > 9999 else text * 3,
            }
        )
    if data is not None:
        lines = (data / "long_cot_aime24.jsonl").read_text(encoding="utf-8").splitlines()
        items += [json.loads(line) for line in lines[: count - len(items)]]
    for number in range(count - len(items)):
        question = f"What is 3 + 4, {number}?"
        trace = PLAIN * (number + 2)
        items.append({"id": f"p{number}", "question": question, "answer": "7", "long_cot": trace})
    return items


def make(folder: Path, data: Path | None = None, upto: str = "eval", **overrides: Any) -> Path:
    """Write a run's folder.

    Args:
        data: the folder of real traces (`real_data`); without it all are made up.
        upto: the last stage that is done.
        overrides: config keys with __ for dots, e.g. judge__kind="answer".
    """
    keys = [f"{key.replace('__', '.')}={value}" for key, value in overrides.items()]
    base = folder.parent / f"{folder.name}.yaml"
    base.parent.mkdir(parents=True, exist_ok=True)
    base.write_text(f"name: {folder.name}\nout: {folder}\nalign: {{samples: 2}}\n")
    config = configs.load(base, keys)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(configs.dump(config), encoding="utf-8")
    draw = random.Random(f"{config.seed} {config.method} {config.judge.kind}")
    items = problems(data, 24)
    stages = {
        "teach": lambda: _teach(folder, items),
        "truncate": lambda: _truncate(folder, items, draw),
        "align": lambda: _align(folder, draw),
        "train": lambda: _train(folder, draw),
        "eval": lambda: _eval(folder, draw, config),
    }
    manifest: dict[str, Any] = {
        "format": 2,
        "palign": "0",
        "name": config.name,
        "seed": config.seed,
        "stages": {},
        "versions": {"python": "3.11"},
        "rejected": [{"id": "q9", "reason": "no answer"}],
    }
    _write_rejected(
        folder, "data", [Outcome(id="q9", question="", answer="", rejected="no answer")]
    )
    for stage in list(stages)[: list(stages).index(upto) + 1]:
        summary = stages[stage]()
        manifest["stages"][stage] = {"done": True, "keys": {}, "output": stage, **summary}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def _teach(folder: Path, items: list[dict[str, str]]) -> dict[str, Any]:
    rows = []
    for item in items:
        sample = Sample(text=item["long_cot"], verdict="correct", answer=item["answer"], tokens=900)
        rows.append(TraceRow(**_problem(item), samples=(sample,), kept=(0,), seconds=2.0))
    wrong = Sample(text="No idea.", verdict="wrong", answer="1", finish_reason="length", tokens=160)
    lost = _problem({**items[0], "id": "q-lost"})
    rows.append(TraceRow(**lost, samples=(wrong,), kept=(), rejected="no right trace"))
    RowFile(folder / "traces.jsonl", TraceRow).write_all(rows)
    _write_rejected(folder, "teach", rows)
    return {"rows_in": len(rows), "rows_out": len(items), "seconds": 61.2, "summary": {}}


def _truncate(folder: Path, items: list[dict[str, str]], draw: random.Random) -> dict[str, Any]:
    """Binary search under a judge whose margin rises along the trace, with noise."""
    rows = []
    for item in items:
        trace = item["long_cot"]
        boundaries = ends(trace)
        total = kept = len(boundaries)
        point = draw.betavariate(1.6, 3.5) * total
        low = 1
        high = total
        verdicts = []
        while low <= high:
            middle = (low + high) // 2
            rise = math.tanh((middle - point) / (0.2 * total + 1))
            margin = round(2.4 * rise + draw.gauss(0, 0.2), 3)
            label = "ENOUGH" if margin >= 0 else "NOT_ENOUGH"
            verdicts.append(Verdict(sentences=middle, label=label, margin=margin))
            if label == "ENOUGH":
                kept = middle
                high = middle - 1
            else:
                low = middle + 1
        tokens = len(trace) // 4 + 120
        rows.append(
            PrefixRow(
                **_problem(item),
                trace=trace,
                end=boundaries[kept - 1],
                sentences=kept,
                sentences_total=total,
                ratio=kept / total,
                sufficient=any(verdict.label == "ENOUGH" for verdict in verdicts),
                verdicts=tuple(verdicts),
                prompt_tokens=tokens,
                prefill_tokens=tokens + 40 * len(verdicts),
                cached_tokens=tokens * (len(verdicts) - 1),
                seconds=1.0,
            )
        )
    RowFile(folder / "prefixes.jsonl", PrefixRow).write_all(rows)
    notes = ["the cache was checked against fresh logits"]
    summary = {"degenerate": None, "violations": 0, "notes": notes}
    return {"rows_in": len(rows), "rows_out": len(rows), "seconds": 301.5, "summary": summary}


def _align(folder: Path, draw: random.Random) -> dict[str, Any]:
    """Two samples per prefix; the first is correct for about seven in ten."""
    rows = []
    lines = []
    for row in RowFile(folder / "prefixes.jsonl", PrefixRow).read():
        prefix = row.trace[: row.end]
        rest = row.trace[row.end : row.end + 4000] or "So it is 7."
        correct = draw.random() < 0.7
        text = f"{rest} Therefore \\boxed{{{row.answer}}}."
        first = Sample(
            text=text,
            verdict="correct" if correct else "wrong",
            answer=row.answer,
            finish_reason="stop" if correct or draw.random() < 0.5 else "length",
            tokens=300,
        )
        second = Sample(text="Hmm.", verdict="unparsed", finish_reason="length", tokens=4096)
        rows.append(
            AlignedRow(
                id=row.id,
                question=row.question,
                answer=row.answer,
                prefix=prefix,
                continuation=text if correct else "",
                samples=(first, second),
                answer_in_prefix=row.answer in prefix,
                rejected=None if correct else "no right continuation",
                detail=None if correct else "0 of 2 right: 1 wrong, 1 unparsed",
            )
        )
        if correct:
            train = TrainRow(instruction="Solve it.", input=row.question, output=prefix + text)
            lines.append(train.model_dump())
    RowFile(folder / "aligned.jsonl", AlignedRow).write_all(rows)
    _write_lines(folder / "train.jsonl", lines)
    _write_rejected(folder, "align", rows)
    return {"rows_in": len(rows), "rows_out": len(lines), "seconds": 128.0, "summary": {}}


def _train(folder: Path, draw: random.Random) -> dict[str, Any]:
    log = []
    for step in range(36):
        loss = round(0.72 + 0.9 * math.exp(-step / 9) + draw.gauss(0, 0.03), 4)
        log.append({"step": step + 1, "loss": loss, "learning_rate": 5e-5})
    _write_lines(folder / "train_log.jsonl", log)
    rows = len((folder / "train.jsonl").read_text().splitlines())
    summary = {
        "loss_first": log[0]["loss"],
        "loss_last": log[-1]["loss"],
        "rows": rows - 1,
        "peak_bytes": 3 << 30,
        "gradient_check": [
            {"layers": "0-9", "gradient": 2.31, "slope": 2.3},
            {"layers": "10-19", "gradient": 1.5, "slope": 1.52},
        ],
        "fixed_batch_before": 1.61,
        "fixed_batch_after": 0.74,
        "fixed_batch_rows": 4,
        "tokens_per_second": 71.3,
        "dropped": {"over the cutoff": ["line 3 (bad)"]},
    }
    return {"rows_in": rows, "rows_out": rows - 1, "seconds": 412.0, "summary": summary}


def _eval(folder: Path, draw: random.Random, config: Any) -> dict[str, Any]:
    """Two datasets of 60 problems, answered by the base model and by a better tuned one."""
    scores = []
    comparisons = []
    for dataset in ("builtin", "math500"):
        answered = {}
        for which, chance in (("base", 0.31), ("tuned", 0.47)):
            rows = [_answer(dataset, which, chance, number, draw) for number in range(60)]
            path = folder / file_name(config.eval.model, which, dataset)
            path.parent.mkdir(exist_ok=True)
            RowFile(path, EvalRow).write_all(rows)
            answered[which] = rows
            label = {"model": config.eval.model, "dataset": dataset, "which": which}
            scores.append({**label, **asdict(score(rows))})
        test = compare_rows(answered["base"], answered["tuned"])
        comparisons.append({"dataset": dataset, "a": "base", "b": "tuned", **asdict(test)})
    summary = {"scores": scores, "comparisons": comparisons}
    return {"rows_in": 240, "rows_out": 240, "seconds": 188.0, "summary": summary}


def _answer(dataset: str, which: str, chance: float, number: int, draw: random.Random) -> EvalRow:
    """One problem's answer; a problem is as hard for every model."""
    difficulty = random.Random(f"{dataset}{number}").random()
    correct = difficulty * 0.5 + draw.random() * 0.5 < chance
    answer = "7" if correct else "8"
    text = f"<b>{which}</b> thinks about {number}: {answer}{HOSTILE[number % 2]}"
    sample = Sample(
        text=text,
        verdict="correct" if correct else "wrong",
        finish_reason="length" if draw.random() < 0.24 else "stop",
        tokens=200 + number,
    )
    row = EvalRow(id=f"{number}", question=f"Question {number} <i>?", answer="7", samples=(sample,))
    if dataset != "math500":
        return row
    subject = ("Algebra", "Geometry")[number % 2]
    return row.model_copy(update={"level": str(1 + number % 5), "subject": subject})


def _write_rejected(folder: Path, stage: str, rows: Sequence[Outcome]) -> None:
    """Add to rejected.jsonl, as `Run.finish` writes it."""
    with open(folder / "rejected.jsonl", "w" if stage == "data" else "a") as file:
        for row in rows:
            if row.rejected:
                line = {"stage": stage, "id": row.id, "reason": row.rejected, "detail": row.detail}
                file.write(json.dumps(line) + "\n")


def _write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _problem(item: dict[str, str]) -> dict[str, str]:
    return {key: item[key] for key in ("id", "question", "answer")}
