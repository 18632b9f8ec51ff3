"""Generation through transformers: continuous batches, one prefill for n samples, a random stream for each sample.

Weights in bf16, fp32, int8 or NF4, with or without an adapter, on one card or a CPU. Rows join a running batch where
the cache of the model allows it, and finished rows leave it. Judging sessions are in kit/backends/hf_session.py.
"""

from __future__ import annotations

import random
import re
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kit.backends import Completion, Finish, Generation, Request, Session, Tokenizer, looping, sample_seed
from kit.backends.sampling import draw
from kit.config import Engine, Sampling

if TYPE_CHECKING:
    from kit.backends.hf_batch import Rows

FREE_SHARE = 0.7  # of free memory that caches may take when the config names no budget
HEADROOM_TOKENS = 256  # a row is let in when this much of its sample fits; it may have to leave again
LOOP_EVERY_TOKENS = 8
SIMILAR = 1.15  # prompts are prefilled together while padding adds at most this factor


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
        self.engine = engine
        self.notes: list[str] = []
        self.tokenizer = load_tokenizer(engine.model)
        self.model: Any = load_model(engine.model, engine.dtype, adapter)
        self.device: torch.device = self.model.device
        self.name = re.sub(r"[^\w.-]+", "-", engine.model.removesuffix(".gguf")).strip("-")
        trained = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 4096
        self.context_tokens = min(engine.context_tokens or trained, trained)

    def generate(self, requests: Sequence[Request]) -> Iterator[Generation]:
        """Yield each request's samples as they finish; prompts that leave no room come first, as errors."""
        work = _Work(self, requests)
        while True:
            while work.finished:
                yield work.finished.popleft()
            if not work.left:
                return
            work.advance()

    def session(self, fresh: bool = False) -> Session:
        """Open a judging session; fresh=True evaluates every probe without a cache."""
        from kit.backends.hf_session import HfSession

        return HfSession(self, fresh=fresh)

    def close(self) -> None:
        """Drop the weights."""
        self.model = None

    def cache_budget_bytes(self) -> int:
        """Bytes that the KV caches of a batch may take: the config's, or a share of what is free now."""
        import torch

        if self.engine.memory_gib:
            return int(self.engine.memory_gib * 2**30)
        if self.device.type == "cuda":
            unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
            return int((torch.cuda.mem_get_info()[0] + unused) * FREE_SHARE)
        import psutil

        return int(psutil.virtual_memory().available * FREE_SHARE)

    def cache_bytes_per_token(self) -> int:
        """Bytes that one token of one row takes in the KV cache."""
        config = self.model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return 2 * config.num_hidden_layers * heads * width * (4 if self.model.dtype.itemsize == 4 else 2)


@dataclass
class _Ask:
    """A request under way."""

    request: Request
    sampling: Sampling
    begun: float = 0.0
    evaluated_tokens: int = 0
    done: dict[int, Completion] = field(default_factory=dict)


@dataclass
class _Row:
    """One sample under way."""

    ask: _Ask
    sample: int
    limit: int  # new tokens that it may have
    random: random.Random
    ids: list[int] = field(default_factory=list)

    @property
    def sampling(self) -> Sampling:
        return self.ask.sampling

    @property
    def tokens(self) -> list[int]:
        """Prompt and what was drawn so far."""
        return [*self.ask.request.prompt, *self.ids]

    def push(self, token: int, tokenizer: Tokenizer) -> Finish | None:
        """Take a drawn token; how the sample ends, if it does. A stop string is cut off, with all that follows it."""
        if token in tokenizer.eos_ids:
            return "stop"
        self.ids.append(token)
        if self.sampling.stop and self._cut(tokenizer):
            return "stop"
        if self.sampling.stop_loops and len(self.ids) % LOOP_EVERY_TOKENS == 0 and looping(self.ids):
            return "loop"
        return "length" if len(self.ids) >= self.limit else None

    def _cut(self, tokenizer: Tokenizer) -> bool:
        """Whether a stop string stands at the end; if so the sample ends right before it."""
        stops = self.sampling.stop
        tail = max(len(stop.encode()) for stop in stops) + 4  # a token holds at least one byte
        if not any(stop in tokenizer.decode(self.ids[-tail:]) for stop in stops):
            return False
        text = tokenizer.decode(self.ids)
        text = text[: min(text.find(stop) for stop in stops if stop in text)]
        whole = len(self.ids)
        while whole and not text.startswith(tokenizer.decode(self.ids[:whole])):
            whole -= 1
        kept = tokenizer.decode(self.ids[:whole])
        self.ids = self.ids[:whole] + tokenizer.encode(text[len(kept) :], special=False)
        return True


class _Work:
    """One call of generate: what waits, what runs, what is finished.

    Samples of one prompt wait together until their prompt is evaluated; the evaluated prompts (`held`) are kept until
    the last of their samples has joined the batch.
    """

    def __init__(self, backend: HfBackend, requests: Sequence[Request]) -> None:
        from kit.backends.hf_batch import joins

        self.backend, self.tokenizer = backend, backend.tokenizer
        self.limit, self.joins = backend.engine.parallel, joins(backend.model)
        self.token_bytes, self.budget = backend.cache_bytes_per_token(), backend.cache_budget_bytes()
        self.finished: deque[Generation] = deque()
        self.queue: deque[list[_Row]] = deque()
        self.held: Rows | None = None
        self.waiting: deque[tuple[int, _Row]] = deque()  # (row of held, sample)
        self.batch: Rows | None = None
        self.rows: list[_Row | None] = []  # of the batch; None: finished, not yet cut out
        self.seen: Any = None  # (B, V) bool, with a repetition penalty only
        self.samplings: dict[Sampling, Sampling] = {}  # equal settings as one object
        for request in sorted(requests, key=lambda r: (-len(r.prompt), r.id)):
            self._enqueue(request)

    @property
    def left(self) -> bool:
        """Whether anything is not finished."""
        return bool(self.queue or self.waiting or any(self.rows))

    def advance(self) -> None:
        """Let rows in and out, and give every running sample one token."""
        import torch

        try:
            with torch.inference_mode():
                self._arrange()
                self._step()
            return
        except torch.OutOfMemoryError:
            pass  # handled below, where the traceback no longer holds the tensors
        self._shrink()

    def _enqueue(self, request: Request) -> None:
        room = self.backend.context_tokens - len(request.prompt)
        if room < 1 or not request.prompt:
            told = f"The prompt has {len(request.prompt)} tokens, the context {self.backend.context_tokens}."
            self.finished.append(Generation(request.id, prompt_tokens=len(request.prompt), error=told))
            return
        ask = _Ask(request, self.samplings.setdefault(request.sampling, request.sampling))
        limit = min(room, request.sampling.max_new_tokens)
        seeds = [sample_seed(request.seed, request.id, j) for j in range(request.n)]
        self.queue.append([_Row(ask, j, limit, random.Random(seed)) for j, seed in enumerate(seeds)])

    def _arrange(self) -> None:
        """Cut finished rows out and fill their places, once enough of them are free to be worth the copying."""
        from kit.backends.hf_batch import assemble

        live = [i for i, row in enumerate(self.rows) if row is not None]
        some = max(1, self.limit // 4)
        free, gone = self.limit - len(live), len(self.rows) - len(live)
        parts = [(self.batch, live)] if live else []
        if (self.queue or self.waiting) and (not live or (self.joins and free >= some)):
            while free > 0 and (self.waiting or self._prefill(free)):
                took = [self.waiting.popleft() for _ in range(min(free, len(self.waiting)))]
                parts.append((self.held, [i for i, _ in took]))
                self.rows += [row for _, row in took]
                free -= len(took)
                if not self.joins:
                    break
        if len(parts) > bool(live) or gone >= some:
            self.rows = [row for row in self.rows if row is not None]
            self.batch = assemble(parts, keep=bool(self.waiting))
            self._note_seen()
        if not self.waiting:
            self.held = None

    def _prefill(self, free: int) -> bool:
        """Evaluate waiting prompts of similar length; False where the budget has no room for one more row."""
        from kit.backends.hf_batch import prefill

        group: list[list[_Row]] = []
        total = count = 0
        while self.queue and count < free:
            size = len(self.queue[0][0].tokens)
            widest = max([size, *(len(rows[0].tokens) for rows in group)])
            if group and self.joins and widest * (len(group) + 1) > SIMILAR * (total + size):
                break
            columns = max(widest, self.batch.columns if self.batch else 0) + HEADROOM_TOKENS
            busy = len(self.rows) + count + min(len(self.queue[0]), free - count)
            if (group or self.rows) and busy * columns * self.token_bytes > self.budget:
                break
            group.append(self.queue.popleft())
            total, count = total + size, count + len(group[-1])
        if not group:
            return False
        begun = time.perf_counter()
        try:
            self.held = prefill(self.backend.model, [rows[0].tokens for rows in group])
        except BaseException:
            self.queue.extendleft(reversed(group))
            raise
        for i, rows in enumerate(group):
            rows[0].ask.begun = rows[0].ask.begun or begun
            rows[0].ask.evaluated_tokens += len(rows[0].tokens)
            self.waiting.extend((i, row) for row in rows)
        return True

    def _note_seen(self) -> None:
        """Mark the tokens of every row, where a repetition penalty asks for it."""
        import torch

        self.seen = None
        if self.batch is not None and any(row and row.sampling.repetition_penalty != 1 for row in self.rows):
            self.seen = torch.zeros_like(self.batch.logits, dtype=torch.bool)
            for i, row in enumerate(self.rows):
                if row is not None:
                    self.seen[i, torch.tensor(row.tokens, device=self.seen.device)] = True

    def _step(self) -> None:
        """Draw a token for every row, finish those that end, and compute what follows for the others."""
        import torch

        tokens = self._draw()
        for i, row in enumerate(self.rows):
            if row is not None and (finish := row.push(tokens[i], self.tokenizer)):
                self.rows[i] = None
                self._finish(row, finish)
        if not any(self.rows):
            self.batch, self.rows = None, []
            return
        if self.seen is not None:
            self.seen[torch.arange(len(tokens)), torch.tensor(tokens)] = True
        self.batch.step(self.backend.model, tokens)
        running = [row for row in self.rows if row is not None]
        if len(running) > 1 and self.batch.columns * len(self.rows) * self.token_bytes > self.budget:
            self._set_back(running[len(running) // 2 :])

    def _draw(self) -> list[int]:
        """The next token of every row; rows that are finished get one that nobody reads."""
        groups: dict[int, list[int]] = {}
        for i, row in enumerate(self.rows):
            if row is not None:
                groups.setdefault(id(row.sampling), []).append(i)
        tokens = [0] * len(self.rows)
        for chosen in groups.values():
            sampling = self.rows[chosen[0]].sampling
            whole = len(chosen) == len(self.rows)
            logits = self.batch.logits if whole else self.batch.logits[chosen]
            seen = None if self.seen is None else self.seen if whole else self.seen[chosen]
            greedy = sampling.temperature == 0
            uniforms = [] if greedy else [self.rows[i].random.random() for i in chosen]
            for i, token in zip(chosen, draw(logits, sampling, uniforms, seen), strict=True):
                tokens[i] = token
        return tokens

    def _finish(self, row: _Row, finish: Finish) -> None:
        """Keep a finished sample; the last one of its request makes the result."""
        ask, request = row.ask, row.ask.request
        ask.done[row.sample] = Completion(self.tokenizer.decode(row.ids), tuple(row.ids), finish)
        if len(ask.done) == request.n:
            samples = tuple(ask.done[j] for j in range(request.n))
            seconds = time.perf_counter() - ask.begun
            self.finished.append(
                Generation(request.id, samples, len(request.prompt), ask.evaluated_tokens, round(seconds, 3))
            )

    def _set_back(self, rows: Sequence[_Row]) -> None:
        """Let running samples wait again; what they have drawn stays, and is evaluated again with their prompt."""
        same: dict[int, list[_Row]] = {}
        for row in rows:
            same.setdefault(id(row) if row.ids else id(row.ask), []).append(row)
        self.queue.extendleft(reversed(same.values()))
        self.rows = [None if row in rows else row for row in self.rows]

    def _shrink(self) -> None:
        """After running out of memory: half as many rows; a single one that does not fit is its request's error."""
        import torch

        running = [row for row in self.rows if row is not None] + [row for _, row in self.waiting]
        self._set_back(running)
        self.waiting.clear()
        self.batch, self.held, self.seen, self.rows = None, None, None, []
        torch.cuda.empty_cache()
        if self.limit > 1:
            self.limit = max(1, min(self.limit, len(running) or self.limit) // 2)
            self.backend.notes.append(f"Out of memory: going on with {self.limit} rows at a time.")
            return
        lost = self.queue[0][0].ask
        self.queue = deque(rows for rows in self.queue if rows[0].ask is not lost)
        told = f"Out of memory with one prompt of {len(lost.request.prompt)} tokens; try a smaller dtype, e.g. nf4."
        self.finished.append(Generation(lost.request.id, prompt_tokens=len(lost.request.prompt), error=told))
