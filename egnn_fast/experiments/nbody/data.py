"""The n-body data set: simulated once, stored in the cache folder, checked when read."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from egnn_fast.experiments.errors import CacheError, UsageError
from egnn_fast.experiments.io import CACHE_VARIABLE, cache_folder, writable_folder, write_atomic
from egnn_fast.experiments.nbody.simulate import Array, draw_initial_states, simulate

FORMAT = 1
_ARRAYS = ("charges", "x_in", "v_in", "x_out")


@dataclass(frozen=True)
class DataSpec:
    """Parameters of a data set. The defaults are those of the official ``nbody_small``.

    Attributes
    ----------
    train, val, test : int
        Number of systems in each part.
    drawn_train : int
        Training systems drawn from the generator before the first validation system.
    seed : int
        Seed of NumPy's legacy generator.
    particles : int
        P, the particles in a system.
    length, sample_every : int
        Time steps of the official simulation, and time steps between its frames. It stores
        ``length / sample_every - 1`` frames, frame k at time step ``sample_every * (k + 1)``.
    frame_in, frame_out : int
        The model gets the state in frame ``frame_in`` and predicts the positions in ``frame_out``.
    """

    train: int = 3000
    val: int = 2000
    test: int = 2000
    drawn_train: int = 10000
    seed: int = 43
    particles: int = 5
    length: int = 5000
    sample_every: int = 100
    frame_in: int = 30
    frame_out: int = 40

    def __post_init__(self) -> None:
        """Raise UsageError for parameters that no data set can have."""
        if not 0 < self.train <= self.drawn_train:
            raise UsageError(
                f"training systems: expected 1 to {self.drawn_train}, got {self.train}"
            )
        if not 0 <= self.frame_in < self.frame_out < self.frames:
            raise UsageError(
                f"frames: expected 0 <= input < target < {self.frames}, "
                f"got {self.frame_in} and {self.frame_out}"
            )

    @property
    def frames(self) -> int:
        """Number of frames that the official simulation stores."""
        return self.length // self.sample_every - 1

    @property
    def size(self) -> int:
        """Number of systems in all three parts."""
        return self.train + self.val + self.test

    @property
    def file_name(self) -> str:
        """Name of the cached file; contains every parameter."""
        return (
            f"nbody-charged{self.particles}-seed{self.seed}"
            f"-train{self.train}of{self.drawn_train}-val{self.val}-test{self.test}"
            f"-length{self.length}by{self.sample_every}"
            f"-frames{self.frame_in}to{self.frame_out}-v{FORMAT}.npz"
        )


@dataclass(frozen=True)
class Arrays:
    """The simulated systems as float64 arrays, in the order train, val, test.

    Attributes
    ----------
    charges : Array [S, P]
        -1 or 1.
    x_in, v_in, x_out : Array [S, 3, P]
        Positions and velocities in the input frame, positions in the target frame.
    """

    charges: Array
    x_in: Array
    v_in: Array
    x_out: Array


@dataclass(frozen=True)
class Systems:
    """S systems of P particles as the model's tensors, in one floating-point dtype.

    The edges are all ordered pairs of a system's particles, sorted by receiver, then by sender.

    Attributes
    ----------
    h : Tensor [S, P, 1]
        Speed of each particle.
    x, v, target : Tensor [S, P, 3]
        Positions and velocities in the input frame, positions in the target frame.
    edge_attr : Tensor [S, P (P - 1), 2]
        q_i q_j and the squared distance in the input frame.
    charges : Tensor [S, P]
        -1 or 1.
    """

    h: Tensor
    x: Tensor
    v: Tensor
    edge_attr: Tensor
    target: Tensor
    charges: Tensor

    def __len__(self) -> int:
        """S, the number of systems."""
        return len(self.x)

    def __getitem__(self, index: slice | Tensor) -> Systems:
        """Select systems. A slice gives views."""
        return Systems(*(getattr(self, name)[index] for name in self.__dataclass_fields__))

    def to(self, device: torch.device | str) -> Systems:
        """The same systems on another device."""
        return Systems(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Splits:
    """The three parts of the data set."""

    train: Systems
    val: Systems
    test: Systems


def generate(spec: DataSpec, on_progress: Callable[[float], None] | None = None) -> Arrays:
    """Simulate a data set. The official one takes about 10 s on two cores.

    Parameters
    ----------
    spec : DataSpec
        Its parameters.
    on_progress : callable, optional
        Called at intervals, from any thread, with the fraction of the work done since its last
        call.
    """
    drawn = draw_initial_states(
        spec.drawn_train + spec.val + spec.test,
        seed=spec.seed,
        particles=spec.particles,
        frames=spec.frames,
    )
    held_out = np.arange(spec.drawn_train, len(drawn))
    initial = drawn[np.concatenate([np.arange(spec.train), held_out])]
    between = spec.sample_every * (spec.frame_out - spec.frame_in)
    first = spec.sample_every * (spec.frame_in + 1)
    x, v = simulate(
        initial,
        first + between,
        sample_every=between,
        first_sample=first,
        on_progress=on_progress,
    )
    return Arrays(initial.charges, x[:, 0].copy(), v[:, 0].copy(), x[:, 1].copy())


def cache_path(spec: DataSpec) -> Path:
    """The file in which :func:`load_arrays` stores a data set."""
    return cache_folder() / spec.file_name


def load_arrays(spec: DataSpec, on_progress: Callable[[float], None] | None = None) -> Arrays:
    """Read a data set from the cache. If it is not there yet, simulate and store it.

    Raises
    ------
    UsageError
        The cache folder cannot be written to.
    CacheError
        The cached file is damaged, or was made with other parameters.
    """
    path = cache_path(spec)
    if path.exists():
        return read_arrays(path, spec)
    writable_folder(path.parent, CACHE_VARIABLE)
    arrays = generate(spec, on_progress)
    write_arrays(path, arrays, spec)
    return arrays


def write_arrays(path: Path, arrays: Arrays, spec: DataSpec) -> None:
    """Write a data set with its parameters and a checksum."""
    fields = {name: getattr(arrays, name) for name in _ARRAYS}
    meta = {"format": FORMAT, "spec": asdict(spec), "sha256": _checksum(fields)}
    buffer = io.BytesIO()
    np.savez(buffer, meta=np.array(json.dumps(meta)), **fields)
    write_atomic(path, buffer.getbuffer())


def read_arrays(path: Path, spec: DataSpec) -> Arrays:
    """Read what :func:`write_arrays` wrote.

    Raises
    ------
    CacheError
        The file is damaged, or was made with other parameters.
    """

    def error(what: str) -> CacheError:
        return CacheError(f"the cached data set {path} {what}: delete it, and it is made again")

    try:
        with np.load(path, allow_pickle=False) as file:
            meta: Any = json.loads(file["meta"].item())
            fields = {name: file[name] for name in _ARRAYS}
        made_with, checksum = (meta["format"], meta["spec"]), meta["sha256"]
    except Exception as e:  # damaged bytes may raise anything
        reason = " ".join(str(e).split())
        raise error(f"is corrupt or truncated ({type(e).__name__}: {reason})") from e
    if made_with != (FORMAT, asdict(spec)):
        raise error("was made with other parameters than its name says")
    if checksum != _checksum(fields):
        raise error("is corrupt (its checksum is wrong)")
    return Arrays(**fields)


def systems(
    arrays: Arrays, part: slice, *, device: torch.device | str = "cpu", dtype: torch.dtype
) -> Systems:
    """The systems in the slice ``part`` as tensors of ``dtype`` on a device."""

    def tensor(array: npt.NDArray[np.float64]) -> Tensor:
        return torch.as_tensor(array[part], dtype=dtype, device="cpu")

    charges = tensor(arrays.charges)
    x, v, target = (
        tensor(a).transpose(1, 2).contiguous() for a in (arrays.x_in, arrays.v_in, arrays.x_out)
    )
    particles = charges.shape[1]
    receiver, sender = (~torch.eye(particles, dtype=torch.bool, device="cpu")).nonzero().T
    charge_product = charges[:, receiver] * charges[:, sender]
    distance2 = ((x[:, receiver] - x[:, sender]) ** 2).sum(dim=2)
    return Systems(
        h=v.square().sum(dim=2, keepdim=True).sqrt(),
        x=x,
        v=v,
        edge_attr=torch.stack([charge_product, distance2], dim=2),
        target=target,
        charges=charges,
    ).to(device)


def splits(
    spec: DataSpec,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    on_progress: Callable[[float], None] | None = None,
) -> Splits:
    """The three parts of the data set as tensors; see :func:`load_arrays` for cache and errors."""
    arrays = load_arrays(spec, on_progress)
    bounds = np.cumsum([0, spec.train, spec.val, spec.test])
    train, val, test = (
        systems(arrays, slice(int(a), int(b)), device=device, dtype=dtype)
        for a, b in itertools.pairwise(bounds)
    )
    return Splits(train, val, test)


def _checksum(fields: dict[str, Array]) -> str:
    """SHA-256 of the arrays' names, shapes and values."""
    digest = hashlib.sha256()
    for name in _ARRAYS:
        array = np.ascontiguousarray(fields[name], dtype="<f8")
        digest.update(f"{name}{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def still_error(part: Systems) -> float:
    """Mean squared error of predicting x itself; 0.27147 on the official test set."""
    return float((part.x - part.target).double().square().mean())


def linear_error(part: Systems, time: float) -> float:
    """Mean squared error of predicting x + time * v.

    0.08348 on the official test set with ``time = 0.724``.
    """
    return float((part.x + time * part.v - part.target).double().square().mean())
