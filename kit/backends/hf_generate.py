"""The scheduler of generation: which rows wait, which run together, and when a sample ends.

Every sample is a row with a random generator of its own; n samples of a prompt share its prefill.
Rows join a running batch where every layer of the model keeps all keys and values; other models
(sliding windows, convolutions, linear attention) run batch after batch. Serves every stage that
generates (sections 3.1 and 3.3 of the paper). What a batch computes is in hf_batch.py.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from kit.backends.base import (
    ActiveSample,
    Generation,
    Ids,
    Request,
    Trunk,
    common_prefix_len,
    samples_of,
)
from kit.backends.hf_batch import (
    ROOM_TOKENS,
    DecodeBatch,
    Part,
    assemble,
    draw,
    prefill,
    supports_continuous_batching,
)
from kit.backends.hf_graphs import GRAPH_ROOM_TOKENS
from kit.core.config import Sampling
from kit.core.memory import is_out_of_memory

if TYPE_CHECKING:
    from kit.backends.hf import HfBackend

UNSHARED = (
    "generated verdicts and continuations: this cache cannot be shared; every prompt is prefilled "
    "whole"
)
HEADROOM_TOKENS = 256  # a row is admitted when this much of its sample fits; it may have to leave


class Scheduler:
    """One call of generate."""

    def __init__(self, backend: HfBackend, requests: Sequence[Request]) -> None:
        self.backend = backend
        self.model = backend.model
        self.budget_tokens = backend.cache_tokens()  # that rows may hold together
        self.proven_tokens = self.budget_tokens  # with which a step succeeded
        self.continuous = supports_continuous_batching(self.model)
        self.graphs = backend.graphs() if self.continuous else None
        self.room_tokens = GRAPH_ROOM_TOKENS if self.graphs else ROOM_TOKENS
        # Longest prompts first, so that the rows of a batch have similar lengths.
        ordered = sorted(requests, key=lambda request: (-len(request.prompt), request.id))
        self.queue, self.finished = samples_of(ordered, backend.context_tokens, random.Random)
        self.rows: dict[int, ActiveSample] = {}  # running, by their place in the batch
        self.joining: list[ActiveSample] = []  # taken from the queue, not running yet
        self.batch: DecodeBatch | None = None
        self.trunk: Trunk | None = None
        if requests and requests[0].trunk:
            if self.continuous:
                self.trunk = requests[0].trunk
            elif UNSHARED not in backend.notes:
                backend.notes.append(UNSHARED)
        # The prompts evaluated last and their states, for further samples of them.
        self.prompts: list[Ids] = []
        self.prefilled: DecodeBatch | None = None

    def run(self) -> Iterator[Generation]:
        """Yield each request's result as it finishes."""
        while self.finished or self.queue or self.rows:
            while self.finished:
                yield self.finished.popleft()
            self._advance()

    @property
    def places(self) -> int:
        """Of the batch; the rows of some have ended."""
        return len(self.batch.starts) if self.batch else 0

    def _advance(self) -> None:
        """Admit waiting rows, then draw one token for every running row."""
        try:
            with torch.inference_mode():
                self._admit()
                self._clear_out()
                self._decode()
            # So much fits; the next call of generate begins with it.
            if self.budget_tokens < self.proven_tokens:
                self.proven_tokens = self.backend.most_tokens = self.budget_tokens
            return
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            # Handled after this block, where the traceback no longer holds the tensors.
        self._shrink()

    def _clear_out(self) -> None:
        """Copy the cache without empty places if they are many, or if it must be copied anyway."""
        if self.batch is None:
            return
        empty = self.places - len(self.rows)
        over_budget = self.batch.columns * self.places > self.budget_tokens
        if self.batch.free_columns == 0 or 4 * empty > self.places or (empty and over_budget):
            self._assemble()

    def _admit(self) -> None:
        """Prefill waiting rows while they fit, draw their first tokens, and let them join."""
        while self._fits():
            self.joining.append(self.queue.popleft())
        if not self.joining:
            return

        # Rows are prefilled one by one where they can join a batch, else padded together.
        groups = [[row] for row in self.joining] if self.continuous else [self.joining]
        parts = []
        rows = []
        for group in groups:
            prefilled = self._prefill(group)
            prompt_rows = [self.prompts.index(row.tokens) for row in group]
            going_on = self._draw(dict(enumerate(group)), prefilled.logits[prompt_rows])
            if going_on:
                parts.append(Part(prefilled, [prompt_rows[index] for index in going_on]))
                rows += [group[index] for index in going_on]
        self._join(parts, rows)

        self.joining = []
        if not self.queue or not self.continuous:
            self.prefilled = None

    def _fits(self) -> bool:
        """Whether the first waiting row can join; there is always room for one row."""
        rows = [*self.rows.values(), *self.joining]
        if not self.queue or len(rows) >= self.backend.max_rows:
            return False
        if not rows:
            return True
        if self.batch is not None and not self.continuous:
            return False
        longest = max(len(row.tokens) for row in (self.queue[0], *rows))
        places = max(len(rows) + 1, self.places)
        return places * (longest + HEADROOM_TOKENS) <= self.budget_tokens

    def _join(self, parts: Sequence[Part], rows: Sequence[ActiveSample]) -> None:
        """Let new rows run: in the places of ended ones if they fit there, else in a new batch."""
        empty_places = [place for place in range(self.places) if place not in self.rows]
        longest = max((int(part.lengths.max()) for part in parts), default=0)
        if self.batch is None or len(rows) > len(empty_places) or longest > self.batch.columns:
            self._assemble(parts, rows)
            return
        self.rows.update(zip(empty_places, rows, strict=False))
        for part in parts:
            self.batch.put(empty_places[: len(part.rows)], part)
            del empty_places[: len(part.rows)]

    def _assemble(self, parts: Sequence[Part] = (), rows: Sequence[ActiveSample] = ()) -> None:
        """Make a new batch, of the running rows and of new ones, without ended ones."""
        running = sorted(self.rows)
        self.rows = dict(enumerate([*(self.rows[place] for place in running), *rows]))
        parts = list(parts)
        if running and self.batch is not None:
            parts.insert(0, Part(self.batch, running))
        if self.graphs:
            self.graphs.drop()
        self.batch = assemble(parts, self.prefilled, self.room_tokens) if parts else None

    def _prefill(self, rows: Sequence[ActiveSample]) -> DecodeBatch:
        """Evaluate rows' tokens, each distinct prompt once; the last prompts' states are reused."""
        now = time.perf_counter()
        for row in rows:
            row.active.begun = row.active.begun or now
        by_prompt = {row.tokens: row for row in rows}
        prompts = list(by_prompt)
        if self.prefilled is None or prompts != self.prompts:
            self.prefilled = None
            trunk = self.trunk or Trunk()
            # Rows that share a trunk come one by one. The last token's logits are needed.
            shared_tokens = common_prefix_len(trunk.ids, prompts[0][:-1])
            self.prefilled = prefill(self.model, prompts, trunk.state, shared_tokens)
            if len(prompts[0]) > len(trunk.ids):
                trunk.ids = prompts[0]
                # A list of its own: `assemble` empties that of a batch.
                trunk.state = [*self.prefilled.cache.layers]
            self.prompts = prompts
            for prompt, row in by_prompt.items():
                row.active.prefill_tokens += len(prompt) - shared_tokens
        return self.prefilled

    def _decode(self) -> None:
        """Compute what follows every running row's last token, and draw from it."""
        if self.batch is None:
            return
        self._step(self.batch)
        going_on = self._draw(self.rows, self.batch.logits)

        # Past the budget, a row waits again: the one that takes least to evaluate anew.
        if len(going_on) > 1 and self.batch.columns * len(going_on) > self.budget_tokens:
            shortest = min(going_on, key=lambda place: len(self.rows[place].tokens))
            self.queue.appendleft(self.rows[shortest])
            going_on.remove(shortest)
        leaving = sorted(self.rows.keys() - going_on)
        for place in leaving:
            del self.rows[place]
        if not self.rows:
            self._assemble()
        elif leaving:
            self.batch.vacate(leaving)

    def _step(self, batch: DecodeBatch) -> None:
        """Append every row's last token and compute the logits after it."""
        # A row that has ended takes any token: its place is cheaper to keep than to take out.
        tokens = [0] * self.places
        for place, row in self.rows.items():
            tokens[place] = row.ids[-1]
        if self.graphs is None:
            batch.step(self.model, tokens)
            return
        most_steps = max(row.active.limit_tokens - len(row.ids) for row in self.rows.values())
        self.graphs.step(batch, tokens, most_steps)

    def _draw(self, rows: Mapping[int, ActiveSample], logits: torch.Tensor) -> list[int]:
        """Draw each row's next token from logits (B, V), and finish the rows that end with it.

        Args:
            rows: by their index among the B.

        Returns:
            Indices of the rows that go on.
        """
        by_sampling: dict[Sampling, list[tuple[int, ActiveSample]]] = {}
        for index, row in sorted(rows.items()):
            by_sampling.setdefault(row.active.request.sampling, []).append((index, row))

        going_on = []
        for sampling, chosen in by_sampling.items():
            seen = None
            if sampling.repetition_penalty != 1:
                seen = torch.stack([_mark_seen(row, logits[index]) for index, row in chosen])
            uniforms = [row.uniform() for _, row in chosen]
            tokens = draw(logits[[index for index, _ in chosen]], sampling, uniforms, seen)
            for (index, row), token in zip(chosen, tokens, strict=True):
                if row.push(token, self.backend.tokenizer):
                    self.finished.extend(row.active.result())
                else:
                    going_on.append(index)
        return sorted(going_on)

    def _shrink(self) -> None:
        """After running out of memory: half as many tokens, so that short rows stay many.

        Running rows wait again with what they have drawn. A single row that does not fit is its
        request's error.
        """
        # where the memory ran out while new rows joined, they are in both
        rows = dict.fromkeys((*self.rows.values(), *self.joining))
        waiting = [row for row in rows if row.number not in row.active.done]
        self.queue.extendleft(reversed(waiting))
        self.rows = {}
        self.joining = []
        self._assemble()
        self.prefilled = None
        if self.trunk:
            self.trunk.ids = ()
            self.trunk.state = None
        torch.cuda.empty_cache()
        if len(waiting) > 1:
            longest = max(len(row.tokens) for row in waiting)
            self.budget_tokens = len(waiting) // 2 * (longest + HEADROOM_TOKENS)
            note = f"Out of memory: going on with {self.budget_tokens} tokens at a time."
            self.backend.notes.append(note)
            return
        # What does not fit alone says nothing about how many others do.
        self.budget_tokens = self.proven_tokens
        failed = self.queue[0].active
        self.queue = deque(row for row in self.queue if row.active is not failed)
        size = len(failed.request.prompt)
        error = f"Out of memory with one prompt of {size} tokens; try a smaller dtype, e.g. nf4."
        self.finished.append(Generation(failed.request.id, prompt_tokens=size, error=error))


def _mark_seen(row: ActiveSample, logits: torch.Tensor) -> torch.Tensor:
    """(V,) bool: tokens of prompt and sample, which a repetition penalty makes less likely.

    Called before every draw, so only the last token is new. `logits` (V,) give the shape.
    """
    if row.seen is None:
        row.seen = torch.zeros_like(logits, dtype=torch.bool)
        row.seen[list(row.tokens)] = True
    else:
        row.seen[row.ids[-1]] = True
    return row.seen
