"""Generation through transformers: continuous batches, one prefill for n samples, a random stream for each sample.

Weights in bf16, fp32, int8 or NF4, with or without an adapter, on one card or a CPU. Rows join a running batch where
every layer of the model keeps all keys and values; other models (sliding windows, convolutions, linear attention) run
batch after batch. Judging sessions are in kit/backends/hf_session.py.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kit.backends.base import (
    ActiveRequest,
    Completion,
    Generation,
    Request,
    ScoringSession,
    Tokenizer,
    check_stop,
    sample_seed,
    slug,
    too_long,
)
from kit.core.config import ModelConfig, Sampling

if TYPE_CHECKING:
    import torch

    from kit.backends.hf_batch import DecodeBatch, Part

FREE_SHARE = 0.7  # of free memory that caches may take when the config names no budget
HEADROOM_TOKENS = (
    256  # a row is let in when this much of its sample fits; it may have to leave again
)


class HfBackend:
    """A model in this process.

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
        self.notes: list[str] = []
        self.tokenizer = load_tokenizer(engine.model)
        self.model: Any = load_model(engine.model, engine.dtype, adapter)
        self.device: torch.device = self.model.device
        self.name = slug(engine.model)
        trained = (
            getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 4096
        )
        self.context_tokens = min(engine.context_tokens or trained, trained)

    def generate(self, requests: Sequence[Request]) -> Iterator[Generation]:
        """Yield each request's samples as they finish; prompts that leave no room come first, as errors."""
        work = Scheduler(self, requests)
        while work.finished or work.queue or any(work.rows):
            while work.finished:
                yield work.finished.popleft()
            work.advance()

    def session(self, uncached: bool = False) -> ScoringSession:
        """Open a judging session; uncached=True evaluates every probe without a cache."""
        from kit.backends.hf_session import open_session

        return open_session(self, uncached)

    def close(self) -> None:
        """Drop the weights."""
        self.model = None

    def cache_tokens(self) -> int:
        """Tokens that the KV cache of a batch may hold: in the config's budget, or in a share of what is free now."""
        from kit.core.memory import limit_bytes
        from kit.models import kv_elements

        gib, token_bytes = (
            self.engine.kv_cache_gib,
            kv_elements(self.model.config) * self.model.dtype.itemsize,
        )
        return int(gib * 2**30 if gib else limit_bytes()[1] * FREE_SHARE) // token_bytes


@dataclass(eq=False)
class _Row:
    """One sample under way."""

    job: ActiveRequest
    sample: int
    random: random.Random
    ids: list[int] = field(default_factory=list)
    seen: Any = None  # (V,) bool, the tokens of prompt and sample; with a repetition penalty only

    @property
    def sampling(self) -> Sampling:
        return self.job.request.sampling

    @property
    def tokens(self) -> tuple[int, ...]:
        """Prompt and what was drawn so far."""
        return (*self.job.request.prompt, *self.ids)

    def push(self, token: int, tokenizer: Tokenizer) -> Completion | None:
        """Take a drawn token; the sample, if it ends."""
        self.ids.append(token)
        return check_stop(self.ids, self.job.limit_tokens, self.sampling, tokenizer)

    def marked(self, like: torch.Tensor) -> torch.Tensor:
        """(V,) bool: the tokens of prompt and sample, for the repetition penalty; `like` is (V,)."""
        if self.seen is None:
            self.seen = like.new_zeros(like.shape, dtype=bool)
            self.seen[list(self.tokens)] = True
        elif self.ids:
            self.seen[self.ids[-1]] = True
        return self.seen


class Scheduler:
    """One call of generate: what waits, what runs, what is finished."""

    def __init__(self, backend: HfBackend, requests: Sequence[Request]) -> None:
        from kit.backends.hf_batch import supports_continuous_batching

        self.backend, self.model, self.tokenizer = backend, backend.model, backend.tokenizer
        self.limit, self.supports_continuous_batching, self.budget_tokens = (
            backend.engine.max_num_seqs,
            supports_continuous_batching(self.model),
            backend.cache_tokens(),
        )
        self.finished: deque[Generation] = deque()
        self.queue: deque[_Row] = (
            deque()
        )  # longest prompts first, so that a batch holds rows of like length
        self.held: tuple[list[tuple[int, ...]], DecodeBatch] | None = (
            None  # evaluated last, for its other samples
        )
        self.batch: DecodeBatch | None = None
        self.rows: list[_Row | None] = []  # of the batch; None: finished, not yet cut out
        for request in sorted(requests, key=lambda r: (-len(r.prompt), r.id)):
            self._enqueue(request)

    def advance(self) -> None:
        """Let rows in and out, and give every running sample one token."""
        import torch

        try:
            with torch.inference_mode():
                self._arrange()
                if self.batch is not None:
                    self._step()
            return
        except torch.OutOfMemoryError:
            pass  # handled below, where the traceback no longer holds the tensors
        self._shrink()

    def _enqueue(self, request: Request) -> None:
        if refused := too_long(request, self.backend.context_tokens):
            self.finished.append(refused)
            return
        room = self.backend.context_tokens - len(request.prompt)
        job = ActiveRequest(request, min(room, request.sampling.max_new_tokens))
        seeds = [sample_seed(request.seed, request.id, j) for j in range(request.n)]
        self.queue.extend(_Row(job, j, random.Random(seed)) for j, seed in enumerate(seeds))

    def _arrange(self) -> None:
        """Cut finished rows out and fill their places, once enough of them are free to be worth the copying."""
        from kit.backends.hf_batch import assemble

        live = [i for i, row in enumerate(self.rows) if row]
        if live and self.rows.count(None) < max(1, len(self.rows) // 4):
            return
        parts = [(self.batch, live)] if live else []
        self.rows = [self.rows[i] for i in live]
        joining: list[_Row] = []
        while self._fits(joining):
            joining.append(self.queue.popleft())
            self.rows.append(joining[-1])
        parts += self._evaluate(joining)
        self.batch = assemble(parts, keep=self.held and self.held[1]) if parts else None
        if not self.queue or not self.supports_continuous_batching:
            self.held = None

    def _fits(self, joining: Sequence[_Row]) -> bool:
        """Whether the first waiting row may join: there is always room for one."""
        if (
            not self.queue
            or len(self.rows) >= self.limit
            or (not self.supports_continuous_batching and len(self.rows) > len(joining))
        ):
            return False
        widest = max(len(row.tokens) for row in (self.queue[0], *self.rows)) + HEADROOM_TOKENS
        return not self.rows or (len(self.rows) + 1) * widest <= self.budget_tokens

    def _evaluate(self, joining: Sequence[_Row]) -> list[Part]:
        """Evaluate prompts, each once for all of its samples; one by one where rows may join, else padded together."""
        from kit.backends.hf_batch import prefill

        for row in joining:
            row.job.begun = row.job.begun or time.perf_counter()
        jobs = {row.tokens: row.job for row in joining}
        parts: list[Part] = []
        for group in (
            [[tokens] for tokens in jobs]
            if self.supports_continuous_batching
            else [list(jobs)]
            if jobs
            else []
        ):
            if self.held is None or self.held[0] != group:
                self.held = (group, prefill(self.model, group))
                for tokens in group:
                    jobs[tokens].prefill_tokens += len(tokens)
            parts.append(
                (self.held[1], [group.index(row.tokens) for row in joining if row.tokens in group])
            )
        return parts

    def _step(self) -> None:
        """Draw a token for every row, finish those that end, and compute what follows for the others."""
        tokens = self._draw()
        for i, row in enumerate(self.rows):
            if row and (completion := row.push(tokens[i], self.tokenizer)):
                self.rows[i] = None
                if made := row.job.finish(row.sample, completion):
                    self.finished.append(made)
        running = [row for row in self.rows if row]
        if not running:
            self.batch, self.rows = None, []
            return
        self.batch.step(self.model, tokens)
        if len(running) > 1 and self.batch.columns * len(self.rows) > self.budget_tokens:
            self._set_back(running[len(running) // 2 :])

    def _draw(self) -> list[int]:
        """The next token of every row; rows that are finished get one that nobody reads."""
        import torch

        from kit.backends.hf_batch import draw

        groups: dict[Sampling, list[int]] = {}
        for i, row in enumerate(self.rows):
            if row:
                groups.setdefault(row.sampling, []).append(i)
        tokens = [0] * len(self.rows)
        for sampling, slots in groups.items():
            rows, logits, seen = [self.rows[i] for i in slots], self.batch.logits[slots], None
            if sampling.repetition_penalty != 1:
                seen = torch.stack([row.marked(logits[0]) for row in rows])
            drawn = draw(logits, sampling, [row.random.random() for row in rows], seen)
            for i, token in zip(slots, drawn, strict=True):
                tokens[i] = token
        return tokens

    def _set_back(self, rows: Sequence[_Row]) -> None:
        """Let running samples wait again; what they have drawn stays, and is evaluated again with their prompt."""
        self.queue.extendleft(reversed(rows))
        self.rows = [None if row in rows else row for row in self.rows]

    def _shrink(self) -> None:
        """After running out of memory: half as many rows; a single one that does not fit is its request's error."""
        import torch

        running = [row for row in self.rows if row]
        self._set_back(running)
        self.batch, self.held, self.rows = None, None, []
        torch.cuda.empty_cache()
        if self.limit > 1:
            self.limit = max(1, min(self.limit, len(running)) // 2)
            self.backend.notes.append(f"Out of memory: going on with {self.limit} rows at a time.")
            return
        lost = self.queue[0].job
        self.queue = deque(row for row in self.queue if row.job is not lost)
        size = len(lost.request.prompt)
        told = f"Out of memory with one prompt of {size} tokens; try a smaller dtype, e.g. nf4."
        self.finished.append(Generation(lost.request.id, prompt_tokens=size, error=told))
