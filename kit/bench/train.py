"""One training step with the plain and with the chunked loss (palign.py bench train).

Each step runs in a process of its own. The student is as train.* sets it by default: an NF4 base,
rank 16, gradient checkpointing. `plain` lets transformers build the logits and their loss.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from argparse import Namespace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from kit.bench import measure
from kit.core.progress import Progress

ROOT = Path(__file__).parents[2]
SUPERVISED_RATIO = 0.8  # of the row's tokens


def bench(options: Namespace, progress: Progress) -> dict[str, Any]:
    """Forward and backward of one row of `tokens` random tokens.

    Returns:
        {rows: [{name, tokens, seconds, peak_bytes, loss}], time_ratio, peak_ratio, repeats}:
        the median seconds of one step, and the largest memory above what the process used with the
        model loaded (the CUDA allocator's, where there is a card); ratios are chunked over plain.
    """
    ways = {name: partial(_run, name, options) for name in ("plain", "chunked")}
    rows = []
    for name, timing in measure(ways, options.repeats, progress).items():
        row = {
            "name": name,
            "tokens": options.tokens,
            "seconds": median(step["seconds"] for step in timing.results),
            "peak_bytes": max(step["peak_bytes"] for step in timing.results),
            "loss": timing.results[0]["loss"],
        }
        rows.append(row)
    plain, chunked = rows
    return {
        "rows": rows,
        "time_ratio": chunked["seconds"] / plain["seconds"],
        "peak_ratio": chunked["peak_bytes"] / plain["peak_bytes"],
        "repeats": options.repeats,
    }


def _run(name: str, options: Namespace) -> dict[str, float]:
    command = [sys.executable, "-m", __name__, name, str(options.tokens), options.model]
    output = subprocess.check_output(command, cwd=ROOT, text=True)
    return json.loads(output.splitlines()[-1])


def step(name: str, tokens: int, model: str) -> dict[str, float]:
    """Two steps in this process, the second one timed."""
    import torch

    from kit.core.config import resolve
    from kit.core.memory import peak_bytes, reset_peak, return_at_once
    from kit.training.loss import IGNORED
    from kit.training.trainer import make_model

    # Otherwise glibc keeps what was freed, and a peak is not of what was in use together.
    return_at_once()
    config = resolve({"student": {"model": model}, "train": {"dropout": 0.0}}, "bench")
    student = make_model(config).train()
    causal = student.get_base_model()
    if name == "plain":
        # The class's own forward again, which builds all logits.
        del causal.forward
    torch.manual_seed(0)
    ids = torch.randint(causal.config.vocab_size, (1, tokens), device=student.device)
    labels = ids.clone()
    labels[:, : int(tokens * (1 - SUPERVISED_RATIO))] = IGNORED

    def one_step() -> float:
        loss = student(input_ids=ids, labels=labels)["loss"]
        loss.backward()
        student.zero_grad()
        return loss.item()

    reset_peak()
    loaded = peak_bytes()
    # The first step is not timed, but its peak counts: later ones reuse what the allocator kept.
    one_step()
    started = time.perf_counter()
    loss = one_step()
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "peak_bytes": peak_bytes() - loaded, "loss": loss}


if __name__ == "__main__":
    print(json.dumps(step(sys.argv[1], int(sys.argv[2]), sys.argv[3])))
