"""Loads the golden vectors in ``tests/data`` into the compat classes they were made with.

A file holds inputs, weights, outputs and gradients of an official class, run in float64.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from egnn_fast.compat import ae, egnn_clean, gcl, nbody, qm9

DATA = Path(__file__).resolve().parent.parent / "data"

CLASSES: dict[str, type[nn.Module]] = {
    "models.egnn_clean.egnn_clean.E_GCL": egnn_clean.E_GCL,
    "models.egnn_clean.egnn_clean.EGNN": egnn_clean.EGNN,
    "models.gcl.E_GCL": gcl.E_GCL,
    "models.gcl.E_GCL_vel": gcl.E_GCL_vel,
    "n_body_system.model.EGNN": nbody.EGNN,
    "n_body_system.model.EGNN_vel": nbody.EGNN_vel,
    "qm9.models.E_GCL_mask": qm9.E_GCL_mask,
    "qm9.models.EGNN": qm9.EGNN,
    "models.ae.AE_EGNN": ae.AE_EGNN,
}
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "silu": nn.SiLU,
    "relu": nn.ReLU,
    "leaky_relu_0.2": lambda: nn.LeakyReLU(0.2),
    "prelu": nn.PReLU,
}


def names() -> list[str]:
    """The names of all golden cases."""
    return sorted(
        path.stem
        for path in DATA.glob("*.npz")
        if "source" in json.loads(str(np.load(path).get("meta", "{}")))
    )


def build(source: str, kwargs: dict[str, Any]) -> nn.Module:
    """The compat class that stands for an official one, built with its arguments.

    ``act`` among the arguments names the activation ``act_fn``.
    """
    arguments = dict(kwargs)
    if "act" in arguments:
        arguments["act_fn"] = ACTIVATIONS[arguments.pop("act")]()
    return CLASSES[source](**arguments)


def call(
    source: str,
    module: nn.Module,
    inputs: dict[str, Tensor],
    edges: Any,
    n_nodes: int | None = None,
) -> dict[str, Tensor]:
    """Run a module the official way: its outputs under the names the golden files give them."""
    i: dict[str, Any] = inputs
    edge_attr, node_attr = i.get("edge_attr"), i.get("node_attr")
    h: Tensor
    x: Tensor
    if source == "models.ae.AE_EGNN":
        adjacency, z = module(i["h"], edges, edge_attr, x0=i["x0"])
        return {"adj": adjacency, "z": z}
    if source == "qm9.models.EGNN":
        masks = i["node_mask"], i["edge_mask"]
        return {"y": module(i["h"], i["x"], edges, edge_attr, *masks, n_nodes)}
    if source == "n_body_system.model.EGNN":
        return {"x": module(i["h"], i["x"], edges, edge_attr)}
    if source == "n_body_system.model.EGNN_vel":
        return {"x": module(i["h"], i["x"], edges, i["vel"], edge_attr)}
    if source == "models.egnn_clean.egnn_clean.EGNN":
        h, x = module(i["h"], i["x"], edges, edge_attr)
    elif source == "qm9.models.E_GCL_mask":
        h, _, _ = module(i["h"], edges, i["x"], None, i["edge_mask"], edge_attr, node_attr)
        return {"h": h}
    elif source == "models.gcl.E_GCL_vel":
        h, x, _ = module(i["h"], edges, i["x"], i["vel"], edge_attr, node_attr)
    else:
        h, x, _ = module(i["h"], edges, i["x"], edge_attr, node_attr)
    return {"h": h, "x": x}


@dataclass
class Golden:
    """A golden case in one dtype; what is expected stays in float64."""

    module: nn.Module
    inputs: dict[str, Tensor]
    cotangents: dict[str, Tensor]
    outputs: dict[str, Tensor]
    input_grads: dict[str, Tensor]
    state_grads: dict[str, Tensor]
    source: str
    n_nodes: int | None
    kernel_calls: int

    def run(self, edges: Any = None) -> dict[str, Tensor]:
        """The module's outputs; ``edges`` replaces the raw ``edge_index``."""
        edges = self.inputs["edge_index"] if edges is None else edges
        return call(self.source, self.module, self.inputs, edges, self.n_nodes)

    def backward(self, outputs: dict[str, Tensor]) -> None:
        """Give every leaf the gradient of ``sum(cotangent * output)``."""
        sum((self.cotangents[k] * v).sum() for k, v in outputs.items()).backward()  # type: ignore[union-attr]


def load(name: str, dtype: torch.dtype) -> Golden:
    """A golden case, its inputs and weights cast to ``dtype``."""
    with np.load(DATA / f"{name}.npz") as file:
        meta = json.loads(str(file["meta"]))
        found = {key: torch.from_numpy(file[key]) for key in file.files if key != "meta"}

    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)}

    state_grads = part("grad/state/")
    input_grads = {k: v for k, v in part("grad/").items() if not k.startswith("state/")}
    # every case was made with SiLU, those too that do not say so and whose class defaults to ReLU
    module = build(meta["source"], {"act": "silu", **meta["kwargs"]}).to(dtype)
    module.load_state_dict(part("state/"), strict=True)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in part("in/").items()}
    for key in input_grads:
        inputs[key] = inputs[key].clone().requires_grad_()
    return Golden(
        module=module,
        inputs=inputs,
        cotangents={k: v.to(dtype) for k, v in part("cotangent/").items()},
        outputs=part("out/"),
        input_grads=input_grads,
        state_grads=state_grads,
        source=meta["source"],
        n_nodes=meta.get("n_nodes"),
        kernel_calls=getattr(module, "n_layers", 1),
    )
