"""Options of a run of the n-body experiment. Imports neither PyTorch nor NumPy."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from egnn_fast.experiments.errors import CheckpointError, UsageError
from egnn_fast.runtime.backend_names import AUTO, BACKENDS

PRECISIONS = ("32-true", "64-true", "bf16-mixed")
DATA_SYSTEMS = 3000  # training systems of the official run; the cache holds at least so many
MAX_TRAIN_SYSTEMS = 10000


@dataclass(frozen=True)
class Config:
    """Options of a training run. The defaults are the official ones, except ``epochs``.

    Attributes
    ----------
    epochs : int
        Passes over the training set. The paper's run has 10,000, but reaches its best validation
        error within the first few hundred.
    seed : int
        Seed of the initial weights and of the order of the batches.
    lr, weight_decay : float
        Adam's learning rate and weight decay.
    batch_size : int
        Systems in an optimiser step.
    hidden, layers : int
        Width H and number of layers.
    train_systems : int
        Number of training systems; the first ones of the data set are used.
    test_every : int
        Epochs between validations. The first validation is in epoch 0.
    backend : str
        See :func:`egnn_fast.use_backend`.
    device : str
        "cpu", "cuda", "cuda:N" or "auto".
    precision : str
        One of ``PRECISIONS``, which are Lightning Fabric's names.
    """

    epochs: int = 300
    seed: int = 1
    lr: float = 5e-4
    weight_decay: float = 1e-12
    batch_size: int = 100
    hidden: int = 64
    layers: int = 4
    train_systems: int = DATA_SYSTEMS
    test_every: int = 5
    backend: str = AUTO
    device: str = "cpu"
    precision: str = "32-true"

    def __post_init__(self) -> None:
        """Check the options.

        Raises
        ------
        UsageError
            An option is wrong; the message names it.
        """
        for name in ("epochs", "batch_size", "hidden", "layers", "train_systems", "test_every"):
            if getattr(self, name) < 1:
                raise UsageError(f"{option(name)}: expected at least 1, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"--seed: expected 0 to 2**63 - 1, got {self.seed}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise UsageError(f"--lr: expected a positive number, got {self.lr}")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise UsageError(
                f"--weight-decay: expected a number of at least 0, got {self.weight_decay}"
            )
        if self.train_systems > MAX_TRAIN_SYSTEMS:
            raise UsageError(
                f"--train-systems: expected at most {MAX_TRAIN_SYSTEMS}, got {self.train_systems}"
            )
        if self.batch_size > self.train_systems:
            raise UsageError(
                f"--batch-size: expected at most the {self.train_systems} training systems, "
                f"got {self.batch_size}"
            )
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise UsageError(
                f"--device: expected 'cpu', 'cuda', 'cuda:N' or 'auto', got {self.device!r}"
            )
        if self.backend not in (AUTO, *BACKENDS):
            raise UsageError(
                f"--backend: expected one of {', '.join((AUTO, *BACKENDS))}, got {self.backend!r}"
            )
        if self.precision not in PRECISIONS:
            raise UsageError(
                f"--precision: expected one of {', '.join(PRECISIONS)}, got {self.precision!r}"
            )

    def to_dict(self) -> dict[str, Any]:
        """The options as plain values, for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_checkpoint(cls, saved: Mapping[str, Any], path: Path) -> Config:
        """The options that the checkpoint ``path`` stores.

        Raises
        ------
        CheckpointError
            ``saved`` are not options of a run.
        """
        known = {field.name for field in fields(cls)}
        if not isinstance(saved, Mapping) or set(saved) != known:
            raise CheckpointError(
                f"the checkpoint {path} does not fit: its options are not a run's"
            )
        try:
            return cls(**saved)
        except (TypeError, UsageError) as error:
            raise CheckpointError(f"the checkpoint {path} does not fit: {error}") from error

    def resumed(self, options: Mapping[str, Any]) -> Config:
        """These options, of a run to resume, updated by the user's. Only ``epochs`` may change.

        Raises
        ------
        UsageError
            Another option has a new value.
        """
        for name, value in options.items():
            if name != "epochs" and value != getattr(self, name):
                raise UsageError(
                    f"{option(name)}: the run to resume was started with {getattr(self, name)}, "
                    f"got {value}"
                )
        return Config(**{**self.to_dict(), **options})


def option(name: str) -> str:
    """The command-line option of a field."""
    return "--" + name.replace("_", "-")
