"""Pictures of a run: learning curves and trajectories."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from egnn_fast.experiments.io import write_atomic
from egnn_fast.experiments.nbody.config import Config
from egnn_fast.experiments.nbody.data import Systems
from egnn_fast.experiments.nbody.folder import History
from egnn_fast.experiments.nbody.simulate import InitialState, simulate
from egnn_fast.experiments.nbody.summary import PAPER

Array = npt.NDArray[np.float64]

DPI = 150
COLORS = {"train": "#9aa5b1", "val": "#2f6fb5", "test": "#d1495b"}
CHARGES = {1.0: ("#d1495b", "positive"), -1.0: ("#2f6fb5", "negative")}
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
_PATH_EVERY = 10  # time steps between the points of a drawn path


def curve(history: History, config: Config, path: Path) -> None:
    """Train, validation and test error by epoch, with the paper's EGNN and GNN as lines.

    Parameters
    ----------
    history : History
        Errors of the run.
    config : Config
        Options of the run.
    path : Path
        The PNG to write.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    epochs = np.arange(len(history))
    tested = [e for e in epochs if not math.isnan(history.val[e])]
    axes.plot(epochs, history.train, color=COLORS["train"], linewidth=1.2, label="train")
    for name, values in (("val", history.val), ("test", history.test)):
        label = {"val": "validation", "test": "test"}[name]
        axes.plot(tested, [values[e] for e in tested], color=COLORS[name], lw=1.6, label=label)
    for name, style in (("GNN", ":"), ("EGNN", "--")):
        axes.axhline(PAPER[name], color="black", linewidth=1, linestyle=style)
        axes.annotate(
            f"{name} in the paper: {PAPER[name]:.4f}",
            xy=(1, PAPER[name]),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 3),
            textcoords="offset points",
            horizontalalignment="right",
            fontsize=9,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
        )
    best = history.best
    if best is not None:
        axes.plot(
            best.epoch,
            best.test_mse,
            "o",
            color=COLORS["test"],
            markeredgecolor="black",
            label=f"test at best validation: {best.test_mse:.4f} (epoch {best.epoch})",
            zorder=5,
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(0, max(1, len(history) - 1))
    axes.set_xlabel("epoch")
    axes.set_ylabel("mean squared error of the positions")
    axes.set_title(f"EGNN on charged particles, {config.train_systems} systems, seed {config.seed}")
    axes.grid(which="major", alpha=0.25)
    axes.legend(loc="upper right", framealpha=1)
    _save(figure, path)


def trajectories(systems: Systems, predicted: Array, time_steps: int, path: Path) -> None:
    """True paths, and true and predicted end positions, of six systems, seen along the z axis.

    The systems are those at the ``QUANTILES`` of the error.

    Parameters
    ----------
    systems : Systems
        The test set, on the CPU.
    predicted : Array [S, P, 3]
        Predicted end positions.
    time_steps : int
        Time steps between the input and the target frame.
    path : Path
        The PNG to write.
    """
    target = systems.target.double().numpy()
    errors = ((predicted - target) ** 2).mean(axis=(1, 2))
    ranked = np.argsort(errors)
    chosen = ranked[[round(q * (len(ranked) - 1)) for q in QUANTILES]]
    paths = _paths(systems, chosen, time_steps)
    figure = Figure(figsize=(11, 7.6), layout="constrained")
    grid = figure.subplots(2, 3)
    for axes, system, quantile, lines in zip(grid.flat, chosen, QUANTILES, paths, strict=True):
        _draw_system(
            axes, lines, predicted[system], target[system], systems.charges[system].numpy()
        )
        rank = "median" if quantile == 0.5 else f"{quantile:.0%} have less"
        axes.set(xlabel="x", ylabel="y")
        axes.set_title(f"test system {system}: MSE {errors[system]:.2g} ({rank})", fontsize=10)
    figure.suptitle(f"Charged particles after {time_steps} time steps: simulated and predicted")
    figure.legend(handles=_legend(), loc="outside lower center", ncols=5, frameon=False)
    _save(figure, path)


def _draw_system(axes: Axes, lines: Array, predicted: Array, target: Array, charges: Array) -> None:
    for particle, charge in enumerate(charges):
        color = CHARGES[float(charge)][0]
        axes.plot(*lines[:, :2, particle].T, color=color, linewidth=1.2, alpha=0.7)
        axes.plot(*lines[0, :2, particle], ".", color=color, markersize=5)
        axes.plot(*target[particle, :2], "o", color=color, markersize=8, alpha=0.75)
        ends = np.stack([target[particle, :2], predicted[particle, :2]])
        axes.plot(*ends.T, ":", color="black", linewidth=1.2)
        axes.plot(*predicted[particle, :2], "x", color="black", markersize=8, mew=1.6, zorder=5)
    axes.set_aspect("equal", adjustable="datalim")
    axes.margins(0.08)
    axes.grid(alpha=0.25)


def _legend() -> list[Line2D]:
    def mark(label: str, **style: object) -> Line2D:
        return Line2D([], [], label=label, **{"linestyle": "none", **style})  # type: ignore[arg-type]

    charge = [mark(f"{name} charge", marker="s", color=color) for color, name in CHARGES.values()]
    return [
        *charge,
        mark("start and simulated path", marker=".", linestyle="-", color="gray"),
        mark("simulated end", marker="o", markersize=8, color="gray"),
        mark("predicted end", marker="x", markersize=8, mew=1.6, color="black"),
    ]


def _paths(systems: Systems, chosen: npt.NDArray[np.int64], time_steps: int) -> Array:
    """Positions ``[S, T, 3, P]`` from the input to the target frame, simulated again."""
    start = InitialState(
        systems.charges[chosen].double().numpy(),
        systems.x[chosen].double().transpose(1, 2).numpy(),
        systems.v[chosen].double().transpose(1, 2).numpy(),
    )
    later = simulate(start, time_steps, sample_every=_PATH_EVERY)[0]
    return np.concatenate([start.x[:, None], later], axis=1)


def _save(figure: Figure, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    write_atomic(path, buffer.getbuffer())
