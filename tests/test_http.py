"""kit.backends.http against llama.cpp's real server, directly and through a proxy that misbehaves.

Everything listens on 127.0.0.1. The server runs the 16-bit copy that the in-process engine runs as
well, with one thread: on busy cores two of them spin on each other.
"""

from __future__ import annotations

import http.client
import http.server
import json
import logging
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kit.backends import open_backend
from kit.backends.base import Request, ScoreRequest, sample_seed
from kit.backends.gguf import f16_copy
from kit.backends.http import HttpBackend
from kit.core.config import Config, ModelConfig, Sampling, resolve
from kit.core.errors import KitError
from kit.core.records import PrefixRow, Problem
from kit.judging import trace as judging
from kit.judging.cut import cut, from_problem
from kit.judging.judge import Judge
from kit.judging.sentences import ends
from kit.models import gguf_file
from kit.prompts import render
from tests.judging_cases import judge_config
from tests.test_success import QUESTION, WORKED

SERVE = """
import sys, xllamacpp
p = xllamacpp.CommonParams()
p.model.path, p.port, p.hostnames = sys.argv[1], int(sys.argv[2]), ["127.0.0.1"]
p.n_ctx, p.n_parallel, p.model_alias = 8192, 4, {"smollm2"}
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = 1
p.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
p.warmup = False
if len(sys.argv) > 3:
    p.api_keys = [sys.argv[3]]
server = xllamacpp.Server(p)
print("up", flush=True)
sys.stdin.read()  # until the test's process is gone, however it ended
"""
GREEDY = Sampling(temperature=0, top_p=1, max_new_tokens=3)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    """llama.cpp's server in a process of its own, on one port for its life."""

    def __init__(self, *more: str) -> None:
        self.port, self.more = free_port(), more
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self, wait: bool = True) -> None:
        command = [
            sys.executable,
            "-c",
            SERVE,
            str(f16_copy(gguf_file("smollm2-135m"))),
            str(self.port),
            *self.more,
        ]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        if wait:
            assert self.process.stdout.readline().strip() == b"up"

    def kill(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    pytest.importorskip("xllamacpp", reason="xllamacpp carries the server for these tests")
    server = Server()
    yield server
    server.kill()


@pytest.fixture
def mortal() -> Iterator[Server]:
    """A server that a test may kill."""
    pytest.importorskip("xllamacpp", reason="xllamacpp carries the server for these tests")
    server = Server()
    yield server
    server.kill()


class Proxy:
    """Passes requests on to a server.

    `meddle(number, body)` says what to do with the number-th completion instead: a status to answer
    with, "hang", "cut" (close without an answer), "delay" (a second, then the answer), "truncate"
    (half of the answer), "garbage", or None. `reshape` rewrites JSON answers.
    """

    def __init__(
        self,
        port: int,
        meddle: Callable[[int, dict[str, Any]], Any] = lambda n, body: None,
        reshape: Callable[[str, dict[str, Any], Any], Any] | None = None,
    ) -> None:
        self.seen: list[dict[str, Any]] = []
        self.done: Counter[Any] = Counter()
        self.headers: list[dict[str, str]] = []
        lock, outer = threading.Lock(), self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True
            halve = False

            def log_message(self, *_: Any) -> None: ...

            def do_GET(self) -> None:
                self.forward("GET", b"")

            def do_POST(self) -> None:
                data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                action = None
                if self.path.endswith("/completions"):
                    with lock:
                        body = json.loads(data)
                        outer.seen.append(body)
                        outer.headers.append(dict(self.headers))
                        number = len(outer.seen)
                    action = meddle(number, body)
                    data = json.dumps(body).encode()
                    outer.done[action] += 1
                time.sleep({"hang": 4, "delay": 1}.get(action, 0))
                self.halve = action == "truncate"
                if action in ("cut", "hang"):
                    self.close_connection = True
                elif action == "garbage":
                    self.answer(200, b"<html>\xff\x00 {choices: [", {"Content-Type": "text/html"})
                elif isinstance(action, int):
                    self.answer(
                        action, b'{"error": {"message": "not now"}}', {"Retry-After": "0.2"}
                    )
                else:
                    self.forward("POST", data)

            def forward(self, method: str, data: bytes) -> None:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                try:
                    connection.request(
                        method, self.path, data, {"Content-Type": "application/json"}
                    )
                    reply = connection.getresponse()
                    body = reply.read()
                except (OSError, http.client.HTTPException):
                    self.answer(502, b"{}", {})
                    return
                finally:
                    connection.close()
                if reshape and reply.status == 200:
                    body = json.dumps(
                        reshape(self.path, json.loads(data or b"{}"), json.loads(body))
                    ).encode()
                self.answer(reply.status, body, {"Content-Type": reply.headers["Content-Type"]})

            def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.close_connection |= self.halve
                self.wfile.write(body[: len(body) // (1 + self.halve)])

        class Listener(http.server.ThreadingHTTPServer):
            request_queue_size = 64
            daemon_threads = True

            def handle_error(self, *_: Any) -> None: ...  # the client gave up on a hanging request

        self.listener = Listener(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.listener.server_port}/v1"
        threading.Thread(target=self.listener.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.listener.shutdown()
        self.listener.server_close()


def engine(url: str | None, **keys: Any) -> ModelConfig:
    keys = {
        "model": "smollm2",
        "tokenizer": "smollm2-135m",
        "max_num_seqs": 4,
        "timeout_seconds": 60,
    } | keys
    return ModelConfig(backend="http", url=url, **keys)


@pytest.fixture(scope="module")
def backend(server: Server) -> Iterator[HttpBackend]:
    backend = open_backend(engine(server.url))
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def local() -> Iterator[Any]:
    backend = open_backend(
        ModelConfig(
            backend="gguf", model="smollm2-135m", context_tokens=2048, n_threads=1, max_num_seqs=2
        )
    )
    yield backend
    backend.close()


def test_start_learns_context_slots_and_template(backend: HttpBackend) -> None:
    assert backend.context_tokens == 2048 and backend.concurrent == 4
    assert "<|im_start|>" in backend.tokenizer.template
    assert (backend.tokenizer.bos, backend.tokenizer.eos) == ("<|im_start|>", "<|im_end|>")


def test_closing_with_requests_in_flight_leaves_no_thread_waiting(server: Server) -> None:
    """A full disk, for one: the process must end, though the server answers for a minute."""
    backend = open_backend(engine(server.url))
    requests = [
        Request(f"r{tokens}", (5, 6, 7, 8), Sampling(max_new_tokens=tokens, temperature=1.0))
        for tokens in (1, 1500, 1501, 1502)
    ]
    answers = backend.generate(requests)
    assert next(answers).id == "r1"
    workers = list(backend.pool._threads)
    answers.close()
    backend.close()
    for worker in workers:
        worker.join(5)
    assert workers and not any(worker.is_alive() for worker in workers)


def test_another_models_tokenizer_is_noticed(server: Server, tmp_path: Path) -> None:
    # as a GGUF writes its vocabulary
    four = struct.pack("<Q", 1) + b"4"
    other = struct.pack("<Q", 1) + b"x"
    data = gguf_file("smollm2-135m").read_bytes()
    assert four in data and other in data
    at = data.index(four)
    swapped = data[:at] + other + data[at + 9 :]
    at = data.index(other)
    (tmp_path / "other.gguf").write_bytes(swapped[:at] + four + swapped[at + 9 :])
    with pytest.raises(KitError, match=r"other token ids than .*Set tokenizer"):
        open_backend(engine(server.url, tokenizer=str(tmp_path / "other.gguf")))
    with pytest.raises(KitError, match=r"not found as 'smollm2'.*Set tokenizer"):
        open_backend(engine(server.url, tokenizer=None))


def test_start_up_errors_say_what_to_do(server: Server) -> None:
    with pytest.raises(KitError, match=r"Set url=http://HOST:PORT/v1"):
        open_backend(engine(None))
    with pytest.raises(KitError, match="does not answer"):
        open_backend(engine(f"http://127.0.0.1:{free_port()}/v1", retries=0))
    with pytest.raises(KitError, match=r"serves no model 'gpt-5'.*smollm2"):
        open_backend(engine(server.url, model="gpt-5"))
    with pytest.raises(KitError, match=r"Check url|does not answer"):
        open_backend(engine(f"http://127.0.0.1:{server.port}/nothing/v1", retries=0))


def test_the_key_is_sent_and_appears_nowhere(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    key = "sk-very-secret-0123456789"
    server = Server(key)
    caplog.set_level(logging.DEBUG)
    try:
        monkeypatch.delenv("LAB_KEY", raising=False)
        monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another-place")
        with pytest.raises(KitError, match="LAB_KEY, is not set"):
            open_backend(engine(server.url, api_key_env="LAB_KEY"))
        # not OPENAI_API_KEY
        with pytest.raises(KitError, match="api_key_env names, None, is not set"):
            open_backend(engine(server.url))
        monkeypatch.setenv("LAB_KEY", "sk-wrong-98765")
        with pytest.raises(KitError, match="LAB_KEY, is set, but not accepted") as wrong:
            open_backend(engine(server.url, api_key_env="LAB_KEY"))
        monkeypatch.setenv("LAB_KEY", key)
        backend = open_backend(engine(server.url, api_key_env="LAB_KEY"))
        assert next(iter(backend.generate([Request("a", (1, 2, 3), GREEDY)]))).completions
        messages = [
            caplog.text,
            str(wrong.value),
            repr(wrong.value.args),
            *backend.notes,
            str(vars(backend.engine)),
        ]
        backend.close()
    finally:
        server.kill()

    class Echoes(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps(
                {"error": {"message": f"bad {self.headers['Authorization']}"}}
            ).encode()
            self.send_response(401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None: ...

    listener = http.server.HTTPServer(("127.0.0.1", 0), Echoes)
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{listener.server_port}/v1"
    # a server that repeats what it was sent
    with pytest.raises(KitError, match=r"bad Bearer \*\*\*") as echoed:
        open_backend(engine(url, api_key_env="LAB_KEY"))
    # no key was sent that nobody named
    with pytest.raises(KitError, match=r"bad Bearer") as unnamed:
        open_backend(engine(url))
    listener.shutdown()
    listener.server_close()
    messages += [str(echoed.value), str(unnamed.value), caplog.text]
    assert not any(
        secret in text
        for text in messages
        for secret in (key, "sk-wrong-98765", "sk-of-another-place")
    )


def test_samples_have_seeds_of_their_own_and_share_the_prefill(backend: HttpBackend) -> None:
    prompt = render(backend.tokenizer, "Write one sentence about the sea.")
    sampling = Sampling(temperature=1.2, top_p=1, max_new_tokens=8)
    requests = [
        Request("sea", prompt, sampling, n=4, seed=7),
        Request("other", prompt, sampling, n=1, seed=7),
    ]
    first = {g.id: g for g in backend.generate(requests)}
    again = next(iter(backend.generate(requests[:1])))
    texts = [c.text for c in first["sea"].completions]
    assert len(set(texts)) == 4 and texts == [c.text for c in again.completions]
    assert first["other"].completions[0].text not in texts
    # one prefill at most, then the last token of each prompt
    assert again.prefill_tokens <= len(prompt) + 3
    for completion in first["sea"].completions:
        assert backend.tokenizer.decode(completion.ids).strip() == completion.text.strip()


def test_greedy_equals_llama_cpp_in_process(backend: HttpBackend, local: Any) -> None:
    """The same ids up to the first near-tie; the penalty, which changes these answers, included."""
    questions = ["What is 2+2?", "Name a colour.", "Tell me about foxes."]
    for penalty in (1.0, 1.3):
        sampling = Sampling(temperature=0, top_p=1, repetition_penalty=penalty, max_new_tokens=8)
        requests = [Request(q, render(local.tokenizer, q), sampling) for q in questions]
        here = {g.id: g.completions[0] for g in local.generate(requests)}
        there = {g.id: g.completions[0] for g in backend.generate(requests)}
        for request in requests:
            a, b = here[request.id].ids, there[request.id].ids
            parted = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
            if parted is None:
                assert a == b and here[request.id].finish_reason == there[request.id].finish_reason
                continue
            ids = (*request.prompt, *a[:parted])
            (reading,) = local.session(uncached=True).score(
                [ScoreRequest(ids, ((len(ids) - 1, (a[parted], b[parted])),))]
            )
            assert abs(reading[0][0] - reading[0][1]) < 0.5 and not {a[parted], b[parted]} & set(
                ids
            )


def test_stop_length_and_loop_are_told_apart(backend: HttpBackend) -> None:
    prompt = tuple(backend.tokenizer.encode("a b a b a b a b a b a b a b a b"))
    loop = Sampling(temperature=0, top_p=1, max_new_tokens=40, stop_loops=True)
    requests = [
        Request("looped", prompt, loop),
        Request("ended", render(backend.tokenizer, "What is 2+2?"), loop),
    ]
    requests.append(Request("cut", prompt, loop.model_copy(update={"stop": (" b",)})))
    requests.append(Request("long", prompt, loop.model_copy(update={"stop_loops": False})))
    results = {g.id: g.completions[0] for g in backend.generate(requests)}
    assert {k: c.finish_reason for k, c in results.items()} == {
        "looped": "loop",
        "ended": "stop",
        "cut": "stop",
        "long": "length",
    }
    assert results["cut"].text == " a" and len(results["long"].ids) == 40
    assert (
        not set(results["ended"].ids) & backend.tokenizer.eos_ids
        and backend.tokenizer.eos not in results["ended"].text
    )


def test_a_refused_prompt_costs_no_other(backend: HttpBackend) -> None:
    requests = [Request("long", (5,) * 2100, GREEDY), Request("good", (5, 6, 7), GREEDY)]
    requests += [Request("bad", (5, 10**8), GREEDY), Request("empty", (), GREEDY)]
    results = {g.id: g for g in backend.generate(requests)}
    assert (
        "2100 tokens, but the context is 2048" in results["long"].error
        and "invalid tokens" in results["bad"].error
    )
    assert (
        "0 tokens" in results["empty"].error
        and results["good"].completions
        and not results["good"].error
    )


def test_a_retokenizing_server_is_refused(server: Server) -> None:
    def miscount(path: str, sent: dict[str, Any], answer: Any) -> Any:
        if path.endswith("/completions"):
            answer["usage"]["prompt_tokens"] += 1
        return answer

    proxy = Proxy(server.port, reshape=miscount)
    with pytest.raises(KitError, match="ids were asked for"):
        open_backend(engine(proxy.url))
    proxy.close()


def test_hundreds_of_requests_through_a_bad_line_and_a_restart(mortal: Server) -> None:
    """Each of 200 requests is answered exactly once, with its own answer.

    Some are refused with 429 and 503, some cut off before or in the answer, some late, some hang
    beyond the time-out; the server is killed and started again on the way. tests/test_load.py has
    2,000 requests to a whole command.
    """
    dice, lock = random.Random(3), threading.Lock()

    def meddle(number: int, body: dict[str, Any]) -> Any:
        if number == 80:
            mortal.kill()
            threading.Timer(0.5, mortal.start, kwargs={"wait": False}).start()
        with lock:
            roll = dice.random()
        if number in (40, 41):
            return "hang"
        choices = ((0.05, 429), (0.09, 503), (0.13, "cut"), (0.16, "truncate"), (0.18, "delay"))
        return next((action for share, action in choices if roll < share and number > 4), None)

    proxy = Proxy(mortal.port, meddle)
    backend = open_backend(engine(proxy.url, timeout_seconds=3, retries=8))
    # after eight rounds the second of a pair follows with p 0.56 to 0.86
    pairs = [(" c", " a"), (" a", " cat"), (" c", " d")]
    turns = [tuple(tuple(backend.tokenizer.encode(word)) for word in pair) for pair in pairs]
    sampling = GREEDY.model_copy(update={"max_new_tokens": 1})
    requests = [
        Request(f"r{i}", (turns[i % 3][0] + turns[i % 3][1]) * 8 + turns[i % 3][0], sampling)
        for i in range(200)
    ]
    results = list(backend.generate(requests))
    counts = Counter(g.id for g in results)
    assert set(counts) == {r.id for r in requests} and set(counts.values()) == {1}
    for generation in results:
        assert generation.completions[0].ids == turns[int(generation.id[1:]) % 3][1], generation
    assert (
        all(proxy.done[kind] for kind in (429, 503, "cut", "truncate", "delay", "hang"))
        and mortal.process.poll() is None
    )
    backend.close()
    proxy.close()


def test_a_dead_server_loses_nothing_that_was_finished(mortal: Server) -> None:
    backend = open_backend(engine(mortal.url, retries=1))
    requests = [Request(f"r{i}", (5, 6, 7, i + 40), GREEDY) for i in range(40)]
    results: list[str] = []
    with pytest.raises(KitError, match=r"does not answer.*goes on from here"):
        for generation in backend.generate(requests):
            results.append(generation.id)
            if len(results) == 10:
                mortal.kill()
    assert 10 <= len(results) < 40 and len(set(results)) == len(results)
    mortal.start()
    rest = [r for r in requests if r.id not in results]
    assert {g.id for g in backend.generate(rest)} == {r.id for r in rest}
    backend.close()


def judging_probes(tokenizer: Any, count: int = 4) -> list[ScoreRequest]:
    """As the judge asks: one beginning, `count` boundaries, labels read where they part."""
    sentences = [
        f"Step {i}: we add {i} to the sum and get {i * (i + 1) // 2}. " for i in range(1, count + 1)
    ]
    labels = [tuple(tokenizer.encode(label)) for label in ("[ENOUGH]", "[NOT_ENOUGH]")]
    split = next(i for i in range(9) if labels[0][i] != labels[1][i])
    probes = []
    for k in range(1, count + 1):
        prompt = render(
            tokenizer,
            "Is this enough? Reply [ENOUGH] or [NOT_ENOUGH].\n\n" + "".join(sentences[:k]),
        )
        ids = (*prompt, *labels[0][:split])
        probes.append(ScoreRequest(ids, ((len(ids) - 1, (labels[0][split], labels[1][split])),)))
    return probes


def worked_row() -> PrefixRow:
    """A trace of five sentences; the last number that a continuation names is its answer."""
    problem = Problem(id="tom", question=QUESTION, answer="7", trace=WORKED, verifier="number")
    return from_problem(problem)


def margins(readings: list[list[list[float]]]) -> list[float]:
    return [reads[0][0] - reads[0][1] for reads in readings]


def test_judging_equals_llama_cpp_in_process(backend: HttpBackend, local: Any) -> None:
    """The same 16-bit weights in two builds of llama.cpp."""
    probes = judging_probes(local.tokenizer)
    expected = margins(local.session(uncached=True).score(probes))
    session = backend.session()
    results = margins(session.score(probes))
    print(
        "margins in process",
        [round(m, 3) for m in expected],
        "over HTTP",
        [round(m, 3) for m in results],
    )
    assert results == pytest.approx(expected, abs=0.012)  # the largest seen: 0.006
    assert [m > 0 for m in expected] == [m > 0 for m in results]
    assert session.cost.cached_tokens > session.cost.prefill_tokens
    assert any(note.startswith("prefix cache:") for note in backend.notes)
    fresh = backend.session(uncached=True)
    assert margins(fresh.score(probes)) == pytest.approx(
        results, abs=1e-3
    )  # cached equals uncached
    assert fresh.cost.cached_tokens == 0 and fresh.cost.prefill_tokens == sum(
        len(p.ids) for p in probes
    )


def test_a_judging_prompt_leaves_a_server_room_for_a_token(
    server: Server, backend: HttpBackend
) -> None:
    """A server refuses a prompt as long as its context, though nothing is to be written."""
    config = Config(student=engine(server.url).model_dump())
    with Judge(config, backend) as judge:
        assert judge.limit_tokens == backend.context_tokens - 1
        longest = ScoreRequest((5,) * judge.limit_tokens, ((judge.limit_tokens - 1, (5, 6)),))
        assert judge.backend.session().score([longest])


def test_values_beyond_the_listed_ones_are_exact(backend: HttpBackend, local: Any) -> None:
    ids = render(backend.tokenizer, "Name a colour.")
    probe = ScoreRequest(ids, ((len(ids) - 1, tuple(range(0, 49152, 4001))),))
    ((wanted,),), ((results,),) = (
        local.session(uncached=True).score([probe]),
        backend.session().score([probe]),
    )
    assert results == pytest.approx(wanted, abs=0.05) and min(results) < -10


def test_a_server_that_names_no_ids_generates_and_does_not_judge(server: Server) -> None:
    def by_text(path: str, sent: dict[str, Any], answer: Any) -> Any:
        answer = vllm(path, sent, answer)
        for choice in answer.get("choices", ()):
            content = choice.pop("token_ids") and None
            choice["logprobs"] = {
                "tokens": [choice["text"]],
                "token_logprobs": [-1.0],
                "top_logprobs": content,
            }
        return answer

    proxy = Proxy(server.port, reshape=by_text)
    other = open_backend(engine(proxy.url))
    prompt = render(other.tokenizer, "Name a colour.")
    generation = next(other.generate([Request("a", prompt, GREEDY)])).completions[0]
    assert other.tokenizer.decode(generation.ids) == generation.text
    with pytest.raises(KitError, match=r"returns no log-probabilities.*Judge with"):
        other.session().score([ScoreRequest(prompt, ((len(prompt) - 1, (5, 6)),))])
    other.close()
    proxy.close()


def test_sessions_in_threads_agree_with_one_alone(backend: HttpBackend) -> None:
    probes = judging_probes(backend.tokenizer, 3)
    alone = backend.session().score(probes)
    results: dict[int, Any] = {}

    def judge(number: int) -> None:
        results[number] = [backend.session().score([probe])[0] for probe in probes]

    threads = [threading.Thread(target=judge, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == 4
    for number in results:
        for a, b in zip(alone, results[number], strict=True):
            assert a[0] == pytest.approx(b[0], abs=0.05)


@pytest.mark.parametrize("kind", ["verbal", "answer"])
def test_a_sweep_on_a_server_finds_the_first_sufficient_boundary(
    kind: str, backend: HttpBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against every boundary asked without a cache; the cut is past the first stretch."""
    monkeypatch.setattr(judging, "STRETCH_CHARACTERS", 60)
    row = worked_row()
    judge = Judge(judge_config(kind=kind), backend)
    requests = [judge.request(row, row.trace[:end]) for end in ends(row.trace)]
    fresh = [judge.margin(reads) for reads in backend.session(uncached=True).score(requests)]
    # a threshold just under the highest margin: the first that reaches it is known
    highest = max(fresh)
    judge.threshold = highest - 0.02
    first = next(k for k, margin in enumerate(fresh, 1) if margin >= judge.threshold)
    row = cut(judge, row, search="sweep")
    assert row.sufficient and row.sentences == first
    for verdict in row.verdicts:
        assert verdict.margin == pytest.approx(fresh[verdict.sentences - 1], abs=0.012)
    assert row.cached_tokens > row.prefill_tokens
    judge.threshold = highest + 1
    assert not cut(judge, row, search="sweep").sufficient


def test_success_on_a_server_draws_the_same_for_every_search(backend: HttpBackend) -> None:
    """The seeds are those of row, boundary and number, whatever is asked before."""
    sampling = {"temperature": 0.8, "top_p": 0.95, "max_new_tokens": 16}
    align = {"mode": "prefill", "sampling": sampling}
    raw = {"judge": {"kind": "success"}, "align": align}
    with Judge(resolve(raw, "test"), backend) as judge:
        rows = {name: cut(judge, worked_row(), search=name) for name in ("scan", "sweep", "binary")}
    margins = {verdict.sentences: verdict.margin for verdict in rows["scan"].verdicts}
    assert len(set(margins.values())) > 1, "some boundaries suffice, others do not"
    differing = 0
    for row in rows.values():
        kept_margin = {v.sentences: v.margin for v in row.verdicts}[row.sentences]
        assert row.sufficient == (kept_margin >= 0.8)
        assert len(row.samples) >= 2 and row.generated_tokens > 0
        # the server's prefix cache does the sharing
        assert row.cached_tokens > 0
        differing += sum(v.margin != margins[v.sentences] for v in row.verdicts)
    assert differing <= 1, "up to a near-tie"


def test_judging_goes_on_after_the_server_was_killed(mortal: Server) -> None:
    backend = open_backend(engine(mortal.url, retries=1))
    probes = judging_probes(backend.tokenizer, 4)
    session = backend.session()
    done = [session.score([probe])[0] for probe in probes[:2]]
    mortal.kill()
    with pytest.raises(KitError, match=r"does not answer.*goes on from here"):
        session.score(probes[2:])
    assert len(done) == 2
    mortal.start()
    assert session.score(probes[:2])[1][0] == pytest.approx(done[1][0], abs=0.05)
    backend.close()


def vllm(path: str, sent: dict[str, Any], answer: Any) -> Any:
    """llama-server's answers in the shape of vLLM's: a translation for the parser, not vLLM."""
    if path.endswith("/models"):
        answer["data"][0] |= {"owned_by": "vllm", "max_model_len": 2048, "root": "smollm2-135m"}
    for choice in answer["choices"] if path.endswith("/completions") else ():
        content = (choice.get("logprobs") or {}).get("content") or []
        choice["token_ids"] = [e["id"] for e in content] or None
        choice["logprobs"] = {
            "tokens": [f"token_id:{e['id']}" for e in content],
            "token_logprobs": [e["logprob"] for e in content],
            "top_logprobs": [
                {f"token_id:{t['id']}": t["logprob"] for t in e["top_logprobs"]} for e in content
            ],
        }
    return answer


def test_answers_in_the_shape_of_vllm_are_read(server: Server, backend: HttpBackend) -> None:
    proxy = Proxy(server.port, reshape=vllm)
    other = open_backend(engine(proxy.url))
    assert not other.llama and other.context_tokens == 2048
    probes = judging_probes(backend.tokenizer, 3)
    for a, b in zip(backend.session().score(probes), other.session().score(probes), strict=True):
        assert a[0] == pytest.approx(b[0], abs=0.05)
    asked = [body for body in proxy.seen if "logprob_token_ids" in body]
    # the longest first, to fill the cache
    assert len(asked[0]["prompt"]) == max(len(p.ids) for p in probes)
    sampling = Sampling(temperature=1.2, top_p=1, top_k=300, max_new_tokens=6)
    generation = next(other.generate([Request("v", (5, 6, 7), sampling, n=3, seed=1)]))
    assert (
        len({sample.text for sample in generation.completions}) > 1
        and len(generation.completions) == 3
    )
    body = proxy.seen[-1]
    assert (body["n"], body["seed"]) == (3, sample_seed(1, "v", 0)) and "id_slot" not in body
    assert body["top_k"] == 300 and body["repetition_penalty"] == 1.0
    # vLLM refuses several greedy answers in one request
    before = len(proxy.seen)
    generation = next(other.generate([Request("g", (5, 6, 7), GREEDY, n=2)]))
    assert len(generation.completions) == 2
    assert [body["n"] for body in proxy.seen[before:]] == [1, 1]
    other.close()
    proxy.close()
