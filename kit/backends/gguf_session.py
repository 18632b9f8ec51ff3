"""Reads along one trace through llama.cpp: the trunk is prefilled once, boundaries share it by sequence copies.

Section 3.2 of the paper. Sequence 0 holds the longest probe seen (the trunk); a shorter one, and all
others of a scan, get the trunk's beginning by a copy that costs nothing and evaluate their tails only.
Caches that cannot be cut (recurrent, hybrid) keep snapshots at the boundaries asked instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from kit.backends import Cost, Probe, Readings
from kit.backends.gguf import Context, Piece
from kit.backends.gguf_generate import common
from kit.errors import KitError

if TYPE_CHECKING:
    from kit.backends.gguf import GgufBackend

SEQUENCES = 33  # the trunk and 32 tails
STATES = 12  # sequences of a model whose every sequence costs memory
SPARE_TOKENS = 1024  # cells for tails beside the trunk
CLOSING_TOKENS = 48  # a snapshot lies this far before a probe's end, so that its closing turn is behind it
CHECK = "A cache that is cut must answer as if it had never held more: 17 + 25 = 42, and 42 / 6 = 7. So"


class CannotCut(Exception):
    """llama.cpp refused to cut or copy a sequence."""


class GgufSession:
    """See kit.backends.Session.

    Args:
        backend: the model.
        fresh: evaluate every probe from its first token.
    """

    def __init__(self, backend: GgufBackend, fresh: bool = False) -> None:
        self.backend, self.fresh, self.cost = backend, fresh, Cost()
        self.held: dict[int, np.ndarray] = {}  # sequence: tokens (T,) in its cache
        if not fresh and not backend.checked:
            backend.checked = True
            self._check()
            self.cost = Cost()
        self._forget()

    def read(self, probes: Sequence[Probe]) -> list[Readings]:
        """Read probes; see kit.backends.Session.

        Raises:
            KitError: a probe is longer than the model's context.
        """
        ids = [np.asarray(probe.ids, np.int32) for probe in probes]
        longest = max(map(len, ids), default=0)
        if longest > self.backend.context_tokens:
            raise KitError(
                f"A judging prompt has {longest} tokens, the model's context {self.backend.context_tokens}.",
                "Set judge.limit_tokens, or judge with a model of longer context.",
            )
        self._reserve(longest)
        order = sorted(range(len(probes)), key=lambda i: -len(ids[i]))
        if self.fresh:
            found = {}
            for i in order:
                self.context.drop(0)
                found |= self._evaluate([(i, 0, 0)], probes, ids)
        else:
            found = self._read_cached(order, probes, ids)
        return [found[i] for i in range(len(probes))]

    def close(self) -> None:
        """Nothing is left to do: the context stays with the backend for the next trace."""

    @property
    def context(self) -> Context:
        return self.backend.session_context

    def _read_cached(self, order: list[int], probes: Sequence[Probe], ids: list[np.ndarray]) -> dict[int, Readings]:
        if self.backend.cuttable:
            try:
                return self._from_trunk(order, probes, ids)
            except CannotCut:
                self._fall_back("llama.cpp refused to cut it")
        return self._from_snapshots(order[::-1], probes, ids)

    def _from_trunk(self, order: list[int], probes: Sequence[Probe], ids: list[np.ndarray]) -> dict[int, Readings]:
        """Longest first: it becomes the trunk where it goes on past it; the others are tails on copies of it."""
        found: dict[int, Readings] = {}
        tails: list[tuple[int, int, int]] = []  # (probe, sequence, tokens kept)
        for i in order:
            keep = _usable(self.held.get(0, ids[i][:0]), ids[i], probes[i])
            spent = sum(len(ids[j]) - kept for j, _, kept in tails)
            tail = len(ids[i]) - keep
            extends = len(ids[i]) > len(self.held.get(0, ())) or tail > SPARE_TOKENS
            if tails and (extends or len(tails) == self.context.sequences - 1 or spent + tail > SPARE_TOKENS):
                found |= self._evaluate(tails, probes, ids)
                tails = []
            if extends:
                self._fork(0, 0, keep)
                found |= self._evaluate([(i, 0, keep)], probes, ids)
                self.held[0] = ids[i]
            else:
                self._fork(0, len(tails) + 1, keep)
                tails.append((i, len(tails) + 1, keep))
        return found | self._evaluate(tails, probes, ids)

    def _from_snapshots(self, order: list[int], probes: Sequence[Probe], ids: list[np.ndarray]) -> dict[int, Readings]:
        """Shortest first: each starts from the longest state that is a beginning of it and leaves one on its way."""
        found: dict[int, Readings] = {}
        last = self.context.sequences - 1
        for i, after in zip(order, [*order[1:], None], strict=True):
            ahead = ids[i][: max(len(ids[i]) - CLOSING_TOKENS, 0)] if after is None else ids[after]
            point = _usable(ahead, ids[i], probes[i])
            starts = [s for s, held in self.held.items() if len(held) <= point and common(held, ids[i]) == len(held)]
            base = max(starts, key=lambda s: len(self.held[s]), default=None)
            kept = len(self.held[base]) if base is not None else 0
            if kept < point:
                place = next((s for s in range(last) if s not in self.held), None)
                if place is None:
                    place = next(s for s in self.held if s != base)  # the oldest
                    del self.held[place]
                self.context.drop(place)
                if base is not None and not self.context.fork(base, place, kept):
                    kept = 0
                self.context.run([Piece(place, kept, ids[i][kept:point])])
                self.cost.evaluated_tokens += point - kept
                self.cost.reused_tokens -= point - kept  # _evaluate counts the whole beginning as reused
                base, self.held[place] = place, ids[i][:point]
            keep = point if base is not None and self.context.fork(base, last, point) else 0
            found |= self._evaluate([(i, last, keep)], probes, ids)
        return found

    def _evaluate(
        self, tails: list[tuple[int, int, int]], probes: Sequence[Probe], ids: list[np.ndarray]
    ) -> dict[int, Readings]:
        """Evaluate tails (probe, sequence, tokens kept) together, read, and empty every sequence but the trunk's."""
        pieces = [Piece(s, keep, ids[i][keep:], [p for p, _ in probes[i].reads]) for i, s, keep in tails]
        found: dict[int, Readings] = {i: [] for i, _, _ in tails}
        for number, _, logits in self.context.evaluate(pieces):
            i = tails[number][0]
            _, candidates = probes[i].reads[len(found[i])]
            found[i].append(log_probabilities(logits)[list(candidates)].tolist())
        for i, sequence, keep in tails:
            self.cost.add(Cost(len(ids[i]) - keep, keep))
            if sequence:
                self.context.drop(sequence)
        return found

    def _fork(self, source: int, target: int, length: int) -> None:
        if not self.context.fork(source, target, length):
            raise CannotCut

    def _reserve(self, longest: int) -> None:
        """Have a context with room for a probe, and for twice its length where the model allows; keep the longest."""
        backend = self.backend
        old = backend.session_context
        if old and old.tokens >= longest + SPARE_TOKENS:
            return
        data = None
        if old:
            best = max(self.held, key=lambda s: len(self.held[s]), default=None)
            data = old.save(best) if best is not None else None
            self.held = {0: self.held[best]} if best is not None else {}
            old.close()
            backend.session_context = None
        tokens = min(max(2 * longest, 1024), backend.context_tokens) + SPARE_TOKENS
        flash = int(backend.engine.flash_attention)
        backend.session_context = Context(backend, tokens, SEQUENCES if backend.cuttable else STATES, True, flash)
        if data is not None and not backend.session_context.restore(0, data):
            self._forget()

    def _forget(self) -> None:
        """Empty every sequence."""
        self.held = {}
        for sequence in range(self.context.sequences if self.context else 0):
            self.context.drop(sequence)

    def _fall_back(self, why: str) -> None:
        """Go on without cutting."""
        self.backend.cuttable = False
        self.backend.notes.append(
            f"judging cache: {why}; the judge keeps states at the boundaries asked and recomputes from there"
        )
        self._forget()

    def _check(self) -> None:
        """Start-up self-check: a cut cache against a fresh one, once for a model."""
        ids = tuple(self.backend.tokenizer.encode(CHECK))
        if not self.backend.cuttable:
            self._fall_back("this architecture carries a recurrent state")
            return
        every = tuple(range(self.backend.tokenizer.vocabulary))
        half, whole = (Probe(part, ((len(part) - 1, every),)) for part in (ids[: len(ids) // 2], ids))
        other = Probe((*half.ids, *half.ids, *half.ids), ((0, (0,)),))  # the trunk that is cut back
        self.fresh = True
        [[fresh]] = self.read([whole])
        self.fresh = False
        self._forget()
        self.read([other])
        [[cached]] = self.read([whole])
        likely = np.asarray(fresh) > -15.0
        worst = float(np.abs(np.asarray(fresh) - np.asarray(cached))[likely].max())
        if worst > (1.0 if self.backend.engine.flash_attention else 0.05):
            self._fall_back(f"log-probabilities moved by {worst:.2g} when it was cut")


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """Natural-log probabilities (V,) in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max()
    return shifted - np.log(np.exp(shifted).sum())


def _usable(held: np.ndarray, ids: np.ndarray, probe: Probe) -> int:
    """Tokens of a probe that need no evaluation: shared with `held`, and before the first read."""
    return min(common(held, ids), probe.reads[0][0] if probe.reads else len(ids) - 1)
