"""What the GPU suite makes of its rows: floors, ratios, goals, files and pictures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

# last: an installed package goes before the checkout
from bench.gpu import derive, floor, plots
from bench.gpu.results import Results, environment
from bench.gpu.setting import FAIL, LEFT_OUT, PASS, Item, Outcome, Setting
from egnn_fast.bench.cases import FUSED, INFERENCE, TRAINING
from egnn_fast.experiments.errors import UsageError

CPU = Setting("cpu", True)
ITEM = Item("a", "checks", lambda setting: Outcome())


def h200() -> floor.Chip:
    rates = {"highest": 50e12, "high": 390e12, "bf16": 780e12, "fp16": 780e12}
    return floor.Chip(132, 1.98e9, 4.0e12, rates)


def test_floor_of_the_special_functions() -> None:
    for kind, cycles in (("ex2 + rcp", 24), ("shared rcp", 18), ("tanh.approx", 12)):
        assert floor.edge_cycles(64, kind) == cycles
        assert floor.edge_cycles(128, kind) == 2 * cycles
    edges = 32_000_000
    work = floor.work("edges", INFERENCE, 1_000_000, edges, 64, 1)
    assert work.activations == 3 * 64 * edges
    assert h200().mufu_seconds(work.activations, "ex2 + rcp") == pytest.approx(2.94e-3, rel=0.01)
    assert floor.work("qm9", INFERENCE, 0, 10, 64, 1, head=False).activations == 2 * 64 * 10


def test_floor_of_products_and_bytes() -> None:
    nodes, edges = 10, 70
    work = floor.work("edges", INFERENCE, nodes, edges, 64, 1)
    assert work.flop == 4 * 64 * 64 * edges
    assert work.gathered == edges * 4 * (64 + 3)
    assert work.bytes == pytest.approx(4 * edges + nodes * 4 * 3 * 64)
    both = floor.work("edges", TRAINING, nodes, edges, 64, 1)
    assert both.flop == 4 * work.flop
    assert both.gathered == 3 * work.gathered
    narrow = [
        floor.work("edges", measured, nodes, edges, 64, 1, precision="bf16").gathered
        for measured in (INFERENCE, TRAINING)
    ]
    # a row is read once, or twice and its gradient added to
    assert narrow == [edges * (2 * 64 + 12), edges * (2 * (2 * 64 + 12) + 4 * 67)]
    assert floor.work("network", INFERENCE, nodes, edges, 64, 4).flop == 4 * (
        floor.work("layer", INFERENCE, nodes, edges, 64, 1).flop
    )
    units = h200().seconds(floor.Work(1e12, 0, 2e9, 2e9), "highest", gathers=False)
    assert units["products"] == pytest.approx(1 / 130)  # three products in tf32
    assert units["memory"] == pytest.approx(0.5e-3)
    assert h200().seconds(floor.Work(0, 0, 2e9, 2e9), "bf16", True)["memory"] == 1e-3


def time_row(peer: str, seconds: float, case: str = "random-64", **more: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "item": "i", "case": case, "kind": "layer", "nodes": 1_000_000, "edges": 32_000_000,
        "hidden": 64, "layers": 1, "precision": "bf16", "measured": INFERENCE, "peer": peer,
        "median_s": seconds, "variant": "own ptxas",
    }  # fmt: skip
    return row | more


WHERE = {"multiprocessors": 132, "clock_mhz": 1980.0}


def sections() -> dict[str, list[dict[str, Any]]]:
    rates = {"copy": 4e12, "highest": 5e13, "high": 3.9e14, "bf16": 7.8e14, "fp16": 7.8e14}
    return {
        "rates": [{"what": k, "value": v} for k, v in rates.items()],
        "times": [
            time_row(FUSED, 4e-3), time_row("reference", 80e-3), time_row("official", 100e-3),
            time_row(FUSED, 2e-3, measured=TRAINING), time_row("compile", 10e-3, item="other"),
        ],
    }  # fmt: skip


def test_ratios_floors_and_goals() -> None:
    found = derive.times(WHERE, sections(), {})
    # against what was timed in turn with it
    assert [row["ratio"] for row in found] == [1, 20, 25, 1, None]
    gathered = 32e6 * (64 * 2 + 3 * 4 + 4) + 1e6 * 8 * 64 * 4  # rows of bf16
    assert found[0]["floor_units"]["memory"] == pytest.approx(gathered / 4e12, rel=1e-3)
    assert found[0]["floor_unit"] == "special functions"
    silus = 32e6 * 3 * 64 + 1e6 * 64
    assert found[0]["floor_s"] == pytest.approx(h200().mufu_seconds(silus), rel=1e-3)
    assert found[0]["floor_share"] == found[0]["floor_s"] / 4e-3
    memory = [
        {"case": "random-64", "precision": "bf16", "peer": peer, "peak_bytes": size}
        for peer, size in ((FUSED, 4e9), ("reference", 50e9), ("official", 90e9))
    ]
    met = {row["what"]: (row["value"], row["met"]) for row in derive.goals(found, memory)}
    assert met["times eager, bf16, inference"] == (20, True)  # the faster eager one
    assert met["peak memory of eager over ours, bf16"] == (12.5, False)


FULL_SIZE = "at full size: random-64: bf16"


def known(*items: tuple[str, str, str]) -> dict[str, dict[str, Any]]:
    return {
        f"{name} {variant}": {
            "name": name,
            "status": status.removeprefix("hung "),
            "variant": variant,
            "hung": status.startswith("hung "),
        }
        for name, status, variant in items
    }


@pytest.mark.parametrize(
    ("items", "checked"),
    [
        ([(FULL_SIZE, PASS, "own ptxas")], True),
        ([], False),  # it did not run
        ([(FULL_SIZE, FAIL, "own ptxas")], False),
        ([(FULL_SIZE, LEFT_OUT, "own ptxas")], False),
        ([(FULL_SIZE, PASS, "no wgmma")], False),  # another variant's code
        # another case in the same precision is wrong, in another precision, with another variant
        ([(FULL_SIZE, PASS, "own ptxas"), ("edge pass: a: bf16", FAIL, "own ptxas")], False),
        ([(FULL_SIZE, PASS, "own ptxas"), ("edge pass: a: high", FAIL, "own ptxas")], True),
        ([(FULL_SIZE, PASS, "own ptxas"), ("smoke: a: bf16", FAIL, "no wgmma")], True),
        ([(FULL_SIZE, PASS, "own ptxas"), ("racecheck: a: bf16", FAIL, "own ptxas")], True),
        ([(FULL_SIZE, PASS, "own ptxas"), ("layer: a: bf16", f"hung {FAIL}", "own ptxas")], True),
    ],
)
def test_a_ratio_stands_whatever_is_checked(items: Any, checked: bool) -> None:
    found = derive.times(WHERE, sections(), known(*items))
    assert [row["ratio"] for row in found] == [1, 20, 25, 1, None]
    assert {row["checked"] for row in found} == {checked}
    goals = list(derive.goals(found, []))
    assert {row["checked"] for row in goals} == {checked}


def test_a_network_rests_on_the_smoke_of_its_precision() -> None:
    rows = {"times": [time_row(FUSED, 1.0, "nbody", kind="nbody")]}
    for status, checked in ((PASS, True), (LEFT_OUT, False), (FAIL, False)):
        items = known(("smoke: own ptxas: H 64: bf16", status, "own ptxas"))
        (found,) = derive.times(WHERE, rows, items)
        assert found["checked"] is checked


def test_without_rates_there_is_no_floor() -> None:
    found = derive.times(WHERE, {"times": sections()["times"]}, {})
    assert found[0]["floor_s"] is None


def test_results_are_written_after_each_item(tmp_path: Path) -> None:
    results = Results(tmp_path, environment(CPU, "a command", "abc"))
    outcome = Outcome()
    outcome.add("checks", error=math.nan)
    outcome.add("checks", error=1.0)
    results.add(ITEM, outcome, 1.0)
    assert len(json.loads((tmp_path / "results.json").read_text())["items"]) == 1
    results.add(ITEM, Outcome(FAIL, "why"), 1.0)  # anew: the old rows go
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["found"]["checks"] == []
    assert content["passed"] is False
    assert content["items"][0]["reason"] == "why"
    again = Results(tmp_path, environment(CPU, "another", "abc"))
    assert again.resume() == 1
    with pytest.raises(UsageError, match=r"commit was 'abc', is 'def'"):
        Results(tmp_path, environment(CPU, "another", "def")).resume()
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(UsageError, match="holds no results"):
        again.resume()


def test_triage_is_that_of_this_run(tmp_path: Path) -> None:
    (tmp_path / "triage.json").write_text('{"triage": ["of an earlier run"]}')
    results = Results(tmp_path, environment(CPU, "a command", "abc"))
    results.add(ITEM, Outcome(), 1.0)
    assert json.loads((tmp_path / "triage.json").read_text())["triage"] == []
    outcome = Outcome(FAIL, "wrong")
    outcome.add("triage", tensor="M")
    results.add(ITEM, outcome, 1.0)
    written = (tmp_path / "triage.json").stat().st_mtime_ns
    results.add(Item("b", "checks", lambda setting: Outcome()), Outcome(), 1.0)
    assert (tmp_path / "triage.json").stat().st_mtime_ns == written  # nothing new to write
    again = Results(tmp_path, environment(CPU, "a command", "abc"))
    assert again.resume() == 2
    assert [row["tensor"] for row in again.sections["triage"]] == ["M"]
    again.add(ITEM, Outcome(), 1.0)  # right by now
    assert json.loads((tmp_path / "triage.json").read_text())["triage"] == []


def test_of_many_wrong_results_the_first_are_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.gpu.results.TRIAGE_ROWS", 3)
    results = Results(tmp_path, environment(CPU, "a command", "abc"))
    for k in range(3):
        outcome = Outcome(FAIL, "wrong")
        for tensor in ("M", "X"):
            outcome.add("triage", tensor=tensor)
            outcome.add("checks", tensor=tensor)
        results.add(Item(f"item {k}", "checks", lambda setting: Outcome()), outcome, 1.0)
    rows = json.loads((tmp_path / "triage.json").read_text())["triage"]
    assert [(row["item"], row["tensor"]) for row in rows] == [
        ("item 0", "M"), ("item 0", "X"), ("item 1", "M")
    ]  # fmt: skip
    assert len(json.loads((tmp_path / "results.json").read_text())["found"]["checks"]) == 6


def test_pictures(tmp_path: Path) -> None:
    rows = derive.times(WHERE, sections(), {})
    memory = [{"case": "c", "precision": "bf16", "peer": FUSED, "node_tensors": 9.0}]
    written = plots.draw(rows, memory, environment(CPU, "", None), tmp_path)
    assert [path.name for path in written] == ["times.png", "speedup.png", "memory.png"]
    for path in written:
        assert path.read_bytes().startswith(b"\x89PNG")
    assert plots.draw([], [], environment(CPU, "", None), tmp_path) == []
    assert not list(tmp_path.glob("*.png"))
