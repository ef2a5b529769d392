"""Count what the GPU suite has Triton compile: ``python -m bench.offline.specialisations``.

Runs every item of the suite's table of checks on the CPU with the kernels left out: each launch
only records its key in Triton's cache; Triton would compile once for each key. Nothing is compiled.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from triton.runtime import driver
from triton.runtime.jit import JITFunction, compute_cache_key

from bench.gpu.checks import at, table
from bench.gpu.setting import Setting, matmul
from bench.offline import compile, configurations
from egnn_fast import checks
from egnn_fast.backends import decision
from egnn_fast.backends import triton as triton_backend
from egnn_fast.kernels import interpreting

MULTIPROCESSORS = 132  # an H100's: with them the tiles of nodes are chosen
FEW = 203  # edges: their number is no constant of any kernel
Keys = dict[str, set[str]]


def key_of(kernel: Any, args: Sequence[Any], keywords: dict[str, Any]) -> str:
    """Triton's cache key of a compiled kernel: types, constants, alignments, options."""
    keywords = {"debug": False, "instrumentation_mode": "", **keywords}
    *_, binder = kernel.device_caches[driver.active.get_current_device()]
    _, specialization, options = binder(*args, **keywords)
    key: str = compute_cache_key({}, specialization, options)
    return key


@contextmanager
def recorded(arch: str = "sm_90") -> Iterator[Keys]:
    """Inside the block kernels do not run: their cache keys are written down, by kernel."""
    if interpreting():
        raise RuntimeError("TRITON_INTERPRET is set: the interpreter has no keys")
    keys: Keys = defaultdict(set)

    def note(self: Any, *args: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        keys[self.__name__].add(key_of(self, args, keywords))

    call: Any = triton_backend.call.Call
    jit: Any = JITFunction
    replaced: list[tuple[Any, str, Any]] = [
        (jit, "run", note),
        (call, "multiprocessors", property(lambda self: MULTIPROCESSORS)),
        # the tensors lie on the CPU
        (decision, "refusal", lambda backend, call: None),
    ]
    before = [getattr(owner, name) for owner, name, _ in replaced]
    driver.set_active(compile._NoDevice(configurations.TARGETS[arch]))
    for owner, name, value in replaced:
        setattr(owner, name, value)
    try:
        yield keys
    finally:
        for (owner, name, _), value in zip(replaced, before, strict=True):
            setattr(owner, name, value)


def of_suite(rows: Sequence[tuple[str, Any, str]]) -> Keys:
    """The keys of rows of the suite's table; outputs, gradients and second order."""
    with recorded() as keys:
        for face, case, precision in rows:
            small = replace(case, edges=min(case.edges, FEW))
            make = small.edge_pass if face == "edge pass" else small.layer
            with matmul(precision):
                checks.evaluate(at(make(torch.float32), precision, "cpu"), "triton")
    return keys


def main(arguments: Sequence[str] | None = None) -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.offline.specialisations",
        description="Count what the GPU suite has Triton compile.",
    )
    parser.add_argument("--quick", action="store_true", help="only the suite's --quick subset")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts there too")
    args = parser.parse_args(arguments)
    keys = of_suite(table(Setting("cuda", args.quick)))
    counts = {name: len(own) for name, own in sorted(keys.items())}
    for name, count in counts.items():
        print(f"{count:5} {name}")
    print(f"{sum(counts.values()):5} in all")
    if args.json is not None:
        args.json.write_text(json.dumps(counts, indent=1) + "\n")


if __name__ == "__main__":
    main()
