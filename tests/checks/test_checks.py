"""The check itself: it passes what is right, and finds what is wrong."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from cases import BACKENDS_AND_DTYPES, FUSED_BACKENDS, INTERPRETED_BACKENDS
from torch import Tensor

from egnn_fast import BackendError, Graph, checks, functional
from egnn_fast.checks.cases import ORDERS, Case, Problem, check_cases
from egnn_fast.runtime import native

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def quick() -> checks.Report:
    return checks.run(quick=True)


def test_everything_here_passes(quick: checks.Report) -> None:
    assert quick.passed
    cases = len(check_cases(quick=True))
    pairs = {(backend, str(dtype)[6:]) for backend, dtype in BACKENDS_AND_DTYPES}
    assert len(quick.rows) == len(pairs) * cases * 3
    assert len(quick.equivariance) == (len(pairs) + 2) * 3 * 4
    assert {(row.backend, row.dtype) for row in quick.rows} == pairs
    assert {row.quantity for row in quick.rows} == {"outputs", "gradients", "second order"}
    assert {row.dtype for row in quick.rows} == {"float64", "float32"}
    assert {row.dim for row in quick.equivariance} == {2, 3, 8}
    assert set(quick.missing) == {f"{b}, float64" for b in INTERPRETED_BACKENDS}
    for row in quick.rows:
        assert 0 <= row.error <= row.bound
        if row.dtype == "float64":
            assert row.bound == 1e-11


def test_report_as_json(quick: checks.Report) -> None:
    content = json.loads(quick.to_json())
    assert content["passed"] is True
    assert len(content["rows"]) == len(quick.rows)
    assert content["rows"][0]["passed"] is True
    assert content["equivariance"][0]["symmetry"] == "rotation"
    assert content["instruction_sets"].keys() == {
        "reference",
        *FUSED_BACKENDS,
        *INTERPRETED_BACKENDS,
    }


def test_progress_names_each_case() -> None:
    lines: list[str] = []
    checks.run(["cpu"], [torch.float32], quick=True, progress=lines.append)
    names = [case.name for case in check_cases(quick=True)]
    assert lines == [*names, "equivariance, D 2", "equivariance, D 3", "equivariance, D 8"]


def test_the_full_check_contains_the_quick_one() -> None:
    full, some = check_cases(quick=False), check_cases(quick=True)
    assert set(some) < set(full)
    assert len({case.name for case in full}) == len(full)


def test_threads_are_left_as_they_were() -> None:
    torch.set_num_threads(2)
    checks.run(["cpu"], [torch.float32], quick=True)
    assert torch.get_num_threads() == 2


def spoiled(tensor: Tensor, how: str) -> Tensor:
    """A wrong number where a right one was."""
    if how == "slightly":
        return tensor * (1 + 3e-6)
    mask = torch.zeros_like(tensor)
    mask.view(-1)[-1:] = math.nan
    return tensor + mask


@pytest.mark.parametrize("how", ["slightly", "nan"])
@pytest.mark.parametrize("place", ["h", "x", "edge_w1", "coord_w2"])
def test_wrong_numbers_are_found(place: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An output or a single weight's gradient that is off in the sixth digit."""
    from egnn_fast.operators.layer import layer

    def wrong(h: Tensor, x: Tensor, graph: Graph, weights: Any, *args: Any, **kwargs: Any) -> Any:
        weight = getattr(weights, place, None)
        if weight is not None and weight.requires_grad:
            weight = weight.clone()
            weight.register_hook(lambda g: spoiled(g, how))
            weights = weights._replace(**{place: weight})
        new_h, new_x, new_v = layer(h, x, graph, weights, *args, **kwargs)
        if place == "h":
            new_h = spoiled(new_h, how)
        if place == "x" and new_x is not None:
            new_x = spoiled(new_x, how)
        return new_h, new_x, new_v

    monkeypatch.setattr(functional, "layer", wrong)
    report = checks.run(["cpu"], [torch.float32], quick=True)
    assert not report.passed
    quantity = "outputs" if place in ("h", "x") else "gradients"
    assert (quantity, place) in {(r.quantity, r.worst) for r in report.rows if not r.passed}


@pytest.mark.usefixtures("without_triton")
def test_an_unavailable_backend_is_missing_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "core", None)
    monkeypatch.setattr(native, "load_error", "not built")
    report = checks.run(quick=True)
    assert report.missing["cpu"] == "not built"
    assert "not installed" in report.missing["triton"]
    assert report.rows == ()
    assert {row.backend for row in report.equivariance} == {"reference"}
    with pytest.raises(BackendError, match="'cpu' cannot run here: not built"):
        checks.run(["cpu"])


def test_a_dtype_that_a_backend_has_not_is_missing() -> None:
    report = checks.run(["triton"], [torch.float64], quick=True)
    assert not report.passed
    assert set(report.missing) == {"triton, float64"}
    assert "float32" in report.missing["triton, float64"]
    assert report.rows == ()
    assert report.equivariance == ()


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"^backends: expected .* got 'gpu'"):
        checks.run(["gpu"])
    with pytest.raises(ValueError, match=r"^backends: expected .* got 'auto'"):
        checks.run(["auto"])
    with pytest.raises(ValueError, match=r"^dtypes: expected some of .* got torch.float16"):
        checks.run(dtypes=[torch.float16])
    with pytest.raises(ValueError, match=r"^graph: no kind of graph is called 'ring'"):
        Case("ring", "ring").build_graph()


def test_nothing_checked_is_nothing_passed() -> None:
    assert not checks.run([]).passed


def test_relative_error() -> None:
    right = torch.tensor([2.0, -4.0])
    assert checks.relative_error(torch.tensor([2.0, -4.0]), right) == 0
    assert checks.relative_error(torch.tensor([2.0, -3.0]), right) == 0.25
    assert checks.relative_error(torch.tensor([math.nan, -4.0]), right) == math.inf
    assert checks.relative_error(right, torch.tensor([math.inf, -4.0])) == math.inf
    assert checks.relative_error(torch.tensor([0.5]), torch.tensor([0.0])) == 0.5
    assert checks.relative_error(torch.ones(0, 3), torch.ones(0, 3)) == 0
    with pytest.raises(ValueError, match=r"^value: expected shape \[2\], got \[1\]"):
        checks.relative_error(torch.ones(1), right)


@pytest.mark.parametrize(("error", "orders"), [(0.5, 6), (3.0, 48), (9.0, 48)])
def test_more_orders_are_asked_where_some_leave_doubt(error: float, orders: int) -> None:
    """The reference's error: 1e-4 at most in the first orders of summation, 2e-4 in later ones."""
    asked: list[int] = []

    def run(leaves: dict[str, Tensor], backend: str, order: int) -> dict[str, Tensor]:
        exact = leaves["h"].dtype == torch.float64
        off = error if backend == "cpu" else 0.0 if exact else 1.0 if order < ORDERS else 2.0
        if backend == "reference" and not exact:
            asked.append(order)
        return {"h": leaves["h"] * (1 + off * 1e-4)}

    problem = Problem({"h": torch.ones(3)}, run)
    rows = list(checks.compare(problem, "made up", ["cpu"], torch.float32))
    assert asked == list(range(orders))
    assert all(row.passed for row in rows) == (error < 4)


@pytest.mark.parametrize("face", ["edge_pass", "layer"])
def test_orders_are_one_function(face: str) -> None:
    """Shuffling nodes, edges and hidden units changes roundings only."""
    for case in check_cases(quick=True):
        problem = getattr(case, face)(torch.float64)
        right = checks.evaluate(problem, "reference")
        for order in range(1, ORDERS):
            for quantity, tensors in checks.evaluate(problem, "reference", order).items():
                for name, t in tensors.items():
                    error = checks.relative_error(t, right[quantity][name])
                    assert error <= 1e-11, f"{case.name}: {quantity}, {name}"


def test_cases_draw_the_same_numbers_each_time() -> None:
    case = check_cases(quick=True)[1]
    first, second = case.layer(torch.float64).leaves, case.layer(torch.float64).leaves
    for name, t in first.items():
        assert torch.equal(t, second[name])
        assert torch.equal(t.float(), case.layer(torch.float32).leaves[name])
