"""The error for an argument's other name gives the class's own name of it."""

from __future__ import annotations

from typing import Any

import pytest

from egnn_fast import Options
from egnn_fast.compat import ae, egnn_clean, gcl, nbody, qm9
from egnn_fast.nn import EGCL, EGNN, EGCLVel, EGNNVel

CLEAN = (EGCL, EGCLVel, EGNN, EGNNVel)


@pytest.mark.parametrize("cls", CLEAN)
@pytest.mark.parametrize(
    ("given", "own"),
    [
        ("act_fn", "activation"),
        ("hidden_nf", "hidden_features"),
        ("edges_in_d", "edge_attr_dim"),
        ("in_edge_nf", "edge_attr_dim"),
        ("nodes_att_dim", "node_attr_dim"),
        ("recurrent", "residual"),
        ("normalize", "coord_norm='unit'"),
        ("norm_diff", "coord_norm=1.0"),
        ("tanh", "coord_tanh"),
        ("coords_agg", "coord_agg"),
        ("coords_weight", "coord_scale"),
        ("clamp", "coord_clamp=100.0"),
    ],
)
def test_official_keywords_in_nn(cls: Any, given: str, own: str) -> None:
    sizes = (4, 4, 8) if cls in (EGCL, EGCLVel) else (4, 8, 4)
    with pytest.raises(TypeError, match=rf"^{given}: \w+ calls it {own}$"):
        cls(*sizes, **{given: 1})


@pytest.mark.parametrize(
    ("cls", "given", "own"),
    [
        (egnn_clean.E_GCL, "activation", "act_fn"),
        (egnn_clean.E_GCL, "in_features", "input_nf"),
        (egnn_clean.E_GCL, "recurrent", "residual"),
        (egnn_clean.E_GCL, "coord_norm", "normalize"),
        (egnn_clean.EGNN, "in_features", "in_node_nf"),
        (egnn_clean.EGNN, "edge_attr_dim", "in_edge_nf"),
        (gcl.E_GCL, "residual", "recurrent"),
        (gcl.E_GCL, "normalize", "norm_diff"),
        (gcl.E_GCL_vel, "node_attr_dim", "nodes_att_dim"),
        (nbody.EGNN, "coord_scale", "coords_weight"),
        (nbody.EGNN_vel, "coord_tanh", "tanh"),
        (qm9.E_GCL_mask, "nodes_att_dim", "nodes_attr_dim"),
        (qm9.EGNN, "hidden_features", "hidden_nf"),
        (ae.AE_EGNN, "hidden_features", "hidden_nf"),
        (Options, "tanh", "coord_tanh"),
        (Options, "act_fn", "activation"),
    ],
)
def test_each_class_names_its_own(cls: Any, given: str, own: str) -> None:
    with pytest.raises(TypeError, match=rf"^{given}: {cls.__name__} calls it {own}$"):
        cls(**{given: 1})


@pytest.mark.parametrize("cls", [*CLEAN, egnn_clean.EGNN, gcl.E_GCL, Options])
def test_other_keywords_are_left_to_python(cls: Any) -> None:
    sizes = () if cls is Options else (4, 4, 8) if cls in (EGCL, EGCLVel) else (4, 8, 4)
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        cls(*sizes, colour=1)


def test_an_argument_without_effect_is_not_suggested() -> None:
    layer: Any = gcl.E_GCL
    with pytest.raises(TypeError, match="unexpected keyword argument 'coord_clamp'"):
        layer(4, 4, 8, coord_clamp=1.0)
