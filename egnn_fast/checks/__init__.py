"""Does every backend compute what the reference computes? The work behind ``egnn-fast check``.

:func:`run` is the entry point; it returns a :class:`Report`::

    report = run(quick=True, progress=print)
    report.rows           # Row: backend, dtype, case, quantity, error, bound, worst, passed
    report.equivariance   # EquivarianceRow: backend, dtype, dim, symmetry, error, bound, passed
    report.missing        # {"triton": "why it was not checked", "triton, float64": "...", ...}
    report.passed         # False: exit with a non-zero status
    report.to_json()      # all of it as text

Quantities are outputs, the gradients of every input and every weight, and second-order gradients
(the derivative of a random combination of the gradients). An error is ``max|a - b| / max|b|`` of a
tensor, with b from the reference in float64; a row holds a quantity's worst tensor. In float64 at
most 1e-11 passes; below, twice the error that the reference makes in the same dtype (the largest
of several orders of summation, of more before a check fails), plus a few ulp.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from egnn_fast.backends import (
    BACKENDS,
    BackendError,
    Call,
    check_name,
    instruction_set,
    refusal,
    unavailable,
)
from egnn_fast.checks.cases import ORDERS, Case, Outputs, Problem, check_cases
from egnn_fast.options import Options

QUANTITIES = ("outputs", "gradients", "second order")
DTYPES = (torch.float64, torch.float32)
DIMS = (2, 3, 8)
SYMMETRIES = ("rotation", "reflection", "translation", "permutation")
FLOAT64_BOUND = 1e-11
# more orders of summation, where some leave plain PyTorch's error in doubt
MORE = 8
# two roundings of an operand at either end of a sum, in units of the last place
ULPS = 4
THREADED_EDGES = 2000  # enough for several tasks, so for several threads


@dataclass(frozen=True)
class Row:
    """How far one backend's quantity of one case lies from the reference."""

    backend: str
    dtype: str
    case: str
    quantity: str
    error: float
    bound: float
    worst: str  # the tensor with the largest error

    @property
    def passed(self) -> bool:
        """Whether the error is within its bound."""
        return self.error <= self.bound


@dataclass(frozen=True)
class EquivarianceRow:
    """How far a layer's output moves away from its input's symmetry."""

    backend: str
    dtype: str
    dim: int
    symmetry: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        """Whether the error is within its bound."""
        return self.error <= self.bound


@dataclass(frozen=True)
class Report:
    """All that a check found."""

    rows: tuple[Row, ...]
    equivariance: tuple[EquivarianceRow, ...]
    missing: dict[str, str]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether something was checked and all of it passed."""
        lines: list[Row | EquivarianceRow] = [*self.rows, *self.equivariance]
        return len(lines) > 0 and all(line.passed for line in lines)

    def to_json(self, indent: int | None = 2) -> str:
        """The report as JSON; a number that is none is written as null."""

        def record(line: Row | EquivarianceRow) -> dict[str, object]:
            error = line.error if math.isfinite(line.error) else None
            return {**asdict(line), "error": error, "passed": line.passed}

        content = {
            "passed": self.passed,
            "torch": torch.__version__,
            "instruction_sets": {
                name: instruction_set(name) for name in BACKENDS if unavailable(name) is None
            },
            "missing": self.missing,
            "seconds": self.seconds,
            "rows": [record(row) for row in self.rows],
            "equivariance": [record(row) for row in self.equivariance],
        }
        return json.dumps(content, indent=indent)


def run(
    backends: Sequence[str] | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    quick: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Compare backends with the reference.

    Parameters
    ----------
    backends : sequence of str, optional
        Which ones; all that are available here by default. ``"reference"`` itself is tested for
        equivariance only. A dtype that one of them has not is left out, and said to be missing.
    dtypes : sequence of torch.dtype, optional
        float64 and float32 by default.
    quick : bool
        A subset of the cases: seconds rather than a minute.
    progress : callable, optional
        Called with a line of text before each case.

    Raises
    ------
    ValueError
        ``backends`` names one that does not exist, or ``dtypes`` one that no backend computes in.
    BackendError
        ``backends`` names one that cannot run here.
    """
    start = time.perf_counter()
    names, missing = _resolve(backends)
    chosen = tuple(DTYPES if dtypes is None else dtypes)
    for dtype in chosen:
        if dtype not in DTYPES:
            raise ValueError(f"dtypes: expected some of {DTYPES}, got {dtype}")
    say = progress or (lambda line: None)
    able: dict[torch.dtype, list[str]] = {dtype: [] for dtype in chosen}
    for name, dtype in itertools.product(names, chosen):
        reason = refusal(name, Call("cpu", dtype, hidden=1, coord_dim=1, activation="silu"))
        if reason is None:
            able[dtype].append(name)
        else:
            missing[f"{name}, {_name(dtype)}"] = reason
    fused = {dtype: [n for n in found if n != "reference"] for dtype, found in able.items()}
    rows: list[Row] = []
    for case in check_cases(quick) if any(fused.values()) else ():
        say(case.name)
        with nullcontext() if case.edges >= THREADED_EDGES else _one_thread():
            for dtype, found in fused.items():
                rows += compare(case.layer(dtype), case.name, found, dtype) if found else ()
    moved: list[EquivarianceRow] = []
    for dim in DIMS:
        say(f"equivariance, D {dim}")
        with _one_thread():
            for dtype in chosen:
                moved += equivariance(able[dtype], dtype, dim)
    return Report(tuple(rows), tuple(moved), missing, time.perf_counter() - start)


def compare(
    problem: Problem,
    name: str,
    backends: Sequence[str],
    dtype: torch.dtype,
    orders: int = ORDERS,
    rounding: float = 0.0,
) -> Iterator[Row]:
    """Rows for one problem in one dtype: each backend's quantities against the reference's.

    ``orders`` of summation say what plain PyTorch's error is, and MORE times as many where these
    leave it in doubt; ``rounding``: see :func:`bound`.
    """
    exact = Problem({k: t.double() for k, t in problem.leaves.items()}, problem.run)
    orders = 0 if dtype == torch.float64 else orders
    plain: list[dict[str, Outputs]] = []

    def evaluate_plain(count: int) -> None:
        with _one_thread():
            plain.extend(
                evaluate(problem, "reference", order) for order in range(len(plain), count)
            )

    def rows(backend: str, found: dict[str, Outputs]) -> Iterator[Row]:
        for quantity in QUANTITIES:
            lines = []
            for key, right in truth[quantity].items():
                errors = [relative_error(p[quantity][key], right) for p in plain]
                allowed = bound(dtype, errors, rounding)
                error = relative_error(found[quantity][key], right)
                lines.append(Row(backend, _name(dtype), name, quantity, error, allowed, key))
            # the tensor that goes furthest towards its bound stands for its quantity
            yield max(lines, key=lambda row: row.error / row.bound)

    with _one_thread():
        truth = evaluate(exact, "reference")
    evaluate_plain(orders)
    for backend in backends:
        found = evaluate(problem, backend)
        judged = list(rows(backend, found))
        if not all(row.passed for row in judged) and len(plain) < MORE * orders:
            evaluate_plain(MORE * orders)
            judged = list(rows(backend, found))
        yield from judged


def evaluate(problem: Problem, backend: str, order: int = 0) -> dict[str, Outputs]:
    """Outputs, gradients and second-order gradients of a problem, by name; None counts as 0."""
    draw = torch.Generator().manual_seed(3)

    def random_like(tensor: Tensor) -> Tensor:
        values = torch.rand(tensor.shape, generator=draw, dtype=torch.float64, device="cpu")
        return (values + 0.5).to(tensor.device, tensor.dtype)

    leaves = {k: t.detach().clone().requires_grad_() for k, t in problem.leaves.items()}
    outputs = problem.run(leaves, backend, order)
    # cotangents with the outputs' signs: where a sum cancels, an error says little
    exact = problem.run({k: t.double() for k, t in problem.leaves.items()}, "reference", 0)
    signs = {k: torch.where(t < 0, -1.0, 1.0).to(outputs[k].dtype) for k, t in exact.items()}
    towards = {
        f"grad of {k}": (random_like(t) * signs[k]).requires_grad_() for k, t in outputs.items()
    }
    first = _gradients(list(outputs.values()), list(towards.values()), leaves, create_graph=True)
    directions = [random_like(g) for g in first.values()]
    chain = [(g, v) for g, v in zip(first.values(), directions, strict=True) if g.requires_grad]
    second = _gradients(
        [g for g, _ in chain], [v for _, v in chain], leaves | towards, create_graph=False
    )
    found = dict(zip(QUANTITIES, (outputs, first, second), strict=True))
    return {k: {n: t.detach() for n, t in tensors.items()} for k, tensors in found.items()}


def relative_error(value: Tensor, right: Tensor) -> float:
    """``max|a - b| / max|b|``; infinite where either is not finite, absolute where b is 0."""
    if value.shape != right.shape:
        raise ValueError(f"value: expected shape {list(right.shape)}, got {list(value.shape)}")
    if value.numel() == 0:
        return 0.0
    error = float((value.detach().double() - right.detach().double()).abs().max())
    scale = float(right.detach().abs().max())
    if not math.isfinite(error):
        return math.inf
    return error / scale if scale > 0 else error


def bound(dtype: torch.dtype, plain: Sequence[float], rounding: float = 0.0) -> float:
    """The largest error that passes, given those of plain PyTorch in the same dtype.

    Its roundings may happen to cancel in one run, so several runs, equal but for the order of
    nodes, edges and hidden units, say what its error is. ``rounding`` is that of one operand
    where products take operands of lower precision, which the order does not change.
    """
    if dtype == torch.float64:
        return FLOAT64_BOUND
    return 2 * max(plain) + ULPS * torch.finfo(dtype).eps + rounding


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN, and integers far out of range: what is not written shows."""
    empty, empty_like, new_empty = torch.empty, torch.empty_like, Tensor.new_empty

    def spoiling(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def spoiled(*args: Any, **kwargs: Any) -> Tensor:
            found = make(*args, **kwargs)
            if found.is_floating_point():
                return found.fill_(math.nan)
            return found.fill_(True if found.dtype == torch.bool else torch.iinfo(found.dtype).max)

        return spoiled

    changed: Any = torch, Tensor
    changed[0].empty, changed[0].empty_like = spoiling(empty), spoiling(empty_like)
    changed[1].new_empty = spoiling(new_empty)
    try:
        yield
    finally:
        changed[0].empty, changed[0].empty_like = empty, empty_like
        changed[1].new_empty = new_empty


def _gradients(
    outputs: list[Tensor], towards: list[Tensor], inputs: Outputs, create_graph: bool
) -> Outputs:
    grads: tuple[Tensor | None, ...] = torch.autograd.grad(
        outputs, list(inputs.values()), towards, create_graph=create_graph, allow_unused=True
    )
    return {
        name: torch.zeros_like(t) if g is None else g
        for (name, t), g in zip(inputs.items(), grads, strict=True)
    }


def equivariance(
    backends: Sequence[str], dtype: torch.dtype, dim: int, device: torch.device | str = "cpu"
) -> Iterator[EquivarianceRow]:
    """Rows for each symmetry: ``f(T inputs)`` against ``T f(inputs)``, relative to the latter."""
    case = Case(
        "equivariance",
        dim=dim,
        attrs=2,
        velocity=True,
        options=Options(attention=True, coord_norm=1.0),
    )
    for symmetry in SYMMETRIES:
        plain = [_deviation(case, symmetry, dtype, "reference", k, device) for k in range(ORDERS)]
        for backend in backends:
            error = _deviation(case, symmetry, dtype, backend, 0, device)
            yield EquivarianceRow(
                backend, _name(dtype), case.dim, symmetry, error, bound(dtype, plain)
            )


def _deviation(
    case: Case,
    symmetry: str,
    dtype: torch.dtype,
    backend: str,
    order: int,
    device: torch.device | str,
) -> float:
    """How far the layer's output on transformed inputs is from its transformed output."""
    draw = torch.Generator().manual_seed(4)
    matrix = torch.eye(case.dim, dtype=torch.float64, device="cpu")
    shift = torch.zeros(case.dim, dtype=torch.float64, device="cpu")
    relabel = torch.arange(case.num_nodes, device="cpu")
    if symmetry == "rotation":
        random = torch.randn(case.dim, case.dim, generator=draw, dtype=torch.float64, device="cpu")
        matrix = torch.linalg.qr(random).Q
        matrix[0] *= torch.linalg.det(matrix)
    elif symmetry == "reflection":
        normal = torch.randn(case.dim, generator=draw, dtype=torch.float64, device="cpu")
        matrix -= 2 * torch.outer(normal, normal) / normal.dot(normal)
    elif symmetry == "translation":
        shift = torch.randn(case.dim, generator=draw, dtype=torch.float64, device="cpu")
    else:
        relabel = torch.randperm(case.num_nodes, generator=draw, device="cpu")

    def transform(values: dict[str, Tensor]) -> dict[str, Tensor]:
        moved = {k: values[k].double() for k in ("h", "x", "v") if k in values}
        turn, step = matrix.T.to(device), shift.to(device)
        moved["x"] = moved["x"] @ turn + step
        if "v" in moved:
            moved["v"] = moved["v"] @ turn
        old = relabel.argsort().to(device)
        return {k: t[old] for k, t in moved.items()}

    here, there = (case.layer(dtype, places, device) for places in (None, relabel))
    inputs = there.leaves | {k: t.to(dtype) for k, t in transform(here.leaves).items()}
    right = transform(here.run(here.leaves, backend, order))
    found = there.run(inputs, backend, order)
    return max(relative_error(found[name], right[name]) for name in right)


@contextmanager
def _one_thread() -> Iterator[None]:
    """For small problems: several threads would wait for each other longest."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _resolve(names: Sequence[str] | None) -> tuple[list[str], dict[str, str]]:
    """The backends to check, and why the others are left out."""
    if names is None:
        reasons = {name: unavailable(name) for name in BACKENDS}
        return [n for n, why in reasons.items() if why is None], {
            n: why for n, why in reasons.items() if why is not None
        }
    for name in names:
        if name == "auto":
            raise ValueError(f"backends: expected some of {BACKENDS}, got 'auto'")
        reason = unavailable(check_name(name, "backends"))
        if reason is not None:
            raise BackendError(f"backend {name!r} cannot run here: {reason}")
    return list(dict.fromkeys(names)), {}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
