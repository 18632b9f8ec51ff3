"""Does another engine answer as the adapter does in this process? Asked before it writes any row.

A server that ignores the adapter or a field, parses reasoning away, or was given another adapter
answers all the same. So training questions are answered greedily by the engine, with and without
the adapter, and by transformers and PEFT here. Near-ties of two tokens part equal weights too, and
a quantized base parts earlier: the agreement is stated, and only an engine that is nearer to the
untrained model is refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kit import Json
from kit.backends import open_backend
from kit.backends.base import Ids, Request, ScoreRequest, common_prefix_len
from kit.core.config import Config, ModelConfig, Sampling
from kit.core.errors import KitError
from kit.core.fingerprints import file_hash
from kit.core.progress import Progress
from kit.core.storage import write_atomic
from kit.models import load_tokenizer
from kit.prompts import render, solve_text
from kit.training.sft_data import read_rows

PROMPTS = 8
NEW_TOKENS = 64
FIRST_TOKENS = 1000  # of the vocabulary, whose log-probabilities are compared
ANSWERS = "answers.json"  # in the adapter's folder: what it answers in this process


def engine(kind: str, model: str, adapter: str | None = None, **keys: Any) -> Any:
    """A context with a model; one sequence at a time, unless `keys` of the config say else, so that
    its answers do not depend on a batch.
    """
    settings = {"context_tokens": 4096, "max_num_seqs": 1, **keys}
    return closing(open_backend(ModelConfig(backend=kind, model=model, **settings), adapter))


def prompts_of(folder: Path, config: Config, tokenizer: Any) -> list[Ids]:
    """A run's first training questions, asked as the evaluation asks."""
    questions = dict.fromkeys(row.input for row in read_rows(folder / "train.jsonl"))
    return [
        render(tokenizer, solve_text(config.prompts, question), config.eval)
        for question in list(questions)[:PROMPTS]
    ]


def answer(backend: Any, prompts: Sequence[Ids], **sampling: Any) -> list[Ids]:
    """The token ids of a model's answer to each prompt, greedy unless `sampling` says else.

    Raises:
        KitError: it does not run, or its text is not its tokens.
    """
    keys = {"temperature": 0, "top_p": 1, "max_new_tokens": NEW_TOKENS, **sampling}
    requests = [Request(str(i), prompt, Sampling(**keys)) for i, prompt in enumerate(prompts)]
    answers = {}
    for generation in backend.generate(requests):
        if generation.error:
            raise KitError(f"{backend.name} does not run: {generation.error}")
        completion = generation.completions[0]
        text = backend.tokenizer.decode(completion.ids).strip()
        if text != completion.text.strip() or len(completion.ids) > NEW_TOKENS:
            raise KitError(
                f"{backend.name} returned {completion.text[:80]!r}, but its token IDs decode to "
                f"{text[:80]!r} ({len(completion.ids)} tokens; the limit is {NEW_TOKENS}).",
                "Start the server without a reasoning parser or other changes to its answers.",
            )
        answers[generation.id] = completion.ids
    return [answers[request.id] for request in requests]


@dataclass(frozen=True)
class Reference:
    """What a model makes of the prompts, to be compared with another's."""

    answers: list[Ids]  # greedy
    logprobs: np.ndarray  # (N, FIRST_TOKENS), of the token after each prompt

    @classmethod
    def of(cls, backend: Any, prompts: Sequence[Ids]) -> Reference:
        """Ask a model."""
        first = tuple(range(FIRST_TOKENS))
        with closing(backend.session(uncached=True)) as session:
            scores = session.score([ScoreRequest(ids, ((len(ids) - 1, first),)) for ids in prompts])
        return cls(answer(backend, prompts), np.array(scores)[:, 0])

    def compare(self, other: Reference) -> Json:
        """{logit_difference: largest, of log-probabilities} and see `agreement`."""
        difference = float(np.abs(self.logprobs - other.logprobs).max())
        return {"logit_difference": difference, **agreement(self.answers, other.answers)}


def agreement(first: Sequence[Ids], second: Sequence[Ids]) -> Json:
    """{equal_answers, equal_tokens: share before the first difference} of answers in order."""
    equal_answers = 0
    equal_tokens = 0
    all_tokens = 0
    for one, other in zip(first, second, strict=True):
        equal_answers += one == other
        equal_tokens += common_prefix_len(one, other)
        all_tokens += max(len(one), len(other))
    return {"equal_answers": equal_answers, "equal_tokens": equal_tokens / max(all_tokens, 1)}


def in_process(folder: Path, config: Config, prompts: Sequence[Ids]) -> list[Ids]:
    """What the adapter answers on transformers, computed once for an adapter and its prompts."""
    adapter = folder / "adapter"
    weights = file_hash(adapter / "adapter_model.safetensors")
    key = [weights, config.student.model, config.eval.dtype, list(map(list, prompts))]
    path = adapter / ANSWERS
    saved = json.loads(path.read_bytes()) if path.exists() else {}
    if saved.get("key") != key:
        with engine("hf", config.student.model, str(adapter), dtype=config.eval.dtype) as backend:
            saved = {"key": key, "answers": answer(backend, prompts)}
        write_atomic(path, json.dumps(saved))
    return list(map(tuple, saved["answers"]))


def check(folder: Path, config: Config, backend: Any, progress: Progress) -> Json:
    """Compare an engine that holds a run's adapter with the adapter in this process.

    Args:
        folder: the run's.
        backend: gguf or http, opened with the adapter; it is switched off for some answers.

    Returns:
        {equal_answers, equal_tokens: as the adapter here, None where it cannot run; prompts;
        differs_from_base: with and without the adapter}.

    Raises:
        KitError: another template, another adapter or none, or ignored fields.
    """
    prompts = prompts_of(folder, config, load_tokenizer(config.student.model))
    if prompts != prompts_of(folder, config, backend.tokenizer):
        raise KitError(
            f"{backend.name} renders prompts in another way than {config.student.model}: its chat "
            "template or its tokenizer is another one.",
            "Name a GGUF or a tokenizer of the very model that was trained.",
        )
    progress.say(f"canary: comparing {len(prompts)} answers with the adapter in process")
    tuned = answer(backend, prompts)
    if config.eval.backend == "http":
        _check_fields(backend, prompts, tuned)
    backend.adapter_enabled = False
    base = answer(backend, prompts)
    backend.adapter_enabled = True
    result = {"prompts": len(prompts), "differs_from_base": tuned != base}
    try:
        here = in_process(folder, config, prompts)
    except KitError as error:
        progress.warn(f"the adapter does not run in this process, so nothing is compared: {error}")
        here = None
    equal = agreement(here or tuned, tuned)
    with_base = agreement(here or tuned, base)["equal_tokens"]
    is_unproven = False
    if tuned == base:
        # an adapter that hardly learned changes nothing here either
        with engine("hf", config.student.model, dtype=config.eval.dtype) as plain:
            is_unproven = answer(plain, prompts) != here
    if is_unproven or equal["equal_tokens"] <= with_base < 1:
        raise KitError(
            f"{backend.name} does not apply the adapter in {folder}, or applies it to the base as "
            f"well: {equal['equal_tokens']:.0%} of its tokens are the adapter's, {with_base:.0%} "
            "when asked without it.",
            "Serve this run's adapter, on the base that it was trained on, by a server that can "
            "leave it out.",
        )
    progress.say(f"canary: {equal['equal_tokens']:.1%} of the tokens are the adapter's")
    return {**result, **(equal if here else dict.fromkeys(equal))}


def _check_fields(backend: Any, prompts: Sequence[Ids], greedy: Sequence[Ids]) -> None:
    """Refuse (KitError) a server that ignores fields of the evaluation's requests."""
    longest = max(range(len(prompts)), key=lambda index: len(greedy[index]))
    prompt = prompts[longest : longest + 1]
    # hot, but with one candidate; and with every repetition forbidden
    [narrow] = answer(backend, prompt, temperature=5, top_k=1, max_new_tokens=4)
    [penalized] = answer(backend, prompt, repetition_penalty=10)
    if narrow != greedy[longest][:4] or penalized == greedy[longest]:
        raise KitError(
            f"{backend.name} ignores top_k or repetition_penalty.",
            "Use a server that takes them: vLLM, SGLang, llama-server.",
        )
