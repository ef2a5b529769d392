"""A network under CUDA graphs: one launch instead of some hundred, for small graphs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from egnn_fast.graph import Graph

DEVICE = "cuda"
_OPTIONAL = ("v", "edge_attr", "node_attr", "edge_mask", "node_mask")


class _OnOneGraph(nn.Module):
    """A network as a function of tensors alone, as PyTorch's capture wants it."""

    def __init__(self, network: nn.Module, graph: Graph, names: tuple[str, ...]) -> None:
        super().__init__()
        self.network, self.graph, self.names = network, graph, names

    def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        given = dict(zip(self.names, tensors, strict=True))
        h, x = given.pop("h"), given.pop("x")
        velocity = (given.pop("v"),) if "v" in given else ()
        found: tuple[Tensor, Tensor] = self.network(h, x, self.graph, *velocity, **given)
        return found


class GraphedNetwork:
    """What :func:`graphed` returns: call it with tensors like those it was captured with."""

    def __init__(self, run: Any, network: nn.Module, samples: dict[str, Tensor]) -> None:
        self._run = run
        self._samples = {k: (t.shape, t.dtype, t.device) for k, t in samples.items()}
        self._differentiable = {k for k, t in samples.items() if t.requires_grad}
        self._autocast = _autocast()
        # the weights that the capture reads and writes, and the dictionaries that hold them
        self._weights = [
            (f"{path}.{name}" if path else name, part._parameters, name, t, t.data_ptr())
            for path, part in network.named_modules()
            for name, t in part._parameters.items()
            if t is not None
        ]

    def __call__(self, h: Tensor, x: Tensor, **tensors: Tensor) -> tuple[Tensor, Tensor]:
        """``(h, x)`` of the network; the tensors by the names they were captured with."""
        given = {"h": h, "x": x, **tensors}
        if given.keys() != self._samples.keys():
            raise ValueError(
                f"tensors: captured with {', '.join(self._samples)}, called with {', '.join(given)}"
            )
        for name, sample in self._samples.items():
            t = given[name]
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
        for full, owner, name, weight, address in self._weights:
            if owner.get(name) is not weight or weight.data_ptr() != address:
                raise RuntimeError(
                    f"{full}: its memory was replaced after the capture, which still uses the old "
                    "one; update weights in place, or capture again"
                )
        if _autocast() != self._autocast:
            raise RuntimeError(
                f"autocast: captured with {self._autocast or 'none'}, called with "
                f"{_autocast() or 'none'}"
            )
        found: tuple[Tensor, Tensor] = self._run(*(given[name] for name in self._samples))
        return found


def _autocast() -> torch.dtype | None:
    """The dtype of autocast; None where it is off."""
    enabled = torch.is_autocast_enabled(DEVICE)
    return torch.get_autocast_dtype(DEVICE) if enabled else None


def graphed(
    network: nn.Module, h: Tensor, x: Tensor, graph: Graph, **tensors: Tensor
) -> GraphedNetwork:
    """Capture a network's forward and backward on one graph as CUDA graphs.

    Batches of small graphs leave a GPU idle between kernels; replaying a capture has no such gaps.
    Shapes, the graph and the precision (autocast or not) are fixed; tensors, weights and their
    gradients are not: train with the result as with the network. Weights must be updated in place,
    as optimisers do.

    Parameters
    ----------
    network : EGNN or EGNNVel
        On a CUDA device, in the mode (training or not) in which it will be used.
    h : Tensor [N, F]
        Node features. Samples, like all tensors here: their values do not matter, but whether they
        require gradients does.
    x : Tensor [N, D]
        Coordinates.
    graph : Graph
        The graph of every call.
    **tensors : Tensor
        ``v`` (of an ``EGNNVel``), ``edge_attr``, ``node_attr``, ``edge_mask``, ``node_mask``.

    Returns
    -------
    GraphedNetwork
        To be called as ``run(h, x, edge_attr=...)``, without the graph. What it returns is
        overwritten by the next call.

    Raises
    ------
    TypeError, ValueError
        An argument is wrong, or does not lie on a CUDA device; the message names it.
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
    fixed = _OnOneGraph(network, graph, tuple(samples))
    # a capture must not hold weights that autocast converted before it
    with torch.autocast(
        DEVICE,
        dtype=torch.get_autocast_dtype(DEVICE),
        enabled=torch.is_autocast_enabled(DEVICE),
        cache_enabled=False,
    ):
        run = torch.cuda.make_graphed_callables(fixed, tuple(samples.values()))
    return GraphedNetwork(run, network, samples)
