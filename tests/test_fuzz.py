"""Hypothesis against everything that reads what people write: no crash but our own errors.

PALIGN_FUZZ=10000 sets the number of examples of each test.
"""

from __future__ import annotations

import json
import os
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from kit import data, prompts
from kit.core import config
from kit.core.bundled import bundled
from kit.core.config import Config, DatasetConfig, ModelConfig
from kit.core.errors import KitError
from kit.core.records import Problem, Sample, TraceRow
from kit.core.storage import RowFile, line_of
from kit.grading.answers import find
from kit.judging.sentences import ends, split

EXAMPLES = int(os.environ.get("PALIGN_FUZZ", "50"))
fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
    ],
)
ANY = st.text(st.characters(), max_size=120)  # lone surrogates and control characters included
MATHS = st.lists(
    st.sampled_from(
        r"\boxed{ \boxed \fbox{ } { \frac{1}{2} \text{cm} $ $$ \[ \] \( \) 3.14 1,000 -7 50% = . "
        r"... ! ? 。 <<1+1=2>> #### **73** (A) answer is: \n \begin{a} \end{a} ``` ` Dr. e.g. 1. "
        r"<think> </think> <End_of_Prefix>".split(" ")
    )
    | ANY
    | st.sampled_from(["\n", "\n\n", " ", "\\", "\x00", "\ud800"]),
    max_size=40,
).map("".join)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ANY, inner, max_size=4),
    max_leaves=8,
)
ROLES = bundled("formats")
KEYS = sorted({key for keys in ROLES.values() for key in keys} | {"Problem", "ANSWER", "other"})


@fuzz
@given(MATHS)
def test_splitter(text: str) -> None:
    parts = split(text)
    assert "".join(parts) == text and len(ends(text)) == len(parts)
    assert all(part.strip() for part in parts) or parts == [text]
    assert ends(text)[-1:] == ([len(text)] if text else [])


@fuzz
@given(MATHS, st.sampled_from(["math", "number", "choice", "text"]))
def test_answer_extraction(text: str, verifier: str) -> None:
    found, place = find(text, verifier)
    assert found.strip() if found is not None else place == "none"


LEAVES = sorted(config.flat(Config()))
PATHS = st.sampled_from(LEAVES) | st.sampled_from([leaf.rsplit(".", 1)[0] for leaf in LEAVES]) | ANY
VALUES = st.sampled_from(
    [
        "1",
        "0",
        "-1",
        "true",
        "hf",
        "nf4",
        "null",
        "{}",
        "[]",
        "{path: x}",
        "[a, b]",
        "1e999",
        ".nan",
    ]
)
OVERRIDES = st.lists(st.tuples(PATHS, VALUES | ANY).map("=".join) | ANY, max_size=5)


@fuzz
@given(
    JSON | st.dictionaries(st.sampled_from(list(Config.model_fields)), JSON, max_size=4), OVERRIDES
)
def test_config(tmp_path: Path, raw: Any, overrides: list[str]) -> None:
    path = tmp_path / "config.yaml"
    try:
        text = yaml.safe_dump(raw, allow_unicode=True)
        path.write_text(text, encoding="utf-8")
    except (UnicodeEncodeError, yaml.YAMLError):
        path.write_text(json.dumps(raw), encoding="utf-8")
    check_config(path, overrides)


@fuzz
@given(st.binary(max_size=200) | ANY.map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_config_of_any_bytes(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    check_config(path, [])


def check_config(path: Path, overrides: list[str]) -> None:
    """A config that is accepted says the same when it is saved and read again."""
    try:
        loaded = config.load(path, overrides)
    except KitError as error:
        assert error.code == 2 and str(error)
        return
    assert config.resolve(yaml.safe_load(config.dump(loaded)), "again") == loaded


ROWS = st.lists(st.dictionaries(st.sampled_from(KEYS), JSON | MATHS, max_size=6) | JSON, max_size=6)
SOURCES = st.fixed_dictionaries(
    {},
    optional={
        "fields": st.dictionaries(st.sampled_from([*ROLES]), st.sampled_from(KEYS), max_size=3),
        "limit": st.integers(1, 5),
        "seed": st.integers(),
        "stratify": st.sampled_from(["level", "subject", "id", "x"]),
    },
)


def check_source(source: DatasetConfig, traces: bool) -> None:
    """What is read is whole: no surrogates, unique ids, everything else accounted for."""
    try:
        reading = data.read(source, 0, traces=traces)
        problems = data.subset(reading.problems, source, 0)
    except KitError as error:
        assert str(error)
        return
    assert 0 < len(problems) <= (source.limit or 10**9)
    assert len({problem.id for problem in reading.problems}) == len(reading.problems)
    for problem in problems:
        assert problem.question.strip() and problem.answer.strip()
        assert line_of(problem).encode()
        assert not traces or problem.trace
    assert all(
        gone["id"] and gone["reason"] and gone["detail"].encode() for gone in reading.rejected
    )


@fuzz
@given(ROWS, SOURCES, st.booleans())
def test_rows_of_any_shape(
    tmp_path: Path, rows: list[Any], source: dict[str, Any], traces: bool
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    check_source(DatasetConfig(path=str(path), **source), traces)


@fuzz
@given(st.binary(max_size=300), st.integers(0, 400))
def test_files_of_any_bytes(tmp_path: Path, junk: bytes, where: int) -> None:
    path = tmp_path / "rows.jsonl"
    replace_surrogates = b"".join(
        b'{"question": "How much is %d?", "answer": "%d"}\n' % (i, i) for i in range(8)
    )
    path.write_bytes(replace_surrogates[:where] + junk + replace_surrogates[where:])
    check_source(DatasetConfig(path=str(path)), False)


@fuzz
@given(ANY | st.text(string.printable, max_size=20))
def test_paths_of_any_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    assume(path not in ("builtin", "holdout"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KitError):
        data.read(DatasetConfig(path=path), 0)


@fuzz
@given(st.data())
def test_stage_files_that_were_mangled(tmp_path: Path, draw: st.DataObject) -> None:
    """Rows read back are rows that were written; anything else in the file is set aside by name."""
    texts = draw.draw(
        st.lists(
            MATHS.map(lambda text: text.encode("utf-8", "replace").decode()), min_size=1, max_size=4
        )
    )
    rows = [
        TraceRow(
            id=f"r{i}",
            question=text,
            answer="1",
            samples=(Sample(text=text, verdict="wrong"),),
            kept=(),
        )
        for i, text in enumerate(texts)
    ]
    path = tmp_path / "rows.jsonl"
    for old in tmp_path.glob("rows*"):
        old.unlink()
    content = "".join(map(line_of, rows)).encode()
    start = draw.draw(st.integers(0, len(content)))
    end = draw.draw(st.integers(start, min(len(content), start + 50)))
    path.write_bytes(content[:start] + draw.draw(st.binary(max_size=40)) + content[end:])
    file = RowFile(path, TraceRow)
    found = file.read()
    assert all(row in rows for row in found)
    assert file.damaged or len(found) == len(rows) or (start, end) != (end, start)
    assert (
        RowFile(path, TraceRow).read() == found
    )  # repaired: the second reading finds nothing damaged
    file.append(*[row for row in rows if row not in found])
    assert sorted(RowFile(path, TraceRow).read(), key=lambda row: row.id) == rows


class Toy:
    """Characters are tokens; some names are special; ChatML, or one that refuses a system role."""

    bos, eos, eos_ids = "<s>", "<|im_end|>", frozenset({1})
    special = ("<s>", "<|im_end|>", "<|im_start|>", "\ue000", "a")

    def __init__(self, template: str | None) -> None:
        self.template = template

    def encode(self, text: str, special: bool = True) -> list[int]:
        return [ord(character) + (0 if special else 1 << 21) for character in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(i % (1 << 21)) for i in ids)


CHATML = (
    "{% for m in messages %}{% if m.role == 'system' and no_system %}"
    "{{ raise_exception('no system role') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
REFUSING = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHATML
NAMES = st.sampled_from(
    ["<|im_end|>", "<|im_start|>", "<s>", "\ue000", "\ue0000\ue001", "{{ x }}", "{% y %}", "</s>"]
)
TALK = st.lists(NAMES | MATHS, max_size=6).map("".join)


@fuzz
@given(TALK, st.none() | TALK, TALK, st.sampled_from([None, CHATML, REFUSING]))
def test_rendering(user: str, system: str | None, answer: str, template: str | None) -> None:
    """All text is in the prompt, character for character, and none of it is a special token."""
    toy = Toy(template)
    ids = prompts.render(toy, user, ModelConfig(system=system), answer)
    text = toy.decode(ids)
    for said in (user, answer, system or ""):
        assert said in text
    frame = prompts.render(toy, "", ModelConfig(system="x" if system else None))
    for name in toy.special:
        assert as_special(ids).count(name) == as_special(frame).count(name)


def as_special(ids: Sequence[int]) -> str:
    """Where special tokens count in a prompt; a zero for what was tokenized as plain text."""
    return "".join(chr(i) if i < 1 << 21 else "\0" for i in ids)


@fuzz
@given(TALK, st.none() | TALK, TALK)
def test_rendering_for_the_packaged_model(
    tokenizer: Any, user: str, system: str | None, answer: str
) -> None:
    """However often a text names special tokens, only the template's own are in the prompt."""
    user, answer = (text.encode("utf-8", "replace").decode() for text in (user, answer))
    system = system.encode("utf-8", "replace").decode() if system else None
    special = {
        tokenizer.encode(name)[0] for name in tokenizer.special if len(tokenizer.encode(name)) == 1
    }
    ids = prompts.render(tokenizer, user, ModelConfig(system=system), answer)
    plain = prompts.render(
        tokenizer, "x", ModelConfig(system="x" if system else None), "x" if answer else ""
    )
    assert sum(i in special for i in ids) == sum(i in special for i in plain)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from kit.models import load_tokenizer

    return load_tokenizer("smollm2-135m")


@fuzz
@given(
    st.sampled_from(["judge", "draft", "compare", "instruction", "answer_cue"]), TALK, TALK, TALK
)
def test_prompt_texts(name: str, text: str, question: str, prefix: str) -> None:
    try:
        template = prompts.text_of(config.resolve({"prompts": {name: text}}, "fuzz").prompts, name)
    except KitError as error:
        assert str(error)
        return
    filled = prompts.fill(template, question=question, prefix=prefix)
    assert question in filled or "{question}" not in template


@fuzz
@given(st.lists(st.tuples(MATHS, MATHS), min_size=1, max_size=8))
def test_overlap_is_found_or_absent(rows: list[tuple[str, str]]) -> None:
    first = [Problem(id=f"a{i}", question=a, answer="1") for i, (a, _) in enumerate(rows)]
    second = [Problem(id=f"b{i}", question=b, answer="1") for i, (_, b) in enumerate(rows)]
    assert set(data.near_duplicates(first, second)) <= {problem.id for problem in second}
    assert data.near_duplicates(first, first) == [problem.id for problem in first]
