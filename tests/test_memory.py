"""How libraries say that there is too little memory, and how many threads the machine leaves."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch

from kit.core import threads
from kit.core.memory import is_out_of_memory
from kit.core.threads import Threads, watch


def test_torch_without_memory_on_a_cpu_is_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError(),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasGemmEx(...)`"),
        RuntimeError(
            "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"
        ),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA error: out of memory"),
        "ggml_backend_cuda_buffer_type_alloc_buffer: cudaMalloc failed: out of memory",
        "alloc_tensor_range: failed to allocate CPU buffer of size 99",
        "mmap failed: Cannot allocate memory",
    ],
)
def test_every_library_says_it_in_its_own_words(error: Exception | str) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)"),
        RuntimeError("CUDA error: device-side assert triggered"),
        "tensor 'token_embd.weight' data is not within the file bounds, model is corrupted",
    ],
)
def test_other_failures_are_not_out_of_memory(error: Exception | str) -> None:
    assert not is_out_of_memory(error)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What the next looks at a machine of four cores see: the time, and free cores."""
    seen = {"seconds": 0.0, "free": 0.0}
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "cores", lambda: 4)
    monkeypatch.setattr(threads, "_free_cores", lambda: seen["free"])
    monkeypatch.setattr(time, "monotonic", lambda: seen["seconds"])
    return seen


def test_threads_are_the_cores_that_others_leave(clock: dict[str, float]) -> None:
    """Quiet, noise, one neighbour, three, none again."""
    counter = Threads()
    for others, expected in [(0.0, 4), (0.3, 4), (0.7, 3), (1.0, 3), (3.0, 1), (3.9, 1), (0.1, 4)]:
        clock["seconds"] += 1
        clock["free"] = 4 - others
        assert counter.now() == expected, others


def test_a_look_too_soon_changes_nothing_and_fixed_threads_never_change(
    clock: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = Threads()
    clock["seconds"] = threads.LOOK_SECONDS / 2
    assert counter.now() == 4
    fixed = Threads(3)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    from_environment = Threads()
    # one number for each nested region, or none
    monkeypatch.setenv("OMP_NUM_THREADS", " 3,1")
    nested = Threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "all")
    assert nested.fixed == 3 and Threads().fixed == 0
    clock["seconds"] = 10.0
    assert fixed.now() == 3 == fixed.most
    assert from_environment.now() == 2
    assert counter.now() == 1


def test_free_cores_are_the_idle_ones_and_this_processs_own() -> None:
    threads._free_cores()
    deadline = time.monotonic() + 0.5
    while time.monotonic() < deadline:
        pass
    assert 0 < threads._free_cores() < threads.cores() + 0.5


def test_cores_that_the_machine_does_not_list_are_no_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a container, this process may have the cores 4 and 5 where only two are listed."""
    monkeypatch.setattr("psutil.cpu_percent", lambda percpu: [100.0, 20.0])
    monkeypatch.setattr("os.sched_getaffinity", lambda _process: {4, 5})
    monkeypatch.setattr(threads._PROCESS, "cpu_percent", lambda: 10.0)
    assert threads._free_cores() == pytest.approx(0.9)


def test_a_mac_counts_cores_and_memory_and_grades_without_a_memory_limit() -> None:
    """macOS has no affinity, no /proc, and refuses a limit of memory; imitated on this system."""
    program = """
import os, pathlib, resource
del os.sched_getaffinity
exists = pathlib.Path.exists
pathlib.Path.exists = lambda path: not str(path).startswith("/proc") and exists(path)
setrlimit = resource.setrlimit
def refuse(number, limits):
    if number == resource.RLIMIT_AS:
        raise ValueError("current limit exceeds maximum limit")
    setrlimit(number, limits)
resource.setrlimit = refuse

from kit.core import memory, threads
from kit.grading import math_worker
assert threads.cores() >= 1 and threads.Threads().now() >= 1 and threads._free_cores() >= 0
assert memory.peak_bytes() > 0
math_worker._prepare(1 << 30)
assert math_worker._compare("1/2", "0.5") == ("correct", "math")
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_real_neighbours_on_every_core_leave_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    command = [sys.executable, "-c", "while True: pass"]
    neighbours = [subprocess.Popen(command) for _ in range(threads.cores())]
    try:
        time.sleep(0.3)
        counter = Threads()
        time.sleep(2 * threads.LOOK_SECONDS)
        assert counter.now() == 1
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.wait()


def test_a_watched_model_computes_with_the_free_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    used = []

    class Model(torch.nn.Module):
        def forward(self) -> None:
            used.append(torch.get_num_threads())

    model = Model()
    counts = iter([3, 3, 1])
    monkeypatch.setattr(Threads, "now", lambda self: next(counts))
    watch(model)
    try:
        for _ in range(3):
            model()
        assert used == [3, 3, 1]
    finally:
        torch.set_num_threads(before)
