"""kit.training.hub: folders and cards that the hub's library accepts, and uploads that are whole.

The uploads go through the real huggingface_hub to a server on 127.0.0.1 that imitates the hub's
documented endpoints: no hub is asked.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import DatasetCard, ModelCard

from kit.core.errors import KitError
from kit.core.fingerprints import adapter_hash
from kit.core.progress import Progress
from kit.training.export import Export, export
from tests.conftest import ROOT
from tests.make_run import make
from tests.test_gguf_lora import save

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
TOKEN = "hf_very_secret_0123456789"
QUIET = Progress(quiet=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A made-up run with scores, whose config names local paths, a url and a key."""
    folder = tmp_path_factory.mktemp("hub") / "run"
    make(
        folder,
        student__model="/home/ann/models/base",
        teacher__model="/home/ann/teacher.gguf",
        data__eval="[/home/ann/data/sums.jsonl, {path: ./home/ann/more.jsonl}]",
        eval__url="http://lab-of-ann:8000/v1",
        eval__api_key_env="LAB_KEY",
    )
    save(folder / "adapter", {}, r=2, base_model_name_or_path="/home/ann/models/base")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["stages"]["train"]["output"] = adapter_hash(folder / "adapter")
    manifest["template_hash"] = "0123456789abcdef"
    facts = {"path": "/home/ann/sums.jsonl", "rows": 24, "rejected": 0, "fingerprint": "abc123"}
    manifest["data"] = {"train": facts, "evals": {"math500": {**facts, "fingerprint": "def456"}}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_the_cards_say_what_the_run_did(run: Path) -> None:
    result = export(Export(run, QUIET, "hub", base=BASE, repo="ann/student", dry_run=True))
    card = ModelCard(result["card"])
    assert card.data.base_model == BASE and card.data.license == "unknown"
    assert card.data.library_name == "peft" and card.data.datasets == ["ann/student-data"]
    # the library's own reading of the scores: the tuned model's, by data
    manifest = json.loads((run / "manifest.json").read_text())
    scores = manifest["stages"]["eval"]["summary"]["scores"]
    tuned = {s["dataset"]: s["accuracy"] for s in scores if s["which"] == "tuned"}
    assert {r.dataset_name: r.metric_value for r in card.data.eval_results} == tuned
    for score in scores:
        low, high = 100 * score["ci_low"], 100 * score["ci_high"]
        line = f"| {100 * score['accuracy']:.1f}% | {low:.1f}% to {high:.1f}% | {score['n']} |"
        assert f"| {score['dataset']} | {score['which']} {line}" in card.text
    for text in (
        "sums.jsonl",
        "more.jsonl",
        "abc123",
        "def456",
        "must not be taken for",
        "run config.yaml",
        "`palign`",
    ):
        assert text in card.text
    rows = DatasetCard(result["dataset_card"])
    assert rows.data.license == "other" and "ann/student" in rows.text and "abc123" in rows.text
    assert "learns to write the prefix that the student judged enough" in rows.text
    assert result["uploaded"] == []


def test_a_baselines_rows_are_not_called_checked(run: Path, tmp_path: Path) -> None:
    """A long trace is the teacher's own words, and a wrong one from a file trains too."""
    copy = tmp_path / "long"
    shutil.copytree(run, copy)
    config = copy / "config.yaml"
    config.write_text(re.sub(r"(?m)^method: .*$", "method: long-trace", config.read_text()))
    text = export(Export(copy, QUIET, "hub", base=BASE))["dataset_card"]
    assert "learns to write the teacher's whole trace. The student wrote none of it" in text


def test_nothing_of_this_machine_or_its_keys_is_in_the_folders(run: Path) -> None:
    result = export(Export(run, QUIET, "hub", base=BASE))
    assert {Path(path).name for path in result["files"]} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "train.jsonl",
    }
    for folder in ("model", "dataset"):
        for path in Path(result[folder]).iterdir():
            text = path.read_bytes()
            for secret in (b"/home/ann", b"lab-of-ann", b"LAB_KEY", b"8000"):
                assert secret not in text, (path, secret)
    settings = json.loads((Path(result["model"]) / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == BASE
    assert (Path(result["dataset"]) / "train.jsonl").read_bytes() == (
        run / "train.jsonl"
    ).read_bytes()


def test_a_local_base_needs_its_hub_id(run: Path) -> None:
    for base in (None, "smollm2-135m", "./models/base"):
        with pytest.raises(KitError, match=r"Nobody else can load the base.*--base OWNER/NAME"):
            export(Export(run, QUIET, "hub", base=base))


def test_a_card_that_the_library_refuses_is_not_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kit.training.hub.TEMPLATES", tmp_path)
    (tmp_path / "model.md.j2").write_text("---\nmodel-index: [{name: x}]\n---\n")
    with pytest.raises(KitError, match="refuses the card"):
        export(Export(run, QUIET, "hub", base=BASE, out=tmp_path / "out"))
    assert not (tmp_path / "out" / "hub" / "model" / "README.md").exists()


class Handler(BaseHTTPRequestHandler):
    """Repositories in memory behind the hub's endpoints for looking, creating and committing."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None: ...

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def answer(self, status: int, reply: Any, code: str = "") -> None:
        data = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if code:
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", reply["error"])
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        _, _, kind, owner, name, *_ = self.path.split("?")[0].split("/")
        repo = self.hub.repos.get(f"{kind}/{owner}/{name}")
        if repo is None:
            self.answer(404, {"error": "Repository not found"}, "RepoNotFound")
            return
        if "/tree/" in self.path:
            entries = [
                {"type": "file", "path": file, "size": len(data), "oid": "0" * 40}
                for file, data in repo.items()
            ]
            self.answer(200, entries)
            return
        files = [{"rfilename": file} for file in repo]
        self.answer(200, {"id": f"{owner}/{name}", "sha": "0" * 40, "siblings": files})

    def do_POST(self) -> None:
        body = self.body()
        path = self.path.split("?")[0]
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer(401, {"error": "Invalid username or password."})
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            modes = [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in files]
            self.answer(200, {"files": modes})
        elif "/commit/" in path:
            self.commit("/".join(path.split("/")[2:5]), body)
        else:
            self.answer(200, {})

    def create(self, sent: dict[str, Any]) -> None:
        key = f"{sent.get('type', 'model')}s/{sent['organization']}/{sent['name']}"
        self.hub.private[key] = sent.get("private") or sent.get("visibility") == "private"
        self.hub.repos.setdefault(key, {})
        self.answer(200, {"url": f"{self.hub.url}/{sent['organization']}/{sent['name']}"})

    def commit(self, key: str, body: bytes) -> None:
        if self.hub.refuses_commits:
            self.answer(403, {"error": "You don't have the rights to write."})
            return
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file" and value["path"] != self.hub.loses:
                self.hub.repos[key][value["path"]] = base64.b64decode(value["content"])
        url = f"{self.hub.url}/{key}/commit/{'1' * 40}"
        self.answer(200, {"commitUrl": url, "commitOid": "1" * 40})


class Hub:
    """The listening hub, what it holds, and how it fails."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.refuses_commits = False
        self.loses: str | None = None  # a file that a commit forgets
        handler = type("Of", (Handler,), {"hub": self})
        self.listener = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.listener.server_port}"
        threading.Thread(target=self.listener.serve_forever, daemon=True).start()


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    yield hub
    hub.listener.shutdown()
    hub.listener.server_close()


def upload(run: Path, url: str, home: Path, *more: str, token: str = TOKEN) -> Any:
    """`palign.py export RUN --to hub --repo` in a process of its own, whose hub is `url`."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": url,
        "HF_TOKEN": token,
        "HF_HOME": str(home / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    folder = home / "run"
    if not folder.exists():
        shutil.copytree(run, folder)
    command = [sys.executable, "palign.py", "export", str(folder), "--to", "hub", "--base", BASE]
    return subprocess.run(
        [*command, "--repo", "ann/student", "--json", *more],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_an_upload_is_private_whole_and_keeps_a_readme(run: Path, hub: Hub, tmp_path: Path) -> None:
    done = upload(run, hub.url, tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert len(result["uploaded"]) == 2 and TOKEN not in done.stdout + done.stderr
    model, rows = hub.repos["models/ann/student"], hub.repos["datasets/ann/student-data"]
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= set(model)
    assert rows["train.jsonl"] == (run / "train.jsonl").read_bytes()
    assert model["README.md"].decode() == result["card"] and all(hub.private.values())
    # it exists now: refused, and with --update its README stays
    again = upload(run, hub.url, tmp_path)
    assert again.returncode == 1 and "ann/student-data exists. Uploaded before" in again.stderr
    model["README.md"] = b"my own words"
    del model["adapter_config.json"]
    assert upload(run, hub.url, tmp_path, "--update").returncode == 0
    assert model["README.md"] == b"my own words" and "adapter_config.json" in model


def test_what_was_not_uploaded_is_not_called_done(run: Path, hub: Hub, tmp_path: Path) -> None:
    wrong = upload(run, hub.url, tmp_path, token="hf_wrong_token_1")
    assert wrong.returncode == 1 and "ann/student-data was not uploaded" in wrong.stderr
    assert "hf auth login" in wrong.stderr and "hf_wrong" not in wrong.stderr
    hub.refuses_commits = True
    refused = upload(run, hub.url, tmp_path)
    assert refused.returncode == 1 and "not uploaded" in refused.stderr and not refused.stdout
    hub.refuses_commits = False
    hub.loses = "adapter_model.safetensors"
    lost = upload(run, hub.url, tmp_path, "--update")
    assert lost.returncode == 1 and "misses adapter_model.safetensors" in lost.stderr
    assert "Uploaded before: http" in lost.stderr and not lost.stdout
    hub.listener.server_close()
    gone = upload(run, "http://127.0.0.1:9", tmp_path)
    assert gone.returncode == 1 and "Check the network" in gone.stderr
