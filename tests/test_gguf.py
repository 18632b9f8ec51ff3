"""The llama.cpp backend on the packaged model: cached equals fresh, parallel equals sequential up to near-ties."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest

from kit import prompts
from kit.backends import open_backend
from kit.backends.base import Completion, Generation, Request, ScoreRequest, looping
from kit.backends.gguf import GgufBackend
from kit.backends.gguf_generate import draw
from kit.core.config import ModelConfig, Prompts, Sampling
from kit.core.errors import KitError
from kit.judging.sentences import ends
from kit.models import gguf_file

NEAR_TIE = (
    0.05  # nats between the two best tokens; batch shape moves 16-bit logits by some thousandths
)
ENGINE = ModelConfig(backend="gguf", context_tokens=2048, max_num_seqs=6, n_threads=1)


@pytest.fixture(scope="module")
def backend() -> Iterator[GgufBackend]:
    opened = open_backend(ENGINE)
    yield opened
    opened.close()


def asked(backend: GgufBackend, count: int, sampling: Sampling, n: int = 1) -> list[Request]:
    """Prompts of mixed length that share the template and the instruction."""
    texts = [f"Add {i} and {i + 3}. " * (1 + 3 * (i % 4)) for i in range(count)]
    ids = [prompts.render(backend.tokenizer, prompts.solve_text(Prompts(), text)) for text in texts]
    return [Request(f"r{i}", prompt, sampling, n=n, seed=3) for i, prompt in enumerate(ids)]


def read(backend: GgufBackend, probes: list[ScoreRequest], fresh: bool = False) -> list:
    with closing(backend.session(fresh)) as session:
        return session.score(probes)


def by_id(results: Iterator[Generation]) -> dict[str, Generation]:
    return {result.id: result for result in results}


def margins(readings: list) -> np.ndarray:
    return np.array([reads[0][0] - reads[0][1] for reads in readings])


def judged(backend: GgufBackend, shared: Path, count: int, every: int) -> list[list[ScoreRequest]]:
    """The judging probes of the shortest real traces, at every so many sentences and at the end."""
    rows = [
        json.loads(line)
        for line in (shared / "long_cot_aime24.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    encode = backend.tokenizer.encode
    labels = encode("[ENOUGH]", False), encode("[NOT_ENOUGH]", False)
    same = next(i for i, (a, b) in enumerate(zip(*labels, strict=False)) if a != b)
    found = []
    for row in sorted(rows, key=lambda row: len(row["long_cot"]))[:count]:
        cuts = ends(row["long_cot"])
        probes = []
        for cut in sorted({*cuts[every - 1 :: every], cuts[-1]}):
            text = prompts.fill(
                prompts.words()["judge"], question=row["question"], prefix=row["long_cot"][:cut]
            )
            ids = (*prompts.render(backend.tokenizer, text), *labels[0][:same])
            probes.append(ScoreRequest(ids, ((len(ids) - 1, (labels[0][same], labels[1][same])),)))
        found.append(probes)
    return found


def test_cached_verdicts_equal_fresh_ones(backend: GgufBackend, shared: Path) -> None:
    worst = 0.0
    for probes in judged(backend, shared, count=1, every=8):
        fresh = margins(read(backend, probes, fresh=True))
        with closing(backend.session()) as scan:
            worst = max(worst, np.abs(margins(scan.score(probes)) - fresh).max())
        assert scan.cost.prefill_tokens < len(probes[-1].ids) + 16 * len(probes)
        binary, order = backend.session(), [len(probes) // 2, 0, len(probes) - 1, 1]
        worst = max(worst, *(abs(margins(binary.score([probes[i]]))[0] - fresh[i]) for i in order))
        assert binary.cost.prefill_tokens < len(probes[-1].ids) + 16 * len(order)
    again = binary.score(
        [probes[-1]]
    )  # all of it is held, and two tokens are evaluated all the same
    worst = max(worst, abs(margins(again)[0] - fresh[-1]))
    binary.close()
    print(f"largest difference of cached and fresh margins: {worst:.2g}")
    assert worst < 1e-3


def test_nothing_past_the_furthest_boundary_is_evaluated(
    backend: GgufBackend, shared: Path
) -> None:
    [probes] = judged(backend, shared, count=1, every=6)
    session = backend.session()
    session.score([probes[2]])
    session.score([probes[0]])
    assert session.cost.prefill_tokens < len(probes[2].ids) + 16
    assert session.cost.prefill_tokens + session.cost.cached_tokens == len(probes[2].ids) + len(
        probes[0].ids
    )
    session.close()


def test_reads_along_one_probe(backend: GgufBackend) -> None:
    ids = tuple(backend.tokenizer.encode("One plus one is two, and two plus two is four."))
    reads = tuple((p, (ids[p + 1],)) for p in range(4, len(ids) - 1))
    together = read(backend, [ScoreRequest(ids, reads)])[0]
    session = backend.session()
    apart = [
        session.score([ScoreRequest(ids[: p + 1], ((p, wanted),))])[0][0] for p, wanted in reads
    ]
    assert np.abs(np.array(together) - np.array(apart)).max() < 1e-3
    whole = session.score(
        [ScoreRequest(ids, ((len(ids) - 1, tuple(range(backend.tokenizer.size))),))]
    )[0][0]
    assert np.exp(whole).sum() == pytest.approx(1, abs=1e-6)
    session.close()


def test_labels_agree_with_transformers(backend: GgufBackend, shared: Path) -> None:
    """Of the same weights, dequantized: labels, by a threshold amid the margins, differ at near-ties alone."""
    hf = open_backend(ModelConfig(backend="hf", model=ENGINE.model))
    [probes] = judged(backend, shared, count=1, every=2)
    ours, theirs = margins(read(backend, probes)), margins(read(hf, probes))
    hf.close()
    threshold, worst = np.median(theirs), np.abs(ours - theirs).max()
    print(f"llama.cpp and transformers: margins differ by up to {worst:.2g}")
    assert worst < 0.05
    same = (ours >= threshold) == (theirs >= threshold)
    assert same[np.abs(theirs - threshold) > worst].all() and 0 < (theirs >= threshold).mean() < 1


@pytest.mark.slow
def test_more_traces_cached_equal_fresh(backend: GgufBackend, shared: Path) -> None:
    for probes in judged(backend, shared, count=4, every=3):
        fresh = margins(read(backend, probes, fresh=True))
        assert np.abs(margins(read(backend, probes)) - fresh).max() < 1e-3


@pytest.mark.slow
def test_flash_attention_keeps_labels(shared: Path) -> None:
    flash = open_backend(ENGINE.model_copy(update={"flash_attention": True}))
    for probes in judged(flash, shared, count=3, every=4):
        fresh = margins(read(flash, probes, fresh=True))
        cached = margins(read(flash, probes))
        print(
            f"with flash attention: {np.abs(cached - fresh).max():.2g} between cached and fresh margins"
        )
        assert ((cached >= 0) == (fresh >= 0)).all()
    flash.close()


def test_a_cache_that_refuses_to_be_cut_is_recomputed(
    backend: GgufBackend, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probes = judged(backend, shared, count=1, every=8)[0][:2]
    expected = margins(read(backend, probes))
    remove = llama_cpp.llama_memory_seq_rm

    def refuse_to_cut(memory: Any, sequence: int, start: int, end: int) -> bool:
        return start <= 0 and remove(memory, sequence, start, end)

    monkeypatch.setattr(llama_cpp, "llama_memory_seq_rm", refuse_to_cut)
    session = backend.session()
    assert np.abs(margins(session.score(probes)) - expected).max() < 1e-3
    assert session.cost.cached_tokens == 0
    session.close()
    assert any("cannot be cut" in note for note in backend.notes)


def test_parallel_equals_sequential_up_to_near_ties(backend: GgufBackend) -> None:
    requests = asked(backend, 8, Sampling(temperature=0, max_new_tokens=24))
    many = by_id(backend.generate(requests))
    backend.engine = ENGINE.model_copy(update={"max_num_seqs": 1})
    one = by_id(backend.generate(requests))
    backend.engine = ENGINE
    ties = 0
    for request in requests:
        first, second = many[request.id].completions[0].ids, one[request.id].completions[0].ids
        if first == second:
            continue
        at = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
        assert at is not None, "one is the other's beginning: the end token came early"
        ids = (*request.prompt, *first[:at])
        a, b = read(
            backend, [ScoreRequest(ids, ((len(ids) - 1, (first[at], second[at])),))], fresh=True
        )[0][0]
        assert abs(a - b) < NEAR_TIE
        ties += 1
    print(f"{ties} of {len(requests)} greedy outputs part, each at a gap under {NEAR_TIE} nats")
    assert ties <= 2


def test_samples_share_their_prefill_and_have_their_own_seeds(backend: GgufBackend) -> None:
    hot = Sampling(temperature=1.0, max_new_tokens=12)
    requests = asked(backend, 3, hot, n=4)
    results = by_id(backend.generate(requests))
    shortest = min(len(request.prompt) for request in requests)
    for request in requests:
        result = results[request.id]
        assert result.prompt_tokens == len(request.prompt) >= result.prefill_tokens > 0
        assert len({sample.ids for sample in result.completions}) > 1
    assert results["r0"].prefill_tokens == len(requests[0].prompt)
    assert (
        results["r1"].prefill_tokens < len(requests[1].prompt) - 8 < shortest + 100
    )  # the shared beginning
    alone = by_id(backend.generate([replace(requests[1], n=2)]))["r1"]
    pairs = zip(alone.completions, results["r1"].completions, strict=False)
    assert (
        sum(a.ids == b.ids for a, b in pairs) >= 1
    )  # neighbours move a draw only where it falls on an edge


def test_finish_reasons(backend: GgufBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "context_tokens", 128)
    tokenizer = backend.tokenizer
    greedy = Sampling(temperature=0, max_new_tokens=40)
    ask = prompts.render(tokenizer, "Reply with the one word yes.")
    count = tuple(tokenizer.encode("1, 2, 3, 4, 5, 6,"))
    loop = tuple(
        tokenizer.encode("la la la la la la la la la la la la la la la la la la la la la la")
    )
    requests = [
        Request("end", ask, greedy.model_copy(update={"max_new_tokens": 60})),
        Request("length", count, greedy.model_copy(update={"max_new_tokens": 3})),
        Request("stop", count, greedy.model_copy(update={"stop": ("1, 2", " 9")})),
        Request(
            "loop", loop, greedy.model_copy(update={"stop_loops": True, "max_new_tokens": 200})
        ),
        Request("full", (5,) * 125, greedy),
        Request("long", (5,) * 128, greedy),
        Request("empty", (), greedy),
    ]
    results = by_id(backend.generate(requests))
    done: dict[str, Completion] = {
        key: r.completions[0] for key, r in results.items() if r.completions
    }
    assert {key: sample.finish_reason for key, sample in done.items()} == {
        "end": "stop",
        "length": "length",
        "stop": "stop",
        "loop": "loop",
        "full": "length",
    }
    assert not set(done["end"].ids) & tokenizer.eos_ids and done["end"].text == tokenizer.decode(
        done["end"].ids
    )
    assert len(done["length"].ids) == 3 and len(done["full"].ids) == 3
    assert done["stop"].text == " 7, 8,"
    assert looping(done["loop"].ids)
    assert "128 tokens" in results["long"].error and "0 tokens" in results["empty"].error


def test_tokenizer(backend: GgufBackend) -> None:
    tokenizer = backend.tokenizer
    text = "naïve 😀 x² <|im_end|> tail "
    plain, special = tokenizer.encode(text, special=False), tokenizer.encode(text)
    assert tokenizer.decode(plain) == tokenizer.decode(special) == text
    assert not set(plain) & tokenizer.eos_ids and set(special) & tokenizer.eos_ids
    assert len(tokenizer.encode("<|im_end|>")) == 1
    assert {"<|im_start|>", "<|im_end|>", "<|endoftext|>"} <= set(tokenizer.special)
    assert tokenizer.eos == "<|im_end|>" and tokenizer.template and "im_start" in tokenizer.template
    smile = tokenizer.encode("😀")
    assert len(smile) > 1 and "\ufffd" in tokenizer.decode(
        smile[:1]
    )  # bytes that are not yet a character
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""


def test_a_penalty_reaches_the_prompt_and_the_sample(backend: GgufBackend) -> None:
    ids = tuple(backend.tokenizer.encode("ha ha ha ha ha ha ha ha ha ha ha ha ha ha"))
    plain = Sampling(temperature=0, max_new_tokens=24)
    penal = plain.model_copy(update={"repetition_penalty": 1.5})
    found = by_id(backend.generate([Request("plain", ids, plain), Request("penal", ids, penal)]))
    kinds = {name: len(set(result.completions[0].ids)) for name, result in found.items()}
    assert kinds["penal"] > 2 * kinds["plain"]


def test_draws_follow_the_filtered_distribution() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    seen = np.array([True, False, False, False])

    def ratios(**settings: float) -> list[float]:
        sampling = Sampling(**({"temperature": 1.0, "top_p": 1.0} | settings))
        random = np.random.default_rng(0)
        tokens = [draw(logits, sampling, random, seen) for _ in range(1500)]
        return (np.bincount(tokens, minlength=4) / 1500).tolist()

    assert ratios() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.05)
    assert ratios(top_k=2) == pytest.approx([0.625, 0.375, 0, 0], abs=0.05)
    assert ratios(top_p=0.75) == pytest.approx([0.625, 0.375, 0, 0], abs=0.05)
    assert ratios(min_p=0.25) == pytest.approx([0.526, 0.316, 0.158, 0], abs=0.05)
    assert ratios(temperature=0.5)[0] == pytest.approx(0.25 / 0.365, abs=0.05)
    assert ratios(temperature=0) == [1, 0, 0, 0]
    assert ratios(temperature=0, repetition_penalty=2.0) == [0, 1, 0, 0]
    assert logits[0] == np.float32(np.log(np.float32(0.5)))  # left as they were


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.delitem(sys.modules, "kit.backends.gguf")
    with pytest.raises(KitError, match=r"pip install llama-cpp-python==0\.3\.36"):
        open_backend(ENGINE)


def test_files_that_are_no_models(tmp_path: Path) -> None:
    whole = gguf_file("smollm2-135m").read_bytes()
    for name, data in (
        ("cut.gguf", whole[: len(whole) // 2]),
        ("head.gguf", whole[:64]),
        ("zeros.gguf", b"GGUF" * 99),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(KitError, match=f"cannot load .*{name}"):
            open_backend(ModelConfig(backend="gguf", model=str(tmp_path / name)))


def test_a_copy_that_cannot_be_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PALIGN_CACHE", str(tmp_path / "file"))
    with pytest.raises(KitError, match=r"cannot be cached.*set PALIGN_CACHE"):
        open_backend(ENGINE)
