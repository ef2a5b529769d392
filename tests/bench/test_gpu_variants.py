"""The GPU suite's variants of the compiler, and what it writes down of wrong results."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

# last: an installed package goes before the checkout
from bench.gpu import draws, triage, variants
from bench.gpu.setting import FAIL, LEFT_OUT, PASS, Outcome
from egnn_fast import checks
from egnn_fast.checks.cases import Problem
from egnn_fast.kernels.assembler import version_of

ROOT = Path(__file__).resolve().parents[2]


def assembler(path: Path, version: str) -> Path:
    path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release 1.2, V{version}'\n")
    path.chmod(0o755)
    return path


def test_variants_choose_their_assembler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_PTXAS_PATH", "/somewhere/ptxas")
    monkeypatch.setenv("DISABLE_MMA_V3", "1")
    newer = assembler(tmp_path / "ptxas", "13.1.80")
    found = variants.known(newer, tmp_path / "cache")
    assert list(found) == list(variants.NAMES)
    assert found[variants.NEWER].about == "ptxas 13.1.80"
    environments = {name: variant.environment() for name, variant in found.items()}
    caches = {e["TRITON_CACHE_DIR"] for e in environments.values()}
    assert len(caches) == 3
    # named even where it is Triton's own: Inductor sets what is not set
    for name in (variants.OWN, variants.NO_WGMMA):
        assert environments[name]["TRITON_PTXAS_PATH"] == variants.own_ptxas()
    assert environments[variants.NEWER]["TRITON_PTXAS_PATH"] == str(newer)
    switches = {name: e.get("DISABLE_MMA_V3") for name, e in environments.items()}
    assert switches == {variants.OWN: None, variants.NEWER: None, variants.NO_WGMMA: "1"}
    # one that is carried along is found, but none that is too old
    monkeypatch.setattr(variants, "places", lambda: [newer])
    assert variants.known(None, tmp_path)[variants.NEWER].version == "13.1.80"
    newer.chmod(0o644)  # copied without its executable bit
    moved = variants.known(None, tmp_path / "cache")[variants.NEWER]
    assert (moved.version, moved.ptxas) == ("13.1.80", str(tmp_path / "cache" / "ptxas"))
    assembler(newer, "13.0.88")
    assert "no ptxas 13.1.80 or newer" in variants.known(None, tmp_path)[variants.NEWER].missing


@pytest.mark.parametrize(
    ("version", "told"),
    [("13.0.88", "got version 13.0.88"), ("x", "got a file that tells no version")],
)
def test_an_assembler_that_is_too_old_is_refused(tmp_path: Path, version: str, told: str) -> None:
    path = assembler(tmp_path / "ptxas", version)
    with pytest.raises(ValueError, match=f"--ptxas: expected ptxas 13.1.80 or newer, {told}"):
        variants.known(path, tmp_path)
    with pytest.raises(ValueError, match="--ptxas: no such file: "):
        variants.known(tmp_path / "nothing", tmp_path)
    words = ("--device", "cpu", "--out", str(tmp_path / "out"), "--ptxas", str(path))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(ROOT / "bench" / "gpu_suite.py"), *words],
        env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 2
    assert f"gpu_suite.py: --ptxas: expected ptxas 13.1.80 or newer, {told}" in done.stderr


HUNG = "hung"


def smoked(variant: str, *statuses: str) -> dict[str, Any]:
    names = [f"smoke: {variant}: {k}" for k in range(len(statuses))]
    return {
        n: {"name": n, "status": FAIL if s == HUNG else s, "hung": s == HUNG}
        for n, s in zip(names, statuses, strict=True)
    }


@pytest.mark.parametrize(
    ("own", "newer", "best"),
    [
        ((PASS, PASS), (PASS, PASS), "own ptxas"),  # the faster of two that are right
        ((PASS, FAIL), (PASS, PASS), "newer ptxas"),  # right before fast
        ((PASS, FAIL), (FAIL, FAIL), "own ptxas"),  # the least wrong
        ((PASS, PASS), (LEFT_OUT, LEFT_OUT), "own ptxas"),  # what did not run is not right
        ((PASS, LEFT_OUT), (PASS, PASS), "newer ptxas"),
        ((PASS, PASS), (PASS, HUNG), "own ptxas"),
        ((FAIL, PASS), (PASS, HUNG), "newer ptxas"),  # slow is not wrong
    ],
)
def test_the_best_variant(own: tuple[str, ...], newer: tuple[str, ...], best: str) -> None:
    speeds = [{"variant": "own ptxas", "seconds": 1.0}, {"variant": "newer ptxas", "seconds": 2.0}]
    known = smoked("own ptxas", *own) | smoked("newer ptxas", *newer)
    found = variants.standing(speeds, known, ["own ptxas", "newer ptxas"])
    assert found[0]["variant"] == best


def test_a_time_without_another_does_not_choose() -> None:
    known = smoked("own ptxas", PASS) | smoked("newer ptxas", PASS)
    speeds = [{"variant": "own ptxas", "seconds": 1.0}]
    found = variants.standing(speeds, known, ["own ptxas", "newer ptxas"])
    assert found[0]["variant"] == "newer ptxas"


def test_where_a_tensor_is_wrong() -> None:
    right = torch.ones(130, 6, dtype=torch.float64)
    found = right.clone().float()
    found[64, 3] = 1.5
    found[128, 3] = float("nan")
    found[5, 0] += 1e-7  # within the bound
    row = triage.judged(found, right, 1e-6)
    assert (row["wrong"], row["not_finite"], row["error"]) == (2, 1, None)
    assert (row["wrong_rows"], row["wrong_columns"]) == (2, 1)
    assert (row["rows"], row["columns"]) == ([64, 128], [3])
    assert row["by_row"][0] == 2
    assert row["first"][0] == {"row": 64, "column": 3, "found": 1.5, "right": 1.0}


def test_a_race_shows_in_a_second_run() -> None:
    outcome, right = Outcome(), {"M": torch.ones(4, 2, dtype=torch.float64)}
    found = {"M": torch.ones(4, 2) + torch.tensor([[0.5, 0.0]])}
    bounds = {"M": 1e-3}
    triage.examine(outcome, "a", "bf16", found, right, bounds, lambda: {"M": torch.ones(4, 2)})
    (row,) = outcome.rows["triage"]
    assert row["again"] == 0.5
    (line,) = triage.lines(outcome.rows["triage"], 9)
    assert "M [4, 2]: 5.00e-01" in line
    assert line.endswith("columns [0]; a second run differs by 5.0e-01")

    def broken() -> dict[str, torch.Tensor]:
        raise RuntimeError("no more")

    outcome = Outcome()
    triage.examine(outcome, "a", "bf16", found, right, bounds, broken)
    (line,) = triage.lines(outcome.rows["triage"], 9)
    assert line.endswith("a second run failed: RuntimeError: no more")


# Triton decides at its import whether kernels are interpreted, and its driver is replaced
COMPILED = """
import json, sys
sys.path.insert(0, sys.argv[1])
from bench.gpu import triage
from bench.offline import compile
from bench.offline.configurations import TARGETS, Configuration, arguments

compile.driver.set_active(compile._NoDevice(TARGETS["sm_90"]))
kernel, args, keywords = arguments(Configuration("finish_rows"))
kernel.warmup(*args, grid=(1,), **keywords)
found = triage.compiled_kernels()
triage.forget_kernels()
left = triage.compiled_kernels()
kernel.warmup(*args, grid=(1,), **keywords)
print(json.dumps([found, left, triage.compiled_kernels()]))
"""


def without_interpreter() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}


def test_the_kernels_of_a_wrong_result_are_named(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILED, str(ROOT)], cwd=ROOT.parent,
        env={**without_interpreter(), "TRITON_CACHE_DIR": str(tmp_path)}, capture_output=True,
        text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, left, again = json.loads(done.stdout)
    assert left == []
    assert first == again  # forgotten kernels come from the cache, as they were
    (kernel,) = first
    assert kernel["kernel"] == "finish_rows"
    assert len(kernel["hash"]) == len(kernel["ttgir_hash"]) == 16
    assert kernel["ptxas"].split(":")[0] == version_of(variants.own_ptxas())
    assert len(kernel["code"]) > 1000


def test_a_triage_that_stops_is_written_down_too() -> None:
    outcome, right = Outcome(), {"M": torch.ones(4, 2, dtype=torch.float64)}
    outcome.fail("M is wrong")
    with triage.kept(outcome, "a", "bf16"):
        triage.examine(outcome, "a", "bf16", {"M": torch.zeros(4, 2)}, right, {}, lambda: right)
    assert (outcome.status, outcome.reason) == (FAIL, "M is wrong")
    (row,) = outcome.rows["triage"]
    assert row["stopped"] == "KeyError: 'M'"
    assert triage.lines([row], 9) == []


def test_what_is_not_finite_is_not_judged_by_medians() -> None:
    row = checks.Row("triton", "float32", "a", "gradients", math.inf, 1.0, "x")

    def never(seed: int) -> Problem:
        raise AssertionError("another draw was made")

    assert draws.judged(never, [row], 0.1) == [row]
