"""Which samples are kept, and what is reported about an item without one."""

from __future__ import annotations

from kit.backends.base import Generation
from kit.core.records import Sample
from kit.sampling import choose, rejection


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
