"""One problem on a backend and in the reference: how far apart, and how far they may be."""

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
# more orders of summation, where some leave the reference's own error in doubt
MORE = 8
# two roundings of an operand at either end of a sum, in units of the last place
ULPS = 4


def compare(
    problem: Problem,
    name: str,
    backends: Sequence[str],
    dtype: torch.dtype,
    orders: int = ORDERS,
    rounding: float = 0.0,
) -> Iterator[Row]:
    """Rows for one problem in one dtype: each backend's quantities against the reference's.

    ``orders`` of summation say what the reference's error in this dtype is, and MORE times as many
    where these leave it in doubt; ``rounding``: see :func:`bound`.
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
            lines = []
            for key, right in truth[quantity].items():
                errors = [relative_error(b[quantity][key], right) for b in baselines]
                allowed = bound(dtype, errors, rounding)
                error = relative_error(values[quantity][key], right)
                lines.append(Row(backend, dtype_name(dtype), name, quantity, error, allowed, key))
            # the tensor that goes furthest towards its bound stands for its quantity
            yield max(lines, key=lambda row: row.error / row.bound)

    with one_thread():
        truth = evaluate(exact, "reference")
    evaluate_baselines(orders)
    for backend in backends:
        values = evaluate(problem, backend)
        judged = list(rows(backend, values))
        if not all(row.passed for row in judged) and len(baselines) < MORE * orders:
            evaluate_baselines(MORE * orders)
            judged = list(rows(backend, values))
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
    quantities = dict(zip(QUANTITIES, (outputs, first, second), strict=True))
    return {k: {n: t.detach() for n, t in tensors.items()} for k, tensors in quantities.items()}


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


def bound(dtype: torch.dtype, baselines: Sequence[float], rounding: float = 0.0) -> float:
    """The largest error that passes, given those of the reference in the same dtype.

    Its roundings may happen to cancel in one run, so several runs, equal but for the order of
    nodes, edges and hidden units, say what its error is. ``rounding`` is that of one operand
    where products take operands of lower precision, which the order does not change.
    """
    if dtype == torch.float64:
        return FLOAT64_BOUND
    return 2 * max(baselines) + ULPS * torch.finfo(dtype).eps + rounding


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

    here, there = (case.layer(dtype, labels, device) for labels in (None, relabel))
    inputs = there.leaves | {k: t.to(dtype) for k, t in transform(here.leaves).items()}
    right = transform(here.run(here.leaves, backend, order))
    outputs = there.run(inputs, backend, order)
    return max(relative_error(outputs[name], right[name]) for name in right)


@contextmanager
def one_thread() -> Iterator[None]:
    """For small problems: several threads would wait for each other longest."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def dtype_name(dtype: torch.dtype) -> str:
    """As reports have it: ``float64``, not ``torch.float64``."""
    return str(dtype).removeprefix("torch.")
