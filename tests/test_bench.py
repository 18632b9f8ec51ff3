"""The measurements: their shape, their order, and that the ratios are what they say; no speed."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import psutil
import pytest

from kit import bench
from kit.backends.gguf import ROUNDING_NATS
from kit.bench import measure
from kit.bench.judge import SEARCHES
from kit.core.errors import KitError
from kit.core.progress import Progress
from tests.test_train import tiny  # noqa: F401  (a fixture)

OPTIONS = {
    "traces": None,
    "limit": None,
    "backend": "hf",
    "model": "smollm2-135m",
    "verdicts": None,
    "repeats": 1,
    "new_tokens": 2,
    "neighbour": False,
}
ROW = {"verdicts", "name", "seconds", "ratio", "token_ratio", "price", "traces"}
TRACE = (
    "Tom starts with 3 apples. He buys 4 more. So he has 3 + 4 = 7 apples. "
    "Let me check: 7 - 4 = 3. The answer is 7."
)


def run(**options):
    return bench.run(SimpleNamespace(**{**OPTIONS, **options}), Progress(quiet=True))


def test_ways_take_turns_and_the_order_turns_around_each_round():
    calls = []
    ways = {name: lambda number, name=name: calls.append(name) or number for name in "abc"}
    timings = measure(ways, 3, Progress(quiet=True), 8)
    assert "".join(calls) == "abccbaabc"
    assert timings["a"].results == [8, 8, 8]
    assert timings["a"].seconds == sorted(timings["a"].all_seconds)[1]


def test_judging_without_traces_is_bad_usage():
    with pytest.raises(KitError, match="--traces") as caught:
        run(subject="judge")
    assert caught.value.code == 2


@pytest.fixture(
    scope="module",
    params=["tiny", *(pytest.param(one, marks=pytest.mark.slow) for one in ("gguf", "hf"))],
)
def judged(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "traces.jsonl"
    row = {"id": "t", "question": "How many apples?", "answer": "7", "long_cot": TRACE}
    path.write_text(json.dumps(row) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        # The reference loops generate a few tokens in place of 256 and 16.
        patch.setattr("kit.bench.judge.REFERENCES", {"reference-256": 3, "reference-16": 2})
        options = {"subject": "judge", "traces": path, "backend": request.param}
        if request.param == "tiny":
            options.update(backend="hf", model=request.getfixturevalue("tiny"))
        own = run(**options)
    steered = run(**options, verdicts=["early", "middle", "late"])
    # llama.cpp sums the tails in another order, and rounds to 16 bits
    bound = max(ROUNDING_NATS.values()) if request.param == "gguf" else 1e-3
    return own, steered, bound


def test_judging_has_a_row_per_way_with_ratios_to_the_prefill(judged):
    judged, steered, _ = judged
    names = ["prefill", *SEARCHES]
    assert [row["name"] for row in judged["rows"]] == [*names, "reference-256", "reference-16"]
    # the minutes of the reference loops are not spent again where only prices are asked
    assert [row["name"] for row in steered["rows"]] == 3 * names
    assert [row["verdicts"] for row in steered["rows"][:: len(names)]] == [
        "early",
        "middle",
        "late",
    ]
    # the first one's margins are those to compare with
    assert SEARCHES[0] == "uncached" and {"binary", "gallop", "scan"} < {*SEARCHES}
    [trace] = judged["traces"]
    for row, own in zip(judged["rows"], trace["rows"], strict=True):
        assert row.keys() == ROW
        assert row["price"] == pytest.approx(row["ratio"] / row["token_ratio"])
        assert row["ratio"] == pytest.approx(own["seconds"] / trace["rows"][0]["seconds"])
        assert row["traces"] == 1
    assert judged["subject"] == "judge" and judged["skipped"] == 0


def test_forced_verdicts_keep_what_they_say_and_cached_margins_equal_uncached(judged):
    _, steered, bound = judged
    assert [trace["kept"] for trace in steered["traces"]] == [1, 3, 5]
    assert {trace["sentences"] for trace in steered["traces"]} == {5}
    differences = [trace["margin_difference"] for trace in steered["traces"]]
    assert steered["max_margin_difference"] == max(differences) < bound


@pytest.mark.parametrize("longest", [60, pytest.param(400, marks=pytest.mark.slow)])
def test_generation_counts_the_same_tokens_in_every_way(longest, monkeypatch):
    monkeypatch.setattr("kit.bench.generate.LONGEST", longest)  # tokens of the longest prompt
    result = run(subject="generate", limit=2)
    assert [row["name"] for row in result["rows"]] == [
        "gguf-sequential",
        "gguf-parallel",
        "hf-sequential",
        "hf-batched",
    ]
    for row in result["rows"]:
        assert 0 < row["new_tokens"] <= 4 and row["tokens_per_second"] > 0
    speed = {row["name"]: row["tokens_per_second"] for row in result["rows"]}
    assert result["hf_ratio"] == speed["hf-batched"] / speed["hf-sequential"]
    assert result["gguf_ratio"] == speed["gguf-parallel"] / speed["gguf-sequential"]


def test_overheads_are_measured_and_one_work_list_drains_once(monkeypatch):
    monkeypatch.setattr("kit.bench.overhead.CALLS", 2)
    result = run(subject="overhead")
    names = [row["name"] for row in result["rows"]]
    assert names == ["step", "step-adapter", "draw"]
    assert all(row["seconds"] > 0 for row in result["rows"])
    assert result["drained_ratio"][1000] < 0.05 < 0.25 < result["drained_ratio"][128]


def test_a_neighbour_computes_while_the_rows_are_measured_again(monkeypatch):
    shares = []

    def subject(options, progress):
        before = psutil.cpu_percent(0.5, percpu=True)
        shares.append(max(before))
        return {"rows": [{"name": "way", "seconds": len(shares)}]}

    monkeypatch.setattr("kit.bench.overhead.bench", subject)
    [row] = run(subject="overhead", neighbour=True)["rows"]
    assert row == {"name": "way", "seconds": 1, "busy_seconds": 2, "busy_speed_ratio": 0.5}
    assert shares[1] > 50
    time.sleep(0.2)
    children = psutil.Process().children()
    assert not [child for child in children if "while True" in " ".join(child.cmdline())]


@pytest.mark.slow
def test_a_training_step_is_timed():
    result = run(subject="train")
    [row] = result["rows"]
    assert row["name"] == "step" and row["seconds"] > 0 and row["tokens"] == 512
