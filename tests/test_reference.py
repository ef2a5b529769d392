"""The reference against the paper's equations, written out edge by edge."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from egnn_fast import Graph, Options, reference
from egnn_fast.checks.cases import Case
from egnn_fast.weights import LayerWeights

CASES = (
    Case("default", nodes=6, edges=14, hidden=4),
    Case(
        "all, mean", nodes=6, edges=14, hidden=4, attrs=2, node_attrs=3, mask="soft",
        node_mask=True, velocity=True, carry=True,
        options=Options(
            attention=True, coord_norm=0.7, coord_tanh=True, coord_clamp=0.05, coord_scale=0.6
        ),
    ),
    Case(
        "sum, relu, without residual", nodes=6, edges=14, hidden=4, mask="binary", residual=False,
        options=Options(activation="relu", coord_agg="sum", coord_norm="unit", coord_scale=2.0),
    ),
    Case(
        "no head, velocity", nodes=6, edges=14, hidden=4, velocity=True, node_mask=True,
        options=Options(coord_agg=None),
    ),
    Case("isolated nodes", "isolated", nodes=20, edges=14, hidden=4, velocity=True, carry=True),
)  # fmt: skip


def by_edges(case: Case, t: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    """The layer of Satorras et al., one edge and one node at a time."""
    o, one = case.options, torch.ones((), dtype=torch.float64)
    act = torch.relu if o.activation == "relu" else torch.nn.functional.silu
    edge_mask, node_mask, v = t.get("edge_mask"), t.get("node_mask"), t.get("v")
    n, dim = t["x"].shape
    m_sum = [torch.zeros(case.hidden, dtype=torch.float64) for _ in range(n)]
    t_sum = [torch.zeros(dim, dtype=torch.float64) for _ in range(n)]
    masks = [torch.zeros((), dtype=torch.float64) for _ in range(n)]
    for e, (i, j) in enumerate(case.edge_index().T.tolist()):
        mask = one if edge_mask is None else edge_mask[e]
        if node_mask is not None:
            mask = mask * node_mask[i] * node_mask[j]
        d = t["x"][i] - t["x"][j]
        inputs = [t["h"][i], t["h"][j], d.dot(d).reshape(1)]
        inputs += [t["edge_attr"][e]] if "edge_attr" in t else []
        z = act(t["edge_w1"] @ torch.cat(inputs) + t["edge_b1"])
        m = act(t["edge_w2"] @ z + t["edge_b2"])  # eq. 3
        if o.attention:
            m = m * torch.sigmoid(t["att_w"] @ m + t["att_b"])  # eq. 8
        m_sum[i] = m_sum[i] + mask * m  # eq. 5
        masks[i] = masks[i] + mask
        if o.coord_agg is None:
            continue
        s = t["coord_w2"] @ act(t["coord_w1"] @ (mask * m) + t["coord_b1"])
        s = torch.tanh(s) if o.coord_tanh else s
        rho = one
        if o.coord_norm is not None:
            rho = d.norm() + (1e-8 if o.coord_norm == "unit" else float(o.coord_norm))
        bound = o.coord_clamp or torch.inf
        t_sum[i] = t_sum[i] + mask * (s * d / rho).clamp(-bound, bound)
    new_h, new_x, new_v = [], [], []
    for i in range(n):
        step = o.coord_scale * t_sum[i]
        if o.coord_agg == "mean":
            step = step / masks[i].clamp(min=1)  # eq. 4
        if v is not None:
            z = act(t["vel_w1"] @ t["h"][i] + t["vel_b1"])
            gate = t["vel_w2"] @ z + t["vel_b2"]
            step = step + gate * v[i] * (one if node_mask is None else node_mask[i])  # eq. 7
        inputs = [t["h"][i], m_sum[i], *([t["node_attr"][i]] if "node_attr" in t else [])]
        update = t["node_w2"] @ act(t["node_w1"] @ torch.cat(inputs) + t["node_b1"]) + t["node_b2"]
        h = t["h"][i] + update if case.residual else update  # eq. 6
        new_h.append(h if node_mask is None else h * node_mask[i])
        new_x.append(t["x"][i] + step)
        new_v.append(step)
    carried = torch.stack(new_v) if case.carry else None
    return torch.stack(new_h), torch.stack(new_x), carried


def layer(case: Case, t: dict[str, Tensor], **changed: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    weights = LayerWeights(**{k: w for k, w in t.items() if k in LayerWeights._fields})
    optional = ("edge_attr", "node_attr", "edge_mask", "node_mask", "v")
    return reference.egcl(
        t["h"], t["x"], case.build_graph(), reference.maps_of(weights, case.options), case.options,
        **{k: changed.get(k, t.get(k)) for k in optional}, residual=case.residual,
        carry_velocity=case.carry,
    )  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equations(case: Case) -> None:
    leaves = case.layer(torch.float64).leaves
    for output, right in zip(layer(case, leaves), by_edges(case, leaves), strict=True):
        assert (output is None) is (right is None)
        if output is not None and right is not None:
            torch.testing.assert_close(output, right, rtol=1e-12, atol=1e-12)


def test_masks_are_bool_or_a_column_too() -> None:
    case = Case("masks", attrs=1, mask="binary", node_mask=True, velocity=True, carry=True)
    leaves = case.layer(torch.float64).leaves
    leaves["node_mask"] = (leaves["node_mask"] > 0.3).double()
    right = layer(case, leaves)
    masks = {k: leaves[k] for k in ("edge_mask", "node_mask")}
    for form in (lambda t: t.bool(), lambda t: t.unsqueeze(1), lambda t: t.bool().unsqueeze(1)):
        for output, expected in zip(
            layer(case, leaves, **{k: form(t) for k, t in masks.items()}), right, strict=True
        ):
            assert output is not None
            assert expected is not None
            assert torch.equal(output, expected)


def test_where_nothing_moves_x_is_the_callers() -> None:
    case = Case("still", options=Options(coord_agg=None))
    leaves = case.layer(torch.float64).leaves
    _, x, v = layer(case, leaves)
    assert x is leaves["x"]
    assert v is None


def test_velocities_need_a_velocity_mlp() -> None:
    case = Case("no phi_v")
    leaves = case.layer(torch.float64).leaves
    with pytest.raises(ValueError, match=r"^v: the layer has no velocity MLP$"):
        layer(case, leaves, v=leaves["x"])


def test_the_split_edge_pass_is_the_layers() -> None:
    """``messages`` on P and Q gives what ``egcl`` sums, for any part of the edges."""
    case = CASES[1]
    t = case.layer(torch.float64).leaves
    graph: Graph = case.build_graph()
    weights = LayerWeights(**{k: w for k, w in t.items() if k in LayerWeights._fields})
    w_pq, b_pq, edge = weights.split(case.features)
    p, q = torch.nn.functional.linear(t["h"], w_pq, b_pq).chunk(2, dim=1)
    receiver, sender = graph.edge_index
    m_sum, t_sum = t["h"].new_zeros(6, 4), t["x"].new_zeros(6, 3)
    for part in (slice(0, 5), slice(5, 14)):
        m, shift = reference.messages(
            p, q, t["x"], receiver[part], sender[part], edge, case.options,
            edge_attr=t["edge_attr"][part], edge_mask=t["edge_mask"][part],
        )  # fmt: skip
        assert shift is not None
        m_sum, t_sum = m_sum + m, t_sum + shift
    weight = reference.coord_weight(graph, case.options, t["edge_mask"], torch.float64)
    new_h, new_x, new_v = reference.update_nodes(
        t["h"], t["x"], t["v"], m_sum, t_sum, reference.maps_of(weights, case.options),
        case.options, node_attr=t["node_attr"], weight=weight, residual=True,
    )  # fmt: skip
    right = layer(case, t, node_mask=None)
    for output, expected in zip((new_h, new_x, new_v), right, strict=True):
        assert output is not None
        torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
