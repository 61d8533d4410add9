"""How long a device has worked, without waiting for it."""

import time
from typing import Any

import torch


class Clock:
    """Adds up the seconds spent in its `with` blocks; on a GPU the device's own time, read when it is asked for."""

    def __init__(self, device: torch.device | str):
        self._on_gpu = torch.device(device).type == "cuda"
        self._seconds = 0.0
        self._started: Any = None
        self._events: list[tuple[Any, Any]] = []

    def __enter__(self) -> "Clock":
        self._started = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        now = self._now()
        if self._on_gpu:
            self._events.append((self._started, now))
        else:
            self._seconds += now - self._started

    def add(self, other: "Clock") -> None:
        """Add what another clock has measured, once both are asked."""
        self._seconds += other._seconds
        self._events += other._events

    @property
    def seconds(self) -> float:
        """So far. On a GPU this waits until the work is done."""
        for start, end in self._events:
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1000
        self._events.clear()
        return self._seconds

    @seconds.setter
    def seconds(self, value: float) -> None:
        self._events.clear()
        self._seconds = value

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
