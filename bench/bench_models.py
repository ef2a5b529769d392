"""Inference of whole models."""

from __future__ import annotations

import pytest

from bench.conftest import Time, table
from egnn_fast.bench.cases import INFERENCE, Case

ROWS = table("nbody", "qm9", passes=(INFERENCE,))


@pytest.mark.parametrize(("case", "measured", "peer"), ROWS)
def bench_model(case: Case, measured: str, peer: str, time: Time) -> None:
    time(case, measured, peer)
