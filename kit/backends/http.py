"""OpenAI-compatible servers (llama-server, vLLM, SGLang): how the work leaves this machine.

Prompts go to /v1/completions as token ids; every sample is a request of its own with its own seed. Retries, back-off
with jitter, Retry-After and time-outs are the openai package's. Judging is in kit/backends/http_session.py. Nothing
here starts a server or streams: a loop is told when its sample ends, and costs its tokens until then (vLLM is asked to
end it at once). A key comes from the environment and stands in no message.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import re
import threading
import time
from collections.abc import Coroutine, Iterator, Sequence
from functools import cached_property, lru_cache
from typing import Any, TypeVar

from kit.backends import Completion, Finish, Generation, Request, Session, Tokenizer, looping, sample_seed
from kit.backends.http_reply import Refused, Reply, read_reply
from kit.config import Engine, Sampling
from kit.errors import KitError

REFUSED = (400, 413, 422)  # statuses of one request: asking again changes nothing
SAMPLERS = ("penalties", "temperature", "top_k", "top_p", "min_p")  # llama-server's, in the order of transformers
FINISHES: dict[str, Finish] = {"stop": "stop", "length": "length", "repetition": "loop"}
LOOPS = {"max_pattern_size": 64, "min_pattern_size": 1, "min_count": 24}  # vLLM's own detection
T = TypeVar("T")


class ServerTokenizer:
    """llama-server's own tokenizer and chat template, behind the protocol of kit.backends; answers are kept."""

    def __init__(self, backend: HttpBackend, props: dict[str, Any], vocabulary: int) -> None:
        self._backend, self._vocabulary, self.template = backend, vocabulary, props.get("chat_template") or None
        self.bos, self.eos = props.get("bos_token") or "", props.get("eos_token") or ""
        self._encoded, self._decoded = lru_cache(2048)(self._encode), lru_cache(2048)(self._decode)
        self.eos_ids = frozenset(self.encode(self.eos))

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Ids of a text; special=False tokenizes special tokens' names as text. No BOS or EOS is added."""
        return list(self._encoded(text, special))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens by their names."""
        return self._decoded(tuple(ids))

    @cached_property
    def special(self) -> tuple[str, ...]:
        """All special tokens' names: of the ids of the whole vocabulary's text that come only where they are parsed."""
        text = self._decode(range(self._vocabulary))
        found = set(self._encode(text, True)) - set(self._encode(text, False))
        return tuple(name for i in sorted(found) if self.encode(name := self._decode([i])) == [i])

    def _encode(self, text: str, special: bool) -> list[int]:
        body = {"content": text, "add_special": False, "parse_special": special}
        return self._backend.call("/tokenize", body)["tokens"]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._backend.call("/detokenize", {"tokens": list(ids)})["content"]


class HttpBackend:
    """A model that a server holds.

    Args:
        engine: url, model (the server's name for it), tokenizer, api_key_env, parallel, timeout_seconds, retries.

    Raises:
        KitError: nothing answers, a key is wanted, the model is not served, the server takes no token ids, or its
            tokenizer is not the named one.
    """

    def __init__(self, engine: Engine) -> None:
        import openai

        self.engine, self.root = engine, (engine.url or "http://HOST:PORT").rstrip("/").removesuffix("/v1")
        if not (engine.url or "").rstrip("/").endswith("/v1"):
            raise KitError(f"url is {engine.url!r}; a server's address ends in /v1.", f"Set url={self.root}/v1.", 2)
        self.name = re.sub(r"[^\w.-]+", "-", engine.model.removesuffix(".gguf")).strip("-")
        self.forces: bool | None = None  # whether a bias shows a token's own log-probability; None: not yet tried
        self._told: dict[str, None] = {}  # notes, each once
        self._sent_tokens = self._cached_tokens = 0
        self._key = os.environ.get(engine.api_key_env) or "none"  # None would send the client looking for another
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

    @property
    def notes(self) -> list[str]:
        """What the user must know; the hit rate of the server's prefix cache as measured so far."""
        share = f"{self._cached_tokens / max(self._sent_tokens, 1):.1%} of {self._sent_tokens:,}"
        return [*self._told, *([f"prefix cache: {share} prompt tokens reused"] if self._sent_tokens else [])]

    def note(self, text: str) -> None:
        """Add a note, once."""
        self._told[text] = None

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

    def call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """`ask`, waited for."""
        return self.run(self.ask(path, body))

    async def ask(self, path: str, body: dict[str, Any] | None = None, **options: Any) -> Any:
        """POST a body (None: GET) to a path under the server's root.

        Raises:
            Refused: of this request, for good.
            KitError: the server is gone past the retries, wants a key, or is none.
        """
        import openai

        try:
            options = {"cast_to": object} | options
            send = self._client.get(path, **options) if body is None else self._client.post(path, body=body, **options)
            async with self._room:
                reply = await send
        except openai.OpenAIError as error:
            raise self._explained(error) from None
        if isinstance(reply, str):
            raise KitError(f"{self.root}{path} does not answer in JSON.", "Check url: it must be an API's.")
        return reply

    async def complete(self, prompt: Sequence[int], fields: dict[str, Any]) -> Reply:
        """Complete token ids.

        Raises:
            Refused, KitError: as `ask`; KitError too where the server counted other tokens than were sent.
        """
        reply = read_reply(
            await self.ask("/v1/completions", {"model": self.engine.model, "prompt": list(prompt), **fields})
        )
        self.account(len(prompt), reply.prompt_tokens, reply.cached_tokens)
        return reply

    def account(self, sent_tokens: int, counted_tokens: int | None, cached_tokens: int | None) -> None:
        """Check the server's count of a prompt (KitError: it is another) and keep what it says it reused."""
        if counted_tokens not in (None, sent_tokens):
            raise KitError(
                f"{self.root} counts {counted_tokens} prompt tokens where {sent_tokens} ids were sent.",
                "It tokenizes them again: use one that takes ids as they are (vLLM, SGLang, llama-server).",
            )
        if cached_tokens is None:
            self.note("this server does not report reused tokens (vLLM: --enable-prompt-tokens-details)")
        else:
            self._sent_tokens += sent_tokens
            self._cached_tokens += cached_tokens

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
            why = (
                f"the prompt has {length} tokens, the context {self.context_tokens}"
                if length
                else "the prompt is empty"
            )
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
            fields |= {"repetition_detection": LOOPS} if s.stop_loops else {}
        reply = await self.complete(request.prompt, fields)
        ids, finish = reply.ids, FINISHES.get(reply.finish, "error")
        if ids is None:
            ids = tuple(await asyncio.to_thread(self.tokenizer.encode, reply.text, False))
            self.note("this server does not tell generated ids: they are its text, tokenized again")
        while ids and finish == "stop" and ids[-1] in self._ends:
            ids = ids[:-1]
        if s.stop_loops and finish == "length" and looping(ids):
            finish = "loop"
        return Completion(reply.text, ids, finish), length - (reply.cached_tokens or 0)

    def _connect(self) -> None:
        """Learn what is served, by whom, with which tokenizer; one generated token proves that ids are taken."""
        listed = self.call("/v1/models").get("data", ())
        models = {name: model for model in listed for name in (model["id"], *(model.get("aliases") or ()))}
        model = models.get(self.engine.model)
        if model is None:
            names = " or ".join(models)
            raise KitError(f"{self.root}/v1 serves no model {self.engine.model!r}.", f"Set model to {names}.")
        self.llama, self.sglang = model.get("owned_by") == "llamacpp", model.get("owned_by") == "sglang"
        limit, self.concurrent = model.get("max_model_len"), self.engine.parallel
        props = self.call("/props") if self.llama else {}
        if self.llama:
            limit, slots = props["default_generation_settings"]["n_ctx"], props["total_slots"]
            self.concurrent = min(self.concurrent, slots)
            if slots < self.engine.parallel:
                self.note(f"{slots} requests in flight, not {self.engine.parallel}: the server has as many slots")
        if not (limit or self.engine.context_tokens):
            raise KitError(f"{self.root} does not tell the model's context.", "Set context_tokens.")
        self.context_tokens = min(filter(None, (limit, self.engine.context_tokens)))
        for slot in range(self.concurrent):
            self._slots.put_nowait(slot)
        self.tokenizer: Tokenizer = (
            ServerTokenizer(self, props, model["meta"]["n_vocab"])
            if self.llama and not self.engine.tokenizer
            else self._local_tokenizer(self.engine.tokenizer or model.get("root") or self.engine.model)
        )
        special = [self.tokenizer.encode(name) for name in self.tokenizer.special]
        self._ends = self.tokenizer.eos_ids | {ids[0] for ids in special if len(ids) == 1}
        self.start = tuple(self.tokenizer.encode("1, 2, 3,"))
        try:
            self.run(self._sample(Request("start", self.start, Sampling(max_new_tokens=1)), 0, 0))
        except Refused as error:
            raise KitError(f"{self.root} takes no token ids: {error}", "Use vLLM, SGLang or llama-server.") from None

    def _local_tokenizer(self, name: str) -> Tokenizer:
        """A tokenizer of this machine, compared with the server's where that can be asked."""
        from kit.models import PROBE, load_tokenizer

        tokenizer = load_tokenizer(name)
        theirs = ours = tokenizer.encode(PROBE)
        body = {"content": PROBE, "add_special": False, "parse_special": True}  # llama-server's words, then vLLM's
        body |= {"model": self.engine.model, "prompt": PROBE, "add_special_tokens": False}
        with contextlib.suppress(Refused, KitError):  # none there: every prompt's count is compared all the same
            theirs = self.call("/tokenize", body)["tokens"]
        if theirs != ours:
            raise KitError(
                f"{name} is not {self.root}'s tokenizer: one text gives other ids.",
                "Set tokenizer to the served model's hub id or folder.",
            )
        return tokenizer

    def _explained(self, error: Exception) -> Exception:
        """An error of the openai package as one for users; without the key, should the server have echoed it."""
        import openai

        text = " ".join(str(error).replace(self._key, "***").split())[:500]
        status, name = getattr(error, "status_code", None), self.engine.api_key_env
        if status in REFUSED:
            return Refused(text)
        what, hint = f"does not answer, {self.engine.retries} retries: {text}", "Start the server"
        if status in (401, 403):
            state = "is set, but not accepted" if os.environ.get(name) else "is not set"
            what, hint = f"wants a key, and the variable {name} {state}: {text}", f"Set {name}"
        elif status == 404:
            what, hint = f"knows no such address: {text}", "Check url (/v1/models must answer there)"
        elif isinstance(error, openai.APITimeoutError):
            what = f"did not answer within {self.engine.timeout_seconds:g} s, {self.engine.retries} retries"
            hint = "Set a larger timeout_seconds or a smaller parallel"
        return KitError(f"{self.root} {what}.", f"{hint}; the same command then goes on from here.")
