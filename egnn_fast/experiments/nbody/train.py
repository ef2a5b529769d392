"""The training loop. Each epoch writes a checkpoint and a line of metrics."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from lightning_fabric import Fabric

from egnn_fast import backends
from egnn_fast.experiments import checkpoint
from egnn_fast.experiments.errors import CheckpointError, TrainingError, UsageError
from egnn_fast.experiments.nbody.config import Config
from egnn_fast.experiments.nbody.data import Splits, Systems
from egnn_fast.experiments.nbody.folder import History, RunFolder
from egnn_fast.experiments.nbody.task import Trainer, make_model


class EpochReport(NamedTuple):
    """What :func:`train` passes to ``on_epoch`` after each epoch."""

    epoch: int
    history: History
    steps_per_second: float


def make_fabric(config: Config) -> Fabric:
    """Lightning Fabric on one device.

    Raises
    ------
    UsageError
        The device does not exist.
    """
    name, _, index = config.device.partition(":")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(index or 0) >= count:
            raise UsageError(f"--device: {config.device} is not there; CUDA devices found: {count}")
    devices = [int(index)] if index else 1
    fabric = Fabric(accelerator=name, devices=devices, precision=config.precision)  # type: ignore[arg-type]
    fabric.launch()
    return fabric


def make_trainer(config: Config, *, backend: str | None = None) -> Trainer:
    """The trainer of a run, with the initial weights.

    Parameters
    ----------
    config : Config
        The run's options.
    backend : str, optional
        Used instead of ``config.backend``.
    """
    model = make_model(
        config.seed,
        hidden=config.hidden,
        layers=config.layers,
        backend=backend or config.backend,
    )
    return Trainer(make_fabric(config), model, config.lr, config.weight_decay)


def data_dtype(config: Config) -> torch.dtype:
    """The dtype of the data set's tensors."""
    return torch.float64 if config.precision == "64-true" else torch.float32


# The dtype of the layers' inputs by precision: Fabric converts a batch before the forward.
_LAYER_DTYPES = {
    "32-true": torch.float32,
    "64-true": torch.float64,
    "bf16-mixed": torch.bfloat16,
}


def _backend_of_layers(config: Config, device: torch.device) -> str:
    """The backend that runs the model's layers and, in brackets, its instruction set."""
    dtype = _LAYER_DTYPES[config.precision]
    call = backends.Call(device.type, dtype, config.hidden, 3, "silu")
    explanation = backends.explain_call(config.backend, call)
    return f"{explanation.backend} ({explanation.instruction_set})"


def try_out(config: Config) -> str:
    """Take one training step on random systems, so that wrong options fail before data is made.

    Returns the backend that runs the layers and, in brackets, its instruction set.

    Raises
    ------
    UsageError
        The device does not exist, or the backend cannot run the model on it.
    """
    trainer = make_trainer(config)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        dtype = data_dtype(config)
        values = torch.randn(2, *shape, generator=generator, dtype=dtype, device="cpu")
        return values.to(trainer.fabric.device)

    batch = Systems(draw(5, 1), draw(5, 3), draw(5, 3), draw(20, 2), draw(5, 3), draw(5))
    try:
        backend = _backend_of_layers(config, trainer.fabric.device)
        trainer.step(batch)
    except backends.BackendError as error:
        raise UsageError(f"--backend: {error}") from error
    return backend


def train(
    config: Config,
    data: Splits,
    folder: RunFolder,
    *,
    resume: dict[str, Any] | None = None,
    on_epoch: Callable[[EpochReport], None] | None = None,
) -> tuple[Trainer, History]:
    """Train, or continue training.

    Each epoch adds a line to ``metrics.csv`` and writes ``last.pt``, which has all that resuming
    needs. So a run that is killed and resumed has the same metrics and weights, bit for bit, as an
    uninterrupted one.

    Parameters
    ----------
    config : Config
        The run's options.
    data : Splits
        The data set, on the device that ``config`` names.
    folder : RunFolder
        Where the results are written.
    resume : dict, optional
        What :meth:`RunFolder.load_run` returned, to continue that run.
    on_epoch : callable, optional
        Called after each epoch.

    Returns
    -------
    trainer, history
        With the weights after the last epoch.

    Raises
    ------
    TrainingError
        The loss is not finite. The checkpoint of the epoch before stays.
    CheckpointError
        The checkpoint does not fit the model.
    """
    trainer = make_trainer(config)
    shuffle = torch.Generator().manual_seed(config.seed)
    history = History()
    if resume is not None:
        history = resume["history"]
        _restore(trainer, shuffle, resume, folder)

    def save() -> None:
        folder.save_run(
            {
                "config": config.to_dict(),
                "epochs": len(history),
                "model": trainer.model.egnn.state_dict(),
                "optimizer": trainer.optimizer.state_dict(),
                "shuffle": shuffle.get_state(),
                "history": history.to_tensor(),
                "threads": torch.get_num_threads(),
            }
        )

    save()  # from here on the run can be resumed
    steps = len(data.train) // config.batch_size
    with folder.start_metrics(history) as metrics:
        for epoch in range(len(history), config.epochs):
            start = time.perf_counter()
            order = torch.randperm(len(data.train), generator=shuffle, device="cpu")
            order = order.to(data.train.x.device)
            loss = trainer.epoch(data.train, order, config.batch_size)
            rate = steps / (time.perf_counter() - start)
            if not math.isfinite(loss):
                raise TrainingError(
                    f"the training loss is {loss} in epoch {epoch}: try a lower --lr "
                    f"({folder.last} has the state before this epoch)"
                )
            val = test = math.nan
            if epoch % config.test_every == 0:
                val, test = trainer.evaluate(data.val), trainer.evaluate(data.test)
            history.append(loss, val, test)
            best = history.best
            if best is not None and best.epoch == epoch:
                # Before last.pt: if the process is killed in between, resuming repeats this epoch
                # and writes the same again.
                folder.save_best(config.to_dict(), best, trainer.model.egnn.state_dict())
            metrics.write(history.row(epoch))
            metrics.flush()
            save()
            if on_epoch is not None:
                on_epoch(EpochReport(epoch, history, rate))
    return trainer, history


def _restore(
    trainer: Trainer, shuffle: torch.Generator, resume: dict[str, Any], folder: RunFolder
) -> None:
    """Load weights, optimiser state and generator state; raises CheckpointError."""
    checkpoint.load_state(trainer.model.egnn, resume["model"], folder.last)
    try:
        trainer.optimizer.load_state_dict(resume["optimizer"])
        shuffle.set_state(resume["shuffle"])
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"the checkpoint {folder.last} does not fit: {reason}") from error
