"""What the gradient check catches and lets pass, and that 4-bit training on a CPU is right."""

from __future__ import annotations

import random
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse, has_avx512bf16
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, LlamaConfig

from kit.core.errors import KitError
from kit.training import trainer as training
from kit.training.gradient_check import TOLERANCE, Slope, check_gradient, lost_gradient_is_an_error
from kit.training.loss import IGNORED, head_of
from tests.test_train import settings

DTYPES = ("fp32", "bf16", "nf4", "int8")
VOCABULARY = 97


def fused_kernel(
    x: torch.Tensor,
    packed: torch.Tensor,
    shape: list[int],
    absmax: torch.Tensor,
    code: torch.Tensor,
    blocksize: int,
) -> torch.Tensor:
    """bitsandbytes' AVX512-BF16 kernel in plain torch: x W^T of repacked weights, in bf16.

    As in the compiled kernel, autograd sees nothing of what it computes.
    """
    state = types.SimpleNamespace(
        packing_format_for_cpu=True,
        original_qshape=(-1,),
        original_nested=False,
        original_dtype=torch.float32,
        absmax=absmax,
    )
    bytes_, _ = _convert_weight_packed_for_cpu_inverse(packed, state)
    numbers = torch.stack([bytes_ >> 4, bytes_ & 15], -1).flatten().long()
    scales = absmax.T.float().repeat_interleave(blocksize, 1)
    weight = code[numbers].reshape(shape) * scales
    with torch.no_grad():
        return (x.to(torch.bfloat16) @ weight.to(torch.bfloat16).T).to(x.dtype)


@pytest.fixture
def avx512_bf16(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a CPU with AVX512-BF16: layers repack themselves; without one the kernel is imitated.

    The repacking, the operation and its missing autograd formula are bitsandbytes' own either way.
    """
    if has_avx512bf16():
        yield
        return
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)
    library = torch.library.Library("bitsandbytes", "IMPL")
    library.impl("gemv_4bit", fused_kernel, "CPU")
    yield
    library._destroy()


def save_tiny(folder: Path, seed: int, layers: int | None = None) -> None:
    """A random Llama of a random shape."""
    draw = random.Random(seed)
    heads = draw.choice((2, 4))
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=heads * 32,
        intermediate_size=draw.choice((64, 128, 192)),
        num_hidden_layers=layers or draw.randint(1, 7),
        num_attention_heads=heads,
        num_key_value_heads=draw.choice((1, 2)),
        tie_word_embeddings=draw.random() < 0.5,
        initializer_range=draw.uniform(0.1, 0.2),
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def make_tiny(
    folder: Path, dtype: str, is_resumed: bool = False, seed: int = 0, layers: int | None = None
) -> Any:
    """That model in a dtype, with an adapter that is fresh or as training leaves one."""
    save_tiny(folder, seed, layers)
    draw = random.Random(-seed)
    keys = {"rank": draw.choice((4, 16)), "dropout": draw.choice((0.0, 0.1))}
    checkpointing = draw.random() < 0.5
    config = settings(
        folder, str(folder), dtype=dtype, gradient_checkpointing=checkpointing, **keys
    )
    model = training.make_model(config).train()
    if is_resumed:
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_B" in name:
                    weight.normal_(std=0.03)
    return model


class Row:
    """A row of random tokens and its two passes."""

    def __init__(self, model: Any, seed: int = 0, vocabulary: int = VOCABULARY) -> None:
        length = random.Random(seed).randint(12, 64)
        generator = torch.Generator().manual_seed(seed)
        self.model = model
        self.ids = torch.randint(3, vocabulary, (1, length), generator=generator)
        self.labels = self.ids.clone()
        self.labels[:, :4] = IGNORED

    def loss(self) -> torch.Tensor:
        return self.model(input_ids=self.ids, labels=self.labels)["loss"]

    def backward(self) -> None:
        self.loss().backward()

    def check(self) -> list[Slope]:
        return check_gradient(self.model, self.backward, self.loss)


@pytest.mark.parametrize("seeds", [2, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_healthy_models_of_many_seeds_and_shapes_pass(
    dtype: str, seeds: int, tmp_path: Path
) -> None:
    errors = []
    for seed in range(seeds):
        model = make_tiny(tmp_path, dtype, is_resumed=seed % 2 == 1, seed=seed)
        slopes = Row(model, seed).check()
        errors += [abs(one.slope / one.gradient - 1) for one in slopes]
    print(f"{dtype}: error of slope / gradient, largest {max(errors):.4f} of {len(errors)}")
    assert max(errors) < TOLERANCE


@pytest.mark.parametrize("seed", [9, 11])
def test_a_row_that_is_known_by_heart_is_no_false_alarm(seed: int, tmp_path: Path) -> None:
    """In 16 bits rounding moves a small loss as much as a large one. A step of 3% of it is lost in
    that: healthy models of these seeds were refused.
    """
    model = make_tiny(tmp_path, "bf16", is_resumed=True, seed=seed)
    row = Row(model, seed)
    adapter = [weight for name, weight in model.named_parameters() if "lora_" in name]
    optimizer = torch.optim.Adam(adapter, lr=5e-3)
    while float(row.loss()) > 0.04:
        optimizer.zero_grad()
        row.backward()
        optimizer.step()
    assert max(one.error for one in row.check()) < TOLERANCE


def layer_of(model: Any, number: int) -> Any:
    return model.get_base_model().model.layers[number]


def freeze(model: Any, row: Row) -> None:
    for name, weight in layer_of(model, 1).named_parameters():
        if "lora" in name:
            weight.requires_grad_(False)


def detach_layer(model: Any, row: Row) -> None:
    layer_of(model, 1).register_forward_hook(lambda _module, _inputs, output: output.detach())


def detach_mlp(model: Any, row: Row) -> None:
    layer_of(model, 1).mlp.register_forward_hook(lambda _module, _inputs, output: output.detach())


def double(model: Any, row: Row) -> None:
    row.backward = lambda: (2 * row.loss()).backward()  # type: ignore[method-assign]


def shift_labels(model: Any, row: Row) -> None:
    def backward() -> None:
        shifted = torch.roll(row.labels, 1, dims=1)
        model(input_ids=row.ids, labels=shifted)["loss"].backward()

    row.backward = backward  # type: ignore[method-assign]


FAULTS: dict[str, Callable[[Any, Row], None]] = {
    "one layer's adapter frozen": freeze,
    "one layer's output detached": detach_layer,
    "one layer's MLP detached": detach_mlp,
    "gradient doubled": double,
    "labels shifted between loss and gradient": shift_labels,
}


# Trained in 4 bits, as on a card, is the quick case; the others are long together.
@pytest.mark.parametrize("is_resumed", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("dtype", [pytest.param("fp32", marks=pytest.mark.slow), "nf4"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught(fault: str, dtype: str, is_resumed: bool, tmp_path: Path) -> None:
    model = make_tiny(tmp_path, dtype, is_resumed, layers=6)
    row = Row(model)
    row.check()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    FAULTS[fault](model, row)
    with pytest.raises(KitError, match="gradient is not the slope of the loss") as caught:
        row.check()
    message = str(caught.value)
    assert "torch " in message and "bitsandbytes " in message and "peft " in message
    assert "Nothing is trained" in message and "train.gradient_checkpointing=false" in message
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]) and weight.grad is None


def test_the_layers_at_fault_are_named(tmp_path: Path) -> None:
    model = make_tiny(tmp_path, "fp32", layers=6)
    row = Row(model)
    freeze(model, row)
    with pytest.raises(KitError, match=r"adapters get none: \S*layers\.1\."):
        row.check()


def repack_one_layer(model: Any) -> None:
    """Let layer 1 take bitsandbytes' fast path, as all layers did before the kit prevented it."""
    packed = 0
    for module in layer_of(model, 1).modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = True
            packed += 1
    with torch.no_grad():
        model.eval()(input_ids=torch.arange(8)[None])
    model.train()
    assert packed == 7


@pytest.mark.parametrize("is_resumed", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_repacked_layer_is_caught_by_the_warning_and_by_the_slope(
    is_resumed: bool, avx512_bf16: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_tiny(tmp_path, "nf4", is_resumed, layers=6)
    row = Row(model)
    row.check()
    repack_one_layer(model)
    with pytest.raises(KitError, match="gemv_4bit: an autograd kernel was not registered"):
        row.check()
    # PyTorch's warning apart
    from kit.training import gradient_check

    ignored = warnings.catch_warnings(action="ignore")
    monkeypatch.setattr(gradient_check, "lost_gradient_is_an_error", lambda: ignored)
    with pytest.raises(KitError, match=r"adapters get none: \S*layers\.1\."):
        row.check()


def test_a_lost_gradient_is_an_error_in_the_suite_and_in_runs(avx512_bf16: None) -> None:
    layer = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    layer.load_state_dict({"weight": torch.randn(64, 64)})
    layer = layer.to("cpu").eval()
    layer(torch.randn(2, 64))
    out = layer(torch.randn(2, 64, requires_grad=True))
    with pytest.raises(UserWarning, match="an autograd kernel was not registered"):
        out.sum().backward()
    out = layer(torch.randn(2, 64, requires_grad=True))
    with pytest.raises(KitError, match="Nothing is trained"), lost_gradient_is_an_error():
        out.sum().backward()


def test_an_adapter_that_the_row_does_not_use_is_no_fault(tmp_path: Path) -> None:
    """As an expert of a mixture that no token is sent to."""
    model = make_tiny(tmp_path, "fp32", layers=6)
    mlp = layer_of(model, 1).mlp
    mlp.forward = lambda hidden: hidden
    assert len(Row(model).check()) == 3


def test_weights_and_random_state_stay(tmp_path: Path) -> None:
    model = make_tiny(tmp_path, "fp32", is_resumed=True, layers=6)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    Row(model).check()
    assert torch.equal(torch.rand(3), expected)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]) and weight.grad is None


# the packaged student

TEXT = "Tom has 3 apples and buys 4. How many has he? He has 3 + 4 = 7 apples, so it is \\boxed{7}."


def gradients(model: Any) -> dict[int, torch.Tensor]:
    """The adapter's gradient of each layer, on a fixed row, at B plus fixed noise."""
    from kit.models import load_tokenizer

    ids = torch.tensor([load_tokenizer("smollm2-135m").encode(TEXT)[:24]])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_A" in name:
                weight.copy_(
                    torch.randn(weight.shape, generator=generator) / weight.shape[1] ** 0.5
                )
            if "lora_B" in name:
                weight.copy_(0.01 * torch.randn(weight.shape, generator=generator))
    model.train()(input_ids=ids, labels=ids)["loss"].backward()
    layers: dict[int, list[torch.Tensor]] = {}
    for name, weight in model.named_parameters():
        if "lora" in name:
            layers.setdefault(int(name.split(".layers.")[1].split(".")[0]), []).append(weight.grad)
    return {number: torch.cat([g.flatten() for g in parts]) for number, parts in layers.items()}


def dequantize(layer: Any) -> torch.Tensor:
    """The weights that a quantized layer stands for, in fp32."""
    if isinstance(layer, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    if isinstance(layer, bnb.nn.Linear8bitLt):
        scales = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
        return bnb.functional.int8_vectorwise_dequant(layer.weight.data, scales).float()
    return layer.weight.data.float()


def packaged(folder: Path, dtype: str) -> Any:
    return training.make_model(settings(folder, "smollm2-135m", dtype=dtype, dropout=0.0))


def reference_of(quantized: Any, folder: Path) -> Any:
    """The same model with the same weights, in fp32."""
    reference = packaged(folder, "fp32")
    targets = dict(reference.named_modules())
    with torch.no_grad():
        for name, module in quantized.named_modules():
            is_wrapper = isinstance(module, LoraLayer)
            if hasattr(module, "weight") and "lora_" not in name and not is_wrapper:
                targets[name].weight.copy_(dequantize(module))
    return reference


def evaluate_in_each_way(model: Any) -> None:
    """Every pass in evaluation mode that the kit makes of a model that it trains."""
    from kit.training.sft_data import Example

    head_of(model.get_base_model())
    example = Example("row", tuple(range(5, 25)), 4)
    training._mean_loss(model, [example])
    with model.disable_adapter():
        training._mean_loss(model, [example])


def cosines(model: Any, expected: dict[int, torch.Tensor]) -> list[float]:
    actual = gradients(model)
    return [
        torch.nn.functional.cosine_similarity(actual[number], expected[number], dim=0).item()
        for number in sorted(expected)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["nf4", "int8", "bf16"])
def test_the_packaged_students_gradient_is_that_of_its_own_weights_in_fp32(
    dtype: str, avx512_bf16: None, tmp_path: Path
) -> None:
    model = packaged(tmp_path, dtype)
    expected = gradients(reference_of(model, tmp_path))
    evaluate_in_each_way(model)
    found = cosines(model, expected)
    print(f"{dtype}: cosine of each layer's gradient {min(found):.4f} to {max(found):.4f}")
    assert len(found) == 30 and min(found) >= 0.95


@pytest.mark.slow
def test_on_the_repacking_path_that_gradient_is_lost(
    avx512_bf16: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault itself: what loading for training prevents."""
    real = training.load_model

    def load_as_before(*args: Any, **options: Any) -> Any:
        model = real(*args, **options)
        for module in model.modules():
            if isinstance(module, bnb.nn.Linear4bit):
                module.support_avx512bf16_for_cpu = True
        return model

    healthy = packaged(tmp_path, "nf4")
    expected = gradients(healthy)
    monkeypatch.setattr(training, "load_model", load_as_before)
    faulty = packaged(tmp_path, "nf4")
    layers = [one for one in faulty.modules() if isinstance(one, bnb.nn.Linear4bit)]
    assert len(layers) == 210
    assert all(one.weight.quant_state.packing_format_for_cpu for one in layers)
    with warnings.catch_warnings(action="ignore"):
        found = cosines(faulty, expected)
    print(f"repacked: cosine {min(found):.4f} in the worst layer, {found[0]:.4f} in layer 0")
    assert min(found) < 0.5


def test_no_layer_that_is_trained_repacks(avx512_bf16: None, tmp_path: Path) -> None:
    modules = make_tiny(tmp_path, "nf4").modules()
    repacks = [getattr(module, "support_avx512bf16_for_cpu", None) for module in modules]
    assert False in repacks and True not in repacks
