"""Training steps per second beside those of the eager reference."""

from __future__ import annotations

import itertools
import statistics
import time
from typing import NamedTuple

import torch

from egnn_fast.experiments.nbody.config import Config
from egnn_fast.experiments.nbody.data import Systems
from egnn_fast.experiments.nbody.task import Trainer, batches
from egnn_fast.experiments.nbody.train import make_trainer

ROUNDS = 9
SECONDS = 0.3  # time of each backend in each round
WARM_UP = 5  # steps before timing


class Speed(NamedTuple):
    """Optimiser steps per second: medians of rounds in which the two backends alternate."""

    run: float
    reference: float

    @property
    def ratio(self) -> float:
        """How many times faster than the reference the run is."""
        return self.run / self.reference


def measure(config: Config, train: Systems) -> Speed:
    """Time the run's backend and the eager reference on new models with the same weights.

    Batches, loop, optimiser, device, precision and threads are the same for both. The batches are
    made before; that time does not count.
    """
    order = torch.arange(min(len(train), 10 * config.batch_size), device=train.x.device)
    cycle = list(batches(train, order, config.batch_size))
    trainers = [make_trainer(config), make_trainer(config, backend="reference")]
    for trainer in trainers:
        for batch in itertools.islice(itertools.cycle(cycle), WARM_UP):
            trainer.step(batch)
    rates: list[list[float]] = [[], []]
    for _ in range(ROUNDS):
        for trainer, samples in zip(trainers, rates, strict=True):
            samples.append(_rate(trainer, cycle))
    return Speed(statistics.median(rates[0]), statistics.median(rates[1]))


def _rate(trainer: Trainer, cycle: list[Systems]) -> float:
    """Steps per second over at least ``SECONDS``."""
    done = 0
    start = now = time.perf_counter()
    while now - start < SECONDS:
        for batch in cycle:
            trainer.step(batch)
        if trainer.fabric.device.type == "cuda":
            torch.cuda.synchronize(trainer.fabric.device)
        done += len(cycle)
        now = time.perf_counter()
    return done / (now - start)
