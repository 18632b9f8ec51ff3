"""Reads along one trace through llama.cpp (section 3.2 of the paper).

Sequence 0 holds the longest probe so far, the trunk; shorter ones are answered in sequence 1, which takes the
trunk's beginning over. Many probes go longest first, so one copy serves a whole scan.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from kit.backends import Cost, Probe, Readings
from kit.backends.gguf import Context
from kit.errors import KitError

if TYPE_CHECKING:
    from kit.backends.gguf import GgufBackend

RECOMPUTED = "the judge's cache cannot be cut for this architecture: every verdict evaluates its whole prompt"


class GgufSession:
    """See kit.backends.Session.

    Args:
        backend: the model.
        fresh: evaluate every probe from its first token.
    """

    def __init__(self, backend: GgufBackend, fresh: bool = False) -> None:
        self.backend, self.fresh, self.cost = backend, fresh, Cost()
        if backend.judging:  # what a trace costs must not depend on the one before it
            for sequence in range(2):
                backend.judging.keep(sequence, ())

    def read(self, probes: Sequence[Probe]) -> list[Readings]:
        """Read probes; see kit.backends.Session.

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
                found[i].append(log_probabilities(logits)[list(reads[position])].tolist())
            self.cost.add(Cost(len(ids) - kept, kept))
        if not context.cuttable and RECOMPUTED not in self.backend.notes:
            self.backend.notes.append(RECOMPUTED)
        return found

    def close(self) -> None:
        """Nothing to do: the context stays for the next trace."""

    def _context(self, longest: int) -> Context:
        """The backend's judging context, with room for a probe and for one twice as long where the model allows."""
        backend, old = self.backend, self.backend.judging
        if longest > backend.context_tokens:
            raise KitError(
                f"A judging prompt has {longest} tokens, the model's context {backend.context_tokens}.",
                "Set judge.limit_tokens, or judge with a model of longer context.",
            )
        if old is None or old.tokens < longest:
            room = min(max(2 * longest, 1024), backend.context_tokens)
            backend.judging = Context(backend, room, 2, backend.engine.flash_attention)
            if old is not None:
                backend.judging.move_from(old)
        return backend.judging


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """Natural-log probabilities (V,) in float64."""
    shifted = logits - logits.max().astype(np.float64)
    return shifted - np.log(np.exp(shifted).sum())
