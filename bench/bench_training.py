"""Training steps of whole models, with loss and Adam."""

from __future__ import annotations

import pytest

from bench.conftest import Time, table
from egnn_fast.bench.cases import STEP, Case

ROWS = table("nbody", "qm9", passes=(STEP,))


@pytest.mark.parametrize(("case", "measured", "peer"), ROWS)
def bench_training_step(case: Case, measured: str, peer: str, time: Time) -> None:
    time(case, measured, peer)
