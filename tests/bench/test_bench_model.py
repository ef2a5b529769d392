"""The static model's arithmetic on made-up counts, and one run of its command."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

if sys.platform != "linux":
    pytest.skip("Triton's wheels are for Linux alone", allow_module_level=True)

from bench.offline import model, stalls
from bench.offline.chips import GPUS, Gpu
from bench.offline.compile import Record
from bench.offline.configurations import Configuration
from bench.offline.disassembly import Loop
from bench.offline.model import Problem
from egnn_fast.backends.triton import call
from egnn_fast.kernels.blocks import Blocks

A100, H200 = GPUS["a100"], GPUS["h200"]
WARPS, EDGES = 4, 64
UNIFORM = Problem(nodes=1_000_000, edges=32_000_000)


def cycles(counts: dict[str, int], gpu: Gpu = H200, **macs: int) -> dict[str, float]:
    loop = Loop("block", counts, {name.replace("_", "."): n for name, n in macs.items()})
    return model.unit_cycles([loop], gpu, WARPS, EDGES, rows=3)


def record(kernel: str = "edge_forward", in_memory: int = 0, **fields: object) -> Record:
    blocks = Blocks(EDGES, WARPS, 2, in_memory, "made up")
    c = replace(Configuration(kernel, precision="bf16", blocks=blocks), **fields)  # type: ignore[arg-type]
    counts = {"MUFU.EX2": 96, "MUFU.RCP": 48, "HGMMA": 8, "LDG.128": 16}
    loops = [Loop("block", counts, {"HGMMA.BF16": 131072})]
    return Record(c, WARPS, EDGES, 200, 0, 1024, counts, loops=loops)


def test_special_units() -> None:
    # three activations of 64 channels: an exponential each, a reciprocal for two
    found = cycles({"MUFU.EX2": 96, "MUFU.RCP": 48})
    assert found["special"] == pytest.approx(3 * 64 * 1.5 / 16)
    assert found["fma"] == found["alu"] == found["l1"] == found["matrix"] == 0
    assert found["issue"] == pytest.approx(144 * WARPS / 4 / EDGES)


def test_matrix_units() -> None:
    """2 H² multiply-adds of an edge, at each chip's rate."""
    macs = 2 * 64 * 64 * EDGES // WARPS
    assert cycles({}, HGMMA_BF16=macs)["matrix"] == pytest.approx(8192 / 2048)
    assert cycles({}, HGMMA_TF32=macs)["matrix"] == pytest.approx(8192 / 1024)
    assert cycles({}, HMMA_BF16=macs)["matrix"] == pytest.approx(8192 / (2048 * 0.629))
    assert cycles({}, A100, HMMA_BF16=macs)["matrix"] == pytest.approx(8192 / 1024)
    assert cycles({}, A100, HMMA_TF32=macs)["matrix"] == pytest.approx(8192 / 512)


def test_what_is_spilled_goes_to_l2_where_l1_is_too_small() -> None:
    loops = [Loop("block", {"STL.32": 3, "LDL.64": 1}, {})]
    small = replace(record(), stack=64, loops=loops)
    assert model.spilled_traffic(replace(small, stack=0, loops=[]), H200, 3) == 0
    assert model.spilled_traffic(small, H200, 3) == 0  # two programs' 16 KB fit beside 2 KB
    full = replace(small, shared=124 << 10)  # of 256 KB 8 are left
    moved = (3 * 4 + 8) * 32 * WARPS / EDGES
    assert model.spilled_traffic(full, H200, 3) == pytest.approx(moved / 2)
    assert model.spilled_traffic(replace(full, shared=128 << 10), H200, 3) == pytest.approx(moved)


def test_arithmetic() -> None:
    counts = {"FFMA": 32, "FADD": 16, "FMUL": 16, "IMAD": 64, "ALU": 64}
    share = WARPS / EDGES
    hopper, ampere = cycles(counts), cycles(counts, A100)
    assert hopper["fma"] == pytest.approx((64 * 32 / 128 + 64 * 32 / 64) * share)
    assert ampere["fma"] == pytest.approx((64 * 32 / 64 + 64 * 32 / 64) * share)
    assert hopper["alu"] == ampere["alu"] == pytest.approx(64 * 32 / 64 * share)


def test_memory_unit_counts_bytes() -> None:
    one = WARPS / EDGES
    for name, busy in (("LDS.128", 4), ("LDG.64", 2), ("STS.16", 1), ("SHFL", 1), ("STL.32", 1)):
        assert cycles({name: 1})["l1"] == pytest.approx(busy * one), name


def test_loops_count_by_their_trips() -> None:
    loops = [
        Loop("block", {"SHFL": 1}, {}),
        Loop("window", {"SHFL": 10}, {}),
        Loop("search", {"SHFL": 100}, {}),
        Loop("wait", {"SHFL": 1000}, {}),
    ]

    def shuffles(rows: float) -> float:
        return model.unit_cycles(loops, H200, 1, 1, rows)["l1"]

    assert shuffles(1) == 111
    assert shuffles(3) == 211
    assert shuffles(64) == 1 + 4 * 10 + 6 * 100


def test_rows_of_a_block() -> None:
    assert model.rows_of_block(64, 32) == pytest.approx(1 + 63 / 32)
    assert model.rows_of_block(64, 1) == model.rows_of_block(64, 0.01) == 64


def test_bytes_forward() -> None:
    rows = (1 + 63 / 32) / 64
    l2, hbm = model.traffic(record(), H200, UNIFORM)
    gathered, node, sums = 128 + 32, 128 + 12, 4 * (64 + 3)
    assert l2 == pytest.approx(gathered + 8 + rows * (node + sums))
    missed = 1 - (50 << 20) / (140 * 1_000_000)
    assert hbm == pytest.approx(missed * gathered + 8 + (node + sums) / 32)
    # what fits into L2 is read from HBM once for each node
    assert model.traffic(record(), H200, Problem(1000, 32_000))[1] == pytest.approx(8 + 408 / 32)
    assert model.traffic(record(complete=True), H200, UNIFORM)[0] == pytest.approx(l2 - 8)


def test_bytes_backward() -> None:
    forward = model.traffic(record(), H200, UNIFORM)
    l2, hbm = model.traffic(record("edge_backward"), H200, UNIFORM)
    rows = (1 + 63 / 32) / 64
    assert l2 - forward[0] == pytest.approx(rows * 268 + 2 * (256 + 32))
    missed = 1 - (50 << 20) / (268 * 1_000_000)
    assert hbm - forward[1] == pytest.approx(268 / 32 + 2 * 288 * missed)
    in_memory = model.traffic(record("edge_backward", in_memory=2), H200, UNIFORM)
    assert in_memory[0] - l2 == pytest.approx(2 * 2 * 4 * 64 * 64 / 64)
    assert in_memory[1] == hbm


def test_prediction() -> None:
    found = model.predict(record(), H200, UNIFORM)
    assert found.limit == "special"
    assert found.ns_per_edge == pytest.approx(18 / 132 / 1.83)
    assert found.ms_least == pytest.approx(32e6 * 18 / 132 / 1.83e6)
    assert found.ms_least < found.ms_likely_most < found.ms_in_turn
    # HBM's time does not depend on the clock
    ns = found.cycles["hbm"] / 132 / 1.83
    assert ns == pytest.approx(found.hbm_bytes / 4800)


def test_a_pass_in_stages_takes_the_sum_of_its_stages() -> None:
    stages = [record(f"staged_{name}", hidden=256) for name in ("first", "messages", "shifts")]
    tile = 256 * 2 * 132 / 5120  # cycles of L2
    # of what L2 does not hold of a chunk, cycles of HBM
    missed = 1 - (50 << 20) / call.CHUNK_BYTES
    far = 256 * 2 * missed * 132 * 1.83 / 4800
    found = model.predict_stages(stages, H200, UNIFORM)
    products = 2 * 256**2 / 2048
    assert products > 4 * far > 4 * tile
    l2, hbm = model.traffic(record(hidden=256), H200, UNIFORM)
    first = max(l2 * 132 / 5120 + tile, hbm * 132 * 1.83 / 4800 + far)
    assert 2 * far > 2 * tile > 18 > far
    least = products + first + 2 * far + 18
    assert found.ns_per_edge == pytest.approx(least / 132 / 1.83)
    assert found.limit == "stages"
    assert found.cycles["special"] == pytest.approx(3 * 18)
    assert found.cycles["l2"] == pytest.approx((4 + 4) * tile + l2 * 132 / 5120)
    assert found.cycles["hbm"] == pytest.approx((4 + 4) * far + hbm * 132 * 1.83 / 4800)
    # float32's own products have no matrix units; those of the stages themselves are 4 cycles each
    exact = [replace(r, configuration=replace(r.configuration, precision="highest"))
             for r in stages]  # fmt: skip
    matrix = model.predict_stages(exact, H200, UNIFORM).cycles["matrix"]
    assert matrix == pytest.approx(2 * 256**2 / 128 + 3 * 4)


def test_chunks_that_fit_into_l2_are_not_read_from_hbm(monkeypatch: pytest.MonkeyPatch) -> None:
    stages = [record(f"staged_{name}", hidden=256) for name in ("first", "messages", "shifts")]
    gathered = model.traffic(record(hidden=256), H200, UNIFORM)[1]
    monkeypatch.setattr(call, "CHUNK_BYTES", 24 << 20)
    small = model.predict_stages(stages, H200, UNIFORM)
    assert small.hbm_bytes == pytest.approx(gathered)
    monkeypatch.setattr(call, "CHUNK_BYTES", 128 << 20)
    large = model.predict_stages(stages, H200, UNIFORM)
    assert large.ms_least > small.ms_least
    assert large.host_ms < small.host_ms / 5
    # likely at most, tiles of any chunk come from HBM
    assert large.ms_likely_most == pytest.approx(small.ms_likely_most)


def test_waits_of_the_upper_end() -> None:
    """One reads in turn 3 times and waits at 10 barriers: beside its programs, nothing else."""
    loops = [Loop("block", {"BAR": 4, "FFMA": 640}, {}), Loop("window", {"BAR": 6}, {})]
    one = replace(record(), loops=loops)
    units = {"issue": 10.0, "fma": 9.0, "l2": 3.0, "hbm": 4.5}
    found = stalls.stalled(one, H200, [1, 1], units)
    programs = stalls.programs_that_fit(one, H200)
    assert programs == 2
    assert found["waits"] == pytest.approx((3 * 800 + 10 * 30) / (2 * EDGES))
    # two warps to a scheduler, each of which issues at every fourth clock
    assert found["issue"] == pytest.approx(20)
    assert found["l2"] == pytest.approx(6)
    assert found["hbm"] == pytest.approx(5)
    assert stalls.longest(found) == pytest.approx(20 + found["waits"])
    # a window that runs twice has its barriers twice
    again = stalls.stalled(one, H200, [1, 2], units)
    assert again["waits"] - found["waits"] == pytest.approx(6 * 30 / (2 * EDGES))


@pytest.mark.parametrize(
    ("fields", "programs"),
    [({}, 2), ({"registers": 255}, 2), ({"shared": 113 << 10}, 2), ({"shared": 114 << 10}, 1),
     ({"warps": 8, "registers": 160}, 1), ({"registers": 250, "warps": 16}, 1)],
)  # fmt: skip
def test_programs_that_fit(fields: dict[str, int], programs: int) -> None:
    assert stalls.programs_that_fit(replace(record(), **fields), H200) == programs  # type: ignore[arg-type]


def test_what_does_not_fit_comes_afterwards() -> None:
    both, one = record(), replace(record(), shared=114 << 10)
    units = {"issue": 10.0, "fma": 90.0}
    assert stalls.stalled(both, H200, [1], units)["fma"] == 90
    # one program at a time is as fast as two for a unit that is always busy
    assert stalls.stalled(one, H200, [1], units)["fma"] == 90
    blocks = both.configuration.row._replace(programs=3)
    three = replace(both, registers=255, configuration=replace(both.configuration, blocks=blocks))
    assert stalls.programs_that_fit(three, H200) == 2
    assert stalls.stalled(three, H200, [1], units)["fma"] == pytest.approx(90 * 4 / 3)


def test_the_host_may_take_longer() -> None:
    found = replace(model.predict(record(), H200, UNIFORM), host_ms=1e3)
    assert found.total_ms == (1e3, 1e3)
    found = replace(found, host_ms=1e-3)
    assert found.total_ms == (found.ms_least, found.ms_likely_most)


def test_which_kernels_a_pass_has() -> None:
    assert [c.kernel for c in model.kernels_of("forward", "sm_90", 64, "bf16")] == ["edge_forward"]
    kernels = [c.kernel for c in model.kernels_of("backward", "sm_90", 256, "bf16")]
    assert kernels == [
        "staged_first", "staged_messages",
        "staged_shifts_backward", "staged_messages_backward", "staged_first_backward",
    ]  # fmt: skip


def test_what_cannot_be_predicted_is_told() -> None:
    with pytest.raises(ValueError, match=r"UTC\*MMA"):
        cycles({"UTCMMA": 1})
    with pytest.raises(ValueError, match="no loop with matrix instructions"):
        model.predict(replace(record(), loops=[]), H200, UNIFORM)


def test_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    file = tmp_path / "model.json"
    model.main(["--arch", "h100", "h200", "--hidden", "64", "--precision", "bf16",
                "--kernel", "forward", "--json", str(file)])  # fmt: skip
    assert "A prediction from compiled code, not a measurement" in capsys.readouterr().out
    content = json.loads(file.read_text())
    assert content["prediction"] is True
    h100, h200 = content["rows"]
    assert (h100["gpu"], h200["gpu"]) == ("h100", "h200")
    for row in (h100, h200):
        # three activations of 64 channels, an exponential and half a reciprocal each
        assert row["cycles"]["special"] >= 18
        assert row["cycles"]["matrix"] >= 4
        assert row["ms_least"] == pytest.approx(32e6 * max(row["cycles"].values()) / 132 / 1.83e6)
        assert row["total_ms"][0] == row["ms_least"] < row["ms_likely_most"] < row["ms_in_turn"]
        assert row["launches"] == {"triton": 3, "torch": 2}
        assert 0 < row["host_ms"] < 1
        assert row["limit"] in row["cycles"]
    assert h100["cycles"]["hbm"] == pytest.approx(h200["cycles"]["hbm"] * 4800 / 3350)
