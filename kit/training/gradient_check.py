"""Whether the gradient is the slope of the loss: checked before the first update of a training.

A backward pass can be wrong without an error: a kernel without an autograd formula, a checkpoint
that drops a path, a wrong factor. The loss still moves, so only a comparison with the loss itself
shows it. It is made on one short row, in training mode, with the same dropout masks in every pass:

1. At B = 0 (a fresh adapter) each B must have a gradient, since only the frozen weights pass one
   on. A B without one that still moves the loss has lost its gradient or is frozen. One that does
   not move it is unused by this row (an expert of a mixture), which is fine.
2. At B plus noise, where A has a gradient too, a third of the adapters' weights moves along
   its gradient and against it: (L(w + h g/|g|) - L(w - h g/|g|)) / 2h must equal |g|. Thirds, so
   that a lost early part does not hide behind a healthy late one.

The step: h |g| is STEP of the loss. Where all is computed in fp32 (on a CPU NF4 and int8 too),
rounding moves the loss by 1e-6 and the third derivative by less than 1% of that step. In bf16 (on a
card under autocast NF4 and int8 too) rounding moves it by some 0.005 nats, from which BF16_STEP
stands out, and BF16_LEAST where the loss is small already. NOISE has the same purpose. At B = 0 the
output is a bf16 number, to which less than half of its last bit adds nothing: a correct gradient
then showed a slope of only 0.6 of it.

TOLERANCE: 50 healthy models of random shapes and seeds, fresh and trained, stay within half of it
(tests/test_gradient_check.py prints their errors in each dtype); a doubled gradient is off by 0.5.

It cannot see an error below TOLERANCE, one that only long rows or later steps show, or a loss that
is the wrong one itself.
"""

import math
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from kit.core.errors import KitError
from kit.core.run import versions

# predicted change of the loss, as a share of it
STEP = 0.003
SHORTEST = 0.0001  # of a mixture of experts in fp32
BF16_STEP = 0.03
BF16_LEAST = 0.007  # nats, at least so much
HALVES = (torch.bfloat16, torch.float16)
NOISE = 0.02  # standard deviation, compared with an A of about sqrt(1 / 3 in)
TOLERANCE = 0.35  # of slope / gradient from 1
Weights = dict[str, Any]  # parameters by name; A (rank, in), B (out, rank)


class Slope(NamedTuple):
    """What a group of layers showed; both numbers are nats per unit of the weights' norm."""

    layers: str  # first-last
    gradient: float  # norm of the gradient
    slope: float  # of the loss along it, by finite difference

    @property
    def error(self) -> float:
        """How far slope / gradient is from 1."""
        return abs(self.slope / self.gradient - 1)

    def __str__(self) -> str:
        return f"layers {self.layers}: gradient {self.gradient:.4g}, slope {self.slope:.4g}"


def check_gradient(
    model: torch.nn.Module, backward: Callable[[], Any], loss: Callable[[], Any]
) -> list[Slope]:
    """Compare a model's gradient with the slope of its loss; weights and random state stay.

    Args:
        model: with LoRA adapters, in training mode; its gradients are cleared.
        backward: adds the gradient of the loss of one fixed row to the adapters.
        loss: computes that loss again.

    Returns:
        One comparison for each third of the adapters, from the first layer to the last.

    Raises:
        KitError: they differ; it names the layers, the versions and what to try.
    """
    weights = {name: weight for name, weight in model.named_parameters() if "lora_" in name}
    original = {name: weight.detach().clone() for name, weight in weights.items()}
    outer = {name: weight for name, weight in weights.items() if "lora_B" in name}

    def read_loss() -> float:
        torch.manual_seed(0)
        return float(loss())

    def compute_gradient() -> None:
        model.zero_grad()
        torch.manual_seed(0)
        with torch.enable_grad():
            backward()

    device = next(model.parameters()).device
    cards = [device] if device.type == "cuda" else []
    with lost_gradient_is_an_error(), torch.no_grad(), torch.random.fork_rng(cards):
        try:
            # 1. at B = 0
            for weight in outer.values():
                weight.zero_()
            compute_gradient()
            _find_lost(outer, read_loss)
            # 2. at B plus noise
            for name, weight in outer.items():
                weight.copy_(original[name] + NOISE * torch.randn_like(weight))
            compute_gradient()
            in_16_bits = any(weight.dtype in HALVES for weight in model.parameters())
            before = read_loss()
            step = STEP * before
            if in_16_bits:
                step = max(BF16_STEP * before, BF16_LEAST)
            slopes = _slopes(weights, step, read_loss)
            # a token that changes its experts makes the loss jump: rarer on a shorter way
            while not in_16_bits and _wrong(slopes) and step / 10 >= SHORTEST * before:
                step /= 10
                slopes = _slopes(weights, step, read_loss)
        finally:
            for name, weight in weights.items():
                weight.copy_(original[name])
            model.zero_grad()
    wrong = _wrong(slopes)
    if wrong:
        raise _failure("; ".join(wrong))
    return slopes


def _wrong(slopes: list[Slope]) -> list[str]:
    """Those of a gradient that is not the slope; NaN is none."""
    return [str(one) for one in slopes if not one.error <= TOLERANCE]


@contextmanager
def lost_gradient_is_an_error() -> Iterator[None]:
    """Turn PyTorch's warning that an operation passes no gradient on into a KitError."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*an autograd kernel was not registered")
        try:
            yield
        except UserWarning as warning:
            raise _failure(str(warning)) from warning


def _has_gradient(weight: torch.nn.Parameter) -> bool:
    return weight.grad is not None and bool(weight.grad.any())


def _find_lost(outer: Weights, read_loss: Callable[[], float]) -> None:
    """Raise where weights (changed by this) have no gradient but move the loss."""
    lost = [name for name, weight in outer.items() if not _has_gradient(weight)]
    if not lost:
        return
    before = read_loss()
    for name in lost:
        outer[name].normal_(std=NOISE)
    if read_loss() != before:
        raise _failure(f"{len(lost)} of {len(outer)} adapters get none: {lost[0]} ...")


def _slopes(weights: Weights, step: float, read_loss: Callable[[], float]) -> list[Slope]:
    """See `_slope`, for each third of the weights that have a gradient."""
    moving = [item for item in weights.items() if _has_gradient(item[1])]
    third = math.ceil(len(moving) / 3)
    slopes = []
    for start in range(0, len(moving), third):
        slopes.append(_slope(dict(moving[start : start + third]), step, read_loss))
    return slopes


def _slope(group: Weights, step: float, read_loss: Callable[[], float]) -> Slope:
    """The slope of the loss along a group's gradient, by a step that should change it by `step`."""
    norm = math.hypot(*(weight.grad.norm().item() for weight in group.values()))

    def move(steps: int) -> None:
        for weight in group.values():
            weight.add_(weight.grad, alpha=steps * step / norm**2)

    move(1)
    above = read_loss()
    move(-2)
    below = read_loss()
    move(1)
    names = list(group)
    layers = f"{_layer(names[0])}-{_layer(names[-1])}"
    return Slope(layers, norm, (above - below) / (2 * step) * norm)


def _layer(name: str) -> str:
    number = re.search(r"\.(\d+)\.", name)
    return number[1] if number else name


def _failure(finding: str) -> KitError:
    installed = versions()
    return KitError(
        f"The gradient is not the slope of the loss: {finding} (torch {installed['torch']}, "
        f"bitsandbytes {installed['bitsandbytes']}, peft {installed['peft']}). Nothing is trained.",
        "Try train.gradient_checkpointing=false, then train.dtype=fp32 or bf16, then the versions "
        "in requirements.txt. `palign.py doctor` checks each dtype on the packaged model.",
    )
