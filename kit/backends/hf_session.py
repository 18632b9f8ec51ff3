"""Reads along one trace through transformers: the trunk is prefilled once, every boundary is a tail on it.

Section 3.2 of the paper. The longest probe seen is the trunk; a shorter one branches off at their common
token prefix, and the tails of a scan go through the model together. Models whose cache cannot be cut
(recurrent, hybrid, unknown attention) keep snapshots instead, or recompute; a self-check at the first
session finds out which. What a verdict is, and which boundaries to ask, is not decided here.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import DynamicCache

from kit.backends.base import Logprobs, ScoreRequest, TokenUsage, common_prefix_len
from kit.backends.hf_attention import Layout, laid_out
from kit.backends.hf_batch import GrowingLayer
from kit.core.errors import KitError

if TYPE_CHECKING:
    from kit.backends.hf import HfBackend

READ_BYTES = 64 << 20  # logits alive at once
STRIDE_TOKENS, SNAPSHOTS = (
    64,
    64,
)  # between snapshots, and how many; past that every other one is dropped
TOLERANCE = {
    torch.float32: 1e-3,
    torch.bfloat16: 0.15,
    torch.float16: 0.05,
}  # of the spread of log-probabilities
SPEED = {
    "snapshots": f"snapshots every {STRIDE_TOKENS} tokens and recomputes up to so many for a question",
    "none": "every question is a whole prefill",
}


_Reads = Sequence[tuple[int, tuple[int, ...]]]


class UncachedSession:
    """No cache at all: the slow, obvious way that the others are tested against. See kit.backends.Session."""

    ahead_tokens = 0  # past a question that cost little beside a pass of their own

    def __init__(self, backend: HfBackend, chunk_tokens: int) -> None:
        self.backend, self.chunk_tokens, self.cost = backend, chunk_tokens, TokenUsage()
        self.model, self.device = backend.model, backend.device
        self.path = np.empty(
            0, np.int64
        )  # token ids (T,) of the longest probe whose states are cached

    def score(self, probes: Sequence[ScoreRequest]) -> list[Logprobs]:
        """Read probes; see kit.backends.Session.

        Raises:
            KitError: a probe is longer than the model's context.
        """
        longest = max((len(probe.ids) for probe in probes), default=0)
        if longest > self.backend.context_tokens:
            raise KitError(
                f"A judging prompt has {longest} tokens, the model's context {self.backend.context_tokens}.",
                "Set judge.limit_tokens, or judge with a model of longer context.",
            )
        with torch.inference_mode():
            return self._readings([np.asarray(probe.ids) for probe in probes], probes)

    def close(self) -> None:
        """Nothing to drop: the cache goes with the session."""

    def _readings(self, ids: list[np.ndarray], probes: Sequence[ScoreRequest]) -> list[Logprobs]:
        for own in ids:
            self._count(len(own), 0)
        return [
            self._forward(own, probe.reads, use_cache=False)
            for own, probe in zip(ids, probes, strict=True)
        ]

    def _forward(self, ids: np.ndarray, reads: _Reads, start: int = 0, **options: Any) -> Logprobs:
        """Evaluate ids (n,), the first at index `start` of its probe, and read what lies among them."""
        wanted = [
            (p - start, candidates) for p, candidates in reads if start <= p < start + len(ids)
        ]
        rows = torch.tensor([p for p, _ in wanted], dtype=torch.long, device=self.device)
        shown = torch.from_numpy(np.ascontiguousarray(ids)).to(self.device)[None]
        logits = (
            self.model(input_ids=shown, logits_to_keep=rows, **options).logits[0].float()
        )  # (reads, V)
        return [
            (row[list(c)] - row.logsumexp(-1)).tolist()
            for row, (_, c) in zip(logits, wanted, strict=True)
        ]

    def _count(self, evaluated: int, reused: int) -> None:
        self.cost.add(TokenUsage(evaluated, reused))


class _Tree(UncachedSession):
    """A trunk in buffers; tails are written behind it, whatever part of it they see, and cropped off again."""

    ahead_tokens = 64  # a pass of few tokens costs as much as dozens more

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        config = self.model.config.get_text_config()
        self.cache = DynamicCache()
        self.cache.layers = [GrowingLayer() for _ in range(config.num_hidden_layers)]
        self.reads_limit = max(1, READ_BYTES // (4 * config.vocab_size))

    def _readings(self, ids: list[np.ndarray], probes: Sequence[ScoreRequest]) -> list[Logprobs]:
        """The longest probe first, in chunks, if it is longer than the trunk, or branches off for more than a chunk: it
        becomes the trunk. Tails fill its last chunk and further passes."""
        chunk, found = self.chunk_tokens, [[] for _ in probes]
        lead = max(range(len(ids)), key=lambda i: len(ids[i]))
        start, end = reusable_prefix_len(self.path, ids[lead], probes[lead]), len(ids[lead])
        grows = end > len(self.path) or end - start > chunk
        if grows:
            self.path = ids[lead]
            self._count(end - start, start)
        tails = sorted(
            (reusable_prefix_len(self.path, ids[i], probes[i]), i)
            for i in range(len(ids))
            if not grows or i != lead
        )
        for at in range(start, end, chunk) if grows else ():
            pieces = [(at, lead, ids[lead][at : at + chunk])]
            if at + chunk >= end:
                pieces += self._next(tails, ids, probes, chunk - (end - at), 0)
            self._run(at, pieces, probes, found)
        while tails:
            self._run(len(self.path), self._next(tails, ids, probes, chunk, 1), probes, found)
        return found

    def _next(
        self,
        tails: list[tuple[int, int]],
        ids: list[np.ndarray],
        probes: Sequence[ScoreRequest],
        room: int,
        least: int,
    ) -> list[tuple[int, int, np.ndarray]]:
        """Take tails (cut, probe) off the list, at least so many, while they fit into `room` tokens."""
        taken, reads = [], 0
        while tails:
            cut, i = tails[0]
            reads, room = reads + len(probes[i].reads), room - (len(ids[i]) - cut)
            if (room < 0 or reads > self.reads_limit) and len(taken) >= least:
                break
            taken.append((*tails.pop(0), ids[i][cut:]))
            self._count(len(ids[i]) - cut, cut)
        return taken

    def _run(
        self,
        past: int,
        pieces: list[tuple[int, int, np.ndarray]],
        probes: Sequence[ScoreRequest],
        found: Any,
    ) -> None:
        """One forward pass over pieces (cut, probe, ids (n,)) behind `past` tokens of the trunk; adds to `found`."""
        cuts, lengths = [cut for cut, *_ in pieces], [len(piece) for *_, piece in pieces]
        layout, reads, owners = Layout(past, cuts, lengths, self.device), [], []
        for (cut, i, piece), at in zip(pieces, np.cumsum([0, *lengths]), strict=False):
            inside = [
                (p - cut + at, candidates)
                for p, candidates in probes[i].reads
                if 0 <= p - cut < len(piece)
            ]
            reads, owners = reads + inside, owners + [i] * len(inside)
        self.cache.crop(
            past - self.cache.get_seq_length()
        )  # a negative number: so many tokens off the end
        options = {
            "past_key_values": self.cache,
            "position_ids": layout.position[None],
            "use_cache": True,
        }
        with laid_out(self.model, layout):
            made = self._forward(np.concatenate([piece for *_, piece in pieces]), reads, **options)
        for i, values in zip(owners, made, strict=True):
            found[i].append(values)


class _Snapshots(UncachedSession):
    """The model's own cache, copied every so many tokens along the longest probe; the rest is recomputed."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.kept: list[tuple[int, Any]] = []  # (tokens, cache), ascending, along `path`
        arguments = inspect.signature(self.model.forward).parameters
        self.name = "past_key_values" if "past_key_values" in arguments else "cache_params"

    def _readings(self, ids: list[np.ndarray], probes: Sequence[ScoreRequest]) -> list[Logprobs]:
        found = {
            i: self._single(ids[i], probes[i])
            for i in sorted(range(len(ids)), key=lambda i: len(ids[i]))
        }
        return [found[i] for i in range(len(ids))]

    def _single(self, ids: np.ndarray, probe: ScoreRequest) -> Logprobs:
        shared, limit = (
            common_prefix_len(self.path, ids),
            reusable_prefix_len(self.path, ids, probe),
        )
        if len(ids) > len(self.path):
            self.kept, self.path, shared = (
                [(n, c) for n, c in self.kept if n <= shared],
                ids,
                len(ids),
            )
        begin, cache = max(
            ((n, c) for n, c in self.kept if n <= limit), key=lambda x: x[0], default=(0, None)
        )
        cache = (
            copy.deepcopy(cache) if cache is not None else DynamicCache(config=self.model.config)
        )
        first = (begin // STRIDE_TOKENS + 1) * STRIDE_TOKENS
        stops = [*range(first, len(ids), STRIDE_TOKENS), len(ids)]
        found: Logprobs = []
        for start, end in zip([begin, *stops], stops, strict=False):
            found += self._forward(
                ids[start:end], probe.reads, start, use_cache=True, **{self.name: cache}
            )
            if end < len(ids) and end <= shared and all(n != end for n, _ in self.kept):
                self.kept.append((end, copy.deepcopy(cache)))
        self.kept.sort(key=lambda x: x[0])
        while len(self.kept) > SNAPSHOTS:
            self.kept = self.kept[1::2]
        self._count(len(ids) - begin, begin)
        return found


_KINDS: dict[str, type[UncachedSession]] = {
    "tree": _Tree,
    "snapshots": _Snapshots,
    "none": UncachedSession,
}


def open_session(
    backend: HfBackend, uncached: bool = False, chunk_tokens: int = 1024
) -> UncachedSession:
    """A session on a model.

    Args:
        uncached: evaluate every probe from its first token, without a cache.
        chunk_tokens: tokens of one forward pass; bounds memory.
    """
    return (UncachedSession if uncached else _KINDS[cache_kind(backend)])(backend, chunk_tokens)


def cache_kind(backend: HfBackend) -> str:
    """How this model's cache may be reused: tree, snapshots or none; checked once against uncached readings."""
    kind = getattr(backend, "cache_kind", None)
    if kind is None:
        kind, why = _check(backend)
        backend.cache_kind = kind  # type: ignore[attr-defined]
        if kind != "tree":
            backend.notes.append(f"judging cache: {why}; the judge works with {SPEED[kind]}")
    return kind


def _check(backend: HfBackend) -> tuple[str, str]:
    """Compare each way of caching with uncached readings on probes that share beginnings, cut and branch."""
    config = backend.model.config.get_text_config()
    window = getattr(config, "sliding_window", None) or 0
    length = min(window + 64 if 32 <= window <= 2048 else 96, backend.context_tokens)
    ids = (
        np.random.default_rng(0)
        .integers(config.vocab_size // 8, config.vocab_size // 2, length + 6)
        .tolist()
    )
    cuts = [length // 2, length, length * 3 // 4, length // 3, length // 2 + 1, length * 7 // 8]
    every = tuple(range(min(config.vocab_size, 512)))
    probes = [ScoreRequest((*ids[: n - 6], *ids[length + i % 3 :]), ()) for i, n in enumerate(cuts)]
    probes = [
        ScoreRequest(p.ids, ((len(p.ids) - 2, every), (len(p.ids) - 1, every))) for p in probes
    ]
    fresh = np.asarray(UncachedSession(backend, 0).score(probes))
    allowed = TOLERANCE.get(backend.model.dtype, 1e-3) * max(float(fresh.std()), 1e-6)
    if getattr(backend.model, "hf_quantizer", None) is not None:
        allowed = max(allowed, TOLERANCE[torch.bfloat16] * float(fresh.std()))
    why = []
    for kind in ("tree", "snapshots"):
        session = _KINDS[kind](backend, 40)
        try:  # a question, many that go past it, one that stays within, many that do
            first, rest = probes[:1], probes[1:]
            found = [
                session.score(first) + session.score(rest),
                session.score(first) + session.score(rest),
            ]
        except (
            Exception
        ) as error:  # whatever a model's own cache raises, the next way is tried and the user told
            why.append(f"{kind}: {type(error).__name__}: {str(error)[:120]}")
            continue
        worst = float(np.abs(np.asarray(found) - fresh).max())
        if worst <= allowed:
            return kind, "; ".join(why)
        why.append(f"{kind}: log-probabilities moved by {worst:.2g}")
    return "none", "; ".join(why)


def reusable_prefix_len(held: np.ndarray, ids: np.ndarray, probe: ScoreRequest) -> int:
    """Tokens of a probe that need no evaluation: shared with `held`, and before the first read."""
    return min(common_prefix_len(held, ids), probe.reads[0][0] if probe.reads else len(ids) - 1)
