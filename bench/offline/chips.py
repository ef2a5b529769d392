"""The GPUs that times are predicted for: rates of their units, from NVIDIA's white papers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

WARP = 32


@dataclass(frozen=True)
class Gpu:
    """A GPU's rates; those of a multiprocessor for each of its clocks.

    Attributes
    ----------
    arch : what its code is compiled for
    multiprocessors, ghz : their number, the boost clock
    macs : multiply-adds of the matrix units, dense, by instruction and type
    fma : lanes of float32 arithmetic
    l2_bytes_per_clock : of all multiprocessors together
    l2_bytes, hbm_gb : L2's size, GB/s of the memory
    l1_bytes : of a multiprocessor, shared memory among them
    shared_bytes : of these, what its programs' shared memory can take
    """

    arch: str
    multiprocessors: int
    ghz: float
    macs: Mapping[str, float]
    fma: int
    l2_bytes_per_clock: int
    l2_bytes: int
    hbm_gb: float
    l1_bytes: int
    shared_bytes: int


# NVIDIA A100 Tensor Core GPU Architecture (white paper, 2020): 108 SMs, 1410 MHz, 312 TFLOPS in
# 16 bits and 156 in tf32, 64 FP32 lanes, L2 of 40 MB that reads 5120 bytes a clock; the data sheet
# of the 80 GB SXM model: 2039 GB/s. L1 and shared memory: 192 KB, H100's 256 KB; of these at most
# 164 and 228 KB are shared memory (CUDA C++ Programming Guide, compute capabilities 8.0 and 9.0).
# NVIDIA H100 Tensor Core GPU Architecture (white paper, 2022), SXM5: 132 SMs, 989.4 TFLOPS in 16
# bits and 494.7 in tf32, dense, which is 2048 and 1024 multiply-adds at 1830 MHz; 128 FP32 lanes,
# L2 of 50 MB, 3.35 TB/s. No bandwidth of L2 is given there: A100's is taken.
# HMMA on Hopper: 62.9 % of the peak, as measured in arXiv 2402.13499; HGMMA: all of it.
# NVIDIA H200 Tensor Core GPU (data sheet, 2024), SXM: H100's multiprocessors, 4.8 TB/s.
_MMA_SHARE = 0.629
_HOPPER = {
    "HGMMA.BF16": 2048, "HGMMA.F16": 2048, "HGMMA.TF32": 1024,
    "HMMA.BF16": 2048 * _MMA_SHARE, "HMMA.F16": 2048 * _MMA_SHARE, "HMMA.TF32": 1024 * _MMA_SHARE,
}  # fmt: skip
_AMPERE = {"HMMA.BF16": 1024, "HMMA.F16": 1024, "HMMA.TF32": 512}
_A100 = (192 << 10, 164 << 10)
_H100 = (256 << 10, 228 << 10)
GPUS = {
    "a100": Gpu("sm_80", 108, 1.410, _AMPERE, 64, 5120, 40 << 20, 2039, *_A100),
    "h100": Gpu("sm_90", 132, 1.830, _HOPPER, 128, 5120, 50 << 20, 3350, *_H100),
    "h200": Gpu("sm_90", 132, 1.830, _HOPPER, 128, 5120, 50 << 20, 4800, *_H100),
}
# CUDA C++ Programming Guide, throughput of native arithmetic instructions, 8.0 and 9.0: results of
# a multiprocessor for each clock
SPECIAL, INTEGER, SHUFFLE = 16, 64, 32
SCHEDULERS = 4  # of a multiprocessor, each of which issues a warp's instruction in each clock
L1_BYTES = 128  # bytes of L1 and shared memory for each clock, both white papers
