"""Reads along one trace through transformers: the trunk is prefilled once, every boundary is a tail on it.

Section 3.2 of the paper. The longest probe seen is the trunk; a shorter one branches off at their common
token prefix, and the tails of a scan go through the model together. Models whose cache cannot be cut
(recurrent, hybrid, unknown attention) keep snapshots instead, or recompute; a self-check at the first
session finds out which. What a verdict is, and which boundaries to ask, is not decided here.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kit.backends import Cost, Probe, Readings
from kit.backends.hf_attention import Layout, TrunkCache, laid_out
from kit.errors import KitError

if TYPE_CHECKING:
    from kit.backends.hf import HfBackend

PACK_TOKENS = 512  # tails evaluated together
READ_BYTES = 64 << 20  # logits alive at once
STRIDE_TOKENS = 256  # between snapshots
CLOSING_TOKENS = 48  # one more lies this far before a probe's end, ahead of its closing turn
SNAPSHOTS = 24
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.05}  # of the spread of log-probabilities
SPEED = {"tree": "", "snapshots": "snapshots every 256 tokens", "none": "every question is a whole prefill"}


class HfSession:
    """See kit.backends.Session.

    Args:
        backend: the model.
        fresh: evaluate every probe from its first token, without a cache.
        chunk_tokens: tokens of one forward pass; bounds memory.
    """

    def __init__(self, backend: HfBackend, fresh: bool = False, chunk_tokens: int = 1024) -> None:
        self.backend, self.chunk_tokens, self.cost = backend, chunk_tokens, Cost()
        self.reader: _Reader = _Fresh(self) if fresh else _KINDS[cache_kind(backend)](self)

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


class _Reader:
    """Reads probes in one way of caching."""

    def __init__(self, session: HfSession) -> None:
        self.session, self.model, self.device = session, session.backend.model, session.backend.device
        self.path = np.empty(0, np.int64)  # token ids (T,) whose states are cached

    def forward(self, ids: np.ndarray, reads: _Reads, start: int = 0, **options: Any) -> tuple[Readings, Any]:
        """Evaluate ids (n,), the first at index `start` of its probe, and read what lies among them."""
        wanted = [(p - start, candidates) for p, candidates in reads if start <= p < start + len(ids)]
        rows = torch.tensor([p for p, _ in wanted], dtype=torch.long, device=self.device)
        shown = torch.from_numpy(np.ascontiguousarray(ids)).to(self.device)[None]
        out = self.model(input_ids=shown, logits_to_keep=rows, **options)
        return [log_probabilities(out.logits[0, i], c) for i, (_, c) in enumerate(wanted)], out

    def count(self, evaluated: int, reused: int) -> None:
        self.session.cost.add(Cost(evaluated, reused))

    def read(self, probes: Sequence[Probe]) -> list[Readings]:
        raise NotImplementedError


_Reads = Sequence[tuple[int, tuple[int, ...]]]


class _Fresh(_Reader):
    """No cache at all: the slow, obvious way that the others are tested against."""

    def read(self, probes: Sequence[Probe]) -> list[Readings]:
        found = []
        for probe in probes:
            found.append(self.forward(np.asarray(probe.ids), probe.reads, use_cache=False)[0])
            self.count(len(probe.ids), 0)
        return found


class _Tree(_Reader):
    """A trunk in buffers; tails borrow the place behind their cut and give it back."""

    def __init__(self, session: HfSession) -> None:
        super().__init__(session)
        self.cache = TrunkCache(self.model.config.get_text_config().num_hidden_layers)

    def read(self, probes: Sequence[Probe]) -> list[Readings]:
        ids = [np.asarray(probe.ids) for probe in probes]
        lead = max(range(len(ids)), key=lambda i: len(ids[i]))
        found = {lead: self._single(ids[lead], probes[lead])}
        tails = [(usable(self.path, ids[i], probes[i]), i) for i in range(len(ids)) if i != lead]
        for pack in self._packs(sorted(tails), ids, probes):
            if len(pack) == 1:
                found[pack[0][1]] = self._single(ids[pack[0][1]], probes[pack[0][1]])
            else:
                found |= self._together(pack, ids, probes)
        return [found[i] for i in range(len(ids))]

    def _single(self, ids: np.ndarray, probe: Probe) -> Readings:
        """Evaluate what the trunk lacks, in chunks; the longer of trunk and probe is the trunk afterwards."""
        cut = usable(self.path, ids, probe)
        stays = len(ids) <= len(self.path)
        saved = self.cache.save(cut, min(len(ids), len(self.path))) if stays else []
        self.cache.length, self.cache.room = cut, max(len(ids), self.cache.room)
        found: Readings = []
        for start in range(cut, len(ids), self.session.chunk_tokens):
            piece = ids[start : start + self.session.chunk_tokens]
            found += self._run(piece, probe.reads, Layout([start], [len(piece)], start, self.device), start)
            self.cache.length = start + len(piece)
        if stays:
            self.cache.restore(cut, saved)
        else:
            self.path = ids
        self.count(len(ids) - cut, cut)
        return found

    def _together(
        self, pack: list[tuple[int, int]], ids: list[np.ndarray], probes: Sequence[Probe]
    ) -> dict[int, Readings]:
        """One forward pass over several tails, each seeing the trunk up to its own cut and itself."""
        cuts, lengths = [cut for cut, _ in pack], [len(ids[i]) - cut for cut, i in pack]
        past, total = max(cuts), sum(lengths)
        saved = self.cache.save(past, min(past + total, len(self.path)))
        self.cache.length, self.cache.room = past, max(past + total, self.cache.room)
        starts = np.cumsum([0, *lengths])
        reads = [(p - cut + at, c) for (cut, i), at in zip(pack, starts, strict=False) for p, c in probes[i].reads]
        rows = self._run(
            np.concatenate([ids[i][cut:] for cut, i in pack]), reads, Layout(cuts, lengths, past, self.device)
        )
        self.cache.restore(past, saved)
        found = {}
        for cut, i in pack:
            found[i], rows = rows[: len(probes[i].reads)], rows[len(probes[i].reads) :]
            self.count(len(ids[i]) - cut, cut)
        return found

    def _run(self, ids: np.ndarray, reads: _Reads, layout: Layout, start: int = 0) -> Readings:
        with laid_out(self.model, layout):
            options = {"past_key_values": self.cache, "position_ids": layout.position[None], "use_cache": True}
            return self.forward(ids, reads, start, **options)[0]

    def _packs(
        self, tails: list[tuple[int, int]], ids: list[np.ndarray], probes: Sequence[Probe]
    ) -> Iterator[list[tuple[int, int]]]:
        """Neighbouring tails (cut, probe) in packs bounded in tokens and in logits."""
        reads_limit = max(1, READ_BYTES // (4 * self.model.config.get_text_config().vocab_size))
        pack: list[tuple[int, int]] = []
        tokens = reads = 0
        for cut, i in tails:
            tail = len(ids[i]) - cut
            if pack and (tokens + tail > PACK_TOKENS or reads + len(probes[i].reads) > reads_limit):
                yield pack
                pack, tokens, reads = [], 0, 0
            pack.append((cut, i))
            tokens, reads = tokens + tail, reads + len(probes[i].reads)
        if pack:
            yield pack


class _Snapshots(_Reader):
    """The model's own cache, copied every now and then along the longest probe; the rest is recomputed."""

    def __init__(self, session: HfSession) -> None:
        super().__init__(session)
        self.kept: list[tuple[int, Any]] = []  # (tokens, cache), ascending, along `path`

    def read(self, probes: Sequence[Probe]) -> list[Readings]:
        ids = [np.asarray(probe.ids) for probe in probes]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        found = {}
        for i, after in zip(order, [*order[1:], None], strict=True):
            ahead = len(ids[i]) - CLOSING_TOKENS if after is None else common(ids[i], ids[after])
            found[i] = self._single(ids[i], probes[i], ahead)
        return [found[i] for i in range(len(ids))]

    def _single(self, ids: np.ndarray, probe: Probe, ahead: int) -> Readings:
        from transformers import DynamicCache

        shared = common(self.path, ids)
        limit = min(shared, probe.reads[0][0]) if probe.reads else shared
        longer = len(ids) > len(self.path)
        if longer:
            self.kept, self.path = [(n, cache) for n, cache in self.kept if n <= shared], ids
        begin, cache = max(((n, c) for n, c in self.kept if n <= limit), key=lambda x: x[0], default=(0, None))
        cache = copied(cache) if cache is not None else DynamicCache(config=self.model.config)
        marks = {*range(begin // STRIDE_TOKENS * STRIDE_TOKENS + STRIDE_TOKENS, len(ids), STRIDE_TOKENS), ahead}
        stops = sorted({*(n for n in marks if begin < n < len(ids)), len(ids)})
        found: Readings = []
        for start, end in zip([begin, *stops], stops, strict=False):
            found += self._advance(ids[start:end], probe, cache, start)
            if end < len(ids) and (longer or end <= shared) and all(n != end for n, _ in self.kept):
                self._keep(end, copied(cache))
        self.count(len(ids) - begin, begin)
        return found

    def _advance(self, ids: np.ndarray, probe: Probe, cache: Any, start: int) -> Readings:
        name = "past_key_values" if "past_key_values" in _arguments(self.model) else "cache_params"
        return self.forward(ids, probe.reads, start, use_cache=True, **{name: cache})[0]

    def _keep(self, tokens: int, cache: Any) -> None:
        self.kept = sorted([*self.kept, (tokens, cache)], key=lambda x: x[0])
        if len(self.kept) > SNAPSHOTS:
            self.kept = self.kept[: SNAPSHOTS // 2 : 2] + self.kept[SNAPSHOTS // 2 :]


_KINDS: dict[str, type[_Reader]] = {"tree": _Tree, "snapshots": _Snapshots, "none": _Fresh}


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


def log_probabilities(logits: torch.Tensor, candidates: Sequence[int]) -> list[float]:
    """Natural-log probabilities of candidate ids under logits (V,)."""
    logits = logits.float()
    picked = logits[torch.tensor(candidates, device=logits.device)]
    return (picked - logits.logsumexp(-1)).tolist()


def common(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the longest common prefix."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


def usable(held: np.ndarray, ids: np.ndarray, probe: Probe) -> int:
    """Tokens of a probe that need no evaluation: shared with `held`, and before the first read."""
    return min(common(held, ids), probe.reads[0][0] if probe.reads else len(ids) - 1)


def _arguments(model: Any) -> Sequence[str]:
    import inspect

    return tuple(inspect.signature(model.forward).parameters)
