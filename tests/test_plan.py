"""kit.training.plan, shape, hours: counts equal a real model's, the longest row fits, refusals name
the key, estimates agree with the audit's arithmetic and with the bundled configs.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kit.core.config import load, resolve
from kit.core.errors import KitError
from kit.core.progress import Progress
from kit.core.run import FORMAT, Run
from kit.shape import GIB, RESERVE_BYTES, SHAPES, card_limit, shape_of
from kit.training import hours
from kit.training import plan as planning
from kit.training.plan import (
    LEAST_LOGITS,
    check_fit,
    check_longest,
    longest,
    plan,
    training_bytes,
)
from tests.conftest import ROOT
from tests.test_train import settings, tiny  # noqa: F401  (a fixture)

# config: the card that it is for, in GB, and the named card of its first lines
CARD_CONFIGS = {
    "qwen2.5-7b-24gb": (24, "4090"),
    "qwen2.5-7b-16gb": (16, "4060 Ti 16 GB"),
    "qwen2.5-7b-12gb": (12, "3060 12 GB"),
    "qwen2.5-1.5b-8gb": (8, "3060 12 GB"),
}


def test_counts_equal_the_real_models(tiny: str, tmp_path: Path) -> None:  # noqa: F811
    from kit.training.trainer import make_model

    model = make_model(settings(tmp_path, tiny, rank=4))
    shape = shape_of(tiny)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert 4 * shape.adapter == trainable and shape.linear + shape.other == frozen
    parts = training_bytes(settings(tmp_path, tiny, rank=4), 64, cuda=False)
    assert parts.weights == 4 * frozen and parts.adapter == parts.optimizer == 8 * trainable


def test_a_row_of_the_table_is_what_the_models_config_says(tmp_path: Path) -> None:
    from transformers import Qwen2Config, Qwen3Config

    # as the models' own config.json has them
    kinds = {
        "Qwen/Qwen2.5-7B-Instruct": Qwen2Config(
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            vocab_size=152064,
            max_position_embeddings=32768,
            tie_word_embeddings=False,
        ),
        "Qwen/Qwen3-8B": Qwen3Config(
            hidden_size=4096,
            intermediate_size=12288,
            num_hidden_layers=36,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            vocab_size=151936,
            max_position_embeddings=40960,
            tie_word_embeddings=False,
        ),
    }
    for name, kind in kinds.items():
        folder = tmp_path / name.split("/")[1]
        kind.save_pretrained(folder)
        assert shape_of(str(folder)) == SHAPES[name]


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_weights_are_counted_whatever_type_their_file_has(
    dtype: str,
    tmp_path: Path,
    tiny: str,  # noqa: F811
) -> None:
    config = json.loads(Path(tiny, "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": dtype}))
    assert shape_of(str(tmp_path)) == shape_of(tiny)


def test_a_model_that_cannot_be_built_is_refused_in_one_line(tmp_path: Path) -> None:
    from transformers import Qwen2VLConfig

    Qwen2VLConfig().save_pretrained(tmp_path)
    with pytest.raises(KitError, match="cannot be used: Unrecognized configuration") as refused:
        shape_of(str(tmp_path))
    # the error that it comes from names every class that transformers knows
    assert len(str(refused.value)) < 700


@pytest.mark.parametrize(
    ("tokens", "gib"), [(7168, 9.8), (12288, 12.6), (16384, 14.9), (32768, 24.1)]
)
def test_memory_on_a_card_is_within_a_twentieth_of_the_audits(tokens: int, gib: float) -> None:
    """Qwen2.5-7B in NF4 with checkpoints, added up by hand from the libraries' sources."""
    config = resolve({"student": {"model": "Qwen/Qwen2.5-7B-Instruct"}}, "test")
    estimated = sum(training_bytes(config, tokens, cuda=True)) / GIB
    print(f"{tokens} tokens: {estimated:.2f} GiB, by hand {gib}")
    assert estimated == pytest.approx(gib, rel=0.05)


def test_a_cards_row_length_is_known_without_a_card() -> None:
    result = plan(load(ROOT / "configs" / "qwen2.5-7b-24gb.yaml"))
    lengths = result["longest_tokens"]
    assert list(lengths) == ["8 GB", "12 GB", "16 GB", "24 GB"]
    assert lengths["8 GB"] < lengths["12 GB"] < lengths["16 GB"] < lengths["24 GB"]
    # 32,768 tokens need 24.1 GiB
    assert lengths["24 GB"] < 32768


@pytest.mark.parametrize("name", CARD_CONFIGS)
def test_a_cards_config_agrees_with_its_plan(name: str) -> None:
    text = (ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8")
    config = load(ROOT / "configs" / f"{name}.yaml")
    size, card = CARD_CONFIGS[name]
    row_tokens = config.train.max_seq_tokens
    # a tenth of the card stays for the desktop
    assert row_tokens <= longest(config, 0.9 * card_limit(size))
    assert row_tokens > longest(config, 0.9 * card_limit(size)) / 2
    for section in (config.student, config.eval):
        assert section.max_num_seqs >= 32
    for sampling in (config.align.sampling, config.eval.sampling):
        assert sampling.stop_loops
    # what is written must also be trained on
    assert config.align.sampling.max_new_tokens < row_tokens
    # smaller slices of the logits would reread the head more often, and save nothing
    assert config.train.logits_bytes > LEAST_LOGITS
    in_small_slices = planning._with(config, logits_bytes=LEAST_LOGITS)
    estimated = sum(training_bytes(config, row_tokens, cuda=True)) / GIB
    assert sum(training_bytes(in_small_slices, row_tokens, True)) / GIB == pytest.approx(estimated)
    # what its first lines say
    said = re.search(r"not run by us: ([\d.]+) GiB to train, ([\d.]+) hours on a (.*)\. For", text)
    assert said and said[3] == card
    assert float(said[1]) == pytest.approx(estimated, abs=0.06)
    by_backend = hours.card_hours(config, shape_of(config.student.model))[card]
    assert float(said[2]) == pytest.approx(by_backend["hf"]["total"], abs=0.06)


def test_every_card_has_hours_for_every_backend_and_stage() -> None:
    config = load(ROOT / "configs" / "qwen2.5-7b-24gb.yaml")
    by_card = hours.card_hours(config, shape_of(config.student.model))
    assert list(by_card) == ["T4", "3060 12 GB", "4060 Ti 16 GB", "3090", "4090", "A100", "H100"]
    for by_backend in by_card.values():
        assert list(by_backend) == ["hf", "gguf", "http"]
        for stages in by_backend.values():
            assert list(stages) == ["teach", "truncate", "align", "train", "eval", "total"]
            assert stages["total"] == pytest.approx(
                sum(stages.values()) - stages["total"], abs=1e-9
            )
            assert stages["teach"] == 0 and min(list(stages.values())[1:]) > 0
        assert by_backend["http"]["eval"] <= by_backend["hf"]["eval"]
    # 16 bits with a merged adapter are faster, where they fit
    in_4_bits = resolve(
        {**config.model_dump(), "eval": {**config.eval.model_dump(), "dtype": "nf4"}}, "x"
    )
    slower = hours.card_hours(in_4_bits, shape_of(config.student.model))
    assert slower["4090"]["hf"]["eval"] > 1.3 * by_card["4090"]["hf"]["eval"]
    assert slower["T4"] == by_card["T4"]
    for backend in ("hf", "gguf", "http"):
        totals = [
            by_card[card][backend]["total"] for card in ("3060 12 GB", "3090", "4090", "H100")
        ]
        assert totals == sorted(totals, reverse=True)
    rows = hours.rows_of(by_card)
    assert len(rows) == 21 and rows[0]["card"] == "T4"


@pytest.mark.parametrize(
    ("dtype", "rows", "replayed_ms", "launched_ms"),
    [
        ("nf4", 8, 16.9, 102.6),
        ("nf4", 32, 16.3, 147.6),
        ("bf16", 1, 9.7, 41.2),
        ("bf16", 8, 10.1, 41.5),
        ("bf16", 32, 14.3, 32.2),
    ],
)
@pytest.mark.parametrize("graphs", [True, False])
def test_a_step_takes_about_what_it_took_on_an_h100(
    dtype: str, rows: int, replayed_ms: float, launched_ms: float, graphs: bool
) -> None:
    """A 7B shape with random weights, contexts of 512 to 641 tokens, torch 2.11."""
    keys = {"model": "Qwen/Qwen2.5-7B-Instruct", "dtype": dtype, "cuda_graphs": graphs}
    config = resolve({"student": keys}, "test")
    measured_ms = replayed_ms if graphs else launched_ms
    shape, card = shape_of(config.student.model), hours.CARDS["H100"]
    estimated = hours.speeds(config, shape, card)["hf"].step(rows, 576)
    assert 1000 * estimated == pytest.approx(measured_ms, rel=0.3)


def test_prefill_and_training_take_about_what_they_took_on_an_h100() -> None:
    """As above; NF4, gradient checkpoints, rank 16."""
    config = resolve({"student": {"model": "Qwen/Qwen2.5-7B-Instruct", "dtype": "nf4"}}, "test")
    shape, card = shape_of(config.student.model), hours.CARDS["H100"]
    speed = hours.speeds(config, shape, card)["hf"]
    assert speed.prefill(4096) == pytest.approx(0.121, rel=0.2)
    for tokens, measured in ((4096, 0.75), (16384, 3.10)):
        assert speed.train(tokens) == pytest.approx(measured, rel=0.2)


def test_a_model_that_fits_no_card_has_no_hours() -> None:
    shape = SHAPES["Qwen/Qwen2.5-7B-Instruct"]._replace(linear=int(6.5e10))
    by_card = hours.card_hours(resolve({}, "test"), shape)
    assert by_card["3060 12 GB"]["hf"]["total"] is None


def test_the_longest_row_fits_and_one_token_more_does_not(tiny: str, tmp_path: Path) -> None:  # noqa: F811
    config = settings(tmp_path, tiny, dtype="nf4")
    limit = sum(training_bytes(config, 700, True))
    assert longest(config, limit) == 700
    assert longest(config, 1000) == 0


def test_what_does_not_fit_is_refused_with_the_key_to_change(
    tiny: str,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = settings(tmp_path / "r", tiny, gradient_checkpointing=False, max_seq_tokens=1024)
    monkeypatch.setattr(planning, "limit_bytes", lambda: (False, RESERVE_BYTES + int(0.03 * GIB)))
    result = plan(config)
    assert not result["fits"] and "train.gradient_checkpointing=true" in result["change"]
    with Run(config, Progress(quiet=True)) as run:
        with pytest.raises(KitError, match="Training on rows of 1024 tokens needs about") as caught:
            check_fit(run, 1024)
        assert "train.gradient_checkpointing=true" in caught.value.hint
        ignoring = config.model_copy(
            update={"train": config.train.model_copy(update={"on_low_memory": "warn"})}
        )
        check_fit(run, 8)
        run.config = ignoring
        check_fit(run, 1024)
    assert "Trying anyway" in (tmp_path / "r" / "run.log").read_text()


def test_a_run_is_refused_before_any_work_where_its_longest_rows_do_not_fit(
    tiny: str,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(planning, "limit_bytes", lambda: (False, RESERVE_BYTES + int(0.02 * GIB)))
    called: list[int] = []
    monkeypatch.setattr(planning, "return_at_once", lambda: called.append(1))
    config = settings(tmp_path / "r", tiny, max_seq_tokens=2048)
    with pytest.raises(KitError, match="rows of 2048 tokens needs about"):
        check_longest(config)
    # generation comes first, and malloc is faster as it is
    assert not called
    check_longest(settings(tmp_path / "r", tiny, max_seq_tokens=2048, on_low_memory="warn"))
    check_longest(settings(tmp_path / "r", tiny, max_seq_tokens=8))


def test_the_command_refuses_before_teaching(tmp_path: Path) -> None:
    """A 7B's rows of 32,768 tokens on this machine: known from its shape, nothing is loaded."""
    raw = {"student": {"model": "Qwen/Qwen2.5-7B-Instruct"}, "train": {"dtype": "fp32"}}
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps({"out": str(tmp_path / "r"), **raw}), encoding="utf-8")
    command = [sys.executable, "palign.py", "run", str(path), "--quiet"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Training on rows of 32768 tokens needs about" in done.stderr
    assert "Set train.dtype=nf4" in done.stderr or "train.logits_bytes" in done.stderr
    assert not (tmp_path / "r" / "traces.jsonl").exists()


def test_times_scale_with_the_rows_of_the_run_in_the_folder(tiny: str, tmp_path: Path) -> None:  # noqa: F811
    config = settings(tmp_path, tiny)
    assert hours.THIS_RUN not in plan(config)["hours"]
    stages = {
        "teach": {"done": True, "rows_in": 4, "seconds": 10.0},
        "align": {"done": False, "rows_in": 4},
    }
    (tmp_path / "manifest.json").write_text(json.dumps({"format": FORMAT, "stages": stages}))
    source = config.data.train.model_copy(update={"limit": 40})
    larger = config.model_copy(update={"data": config.data.model_copy(update={"train": source})})
    result = plan(larger)
    assert hours.measured_seconds(larger) == {"teach": 100.0}
    assert result["hours"][hours.THIS_RUN]["hf"] == {"teach": 0.028, "total": 0.028}
    # the estimates stay beside it
    assert list(result["hours"])[:-1] == list(hours.CARDS)


def test_what_is_printed_tells_this_machine_from_named_cards(
    tiny: str,  # noqa: F811
    tmp_path: Path,
) -> None:
    printed = planning.in_words(plan(settings(tmp_path, tiny, max_seq_tokens=64)))
    assert re.fullmatch(
        r"0\.\d GiB for rows of 64 tokens, 1 at a time; [\d.]+ GiB are free \(cpu\): fits",
        printed["training on this machine"],
    )
    assert "tokens before training" in printed["hours assume"]
    # a card where no sequence fits has no row
    big = resolve({"student": {"model": "Qwen/Qwen2.5-7B-Instruct", "dtype": "bf16"}}, "test")
    rows = planning.in_words(plan(big))["hours on cards, estimated (this run: measured)"]
    assert ("3060 12 GB", "hf") not in {(row["card"], row["backend"]) for row in rows}
    assert ("4090", "hf") in {(row["card"], row["backend"]) for row in rows}


def test_a_configs_limits_bound_the_lengths_that_its_hours_assume() -> None:
    """The quick example answers with 80 tokens: its hours are no paper's."""
    smoke = load(ROOT / "configs" / "smoke.yaml")
    assert hours.lengths_of(smoke) == (80, 80, 80, 80, 1024)
    assert "traces of 80 tokens" in hours.assumptions(smoke)
    by_card = hours.card_hours(smoke, shape_of(smoke.student.model))
    assert by_card["4090"]["hf"]["total"] < 0.05
    paper = load(ROOT / "configs" / "qwen2.5-7b-24gb.yaml")
    assert hours.lengths_of(paper) == (10_000, 2900, 1100, 3400, 2600)


STEP = """
import json, sys
from kit.doctor_full import step_peak

print(json.dumps(step_peak(int(sys.argv[1]), json.loads(sys.argv[2]))))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tokens", "keys"),
    [
        (128, {}),
        (512, {}),
        (2048, {}),
        (1024, {"logits_bytes": 1 << 24}),
        (512, {"gradient_checkpointing": False, "dtype": "fp32"}),
    ],
)
def test_the_estimate_is_within_a_fifth_of_what_a_step_of_the_packaged_model_takes(
    tokens: int, keys: dict[str, object]
) -> None:
    command = [sys.executable, "-c", STEP, str(tokens), json.dumps(keys)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    )
    measured, estimated = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{tokens} tokens {keys}: measured {measured / GIB:.3f} GiB, "
        f"estimated {estimated / GIB:.3f} GiB"
    )
    assert 0.8 * measured < estimated < 1.2 * measured


def test_where_memory_is_short_freed_blocks_go_back_at_once(
    tiny: str,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called: list[int] = []
    monkeypatch.setattr(planning, "return_at_once", lambda: called.append(1))
    config = settings(tmp_path / "r", tiny)
    without_checkpoints = planning._with(config, gradient_checkpointing=False)
    whole = planning._total(without_checkpoints, 512, False)
    with Run(config, Progress(quiet=True)) as run:
        for room, times in ((whole + 1, 0), (whole - 1, 1)):
            monkeypatch.setattr(
                planning, "limit_bytes", lambda room=room: (False, RESERVE_BYTES + room)
            )
            check_fit(run, 512)
            assert len(called) == times
