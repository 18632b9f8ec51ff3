"""Judging sessions on transformers: one trace is prefilled once, and boundaries branch off it.

Section 3.2 of the paper. The cached tokens of a trace are the *trunk*. Every request is a *tail*
that branches off where its tokens part from the trunk's, and many tails go through the model in
one pass under a tree mask: a 4-D mask, which transformers takes as given. Models that keep
something other than keys and values (recurrent, hybrid, chunked attention) recompute every
request. What a verdict is, and which boundaries to ask, is not decided here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import DynamicCache
from transformers.cache_utils import get_layer_types_and_kwargs

from kit.backends.base import (
    Logprobs,
    ScoreRequest,
    Tail,
    TrunkSession,
    check_requests,
)
from kit.backends.hf_batch import GrowingLayer, few_tokens
from kit.core.errors import KitError
from kit.core.memory import is_out_of_memory

if TYPE_CHECKING:
    from kit.backends.hf import HfBackend

SHARE_HEADS = "TRANSFORMERS_SDPA_FORCE_GQA"  # read by transformers in every layer
TREE_LAYERS = frozenset({"full_attention", "sliding_attention"})  # what a tree mask can express
PIECE_TOKENS = 512  # of one pass: each also reads the weights and the whole trunk once
SMALLEST_PIECE_TOKENS = 64  # less saves no memory beside the trunk's
CHECK_PIECE_TOKENS = 40  # of the self-check: several passes for trunk and tails
# How far cached log-probabilities may be from uncached ones, as a share of their spread: rounding
# in fp32; in 16 bits and quantized, the shape of a pass moves more.
EXACT_TOLERANCE = 1e-3
COARSE_TOLERANCE = 0.15


class TrunkLayer(GrowingLayer):
    """Has room for the tails of a pass, and for short pieces, without being copied."""

    room_tokens = PIECE_TOKENS


class TreeSession(TrunkSession):
    """The trunk's keys and values stay in the cache; tails are appended to it and removed."""

    def __init__(self, backend: HfBackend, piece_tokens: int, uncached: bool = False) -> None:
        super().__init__(piece_tokens, uncached)
        self.backend = backend
        self.model = backend.model
        self._clear()

    def _clear(self) -> None:
        self.trunk = self.trunk[:0]
        self.cache = DynamicCache()
        # Layers with a sliding window keep all keys too: a tail may branch off before it.
        layers = self.model.config.get_text_config().num_hidden_layers
        self.cache.layers = [TrunkLayer() for _ in range(layers)]

    def score(self, requests: Sequence[ScoreRequest]) -> list[Logprobs]:
        """Score requests; see base.ScoringSession.

        Running out of memory drops the cache and halves the passes.

        Raises:
            KitError: a request is longer than the model's context.
        """
        longest = max(len(request.ids) for request in requests)
        if longest > self.backend.context_tokens:
            raise KitError(
                f"A judging prompt has {longest} tokens, but the model's context is "
                f"{self.backend.context_tokens}.",
                "Set judge.limit_tokens, or judge with a model of longer context.",
            )
        before = replace(self.cost)
        while True:
            try:
                return super().score(requests)
            except (RuntimeError, MemoryError) as error:
                self._clear()
                self.cost = replace(before)
                self.piece_tokens //= 2
                if not is_out_of_memory(error) or self.piece_tokens < SMALLEST_PIECE_TOKENS:
                    raise

    def close(self) -> None:
        """Nothing to release: the cache is dropped with the session."""

    def _score_uncached(self, request: ScoreRequest) -> Logprobs:
        return forward(self.model, [request])[0]

    def _cut_cache(self, tokens: int) -> None:
        # DynamicCache.crop takes minus the tokens to remove.
        self.cache.crop(tokens - self.cache.get_seq_length())

    def _extend(self, piece: Tail) -> Logprobs:
        # Without a mask of ours, transformers takes its fastest attention.
        return forward(self.model, [piece], self.cache)[0]

    def _score_tails(self, tails: Sequence[Tail]) -> list[Logprobs]:
        trunk_tokens = self.cache.get_seq_length()
        mask, positions = tree_mask(self.model, trunk_tokens, tails)
        results = forward(
            self.model, tails, self.cache, attention_mask=mask, position_ids=positions
        )
        self._cut_cache(trunk_tokens)
        return results


@torch.inference_mode()
def forward(
    model: Any, requests: Sequence[ScoreRequest], cache: Any = None, **options: Any
) -> list[Logprobs]:
    """Evaluate the tokens of requests, one after the other, in one pass; reads their logits.

    They are appended to the cache, if one is given.
    """
    ids: list[int] = []
    positions: list[int] = []
    for request in requests:
        positions += [len(ids) + position for position, _ in request.reads]
        ids += request.ids
    with few_tokens(len(ids), model.device), shared_heads(model.device):
        output = model(
            input_ids=torch.tensor([ids], device=model.device),
            logits_to_keep=torch.tensor(positions, dtype=torch.long, device=model.device),
            past_key_values=cache,
            use_cache=cache is not None,
            **options,
        )
    rows = iter(output.logits[0])
    results = []
    for request in requests:
        logprobs = []
        for _, candidates in request.reads:
            row = next(rows).float().log_softmax(-1)
            logprobs.append(row[list(candidates)].tolist())
        results.append(logprobs)
    return results


@torch.inference_mode()
def entropies(
    backend: HfBackend, ids: Sequence[int], piece_tokens: int = PIECE_TOKENS
) -> list[float]:
    """The entropy of the distribution after each token (T,), in nats, from one prefill.

    It goes through the model in pieces, so that the logits of few tokens are in memory at once.
    """
    session = open_session(backend)
    cache = None if session.uncached else session.cache
    if cache is None:
        piece_tokens = len(ids)
    values: list[float] = []
    for start in range(0, len(ids), piece_tokens):
        piece = torch.tensor([ids[start : start + piece_tokens]], device=backend.device)
        options = {"past_key_values": cache, "use_cache": cache is not None}
        with few_tokens(piece.shape[1], backend.device):
            logits = backend.model(input_ids=piece, **options).logits
        values += torch.distributions.Categorical(logits=logits[0].float()).entropy().tolist()
    return values


@contextmanager
def shared_heads(device: torch.device) -> Iterator[None]:
    """On a CPU: query heads read the key head that they share.

    Where there is a mask, transformers copies keys and values for every query head: the whole trunk
    at every pass, about a tenth of its time. The CPU's kernel needs no copies, for the same bits.
    """
    if device.type == "cpu":
        os.environ[SHARE_HEADS] = "1"
    try:
        yield
    finally:
        os.environ.pop(SHARE_HEADS, None)


def tree_mask(model: Any, trunk_tokens: int, tails: Sequence[Tail]) -> tuple[Any, torch.Tensor]:
    """The attention mask of tails that go through a model together, after the whole trunk.

    A token sees the trunk up to its tail's cut, and its own tail up to itself. A sliding window
    counts positions in the request, not columns of the cache, so it is part of the mask.

    Returns:
        An additive mask (1, 1, q, trunk + q) for the q tokens, which SDPA and eager attention both
        take. For a config with layer types: a dict of them by type, as transformers'
        create_masks_for_generate makes it. And the tokens' positions (1, q).
    """
    tokens = sum(len(tail.ids) for tail in tails)
    columns = trunk_tokens + tokens
    mask = torch.full((tokens, columns), float("-inf"), dtype=model.dtype, device=model.device)
    position = torch.arange(columns, device=model.device)  # in the request, of every column
    row = 0
    for tail in tails:
        end = row + len(tail.ids)
        own_columns = slice(trunk_tokens + row, trunk_tokens + end)
        position[own_columns] += tail.cut - own_columns.start
        # 0 lets a token see: the trunk up to the cut, and below the diagonal its own tail.
        mask[row:end, : tail.cut] = 0
        mask[row:end, own_columns].triu_(1)
        row = end

    config = model.config.get_text_config()
    own_position = position[trunk_tokens:]
    windowed = mask
    window = getattr(config, "sliding_window", None)
    if window is not None:
        too_far = position <= own_position[:, None] - window
        windowed = mask.masked_fill(too_far, float("-inf"))
    if not hasattr(config, "layer_types"):
        return windowed[None, None], own_position[None]
    by_type = {"full_attention": mask[None, None], "sliding_attention": windowed[None, None]}
    return by_type, own_position[None]


def open_session(
    backend: HfBackend, uncached: bool = False, piece_tokens: int = PIECE_TOKENS
) -> TreeSession:
    """Open a session on a model.

    Args:
        uncached: evaluate every request from its first token, without a cache.
        piece_tokens: of one forward pass with a cache; bounds memory.
    """
    uncached = uncached or cache_kind(backend) == "uncached"
    return TreeSession(backend, piece_tokens, uncached)


def cache_kind(backend: HfBackend) -> str:
    """tree or uncached: how this model is judged. Checked once per backend; sets its cache_kind."""
    if backend.cache_kind is None:
        problem = _tree_problem(backend)
        backend.cache_kind = "uncached" if problem else "tree"
        if problem:
            note = f"judging cache: {problem}; every prompt is prefilled whole"
            backend.notes.append(note)
    return backend.cache_kind


def _tree_problem(backend: HfBackend) -> str:
    """Why a model cannot be judged on a tree; empty if it can.

    Compares cached with uncached log-probabilities of requests that share beginnings and branch.
    """
    # Chunked attention would pass a check that is shorter than a chunk: types come first.
    config = backend.model.config.get_text_config()
    layer_types, _ = get_layer_types_and_kwargs(config)
    other_types = set(layer_types) - TREE_LAYERS
    if other_types:
        return f"it has layers of type {', '.join(sorted(other_types))}"

    # GPT-Neo and Doge count these in columns of the cache, and they are longer than the check
    for key in ("window_size", "keep_window_size"):
        if getattr(config, key, None):
            return f"its attention has a {key} of its own"

    # longer than a short window
    window = getattr(config, "sliding_window", None) or 0
    length = window + 64 if 32 <= window <= 2048 else 96
    requests = check_requests(config.vocab_size, min(length, backend.context_tokens - 6))
    uncached = np.asarray(TreeSession(backend, 0, uncached=True).score(requests))
    session = TreeSession(backend, CHECK_PIECE_TOKENS)
    try:
        # A question first, then longer and shorter ones: the trunk grows, and tails leave it.
        cached = session.score(requests[:1]) + session.score(requests[1:])
    except Exception as error:
        if is_out_of_memory(error):
            raise
        # A model's own code may raise anything on a cache or a mask that it does not know.
        return f"{type(error).__name__}: {str(error)[:120]}"

    quantized = getattr(backend.model, "hf_quantizer", None) is not None
    exact = backend.model.dtype == torch.float32 and not quantized
    tolerance = EXACT_TOLERANCE if exact else COARSE_TOLERANCE
    difference = np.abs(np.asarray(cached) - uncached).max()
    if difference <= tolerance * uncached.std():
        return ""
    return f"log-probabilities moved by {difference:.2g}"
