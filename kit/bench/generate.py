"""Both local backends, one prompt at a time against many at once (palign.py bench generate).

The sequential baselines: llama.cpp with one sequence, and transformers' own `generate`. A model
that is not a GGUF leaves the gguf rows out.
"""

import random
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from kit.backends import open_backend
from kit.backends.base import Backend, Request, Tokenizer
from kit.bench import measure
from kit.core.config import ModelConfig, Sampling
from kit.core.progress import Progress
from kit.models import resolve
from kit.prompts import render
from kit.synthetic import generate

SHORTEST, LONGEST = 30, 400  # prompt tokens, chat template apart
MAX_NUM_SEQS = 16
Prompt = tuple[int, ...]


def bench(options: Namespace, progress: Progress) -> dict[str, Any]:
    """Greedy generation from `limit` prompts of 30 to 400 tokens, in a fixed random order.

    Samples may end before `new_tokens`; rates count the tokens that were really generated.

    Returns:
        {rows: [{name, tokens_per_second, new_tokens, seconds}], hf_ratio, gguf_ratio, prompts,
        max_num_seqs, repeats}: a ratio is of the medians, tokens per second in parallel over
        sequential.
    """
    hf = _open("hf", options.model)
    prompts = make_prompts(hf.tokenizer, options.limit or 32)
    # Name: greedy generation from all prompts, up to so many new tokens each; how many it made.
    ways: dict[str, Callable[[int], int]] = {}
    if isinstance(resolve(options.model), Path):
        ways["gguf-sequential"] = partial(kit_generate, _open("gguf", options.model, 1), prompts)
        ways["gguf-parallel"] = partial(kit_generate, _open("gguf", options.model), prompts)
    ways["hf-sequential"] = partial(transformers_generate, hf, prompts)
    ways["hf-batched"] = partial(kit_generate, hf, prompts)
    # First calls allocate and build.
    measure(ways, 1, progress, 2)
    # One row per way, and how much faster the parallel ways are.
    rows = []
    speeds = {}
    for name, timing in measure(ways, options.repeats, progress, options.new_tokens).items():
        speeds[name] = timing.results[0] / timing.seconds
        row = {
            "name": name,
            "tokens_per_second": speeds[name],
            "new_tokens": timing.results[0],
            "seconds": timing.seconds,
        }
        rows.append(row)
    result = {"rows": rows, "hf_ratio": speeds["hf-batched"] / speeds["hf-sequential"]}
    if "gguf-parallel" in speeds:
        result["gguf_ratio"] = speeds["gguf-parallel"] / speeds["gguf-sequential"]
    settings = {"prompts": len(prompts), "max_num_seqs": MAX_NUM_SEQS, "repeats": options.repeats}
    return {**result, **settings}


def make_prompts(tokenizer: Tokenizer, count: int) -> list[Prompt]:
    """Rendered prompts of mixed length: built-in problems one after the other, cut to length."""
    draw = random.Random(0)
    text = "\n\n".join(problem.question for problem in generate(64, 0))
    ids = tokenizer.encode(text, special=False)
    prompts = []
    for number in range(count):
        length = SHORTEST + (LONGEST - SHORTEST) * number // max(1, count - 1)
        start = draw.randrange(len(ids) - length)
        prompts.append(render(tokenizer, tokenizer.decode(ids[start : start + length])))
    draw.shuffle(prompts)
    return prompts


def transformers_generate(backend: Any, prompts: Sequence[Prompt], new_tokens: int) -> int:
    """Greedy generation as transformers does it, prompt by prompt; how many tokens it made."""
    import torch

    ends = sorted(backend.tokenizer.eos_ids)
    options = {"do_sample": False, "eos_token_id": ends, "pad_token_id": ends[0]}
    generated = 0
    for prompt in prompts:
        ids = torch.tensor([prompt], device=backend.device)
        mask = torch.ones_like(ids)
        output = backend.model.generate(
            ids, attention_mask=mask, max_new_tokens=new_tokens, **options
        )
        generated += sum(token not in ends for token in output[0, len(prompt) :].tolist())
    return generated


def _open(backend: Any, model: str, max_num_seqs: int = MAX_NUM_SEQS) -> Any:
    return open_backend(ModelConfig(backend=backend, model=model, max_num_seqs=max_num_seqs))


def kit_generate(backend: Backend, prompts: Sequence[Prompt], new_tokens: int) -> int:
    """Greedy generation as this kit does it, all prompts at once; how many tokens it made."""
    sampling = Sampling(temperature=0, max_new_tokens=new_tokens)
    requests = [Request(str(number), prompt, sampling) for number, prompt in enumerate(prompts)]
    return sum(len(generation.completions[0].ids) for generation in backend.generate(requests))
