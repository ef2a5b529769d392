"""What follows from the rows of a run: ratios, shares of the floor, goals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bench.gpu.floor import Chip, work
from egnn_fast.bench.cases import FUSED, INFERENCE, TRAINING

Row = dict[str, Any]
Sections = Mapping[str, list[Row]]
EAGER = ("reference", "official")
IN_GRAPH = " in a CUDA graph"
# what the names of items that compare values begin with; they end with the precision
_VALUES = ("smoke: ", "edge pass: ", "layer: ", "at full size: ")


def chip(environment: Mapping[str, Any], sections: Sections) -> Chip | None:
    """The GPU's rates; None before they are measured."""
    rates = {row["what"]: row["value"] for row in sections.get("rates", [])}
    if not environment.get("multiprocessors") or "copy" not in rates or len(rates) < 5:
        return None
    flop = {name: value for name, value in rates.items() if name != "copy"}
    return Chip(environment["multiprocessors"], environment["clock_mhz"] * 1e6, rates["copy"], flop)


def check_of(row: Row) -> str:
    """The name of the check that a time rests on, if there is one for its graph and size."""
    return f"at full size: {row['case'].removeprefix('edges-')}: {row['precision']}"


def times(
    environment: Mapping[str, Any], sections: Sections, items: Mapping[str, Row]
) -> list[Row]:
    """The rows of times with ratios to ours, shares of the floor, and whether they are checked.

    ``checked`` is the result of what the row rests on: False where that failed or did not run.
    """
    rows = sections.get("times", [])
    found, gpu = [], chip(environment, sections)
    for row in rows:
        ours = _our_time(rows, row)
        new = {**row, "checked": checked(row, items), "ratio": None, "floor_s": None}
        new |= {"floor_unit": None, "floor_share": None, "floor_units": None}
        if ours is not None:
            new["ratio"] = row["median_s"] / ours
        if gpu is not None:
            head = row["kind"] != "qm9"
            sizes = (row["nodes"], row["edges"], row["hidden"], row["layers"])
            needed = work(row["kind"], row["measured"], *sizes, head, row["precision"])
            units = gpu.seconds(needed, row["precision"], "random" in row["case"])
            unit = max(units, key=lambda name: units[name])
            new |= {"floor_s": units[unit], "floor_unit": unit, "floor_units": units}
            new["floor_share"] = units[unit] / row["median_s"]
        found.append(new)
    return found


def checked(row: Row, items: Mapping[str, Row]) -> bool:
    """Whether a time's kernels are known to be right.

    The check of its graph and size passed, or, for a network, smoke items of its precision did; and
    no check of values failed in this precision with the variant that the row was timed with.
    """
    mine = [
        other for other in items.values()
        if other["name"].startswith(_VALUES) and other["name"].endswith(f": {row['precision']}")
        and other["variant"] == row["variant"]
    ]  # fmt: skip
    if any(other["status"] == "fail" and not other["hung"] for other in mine):
        return False
    passed = [other["name"] for other in mine if other["status"] == "pass"]
    if row["kind"] in ("layer", "edges"):
        return check_of(row) in passed
    return any(name.startswith("smoke: ") for name in passed)


def _our_time(rows: Sequence[Row], row: Row) -> float | None:
    """Of the same item, so that the two were timed in turn."""
    graph = IN_GRAPH if row["peer"].endswith(IN_GRAPH) else ""
    same = ("item", "case", "precision", "measured")
    for other in rows:
        if other["peer"] == FUSED + graph and all(other[k] == row[k] for k in same):
            return float(other["median_s"])
    return None


def goals(rows: Sequence[Row], memory: Sequence[Row]) -> Iterator[Row]:
    """The figures that bench/README.md has goals for on a GPU; ``rows`` are of :func:`times`."""
    ms = 1e3
    for precision, measured, goal in (
        ("bf16", INFERENCE, 4.0), ("highest", INFERENCE, 8.0), ("bf16", TRAINING, 16.0),
    ):  # fmt: skip
        yield from _goal(rows, "edges-random-64", precision, measured, goal, ms)
    for measured, goal in ((INFERENCE, 15.0), (TRAINING, 10.0)):
        for precision in ("bf16", "highest"):
            found = [_ratio(rows, "random-64", precision, measured, name) for name in EAGER]
            known = [ratio for ratio in found if ratio is not None]
            if known:
                what = f"times eager, {precision}, {measured}"
                told = _is_checked(rows, "random-64", precision)
                yield _finding("random-64", what, min(known), "x", goal, True, told)
    for measured in (INFERENCE, TRAINING):
        for precision in ("bf16", "highest"):
            ratio = _ratio(rows, "random-64", precision, measured, "compile")
            if ratio is not None:
                what = f"times torch.compile, {precision}, {measured}"
                told = _is_checked(rows, "random-64", precision)
                yield _finding("random-64", what, ratio, "x", 5.0, True, told)
    for precision in ("bf16", "highest"):
        peaks = {
            row["peer"]: row["peak_bytes"]
            for row in memory
            if (row["case"], row["precision"]) == ("random-64", precision)
        }
        eager = [peaks[name] for name in EAGER if name in peaks]
        if FUSED in peaks and eager:
            what = f"peak memory of eager over ours, {precision}"
            told = _is_checked(rows, "random-64", precision)
            yield _finding("random-64", what, min(eager) / peaks[FUSED], "x", 15.0, True, told)
    for precision in ("bf16", "highest"):
        yield from _goal(rows, "nbody", precision, INFERENCE, 100.0, 1e6, FUSED + IN_GRAPH)


def _goal(
    rows: Sequence[Row], case: str, precision: str, measured: str, goal: float, scale: float,
    peer: str = FUSED,
) -> Iterator[Row]:  # fmt: skip
    wanted = (case, precision, measured, peer)
    for row in rows:
        if (row["case"], row["precision"], row["measured"], row["peer"]) == wanted:
            unit = "ms" if scale == 1e3 else "µs"
            what = f"{measured}, {precision}{peer.removeprefix(FUSED)}"
            yield _finding(case, what, row["median_s"] * scale, unit, goal, False, row["checked"])
            return


def _is_checked(rows: Sequence[Row], case: str, precision: str) -> bool:
    mine = [row["checked"] for row in rows if (row["case"], row["precision"]) == (case, precision)]
    return bool(mine) and all(mine)


def _ratio(
    rows: Sequence[Row], case: str, precision: str, measured: str, peer: str
) -> float | None:
    wanted = (case, precision, measured, peer)
    for row in rows:
        if (row["case"], row["precision"], row["measured"], row["peer"]) == wanted:
            return None if row["ratio"] is None else float(row["ratio"])
    return None


def _finding(
    case: str, what: str, value: float, unit: str, goal: float, at_least: bool, checked: bool
) -> Row:
    met = value >= goal if at_least else value <= goal
    return {
        "case": case, "what": what, "value": value, "unit": unit, "goal": goal,
        "at_least": at_least, "met": met, "checked": checked,
    }  # fmt: skip
