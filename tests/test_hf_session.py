"""Cached readings equal uncached ones, whatever the architecture; tiny models with random weights."""

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
import transformers as t

from kit.backends.base import ScoreRequest
from kit.backends.base import hf_attention as attention
from kit.backends.base import hf_session as sessions
from kit.backends.hf_session import cache_kind, open_session
from kit.core.errors import KitError

BASE = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
BASE |= {"num_key_value_heads": 2, "initializer_range": 0.25, "max_position_embeddings": 2048}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
EXPERTS |= {
    "shared_expert_intermediate_size": 32,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
}
EXPERTS |= {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "head_dim": 16,
    "num_hidden_layers": 4,
}
EVERY = tuple(range(320))


def _model(name: str) -> Any:
    torch.manual_seed(0)
    if name == "llama":
        return t.LlamaForCausalLM(t.LlamaConfig(**BASE))
    if name == "qwen2":
        return t.Qwen2ForCausalLM(t.Qwen2Config(**BASE))
    if name == "qwen3":
        return t.Qwen3ForCausalLM(t.Qwen3Config(**BASE, head_dim=16))
    if name == "granite":  # scales its logits
        return t.GraniteForCausalLM(t.GraniteConfig(**BASE, logits_scaling=4.0))
    if name == "mistral":
        return t.MistralForCausalLM(t.MistralConfig(**BASE, head_dim=16, sliding_window=40))
    if name == "gemma3":
        keys = {
            **BASE,
            "num_hidden_layers": 6,
            "head_dim": 16,
            "sliding_window": 40,
            "sliding_window_pattern": 3,
        }
        return t.Gemma3ForCausalLM(t.Gemma3TextConfig(**keys))
    if name == "gemma2":
        return t.Gemma2ForCausalLM(t.Gemma2Config(**BASE, head_dim=16, sliding_window=40))
    if name == "qwen3-next":
        return t.Qwen3NextForCausalLM(
            t.Qwen3NextConfig(**BASE | EXPERTS | {"initializer_range": 0.12})
        )
    keys = {
        "vocab_size": 320,
        "hidden_size": 64,
        "state_size": 8,
        "num_hidden_layers": 3,
        "initializer_range": 0.25,
    }
    return t.MambaForCausalLM(t.MambaConfig(**keys))


def backend(model: Any, context_tokens: int = 2048) -> Any:
    """What a session needs of a backend."""
    fields = {
        "model": model.eval(),
        "device": torch.device("cpu"),
        "context_tokens": context_tokens,
        "notes": [],
    }
    return SimpleNamespace(**fields)


def probes(cuts: tuple[int, ...], length: int = 420) -> list[ScoreRequest]:
    """Questions on one random trace: its first c tokens and a closing turn, read at three places."""
    ids = np.random.default_rng(1).integers(10, 310, length).tolist()
    found = [(*ids[:c], 5, 6, 7 + c % 2, 8, 9) for c in cuts]
    return [
        ScoreRequest(p, tuple((i, EVERY) for i in (len(p) - 4, len(p) - 2, len(p) - 1)))
        for p in found
    ]


CUTS = (210, 105, 315, 300, 310, 52, 53, 420, 1)
KINDS = {
    "llama": "tree",
    "qwen2": "tree",
    "qwen3": "tree",
    "granite": "tree",
    "mistral": "tree",
    "gemma3": "tree",
}
KINDS |= {"gemma2": "snapshots", "qwen3-next": "snapshots", "mamba": "none"}


@pytest.mark.parametrize("name", KINDS)
def test_cached_equals_fresh(name: str) -> None:
    own = backend(_model(name))
    assert cache_kind(own) == KINDS[name], own.notes
    assert bool(own.notes) == (KINDS[name] != "tree")
    asked = probes(CUTS)
    fresh = np.asarray(open_session(own, uncached=True).score(asked))
    assert fresh.std() > 0.4  # differences of a broken cache would be large
    one_by_one = open_session(own, chunk_tokens=64)
    assert np.abs(np.asarray([one_by_one.score([p])[0] for p in asked]) - fresh).max() < 5e-4
    scan = open_session(own, chunk_tokens=150)
    scan.score(asked[:1])  # a scan may follow a question
    scan.score(
        [ScoreRequest((*asked[1].ids[:80], *asked[2].ids[90:280]), ((150, EVERY),))]
    )  # a long branch becomes the trunk
    assert np.abs(np.asarray(scan.score(asked)) - fresh).max() < 5e-4
    if KINDS[name] == "tree":
        whole = sum(len(p.ids) for p in asked)
        assert one_by_one.cost.prefill_tokens <= 425 + 6 * len(
            CUTS
        )  # the trace once, and each closing turn
        assert one_by_one.cost.prefill_tokens + one_by_one.cost.cached_tokens == whole


def test_never_past_the_furthest_boundary() -> None:
    own = backend(_model("llama"))
    session = open_session(own)
    for probe in probes((210, 105, 52, 78)):
        session.score([probe])
    assert session.cost.prefill_tokens <= 215 + 3 * 5


@pytest.mark.parametrize("tear", ["branch", "window", "cut"])
def test_self_check_finds_a_broken_cache(tear: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Break the mechanism in three ways; none may pass for a tree."""
    if tear == "branch":  # what another probe wrote there is taken for this one's
        monkeypatch.setattr(sessions, "common", lambda held, ids: min(len(held), len(ids)))
    elif tear == "window":
        whole = attention.Layout.mask
        monkeypatch.setattr(attention.Layout, "mask", lambda *given: whole(*given[:3], window=4096))
    else:
        begin = attention.Layout.__init__
        monkeypatch.setattr(
            attention.Layout,
            "__init__",
            lambda own, past, cuts, *rest: begin(own, past, [c - (c < past) for c in cuts], *rest),
        )
    own = backend(_model("mistral"))
    assert cache_kind(own) != "tree"
    assert "moved by" in own.notes[0]


def test_bf16_stays_a_tree() -> None:
    own = backend(_model("llama").to(torch.bfloat16))
    assert cache_kind(own) == "tree"
    asked = probes(CUTS)
    fresh, scan = (
        np.asarray(s.score(asked)) for s in (open_session(own, uncached=True), open_session(own))
    )
    assert np.abs(scan - fresh).max() < 0.15 * fresh.std()


def test_generation_is_untouched() -> None:
    own = backend(_model("gemma3"))
    ids = torch.tensor([probes((60,))[0].ids])
    before = own.model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
    open_session(own).score(probes(CUTS))
    assert own.model.config._attn_implementation == "sdpa"
    assert torch.equal(
        before, own.model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
    )


def test_prompt_longer_than_the_context() -> None:
    own = backend(_model("llama"), context_tokens=100)
    with pytest.raises(KitError, match=r"205 tokens.*context 100"):
        open_session(own).score(probes((200,)))


MEMORY = """
import json, os, sys, threading, time
import psutil, torch
sys.path[:0] = [{root!r}, {tests!r}]
import test_hf_session as here
from kit.backends.hf_session import open_session
torch.set_num_threads(2)
keys = here.BASE | dict(hidden_size=128, num_hidden_layers=2, intermediate_size=256, max_position_embeddings=32768)
model = here.t.LlamaForCausalLM(here.t.LlamaConfig(**keys)).eval()
own = here.backend(model, 32768)
cuts = (16000, 8000, 24000, 28000, 30000, 31000, 32000, 32700)
asked = [here.Probe(p.ids, p.reads[-1:]) for p in here.probes(cuts, 32700)]
session = open_session(own)  # the self-check comes first
me, peak, running = psutil.Process(), [0], [True]
begin = me.memory_info().rss
def watch():
    while running[0]:
        peak[0] = max(peak[0], me.memory_info().rss)
        time.sleep(0.005)
thread = threading.Thread(target=watch)
thread.start()
if sys.argv[1] == "prefill":
    with torch.inference_mode():
        model(torch.tensor([asked[-1].ids]), use_cache=True, logits_to_keep=1)
elif sys.argv[1] == "binary":
    for probe in asked:
        session.score([probe])
else:
    session.score(asked * 4)
running[0] = False
thread.join()
print(json.dumps(peak[0] - begin))
"""


@pytest.mark.slow
def test_memory_of_a_32k_trace() -> None:
    """Peak memory of judging, above what is held before, against a plain prefill's; each in a process of its own."""
    here = Path(__file__).resolve()
    script = MEMORY.format(root=str(here.parents[1]), tests=str(here.parent))
    peak = {}
    for name in ("prefill", "binary", "scan"):
        out = subprocess.run(
            [sys.executable, "-c", script, name], capture_output=True, text=True, check=True
        )
        peak[name] = json.loads(out.stdout.splitlines()[-1])
    print(peak)
    assert peak["binary"] <= 1.25 * peak["prefill"], peak
    assert peak["scan"] <= 1.25 * peak["prefill"], peak
