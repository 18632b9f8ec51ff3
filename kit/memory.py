"""The memory high-water mark of this process: a card's where there is one, the resident set elsewhere."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path


def reset_peak() -> None:
    """Start the mark anew. Where the system cannot (not Linux), it stays the whole process's."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The mark: bytes the CUDA allocator handed out, or this process's largest resident set."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def limit_bytes() -> tuple[bool, int]:
    """(Whether there is a card, bytes free on it; without one: memory that processes can still get)."""
    import psutil
    import torch

    if torch.cuda.is_available():
        return True, torch.cuda.mem_get_info()[0]
    return False, psutil.virtual_memory().available
