"""Plots of a run: speed and memory against the number of edges, and the roofline."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from egnn_fast.bench.cases import CASES, FUSED, INFERENCE, TRAINING
from egnn_fast.bench.report import environment
from egnn_fast.bench.results import CaseResult, Results
from egnn_fast.experiments.io import write_atomic

DPI = 150
COLORS = {
    FUSED: "#d1495b",
    "reference": "#9aa5b1",
    "official": "#2f6fb5",
    "compile": "#3c8d63",
    "egnn-pytorch": "#8e5ea2",
    "egnn-pytorch-sparse": "#c08a2e",
}
_MARKERS = {INFERENCE: "o", TRAINING: "s"}
_SERIES = "growth-"
# cases that differ only in their graphs; and cases too small for a meaningful rate
_ALIKE = {c.name for c in CASES if (c.kind, c.hidden, c.dtype) == ("layer", 64, "float32")}
_TINY = {c.name for c in CASES if c.kind == "overhead"}


def draw(results: Results, folder: Path) -> list[Path]:
    """Write ``speed.png``, ``memory.png`` and ``roofline.png``, if there are data for them.

    Returns
    -------
    list of Path
        The files that were written.
    """
    written = []
    for name, picture in (("speed", _speed), ("memory", _memory), ("roofline", _roofline)):
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.add_subplot()
        path = folder / f"{name}.png"
        if not picture(axes, results):
            path.unlink(missing_ok=True)  # an earlier run with other cases may have left one
            continue
        axes.grid(which="major", alpha=0.25)
        axes.legend(fontsize=8, framealpha=1)
        figure.supxlabel(environment(results.environment), fontsize=5.5)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DPI)
        write_atomic(path, buffer.getbuffer())
        written.append(path)
    return written


def _speed(axes: Axes, results: Results) -> bool:
    """Plot edges per second, with lines through the growing graphs; False without data."""

    def rate(result: CaseResult, peer: str, measured: str) -> float | None:
        row = result.time(measured, peer)
        return None if row is None else result.edges / row.median_s

    drawn = False
    for peer in COLORS:
        for measured in (INFERENCE, TRAINING):
            label = f"{peer}, {measured}"
            drawn |= _against_edges(axes, results, label, peer, measured, rate)
    axes.set(xlabel="edges", ylabel="edges per second", title="Speed of a layer, H = 64, float32")
    return drawn


def _memory(axes: Axes, results: Results) -> bool:
    """Plot the peak memory of forward + backward; False without data."""

    def peak(result: CaseResult, peer: str, _: str) -> float | None:
        row = result.peak(peer)
        return None if row is None or row.peak_bytes is None else row.peak_bytes / 1e6

    drawn = False
    for peer in COLORS:
        drawn |= _against_edges(axes, results, peer, peer, TRAINING, peak)
    title = "Peak extra memory of forward + backward, H = 64, float32"
    axes.set(xlabel="edges", ylabel="MB", title=title)
    return drawn


def _against_edges(
    axes: Axes,
    results: Results,
    label: str,
    peer: str,
    measured: str,
    value: Callable[[CaseResult, str, str], float | None],
) -> bool:
    """Plot ``value(result, peer, measured)`` of the cases in ``_ALIKE``; False without data.

    A line joins the series of growing graphs.
    """
    alike = [result for result in results.cases if result.name in _ALIKE]
    values = [(result, value(result, peer, measured)) for result in alike]
    points = sorted(
        (result.edges, y, result.name) for result, y in values if y is not None and y > 0
    )
    if not points:
        return False
    style = {"color": COLORS[peer], "markersize": 5, "marker": _MARKERS[measured]}
    line = "-" if measured == INFERENCE else "--"
    series = [(e, y) for e, y, name in points if name.startswith(_SERIES)]
    others = [(e, y) for e, y, name in points if not name.startswith(_SERIES)]
    if series:
        axes.loglog(*zip(*series, strict=True), linestyle=line, label=label, **style)
    if others:
        axes.loglog(
            *zip(*others, strict=True),
            linestyle="none",
            alpha=0.5,
            label="_" if series else label,
            **style,
        )
    return True


def _roofline(axes: Axes, results: Results) -> bool:
    """Plot GFLOP/s against flop per byte, with the BLAS's and memory's limits and the floor.

    False without data.
    """
    points = [
        (result, row)
        for result in results.cases
        if result.name not in _TINY
        for row in result.times
        if row.measured == INFERENCE and row.gflops is not None and row.peer in COLORS
    ]
    if not points:
        return False
    intensity = np.geomspace(1.0, 2 * max(result.flop_per_byte for result, _ in points), 100)
    for (kind, rates), style in zip(results.rates().items(), ("-", "--", ":", "-."), strict=False):
        ceiling = np.minimum(rates.blas_gflops, rates.copy_gb * intensity)
        label = f"BLAS and memory, {kind[0]}, H = {kind[1]}"
        axes.loglog(intensity, ceiling, style, color="black", linewidth=1, label=label)
    labelled: set[str] = set()
    for result, row in points:
        assert row.gflops is not None
        axes.loglog(
            result.flop_per_byte,
            row.gflops,
            "o",
            color=COLORS[row.peer],
            label="_" if row.peer in labelled else row.peer,
        )
        labelled.add(row.peer)
        if row.peer == FUSED and row.floor_share:
            label = "_" if "floor" in labelled else "floor: products and SiLU"
            top = row.gflops / row.floor_share
            axes.loglog(result.flop_per_byte, top, "_", color="black", ms=12, label=label)
            labelled.add("floor")
        if row.peer == FUSED and not result.name.startswith(_SERIES):
            axes.annotate(
                result.name,
                (result.flop_per_byte, row.gflops),
                xytext=(8, -3),
                textcoords="offset points",
                fontsize=7,
            )
    axes.set(xlabel="flop per byte", ylabel="GFLOP/s", title="Roofline, forward")
    return True
