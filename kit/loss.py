"""Cross-entropy that never builds the full logits (Eq. 2 of the paper).

Only supervised positions are projected, a slice of bounded size at a time; each slice's gradient is taken while it is
there, so nothing is recomputed and nothing of size (N, V) outlives its slice. Router losses are not added.
"""

from __future__ import annotations

import types
from typing import Any, NamedTuple

import torch

from kit.errors import KitError

IGNORED = -100  # label of a position that is not learned


class Head(NamedTuple):
    """How hidden states become logits: softcap(scale * (h W^T + b)), W (V, D)."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (N, V) in fp32 of hidden states (N, D)."""
        logits = torch.nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias).float()
        logits.mul_(self.scale)
        return logits.div_(self.softcap).tanh_().mul_(self.softcap) if self.softcap else logits


class SlicedLoss(torch.autograd.Function):
    """apply(hidden (N, D), weight, bias, targets (N,), head, rows a slice) -> (summed loss (), each one (N,))."""

    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any, bias: Any, targets: Any, head: Head, rows: int) -> Any:
        wanted = zip(ctx.needs_input_grad, (hidden, weight, bias), strict=False)
        ctx.grads = [torch.zeros_like(x) if needed else None for needed, x in wanted]
        losses = torch.empty(len(targets), device=hidden.device)
        for part in (slice(start, start + rows) for start in range(0, len(targets), rows)):
            target, logits = targets[part, None], head.logits(hidden[part])
            slope = 1 - (logits / head.softcap).square_() if head.softcap else 1.0
            right, top = logits.gather(1, target), logits.amax(dim=1, keepdim=True)
            total = logits.sub_(top).exp_().sum(dim=1, keepdim=True)  # from here on the logits' storage is reused
            losses[part] = (total.log() + top - right).squeeze(1)
            grad = logits.div_(total).scatter_add_(1, target, torch.full_like(right, -1.0))  # softmax minus one-hot
            grad = grad.mul_(slope).mul_(head.scale).to(weight.dtype)
            if ctx.grads[0] is not None:
                ctx.grads[0][part] = grad @ weight
            if ctx.grads[1] is not None:
                ctx.grads[1].addmm_(grad.T, hidden[part].to(weight.dtype))
            if ctx.grads[2] is not None:
                ctx.grads[2].add_(grad.sum(dim=0))
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx: Any, outer: Any, _losses: Any) -> Any:
        return (*(None if grad is None else grad.mul_(outer.to(grad.dtype)) for grad in ctx.grads), None, None, None)


def head_of(causal: Any) -> Head:
    """A causal model's head with its scaling (Cohere, Granite, Falcon-H1) and softcap (Gemma).

    Raises:
        KitError: the head computes something else than `Head` does (compared on 8 tokens).
    """
    config, output = causal.config.get_text_config(), causal.get_output_embeddings()
    scale = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    cap = getattr(config, "final_logit_softcapping", None)
    head, training = Head(output.weight, getattr(output, "bias", None), scale, cap), causal.training
    with torch.no_grad():
        ids = torch.arange(8, device=output.weight.device)[None]
        plain = type(causal).forward(causal.eval(), input_ids=ids, use_cache=False).logits[0].float()
        ours = head.logits(_states(causal, input_ids=ids)[0])
        causal.train(training)
    slack = (1e-4 if output.weight.dtype == torch.float32 else 5e-2) * max(1.0, plain.abs().max().item())
    if not (plain - ours).abs().max().item() <= slack:
        name = type(causal).__name__
        raise KitError(f"{name} shapes its logits in a way training does not know.", "Try another student.")
    return head


def attach(causal: Any, logits_bytes: int) -> None:
    """Let a causal model's forward with `labels` (B, T) return {loss, losses: of each position} without logits.

    It is called through the outermost wrapper (PEFT, DDP), so that their hooks run. `denominator` is the supervised
    tokens of the whole optimizer step; `logits_bytes` bounds a slice of fp32 logits (one row at least).
    """
    head = head_of(causal)
    rows = max(1, logits_bytes // (4 * head.weight.shape[0]))

    def forward(self: Any, labels: Any = None, denominator: Any = None, **inputs: Any) -> Any:
        if labels is None:
            return type(self).forward(self, **inputs)
        hidden, targets = _states(self, **inputs), labels[:, 1:]
        kept = targets != IGNORED
        total, losses = SlicedLoss.apply(hidden[:, :-1][kept], head.weight, head.bias, targets[kept], head, rows)
        return {"loss": total / (kept.sum() if denominator is None else denominator), "losses": losses}

    causal.forward = types.MethodType(forward, causal)


def _states(causal: Any, **inputs: Any) -> torch.Tensor:
    given = {key: value for key, value in inputs.items() if value is not None}
    return causal.get_decoder()(**given, use_cache=False).last_hidden_state  # (B, T, D)
