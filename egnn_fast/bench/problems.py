"""What a case computes: a module with its inputs, made from the same random numbers each time."""

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
    """A module, its inputs, and how the two give outputs.

    Parameters
    ----------
    case : Case
        Sizes; the dtype of the numbers drawn.
    graph : Graph, optional
        In place of the one that the case describes, and of its size.

    Attributes
    ----------
    graph : Graph
        N nodes, E edges; building it is never timed.
    edges : Tensor [2, E]
        The same as a list, for peers that take one.
    order : Tensor [E] or None
        The number of each of these edges where they were shuffled.
    module : nn.Module
        With the weights that every peer computes with.
    inputs : dict of Tensor
        By name; those that require gradients are leaves.
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
        """The module's outputs."""

    def step(self, module: nn.Module) -> Step:
        """A training step of the module: loss, gradients and Adam."""
        raise ValueError(f"a case of kind {self.case.kind!r} has no training step")

    def network(self, module: nn.Module) -> nn.Module:
        """The part of the module that ``torch.compile`` is given."""
        return module

    def with_backend(self, name: str) -> nn.Module:
        """A copy of the module whose layers run on a backend."""
        module = copy.deepcopy(self.module)
        for part in module.modules():
            if isinstance(part, (EGCLBase, EdgePass)):
                part.backend = name
        return module

    def leaves(self, module: nn.Module) -> dict[str, Tensor]:
        """What is differentiated by: inputs and weights."""
        wanted = {name: t for name, t in self.inputs.items() if t.requires_grad}
        return wanted | dict(module.named_parameters())

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
        """The same numbers, the edges in another order: sums round in another way."""
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
        """New h and x."""
        found: tuple[Tensor, ...] = module(self.inputs["h"], self.inputs["x"], self.graph)
        return found


class EdgePass(nn.Module):
    """``functional.egcl_messages`` with weights of its own, drawn as ``nn.Linear`` draws them."""

    backend: str | None = None

    def __init__(self, hidden: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.first = nn.Linear(1, hidden, bias=False, dtype=dtype)
        self.second = nn.Linear(hidden, hidden, dtype=dtype)
        self.third = nn.Linear(hidden, hidden, dtype=dtype)
        self.last = nn.Linear(hidden, 1, bias=False, dtype=dtype)

    def weights(self) -> EdgeWeights:
        """As the function takes them."""
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
        m, shift = functional.egcl_messages(
            p, q, x, graph, self.weights(), Options(), backend=self.backend
        )
        assert shift is not None
        return m, shift


class EdgePassProblem(Problem):
    """The edge pass alone; gradients of P, Q, x and the weights."""

    def _draw(self, dtype: torch.dtype) -> None:
        n, hidden = self.case.num_nodes, self.case.hidden
        self.module = EdgePass(hidden, dtype)
        shapes = {"p": hidden, "q": hidden, "x": 3}
        self.inputs = {
            name: torch.randn(n, width, dtype=dtype, requires_grad=True, device="cpu")
            for name, width in shapes.items()
        }

    def forward(self, module: nn.Module) -> tuple[Tensor, ...]:
        """M and X."""
        t = self.inputs
        found: tuple[Tensor, ...] = module(t["p"], t["q"], t["x"], self.graph)
        return found


class NBodyProblem(Problem):
    """The n-body model on made-up systems, stepped by the experiment's own trainer."""

    def _draw(self, dtype: torch.dtype) -> None:
        case = self.case
        shape = (len(case.sizes), case.sizes[0])
        charges = torch.randint(2, shape, device="cpu") * 2.0 - 1
        x, v, later = (torch.randn(shape[0], 3, shape[1], device="cpu").numpy() for _ in range(3))
        batch = systems(Arrays(charges.numpy(), x, v, later), slice(None), dtype=dtype)
        self.inputs = {name: getattr(batch, name) for name in type(batch).__dataclass_fields__}
        self._systems = type(batch)
        self.module = NBodyModel(case.hidden, case.layers).to(dtype)

    def forward(self, module: nn.Module) -> tuple[Tensor, ...]:
        """Positions."""
        t = self.inputs
        return (module(t["h"], t["x"], t["v"], t["edge_attr"]),)

    def network(self, module: nn.Module) -> nn.Module:
        """Without what makes the batch a graph."""
        network: Any = module.egnn
        return network

    def step(self, module: nn.Module) -> Step:
        """As ``egnn-fast train nbody`` takes it."""
        from lightning_fabric import Fabric  # nothing else here needs it

        assert isinstance(module, NBodyModel)
        config = Config()
        fabric = Fabric(accelerator="cpu", devices=1)
        trainer = Trainer(fabric, module, config.lr, config.weight_decay)
        batch = self._systems(**self.inputs)
        return lambda: trainer.step(batch)


class QM9Model(nn.Module):
    """The official QM9 network on a ragged batch: atoms to one number for each molecule.

    ``embedding_out`` of the network is the first linear of the official ``node_dec``.
    """

    def __init__(self, atoms: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.egnn = EGNN(atoms, hidden, hidden, n_layers=layers, attention=True, coord_agg=None)
        self.node_dec = nn.Sequential(nn.SiLU(), nn.Linear(hidden, hidden))
        self.graph_dec = nn.Sequential(nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, 1))

    def forward(self, h: Tensor, x: Tensor, graph: Graph, molecule: Tensor, count: int) -> Tensor:
        """One number for each molecule ``[count]``; ``molecule [N]`` says whose each atom is."""
        h = self.node_dec(self.egnn(h, x, graph)[0])
        pooled = h.new_zeros(count, h.shape[1]).index_add(0, molecule, h)
        out: Tensor = self.graph_dec(pooled).squeeze(1)
        return out


class QM9Problem(Problem):
    """A QM9-like batch; L1 loss and Adam as officially."""

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
        found: Problem = moved
        return found

    def forward(self, module: nn.Module) -> tuple[Tensor, ...]:
        """One number for each molecule."""
        t = self.inputs
        return (module(t["h"], t["x"], self.graph, self._molecule, len(self.case.sizes)),)

    def network(self, module: nn.Module) -> nn.Module:
        """Without the readout."""
        network: Any = module.egnn
        return network

    def step(self, module: nn.Module) -> Step:
        """Loss, gradients, Adam."""
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
    """The case's module and inputs."""
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
