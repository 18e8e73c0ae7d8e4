"""The epsilon objective against the papers' formulas, written out anew in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from gspn_dit.config import ObjectiveConfig
from gspn_dit.diffusion import create_objective
from gspn_dit.diffusion.epsilon import EpsilonObjective, discretised_log_likelihood, linear_schedule

BETA = [1e-4 + (0.02 - 1e-4) * t / 999 for t in range(1000)]
ALPHA_BAR = [math.prod(1 - beta for beta in BETA[: t + 1]) for t in range(1000)]


def objective(**options: Any) -> EpsilonObjective:
    created = create_objective(ObjectiveConfig(name="epsilon", **options))
    assert isinstance(created, EpsilonObjective)
    return created


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Answer:
    """A model that answers with a fixed tensor and remembers what it was asked."""

    def __init__(self, answer: Tensor) -> None:
        self.answer = answer
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, *arguments: Any) -> Tensor:
        self.calls.append(arguments)
        return self.answer


# -- the bound, term by term -----------------------------------------------------------------------------------------


def posterior(t: int, latents: Tensor, noisy: Tensor) -> Normal:
    """q(x_{t-1} | x_t, x₀), iDDPM eq. 10 to 12."""
    before = ALPHA_BAR[t - 1]
    mean = math.sqrt(before) * BETA[t] / (1 - ALPHA_BAR[t]) * latents
    mean = mean + math.sqrt(1 - BETA[t]) * (1 - before) / (1 - ALPHA_BAR[t]) * noisy
    return Normal(mean, math.sqrt(BETA[t] * (1 - before) / (1 - ALPHA_BAR[t])))


def predicted(t: int, noisy: Tensor, epsilon: Tensor, variance_values: Tensor) -> Normal:
    """p(x_{t-1} | x_t), iDDPM eq. 13 and 15; the least variance of t = 0 is that of t = 1."""
    mean = (noisy - BETA[t] / math.sqrt(1 - ALPHA_BAR[t]) * epsilon) / math.sqrt(1 - BETA[t])
    s = max(t, 1)
    least = BETA[s] * (1 - ALPHA_BAR[s - 1]) / (1 - ALPHA_BAR[s])
    share = (variance_values + 1) / 2
    variance = torch.exp(share * math.log(BETA[t]) + (1 - share) * math.log(least))
    return Normal(mean, variance.sqrt())


def direct_bound(t: int, latents: Tensor, noise: Tensor, epsilon: Tensor, variance_values: Tensor) -> Tensor:
    """One image's term of L_vlb in bits per dimension, from the distributions themselves."""
    noisy = math.sqrt(ALPHA_BAR[t]) * latents + math.sqrt(1 - ALPHA_BAR[t]) * noise
    model = predicted(t, noisy, epsilon, variance_values)
    if t > 0:
        return kl_divergence(posterior(t, latents, noisy), model).mean() / math.log(2)
    upper = torch.where(latents == 1, 1.0, model.cdf(latents + 1 / 255))
    lower = torch.where(latents == -1, 0.0, model.cdf(latents - 1 / 255))
    return -(upper - lower).log().mean() / math.log(2)


def pixels(count: int, seed: int = 3) -> Tensor:
    """Images of 8-bit pixels scaled to [-1, 1], black and white among them."""
    values = torch.randint(0, 256, (count, 2, 3, 4), generator=torch.Generator().manual_seed(seed))
    values[:, 0, 0, :2] = torch.tensor([0, 255])
    return values.double() / 127.5 - 1


@pytest.mark.parametrize("t", [0, 1, 2, 57, 500, 998, 999])
@pytest.mark.parametrize("spread", [0.0, 0.1, 1.0])
def test_bound_equals_the_divergences(t: int, spread: float) -> None:
    latents, noise = pixels(3), drawn(3, 2, 3, 4)
    epsilon = noise + spread * drawn(3, 2, 3, 4, seed=1)
    variance_values = drawn(3, 2, 3, 4, seed=2)
    bound = objective().variational_bound(latents, noise, torch.full((3,), t), epsilon, variance_values)
    expected = [direct_bound(t, *parts) for parts in zip(latents, noise, epsilon, variance_values)]
    torch.testing.assert_close(bound, torch.stack(expected), rtol=1e-6, atol=1e-12)


def test_bound_in_float32_is_that_of_float64() -> None:
    latents, noise, error, variance_values = pixels(8), drawn(8, 2, 3, 4), drawn(8, 2, 3, 4, seed=1), drawn(8, 2, 3, 4)
    t = torch.tensor([0, 1, 2, 10, 100, 500, 900, 999])
    exact = objective().variational_bound(latents, noise, t, noise + 0.1 * error, variance_values)
    parts = (part.float() for part in (noise, noise + 0.1 * error, variance_values))
    noise32, epsilon32, values32 = parts
    rounded = objective().variational_bound(latents.float(), noise32, t, epsilon32, values32)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded.double(), exact, rtol=1e-4, atol=1e-6)


def test_nothing_is_lost_where_epsilon_and_variance_are_the_posteriors() -> None:
    noise, t = drawn(3, 1, 2, 2), torch.tensor([1, 500, 999])
    bound = objective().variational_bound(drawn(3, 1, 2, 2, seed=1), noise, t, noise, -torch.ones_like(noise))
    assert bound.abs().max() < 1e-12


def test_the_probabilities_of_all_pixels_add_up_to_one() -> None:
    values = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    for mean, deviation in ((0.1, 0.01), (-0.9, 0.3), (1.4, 0.5), (0.0, 3.0)):
        total = discretised_log_likelihood(values, values - mean, torch.tensor(deviation).double()).exp().sum()
        assert total.item() == pytest.approx(1, abs=1e-9)


def test_likelihood_far_from_the_mean_is_finite_with_a_gradient() -> None:
    deviation = torch.tensor([0.005, 0.005, 0.005], requires_grad=True)
    value = discretised_log_likelihood(torch.tensor([0.5, -1.0, 1.0]), torch.tensor([0.9, -0.9, 0.9]), deviation)
    value.sum().backward()
    assert bool(value.isfinite().all()) and value.max() < -1000
    assert deviation.grad is not None and bool((deviation.grad > 1e5).all())


def test_an_extreme_variance_has_a_finite_gradient_where_only_the_divergence_counts() -> None:
    values = torch.full((2, 1, 1, 2), -100.0, requires_grad=True)
    noise = torch.zeros(2, 1, 1, 2)
    bound = objective().variational_bound(noise, noise, torch.tensor([500, 999]), noise, values)
    bound.sum().backward()
    assert bool(bound.isfinite().all())
    assert values.grad is not None and bool(values.grad.isfinite().all())


# -- the loss --------------------------------------------------------------------------------------------------------


def test_noisy_latents_and_timesteps_reach_the_model() -> None:
    model = Answer(torch.zeros(2, 2, 1, 2, dtype=torch.float64))
    latents, noise = pixels(2)[:, :1, :1, :2], drawn(2, 1, 1, 2)
    objective().loss(model, latents, noise, torch.tensor([250.0, 999.0]).double())
    ((noisy, timesteps),) = model.calls
    for row, t in enumerate((250, 999)):
        expected = math.sqrt(ALPHA_BAR[t]) * latents[row] + math.sqrt(1 - ALPHA_BAR[t]) * noise[row]
        torch.testing.assert_close(noisy[row], expected, rtol=1e-12, atol=0)
    assert (timesteps.tolist(), timesteps.dtype) == ([250, 999], torch.float64)


@pytest.mark.parametrize("t", [0, 1, 700])
def test_hybrid_loss_is_mean_square_plus_bound(t: int) -> None:
    latents, noise, answer = pixels(1), drawn(1, 2, 3, 4), drawn(1, 4, 3, 4, seed=5)
    loss = objective().loss(Answer(answer), latents, noise, torch.tensor([float(t)]))
    epsilon, variance_values = answer[:, :2], answer[:, 2:]
    expected = (epsilon - noise).square().mean() + direct_bound(t, latents, noise, epsilon, variance_values)
    assert loss.shape == (1,)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("t", [0, 1, 700])
def test_the_bound_teaches_the_variance_alone(t: int) -> None:
    """Epsilon's gradient is that of the mean square; the variance's is that of the bound."""
    latents, noise, answer = pixels(1), drawn(1, 2, 3, 4), drawn(1, 4, 3, 4, seed=5).requires_grad_()
    objective().loss(Answer(answer), latents, noise, torch.tensor([float(t)])).backward()
    gradient = answer.grad
    assert gradient is not None
    torch.testing.assert_close(gradient[:, :2], 2 * (answer.detach()[:, :2] - noise) / noise.numel())
    variance_values = answer.detach()[:, 2:].requires_grad_()
    direct_bound(t, latents, noise, answer.detach()[:, :2], variance_values).backward()
    torch.testing.assert_close(gradient[:, 2:], variance_values.grad, rtol=1e-5, atol=1e-9)


def test_loss_of_a_half_precision_answer_is_float32() -> None:
    latents, noise = pixels(1).float(), drawn(1, 2, 3, 4).float()
    answer = torch.cat([noise, -torch.ones_like(noise)], dim=1)
    loss = objective().loss(Answer(answer.bfloat16()), latents, noise, torch.tensor([500.0]))
    assert loss.dtype == torch.float32
    assert 0 < loss.item() < 1e-4  # what rounding epsilon to bfloat16 costs


# -- timesteps -------------------------------------------------------------------------------------------------------


def test_uniform_draws_hit_every_timestep_alike() -> None:
    uniforms = (torch.arange(3000).double() + 0.5) / 3000
    timesteps = objective().timesteps(uniforms)
    assert torch.equal(timesteps, timesteps.round())
    assert timesteps.long().bincount().tolist() == [3] * 1000


def test_shifted_and_logit_normal_timesteps_by_hand() -> None:
    """s = 3: 3t / (1 + 2t); logit-normal: sigmoid(mean + std·z) at the quantile z = 1.2816 of 0.9."""
    uniforms = torch.tensor([0.0, 0.25, 0.5, 0.9]).double()
    assert objective(timestep_shift=3.0).timesteps(uniforms).tolist() == [0, 500, 750, math.floor(2700 / 2.8)]
    options: dict[str, Any] = {"logit_normal_mean": 0.3, "logit_normal_std": 1.7}
    normal = objective(timestep_sampling="logit_normal", **options).timesteps(torch.tensor([0.1, 0.9]).double())
    z = 1.2815515655446004
    assert normal.tolist() == [math.floor(1000 / (1 + math.exp(-(0.3 + 1.7 * value)))) for value in (-z, z)]


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal"])
@pytest.mark.parametrize("shift", [0.2, 1.0, 6.0])
def test_timesteps_stay_in_range(sampling: Any, shift: float) -> None:
    uniforms = torch.tensor([0.0, 2**-53, 0.5, 1 - 2**-53], dtype=torch.float64)
    timesteps = objective(timestep_sampling=sampling, timestep_shift=shift, logit_normal_std=4.0).timesteps(uniforms)
    assert timesteps.min() >= 0 and timesteps.max() <= 999


# -- interface -------------------------------------------------------------------------------------------------------


def test_schedule_is_the_published_one() -> None:
    torch.testing.assert_close(
        linear_schedule().alpha_bar, torch.tensor(ALPHA_BAR, dtype=torch.float64), rtol=1e-11, atol=0
    )
    assert linear_schedule().alpha_bar[-1].item() == pytest.approx(4.0358e-5, rel=1e-4)


def test_predicts_the_noise_and_a_variance_for_each_channel() -> None:
    assert objective().out_channels(4) == 8
    output = drawn(1, 8, 2, 2)
    epsilon, variance_values = objective().split_output(output)
    assert variance_values is not None
    assert torch.equal(torch.cat([epsilon, variance_values], dim=1), output)
    assert epsilon.shape == (1, 4, 2, 2)
