"""What can go wrong in an experiment, told in one line."""

from __future__ import annotations


class ExperimentError(Exception):
    """A run cannot go on; the message is one line, made to be read by a person.

    ``exit_code`` is what the command line returns.
    """

    exit_code = 1


class UsageError(ExperimentError):
    """What was asked for cannot be done: a wrong option, folder or device."""

    exit_code = 2


class CacheError(ExperimentError):
    """A cached data set is not whole, or not what its name says."""


class CheckpointError(ExperimentError):
    """A checkpoint is not whole, of another kind, or does not fit the model."""


class TrainingError(ExperimentError):
    """Training diverged."""
