"""The wire to an OpenAI-compatible server: requests by token ids, retried, timed out and explained.

Retries, exponential back-off with jitter and Retry-After are the openai package's, which runs on a loop in a thread of
its own, so that any thread can wait for it. What is asked, and why, is in kit/backends/http.py and http_session.py.
The key comes from the environment and stands in no message.
"""

from __future__ import annotations

import asyncio
import os
import random
import threading
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from kit.backends import looping
from kit.config import Engine
from kit.errors import KitError

REFUSED = (400, 413, 422)  # of one request: asking again changes nothing
T = TypeVar("T")


class Refused(Exception):
    """A request that the server will never take; its message says why."""


@dataclass(frozen=True)
class Reply:
    """What a server answered. None: it does not tell. logprobs: of the first token and its rivals, by id."""

    text: str
    ids: tuple[int, ...] | None
    finish: str
    prompt_tokens: int | None
    cached_tokens: int | None
    logprobs: dict[int, float]


class Client:
    """A connection to one server.

    Args:
        engine: url, model, api_key_env, timeout_seconds, retries.

    Raises:
        KitError: url does not end in /v1.
    """

    def __init__(self, engine: Engine) -> None:
        import openai

        self.engine, self.url = engine, (engine.url or "http://HOST:PORT").rstrip("/")
        if not self.url.endswith("/v1"):
            raise KitError(f"url is {engine.url!r}; a server's address ends in /v1.", f"Set url={self.url}/v1.", 2)
        self.notes: list[str] = []
        self.reported_tokens = self.cached_tokens = 0  # prompt tokens, by the server's own account
        self.room = asyncio.Semaphore(engine.parallel)
        self._key = os.environ.get(engine.api_key_env) or "none"  # None would send the client looking for another
        timeout = openai.Timeout(engine.timeout_seconds, connect=min(10.0, engine.timeout_seconds))
        self._openai = openai.AsyncOpenAI(
            api_key=self._key, base_url=self.url, timeout=timeout, max_retries=engine.retries
        )
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True, name="http").start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop, from any thread, and wait for it."""
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return future.result()
        finally:
            future.cancel()  # at Ctrl-C nothing stays in flight

    def get(self, path: str) -> Any:
        """GET JSON from the server's root."""
        return self.run(self.ask("get", self.url.removesuffix("/v1") + path))

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """POST JSON to the server's root and wait for the JSON that comes back."""
        return self.run(self.ask("post", self.url.removesuffix("/v1") + path, body=body))

    def close(self) -> None:
        """Close the connections and end the thread."""
        if self.loop.is_running():
            self.run(self._openai.close())
            self.loop.call_soon_threadsafe(self.loop.stop)

    def note(self, text: str) -> None:
        """Add a note, once."""
        if text not in self.notes:
            self.notes.append(text)

    async def ask(self, method: str, url: str, **options: Any) -> Any:
        """A request through the openai client.

        Raises:
            Refused: of this request, for good.
            KitError: the server is gone past the retries, wants a key, or is no such server.
        """
        import openai

        try:
            reply = await getattr(self._openai, method)(url, **{"cast_to": object} | options)
        except openai.OpenAIError as error:
            raise self._explained(error) from None
        if isinstance(reply, str):
            raise KitError(f"{self.url} does not answer in JSON.", "Check url: it must be an API's address.")
        return reply

    async def complete(self, prompt: Sequence[int], fields: dict[str, Any], watch: bool = False) -> Reply:
        """Complete token ids; watch=True streams the answer and ends it when it loops.

        Raises:
            Refused, KitError: as `ask`; and KitError where the server counted other tokens than were sent.
        """
        body = {"model": self.engine.model, "prompt": list(prompt), **fields}
        async with self.room:
            whole = self._stream(body) if watch else self.ask("post", "/completions", body=body)
            reply = read_reply(await whole)
        self.count(len(prompt), reply.prompt_tokens, reply.cached_tokens)
        return reply

    def count(self, sent_tokens: int, counted_tokens: int | None, cached_tokens: int | None) -> None:
        """Check the server's count of a prompt, and keep account of what it reused.

        Raises:
            KitError: it counted other tokens than were sent.
        """
        if counted_tokens not in (None, sent_tokens):
            raise KitError(
                f"{self.url} counts {counted_tokens} prompt tokens where {sent_tokens} ids were sent: it tokenizes.",
                "Use a server that takes token ids as they are (vLLM, SGLang, llama-server).",
            )
        if cached_tokens is None:
            self.note("this server does not report reused tokens (vLLM: --enable-prompt-tokens-details)")
        else:
            self.reported_tokens += sent_tokens
            self.cached_tokens += cached_tokens

    async def _stream(self, body: dict[str, Any], attempt: int = 0) -> list[dict[str, Any]]:
        """The chunks of a streamed answer, begun anew when it breaks off: the package retries no broken stream."""
        import httpx2
        import openai

        body = body | {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
        stream = await self.ask("post", "/completions", body=body, stream=True, stream_cls=openai.AsyncStream[object])
        chunks: list[dict[str, Any]] = []
        ids: list[int] = []
        try:
            async for chunk in stream:
                chunks.append(chunk)
                for choice in chunk["choices"]:  # where ids are not told, chunks of equal text pass for equal tokens
                    ids += generated_ids(choice) or [hash(choice["text"])]
                if len(chunks) % 16 == 0 and looping(ids):
                    return [*chunks, {"choices": [{"text": "", "finish_reason": "repetition"}]}]
            return chunks
        except (httpx2.TransportError, openai.APIError) as error:
            if attempt >= self.engine.retries:
                raise self._explained(error) from None
        finally:
            await stream.close()
        await asyncio.sleep(min(8.0, 0.5 * 2**attempt) * random.uniform(0.75, 1))
        return await self._stream(body, attempt + 1)

    def _explained(self, error: Exception) -> Exception:
        """An error of the package as one for users; without the key, should the server have echoed it."""
        import openai

        text = " ".join(str(error).replace(self._key, "***").split())[:500]
        status, name = getattr(error, "status_code", None), self.engine.api_key_env
        if status in REFUSED:
            return Refused(text)
        if status in (401, 403):
            state = "is set, but not accepted" if os.environ.get(name) else "is not set"
            return KitError(
                f"{self.url} wants a key: {text}. The variable {name} {state}.", f"Set {name} and run again."
            )
        if status == 404:
            return KitError(f"{self.url}: {text}.", "Check url: it ends in /v1, and /v1/models answers there.")
        if isinstance(error, openai.APITimeoutError):
            return KitError(
                f"{self.url} did not answer within {self.engine.timeout_seconds:g} s, {self.engine.retries} retries.",
                "Set a larger timeout_seconds or a smaller parallel; the same command then goes on from here.",
            )
        return KitError(
            f"{self.url} does not answer after {self.engine.retries} retries: {text}",
            "Start the server; the same command then goes on from here.",
        )


def generated_ids(choice: dict[str, Any]) -> list[int] | None:
    """Generated ids of a choice: vLLM and SGLang tell them by name, llama-server in its log-probabilities."""
    if choice.get("token_ids") is not None:
        return choice["token_ids"]
    content = (choice.get("logprobs") or {}).get("content")
    return None if content is None else [entry["id"] for entry in content]


def read_reply(body: dict[str, Any] | list[dict[str, Any]]) -> Reply:
    """One reply, from a body or from the chunks of a stream.

    Raises:
        KitError: it is no completion.
    """
    chunks = body if isinstance(body, list) else [body]
    if any("choices" not in chunk for chunk in chunks):
        raise KitError("The server's answer is no completion.", "Check url: it must be an OpenAI-compatible API.")
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    told = [ids for choice in choices if (ids := generated_ids(choice)) is not None]
    text = "".join(choice["text"] for choice in choices)
    usage: dict[str, Any] = next((u for chunk in reversed(chunks) if (u := chunk.get("usage"))), {})
    timings: dict[str, Any] = next((t for chunk in chunks if (t := chunk.get("timings"))), {})
    cached = usage.get("prompt_tokens_details") or {"cached_tokens": timings.get("cache_n")}
    return Reply(
        text,
        tuple(i for ids in told for i in ids) if told or not text else None,
        next((finish for choice in reversed(choices) if (finish := choice.get("finish_reason"))), "none"),
        usage.get("prompt_tokens"),
        cached.get("cached_tokens"),
        _logprobs(choices[0].get("logprobs") or {}) if choices else {},
    )


def _logprobs(told: dict[str, Any]) -> dict[int, float]:
    """{id: log-probability} of the first generated token and its rivals; {} where ids are not told."""
    if told.get("content"):  # llama-server
        first = told["content"][0]
        return {entry["id"]: entry["logprob"] for entry in (*first["top_logprobs"], first)}
    values = dict((told.get("top_logprobs") or [None])[0] or {})  # vLLM, with return_tokens_as_token_ids
    values |= dict(zip((told.get("tokens") or ())[:1], (told.get("token_logprobs") or ())[:1], strict=True))
    return {int(name[9:]): value for name, value in values.items() if name.startswith("token_id:")}
