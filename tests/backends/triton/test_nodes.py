"""What surrounds the edge pass in a layer of the Triton kernels: packed weights, tiles of nodes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import EVERYTHING, INTERPRETED_BACKENDS, assert_passed
from torch import Tensor

from egnn_fast import Options, checks
from egnn_fast.checks.cases import Case

if not INTERPRETED_BACKENDS:
    pytest.skip("Triton's wheels are for Linux alone", allow_module_level=True)

from egnn_fast.backends.triton.packing import packed
from egnn_fast.backends.triton.products import multiply
from egnn_fast.kernels.blocks import blocks_for, few_nodes, node_blocks
from egnn_fast.kernels.records import LayerOptions, Plan, Weights, row_width

pytestmark = [pytest.mark.interpreted, pytest.mark.usefixtures("one_thread", "bfloat16")]


def plan_of(hidden: int, attrs: int, precision: str = "highest") -> Plan:
    return Plan.make(
        "forward", blocks_for("forward", "highest", 64), LayerOptions(),
        hidden=row_width(hidden, False), dim=3, attrs=attrs, precision=precision, arch="sm_90",
        nvidia=precision != "highest",
    )  # fmt: skip


def weights_of(hidden: int, attrs: int, everything: bool = True) -> Weights:
    """As a layer has them: w_r and w_a are columns of a wider matrix."""
    first = torch.randn(hidden, 5 + attrs)
    own: dict[str, Any] = {
        "w_r": first[:, 4], "w_a": first[:, 5:] if attrs else None,
        "w2": torch.randn(hidden, hidden), "b2": torch.randn(hidden),
        "w_g": None, "b_g": None, "w3": None, "b3": None, "w_x": None,
    }  # fmt: skip
    if everything:
        own |= {name: torch.randn(hidden) for name in ("w_g", "b3", "w_x")}
        own |= {"w3": torch.randn(hidden, hidden), "b_g": torch.randn(1)}
    return Weights(**own)


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize(("hidden", "attrs"), [(1, 1), (16, 0), (16, 1), (33, 3), (100, 11)])
@pytest.mark.usefixtures("poison")
def test_packed_weights(hidden: int, attrs: int, everything: bool) -> None:
    given = weights_of(hidden, attrs, everything)
    found = packed(given, plan_of(hidden, attrs))
    width = row_width(hidden, False)
    for name, t in given._asdict().items():
        own = getattr(found, name)
        assert (own is None) == (t is None), name
        if t is None or name == "b_g":
            assert own is t
            continue
        square = name in ("w2", "w3")
        right = torch.zeros(width, *((width if square else attrs,) if t.dim() == 2 else ()))
        right[tuple(slice(size) for size in t.shape)] = t
        assert torch.equal(own, right), name
        assert own.is_contiguous()


def test_weights_that_are_dense_and_whole_are_not_copied() -> None:
    given = weights_of(16, 0)._replace(w_r=torch.randn(16))
    found = packed(given, plan_of(16, 0))
    assert all(a is b for a, b in zip(found, given, strict=True))


@pytest.mark.parametrize("name", ["b2", "w2", "w_a", "w_g", "w3", "b3", "w_x"])
def test_weights_may_have_any_strides(name: str) -> None:
    given = weights_of(16, 2)
    t = getattr(given, name)
    wide = torch.randn(*(2 * size for size in t.shape))
    strided = wide[tuple(slice(None, None, 2) for _ in t.shape)].copy_(t)
    assert not strided.is_contiguous()
    found = packed(given._replace(**{name: strided}), plan_of(16, 2))
    assert torch.equal(getattr(found, name), t)


def test_matrices_are_rounded_to_the_operands() -> None:
    given = weights_of(16, 2)
    half = packed(given, plan_of(16, 2, "fp16"))
    tf32 = packed(given, plan_of(16, 2, "high"))
    for name in ("w2", "w3"):
        t = getattr(given, name)
        assert torch.equal(getattr(half, name), t.half())
        rounded = t * 8193.0 - t * 8192.0
        assert torch.equal(getattr(tf32, name), rounded)
        # some number had digits to lose
        assert not torch.equal(rounded, t)
    for name in ("w_r", "w_a", "b2", "w_g", "b3", "w_x"):
        assert torch.equal(getattr(half, name), getattr(given, name)), name
        assert torch.equal(getattr(tf32, name), getattr(given, name)), name


@pytest.mark.parametrize("precision", ["fp16", "fp16~", "bf16"])
def test_products_round_their_operands_alone(precision: str) -> None:
    a, b = torch.randn(5, 300), torch.randn(300, 4)
    kind = torch.bfloat16 if precision == "bf16" else torch.float16
    found = multiply(a, b, precision)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, a.to(kind).float() @ b.to(kind).float())
    assert not torch.allclose(found, a @ b, rtol=1e-6, atol=1e-6)
    assert torch.equal(multiply(a, b, "highest"), a @ b)


def test_tiles_of_nodes() -> None:
    assert few_nodes(8448, 132)
    assert not few_nodes(8449, 132)
    for width in (16, 64, 128, 256):
        for precision in ("bf16", "high", "highest"):
            assert node_blocks(width, precision, True, "sm_90")[0] == 16
            tile, chunk, warps = node_blocks(width, precision, False, "sm_90")
            assert tile in (16, 64)
            assert chunk >= 16
            assert warps in (4, 8)
            assert node_blocks(width, precision, False, "sm_100")[0] <= 32


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.usefixtures("poison")
def test_both_tiles_agree_with_the_reference(few: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers of nodes around the ends of tiles."""
    from egnn_fast.backends.triton import layers

    monkeypatch.setattr(layers, "few_nodes", lambda *_: few)
    for nodes in (1, 15, 16, 17, 64, 65):
        case = Case(
            f"{nodes} nodes", "loops", nodes, min(2 * nodes, 24), velocity=True, carry=True,
            features=5, node_attrs=2, options=replace(EVERYTHING, coord_agg="sum"),
        )  # fmt: skip
        problem = case.layer(torch.float32)
        assert_passed(list(checks.compare(problem, case.name, ["triton"], torch.float32)))


@pytest.mark.parametrize("wanted", ["h", "x", "v", "edge_w1", "node_w1", "coord_w2", "vel_b2"])
def test_a_gradient_does_not_depend_on_what_else_is_asked_for(wanted: str) -> None:
    case = Case("some", nodes=7, edges=20, velocity=True, attrs=1, node_attrs=1, options=EVERYTHING)
    problem = case.layer(torch.float32)

    def gradients(names: list[str], outputs: tuple[str, ...]) -> dict[str, Tensor]:
        leaves = {k: t.clone().requires_grad_(k in names) for k, t in problem.leaves.items()}
        found = problem.run(leaves, "triton", 0)
        total = torch.stack([(found[k] * found[k]).sum() for k in outputs]).sum()
        grads = torch.autograd.grad(
            total, [leaves[k] for k in names], allow_unused=True, materialize_grads=True
        )
        return dict(zip(names, grads, strict=True))

    for outputs in (("h", "x"), ("h",), ("x",)):
        every = gradients(list(problem.leaves), outputs)
        assert torch.equal(gradients([wanted], outputs)[wanted], every[wanted]), outputs


def test_features_keep_float32_under_autocast() -> None:
    case = Case("half", nodes=7, edges=20, options=Options())
    problem = case.layer(torch.float32)
    with torch.autocast("cpu", torch.float16):
        found = problem.run(problem.leaves, "triton", 0)
    assert {t.dtype for t in found.values()} == {torch.float32}
