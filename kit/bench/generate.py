"""Both local backends, one prompt at a time against many at once, in one run (palign.py bench generate)."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kit import prompts
from kit.backends import open_backend
from kit.backends.base import Backend, Request, Tokenizer
from kit.core.config import ModelConfig, Sampling
from kit.synthetic import generate

SHORTEST, LONGEST = 30, 400  # prompt tokens, chat template apart
Ids = tuple[int, ...]


def bench(
    limit: int = 32,
    new_tokens: int = 128,
    repeats: int = 3,
    model: str = "smollm2-135m",
    max_num_seqs: int = 16,
) -> dict[str, Any]:
    """Greedy generation, the four ways in turn within every repeat; their order turns around from one to the next.

    The sequential baselines are the libraries' own: llama-cpp-python's `create_completion` on one `Llama`, and
    transformers' `generate`. A repeat's prefill is the same prompts with one new token. Samples may end before
    `new_tokens`; rates count the tokens that were really made. A model that is no GGUF leaves the gguf rows out.

    Args:
        limit: prompts, their lengths spread evenly over 30 to 400 tokens, in a fixed random order.
        new_tokens: most new tokens a prompt.
        repeats: medians are over these.
        model: as in a config.
        parallel: rows or sequences at once.

    Returns:
        {subject, rows: [{name, tokens_per_second, prompt_tokens, new_tokens, seconds, prefill_tokens_per_second}],
        hf_ratio, gguf_ratio, ...}: a ratio is the median over repeats of parallel over sequential tokens a second.
    """
    from kit.models import resolve

    hf = open_backend(ModelConfig(backend="hf", model=model, max_num_seqs=max_num_seqs))
    asked = make_prompts(hf.tokenizer, limit)
    context = max(map(len, asked)) + new_tokens
    ways: dict[str, Callable[[int], int]] = {}
    if isinstance(resolve(model), Path):
        gguf = open_backend(ModelConfig(backend="gguf", model=model, max_num_seqs=max_num_seqs))
        ways["gguf-sequential"] = _completions(model, gguf, asked, context)
        ways["gguf-parallel"] = _backend(gguf, asked)
    ways |= {"hf-sequential": _generate(hf, asked), "hf-batched": _backend(hf, asked)}
    seen: dict[str, list[tuple[int, float, float]]] = {name: [] for name in ways}
    for way in ways.values():
        way(2)  # first calls allocate and build
    for turn in range(repeats):
        for name in list(ways) if turn % 2 == 0 else list(ways)[::-1]:
            prefill_seconds = _timed(ways[name], 1)[1]
            seen[name].append((*_timed(ways[name], new_tokens), prefill_seconds))
    prompt_tokens = sum(map(len, asked))
    rows = [_row(name, turns, prompt_tokens) for name, turns in seen.items()]
    result: dict[str, Any] = {"subject": "generate", "rows": rows}
    for kind, one, many in (
        ("hf", "hf-sequential", "hf-batched"),
        ("gguf", "gguf-sequential", "gguf-parallel"),
    ):
        if one in seen:
            pairs = zip(seen[one], seen[many], strict=True)
            result[f"{kind}_ratio"] = statistics.median(
                (b[0] / b[1]) / (a[0] / a[1]) for a, b in pairs
            )
    return result | {"prompts": limit, "max_num_seqs": max_num_seqs, "repeats": repeats}


def make_prompts(tokenizer: Tokenizer, count: int, seed: int = 0) -> list[Ids]:
    """Rendered prompts of mixed length: built-in problems one after the other, cut to length."""
    draw = random.Random(seed)
    text = "\n\n".join(problem.question for problem in generate(64, seed))
    ids = tokenizer.encode(text, special=False)
    made = []
    for i in range(count):
        length = SHORTEST + (LONGEST - SHORTEST) * i // max(1, count - 1)
        start = draw.randrange(len(ids) - length)
        made.append(prompts.render(tokenizer, tokenizer.decode(ids[start : start + length])))
    draw.shuffle(made)
    return made


def _row(
    name: str, turns: Sequence[tuple[int, float, float]], prompt_tokens: int
) -> dict[str, Any]:
    return {
        "name": name,
        "tokens_per_second": statistics.median(made / seconds for made, seconds, _ in turns),
        "prompt_tokens": prompt_tokens,
        "new_tokens": turns[0][0],
        "seconds": statistics.median(seconds for _, seconds, _ in turns),
        "prefill_tokens_per_second": statistics.median(
            prompt_tokens / prefill for _, _, prefill in turns
        ),
    }


def _timed(way: Callable[[int], int], new_tokens: int) -> tuple[int, float]:
    begun = time.perf_counter()
    made = way(new_tokens)
    return made, time.perf_counter() - begun


def _backend(backend: Backend, asked: Sequence[Ids]) -> Callable[[int], int]:
    def run(new_tokens: int) -> int:
        sampling = Sampling(temperature=0, max_new_tokens=new_tokens)
        requests = [Request(str(i), ids, sampling) for i, ids in enumerate(asked)]
        return sum(
            len(sample.ids)
            for result in backend.generate(requests)
            for sample in result.completions
        )

    return run


def _generate(backend: Any, asked: Sequence[Ids]) -> Callable[[int], int]:
    import torch

    ends = sorted(backend.tokenizer.eos_ids)

    def run(new_tokens: int) -> int:
        made = 0
        for prompt in asked:
            ids = torch.tensor([prompt], device=backend.device)
            options = {
                "do_sample": False,
                "max_new_tokens": new_tokens,
                "eos_token_id": ends,
                "pad_token_id": ends[0],
            }
            out = backend.model.generate(ids, attention_mask=torch.ones_like(ids), **options)[
                0, len(prompt) :
            ]
            made += sum(token not in backend.tokenizer.eos_ids for token in out.tolist())
        return made

    return run


def _completions(
    model: str, backend: Any, asked: Sequence[Ids], context: int
) -> Callable[[int], int]:
    from llama_cpp import Llama

    from kit.models import gguf_file

    n_threads = backend.n_threads
    llama = Llama(
        str(gguf_file(model)),
        n_ctx=context,
        n_threads=n_threads,
        n_threads_batch=n_threads,
        verbose=False,
    )

    def run(new_tokens: int) -> int:
        made = 0
        for prompt in asked:
            llama.reset()  # every prompt whole, as the batched ways evaluate it
            done = llama.create_completion(
                list(prompt), max_tokens=new_tokens, temperature=0.0, repeat_penalty=1.0
            )
            made += done["usage"]["completion_tokens"]
        return made

    return run
