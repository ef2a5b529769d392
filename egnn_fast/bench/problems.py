"""The modules and inputs of the cases. The random numbers are the same each time."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from egnn_fast import functional
from egnn_fast.bench.cases import Case
from egnn_fast.checks.cases import Case as CheckCase
from egnn_fast.experiments.nbody.config import Config
from egnn_fast.experiments.nbody.data import Arrays, systems
from egnn_fast.experiments.nbody.task import NBodyModel, Trainer
from egnn_fast.graph import Graph
from egnn_fast.nn import EGCL, EGNN
from egnn_fast.nn.layers import EGCLBase
from egnn_fast.options import Options
from egnn_fast.weights import EdgeWeights

SEED = 0
Step = Callable[[], Tensor]


class Problem(ABC):
    """A module, its inputs, and how to compute the outputs from both.

    Parameters
    ----------
    case : Case
        Sizes and dtype.
    graph : Graph, optional
        Used instead of the graph that the case describes; it must have that graph's size.

    Attributes
    ----------
    graph : Graph
        N nodes, E edges; building it is never timed.
    edges : Tensor [2, E]
        The graph as an edge list, for peers that take one.
    order : Tensor [E] or None
        If the edges were shuffled: the index of each in the original order.
    module : nn.Module
        Has the weights that every peer uses.
    inputs : dict of Tensor
        Inputs by name; gradients are computed for those that require them.
    """

    graph: Graph
    edges: Tensor
    order: Tensor | None
    module: nn.Module
    inputs: dict[str, Tensor]

    def __init__(self, case: Case, graph: Graph | None = None) -> None:
        self.case = case
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            self.graph = _graph(case) if graph is None else graph
            self.edges, self.order = self.graph.shared_edge_index(), None
            self._draw(getattr(torch, case.dtype))

    @abstractmethod
    def _draw(self, dtype: torch.dtype) -> None:
        """Set ``module`` and ``inputs``."""

    @abstractmethod
    def forward(self, module: nn.Module) -> tuple[Tensor, ...]:
        """The outputs of ``module`` for the inputs."""

    def step(self, module: nn.Module) -> Step:
        """A function that takes a training step of ``module``: loss, gradients and Adam.

        Raises
        ------
        ValueError
            Cases of this kind have no training step.
        """
        raise ValueError(f"a case of kind {self.case.kind!r} has no training step")

    def network(self, module: nn.Module) -> nn.Module:
        """The part of ``module`` that the peer "compile" compiles."""
        return module

    def with_backend(self, name: str) -> nn.Module:
        """A copy of the module whose layers run on a backend."""
        module = copy.deepcopy(self.module)
        for part in module.modules():
            if isinstance(part, (EGCLBase, EdgePass)):
                part.backend = name
        return module

    def leaves(self, module: nn.Module) -> dict[str, Tensor]:
        """The tensors whose gradients are computed, inputs and weights, by name."""
        inputs = {name: t for name, t in self.inputs.items() if t.requires_grad}
        return inputs | dict(module.named_parameters())

    def double(self) -> Problem:
        """The same numbers in float64."""
        exact = copy.copy(self)
        exact.module = copy.deepcopy(self.module).double()
        exact.inputs = {
            name: t.detach().double().requires_grad_(t.requires_grad)
            for name, t in self.inputs.items()
        }
        return exact

    def to(self, device: torch.device | str) -> Problem:
        """The same numbers on another device."""
        moved = copy.copy(self)
        moved.graph, moved.edges = self.graph.to(device), self.edges.to(device)
        moved.order = None if self.order is None else self.order.to(device)
        moved.module = copy.deepcopy(self.module).to(device)
        moved.inputs = {
            name: t.detach().to(device).requires_grad_(t.requires_grad)
            for name, t in self.inputs.items()
        }
        return moved

    def shuffled(self, seed: int) -> Problem:
        """The same numbers, with the edges in a random order, so that sums round differently."""
        other = copy.copy(self)
        draw = torch.Generator().manual_seed(seed)
        other.order = torch.randperm(self.graph.num_edges, generator=draw, device="cpu")
        other.edges = self.edges[:, other.order]
        other.graph = Graph.from_edge_index(other.edges, self.graph.num_nodes)
        return other


class LayerProblem(Problem):
    """One ``EGCL``; gradients of h, x and every weight."""

    def _draw(self, dtype: torch.dtype) -> None:
        n, hidden = self.case.num_nodes, self.case.hidden
        self.module = EGCL(hidden, hidden, hidden, dtype=dtype)
        self.inputs = {
            "h": torch.randn(n, hidden, dtype=dtype, requires_grad=True, device="cpu"),
            "x": torch.randn(n, 3, dtype=dtype, requires_grad=True, device="cpu"),
        }

    def forward(self, module: nn.Module) -> tuple[Tensor, ...]:
        """New h ``[N, H]`` and x ``[N, 3]``."""
        outputs: tuple[Tensor, ...] = module(self.inputs["h"], self.inputs["x"], self.graph)
        return outputs


class EdgePass(nn.Module):
    """``functional.egcl_messages`` as a module with weights, initialised as in ``nn.Linear``."""

    backend: str | None = None

    def __init__(self, hidden: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.first = nn.Linear(1, hidden, bias=False, dtype=dtype)
        self.second = nn.Linear(hidden, hidden, dtype=dtype)
        self.third = nn.Linear(hidden, hidden, dtype=dtype)
        self.last = nn.Linear(hidden, 1, bias=False, dtype=dtype)

    def weights(self) -> EdgeWeights:
        """The weights as an argument for ``functional.egcl_messages``."""
        return EdgeWeights(
            w_r=self.first.weight.squeeze(1),
            w_a=None,
            w2=self.second.weight,
            b2=self.second.bias,
            w3=self.third.weight,
            b3=self.third.bias,
            w_x=self.last.weight.squeeze(0),
        )

    def forward(self, p: Tensor, q: Tensor, x: Tensor, graph: Graph) -> tuple[Tensor, Tensor]:
        """M ``[N, H]`` and X ``[N, 3]``."""
        message_sum, coord_sum = functional.egcl_messages(
            p, q, x, graph, self.weights(), Options(), backend=self.backend
        )
        assert coord_sum is not None
        return message_sum, coord_sum


class EdgePassProblem(Problem):
    """The edge pass alone; gradients of P, Q, x and the weights."""

    def _draw(self, dtype: torch.dtype) -> None:
        n, hidden = self.case.num_nodes, self.case.hidden
        self.module = EdgePass(hidden, dtype)
        widths = {"p": hidden, "q": hidden, "x": 3}
        self.inputs = {
            name: torch.randn(n, width, dtype=dtype, requires_grad=True, device="cpu")
            for name, width in widths.items()
        }

    def forward(self, module: nn.Module) -> tuple[Tensor, ...]:
        """M ``[N, H]`` and X ``[N, 3]``."""
        t = self.inputs
        outputs: tuple[Tensor, ...] = module(t["p"], t["q"], t["x"], self.graph)
        return outputs


class NBodyProblem(Problem):
    """The n-body model on random systems, trained by the experiment's own trainer."""

    def _draw(self, dtype: torch.dtype) -> None:
        case = self.case
        shape = (len(case.sizes), case.sizes[0])
        charges = torch.randint(2, shape, device="cpu") * 2.0 - 1
        x, v, target = (torch.randn(shape[0], 3, shape[1], device="cpu").numpy() for _ in range(3))
        batch = systems(Arrays(charges.numpy(), x, v, target), slice(None), dtype=dtype)
        self.inputs = {name: getattr(batch, name) for name in type(batch).__dataclass_fields__}
        self._systems = type(batch)
        self.module = NBodyModel(case.hidden, case.layers).to(dtype)

    def forward(self, module: nn.Module) -> tuple[Tensor, ...]:
        """Predicted positions ``[S, P, 3]``."""
        t = self.inputs
        return (module(t["h"], t["x"], t["v"], t["edge_attr"]),)

    def network(self, module: nn.Module) -> nn.Module:
        """The ``EGNNVel`` alone, without the code that turns the batch into a graph."""
        network: Any = module.egnn
        return network

    def step(self, module: nn.Module) -> Step:
        """The training step of ``egnn-fast train nbody``."""
        from lightning_fabric import Fabric  # slow to import, and used only here

        assert isinstance(module, NBodyModel)
        config = Config()
        fabric = Fabric(accelerator="cpu", devices=1)
        trainer = Trainer(fabric, module, config.lr, config.weight_decay)
        batch = self._systems(**self.inputs)
        return lambda: trainer.step(batch)


class QM9Model(nn.Module):
    """The official QM9 network on molecules of different sizes, without padding.

    The first linear of the official ``node_dec`` is the network's ``embedding_out`` here.
    """

    def __init__(self, atoms: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.egnn = EGNN(atoms, hidden, hidden, n_layers=layers, attention=True, coord_agg=None)
        self.node_dec = nn.Sequential(nn.SiLU(), nn.Linear(hidden, hidden))
        self.graph_dec = nn.Sequential(nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, 1))

    def forward(self, h: Tensor, x: Tensor, graph: Graph, molecule: Tensor, count: int) -> Tensor:
        """One number for each molecule, ``[count]``.

        ``molecule [N]`` has the index of each atom's molecule.
        """
        h = self.node_dec(self.egnn(h, x, graph)[0])
        pooled = h.new_zeros(count, h.shape[1]).index_add(0, molecule, h)
        out: Tensor = self.graph_dec(pooled).squeeze(1)
        return out


class QM9Problem(Problem):
    """A QM9-like batch, with L1 loss and Adam as in the official code."""

    ATOMS = 15  # width of the official one-hot atom features
    LR, WEIGHT_DECAY = 1e-3, 1e-16

    def _draw(self, dtype: torch.dtype) -> None:
        case = self.case
        sizes = torch.tensor(case.sizes, device="cpu")
        self.module = QM9Model(self.ATOMS, case.hidden, case.layers).to(dtype)
        self.inputs = {
            "h": torch.randn(case.num_nodes, self.ATOMS, dtype=dtype, device="cpu"),
            "x": torch.randn(case.num_nodes, 3, dtype=dtype, device="cpu"),
            "target": torch.randn(len(sizes), dtype=dtype, device="cpu"),
        }
        self._molecule = torch.repeat_interleave(torch.arange(len(sizes), device="cpu"), sizes)

    def to(self, device: torch.device | str) -> Problem:
        """The same numbers on another device."""
        moved: Any = super().to(device)
        moved._molecule = self._molecule.to(device)
        problem: Problem = moved
        return problem

    def forward(self, module: nn.Module) -> tuple[Tensor, ...]:
        """One number for each molecule, ``[B]``."""
        t = self.inputs
        return (module(t["h"], t["x"], self.graph, self._molecule, len(self.case.sizes)),)

    def network(self, module: nn.Module) -> nn.Module:
        """The ``EGNN`` alone, without the readout."""
        network: Any = module.egnn
        return network

    def step(self, module: nn.Module) -> Step:
        """L1 loss, gradients, fused Adam."""
        optimizer = torch.optim.Adam(
            module.parameters(), lr=self.LR, weight_decay=self.WEIGHT_DECAY, fused=True,
            capturable=self.inputs["x"].is_cuda,
        )  # fmt: skip

        def run() -> Tensor:
            loss = F.l1_loss(self.forward(module)[0], self.inputs["target"])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            return loss.detach()

        return run


_KINDS: dict[str, type[Problem]] = {
    "layer": LayerProblem,
    "overhead": LayerProblem,
    "edges": EdgePassProblem,
    "nbody": NBodyProblem,
    "qm9": QM9Problem,
}


def build(case: Case) -> Problem:
    """The problem of a case."""
    return _KINDS[case.kind](case)


def _graph(case: Case) -> Graph:
    if case.graph == "complete":
        return Graph.complete(case.sizes)
    if case.graph == "regular":
        receiver = torch.arange(case.nodes, device="cpu").repeat_interleave(case.degree)
        sender = torch.randint(case.nodes, (case.num_edges,), device="cpu")
        return Graph.from_edge_index(torch.stack((receiver, sender)), case.nodes)
    kind = CheckCase(case.name, case.graph, case.nodes, case.num_edges)
    return Graph.from_edge_index(kind.edge_index(), case.nodes)
