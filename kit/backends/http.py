"""OpenAI-compatible servers (llama-server, vLLM, SGLang): how the work leaves this machine.

Prompts go to /v1/completions as token ids; every sample has its own request and seed. Requests, retries and errors are
in kit/backends/http_client.py, judging in kit/backends/http_session.py. Nothing here starts a server.
"""

from __future__ import annotations

import asyncio
import queue
import re
import time
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from typing import Any

from kit.backends import Completion, Finish, Generation, Request, Session, Tokenizer, sample_seed
from kit.backends.http_client import Client, Refused
from kit.config import Engine, Sampling
from kit.errors import KitError

SAMPLERS = ("penalties", "temperature", "top_k", "top_p", "min_p")  # llama-server's, in the order of transformers
FINISHES: dict[str, Finish] = {"stop": "stop", "length": "length", "repetition": "loop"}


class ServerTokenizer:
    """llama-server's own tokenizer and chat template, behind the protocol of kit.backends; answers are kept."""

    def __init__(self, client: Client, props: dict[str, Any], vocabulary: int) -> None:
        self._client, self._vocabulary = client, vocabulary
        self.template: str | None = props.get("chat_template") or None
        self.bos, self.eos = props.get("bos_token") or "", props.get("eos_token") or ""
        self._encoded, self._decoded = lru_cache(2048)(self._encode), lru_cache(2048)(self._decode)
        self.eos_ids: frozenset[int] = frozenset(self.encode(self.eos))

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Ids of a text; special=False tokenizes special tokens' names as text. No BOS or EOS is added."""
        return list(self._encoded(text, special)) if text else []

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens by their names."""
        return self._decoded(tuple(ids)) if ids else ""

    @cached_property
    def special(self) -> tuple[str, ...]:
        """All special tokens' names: those ids of the whole vocabulary's text that come only where they are parsed."""
        text = self._decode(range(self._vocabulary))
        found = set(self._encode(text, True)) - set(self._encode(text, False))
        return tuple(name for i in sorted(found) if self.encode(name := self._decode([i])) == [i])

    def _encode(self, text: str, special: bool) -> list[int]:
        return self._client.post("/tokenize", {"content": text, "add_special": False, "parse_special": special})[
            "tokens"
        ]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._client.post("/detokenize", {"tokens": list(ids)})["content"]


class HttpBackend:
    """A model that a server holds.

    Args:
        engine: url, model (the server's name for it), tokenizer, api_key_env, parallel, timeout_seconds, retries.

    Raises:
        KitError: nothing answers, a key is wanted, the model is not served, the server takes no token ids, or its
            tokenizer is not the named one.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.name = re.sub(r"[^\w.-]+", "-", engine.model.removesuffix(".gguf")).strip("-")
        self.forces: bool | None = None  # whether a bias shows a token's own log-probability; None: not yet tried
        self.client = Client(engine)
        try:
            self._connect()
        except BaseException:
            self.client.close()
            raise

    @property
    def notes(self) -> list[str]:
        """What the user must know; the hit rate of the server's prefix cache as measured so far."""
        count, share = self.client.reported_tokens, self.client.cached_tokens / max(self.client.reported_tokens, 1)
        return [
            *self.client.notes,
            *([f"prefix cache: {share:.1%} of {count:,} prompt tokens reused"] if count else []),
        ]

    def generate(self, requests: Sequence[Request]) -> Iterator[Generation]:
        """Yield each request's result as it finishes, `parallel` requests in flight.

        Raises:
            KitError: the server is gone past the retries; only after all that finished has been yielded.
        """
        finished: queue.SimpleQueue[Any] = queue.SimpleQueue()
        work = asyncio.run_coroutine_threadsafe(self._generate(requests, finished), self.client.loop)
        try:
            while (item := finished.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            work.cancel()  # closes connections, at which servers stop generating

    def session(self, fresh: bool = False) -> Session:
        """Open a judging session; fresh=True has the server evaluate every probe without its cache."""
        from kit.backends.http_session import HttpSession

        return HttpSession(self, fresh)

    def close(self) -> None:
        """Close the connections."""
        self.client.close()

    async def _generate(self, requests: Sequence[Request], finished: queue.SimpleQueue[Any]) -> None:
        failures: list[Exception] = []

        async def one(request: Request) -> None:
            slot = await self._slots.get()
            try:
                if not failures:
                    finished.put(await self._answer(request, slot))
            except Exception as error:  # raised in generate(), after what the requests in flight still bring
                failures.append(error)
            finally:
                self._slots.put_nowait(slot)

        await asyncio.gather(*map(one, requests))
        finished.put(failures[0] if failures else None)

    async def _answer(self, request: Request, slot: int) -> Generation:
        """All samples of a request. The first fills the prefix cache for the others; llama-server's is a slot's, so
        there they go one by one through one slot."""
        length, begun = len(request.prompt), time.perf_counter()
        if not 0 < length < self.context_tokens:
            why = f"the prompt has {length} tokens, the context {self.context_tokens}"
            return Generation(request.id, prompt_tokens=length, error=why if length else "the prompt is empty")
        samples: list[Any] = []
        while len(samples) < request.n:
            stop = len(samples) + 1 if self.llama or not samples else request.n
            some = (self._sample(request, j, slot) for j in range(len(samples), stop))
            samples += await asyncio.gather(*some, return_exceptions=True)
            for failure in (s for s in samples if isinstance(s, BaseException)):
                if not isinstance(failure, Refused):
                    raise failure
                return Generation(request.id, prompt_tokens=length, error=str(failure))
        completions = tuple(completion for completion, _ in samples)
        evaluated = sum(length - (cached or 0) for _, cached in samples)
        return Generation(request.id, completions, length, evaluated, time.perf_counter() - begun)

    async def _sample(self, request: Request, number: int, slot: int) -> tuple[Completion, int | None]:
        """One sample, and how many prompt tokens it found cached (None: not told)."""
        s = request.sampling
        fields: dict[str, Any] = {"temperature": s.temperature, "top_p": s.top_p, "top_k": s.top_k or -1}
        fields |= {"min_p": s.min_p, "seed": sample_seed(request.seed, request.id, number), "stop": list(s.stop)}
        fields["max_tokens"] = min(s.max_new_tokens, self.context_tokens - len(request.prompt))
        if self.llama:  # logprobs because nothing else brings the ids
            fields |= {"repeat_penalty": s.repetition_penalty, "repeat_last_n": self.context_tokens, "logprobs": 1}
            fields |= {"samplers": SAMPLERS, "id_slot": slot, "timings_per_token": s.stop_loops}
        else:
            fields |= {"repetition_penalty": s.repetition_penalty, "return_token_ids": True}
        reply = await self.client.complete(request.prompt, fields, watch=s.stop_loops)
        ids = reply.ids
        if ids is None:
            ids = tuple(await asyncio.to_thread(self.tokenizer.encode, reply.text, False))
            self.client.note("this server does not tell generated ids: they are its text, tokenized again")
        while ids and reply.finish == "stop" and ids[-1] in self._ends:
            ids = ids[:-1]
        return Completion(reply.text, ids, FINISHES.get(reply.finish, "error")), reply.cached_tokens

    def _connect(self) -> None:
        """Learn what is served, by whom, with which tokenizer; one generated token proves that ids are taken."""
        model = self._served()
        self.llama, self.sglang = model.get("owned_by") == "llamacpp", model.get("owned_by") == "sglang"
        limit, parallel = model.get("max_model_len"), self.engine.parallel
        if self.llama:
            props = self.client.get("/props")
            limit, parallel = props["default_generation_settings"]["n_ctx"], min(parallel, props["total_slots"])
            if parallel < self.engine.parallel:
                self.client.note(f"{parallel} requests in flight, not {self.engine.parallel}: the server's slots")
        if not (limit or self.engine.context_tokens):
            raise KitError(f"{self.client.url} does not tell the model's context.", "Set context_tokens.")
        self.context_tokens = min(filter(None, (limit, self.engine.context_tokens)))
        self.concurrent, self._slots = parallel, asyncio.Queue[int]()
        for slot in range(parallel):
            self._slots.put_nowait(slot)
        if self.llama and not self.engine.tokenizer:
            self.tokenizer: Tokenizer = ServerTokenizer(self.client, props, model["meta"]["n_vocab"])
        else:
            self.tokenizer = self._local_tokenizer(self.engine.tokenizer or model.get("root") or self.engine.model)
        special = [self.tokenizer.encode(name) for name in self.tokenizer.special]
        self._ends = self.tokenizer.eos_ids | {ids[0] for ids in special if len(ids) == 1}
        start = Request("start", tuple(self.tokenizer.encode("1, 2, 3,")), Sampling(max_new_tokens=1))
        try:
            self.client.run(self._sample(start, 0, 0))
        except Refused as error:
            raise KitError(
                f"{self.client.url} takes no token ids: {error}", "Use vLLM, SGLang or llama-server itself."
            ) from None

    def _served(self) -> dict[str, Any]:
        listed = self.client.get("/v1/models").get("data", ())
        models = {name: model for model in listed for name in (model["id"], *(model.get("aliases") or ()))}
        if self.engine.model not in models:
            raise KitError(
                f"{self.client.url} serves no model {self.engine.model!r}.", f"Set model to {' or '.join(models)}."
            )
        return models[self.engine.model]

    def _local_tokenizer(self, name: str) -> Tokenizer:
        """A tokenizer of this machine, compared with the server's where that can be asked."""
        from kit.models import PROBE, load_tokenizer

        try:
            tokenizer = load_tokenizer(name)
        except KitError as error:
            hint = "Set tokenizer to the served model's hub id or folder."
            raise KitError(f"{self.engine.model} has no tokenizer here: {error.args[0]}", hint) from None
        body = {"content": PROBE, "add_special": False, "parse_special": True}  # llama-server's names
        body |= {"model": self.engine.model, "prompt": PROBE, "add_special_tokens": False}  # vLLM's
        try:
            same = self.client.post("/tokenize", body)["tokens"] == tokenizer.encode(PROBE)
        except (Refused, KitError):  # none there: the count of each prompt's ids alone is compared
            return tokenizer
        if not same:
            raise KitError(
                f"{name} is not the tokenizer that {self.client.url} uses: one text gives other ids.",
                "Set tokenizer to the served model's own.",
            )
        return tokenizer
