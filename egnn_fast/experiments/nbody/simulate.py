"""Simulate charged particles, many systems at once, bit for bit as the official code does.

The dynamics is chaotic: in some systems the last bit of one force decides where the particles
are after 4,000 steps. So the order and rounding of every operation must be the official code's.
Where the official code calls a library, :class:`_Forces` says how the library rounds.
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
BOX = 5.0  # walls at ±BOX; only the initial state is reflected at them
SPEED = 0.5  # initial speed of every particle
TIME_STEP = 0.001
STRENGTH = 1.0
MAX_FORCE = 100.0  # per component
# Systems simulated together. Fewer would fit a smaller cache, but then the threads spend more time
# passing the interpreter lock around than computing.
CHUNK = 3500
_REPORT_EVERY = 50  # steps between calls of on_progress

_SPLITTER = 2.0**27 + 1.0  # Veltkamp's constant, to split a double into two halves of 26 bits


@dataclass(frozen=True)
class InitialState:
    """Charged particles at time 0.

    Attributes
    ----------
    charges : Array [S, P]
        -1 or 1.
    x, v : Array [S, 3, P]
        Positions and velocities, in the official layout.
    """

    charges: Array
    x: Array
    v: Array

    def __len__(self) -> int:
        """S, the number of systems."""
        return len(self.charges)

    def __getitem__(self, index: slice | npt.NDArray[np.int64]) -> InitialState:
        """Select systems."""
        return InitialState(self.charges[index], self.x[index], self.v[index])


def draw_initial_states(
    count: int, *, seed: int, particles: int = 5, frames: int = 49
) -> InitialState:
    """Draw the initial states of the first systems of the official data set.

    Parameters
    ----------
    count : int
        S, the number of systems.
    seed : int
        Seed of NumPy's legacy generator.
    particles : int
        P, the particles in a system.
    frames : int
        Frames that the official simulation stores. It draws noise for each frame and multiplies it
        by 0, which advances the generator.

    Returns
    -------
    InitialState
        v is rescaled to speed 0.5, and particles beyond the walls are reflected.
    """
    # the official data set uses the legacy generator
    generator = np.random.RandomState(seed)
    charges = np.empty((count, particles))
    x = np.empty((count, DIM, particles))
    v = np.empty_like(x)
    state = DIM * particles
    noise = 2 * frames * state
    for system in range(count):
        charges[system] = generator.choice([-1.0, 0.0, 1.0], size=particles, p=[0.5, 0.0, 0.5])
        # One call draws positions, velocities and noise. The legacy generator gives the same
        # numbers in one call or several.
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
    """Integrate Coulomb's law by the leapfrog scheme.

    First comes one kick ``v += dt F``, then in each step a drift ``x += dt v`` and a kick.

    Parameters
    ----------
    initial : InitialState
        S systems; not modified.
    steps : int
        Number of time steps. The official 5,000 steps are ``steps=4999``.
    sample_every : int
        Steps between stored states. A state is stored after the drift and before the kick.
    first_sample : int, optional
        Step of the first stored state; ``sample_every`` by default.
    threads : int, optional
        Number of threads; by default that of the available cores. The result does not depend on
        it.
    on_progress : callable, optional
        Called at intervals, from any thread, with the fraction of the work done since its last
        call.

    Returns
    -------
    x, v : Array [S, T, 3, P]
        The stored states. If two particles of a system meet (r = 0), it continues as NaN.
    """
    first = sample_every if first_sample is None else first_sample
    frames = max(0, (steps - first) // sample_every + 1)
    particles = initial.charges.shape[1]
    x = np.empty((len(initial), frames, DIM, particles))
    v = np.empty_like(x)
    workers = max(1, threads or _cores())
    # at least one chunk for each thread
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
        except BaseException:  # Ctrl-C too: the pool waits for its threads, so they must stop
            stop.set()
            raise
    return x, v


def _simulate_chunk(
    initial: InitialState, steps: int, sample_every: int, first: int, x_out: Array, v_out: Array
) -> Iterator[int]:
    """Simulate, fill the outputs ``[S, T, 3, P]``, and yield the number of each finished step."""
    # systems are the last axis, so that every operation runs over contiguous memory
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
            if step < steps:  # nothing is stored after the last kick
                _advance(v, forces(x), change)
            yield step


def _advance(state: Array, rate: Array, change: Array) -> None:
    """``state += dt * rate`` in place; ``change`` is scratch memory."""
    np.multiply(rate, TIME_STEP, out=change)
    np.add(state, change, out=state)


class _Forces:
    """F_i = sum_j q_i q_j (x_i - x_j) / r^3, each component clipped, for a chunk of systems.

    Each unordered pair is computed once: r^2 is symmetric and x_i - x_j antisymmetric, to the bit.
    The last axis of arrays counts systems. The axis before it counts particles, or pairs in the
    order (0, 1) ... (0, P-1), (1, 2) ...
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
        """``out[(i, j)] = operation(a_i, b_j)`` for i < j; b defaults to a."""
        b = a if b is None else b
        for i, row in enumerate(self.rows):
            operation(a[..., i : i + 1, :], b[..., i + 1 :, :], out=out[..., row, :])

    def __call__(self, x: Array) -> Array:
        """The forces ``[3, P, systems]`` at x; overwritten by the next call."""
        # The official code computes r^2 = |a|^2 + |b|^2 - 2 a.b, which near a collision is far from
        # the sum of (a - b)^2.
        self._fused_products(x)
        np.multiply(x, x, out=self.square)
        norm = self.square[0]
        np.add(norm, self.square[1], out=norm)
        np.add(norm, self.square[2], out=norm)
        self._pairs(np.add, norm, self.r2)
        np.multiply(self.dot, 2.0, out=self.dot)
        np.subtract(self.r2, self.dot, out=self.r2)
        # float_power calls the C library's pow. On some machines np.power has a vector version,
        # which rounds 5 % of the values differently. (A correctly rounded power differs from
        # glibc's in 0.08 % of the values, which moves 8 of the 7,000 official systems by more than
        # 0.1.)
        np.float_power(self.r2, 1.5, out=self.r2)
        np.divide(self.size, self.r2, out=self.r2)
        self._pairs(np.subtract, x, self.pull)
        np.multiply(self.pull, self.r2, out=self.pull)
        self._sum_over_senders()
        np.minimum(self.force, MAX_FORCE, out=self.force)
        np.maximum(self.force, -MAX_FORCE, out=self.force)
        return self.force

    def _fused_products(self, x: Array) -> None:
        """``dot[(i, j)] = fma(z_i, z_j, fma(y_i, y_j, x_i x_j))``, as a BLAS computes it.

        NumPy has no fused multiply-add, so fma(a, b, c) is emulated. p = a b has a rounding error e
        that is a double itself (Dekker 1971). s = p + c has a rounding error t (Knuth's two-sum).
        The result is s + (t + e). It rounds like a real fma unless the exact sum is within 2^-53
        units in the last place of a tie.
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
        """Sum the pulls on i over j in ascending order; a pair's pull on j is minus that on i."""
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
    """Reflect ``x, v [S, 3, P]`` at the walls, in place: particles beyond one move inwards."""
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
