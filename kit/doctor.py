"""doctor: what this machine has, and what is missing, each finding with the command that fixes it.

A check that fails is a finding, never a crash: native libraries are tried in processes of their
own. Nothing is installed or downloaded; one request asks whether the hub answers.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import psutil

from kit import Json
from kit.doctor_full import FULL_CHECKS, REINSTALL, Finding

ROOT = Path(__file__).resolve().parents[1]
# in a process of their own, which they may kill or hang
ALONE = {"CUDA", "gradient", "llama.cpp", *FULL_CHECKS}
ALONE_SECONDS = 300
LABELS = {True: "ok", False: "FAIL", None: "note"}


def examine(full: bool = False, tell: Callable[[Json], None] = lambda check: None) -> Json:
    """Run all checks; about a minute, most of it for the gradients of the packaged model.

    Args:
        full: also those of doctor_full.py; some minutes.
        tell: called with each check as it ends, in the order of the result.

    Returns:
        {ok: nothing that every run needs is broken, checks: [{name, ok, found, fix: a command, or
        empty}]}.
    """
    checks = []
    # one after the other: some measure
    for name in (*CHECKS, *FULL_CHECKS) if full else CHECKS:
        check = _examine(name)
        tell(check)
        checks.append(check)
    return {"ok": all(check["ok"] is not False for check in checks), "checks": checks}


def in_words(check: Json) -> str:
    """A check as a line of a table; what to do has a line of its own, to be copied."""
    line = f"{LABELS[check['ok']]:<5} {check['name']:<15} {check['found']}"
    return f"{line}\n{'':<21} -> {check['fix']}" if check["fix"] else line


def show(result: Json) -> None:
    """Print what a result of `examine` comes to."""
    print("Everything a run needs is here." if result["ok"] else "Fix the FAIL items and rerun.")


def _examine(name: str) -> Json:
    check, fix = {**CHECKS, **FULL_CHECKS}[name]
    try:
        ok, found = _run_alone(name) if name in ALONE else check()
    except Exception as error:  # whatever a broken installation raises is the finding
        ok = False
        found = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
    return {"name": name, "ok": ok, "found": found, "fix": "" if ok else fix}


def _run_alone(name: str) -> Finding:
    command = [sys.executable, "-m", "kit.doctor", name]
    # packages may lie where only this variable says, as a cluster's modules do
    search_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    child = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": search_path},
        capture_output=True,
        text=True,
        timeout=ALONE_SECONDS,
        check=False,
    )
    if child.returncode == 0:
        return tuple(json.loads(child.stdout.splitlines()[-1]))
    last_words = child.stderr.strip().splitlines()
    return False, last_words[-1][:600] if last_words else f"died with code {child.returncode}"


def _python() -> Finding:
    return sys.version_info >= (3, 11), platform.python_version()


def _packages() -> Finding:
    requirements = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    pins = re.findall(r"^([\w.-]+)==([\w.]+)", requirements, re.M)
    wrong = []
    for name, pin in pins:
        installed = [package.version for package in metadata.distributions(name=name)]
        version = installed[0] if installed else "missing"
        if version.split("+")[0] != pin:
            wrong.append(f"{name} {version} (pinned {pin})")
    return not wrong, "; ".join(wrong) or f"{len(pins)} as pinned"


def _compiler() -> Finding:
    path = shutil.which("c++")
    return bool(path) or None, path or "none; only building llama.cpp needs one"


def _room(free_bytes: int, least_gib: int, where: str) -> Finding:
    free_gib = free_bytes / (1 << 30)
    return free_gib > least_gib or None, f"{free_gib:.1f} GiB free{where}"


def _memory() -> Finding:
    return _room(psutil.virtual_memory().available, 4, f", {os.cpu_count()} cores")


def _disk() -> Finding:
    return _room(shutil.disk_usage(".").free, 5, " here")


def _cuda() -> Finding:
    import torch

    from kit.core.card import check_card

    card = check_card()
    if not card:
        return None, f"no card that torch {torch.__version__} sees; runs use the CPU"
    return True, card


def _gradient() -> Finding:
    """The check that precedes every training, on the packaged model."""
    import torch

    # a CPU without instructions for bf16 takes some 20 times as long in it: nobody trains that way
    has_bf16 = torch.cuda.is_available() or torch.cpu.get_capabilities().get("avx512_bf16")
    dtypes = ("fp32", "int8", "nf4", "bf16") if has_bf16 else ("fp32", "int8", "nf4")
    losses = {}
    errors = []
    for dtype in dtypes:
        losses[dtype], error = _check_gradient(dtype)
        errors.append(f"{dtype} off by {error:.1%}, loss {losses[dtype]:.2f}")
    # quantized weights compute about the same
    ok = max(losses.values()) < losses["fp32"] + 0.5
    return ok, f"{'; '.join(errors)}; CPU kernels {torch.backends.cpu.get_cpu_capability()}"


def _check_gradient(dtype: str) -> tuple[float, float]:
    """A loss, and how far its gradient is from its slope; KitError: too far to train."""
    import torch

    from kit.core.card import half_dtype
    from kit.core.config import resolve
    from kit.models import load_tokenizer
    from kit.training.gradient_check import check_gradient
    from kit.training.trainer import make_model

    model = make_model(resolve({"train": {"dtype": dtype}}, "doctor")).train()
    text = "Tom has 3 apples and buys 4. He then has 3 + 4 = 7 apples."
    ids = torch.tensor([load_tokenizer("smollm2-135m").encode(text)], device=model.device)
    autocast = torch.autocast("cuda", half_dtype(), enabled=ids.is_cuda and dtype != "fp32")

    def loss() -> torch.Tensor:
        with autocast:
            return model(input_ids=ids, labels=ids)["loss"]

    slopes = check_gradient(model, lambda: loss().backward(), loss)
    return loss().item(), max(one.error for one in slopes)


def _llama() -> Finding:
    import llama_cpp

    from kit.models import gguf_file

    llama_cpp.Llama(str(gguf_file("smollm2-135m")), vocab_only=True, verbose=False).close()
    loads = f"{llama_cpp.__version__}, loads the packaged model"
    if llama_cpp.llama_supports_gpu_offload():
        return True, f"{loads}, GPU offload"
    if shutil.which("nvidia-smi"):
        return None, f"{loads}, built without CUDA though there is a card; see the README"
    return True, f"{loads}, no GPU offload"


def _hub() -> Finding:
    from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE
    from huggingface_hub.utils import get_session

    if HF_HUB_OFFLINE:
        return None, "HF_HUB_OFFLINE is set: local files only"
    try:
        status = get_session().head(ENDPOINT, timeout=3).status_code
    except Exception as failure:  # whatever its HTTP library raises means the same
        return None, f"{ENDPOINT} does not answer ({failure}): local files only"
    return True, f"{ENDPOINT} answers {status}"


# name: (check, the command that fixes it)
CHECKS: dict[str, tuple[Callable[[], Finding], str]] = {
    "Python": (_python, "python3.11 -m venv venv"),
    "packages": (_packages, "python -m pip install -r requirements.txt"),
    "C++ compiler": (_compiler, "apt-get install g++"),
    "CUDA": (
        _cuda,
        "nvidia-smi; driver 580 or newer: python -m pip install --force-reinstall -c "
        "requirements.txt torch; older: the same with --index-url "
        "https://download.pytorch.org/whl/cu126",
    ),
    "gradient": (_gradient, f"{REINSTALL} torch bitsandbytes peft"),
    "llama.cpp": (
        _llama,
        # without --no-cache-dir pip takes the wheel that it built before, whatever CMAKE_ARGS says
        'CMAKE_ARGS="$(command -v nvcc >&2 && echo -DGGML_CUDA=on)" '
        f"{REINSTALL} --no-cache-dir llama-cpp-python",
    ),
    "memory": (
        _memory,
        "close other programs, or run with teacher.max_num_seqs=2 train.micro_batch_size=1",
    ),
    "disk": (_disk, "run with out=DIR on a disk with free space"),
    "model hub": (_hub, "unset HF_HUB_OFFLINE; through a mirror: export HF_ENDPOINT=URL"),
}

if __name__ == "__main__":
    print(json.dumps({**CHECKS, **FULL_CHECKS}[sys.argv[1]][0]()))
