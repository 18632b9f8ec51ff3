"""Judging over HTTP: each read is the log-probabilities of one generated token, its prompt's beginning taken from the
server's prefix cache.

Candidates are told apart by token id, never by text. Prompt log-probabilities are not used: vLLM computes them past its
cache. Which probes are asked, and what a margin means, is in kit/search.py and kit/judge.py.
"""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections.abc import Sequence
from typing import Any

from kit.backends import Cost, Probe, Readings
from kit.backends.http import HttpBackend, Refused
from kit.errors import KitError

TOP = 20  # log-probabilities asked for; vLLM's default limit
ALL = 1 << 20  # more than any vocabulary; llama-server tells as many as there are
_sessions = itertools.count()


class HttpSession:
    """Reads of one trace's probes; several sessions may be open at once, each in a thread of its own.

    Args:
        backend: a connected backend.
        fresh: have every probe evaluated from its first token.
    """

    def __init__(self, backend: HttpBackend, fresh: bool = False) -> None:
        self.backend, self.fresh, self.cost = backend, fresh, Cost()
        self._slot = next(_sessions) % backend.concurrent  # llama-server's cache is a slot's: stay in one

    def read(self, probes: Sequence[Probe]) -> list[Readings]:
        """Read probes, the longest first, which fills the cache; the others then at once, or, in the one slot of
        llama-server, from the longest to the shortest.

        Returns:
            Natural-log probabilities, [probe][read][candidate].

        Raises:
            KitError: the server is gone, refuses a prompt, or tells no candidate's value.
        """
        return self.backend.run(self._read(probes))

    def close(self) -> None:
        """Nothing to free: the cache is the server's."""

    async def _read(self, probes: Sequence[Probe]) -> list[Readings]:
        found: list[Readings] = [[[] for _ in probe.reads] for probe in probes]

        async def one(probe: int, read: int) -> None:
            """Put one read's values in their place."""
            ids, (position, candidates) = probes[probe].ids, probes[probe].reads[read]
            found[probe][read] = await self._values(ids[: position + 1], candidates)

        places = [(i, j) for i, probe in enumerate(probes) for j in range(len(probe.reads))]
        places.sort(key=lambda place: -probes[place[0]].reads[place[1]][0])
        width = 1 if self.backend.llama else max(len(places), 1)
        for some in (places[:1], *(places[i : i + width] for i in range(1, len(places), width))):
            results = await asyncio.gather(*(one(*place) for place in some), return_exceptions=True)
            for failure in filter(None, results):
                raise failure
        return found

    async def _values(self, prompt: Sequence[int], candidates: Sequence[int]) -> list[float]:
        """Log-probabilities of the candidates after a prompt."""
        backend = self.backend
        known = await self._told(prompt, candidates, TOP)
        if backend.llama and not known.keys() >= set(candidates):  # the rare label that is far from likely
            known = await self._told(prompt, candidates, ALL)
        if not known.keys() & set(candidates):
            raise KitError(
                f"{backend.root} tells no log-probability of the tokens asked for, by their ids.",
                "Judge with backend=hf or gguf, or serve the model with a newer vLLM or with llama-server.",
            )
        if not known.keys() >= set(candidates):
            backend.note(f"labels beyond the {TOP} likeliest tokens got the last one's value, an upper bound")
        return [known.get(candidate, min(known.values())) for candidate in candidates]

    async def _told(self, prompt: Sequence[int], candidates: Sequence[int], count: int) -> dict[int, float]:
        """What the server tells of the `count` likeliest tokens, by id."""
        fields: dict[str, Any] = {"max_tokens": 1, "temperature": 0, "logprobs": count}
        if self.backend.llama:
            fields |= {"cache_prompt": not self.fresh, "id_slot": self._slot}
        else:  # vLLM: the candidates are told by id; a salt of its own keeps a prompt out of every cache
            fields |= {"return_tokens_as_token_ids": True, "logprob_token_ids": list(candidates)}
            fields |= {"cache_salt": uuid.uuid4().hex} if self.fresh else {}
        try:
            reply = await self.backend.complete(prompt, fields)
        except Refused as error:
            raise KitError(f"The server refuses a judging prompt of {len(prompt)} tokens: {error}") from None
        cached = reply.cached_tokens or 0
        self.cost.add(Cost(len(prompt) - cached, cached))
        if self.fresh and cached:
            self.backend.note("fresh verdicts: this server reuses its cache all the same")
        return reply.logprobs
