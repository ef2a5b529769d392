"""Results of a run, as a table and as JSON."""

from __future__ import annotations

import json
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.table import Table

import egnn_fast
from egnn_fast.experiments.io import write_atomic
from egnn_fast.experiments.nbody.config import Config
from egnn_fast.experiments.nbody.data import DataSpec, cache_path
from egnn_fast.experiments.nbody.folder import History, RunFolder
from egnn_fast.experiments.nbody.speed import Speed

# Test MSE in table 2 of arXiv 2102.09844
PAPER = {
    "Linear": 0.0819,
    "SE(3)-Transformer": 0.0244,
    "Tensor Field Network": 0.0155,
    "GNN": 0.0107,
    "Radial Field": 0.0104,
    "EGNN": 0.0071,
}


def write(
    folder: RunFolder, config: Config, spec: DataSpec, history: History, speed: Speed, backend: str
) -> None:
    """Write ``summary.json``. ``backend`` is what :func:`try_out` returned."""
    best = history.best
    content: dict[str, Any] = {
        "options": config.to_dict(),
        "epochs_done": len(history),
        "last_train_mse": history.train[-1],
        "best": best._asdict() if best is not None else None,
        "paper_test_mse": PAPER,
        "steps_per_second": {
            "backend": backend,
            "run": speed.run,
            "reference": speed.reference,
            "ratio": speed.ratio,
        },
        "environment": {
            "egnn_fast": egnn_fast.__version__,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        },
        "files": {
            "data": str(cache_path(spec)),
            "metrics": str(folder.metrics),
            "best_model": str(folder.best),
            "curve": str(folder.curve),
            "trajectories": str(folder.trajectories),
        },
    }
    write_atomic(folder.summary, json.dumps(content, indent=2) + "\n")


def table(history: History, speed: Speed, backend: str) -> RenderableType:
    """Tables of test errors and of training steps per second."""
    best = history.best
    errors = Table(title="Test MSE on charged particles", title_justify="left")
    errors.add_column("model")
    errors.add_column("test MSE", justify="right")
    errors.add_column("source")
    paper = "arXiv 2102.09844, table 2"
    rows = [(value, name, paper, "") for name, value in PAPER.items()]
    if best is not None:
        source = f"this run, epoch {best.epoch} of {len(history)}"
        rows.append((best.test_mse, "EGNN, egnn_fast", source, "bold green"))
    for value, name, source, style in sorted(rows, key=lambda row: -row[0]):
        errors.add_row(name, f"{value:.4f}", source, style=style)
    steps = Table(title="Training steps per second", title_justify="left")
    steps.add_column("backend")
    steps.add_column("steps/s", justify="right")
    steps.add_column("ratio", justify="right")
    steps.add_row("reference (eager PyTorch)", f"{speed.reference:.1f}", "1.0x")
    steps.add_row(backend, f"{speed.run:.1f}", f"{speed.ratio:.1f}x", style="bold green")
    return Group(errors, steps)


def paths(folder: RunFolder) -> str:
    """The paths of the results, one in a line."""
    files = (folder.curve, folder.trajectories, folder.metrics, folder.best, folder.summary)
    return "\n".join(f"{file.stem:<13} {file}" for file in files)
