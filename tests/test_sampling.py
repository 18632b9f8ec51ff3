"""Which samples are kept, and what is reported about an item without one."""

from __future__ import annotations

import pytest

from kit import sampling
from kit.backends.base import Generation
from kit.core.config import ModelConfig
from kit.core.records import Problem, Sample, TraceRow
from kit.sampling import Sampler, choose, rejection
from tests.test_run import open_run, trace_row


def sample(verdict: str = "correct", text: str = "x", finish_reason: str = "stop") -> Sample:
    return Sample(text=text, verdict=verdict, finish_reason=finish_reason)


def test_only_correct_samples_are_kept_and_a_finished_one_goes_first() -> None:
    samples = (
        sample("wrong"),
        sample(text="long right", finish_reason="length"),
        sample(text="right one"),
        sample(text="ok"),
    )
    assert choose(samples, "first") == (2,) and choose(samples, "shortest") == (3,)
    assert choose(samples, "all") == (1, 2, 3) and choose(samples[:1], "all") == ()
    assert choose(samples[:2], "first") == choose(samples[:2], "shortest") == (1,)
    assert choose((sample("unparsed"), sample("timeout")), "first") == ()


def test_a_rejection_counts_every_verdict_and_what_was_cut_off() -> None:
    samples = [sample("wrong"), sample("wrong", finish_reason="length"), sample("unparsed")]
    fields = rejection(Generation("a"), "no right trace", samples)
    assert fields == {
        "rejected": "no right trace",
        "detail": "0 of 3 right: 2 wrong, 1 unparsed; 1 cut off at the token limit",
    }
    failed = rejection(Generation("a", error="too long"), "no right trace", [])
    assert failed == {"rejected": "generation failed", "detail": "too long"}
    assert rejection(Generation("a"), "x", [sample()])["detail"] == "1 of 1 right: none"


@pytest.mark.parametrize(
    ("backend", "on_card", "sizes"),
    [("hf", False, [8, 8, 4]), ("hf", True, [20]), ("http", False, [20])],
)
def test_a_card_or_a_server_gets_one_work_list_and_a_cpu_batches(
    tmp_path, monkeypatch, backend, on_card, sizes
):
    monkeypatch.setattr(sampling, "limit_bytes", lambda: (on_card, 0))
    problems = [Problem(id=f"p{i}", question=f"q{i}", answer="1") for i in range(20)]
    engine = ModelConfig(backend=backend, max_num_seqs=2)
    batches = []

    def work(batch):
        batches.append(len(batch))
        yield from map(trace_row, batch)

    with open_run(tmp_path) as run, Sampler(run, engine, run.config.align) as sampler:
        sampler.write_rows("teach", "traces.jsonl", TraceRow, problems, work)
    assert batches == sizes
