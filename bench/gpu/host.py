"""What a call costs on the host: time until the launches are made, and how many there are."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch

from bench.gpu.cases import timed
from bench.gpu.setting import Item, Outcome, Setting, matmul, synchronize
from egnn_fast.bench.cases import FUSED, INFERENCE, TRAINING
from egnn_fast.nn import EGCL

PEERS = (FUSED, "reference")
_CALLS, _SAMPLES = 20, 15  # calls of a sample: fewer launches than a stream's queue holds
_NODES, _DEGREE, _HIDDEN = 20, 4, 64


def items(setting: Setting) -> Iterator[Item]:
    """An item for a tiny layer, and one for the n-body batch."""
    yield Item("host: layer", "times", _layer, 6, alone=True)
    yield Item("host: nbody", "times", _nbody, 6, alone=True)


def _layer(setting: Setting) -> Outcome:
    from bench.gpu.graphs import regular_graph

    outcome, device = Outcome(), setting.device
    graph = regular_graph(_NODES, _DEGREE, device)
    hidden = _HIDDEN if setting.on_gpu else 16
    for peer in PEERS:
        backend = "triton" if peer == FUSED else "reference"
        layer = EGCL(hidden, hidden, hidden, backend=backend, device=device)
        h, x = (torch.randn(_NODES, width, device=device) for width in (hidden, 3))
        h.requires_grad_()

        def forward(layer: Any = layer, h: Any = h, x: Any = x) -> Any:
            return layer(h, x, graph)

        def both(forward: Any = forward, layer: Any = layer, h: Any = h) -> Any:
            new_h, new_x = forward()
            return torch.autograd.grad(
                new_h.sum() + new_x.sum(), [h, *layer.parameters()], allow_unused=True
            )

        runs = {INFERENCE: torch.inference_mode()(forward), TRAINING: both}
        for measured, run in runs.items():
            _add(outcome, f"a layer of {_NODES} nodes", peer, measured, run, setting)
    return outcome


def _nbody(setting: Setting) -> Outcome:
    from bench.gpu.problems import build, runner

    outcome = Outcome()
    (case,) = (case for case in timed(setting) if case.name == "nbody")
    with matmul("highest"):
        problem = build(case, setting)
        for peer in PEERS:
            run = runner(problem, peer).timed(INFERENCE)
            _add(outcome, "n-body batch", peer, INFERENCE, run, setting)
    return outcome


def _add(
    outcome: Outcome, what: str, peer: str, measured: str, run: Callable[[], Any], setting: Setting
) -> None:
    for _ in range(2):
        run()
    found = _times(run, setting)
    outcome.add("host", what=what, peer=peer, measured=measured, median_s=median(found),
                best_s=min(found), launches=_launches(run, setting))  # fmt: skip


def _times(run: Callable[[], Any], setting: Setting) -> list[float]:
    """Seconds of a call until it returns, its kernels not waited for; samples."""
    calls, samples = (_CALLS, _SAMPLES) if setting.on_gpu else (1, 1)
    found = []
    for _ in range(samples):
        synchronize(setting)
        begin = time.perf_counter()
        for _ in range(calls):
            run()
        found.append((time.perf_counter() - begin) / calls)
    return found


def _launches(run: Callable[[], Any], setting: Setting) -> float | None:
    """Kernels, copies and fills of a call; None where no GPU runs them."""
    from bench.gpu.times import profiled

    if not setting.on_gpu:
        return None
    return sum(calls for _, calls, _ in profiled(run, setting, most=1000))
