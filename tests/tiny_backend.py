"""Backends of random models with few weights, one of each kind of cache, on bytes."""

from __future__ import annotations

import torch
import transformers

from kit.backends.hf import HfBackend
from kit.backends.scripted import ByteTokenizer
from kit.core.config import ModelConfig
from tests.test_hf_session import CONFIGS


def tiny_backend(name: str, context_tokens: int = 2048) -> HfBackend:
    """A real backend around one of test_hf_session's models; it ends no text by itself."""
    backend = HfBackend.__new__(HfBackend)
    torch.manual_seed(0)
    backend.model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    backend.device = torch.device("cpu")
    backend.engine = ModelConfig(model=name)
    backend.name = name
    backend.notes = []
    backend.cache_kind = None
    backend.tokenizer = ByteTokenizer()
    backend.most_tokens = None
    backend.max_rows = 8
    backend.context_tokens = context_tokens
    return backend
