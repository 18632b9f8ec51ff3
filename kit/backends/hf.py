"""A transformers model in this process, in bf16, fp32, int8 or NF4, with or without an adapter.

One card or a CPU. Generation (sections 3.1 and 3.3 of the paper) is in hf_generate.py, judging
(section 3.2) in hf_session.py; both load torch only when they are used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from kit.backends.base import Generation, Request, ScoringSession, slug
from kit.core.config import ModelConfig

if TYPE_CHECKING:
    import torch

FREE_RATIO = 0.7  # of free memory that caches may take when the config names no budget


class HfBackend:
    """A loaded model.

    Args:
        engine: names the model, its dtype and the limits.
        adapter: a PEFT adapter's folder, applied to the model.

    Raises:
        KitError: the model or the adapter does not load; see kit.models.
    """

    def __init__(self, engine: ModelConfig, adapter: str | None = None) -> None:
        import torch

        from kit.models import load_model, load_tokenizer

        if engine.n_threads:
            torch.set_num_threads(engine.n_threads)
        self.engine = engine
        self.name = slug(engine.model)
        self.notes: list[str] = []
        self.cache_kind: str | None = None  # set by the first judging session, see hf_session
        self.tokenizer = load_tokenizer(engine.model)
        self.model: Any = load_model(engine.model, engine.dtype, adapter)
        self.device: torch.device = self.model.device
        text_config = self.model.config.get_text_config()
        trained_tokens = getattr(text_config, "max_position_embeddings", None) or 4096
        self.context_tokens = min(engine.context_tokens or trained_tokens, trained_tokens)

    def generate(self, requests: Sequence[Request]) -> Iterator[Generation]:
        """Yield each request's samples as they finish; prompts without room come first, as errors.

        Running out of memory halves the number of rows, and a note says so.
        """
        from kit.backends.hf_generate import Scheduler

        return Scheduler(self, requests).run()

    def session(self, uncached: bool = False) -> ScoringSession:
        """Open a judging session; uncached=True evaluates every prompt from its first token."""
        from kit.backends.hf_session import open_session

        return open_session(self, uncached)

    def close(self) -> None:
        """Drop the weights."""
        self.model = None

    def cache_tokens(self) -> int:
        """Tokens that a batch's cache may hold: the config's budget, or a share of free memory."""
        from kit.core.memory import limit_bytes
        from kit.models import kv_elements

        budget_bytes = limit_bytes()[1] * FREE_RATIO
        if self.engine.kv_cache_gib:
            budget_bytes = self.engine.kv_cache_gib * 2**30
        token_bytes = kv_elements(self.model.config) * self.model.dtype.itemsize
        return int(budget_bytes) // token_bytes
