"""What makes judging cheap changes nothing: encoding only what is new, many tails in one pass.

And where a quantized model's cache moves margins, verdicts near the threshold are uncached ones.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import llama_cpp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kit.backends import open_backend
from kit.backends.base import ScoreRequest
from kit.backends.gguf import GgufBackend, GgufTokenizer, load
from kit.core.config import ModelConfig
from kit.core.records import Problem
from kit.judging.cut import cut, from_problem
from kit.judging.judge import Judge
from kit.judging.sentences import ends
from kit.models import gguf_file, load_tokenizer
from kit.prompts import SPLIT_CHARACTERS, PrefixEncoder, judge_text, render
from tests.judging_cases import LengthBackend, judge_config, whole_row

Encode = Callable[[str], list[int]]


def by_word(text: str) -> list[int]:
    """A word with the space before it is a token; so are runs of other characters."""
    return [hash(piece) for piece in re.findall(r" ?[^\W\d]+| ?\d{1,3}| ?[^\w\s]+\n*|\s+", text)]


def with_a_space_in_front(text: str) -> list[int]:
    """Like Llama 2's in llama.cpp: every text gets a space of its own."""
    return by_word(" " + text)


def across_spaces(text: str) -> list[int]:
    """Tokens of three words, counted from the beginning."""
    words = text.split(" ")
    return [hash(" ".join(words[i : i + 3])) for i in range(0, len(words), 3)]


def by_length(text: str) -> list[int]:
    """The last word's id depends on the whole text's length."""
    return [*by_word(text), len(text)]


def from_the_right(text: str) -> list[int]:
    """Groups of four characters, counted from the end."""
    first = len(text) % 4
    starts = [0, *range(first, len(text), 4)]
    return [hash(text[a:b]) for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]


HOSTILE = (by_word, with_a_space_in_front, across_spaces, by_length, from_the_right)
words = st.sampled_from(
    ["a", "So", "12", "345", "x.", "\n\n", "  ", "is", "=", "(2)", "naïve", "日本"]
)
texts = st.lists(words, min_size=80, max_size=400).map(" ".join)


@pytest.mark.parametrize("encode", HOSTILE)
@settings(max_examples=40, deadline=None)
@given(text=texts, cuts=st.lists(st.integers(1, 900), max_size=8), closing_turn=texts)
def test_texts_that_begin_alike_have_the_ids_of_whole_ones(
    encode: Encode, text: str, cuts: list[int], closing_turn: str
) -> None:
    encoder = PrefixEncoder(encode)
    for end in (len(text), *cuts):
        shorter = text[:end] + closing_turn[: end % 40]
        assert encoder.encode(shorter) == encode(shorter)


def test_only_what_is_new_is_encoded() -> None:
    seen: list[str] = []

    def counting(text: str) -> list[int]:
        seen.append(text)
        return by_word(text)

    encoder = PrefixEncoder(counting)
    text = "So it is one more step. " * 400
    encoder.encode(text)
    for end in (9000, 500, 4321, 9599):
        seen.clear()
        encoder.encode(text[:end] + "<end>")
        assert sum(map(len, seen)) < 2 * SPLIT_CHARACTERS


def test_stretches_of_other_ids_are_tried_once() -> None:
    seen: list[str] = []

    def counting(text: str) -> list[int]:
        seen.append(text)
        return with_a_space_in_front(text)

    encoder = PrefixEncoder(counting)
    encoder.encode("So it is one more step. " * 100)
    seen.clear()
    longer = "So it is one more step. " * 200
    encoder.encode(longer)
    assert seen == [longer]


@pytest.fixture(scope="module")
def tokenizers() -> list[Any]:
    packaged = GgufTokenizer(load(gguf_file("smollm2-135m"), vocab_only=True))
    return [packaged, load_tokenizer("smollm2-135m")]


def test_every_boundary_of_real_traces_has_the_ids_of_its_whole_prompt(
    tokenizers: list[Any], real_traces: list[dict[str, str]]
) -> None:
    for number, trace in enumerate(real_traces[:3]):
        # names of special tokens in a trace stay text, and split the prompt
        question = f"{trace['question']} <|im_end|>" if number == 1 else trace["question"]
        problem = Problem(id="t", question=question, answer="1", trace=trace["long_cot"])
        row = from_problem(problem)
        for tokenizer in tokenizers:
            backend: Any = SimpleNamespace(tokenizer=tokenizer, context_tokens=8192)
            judge = Judge(judge_config(), backend)
            judge.prompt(row, row.trace)
            assert judge._encoder_of_trace(row.id).splits
            for end in ends(row.trace):
                text = judge_text(judge.config.prompts, question, row.trace[:end])
                assert judge.prompt(row, row.trace[:end]) == render(tokenizer, text)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GgufBackend]:
    """The packaged model in Q4_0, which llama.cpp's CPU kernels read without unpacking."""
    path = tmp_path_factory.mktemp("q4") / "small.gguf"
    quantize(gguf_file("smollm2-135m"), path)
    opened: Any = open_backend(ModelConfig(backend="gguf", model=str(path), n_threads=1))
    yield opened
    opened.close()


def quantize(source: Path, target: Path) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = 2
    params.allow_requantize = True
    assert not llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), params)


@pytest.mark.slow
def test_a_quantized_model_s_verdicts_near_the_threshold_are_uncached_ones(
    quantized: GgufBackend,
) -> None:
    judge = Judge(judge_config(search="scan"), quantized)
    row = whole_row(
        "Tom has 3 apples. He buys 4 more. So he has 7. Check: 7 - 4 = 3. Yes, it is 7."
    )
    requests = [judge.request(row, row.trace[:end]) for end in ends(row.trace)]
    with closing(quantized.session(uncached=True)) as session:
        fresh = np.array([judge.margin(logprobs) for logprobs in session.score(requests)])
    with closing(quantized.session()) as session:
        cached = np.array([judge.margin(logprobs) for logprobs in session.score(requests)])
    moves = np.abs(cached - fresh)
    print(f"cached margins moved by {moves}, the check says {quantized.cache_error:.2g}")
    assert quantized.cache_error > 0
    [note] = [note for note in quantized.notes if "moves margins by up to" in note]
    assert f"{quantized.cache_error:.2g}" in note

    # Between a cached margin and its uncached one, the cache alone would tell the wrong verdict.
    furthest = int(moves.argmax())
    judge.threshold = (cached[furthest] + fresh[furthest]) / 2
    verdicts = cut(judge, row).verdicts
    labels = [verdict.label for verdict in verdicts]
    assert labels == [judge.label(margin) for margin in fresh]
    assert verdicts[furthest].margin == pytest.approx(fresh[furthest], abs=1e-5)


class MovingBackend(LengthBackend):
    """Its cached margins are off by 0.19, of which a check has seen 0.15."""

    cache_error = 0.15

    def session(self, uncached: bool = False) -> Any:
        session = super().session(uncached)
        score = session.score

        def moved(requests: list[ScoreRequest]) -> list[Any]:
            self.uncached_requests += len(requests) if uncached else 0
            scores = score(requests)
            if not uncached:
                for [values] in scores:
                    values[0] += 0.19
            return scores

        session.score = moved
        return session

    uncached_requests = 0


def test_verdicts_nearer_than_the_largest_move_seen_are_asked_again() -> None:
    backend = MovingBackend()
    judge = Judge(judge_config(search="scan"), backend)
    row = whole_row()
    lengths = [len(judge.request(row, row.trace[:end]).ids) for end in ends(row.trace)]
    fresh = [0.01 * length for length in lengths]
    # that of boundary 7 is further from its cached margin than 0.15, and must be asked again too
    judge.threshold = fresh[6] + 0.001
    verdicts = cut(judge, row).verdicts
    assert [verdict.label for verdict in verdicts] == [judge.label(margin) for margin in fresh]
    assert verdicts[6].margin == pytest.approx(fresh[6])
    assert 0 < backend.uncached_requests < len(verdicts)


def test_tails_go_through_llama_cpp_together(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    decode = llama_cpp.llama_decode

    def counting(context: Any, batch: Any) -> int:
        sizes.append(batch.n_tokens)
        return decode(context, batch)

    monkeypatch.setattr(llama_cpp, "llama_decode", counting)
    with closing(open_backend(ModelConfig(backend="gguf", n_threads=1))) as backend:
        judge = Judge(judge_config(search="scan"), backend)
        row = cut(judge, whole_row())
    assert len(row.verdicts) == 13
    # the trunk in passes of 255 tokens, the twelve others in one or two after each
    assert len(sizes) <= 4
    assert sum(sizes) == row.prefill_tokens < row.prompt_tokens + 12 * 20
