"""Cross-entropy that never builds the full logits (the training loss, Eq. 2 of the paper).

At 16k tokens a 150k vocabulary's logits and their gradient are several times larger than the model. Only supervised
positions are projected, a slice of bounded size at a time; each slice's gradient is taken while it is there, so
nothing is recomputed and nothing of size (N, V) outlives its slice. Router losses of mixtures are not added.
"""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Any

import torch

from kit.errors import KitError

IGNORED = -100  # label of a position that is not learned


@dataclass(frozen=True)
class Head:
    """How a model turns hidden states into logits: softcap(scale * (h W^T + b))."""

    weight: torch.Tensor  # (V, D)
    bias: torch.Tensor | None  # (V,)
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (N, V) in fp32 of hidden states (N, D)."""
        logits = torch.nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias).float()
        logits = logits.mul_(self.scale) if self.scale != 1.0 else logits
        return logits.div_(self.softcap).tanh_().mul_(self.softcap) if self.softcap else logits


class _SlicedLoss(torch.autograd.Function):
    """Summed cross-entropy whose gradients are made in the forward pass, slice by slice."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets, head: Head, rows: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wanted = ctx.needs_input_grad[:3]
        grads = [torch.zeros_like(x) if want else None for x, want in zip((hidden, weight, bias), wanted, strict=True)]
        losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(targets), rows):
            part = slice(start, start + rows)
            h, target = hidden[part], targets[part, None]
            logits = head.logits(h)  # (n, V); from here on the same storage is reused
            slope = 1 - (logits / head.softcap).square_() if head.softcap and any(wanted) else None
            right = logits.gather(1, target)
            top = logits.amax(dim=1, keepdim=True)
            total = logits.sub_(top).exp_().sum(dim=1, keepdim=True)
            losses[part] = (total.log() + top - right).squeeze(1)
            if not any(wanted):
                continue
            grad = logits.div_(total)  # softmax; minus one at the target is the gradient
            grad.scatter_add_(1, target, torch.full_like(right, -1.0))
            grad = grad.mul_(slope) if slope is not None else grad
            grad = (grad.mul_(head.scale) if head.scale != 1.0 else grad).to(weight.dtype)
            if grads[0] is not None:
                grads[0][part] = grad @ weight
            if grads[1] is not None:
                grads[1].addmm_(grad.T, h.to(weight.dtype))
            if grads[2] is not None:
                grads[2].add_(grad.sum(dim=0))
        ctx.grads = grads
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx: Any, outer: torch.Tensor, _losses: Any) -> tuple[Any, ...]:  # type: ignore[override]
        grads = [None if grad is None else grad.mul_(outer.to(grad.dtype)) for grad in ctx.grads]
        ctx.grads = None  # scaled in place: good for one backward pass
        return (*grads, None, None, None)


def sliced_loss(
    hidden: torch.Tensor, targets: torch.Tensor, head: Head, logits_bytes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of supervised positions.

    Args:
        hidden: states before the head (N, D); the gradient reaches them, and the head where it is trainable.
        targets: ids (N,), none ignored.
        head: the projection.
        logits_bytes: largest slice of fp32 logits; one row at least.

    Returns:
        (summed loss (), loss of each position (N,) without gradient). Divide the sum by the step's token count.
    """
    rows = max(1, logits_bytes // (4 * head.weight.shape[0]))
    return _SlicedLoss.apply(hidden, head.weight, head.bias, targets, head, rows)


def head_of(causal: Any) -> Head:
    """A causal model's output head with its scaling (Cohere, Granite, Falcon-H1) and softcap (Gemma).

    Raises:
        KitError: the head is quantized, or computes something else than this module knows (checked on 8 tokens).
    """
    config, output = causal.config.get_text_config(), causal.get_output_embeddings()
    if output is None or not getattr(output, "weight", None).is_floating_point():
        raise KitError(
            f"{type(causal).__name__} has no plain output head.", "Train another student, or train.dtype=bf16."
        )
    scale = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    bias = getattr(output, "bias", None)
    head = Head(output.weight, bias, scale, getattr(config, "final_logit_softcapping", None))
    training, ids = causal.training, torch.arange(8, device=output.weight.device)[None] % output.weight.shape[0]
    with torch.no_grad():
        causal.eval()
        plain = type(causal).forward(causal, input_ids=ids, use_cache=False).logits[0].float()
        ours = head.logits(causal.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0])
        causal.train(training)
    slack = (1e-4 if output.weight.dtype == torch.float32 else 5e-2) * max(1.0, plain.abs().max().item())
    if (plain - ours).abs().max().item() > slack:
        raise KitError(
            f"{type(causal).__name__} shapes its logits in a way that training does not know.", "Train another student."
        )
    return head


def attach(causal: Any, logits_bytes: int) -> None:
    """Let a causal model's forward with `labels` return {loss, losses} without logits.

    Called through the outermost wrapper (PEFT, DDP), so that their hooks run. Labels (B, T) are shifted here;
    `denominator` is the supervised tokens of the whole optimizer step.
    """
    head = head_of(causal)

    def forward(self: Any, labels: torch.Tensor | None = None, denominator: Any = None, **inputs: Any) -> Any:
        inputs = {key: value for key, value in inputs.items() if value is not None}
        if labels is None:
            return type(self).forward(self, **inputs)
        hidden = self.get_decoder()(**inputs, use_cache=False).last_hidden_state  # (B, T, D)
        targets = labels[:, 1:]
        kept = targets != IGNORED
        total, losses = sliced_loss(hidden[:, :-1][kept], targets[kept], head, logits_bytes)
        return {"loss": total / (kept.sum() if denominator is None else denominator), "losses": losses}

    causal.forward = types.MethodType(forward, causal)
