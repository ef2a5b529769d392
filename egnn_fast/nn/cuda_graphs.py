"""Networks captured as CUDA graphs: one launch instead of hundreds, which pays on small graphs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from egnn_fast.graph import Graph

DEVICE = "cuda"
_OPTIONAL = ("v", "edge_attr", "node_attr", "edge_mask", "node_mask")


class _NetworkOnGraph(nn.Module):
    """A network on one graph as a function of positional tensors: PyTorch captures no other kind.

    ``names`` are the tensors' argument names in the network's forward.
    """

    def __init__(self, network: nn.Module, graph: Graph, names: tuple[str, ...]) -> None:
        super().__init__()
        self.network, self.graph, self.names = network, graph, names

    def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        inputs = dict(zip(self.names, tensors, strict=True))
        h, x = inputs.pop("h"), inputs.pop("x")
        velocity = (inputs.pop("v"),) if "v" in inputs else ()
        outputs: tuple[Tensor, Tensor] = self.network(h, x, self.graph, *velocity, **inputs)
        return outputs


class GraphedNetwork:
    """A captured network, made by :func:`graphed`.

    Each call needs tensors of the shapes, dtypes and devices of the capture.
    """

    def __init__(self, run: Any, network: nn.Module, samples: dict[str, Tensor]) -> None:
        self._run = run
        self._samples = {k: (t.shape, t.dtype, t.device) for k, t in samples.items()}
        self._differentiable = {k for k, t in samples.items() if t.requires_grad}
        self._autocast = _autocast()
        # Each weight with its full name, the dictionary that holds it, its key there, and its
        # address. The capture reads weights by address.
        self._weights = [
            (f"{path}.{name}" if path else name, part._parameters, name, t, t.data_ptr())
            for path, part in network.named_modules()
            for name, t in part._parameters.items()
            if t is not None
        ]

    def __call__(self, h: Tensor, x: Tensor, **tensors: Tensor) -> tuple[Tensor, Tensor]:
        """Run the captured network.

        Parameters
        ----------
        h, x, **tensors : Tensor
            The arguments that :func:`graphed` was called with, without the graph.

        Returns
        -------
        h : Tensor [N, out_features]
        x : Tensor [N, D]

        Raises
        ------
        ValueError
            A tensor is missing, superfluous, or differs from the sample of the capture.
        RuntimeError
            A weight has other memory than at the capture, or autocast differs.
        """
        inputs = {"h": h, "x": x, **tensors}
        if inputs.keys() != self._samples.keys():
            raise ValueError(
                f"tensors: captured with {', '.join(self._samples)}, "
                f"called with {', '.join(inputs)}"
            )
        for name, sample in self._samples.items():
            t = inputs[name]
            if (t.shape, t.dtype, t.device) != sample:
                shape, dtype, device = sample
                raise ValueError(
                    f"{name}: captured as {list(shape)} {dtype} on {device}, "
                    f"got {list(t.shape)} {t.dtype} on {t.device}"
                )
            if t.requires_grad and name not in self._differentiable and torch.is_grad_enabled():
                raise ValueError(
                    f"{name}: captured without requires_grad, so it would get no gradient; "
                    "capture with a sample that requires it"
                )
        for full_name, owner, name, weight, address in self._weights:
            if owner.get(name) is not weight or weight.data_ptr() != address:
                raise RuntimeError(
                    f"{full_name}: its memory was replaced after the capture, which still uses the "
                    "old memory; update weights in place, or capture again"
                )
        if _autocast() != self._autocast:
            raise RuntimeError(
                f"autocast: captured with {self._autocast or 'none'}, called with "
                f"{_autocast() or 'none'}"
            )
        outputs: tuple[Tensor, Tensor] = self._run(*(inputs[name] for name in self._samples))
        return outputs


def _autocast() -> torch.dtype | None:
    """The dtype of autocast; None if it is off."""
    enabled = torch.is_autocast_enabled(DEVICE)
    return torch.get_autocast_dtype(DEVICE) if enabled else None


def graphed(
    network: nn.Module, h: Tensor, x: Tensor, graph: Graph, **tensors: Tensor
) -> GraphedNetwork:
    """Capture a network's forward and backward on one graph as CUDA graphs.

    On batches of small graphs a GPU idles between kernels; a replayed capture has no such gaps.
    The capture fixes the shapes, the graph and the autocast state. The values of tensors and
    weights may change, so the result can be trained like the network. Weights must be updated in
    place, as optimisers do.

    Parameters
    ----------
    network : EGNN or EGNNVel
        On a CUDA device, in the mode (training or evaluation) in which it will be used.
    h : Tensor [N, F]
        Node features. All tensors here are samples: shapes, dtypes, devices and ``requires_grad``
        matter, their values do not.
    x : Tensor [N, D]
        Coordinates.
    graph : Graph
        The graph of every call.
    **tensors : Tensor
        ``v`` (for an ``EGNNVel``), ``edge_attr``, ``node_attr``, ``edge_mask``, ``node_mask``.

    Returns
    -------
    GraphedNetwork
        Call it as ``run(h, x, edge_attr=...)``, without the graph. The next call overwrites the
        tensors that it returned.

    Raises
    ------
    TypeError, ValueError
        An argument is wrong, or is not on a CUDA device; the message names it.
    """
    if not isinstance(graph, Graph):
        raise TypeError(f"graph: expected a Graph, got {type(graph).__name__}")
    for name in tensors:
        if name not in _OPTIONAL:
            raise TypeError(f"{name}: expected one of {', '.join(_OPTIONAL)}")
    samples = {"h": h, "x": x, **tensors}
    for name, t in samples.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(t).__name__}")
    for name, t in samples.items():
        if t.device.type != DEVICE:
            raise ValueError(f"{name}: expected to lie on a CUDA device, got {t.device}")
    network_on_graph = _NetworkOnGraph(network, graph, tuple(samples))
    # Autocast's cache may hold weights that were converted before; a capture would keep using them.
    with torch.autocast(
        DEVICE,
        dtype=torch.get_autocast_dtype(DEVICE),
        enabled=torch.is_autocast_enabled(DEVICE),
        cache_enabled=False,
    ):
        run = torch.cuda.make_graphed_callables(network_on_graph, tuple(samples.values()))
    return GraphedNetwork(run, network, samples)
