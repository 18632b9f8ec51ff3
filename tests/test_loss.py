"""kit.training.loss: the sliced cross-entropy equals the plain one, gradients too."""

from __future__ import annotations

import pytest
import torch
from transformers import CohereConfig, Gemma2Config, GraniteConfig, LlamaConfig

from kit.core.errors import KitError
from kit.training.loss import IGNORED, LIVE_BYTES, Head, attach, head_of

SMALL = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SMALL |= {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KINDS = {
    "tied": (LlamaConfig, {"tie_word_embeddings": True}),
    "untied": (LlamaConfig, {"tie_word_embeddings": False}),
    "softcap": (
        Gemma2Config,
        {"final_logit_softcapping": 0.5, "head_dim": 8, "sliding_window": 16},
    ),
    "scaled": (CohereConfig, {"logit_scale": 3.0}),
    "divided": (GraniteConfig, {"logits_scaling": 5.0}),
}


def small_model(kind: str = "tied"):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config, extra = KINDS[kind]
    return AutoModelForCausalLM.from_config(config(**SMALL, **extra)).float().train()


def batch(rows: int = 3, length: int = 11):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 97, (rows, length), generator=generator)
    labels = ids.clone()
    for i in range(rows):
        labels[i, : 2 + i] = IGNORED
    return ids, labels


def plain(model, ids, labels, denominator):
    logits = model(input_ids=ids, use_cache=False).logits.float()
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, 97),
        labels[:, 1:].reshape(-1),
        ignore_index=IGNORED,
        reduction="sum",
    )
    return loss / denominator


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("logits_bytes", [97 * LIVE_BYTES * 5, 1 << 20])
def test_loss_and_every_gradient_equal_the_plain_way_under_accumulation(
    kind: str, logits_bytes: int
) -> None:
    ids, labels = batch()
    count = (labels[:, 1:] != IGNORED).sum()
    model = small_model(kind)
    wanted = sum(plain(model, ids[i : i + 1], labels[i : i + 1], count) for i in range(3))
    wanted.backward()
    expected = gradients(model)
    model.zero_grad()
    attach(model, logits_bytes)
    total = 0.0
    for i in range(3):  # three micro-batches of one step
        out = model(input_ids=ids[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=count)
        out["loss"].backward()
        total += out["loss"].item()
    got = gradients(model)
    assert abs(total - wanted.item()) < 1e-5
    assert got.keys() == expected.keys() and any("embed" in name for name in got)
    for name, value in expected.items():
        assert (got[name] - value).abs().max() < 1e-5, name


def test_a_frozen_head_still_passes_the_gradient_on() -> None:
    ids, labels = batch()
    model = small_model("untied")
    model.lm_head.weight.requires_grad_(False)
    plain(model, ids, labels, 20).backward()
    expected = gradients(model)
    model.zero_grad()
    attach(model, 97 * LIVE_BYTES * 2)
    model(input_ids=ids, labels=labels, num_items_in_batch=20)["loss"].backward()
    got = gradients(model)
    assert "lm_head.weight" not in got
    assert max((got[n] - v).abs().max().item() for n, v in expected.items()) < 1e-5


def test_the_bias_of_a_head_is_learned() -> None:
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(7, 8), torch.randn(13, 8), torch.randn(13)
    targets = torch.randint(0, 13, (7,))
    leaves = [x.requires_grad_(True) for x in (hidden, weight, bias)]
    torch.nn.functional.cross_entropy(hidden @ weight.T + bias, targets, reduction="sum").backward()
    expected = [x.grad.clone() for x in leaves]
    for x in leaves:
        x.grad = None
    losses = Head(weight, bias).losses(hidden, targets, 2)
    losses.sum().backward()
    assert all((x.grad - e).abs().max() < 1e-5 for x, e in zip(leaves, expected, strict=True))
    assert losses.shape == (7,)


def test_no_slice_is_larger_than_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = Head.logits
    monkeypatch.setattr(
        Head, "logits", lambda self, hidden: seen.append(len(hidden)) or real(self, hidden)
    )
    model = small_model()
    attach(model, 97 * LIVE_BYTES * 8)
    seen.clear()
    ids, labels = batch()
    loss = model(input_ids=ids, labels=labels)["loss"]
    assert seen == [8, 8, 8]  # 24 supervised positions
    loss.backward()
    assert seen == [8] * 6  # none was kept for backward


def test_without_labels_the_model_answers_as_before() -> None:
    ids, _ = batch()
    model = small_model().eval()
    before = model(input_ids=ids).logits
    attach(model, 1 << 20)
    assert torch.equal(model(input_ids=ids).logits, before)


def test_a_head_that_computes_something_else_is_refused() -> None:
    model = small_model("scaled")
    model.config.logit_scale = (
        1.0  # what the module believes; the model itself still multiplies by 3
    )
    with pytest.raises(KitError, match="unsupported output head"):
        head_of(model)
