"""What has Triton compile a kernel anew: the constants that it reads, and nothing else."""

from __future__ import annotations

import ast
import inspect
import json
import sys
import textwrap
from typing import Any

import children
import pytest

if sys.platform != "linux":
    pytest.skip("Triton's wheels are for Linux alone", allow_module_level=True)

from bench.offline.configurations import KERNELS, Configuration, arguments
from egnn_fast.kernels import backward, forward, nodes, staged, staged_backward, sums
from egnn_fast.kernels.nodes import PROJECTED, NodeSizes
from egnn_fast.kernels.records import READ, Spec, only

MODULES = (forward, backward, staged, staged_backward, nodes, sums)


def fields_read(kernel: Any, record: str) -> set[str]:
    """The fields of an argument that a kernel reads, itself or in what it is handed on to."""
    function = kernel.fn
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == record:
                found.add(node.attr)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            called = function.__globals__.get(node.func.id)
            handed = any(isinstance(a, ast.Name) and a.id == record for a in node.args)
            if handed and hasattr(called, "fn"):
                found |= fields_read(called, record)
    return found


@pytest.mark.parametrize("name", READ)
def test_kernels_are_given_the_constants_that_they_read(name: str) -> None:
    (kernel,) = (getattr(module, name) for module in MODULES if hasattr(module, name))
    assert fields_read(kernel, "spec") == set(READ[name])
    assert set(READ[name]) <= set(Spec._fields)


def test_project_nodes_is_given_the_sizes_that_it_reads() -> None:
    assert fields_read(nodes.project_nodes, "sizes") == set(PROJECTED)
    assert fields_read(nodes.update_nodes, "sizes") == set(NodeSizes._fields)


def test_the_table_has_every_kernel_that_takes_such_constants() -> None:
    assert set(READ) == set(KERNELS) - {"finish_rows"}


def test_a_field_that_is_not_given_cannot_be_read() -> None:
    *_, record = arguments(Configuration("staged_first", hidden=256))[1]
    assert record._fields == READ["staged_first"]
    with pytest.raises(AttributeError, match="TANH"):
        record.TANH  # noqa: B018
    assert only(record, ("H",))._fields == ("H",)


@pytest.fixture(scope="module")
def counts() -> dict[str, dict[str, int]]:
    """Of each kernel: how often layers that differ in one thing have it compiled."""
    found: dict[str, dict[str, int]] = json.loads(
        children.run("specialisations", {"TRITON_INTERPRET": "0"}, timeout=300)
    )
    return found


def test_options_of_the_edges_compile_no_kernel_of_the_nodes(
    counts: dict[str, dict[str, int]],
) -> None:
    """Norm, tanh and clamp: six layers."""
    found = counts["coordinates"]
    assert found["edge_forward"] == found["edge_backward"] == 6
    # before the edges forward, and backward without sums to begin
    assert found["project_nodes"] == 2
    assert found["pack_weights"] == found["update_nodes"] == found["finish_rows"] == 1


def test_an_activation_compiles_what_computes_it(counts: dict[str, dict[str, int]]) -> None:
    found = counts["activation"]
    assert found["edge_forward"] == found["edge_backward"] == found["update_nodes"] == 3
    assert found["project_nodes"] == 2
    assert found["pack_weights"] == 1


def test_widths_of_one_tile_share_what_packs_their_weights(
    counts: dict[str, dict[str, int]],
) -> None:
    """H of 17 to 31, 1 to 3 attributes; columns that begin at multiples of 16 bytes and beside."""
    found = counts["sizes"]
    assert found["pack_weights"] == 1
    assert found["edge_forward"] >= 2


def test_stages_are_compiled_for_what_they_read(counts: dict[str, dict[str, int]]) -> None:
    """Norm, tanh and clamp again."""
    found = counts["staged"]
    assert found["staged_shifts"] == found["staged_shifts_backward"] == 6
    for name in ("first", "messages", "first_backward", "messages_backward"):
        # messages alone are wanted again backward, not their sums
        assert found[f"staged_{name}"] == (2 if name == "messages" else 1), name
