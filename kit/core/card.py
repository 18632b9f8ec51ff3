"""The graphics card: whether torch can use the one that is there, and which 16-bit numbers it has.

Memory is in memory.py. Nothing here chooses what a model computes in; kit/models.py does.
"""

import os
import re
import subprocess

import torch

from kit.core.errors import KitError

BF16_CAPABILITY = (8, 0)  # Ampere; older cards emulate bf16, and is_bf16_supported() counts that
# torch's CUDA: the oldest driver that runs it
DRIVERS = {"13": 580, "12": 525}
OLDER_WHEEL = (
    f"python -m pip install --force-reinstall torch=={torch.__version__.split('+')[0]} "
    "--index-url https://download.pytorch.org/whl/cu126"
)
HIDDEN = ("", "-1")  # values of CUDA_VISIBLE_DEVICES with which the user wants none


def check_card() -> str:
    """Make this process's card torch's current one, and say what it is; "" on a CPU.

    Raises:
        KitError: there is a card, but torch cannot use it. A run would take weeks on the CPU.
    """
    if not torch.cuda.is_available():
        _check_driver()
        return ""
    # accelerate launch starts one process per card
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    name = torch.cuda.get_device_name()
    major, minor = torch.cuda.get_device_capability()
    # sm_75, sm_80, ...; a kernel runs on its own and on newer cards
    kernels = re.findall(r"sm_(\d+)\b", " ".join(torch.cuda.get_arch_list()))
    oldest = min(map(int, kernels), default=0)
    if 10 * major + minor < oldest:
        raise KitError(
            f"{name} has compute capability {major}.{minor}; torch {torch.__version__} has "
            f"kernels from {oldest / 10} on.",
            f"Install a wheel for older cards: {OLDER_WHEEL}; or hide the card: "
            "export CUDA_VISIBLE_DEVICES=",
        )
    free, total = torch.cuda.mem_get_info()
    return (
        f"{name}, compute capability {major}.{minor}, CUDA {torch.version.cuda}, "
        f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    )


def half_dtype(wanted: str = "auto") -> torch.dtype:
    """The 16-bit numbers to compute in: fp16 on a card that has no bf16, else bf16.

    Raises:
        KitError: bf16 is wanted of a card that only emulates it.
    """
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() >= BF16_CAPABILITY:
        return torch.bfloat16
    if wanted == "bf16":
        raise KitError(
            f"{torch.cuda.get_device_name()} only emulates bf16, slowly.",
            "Set dtype=auto, which takes fp16 on this card.",
            2,
        )
    return torch.float16


def _check_driver() -> None:
    """Raise KitError where nvidia-smi lists a card that torch does not see."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in HIDDEN:
        return
    command = ["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return
    # a driver without a card is no fault
    if not done.stdout.strip() or "No devices" in done.stdout:
        return
    driver, _, name = done.stdout.splitlines()[0].partition(", ")
    version = torch.__version__
    wheel = torch.version.cuda
    needed = DRIVERS.get(str(wheel).split(".")[0], 0)
    if done.returncode:
        name = "a card"
        reason = f"nvidia-smi fails: {driver}"
        hint = "Reinstall the driver and restart"
    elif wheel is None:
        reason = f"driver {driver}, but torch {version} is built for CPUs alone"
        hint = f"python -m pip install --force-reinstall torch=={version.split('+')[0]}"
    elif int(driver.split(".")[0]) < needed:
        reason = f"driver {driver}; torch {version} is built for CUDA {wheel}, which needs {needed}"
        hint = f"Update the driver, or install a wheel for older ones: {OLDER_WHEEL}"
    else:
        reason = f"driver {driver} suits torch {version} (CUDA {wheel}), which sees no device"
        hint = "In a container, start it with --gpus all; else restart the machine"
    raise KitError(
        f"There is {name} here, and torch cannot use it: {reason}.",
        f"{hint}. To run on the CPU: export CUDA_VISIBLE_DEVICES=",
    )
