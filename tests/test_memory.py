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
def clocks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float, float]]:
    """What the next looks at the machine see: seconds, idle and own core seconds, in total."""
    seen: list[tuple[float, float, float]] = [(0.0, 0.0, 0.0)]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "cores", lambda: 4)
    monkeypatch.setattr(threads, "_clocks", lambda: seen.pop(0))
    monkeypatch.setattr(time, "monotonic", lambda: seen[0][0] if seen else 1e9)
    return seen


def test_threads_are_the_cores_that_others_leave(
    clocks: list[tuple[float, float, float]],
) -> None:
    """In each second of 4 core seconds: quiet, noise, one neighbour, three, none again."""
    counter = Threads()
    idle = own = 0.0
    for second, (others, expected) in enumerate(
        [(0.0, 4), (0.3, 4), (0.7, 3), (1.0, 3), (3.0, 1), (3.9, 1), (0.1, 4)], start=1
    ):
        idle += (4 - others) / 2
        own += (4 - others) / 2
        clocks.append((float(second), idle, own))
        assert counter.now() == expected, others


def test_a_look_too_soon_changes_nothing_and_fixed_threads_never_change(
    clocks: list[tuple[float, float, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = Threads()
    clocks.append((threads.LOOK_SECONDS / 2, 0.0, 0.0))
    assert counter.now() == 4
    busy = [(10.0, 0.0, 0.0), (20.0, 0.0, 0.0), (30.0, 0.0, 0.0)]
    clocks[:] = busy
    fixed = Threads(3)
    assert fixed.now() == 3 == fixed.most
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    clocks[:] = busy
    assert Threads().now() == 2


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
