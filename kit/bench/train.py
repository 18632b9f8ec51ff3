"""One training step with the plain and with the sliced loss (palign.py bench train)."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

NAMES = ("plain", "chunked")


def bench(
    tokens: int = 4096, repeats: int = 3, model: str = "smollm2-135m", supervised: float = 0.8
) -> dict[str, Any]:
    """Forward and backward of one row, in an alternating order, each time in a process of its own.

    On a CPU both give freed blocks back to the system at once, so that a peak is of what was alive together.
    The student is as train.* sets it by default: an NF4 base, rank 16, activation checkpointing on for both. `plain`
    lets transformers build the logits and their loss. The first step of a process is not counted.

    Args:
        tokens: length of the row.
        repeats: processes a name; times are medians over them, peaks are the largest.
        model: the student.
        supervised: share of the row's tokens that are learned.

    Returns:
        {subject, rows: [{name, tokens, seconds, peak_bytes}], time_ratio, peak_ratio}: seconds of one step, and the
        process's largest memory above what it held with the model loaded (the CUDA allocator's, where there is a card);
        the ratios are chunked over plain.
    """
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in NAMES}
    for turn in range(repeats):
        for name in NAMES if turn % 2 == 0 else NAMES[::-1]:
            command = [
                sys.executable,
                "-m",
                "kit.bench.train",
                name,
                str(tokens),
                model,
                str(supervised),
            ]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{name} failed:\n{done.stderr[-2000:]}")
            seen[name].append(json.loads(done.stdout.splitlines()[-1]))
    rows = [
        {
            "name": name,
            "tokens": tokens,
            "seconds": statistics.median(one["seconds"] for one in seen[name]),
            "peak_bytes": max(one["peak_bytes"] for one in seen[name]),
            "loss": seen[name][0]["loss"],
        }
        for name in NAMES
    ]
    time_ratio, peak_ratio = (rows[1][key] / rows[0][key] for key in ("seconds", "peak_bytes"))
    return {
        "subject": "train",
        "rows": rows,
        "time_ratio": time_ratio,
        "peak_ratio": peak_ratio,
        "repeats": repeats,
    }


def step(name: str, tokens: int, model: str, supervised: float) -> dict[str, float]:
    """Two steps in this process, the second one measured."""
    import torch

    from kit.core.config import resolve
    from kit.core.memory import peak_bytes, reset_peak, return_at_once
    from kit.training.loss import IGNORED
    from kit.training.trainer import make_model

    return_at_once()  # else glibc keeps what was freed, and a peak is not of what was alive
    peft = make_model(
        resolve({"student": {"model": model}, "train": {"dropout": 0.0}}, "bench")
    ).train()
    causal = peft.get_base_model()
    if name == "plain":
        del causal.forward  # the class's own again
    ids = torch.randint(
        0, causal.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0)
    )
    labels = ids.clone()
    labels[:, : int(tokens * (1 - supervised))] = IGNORED
    ids, labels = ids.to(peft.device), labels.to(peft.device)

    def once() -> float:
        loss = peft(input_ids=ids, labels=labels)["loss"]
        loss.backward()
        peft.zero_grad()
        return loss.item()

    def held() -> int:
        reset_peak()
        return peak_bytes()

    before = held()
    once()
    peak = peak_bytes() - before  # the first step's: later ones find memory that the allocator kept
    begun = time.perf_counter()
    loss = once()
    return {
        "seconds": time.perf_counter() - begun,
        "peak_bytes": max(peak, peak_bytes() - before),
        "loss": loss,
    }


if __name__ == "__main__":
    print(json.dumps(step(sys.argv[1], int(sys.argv[2]), sys.argv[3], float(sys.argv[4]))))
