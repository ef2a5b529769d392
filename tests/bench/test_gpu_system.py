"""What the GPU suite's checks of whole networks are compared with."""

from __future__ import annotations

import pytest
import torch

# last: an installed package goes before the checkout
from bench.gpu.checks import ORDERS
from bench.gpu.setting import Setting, Tf32Products, rounded_products
from bench.gpu.system import _Network

CPU = Setting("cpu", True)


@pytest.mark.parametrize("kind", ["complete", "edge list"])
def test_another_order_of_nodes_gives_the_same(kind: str) -> None:
    network = _Network(kind, CPU).like("reference", torch.float64)
    right = network.run("highest")
    order = torch.randperm(network.graph.num_nodes, generator=torch.Generator().manual_seed(3))
    found = network.run("highest", order=order)
    assert found.keys() == right.keys()
    for name, expected in right.items():
        torch.testing.assert_close(found[name], expected, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("kind", ["complete", "edge list"])
def test_plain_runs_differ_by_their_order(kind: str) -> None:
    plain, truth = _Network(kind, CPU).expected("highest")
    assert len(plain) == ORDERS
    for other in plain[1:]:
        assert other.keys() == truth.keys()
        assert any(not torch.equal(other[name], plain[0][name]) for name in truth)


def test_plain_products_are_rounded_on_every_device() -> None:
    assert isinstance(rounded_products("high"), Tf32Products)
    assert not isinstance(rounded_products("highest"), Tf32Products)
