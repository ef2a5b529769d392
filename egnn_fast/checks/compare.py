"""Compares a backend with the reference on one problem: the errors and their bounds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from egnn_fast.checks.cases import ORDERS, Case, Outputs, Problem
from egnn_fast.checks.report import EquivarianceRow, Row
from egnn_fast.options import Options

QUANTITIES = ("outputs", "gradients", "second order")
SYMMETRIES = ("rotation", "reflection", "translation", "permutation")
FLOAT64_BOUND = 1e-11
# before a check fails, the reference's error is measured on this many times as many orders
MORE = 8
# an allowance of roundings in units of the last place: two for an operand at either end of a sum
ULPS = 4


def compare(
    problem: Problem,
    name: str,
    backends: Sequence[str],
    dtype: torch.dtype,
    orders: int = ORDERS,
    rounding: float = 0.0,
) -> Iterator[Row]:
    """Rows for one problem in one dtype: one for each backend and quantity.

    Parameters
    ----------
    problem : Problem
        Its leaves have the dtype ``dtype``.
    name : str
        The case's name, for the rows.
    backends : sequence of str
        What is compared with the reference in float64.
    dtype : torch.dtype
        The dtype to check.
    orders : int
        How many orders of summation measure the reference's error in this dtype; ``MORE`` times as
        many are tried before a row fails.
    rounding : float
        See :func:`bound`.
    """
    exact = Problem({k: t.double() for k, t in problem.leaves.items()}, problem.run)
    orders = 0 if dtype == torch.float64 else orders
    baselines: list[dict[str, Outputs]] = []

    def evaluate_baselines(count: int) -> None:
        with one_thread():
            baselines.extend(
                evaluate(problem, "reference", order) for order in range(len(baselines), count)
            )

    def rows(backend: str, values: dict[str, Outputs]) -> Iterator[Row]:
        for quantity in QUANTITIES:
            tensor_rows = []
            for key, expected in truth[quantity].items():
                errors = [relative_error(b[quantity][key], expected) for b in baselines]
                limit = bound(dtype, errors, rounding)
                error = relative_error(values[quantity][key], expected)
                tensor_rows.append(
                    Row(backend, dtype_name(dtype), name, quantity, error, limit, key)
                )
            # the row of a quantity is that of the tensor nearest to its bound, or furthest beyond
            yield max(tensor_rows, key=lambda row: row.error / row.bound)

    with one_thread():
        truth = evaluate(exact, "reference")
    evaluate_baselines(orders)
    for backend in backends:
        values = evaluate(problem, backend)
        backend_rows = list(rows(backend, values))
        if not all(row.passed for row in backend_rows) and len(baselines) < MORE * orders:
            evaluate_baselines(MORE * orders)
            backend_rows = list(rows(backend, values))
        yield from backend_rows


def evaluate(problem: Problem, backend: str, order: int = 0) -> dict[str, Outputs]:
    """Outputs, gradients and second-order gradients of a problem.

    Returns a dict of tensors by name for each of ``QUANTITIES``. A gradient that is None becomes
    zeros. ``order`` is the order of summation: see :class:`Problem`.
    """
    draw = torch.Generator().manual_seed(3)

    def random_like(tensor: Tensor) -> Tensor:
        values = torch.rand(tensor.shape, generator=draw, dtype=torch.float64, device="cpu")
        return (values + 0.5).to(tensor.device, tensor.dtype)

    leaves = {k: t.detach().clone().requires_grad_() for k, t in problem.leaves.items()}
    outputs = problem.run(leaves, backend, order)
    # with cotangents of the outputs' signs sums do not cancel, which would inflate relative errors
    exact = problem.run({k: t.double() for k, t in problem.leaves.items()}, "reference", 0)
    signs = {k: torch.where(t < 0, -1.0, 1.0).to(outputs[k].dtype) for k, t in exact.items()}
    cotangents = {
        f"grad of {k}": (random_like(t) * signs[k]).requires_grad_() for k, t in outputs.items()
    }
    first = _gradients(list(outputs.values()), list(cotangents.values()), leaves, create_graph=True)
    directions = [random_like(g) for g in first.values()]
    pairs = [
        (grad, direction)
        for grad, direction in zip(first.values(), directions, strict=True)
        if grad.requires_grad
    ]
    second = _gradients(
        [grad for grad, _ in pairs],
        [direction for _, direction in pairs],
        leaves | cotangents,
        create_graph=False,
    )
    quantities = dict(zip(QUANTITIES, (outputs, first, second), strict=True))
    return {k: {n: t.detach() for n, t in tensors.items()} for k, tensors in quantities.items()}


def _gradients(
    outputs: list[Tensor], cotangents: list[Tensor], inputs: Outputs, create_graph: bool
) -> Outputs:
    grads: tuple[Tensor | None, ...] = torch.autograd.grad(
        outputs, list(inputs.values()), cotangents, create_graph=create_graph, allow_unused=True
    )
    return {
        name: torch.zeros_like(t) if g is None else g
        for (name, t), g in zip(inputs.items(), grads, strict=True)
    }


def relative_error(value: Tensor, expected: Tensor) -> float:
    """``max|a - b| / max|b|`` for a ``value`` and b ``expected``, of the same shape.

    The absolute error if b is 0; infinite if a or b has values that are not finite; 0 without
    elements.

    Raises
    ------
    ValueError
        The shapes differ.
    """
    if value.shape != expected.shape:
        raise ValueError(f"value: expected shape {list(expected.shape)}, got {list(value.shape)}")
    if value.numel() == 0:
        return 0.0
    error = float((value.detach().double() - expected.detach().double()).abs().max())
    scale = float(expected.detach().abs().max())
    if not math.isfinite(error):
        return math.inf
    return error / scale if scale > 0 else error


def bound(dtype: torch.dtype, baselines: Sequence[float], rounding: float = 0.0) -> float:
    """The largest error that passes.

    Parameters
    ----------
    dtype : torch.dtype
        The dtype that is checked.
    baselines : sequence of float
        Errors of the reference in this dtype. In one run its roundings may happen to cancel, so
        these are of several runs that differ in the order of nodes, edges and hidden units.
    rounding : float
        The rounding error of one operand if matrix products round their operands to a lower
        precision. Another order does not change that rounding.
    """
    if dtype == torch.float64:
        return FLOAT64_BOUND
    return 2 * max(baselines) + ULPS * torch.finfo(dtype).eps + rounding


def equivariance(
    backends: Sequence[str], dtype: torch.dtype, dim: int, device: torch.device | str = "cpu"
) -> Iterator[EquivarianceRow]:
    """A row for each backend and symmetry T of a layer f.

    The error is that of ``f(T inputs)`` against ``T f(inputs)``, relative to the latter.
    """
    case = Case(
        "equivariance",
        dim=dim,
        attrs=2,
        velocity=True,
        options=Options(attention=True, coord_norm=1.0),
    )
    for symmetry in SYMMETRIES:
        baselines = [
            _deviation(case, symmetry, dtype, "reference", k, device) for k in range(ORDERS)
        ]
        for backend in backends:
            error = _deviation(case, symmetry, dtype, backend, 0, device)
            yield EquivarianceRow(
                backend, dtype_name(dtype), case.dim, symmetry, error, bound(dtype, baselines)
            )


def _deviation(
    case: Case,
    symmetry: str,
    dtype: torch.dtype,
    backend: str,
    order: int,
    device: torch.device | str,
) -> float:
    """The error of the layer's outputs on transformed inputs against its transformed outputs."""
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
        rotation, translation = matrix.T.to(device), shift.to(device)
        moved["x"] = moved["x"] @ rotation + translation
        if "v" in moved:
            moved["v"] = moved["v"] @ rotation
        old_index = relabel.argsort().to(device)
        return {k: t[old_index] for k, t in moved.items()}

    original, relabelled = (case.layer(dtype, labels, device) for labels in (None, relabel))
    inputs = relabelled.leaves | {k: t.to(dtype) for k, t in transform(original.leaves).items()}
    expected = transform(original.run(original.leaves, backend, order))
    outputs = relabelled.run(inputs, backend, order)
    return max(relative_error(outputs[name], expected[name]) for name in expected)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run PyTorch on one thread inside the block: faster for small problems."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def dtype_name(dtype: torch.dtype) -> str:
    """The name in reports: ``float64``, not ``torch.float64``."""
    return str(dtype).removeprefix("torch.")
