"""Flow maps and mean flows by hand, where data are Gaussian and the flow map is known: it is affine in x."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from gspn_dit.config import ObjectiveConfig
from gspn_dit.diffusion import Conditioned, create_objective, mean_flow, sample_latents
from gspn_dit.diffusion.few_step import FewStepObjective, mean_velocity
from gspn_dit.diffusion.flow_map import FlowMapObjective, map_drift
from gspn_dit.diffusion.guidance import Guidance
from gspn_dit.diffusion.mean_flow import MeanFlowObjective, central_difference, exact_derivative
from gspn_dit.diffusion.schedulers import default_scheduler, ready_scheduler
from gspn_dit.errors import UserError
from gspn_dit.models import DiffusionModel, create_model

FLOW_MAP, MEAN_FLOW = "flow_map", "mean_flow"
BOTH = pytest.mark.parametrize("name", [FLOW_MAP, MEAN_FLOW])
NULL = 3


def objective(name: str, **options: Any) -> FewStepObjective:
    created = create_objective(ObjectiveConfig(name=name, **options))
    assert isinstance(created, FewStepObjective)
    return created


# -- a Gaussian: x₀ ~ N(mean, deviation²), so x_t ~ N((1 - t)·mean, a(t)²) ---------------------------------------------


@dataclass(frozen=True)
class Gaussian:
    """Data of one dimension; the flow keeps the number of deviations from the mean."""

    mean: float
    deviation: float

    def spread(self, t: Any) -> Any:
        """a(t)"""
        return (((1 - t) * self.deviation) ** 2 + t**2) ** 0.5

    def flow_map(self, x: Any, t: Any, s: Any) -> Any:
        return (1 - s) * self.mean + self.spread(s) / self.spread(t) * (x - (1 - t) * self.mean)

    def velocity(self, x: Any, t: Any) -> Any:
        """dx/dt = -mean + a'/a·(x - (1 - t)·mean)"""
        slope = (t - (1 - t) * self.deviation**2) / self.spread(t)
        return -self.mean + slope / self.spread(t) * (x - (1 - t) * self.mean)

    def mean_velocity(self, x: Any, t: Any, s: Any) -> Any:
        return self.velocity(x, t) if t == s else (self.flow_map(x, t, s) - x) / (s - t)

    def endpoints(self, x: float, t: float) -> list[tuple[float, float]]:
        """Two equally likely (x₀, ε) whose mean and variance are those of all that lead to x_t = x."""
        covariance = (1 - t) * self.deviation**2
        centre = self.mean + covariance / self.spread(t) ** 2 * (x - (1 - t) * self.mean)
        width = (self.deviation**2 - covariance**2 / self.spread(t) ** 2) ** 0.5
        return [(x0, (x - (1 - t) * x0) / t) for x0 in (centre - width, centre + width)]


CLASSES = {0: Gaussian(2.0, 0.5), NULL: Gaussian(0.5, 1.5)}
"""One class among others, and what is drawn without one."""


def exact_model(
    latents: Tensor, timesteps: Tensor, labels: Tensor, keep_mask: Tensor | None = None, spans: Tensor | None = None
) -> Tensor:
    """The mean velocity of the flow of each row's class, in closed form."""
    t = timesteps[:, None, None, None] / 1000
    span = torch.zeros_like(t) if spans is None else spans[:, None, None, None] / 1000
    predicted = torch.zeros_like(latents)
    for label, flow in CLASSES.items():
        over_span = (flow.flow_map(latents, t, t - span) - latents) / -torch.where(span == 0, 1.0, span)
        mean = torch.where(span == 0, flow.velocity(latents, t), over_span)
        predicted = torch.where((labels == label)[:, None, None, None], mean, predicted)
    return predicted


def image(*values: float) -> Tensor:
    """Images of one channel and one pixel."""
    return torch.tensor(values, dtype=torch.float64).reshape(-1, 1, 1, 1)


def conditioned(*labels: int) -> Conditioned:
    return Conditioned(exact_model, torch.tensor(labels), NULL)


def losses(name: str, x0: float, noise: float, times: list[float], label: int, **options: Any) -> tuple[float, float]:
    timesteps = 1000 * torch.tensor([times], dtype=torch.float64)
    found = objective(name, **options).training_loss(conditioned(label), image(x0), image(noise), timesteps)
    return found["loss"].item(), found["error"].item()


@pytest.mark.parametrize("label", [0, NULL])
@pytest.mark.parametrize("t", [0.3, 0.7, 0.9])
def test_loss_of_the_velocity_by_hand(label: int, t: float) -> None:
    """g = v for a sample without a class, else m·(v + (w - 1)·d·(v - F_∅)) + (1 - m)·F_c with w = 3, m = ¼."""
    x0, noise = 1.3, -0.4
    x, v = (1 - t) * x0 + t * noise, noise - x0
    own, without = (CLASSES[of].velocity(x, t) for of in (label, NULL))
    a = (1 - t) / 0.2
    strength = 1.0 if t <= 0.8 else 1 - math.exp(-0.025 * a / (1 - a))
    g = v if label == NULL else 0.25 * (v + 2 * strength * (v - without)) + 0.75 * own
    delta = (own - g) ** 2
    assert losses(FLOW_MAP, x0, noise, [t, t, t], label) == pytest.approx((delta / (delta + 0.01), delta), rel=1e-9)


def test_loss_of_a_step_by_hand() -> None:
    """-F·D / (D² + 0.01), D the drift of the flow map's end over the step from t to l, without guidance."""
    x0, noise, t, s, middle = 1.3, -0.4, 0.8, 0.3, 0.75
    x, v, flow = (1 - t) * x0 + t * noise, noise - x0, CLASSES[0]
    g = 0.25 * v + 0.75 * flow.velocity(x, t)
    drift = (flow.flow_map(x, t, s) - flow.flow_map(x + g * (middle - t), middle, s)) / (t - middle)
    expected = -flow.mean_velocity(x, t, s) * drift / (drift**2 + 0.01)
    found = losses(FLOW_MAP, x0, noise, [t, s, middle], 0, guidance_scale=1.0)
    assert abs(drift) > 0.1  # v is that of one pair, not of all that lead through x
    assert found == pytest.approx((expected, drift**2), rel=1e-9)


def test_a_step_is_unbiased_and_vanishes_for_the_flow_map() -> None:
    """Over all (x₀, ε) that lead through x_t, D has the mean that the flow's own velocity gives: 0 as l nears t."""
    x, t, s, flow = 0.9, 0.7, 0.2, CLASSES[0]
    predicted, ends = image(flow.mean_velocity(x, t, s)), flow.endpoints(x, t)
    for distance in (0.05, 1e-3, 1e-5):
        times = [image(time) for time in (t, s, t - distance)]
        one, other, expected = (
            map_drift(conditioned(0), image(x), image(velocity), *times, predicted).item()
            for velocity in (*(noise - x0 for x0, noise in ends), flow.velocity(x, t))
        )
        assert abs(one - other) > 0.5
        assert (one + other) / 2 == pytest.approx(expected, rel=1e-6, abs=1e-9)
        assert abs(one + other) / 2 < 10 * distance  # of Euler's step from t to l
    assert abs(one + other) / 2 < 1e-4


@pytest.mark.parametrize("error", [-0.3, 0.3])
def test_a_step_moves_the_prediction_towards_consistency(error: float) -> None:
    """A mean velocity that is too small is raised, one that is too large lowered; the own velocity as the target."""
    flow, (t, s, middle) = CLASSES[0], (0.7, 0.2, 0.69)
    (x0, noise), _ = flow.endpoints(0.9, t)
    shift = torch.tensor(error, dtype=torch.float64, requires_grad=True)

    def model(*arguments: Any, spans: Tensor) -> Tensor:
        moved = spans.gt(0)[:, None, None, None] & (arguments[1] == 1000 * t)[:, None, None, None]
        return exact_model(*arguments, spans=spans) + moved * shift

    denoise = Conditioned(model, torch.tensor([0]), NULL)
    timesteps = torch.tensor([[1000 * t, 1000 * s, 1000 * middle]], dtype=torch.float64)
    options = {"guidance_scale": 1.0, "guidance_mix": 1e-9}
    found = objective(FLOW_MAP, **options).training_loss(denoise, image(x0), image(noise), timesteps)
    found["loss"].sum().backward()
    assert shift.grad is not None and math.copysign(1, shift.grad.item()) == math.copysign(1, error)
    assert not found["error"].requires_grad


def test_mean_flow_by_hand() -> None:
    """The target g - (t - s)·dF/dt, whose mean over all (x₀, ε) is F itself; w = 2 and m = ½ for the velocity."""
    x, t, s, flow = 0.9, 0.7, 0.2, CLASSES[0]
    predicted = flow.mean_velocity(x, t, s)
    targets = []
    for x0, noise in flow.endpoints(x, t):
        g, h = 0.5 * (noise - x0) + 0.5 * flow.velocity(x, t), 0.005
        ahead, behind = (flow.mean_velocity(x + g * (time - t), time, s) for time in (t + h, t - h))
        targets.append(g - (t - s) * (ahead - behind) / (2 * h))
        square = (predicted - targets[-1]) ** 2
        found = losses(MEAN_FLOW, x0, noise, [t, s], 0, guidance_scale=1.0)
        assert found == pytest.approx((square / (square + 0.01), square), rel=1e-8)
    assert sum(targets) / 2 == pytest.approx(predicted, abs=1e-4)
    (x0, noise), _ = flow.endpoints(x, t)
    own, without, v = flow.velocity(x, t), CLASSES[NULL].velocity(x, t), noise - x0
    square = (own - (1.0 * v + 0.5 * own - 0.5 * without)) ** 2  # ω = 1, κ = ½
    assert losses(MEAN_FLOW, x0, noise, [t, t], 0)[1] == pytest.approx(square, rel=1e-9)


@pytest.mark.parametrize(("t", "s"), [(0.7, 0.2), (0.999, 0.5), (0.5, 0.4999), (0.6, 0.597)])
def test_derivatives_along_the_path(t: float, s: float) -> None:
    """Differences are one-sided at t = 1 and where s is near; both agree with dF/dt = (v - F) / (t - s)."""
    x, flow = 0.9, CLASSES[0]
    velocity = flow.velocity(x, t)
    expected = (velocity - flow.mean_velocity(x, t, s)) / (t - s)
    arguments = conditioned(0), image(x), image(velocity), image(t), image(s)
    assert exact_derivative(*arguments).item() == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert central_difference(*arguments).item() == pytest.approx(expected, abs=0.02)
    if t - s > 0.01 and t < 0.99:
        assert central_difference(*arguments).item() == pytest.approx(expected, abs=1e-4)


def scan_model() -> DiffusionModel:
    options = {"hidden_size": 32, "depth": 2, "second_time": True}
    model = create_model("GSPN-N/2", num_classes=3, latent_channels=1, latent_size=4, **options).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    return model


@pytest.mark.parametrize(("half_width", "tolerance"), [(1e-6, 1e-6), (1e-4, 1e-3)])
def test_both_derivatives_give_the_same_gradient(
    half_width: float, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all weights of a model with scans, relative to the gradient's norm, as the difference gets narrow."""
    monkeypatch.setattr(mean_flow, "HALF_WIDTH", half_width)
    model, gradients = scan_model(), []
    latents, noise = torch.randn(2, 4, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    timesteps = 1000 * torch.tensor([[0.8, 0.1], [0.5, 0.5], [0.6, 0.3], [0.3, 0.2]], dtype=torch.float64)
    for derivative in ("differences", "jvp"):
        denoise = Conditioned(model, torch.tensor([0, 1, 2, 3]), model.null_label)
        loss = objective(MEAN_FLOW, derivative=derivative).training_loss(denoise, latents, noise, timesteps)["loss"]
        wanted = torch.autograd.grad(loss.sum(), list(model.parameters()), allow_unused=True)
        gradients.append(torch.cat([part.flatten() for part in wanted if part is not None]))
    difference = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
    assert 0 < difference < tolerance


# -- times -----------------------------------------------------------------------------------------------------------


def uniforms(count: int) -> Tensor:
    return torch.rand(count, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@BOTH
def test_a_quarter_are_pairs_and_times_stay_in_order(name: str) -> None:
    draws = torch.cat([uniforms(20_000), torch.tensor([[0.0, 0.0, 0.0], [0.0, 1 - 2**-53, 0.0], [0.5, 0.0, 0.0]])])
    times = objective(name).training_timesteps(draws, torch.linspace(0, 1, len(draws))) / 1000
    t, s = times[:, 0], times[:, 1]
    assert times.dtype == torch.float64 and bool(times.isfinite().all())
    assert t.max() <= 1 and s.min() >= 0
    assert (t > s).double().mean().item() == pytest.approx(0.25, abs=0.01)
    assert ((t - s)[t > s]).min().item() >= 1e-4 - 1e-12
    if name == FLOW_MAP:
        middle = times[:, 2]
        assert bool((middle >= s - 1e-15).all()) and ((t - middle)[t > s]).min().item() >= 1e-4 - 1e-12


def test_times_by_hand() -> None:
    """At the quantile 0.9 of a normal, z = 1.2816; a tenth of the way from t to s first, a 500th at last."""
    z = 1.2815515655446004
    draws = torch.tensor([[0.3, 0.9, 0.1], [0.2, 0.9, 0.1], [0.2, 0.9, 0.1]], dtype=torch.float64)
    alone, first, last = objective(FLOW_MAP).training_timesteps(draws, torch.tensor([0.0, 0.0, 1.0])).tolist()
    velocity, t, s = (1 / (1 + math.exp(-u)) for u in (-0.2 + z, 0.2 + 0.8 * z, -1 - 0.8 * z))
    assert alone == pytest.approx([1000 * velocity] * 3)
    assert first == pytest.approx([1000 * t, 1000 * s, 1000 * (t - 0.1 * (t - s))])
    assert last == pytest.approx([1000 * t, 1000 * s, 1000 * (t - 0.002 * (t - s))])
    alone, pair, _ = objective(MEAN_FLOW).training_timesteps(draws, torch.zeros(3)).tolist()
    later, earlier = (1000 / (1 + math.exp(-u)) for u in (-0.4 + z, -0.4 - z))
    assert alone == pytest.approx([later, later]) and pair == pytest.approx([later, earlier])


@BOTH
def test_uniform_pairs_and_their_share(name: str) -> None:
    """t is uniform, s uniform below it; 0.4 is the place of s between 0 and t."""
    few = objective(name, pair_times="uniform", pair_share=0.5)
    draws = torch.tensor([[0.49, 0.9, 0.4], [0.51, 0.9, 0.4], [0.1, 0.0, 0.4]], dtype=torch.float64)
    pair, velocity, least = few.training_timesteps(draws, torch.zeros(3))[:, :2].tolist()
    assert pair == pytest.approx([900, 360]) and least == pytest.approx([0.1, 0])
    assert velocity == objective(name).training_timesteps(draws, torch.zeros(3))[1, :2].tolist()


@BOTH
@pytest.mark.parametrize("key", ["timestep_shift", "timestep_sampling"])
def test_other_times_are_refused(name: str, key: str) -> None:
    value = {"timestep_shift": 3.0, "timestep_sampling": "logit_normal"}[key]
    with pytest.raises(UserError, match=f"objective.{key} is .*, but {name} draws its times as published"):
        objective(name, **{key: value})


# -- rows ------------------------------------------------------------------------------------------------------------


@BOTH
def test_rows_do_not_depend_on_what_is_beside_them(name: str) -> None:
    """A batch of both kinds, with and without a class and branches dropped; and no pair at all."""
    model = scan_model()
    generator = torch.Generator().manual_seed(2)
    latents, noise = torch.randn(2, 6, 1, 4, 4, generator=generator, dtype=torch.float64)
    labels, keep_mask = torch.tensor([0, 1, 2, 3, 3, 1]), torch.rand(3, 6, generator=generator) < 0.7
    timesteps = objective(name).training_timesteps(
        torch.tensor([[u, 0.4 + u / 3, 0.3] for u in (0.9, 0.1, 0.8, 0.2, 0.7, 0.3)]), torch.zeros(6)
    )
    denoise = Conditioned(model, labels, model.null_label, keep_mask)
    whole = objective(name).training_loss(denoise, latents, noise, timesteps)
    for row in range(6):
        one = torch.tensor([row])
        alone = objective(name).training_loss(denoise[one], latents[one], noise[one], timesteps[one])
        for key, value in alone.items():
            torch.testing.assert_close(value[0], whole[key][row], rtol=1e-9, atol=1e-12)


# -- sampling --------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("steps", [1, 2, 4, 50])
def test_any_number_of_steps_of_the_flow_map_ends_where_one_does(name: str, steps: int) -> None:
    noise = image(-1.2, 0.3, 2.0)
    latents = sample_latents(exact_model, objective(name), noise, torch.zeros(3, dtype=torch.int64), NULL, steps)
    torch.testing.assert_close(latents, CLASSES[0].flow_map(noise, 1.0, 0.0), rtol=1e-5, atol=1e-5)


@BOTH
def test_guidance_at_sampling_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"guidance of scale 2 does not go with objective {name}"):
        sample_latents(exact_model, objective(name), image(1.0), torch.tensor([0]), NULL, 1, guidance=Guidance(2.0))


@BOTH
def test_schedulers_that_do_not_step_by_mean_velocities_are_refused(name: str) -> None:
    import diffusers

    few = objective(name)
    shifted = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert ready_scheduler(shifted, few, None, 2).sigmas.tolist() == pytest.approx([1.0, 0.75, 0.0])
    assert ready_scheduler(default_scheduler(few), few, None, 2).sigmas.tolist() == pytest.approx([1.0, 0.5, 0.0])
    for other in (
        diffusers.FlowMatchHeunDiscreteScheduler(),
        diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True, shift=2.0),
    ):
        with pytest.raises(ValueError, match="a deterministic FlowMatchEulerDiscreteScheduler alone steps"):
            ready_scheduler(other, few, None, 2)
    with pytest.raises(UserError, match="unknown sampler 'heun'; allowed are euler"):
        few.resolve_sampler("heun", 2)


def test_the_published_guidance_unless_a_config_says_otherwise() -> None:
    assert [(objective(name).guidance_scale, objective(name).guidance_mix) for name in (FLOW_MAP, MEAN_FLOW)] == [
        (3.0, 0.25),
        (2.0, 0.5),
    ]
    given = objective(FLOW_MAP, guidance_scale=1.5, guidance_mix=0.5)
    assert (given.guidance_scale, given.guidance_mix) == (1.5, 0.5)
    assert isinstance(objective(FLOW_MAP), FlowMapObjective) and isinstance(objective(MEAN_FLOW), MeanFlowObjective)


def test_spans_are_told_in_timesteps() -> None:
    calls = []

    def model(latents: Tensor, timesteps: Tensor, *rest: Any, spans: Tensor) -> Tensor:
        calls.append((timesteps.tolist(), spans.tolist()))
        return latents

    mean_velocity(Conditioned(model, torch.tensor([0]), NULL), image(1.0), image(0.75), image(0.5))
    assert calls == [([750.0], [250.0])]
