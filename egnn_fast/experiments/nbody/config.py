"""What a run of the n-body experiment is made with. Imports neither torch nor NumPy."""

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
DATA_SYSTEMS = 3000  # training systems of the official run, those that the cache holds
MAX_TRAIN_SYSTEMS = 10000


@dataclass(frozen=True)
class Config:
    """Options of a training run; the defaults are the official ones, but for the epochs.

    Attributes
    ----------
    epochs : int
        Passes over the training set. The paper's run has 10,000; the best validation error comes
        within the first few hundred.
    seed : int
        Of the initial weights and of the order of the batches.
    lr, weight_decay : float
        Of Adam.
    batch_size : int
        Systems of an optimiser step.
    hidden, layers : int
        Width and number of layers.
    train_systems : int
        The first so many training systems.
    test_every : int
        Epochs between validations, the first of them in epoch 0.
    backend : str
        See :func:`egnn_fast.use_backend`.
    device : str
        "cpu", "cuda", "cuda:N" or "auto".
    precision : str
        One of Lightning Fabric's.
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
        """Refuse options that no run can have.

        Raises
        ------
        UsageError
            Names the command-line option.
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
        """Plain values, as a checkpoint keeps them."""
        return asdict(self)

    @classmethod
    def from_checkpoint(cls, saved: Mapping[str, Any], path: Path) -> Config:
        """The options that a checkpoint was made with.

        Raises
        ------
        CheckpointError
            They are not those of a run.
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

    def resumed(self, given: Mapping[str, Any]) -> Config:
        """The checkpoint's options with those the user gave; only ``epochs`` may differ.

        Raises
        ------
        UsageError
            An option was given that would make it another run.
        """
        for name, value in given.items():
            if name != "epochs" and value != getattr(self, name):
                raise UsageError(
                    f"{option(name)}: the run to resume was started with {getattr(self, name)}, "
                    f"got {value}"
                )
        return Config(**{**self.to_dict(), **given})


def option(name: str) -> str:
    """A field's name on the command line."""
    return "--" + name.replace("_", "-")
