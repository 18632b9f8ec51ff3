"""A run's folder for tests of what reads it, written with the real records; texts are real traces and hostile ones.

Verdicts, grades and losses in it are made up by a seeded generator: they test the reading, they measure nothing.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from kit.core import config as configs
from kit.core.records import AlignedRow, EvalRow, PrefixRow, Sample, TraceRow, TrainRow, Verdict
from kit.core.stages import file_name
from kit.core.storage import RowFile
from kit.grading.scores import compare_rows, score
from kit.judging.sentences import ends
from kit.reporting.metrics import Files

HOSTILE = [
    "<script>alert('trace')</script></style></title></svg><img src=x onerror=alert(1)> So the answer is \\boxed{7}. ",
    "Direction: \u202e reversed \u2066 isolated \u200f mark. NUL \x00 and bell \x07 and escape \x1b[31m. Next. ",
    "x" * 50_000 + ". Then done. ",
    "{{ 7 * 7 }} {% for x in y %} &lt;b&gt; <!-- <b> --> ]]> javascript:alert(2) https://example.org/pixel.png. ",
    "مرحبا، الجواب سبعة. שלום, התשובה שבע. 答えは七です。まず数えます。 ",
]


def traces(shared: Path | None, count: int) -> list[dict[str, str]]:
    """Problems with traces: real ones where the shared data are, and the hostile ones."""
    found = [
        {
            "id": f"bad<{i}>&\"'",
            "question": f"What is 3 + 4? {text[:200]}",
            "answer": "7",
            "long_cot": text if len(text) > 9999 else text * 3,
        }
        for i, text in enumerate(HOSTILE)
    ]
    path = (shared or Path("/nowhere")) / "long_cot_aime24.jsonl"
    if path.exists():
        return (
            found
            + [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()][
                : count - len(found)
            ]
        )
    plain = "First we count the apples. There are 3. Then 4 more come. Let me check that again. So 3 + 4 = 7. "
    return found + [
        {
            "id": f"p{i}",
            "question": f"What is 3 + 4, {i}?",
            "answer": "7",
            "long_cot": plain * (i + 2),
        }
        for i in range(count - len(found))
    ]


def make(folder: Path, shared: Path | None = None, upto: str = "eval", **overrides: Any) -> Path:
    """Write a run's folder.

    Args:
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
    manifest: dict[str, Any] = {
        "format": 2,
        "palign": "0",
        "name": config.name,
        "seed": config.seed,
        "stages": {},
    }
    manifest |= {"versions": {"python": "3.11"}, "rejected": [{"id": "q9", "reason": "no answer"}]}
    (folder / "manifest.json").write_text(
        json.dumps(manifest)
    )  # so that the stages can be read while it grows
    source, done = traces(shared, 24), manifest["stages"]
    order = configs.STAGES[: configs.STAGES.index(upto) + 1]
    for stage, write in (
        ("teach", _teach),
        ("truncate", _truncate),
        ("align", _align),
        ("train", _train),
    ):
        if stage in order:
            done[stage] = {
                "done": True,
                "keys": {},
                "output": stage,
                **write(folder, source, draw, config),
            }
    if "eval" in order:
        done["eval"] = {"done": True, "keys": {}, "output": "eval", **_eval(folder, draw, config)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def _teach(
    folder: Path, source: list[dict[str, str]], draw: random.Random, config: Any
) -> dict[str, Any]:
    rows = []
    for item in source:
        samples = (
            Sample(text=item["long_cot"], verdict="correct", answer=item["answer"], tokens=900),
        )
        rows.append(TraceRow(**_facts(item), samples=samples, kept=(0,), seconds=2.0))
    wrong = Sample(text="No idea.", verdict="wrong", answer="1", finish_reason="length", tokens=160)
    rows.append(
        TraceRow(
            **_facts({**source[0], "id": "q-lost"}),
            samples=(wrong,),
            kept=(),
            rejected="no right trace",
        )
    )
    RowFile(folder / "traces.jsonl", TraceRow).write_all(rows)
    return {"rows_in": len(rows), "rows_out": len(source), "seconds": 61.2, "summary": {}}


def _truncate(
    folder: Path, source: list[dict[str, str]], draw: random.Random, config: Any
) -> dict[str, Any]:
    rows = []
    for item in source:
        trace, places = item["long_cot"], ends(item["long_cot"])
        total, low, high, asked, kept = len(places), 1, len(places), [], len(places)
        point = draw.betavariate(1.6, 3.5) * total
        while low <= high:
            middle = (low + high) // 2
            margin = round(
                2.4 * math.tanh((middle - point) / (0.2 * total + 1)) + draw.gauss(0, 0.2), 3
            )
            asked.append(
                Verdict(
                    sentences=middle, label="ENOUGH" if margin >= 0 else "NOT_ENOUGH", margin=margin
                )
            )
            kept, low, high = (middle, low, middle - 1) if margin >= 0 else (kept, middle + 1, high)
        tokens = len(trace) // 4 + 120
        rows.append(
            PrefixRow(
                **_facts(item),
                trace=trace,
                end=places[kept - 1],
                sentences=kept,
                sentences_total=total,
                ratio=kept / total,
                sufficient=any(v.label == "ENOUGH" for v in asked),
                verdicts=tuple(asked),
                prompt_tokens=tokens,
                prefill_tokens=tokens + 40 * len(asked),
                cached_tokens=tokens * (len(asked) - 1),
                seconds=1.0,
            )
        )
    RowFile(folder / "prefixes.jsonl", PrefixRow).write_all(rows)
    told = {
        "degenerate": None,
        "violations": 0,
        "notes": ["the cache was checked against fresh logits"],
    }
    return {"rows_in": len(rows), "rows_out": len(rows), "seconds": 301.5, "summary": told}


def _align(
    folder: Path, source: list[dict[str, str]], draw: random.Random, config: Any
) -> dict[str, Any]:
    rows, lines = [], []
    for row in RowFile(folder / "prefixes.jsonl", PrefixRow).read():
        prefix, rest = row.trace[: row.end], row.trace[row.end : row.end + 4000] or "So it is 7."
        right = draw.random() < 0.7
        text = f"{rest} Therefore \\boxed{{{row.answer}}}."
        finish_reason = "stop" if right or draw.random() < 0.5 else "length"
        samples = (
            Sample(
                text=text,
                verdict="correct" if right else "wrong",
                answer=row.answer,
                finish_reason=finish_reason,
                tokens=300,
            ),
            Sample(text="Hmm.", verdict="unparsed", finish_reason="length", tokens=4096),
        )
        lost = (
            {}
            if right
            else {
                "rejected": "no right continuation",
                "detail": "0 of 2 right: 1 wrong, 1 unparsed",
            }
        )
        facts = {"id": row.id, "question": row.question, "answer": row.answer, "prefix": prefix}
        holds = row.answer in prefix
        kept = text if right else ""
        rows.append(
            AlignedRow(**facts, continuation=kept, samples=samples, answer_in_prefix=holds, **lost)
        )
        if right:
            lines.append(
                TrainRow(instruction="Solve it.", input=row.question, output=prefix + text)
            )
    RowFile(folder / "aligned.jsonl", AlignedRow).write_all(rows)
    (folder / "train.jsonl").write_text(
        "".join(json.dumps(line.model_dump()) + "\n" for line in lines)
    )
    return {"rows_in": len(rows), "rows_out": len(lines), "seconds": 128.0, "summary": {}}


def _train(
    folder: Path, source: list[dict[str, str]], draw: random.Random, config: Any
) -> dict[str, Any]:
    steps = 36
    log = [
        {
            "step": i + 1,
            "loss": round(0.72 + 0.9 * math.exp(-i / 9) + draw.gauss(0, 0.03), 4),
            "learning_rate": 5e-5,
        }
        for i in range(steps)
    ]
    (folder / "train_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    rows = len(Files(folder).train)
    told = {
        "loss_first": log[0]["loss"],
        "loss_last": log[-1]["loss"],
        "rows": rows - 1,
        "peak_bytes": 3 << 30,
    }
    told |= {
        "fixed_batch_before": 1.61,
        "fixed_batch_after": 0.74,
        "fixed_batch_rows": 4,
        "tokens_per_second": 71.3,
    }
    told["dropped"] = {"over the cutoff": ["line 3 (bad)"]}
    return {"rows_in": rows, "rows_out": rows - 1, "seconds": 412.0, "summary": told}


def _eval(folder: Path, draw: random.Random, config: Any) -> dict[str, Any]:
    scores, comparisons, every = [], [], 0
    for dataset in ("builtin", "math500"):
        sides = {}
        for which, chance in (("base", 0.31), ("tuned", 0.47)):
            rows = []
            for i in range(60):
                right = random.Random(f"{dataset}{i}").random() * 0.5 + draw.random() * 0.5 < chance
                text = (
                    f"<b>{which}</b> thinks about {i}: " + ("7" if right else "8") + HOSTILE[i % 2]
                )
                finish_reason = "length" if draw.random() < 0.24 else "stop"
                sample = Sample(
                    text=text,
                    verdict="correct" if right else "wrong",
                    finish_reason=finish_reason,
                    tokens=200 + i,
                )
                level = {"level": str(1 + i % 5), "subject": ("Algebra", "Geometry")[i % 2]}
                facts = level if dataset == "math500" else {}
                rows.append(
                    EvalRow(
                        id=f"{i}",
                        question=f"Question {i} <i>?",
                        answer="7",
                        samples=(sample,),
                        **facts,
                    )
                )
            path = folder / file_name(config.eval.model, which, dataset)
            path.parent.mkdir(exist_ok=True)
            RowFile(path, EvalRow).write_all(rows)
            sides[which], every = rows, every + len(rows)
            scores.append(
                {"model": config.eval.model, "dataset": dataset, "which": which, **score(rows)}
            )
        pair = compare_rows(sides["base"], sides["tuned"])
        comparisons.append({"dataset": dataset, "a": "base", "b": "tuned", **pair})
    summary = {"scores": scores, "comparisons": comparisons}
    return {"rows_in": every, "rows_out": every, "seconds": 188.0, "summary": summary}


def _facts(item: dict[str, str]) -> dict[str, str]:
    return {key: item[key] for key in ("id", "question", "answer")}
