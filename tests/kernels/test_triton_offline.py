"""The Triton kernels compiled without a GPU: registers, spills, memory, instruction mix."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import children
import pytest

if sys.platform != "linux":
    pytest.skip("Triton's wheels are for Linux alone", allow_module_level=True)

import triton

from bench.offline import __main__ as table
from bench.offline.compile import Record, compile_all, compile_here
from bench.offline.configurations import (
    KERNELS,
    NODE_KERNELS,
    NVIDIA,
    PASSES,
    SHARED_LIMIT,
    STAGED_KERNELS,
    WIDE_WIDTH,
    Configuration,
    arguments,
    kernel_functions,
    shipped,
    with_options,
)
from bench.offline.disassembly import number_of
from egnn_fast.kernels import blocks
from egnn_fast.kernels.blocks import Blocks, blocks_for
from egnn_fast.kernels.records import MAX_ATTRS, READ, LayerOptions

ROOT = Path(__file__).resolve().parents[2]

CHIPS = ("sm_80", "sm_90", "sm_100", "gfx942")
PROCESSES = min(4, os.cpu_count() or 1)
EDGE_KERNELS = ("edge_forward", "edge_backward")
# the first test that needs them compiles them all
pytestmark = pytest.mark.timeout(1800)


def representative() -> list[Configuration]:
    """Each kernel, precision, chip and option at least once."""
    forward, backward = (Configuration(kernel) for kernel in EDGE_KERNELS)
    own = [kernel for kernel in KERNELS if kernel not in STAGED_KERNELS]
    found = [Configuration(kernel, arch) for arch in CHIPS for kernel in own]
    found.append(Configuration("update_nodes", precision="high", few=True))
    found.append(Configuration("update_nodes", hidden=33, precision="highest", velocity=True))
    found.append(Configuration("pack_weights", hidden=33, attrs=2, precision="high"))
    found += [Configuration("edge_backward", arch) for arch in ("sm_89", "sm_120")]
    found += [Configuration(kernel, hidden=WIDE_WIDTH) for kernel in STAGED_KERNELS]
    for arch in ("sm_80", "sm_100", "gfx942"):
        found.append(Configuration("staged_first_backward", arch, WIDE_WIDTH, precision="highest"))
    *_, every = with_options(backward)
    for kernel in ("staged_messages", "staged_messages_backward", "staged_first_backward"):
        found.append(replace(every, kernel=kernel, hidden=WIDE_WIDTH))
    found += [*with_options(forward), *with_options(backward)]
    for precision in ("fp16", "high", "highest"):
        found.append(Configuration("edge_forward", precision=precision))
    found.append(Configuration("edge_backward", hidden=16))
    found.append(Configuration("edge_forward", hidden=33, complete=True))
    found.append(Configuration("edge_forward", hidden=128, precision="high"))
    found.append(Configuration("edge_forward", "gfx942", precision="highest"))
    leaky = LayerOptions(activation="leaky_relu")
    found.append(Configuration("edge_forward", dim=1, options=leaky))
    # what needs the most shared memory
    widest = {"attrs": MAX_ATTRS, "dim": 16, "options": leaky}
    found.append(Configuration("edge_forward", "sm_89", precision="highest", **widest))  # type: ignore[arg-type]
    found.append(Configuration("edge_backward", "sm_89", precision="high", **widest))  # type: ignore[arg-type]
    found.append(Configuration("edge_backward", hidden=128, precision="high", **widest))  # type: ignore[arg-type]
    for activation in ("silu", "leaky_relu"):
        options = replace(every.options, activation=activation)
        wide = replace(every, hidden=128, **{**widest, "options": options})  # type: ignore[arg-type]
        found.append(wide)
    return found


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("triton")


@pytest.fixture(scope="module")
def records(cache: Path) -> list[Record]:
    return compile_all(representative(), PROCESSES, cache)


@pytest.fixture(scope="module")
def all_shipped(cache: Path) -> list[Record]:
    return compile_all(list(shipped()), PROCESSES, cache)


def check(record: Record) -> None:
    """What holds for every configuration."""
    c = record.configuration
    assert number_of(record.counts, "LDG", "LOAD") > 0, c.label
    assert number_of(record.counts, "STG", "STORE") > 0, c.label
    matrix = number_of(record.counts, "HMMA", "HGMMA", "UTCMMA", "MFMA")
    without = c.kernel in ("finish_rows", "pack_weights")
    without |= c.kernel == "staged_first" and not c.attrs
    assert (matrix > 0) != without, c.label
    if c.arch == "gfx942":
        return
    assert 0 < record.registers <= 255, c.label
    # a spilled register goes to local memory, and nothing else does
    assert (record.stack > 0) == (number_of(record.counts, "LDL", "STL") > 0), c.label
    if c.kernel not in NODE_KERNELS:
        assert [loop.kind for loop in record.loops[:1]] == ["block"] * (c.kernel != "finish_rows")


def check_special(record: Record) -> None:
    """Exponentials and reciprocals for each edge and channel, as the algorithm has them."""
    c = record.configuration
    if c.kernel not in EDGE_KERNELS or c.arch == "gfx942":
        return
    exponentials = table.per_edge_and_channel(record, "MUFU.EX2")
    reciprocals = table.per_edge_and_channel(record, "MUFU.RCP")
    activations = 0 if c.options.activation != "silu" else 3 if c.head else 2
    inverses = activations / 2 if c.row.paired else activations
    if c.attention or c.options.coord_tanh or c.options.coord_norm:  # these have some for each edge
        assert activations <= exponentials < activations + 1, c.label
        assert inverses <= reciprocals < inverses + 1, c.label
    elif activations == 0:
        assert exponentials == reciprocals == 0, c.label
    else:
        # some have a few more for each warp and block; a whole activation would be 1 and 1/2 or 1
        assert activations <= exponentials <= activations + 0.125, c.label
        assert inverses <= reciprocals <= inverses + 0.125, c.label


def committed() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(table.RESULTS.read_text())
    return found


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["kernel"], row["arch"], row["hidden"], row["precision"], row["edges"]


def check_committed(records: list[Record]) -> int:
    """What is shipped is compiled to what is committed; how many of these there are."""
    plain = [r for r in records if r.configuration in set(shipped())]
    known = {key(row): row for row in committed()["kernels"]}
    for record in plain:
        row = table.summary(record)
        # another compiler or assembler spills other registers
        same = record.triton == committed()["triton"]
        known_ptxas = committed().get("ptxas", {}).get(record.configuration.arch)
        if same and known_ptxas in (None, record.assembler):
            assert row == known[key(row)], "run: python -m bench.offline"
    return len(plain)


def test_what_is_compiled_holds(records: list[Record]) -> None:
    assert [r.configuration for r in records] == representative()
    for record in records:
        check(record)
        check_special(record)
        assert record.shared <= SHARED_LIMIT[record.configuration.arch], record.configuration.label


def test_what_is_compiled_is_committed(records: list[Record]) -> None:
    assert check_committed(records) >= 16


def test_matrix_units_by_chip(records: list[Record]) -> None:
    found = {r.configuration: r for r in records}
    for kernel in EDGE_KERNELS:
        counts = {arch: found[Configuration(kernel, arch)].counts for arch in CHIPS}
        assert "HMMA" in counts["sm_80"]
        assert "HGMMA" in counts["sm_90"] or "HMMA" in counts["sm_90"]
        assert "UTCMMA" in counts["sm_100"] or "HMMA" in counts["sm_100"]
        assert "MFMA" in counts["gfx942"]


def test_products_are_as_many_as_the_algorithm_has(records: list[Record]) -> None:
    """2 H² multiply-adds an edge forward, 6 H² backward; in tf32x3 three times, in bf16x6 six.

    Backward, also a slope's way from shared memory: a product with an identity as wide as a block.
    """
    checked = 0
    for record in records:
        c = record.configuration
        plain = c.head and not c.attrs and c.arch in ("sm_80", "sm_90")
        # several warps do the same for a matrix of 16 x 16
        if c.kernel not in EDGE_KERNELS or not plain or c.hidden < 64:
            continue
        checked += 1
        block = record.loops[0]
        macs = sum(block.macs.values()) * record.warps / record.edges
        expected = (2 if c.kernel == "edge_forward" else 6) * c.hidden**2
        expected *= {"tf32x3": 3, "bf16x6": 6}[c.row.split] if c.precision == "highest" else 1
        # backward: sums of the weights that are vectors go through tiles of 16 rows
        vectors = 0 if c.kernel == "edge_forward" else 4 * 16 * c.hidden
        if c.kernel == "edge_backward" and c.precision != "highest":
            expected += record.edges * c.hidden
        assert expected <= macs <= expected + vectors, c.label
    assert checked >= 10


def test_asynchronous_products_have_their_registers_to_themselves(records: list[Record]) -> None:
    hopper = [r for r in records if "HGMMA" in r.counts]
    assert {r.configuration.kernel for r in hopper} >= {*EDGE_KERNELS, "sender_sums"}
    assert {r.configuration.arch for r in hopper} == {"sm_90"}
    for record in hopper:
        assert record.hazards == [], record.configuration.label


def test_a_record_names_assembler_and_code(records: list[Record], tmp_path: Path) -> None:
    for record in records:
        nvidia = record.configuration.arch in NVIDIA
        assert bool(record.assembler) == bool(record.code) == nvidia, record.configuration.label
    chosen = Configuration("finish_rows")
    (again,) = compile_all([chosen], 1, tmp_path)
    (before,) = (r for r in records if r.configuration == chosen)
    assert again == before
    codes = {r.code for r in records if r.code}
    assert len(codes) > len(records) / 2


def test_another_assembler_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its programs are Triton's own in disguise: the version comes from what was called."""
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    other = tmp_path / "ptxas"
    other.write_text(
        f'#!/bin/sh\nif [ "$1" = --version ]; then\n'
        f"  echo 'Cuda compilation tools, release 12.8, V12.8.7'\nelse\n  exec {ptxas} \"$@\"\nfi\n"
    )
    other.chmod(0o755)
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(other))
    (record,) = compile_all([Configuration("finish_rows", "sm_80")], 1, tmp_path / "cache")
    assert record.assembler == "12.8.7"
    table.write([record], tmp_path / "offline.json")
    written = json.loads((tmp_path / "offline.json").read_text())
    assert written["ptxas"] == {"sm_80": "12.8.7"}
    assert list(written["kernels"][0]) == list(committed()["kernels"][0])


def test_amd_tells_registers_and_spills(records: list[Record]) -> None:
    amd = [r for r in records if r.configuration.arch == "gfx942"]
    assert len(amd) == 9
    for record in amd:
        assert 0 < record.registers <= 512
        # scalar registers go to lanes of a vector register first, which is no memory
        assert record.spilled_registers > 0 or "SCRATCH" not in record.counts


def test_offline_compiles_what_is_launched(cache: Path) -> None:
    """Kernel by kernel, the hash of source, arguments' types, constants and options."""
    environment = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    found = json.loads(children.run("launched_kernels", environment, timeout=900))
    assert set(found) == set(KERNELS)
    for name, (launched, offline) in found.items():
        assert launched == offline, name


def test_a_failure_to_compile_is_told(cache: Path) -> None:
    wrong = Configuration("edge_forward", blocks=Blocks(48, 4, 1, 0, "no power of 2"))
    with pytest.raises(
        RuntimeError, match=r"compiling failed: edge_forward sm_90 H=64 bf16 blocks"
    ):
        compile_all([wrong], 1, cache)


def test_configurations_are_checked() -> None:
    with pytest.raises(ValueError, match="kernel: expected one of edge_forward"):
        Configuration("edge_sideways")
    with pytest.raises(ValueError, match="arch: expected one of sm_80"):
        Configuration("edge_forward", "sm_12")


def test_options_are_given_by_name_and_come_back_from_json() -> None:
    c = Configuration("edge_forward", options={"coord_tanh": True, "coord_norm": 0.5}, attrs=2)  # type: ignore[arg-type]
    assert c.options == LayerOptions(coord_tanh=True, coord_norm=0.5)
    assert c.label == "edge_forward sm_90 H=64 bf16 coord_norm=0.5 coord_tanh attrs=2"
    assert Configuration(**json.loads(json.dumps(asdict(c)))) == c
    assert c.plan.spec.TANH.value
    assert c.plan.spec.NORM.value == 2
    with pytest.raises(TypeError, match="coord_spin"):
        Configuration("edge_forward", options={"coord_spin": True})  # type: ignore[arg-type]


def test_a_launch_holds_what_the_launcher_passes() -> None:
    """Of a stage: its records in order, the edges of the chunk, the constants that it reads."""
    kernel, args, keywords = arguments(Configuration("staged_shifts", hidden=WIDE_WIDTH))
    problem, tile, rows, begin, end, blocks, spec = args
    assert kernel is kernel_functions()["staged_shifts"]
    assert problem.weights.w3.dtype == tile.dtype
    assert rows.out.shape[1] == 3
    assert (begin, blocks) == (0, -(-end // spec.BLOCK.value))
    assert spec._fields == READ["staged_shifts"]
    assert keywords["num_warps"] == Configuration("staged_shifts", hidden=WIDE_WIDTH).warps


def test_nothing_is_compiled_under_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        compile_here(Configuration("edge_forward"))


def test_programs_share_the_registers() -> None:
    three, usual = Blocks(64, 4, 3, 0, "made up"), {"num_warps": 4, "num_stages": 1}
    assert three.launch_options("forward", nvidia=True) == {**usual, "maxnreg": 168}
    one = three._replace(programs=1)
    assert one.launch_options("forward", nvidia=True) == {**usual, "maxnreg": 255}
    for direction, nvidia, row in (
        ("backward", True, three), ("forward", False, three),
        ("forward", True, three._replace(staged=True)),
    ):  # fmt: skip
        assert row.launch_options(direction, nvidia) == usual


def test_shipped_configurations_cover_the_tables() -> None:
    rows = {c.row for c in shipped() if c.kernel in EDGE_KERNELS + STAGED_KERNELS}
    precisions = ("bf16", "fp16", "high", "highest")
    passes = itertools.product(("forward", "backward"), precisions, (16, 32, 64, 128, 256), NVIDIA)
    assert rows == {blocks_for(*each) for each in passes}
    tables = (blocks.TABLE, blocks.AMPERE, blocks.CONSUMER, blocks.BLACKWELL)
    assert rows >= {row for table in tables for row in table.values()}
    # every pass at every width, by one kernel or by its stages
    for arch, precision in itertools.product(NVIDIA, precisions):
        found = [c for c in shipped((arch,)) if c.precision == precision]
        for hidden in (16, 32, 64, 128, 256):
            beside = {"sender_sums", "finish_rows", *NODE_KERNELS}
            kernels = {c.kernel for c in found if c.hidden == hidden} - beside
            for fused, *stages in PASSES.values():
                assert ({fused} <= kernels) != (set(stages) <= kernels)


def test_committed_file_lists_every_shipped_configuration() -> None:
    assert {key(row) for row in committed()["kernels"]} == {
        (c.kernel, c.arch, c.hidden, c.precision, c.edges) for c in shipped()
    }


def edge_rows() -> list[dict[str, Any]]:
    return [row for row in committed()["kernels"] if row["kernel"] in EDGE_KERNELS]


def test_no_row_needs_more_shared_memory_than_there_is() -> None:
    beyond = [key(row) for row in edge_rows() if row["shared"] > SHARED_LIMIT[row["arch"]]]
    assert beyond == []


def spilling(*archs: str) -> list[tuple[Any, ...]]:
    """Rows that spill at H <= 64, or forward at H = 128, in 16 bits and tf32.

    Of the edge kernels those that spill in their loop over blocks: what lies outside costs nothing.
    """
    beside = dict.fromkeys(("sender_sums", "finish_rows", *NODE_KERNELS), 128)
    widest = {"edge_forward": 128, "edge_backward": 64, **beside}
    return [
        key(row)
        for row in committed()["kernels"]
        if row["arch"] in archs and row["precision"] != "highest"
        if row["spill_cycles_per_edge" if row["kernel"].startswith("edge_") else "stack"]
        if row["hidden"] <= widest.get(row["kernel"], 64)
    ]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_spills_cost_little(arch: str) -> None:
    """Less than a cycle of an edge, of which a pass takes 29 at least.

    On an H200 the fastest row of tf32 forward at H = 64 is one that spills so little.
    """
    found = {key(row): row["spill_cycles_per_edge"] for row in committed()["kernels"]}
    rows = spilling(arch)
    assert {row: found[row] for row in rows if not row[0].startswith("edge_")} == {}
    assert {row: found[row] for row in rows if found[row] >= 1} == {}
    assert sum(row["arch"] == arch for row in edge_rows()) >= 2 * 3 * 3


def test_what_spills_on_consumer_cards_costs_little() -> None:
    """Backward alone; in cycles of an edge, of which such a pass takes 44 (H = 32) to 160."""
    found = {key(row): row["spill_cycles_per_edge"] for row in committed()["kernels"]}
    costs = {name: found[name] for name in spilling("sm_89", "sm_120")}
    assert {name for name in costs if name[0] != "edge_backward"} == set()
    assert {name: cost for name, cost in costs.items() if cost > 13} == {}


def test_no_row_computes_an_activation_twice() -> None:
    """Neither a pass its three nor a stage its one, in the layouts of two products."""
    stages = [row for row in committed()["kernels"] if row["kernel"] in STAGED_KERNELS]
    twice = [row for row in edge_rows() if not 3 <= row["exponentials"] < 3.5]
    twice += [row for row in stages if not 1 <= row["exponentials"] < 1.5]
    assert [key(row) for row in twice] == []


@pytest.mark.full
@pytest.mark.timeout(3 * 3600)
def test_every_shipped_configuration(all_shipped: list[Record]) -> None:
    for record in all_shipped:
        check(record)
    assert check_committed(all_shipped) == len(list(shipped()))


def test_no_address_is_an_offset_between_tensors_on_amd() -> None:
    """There an offset from a tensor of less than 2 GB is cut to 32 bits, without a fault."""
    code = """
import re, sys
from bench.offline import compile, configurations
from triton.runtime import driver

configurations._Address.ptr_range = lambda self: 1 << 20
c = configurations.Configuration("edge_forward", "gfx942")
driver.set_active(compile._NoDevice(configurations.TARGETS["gfx942"]))
kernel, args, keywords = configurations.arguments(c)
lines = kernel.warmup(*args, grid=(1,), **keywords).asm["ttgir"].splitlines()
offsets = [line.split("=")[0].strip() for line in lines if re.search(
    r"arith[.]trunci .*xi64> to tensor<.*xi32>", line)]
loads = [line for line in lines if "buffer_load" in line]
assert loads, "no buffer operations: the test shows nothing"
cut = [line for line in loads for name in offsets if f"[{name}]" in line]
pairs = [line for line in lines if "tt.int_to_ptr" in line]
print(len(cut), len(pairs) > 0)
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, env=environment,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["0", "True"]
