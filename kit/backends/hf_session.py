"""Reads along one trace through transformers: the trunk is prefilled once, every boundary is a tail on it.

Section 3.2 of the paper. The longest probe seen is the trunk; a shorter one branches off at their common
token prefix, and the tails of a scan go through the model together. Models whose cache cannot be cut
(recurrent, hybrid, unknown attention) keep snapshots instead, or recompute; a self-check at the first
session finds out which. What a verdict is, and which boundaries to ask, is not decided here.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import DynamicCache

from kit.backends import Cost, Probe, Readings
from kit.backends.hf_attention import Layout, TrunkCache, laid_out
from kit.errors import KitError

if TYPE_CHECKING:
    from kit.backends.hf import HfBackend

PACK_TOKENS = 512  # tails evaluated together
READ_BYTES = 64 << 20  # logits alive at once
STRIDE_TOKENS, SNAPSHOTS = 64, 64  # between snapshots, and how many; past that every other one is dropped
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.05}  # of the spread of log-probabilities
SPEED = {
    "tree": "",
    "snapshots": f"snapshots every {STRIDE_TOKENS} tokens and recomputes up to so many for a question",
    "none": "every question is a whole prefill",
}


class HfSession:
    """See kit.backends.Session.

    Args:
        backend: the model.
        fresh: evaluate every probe from its first token, without a cache.
        chunk_tokens: tokens of one forward pass; bounds memory.
    """

    def __init__(self, backend: HfBackend, fresh: bool = False, chunk_tokens: int = 1024) -> None:
        self.backend, self.chunk_tokens, self.cost = backend, chunk_tokens, Cost()
        self.reader: _Fresh = _Fresh(self) if fresh else _KINDS[cache_kind(backend)](self)

    def read(self, probes: Sequence[Probe]) -> list[Readings]:
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
            return self.reader.read(probes)

    def close(self) -> None:
        """Drop the cache."""
        self.reader = _Fresh(self)


_Reads = Sequence[tuple[int, tuple[int, ...]]]


class _Fresh:
    """No cache at all: the slow, obvious way that the others are tested against."""

    def __init__(self, session: HfSession) -> None:
        self.session, self.model, self.device = session, session.backend.model, session.backend.device
        self.path = np.empty(0, np.int64)  # token ids (T,) of the longest probe whose states are cached

    def read(self, probes: Sequence[Probe]) -> list[Readings]:
        for probe in probes:
            self.count(len(probe.ids), 0)
        return [self.forward(np.asarray(probe.ids), probe.reads, use_cache=False) for probe in probes]

    def forward(self, ids: np.ndarray, reads: _Reads, start: int = 0, **options: Any) -> Readings:
        """Evaluate ids (n,), the first at index `start` of its probe, and read what lies among them."""
        wanted = [(p - start, candidates) for p, candidates in reads if start <= p < start + len(ids)]
        rows = torch.tensor([p for p, _ in wanted], dtype=torch.long, device=self.device)
        shown = torch.from_numpy(np.ascontiguousarray(ids)).to(self.device)[None]
        logits = self.model(input_ids=shown, logits_to_keep=rows, **options).logits[0].float()  # (reads, V)
        return [(row[list(c)] - row.logsumexp(-1)).tolist() for row, (_, c) in zip(logits, wanted, strict=True)]

    def count(self, evaluated: int, reused: int) -> None:
        self.session.cost.add(Cost(evaluated, reused))


class _Tree(_Fresh):
    """A trunk in buffers; tails borrow the place behind their cut and give it back."""

    def __init__(self, session: HfSession) -> None:
        super().__init__(session)
        config = self.model.config.get_text_config()
        self.cache = TrunkCache(config.num_hidden_layers)
        self.reads_limit = max(1, READ_BYTES // (4 * config.vocab_size))

    def read(self, probes: Sequence[Probe]) -> list[Readings]:
        ids = [np.asarray(probe.ids) for probe in probes]
        lead = max(range(len(ids)), key=lambda i: len(ids[i]))
        found = {lead: self._single(ids[lead], probes[lead])}
        pack: list[tuple[int, int]] = []
        for cut, i in sorted((usable(self.path, ids[i], probes[i]), i) for i in range(len(ids)) if i != lead):
            tokens = sum(len(ids[j]) - c for c, j in [*pack, (cut, i)])
            if pack and (tokens > PACK_TOKENS or sum(len(probes[j].reads) for _, j in pack) >= self.reads_limit):
                found |= self._together(pack, ids, probes)
                pack = []
            pack.append((cut, i))
        found |= self._together(pack, ids, probes)
        return [found[i] for i in range(len(ids))]

    def _single(self, ids: np.ndarray, probe: Probe) -> Readings:
        """Evaluate what the trunk lacks, in chunks; the longer of trunk and probe is the trunk afterwards."""
        cut, chunk = usable(self.path, ids, probe), self.session.chunk_tokens
        with self._borrowed(cut, len(ids)):
            found: Readings = []
            for start in range(cut, len(ids), chunk):
                piece = ids[start : start + chunk]
                found += self._run(piece, probe.reads, [start], [len(piece)], start)
        if len(ids) > len(self.path):
            self.path = ids
        self.count(len(ids) - cut, cut)
        return found

    def _together(self, pack: list[tuple[int, int]], ids: list[np.ndarray], probes: Sequence[Probe]) -> dict[int, Any]:
        """One forward pass over several tails (cut, probe), each seeing the trunk up to its own cut and itself."""
        if len(pack) == 1:  # it may be longer than a chunk
            return {i: self._single(ids[i], probes[i]) for _, i in pack}
        if not pack:
            return {}
        cuts, lengths = [cut for cut, _ in pack], [len(ids[i]) - cut for cut, i in pack]
        starts = np.cumsum([0, *lengths])
        reads = [(p - cut + at, c) for (cut, i), at in zip(pack, starts, strict=False) for p, c in probes[i].reads]
        tails = np.concatenate([ids[i][cut:] for cut, i in pack])
        with self._borrowed(max(cuts), min(max(cuts) + len(tails), len(self.path))):
            rows = iter(self._run(tails, reads, cuts, lengths))
        self.count(len(tails), sum(cuts))
        return {i: [next(rows) for _ in probes[i].reads] for _, i in pack}

    @contextmanager
    def _borrowed(self, cut: int, end: int) -> Iterator[None]:
        """Let [cut, end) of the trunk be overwritten, and put it back; a tail past the trunk's end becomes trunk."""
        saved = self.cache.save(cut, end) if end <= len(self.path) else None
        self.cache.length, self.cache.room = cut, max(end, self.cache.room)
        yield
        if saved is not None:
            self.cache.restore(cut, saved)

    def _run(self, ids: np.ndarray, reads: _Reads, cuts: list[int], lengths: list[int], start: int = 0) -> Readings:
        layout = Layout(cuts, lengths, self.device)
        options = {"past_key_values": self.cache, "position_ids": layout.position[None], "use_cache": True}
        with laid_out(self.model, layout):
            found = self.forward(ids, reads, start, **options)
        self.cache.length += len(ids)
        return found


class _Snapshots(_Fresh):
    """The model's own cache, copied every so many tokens along the longest probe; the rest is recomputed."""

    def __init__(self, session: HfSession) -> None:
        super().__init__(session)
        self.kept: list[tuple[int, Any]] = []  # (tokens, cache), ascending, along `path`
        arguments = inspect.signature(self.model.forward).parameters
        self.name = "past_key_values" if "past_key_values" in arguments else "cache_params"

    def read(self, probes: Sequence[Probe]) -> list[Readings]:
        order = sorted(range(len(probes)), key=lambda i: len(probes[i].ids))
        found = {i: self._single(np.asarray(probes[i].ids), probes[i]) for i in order}
        return [found[i] for i in range(len(probes))]

    def _single(self, ids: np.ndarray, probe: Probe) -> Readings:
        shared, limit = common(self.path, ids), usable(self.path, ids, probe)
        if len(ids) > len(self.path):
            self.kept, self.path, shared = [(n, c) for n, c in self.kept if n <= shared], ids, len(ids)
        begin, cache = max(((n, c) for n, c in self.kept if n <= limit), key=lambda x: x[0], default=(0, None))
        cache = copied(cache) if cache is not None else DynamicCache(config=self.model.config)
        first = (begin // STRIDE_TOKENS + 1) * STRIDE_TOKENS
        stops = [*range(first, len(ids), STRIDE_TOKENS), len(ids)]
        found: Readings = []
        for start, end in zip([begin, *stops], stops, strict=False):
            found += self.forward(ids[start:end], probe.reads, start, use_cache=True, **{self.name: cache})
            if end < len(ids) and end <= shared and all(n != end for n, _ in self.kept):
                self.kept.append((end, copied(cache)))
        self.kept.sort(key=lambda x: x[0])
        while len(self.kept) > SNAPSHOTS:
            self.kept = self.kept[1::2]
        self.count(len(ids) - begin, begin)
        return found


_KINDS: dict[str, type[_Fresh]] = {"tree": _Tree, "snapshots": _Snapshots, "none": _Fresh}


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
    ids = np.random.default_rng(0).integers(config.vocab_size // 8, config.vocab_size // 2, length + 6).tolist()
    cuts = [length // 2, length, length * 3 // 4, length // 3, length // 2 + 1, length * 7 // 8]
    every = tuple(range(min(config.vocab_size, 512)))
    probes = [Probe((*ids[: n - 6], *ids[length + i % 3 :]), ()) for i, n in enumerate(cuts)]
    probes = [Probe(p.ids, ((len(p.ids) - 2, every), (len(p.ids) - 1, every))) for p in probes]
    fresh = np.asarray(HfSession(backend, fresh=True).read(probes))
    allowed = TOLERANCE.get(backend.model.dtype, 1e-3) * max(float(fresh.std()), 1e-6)
    if getattr(backend.model, "hf_quantizer", None) is not None:
        allowed = max(allowed, TOLERANCE[torch.bfloat16] * float(fresh.std()))
    why = []
    for kind in ("tree", "snapshots"):
        backend.cache_kind = kind  # type: ignore[attr-defined]
        session = HfSession(backend, chunk_tokens=40)
        try:
            found = np.asarray([session.read([p])[0] for p in probes[:3]] + session.read(probes[3:]))
        except Exception as error:  # whatever a model's own cache raises, the next way is tried and the user told
            why.append(f"{kind}: {type(error).__name__}: {str(error)[:120]}")
            continue
        worst = float(np.abs(found - fresh).max())
        if worst <= allowed:
            return kind, "; ".join(why)
        why.append(f"{kind}: log-probabilities moved by {worst:.2g}")
    return "none", "; ".join(why)


def copied(cache: Any) -> Any:
    """A cache that can go on by itself: tensors that forward passes replace are shared, those they write are cloned."""
    new = copy.copy(cache)
    new.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in new.layers:
        for name, value in vars(layer).items():
            if isinstance(value, dict):
                cloned = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in value.items()}
                setattr(layer, name, cloned)
    return new


def common(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the longest common prefix."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


def usable(held: np.ndarray, ids: np.ndarray, probe: Probe) -> int:
    """Tokens of a probe that need no evaluation: shared with `held`, and before the first read."""
    return min(common(held, ids), probe.reads[0][0] if probe.reads else len(ids) - 1)
