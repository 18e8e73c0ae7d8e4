"""The samplers of flow matching: orders of convergence where the answer is known, and shifted times."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gspn_dit.config import ObjectiveConfig
from gspn_dit.data.latents import shift_of_size
from gspn_dit.diffusion import create_objective, draw_noise, sample_latents
from gspn_dit.diffusion.flow_schedulers import EulerMaruyamaScheduler
from gspn_dit.diffusion.objective import Objective
from gspn_dit.diffusion.sampling import draw_step_noise
from gspn_dit.diffusion.schedulers import default_scheduler, ready_scheduler
from gspn_dit.errors import UserError

MEAN, STD = 0.7, 0.4
SAMPLERS = ("euler", "heun", "dpm++", "sde")


def objective(**options: Any) -> Objective:
    return create_objective(ObjectiveConfig(**options))


def gaussian(latents: Tensor, timesteps: Tensor, class_labels: Tensor) -> Tensor:
    """The exact velocity of x_t = (1-t)·x₀ + t·ε for data N(MEAN, STD²).

    x_t has mean (1-t)·MEAN and variance (1-t)²STD² + t²; E[ε - x₀ | x_t] is linear in x_t.
    """
    t = (timesteps / 1000)[:, None, None, None].to(latents)
    variance = (1 - t) ** 2 * STD**2 + t**2
    slope = (t - (1 - t) * STD**2) / variance
    return slope * (latents - (1 - t) * MEAN) - MEAN


def sample(noise: Tensor, sampler: str, steps: int, **options: Any) -> Tensor:
    labels = torch.zeros(len(noise), dtype=torch.int64)
    made = objective(**options)
    return sample_latents(gaussian, made, noise, labels, 9, steps, sampler=sampler, seed=5, indices=range(len(noise)))


def order(error: Callable[[int], float], few: int, many: int) -> float:
    return math.log(error(few) / error(many)) / math.log(many / few)


# -- order of convergence --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sampler", "expected"), [("euler", 1), ("heun", 2)])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_order_of_the_flow(sampler: str, expected: int, shift: float) -> None:
    """The flow of a Gaussian takes noise z to MEAN + STD·z, exactly."""
    noise = draw_noise(1, range(2), (1, 4, 4))

    def error(steps: int) -> float:
        found = sample(noise, sampler, steps, sampling_shift=shift)
        return (found - (MEAN + STD * noise)).abs().max().item()

    assert order(error, 40, 160) == pytest.approx(expected, abs=0.15)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_order_of_dpm_solver(shift: float) -> None:
    """2, but for a logarithm: near noise even steps of t are steps of log(t / (1-t)) that do not get shorter."""
    noise = draw_noise(1, range(2), (1, 4, 4))

    def error(steps: int) -> float:
        found = sample(noise, "dpm++", steps, sampling_shift=shift)
        return (found - (MEAN + STD * noise)).abs().max().item() / math.log(steps)

    assert order(error, 160, 640) == pytest.approx(2, abs=0.25)


def moments(steps: int, shift: float) -> tuple[float, float]:
    """Mean and variance of what "sde" draws, exactly: its steps are affine in x and in the noise."""
    scheduler = objective(sampling_shift=shift).make_scheduler("sde", steps)
    mean, variance = 0.0, 1.0
    zero, one = torch.zeros(1, 1, 1, 1, dtype=torch.float64), torch.ones(1, 1, 1, 1, dtype=torch.float64)
    for number, timestep in enumerate(scheduler.timesteps):

        def step(x: Tensor, noise: Tensor, number: int = number, timestep: Tensor = timestep) -> float:
            scheduler._step_index = number
            velocity = gaussian(x, timestep.expand(1), timestep)
            return scheduler.step(velocity, timestep, x, noise)[0].item()

        offset = step(zero, zero)
        of_x, of_noise = step(one, zero) - offset, step(zero, one) - offset
        mean, variance = of_x * mean + offset, of_x**2 * variance + of_noise**2
    return mean, variance


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_weak_order_of_the_stochastic_sampler(shift: float) -> None:
    def error(steps: int) -> float:
        mean, variance = moments(steps, shift)
        return abs(mean - MEAN) + abs(variance - STD**2)

    assert error(400) < 0.01
    assert order(error, 100, 400) == pytest.approx(1, abs=0.2)


def test_steps_of_the_stochastic_sampler_by_hand() -> None:
    """Two steps from x = 2, v = 1: to 2 - ½ - ¼·2 + √½·noise at t = ½, then to x - ½·v without noise."""
    scheduler = EulerMaruyamaScheduler()
    scheduler.set_timesteps(sigmas=[1.0, 0.5])
    one, noise = torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), 3.0)
    (middle,) = scheduler.step(one, scheduler.timesteps[0], 2 * one, noise)
    assert middle.item() == pytest.approx(2 - 0.5 - 0.25 * 2 + math.sqrt(0.5) * 3)
    (end,) = scheduler.step(one, scheduler.timesteps[1], middle, noise)
    assert end.item() == pytest.approx(middle.item() - 0.5)


def test_noise_of_steps_is_that_of_the_image() -> None:
    noise = draw_noise(5, range(3), (1, 2, 2))
    labels = torch.zeros(2, dtype=torch.int64)
    alone = sample_latents(gaussian, objective(), noise[1:], labels, 9, 4, sampler="sde", seed=5, indices=[1, 2])
    assert torch.equal(sample(noise, "sde", 4)[1:], alone)
    assert not torch.equal(draw_step_noise(5, [1], (1, 2, 2), 0), draw_step_noise(5, [1], (1, 2, 2), 1))


# -- times -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_all_samplers_visit_the_same_times(sampler: str, steps: int, shift: float) -> None:
    scheduler = objective(sampling_shift=shift).make_scheduler(sampler, steps)
    uniform = [1 - k / steps for k in range(steps)]
    expected = [shift * t / (1 + (shift - 1) * t) for t in uniform]
    assert sorted(set(scheduler.sigmas.tolist()), reverse=True) == pytest.approx([*expected, 0.0], abs=2e-7)
    assert sorted(set(scheduler.timesteps.tolist()), reverse=True) == pytest.approx([1000 * t for t in expected])


def test_one_step_of_every_sampler_is_the_mean_of_the_data() -> None:
    noise = draw_noise(2, range(2), (1, 2, 2))
    for sampler in SAMPLERS:
        assert sample(noise, sampler, 1).flatten().tolist() == pytest.approx([MEAN] * 8, abs=1e-6)


# -- which shift -----------------------------------------------------------------------------------------------------


def test_shift_of_size() -> None:
    """RAE: 768 channels of 16×16 are shifted by √48 = 6.93; what is no larger than 4×32×32 is not."""
    assert shift_of_size(768 * 16 * 16) == pytest.approx(6.928, abs=1e-3)
    assert shift_of_size(4 * 32 * 32) == shift_of_size(4 * 8 * 8) == 1


@pytest.mark.parametrize(
    ("options", "natural", "training", "sampling"),
    [
        ({}, 1.0, 1, 1),
        ({}, 6.0, 6, 6),
        ({"timestep_shift": 1.0}, 6.0, 1, 1),
        ({"timestep_shift": 3.0}, 6.0, 3, 3),
        ({"sampling_shift": 2.0}, 6.0, 6, 2),
        ({"timestep_shift": 3.0, "sampling_shift": 1.0}, 1.0, 3, 1),
        ({"name": "epsilon"}, 6.0, 1, 1),
        ({"name": "epsilon", "timestep_shift": 3.0}, 6.0, 3, 1),
        ({"name": "flow_map"}, 6.0, 1, 1),
        ({"name": "mean_flow", "sampling_shift": 2.0}, 6.0, 1, 2),
    ],
)
def test_shifts_that_a_config_means(options: dict[str, Any], natural: float, training: float, sampling: float) -> None:
    found = create_objective(ObjectiveConfig(**options), natural)
    assert (found.training_shift, found.sampling_shift) == (training, sampling)


def test_a_call_can_shift_otherwise() -> None:
    own = create_objective(ObjectiveConfig(), 4.0)
    scheduler = default_scheduler(own)
    assert scheduler.config.shift == 4
    times = [ready_scheduler(scheduler, own, None, 2, shift).sigmas[1].item() for shift in (None, 1.0, 3.0)]
    assert times == pytest.approx([0.8, 0.5, 0.75])
    assert own.sampling_shift == 4


def test_shifts_that_are_refused() -> None:
    with pytest.raises(UserError, match=r"a sampling shift of 2 does not go with objective epsilon"):
        objective(name="epsilon", sampling_shift=2.0)
    with pytest.raises(UserError, match=r"a sampling shift of 2 does not go with objective epsilon"):
        objective(name="epsilon").with_sampling_shift(2.0)
    own = objective()
    replaced = default_scheduler(create_objective(ObjectiveConfig(sampling_shift=5.0)))
    assert ready_scheduler(replaced, own, None, 2).sigmas[1].item() == pytest.approx(5 / 6)
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler took the place of the sampler"):
        ready_scheduler(replaced, own, None, 2, 2.0)
