"""Generation through transformers, on the packaged model's real weights and on tiny ones of other cache kinds."""

from __future__ import annotations

import random

import pytest
import torch
import transformers

from kit import prompts
from kit.backends import hf
from kit.backends.base import Generation, Request
from kit.backends.hf import HfBackend
from kit.backends.hf_batch import assemble, draw, prefill, supports_continuous_batching
from kit.core.config import ModelConfig, Sampling

GREEDY = Sampling(temperature=0, max_new_tokens=8)
WARM = Sampling(temperature=1, top_p=0.95, max_new_tokens=8)
TIE = 1e-3  # logits closer than this may change places with the batch's shape (fp32)
QUESTIONS = (
    "What is 2 + 2?",
    "Tom has 3 apples, buys 5 more and gives 2 to Anna. How many are left? Explain every step of your reasoning.",
    "Name three colours.",
    "A train leaves at 9:40 and arrives at 11:05. " * 4 + "How long is the trip?",
    "Write one sentence about the sea.",
)


@pytest.fixture(scope="module")
def backend() -> HfBackend:
    return HfBackend(ModelConfig(max_num_seqs=4))


def limited(
    backend: HfBackend, max_num_seqs: int, model: object = None, **more: object
) -> HfBackend:
    """The same tokenizer and weights, or others, under other limits."""
    other = object.__new__(HfBackend)
    other.__dict__.update(backend.__dict__)
    other.engine, other.notes, other.model = (
        ModelConfig(max_num_seqs=max_num_seqs, **more),
        [],
        model or backend.model,
    )
    other.context_tokens = other.engine.context_tokens or backend.context_tokens
    return other


def ask(backend: HfBackend, sampling: Sampling, n: int = 1) -> list[Request]:
    rendered = [prompts.render(backend.tokenizer, text) for text in QUESTIONS]
    return [Request(f"q{i}", ids, sampling, n, seed=7) for i, ids in enumerate(rendered)]


def run(backend: HfBackend, requests: list[Request]) -> dict[str, Generation]:
    found = {result.id: result for result in backend.generate(requests)}
    assert len(found) == len(requests)
    return found


def tiny(kind: str = "full") -> torch.nn.Module:
    """A random model; rows of the sliding and the convolution kind cannot join a running batch."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": 49152,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
    }
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    layers = {
        "sliding": ["sliding_attention", "full_attention"],
        "convolution": ["conv", "full_attention"],
    }.get(kind)
    if kind == "full":
        config = transformers.LlamaConfig(**shape)
    elif kind == "sliding":
        config = transformers.Gemma3TextConfig(**shape, sliding_window=16, layer_types=layers)
    else:
        config = transformers.Lfm2Config(
            **shape, layer_types=layers, block_auto_adjust_ff_dim=False
        )
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


def test_batched_equals_sequential_up_to_near_ties(backend: HfBackend) -> None:
    """Greedy, five prompts of 31 to 100 tokens through a batch of 4: rows are padded, leave and join."""
    requests = ask(backend, GREEDY)
    alone, together = run(limited(backend, 1), requests), run(backend, requests)
    parted = 0
    for request in requests:
        one, many = (list(found[request.id].completions[0].ids) for found in (alone, together))
        at = next((i for i, (a, b) in enumerate(zip(one, many, strict=False)) if a != b), None)
        if at is not None:
            parted += 1
            with torch.inference_mode():
                best = (
                    backend.model(torch.tensor([[*request.prompt, *one[:at]]]))
                    .logits[0, -1]
                    .topk(2)
                    .values
                )
            assert best[0] - best[1] < TIE
        else:
            assert len(one) == len(many) > 0
    assert parted <= 1
    ids = torch.tensor([requests[1].prompt])
    theirs = backend.model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8
    )
    (sample,) = alone["q1"].completions
    assert (
        list(sample.ids) == theirs[0, ids.shape[1] :].tolist() and sample.finish_reason == "length"
    )
    assert sample.text == backend.tokenizer.decode(sample.ids)


def test_padding_moves_no_logits(backend: HfBackend) -> None:
    ids = [list(request.prompt) for request in ask(backend, GREEDY)]
    order = [3, 0, 1, 4, 4]
    with torch.inference_mode():
        padded, alone = (
            prefill(backend.model, ids),
            [prefill(backend.model, [prompt]) for prompt in ids],
        )
        assert (padded.logits - torch.cat([rows.logits for rows in alone])).abs().max() < TIE
        joined = assemble([(padded, [3, 0]), (alone[1], [0]), (alone[4], [0, 0])])
        for token in (100, 200):
            joined.step(backend.model, [token] * 5)
        fresh = [prefill(backend.model, [[*ids[i], 100, 200]]).logits for i in order]
    assert (joined.columns - joined.starts)[:, 0].tolist() == [len(ids[i]) + 2 for i in order]
    assert (joined.logits - torch.cat(fresh)).abs().max() < TIE


def test_samples_share_a_prefill_and_have_their_own_draws(backend: HfBackend) -> None:
    (request,) = ask(backend, WARM, n=4)[1:2]
    one, four = (run(limited(backend, max_num_seqs), [request])["q1"] for max_num_seqs in (1, 4))
    assert one.prefill_tokens == four.prefill_tokens == one.prompt_tokens == len(request.prompt)
    assert len({sample.ids for sample in one.completions}) == 4
    assert run(limited(backend, 1), [request])["q1"].completions == one.completions
    beside = run(limited(backend, 8), [*ask(backend, GREEDY)[2:], request])["q1"].completions
    for found in (
        four.completions,
        beside,
    ):  # a draw may fall on the border of two tokens, where the last bits decide
        assert sum(a.ids == b.ids for a, b in zip(one.completions, found, strict=True)) >= 3
    other = Request(request.id, request.prompt, WARM, 4, seed=8)
    assert run(limited(backend, 4), [other])["q1"].completions != four.completions


def test_stop_strings_and_end_tokens_are_not_in_the_text(backend: HfBackend) -> None:
    request = ask(backend, GREEDY)[1]
    (whole,) = run(limited(backend, 1), [request])["q1"].completions
    cuts = (whole.text[10:14], whole.text[7:8], whole.text[-3:])
    stopping = [GREEDY.model_copy(update={"stop": ("never!!", cut)}) for cut in cuts]
    found = run(
        backend, [Request(str(i), request.prompt, sampling) for i, sampling in enumerate(stopping)]
    )
    for i, cut in enumerate(cuts):
        (sample,) = found[str(i)].completions
        assert (sample.finish_reason, sample.text) == ("stop", whole.text[: whole.text.index(cut)])
    ended = Request(
        "e", prompts.render(backend.tokenizer, "What is 2 + 2?"), Sampling(temperature=0)
    )
    (sample,) = run(backend, [ended])["e"].completions
    assert sample.finish_reason == "stop" and sample.text == backend.tokenizer.decode(sample.ids)
    assert sample.text and not set(sample.ids) & backend.tokenizer.eos_ids


def test_loops_stop_when_asked_and_are_penalized_when_asked(backend: HfBackend) -> None:
    ids, plain = (
        tuple(backend.tokenizer.encode("ha " * 20)),
        Sampling(temperature=0, max_new_tokens=40),
    )
    more = {"loop": {"stop_loops": True}, "plain": {}, "penal": {"repetition_penalty": 1.5}}
    found = run(
        backend, [Request(name, ids, plain.model_copy(update=keys)) for name, keys in more.items()]
    )
    assert {
        name: result.completions[0].finish_reason
        for name, result in found.items()
        if name != "penal"
    } == {
        "loop": "loop",
        "plain": "length",
    }
    kinds = {name: len(set(result.completions[0].ids)) for name, result in found.items()}
    assert kinds["penal"] > 2 * kinds["plain"]


def test_over_long_prompts_are_errors_of_their_own(backend: HfBackend) -> None:
    sizes = {"fits": 60, "full": 64, "empty": 0}
    requests = [
        Request(name, tuple(range(100, 100 + size)), GREEDY) for name, size in sizes.items()
    ]
    found = run(limited(backend, 4, context_tokens=64), requests)
    assert (
        "64 tokens" in found["full"].error
        and found["empty"].error
        and not found["full"].completions
    )
    assert (
        len(found["fits"].completions[0].ids) == 4
        and found["fits"].completions[0].finish_reason == "length"
    )


def test_a_small_budget_sends_rows_back_and_loses_nothing(
    backend: HfBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows grow past the budget: some wait, are evaluated again, and go on where they were."""
    monkeypatch.setattr(hf, "HEADROOM_TOKENS", 4)
    small, sampling = (
        limited(backend, 4, tiny()),
        Sampling(temperature=1, top_p=1, max_new_tokens=40),
    )
    requests = [Request(f"r{i}", tuple(range(200, 230 + i)), sampling, seed=3) for i in range(3)]
    tight = limited(small, 4, kv_cache_gib=150 * (2 * 2 * 16 * 4) / 2**30)
    found, wanted = run(tight, requests), run(small, requests)
    assert any(result.prefill_tokens > result.prompt_tokens for result in found.values())
    for name, result in wanted.items():
        assert result.prefill_tokens == result.prompt_tokens
        assert found[name].completions == result.completions


def test_out_of_memory_halves_the_batch(backend: HfBackend) -> None:
    class Poor:
        """A model on a card that holds so many rows."""

        most, inner = 2, tiny()
        config, device, dtype = inner.config, inner.device, inner.dtype

        def __call__(self, input_ids: torch.Tensor, **options: object) -> object:
            if len(input_ids) > self.most:
                raise torch.OutOfMemoryError("too many rows")
            return self.inner(input_ids=input_ids, **options)

    poor, requests = limited(backend, 4, Poor()), ask(backend, GREEDY, n=2)
    found, wanted = run(poor, requests), run(limited(backend, 4, Poor.inner), requests)
    assert poor.notes == ["Out of memory: going on with 2 rows at a time."]
    assert {name: result.completions for name, result in found.items()} == {
        k: v.completions for k, v in wanted.items()
    }
    Poor.most = 0
    assert all(
        "memory" in result.error
        for result in run(limited(backend, 4, Poor()), requests[:2]).values()
    )


def test_nf4_generates_on_real_weights() -> None:
    made = HfBackend(ModelConfig(dtype="nf4", max_num_seqs=2))
    found = run(made, ask(made, GREEDY)[:2])
    assert type(made.model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    assert "4" in found["q0"].completions[0].text and found["q1"].completions[0].ids


@pytest.mark.parametrize("kind", ["sliding", "convolution"])
def test_caches_that_keep_less_than_everything(backend: HfBackend, kind: str) -> None:
    odd = limited(backend, 4, tiny(kind))
    assert supports_continuous_batching(backend.model) and not supports_continuous_batching(
        odd.model
    )
    sampling = Sampling(temperature=0, max_new_tokens=10)
    requests = [*ask(odd, sampling)[:4], Request("n", tuple(range(300, 340)), sampling, n=6)]
    alone, together = run(limited(odd, 1), requests), run(odd, requests)
    for name, result in alone.items():
        assert [one.ids for one in result.completions] == [
            many.ids for many in together[name].completions
        ]


def test_draws_follow_the_filters() -> None:
    """The sets that transformers' own filters keep, and frequencies over 4,000 draws."""
    torch.manual_seed(0)
    logits, rng = torch.randn(1, 2000) * 3, random.Random(0)
    for keys in ({"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"top_p": 0.8, "top_k": 9}, {}):
        sampling = Sampling(**{"temperature": 0.8, "top_p": 1, **keys})
        settings = transformers.GenerationConfig(
            do_sample=True, **{"temperature": 0.8, "top_k": 0, "top_p": 1.0, **keys}
        )
        filters = tiny()._get_logits_processor(settings, input_ids_seq_length=1, device="cpu")
        wanted = torch.softmax(filters(torch.tensor([[1]]), logits.clone()), -1)[0]
        drawn = draw(logits.expand(4000, -1), sampling, [rng.random() for _ in range(4000)])
        assert wanted[drawn].min() > 0, keys
        for token in wanted.argsort(descending=True)[:4].tolist():
            assert abs(drawn.count(token) / 4000 - wanted[token]) < 0.03, keys
    flat = {
        draw(torch.zeros(1, 5000), Sampling(temperature=1, top_p=0.9), [u / 200])[0]
        for u in range(200)
    }
    assert len(flat) == 200  # more than the head of likeliest tokens could hold evenly


def test_repetition_penalty_as_transformers_has_it() -> None:
    torch.manual_seed(1)
    logits, ids = torch.randn(2, 50), torch.tensor([[3, 7, 9], [1, 1, 40]])
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, ids, True)
    wanted = (
        transformers.RepetitionPenaltyLogitsProcessor(1.8)(ids, logits.clone()).argmax(-1).tolist()
    )
    assert draw(logits, Sampling(temperature=0, repetition_penalty=1.8), [], seen) == wanted
