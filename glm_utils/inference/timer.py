"""Note moments on a device without stopping it.

On a GPU an event is recorded in the stream and read at the end, so that timing adds no synchronisation: a moment is
when the device got there. The GPU is idle at the start, so the launching of the first work counts.
"""

import time

import torch


class CpuClock:
    """Moments on the CPU."""

    def start(self) -> None:
        """Begin anew."""
        self._marks = [time.perf_counter()]

    def mark(self) -> None:
        """Note a moment."""
        self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Return the seconds from the start to each mark."""
        return [mark - self._marks[0] for mark in self._marks[1:]]


class CudaClock:
    """Moments on the GPU: when all work launched before them was done."""

    def start(self) -> None:
        """Wait until the GPU is idle, and begin anew."""
        torch.cuda.synchronize()
        self._marks: list[torch.cuda.Event] = []
        self.mark()

    def mark(self) -> None:
        """Note the moment when the GPU gets here; does not wait for it."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def seconds(self) -> list[float]:
        """Wait for the last mark; return the seconds from the start to each mark."""
        self._marks[-1].synchronize()
        return [self._marks[0].elapsed_time(mark) / 1e3 for mark in self._marks[1:]]


def make_clock(device: torch.device) -> CpuClock | CudaClock:
    """Return the clock of a device."""
    return CudaClock() if device.type == "cuda" else CpuClock()
