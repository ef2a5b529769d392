"""The official data set, simulated once for the whole test run, and a small one."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from egnn_fast.experiments.io import CACHE_VARIABLE
from egnn_fast.experiments.nbody.config import Config
from egnn_fast.experiments.nbody.data import DataSpec, Splits, splits

DATA = Path(__file__).resolve().parent.parent / "data"
SMALL = DataSpec(train=40, val=12, test=8, drawn_train=50, length=500, frame_in=1, frame_out=3)
TINY = Config(epochs=7, hidden=8, layers=2, batch_size=10, train_systems=40, test_every=2)


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(DATA / f"nbody-{name}.npz", allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


@functools.cache
def cache_of(spec: DataSpec) -> Path:
    """A cache folder of this test run that holds a data set."""
    folder = Path(tempfile.mkdtemp(prefix="egnn-fast-test-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with cache_at(folder):
        splits(spec)
    return folder


@functools.cache
def official() -> Splits:
    """The official data set in float32."""
    with cache_at(cache_of(DataSpec())):
        return splits(DataSpec())


@functools.cache
def small() -> Splits:
    """Few systems, quick to simulate."""
    with cache_at(cache_of(SMALL)):
        return splits(SMALL)


@contextmanager
def cache_at(folder: Path) -> Iterator[None]:
    before = os.environ.get(CACHE_VARIABLE)
    os.environ[CACHE_VARIABLE] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ[CACHE_VARIABLE]
        else:
            os.environ[CACHE_VARIABLE] = before
