"""Clocks and gauges of the benchmarks."""

import contextlib
import ctypes
import gc
import multiprocessing
import random
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3


def keep_freed_memory() -> None:
    """Makes glibc keep what is freed instead of handing it back to the system.

    Which of several steps then pays for fetching it anew, several percent, is chance:
    it depends on where in the heap some small block happens to lie.
    """
    _set_malloc(_M_TRIM_THRESHOLD, 2**31 - 1)
    _set_malloc(_M_MMAP_THRESHOLD, 2**25)


def return_freed_memory() -> None:
    """Makes glibc hand back what is free, from now on every tensor of 64 KiB and more.

    A process then holds what is in use, without the holes of its heap, which differ by
    chance too.
    """
    _set_malloc(_M_MMAP_THRESHOLD, 2**16)
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _set_malloc(parameter: int, value: int) -> None:
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(parameter, value)


def interleaved_medians(
    steps: dict[str, Callable[[], None]],
    rounds: int,
    clock: Callable[[Callable[[], None]], float],
) -> dict[str, float]:
    """Returns each step's median time; all run in every round, in a new order.

    What disturbs the machine for a while then disturbs all of them.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds):
        order = random.Random(number).sample(list(steps), len(steps))
        for name in order:
            times[name].append(clock(steps[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def cpu_seconds(work: Callable[[], None]) -> float:
    """Returns the processor time of this process, which other processes barely move."""
    started = time.process_time()
    work()
    return time.process_time() - started


def cuda_seconds(work: Callable[[], None]) -> float:
    """Returns the time between two events on the GPU around the work."""
    start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1000  # it counts milliseconds


def forked_peak(work: Callable[[], None], warm_up: Callable[[], None]) -> int:
    """Returns the bytes that the work adds to a forked process at its peak.

    Linux counts a fork's peak from the fork on. The warm-up is the same work in small:
    it loads the code that both run, which is no part of what is measured. To be called
    early in a process: work that fills holes of an old heap does not hand them back.

    Raises:
        RuntimeError: what either raised there.
    """
    return_freed_memory()
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_report_peak, args=(work, warm_up, sender))
    child.start()
    sender.close()
    try:
        answer = receiver.recv()
    except EOFError:
        answer = "the process ended without a word"
    child.join()
    if not isinstance(answer, int):
        raise RuntimeError(answer)
    return answer


def cuda_peak(work: Callable[[], None], warm_up: Callable[[], None]) -> int:
    """Returns the bytes that the work adds to the GPU's memory at its peak."""
    warm_up()
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated() - before


def _report_peak(
    work: Callable[[], None], warm_up: Callable[[], None], sender: Connection
) -> None:
    gc.freeze()  # what the parent left may wait, when collected, for a thread of its
    try:
        warm_up()
        gc.collect()
        forget_the_peak()  # a fork starts with its parent's
        before = status_bytes("VmRSS")
        work()
        sender.send(status_bytes("VmHWM") - before)
    except Exception as error:
        sender.send(f"{type(error).__name__}: {error}")


def forget_the_peak() -> None:
    """Has Linux count this process's ``VmHWM`` from now on."""
    Path("/proc/self/clear_refs").write_text("5")


def status_bytes(field: str) -> int:
    """Reads a line such as ``VmHWM:  1234 kB`` of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"Expected {field} in /proc/self/status: measure on Linux.")
