"""How many threads compute: as many as there are cores that other processes leave free.

Every parallel region ends when its last thread does. Beside one busy process on one of two cores,
that thread has to wait for its turn in every region, and speed falls to a tenth instead of a half.
With one thread fewer, nothing waits. Nothing here computes.
"""

import contextlib
import math
import os
import time
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Any

import psutil

_PROCESS = psutil.Process()  # it remembers its last look
LOOK_SECONDS = 0.3  # between two looks at the machine, which take less than a millisecond
SPARE_CORES = 0.4  # that other processes may use before a thread is taken away


class Threads:
    """The number of threads to compute with, by what is free.

    Args:
        fixed: keeps this number; else OMP_NUM_THREADS does, where it is set.
        most: where nothing is fixed; None: all cores that this process may use.
    """

    def __init__(self, fixed: int | None = None, most: int | None = None) -> None:
        self.fixed = fixed or _threads_of_environment()
        self.most = self.fixed or min(most or cores(), cores())
        self.count = self.most
        self.looked = time.monotonic()
        _free_cores()

    def now(self) -> int:
        """How many to use from here on: all at first, later what other processes leave free."""
        if self.fixed or time.monotonic() - self.looked < LOOK_SECONDS:
            return self.count
        self.looked = time.monotonic()
        self.count = max(1, min(self.most, int(_free_cores() + SPARE_CORES)))
        return self.count


def watch(model: Any, fixed: int | None = None) -> None:
    """Let every forward pass of a torch model, and the backward after it, use the free cores."""
    import torch

    threads = Threads(fixed, _torch_threads())

    def before_forward(*_: Any) -> None:
        count = threads.now()
        if count != torch.get_num_threads():
            torch.set_num_threads(count)

    model.register_forward_pre_hook(before_forward)


def cores() -> int:
    """Cores that this process may use: by its affinity, and by its container's limit."""
    count = len(_own_cores())
    # Two numbers, microseconds of computing in a period of so many; or max, which is no limit.
    with contextlib.suppress(OSError, ValueError):
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
        count = min(count, math.ceil(quota / period))
    return count


def _own_cores() -> Collection[int]:
    """The numbers of the cores that the system lets this process use; on macOS, of all."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return range(os.cpu_count() or 1)


def _threads_of_environment() -> int:
    """The first number of OMP_NUM_THREADS, which may be a list, one for each nested region."""
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(first) if first.isdecimal() else 0


@cache
def _torch_threads() -> int:
    """What torch takes by itself, asked before anything has changed it."""
    import torch

    return torch.get_num_threads()


def _free_cores() -> float:
    """Cores that were idle, or computed for this process, since the last call in this thread."""
    used = psutil.cpu_percent(percpu=True)
    # in some containers the list is shorter than the cores' numbers
    own = [used[core] for core in _own_cores() if core < len(used)] or used
    idle = sum(100 - percent for percent in own)
    return (idle + _PROCESS.cpu_percent()) / 100
