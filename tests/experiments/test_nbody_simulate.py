from __future__ import annotations

import numpy as np
import pytest
from nbody import golden

from egnn_fast.experiments.nbody import simulate as module
from egnn_fast.experiments.nbody.simulate import (
    InitialState,
    draw_initial_states,
    simulate,
)


def some(count: int = 7) -> InitialState:
    return draw_initial_states(count, seed=43)


def test_golden_simulations_agree() -> None:
    # 12,366 is chaotic: a wrong last bit anywhere ends up in the first digit
    right = golden("seed43")
    drawn = draw_initial_states(int(right["index"].max()) + 1, seed=43)
    chosen = drawn[right["index"]]
    assert (chosen.charges == right["charges"][..., 0]).all()
    x, v = simulate(chosen, 4999)
    assert x.shape == right["loc"].shape == (5, 49, 3, 5)
    assert np.abs(x - right["loc"]).max() <= 1e-9
    assert np.abs(v - right["vel"]).max() <= 1e-9


def test_draws_of_a_system_do_not_depend_on_how_many_follow() -> None:
    few, many = some(3), some(9)
    assert (few.x == many.x[:3]).all()
    assert (few.v == many.v[:3]).all()
    assert (few.charges == many.charges[:3]).all()
    assert not (few.x == draw_initial_states(3, seed=44).x).any()


def test_speed_and_charges_at_the_start() -> None:
    drawn = some(200)
    assert np.abs(np.sqrt((drawn.v**2).sum(axis=1)) - 0.5).max() < 1e-15
    assert set(np.unique(drawn.charges)) == {-1.0, 1.0}


@pytest.mark.parametrize(("chunk", "threads"), [(1, 1), (2, 3), (100, 2)])
def test_chunks_and_threads_change_no_bit(
    chunk: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = simulate(some(), 200, sample_every=50, threads=1)
    monkeypatch.setattr(module, "CHUNK", chunk)
    found = simulate(some(), 200, sample_every=50, threads=threads)
    assert all((a == b).all() for a, b in zip(found, right, strict=True))


def test_sampling_picks_frames_without_changing_them() -> None:
    all_x, all_v = simulate(some(), 300, sample_every=10)
    x, v = simulate(some(), 299, sample_every=100, first_sample=50)
    assert x.shape == (7, 3, 3, 5)
    assert (x == all_x[:, [4, 14, 24]]).all()
    assert (v == all_v[:, [4, 14, 24]]).all()
    assert simulate(some(), 9, sample_every=10)[0].shape == (7, 0, 3, 5)


def test_a_stored_state_continues_as_the_simulation_did() -> None:
    initial = some()
    x, v = simulate(initial, 200, sample_every=50)
    later = simulate(InitialState(initial.charges, x[:, 1], v[:, 1]), 100, sample_every=50)
    assert (later[0] == x[:, 2:]).all()
    assert (later[1] == v[:, 2:]).all()


def test_inputs_are_not_modified() -> None:
    initial, same = some(), some()
    simulate(initial, 20)
    assert (initial.x == same.x).all()
    assert (initial.v == same.v).all()


def test_walls_mirror_position_and_velocity() -> None:
    x = np.array([[5.5, -6.0, 4.0]])
    v = np.array([[0.1, -0.2, 0.3]])
    module._reflect(x, v)
    assert x.tolist() == [[4.5, -4.0, 4.0]]
    assert v.tolist() == [[-0.1, 0.2, 0.3]]


def test_energy_and_momentum_are_kept() -> None:
    # physics as such, beside the golden bits: charges of one sign never collide
    drawn = some(50)
    initial = InitialState(np.ones_like(drawn.charges), drawn.x, drawn.v)
    x, v = simulate(initial, 2000, sample_every=500)

    def energy(x: np.ndarray, v: np.ndarray) -> np.ndarray:
        distance = np.sqrt(((x[:, :, :, None] - x[:, :, None]) ** 2).sum(axis=1))
        i, j = np.triu_indices(5, 1)
        potential: np.ndarray = (1 / distance[:, i, j]).sum(axis=1)
        return 0.5 * (v**2).sum(axis=(1, 2)) + potential

    before, after = energy(drawn.x, drawn.v), energy(x[:, -1], v[:, -1])
    assert np.median(np.abs(after / before - 1)) < 1e-3
    assert np.abs(v[:, -1].sum(axis=2) - drawn.v.sum(axis=2)).max() < 1e-9


def test_emulated_fused_multiply_add_is_exact_to_the_last_bit() -> None:
    from fractions import Fraction

    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 2, 500))
    forces = module._Forces(np.ones((2, 500)))
    forces._fused_products(x)
    for k in range(500):
        (ax, bx), (ay, by), (az, bz) = x[:, :, k].tolist()
        inner = float(Fraction(ay) * Fraction(by) + Fraction(ax * bx))
        assert forces.dot[0, k] == float(Fraction(az) * Fraction(bz) + Fraction(inner))


def test_coincident_particles_end_as_nan_without_a_warning(
    recwarn: pytest.WarningsRecorder,
) -> None:
    x = np.zeros((1, 3, 5))
    initial = InitialState(np.ones((1, 5)), x, np.zeros_like(x))
    assert np.isnan(simulate(initial, 10, sample_every=5)[0]).all()
    assert not recwarn.list


def test_progress_adds_up_to_the_whole() -> None:
    told: list[float] = []
    simulate(some(), 130, threads=2, on_progress=told.append)
    assert len(told) > 2
    assert sum(told) == pytest.approx(1)


def test_an_interrupt_stops_the_threads_at_once() -> None:
    def interrupt(fraction: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(some(), 10**9, threads=2, on_progress=interrupt)
