"""Charged particles in space, many systems at once, to the last bit as officially simulated.

The dynamics is chaotic: in some systems the last bit of one force decides where the particles
are after 4,000 steps. The order and rounding of every operation is therefore part of the
definition. Where the official code leaves one to a library, :class:`_Forces` states it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

DIM = 3
BOX = 5.0  # walls at ±BOX, felt by the initial state only
SPEED = 0.5  # of every particle at the start
TIME_STEP = 0.001
STRENGTH = 1.0
MAX_FORCE = 100.0  # per component
# Systems simulated together: fewer fit a smaller cache, but then the threads hand each other the
# interpreter lock more often than they compute.
CHUNK = 3500
_REPORT_EVERY = 50  # steps

_SPLITTER = 2.0**27 + 1.0  # Veltkamp: cuts a double in two halves of 26 bits


@dataclass(frozen=True)
class InitialState:
    """Charged particles at time 0.

    Attributes
    ----------
    charges : Array [S, P]
        -1 or 1.
    x, v : Array [S, 3, P]
        Positions and velocities, component before particle, as officially stored.
    """

    charges: Array
    x: Array
    v: Array

    def __len__(self) -> int:
        """S, the number of systems."""
        return len(self.charges)

    def __getitem__(self, index: slice | npt.NDArray[np.int64]) -> InitialState:
        """Some of the systems."""
        return InitialState(self.charges[index], self.x[index], self.v[index])


def draw_initial_states(
    count: int, *, seed: int, particles: int = 5, frames: int = 49
) -> InitialState:
    """Draw the initial states of the first systems of the official data set.

    Parameters
    ----------
    count : int
        S, how many.
    seed : int
        Of NumPy's legacy generator.
    particles : int
        P.
    frames : int
        Frames that the official simulation stores: it draws (and multiplies by 0) noise for each,
        which moves the generator on.

    Returns
    -------
    InitialState
        After the rescaling of v to speed 0.5 and the reflection at the walls.
    """
    # the legacy generator: the data set is defined by it
    generator = np.random.RandomState(seed)
    charges = np.empty((count, particles))
    x = np.empty((count, DIM, particles))
    v = np.empty_like(x)
    state = DIM * particles
    noise = 2 * frames * state
    for system in range(count):
        charges[system] = generator.choice([-1.0, 0.0, 1.0], size=particles, p=[0.5, 0.0, 0.5])
        # one call for positions, velocities and noise: the legacy stream does not tell calls apart
        normal = generator.randn(2 * state + noise)
        x[system] = normal[:state].reshape(DIM, particles)
        v[system] = normal[state : 2 * state].reshape(DIM, particles)
    v = v * SPEED / np.sqrt((v**2).sum(axis=1, keepdims=True))
    _reflect(x, v)
    return InitialState(charges, x, v)


def simulate(
    initial: InitialState,
    steps: int,
    *,
    sample_every: int = 100,
    first_sample: int | None = None,
    threads: int | None = None,
    on_progress: Callable[[float], None] | None = None,
) -> tuple[Array, Array]:
    """Integrate Coulomb's law: one kick ``v += dt F``, then steps of drift and kick.

    Parameters
    ----------
    initial : InitialState
        S systems; not modified.
    steps : int
        The time steps taken; a state is stored at each multiple of ``sample_every`` below or at
        ``steps``, after the drift and before the kick. The official 5,000 steps are
        ``steps=4999``.
    sample_every : int
        Steps between stored states.
    first_sample : int, optional
        Step of the first stored state, a multiple of ``sample_every``, which it defaults to.
    threads : int, optional
        Defaults to the cores of the machine. The result does not depend on it.
    on_progress : callable, optional
        Told, now and then and from any thread, what further fraction of the work is done.

    Returns
    -------
    x, v : Array [S, T, 3, P]
        The stored states. A system that meets r = 0 continues as NaN.
    """
    first = sample_every if first_sample is None else first_sample
    frames = max(0, (steps - first) // sample_every + 1)
    particles = initial.charges.shape[1]
    x = np.empty((len(initial), frames, DIM, particles))
    v = np.empty_like(x)
    workers = max(1, threads or _cores())
    # as many chunks as keep every thread busy
    size = max(1, min(CHUNK, -(-len(initial) // workers)))
    stop = threading.Event()

    def run(start: int) -> None:
        part = slice(start, min(start + size, len(initial)))
        done = 0
        for step in _simulate_chunk(initial[part], steps, sample_every, first, x[part], v[part]):
            if stop.is_set():
                return
            if on_progress is not None and (step % _REPORT_EVERY == 0 or step == steps):
                on_progress((step - done) * (part.stop - part.start) / (steps * len(initial)))
                done = step

    with ThreadPoolExecutor(workers) as pool:
        try:
            for _ in pool.map(run, range(0, len(initial), size)):
                pass
        except BaseException:  # Ctrl-C too: leaving the pool would wait for the threads
            stop.set()
            raise
    return x, v


def _simulate_chunk(
    initial: InitialState, steps: int, sample_every: int, first: int, x_out: Array, v_out: Array
) -> Iterator[int]:
    """Simulate, fill the outputs and yield the number of every step done."""
    # systems last: every operation runs over contiguous memory
    x = np.ascontiguousarray(initial.x.transpose(1, 2, 0))
    v = np.ascontiguousarray(initial.v.transpose(1, 2, 0))
    forces = _Forces(np.ascontiguousarray(initial.charges.T))
    change = np.empty_like(x)
    with np.errstate(all="ignore"):
        _advance(v, forces(x), change)
        for step in range(1, steps + 1):
            _advance(x, v, change)
            if step >= first and (step - first) % sample_every == 0:
                frame = (step - first) // sample_every
                x_out[:, frame] = x.transpose(2, 0, 1)
                v_out[:, frame] = v.transpose(2, 0, 1)
            if step < steps:  # the last kick would never be seen
                _advance(v, forces(x), change)
            yield step


def _advance(state: Array, rate: Array, change: Array) -> None:
    np.multiply(rate, TIME_STEP, out=change)
    np.add(state, change, out=state)


class _Forces:
    """F_i = sum_j q_i q_j (x_i - x_j) / r^3, each component clipped, for a chunk of systems.

    r^2 and x_i - x_j are (anti)symmetric to the bit, so each unordered pair is computed once:
    pairs (0, 1) ... (0, P-1), (1, 2) ..., along the axis before the systems.
    """

    def __init__(self, charges: Array) -> None:
        particles, systems = charges.shape
        self.rows: list[slice] = []
        start = 0
        for i in range(particles - 1):
            self.rows.append(slice(start, start + particles - 1 - i))
            start += particles - 1 - i
        self.size = np.empty((start, systems))
        self._pairs(np.multiply, charges, self.size)
        self.size *= STRENGTH
        self.dot = np.empty_like(self.size)
        self.r2 = np.empty_like(self.size)
        self.spare = np.empty_like(self.size)
        self.product = np.empty((DIM - 1, start, systems))
        self.error = np.empty_like(self.product)
        self.cross = np.empty_like(self.product)
        self.pull = np.empty((DIM, start, systems))
        self.square = np.empty((DIM, particles, systems))
        self.high = np.empty((DIM - 1, particles, systems))
        self.low = np.empty_like(self.high)
        self.force = np.empty_like(self.square)

    def _pairs(self, operation: np.ufunc, a: Array, out: Array, b: Array | None = None) -> None:
        """out[(i, j)] = operation(a_i, b_j) for i < j; b is a unless given."""
        b = a if b is None else b
        for i, row in enumerate(self.rows):
            operation(a[..., i : i + 1, :], b[..., i + 1 :, :], out=out[..., row, :])

    def __call__(self, x: Array) -> Array:
        """The forces ``[3, P, systems]`` at x; overwritten by the next call."""
        # r^2 = |a|^2 + |b|^2 - 2 a.b, which near a collision is far from the sum of (a - b)^2
        self._fused_products(x)
        np.multiply(x, x, out=self.square)
        norm = self.square[0]
        np.add(norm, self.square[1], out=norm)
        np.add(norm, self.square[2], out=norm)
        self._pairs(np.add, norm, self.r2)
        np.multiply(self.dot, 2.0, out=self.dot)
        np.subtract(self.r2, self.dot, out=self.r2)
        # float_power is the C library's pow: np.power has a vector version on some machines that
        # rounds 5 % of the values differently. (A correctly rounded power differs from glibc's in
        # 0.08 %: enough to move 8 of the 7,000 official systems by more than 0.1.)
        np.float_power(self.r2, 1.5, out=self.r2)
        np.divide(self.size, self.r2, out=self.r2)
        self._pairs(np.subtract, x, self.pull)
        np.multiply(self.pull, self.r2, out=self.pull)
        self._sum_over_senders()
        np.minimum(self.force, MAX_FORCE, out=self.force)
        np.maximum(self.force, -MAX_FORCE, out=self.force)
        return self.force

    def _fused_products(self, x: Array) -> None:
        """dot[(i, j)] = fma(z_i, z_j, fma(y_i, y_j, x_i x_j)), as a BLAS computes it.

        NumPy has no fused multiply-add. The rounding error e of a product p is a double itself
        (Dekker 1971), so fma(a, b, c) is p + c + e, the rounding error t of p + c (Knuth's
        two-sum) added with e at the end. It rounds like the real one but where the exact sum is
        within 2^-53 units in the last place of a tie.
        """
        tail = x[1:]
        high, low, product, error, cross = self.high, self.low, self.product, self.error, self.cross
        np.multiply(tail, _SPLITTER, out=low)
        np.subtract(low, tail, out=high)
        np.subtract(low, high, out=high)
        np.subtract(tail, high, out=low)
        self._pairs(np.multiply, tail, product)
        self._pairs(np.multiply, high, error)
        np.subtract(product, error, out=error)
        self._pairs(np.multiply, low, cross, high)
        np.subtract(error, cross, out=error)
        self._pairs(np.multiply, high, cross, low)
        np.subtract(error, cross, out=error)
        self._pairs(np.multiply, low, cross)
        np.subtract(cross, error, out=error)
        self._pairs(np.multiply, x[0], self.dot)
        total, spare = self.r2, self.spare
        for p, e in zip(product, error, strict=True):
            np.add(p, self.dot, out=total)
            np.subtract(total, p, out=spare)
            np.subtract(self.dot, spare, out=self.dot)
            np.subtract(total, spare, out=spare)
            np.subtract(p, spare, out=spare)
            np.add(spare, self.dot, out=spare)
            np.add(spare, e, out=spare)
            np.add(total, spare, out=self.dot)

    def _sum_over_senders(self) -> None:
        """force_i = the sum over j, in ascending order; a pair's pull on j is minus that on i."""
        particles = self.force.shape[1]
        self.force.fill(0.0)
        for i in range(particles):
            total = self.force[:, i]
            for j in range(particles):
                if j == i:
                    continue
                low, high = min(i, j), max(i, j)
                pull = self.pull[:, self.rows[low].start + high - low - 1]
                (np.add if i < j else np.subtract)(total, pull, out=total)


def _reflect(x: Array, v: Array) -> None:
    """Mirror at the walls, in place: a particle beyond one comes back, moving inwards."""
    over = x > BOX
    x[over] = 2 * BOX - x[over]
    v[over] = -np.abs(v[over])
    under = x < -BOX
    x[under] = -2 * BOX - x[under]
    v[under] = np.abs(v[under])


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
