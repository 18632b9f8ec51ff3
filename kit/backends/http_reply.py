"""What a server answers, read as one thing whoever wrote it: llama-server, vLLM or SGLang.

Asking is in kit/backends/http.py. Tokens are known by id; a server that names them by text alone tells nothing here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kit.errors import KitError


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


def read_reply(body: dict[str, Any]) -> Reply:
    """Read a completion as llama-server, vLLM or SGLang write it.

    Raises:
        KitError: it is none.
    """
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
    return Reply(
        choice["text"], None if ids is None else tuple(ids), finish, usage.get("prompt_tokens"), cached, values
    )
