"""Cross-entropy that never builds the full logits (Eq. 2 of the paper).

Only supervised positions are projected, a slice of bounded size at a time; backward recomputes each slice, so nothing
of size (N, V) outlives it. Router losses are not added.
"""

from __future__ import annotations

import types
from typing import Any, NamedTuple

import torch
from torch.nn.functional import cross_entropy, linear
from torch.utils.checkpoint import checkpoint

from kit.core.errors import KitError

IGNORED = -100  # label of a position that is not learned
LIVE_BYTES = (
    16  # a logit's own in a slice's backward: fp32 logit, log-softmax and the gradients of both
)


class Head(NamedTuple):
    """How hidden states become logits: softcap(scale * (h W^T + b)), W (V, D)."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (N, V) in fp32 of hidden states (N, D)."""
        logits = linear(hidden.to(self.weight.dtype), self.weight, self.bias).float()
        logits = logits * self.scale if self.scale != 1 else logits
        return torch.tanh(logits / self.softcap) * self.softcap if self.softcap else logits

    def losses(self, hidden: torch.Tensor, targets: torch.Tensor, rows: int) -> torch.Tensor:
        """Cross-entropy (N,) of each hidden state (N, D) with its target (N,), `rows` of them at a time."""

        def part(states: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
            return cross_entropy(self.logits(states), wanted, reduction="none")

        parts = zip(hidden.split(rows), targets.split(rows), strict=True)
        return torch.cat(
            [checkpoint(part, *one, use_reentrant=False, preserve_rng_state=False) for one in parts]
        )


def head_of(causal: Any) -> Head:
    """A causal model's head with its scaling (Cohere, Granite, Falcon-H1) and softcap (Gemma).

    Raises:
        KitError: the head computes something else than `Head` does (compared on 8 tokens).
    """
    config, output = causal.config.get_text_config(), causal.get_output_embeddings()
    scale = (
        getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
    )
    scale /= getattr(config, "logits_scaling", None) or 1.0
    cap = getattr(config, "final_logit_softcapping", None)
    head, training = Head(output.weight, getattr(output, "bias", None), scale, cap), causal.training
    with torch.no_grad():
        ids = torch.arange(8, device=output.weight.device)[None]
        plain = (
            type(causal).forward(causal.eval(), input_ids=ids, use_cache=False).logits[0].float()
        )
        ours = head.logits(_states(causal, input_ids=ids)[0])
        causal.train(training)
    slack = (1e-4 if output.weight.dtype == torch.float32 else 5e-2) * max(
        1.0, plain.abs().max().item()
    )
    if not (plain - ours).abs().max().item() <= slack:
        name = type(causal).__name__
        raise KitError(
            f"{name} shapes its logits in a way training does not know.", "Try another student."
        )
    return head


def attach(causal: Any, logits_bytes: int) -> None:
    """Let a causal model's forward with `labels` (B, T) return {loss, losses: of each position} without logits.

    It is called through the outermost wrapper (PEFT, DDP), so that their hooks run. `denominator` is the supervised
    tokens of the whole optimizer step; `logits_bytes` bounds what a slice takes (one row at least).
    """
    head = head_of(causal)
    rows = max(1, logits_bytes // (LIVE_BYTES * head.weight.shape[0]))

    def forward(self: Any, labels: Any = None, denominator: Any = None, **inputs: Any) -> Any:
        """The class's own where there are no labels."""
        if labels is None:
            return type(self).forward(self, **inputs)
        hidden, targets = _states(self, **inputs), labels[:, 1:]
        kept = targets != IGNORED
        losses = head.losses(hidden[:, :-1][kept], targets[kept], rows)
        count = kept.sum() if denominator is None else denominator
        return {"loss": losses.sum() / count, "losses": losses.detach()}

    causal.forward = types.MethodType(forward, causal)


def _states(causal: Any, **inputs: Any) -> torch.Tensor:
    given = {key: value for key, value in inputs.items() if value is not None}
    return causal.get_decoder()(**given, use_cache=False).last_hidden_state  # (B, T, D)
