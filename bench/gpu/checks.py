"""The table of cases on a GPU: outputs, gradients and second order against the reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from bench.gpu import draws, triage
from bench.gpu.setting import (
    PRECISIONS,
    Item,
    Outcome,
    Setting,
    autocast,
    matmul,
    rounded_products,
    rounding,
    synchronize,
)
from egnn_fast import checks
from egnn_fast.checks.cases import EVERYTHING as EVERYTHING
from egnn_fast.checks.cases import SINGLE_OPTIONS as SINGLE_OPTIONS
from egnn_fast.checks.cases import Case, Outputs, Problem, check_cases
from egnn_fast.options import Options

# orders of summation that say what plain PyTorch's error is
ORDERS = 3
# of the edge pass: what check_cases leaves out or has with others only
OPTIONS = {
    name: options
    for name, options in SINGLE_OPTIONS.items()
    if name not in ("default", "sum", "scale")
}


def _widths() -> Iterator[Case]:
    """Every H with each D at least once, without and with all options."""
    for hidden, dim, attrs, rich in (
        (64, 3, 0, False), (128, 3, 0, False), (256, 3, 0, False), (16, 2, 1, True),
        (33, 3, 0, False), (33, 16, 4, True), (64, 8, 4, True), (128, 2, 1, True),
        (128, 16, 0, False), (128, 8, 4, True), (16, 3, 0, False), (64, 16, 1, False),
        (100, 1, 0, True), (256, 2, 4, True), (160, 16, 1, True), (256, 8, 0, False),
    ):  # fmt: skip
        options = EVERYTHING if rich else Options()
        name = f"H {hidden}, D {dim}, A {attrs}{', all options' if rich else ''}"
        yield Case(
            name, nodes=150, edges=2000, hidden=hidden, dim=dim, attrs=attrs, options=options,
            mask="soft" if rich else None,
        )  # fmt: skip


def _graphs() -> Iterator[Case]:
    """Hubs, empty rows, ends of blocks, complete components; all compiled for one width."""
    yield Case("a hub of 20,000", "hub", 100, 20_000, hidden=64)
    yield Case("a hub of 20,000, all options", "hub", 50, 20_000, options=EVERYTHING, attrs=1)
    yield Case("power law", "power", 3000, 40_000, hidden=64)
    yield Case("nine rows of ten empty", "isolated", 2000, 20_000, hidden=64)
    yield Case("loops and repeated edges", "loops", 300, 4000, options=EVERYTHING)
    yield Case("coincident points", "coincident", 300, 4000, options=EVERYTHING)
    yield Case("few edges among many nodes", nodes=50_000, edges=40, hidden=64)
    for edges in (1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 1023, 1025):
        yield Case(f"{edges} edges of one row", "hub", edges // 3 + 2, edges, hidden=64)
    for sizes, name in (
        ((5,) * 100, "100 of 5"), (tuple(9 + (11 * k) % 21 for k in range(40)), "9 to 29"),
        ((1, 40, 0, 2, 17, 1, 3), "ragged"), ((300,), "one of 300"), ((1, 1, 1), "of one node"),
    ):  # fmt: skip
        yield Case(f"complete, {name}", "complete", sizes=sizes, hidden=64)
    yield Case("complete, all options", "complete", sizes=(6, 3, 9, 29), attrs=2, mask="binary",
               options=EVERYTHING)  # fmt: skip
    yield Case("no edges", nodes=50, edges=0, hidden=64)
    yield Case("no nodes", nodes=0, edges=0, attrs=1, mask="soft", options=EVERYTHING)


def _options() -> Iterator[Case]:
    for name, options in OPTIONS.items():
        yield Case(f"option {name}", hidden=64, nodes=100, edges=1500, attrs=2, options=options,
                   mask="soft")  # fmt: skip


def _layers() -> Iterator[Case]:
    """So many nodes that their kernels take large tiles; odd widths of everything."""
    for hidden, features in ((33, 20), (64, 64), (128, 100), (256, 256)):
        yield Case(f"many nodes, H {hidden}", nodes=20_000, edges=30_000, hidden=hidden,
                   features=features, node_attrs=3, velocity=True)  # fmt: skip


def table(setting: Setting) -> list[tuple[str, Case, str]]:
    """``(face, case, precision)`` in the order of their importance."""
    if not setting.on_gpu:
        tiny = [
            Case("H 16, D 3, A 0", nodes=8, edges=40),
            Case("H 33, D 2, A 1, all options", nodes=8, edges=40, hidden=33, dim=2, attrs=1,
                 options=EVERYTHING, mask="soft"),
            Case("17 edges of one row", "hub", 7, 17),
            Case("complete, ragged", "complete", sizes=(1, 4, 0, 2), options=EVERYTHING),
            Case("no edges", nodes=5, edges=0),
        ]  # fmt: skip
        small = replace(check_cases(quick=True)[2], nodes=8, edges=40)
        faces = [("edge pass", case, "highest") for case in tiny]
        return [*faces, ("layer", small, "highest"), ("edge pass", tiny[1], "high")]
    widths, options, graphs = list(_widths()), list(_options()), list(_graphs())
    layers = [*check_cases(quick=setting.quick), *_layers()]
    if setting.quick:
        widths, options, graphs = widths[:6], options[-1:], graphs[:4] + graphs[-2:]
    found = [
        (face, case, precision)
        for face, cases in (("edge pass", widths), ("edge pass", options), ("layer", layers))
        for precision in PRECISIONS
        for case in cases
    ]
    found += [
        ("edge pass", case, precision) for precision in ("highest", "bf16") for case in graphs
    ]
    return found


def items(setting: Setting) -> Iterator[Item]:
    """An item for each row of the table, and the symmetries."""
    for face, case, precision in table(setting):
        run = partial(_case, face, case, precision)
        yield Item(f"{face}: {case.name}: {precision}", "checks", run)
    for precision in PRECISIONS if setting.on_gpu else ("highest",):
        for dim in checks.DIMS if setting.on_gpu else (3,):
            run = partial(_equivariance, precision, dim)
            yield Item(f"equivariance: D {dim}: {precision}", "checks", run)


def at(problem: Problem, precision: str, device: str) -> Problem:
    """A problem whose forward runs under autocast, where the precision asks for it."""

    def run(leaves: dict[str, Tensor], backend: str, order: int) -> Outputs:
        with autocast(precision, device):
            return problem.run(leaves, backend, order)

    return Problem(problem.leaves, run)


@contextmanager
def launched(outcome: Outcome, *directions: str) -> Iterator[None]:
    """The kernels of these directions must run inside the block."""
    from egnn_fast.backends.triton import launches

    before = dict(launches)
    yield
    for direction in directions:
        if launches[direction] == before[direction]:
            outcome.fail(f"the {direction} kernel did not run")


def _case(face: str, case: Case, precision: str, setting: Setting) -> Outcome:
    outcome = Outcome()

    def problem_of(seed: int) -> Problem:
        drawn = replace(case, seed=seed)
        make: Callable[..., Problem] = drawn.edge_pass if face == "edge pass" else drawn.layer
        return at(make(torch.float32, device=setting.device), precision, setting.device)

    problem = problem_of(case.seed)
    has_edges = case.build_graph().num_edges > 0
    with (
        matmul(precision),
        rounded_products(precision),
        checks.poisoned_memory(),
        launched(outcome, *(("forward", "backward") if has_edges else ())),
    ):
        rows = list(
            checks.compare(
                problem, case.name, ["triton"], torch.float32, ORDERS, rounding(precision)
            )
        )
        # in float32 a value hardly ever moves across: there a single draw decides
        if rounding(precision) and draws.jumps(case.options):
            rows = draws.judged(problem_of, rows, rounding(precision))
        synchronize(setting)
    judge(outcome, precision, face, rows)
    if not all(row.passed for row in rows):
        with triage.kept(outcome, case.name, precision):
            _look(outcome, problem, case.name, precision)
    return outcome


def _look(outcome: Outcome, problem: Problem, case: str, precision: str) -> None:
    """Write down where outputs and first gradients are wrong."""
    exact = Problem({k: t.double() for k, t in problem.leaves.items()}, problem.run)
    with matmul(precision), rounded_products(precision):
        found, plain = (triage.first_order(problem, name) for name in ("triton", "reference"))
        truth = triage.first_order(exact, "reference")
        bounds = _bounds(precision, [plain], truth)
        again = partial(triage.first_order, problem, "triton")
        triage.examine(outcome, case, precision, found, truth, bounds, again)


def _bounds(
    precision: str, plain: Sequence[dict[str, Tensor]], truth: dict[str, Tensor]
) -> dict[str, float]:
    """The largest relative error of each tensor that passes."""
    return {
        name: checks.bound(
            torch.float32, [checks.relative_error(p[name], right) for p in plain],
            rounding(precision),
        )
        for name, right in truth.items()
    }  # fmt: skip


def _equivariance(precision: str, dim: int, setting: Setting) -> Outcome:
    outcome = Outcome()
    with matmul(precision), autocast(precision, setting.device), launched(outcome, "forward"):
        found = checks.equivariance(["triton"], torch.float32, dim, setting.device)
        rows = [
            checks.Row("triton", "float32", f"D {dim}", row.symmetry, row.error,
                       row.bound + rounding(precision), "")
            for row in found
        ]  # fmt: skip
    judge(outcome, precision, "layer", rows)
    return outcome


def judge(outcome: Outcome, precision: str, face: str, rows: Sequence[checks.Row]) -> None:
    """Write down rows, and fail where one of them is beyond its bound."""
    for row in rows:
        outcome.add(
            "checks", face=face, case=row.case, precision=precision, quantity=row.quantity,
            error=row.error if math.isfinite(row.error) else None, bound=row.bound,
            tensor=row.worst, passed=row.passed,
        )  # fmt: skip
        if not row.passed:
            what = f"{row.quantity}, {row.worst}" if row.worst else row.quantity
            outcome.fail(f"{what} off by {row.error:.2e}, allowed {row.bound:.2e}")


def judge_tensors(
    outcome: Outcome,
    precision: str,
    face: str,
    case: str,
    found: dict[str, Tensor],
    plain: Sequence[dict[str, Tensor]],
    truth: dict[str, Tensor],
    again: Callable[[], dict[str, Tensor]] | None = None,
) -> None:
    """Judge tensors by name, with one row for the tensor nearest to its bound.

    Where one fails, ``again`` computes what was found once more, to find out why.
    """
    if found.keys() != truth.keys():
        outcome.fail(f"expected {sorted(truth)}, got {sorted(found)}")
        return
    bounds = _bounds(precision, plain, truth)
    rows = [
        checks.Row("triton", "float32", case, "outputs and gradients",
                   checks.relative_error(found[name], right), bounds[name], name)
        for name, right in truth.items()
    ]  # fmt: skip
    worst = max(rows, key=lambda row: row.error / row.bound)
    judge(outcome, precision, face, [worst])
    if not worst.passed and again is not None:
        with triage.kept(outcome, case, precision):
            triage.examine(outcome, case, precision, found, truth, bounds, again)
