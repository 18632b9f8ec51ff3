"""Reads along one trace through llama.cpp (section 3.2 of the paper).

Sequence 0 holds the longest probe so far, the trunk; shorter ones are answered in sequence 1, which takes the
trunk's beginning over. Many probes go longest first, so one copy serves a whole scan.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kit.backends import Cost, Probe, Readings
from kit.backends.gguf import Context, GgufBackend
from kit.errors import KitError

ROOM_TOKENS = 8192  # of the trunk at least, where the model has them: growing forgets it
RECOMPUTED = "the judge's cache cannot be cut for this architecture: every verdict evaluates its whole prompt"


class GgufSession:
    """See kit.backends.Session; fresh=True evaluates every probe from its first token."""

    def __init__(self, backend: GgufBackend, fresh: bool = False) -> None:
        self.backend, self.fresh, self.cost = backend, fresh, Cost()
        for sequence in range(2 if backend.judging else 0):  # a trace's cost must not depend on the one before it
            backend.judging.keep(sequence, ())

    def read(self, probes: Sequence[Probe]) -> list[Readings]:
        """Read probes.

        Raises:
            KitError: a probe is longer than the model's context.
        """
        context = self._context(max((len(probe.ids) for probe in probes), default=0))
        found: list[Readings] = [[] for _ in probes]
        for i in sorted(range(len(probes)), key=lambda i: -len(probes[i].ids)):
            ids, reads = probes[i].ids, dict(probes[i].reads)
            sequence = 0 if self.fresh or len(ids) >= len(context.held[0]) else 1
            kept = context.keep(sequence, () if self.fresh else ids[: min(reads, default=len(ids))])
            for _, position, logits in context.evaluate([(sequence, ids[kept:], reads)]):
                shifted = logits - logits.max().astype(np.float64)
                found[i].append((shifted[list(reads[position])] - np.log(np.exp(shifted).sum())).tolist())
            self.cost.add(Cost(len(ids) - kept, kept))
        if not context.cuttable and RECOMPUTED not in self.backend.notes:
            self.backend.notes.append(RECOMPUTED)
        return found

    def close(self) -> None:
        """Nothing to do: the context stays for the next trace."""

    def _context(self, longest: int) -> Context:
        backend, limit = self.backend, self.backend.context_tokens
        if longest > limit:
            raise KitError(
                f"A judging prompt has {longest} tokens, the model's context {limit}.",
                "Set judge.limit_tokens, or judge with a model of longer context.",
            )
        if backend.judging is None or backend.judging.tokens < longest:
            if backend.judging:
                backend.judging.close()
                backend.judging = None
            room = min(max(2 * longest, ROOM_TOKENS), limit)
            backend.judging = Context(backend, room, 2, backend.engine.flash_attention)
        return backend.judging
