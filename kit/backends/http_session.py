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
from kit.backends.http import HttpBackend
from kit.backends.http_reply import Refused, Reply
from kit.errors import KitError

TOP = 20  # log-probabilities asked for; vLLM's default limit
# llama-server tells nothing of a token that ends inside a UTF-8 character: such candidates get the upper bound
BIAS = 100.0  # the largest that servers take; it makes a candidate the generated token, whose own value is told
AGREE_NATS = 0.1  # forced and listed value of one token differ by less, where what is told is raw
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
        """Read probes. llama-server: from the shortest to the longest, each extending what the last one left in the
        cache; elsewhere: the longest first, then the others at once.

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

        async def one(place: tuple[int, int]) -> None:
            probe = probes[place[0]]
            position, candidates = probe.reads[place[1]]
            found[place[0]][place[1]] = await self._values(probe.ids[: position + 1], candidates)

        order = sorted(range(len(probes)), key=lambda i: len(probes[i].ids))
        places = [(i, r) for i in order for r in range(len(probes[i].reads))]
        step = 1 if self.backend.llama else len(places)
        if not self.backend.llama and places:
            await one(places.pop())
        for start in range(0, len(places), max(step, 1)):
            results = await asyncio.gather(*map(one, places[start : start + step]), return_exceptions=True)
            for failure in filter(None, results):
                raise failure
        return found

    async def _values(self, prompt: Sequence[int], candidates: Sequence[int]) -> list[float]:
        """Log-probabilities of the candidates after a prompt."""
        backend = self.backend
        try:
            told = await (self._sglang if backend.sglang else self._ask)(prompt, candidates)
            known = dict(told)
            for candidate in candidates:
                if candidate not in known and await self._can_force():
                    known |= await self._forced(prompt, candidate)
        except Refused as error:
            raise KitError(f"The server refuses a judging prompt of {len(prompt)} tokens: {error}") from None
        if not any(c in known for c in candidates):
            raise KitError(
                f"{backend.root} tells no log-probability of the tokens asked for, by their ids.",
                "Judge with backend=hf or gguf, or serve the model with vLLM, SGLang or llama-server.",
            )
        if any(c not in known for c in candidates):
            backend.note(f"labels beyond the {TOP} likeliest tokens got the last one's value, an upper bound")
        return [known.get(c, min(told.values(), default=0.0)) for c in candidates]

    async def _ask(self, prompt: Sequence[int], candidates: Sequence[int]) -> dict[int, float]:
        return (await self._reply(prompt, candidates)).logprobs

    async def _reply(self, prompt: Sequence[int], candidates: Sequence[int], **more: Any) -> Reply:
        fields: dict[str, Any] = {"max_tokens": 1, "temperature": 0, "logprobs": TOP}
        if self.backend.llama:
            fields |= {"cache_prompt": not self.fresh, "id_slot": self._slot}
        else:  # vLLM: the candidates alone are told, by id; a salt of its own keeps a prompt out of every cache
            fields |= {
                "return_tokens_as_token_ids": True,
                "return_token_ids": True,
                "logprob_token_ids": list(candidates),
            }
            fields |= {"logprob_token_ids": list(candidates)} if candidates else {}
            fields |= {"repetition_penalty": 1.0} | ({"cache_salt": uuid.uuid4().hex} if self.fresh else {})
        reply = await self.backend.complete(prompt, fields | more)
        self._count(len(prompt), reply.cached_tokens)
        return reply

    async def _sglang(self, prompt: Sequence[int], candidates: Sequence[int]) -> dict[int, float]:
        """SGLang tells log-probabilities by id in its own API alone."""
        body: dict[str, Any] = {"input_ids": list(prompt), "sampling_params": {"max_new_tokens": 1, "temperature": 1.0}}
        body |= {"return_logprob": True, "token_ids_logprob": list(candidates)}
        body |= {"extra_key": uuid.uuid4().hex} if self.fresh else {}
        told = (await self.backend.ask("/generate", body))["meta_info"]
        self.backend.account(len(prompt), told["prompt_tokens"], told["cached_tokens"])
        self._count(len(prompt), told["cached_tokens"])
        return {entry[1]: entry[0] for entry in told["output_token_ids_logprobs"][0]}

    def _count(self, prompt_tokens: int, cached_tokens: int | None) -> None:
        self.cost.add(Cost(prompt_tokens - (cached_tokens or 0), cached_tokens or 0))
        if self.fresh and cached_tokens:
            self.backend.note("fresh verdicts: this server reuses its cache all the same")

    async def _forced(self, prompt: Sequence[int], candidate: int) -> dict[int, float]:
        """{candidate: its value}, told because a bias makes it the generated token; {} where it is not."""
        reply = await self._reply(prompt, (candidate,), logit_bias={str(candidate): BIAS})
        return {candidate: reply.logprobs[candidate]} if (reply.ids or ())[:1] == (candidate,) else {}

    async def _can_force(self) -> bool:
        """Whether a bias is obeyed and leaves what is told raw; tried once, on an unlikely token of known value."""
        backend = self.backend
        if backend.forces is None:
            told = await self._ask(backend.start, ())
            known = min(told, key=lambda token: told[token], default=-1)
            forced = await self._forced(backend.start, known)
            backend.forces = abs(forced.get(known, 1.0) - told.get(known, 0.0)) < AGREE_NATS
        return backend.forces
