"""Errors of experiments. Each message is one line, which the command line prints."""

from __future__ import annotations


class ExperimentError(Exception):
    """The run cannot continue. ``exit_code`` is that of the command line."""

    exit_code = 1


class UsageError(ExperimentError):
    """An option, folder or device is wrong."""

    exit_code = 2


class CacheError(ExperimentError):
    """A cached data set is damaged, or was made with other parameters than its name says."""


class CheckpointError(ExperimentError):
    """A checkpoint is missing, damaged, of another kind, or does not fit the model."""


class TrainingError(ExperimentError):
    """Training diverged: the loss is not finite."""
