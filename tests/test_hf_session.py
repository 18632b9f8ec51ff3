"""Cached scores equal uncached ones, whatever the architecture; tiny models of random weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from kit.backends import base, hf_session
from kit.backends.base import ScoreRequest
from kit.backends.hf_session import cache_kind, open_session
from kit.core.errors import KitError

VOCABULARY = 320
EVERY_TOKEN = tuple(range(VOCABULARY))
BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.25,
    "max_position_embeddings": 2048,
}
SLIDING = {"sliding_window": 40, "head_dim": 16}
# A window on some layers only; Qwen2 has it from layer `max_window_layers` on.
QWEN2_SLIDING = {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1}
GEMMA3 = {"num_hidden_layers": 6, "sliding_window_pattern": 3}
QWEN3_NEXT = {
    "num_hidden_layers": 4,
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "initializer_range": 0.12,
}
MAMBA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "state_size": 8,
    "num_hidden_layers": 3,
    "initializer_range": 0.25,
}
# A window in columns of the cache, longer than what the check of a cache tries.
GPT_NEO = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_layers": 2,
    "num_heads": 4,
    "attention_types": [[["global", "local"], 1]],
    "window_size": 128,
    "max_position_embeddings": 2048,
    "initializer_range": 0.25,
}
LLAMA4 = {"head_dim": 16, "intermediate_size_mlp": 96, "attention_chunk_size": 1024}
CONFIGS = {
    "llama": transformers.LlamaConfig(**BASE),
    "qwen2": transformers.Qwen2Config(**BASE),
    "qwen2-sliding": transformers.Qwen2Config(**BASE, **QWEN2_SLIDING),
    "qwen3": transformers.Qwen3Config(**BASE, head_dim=16),
    "granite": transformers.GraniteConfig(**BASE, logits_scaling=4.0),  # scales its logits
    "mistral": transformers.MistralConfig(**BASE, **SLIDING),
    "gemma2": transformers.Gemma2Config(**BASE, **SLIDING, attn_logit_softcapping=5.0),
    "gemma3": transformers.Gemma3TextConfig(**{**BASE, **SLIDING, **GEMMA3}),
    "lfm2": transformers.Lfm2Config(**BASE, layer_types=["conv", "full_attention", "conv"]),
    "qwen3-next": transformers.Qwen3NextConfig(**{**BASE, **QWEN3_NEXT}),
    "llama4": transformers.Llama4TextConfig(**BASE, **LLAMA4, num_local_experts=2),
    "mamba": transformers.MambaConfig(**MAMBA),
    "gpt-neo": transformers.GPTNeoConfig(**GPT_NEO),
}
UNCACHED = ("lfm2", "qwen3-next", "llama4", "mamba", "gpt-neo")
TREES = tuple(name for name in CONFIGS if name not in UNCACHED)
CUTS = (210, 105, 315, 300, 310, 52, 53, 420, 1)


def tiny_backend(name: str, context_tokens: int = 2048) -> Any:
    """What a session needs of a backend, with a random model."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name])
    return SimpleNamespace(
        model=model.eval(),
        device=torch.device("cpu"),
        context_tokens=context_tokens,
        notes=[],
        cache_kind=None,
    )


def questions(cuts: tuple[int, ...], length: int = 420) -> list[ScoreRequest]:
    """On one random trace: its first tokens and a closing turn, read at three places."""
    trace = np.random.default_rng(1).integers(10, 310, length).tolist()
    requests = []
    for cut in cuts:
        ids = (*trace[:cut], 5, 6, 7 + cut % 2, 8, 9)
        positions = (len(ids) - 4, len(ids) - 2, len(ids) - 1)
        requests.append(ScoreRequest(ids, tuple((p, EVERY_TOKEN) for p in positions)))
    return requests


@pytest.mark.parametrize("name", CONFIGS)
def test_cached_equals_uncached(name: str) -> None:
    backend = tiny_backend(name)
    requests = questions(CUTS)
    fresh = np.asarray(open_session(backend, uncached=True).score(requests))
    assert fresh.std() > 0.4  # differences of a broken cache would be large

    # One question at a time, as a binary search asks.
    one_by_one = open_session(backend, piece_tokens=64)
    scores = [one_by_one.score([request])[0] for request in requests]
    assert np.abs(np.asarray(scores) - fresh).max() < 5e-4

    # All together, after a question and after a long branch that becomes the trunk.
    scan = open_session(backend, piece_tokens=150)
    scan.score(requests[:1])
    branch = (*requests[1].ids[:80], *requests[2].ids[90:280])
    scan.score([ScoreRequest(branch, ((150, EVERY_TOKEN),))])
    assert np.abs(np.asarray(scan.score(requests)) - fresh).max() < 5e-4


@pytest.mark.parametrize("name", TREES)
def test_a_trace_is_evaluated_once_and_its_closing_turns(name: str) -> None:
    backend = tiny_backend(name)
    session = open_session(backend, piece_tokens=64)
    requests = questions(CUTS)
    for request in requests:
        session.score([request])
    assert cache_kind(backend) == "tree"
    assert backend.notes == []
    assert session.cost.prefill_tokens <= 425 + 6 * len(CUTS)
    total_tokens = sum(len(request.ids) for request in requests)
    assert session.cost.prefill_tokens + session.cost.cached_tokens == total_tokens


@pytest.mark.parametrize("name", UNCACHED)
def test_a_model_whose_cache_cannot_branch_recomputes_and_says_so(name: str) -> None:
    backend = tiny_backend(name)
    session = open_session(backend)
    requests = questions(CUTS)
    session.score(requests)
    assert cache_kind(backend) == "uncached"
    (note,) = backend.notes
    assert note.startswith("judging cache: ")
    assert note.endswith("; every prompt is prefilled whole")
    assert session.cost.prefill_tokens == sum(len(request.ids) for request in requests)
    assert session.cost.cached_tokens == 0


def test_never_past_the_furthest_boundary() -> None:
    session = open_session(tiny_backend("llama"))
    for request in questions((210, 105, 52, 78)):
        session.score([request])
    assert session.cost.prefill_tokens <= 215 + 3 * 5


def _branches_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """What another request wrote is taken for this one's."""
    monkeypatch.setattr(base, "common_prefix_len", lambda trunk, ids: min(len(trunk), len(ids)))


def _windows_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    tree_mask = hf_session.tree_mask

    def without_window(model: Any, *options: Any) -> Any:
        config = transformers.MistralConfig(**{**model.config.to_dict(), "sliding_window": 4096})
        return tree_mask(SimpleNamespace(config=config, dtype=model.dtype, device="cpu"), *options)

    monkeypatch.setattr(hf_session, "tree_mask", without_window)


def _cuts_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tail sees one token of the trunk too few."""
    tree_mask = hf_session.tree_mask

    def cut_short(model: Any, trunk_tokens: int, tails: Any) -> Any:
        mask, positions = tree_mask(model, trunk_tokens, tails)
        row = 0
        for tail in tails:
            mask[:, :, row : row + len(tail.ids), tail.cut - 1] = float("-inf")
            row += len(tail.ids)
        return mask, positions

    monkeypatch.setattr(hf_session, "tree_mask", cut_short)


@pytest.mark.parametrize("damage", [_branches_ignored, _windows_ignored, _cuts_off_by_one])
def test_self_check_finds_a_broken_cache(damage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    damage(monkeypatch)
    backend = tiny_backend("mistral")
    assert cache_kind(backend) == "uncached"
    assert "moved by" in backend.notes[0]


def test_running_out_of_memory_is_not_taken_for_an_unsupported_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def exhausted(*options: Any) -> Any:
        raise torch.OutOfMemoryError("no room for the mask")

    monkeypatch.setattr(hf_session, "tree_mask", exhausted)
    backend = tiny_backend("llama")
    with pytest.raises(torch.OutOfMemoryError):
        open_session(backend)
    assert backend.cache_kind is None


def test_out_of_memory_makes_the_passes_smaller_and_changes_no_score(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backend = tiny_backend("llama")
    expected = np.asarray(open_session(backend).score(questions(CUTS)))
    forward = backend.model.forward
    passes = []

    def small(input_ids: torch.Tensor, **options: Any) -> Any:
        passes.append(input_ids.shape[1])
        if passes[-1] > 160:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasGemm`")
        return forward(input_ids=input_ids, **options)

    monkeypatch.setattr(backend.model, "forward", small)
    scores = np.asarray(open_session(backend).score(questions(CUTS)))
    assert max(passes) > 160 and passes[-1] <= 128
    assert np.abs(scores - expected).max() < 1e-3

    def full(**options: Any) -> Any:
        raise MemoryError("nothing is left")

    monkeypatch.setattr(backend.model, "forward", full)
    with pytest.raises(MemoryError):
        open_session(backend).score(questions(CUTS))


def test_bf16_stays_a_tree() -> None:
    backend = tiny_backend("llama")
    backend.model.to(torch.bfloat16)
    assert cache_kind(backend) == "tree"
    requests = questions(CUTS)
    fresh = np.asarray(open_session(backend, uncached=True).score(requests))
    scan = np.asarray(open_session(backend).score(requests))
    assert np.abs(scan - fresh).max() < 0.15 * fresh.std()


def test_generation_is_untouched() -> None:
    backend = tiny_backend("gemma3")
    ids = torch.tensor([questions((60,))[0].ids])
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    before = backend.model.generate(ids, **options)
    open_session(backend).score(questions(CUTS))
    assert backend.model.config._attn_implementation == "sdpa"
    assert torch.equal(before, backend.model.generate(ids, **options))


def test_prompt_longer_than_the_context() -> None:
    backend = tiny_backend("llama", context_tokens=100)
    with pytest.raises(KitError, match=r"205 tokens.*context is 100"):
        open_session(backend).score(questions((200,)))


MEMORY = """
import json, sys, threading, time
import psutil, torch
sys.path[:0] = [{root!r}, {tests!r}]
import test_hf_session as here
from kit.backends.hf_session import open_session
torch.set_num_threads(2)
here.CONFIGS["long"] = here.transformers.LlamaConfig(**here.BASE | dict(
    hidden_size=128, num_hidden_layers=2, intermediate_size=256, max_position_embeddings=32768))
backend = here.tiny_backend("long", 32768)
cuts = (16000, 8000, 24000, 28000, 30000, 31000, 32000, 32700)
requests = [here.ScoreRequest(r.ids, r.reads[-1:]) for r in here.questions(cuts, 32700)]
session = open_session(backend)  # the self-check comes first
process, peak, running = psutil.Process(), [0], [True]
begin = process.memory_info().rss
def watch():
    while running[0]:
        peak[0] = max(peak[0], process.memory_info().rss)
        time.sleep(0.005)
thread = threading.Thread(target=watch)
thread.start()
if sys.argv[1] == "prefill":
    with torch.inference_mode():
        backend.model(torch.tensor([requests[-1].ids]), use_cache=True, logits_to_keep=1)
elif sys.argv[1] == "binary":
    for request in requests:
        session.score([request])
else:
    session.score(requests * 4)
running[0] = False
thread.join()
print(json.dumps(peak[0] - begin))
"""


@pytest.mark.slow
def test_memory_of_a_32k_trace() -> None:
    """Peak memory of judging, above what is held before, against a plain prefill's.

    Each runs in a process of its own.
    """
    here = Path(__file__).resolve()
    script = MEMORY.format(root=str(here.parents[1]), tests=str(here.parent))
    peak = {}
    for name in ("prefill", "binary", "scan"):
        command = [sys.executable, "-c", script, name]
        process = subprocess.run(command, capture_output=True, text=True, check=True)
        peak[name] = json.loads(process.stdout.splitlines()[-1])
    print(peak)
    assert peak["binary"] <= 1.25 * peak["prefill"], peak
    assert peak["scan"] <= 1.25 * peak["prefill"], peak
