"""How the benches measure: time, memory, kernel launches, and what a device can do at most."""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path

import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

Device = torch.device | str


def on_gpu(device: Device) -> bool:
    return torch.device(device).type == "cuda"


def synchronise(device: Device) -> None:
    if on_gpu(device):
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], object], device: Device) -> float:
    """Wall time of a call, from an idle device to an idle device."""
    synchronise(device)
    start = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - start


Calls = Mapping[str, Callable[[], object]]


def rounds_within(budget: float, calls: Calls, device: Device) -> int:
    """How many rounds of all calls take `budget` seconds, from 5 to 20."""
    return min(20, max(5, int(budget / sum(seconds(call, device) for call in calls.values()))))


def in_turn(
    benchmark: BenchmarkFixture,
    calls: Calls,
    device: Device,
    rounds: int,
    ready: Callable[[str], object] = lambda _: None,
) -> dict[str, float]:
    """Median seconds of each call, the first being the benchmark's own; `ready(name)` before each is untimed.

    In every round each has its turn, so that a machine that slows down slows all of them.
    """
    first, *others = calls
    times: dict[str, list[float]] = {name: [] for name in calls}

    def time_the_others() -> None:
        for name in others:
            ready(name)
            times[name].append(seconds(calls[name], device))
        ready(first)
        synchronise(device)

    def timed() -> None:
        calls[first]()
        synchronise(device)

    benchmark.pedantic(timed, setup=time_the_others, rounds=rounds)
    times[first] = benchmark.stats.stats.data
    return {name: statistics.median(measured) for name, measured in times.items()}


def matrix_rate(device: Device, dtype: torch.dtype) -> float:
    """Operations a second of a square matrix product, the best of ten."""
    size = 8192 if on_gpu(device) else 2048
    a = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / min(seconds(lambda: a @ a, device) for _ in range(10))


def copy_rate(device: Device) -> float:
    """Bytes a second, read and written, of a copy far larger than any cache, the best of ten."""
    source = torch.ones((1 << 30) if on_gpu(device) else (1 << 28), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / min(seconds(lambda: target.copy_(source), device) for _ in range(10))


@lru_cache(maxsize=1)
def _larger_than_l2(device: Device) -> Tensor:
    size = torch.cuda.get_device_properties(device).L2_cache_size
    return torch.empty(2 * size, dtype=torch.uint8, device=device)


def cool(device: Device) -> None:
    """Leave nothing of earlier calls in the L2 of a GPU, as in training, where much else runs between two."""
    if on_gpu(device):
        _larger_than_l2(device).zero_()


def extra_peak(step: Callable[[], object], device: Device) -> int:
    """Bytes the step needs at its peak beside what is there before it; on a CPU of the process (Linux)."""
    gc.collect()
    if on_gpu(device):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if sys.platform != "linux":
        raise OSError(
            f"the peak memory of a process is read from /proc, which {sys.platform} lacks; use Linux"
        )
    # What earlier steps freed and the C library kept would hide what this one takes.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    before = _resident("VmRSS")
    step()
    return _resident("VmHWM") - before


def _resident(what: str) -> int:
    """Bytes of this process in memory: "VmRSS" now, "VmHWM" at its peak."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return 1024 * int(line.split()[1])


def launches(step: Callable[[], object]) -> int | None:
    """What a step starts on the GPU: kernels, fills and copies; None where the profiler sees nothing."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    cuda, own = torch.autograd.DeviceType.CUDA, "Activity Buffer Request"  # the profiler's own
    return sum(event.device_type == cuda and event.name != own for event in profile.events()) or None


def replayed(step: Callable[[], object], rounds: int) -> float | None:
    """Median seconds of a step as a CUDA graph: the GPU alone, without Python and without launches.

    The step must have run before. None where it cannot be captured.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        # The outer context brings the current stream back where a failure keeps the inner one from it.
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
            step()
    except RuntimeError:
        return None
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cool("cuda")  # no synchronisation after it: the graph is queued while the GPU is busy
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)
