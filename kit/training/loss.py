"""Cross-entropy that never builds the full logits (Eq. 2 of the paper).

Only supervised positions are projected, a slice of bounded size at a time; the backward pass
recomputes each slice, so nothing of size (N, V) outlives it. Router losses are not added.
"""

import types
from typing import Any, NamedTuple

import torch
from torch.nn.functional import cross_entropy, linear
from torch.utils.checkpoint import checkpoint

from kit.core.errors import KitError
from kit.shape import LIVE_BYTES

IGNORED = -100  # label of a position that is not learned


class Head(NamedTuple):
    """How hidden states become logits: softcap(scale * (h W^T + b)), W (V, D)."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (N, V) in fp32 of hidden states (N, D)."""
        logits = linear(hidden.to(self.weight.dtype), self.weight, self.bias).float()
        if self.scale != 1:
            logits = logits * self.scale
        if self.softcap:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def losses(self, hidden: torch.Tensor, targets: torch.Tensor, rows: int) -> torch.Tensor:
        """Cross-entropy (N,) of hidden states (N, D) with targets (N,), `rows` at a time."""

        def slice_losses(states: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
            """Losses (rows,) of hidden states (rows, D)."""
            return cross_entropy(self.logits(states), wanted, reduction="none")

        # backward recomputes a slice's logits instead of keeping them
        slices = zip(hidden.split(rows), targets.split(rows), strict=True)
        return torch.cat(
            [
                checkpoint(slice_losses, *one, use_reentrant=False, preserve_rng_state=False)
                for one in slices
            ]
        )


def head_of(causal: Any) -> Head:
    """A causal model's head with its scaling (Cohere, Granite, Falcon-H1) and softcap (Gemma).

    Raises:
        KitError: the head computes something other than `Head` does (compared on 8 tokens).
    """
    config = causal.config.get_text_config()
    output = causal.get_output_embeddings()
    factors = (getattr(config, name, None) for name in ("logit_scale", "lm_head_multiplier"))
    divisor = getattr(config, "logits_scaling", None) or 1.0
    head = Head(
        output.weight,
        getattr(output, "bias", None),
        next(filter(None, factors), 1.0) / divisor,
        getattr(config, "final_logit_softcapping", None),
    )

    # compare with the class's own forward pass
    was_training = causal.training
    ids = torch.arange(8, device=output.weight.device)[None]
    with torch.no_grad():
        plain = type(causal).forward(causal.eval(), input_ids=ids, use_cache=False).logits[0]
        sliced = head.logits(_states(causal, input_ids=ids)[0])
    causal.train(was_training)
    rounding = 1e-4 if output.weight.dtype == torch.float32 else 5e-2
    slack = rounding * max(1.0, plain.abs().max().item())
    if not (plain - sliced).abs().max().item() <= slack:
        raise KitError(f"{type(causal).__name__}: unsupported output head.", "Try another student.")
    return head


def attach(causal: Any, logits_bytes: int) -> None:
    """Let a causal model's forward with `labels` (B, T) return {loss, losses} without logits.

    `losses` (N,) has one loss for each supervised position. The model is called through the
    outermost wrapper (PEFT, DDP), so that their hooks run.

    Args:
        causal: its `forward` is replaced; without labels that is the class's own. It also takes
            `num_items_in_batch`, the supervised tokens of the whole optimizer step.
        logits_bytes: what a slice of the logits may take (it has one row at least).
    """
    head = head_of(causal)
    rows = max(1, logits_bytes // (LIVE_BYTES * head.weight.shape[0]))

    def forward(
        self: Any, labels: Any = None, num_items_in_batch: Any = None, **inputs: Any
    ) -> Any:
        """See `attach`."""
        if labels is None:
            return type(self).forward(self, **inputs)
        # position t predicts the token after it
        targets = labels[:, 1:]
        kept = targets != IGNORED
        losses = head.losses(_states(self, **inputs)[:, :-1][kept], targets[kept], rows)
        count = kept.sum() if num_items_in_batch is None else num_items_in_batch
        return {"loss": losses.sum() / count, "losses": losses.detach()}

    causal.forward = types.MethodType(forward, causal)


def _states(causal: Any, **inputs: Any) -> torch.Tensor:
    """The decoder's last hidden states (B, T, D)."""
    arguments = {key: value for key, value in inputs.items() if value is not None}
    return causal.get_decoder()(**arguments, use_cache=False).last_hidden_state
