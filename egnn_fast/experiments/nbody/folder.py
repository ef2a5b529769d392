"""The folder of a run: its files, its metrics, its checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from egnn_fast.experiments import checkpoint
from egnn_fast.experiments.errors import CheckpointError, UsageError
from egnn_fast.experiments.io import remove_leftovers, writable_folder, write_atomic

RUN_KIND = "egnn_fast n-body run, version 1"
MODEL_KIND = "egnn_fast n-body model, version 1"
_RUN_KEYS = ("config", "epochs", "model", "optimizer", "shuffle", "history", "threads")
_MODEL_KEYS = ("config", "epoch", "val_mse", "test_mse", "model")
_HEADER = "epoch,train_mse,val_mse,test_mse\n"


class Best(NamedTuple):
    """The epoch with the lowest validation error."""

    epoch: int
    val_mse: float
    test_mse: float


@dataclass
class History:
    """Errors of each epoch.

    Attributes
    ----------
    train, val, test : list of float
        Mean squared errors, one for each epoch; NaN in epochs without validation and test.
    """

    train: list[float] = field(default_factory=list)
    val: list[float] = field(default_factory=list)
    test: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        """Number of finished epochs."""
        return len(self.train)

    def append(self, train: float, val: float, test: float) -> None:
        """Add an epoch."""
        self.train.append(train)
        self.val.append(val)
        self.test.append(test)

    @property
    def best(self) -> Best | None:
        """The first epoch with the lowest validation error; None before the first validation."""
        tested = [epoch for epoch, value in enumerate(self.val) if not math.isnan(value)]
        if not tested:
            return None
        epoch = min(tested, key=self.val.__getitem__)
        return Best(epoch, self.val[epoch], self.test[epoch])

    def row(self, epoch: int) -> str:
        """A line of ``metrics.csv``. Each number reads back as the same float."""
        values = (self.train[epoch], self.val[epoch], self.test[epoch])
        return ",".join([str(epoch), *("" if math.isnan(v) else repr(v) for v in values)]) + "\n"

    def to_tensor(self) -> Tensor:
        """``[epochs, 3]``, float64."""
        rows = [self.train, self.val, self.test]
        return torch.tensor(rows, dtype=torch.float64, device="cpu").T.contiguous()

    @classmethod
    def from_tensor(cls, values: Tensor) -> History:
        """The inverse of :meth:`to_tensor`."""
        train, val, test = values.T.tolist()
        return cls(train, val, test)


class RunFolder:
    """Files of one run.

    Parameters
    ----------
    path : Path
        The folder; made if it does not exist.
    resume : bool
        Continue the run in the folder.
    overwrite : bool
        Remove the run in the folder, if there is one.

    Raises
    ------
    UsageError
        The folder cannot be written to; it has a run, but neither ``resume`` nor ``overwrite`` is
        set; or it has none, but ``resume`` is set.
    """

    def __init__(self, path: Path, *, resume: bool = False, overwrite: bool = False) -> None:
        if resume and overwrite:
            raise UsageError("--resume and --overwrite exclude each other")
        self.path = path
        self.metrics = path / "metrics.csv"
        self.last = path / "last.pt"
        self.best = path / "best.pt"
        self.summary = path / "summary.json"
        self.curve = path / "curve.png"
        self.trajectories = path / "trajectories.png"
        if resume and not self.last.exists():
            raise UsageError(f"--resume: there is no run in {path} (no {self.last.name})")
        writable_folder(path, "--out")
        existing = [file for file in self._files() if file.exists()]
        if existing and not (resume or overwrite):
            raise UsageError(
                f"--out: {path} already holds a run; --resume continues it, --overwrite removes it"
            )
        if overwrite:
            for file in existing:
                file.unlink()
        remove_leftovers(path)

    def _files(self) -> Iterator[Path]:
        # The checkpoint is removed first: if the process is killed before the rest is removed, no
        # run without metrics can be resumed.
        yield from (self.last, self.best, self.metrics)
        yield from (self.summary, self.curve, self.trajectories)

    def start_metrics(self, history: History) -> IO[str]:
        """Write ``metrics.csv`` with the rows of ``history`` and open it for appending."""
        rows = "".join(history.row(epoch) for epoch in range(len(history)))
        write_atomic(self.metrics, _HEADER + rows)
        return self.metrics.open("a", encoding="utf-8")

    def save_run(self, content: dict[str, Any]) -> None:
        """Write ``last.pt``, which has all that resuming needs."""
        assert set(content) == set(_RUN_KEYS)
        checkpoint.save(self.last, RUN_KIND, content)

    def load_run(self) -> dict[str, Any]:
        """Read what :meth:`save_run` wrote, the history as :class:`History`.

        Raises
        ------
        CheckpointError
            The file is missing, damaged or of another kind.
        """
        content = checkpoint.load(self.last, RUN_KIND, _RUN_KEYS)
        values = content["history"]
        epochs = content["epochs"]
        if not (isinstance(values, Tensor) and values.shape == (epochs, 3)):
            raise CheckpointError(f"the checkpoint {self.last} does not fit: its history is wrong")
        content["history"] = History.from_tensor(values)
        return content

    def save_best(self, config: dict[str, Any], best: Best, state: dict[str, Tensor]) -> None:
        """Write ``best.pt``, the model with the lowest validation error so far."""
        content = {"config": config, **best._asdict(), "model": state}
        checkpoint.save(self.best, MODEL_KIND, content)

    def load_best(self) -> dict[str, Any]:
        """Read what :meth:`save_best` wrote.

        Raises
        ------
        CheckpointError
            The file is missing, damaged or of another kind.
        """
        return checkpoint.load(self.best, MODEL_KIND, _MODEL_KEYS)
