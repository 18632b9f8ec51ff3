"""OpenAI-compatible servers (vLLM, SGLang, llama-server): the model runs on another machine.

Prompts go to /v1/completions as token ids. Retries, back-off with jitter, Retry-After and time-outs
are the openai package's. A verdict (section 3.2 of the paper) is the log-probabilities of one
generated token; its prompt's beginning comes from the server's prefix cache. Candidates are
distinguished by token id, never by text. SGLang returns no log-probabilities by token id,
so it generates and does not judge.

A reply that comes byte by byte is given up at the time-out; no redirect is followed.
An adapter is applied by its name (vLLM) or by a field of the request (llama-server).

Nothing here starts a server or streams: `stop_loops` only names a loop after its sample has ended.
A key comes from the environment and appears in no message.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import os
import threading
import time
import uuid
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import httpx2
import openai

from kit import Json
from kit.backends import tokenizer_alone
from kit.backends.base import (
    Completion,
    Generation,
    Ids,
    Logprobs,
    Request,
    ScoreRequest,
    TokenUsage,
    looping,
    sample_seed,
    slug,
    too_long,
)
from kit.core.config import ModelConfig, Sampling
from kit.core.errors import KitError
from kit.core.fingerprints import adapter_hash

REDIRECT_STATUSES = range(300, 400)
REFUSED_STATUSES = (400, 413, 422)  # of one request: a retry changes nothing
KEY_STATUSES = (401, 403)
TOP_LOGPROBS = 20  # vLLM's default limit
ALL_LOGPROBS = 1 << 20  # more than any vocabulary; llama-server returns as many as there are
# llama-server's samplers, in the order of transformers
SAMPLERS = ("penalties", "temperature", "top_k", "top_p", "min_p")


class Refused(KitError):
    """A request that the server will never take."""


class Deadline(httpx2.AsyncHTTPTransport):
    """A transport that bounds a whole reply, where time-outs bound the wait for its next byte."""

    def __init__(self, seconds: float) -> None:
        super().__init__(limits=httpx2.Limits())
        self.seconds = seconds

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send a request and read its whole reply."""
        try:
            async with asyncio.timeout(self.seconds):
                response = await super().handle_async_request(request)
                await response.aread()
                return response
        except TimeoutError:
            message = f"no whole reply within {self.seconds:g} seconds"
            raise httpx2.ReadTimeout(message, request=request) from None


class HttpBackend:
    """A model on a server; see kit.backends.base.Backend.

    Args:
        engine: names the server and the base model that it serves.
        adapter: the name it is served by, or a PEFT folder; `adapter_enabled` says whether
            requests ask for it. vLLM loads a folder at run time, if it was started to allow that.

    Raises:
        KitError: nothing answers, a key is wanted, the model or the adapter is not served, or the
            server's token ids are not those of the tokenizer.
    """

    cache_error = 0.0

    def __init__(self, engine: ModelConfig, adapter: str | None = None) -> None:
        if not engine.url:
            raise KitError(
                "Backend http needs the server's address.", "Set url=http://HOST:PORT/v1.", 2
            )
        self.engine = engine
        self.root = engine.url.rstrip("/").removesuffix("/v1")
        self.name = slug(engine.model)
        self.notes: list[str] = []
        self._usage = TokenUsage()  # of all requests
        self._lock = threading.Lock()
        # without a key of its own, the client would look for one
        self._key = os.environ.get(engine.api_key_env or "") or "none"
        self._client = openai.AsyncOpenAI(
            api_key=self._key,
            base_url=self.root,
            timeout=openai.Timeout(engine.timeout_seconds, connect=10.0),
            max_retries=engine.retries,
            http_client=httpx2.AsyncClient(transport=Deadline(engine.timeout_seconds)),
        )
        # of another account, from the environment
        self._client.organization = self._client.project = None
        # requests wait in threads, and are sent by one loop, which can give them up
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self.adapter_enabled = False
        self._loras: list[Json] = []  # llama-server's, by id
        self._connect()
        if adapter:
            self._adapter_fields = self._find_adapter(adapter)
            self.adapter_enabled = True

    def _connect(self) -> None:
        """Ask the server for its kind, its limits and its model's tokenizer, and check the ids."""
        engine = self.engine
        with self.conforming():
            models = self._served()
            if engine.model not in models:
                raise KitError(
                    f"{self.root}/v1 serves no model {engine.model!r}.",
                    f"Set model to {' or '.join(models)}.",
                )
            served = models[engine.model]
            limit = served.get("max_model_len")
            self.concurrent = engine.rows()
            self.llama = served.get("owned_by") == "llamacpp"
            if self.llama:
                properties = self._call("/props")
                limit = properties["default_generation_settings"]["n_ctx"]
                self.concurrent = min(self.concurrent, properties["total_slots"])
                self._loras = self._call("/lora-adapters", expected=list)
            limits = filter(None, (limit, engine.context_tokens))
            self.context_tokens = int(min(limits, default=0))
        if not self.context_tokens:
            raise KitError(
                f"{self.root} does not report the model's context.", "Set context_tokens."
            )
        self.pool = ThreadPoolExecutor(self.concurrent)
        self._check_token_ids(engine.tokenizer or served.get("root") or engine.model)

    def _served(self) -> Json:
        """The server's models and, with vLLM, adapters by name."""
        return {model["id"]: model for model in self._call("/v1/models").get("data", ())}

    def _find_adapter(self, adapter: str) -> Json:
        """The fields of a request that apply an adapter; vLLM is asked to load it."""
        folder = Path(adapter).absolute()
        is_folder = folder.is_dir()
        if self.llama:
            # what it was started with: the only one, or the one whose path holds the name
            loras = [lora for lora in self._loras if is_folder or adapter in lora["path"]]
            if len(loras) == 1:
                return {"lora": [{"id": loras[0]["id"], "scale": 1.0}]}
            paths = [lora["path"] for lora in self._loras]
            raise KitError(
                f"{self.root} serves no adapter {adapter!r}; it has {paths or 'none'}.",
                "Start llama-server with --lora FILE (palign.py export RUN --to gguf-lora writes "
                "it), or set eval.served_adapter to one of these.",
            )
        # vLLM: the name that was given, this one from an earlier session, or the folder's
        own_name = f"{folder.parent.name}-{adapter_hash(folder)[:12]}"
        for name, model in self._served().items():
            if name in (adapter, own_name) or model.get("root") == str(folder):
                return {"model": name}
        hint = (
            f"Start vLLM with --enable-lora --lora-modules NAME={folder} (and --max-lora-rank) and "
            "set eval.served_adapter=NAME; or let it load folders that it sees: "
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1."
        )
        if not is_folder:
            raise KitError(f"{self.root} serves no adapter {adapter!r}.", hint)
        body = {"lora_name": own_name, "lora_path": str(folder)}
        try:
            self._call("/v1/load_lora_adapter", body, str)
        except KitError as error:
            raise KitError(
                f"The adapter cannot be loaded at run time: {error.args[0]}", hint
            ) from None
        return {"model": own_name}

    def _check_token_ids(self, name: str) -> None:
        """Load a tokenizer; a few generated tokens prove that the server's ids mean the same."""
        hint = "Set tokenizer to the served model's hub id, folder or .gguf file."
        try:
            self.tokenizer = tokenizer_alone(name)
        except KitError as error:
            raise KitError(
                f"The served model's tokenizer is not found as {name!r}: {error.args[0]}", hint
            ) from None
        prompt = tuple(self.tokenizer.encode("1, 2, 3,"))
        sampling = Sampling(temperature=0, max_new_tokens=6)
        result = next(self.generate([Request("start", prompt, sampling)]))
        text = result.error or result.completions[0].text
        if result.error or self.tokenizer.decode(result.completions[0].ids).strip() != text.strip():
            raise KitError(
                f"{self.root} accepts or returns other token ids than {name}'s: {text!r}.", hint
            )

    def generate(self, requests: Sequence[Request]) -> Iterator[Generation]:
        """Yield each request's result as it finishes, `max_num_seqs` requests in flight.

        Raises:
            KitError: the server is gone past the retries; raised after all results are yielded.
        """
        futures = [self.pool.submit(self._answer, request) for request in requests]
        failure: BaseException | None = None
        try:
            for future in as_completed(futures):
                if future.cancelled():
                    continue
                if future.exception():
                    # nothing new is sent; requests in flight still bring their results
                    failure = failure or future.exception()
                    cancel(futures)
                else:
                    yield future.result()
        finally:
            cancel(futures)
        if failure:
            raise failure

    def session(self, uncached: bool = False) -> HttpSession:
        """Open a judging session; uncached=True has the server evaluate every prompt in full."""
        return HttpSession(self, uncached)

    def close(self) -> None:
        """Close the connections; what is in flight is given up and keeps no thread waiting."""
        self.pool.shutdown(wait=False, cancel_futures=True)
        self._await(_cancel_others())
        self._await(self._client.close())
        self._loop.call_soon_threadsafe(self._loop.stop)

    def complete(self, prompt: Sequence[int], fields: Json, usage: TokenUsage) -> list[Json]:
        """The choices of a completion of token ids.

        Args:
            prompt: token ids.
            fields: the request's other fields.
            usage: the request's tokens are added to it.

        Raises:
            Refused: the server will never take this request.
            KitError: it is gone past the retries, requires a key, or counted other tokens than were
                sent.
        """
        size = len(prompt)
        body = {"model": self.engine.model, "prompt": list(prompt), **fields}
        if self._loras:  # a LoRA that llama-server was started with applies unless told otherwise
            body["lora"] = [{"id": lora["id"], "scale": 0.0} for lora in self._loras]
            # its cache does not tell what an adapter computed from what the base did
            body["cache_prompt"] = False
        if self.adapter_enabled:
            body.update(self._adapter_fields)
        reply = self._call("/v1/completions", body)
        with self.conforming():
            choices = list(reply.get("choices") or ())
            reported = reply.get("usage") or {}
            counted = reported.get("prompt_tokens", size)
            details = reported.get("prompt_tokens_details") or {}
            cached_tokens = int(details.get("cached_tokens") or 0)
        wanted = fields.get("n", 1)
        if len(choices) != wanted or counted != size:
            raise KitError(
                f"{self.root} returns {len(choices)} completions and counts {counted} prompt "
                f"tokens where {wanted} of {size} ids were asked for.",
                "Use a server that takes ids as they are: vLLM, SGLang, llama-server.",
            )
        spent = TokenUsage(size - cached_tokens, cached_tokens)
        with self._lock:
            usage.add(spent)
            self._usage.add(spent)
            total = sum(vars(self._usage).values())
            ratio = self._usage.cached_tokens / total
            self.notes[:] = [f"prefix cache: {ratio:.1%} of {total:,} prompt tokens reused"]
        return choices

    def _call(self, path: str, body: Json | None = None, expected: type = dict) -> Any:
        """POST a body, or GET without one, under the server's root; raises as `complete`."""
        try:
            if body:
                reply = self._await(self._client.post(path, body=body, cast_to=object))
            else:
                reply = self._await(self._client.get(path, cast_to=object))
        except openai.OpenAIError as error:
            raise self._explained(error) from None
        except (ValueError, RecursionError):
            reply = None
        if not isinstance(reply, expected):
            raise KitError(
                f"{self.root}{path} does not answer in JSON.",
                "Check url: it must be an API's address.",
            )
        return reply

    def _await(self, request: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(request, self._loop).result()

    @contextlib.contextmanager
    def conforming(self) -> Iterator[None]:
        """Name a reply whose JSON has another form; what is done within only reads replies."""
        try:
            yield
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise KitError(
                f"{self.root} replies in another form than OpenAI's API: {error!r:.200}.",
                "Use a server that keeps to it: vLLM, SGLang, llama-server.",
            ) from None

    def _explained(self, error: Exception) -> KitError:
        """An error of the openai package as one for users."""
        # a server may repeat the key that it was sent
        text = " ".join(str(error).replace(self._key, "***").split())[:500]
        status = getattr(error, "status_code", None)
        if status in REDIRECT_STATUSES:
            return KitError(
                f"{self.root} redirects to another address: {text}",
                "Set url to the final address: prompts and key are not sent to another one.",
            )
        if status in REFUSED_STATUSES:
            return Refused(f"{self.root} refuses a prompt: {text}")
        if status in KEY_STATUSES:
            variable = self.engine.api_key_env
            state = "set, but not accepted" if os.environ.get(variable or "") else "not set"
            return KitError(
                f"{self.root} requires a key, and the variable that api_key_env names, {variable}, "
                f"is {state}: {text}",
                "Name the variable that holds the key, and set it.",
            )
        return KitError(
            f"{self.root} does not answer after {self.engine.retries} retries: {text}",
            "Start the server, check url or set a larger timeout_seconds; "
            "the same command then goes on from here.",
        )

    def _answer(self, request: Request) -> Generation:
        """All samples of one request."""
        error = too_long(request, self.context_tokens)
        if error:
            return error
        begun = time.perf_counter()
        usage = TokenUsage()
        choices = []
        # llama-server caches by slot: its samples go one by one and find the prompt's slot again.
        # vLLM refuses several greedy ones.
        step = 1 if self.llama or request.sampling.temperature == 0 else request.n
        try:
            for first in range(0, request.n, step):
                fields = self._sampling_fields(request, first, step)
                choices += self.complete(request.prompt, fields, usage)
        except Refused as refused:
            return Generation(request.id, prompt_tokens=len(request.prompt), error=str(refused))
        with self.conforming():
            completions = [self._completion(choice, request.sampling) for choice in choices]
        return Generation(
            request.id,
            tuple(completions),
            len(request.prompt),
            usage.prefill_tokens,
            time.perf_counter() - begun,
        )

    def _sampling_fields(self, request: Request, first: int, count: int) -> Json:
        """The fields of `count` samples, the first of which is number `first`."""
        sampling = request.sampling
        room = self.context_tokens - len(request.prompt)
        fields = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "min_p": sampling.min_p,
            "stop": list(sampling.stop),
            "max_tokens": min(sampling.max_new_tokens, room),
            # the server seeds the k-th of these samples with seed + k
            "seed": sample_seed(request.seed, request.id, first),
        }
        penalty = sampling.repetition_penalty
        if not self.llama:
            return {**fields, "repetition_penalty": penalty, "n": count, "return_token_ids": True}
        return {
            **fields,
            "repeat_penalty": penalty,
            "repeat_last_n": self.context_tokens,
            "samplers": SAMPLERS,
            "logprobs": 1,  # nothing else brings the ids
        }

    def _ids(self, choice: Json) -> list[int]:
        """The token ids of a completion."""
        ids = choice.get("token_ids")
        if self.llama:
            content = (choice.get("logprobs") or {}).get("content") or ()
            ids = [entry["id"] for entry in content]
        if ids is None:  # SGLang
            ids = self.tokenizer.encode(choice["text"], special=False)
        ids = [int(token) for token in ids]
        if not all(0 <= token < 1 << 31 for token in ids):
            raise ValueError("a token id out of range")
        return ids

    def _completion(self, choice: Json, sampling: Sampling) -> Completion:
        if not isinstance(choice["text"], str):
            raise TypeError("a completion's text is no string")
        ids = self._ids(choice)
        finish_reason: Any = choice.get("finish_reason")
        if finish_reason == "stop" and ids and ids[-1] in self.tokenizer.eos_ids:
            ids = ids[:-1]
        if finish_reason == "length" and sampling.stop_loops and looping(ids):
            finish_reason = "loop"
        if finish_reason not in ("stop", "length", "loop"):
            finish_reason = "error"
        return Completion(choice["text"], tuple(ids), finish_reason)


class HttpSession:
    """See kit.backends.base.ScoringSession. Sessions may run at once, each in its own thread."""

    def __init__(self, backend: HttpBackend, uncached: bool = False) -> None:
        self.backend = backend
        self.uncached = uncached
        self.cost = TokenUsage()

    def score(self, requests: Sequence[ScoreRequest]) -> list[Logprobs]:
        """Read log-probabilities; KitError: the server is gone, or does not judge."""
        prompts = itertools.chain(*(request.prompts() for request in requests))
        longest_first = sorted(prompts, key=lambda prompt: len(prompt[0]), reverse=True)
        # The longest fills the cache. The others then go at once, or one by one through
        # llama-server's slot.
        apply = map if self.backend.llama else self.backend.pool.map
        values = [*map(self._score, longest_first[:1]), *apply(self._score, longest_first[1:])]
        by_prompt = dict(zip(longest_first, values, strict=True))
        return [list(map(by_prompt.__getitem__, request.prompts())) for request in requests]

    def close(self) -> None:
        """Nothing to free: the cache is the server's."""

    def _score(self, prompt: tuple[Ids, Ids]) -> list[float]:
        """Log-probabilities of candidates after token ids."""
        backend = self.backend
        ids, candidates = prompt
        fields: Json = {"max_tokens": 1, "temperature": 0}
        if backend.llama:
            fields["cache_prompt"] = not self.uncached
        else:
            fields.update(return_tokens_as_token_ids=True, logprob_token_ids=candidates)
            if self.uncached:  # a salt of its own keeps a prompt out of vLLM's cache
                fields["cache_salt"] = uuid.uuid4().hex
        # an unlikely candidate may not be among the top: llama-server then lists every token
        for count in (TOP_LOGPROBS, ALL_LOGPROBS) if backend.llama else (TOP_LOGPROBS,):
            fields["logprobs"] = count
            choice = backend.complete(ids, fields, self.cost)[0]
            with backend.conforming():
                known = logprobs(choice)
                if known.keys() >= set(candidates):
                    return [known[candidate] for candidate in candidates]
        raise KitError(
            f"{backend.root} returns no log-probabilities by token ID.",
            "Judge with llama-server, a vLLM with logprob_token_ids, or backend=hf or gguf.",
        )


def cancel(futures: Sequence[Future]) -> None:
    """Cancel what has not begun."""
    for future in futures:
        future.cancel()


def logprobs(choice: Json) -> dict[int, float]:
    """Log-probabilities of the first token and its rivals by id, from llama-server or vLLM."""
    reply = choice.get("logprobs") or {}
    if reply.get("content"):
        first = reply["content"][0]
        return {entry["id"]: _number(entry["logprob"]) for entry in (*first["top_logprobs"], first)}
    by_name = (reply.get("top_logprobs") or [{}])[0]
    return {
        int(name.removeprefix("token_id:")): _number(value)
        for name, value in by_name.items()
        if name.startswith("token_id:")
    }


def _number(value: Any) -> float:
    if math.isnan(value):
        raise ValueError("a log-probability is not a number")
    return float(value)


async def _cancel_others() -> None:
    """Cancel what else runs in this event loop, and wait until it has ended."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
