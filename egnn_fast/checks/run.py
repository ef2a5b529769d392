"""The whole check: every case and symmetry on every backend in every dtype."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch

from egnn_fast.backends import BACKENDS, BackendError, Call, check_name, refusal, unavailable
from egnn_fast.checks.cases import check_cases
from egnn_fast.checks.compare import compare, dtype_name, equivariance, one_thread
from egnn_fast.checks.report import EquivarianceRow, Report, Row

DTYPES = (torch.float64, torch.float32)
DIMS = (2, 3, 8)
# cases with fewer edges run on one thread; from here on the CPU's kernels have several tasks
THREADED_EDGES = 2000


def run(
    backends: Sequence[str] | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    quick: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Compare backends with the reference.

    Parameters
    ----------
    backends : sequence of str, optional
        Names of backends; by default all that can run on this machine. ``"reference"`` itself is
        tested for equivariance only. A dtype that a backend does not support is left out;
        ``Report.missing`` says so.
    dtypes : sequence of torch.dtype, optional
        float64 and float32 by default.
    quick : bool
        A subset of the cases: seconds rather than a minute.
    progress : callable, optional
        Called with a line of text before each case.

    Raises
    ------
    ValueError
        A backend does not exist, or a dtype is not float64 or float32.
    BackendError
        A backend cannot run on this machine.
    """
    start = time.perf_counter()
    names, missing = _resolve(backends)
    chosen = tuple(DTYPES if dtypes is None else dtypes)
    for dtype in chosen:
        if dtype not in DTYPES:
            raise ValueError(f"dtypes: expected some of {DTYPES}, got {dtype}")
    tell = progress or (lambda line: None)
    supporting: dict[torch.dtype, list[str]] = {dtype: [] for dtype in chosen}
    for name, dtype in itertools.product(names, chosen):
        reason = refusal(name, Call("cpu", dtype, hidden=1, coord_dim=1, activation="silu"))
        if reason is None:
            supporting[dtype].append(name)
        else:
            missing[f"{name}, {dtype_name(dtype)}"] = reason
    fused = {dtype: [n for n in supporting[dtype] if n != "reference"] for dtype in chosen}
    rows: list[Row] = []
    for case in check_cases(quick) if any(fused.values()) else ():
        tell(case.name)
        with nullcontext() if case.edges >= THREADED_EDGES else one_thread():
            for dtype in chosen:
                if fused[dtype]:
                    rows += compare(case.layer(dtype), case.name, fused[dtype], dtype)
    equivariance_rows: list[EquivarianceRow] = []
    for dim in DIMS:
        tell(f"equivariance, D {dim}")
        with one_thread():
            for dtype in chosen:
                equivariance_rows += equivariance(supporting[dtype], dtype, dim)
    return Report(tuple(rows), tuple(equivariance_rows), missing, time.perf_counter() - start)


def _resolve(names: Sequence[str] | None) -> tuple[list[str], dict[str, str]]:
    """The names of the backends to check, and for the others why they are left out."""
    if names is None:
        reasons = {name: unavailable(name) for name in BACKENDS}
        return [n for n, why in reasons.items() if why is None], {
            n: why for n, why in reasons.items() if why is not None
        }
    for name in names:
        if name == "auto":
            raise ValueError(f"backends: expected some of {BACKENDS}, got 'auto'")
        reason = unavailable(check_name(name, "backends"))
        if reason is not None:
            raise BackendError(f"backend {name!r} cannot run here: {reason}")
    return list(dict.fromkeys(names)), {}
