"""The official signatures: arguments, their order and their defaults."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from torch import nn

from egnn_fast.compat import ae, egnn_clean, gcl, nbody, qm9

# constructor arguments in order with their defaults, then forward arguments in order; act_fn's
# official default is a module, here None
REQUIRED = inspect.Parameter.empty
LAYER = {"input_nf": REQUIRED, "output_nf": REQUIRED, "hidden_nf": REQUIRED, "edges_in_d": 0}
SWITCHES = {"attention": False, "norm_diff": False, "tanh": False}
NETWORK = {"in_node_nf": REQUIRED, "in_edge_nf": REQUIRED, "hidden_nf": REQUIRED}
TAIL = {"device": "cpu", "act_fn": None, "n_layers": 4}
SIGNATURES: list[tuple[type[nn.Module], dict[str, Any], str]] = [
    (
        egnn_clean.E_GCL,
        LAYER
        | {"act_fn": None, "residual": True, "attention": False}
        | {"normalize": False, "coords_agg": "mean", "tanh": False},
        "h edge_index coord edge_attr=None node_attr=None",
    ),
    (
        egnn_clean.EGNN,
        {"in_node_nf": REQUIRED, "hidden_nf": REQUIRED, "out_node_nf": REQUIRED, "in_edge_nf": 0}
        | TAIL
        | {"residual": True, "attention": False, "normalize": False, "tanh": False},
        "h x edges edge_attr",
    ),
    (
        gcl.E_GCL,
        LAYER
        | {"nodes_att_dim": 0, "act_fn": None, "recurrent": True, "coords_weight": 1.0}
        | {"attention": False, "clamp": False, "norm_diff": False, "tanh": False},
        "h edge_index coord edge_attr=None node_attr=None",
    ),
    (
        gcl.E_GCL_vel,
        LAYER
        | {"nodes_att_dim": 0, "act_fn": None, "recurrent": True, "coords_weight": 1.0}
        | SWITCHES,
        "h edge_index coord vel edge_attr=None node_attr=None",
    ),
    (nbody.EGNN, NETWORK | TAIL | {"coords_weight": 1.0}, "h x edges edge_attr vel=None"),
    (
        nbody.EGNN_vel,
        NETWORK
        | TAIL
        | {"coords_weight": 1.0, "recurrent": False, "norm_diff": False, "tanh": False},
        "h x edges vel edge_attr",
    ),
    (
        qm9.E_GCL_mask,
        LAYER
        | {"nodes_attr_dim": 0, "act_fn": None, "recurrent": True, "coords_weight": 1.0}
        | {"attention": False},
        "h edge_index coord node_mask edge_mask edge_attr=None node_attr=None n_nodes=None",
    ),
    (
        qm9.EGNN,
        NETWORK | TAIL | {"coords_weight": 1.0, "attention": False, "node_attr": 1},
        "h0 x edges edge_attr node_mask edge_mask n_nodes",
    ),
    (
        ae.AE_EGNN,
        {"hidden_nf": REQUIRED, "K": 8, **TAIL, "reg": 1e-3, "clamp": False},
        "nodes edges edge_attr=None",
    ),
]


@pytest.mark.parametrize(
    ("cls", "init", "forward"), SIGNATURES, ids=lambda p: getattr(p, "__qualname__", "")
)
def test_signatures(cls: type[nn.Module], init: dict[str, Any], forward: str) -> None:
    found = inspect.signature(cls).parameters.values()
    positional = [p for p in found if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [(p.name, p.default) for p in positional] == list(init.items())
    assert all(p.default is not REQUIRED for p in found if p not in positional)

    arguments = [*inspect.signature(cls.forward).parameters.values()][1:]
    shown = [p.name if p.default is REQUIRED else f"{p.name}={p.default}" for p in arguments]
    assert shown[: len(forward.split())] == forward.split()
    assert all(p.default is None for p in arguments[len(forward.split()) :])
