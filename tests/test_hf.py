"""Generation through transformers: the packaged model's weights, tiny ones of other cache kinds."""

from __future__ import annotations

import random
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers

from kit import prompts
from kit.backends import hf_generate
from kit.backends.base import Generation, Request
from kit.backends.hf import HfBackend, lean_adapter
from kit.backends.hf_batch import (
    ROOM_TOKENS,
    DecodeBatch,
    Part,
    assemble,
    draw,
    few_tokens,
    prefill,
    supports_continuous_batching,
)
from kit.backends.hf_graphs import LEAST_STEPS, FixedStep, GraphDecoder, can_be_recorded
from kit.bench import overhead
from kit.core.config import ModelConfig, Sampling
from kit.models import load_tokenizer
from tests.tiny_backend import tiny_backend

GREEDY = Sampling(temperature=0, max_new_tokens=8)
WARM = Sampling(temperature=1, top_p=0.95, max_new_tokens=8)
TIE = 1e-3  # logits closer than this may change places with the batch's shape (fp32)
QUESTIONS = (
    "What is 2 + 2?",
    "Tom has 3 apples, buys 5 more and gives 2 to Anna. How many are left? "
    "Explain every step of your reasoning.",
    "Name three colours.",
    "A train leaves at 9:40 and arrives at 11:05. " * 4 + "How long is the trip?",
    "Write one sentence about the sea.",
)
TINY = {
    "vocab_size": 49152,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
CONVOLUTION = {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}
CONFIGS = {
    "full": transformers.LlamaConfig(**TINY, head_dim=16),
    # its logits differ by more than near-ties do
    "wide": transformers.LlamaConfig(**TINY, head_dim=16, initializer_range=0.3),
    "small": transformers.LlamaConfig(
        **{**TINY, "vocab_size": 1000}, head_dim=16, initializer_range=0.3
    ),
    "sliding": transformers.Gemma3TextConfig(**TINY, **SLIDING, head_dim=16),
    "convolution": transformers.Lfm2Config(**TINY, **CONVOLUTION),
    # Positions are learned: there is none after the last one.
    "learned": transformers.GPT2Config(
        vocab_size=1000, n_embd=32, n_layer=2, n_head=2, n_positions=120, initializer_range=0.3
    ),
}
TOKEN_BYTES = 2 * 2 * 16 * 4  # of the tiny full model's cache: keys and values, layers, dim, fp32


@pytest.fixture(scope="module")
def backend() -> HfBackend:
    return HfBackend(ModelConfig(max_num_seqs=4))


def limited(
    backend: HfBackend, max_num_seqs: int, model: object = None, **limits: object
) -> HfBackend:
    """The same tokenizer and weights, or others, under other limits."""
    other = object.__new__(HfBackend)
    other.__dict__.update(backend.__dict__)
    other.engine = ModelConfig(max_num_seqs=max_num_seqs, **limits)
    other.notes = []
    other.max_rows = max_num_seqs
    other.most_tokens = None
    other.model = model or backend.model
    other.context_tokens = other.engine.context_tokens or backend.context_tokens
    return other


def ask(backend: HfBackend, sampling: Sampling, n: int = 1) -> list[Request]:
    requests = []
    for number, text in enumerate(QUESTIONS):
        ids = prompts.render(backend.tokenizer, text)
        requests.append(Request(f"q{number}", ids, sampling, n, seed=7))
    return requests


def run(backend: HfBackend, requests: list[Request]) -> dict[str, Generation]:
    results = {result.id: result for result in backend.generate(requests)}
    assert len(results) == len(requests)
    return results


@pytest.fixture(params=["tiny", pytest.param("packaged", marks=pytest.mark.slow)])
def either(request: pytest.FixtureRequest, backend: HfBackend) -> HfBackend:
    """The packaged tokenizer before a random model or, a longer proof, before the real one."""
    return limited(backend, 4, tiny("wide")) if request.param == "tiny" else backend


def tiny(kind: str = "full") -> torch.nn.Module:
    """A random model; rows of the sliding and the convolution kind cannot join a running batch."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind], attn_implementation="sdpa")
    return model.eval()


def test_batched_equals_sequential_up_to_near_ties(backend: HfBackend) -> None:
    """Greedy, five prompts of 31 to 100 tokens through a batch of 4: rows pad, leave and join."""
    requests = ask(backend, GREEDY)
    sequential = run(limited(backend, 1), requests)
    batched = run(backend, requests)
    different = 0
    for request in requests:
        one = list(sequential[request.id].completions[0].ids)
        many = list(batched[request.id].completions[0].ids)
        pairs = enumerate(zip(one, many, strict=False))
        parting = next((index for index, (a, b) in pairs if a != b), None)
        if parting is None:
            assert len(one) == len(many) > 0
            continue
        different += 1
        ids = torch.tensor([[*request.prompt, *one[:parting]]])
        with torch.inference_mode():
            best = backend.model(ids).logits[0, -1].topk(2).values
        assert best[0] - best[1] < TIE
    assert different <= 1


def test_greedy_equals_transformers_own_generate(backend: HfBackend) -> None:
    request = ask(backend, GREEDY)[1]
    ids = torch.tensor([request.prompt])
    reference = backend.model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8
    )
    (sample,) = run(limited(backend, 1), [request])["q1"].completions
    assert list(sample.ids) == reference[0, ids.shape[1] :].tolist()
    assert sample.finish_reason == "length"
    assert sample.text == backend.tokenizer.decode(sample.ids)


def test_padding_moves_no_logits(either: HfBackend) -> None:
    ids = [list(request.prompt) for request in ask(either, GREEDY)]
    order = [3, 0, 1, 4, 4]
    model = either.model
    with torch.inference_mode():
        padded = prefill(model, ids)
        alone = [prefill(model, [prompt]) for prompt in ids]
        assert (padded.logits - torch.cat([batch.logits for batch in alone])).abs().max() < TIE
        parts = [Part(padded, [3, 0]), Part(alone[1], [0]), Part(alone[4], [0, 0])]
        joined = assemble(parts)
        for token in (100, 200):
            joined.step(model, [token] * 5)
        fresh = [prefill(model, [[*ids[index], 100, 200]]).logits for index in order]
    lengths = (joined.columns - joined.starts)[:, 0].tolist()
    assert lengths == [len(ids[index]) + 2 for index in order]
    assert (joined.logits - torch.cat(fresh)).abs().max() < TIE


@pytest.mark.parametrize("kind", ["small", "learned"])
def test_rows_take_the_places_of_ended_ones(
    backend: HfBackend, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples of 1 to 117 tokens after prompts of 3 to 40: as if alone, and few new batches.

    Also with the steps that a card records as graphs, which a CPU computes one by one.
    """
    made = []
    buffers = []

    def count(parts: list[Part], *rest: Any) -> object:
        old = buffers.pop() if buffers else None
        batch = assemble(parts, *rest)
        made.append(batch.columns)
        # never two whole caches
        assert old is None or old() is None
        buffers.append(weakref.ref(batch.cache.layers[0].buffers[0]))
        return batch

    monkeypatch.setattr(hf_generate, "assemble", count)
    dice = random.Random(5)
    requests = []
    for number in range(40):
        prompt = tuple(dice.randrange(100, 1000) for _ in range(dice.randint(3, 40)))
        # Half of them up to the model's last position.
        limit = 120 - len(prompt) if number % 2 else dice.randint(1, 80)
        sampling = Sampling(temperature=0, max_new_tokens=limit)
        requests.append(Request(f"q{number}", prompt, sampling))
    # Double precision: no batch shape moves a token.
    model = tiny(kind).double()
    alone = run(limited(backend, 1, model, context_tokens=120), requests)
    assert len(made) >= 40
    fixed_steps = []

    def run_fixed(step: FixedStep, batch: DecodeBatch, tokens: list[int]) -> None:
        fixed_steps.append(batch.columns)
        compute(step, batch, tokens)

    compute = FixedStep.run
    monkeypatch.setattr(FixedStep, "run", run_fixed)
    eight = limited(backend, 8, model, context_tokens=120)
    for graphs in (None, GraphDecoder(model)):
        made.clear()
        eight.graphs = lambda graphs=graphs: graphs
        together = run(eight, requests)
        for name, result in alone.items():
            assert together[name].completions == result.completions
        assert (len(fixed_steps) > 100) == bool(graphs)
        assert len(made) < 30
        # The columns of rows that have ended leave, too.
        assert max(made) <= 120


def test_a_model_that_reads_the_caches_length_is_not_recorded(backend: HfBackend) -> None:
    """OPT does: a recording would keep the length of its first step."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.OPTConfig(
        vocab_size=1000, max_position_embeddings=200, word_embed_proj_dim=32, **sizes
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval().double()
    requests = []
    for number in range(4):
        prompt = tuple(range(100, 110 + number))
        requests.append(Request(f"q{number}", prompt, Sampling(temperature=0, max_new_tokens=40)))
    growing = limited(backend, 4, model, context_tokens=200)
    fixed = limited(backend, 4, model, context_tokens=200)
    decoder = GraphDecoder(model)
    fixed.graphs = lambda: decoder
    assert decoder.works
    expected = run(growing, requests)
    for name, result in run(fixed, requests).items():
        assert result.completions == expected[name].completions
    assert not decoder.works


def test_a_model_that_asks_the_card_for_values_is_not_recorded() -> None:
    assert can_be_recorded(tiny("small"))
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    config = transformers.LlamaConfig(**TINY, head_dim=16, rope_parameters=rope)
    assert not can_be_recorded(transformers.AutoModelForCausalLM.from_config(config))
    in_8_bits = tiny("small")
    in_8_bits.is_loaded_in_8bit = True  # as bitsandbytes' quantizer marks it
    assert not can_be_recorded(in_8_bits)


def test_short_answers_are_not_recorded(
    backend: HfBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A verdict of some tokens is over before a recording would pay."""
    fixed_steps = []
    monkeypatch.setattr(FixedStep, "run", lambda *_: fixed_steps.append(1))
    model = tiny("small")
    few = limited(backend, 4, model)
    few.graphs = lambda: GraphDecoder(model)
    sampling = Sampling(temperature=0, max_new_tokens=LEAST_STEPS)
    assert run(few, [Request("q", (100, 101), sampling)])["q"].completions
    assert not fixed_steps


def test_samples_share_a_prefill_and_have_their_own_draws(either: HfBackend) -> None:
    request = ask(either, WARM, n=4)[1]
    one = run(limited(either, 1), [request])["q1"]
    four = run(limited(either, 4), [request])["q1"]
    assert one.prefill_tokens == four.prefill_tokens == one.prompt_tokens == len(request.prompt)
    assert len({sample.ids for sample in one.completions}) == 4
    assert run(limited(either, 1), [request])["q1"].completions == one.completions

    # A draw may fall on the border of two tokens, where the last bits decide.
    others = ask(either, GREEDY)[2:]
    beside = run(limited(either, 8), [*others, request])["q1"]
    for result in (four, beside):
        pairs = zip(one.completions, result.completions, strict=True)
        assert sum(a.ids == b.ids for a, b in pairs) >= 3
    reseeded = Request(request.id, request.prompt, WARM, 4, seed=8)
    assert run(limited(either, 4), [reseeded])["q1"].completions != four.completions


def test_a_result_counts_seconds_from_its_own_prefill(either: HfBackend) -> None:
    """Two requests of one prompt, which is evaluated once: both have begun."""
    request = ask(either, GREEDY)[0]
    twin = Request("twin", request.prompt, GREEDY)
    results = run(either, [request, twin])
    assert all(0 < result.seconds < 600 for result in results.values())


def test_stop_strings_and_end_tokens_are_not_in_the_text(backend: HfBackend) -> None:
    request = ask(backend, GREEDY)[1]
    (whole,) = run(limited(backend, 1), [request])["q1"].completions
    stops = (whole.text[10:14], whole.text[7:8], whole.text[-3:])
    requests = []
    for number, stop in enumerate(stops):
        sampling = GREEDY.model_copy(update={"stop": ("never!!", stop)})
        requests.append(Request(str(number), request.prompt, sampling))
    results = run(backend, requests)
    for number, stop in enumerate(stops):
        (sample,) = results[str(number)].completions
        assert sample.finish_reason == "stop"
        assert sample.text == whole.text[: whole.text.index(stop)]

    prompt = prompts.render(backend.tokenizer, "What is 2 + 2?")
    (sample,) = run(backend, [Request("end", prompt, Sampling(temperature=0))])["end"].completions
    assert sample.finish_reason == "stop"
    assert sample.text == backend.tokenizer.decode(sample.ids)
    assert sample.text
    assert not set(sample.ids) & backend.tokenizer.eos_ids


def test_loops_stop_when_asked_and_are_penalized_when_asked(backend: HfBackend) -> None:
    ids = tuple(backend.tokenizer.encode("ha " * 20))
    plain = Sampling(temperature=0, max_new_tokens=40)
    requests = [
        Request("plain", ids, plain),
        Request("loop", ids, plain.model_copy(update={"stop_loops": True})),
        Request("penalty", ids, plain.model_copy(update={"repetition_penalty": 1.5})),
    ]
    results = run(backend, requests)
    assert results["plain"].completions[0].finish_reason == "length"
    assert results["loop"].completions[0].finish_reason == "loop"
    different = {name: len(set(result.completions[0].ids)) for name, result in results.items()}
    assert different["penalty"] > 2 * different["plain"]


def test_the_repetition_penalty_in_a_batch_equals_transformers_own(either: HfBackend) -> None:
    sampling = Sampling(temperature=0, repetition_penalty=1.3, max_new_tokens=12)
    requests = ask(either, sampling)[:3]
    results = run(either, requests)
    for request in requests:
        ids = torch.tensor([request.prompt])
        reference = either.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=12,
            repetition_penalty=1.3,
        )
        (sample,) = results[request.id].completions
        expected = reference[0, ids.shape[1] :].tolist()
        assert list(sample.ids) == expected[: len(sample.ids)]


def test_over_long_prompts_are_errors_of_their_own(backend: HfBackend) -> None:
    sizes = {"fits": 60, "full": 64, "empty": 0}
    requests = [
        Request(name, tuple(range(100, 100 + size)), GREEDY) for name, size in sizes.items()
    ]
    results = run(limited(backend, 4, context_tokens=64), requests)
    assert "64 tokens" in results["full"].error
    assert results["empty"].error
    assert not results["full"].completions
    (sample,) = results["fits"].completions
    assert len(sample.ids) == 4
    assert sample.finish_reason == "length"


def test_a_small_budget_sends_rows_back_and_loses_nothing(
    backend: HfBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows grow past the budget: some wait, are evaluated again, and go on where they were."""
    monkeypatch.setattr(hf_generate, "HEADROOM_TOKENS", 4)
    roomy = limited(backend, 4, tiny())
    tight = limited(roomy, 4, roomy.model, kv_cache_gib=150 * TOKEN_BYTES / 2**30)
    sampling = Sampling(temperature=1, top_p=1, max_new_tokens=40)
    requests = [
        Request(f"r{extra}", tuple(range(200, 230 + extra)), sampling, seed=3) for extra in range(3)
    ]
    results = run(tight, requests)
    expected = run(roomy, requests)
    assert any(result.prefill_tokens > result.prompt_tokens for result in results.values())
    for name, result in expected.items():
        assert result.prefill_tokens == result.prompt_tokens
        assert results[name].completions == result.completions


def test_under_a_tight_budget_little_is_evaluated_twice(
    backend: HfBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixty samples of 1 to 90 tokens after prompts of 10 to 60, and room for eight of the mean."""
    monkeypatch.setattr(hf_generate, "HEADROOM_TOKENS", 8)
    tight = limited(backend, 16, tiny(), kv_cache_gib=800 * TOKEN_BYTES / 2**30)
    dice = random.Random(5)
    requests = []
    for number in range(60):
        prompt = tuple(range(number, number + dice.randint(10, 60)))
        sampling = Sampling(temperature=0, max_new_tokens=dice.randint(1, 90))
        requests.append(Request(f"r{number}", prompt, sampling))
    results = run(tight, requests).values()
    assert all(result.completions for result in results)
    again = sum(result.prefill_tokens - result.prompt_tokens for result in results)
    # 259; sending half of the rows away at a time evaluates 2,383 again.
    assert 0 < again < 600


def test_a_card_runs_32_rows_unless_the_config_says_fewer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = SimpleNamespace(
        device=torch.device("cuda"), config=CONFIGS["full"], register_forward_pre_hook=id
    )
    monkeypatch.setattr("kit.backends.hf.load_model", lambda *_, **__: model)
    rows = [HfBackend(ModelConfig(max_num_seqs=most)).max_rows for most in (None, 4)]
    assert rows == [32, 4]


def test_the_budget_decides_how_many_rows_run_and_the_key_is_the_most(
    backend: HfBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    running: list[int] = []
    real = DecodeBatch.step

    def count(batch: DecodeBatch, model: object, tokens: list[int]) -> None:
        running.append(len(tokens))
        real(batch, model, tokens)

    monkeypatch.setattr(DecodeBatch, "step", count)
    # a row is admitted with 40 + 256 tokens: three of them are within 1,000
    prompts_of_40 = [tuple(range(200 + number, 240 + number)) for number in range(8)]
    requests = [Request(f"r{i}", prompt, GREEDY) for i, prompt in enumerate(prompts_of_40)]
    most = {}
    for rows in (2, 32):
        running.clear()
        run(limited(backend, rows, tiny(), kv_cache_gib=1000 * TOKEN_BYTES / 2**30), requests)
        most[rows] = max(running)
    assert most == {2: 2, 32: 3}


def test_a_step_copies_no_cache() -> None:
    """Only one in ROOM_TOKENS does, where transformers' own cache is copied at each."""
    model = tiny()
    with torch.inference_mode():
        batch = prefill(model, [[1, 2, 3], [4, 5]])
        places = set()
        for _ in range(ROOM_TOKENS):
            batch.step(model, [6, 7])
            places.add(batch.cache.layers[0].buffers[0].data_ptr())
    assert len(places) == 1


OUT_OF_MEMORY = (
    torch.OutOfMemoryError("too many rows"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError("too many rows"),
)


class SmallCard:
    """A model on a card that holds so many rows, of so many tokens in one pass, in all so many."""

    def __init__(
        self,
        max_rows: int,
        max_tokens: int = 10**6,
        error: Exception = OUT_OF_MEMORY[0],
        max_cached: int = 10**6,
    ) -> None:
        self.max_rows = max_rows
        self.max_tokens = max_tokens
        self.max_cached = max_cached
        self.most_rows: list[int] = []  # of each step
        self.error = error
        self.inner = tiny()
        self.config = self.inner.config
        self.device = self.inner.device
        self.dtype = self.inner.dtype

    def __call__(self, input_ids: torch.Tensor, **options: object) -> object:
        if len(input_ids) > self.max_rows or input_ids.shape[1] > self.max_tokens:
            raise self.error
        columns = options["past_key_values"].get_seq_length() + input_ids.shape[1]
        if len(input_ids) * columns > self.max_cached:
            raise self.error
        self.most_rows.append(len(input_ids))
        return self.inner(input_ids=input_ids, **options)


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_out_of_memory_halves_the_batch_and_is_remembered(
    backend: HfBackend, error: Exception
) -> None:
    small = limited(backend, 4, SmallCard(2, error=error))
    requests = ask(backend, GREEDY, n=2)
    longest = max(len(request.prompt) for request in requests) + 1  # a token was drawn
    expected = run(limited(backend, 4, tiny()), requests)
    for _ in range(2):
        results = run(small, requests)
        budget_tokens = 2 * (longest + hf_generate.HEADROOM_TOKENS)
        assert small.notes == [f"Out of memory: going on with {budget_tokens} tokens at a time."]
        for name, result in expected.items():
            assert results[name].completions == result.completions


def test_memory_that_long_rows_ran_out_of_leaves_short_ones_many(
    backend: HfBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four prompts of 200 tokens are too much for the card; twenty of 20 are not."""
    monkeypatch.setattr(hf_generate, "HEADROOM_TOKENS", 8)
    card = SmallCard(100, max_cached=700)
    small = limited(backend, 24, card)
    requests = [Request(f"long{n}", tuple(range(n, 200 + n)), GREEDY) for n in range(4)]
    requests += [Request(f"short{n}", tuple(range(n, 20 + n)), GREEDY) for n in range(40)]
    results = run(small, requests)
    assert all(result.completions for result in results.values())
    assert 1 <= len(small.notes) <= 4
    assert max(card.most_rows) >= 10


def test_memory_that_ends_while_rows_join_draws_no_row_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """New rows are then among the running and among the joining ones."""
    model = tiny_backend("llama")
    sampling = Sampling(temperature=1.0, max_new_tokens=60)
    requests = [Request(f"r{i}", tuple(range(5, 20 + i)), sampling, n=2) for i in range(4)]

    def texts() -> list[tuple[str, list[Any]]]:
        answers = [(g.id, [c.ids for c in g.completions]) for g in model.generate(requests)]
        return sorted(answers)

    undisturbed = texts()
    real = hf_generate.assemble
    failures = iter([torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")])

    def assemble(*args: Any, **kwargs: Any) -> Any:
        for failure in failures:
            raise failure
        return real(*args, **kwargs)

    monkeypatch.setattr(hf_generate, "assemble", assemble)
    assert texts() == undisturbed and len(model.notes) == 1


def test_longrope_keeps_to_the_positions_of_one_rotation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [8.0] * 8,
        "original_max_position_embeddings": 256,
    }
    config = transformers.Phi3Config(
        vocab_size=len(load_tokenizer("smollm2-135m").inner),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        original_max_position_embeddings=256,
        rope_parameters=rope,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    load_tokenizer("smollm2-135m").inner.save_pretrained(tmp_path)
    backend = HfBackend(ModelConfig(backend="hf", model=str(tmp_path)))
    assert backend.context_tokens == 256 and "LongRoPE, at most 256" in backend.notes[0]


def test_other_errors_are_not_taken_for_out_of_memory(backend: HfBackend) -> None:
    broken = limited(backend, 4, SmallCard(2, error=RuntimeError("shapes cannot be multiplied")))
    with pytest.raises(RuntimeError, match="shapes"):
        run(broken, ask(backend, GREEDY, n=2))


def test_a_row_that_fits_nowhere_does_not_narrow_the_others(backend: HfBackend) -> None:
    small = limited(backend, 4, SmallCard(4, max_tokens=150))
    giant = Request("giant", tuple(range(300, 500)), GREEDY)
    results = run(small, [*ask(backend, GREEDY), giant])
    assert "memory" in results.pop("giant").error
    assert all(result.completions for result in results.values())
    assert small.most_tokens is None


def test_out_of_memory_with_one_row_is_its_requests_error(backend: HfBackend) -> None:
    results = run(limited(backend, 4, SmallCard(0)), ask(backend, GREEDY, n=2)[:2])
    assert all("memory" in result.error for result in results.values())


def test_a_closed_model_leaves_its_memory_to_other_libraries(
    backend: HfBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a card, llama.cpp cannot have what torch's allocator keeps of a model that is gone."""
    one = limited(backend, 1, tiny())
    model = weakref.ref(one.model)
    gone_when_emptied: list[bool] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: gone_when_emptied.append(not model()))
    one.close()
    assert gone_when_emptied == [True]


@pytest.mark.slow
def test_nf4_generates_on_real_weights() -> None:
    backend = HfBackend(ModelConfig(dtype="nf4", max_num_seqs=2))
    results = run(backend, ask(backend, GREEDY)[:2])
    assert type(backend.model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    assert "4" in results["q0"].completions[0].text
    assert results["q1"].completions[0].ids


@pytest.mark.parametrize("kind", ["sliding", "convolution"])
def test_caches_that_keep_less_than_everything(backend: HfBackend, kind: str) -> None:
    batched = limited(backend, 4, tiny(kind))
    assert supports_continuous_batching(backend.model)
    assert not supports_continuous_batching(batched.model)
    sampling = Sampling(temperature=0, max_new_tokens=10)
    samples = Request("n", tuple(range(300, 340)), sampling, n=6)
    requests = [*ask(batched, sampling)[:4], samples]
    results = run(batched, requests)
    for name, alone in run(limited(batched, 1, batched.model), requests).items():
        pairs = zip(alone.completions, results[name].completions, strict=True)
        assert all(one.ids == many.ids for one, many in pairs)


def with_adapter(model: torch.nn.Module, scale: float) -> peft.PeftModel:
    """The model with a random adapter whose update has about this size."""
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_alpha=12, lora_dropout=0.1, target_modules="all-linear")
    adapted = peft.get_peft_model(model, config).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=scale)
    return adapted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lean_adapter_computes_what_pefts_does(dtype: torch.dtype) -> None:
    adapted = with_adapter(tiny().to(dtype), 0.1)
    ids = torch.arange(300, 340).reshape(4, 10)
    with torch.inference_mode():
        expected = adapted(ids).logits
        with adapted.disable_adapter():
            assert not torch.equal(adapted(ids).logits, expected)
        lean_adapter(adapted)
        assert torch.equal(adapted(ids).logits, expected)


def test_a_step_with_a_lean_adapter_makes_half_of_pefts_calls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """28 tiny layers: on a card, a step takes as long as Python does to launch it."""

    def calls() -> int:
        count = 0

        def profile(frame: object, event: str, argument: object) -> None:
            nonlocal count
            count += event in ("call", "c_call")

        model = overhead._tiny_model(adapter=True)
        with torch.inference_mode():
            batch = prefill(model, [[1, 2, 3]] * 8)
            batch.step(model, [4] * 8)
            sys.setprofile(profile)
            batch.step(model, [4] * 8)
            sys.setprofile(None)
        return count

    lean = calls()
    monkeypatch.setattr("kit.backends.hf.lean_adapter", id)
    assert lean < 0.65 * calls()


def test_an_adapter_is_merged_where_rounding_loses_little(backend: HfBackend) -> None:
    ids = torch.arange(300, 340).reshape(4, 10)
    for dtype, scale, stays in (
        (torch.float32, 1e-3, False),
        (torch.bfloat16, 3.0, False),
        (torch.bfloat16, 1e-3, True),
    ):
        own = limited(backend, 4, with_adapter(tiny().to(dtype), scale))
        lean_adapter(own.model)
        with torch.inference_mode():
            expected = own.model(ids).logits
            own.merge_adapter()
            moved = (own.model(ids).logits - expected).abs().max()
        assert isinstance(own.model, peft.PeftModel) == stays == bool(own.notes)
        assert moved <= (1e-5 if dtype == torch.float32 else 0.1 * expected.abs().max())
    assert "% of the adapter" in own.notes[0]


def test_few_tokens_change_no_linear_layer_for_good() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 48)
    inputs = torch.randn(2, 4, 64)
    original = torch.nn.functional.linear
    with torch.inference_mode():
        expected = layer(inputs)
        with few_tokens(8, inputs.device):
            assert torch.nn.functional.linear is not original
            assert (layer(inputs) - expected).abs().max() < 1e-5
            assert layer(inputs).shape == expected.shape
        for tokens in (3, 65):
            with few_tokens(tokens, inputs.device):
                assert torch.nn.functional.linear is original
    with pytest.raises(ValueError, match="stop"), few_tokens(8, inputs.device):
        raise ValueError("stop")
    assert torch.nn.functional.linear is original


FILTERS = (
    {"top_p": 0.9},
    {"top_k": 5},
    {"min_p": 0.1},
    {"top_p": 0.8, "top_k": 9},
    {},
)


@pytest.mark.parametrize("filters", FILTERS)
def test_draws_follow_the_filters(filters: dict[str, float]) -> None:
    """The sets that transformers' own filters keep, and frequencies over 4,000 draws."""
    torch.manual_seed(0)
    logits = torch.randn(1, 2000) * 3
    rng = random.Random(0)
    uniforms = [rng.random() for _ in range(4000)]
    sampling = Sampling(**{"temperature": 0.8, "top_p": 1, **filters})
    settings = transformers.GenerationConfig(
        do_sample=True, **{"temperature": 0.8, "top_k": 0, "top_p": 1.0, **filters}
    )
    processors = tiny()._get_logits_processor(settings, input_ids_seq_length=1, device="cpu")
    expected = torch.softmax(processors(torch.tensor([[1]]), logits.clone()), -1)[0]
    tokens = draw(logits.expand(4000, -1), sampling, uniforms)
    assert expected[tokens].min() > 0
    for token in expected.argsort(descending=True)[:4].tolist():
        assert abs(tokens.count(token) / 4000 - expected[token]) < 0.03


def test_flat_distributions_are_drawn_from_the_whole_vocabulary() -> None:
    """More tokens than the head of likeliest ones could hold evenly."""
    sampling = Sampling(temperature=1, top_p=0.9)
    tokens = [draw(torch.zeros(1, 5000), sampling, [step / 200])[0] for step in range(200)]
    assert len(set(tokens)) == 200


def test_repetition_penalty_as_transformers_has_it() -> None:
    torch.manual_seed(1)
    logits = torch.randn(2, 50)
    ids = torch.tensor([[3, 7, 9], [1, 1, 40]])
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, ids, True)
    processor = transformers.RepetitionPenaltyLogitsProcessor(1.8)
    expected = processor(ids, logits.clone()).argmax(-1).tolist()
    sampling = Sampling(temperature=0, repetition_penalty=1.8)
    assert draw(logits, sampling, [0.5, 0.5], seen) == expected
