"""What generation costs beside the model's own arithmetic (palign.py bench overhead).

Draining: the steps that a work list adds to those of full batches. Step: 8 rows through 28 layers
so small that only calls cost. Draw: one token of one row from 49,152 logits, with a repetition
penalty, as the samples of llama.cpp are drawn.
"""

import heapq
import random
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from statistics import fmean
from typing import Any

import numpy as np

from kit.bench import measure
from kit.core.config import Sampling
from kit.core.progress import Progress

# Characters of the paper's released continuations at p10, p50 and p90.
SHORT, MEDIAN, LONG = 2612, 4791, 9550
DECILE = 1.2816  # standard deviations between the median and p10 or p90
ITEMS = 1000
SLOTS = 32
CALLS = 20
ROWS = 8
VOCABULARY = 49152


def bench(options: Namespace, progress: Progress) -> dict[str, Any]:
    """Draining is simulated for 1,000 items in 32 slots; the rest is timed.

    Returns:
        {rows: [{name, seconds (a call's median)}], drained_ratio: {batch items: share of the
        steps, mean of 20 seeds}, repeats}.
    """
    drained = {}
    for batch_items in (128, ITEMS):
        drained[batch_items] = fmean(drained_ratio(seed, batch_items) for seed in range(20))
    ways: dict[str, Callable[[], None]] = {
        "step": partial(_steps, _tiny_model()),
        "step-adapter": partial(_steps, _tiny_model(adapter=True)),
        "draw": _draws,
    }
    measure(ways, 1, progress)
    timings = measure(ways, options.repeats, progress)
    rows = []
    for name, timing in timings.items():
        rows.append({"name": name, "seconds": timing.seconds / CALLS})
    return {"rows": rows, "drained_ratio": drained, "repeats": options.repeats}


def drained_ratio(seed: int, batch_items: int) -> float:
    """Share of the steps that a work list adds to full batches, with the paper's lengths.

    A free slot takes the next item of its batch; a batch starts when the one before has ended.
    """
    draw = random.Random(seed)
    lengths = []
    for _ in range(ITEMS):
        deviations = draw.gauss(0, 1) / DECILE
        ratio = LONG / MEDIAN if deviations > 0 else MEDIAN / SHORT
        lengths.append(MEDIAN * ratio**deviations)
    steps = 0.0
    for start in range(0, ITEMS, batch_items):
        slot_ends = [0.0] * SLOTS
        for length in lengths[start : start + batch_items]:
            heapq.heapreplace(slot_ends, slot_ends[0] + length)
        steps += max(slot_ends)
    return 1 - sum(lengths) / SLOTS / steps


def _tiny_model(adapter: bool = False) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from kit.backends.hf import lean_adapter

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=28,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model: Any = Qwen2ForCausalLM(config).eval()
    if adapter:
        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear")).eval()
        lean_adapter(model)
    return model


def _steps(model: Any) -> None:
    import torch

    from kit.backends.hf_batch import prefill

    with torch.inference_mode():
        batch = prefill(model, [[1, 2, 3]] * ROWS)
        for _ in range(CALLS):
            batch.step(model, [4] * ROWS)


def _draws() -> None:
    from kit.backends.gguf_generate import draw

    sampling = Sampling(repetition_penalty=1.05)
    numbers = np.random.default_rng(0)
    seen = numbers.random(VOCABULARY) < 0.02
    logits = numbers.normal(0, 3, VOCABULARY).astype(np.float32)
    for _ in range(CALLS):
        draw(logits, sampling, numbers.random, seen)
