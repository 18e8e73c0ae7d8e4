"""The velocity objective by hand: the path, its target, the times, and the grids of its schedulers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from gspn_dit.config import ObjectiveConfig
from gspn_dit.diffusion import SAMPLERS, Guidance, create_objective, sample_latents
from gspn_dit.diffusion.velocity import VelocityObjective


class Recorder:
    """A model that answers with a fixed tensor and remembers what it was asked."""

    def __init__(self, answer: Tensor) -> None:
        self.answer = answer
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, *arguments: Any) -> Tensor:
        self.calls.append(arguments)
        return self.answer


def objective(**options: Any) -> VelocityObjective:
    return VelocityObjective(ObjectiveConfig(**options))


def image(*values: float) -> Tensor:
    """Images of one channel and 1×2 pixels."""
    return torch.tensor(values, dtype=torch.float32).reshape(-1, 1, 1, 2)


# -- loss ------------------------------------------------------------------------------------------------------------


def test_noisy_latents_and_loss_by_hand() -> None:
    """t = 0.25 and 1: x_t = 0.75·x₀ + 0.25·ε and ε; the target is ε - x₀."""
    latents, noise = image(4, 8, 1, 2), image(0, -4, 5, 6)
    model = Recorder(image(0, 0, 4, 7))
    loss = objective().loss(model, latents, noise, torch.tensor([250.0, 1000.0]))
    ((noisy, timesteps),) = model.calls
    assert noisy.flatten().tolist() == [3, 5, 5, 6]
    assert timesteps.tolist() == [250, 1000]
    # Targets -4, -12 and 4, 4: squared errors 16, 144 and 0, 9, averaged over each image.
    assert loss.tolist() == [80, 4.5]


def test_the_true_velocity_has_no_loss() -> None:
    latents, noise = torch.randn(2, 4, 3, 8, 8)
    loss = objective().loss(Recorder(noise - latents), latents, noise, 1000 * torch.rand(4))
    assert loss.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(("time", "which"), [(0.0, "latents"), (1000.0, "noise")])
def test_ends_of_the_path(time: float, which: str) -> None:
    tensors = {"latents": torch.randn(1, 1, 2, 2), "noise": torch.randn(1, 1, 2, 2)}
    model = Recorder(torch.zeros(1, 1, 2, 2))
    objective().loss(model, **tensors, timesteps=torch.tensor([time]))
    assert torch.equal(model.calls[0][0], tensors[which])


def test_loss_of_a_bfloat16_model_is_float32() -> None:
    model = Recorder(image(1, 3).bfloat16())
    loss = objective().loss(model, image(0, 0), image(1, 1), torch.tensor([500.0]).double())
    assert (loss.dtype, loss.tolist()) == (torch.float32, [2.0])
    assert model.calls[0][0].dtype == model.calls[0][1].dtype == torch.float32


def test_gradient_reaches_the_model_and_is_that_of_the_mean_square() -> None:
    answer = image(1, 3).requires_grad_()
    objective().loss(Recorder(answer), image(0, 0), image(1, 1), torch.tensor([500.0])).backward()
    assert answer.grad is not None
    assert answer.grad.flatten().tolist() == [0, 2]


# -- predicted data --------------------------------------------------------------------------------------------------


def test_loss_of_predicted_data_is_the_velocity_s() -> None:
    """t = 0.5: errors of 1 and 3 in x₀ are 2 and 6 in v. t = 0.01 counts as 0.05: errors of 0.1 are 2."""
    latents, noise = image(4, 8, 1, 2), image(0, -4, 5, 6)
    model = Recorder(image(5, 5, 1.1, 2.1))
    data = objective(prediction="data")
    loss = data.loss(model, latents, noise, torch.tensor([500.0, 10.0]))
    assert loss.tolist() == pytest.approx([20, 4], rel=1e-5)
    times = 50 + 950 * torch.rand(2)
    velocity = data.sampled(model)(
        *((1 - t) * latents + t * noise for t in [times[:, None, None, None] / 1000]), times, None
    )
    same = objective().loss(Recorder(velocity), latents, noise, times)
    torch.testing.assert_close(data.loss(model, latents, noise, times), same, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sampler", ["euler", "heun"])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_samples_of_predicted_data_end_at_the_last_prediction(sampler: str, scale: float) -> None:
    """A model that always says 3 with a class and 1 without draws 1 + scale · 2, from any noise, in any steps."""

    def model(latents: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        return torch.where(labels == 9, 1.0, 3.0)[:, None, None, None].expand_as(latents)

    drawn = sample_latents(
        model,
        objective(prediction="data"),
        torch.randn(2, 1, 2, 2),
        torch.tensor([0, 1]),
        9,
        7,
        Guidance(scale),
        sampler,
    )
    torch.testing.assert_close(drawn, torch.full((2, 1, 2, 2), 1 + 2 * scale), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["epsilon", "flow_map", "mean_flow"])
def test_other_objectives_predict_no_data(name: str) -> None:
    with pytest.raises(ValueError, match=f"prediction data is for objective.name velocity, not {name}"):
        ObjectiveConfig(name, prediction="data")


# -- times -----------------------------------------------------------------------------------------------------------

UNIFORMS = torch.tensor([0.0, 0.25, 0.5, 0.9], dtype=torch.float64)


def test_uniform_times() -> None:
    assert objective().timesteps(UNIFORMS).tolist() == pytest.approx([0, 250, 500, 900])


def test_shifted_times_by_hand() -> None:
    """s = 3: 3t / (1 + 2t)."""
    shifted = objective(timestep_shift=3.0).timesteps(UNIFORMS)
    assert shifted.tolist() == pytest.approx([0, 500, 750, 2700 / 2.8])
    undone = objective(timestep_shift=1 / 3).timesteps(shifted / 1000)
    assert undone.tolist() == pytest.approx((1000 * UNIFORMS).tolist())


def test_logit_normal_times_by_hand() -> None:
    """sigmoid(mean + std·z) at the quantiles z = -1.2816, 0 and 1.2816 of 0.1, 0.5 and 0.9."""
    z = 1.2815515655446004
    expected = [1000 / (1 + math.exp(-(0.3 + 1.7 * value))) for value in (-z, 0, z)]
    options = objective(timestep_sampling="logit_normal", logit_normal_mean=0.3, logit_normal_std=1.7)
    assert options.timesteps(torch.tensor([0.1, 0.5, 0.9]).double()).tolist() == pytest.approx(expected)


def test_logit_normal_is_shifted_after_it_is_drawn() -> None:
    both = objective(timestep_sampling="logit_normal", timestep_shift=3.0).timesteps(torch.tensor([0.5]).double())
    assert both.tolist() == pytest.approx([750])


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal"])
@pytest.mark.parametrize("shift", [0.2, 1.0, 6.0])
def test_times_stay_in_range_and_order(sampling: Any, shift: float) -> None:
    uniforms = torch.cat([torch.linspace(0, 1, 1001)[:-1].double(), torch.tensor([1 - 2**-53], dtype=torch.float64)])
    times = objective(timestep_sampling=sampling, timestep_shift=shift).timesteps(uniforms)
    assert bool(times.isfinite().all())
    assert times.min() >= 0 and times.max() <= 1000
    assert bool((times.diff() >= 0).all())


# -- schedulers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 50, 250])
def test_euler_grid_is_uniform_and_ends_at_zero(steps: int) -> None:
    scheduler = objective().make_scheduler("euler", steps)
    expected = [1 - k / steps for k in range(steps)]
    assert scheduler.sigmas.tolist() == pytest.approx([*expected, 0.0], abs=1e-7)
    assert scheduler.timesteps.tolist() == pytest.approx([1000 * sigma for sigma in expected], rel=1e-6)
    assert scheduler.sigmas[-1] == 0


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 50])
def test_heun_grid_is_the_same(steps: int) -> None:
    scheduler = objective().make_scheduler("heun", steps)
    expected = [1 - k / steps for k in range(steps)]
    repeated = [expected[0], *(sigma for sigma in expected[1:] for _ in range(2))]
    assert scheduler.sigmas.tolist() == pytest.approx([*repeated, 0.0], abs=1e-7)
    assert scheduler.timesteps.tolist() == pytest.approx([1000 * sigma for sigma in repeated], rel=1e-6)


def test_heun_calls_the_model_twice_per_step_but_for_the_last() -> None:
    scheduler = objective().make_scheduler("heun", 5)
    assert len(scheduler.timesteps) == 2 * 5 - 1
    assert (scheduler.sigmas[0], scheduler.sigmas[-1]) == (1, 0)


# -- interface -------------------------------------------------------------------------------------------------------


def test_predicts_as_many_channels_as_the_latent_has() -> None:
    assert objective().out_channels(4) == 4


def test_nothing_is_kept_from_guidance() -> None:
    output = torch.randn(1, 4, 2, 2)
    prediction, rest = objective().split_output(output)
    assert prediction is output
    assert rest is None


def test_create_objective_by_name() -> None:
    config = ObjectiveConfig(timestep_shift=2.0)
    created = create_objective(config)
    assert isinstance(created, VelocityObjective)
    assert created.config is config
    assert set(created.samplers) <= set(SAMPLERS)
