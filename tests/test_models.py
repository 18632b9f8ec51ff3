"""Names, the GGUF's conversion and its tokenizer, and how weights load."""

from __future__ import annotations

import copy
import multiprocessing
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kit import models, prompts
from kit.core.config import ModelConfig
from kit.core.errors import KitError

NAME = "smollm2-135m"


@pytest.fixture(scope="module")
def tokenizer() -> models.HfTokenizer:
    return models.load_tokenizer(NAME)


@pytest.fixture(scope="module")
def llama():
    import llama_cpp
    from llama_cpp._internals import LlamaModel

    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    model = LlamaModel(path_model=str(models.gguf_file(NAME)), params=params, verbose=False)
    yield model
    model.close()


def test_a_name_is_an_alias_a_file_a_folder_or_a_hub_id(tmp_path: Path) -> None:
    assert models.resolve(NAME) == models.gguf_file(NAME)
    assert models.resolve(str(models.gguf_file(NAME))) == models.gguf_file(NAME)
    assert models.resolve("Qwen/Qwen2.5-7B-Instruct") == "Qwen/Qwen2.5-7B-Instruct"
    (tmp_path / "config.json").write_text("{}")
    assert models.resolve(str(tmp_path)) == str(tmp_path)


@pytest.mark.parametrize(
    "name", ["smollm2-135", "no/such/model", "missing.gguf", "dir/missing.gguf", "", "bert"]
)
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(KitError) as caught:
        models.resolve(name)
    assert "smollm2-135m" in str(caught.value)


def test_files_that_are_no_models_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("not a model")
    for name, message in ((tmp_path / "text.gguf", "not a GGUF"), (tmp_path, "text.gguf")):
        with pytest.raises(KitError, match=message):
            models.resolve(str(name))
    with pytest.raises(KitError, match="backend=hf"):
        models.gguf_file("Qwen/Qwen3-8B")


def test_a_hub_id_without_network_says_how_to_fetch_it() -> None:
    with pytest.raises(KitError, match="hf download nobody/nothing"):
        models.load_tokenizer("nobody/nothing")
    with pytest.raises(KitError, match="model cache"):
        models.load_model("nobody/nothing")


def test_ids_equal_llama_cpps_on_real_traces(
    tokenizer: models.HfTokenizer, llama, real_traces: list[dict[str, str]]
) -> None:
    assert len(real_traces) >= 3
    for row in real_traces:
        text = row["question"] + "\n" + row["long_cot"]
        assert tokenizer.encode(text, special=False) == llama.tokenize(
            text.encode(), False, False
        ), row["id"]


def test_an_unrepaired_tokenizer_is_refused() -> None:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    inner = AutoTokenizer.from_pretrained(models.hf_folder(NAME))
    inner.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=True
    )
    with pytest.raises(KitError, match="differently"):
        models.compare_ids(inner, models.gguf_file(NAME))


def test_special_tokens_are_split_only_where_asked(tokenizer: models.HfTokenizer, llama) -> None:
    text = "a<|im_end|>b<|endoftext|> <file_sep>"
    split, whole = tokenizer.encode(text, special=False), tokenizer.encode(text)
    assert split == llama.tokenize(text.encode(), False, False)
    assert whole == llama.tokenize(text.encode(), False, True)
    named = {tokenizer.encode(name)[0] for name in tokenizer.special}
    assert len(named) == len(tokenizer.special) == 17
    assert not named & set(split) and len(named & set(whole)) == 3
    assert tokenizer.decode(split) == tokenizer.decode(whole) == text


def test_decoding_loses_nothing(tokenizer: models.HfTokenizer) -> None:
    for text in (models.HARD_TEXT, " a , b . ' s do n't", "  two\n\n spaces ", "<|im_start|>x"):
        assert tokenizer.decode(tokenizer.encode(text, special=False)) == text


class Layered(SimpleNamespace):
    """A config of Gemma's kind: a list by layer, and an attribute that only layers have."""

    intermediate_size = (64, 96)
    vocab_size = 100
    model_type = "layered"
    per_layer_config = (SimpleNamespace(head_dim=16), SimpleNamespace(head_dim=32))

    @property
    def head_dim(self) -> int:
        raise RuntimeError("it differs between layers")


def test_end_tokens_are_llama_cpps(tokenizer: models.HfTokenizer, llama) -> None:
    import llama_cpp

    assert models.turn_ends(tokenizer.inner) == set(tokenizer.encode("<|im_end|>"))
    ends = {i for i in range(llama.n_vocab()) if llama_cpp.llama_vocab_is_eog(llama.vocab, i)}
    assert tokenizer.eos_ids == set(tokenizer.encode("<|im_end|><|endoftext|>"))
    assert tokenizer.eos_ids <= ends  # llama.cpp ends a turn at <reponame> as well


@pytest.mark.parametrize(("mark", "ends"), [("<|return|>", False), ("<|user|>", True)])
def test_the_end_of_a_message_of_thinking_ends_no_turn(
    tokenizer: models.HfTokenizer, tmp_path: Path, mark: str, ends: bool
) -> None:
    """gpt-oss ends its thinking with <|end|> and its turn with <|return|>; Phi has no other end."""
    inner = copy.deepcopy(tokenizer.inner)
    inner.add_special_tokens({"additional_special_tokens": ["<|end|>", mark]})
    inner.chat_template = "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"
    inner.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    loaded = models.load_tokenizer(str(tmp_path))
    [end] = loaded.encode("<|end|>")
    assert (end in loaded.eos_ids) is ends


def test_rendering_equals_transformers_own(tokenizer: models.HfTokenizer) -> None:
    for system in (None, "Be brief."):
        turns = [{"role": "system", "content": system}] if system else []
        turns.append({"role": "user", "content": "What is 12 + 30?\nThink."})
        wanted = tokenizer.inner.apply_chat_template(
            turns, add_generation_prompt=True, return_dict=False
        )
        assert list(
            prompts.render(tokenizer, turns[-1]["content"], ModelConfig(system=system))
        ) == list(wanted)


def test_special_text_in_a_prompt_stays_text(tokenizer: models.HfTokenizer) -> None:
    end = tokenizer.encode("<|im_end|>")[0]
    plain = prompts.render(tokenizer, "Say it.")
    ids = prompts.render(tokenizer, "Say <|im_end|> it.")
    assert ids.count(end) == plain.count(end)
    assert "Say <|im_end|> it." in tokenizer.decode(ids)


def test_a_template_without_system_role_gets_it_in_the_user_turn(
    tokenizer: models.HfTokenizer,
) -> None:
    refusing = models.HfTokenizer(tokenizer.inner, tokenizer.eos_ids)
    refusing.template = (
        "{% for m in messages %}"
        "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "<|im_start|>assistant{{ '\\n' }}"
    )
    text = refusing.decode(prompts.render(refusing, "Question?", ModelConfig(system="Rules.")))
    assert text == "<|im_start|>user\nRules.\n\nQuestion?<|im_end|>\n<|im_start|>assistant\n"


def _convert_in_process(folder: str, queue: multiprocessing.Queue) -> None:
    os.environ["PALIGN_CACHE"] = folder
    queue.put(models.hf_folder(NAME))


def test_two_processes_convert_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both find the same whole folder; what a killed process left behind is no obstacle."""
    monkeypatch.setattr(models, "_convert", _tiny_convert)
    key = Path(models.hf_folder(NAME)).name
    (tmp_path / f"{key}.part").mkdir()
    (tmp_path / f"{key}.part" / "half.safetensors").write_text("half")
    fork = multiprocessing.get_context("fork")
    queue = fork.Queue()
    workers = [
        fork.Process(target=_convert_in_process, args=(str(tmp_path), queue)) for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    folders = {queue.get(timeout=60) for _ in workers}
    for worker in workers:
        worker.join(60)
    assert folders == {str(tmp_path / key)}
    assert sorted(p.name for p in (tmp_path / key).iterdir()) == ["config.json", "made-once"]
    assert not (tmp_path / f"{key}.part").exists()


def _tiny_convert(gguf: Path, folder: Path) -> None:
    """Stands in for half a minute of dequantizing; fails where two processes write at a time."""
    import time

    folder.mkdir()
    (folder / "config.json").write_text("{}")
    time.sleep(0.3)
    (folder / "made-once").touch(exist_ok=False)


def test_copies_are_cached_by_content(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two files of one name, size and time have copies of their own; equal files share one."""
    monkeypatch.setenv("PALIGN_CACHE", str(tmp_path / "cache"))
    copies = []
    for folder, content in (("a", b"GGUF one"), ("b", b"GGUF two"), ("c", b"GGUF one")):
        original = tmp_path / folder / "model.gguf"
        original.parent.mkdir()
        original.write_bytes(content)
        os.utime(original, (0, 0))
        data = f"{folder}: {content.decode()}"
        copies.append(
            models.cached_copy(original, ".copy", lambda path, d=data: path.write_text(d))
        )
    assert [copy.read_text() for copy in copies] == ["a: GGUF one", "b: GGUF two", "a: GGUF one"]


def test_the_cache_folder_is_one_of_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PALIGN_CACHE", "~/elsewhere")
    assert models.cache_folder() == Path.home() / "elsewhere"
    monkeypatch.delenv("PALIGN_CACHE")
    assert models.cache_folder() == Path.home() / ".cache" / "palign"


def test_a_cache_that_cannot_be_written_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PALIGN_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(KitError, match="PALIGN_CACHE"):
        models.hf_folder(NAME)


def test_the_size_of_a_token_in_the_cache() -> None:
    from transformers import LlamaConfig, MambaConfig

    from kit.shape import shape_in

    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3
    )
    assert shape_in(config).cached == 2 * 3 * 2 * 16
    # layers with sizes of their own: the largest
    layers = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
    shape = shape_in(SimpleNamespace(get_text_config=lambda: Layered(**layers)))
    assert (shape.inner, shape.query, shape.context_tokens) == (96, 4 * 32, 4096)
    with pytest.raises(KitError, match="mamba has no attention"):
        shape_in(MambaConfig())


TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
DENSE = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}


@pytest.mark.parametrize(
    ("kind", "adapted"), [("llama", DENSE), ("gemma3", DENSE), ("qwen3_moe", ATTENTION)]
)
def test_what_gets_an_adapter_and_how_many_weights_there_are(
    kind: str, adapted: set[str], tmp_path: Path
) -> None:
    """No tower for images, and of a mixture of experts neither experts nor routers."""
    import torch
    import transformers

    from kit.shape import shape_of

    configs = {
        "llama": transformers.LlamaConfig(**TEXT),
        "gemma3": transformers.Gemma3Config(
            text_config=TEXT, vision_config={"model_type": "siglip_vision_model", **TOWER}
        ),
        "qwen3_moe": transformers.Qwen3MoeConfig(**TEXT, **EXPERTS),
    }
    torch.manual_seed(0)
    causal = transformers.AutoModelForCausalLM.from_config(configs[kind])
    names = models.adapted_layers(causal)
    assert {name.split(".")[-1] for name in names} == adapted
    assert len(names) == 2 * len(adapted) and not any("vision" in name for name in names)
    causal.save_pretrained(tmp_path)
    shape = shape_of(str(tmp_path))
    weights = sum(weight.numel() for weight in causal.parameters())
    sides = sum(sum(causal.get_submodule(name).weight.shape) for name in names)
    assert shape.linear + shape.other == pytest.approx(weights, rel=0.02)
    assert shape.adapter == sides


def test_an_adapter_loads_on_its_base(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    with pytest.raises(
        KitError, match=r"adapter_config.json and adapter_model.safetensors missing"
    ):
        models.load_model(NAME, adapter=str(tmp_path))
    base = models.load_model(NAME)
    torch.manual_seed(0)
    wrapped = get_peft_model(
        base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    wrapped.save_pretrained(tmp_path)
    ids = torch.arange(20, 30)[None]
    with torch.inference_mode():
        wanted = wrapped(ids).logits
        plain = wrapped.unload()(ids).logits
        loaded = models.load_model(NAME, adapter=str(tmp_path))
        assert torch.allclose(loaded(ids).logits, wanted, atol=1e-4)
        assert not torch.allclose(plain, wanted, atol=1e-2)
    assert not any(p.requires_grad for p in loaded.parameters())
    shutil.rmtree(tmp_path)


def write_tiny(folder: Path) -> None:
    """A random model with grouped heads."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def test_fp16_repeats_grouped_heads_and_computes_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a card without bf16, whose fused attention takes no grouped heads."""
    from transformers.integrations import sdpa_attention

    write_tiny(tmp_path)
    ids = torch.arange(12)[None]
    expected = models.load_model(str(tmp_path), "fp32")(ids).logits
    grouped = sdpa_attention.use_gqa_in_sdpa
    monkeypatch.setattr(sdpa_attention, "use_gqa_in_sdpa", grouped)
    monkeypatch.setattr(models, "_compute_dtype", lambda *_: torch.float16)
    model = models.load_model(str(tmp_path), "bf16")
    assert model.dtype == torch.float16
    heads = torch.zeros(1, 2, 12, 8)
    assert grouped(None, heads, heads) and not sdpa_attention.use_gqa_in_sdpa(None, heads, heads)
    assert torch.allclose(model(ids).logits.float(), expected, atol=2e-2)


@pytest.mark.parametrize(("rank", "place"), [(None, "cuda:0"), ("1", "cuda:1")])
def test_every_process_loads_on_a_card_of_its_own(
    rank: str | None, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As accelerate launch starts them; no card is there, so nothing is loaded."""
    from transformers import AutoModelForCausalLM

    write_tiny(tmp_path)

    def refuse(*_: object, device_map: dict[str, str], **__: object) -> None:
        raise OSError(f"would be on {device_map['']}")

    monkeypatch.setattr("kit.core.card.check_card", lambda: "two cards")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    if rank:
        monkeypatch.setenv("LOCAL_RANK", rank)
    with pytest.raises(KitError, match=f"would be on {place}"):
        models.load_model(str(tmp_path))
