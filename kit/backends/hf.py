"""Generation through transformers: batches by length, one prefill for n samples, a generator of its own for each.

Weights in bf16, fp32, int8 or NF4, with or without an adapter, on one card or a CPU. Judging sessions are in
kit/backends/hf_session.py.
"""

from __future__ import annotations

import re
from typing import Any

from kit.backends import Session
from kit.config import Engine


class HfBackend:
    """A model in this process.

    Args:
        engine: names the model, its dtype and the limits.
        adapter: a PEFT adapter's folder, applied to the model.

    Raises:
        KitError: the model or the adapter does not load; see kit.models.
    """

    concurrent = 1

    def __init__(self, engine: Engine, adapter: str | None = None) -> None:
        import torch

        from kit.models import load_model, load_tokenizer

        if engine.threads:
            torch.set_num_threads(engine.threads)
        self.engine, self.notes = engine, []
        self.tokenizer = load_tokenizer(engine.model)
        self.model: Any = load_model(engine.model, engine.dtype, adapter)
        self.device: torch.device = self.model.device
        self.name = re.sub(r"[^\w.-]+", "-", engine.model.removesuffix(".gguf")).strip("-")
        trained = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 4096
        self.context_tokens = min(engine.context_tokens or trained, trained)

    def session(self, fresh: bool = False) -> Session:
        """Open a judging session; fresh=True evaluates every probe without a cache."""
        from kit.backends.hf_session import HfSession

        return HfSession(self, fresh=fresh)

    def close(self) -> None:
        """Drop the weights."""
        self.model = None
