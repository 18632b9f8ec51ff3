"""What a score belongs to: models and adapters by content, and files that are not as they were.

Weights are a two-layer model's, so that whole runs take seconds; they measure nothing.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import palign
from kit import models, prompts
from kit.core import config as configs
from kit.core.config import ModelConfig
from kit.core.errors import KitError
from kit.core.fingerprints import ADAPTER, BASE, adapter_hash, check_trained, model_hashes
from kit.core.progress import Progress
from kit.core.records import PrefixRow, TrainRow
from kit.judging.judge import Judge
from kit.training.export import Export, export
from kit.training.sft_data import prepare
from tests.test_prompts import CHATML, Toy
from tests.test_train import tiny  # noqa: F401  (a fixture)

WEIGHTS = "model.safetensors"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def in_place(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Change a file's content; its name and modification time stay."""
    stat = path.stat()
    path.write_bytes(change(path.read_bytes()))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def edit_tensors(path: Path, change: Callable[[dict], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    path.unlink()  # the loaded ones lie in the old file
    save_file(tensors, path, metadata={"format": "pt"})


def flip_last_byte(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def set_key(key: str, value: object) -> Callable[[bytes], bytes]:
    return lambda data: json.dumps({**json.loads(data), key: value}).encode()


# --- Fingerprints of files ---


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder; for fingerprints, what is in its files need not be a model."""
    names = (
        WEIGHTS,
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "additional_chat_templates/tool_use.jinja",
        "README.md",
    )
    for name in names:
        path = tmp_path / "model" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"a": "text", "chat_template": "{{ x }}"}')
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("name", "change", "part"),
    [
        (WEIGHTS, flip_last_byte, "weights"),
        ("config.json", flip_last_byte, "architecture"),
        ("generation_config.json", flip_last_byte, "architecture"),
        ("tokenizer.json", flip_last_byte, "tokenizer"),
        ("tokenizer_config.json", set_key("a", "test"), "tokenizer"),
        ("tokenizer_config.json", set_key("chat_template", "{{ y }}"), "chat template"),
        ("chat_template.jinja", flip_last_byte, "chat template"),
        ("additional_chat_templates/tool_use.jinja", flip_last_byte, "chat template"),
        ("README.md", flip_last_byte, None),
    ],
)
def test_a_file_of_equal_size_and_time_with_other_content_changes_its_part_alone(
    folder: Path, name: str, change: Callable[[bytes], bytes], part: str | None
) -> None:
    before = model_hashes(folder)
    in_place(folder / name, change)
    after = model_hashes(folder)
    assert [key for key in before if before[key] != after[key]] == ([part] if part else [])
    assert before.keys() == after.keys()


def test_a_file_that_did_not_change_is_hashed_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from kit.core import fingerprints

    monkeypatch.setenv("PALIGN_CACHE", str(tmp_path / "cache"))
    # a file may change within the tick of a clock after it was written
    monkeypatch.setattr(fingerprints, "RACY_SECONDS", 1e6)
    assert fingerprints.file_hash(folder / WEIGHTS) and not (tmp_path / "cache").exists()
    monkeypatch.setattr(fingerprints, "RACY_SECONDS", -1)
    content = fingerprints.file_hash(folder / WEIGHTS)
    with monkeypatch.context() as patch:
        patch.setattr("hashlib.file_digest", lambda *_: pytest.fail("it was read again"))
        assert fingerprints.file_hash(folder / WEIGHTS) == content
    in_place(folder / WEIGHTS, flip_last_byte)
    assert fingerprints.file_hash(folder / WEIGHTS) != content


def test_a_server_tells_a_name_and_a_model_that_is_not_here_has_no_fingerprint() -> None:
    served = configs.ModelConfig(backend="http", model="gpt", url="http://x/v1")
    told = models.fingerprints("student", served)
    assert told == {"weights of student.model": "not seen: a server tells only its model's name"}
    away = configs.ModelConfig(model="nobody/nothing")
    assert models.fingerprints("student", away) == {}


# --- Two runs of one command, and what was changed between them ---


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny: str) -> Path:  # noqa: F811
    """A folder with model/, config.yaml and the finished run/. Each test leaves it finished."""
    place = tmp_path_factory.mktemp("identity")
    shutil.copytree(tiny, place / "model")
    easy = {"path": "builtin", "steps": [1, 1], "max_number": 10}
    config = {
        "out": str(place / "run"),
        "method": "prefix-only",
        "data": {"train": {**easy, "limit": 3}, "eval": [{**easy, "limit": 2, "seed": 2}]},
        "teacher": {"backend": "reference"},
        "student": {"model": str(place / "model"), "max_num_seqs": 1},
        "train": {"dtype": "fp32", "batch_size": 1, "max_steps": 1, "warmup_ratio": 0},
        "eval": {"sampling": {"temperature": 0, "max_new_tokens": 4}},
    }
    (place / "config.yaml").write_text(json.dumps(config))
    assert palign.main(["run", str(place / "config.yaml"), "--json"]) == 0
    return place


def again(place: Path, capfd: pytest.CaptureFixture[str], command: str = "run") -> tuple[int, str]:
    """The command's exit code, and what it says."""
    capfd.readouterr()
    code = palign.main([command, str(place / "config.yaml"), "--json"])
    return code, " ".join(capfd.readouterr().err.split())


def scale_weights(place: Path) -> None:
    path = place / "model" / WEIGHTS
    stat = path.stat()
    edit_tensors(path, lambda tensors: tensors["model.norm.weight"].mul_(1.5))
    assert path.stat().st_size == stat.st_size
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def edit_template(place: Path) -> None:
    path = place / "model" / "chat_template.jinja"
    path.write_text(path.read_text() + "{# edited #}")


def edit_tokenizer(place: Path) -> None:
    in_place(place / "model" / "tokenizer_config.json", set_key("model_max_length", 4095))


@pytest.mark.parametrize(
    "changes",
    [{"weights": scale_weights}, {"chat template": edit_template, "tokenizer": edit_tokenizer}],
)
def test_what_changed_in_place_is_named_and_its_stages_alone_run_again(
    finished: Path, capfd: pytest.CaptureFixture[str], changes: dict[str, Callable[[Path], None]]
) -> None:
    for change in changes.values():
        change(finished)
    code, said = again(finished, capfd)
    assert code == 0, said
    assert "teach: already done, skipped" in said
    for stage in ("truncate", "train"):
        named = ", ".join(f"the {part} of student.model changed" for part in changes)
        assert f"rerunning {stage}: {named}" in said
    assert all(f"the {part} of eval.model changed" in said for part in changes)
    assert "rerunning eval: " in said
    # nothing is asked of the student here
    assert "rerunning align: the prefixes changed" in said or "align: already done" in said
    manifest = json.loads((finished / "run/manifest.json").read_text())
    hashes = models.fingerprints("student", configs.ModelConfig(model=str(finished / "model")))
    assert hashes.items() <= manifest["stages"]["train"]["keys"].items()
    # and then nothing
    code, said = again(finished, capfd)
    assert code == 0 and said.count("already done, skipped") == 5, said


def test_an_adapter_changed_in_place_is_refused_by_eval_and_made_again_by_run(
    finished: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    adapter = finished / "run/adapter"
    whole = (adapter / ADAPTER_WEIGHTS).read_bytes()
    in_place(adapter / ADAPTER_WEIGHTS, lambda data: data[:-64] + bytes(64))
    code, said = again(finished, capfd, "eval")
    assert code == 1 and "is not the adapter that this run's training wrote" in said
    with pytest.raises(KitError, match="is not the adapter that this run's training wrote"):
        export(Export(finished / "run", Progress(quiet=True)))
    code, said = again(finished, capfd)
    assert code == 0, said
    assert "train: output missing or modified; regenerating" in said
    assert "eval: already done, skipped" in said, "the adapter is the one that was evaluated"
    assert (adapter / ADAPTER_WEIGHTS).read_bytes() == whole


def test_scores_of_another_adapter_are_not_compared(
    finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(finished / "run", other)
    command = ["compare", str(finished / "run"), str(other), "--out", str(tmp_path / "page.html")]
    assert palign.main([*command, "--json"]) == 0
    assert len(json.loads(capfd.readouterr().out)["groups"]) == 1
    # scored on other weights of the same name: another group, and the difference is named
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["stages"]["eval"]["keys"]["weights of eval.model"] = "0" * 32
    (other / "manifest.json").write_text(json.dumps(manifest))
    assert palign.main([*command, "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert len(result["groups"]) == 2 and "weights of eval.model" in result["differs"]
    # scores that outlive their adapter
    in_place(other / "adapter" / ADAPTER_WEIGHTS, flip_last_byte)
    assert palign.main(command) == 1
    assert "are of another adapter than its adapter/ is now" in capfd.readouterr().err
    assert ADAPTER in manifest["stages"]["eval"]["keys"]


@pytest.mark.parametrize("command", ["eval", "export"])
def test_an_adapter_is_refused_on_another_base_of_the_same_shape(
    finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], command: str
) -> None:
    base = tmp_path / "model"
    shutil.copytree(finished / "model", base)
    shutil.copytree(finished / "run", tmp_path / "run")
    scale_weights(tmp_path)
    config = (finished / "config.yaml").read_text().replace(str(finished), str(tmp_path))
    for name in ("config.yaml", "run/config.yaml"):
        (tmp_path / name).write_text(config)
    argument = tmp_path / {"eval": "config.yaml", "export": "run"}[command]
    assert palign.main([command, str(argument)]) == 1
    said = " ".join(capfd.readouterr().err.split())
    assert f"was trained on another model than {base} is now: another weights" in said
    assert f"Use the base it was trained on ({finished / 'model'})" in said


# --- Damaged adapters ---


def rename_keys(tensors: dict) -> None:
    for name in list(tensors):
        if "layers.1." in name:
            tensors[name.replace("layers.1.", "layers.7.")] = tensors.pop(name)


def zero_b(tensors: dict) -> None:
    for name in tensors:
        if "lora_B" in name:
            tensors[name].zero_()


def put_nan(tensors: dict) -> None:
    tensors[min(tensors)].view(-1)[3] = torch.nan


def in_tensors(change: Callable[[dict], None]) -> Callable[[Path], None]:
    return lambda adapter: edit_tensors(adapter / ADAPTER_WEIGHTS, change)


def in_settings(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda adapter: in_place(adapter / "adapter_config.json", change)


DAMAGES = {
    "truncated": (
        lambda adapter: in_place(adapter / ADAPTER_WEIGHTS, lambda data: data[:-100]),
        "cannot be loaded",
    ),
    "empty": (lambda adapter: in_place(adapter / ADAPTER_WEIGHTS, lambda _: b""), "cannot be"),
    "zero B": (in_tensors(zero_b), "it has no effect"),
    "zero alpha": (in_settings(set_key("lora_alpha", 0)), "it has no effect"),
    "NaN": (in_tensors(put_nan), r"layers\.0.* holds NaN or infinity"),
    "other keys": (in_tensors(rename_keys), r"tensors do not match the model's: .*layers\.[17]"),
    "a tensor too few": (in_tensors(lambda t: t.pop(min(t))), "1 of its tensors do not match"),
    "unknown type": (in_settings(set_key("peft_type", "SOMETHING")), "its type is SOMETHING"),
    "another type": (in_settings(set_key("peft_type", "IA3")), "its type is IA3"),
    "no settings": (in_settings(lambda data: data[: len(data) // 2]), "cannot be loaded"),
    "no base": (lambda adapter: in_place(adapter / BASE, lambda data: data[:-5]), "cannot be"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_adapter_is_refused_by_name(finished: Path, tmp_path: Path, damage: str) -> None:
    change, message = DAMAGES[damage]
    adapter = tmp_path / "adapter"
    shutil.copytree(finished / "run/adapter", adapter)
    trained = adapter_hash(adapter)
    change(adapter)
    with pytest.raises(KitError, match=message) as caught:
        models.load_model(str(finished / "model"), "fp32", str(adapter))
    assert str(adapter) in str(caught.value)
    with pytest.raises(KitError, match="changed, damaged or replaced"):
        check_trained(adapter, trained)


# --- Damaged models ---


@pytest.mark.parametrize("dtype", ["fp32", "nf4"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_base_that_is_not_finite_is_refused_with_the_tensors_name(
    tiny: str,  # noqa: F811
    tmp_path: Path,
    value: float,
    dtype: str,
) -> None:
    shutil.copytree(tiny, tmp_path / "model")
    name = "model.layers.1.mlp.up_proj.weight"

    def damage(tensors: dict) -> None:
        tensors[name][5, 7] = value

    edit_tensors(tmp_path / "model" / WEIGHTS, damage)
    with pytest.raises(KitError, match=rf"{tmp_path}.*{name} holds NaN or infinity"):
        models.load_model(str(tmp_path / "model"), dtype)


def test_a_truncated_file_of_weights_is_named(tiny: str, tmp_path: Path) -> None:  # noqa: F811
    shutil.copytree(tiny, tmp_path / "model")
    path = tmp_path / "model" / WEIGHTS
    in_place(path, lambda data: data[:-1000])
    with pytest.raises(KitError, match=rf"{path} is damaged .*delete it and fetch it again"):
        models.load_model(str(tmp_path / "model"))


def test_a_gguf_that_is_not_finite_is_refused_with_the_tensors_name(tmp_path: Path) -> None:
    import numpy as np
    from gguf import GGUFReader

    from kit.backends.gguf import load

    path = tmp_path / "damaged.gguf"
    shutil.copy(models.gguf_file("smollm2-135m"), path)
    [tensor] = [t for t in GGUFReader(path).tensors if t.name == "output_norm.weight"]
    data = np.memmap(path, np.float32, "r+", int(tensor.data_offset), (8,))
    data[3] = np.nan
    data.flush()
    with pytest.raises(KitError, match=r"damaged\.gguf.*output_norm\.weight"):
        load(path)


# --- Copies in the cache ---


@pytest.fixture
def gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PALIGN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    return tmp_path / "model.gguf"


def write_copy(folder: Path) -> None:
    folder.mkdir()
    (folder / WEIGHTS).write_bytes(b"weights" * 99)
    (folder / "config.json").write_text("{}")


@pytest.mark.parametrize(
    "damage",
    [
        lambda copy: in_place(copy / WEIGHTS, lambda data: data[:50] + bytes(50) + data[100:]),
        lambda copy: in_place(copy / WEIGHTS, lambda data: data[:-1]),
        lambda copy: (copy / WEIGHTS).unlink(),
        lambda copy: (copy / "more.safetensors").touch(),
        lambda copy: copy.with_name(f"{copy.name}.sha256").write_text(""),
    ],
)
def test_a_damaged_copy_is_noticed_and_made_again(
    gguf: Path, capfd: pytest.CaptureFixture[str], damage: Callable[[Path], None]
) -> None:
    copy = models.cached_copy(gguf, "-x", write_copy)
    assert models.cached_copy(gguf, "-x", lambda _: pytest.fail("it is intact")) == copy
    damage(copy)
    assert models.cached_copy(gguf, "-x", write_copy) == copy
    assert f"{copy} is damaged; making it again" in capfd.readouterr().err
    assert (copy / WEIGHTS).read_bytes() == b"weights" * 99 and len(list(copy.iterdir())) == 2


@pytest.mark.parametrize("error", [OSError(28, "No space left"), SafetensorError("I/O error")])
def test_a_copy_that_cannot_be_written_leaves_nothing_and_is_no_defect(
    gguf: Path, error: Exception
) -> None:
    def fail(folder: Path) -> None:
        write_copy(folder)
        raise error

    with pytest.raises(KitError, match=r"model\.gguf cannot be cached .*Free some space"):
        models.cached_copy(gguf, "-x", fail)
    left = {path.name for path in models.cache_folder().iterdir()}
    assert left - {"hashes"} == {".lock"}


def test_what_killed_conversions_left_is_removed_by_the_next_one(gguf: Path) -> None:
    cache = models.cache_folder()
    (cache / "dead-1.part").mkdir(parents=True)
    (cache / "dead.f16.part").write_text("half a file")
    models.cached_copy(gguf, "-x", write_copy)
    assert not list(cache.glob("*.part"))


# --- Chat templates ---

NAMED = {"default": CHATML, "tool_use": "{{ tools }}"}


def in_config(value: object) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "chat_template.jinja").unlink()
        in_place(folder / "tokenizer_config.json", set_key("chat_template", value))

    return write


def as_files(**named: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "chat_template.jinja").unlink()
        (folder / "additional_chat_templates").mkdir()
        for name, text in named.items():
            place = folder / "additional_chat_templates" / f"{name}.jinja"
            if name == "default":
                place = folder / "chat_template.jinja"
            place.write_text(text)

    return write


@pytest.fixture
def tokenizer_folder(tiny: str, tmp_path: Path) -> Path:  # noqa: F811
    shutil.copytree(tiny, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    "write",
    [
        in_config(CHATML),
        in_config([{"name": name, "template": text} for name, text in NAMED.items()]),
        in_config(NAMED),
        as_files(default=CHATML),
        as_files(**NAMED),
    ],
)
def test_of_several_templates_the_default_is_taken(
    tokenizer_folder: Path, write: Callable[[Path], None]
) -> None:
    write(tokenizer_folder)
    tokenizer = models.load_tokenizer(str(tokenizer_folder))
    assert tokenizer.template == CHATML
    assert "<|im_start|>user\nq<|im_end|>" in prompts.render_text(tokenizer, "q")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (in_config({"rag": CHATML, "tool_use": CHATML}), "rag, tool_use, none of them .* default"),
        (as_files(tool_use=CHATML), "tool_use, none of them called default"),
        (in_config("{{ nonsense("), "chat template fails"),
        (in_config("{{ 1 + messages }}"), "chat template fails"),
        (in_config("{{ raise_exception('no') }}"), "chat template fails: no"),
        (in_config([{"nothing": 1}]), "cannot be loaded|chat template"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_at_loading(
    tokenizer_folder: Path, write: Callable[[Path], None], message: str
) -> None:
    write(tokenizer_folder)
    with pytest.raises(KitError, match=message):
        models.load_tokenizer(str(tokenizer_folder))


def test_a_gguf_that_has_only_named_templates_is_refused(tmp_path: Path) -> None:
    """The header of a real file with its template renamed, over weights of zeros."""
    from gguf import GGUFReader

    from kit.backends import tokenizer_alone

    real = models.gguf_file("smollm2-135m")
    with open(real, "rb") as file:
        header = file.read(GGUFReader(real).data_offset)
    names = [b"tokenizer.chat_template", b"tokenizer.chat_template.rag"]
    old, new = (len(name).to_bytes(8, "little") + name for name in names)
    assert header.count(old) == 1
    with open(tmp_path / "named.gguf", "wb") as file:
        file.write(header.replace(old, new))
        file.truncate(real.stat().st_size + 64)
    with pytest.raises(KitError, match="templates rag, none of them called default"):
        tokenizer_alone(str(tmp_path / "named.gguf"))


@pytest.mark.parametrize("ignored", ["{% if message.role == 'user' %}", "{% if loop.last %}"])
def test_a_system_message_that_the_template_leaves_out_is_an_error(ignored: str) -> None:
    loop = "{% for message in messages %}IF{{ message.content }}{% endif %}{% endfor %}"
    template = loop.replace("IF", ignored)
    assert prompts.render_text(Toy(template), "q") == "q"
    with pytest.raises(KitError, match="leaves out the system message"):
        prompts.render(Toy(template), "q", ModelConfig(system="be brief, <|im_end|>"))


# --- Tokenizers that put a space before what they encode ---

PIECES = ["▁", "\n", "4", "2", "42", "▁42", ":", "?", "[", "▁[", "Y", "N", "]", "▁?", "▁x", "x"]


def spaced_tokenizer(scheme: str, template: str | None) -> models.HfTokenizer:
    """A tokenizer of the SentencePiece kind, as Llama 2 and Mistral have it."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "<s>", "</s>", *PIECES]
    vocabulary = {name: number for number, name in enumerate(names)}
    merges = [("4", "2"), ("▁", "42"), ("▁", "["), ("▁", "?"), ("▁", "x")]
    inner = Tokenizer(kinds.BPE(vocabulary, merges, unk_token="<unk>"))
    space = {"replacement": "▁", "prepend_scheme": scheme, "split": False}
    inner.pre_tokenizer = pre_tokenizers.Metaspace(**space)
    inner.decoder = decoders.Metaspace(**space)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = template
    return models.HfTokenizer(fast, frozenset({2}))


TEMPLATES = [
    ("{{ messages[0].content }}{{ '\n' }}", "["),  # ends in a newline: the text goes on
    ("{{ messages[0].content }}[x]", "▁["),  # as [/INST]: the answer is a word of its own
]


def with_spaces(test: Callable) -> Callable:
    schemes = pytest.mark.parametrize("scheme", ["first", "always", "never"])
    return schemes(pytest.mark.parametrize(("template", "label"), TEMPLATES)(test))


@with_spaces
def test_a_target_is_trained_as_it_stands_after_its_prompt(
    scheme: str, template: str, label: str
) -> None:
    tokenizer = spaced_tokenizer(scheme, template)
    config = configs.resolve({"prompts": {"instruction": "x"}}, "test")
    row = TrainRow(instruction="x", input="?", output="[42]")
    [example], _ = prepare([row], tokenizer, config)
    target = example.ids[example.prompt_tokens :]
    names = tokenizer.inner.convert_ids_to_tokens(list(target))
    assert names == ["[" if scheme == "never" else label, "42", "]", "</s>"]
    if template.endswith("{{ '\n' }}"):
        text = prompts.render_text(tokenizer, "x\n?")
        assert list(example.ids[:-1]) == tokenizer.encode(f"{text}[42]")


@with_spaces
def test_gold_and_labels_are_encoded_where_they_stand(
    scheme: str, template: str, label: str
) -> None:
    tokenizer = spaced_tokenizer(scheme, template)
    raw = {"judge": {"kind": "answer", "labels": ["[Y]", "[N]"]}, "prompts": {"answer_cue": "x:"}}
    backend = SimpleNamespace(tokenizer=tokenizer, context_tokens=99)
    row = PrefixRow(
        id="r", question="?", answer="42", trace="x", end=1, sentences=1, sentences_total=1,
        ratio=1.0, sufficient=True,
    )  # fmt: skip
    with Judge(configs.resolve(raw, "test"), backend) as judge:
        request = judge.request(row, "x")
        shared = judge.shared_label_tokens
    tokens = tokenizer.inner.convert_ids_to_tokens
    # as the whole text is encoded
    assert [tokens(list(wanted)) for _, wanted in request.reads] == [["42"]]
    assert tokens(list(request.ids[-2:])) == ["x", ":"]
    expected = "[" if scheme == "never" else label
    assert tokens(list(shared)) == [expected]
