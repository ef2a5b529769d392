"""The edge pass alone, and the path to a kernel for a tiny layer."""

from __future__ import annotations

import pytest

from bench.conftest import Time, table
from egnn_fast.bench.cases import INFERENCE, RECORDING, TRAINING, Case

ROWS = table("edges", "overhead", passes=(INFERENCE, RECORDING, TRAINING))


@pytest.mark.parametrize(("case", "measured", "peer"), ROWS)
def bench_kernel(case: Case, measured: str, peer: str, time: Time) -> None:
    time(case, measured, peer)
