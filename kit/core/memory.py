"""Memory of this process and its machine: the card's where there is one, else the resident set.

And how libraries say that there is not enough of it.
"""

import contextlib
import ctypes
import gc
import re
import resource
import shutil
import sys
from os.path import exists
from pathlib import Path

import psutil

FREE_RATIO = 0.7  # of free memory that caches may take when the config names no budget
# CUDA's allocator and libraries, torch's allocator on the CPU, Python, C++, and llama.cpp.
OUT_OF_MEMORY = re.compile(
    r"out of memory|OutOfMemory|MemoryError|bad_alloc|_ALLOC_FAILED|cublasCreate"
    r"|(failed|unable) to allocate|(cannot|can't) allocate memory|not enough memory|no memory for",
    re.IGNORECASE,
)


def is_out_of_memory(error: Exception | str) -> bool:
    """Whether an exception, or what a library logged, means that there is too little memory."""
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    return bool(OUT_OF_MEMORY.search(text))


def reset_peak() -> None:
    """Restart the high-water mark. On macOS it stays that of the whole process."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Most bytes that CUDA's allocator, or else this process, has held since the reset."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        [kibibytes] = re.findall(r"VmHWM:\s+(\d+)", status.read_text())
        return 1024 * int(kibibytes)
    # macOS: since the process began, and in bytes where Linux has KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def may_have_card() -> bool:
    """Whether there may be a GPU, decided without importing torch, which takes seconds: torch is
    loaded already, or there is a driver.
    """
    paths = ("/proc/driver/nvidia", "/dev/dxg", "/dev/kfd")
    return bool("torch" in sys.modules or shutil.which("nvidia-smi") or any(map(exists, paths)))


def limit_bytes() -> tuple[bool, int]:
    """(Whether there is a card, bytes that can still be had on it, or else on the machine)."""
    if may_have_card():
        import torch

        if torch.cuda.is_available():
            unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
            return True, torch.cuda.mem_get_info()[0] + unused
    return False, psutil.virtual_memory().available


def return_at_once() -> None:
    """Let glibc return every freed block of 256 KiB or more, which costs time in page faults.

    Its malloc raises that bound on its own, and before glibc 2.38 it seldom uses a freed aligned
    block again.
    """
    mmap_threshold = -3  # M_MMAP_THRESHOLD in malloc.h; setting it keeps it from moving
    with contextlib.suppress(OSError, AttributeError):  # no glibc, no such bound
        ctypes.CDLL(None).mallopt(mmap_threshold, 1 << 18)


def release() -> None:
    """Return the memory of models that nothing names any more: cycles hold them until collected."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        torch.cuda.empty_cache()
