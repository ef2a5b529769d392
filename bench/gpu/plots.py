"""Pictures of a run: times beside their floor, how much faster, and memory."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from egnn_fast.bench.cases import FUSED
from egnn_fast.experiments.io import write_atomic

DPI = 120
COLORS = {FUSED: "#d1495b", "reference": "#9aa5b1", "official": "#2f6fb5", "compile": "#3c8d63"}
_OTHER = "#8e5ea2"
Row = dict[str, Any]


def draw(times: Sequence[Row], memory: Sequence[Row], environment: Row, folder: Path) -> list[Path]:
    """Write ``times.png``, ``speedup.png`` and ``memory.png``; those that have data."""
    written = []
    ratios = [row for row in times if row["ratio"] is not None and row["peer"] != FUSED]
    for name, rows, value, label in (
        ("times", times, "median_s", "seconds; black: the floor"),
        ("speedup", ratios, "ratio", "times as long as egnn_fast"),
        ("memory", memory, "node_tensors", "peak memory in float32 tensors [N, H]"),
    ):
        path = folder / f"{name}.png"
        if not rows:
            path.unlink(missing_ok=True)
            continue
        figure = Figure(figsize=(9, 1.6 + 0.19 * len(rows)), layout="constrained")
        _bars(figure.add_subplot(), rows, value)
        figure.supxlabel(f"{label}\n{_told(environment)}", fontsize=6)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DPI)
        write_atomic(path, buffer.getbuffer())
        written.append(path)
    return written


def _told(found: Row) -> str:
    where = found["gpu"] or f"{found['cpu']}, interpreted, so times mean nothing"
    parts = [where, f"torch {found['torch']}", f"triton {found['triton']}"]
    if found["commit"]:
        parts.append(f"commit {found['commit']}")
    return ", ".join([*parts, str(found["date"])])


def _bars(axes: Axes, rows: Sequence[Row], value: str) -> None:
    """A bar for each row, on a logarithmic scale; a mark at its floor."""
    labels = []
    for place, row in enumerate(rows):
        color = next((c for name, c in COLORS.items() if row["peer"].startswith(name)), _OTHER)
        axes.barh(place, row[value], color=color)
        if value == "median_s" and row["floor_s"] and row["peer"].startswith(FUSED):
            axes.plot([row["floor_s"]], [place], "|", color="black", markersize=8)
        parts = (row["case"], row["precision"], row.get("measured"), row["peer"])
        labels.append(", ".join(part for part in parts if part))
    axes.set_xscale("log")
    axes.set_yticks(range(len(rows)), labels, fontsize=6)
    axes.invert_yaxis()
    axes.tick_params(axis="x", labelsize=7)
    axes.grid(axis="x", which="major", alpha=0.3)
