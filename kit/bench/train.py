"""A training step of a student as train.* sets it by default (palign.py bench train).

An NF4 base, rank 16, gradient checkpointing. What it takes of memory is in doctor_full.py.
"""

from argparse import Namespace
from functools import partial
from typing import Any

from kit import Json
from kit.bench import measure
from kit.core.progress import Progress

TOKENS = 512


def bench(options: Namespace, progress: Progress) -> Json:
    """Forward and backward of one row of random tokens.

    Returns:
        {rows: [{name, tokens, seconds: the median}], repeats}.
    """
    from kit.core.config import resolve
    from kit.training.trainer import make_model

    model = make_model(resolve({"student": {"model": options.model}}, "bench")).train()
    step(model, TOKENS)
    ways = {"step": partial(step, model, TOKENS)}
    timing = measure(ways, options.repeats, progress)["step"]
    row = {"name": "step", "tokens": TOKENS, "seconds": timing.seconds}
    return {"rows": [row], "repeats": options.repeats}


def step(model: Any, tokens: int) -> float:
    """Forward and backward of a row of random tokens; its loss."""
    import torch

    from kit.core.card import half_dtype

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, tokens), generator=generator).to(model.device)
    with torch.autocast("cuda", half_dtype(), enabled=ids.is_cuda):
        loss = model(input_ids=ids, labels=ids)["loss"]
    loss.backward()
    return loss.item()
