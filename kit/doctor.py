"""What this machine has and lacks: each finding with the command that fixes it.

A check that fails is a finding, never a crash: native libraries are tried in processes of their own. Nothing is
installed or downloaded; one request asks whether the hub answers.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
ALONE = {
    "CUDA",
    "NF4 training",
    "gradient",
    "llama.cpp",
}  # tried in a process of their own, which they may kill or hang
ALONE_SECONDS = 300
Finding = tuple[
    bool | None, str
]  # ok (None: absent, but not every run needs it) and what was found


def examine() -> dict[str, Any]:
    """Examine everything; seconds, most of them spent importing torch.

    Returns:
        {ok: nothing that every run needs is broken, checks: [{name, ok, found, fix: a command, or empty}]}.
    """
    with ThreadPoolExecutor(4) as pool:
        checks = list(pool.map(_examine, EXAMINED))
    return {"ok": all(check["ok"] is not False for check in checks), "checks": checks}


def show(result: dict[str, Any]) -> None:
    """Print a result of `examine` for people; commands stand on lines of their own, to be copied."""
    for check in result["checks"]:
        print(
            f"{ {True: 'ok', False: 'FAIL', None: 'note'}[check['ok']]:<5} {check['name']:<15} {check['found']}"
        )
        print(f"{'':<21} -> {check['fix']}\n" if check["fix"] else "", end="")
    print("All that a run needs is here." if result["ok"] else "Fix the FAIL items and rerun.")


def _examine(name: str) -> dict[str, Any]:
    check, fix = EXAMINED[name]
    try:
        ok, found = _alone(name) if name in ALONE else check()
    except Exception as error:  # whatever a broken installation raises is the finding
        ok, found = False, f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
    return {"name": name, "ok": ok, "found": found, "fix": "" if ok else fix}


def _alone(name: str) -> Finding:
    command = [sys.executable, "-m", "kit.doctor", name]
    child = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=ALONE_SECONDS, check=False
    )
    if child.returncode == 0:
        return tuple(json.loads(child.stdout.splitlines()[-1]))
    return False, (
        child.stderr.strip().splitlines() or [f"its process died with code {child.returncode}"]
    )[-1][:400]


def _packages() -> Finding:
    wrong, pins = (
        [],
        re.findall(
            r"^([\w.-]+)==([\w.]+)", (ROOT / "requirements.txt").read_text(encoding="utf-8"), re.M
        ),
    )
    for name, pin in pins:
        have = next((package.version for package in metadata.distributions(name=name)), "missing")
        wrong += [f"{name} {have} (pinned {pin})"] if have.split("+")[0] != pin else []
    return not wrong, "; ".join(wrong) or f"{len(pins)} as pinned"


def _room(free: int, least_gib: int, where: str) -> Finding:
    return free > least_gib << 30 or None, f"{free / (1 << 30):.1f} GiB free{where}"


def _cuda() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return None, f"no card that torch {torch.__version__} sees; runs use the CPU"
    return True, f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"


def _nf4() -> Finding:
    """A layer in NF4, forward and backward, beside the same layer in 32 bits."""
    import bitsandbytes as bnb
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight, rows = torch.randn(64, 128), torch.randn(4, 128, requires_grad=True)
    layer = bnb.nn.Linear4bit(128, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    layer.load_state_dict({"weight": weight})
    out = layer.to(device)(rows.to(device)).cpu()
    out.sum().backward()
    pairs = (out, rows @ weight.T), (rows.grad, weight.sum(0).expand_as(rows))
    forward, backward = (((ours - exact).norm() / exact.norm()).item() for ours, exact in pairs)
    said = f"{bnb.__version__} on {device}: forward off by {forward:.2f}, backward off by {backward:.2f}"
    return max(forward, backward) < 0.25, said  # four bits are off by about a tenth


def _gradient() -> Finding:
    """The check that precedes every training, on the packaged model."""
    import torch

    # a CPU without instructions for bf16 takes some 20 times as long in it: nobody trains so
    has_bf16 = torch.cuda.is_available() or torch.cpu.get_capabilities().get("avx512_bf16")
    dtypes = ("fp32", "int8", "nf4", "bf16") if has_bf16 else ("fp32", "int8", "nf4")
    errors = ", ".join(f"{dtype} {_gradient_error(dtype):.1%}" for dtype in dtypes)
    kernels = torch.backends.cpu.get_cpu_capability()
    return True, f"off the loss's slope by {errors}; CPU kernels: {kernels}"


def _gradient_error(dtype: str) -> float:
    """How far the gradient is from the loss's slope, as a share; KitError: too far to train."""
    import torch

    from kit.core.config import resolve
    from kit.models import load_tokenizer
    from kit.training.gradient_check import check_gradient
    from kit.training.trainer import make_model

    model = make_model(resolve({"train": {"dtype": dtype}}, "doctor")).train()
    text = "Tom has 3 apples and buys 4. He then has 3 + 4 = 7 apples."
    ids = torch.tensor([load_tokenizer("smollm2-135m").encode(text)], device=model.device)
    autocast = torch.autocast("cuda", torch.bfloat16, enabled=ids.is_cuda and dtype != "fp32")

    def loss() -> torch.Tensor:
        with autocast:
            return model(input_ids=ids, labels=ids)["loss"]

    slopes = check_gradient(model, lambda: loss().backward(), loss)
    return max(one.error for one in slopes)


def _llama() -> Finding:
    import llama_cpp

    from kit.models import gguf_file

    llama_cpp.Llama(str(gguf_file("smollm2-135m")), vocab_only=True, verbose=False).close()
    offload, card = llama_cpp.llama_supports_gpu_offload(), shutil.which("nvidia-smi")
    said = "GPU offload" if offload else f"no GPU offload{', though there is a card' * bool(card)}"
    return (
        offload or not card
    ) or None, f"{llama_cpp.__version__}, loads the packaged model, {said}"


def _hub() -> Finding:
    from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE
    from huggingface_hub.utils import get_session

    if HF_HUB_OFFLINE:
        return None, "HF_HUB_OFFLINE is set: local files only"
    try:
        return True, f"{ENDPOINT} answers {get_session().head(ENDPOINT, timeout=3).status_code}"
    except Exception as failure:  # whatever its HTTP library raises means the same
        return None, f"{ENDPOINT} does not answer ({failure}): local files only"


AGAIN = "python -m pip install --force-reinstall --no-deps -c requirements.txt"  # one package, as pinned
EXAMINED: dict[str, tuple[Any, str]] = {  # name: (check, the command that fixes it)
    "Python": (
        lambda: (sys.version_info >= (3, 11), platform.python_version()),
        "python3.11 -m venv venv",
    ),
    "packages": (_packages, "python -m pip install -r requirements.txt"),
    "C++ compiler": (
        lambda: (
            bool(shutil.which("c++")) or None,
            shutil.which("c++") or "none; only building llama.cpp needs one",
        ),
        "apt-get install g++",
    ),
    "CUDA": (
        _cuda,
        "nvidia-smi && python -m pip install --force-reinstall -c requirements.txt torch",
    ),
    "NF4 training": (_nf4, f"{AGAIN} bitsandbytes"),
    "gradient": (_gradient, f"{AGAIN} torch bitsandbytes peft"),
    "llama.cpp": (
        _llama,
        f'CMAKE_ARGS="$(command -v nvcc >&2 && echo -DGGML_CUDA=on)" {AGAIN} llama-cpp-python',
    ),
    "memory": (
        lambda: _room(psutil.virtual_memory().available, 4, f", {os.cpu_count()} cores"),
        "close other programs, or run with teacher.max_num_seqs=2 train.micro_batch_size=1",
    ),
    "disk": (
        lambda: _room(shutil.disk_usage(".").free, 5, " here"),
        "run with out=DIR on a disk with room",
    ),
    "model hub": (_hub, "unset HF_HUB_OFFLINE; behind a mirror: export HF_ENDPOINT=URL"),
}

if __name__ == "__main__":
    print(json.dumps(EXAMINED[sys.argv[1]][0]()))
