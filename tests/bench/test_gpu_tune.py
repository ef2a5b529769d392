"""The GPU suite's trials of block sizes, through the interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# last: an installed package goes before the checkout
from bench.gpu import tune
from bench.gpu.setting import PASS, Setting

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.timeout(600)]
ROOT = Path(__file__).resolve().parents[2]
GPU = Setting("cuda")


def test_tuning(tmp_path: Path) -> None:
    pattern = ("--case", "*forward highest 16*")
    dropped = ("PYTHONPATH", "TRITON_INTERPRET")
    variables = {k: v for k, v in os.environ.items() if k not in dropped}
    command = [sys.executable, "-W", "ignore", str(ROOT / "bench" / "gpu_suite.py")]
    options = ["--device", "cpu", "--only", "tune", "--jobs", "0", "--out", str(tmp_path)]
    done = subprocess.run(
        [*command, *options, *pattern], cwd=ROOT.parent, env=variables, capture_output=True,
        text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((tmp_path / "results.json").read_text())
    assert [row["status"] for row in content["items"]] == [PASS] * 3
    found = content["found"]["tune"]
    assert {(row["edges"], row["warps"]) for row in found} == {(16, 4), (32, 4)}
    best = min(found, key=lambda row: row["median_s"])
    line = f'("forward", "highest", 16): Blocks({best["edges"]}, 4, 1, 0, "measured: no GPU, '
    assert line in done.stdout


def tune_row(target: tune.Target, edges: int, seconds: float) -> dict[str, Any]:
    return {
        **target._asdict(), "edges": edges, "warps": 4, "in_memory": 1,
        "streamed": 0, "staged": False, "split": "bf16x6", "paired": True, "shared_slopes": 2,
        "prefetch": True, "programs": 2, "median_s": seconds,
    }  # fmt: skip


def test_rows_for_the_table_are_of_the_fastest() -> None:
    target = tune.Target("backward", "bf16", 64)
    rows = [tune_row(target, 32, 2.0), tune_row(target, 64, 1.0), tune_row(target, 128, 3.0)]
    more = 'split="bf16x6", shared_slopes=2, prefetch=True'
    expected = f'Blocks(64, 4, 2, 1, "measured: Some GPU, 2026-01-02", {more}),'
    assert tune.table_rows(rows, "Some GPU", "2026-01-02") == [
        f'("backward", "16", 64): {expected}'
    ]


def test_what_is_tuned() -> None:
    names = [i.name for i in (*tune.candidate_items(GPU), *tune.timing_items(GPU))]
    assert len(set(names)) == len(names)
    for target in tune.targets(GPU):
        found = tune.shapes(target, GPU)
        assert {shape.warps for shape in found} == {4, 8}
        assert {16, 32, 64} <= {shape.edges for shape in found}
        fused = target.direction == "backward" and target.width <= 128
        assert {shape.in_memory for shape in found} == ({0, 1, 2} if fused else {0})
        backward = target.direction == "backward"
        fused_ones = {shape.prefetch for shape in found if not shape.staged}
        both = {True, False} if backward else {False}
        assert fused_ones == (set() if target.width == 256 else both)
        assert not any(shape.prefetch for shape in found if shape.staged)
        shared = fused and target.precision != "highest"
        assert {shape.shared_slopes for shape in found} == ({0, 1, 2} if shared else {0})
        staged = {64: {False}, 128: {False, True}, 256: {True}}[target.width]
        assert {shape.staged for shape in found} == staged


def test_a_candidate_that_does_not_fit_fails() -> None:
    """It would run in stages, and be timed under another name."""
    code = """
import json, sys
sys.path.insert(0, sys.argv[1])
from bench.gpu import tune
from bench.gpu.setting import Setting
from egnn_fast.backends.triton import edges
from triton.runtime.errors import OutOfResources

def refuse(*args):
    raise OutOfResources(262_144, 232_448, "shared memory")

edges.launch_edge_forward = refuse
target = tune.Target("forward", "highest", 16)
found = tune._try(target, tune.Shape(16, 4, 0), Setting("cpu", True))
print(json.dumps([found.status, found.reason]))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(ROOT)], cwd=ROOT.parent,
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["fail", "1 programs: does not fit, ran in stages"]
