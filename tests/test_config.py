"""The config: overrides, every mistake at once, and the keys of the version before."""

from __future__ import annotations

from pathlib import Path

import pytest

from kit.core import config as configs
from kit.core.errors import KitError
from tests.conftest import ROOT


def load(tmp_path, text, *overrides):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return configs.load(path, overrides)


def test_overrides_reach_nested_keys_and_a_string_over_a_dataset_sets_its_path(tmp_path):
    text = "data: {train: {path: a.jsonl, limit: 4}}"
    config = load(
        tmp_path, text, "data.train=b.jsonl", "align.samples=4", "data.eval=c.jsonl", "out=x"
    )
    assert (config.data.train.path, config.data.train.limit) == ("b.jsonl", 4)
    assert (
        config.align.samples == 4
        and config.data.eval[0].path == "c.jsonl"
        and str(config.folder) == "x"
    )


def test_a_number_sign_in_an_override_begins_no_comment(tmp_path):
    config = load(tmp_path, "{}", "out=runs/exp #2", "prompts.instruction=Solve problem #1 now")
    assert str(config.folder) == "runs/exp #2"
    assert config.prompts.instruction == "Solve problem #1 now"
    assert load(tmp_path, "{}", "teacher.path=#3").teacher.path == "#3"
    # what is quoted or a list is YAML as before
    config = load(tmp_path, "{}", "name='7'", "judge.labels=[A, B] # two", "seed=4 # fourth")
    assert (config.name, config.judge.labels, config.seed) == ("7", ("A", "B"), 4)


def test_an_adapter_is_the_students_and_no_key_of_the_evaluation(tmp_path):
    assert load(tmp_path, "student: {adapter: a}").student.adapter == "a"
    with pytest.raises(KitError, match=r"eval\.adapter: unknown key"):
        load(tmp_path, "eval: {adapter: a}")


def test_all_mistakes_are_reported_at_once_with_the_nearest_name(tmp_path):
    with pytest.raises(KitError) as caught:
        load(
            tmp_path,
            "jugde: {}\njudge: {serach: scan, kind: vocal}\nmethod: post-thing",
            "nonsense",
            "train.rank=0",
        )
    text = str(caught.value)
    assert caught.value.code == 2
    for part in (
        "did you mean judge",
        "did you mean search",
        "judge.kind",
        "method: there is no method 'post-thing'; did you mean post-think?",
        "'nonsense'",
        "train.rank",
    ):
        assert part in text, part


@pytest.mark.parametrize("text", ["- a\n- b", "a: [", "\x00", "a: 2024-13-45", "[" * 5000])
def test_a_file_that_is_not_a_mapping_is_refused(tmp_path, text):
    with pytest.raises(KitError):
        load(tmp_path, text)


def test_a_missing_config_is_named_and_one_that_exists(tmp_path):
    with pytest.raises(KitError, match=r"none\.yaml.*configs/smoke\.yaml"):
        configs.load(tmp_path / "none.yaml")


def test_eval_follows_the_student_where_it_says_nothing_else(tmp_path):
    config = load(tmp_path, "student: {model: other, dtype: nf4}\neval: {samples: 3}")
    assert (config.eval.model, config.eval.dtype, config.eval.samples) == ("other", "nf4", 3)


def test_the_resolved_config_resolves_to_itself(tmp_path):
    config = load(
        tmp_path, "method: ratio-0.25\ndata: {eval: [a.jsonl, {path: b.jsonl, stratify: level}]}"
    )
    (tmp_path / "again.yaml").write_text(configs.dump(config))
    assert configs.load(tmp_path / "again.yaml") == config and config.ratio == 0.25


RUNS = [
    path
    for path in sorted((ROOT / "configs").glob("*.yaml"))
    if "\nname:" in "\n" + path.read_text("utf-8")
]


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.name)
def test_every_bundled_config_is_valid(path):
    assert configs.load(path).name


def test_a_bundled_config_has_no_old_keys_and_no_line_over_100_columns(capsys):
    for path in RUNS:
        configs.load(path)
        assert max(map(len, path.read_text("utf-8").splitlines())) <= 100, path
    assert capsys.readouterr().err == ""


def test_old_keys_and_values_are_read_with_a_note_that_names_the_new_ones(tmp_path, capsys):
    text = """
    data: {train: {path: builtin, subset: 1-2 to 10}, eval: [{subset: main, path: openai/gsm8k}]}
    teacher: {backend: worked, parallel: 3}
    eval: {before: false}
    judge: {search: fresh, limit_tokens: 900, chunk_tokens: 64}
    train: {batch_rows: 4, over_cutoff: cut, overfit: ignore, save_steps: 50}
    """
    config = load(tmp_path, text)
    assert (config.data.train.steps, config.data.train.max_number) == ((1, 2), 10)
    assert config.data.train.subset is None and config.data.eval[0].subset == "main"
    assert (config.teacher.backend, config.teacher.max_num_seqs) == ("reference", 3)
    assert not config.eval.base and config.judge.search == "uncached"
    assert config.judge.limit_tokens == 900
    assert (config.train.batch_size, config.train.on_too_long) == (4, "truncate")
    assert config.train.on_low_memory == "warn"
    notes = capsys.readouterr().err.splitlines()
    for note in (
        "note: train.batch_rows is now called train.batch_size",
        "note: judge.search=fresh is now called uncached",
        "note: data.train.subset is now called steps and max_number",
        "note: judge.chunk_tokens is no longer a key: chunks shrink by themselves where memory "
        "runs out",
        "note: train.save_steps is no longer a key: checkpoints are saved by time, see "
        "train.save_minutes (minutes between two)",
    ):
        assert note in notes
    assert len(notes) == 12, notes


def test_a_prompt_can_be_a_file_and_must_hold_its_placeholders(tmp_path):
    (tmp_path / "judge.txt").write_text("{question} {prefix} Enough?")
    config = load(tmp_path, f"prompts: {{judge: 'file:{tmp_path}/judge.txt'}}")
    assert config.prompts.judge == "{question} {prefix} Enough?"
    with pytest.raises(KitError, match=r"prompts\.draft: \{prefix\} is missing"):
        load(tmp_path, "prompts: {draft: '{question}'}")


def test_a_share_outside_of_0_to_1_is_no_method(tmp_path: Path) -> None:
    for share in ("0.25", ".5", "1.0"):
        assert load(tmp_path, f"method: ratio-{share}").ratio == float(share)
    for share in ("0", "0.0", "1.1", "2", "", "-0.5"):
        with pytest.raises(KitError, match=r"no method 'ratio-.*did you mean ratio-0\.5\?"):
            load(tmp_path, f"method: ratio-{share}")


def test_an_unknown_key_with_no_near_name_lists_those_of_its_section(tmp_path):
    with pytest.raises(KitError, match=r"data\.xyzzy: unknown key; known: eval, train"):
        load(tmp_path, "data: {xyzzy: 1}")


def test_a_config_that_an_editor_saved_as_utf_16_is_read(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes("name: märchen".encode("utf-16"))
    assert configs.load(path).name == "märchen"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"thresholds": {"verbal": NaN}}', "finite number|Field required"),
        ("[1, 2]", "valid dictionary"),
        ("{", "Expecting property name"),
    ],
)
def test_a_calibration_file_that_is_none_says_why(
    content: str, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(content)
    with pytest.raises(KitError, match=rf"is no calibration.json of .*: .*({reason})"):
        configs.load(None, [f"judge.calibration={path}"])
