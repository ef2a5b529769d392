"""Files that an earlier version wrote, with another layout of the package's modules."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

import egnn_fast
from egnn_fast import Graph, nn, options

DATA = Path(__file__).resolve().parents[1] / "data"


def test_a_saved_graph_is_loaded() -> None:
    """With ``weights_only=True``, which accepts registered classes alone, by their names."""
    graph = torch.load(DATA / "graph_before_redesign.pt")
    assert isinstance(graph, Graph)
    assert torch.equal(graph.edge_index, torch.tensor([[0, 2, 1, 0], [1, 0, 2, 2]]))


def test_graphs_are_saved_under_the_same_name(tmp_path: Path) -> None:
    graph = Graph.complete([2, 3])
    assert b"egnn_fast.graph\n" in pickle.dumps(graph, protocol=2)
    torch.save(graph, tmp_path / "graph.pt")
    assert torch.equal(torch.load(tmp_path / "graph.pt").edge_index, graph.edge_index)


def test_saved_weights_are_loaded() -> None:
    weights = pickle.loads((DATA / "weights_before_redesign.pickle").read_bytes())
    assert isinstance(weights, egnn_fast.LayerWeights)
    torch.manual_seed(0)
    for found, expected in zip(weights, nn.EGCL(2, 2, 3).weights(), strict=True):
        if found is None or expected is None:
            assert found is expected
        else:
            assert torch.equal(found, expected)


def test_records_of_weights_are_found_where_they_were() -> None:
    assert options.EdgeWeights is egnn_fast.EdgeWeights
    assert options.LayerWeights is egnn_fast.LayerWeights
    with pytest.raises(AttributeError, match="has no attribute 'Weights'"):
        _ = options.Weights
