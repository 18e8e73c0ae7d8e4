"""The samplers of epsilon against formulas written out by hand, and Heun's of velocity."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gspn_dit.config import ObjectiveConfig
from gspn_dit.diffusion import Guidance, create_objective, draw_noise, sample_latents
from gspn_dit.diffusion.epsilon import EpsilonObjective
from gspn_dit.diffusion.sampling import draw_step_noise
from gspn_dit.errors import UserError
from gspn_dit.rng import Stream

NULL = 7
ALPHA_BAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), dim=0)
SAMPLERS = ("ddpm", "ddim", "dpm++", "unipc")


def alpha_bar(timestep: float) -> float:
    """ᾱ of a timestep; 1 for the data, which lies below timestep 0."""
    return ALPHA_BAR[int(timestep)].item() if timestep >= 0 else 1.0


def sample(
    model: Callable[..., Tensor],
    start: Tensor,
    steps: int,
    sampler: str,
    labels: Sequence[int] | None = None,
    indices: Sequence[int] | None = None,
    seed: int = 0,
    guidance: Guidance | None = None,
    objective: EpsilonObjective | None = None,
) -> Tensor:
    objective = objective or EpsilonObjective(ObjectiveConfig(name="epsilon"))
    ids = torch.tensor([0] * len(start) if labels is None else labels)
    indices = range(len(start)) if indices is None else indices
    return sample_latents(model, objective, start, ids, NULL, steps, guidance, sampler, seed=seed, indices=indices)


def gaussian(latents: Tensor, timesteps: Tensor, class_labels: Tensor) -> Tensor:
    """The exact epsilon of data of standard deviation 0.5, and variance values that differ from place to place."""
    level = ALPHA_BAR[timesteps.long()].to(latents)[:, None, None, None]
    epsilon = (1 - level).sqrt() * latents / (0.25 * level + 1 - level)
    return torch.cat([epsilon, torch.sin(5 * latents)], dim=1)


def one_image(latents: Tensor, timesteps: Tensor, class_labels: Tensor) -> Tensor:
    """The exact epsilon of data that is one image, IMAGE, with the least variance."""
    level = ALPHA_BAR[timesteps.long()].to(latents)[:, None, None, None]
    epsilon = (latents - level.sqrt() * IMAGE.to(latents)) / (1 - level).sqrt()
    return torch.cat([epsilon, -torch.ones_like(epsilon)], dim=1)


IMAGE = torch.tensor([3.0, -2.0, 0.5, 0.0]).reshape(1, 4, 1, 1)
"""Values far beyond ±1, which a scheduler that clips would change."""


def start(count: int = 2, channels: int = 4) -> Tensor:
    return draw_noise(3, range(count), (channels, 3, 3))


# -- the grid --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("steps", [2, 3, 10, 30, 50, 250, 1000])
def test_timesteps_are_those_of_the_published_respacing(sampler: str, steps: int) -> None:
    """ "250" of 1000 means round(i · 999 / 249) for i = 0 … 249."""
    scheduler = create_objective(ObjectiveConfig(name="epsilon")).make_scheduler(sampler, steps)
    assert scheduler.timesteps.tolist() == [round(i * 999 / (steps - 1)) for i in range(steps)][::-1]


@pytest.mark.parametrize("sampler", ["dpm++", "unipc"])
@pytest.mark.parametrize("steps", [1, 2, 10, 250, 999])
def test_timesteps_of_the_second_order_solvers_leave_zero_out(sampler: str, steps: int) -> None:
    scheduler = create_objective(ObjectiveConfig(name="epsilon")).make_scheduler(sampler, steps)
    assert scheduler.timesteps.tolist() == [round(i * 999 / steps) for i in range(1, steps + 1)][::-1]
    assert scheduler.sigmas[-1] == 0


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_single_step_starts_from_noise(sampler: str) -> None:
    scheduler = create_objective(ObjectiveConfig(name="epsilon")).make_scheduler(sampler, 1)
    assert scheduler.timesteps.tolist() == [999]


# -- steps by hand ---------------------------------------------------------------------------------------------------


def ddpm_by_hand(latents: Tensor, steps: int, seed: int, indices: Sequence[int]) -> Tensor:
    """Ancestral sampling with the posterior of the respaced chain (iDDPM eq. 10, 11, 15)."""
    grid = [round(i * 999 / (steps - 1)) for i in range(steps)]
    x = latents
    for i in reversed(range(steps)):
        now, before = alpha_bar(grid[i]), alpha_bar(grid[i - 1]) if i else 1.0
        beta = 1 - now / before
        epsilon, values = gaussian(x, torch.full((len(x),), grid[i]), torch.zeros(len(x))).chunk(2, dim=1)
        clean = (x - math.sqrt(1 - now) * epsilon) / math.sqrt(now)
        mean = (math.sqrt(before) * beta * clean + math.sqrt(now / before) * (1 - before) * x) / (1 - now)
        drawn = draw_step_noise(seed, indices, x.shape[1:], steps - 1 - i)
        if i == 0:
            return mean
        log_variance = (values + 1) / 2 * math.log(beta)
        log_variance = log_variance + (1 - values) / 2 * math.log(beta * (1 - before) / (1 - now))
        x = mean + torch.exp(log_variance / 2) * drawn
    raise AssertionError


def ddim_by_hand(latents: Tensor, steps: int) -> Tensor:
    """Deterministic DDIM (arXiv 2010.02502, eq. 12) from each timestep of the grid to the next."""
    grid = [round(i * 999 / (steps - 1)) for i in range(steps)]
    x = latents
    for i in reversed(range(steps)):
        now, before = alpha_bar(grid[i]), alpha_bar(grid[i - 1]) if i else 1.0
        epsilon, _ = gaussian(x, torch.full((len(x),), grid[i]), torch.zeros(len(x))).chunk(2, dim=1)
        clean = (x - math.sqrt(1 - now) * epsilon) / math.sqrt(now)
        x = math.sqrt(before) * clean + math.sqrt(1 - before) * epsilon
    return x


@pytest.mark.parametrize("steps", [2, 3, 10, 30, 250])
def test_ddpm_with_a_learned_range_by_hand(steps: int) -> None:
    result = sample(gaussian, start().double(), steps, "ddpm", indices=[5, 9], seed=4)
    torch.testing.assert_close(result, ddpm_by_hand(start().double(), steps, 4, [5, 9]), rtol=0, atol=1e-9)


@pytest.mark.parametrize("steps", [2, 3, 10, 30, 250])
def test_ddim_by_hand(steps: int) -> None:
    result = sample(gaussian, start().double(), steps, "ddim")
    torch.testing.assert_close(result, ddim_by_hand(start().double(), steps), rtol=0, atol=1e-9)


def test_heun_of_velocity_by_hand() -> None:
    """Uniform times 1 … 1/5, each step corrected with the velocity at its end but for the last."""

    def velocity(latents: Tensor, timesteps: Tensor, class_labels: Tensor) -> Tensor:
        return torch.sin(3 * latents) * (timesteps / 1000)[:, None, None, None]

    steps, x = 5, start().double()
    for k in range(steps):
        t, following = 1 - k / steps, 1 - (k + 1) / steps
        slope = torch.sin(3 * x) * t
        guess = x + (following - t) * slope
        if k < steps - 1:
            guess = x + (following - t) * (slope + torch.sin(3 * guess) * following) / 2
        x = guess
    objective, labels = create_objective(ObjectiveConfig()), torch.zeros(2, dtype=torch.int64)
    result = sample_latents(velocity, objective, start(), labels, NULL, steps, sampler="heun")
    torch.testing.assert_close(result.double(), x, rtol=0, atol=1e-5)


# -- what all samplers have in common --------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_a_known_image_comes_out_whatever_its_range(sampler: str, steps: int) -> None:
    result = sample(one_image, start(), steps, sampler)
    torch.testing.assert_close(result, IMAGE.expand_as(result), rtol=0, atol=2e-3)


@pytest.mark.parametrize(("sampler", "steps"), [("ddpm", 250), ("ddim", 250), ("dpm++", 999), ("unipc", 999)])
def test_many_steps_stay_finite_in_float32(sampler: str, steps: int) -> None:
    result = sample(gaussian, start(), steps, sampler)
    assert result.dtype == torch.float32
    assert bool(result.isfinite().all())


@pytest.mark.parametrize(("sampler", "least", "most"), [("ddim", 0.05, 0.2), ("dpm++", 0, 0.01), ("unipc", 0, 0.01)])
def test_the_higher_order_solvers_come_closer_in_fifty_steps(sampler: str, least: float, most: float) -> None:
    """The flow of Gaussian data keeps x / deviation; what starts at ε ends at ε · 0.5 / deviation(999)."""
    exact = start() * 0.5 / math.sqrt(0.25 * alpha_bar(999) + 1 - alpha_bar(999))
    error = (sample(gaussian, start(), 50, sampler) - exact).abs().max().item()
    assert least <= error <= most


def test_ddpm_keeps_the_deviation_of_the_data() -> None:
    def least_variance(latents: Tensor, timesteps: Tensor, class_labels: Tensor) -> Tensor:
        epsilon = gaussian(latents, timesteps, class_labels).chunk(2, dim=1)[0]
        return torch.cat([epsilon, torch.full_like(epsilon, 0.0)], dim=1)

    noise = draw_noise(0, range(64), (4, 8, 8))
    assert sample(least_variance, noise, 250, "ddpm").std().item() == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize("sampler", ["ddim", "dpm++", "unipc"])
@pytest.mark.parametrize("channels", [1, 3, 4, 5])
def test_the_variance_reaches_no_deterministic_sampler(sampler: str, channels: int) -> None:
    def with_nan(*arguments: Tensor) -> Tensor:
        epsilon, _ = gaussian(*arguments).chunk(2, dim=1)
        return torch.cat([epsilon, torch.full_like(epsilon, math.nan)], dim=1)

    noise = start(channels=channels)
    result = sample(with_nan, noise, 4, sampler, guidance=Guidance(3.0))
    assert result.shape == noise.shape
    assert torch.equal(result, sample(gaussian, noise, 4, sampler, guidance=Guidance(3.0)))


# -- noise of the steps ----------------------------------------------------------------------------------------------


def test_an_image_depends_on_seed_and_index_alone() -> None:
    """Alone, in another order or in another batch: bit by bit the same."""
    noise = start(6)
    together = sample(gaussian, noise, 5, "ddpm", seed=1, indices=range(10, 16))
    for rows in ([3], [5, 0], [2, 1, 4]):
        some = sample(gaussian, noise[rows], 5, "ddpm", seed=1, indices=[10 + row for row in rows])
        assert torch.equal(some, together[rows])
    other = sample(gaussian, noise, 5, "ddpm", seed=2, indices=range(10, 16))
    shifted = sample(gaussian, noise, 5, "ddpm", seed=1, indices=range(11, 17))
    assert not any(torch.equal(a, b) for a, b in zip(together, other))
    assert not any(torch.equal(a, b) for a, b in zip(together, shifted))


def test_every_step_and_image_draws_noise_of_its_own() -> None:
    noise = torch.cat([draw_step_noise(0, range(4), (4096,), step) for step in range(3)])
    torch.testing.assert_close(noise @ noise.T / 4096, torch.eye(12), rtol=0, atol=0.1)


def test_a_step_draws_from_the_projects_own_stream() -> None:
    """Philox with the key (seed, stream) and the counter (0, 0, step, image), whose words have 64 bits each."""
    seed, image, step = 2**40 + 5, 2**33 + 7, 11
    philox = np.random.Philox(key=[seed, Stream.SAMPLE_STEP], counter=[0, 0, step, image])
    expected = np.random.Generator(philox).standard_normal(6, dtype=np.float32)
    assert draw_step_noise(seed, [image], (6,), step).tolist() == [expected.tolist()]


def test_one_step_adds_no_noise() -> None:
    """From timestep 999 straight to the data: what the model takes for the image, whatever the variance values."""

    def widest(latents: Tensor, timesteps: Tensor, class_labels: Tensor) -> Tensor:
        epsilon = one_image(latents, timesteps, class_labels).chunk(2, dim=1)[0]
        return torch.cat([epsilon, torch.ones_like(epsilon)], dim=1)

    result = sample(widest, start().double(), 1, "ddpm")
    torch.testing.assert_close(result, IMAGE.double().expand_as(result), rtol=0, atol=1e-6)
    torch.testing.assert_close(result, sample(widest, start().double(), 1, "ddim"), rtol=0, atol=1e-6)


def test_sampling_leaves_the_generator_of_torch_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    sample(gaussian, start(), 3, "ddpm")
    assert torch.equal(torch.get_rng_state(), before)


def test_noise_without_seed_or_indices_is_refused() -> None:
    objective, labels = create_objective(ObjectiveConfig(name="epsilon")), torch.zeros(2, dtype=torch.int64)
    for options in ({}, {"seed": 1}, {"indices": [0, 1]}):
        with pytest.raises(ValueError, match="sampler 'ddpm' draws noise at every step; give seed and indices"):
            sample_latents(gaussian, objective, start(), labels, NULL, 2, **options)
    assert sample_latents(gaussian, objective, start(), labels, NULL, 2, sampler="ddim").shape == start().shape


# -- guidance --------------------------------------------------------------------------------------------------------


class Recording(EpsilonObjective):
    """Remembers what its scheduler is given."""

    def __init__(self) -> None:
        super().__init__(ObjectiveConfig(name="epsilon"))
        self.inputs: list[Tensor] = []

    def make_scheduler(self, sampler: str, num_inference_steps: int) -> Any:
        scheduler = super().make_scheduler(sampler, num_inference_steps)
        step = scheduler.step

        def recorded(prediction: Tensor, *arguments: Any, **options: Any) -> Any:
            self.inputs.append(prediction)
            return step(prediction, *arguments, **options)

        scheduler.step = recorded
        return scheduler


def by_label(latents: Tensor, timesteps: Tensor, class_labels: Tensor) -> Tensor:
    """Epsilon is the label; the variance values are a tenth of it."""
    label = class_labels.to(latents)[:, None, None, None].expand_as(latents)
    return torch.cat([label, label / 10], dim=1)


@pytest.mark.parametrize(("channels", "guided"), [(None, 4), (3, 3), (1, 1), (4, 4)])
def test_guidance_moves_epsilon_and_never_the_variance(channels: int | None, guided: int) -> None:
    """Classes 2 and 5 with scale 4: 7 + 4·(2 - 7) = -13 and 7 + 4·(5 - 7) = -1; variances stay 0.2 and 0.5."""
    objective = Recording()
    sample(by_label, start(), 2, "ddpm", [2, 5], guidance=Guidance(4.0, channels=channels), objective=objective)
    for given in objective.inputs:
        for row, (label, moved) in enumerate(((2.0, -13.0), (5.0, -1.0))):
            values = given[row].flatten(1)
            expected = [moved] * guided + [label] * (4 - guided) + [label / 10] * 4
            torch.testing.assert_close(values, torch.tensor(expected)[:, None].expand(8, 9))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_guidance_acts_at_timesteps_of_its_interval(sampler: str) -> None:
    """t is timestep / 1000."""
    asked: list[tuple[float, bool]] = []

    def model(latents: Tensor, timesteps: Tensor, class_labels: Tensor) -> Tensor:
        asked.append((timesteps[0].item(), NULL in class_labels.tolist()))
        return by_label(latents, timesteps, class_labels)

    sample(model, start(), 30, sampler, guidance=Guidance(2.0, (0.3, 0.7)))
    assert [guided for _, guided in asked] == [300 <= timestep <= 700 for timestep, _ in asked]
    assert 10 <= sum(guided for _, guided in asked) <= 14


def test_guidance_of_more_channels_than_there_are() -> None:
    with pytest.raises(ValueError, match="guidance of 3 channels, but the latent has 1"):
        sample(gaussian, start(channels=1), 2, "ddim", guidance=Guidance(2.0, channels=3))


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sampler", "steps", "message"),
    [
        ("epsilon", "euler", 5, "unknown sampler 'euler'; allowed are ddpm, ddim, dpm++, unipc"),
        ("velocity", "ddpm", 5, "unknown sampler 'ddpm'; allowed are euler, heun, dpm++, sde"),
        ("epsilon", "ddpm", 1001, "sampler 'ddpm' takes at most 1000 steps, not 1001"),
        ("epsilon", "unipc", 1000, "sampler 'unipc' takes at most 999 steps, not 1000"),
    ],
)
def test_samplers_that_cannot_be(name: Any, sampler: str, steps: int, message: str) -> None:
    objective, labels = create_objective(ObjectiveConfig(name=name)), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(UserError) as caught:
        sample_latents(gaussian, objective, start(), labels, NULL, steps, sampler=sampler, seed=0, indices=[0, 1])
    assert str(caught.value) == message


def test_defaults() -> None:
    epsilon, velocity = (create_objective(ObjectiveConfig(name=name)) for name in ("epsilon", "velocity"))
    assert epsilon.resolve_sampler(None, 1000) == "ddpm"
    assert velocity.resolve_sampler(None, 5000) == "euler"
