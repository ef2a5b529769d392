"""The n-body model and its training step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from egnn_fast.experiments.nbody.data import Systems
from egnn_fast.graph import Graph
from egnn_fast.nn import EGNNVel

if TYPE_CHECKING:  # the model can be used without Lightning Fabric
    from lightning_fabric import Fabric

CLAMP = 100.0
EVAL_BATCH = 500  # systems; does not change the result


class NBodyModel(nn.Module):
    """EGNN with velocities on fully connected particles (section 5.1 of arXiv 2102.09844).

    The layers have a residual, SiLU and mean aggregation; coordinate updates are clamped at 100.
    ``egnn`` has all weights, under the official names.

    Parameters
    ----------
    hidden, layers : int
        Width and number of layers.
    backend : str, optional
        See :func:`egnn_fast.use_backend`.
    """

    def __init__(self, hidden: int = 64, layers: int = 4, backend: str | None = None) -> None:
        super().__init__()
        self.egnn = EGNNVel(
            1,
            hidden,
            n_layers=layers,
            edge_attr_dim=2,
            activation=nn.SiLU(),
            residual=True,
            coord_agg="mean",
            coord_clamp=CLAMP,
            backend=backend,
        )
        self._graphs: dict[tuple[int, int, torch.device], Graph] = {}

    def forward(self, h: Tensor, x: Tensor, v: Tensor, edge_attr: Tensor) -> Tensor:
        """Predict positions in the target frame, ``[S, P, 3]``; arguments: :class:`Systems`."""
        systems, particles = x.shape[:2]
        key = (systems, particles, x.device)
        graph = self._graphs.get(key)
        if graph is None:
            graph = Graph.complete([particles] * systems, device=x.device)
            self._graphs[key] = graph
        nodes, edges = systems * particles, systems * particles * (particles - 1)
        out = self.egnn(
            h.reshape(nodes, -1),
            x.reshape(nodes, -1),
            graph,
            v.reshape(nodes, -1),
            edge_attr=edge_attr.reshape(edges, -1),
        )[1]
        return out.view(x.shape)


def make_model(seed: int, *, hidden: int, layers: int, backend: str | None) -> NBodyModel:
    """A model with the initial weights of the official code after ``manual_seed(seed)``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return NBodyModel(hidden, layers, backend)


@dataclass
class Trainer:
    """A model and its optimiser under Fabric.

    Attributes
    ----------
    fabric : Fabric
        Device and precision.
    model : NBodyModel
        The model, moved to the device.
    lr, weight_decay : float
        Adam's learning rate and weight decay.
    optimizer : torch.optim.Adam
        The model's optimiser. Fabric's wrappers of model and optimiser are private.
    """

    fabric: Fabric
    model: NBodyModel
    lr: float
    weight_decay: float
    optimizer: torch.optim.Adam = field(init=False)
    _model: Any = field(init=False)
    _optimizer: Any = field(init=False)

    def __post_init__(self) -> None:
        """Move the model to the device and make its optimiser."""
        self.model.to(self.fabric.device)
        # fused: one kernel updates all 62 parameters; launching one for each would cost more than
        # the small updates themselves
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), lr=self.lr, weight_decay=self.weight_decay, fused=True
        )
        self._model, self._optimizer = self.fabric.setup(self.model, self.optimizer)

    def step(self, batch: Systems) -> Tensor:
        """Take one optimiser step and return the loss, detached, on the device."""
        loss = F.mse_loss(self._model(batch.h, batch.x, batch.v, batch.edge_attr), batch.target)
        self._optimizer.zero_grad(set_to_none=True)
        self.fabric.backward(loss)
        self._optimizer.step()
        return loss.detach()

    def epoch(self, systems: Systems, order: Tensor, batch_size: int) -> float:
        """Train on the batches of one epoch and return the mean loss; see :func:`batches`."""
        self._model.train()
        losses = [self.step(batch) for batch in batches(systems, order, batch_size)]
        return float(torch.stack(losses).double().mean())

    @torch.no_grad()
    def predict(self, systems: Systems) -> Tensor:
        """Predicted positions ``[S, P, 3]``."""
        self._model.eval()
        parts = [systems[i : i + EVAL_BATCH] for i in range(0, len(systems), EVAL_BATCH)]
        return torch.cat([self._model(p.h, p.x, p.v, p.edge_attr) for p in parts])

    def evaluate(self, systems: Systems) -> float:
        """Mean squared error over systems, particles and components."""
        return float((self.predict(systems) - systems.target).double().square().mean())


def batches(systems: Systems, order: Tensor, batch_size: int) -> Iterator[Systems]:
    """Batches of the systems at the indices ``order``. An incomplete last batch is left out.

    The systems are gathered once; the batches are views.
    """
    shuffled = systems[order[: len(order) // batch_size * batch_size]]
    fields = (getattr(shuffled, name).split(batch_size) for name in Systems.__dataclass_fields__)
    for tensors in zip(*fields, strict=True):
        yield Systems(*tensors)
