"""Memory of this process and of its machine: a card's where there is one, the resident set elsewhere."""

from __future__ import annotations

import contextlib
import ctypes
import re
from pathlib import Path

import torch


def reset_peak() -> None:
    """Start the high-water mark anew. Where the system cannot (not Linux), it stays the whole process's."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Most bytes that the CUDA allocator handed out, or this process's largest resident set, since the reset."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def limit_bytes() -> tuple[bool, int]:
    """(Whether there is a card, bytes that tensors can still get on it; without one: that processes can still get)."""
    import psutil

    if torch.cuda.is_available():
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return True, torch.cuda.mem_get_info()[0] + unused
    return False, psutil.virtual_memory().available


def return_at_once() -> None:
    """Let glibc give every freed block from 256 KiB on back to the system, which costs time in page faults.

    Its malloc raises that bound on its own, and glibc before 2.38 seldom uses a freed aligned block again.
    """
    mmap_threshold = -3  # M_MMAP_THRESHOLD in malloc.h; setting it keeps it from moving
    with contextlib.suppress(OSError, AttributeError):  # no glibc, no such bound
        ctypes.CDLL(None).mallopt(mmap_threshold, 1 << 18)
