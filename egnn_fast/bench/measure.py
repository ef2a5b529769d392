"""Time functions in turn in one process, and measure the growth of this process's memory."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

# Seconds of a sample at least. Shorter runs are repeated within it, so that a training step finds
# in the caches what the step before it left there, as in training, not what another function left.
MIN_SAMPLE = 0.1
_PROC = Path("/proc/self")


class Timing(NamedTuple):
    """Seconds of one run of a function: statistics of its samples."""

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
    """Time several functions in turn, so that other load on the machine affects all of them.

    Parameters
    ----------
    runs : mapping
        The functions by name. Each runs at least once before it is timed. If a function returns a
        float, that is its time in seconds; else the whole run counts.
    repeats : int
        Samples of each.
    min_sample : float
        Seconds of a sample at least (default ``MIN_SAMPLE``). Short functions run several times.
    """
    counts = {name: runs_per_sample(run, min_sample) for name, run in runs.items()}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    with _no_garbage_collection():
        for _ in range(repeats):
            for name, run in runs.items():
                samples[name].append(_sample(run, counts[name]) / counts[name])
    return {name: _timing(seconds, counts[name]) for name, seconds in samples.items()}


def _timing(samples: list[float], runs: int) -> Timing:
    median = statistics.median(samples)
    low = high = median
    if len(samples) > 1:
        low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, low, high, min(samples), len(samples), runs)


def runs_per_sample(run: Callable[[], object], min_sample: float | None = None) -> int:
    """Warm up, and return how many runs a sample of ``min_sample`` seconds needs."""
    min_sample = MIN_SAMPLE if min_sample is None else min_sample
    run()
    seconds, count = _sample(run, 1), 1
    while seconds < min_sample:
        count = max(2 * count, math.ceil(count * min_sample / max(seconds, 1e-9)))
        seconds = _sample(run, count)
    return count


def _sample(run: Callable[[], object], count: int) -> float:
    """Seconds of ``count`` runs: those that the function returned, else those that passed."""
    reported, reports = 0.0, False
    begin = time.perf_counter()
    for _ in range(count):
        seconds = run()
        if isinstance(seconds, float):
            reported, reports = reported + seconds, True
    return reported if reports else time.perf_counter() - begin


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Switch Python's garbage collector off: it would run during one of the functions at random."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def peak_growth(run: Callable[[], object]) -> int | None:
    """Peak of the resident memory during a run, less that before it, in bytes; None off Linux."""
    try:
        (_PROC / "clear_refs").write_text("5")  # resets the peak
        before = _memory(_PROC / "status", "VmRSS")
        run()
        return _memory(_PROC / "status", "VmHWM") - before
    except OSError:
        return None


def available_memory() -> int | None:
    """Bytes that can be allocated without swapping; None if the system does not say."""
    try:
        return _memory(Path("/proc/meminfo"), "MemAvailable")
    except OSError:
        return None


def _memory(file: Path, field: str) -> int:
    """The value of a field, which a file in /proc gives in KiB, in bytes."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) * 1024
