"""Time, in turn and in one process; and memory, in a process of its own."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

# seconds: shorter runs are repeated within a sample, so that a training step meets what the step
# before it left in the caches, as it does in training, rather than what its rival left there
MIN_SAMPLE = 0.1
_PROC = Path("/proc/self")


class Timing(NamedTuple):
    """Seconds of one run; the samples of what is compared were taken in turn."""

    median: float
    lower_quartile: float
    upper_quartile: float
    best: float
    samples: int
    runs_per_sample: int

    @property
    def spread(self) -> float:
        """The interquartile range as a share of the median."""
        return (self.upper_quartile - self.lower_quartile) / self.median


def alternate(
    runs: Mapping[str, Callable[[], object]], repeats: int, min_sample: float | None = None
) -> dict[str, Timing]:
    """Time several functions in turn, so that what disturbs the machine disturbs all of them.

    Parameters
    ----------
    runs : mapping
        The functions by name. Each runs at least once before it is timed. One that returns a
        float says itself how many seconds count.
    repeats : int
        Samples of each.
    min_sample : float
        Seconds that a sample lasts at least (``MIN_SAMPLE``): short functions run several times in
        it.
    """
    counts = {name: runs_per_sample(run, min_sample) for name, run in runs.items()}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    with _no_collection():
        for _ in range(repeats):
            for name, run in runs.items():
                samples[name].append(_sample(run, counts[name]) / counts[name])
    return {name: _timing(found, counts[name]) for name, found in samples.items()}


def _timing(samples: list[float], runs: int) -> Timing:
    median = statistics.median(samples)
    low = high = median
    if len(samples) > 1:
        low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, low, high, min(samples), len(samples), runs)


def runs_per_sample(run: Callable[[], object], min_sample: float | None = None) -> int:
    """Warm up, and find how many runs a sample needs."""
    min_sample = MIN_SAMPLE if min_sample is None else min_sample
    run()
    seconds, count = _sample(run, 1), 1
    while seconds < min_sample:
        count = max(2 * count, math.ceil(count * min_sample / max(seconds, 1e-9)))
        seconds = _sample(run, count)
    return count


def _sample(run: Callable[[], object], count: int) -> float:
    counted, told = 0.0, False
    begin = time.perf_counter()
    for _ in range(count):
        seconds = run()
        if isinstance(seconds, float):
            counted, told = counted + seconds, True
    return counted if told else time.perf_counter() - begin


@contextmanager
def _no_collection() -> Iterator[None]:
    """Without Python's garbage collector, which would strike one of them at random."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def peak_growth(run: Callable[[], object]) -> int | None:
    """By how many bytes the resident memory rises above its level before, at most; Linux only."""
    try:
        (_PROC / "clear_refs").write_text("5")  # forgets the peak so far
        before = _memory(_PROC / "status", "VmRSS")
        run()
        return _memory(_PROC / "status", "VmHWM") - before
    except OSError:
        return None


def available_memory() -> int | None:
    """Bytes that can be had without swapping; None where the system does not say."""
    try:
        return _memory(Path("/proc/meminfo"), "MemAvailable")
    except OSError:
        return None


def _memory(file: Path, field: str) -> int:
    """A figure of a file of /proc, in bytes."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) * 1024
