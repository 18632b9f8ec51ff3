"""OpenAI-compatible servers (llama-server, vLLM): how the work leaves this machine.

Prompts go to /v1/completions as token ids; every sample is a request of its own with its own seed. Retries, back-off
with jitter, Retry-After and time-outs are the openai package's. Judging is in kit/backends/http_session.py. Nothing
here starts a server or streams: `stop_loops` only names a loop when its sample has ended, at its full length. A key
comes from the environment and stands in no message.
"""

from __future__ import annotations

import asyncio
import os
import queue
import re
import threading
import time
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from kit.backends import Completion, Finish, Generation, Request, Session, Tokenizer, looping, sample_seed
from kit.config import Engine, Sampling
from kit.errors import KitError

REFUSED = (400, 413, 422)  # statuses of one request: asking again changes nothing
SAMPLERS = ("penalties", "temperature", "top_k", "top_p", "min_p")  # llama-server's, in the order of transformers
FINISHES: dict[str, Finish] = {"stop": "stop", "length": "length"}
T = TypeVar("T")


class Refused(Exception):
    """A request that the server will never take; its message says why."""


@dataclass(frozen=True)
class Reply:
    """A completion. None: the server does not tell. logprobs: of the first token and its rivals, by id."""

    text: str
    ids: tuple[int, ...] | None
    finish: str
    prompt_tokens: int | None
    cached_tokens: int | None
    logprobs: dict[int, float]


class HttpBackend:
    """A model that a server holds.

    Args:
        engine: url, model (the server's name for it), tokenizer, api_key_env, parallel, timeout_seconds, retries.

    Raises:
        KitError: nothing answers, a key is wanted, the model is not served, the server takes no token ids, or the
            tokenizer is not the server's.
    """

    def __init__(self, engine: Engine) -> None:
        import openai

        self.engine, self.root = engine, (engine.url or "http://HOST:PORT").rstrip("/").removesuffix("/v1")
        if not (engine.url or "").rstrip("/").endswith("/v1"):
            raise KitError(f"url is {engine.url!r}; a server's address ends in /v1.", f"Set url={self.root}/v1.", 2)
        self.name = re.sub(r"[^\w.-]+", "-", engine.model.removesuffix(".gguf")).strip("-")
        self.notes: list[str] = []
        self._sent_tokens = self._cached_tokens = 0
        openais = urlsplit(self.root).hostname == "api.openai.com"  # no other host gets the key that is meant for it
        self._key_name = engine.api_key_env or ("OPENAI_API_KEY" if openais else "")
        self._key = os.environ.get(self._key_name) or "none"  # None would send the client looking for another
        self._client = openai.AsyncOpenAI(
            api_key=self._key,
            base_url=self.root,
            max_retries=engine.retries,
            timeout=openai.Timeout(engine.timeout_seconds, connect=min(10.0, engine.timeout_seconds)),
        )
        self._room, self._slots = asyncio.Semaphore(engine.parallel), asyncio.Queue[int]()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True, name="http").start()
        try:
            self._connect()
        except BaseException:
            self.close()
            raise

    def note(self, text: str) -> None:
        """Add a note, once; one that begins with the same words up to a colon is replaced."""
        kept = [note for note in self.notes if note.partition(":")[0] != text.partition(":")[0]]
        self.notes[:] = [*kept, text]

    def generate(self, requests: Sequence[Request]) -> Iterator[Generation]:
        """Yield each request's result as it finishes, `parallel` requests in flight.

        Raises:
            KitError: the server is gone past the retries; only after all that finished has been yielded.
        """
        finished: queue.SimpleQueue[Any] = queue.SimpleQueue()
        work = asyncio.run_coroutine_threadsafe(self._generate(requests, finished), self._loop)
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
        """Close the connections and end their thread."""
        if self._loop.is_running():
            self.run(self._client.close())
            self._loop.call_soon_threadsafe(self._loop.stop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the backend's loop, from any thread, and wait for it."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        finally:
            future.cancel()  # at Ctrl-C nothing stays in flight

    async def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """POST a body (None: GET) to a path under the server's root.

        Raises:
            Refused: of this request, for good.
            KitError: the server is gone past the retries, wants a key, or is none.
        """
        import openai

        try:
            async with self._room:
                if body is None:
                    reply = await self._client.get(path, cast_to=object)
                else:
                    reply = await self._client.post(path, body=body, cast_to=object)
        except openai.OpenAIError as error:
            raise self._explained(error) from None
        if not isinstance(reply, dict):
            raise KitError(f"{self.root}{path} does not answer in JSON.", "Check url: it must be an API's.")
        return reply

    async def complete(self, prompt: Sequence[int], fields: dict[str, Any]) -> Reply:
        """Complete token ids.

        Raises:
            Refused, KitError: as `ask`; KitError too where the server counted other tokens than were sent.
        """
        body = {"model": self.engine.model, "prompt": list(prompt), **fields}
        reply = read_reply(await self.ask("/v1/completions", body))
        if reply.prompt_tokens not in (None, len(prompt)):
            raise KitError(
                f"{self.root} counts {reply.prompt_tokens} prompt tokens where {len(prompt)} ids were sent.",
                "It tokenizes them again: use one that takes ids as they are (vLLM, llama-server).",
            )
        if reply.cached_tokens is None:
            self.note("prefix cache: this server does not report reused tokens (vLLM: --enable-prompt-tokens-details)")
        else:
            self._sent_tokens += len(prompt)
            self._cached_tokens += reply.cached_tokens
            share = self._cached_tokens / max(self._sent_tokens, 1)
            self.note(f"prefix cache: {share:.1%} of {self._sent_tokens:,} prompt tokens reused")
        return reply

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
            return Generation(request.id, prompt_tokens=length, error=why)
        samples: list[Any] = []
        while len(samples) < request.n:
            stop = len(samples) + 1 if self.llama or not samples else request.n
            some = (self._sample(request, j, slot) for j in range(len(samples), stop))
            samples += await asyncio.gather(*some, return_exceptions=True)
            for failure in (s for s in samples if isinstance(s, BaseException)):
                if not isinstance(failure, Refused):
                    raise failure
                return Generation(request.id, prompt_tokens=length, error=str(failure))
        completions, evaluated = zip(*samples, strict=True)
        return Generation(request.id, completions, length, sum(evaluated), time.perf_counter() - begun)

    async def _sample(self, request: Request, number: int, slot: int) -> tuple[Completion, int]:
        """One sample, and how many prompt tokens were evaluated for it."""
        s, length = request.sampling, len(request.prompt)
        fields: dict[str, Any] = {"temperature": s.temperature, "top_p": s.top_p, "top_k": s.top_k or -1}
        fields |= {"min_p": s.min_p, "seed": sample_seed(request.seed, request.id, number), "stop": list(s.stop)}
        fields["max_tokens"] = min(s.max_new_tokens, self.context_tokens - length)
        if self.llama:  # logprobs because nothing else brings the ids
            fields |= {"repeat_penalty": s.repetition_penalty, "repeat_last_n": self.context_tokens, "logprobs": 1}
            fields |= {"samplers": SAMPLERS, "id_slot": slot}
        else:
            fields |= {"repetition_penalty": s.repetition_penalty, "return_token_ids": True}
        reply = await self.complete(request.prompt, fields)
        ids, finish = reply.ids, FINISHES.get(reply.finish, "error")
        if ids is None:
            ids = tuple(self.tokenizer.encode(reply.text, False))
            self.note("this server does not tell generated ids: they are its text, tokenized again")
        while ids and finish == "stop" and ids[-1] in self._ends:
            ids = ids[:-1]
        if s.stop_loops and finish == "length" and looping(ids):
            finish = "loop"
        return Completion(reply.text, ids, finish), length - (reply.cached_tokens or 0)

    def _connect(self) -> None:
        """Learn what is served and by whom; a few generated tokens prove that ids are taken and mean the same."""
        listed = self.run(self.ask("/v1/models")).get("data", ())
        models = {name: model for model in listed for name in (model["id"], *(model.get("aliases") or ()))}
        model = models.get(self.engine.model)
        if model is None:
            names = " or ".join(models)
            raise KitError(f"{self.root}/v1 serves no model {self.engine.model!r}.", f"Set model to {names}.")
        self.llama, self.concurrent = model.get("owned_by") == "llamacpp", self.engine.parallel
        limit = model.get("max_model_len")
        if self.llama:
            props = self.run(self.ask("/props"))
            limit, slots = props["default_generation_settings"]["n_ctx"], props["total_slots"]
            self.concurrent = min(self.concurrent, slots)
            if slots < self.engine.parallel:
                self.note(f"{slots} requests in flight, not {self.engine.parallel}: the server has as many slots")
        if not (limit or self.engine.context_tokens):
            raise KitError(f"{self.root} does not tell the model's context.", "Set context_tokens.")
        self.context_tokens = min(filter(None, (limit, self.engine.context_tokens)))
        for slot in range(self.concurrent):
            self._slots.put_nowait(slot)
        name = self.engine.tokenizer or model.get("root") or self.engine.model
        hint = "Set tokenizer to the served model's hub id, folder or .gguf file."
        try:
            self.tokenizer = open_tokenizer(name)
        except KitError as error:
            raise KitError(f"The served model's tokenizer is not found as {name!r}: {error.args[0]}", hint) from None
        special = [self.tokenizer.encode(name) for name in self.tokenizer.special]
        self._ends = self.tokenizer.eos_ids | {ids[0] for ids in special if len(ids) == 1}
        start = Request("start", tuple(self.tokenizer.encode("1, 2, 3,")), Sampling(temperature=0, max_new_tokens=6))
        try:
            sample, _ = self.run(self._sample(start, 0, 0))
        except Refused as error:
            raise KitError(f"{self.root} takes no token ids: {error}", "Use vLLM or llama-server.") from None
        if self.tokenizer.decode(sample.ids).strip() != sample.text.strip():
            raise KitError(f"{name} is not {self.root}'s tokenizer: it reads {sample.text!r} otherwise.", hint)

    def _explained(self, error: Exception) -> Exception:
        """An error of the openai package as one for users; without the key, should the server have echoed it."""
        import openai

        text = " ".join(str(error).replace(self._key, "***").split())[:500]
        status, name = getattr(error, "status_code", None), self._key_name
        if status in REFUSED:
            return Refused(text)
        what, hint = f"does not answer, {self.engine.retries} retries: {text}", "Start the server"
        if status in (401, 403):
            state = f"the variable {name} is {'set, but not accepted' if os.environ.get(name) else 'not set'}"
            what = f"wants a key, and {state if name else 'api_key_env names no variable'}: {text}"
            hint = f"Set {name or 'api_key_env to the name of the variable that holds it'}"
        elif status == 404:
            what, hint = f"knows no such address: {text}", "Check url (/v1/models must answer there)"
        elif isinstance(error, openai.APITimeoutError):
            what = f"did not answer within {self.engine.timeout_seconds:g} s, {self.engine.retries} retries"
            hint = "Set a larger timeout_seconds or a smaller parallel"
        return KitError(f"{self.root} {what}.", f"{hint}; the same command then goes on from here.")


def open_tokenizer(name: str) -> Tokenizer:
    """A tokenizer of this machine, without weights: llama.cpp's for a GGUF, else transformers'.

    Raises:
        KitError: no such model.
    """
    from kit.models import load_tokenizer, resolve

    if isinstance(file := resolve(name), Path):
        from kit.backends.gguf import GgufTokenizer, load

        return GgufTokenizer(load(file, vocab_only=True))
    return load_tokenizer(name)


def read_reply(body: dict[str, Any]) -> Reply:
    """Read a completion as llama-server or vLLM write it; KitError: it is none."""
    if not body.get("choices"):
        raise KitError("The server's answer holds no completion.", "Check url: it must be an OpenAI-compatible API's.")
    choice, usage = body["choices"][0], body.get("usage") or {}
    told, ids = choice.get("logprobs") or {}, choice.get("token_ids")
    content, values = told.get("content"), {}
    if content is not None:  # llama-server
        ids = [entry["id"] for entry in content]
        values = {entry["id"]: entry["logprob"] for first in content[:1] for entry in (*first["top_logprobs"], first)}
    elif told.get("tokens"):  # vLLM, which names tokens by their ids when it is asked to
        named = dict((told.get("top_logprobs") or [None])[0] or {}) | {told["tokens"][0]: told["token_logprobs"][0]}
        values = {int(name[9:]): value for name, value in named.items() if name.startswith("token_id:")}
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    finish = choice.get("finish_reason") or "none"
    ids = None if ids is None else tuple(ids)
    return Reply(choice["text"], ids, finish, usage.get("prompt_tokens"), cached, values)
