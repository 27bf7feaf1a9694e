"""Measure times on a device without synchronizing it.

On a GPU an event is recorded in the stream and read at the end, so timing adds no synchronization: a mark has the time
at which the device got there. The GPU is idle at the start, so the time to launch the first kernels counts.
"""

import time

import torch


class CpuClock:
    """Times on the CPU."""

    def start(self) -> None:
        """Forget all marks and start measuring."""
        self._marks = [time.perf_counter()]

    def mark(self) -> None:
        """Record the current time."""
        self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Return the seconds from the start to each mark."""
        return [mark - self._marks[0] for mark in self._marks[1:]]


class CudaClock:
    """Times on the GPU: a mark has the time at which all work launched before it was done."""

    def start(self) -> None:
        """Wait until the GPU is idle, forget all marks and start measuring."""
        torch.cuda.synchronize()
        self._marks: list[torch.cuda.Event] = []
        self.mark()

    def mark(self) -> None:
        """Record the time at which the GPU gets here, without waiting for it."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def seconds(self) -> list[float]:
        """Wait until the GPU reaches the last mark; return the seconds from the start to each mark."""
        self._marks[-1].synchronize()
        return [self._marks[0].elapsed_time(mark) / 1e3 for mark in self._marks[1:]]


def make_clock(device: torch.device) -> CpuClock | CudaClock:
    """Return the clock of a device."""
    return CudaClock() if device.type == "cuda" else CpuClock()
