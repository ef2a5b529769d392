"""``egnn-fast train nbody``: train, time, draw and report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from egnn_fast.experiments import checkpoint
from egnn_fast.experiments.errors import UsageError
from egnn_fast.experiments.nbody import plots, speed, summary
from egnn_fast.experiments.nbody.config import DATA_SYSTEMS, Config
from egnn_fast.experiments.nbody.data import DataSpec, Splits, cache_path, splits
from egnn_fast.experiments.nbody.folder import RunFolder
from egnn_fast.experiments.nbody.task import Trainer
from egnn_fast.experiments.nbody.train import (
    EpochReport,
    data_dtype,
    make_fabric,
    train,
    try_out,
)

_PROGRESS_LINES = 20  # lines of progress in a run, if the output is not a terminal


def run(
    options: Mapping[str, Any],
    out: Path,
    console: Console,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> None:
    """Train the n-body model and report.

    Parameters
    ----------
    options : mapping
        Fields of :class:`Config`. Missing ones are taken from the run to resume, or are the
        defaults.
    out : Path
        The folder of the run.
    console : Console
        Where progress and results are printed.
    resume, overwrite : bool
        See :class:`RunFolder`.

    Raises
    ------
    ExperimentError
        The run is impossible or failed. Wrong options raise before data is made.
    """
    config = Config(**options)
    folder = RunFolder(out, resume=resume, overwrite=overwrite)
    saved = None
    if resume:
        saved = folder.load_run()
        config = Config.from_checkpoint(saved["config"], folder.last).resumed(options)
        _check_resumable(saved, config, console)
    backend = try_out(config)
    spec = DataSpec(train=max(DATA_SYSTEMS, config.train_systems))
    data = _load(spec, config, console)
    console.print(
        f"EGNN, {config.layers} layers, H = {config.hidden}, on {len(data.train)} systems; "
        f"backend {backend}, {torch.get_num_threads()} threads; results in {folder.path}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    epochs_done = 0 if saved is None else saved["epochs"]
    with _training_progress(console, config, epochs_done) as show_epoch:
        trainer, history = train(config, data, folder, resume=saved, on_epoch=show_epoch)
    console.print("timing the training step beside the eager reference ...")
    steps_per_second = speed.measure(config, data.train)
    _load_best_weights(trainer, folder)
    predicted = trainer.predict(data.test).double().cpu().numpy()
    plots.curve(history, config, folder.curve)
    time_steps = spec.sample_every * (spec.frame_out - spec.frame_in)
    plots.trajectories(data.test.to("cpu"), predicted, time_steps, folder.trajectories)
    summary.write(folder, config, spec, history, steps_per_second, backend)
    console.print(summary.table(history, steps_per_second, backend))
    # soft_wrap: do not break long paths
    console.print(summary.paths(folder), highlight=False, markup=False, soft_wrap=True)


def _check_resumable(saved: Mapping[str, Any], config: Config, console: Console) -> None:
    """Raise UsageError if the run has more epochs than asked for; print what may surprise."""
    done = saved["epochs"]
    if config.epochs < done:
        raise UsageError(f"--epochs: the run to resume has {done} epochs already")
    if done == config.epochs:
        console.print(f"all {done} epochs are done; a larger --epochs continues the run")
    threads = torch.get_num_threads()
    if saved["threads"] != threads:
        console.print(
            f"[yellow]note:[/] the run was started on {saved['threads']} threads and continues on "
            f"{threads}: its numbers may differ in the last bits from an uninterrupted run's"
        )


def _load(spec: DataSpec, config: Config, console: Console) -> Splits:
    """The data set, with a progress bar if it has to be simulated."""
    cached = cache_path(spec).exists()
    with Progress(
        TextColumn("simulating {task.fields[systems]} systems"),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=cached,
        disable=cached,
    ) as progress:
        task = progress.add_task("", total=1.0, systems=spec.size)
        data = splits(
            spec,
            device=make_fabric(config).device,
            dtype=data_dtype(config),
            on_progress=lambda fraction: progress.advance(task, fraction),
        )
    console.print(f"data: {cache_path(spec)}", highlight=False, soft_wrap=True)
    return Splits(data.train[: config.train_systems], data.val, data.test)


@contextmanager
def _training_progress(
    console: Console, config: Config, epochs_done: int
) -> Iterator[Callable[[EpochReport], None]]:
    """Give a function that shows an epoch: in a bar on a terminal, else in a few lines."""
    every = max(1, config.epochs // _PROGRESS_LINES)
    with Progress(
        TextColumn("epoch"),
        MofNCompleteColumn(),
        BarColumn(bar_width=12),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("", total=config.epochs, completed=epochs_done, status="")

        def show_epoch(report: EpochReport) -> None:
            best = report.history.best
            status = f"loss {report.history.train[-1]:.4f}"
            if best is not None:  # the test error at the best validation error so far
                status += f"  test {best.test_mse:.4f}"
            status += f"  {report.steps_per_second:.0f} steps/s"
            progress.update(task, completed=report.epoch + 1, status=status)
            if not console.is_terminal and (report.epoch + 1) % every == 0:
                line = f"epoch {report.epoch + 1}/{config.epochs}  {status}"
                console.print(line, highlight=False)

        yield show_epoch


def _load_best_weights(trainer: Trainer, folder: RunFolder) -> None:
    checkpoint.load_state(trainer.model.egnn, folder.load_best()["model"], folder.best)
