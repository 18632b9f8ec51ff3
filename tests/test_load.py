"""A whole command against llama.cpp's real server, on a bad line, while the server dies.

The server's model is the first layer of the packaged one, and its answers are one token long: what
is tested is the way of the rows, not of the tokens.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import psutil
import pytest

from kit.core import config as configs
from kit.core.records import TraceRow
from kit.core.storage import RowFile
from kit.models import gguf_file, load_tokenizer
from kit.prompts import render, solve_text
from tests.conftest import ROOT
from tests.test_http import SERVE, Proxy, Server

KILLS = (0.2, 0.35, 0.5)  # of the requests
GARBAGE = 0.65
CALM = 0.8  # from here on nothing happens
IN_FLIGHT = 32


def first_layer(path: Path) -> Path:
    """Write a GGUF of the packaged model's first layer, with all of its tokens and embeddings."""
    reader = gguf.GGUFReader(gguf_file("smollm2-135m"))
    writer = gguf.GGUFWriter(path, "llama")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value = 1 if name == "llama.block_count" else field.contents()
        kinds = [*field.types, None]
        writer.add_key_value(name, value, kinds[0], sub_type=kinds[-2] if kinds[1] else None)
    for tensor in reader.tensors:
        if tensor.name.startswith("blk.") and not tensor.name.startswith("blk.0."):
            continue
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def many_slots(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    """A server with a slot for each request in flight."""
    pytest.importorskip("xllamacpp", reason="xllamacpp carries the server for these tests")
    model = first_layer(tmp_path / "model.gguf")
    monkeypatch.setattr("tests.test_http.f16_copy", lambda _: model)
    small = "p.n_ctx, p.n_parallel, p.model_alias = 8192, 4,"
    assert small in SERVE
    large = f"p.n_ctx, p.n_parallel, p.model_alias = {256 * IN_FLIGHT}, {IN_FLIGHT},"
    monkeypatch.setattr("tests.test_http.SERVE", SERVE.replace(small, large))
    server = Server()
    yield server
    server.kill()


class Line(Proxy):
    """A bad line to a server that dies: a proxy that remembers what was answered, and when."""

    def __init__(self, server: Server, requests: int) -> None:
        self.server = server
        self.requests = requests
        self.dice = random.Random(5)
        self.answered: list[float] = []
        self.texts: dict[tuple[int, ...], set[str]] = defaultdict(set)
        self.events = {round(share * requests): "kill" for share in KILLS}
        self.events[round(GARBAGE * requests)] = "garbage"
        super().__init__(server.port, self.disturb, self.remember)

    def disturb(self, number: int, body: dict[str, Any]) -> Any:
        event = self.events.get(number)
        if event == "kill":
            self.done[event] += 1
            self.server.kill()
            threading.Timer(0.5, self.server.start, kwargs={"wait": False}).start()
            return None
        if event or number < 10 or number > CALM * self.requests:
            return event
        roll = self.dice.random()
        choices = ((0.02, "delay"), (0.04, "cut"), (0.06, "truncate"), (0.07, 503))
        return next((action for share, action in choices if roll < share), None)

    def remember(self, path: str, sent: dict[str, Any], answer: Any) -> Any:
        if path.endswith("/completions"):
            self.answered.append(time.monotonic())
            self.texts[tuple(sent["prompt"])].add(answer["choices"][0]["text"])
        return answer


def teach(folder: Path, url: str, rows: int) -> tuple[subprocess.Popen, list[int]]:
    """`palign.py teach` with the server as the teacher, and the bytes that it holds over time."""
    config = folder / "load.yaml"
    keys = {
        "name": "load",
        "out": str(folder / "run"),
        "stop_after": "teach",
        "prompts": {"instruction": "Answer."},
        "data": {"train": {"path": "builtin", "steps": [1, 3], "limit": rows}},
        "teacher": {
            "backend": "http",
            "url": url,
            "model": "smollm2",
            "tokenizer": "smollm2-135m",
            "max_num_seqs": IN_FLIGHT,
            "timeout_seconds": 60,
            "retries": 8,
            "sampling": {"temperature": 0, "top_p": 1, "max_new_tokens": 1},
        },
    }
    config.write_text(json.dumps(keys), encoding="utf-8")
    command = [sys.executable, "palign.py", "teach", str(config), "--json"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    sizes: list[int] = []

    def watch() -> None:
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            sizes.append(watched.memory_info().rss)
            time.sleep(0.5)

    threading.Thread(target=watch, daemon=True).start()
    return process, sizes


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_2000_requests_each_give_one_row_whatever_happens(
    many_slots: Server, tmp_path: Path
) -> None:
    """With 32 in flight, on a bad line, the server killed three times and once talking garbage."""
    rows = 2000
    line = Line(many_slots, rows)
    begun = time.monotonic()
    failures = []
    while True:
        process, sizes = teach(tmp_path, line.url, rows)
        _, errors = process.communicate(timeout=1000)
        if process.returncode == 0:
            break
        failures.append(errors.strip().splitlines()[-1])
        assert process.returncode == 1 and len(failures) < 3, errors
    seconds = time.monotonic() - begun
    line.close()

    # The garbage alone stopped the command, with a clear paragraph; the same command went on.
    assert len(failures) == 1 and "does not answer in JSON" in failures[0]
    assert all(line.done[kind] for kind in ("delay", "cut", "truncate", 503))
    assert line.done["kill"] == 3 and line.done["garbage"] == 1

    # Every row once, each with an answer to its own prompt.
    lines = (tmp_path / "run" / "traces.jsonl").read_text(encoding="utf-8").splitlines()
    config = configs.load(tmp_path / "load.yaml")
    answered = RowFile(tmp_path / "run" / "traces.jsonl", TraceRow).read()
    counts = Counter(row.id for row in answered)
    assert len(lines) == len(counts) == rows and set(counts.values()) == {1}
    tokenizer = load_tokenizer("smollm2-135m")
    for row in answered:
        prompt = render(tokenizer, solve_text(config.prompts, row.question))
        assert row.samples[0].text in line.texts[tuple(prompt)], row

    # Memory: flat over the second session, once everything is loaded.
    half = sizes[len(sizes) // 2]
    print(f"memory: {half / 1e6:.0f} MB in the middle, {max(sizes) / 1e6:.0f} MB at most")
    assert max(sizes) - half < 30e6

    # Time: what it would have taken at the pace of the calm end.
    calm = line.answered[round(CALM * len(line.answered)) :]
    pace = (calm[-1] - calm[0]) / (len(calm) - 1)
    print(
        f"{len(line.seen)} requests for {rows} rows in {seconds:.0f} s; at the calm pace of "
        f"{1 / pace:.1f} a second {rows * pace:.0f} s; lost {seconds - rows * pace:.0f} s, with "
        f"two starts of the command; disturbed: {dict(line.done)}"
    )
