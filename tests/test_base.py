"""The helpers that backends share: when a sample ends, what repeats, and whose seed is whose."""

from __future__ import annotations

import random

import numpy as np
import pytest

from kit.backends.base import (
    ActiveRequest,
    Completion,
    Request,
    ScoreRequest,
    check_stop,
    common_prefix_len,
    looping,
    sample_seed,
    slug,
    too_long,
)
from kit.backends.scripted import ByteTokenizer
from kit.core.config import Sampling

TOKENIZER = ByteTokenizer()
END = 256


def stopped(text: str, ended: bool = False, limit: int = 100, **sampling: object) -> Completion:
    """What becomes of a sample that has drawn `text`, and perhaps the end token."""
    ids = TOKENIZER.encode(text) + [END] * ended
    return check_stop(ids, limit, Sampling(**sampling), TOKENIZER)


def test_an_end_token_stops_a_sample_and_is_not_in_its_ids() -> None:
    completion = stopped("done", ended=True)
    assert completion == Completion("done", tuple(b"done"), "stop")
    assert stopped("done") is None


def test_the_end_token_counts_before_the_limit() -> None:
    assert stopped("1234", ended=True, limit=5).finish_reason == "stop"
    assert stopped("12345", limit=5).finish_reason == "length"


def test_text_ends_before_the_earliest_stop_string() -> None:
    assert stopped("one two three", stop=("three", "two")).text == "one "
    assert stopped("a\n\n", stop=("\n\n",)) == Completion("a", tuple(b"a\n\n"), "stop")
    assert stopped("überm", stop=("über",)).text == ""  # four characters, five bytes


def test_a_loop_ends_a_sample_only_where_that_is_asked_for() -> None:
    text = "abcd" * 8
    assert stopped(text, stop_loops=True).finish_reason == "loop"
    assert stopped(text) is None


@pytest.mark.parametrize("period", [1, 2, 7, 64])
def test_looping_finds_what_repeats_four_times_and_over_24_tokens(period: int) -> None:
    pattern = random.Random(period).sample(range(1000), period)
    repeats = max(4, -(-24 // period))
    assert looping([5000, *pattern * repeats])
    assert not looping([5000, *(pattern * repeats)[1:]])
    assert not looping([*pattern * repeats, 5000])


def test_a_common_prefix_ends_at_the_first_difference() -> None:
    draw = random.Random(0)
    for _ in range(200):
        size = draw.randrange(20)
        shared = [draw.randrange(5) for _ in range(size)]
        a = [*shared, 7, *shared]
        b = [*shared, 8, 7]
        assert common_prefix_len(a, b) == common_prefix_len(np.array(b), np.array(a)) == size
        assert common_prefix_len(shared, a) == common_prefix_len(tuple(a), shared) == size


def test_every_sample_has_a_seed_of_its_own() -> None:
    seeds = {sample_seed(s, r, k) for s in range(10) for r in ("a", "b", "a\0") for k in range(10)}
    assert len(seeds) == 300 and all(0 <= seed < 2**31 for seed in seeds)
    assert sample_seed(3, "r1", 0) == 984879585  # the same on every machine and in every version


def test_a_result_is_made_once_with_its_samples_in_order() -> None:
    active = ActiveRequest(Request("r", (1, 2, 3), Sampling(), n=2), limit_tokens=5)
    first, second = (Completion(text, (), "stop") for text in ("first", "second"))
    active.done[1] = second
    assert active.result() == []
    active.done[0] = first
    [generation] = active.result()
    assert generation.completions == (first, second) and generation.prompt_tokens == 3


def test_prompts_without_room_for_an_answer_are_errors() -> None:
    for size, fits in ((0, False), (1, True), (63, True), (64, False), (65, False)):
        generation = too_long(Request("r", (5,) * size, Sampling()), 64)
        assert (generation is None) == fits
        if generation:
            assert f"{size} tokens, but the context is 64" in generation.error


def test_each_read_is_a_prompt_of_its_own() -> None:
    request = ScoreRequest((4, 5, 6), ((0, (1,)), (2, (2, 3))))
    assert request.prompts() == [((4,), (1,)), ((4, 5, 6), (2, 3))]


def test_a_models_name_becomes_a_file_name() -> None:
    assert slug("Qwen/Qwen2.5-7B Instruct.gguf") == "Qwen-Qwen2.5-7B-Instruct"
