"""OpenAI-compatible servers (vLLM, SGLang, llama-server): how the work leaves this machine.

Prompts go to /v1/completions as token ids. Retries, back-off with jitter, Retry-After and time-outs are the openai
package's. A verdict is the log-probabilities of one generated token, its prompt's beginning taken from the server's
prefix cache (vLLM computes those of prompts past it). Candidates are told apart by token id, never by text; SGLang
names none by id: it generates, and does not judge. Nothing here starts a server or streams: `stop_loops` only names a
loop when its sample has ended. A key comes from the environment and stands in no message.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from kit.backends.base import (
    Completion,
    Generation,
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
from kit.models import load_tokenizer, resolve

REFUSED = (400, 413, 422)  # statuses of one request: asking again changes nothing
SAMPLERS = (
    "penalties",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
)  # llama-server's, in the order of transformers
TOP = 20  # log-probabilities asked for; vLLM's default limit
ALL = 1 << 20  # more than any vocabulary; llama-server tells as many as there are


class Refused(KitError):
    """A request that the server will never take."""


class HttpBackend:
    """A model that a server holds; KitError: nothing answers, a key is wanted, the model is not served, or the server's
    token ids are not those of the tokenizer."""

    def __init__(self, engine: ModelConfig) -> None:
        import openai

        if not engine.url:
            raise KitError(
                "Backend http needs the server's address.", "Set url=http://HOST:PORT/v1.", 2
            )
        self.engine, self.root = engine, engine.url.rstrip("/").removesuffix("/v1")
        self.name = slug(engine.model)
        self.notes: list[str] = []
        self.turns, self._own, self._lock, self._spent = (
            itertools.count(),
            threading.local(),
            threading.Lock(),
            TokenUsage(),
        )
        self._key = (
            os.environ.get(engine.api_key_env or "") or "none"
        )  # None would send the client looking for one
        limits = openai.Timeout(engine.timeout_seconds, connect=min(10.0, engine.timeout_seconds))
        given = {
            "api_key": self._key,
            "base_url": self.root,
            "timeout": limits,
            "max_retries": engine.retries,
        }
        self._client = openai.OpenAI(**given)
        self._connect()

    def generate(self, requests: Sequence[Request]) -> Iterator[Generation]:
        """Yield each request's result as it finishes, `max_num_seqs` requests in flight; KitError: the server is gone past
        the retries, raised after all that finished has been yielded."""
        jobs = [self.pool.submit(self._answer, request) for request in requests]
        failures: list[BaseException] = []
        try:
            for job in as_completed(jobs):
                if job.cancelled():
                    continue
                if error := job.exception():
                    failures.append(error)
                    for waiting in jobs:  # those in flight still bring what they can
                        waiting.cancel()
                else:
                    yield job.result()
        finally:
            for waiting in jobs:
                waiting.cancel()
        if failures:
            raise failures[0]

    def session(self, uncached: bool = False) -> HttpSession:
        """Open a judging session; uncached=True has the server evaluate every probe without its cache."""
        return HttpSession(self, uncached)

    def close(self) -> None:
        """Close the connections."""
        self.pool.shutdown(wait=False, cancel_futures=True)
        self._client.close()

    def complete(
        self, prompt: Sequence[int], fields: dict[str, Any], cost: TokenUsage
    ) -> list[dict[str, Any]]:
        """The choices of a completion of token ids; what it took is added to `cost`.

        Raises:
            Refused: of this request, for good.
            KitError: the server is gone past the retries, wants a key, or counted other tokens than were sent.
        """
        reply = self._call(
            "/v1/completions", {"model": self.engine.model, "prompt": list(prompt), **fields}
        )
        choices, usage, wanted = (
            reply.get("choices") or (),
            reply.get("usage") or {},
            fields.get("n", 1),
        )
        counted = usage.get("prompt_tokens", len(prompt))
        if (len(choices), counted) != (wanted, len(prompt)):
            told = (
                f"{self.root} gives {len(choices)} completions and counts {counted} prompt tokens"
            )
            what = f"{told} where {wanted} of {len(prompt)} ids were asked for."
            raise KitError(
                what, "Use a server that takes ids as they are: vLLM, SGLang, llama-server."
            )
        reused = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        spent = TokenUsage(len(prompt) - (reused or 0), reused or 0)
        with self._lock:
            cost.add(spent)
            if reused is not None:
                self._spent.add(spent)
                total = sum(vars(self._spent).values())
                share = self._spent.cached_tokens / total
                self.notes[:] = [f"prefix cache: {share:.1%} of {total:,} prompt tokens reused"]
        return choices

    def _call(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """POST a body (None: GET) to a path under the server's root; raises as `complete`."""
        import openai

        try:
            get, post = self._client.get, self._client.post
            reply = post(path, body=body, cast_to=object) if body else get(path, cast_to=object)
        except openai.OpenAIError as error:
            raise self._explained(error) from None
        if not isinstance(reply, dict):
            raise KitError(
                f"{self.root}{path} does not answer in JSON.", "Check url: it must be an API's."
            )
        return reply

    def _explained(self, error: Exception) -> Exception:
        """An error of the openai package as one for users; without the key, should the server have echoed it."""
        status, name = getattr(error, "status_code", None), self.engine.api_key_env
        text = " ".join(str(error).replace(self._key, "***").split())[:500]
        if status in REFUSED:
            return Refused(f"{self.root} refuses a prompt: {text}")
        if status in (401, 403):
            state = "set, but not accepted" if os.environ.get(name or "") else "not set"
            what = f"{self.root} wants a key, and the variable that api_key_env names, {name}, is {state}: {text}"
            return KitError(what, "Name the variable that holds the key, and set it.")
        hint = "Start the server, check url or set a larger timeout_seconds; the same command then goes on from here."
        return KitError(f"{self.root} does not answer, {self.engine.retries} retries: {text}", hint)

    def _answer(self, request: Request) -> Generation:
        """All samples of a request at once; one by one through one slot of llama-server, whose cache is a slot's."""
        if refused := too_long(request, self.context_tokens):
            return refused
        begun, samples, cost, step = (
            time.perf_counter(),
            [],
            TokenUsage(),
            1 if self.llama else request.n,
        )
        try:
            for first in range(0, request.n, step):
                choices = self.complete(request.prompt, self._fields(request, first, step), cost)
                samples += [self._sample(choice, request.sampling) for choice in choices]
        except Refused as error:
            return Generation(request.id, prompt_tokens=len(request.prompt), error=str(error))
        seconds = time.perf_counter() - begun
        return Generation(
            request.id, tuple(samples), len(request.prompt), cost.prefill_tokens, seconds
        )

    def _fields(self, request: Request, first: int, count: int) -> dict[str, Any]:
        """What `count` samples are asked with; the server seeds the k-th of them with seed + k."""
        s, room = request.sampling, self.context_tokens - len(request.prompt)
        fields = {
            "temperature": s.temperature,
            "top_p": s.top_p,
            "top_k": s.top_k or -1,
            "min_p": s.min_p,
        }
        fields |= {"stop": list(s.stop), "max_tokens": min(s.max_new_tokens, room)}
        fields["seed"] = sample_seed(request.seed, request.id, first)
        if self.llama:  # logprobs because nothing else brings the ids
            fields |= {"repeat_penalty": s.repetition_penalty, "repeat_last_n": self.context_tokens}
            return fields | {"samplers": SAMPLERS, "logprobs": 1, "id_slot": self._own.slot}
        return fields | {
            "n": count,
            "repetition_penalty": s.repetition_penalty,
            "return_token_ids": True,
        }

    def _sample(self, choice: dict[str, Any], sampling: Sampling) -> Completion:
        """A choice's text and ids; where the server tells none (SGLang), they are its text's, tokenized again."""
        text, finish_reason, ids = (
            choice["text"],
            choice.get("finish_reason"),
            choice.get("token_ids"),
        )
        if ids is None:
            content = (choice.get("logprobs") or {}).get("content")
            ids = (
                [entry["id"] for entry in content or ()]
                if self.llama
                else self.tokenizer.encode(text, False)
            )
        while ids and finish_reason == "stop" and ids[-1] in self.tokenizer.eos_ids:
            ids = ids[:-1]
        if finish_reason == "length" and sampling.stop_loops and looping(ids):
            finish_reason = "loop"
        return Completion(
            text,
            tuple(ids),
            finish_reason if finish_reason in ("stop", "length", "loop") else "error",
        )

    def _connect(self) -> None:
        """Learn what is served and by whom; a few generated tokens prove that ids are taken and mean the same."""
        models = {model["id"]: model for model in self._call("/v1/models").get("data", ())}
        if (model := models.get(self.engine.model)) is None:
            hint = f"Set model to {' or '.join(models)}."
            raise KitError(f"{self.root}/v1 serves no model {self.engine.model!r}.", hint)
        self.llama, self.concurrent = model.get("owned_by") == "llamacpp", self.engine.max_num_seqs
        limit = model.get("max_model_len")
        if self.llama:
            props = self._call("/props")
            limit = props["default_generation_settings"]["n_ctx"]
            self.concurrent = min(self.concurrent, props["total_slots"])
        own, slots = self._own, itertools.count()  # each thread generates in a slot of its own
        self.pool = ThreadPoolExecutor(
            self.concurrent, initializer=lambda: setattr(own, "slot", next(slots))
        )
        if not (limit or self.engine.context_tokens):
            raise KitError(f"{self.root} does not tell the model's context.", "Set context_tokens.")
        self.context_tokens = min(filter(None, (limit, self.engine.context_tokens)))
        name = self.engine.tokenizer or model.get("root") or self.engine.model
        hint = "Set tokenizer to the served model's hub id, folder or .gguf file."
        try:
            self.tokenizer = _tokenizer(name)
        except KitError as error:
            raise KitError(
                f"The served model's tokenizer is not found as {name!r}: {error.args[0]}", hint
            ) from None
        start = Request(
            "start",
            tuple(self.tokenizer.encode("1, 2, 3,")),
            Sampling(temperature=0, max_new_tokens=6),
        )
        made = next(self.generate([start]))
        text = made.error or made.completions[0].text
        if made.error or self.tokenizer.decode(made.completions[0].ids).strip() != text.strip():
            raise KitError(
                f"{self.root} takes or gives other token ids than {name}'s: {text!r}.", hint
            )


class HttpSession:
    """Reads of one trace's probes; several sessions may be open at once, each in a thread of its own."""

    def __init__(self, backend: HttpBackend, uncached: bool = False) -> None:
        self.backend, self.uncached, self.cost = backend, uncached, TokenUsage()
        self._slot = (
            next(backend.turns) % backend.concurrent
        )  # llama-server's cache is a slot's: stay in one

    def score(self, probes: Sequence[ScoreRequest]) -> list[Logprobs]:
        """Read probes, the longest first, which fills the cache; the others then at once, or, in the one slot of
        llama-server, from the longest to the shortest. KitError: the server is gone, or does not judge."""
        asked = [
            (probe.ids[: p + 1], candidates) for probe in probes for p, candidates in probe.reads
        ]
        order = sorted(range(len(asked)), key=lambda i: -len(asked[i][0]))
        each = map if self.backend.llama else self.backend.pool.map
        found = {i: self._values(*asked[i]) for i in order[:1]}
        found |= zip(order[1:], each(lambda i: self._values(*asked[i]), order[1:]), strict=True)
        values = (found[i] for i in range(len(asked)))
        return [[next(values) for _ in probe.reads] for probe in probes]

    def close(self) -> None:
        """Nothing to free: the cache is the server's."""

    def _values(self, prompt: Sequence[int], candidates: Sequence[int]) -> list[float]:
        """Log-probabilities of the candidates after a prompt."""
        backend, fields = self.backend, {"max_tokens": 1, "temperature": 0, "logprobs": TOP}
        if backend.llama:
            fields |= {"cache_prompt": not self.uncached, "id_slot": self._slot}
        else:  # a salt of its own keeps a prompt out of vLLM's cache
            fields |= {"return_tokens_as_token_ids": True, "logprob_token_ids": list(candidates)}
            fields |= {"cache_salt": uuid.uuid4().hex} if self.uncached else {}
        known = logprobs(backend.complete(prompt, fields, self.cost)[0])
        if backend.llama and not known.keys() >= set(
            candidates
        ):  # the rare label that is far from likely
            known = logprobs(backend.complete(prompt, fields | {"logprobs": ALL}, self.cost)[0])
        if not known.keys() >= set(candidates):
            what = (
                f"{backend.root} tells no log-probabilities of the tokens asked for, by their ids."
            )
            raise KitError(
                what,
                "Judge with llama-server, a vLLM that knows logprob_token_ids, or backend=hf or gguf.",
            )
        return [known[candidate] for candidate in candidates]


def logprobs(choice: dict[str, Any]) -> dict[int, float]:
    """What a server tells of the first token and its rivals, by id: as llama-server writes it, or vLLM."""
    told = choice.get("logprobs") or {}
    if content := told.get("content"):
        return {
            entry["id"]: entry["logprob"] for entry in (*content[0]["top_logprobs"], content[0])
        }
    named = dict(zip(told.get("tokens") or (), told.get("token_logprobs") or (), strict=True))
    named |= (told.get("top_logprobs") or [None])[0] or {}
    return {int(name[9:]): value for name, value in named.items() if name.startswith("token_id:")}


def _tokenizer(name: str) -> Any:
    """llama.cpp's for a GGUF, which takes no transformers and no weights."""
    if not isinstance(file := resolve(name), Path):
        return load_tokenizer(name)
    from kit.backends.gguf import GgufTokenizer, load

    return GgufTokenizer(load(file, vocab_only=True))
