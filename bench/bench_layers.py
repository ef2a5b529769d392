"""Whole layers: widths, dtypes, degrees, growing graphs."""

from __future__ import annotations

import pytest

from bench.conftest import Time, table
from egnn_fast.bench.cases import INFERENCE, TRAINING, Case

ROWS = table("layer", passes=(INFERENCE, TRAINING))


@pytest.mark.parametrize(("case", "measured", "peer"), ROWS)
def bench_layer(case: Case, measured: str, peer: str, time: Time) -> None:
    time(case, measured, peer)
