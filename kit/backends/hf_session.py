"""Judging sessions on transformers: one trace is prefilled once, and boundaries branch off it.

Section 3.2 of the paper. The cached tokens of a trace are the *trunk*. Every request is a *tail*
that branches off where its tokens part from the trunk's, and many tails go through the model in
one pass under a tree mask: a 4-D mask, which transformers takes as given. Models that keep
something other than keys and values (recurrent, hybrid, chunked attention) recompute every
request. What a verdict is, and which boundaries to ask, is not decided here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import DynamicCache
from transformers.cache_utils import get_layer_types_and_kwargs

from kit.backends.base import Logprobs, ScoreRequest, TokenUsage, common_prefix_len
from kit.backends.hf_batch import GrowingLayer, few_tokens
from kit.core.errors import KitError
from kit.core.memory import is_out_of_memory

if TYPE_CHECKING:
    from kit.backends.hf import HfBackend

TREE_LAYERS = frozenset({"full_attention", "sliding_attention"})  # what a tree mask can express
SMALLEST_CHUNK_TOKENS = 64  # less saves no memory beside the trunk's
CHECK_CHUNK_TOKENS = 40  # of the self-check: several passes for trunk and tails
# How far cached log-probabilities may be from uncached ones, as a share of their spread: rounding
# in fp32; in 16 bits and quantized, the shape of a pass moves more.
EXACT_TOLERANCE = 1e-3
COARSE_TOLERANCE = 0.15


class UncachedSession:
    """No cache: the slow, obvious way that the tree is tested against. See base.ScoringSession.

    Args:
        backend: the model; its context limits a request.
    """

    ahead_tokens = 0  # tokens past a question that cost little compared with their own pass

    def __init__(self, backend: HfBackend) -> None:
        self.model = backend.model
        self.context_tokens = backend.context_tokens
        self.cost = TokenUsage()

    def score(self, requests: Sequence[ScoreRequest]) -> list[Logprobs]:
        """Score requests; see base.ScoringSession.

        Raises:
            KitError: a request is longer than the model's context.
        """
        longest = max(len(request.ids) for request in requests)
        if longest > self.context_tokens:
            raise KitError(
                f"A judging prompt has {longest} tokens, "
                f"the model's context {self.context_tokens}.",
                "Set judge.limit_tokens, or judge with a model of longer context.",
            )
        # All tokens count as cached, until a forward pass evaluates them.
        self.cost.cached_tokens += sum(len(request.ids) for request in requests)
        while True:
            try:
                with torch.inference_mode():
                    return self._score(requests)
            except (RuntimeError, MemoryError) as error:
                if not (is_out_of_memory(error) and self._shrink()):
                    raise

    def close(self) -> None:
        """Nothing to release: the cache is dropped with the session."""

    def _shrink(self) -> bool:
        """After running out of memory, take less at a time; whether there is less to take."""
        return False

    def _score(self, requests: Sequence[ScoreRequest]) -> list[Logprobs]:
        results = []
        for request in requests:
            results += self._forward([request], use_cache=False)
        return results

    def _forward(self, requests: Sequence[ScoreRequest], **options: Any) -> list[Logprobs]:
        """Evaluate the tokens of requests, one after the other, in one pass."""
        ids: list[int] = []
        positions: list[int] = []
        for request in requests:
            positions += [len(ids) + position for position, _ in request.reads]
            ids += request.ids
        self.cost.add(TokenUsage(len(ids), -len(ids)))

        device = self.model.device
        with few_tokens(len(ids), device):
            output = self.model(
                input_ids=torch.tensor([ids], device=device),
                logits_to_keep=torch.tensor(positions, dtype=torch.long, device=device),
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


@dataclass(frozen=True)
class Tail(ScoreRequest):
    """The end of a request: its tokens from `cut` on. Those before are the trunk's."""

    cut: int = 0


class TreeSession(UncachedSession):
    """The trunk's keys and values stay in the cache; tails are appended to it and removed."""

    ahead_tokens = 64  # a pass of few tokens costs as much as one with dozens more

    def __init__(self, backend: HfBackend, chunk_tokens: int = 1024) -> None:
        super().__init__(backend)
        self.chunk_tokens = chunk_tokens
        self.config = self.model.config.get_text_config()
        self._clear()

    def _clear(self) -> None:
        self.trunk = np.empty(0, np.int64)  # token ids (T,)
        self.cache = DynamicCache()
        # Layers with a sliding window keep all keys too: a tail may branch off before it.
        self.cache.layers = [GrowingLayer() for _ in range(self.config.num_hidden_layers)]

    def _score(self, requests: Sequence[ScoreRequest]) -> list[Logprobs]:
        # 1. The longest request becomes the trunk, up to where its logits are read.
        longest = max(requests, key=_first_read)
        self._extend_trunk(longest.ids[: _first_read(longest)])

        # 2. Every request branches off the trunk with at least its first read.
        tails = []
        for request in requests:
            cut = min(common_prefix_len(self.trunk, request.ids), _first_read(request))
            reads = tuple((position - cut, candidates) for position, candidates in request.reads)
            tails.append(Tail(request.ids[cut:], reads, cut))

        # 3. Groups of tails go through the model together.
        results = []
        for group in _groups(tails, self.chunk_tokens):
            results += self._score_tails(group)
        return results

    def _shrink(self) -> bool:
        self._clear()
        self.chunk_tokens //= 2
        return self.chunk_tokens >= SMALLEST_CHUNK_TOKENS

    def _extend_trunk(self, ids: tuple[int, ...]) -> None:
        """Cache ids (n,), if they are longer than the trunk or branch off for over one pass."""
        shared = common_prefix_len(self.trunk, ids)
        if len(ids) <= len(self.trunk) and len(ids) - shared <= self.chunk_tokens:
            return
        self._crop(shared)
        self.trunk = np.asarray(ids)
        # Without a mask of ours, transformers takes its fastest attention.
        for start in range(shared, len(ids), self.chunk_tokens):
            chunk = ScoreRequest(ids[start : start + self.chunk_tokens], ())
            self._forward([chunk], past_key_values=self.cache, use_cache=True)

    def _score_tails(self, tails: Sequence[Tail]) -> list[Logprobs]:
        mask, position_ids = tree_mask(self.model, len(self.trunk), tails)
        results = self._forward(
            tails,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=self.cache,
            use_cache=True,
        )
        self._crop(len(self.trunk))
        return results

    def _crop(self, tokens: int) -> None:
        """Keep the first tokens of the cache. DynamicCache.crop takes minus those to remove."""
        self.cache.crop(tokens - self.cache.get_seq_length())


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
    backend: HfBackend, uncached: bool = False, chunk_tokens: int = 1024
) -> UncachedSession:
    """Open a session on a model.

    Args:
        uncached: evaluate every request from its first token, without a cache.
        chunk_tokens: tokens of one forward pass with a cache; bounds memory.
    """
    if uncached or cache_kind(backend) == "uncached":
        return UncachedSession(backend)
    return TreeSession(backend, chunk_tokens)


def cache_kind(backend: HfBackend) -> str:
    """tree or uncached: how this model is judged. Checked once per backend; sets its cache_kind."""
    if backend.cache_kind is None:
        problem = _tree_problem(backend)
        backend.cache_kind = "uncached" if problem else "tree"
        if problem:
            note = f"judging cache: {problem}; every question is a whole prefill"
            backend.notes.append(note)
    return backend.cache_kind


def _tree_problem(backend: HfBackend) -> str:
    """Why a model cannot be judged on a tree; empty if it can.

    Compares cached with uncached log-probabilities of requests that share beginnings and branch.
    """
    # Chunked attention would pass a check that is shorter than a chunk: types come first.
    layer_types, _ = get_layer_types_and_kwargs(backend.model.config.get_text_config())
    other_types = set(layer_types) - TREE_LAYERS
    if other_types:
        return f"it has layers of type {', '.join(sorted(other_types))}"

    requests = _check_requests(backend)
    uncached = np.asarray(UncachedSession(backend).score(requests))
    session = TreeSession(backend, CHECK_CHUNK_TOKENS)
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


def _check_requests(backend: HfBackend) -> list[ScoreRequest]:
    """Random tokens cut at six places, each with a closing turn; longer than a short window."""
    config = backend.model.config.get_text_config()
    window = getattr(config, "sliding_window", None) or 0
    length = window + 64 if 32 <= window <= 2048 else 96
    length = min(length, backend.context_tokens - 6)
    rng = np.random.default_rng(0)
    ids = rng.integers(config.vocab_size // 2, size=length + 6).tolist()
    candidates = tuple(range(min(config.vocab_size, 512)))
    requests = []
    for number, ratio in enumerate((1 / 2, 1, 3 / 4, 1 / 3, 5 / 9, 7 / 8)):
        prompt = (*ids[: int(length * ratio)], *ids[length + number % 3 :])
        last = len(prompt) - 1
        requests.append(ScoreRequest(prompt, ((last - 1, candidates), (last, candidates))))
    return requests


def _first_read(request: ScoreRequest) -> int:
    """Position of a request's first read: from there on, its tokens must be evaluated."""
    return request.reads[0][0] if request.reads else len(request.ids) - 1


def _groups(tails: Sequence[Tail], limit_tokens: int) -> Iterator[list[Tail]]:
    """Tails in order, in groups of at most so many tokens; a longer tail is a group of its own."""
    group: list[Tail] = []
    tokens = 0
    for tail in tails:
        if group and tokens + len(tail.ids) > limit_tokens:
            yield group
            group = []
            tokens = 0
        group.append(tail)
        tokens += len(tail.ids)
    yield group
