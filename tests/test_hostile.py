"""About a hundred hostile or broken inputs: configs, data, run folders and servers.

Each ends in a message of its own or in a right result, on the real command line in this process:
no defect, no traceback, in seconds, with no process and no temporary file left.
"""

from __future__ import annotations

import contextlib
import gzip
import http.server
import json
import os
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import palign
from kit.core.config import Config
from kit.grading.answers import Grader, Item
from tests.make_run import make

SECONDS = 30.0


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Bounds each test's time, and looks for processes and temporary files afterwards."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.chdir(tmp_path)
    began = time.monotonic()
    before = children()
    yield
    assert time.monotonic() - began < SECONDS
    assert children() <= before
    # torch makes a folder for its compiler as soon as it is imported
    assert [path for path in temporary.iterdir() if "torchinductor" not in path.name] == []


def children() -> set[psutil.Process]:
    """This process's, without the one in which Python counts what processes share."""
    found = set()
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "multiprocessing.resource_tracker" not in " ".join(child.cmdline()):
                found.add(child)
    return found


def ends_well(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Run a command; its exit code and all that it printed."""
    code = palign.main(list(arguments))
    printed = capsys.readouterr()
    text = printed.out + printed.err
    assert code in (0, 1, 2), text
    assert "a defect" not in text and "Traceback" not in text, text
    assert code == 0 or len(text.strip()) > 20, "a message of its own"
    return code, text


# --- configs ---

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {x: 1, y: 2}\n" + "".join(
    f"{new}: &{new} {{<<: [{', '.join([f'*{old}'] * 9)}]}}\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
CONFIGS: dict[str, str | bytes] = {
    "bomb of aliases": BOMB,
    "bomb of merges": MERGES,
    "recursion": "&a [*a]",
    "recursive section": "data: &a {train: *a}",
    "deep nesting": "[" * 3_000,
    "deep mappings": "{a: " * 5_000,
    "duplicate section": "train: {rank: 1}\ntrain: {rank: 2}",
    "duplicate key": "train: {rank: 1, rank: 2}",
    "infinity": "train: {learning_rate: .inf}",
    "not a number": "judge: {threshold: .nan}",
    "huge number": "seed: 1" + "0" * 5_000,
    "huge seed": "seed: 99999999999999999999",
    "negative seed": "seed: -1",
    "list": "- a\n- b",
    "scalar": "just words",
    "binary": random.Random(0).randbytes(4_000),
    "nul": b"\0" * 4_000,
    "tabs": "train:\n\trank: 1",
    "code": "name: !!python/object/apply:os.system ['touch owned']",
    "date": "name: 2024-13-45",
    "name that climbs": "name: ../../x",
    "endless wordiness": "teacher: {backend: reference, wordiness: 1.0e+9}",
    "endless problems": "data: {train: {limit: 1000000000}}",
    "password": "student: {backend: http, url: 'http://me:secret@h/v1'}",
    "key in url": "student: {backend: http, url: 'http://h/v1?api_key=secret'}",
    "pasted key": "student: {api_key_env: sk-secret}",
    "control characters": 'name: "\\u202e\\x07"',
    "unknown home": "data: {train: ~nobody-here/x.jsonl}",
    "unknown home of a model": "student: {model: ~nobody-here/x.gguf}",
    "endless data": "data: {train: /dev/zero}",
    "endless prompt": "prompts: {judge: 'file:/dev/zero'}",
    "endless model": "student: {model: /dev/zero}",
    "key in lower case": "student: {api_key_env: secret_key_of_mine}",
}
for key in sorted(Config.model_fields.keys() - {"stop_after"}):  # it is set on the command line
    CONFIGS[f"{key} of another type"] = f"{key}: [1, {{a: [2]}}]"


@pytest.mark.parametrize("name", CONFIGS)
def test_a_hostile_config(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = CONFIGS[name]
    path = tmp_path / "c.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    for command in ("check", "run"):
        keys = ["teacher.backend=reference", "stop_after=truncate"]
        code, printed = ends_well(capsys, command, str(path), *keys)
        assert code in (1, 2) and "secret" not in printed
    assert not (tmp_path / "owned").exists()
    for file in tmp_path.rglob("runs/*/*"):
        assert file.is_dir() or b"secret" not in file.read_bytes()


@pytest.mark.parametrize("place", ["config", "data", "prompt"])
def test_a_pipe_that_nobody_writes_to_is_not_waited_for(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = tmp_path / "pipe.jsonl"
    os.mkfifo(pipe)
    config = tmp_path / "c.yaml"
    config.write_text("teacher: {backend: reference}\n")
    commands = {
        "config": ["check", str(pipe)],
        "data": ["check", str(config), f"data.train={pipe}"],
        "prompt": ["check", str(config), f"prompts.judge=file:{pipe}"],
    }
    code, printed = ends_well(capsys, *commands[place])
    assert code == 2 and "a pipe or a device" in printed


def test_the_name_of_a_key_in_lower_case_is_refused_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(CONFIGS["key in lower case"])
    _, printed = ends_well(capsys, "check", str(path))
    assert "student.api_key_env: name an environment variable, in capitals (a key may" in printed


def test_an_alias_and_a_merge_within_reason_are_read(tmp_path: Path) -> None:
    from kit.core.config import load

    text = "student: &s {model: m, system: hi}\neval: {<<: *s, samples: 2}\n"
    (tmp_path / "c.yaml").write_text(text)
    assert load(tmp_path / "c.yaml").eval.system == "hi"


# --- files ---

ROW = {"id": "a", "question": "What is 1 + 1?", "answer": "2", "output": "\\boxed{2}"}
GOOD = json.dumps(ROW).encode() + b"\n"
FILES: dict[str, bytes] = {
    "empty.jsonl": b"",
    "blank.jsonl": b"\n \n\n",
    "nul.jsonl": b"\0" * 1_000,
    "torn.jsonl": GOOD + GOOD[:20],
    "scalar.json": b"7",
    "nested.json": b"[[1], [2]]",
    "deep.jsonl": b"[" * 100_000,
    "numbers.jsonl": b'{"question": 1e999, "answer": ' + b"9" * 5_000 + b"}\n",
    "nan.jsonl": b'{"question": NaN, "answer": NaN, "output": NaN}\n',
    "surrogate.jsonl": b'{"question": "\\ud800?", "answer": "\\ud800", "output": "\\udfff"}\n',
    "utf16.jsonl": GOOD.decode().encode("utf-16"),
    "latin.jsonl": '{"question": "é", "answer": "1"}'.encode("latin-1"),
    "bom.jsonl": b"\xef\xbb\xbf" + GOOD,
    "ends.jsonl": json.dumps({**ROW, "question": "a\u2028b\x85c"}, ensure_ascii=False).encode(),
    "list.jsonl": b"[1, 2]\n",
    "keys.jsonl": b'{"": "", " ": null, "question": {"answer": []}}\n',
    "ragged.csv": b"question,answer\n1,2,3\n",
    "quotes.csv": b'question,answer\n"1,2\n',
    "wide.csv": b"question,answer,output\n" + b"x" * 200_000 + b",2,2\n",
    "torn.jsonl.gz": gzip.compress(GOOD * 100)[:60],
    "text.jsonl.gz": b"no gzip",
    "noise.parquet": random.Random(1).randbytes(2_000),
    "sheet.xlsx": b"PK\3\4",
}


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_file(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / name
    path.write_bytes(FILES[name])
    ends_well(capsys, "data", str(path))
    ends_well(capsys, "grade", str(path), "--json")


# 200,000 characters of one kind, in an answer or in its gold answer.
UNITS = [
    "(",
    "[",
    " ",
    "1",
    "\\,",
    "~",
    "$",
    "\\left",
    "( ",
    "<answer>",
    "\\boxed{",
    "a_",
    "A and ",
]


@pytest.mark.parametrize("unit", UNITS)
def test_a_hostile_answer_is_graded_in_seconds(unit: str) -> None:
    text = unit * (200_000 // len(unit))
    short = f"1{unit * (3_900 // len(unit))}1"
    began = time.monotonic()
    with Grader(timeout_seconds=1.0) as grader:
        for verifier in ("choice", "math", "number", "text"):
            for answer in (text, f"1{text}2", f"The answer is {text}"):
                items = [Item("7", answer, verifier), Item(answer, "\\boxed{7}", verifier)]
                for grade in (*grader.grade(items), *grader.grade(items, bare=True)):
                    assert grade.verdict != "correct"
        for verifier in ("choice", "text"):
            grader.grade([Item("2", short, verifier)], bare=True)
    assert time.monotonic() - began < 15


# --- run folders ---


def write(name: str, text: str | bytes) -> Callable[[Path], None]:
    data = text if isinstance(text, bytes) else text.encode()
    return lambda folder: (folder / name).write_bytes(data) and None


def manifest(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def becomes_a_folder(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return change


FOLDERS: dict[str, Callable[[Path], Any]] = {
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "no config": lambda folder: (folder / "config.yaml").unlink(),
    "manifest torn": write("manifest.json", '{"stages": '),
    "manifest a list": write("manifest.json", "[1, 2]"),
    "manifest deep": write("manifest.json", "[" * 100_000),
    "manifest of a web page": write("manifest.json", '{"name": "x", "icons": []}'),
    "stages a list": manifest(stages=[1]),
    "a stage is text": manifest(stages={"teach": "done"}),
    "keys are text": manifest(stages={"teach": {"done": True, "keys": "x"}}),
    "format is text": manifest(format="two"),
    "format of tomorrow": manifest(format=99, palign="9.9"),
    "format of yesterday": manifest(format=1, palign="0.1"),
    "config torn": write("config.yaml", "a: ["),
    "config a bomb": write("config.yaml", BOMB),
    "config of another kind": write("config.yaml", "services: {web: {image: x}}"),
    "traces noise": write("traces.jsonl", random.Random(2).randbytes(9_000)),
    "traces deep": write("traces.jsonl", b"[" * 100_000 + b"\n"),
    "traces a folder": becomes_a_folder("traces.jsonl"),
    "log torn": write("train_log.jsonl", '{"step": 1, "lo'),
    "train rows a folder": becomes_a_folder("train.jsonl"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("hostile") / "run")


@pytest.mark.parametrize("name", FOLDERS)
def test_a_hostile_run_folder(
    name: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    FOLDERS[name](folder)
    own = tmp_path / "mine.yaml"
    own.write_text("teacher: {backend: reference}\n")
    ends_well(capsys, "compare", str(folder), str(whole), "--out", str(tmp_path / "c.html"))
    ends_well(capsys, "export", str(folder))
    ends_well(capsys, "report", str(own), f"out={folder}")


def test_what_is_not_ours_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "config.yaml"
    mine.write_text("name: mine\nteacher: {backend: reference}\n")
    before = mine.read_bytes()
    for command in ("run", "teach", "report", "check"):
        code, printed = ends_well(capsys, command, str(mine), "out=.")
        assert (
            code == 2
            and ("no run's" in printed or "not written by a run" in printed)
            and mine.read_bytes() == before
        )


# --- servers ---

MODELS = {"data": [{"id": "m", "max_model_len": 512}]}
LLAMA = {"data": [{"id": "m", "owned_by": "llamacpp"}]}
CHOICE = {"text": "x", "finish_reason": "stop", "token_ids": [1]}


def completion(**fields: Any) -> dict[str, Any]:
    return {"choices": [{**CHOICE, **fields}]}


# What /v1/models, and then whatever else is asked, is answered with.
SERVERS: dict[str, tuple[Any, Any]] = {
    "a page": (b"<html>", b"<html>"),
    "a list": ([1], [1]),
    "a number": (7, 7),
    "nothing": (b"", b""),
    "torn": (b'{"data": [', b""),
    "deep": (b'{"a":' * 100_000, b""),
    "data is text": ({"data": "abc"}, {}),
    "data is null": ({"data": None}, {}),
    "no ids": ({"data": [{"name": "m"}]}, {}),
    "ids are lists": ({"data": [{"id": [1]}]}, {}),
    "context is text": ({"data": [{"id": "m", "max_model_len": "many"}]}, {}),
    "no properties": (LLAMA, {}),
    "properties are null": (LLAMA, {"default_generation_settings": None, "total_slots": None}),
    "no choices": (MODELS, {}),
    "choices are text": (MODELS, {"choices": "x"}),
    "usage is text": (MODELS, {"choices": [CHOICE], "usage": "x"}),
    "no text": (MODELS, {"choices": [{}]}),
    "text is null": (MODELS, completion(text=None)),
    "text is a list": (MODELS, completion(text=[1])),
    "ids are text": (MODELS, completion(token_ids="x")),
    "ids are null": (MODELS, completion(token_ids=[None])),
    "ids are huge": (MODELS, completion(token_ids=[10**30])),
    "ids are negative": (MODELS, completion(token_ids=[-5])),
    "ids past the vocabulary": (MODELS, completion(token_ids=[10**9])),
    "redirect": (302, 302),
    "drips": ("drip", {}),
    "drips headers": ("headers", {}),
}


class Server:
    """Answers as it is told, on a port of its own."""

    def __init__(self, models: Any, other: Any) -> None:
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.stop = threading.Event()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None: ...

            def do_GET(self) -> None:
                headers = {name.lower(): value for name, value in self.headers.items()}
                outer.asked.append((self.path, headers))
                self.reply(models if self.path.endswith("/models") else other)

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self.do_GET()

            def reply(self, answer: Any) -> None:
                if answer == "headers":
                    self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
                    self.drip()
                elif isinstance(answer, int) and answer > 99:
                    self.send_response(answer)
                    elsewhere = f"http://localhost:{outer.listener.server_port}/elsewhere/models"
                    self.send_header("Location", elsewhere)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                else:
                    data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                    self.send_response(200)
                    self.send_header("Content-Type", "application/json")
                    length = 9_999 if answer == "drip" else len(data)
                    self.send_header("Content-Length", str(length))
                    self.end_headers()
                    if answer == "drip":
                        self.drip()
                    self.wfile.write(data)

            def drip(self) -> None:
                """A byte at a time, as long as somebody reads."""
                try:
                    while not outer.stop.wait(0.2):
                        self.wfile.write(b" ")
                        self.wfile.flush()
                except OSError:
                    self.close_connection = True

        self.listener = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.listener.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.listener.server_port}/v1"
        threading.Thread(target=self.listener.serve_forever, daemon=True).start()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.listener.shutdown()
        self.listener.server_close()


@pytest.mark.parametrize("name", SERVERS)
def test_a_hostile_server(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No reply is taken for an answer, none is waited for past the time-out, and nothing that
    nobody named is sent."""
    for variable in ("API_KEY", "ORG_ID", "PROJECT_ID"):
        monkeypatch.setenv(f"OPENAI_{variable}", "of-another-account")
    monkeypatch.setenv("LAB_KEY", "named-secret")
    config = {
        "stop_after": "truncate",
        "data": {"train": {"limit": 2}},
        "teacher": {"backend": "reference"},
        "student": {
            "backend": "http",
            "model": "m",
            "tokenizer": "smollm2-135m",
            "timeout_seconds": 2,
            "retries": 0,
            "api_key_env": "LAB_KEY",
        },
    }
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps(config))
    with Server(*SERVERS[name]) as server:
        code, printed = ends_well(capsys, "run", str(path), f"student.url={server.url}")
        assert code == 2 and "student:" in printed, printed
        assert "named-secret" not in printed and server.asked
        for asked, headers in server.asked:
            assert "elsewhere" not in asked, "a redirect was followed"
            assert "of-another-account" not in str(headers)
            assert headers["authorization"] == "Bearer named-secret"
    for file in (tmp_path / "runs").rglob("*"):
        assert file.is_dir() or b"named-secret" not in file.read_bytes()
    assert not list(tmp_path.rglob("traces.jsonl"))


def test_there_are_about_a_hundred() -> None:
    assert len({**CONFIGS, **FILES, **FOLDERS, **SERVERS}) + len(UNITS) >= 100
