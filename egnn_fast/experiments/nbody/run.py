"""``egnn-fast train nbody``: a run from its options to its pictures, told on a terminal."""

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

_PLAIN_LINES = 20  # of progress where there is no terminal


def run(
    given: Mapping[str, Any],
    out: Path,
    console: Console,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> None:
    """Train the n-body model and report.

    Parameters
    ----------
    given : mapping
        The fields of :class:`Config` that the user gave; the others are those of the run to be
        resumed, or the defaults.
    out : Path
        The folder of the run.
    console : Console
        Where to tell of it.
    resume, overwrite : bool
        What to do with a run that the folder holds.

    Raises
    ------
    ExperimentError
        In one line, what cannot be done; as far as it can be known, before any work.
    """
    config = Config(**given)
    folder = RunFolder(out, resume=resume, overwrite=overwrite)
    saved = None
    if resume:
        saved = folder.load_run()
        config = Config.from_checkpoint(saved["config"], folder.last).resumed(given)
        _check_resumable(saved, config, console)
    ran = try_out(config)
    spec = DataSpec(train=max(DATA_SYSTEMS, config.train_systems))
    data = _load(spec, config, console)
    console.print(
        f"EGNN, {config.layers} layers, H = {config.hidden}, on {len(data.train)} systems; "
        f"backend {ran}, {torch.get_num_threads()} threads; results in {folder.path}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    with _progress_of_training(console, config, 0 if saved is None else saved["epochs"]) as tell:
        trainer, history = train(config, data, folder, resume=saved, on_epoch=tell)
    console.print("timing the training step beside the eager reference ...")
    measured = speed.measure(config, data.train)
    _use_best(trainer, folder)
    predicted = trainer.predict(data.test).double().cpu().numpy()
    plots.curve(history, config, folder.curve)
    time_steps = spec.sample_every * (spec.frame_out - spec.frame_in)
    plots.trajectories(data.test.to("cpu"), predicted, time_steps, folder.trajectories)
    summary.write(folder, config, spec, history, measured, ran)
    console.print(summary.table(history, measured, ran))
    # a long path must stay in one piece
    console.print(summary.paths(folder), highlight=False, markup=False, soft_wrap=True)


def _check_resumable(saved: Mapping[str, Any], config: Config, console: Console) -> None:
    done = saved["epochs"]
    if config.epochs < done:
        raise UsageError(f"--epochs: the run to resume has {done} epochs already")
    if done == config.epochs:
        console.print(f"all {done} epochs are done; a larger --epochs continues the run")
    threads = torch.get_num_threads()
    if saved["threads"] != threads:
        console.print(
            f"[yellow]note:[/] the run was started on {saved['threads']} threads and goes on with "
            f"{threads}: the last bits will differ from an uninterrupted run's"
        )


def _load(spec: DataSpec, config: Config, console: Console) -> Splits:
    known = cache_path(spec).exists()
    with Progress(
        TextColumn("simulating {task.fields[systems]} systems"),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=known,
        disable=known,
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
def _progress_of_training(
    console: Console, config: Config, done: int
) -> Iterator[Callable[[EpochReport], None]]:
    """A bar on a terminal, a few lines elsewhere."""
    every = max(1, config.epochs // _PLAIN_LINES)
    with Progress(
        TextColumn("epoch"),
        MofNCompleteColumn(),
        BarColumn(bar_width=12),
        TextColumn("{task.fields[told]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("", total=config.epochs, completed=done, told="")

        def tell(report: EpochReport) -> None:
            best = report.history.best
            told = f"loss {report.history.train[-1]:.4f}"
            if best is not None:  # at the best validation error so far
                told += f"  test {best.test_mse:.4f}"
            told += f"  {report.steps_per_second:.0f} steps/s"
            progress.update(task, completed=report.epoch + 1, told=told)
            if not console.is_terminal and (report.epoch + 1) % every == 0:
                console.print(f"epoch {report.epoch + 1}/{config.epochs}  {told}", highlight=False)

        yield tell


def _use_best(trainer: Trainer, folder: RunFolder) -> None:
    checkpoint.load_state(trainer.model.egnn, folder.load_best()["model"], folder.best)
