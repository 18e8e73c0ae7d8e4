"""The noise schedule of a pipeline: targets by hand, and samplers that find the data of a perfect model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gspn_dit.config import ObjectiveConfig
from gspn_dit.diffusion import objective_of, sample_latents
from gspn_dit.diffusion.scheduled import ScheduledObjective
from gspn_dit.diffusion.velocity import VelocityObjective
from gspn_dit.errors import UserError

STABLE_DIFFUSION = {
    "_class_name": "PNDMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "skip_prk_steps": True,
}
ALPHA_BAR = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, dim=0)


def objective(prediction_type: str = "epsilon") -> Any:
    return objective_of(ObjectiveConfig(), {**STABLE_DIFFUSION, "prediction_type": prediction_type})


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_what_the_model_sees_and_what_it_is_asked_for(prediction_type: str) -> None:
    torch.manual_seed(0)
    latents, noise, timesteps = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([0, 500, 999])
    signal, sigma = (
        part.float()[:, None, None, None] for part in (ALPHA_BAR[timesteps].sqrt(), (1 - ALPHA_BAR[timesteps]).sqrt())
    )
    target = noise if prediction_type == "epsilon" else signal * noise - sigma * latents
    seen: list[Tensor] = []

    def denoise(noisy: Tensor, at: Tensor) -> Tensor:
        seen.append(noisy)
        assert torch.equal(at, timesteps)
        return target + 2

    losses = objective(prediction_type).loss(denoise, latents, noise, timesteps)
    torch.testing.assert_close(seen[0], signal * latents + sigma * noise, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses, torch.full((3,), 4.0), rtol=1e-4, atol=1e-4)


def test_timesteps_are_whole_and_cover_the_schedule() -> None:
    timesteps = objective().timesteps((torch.arange(5000, dtype=torch.float64) + 0.5) / 5000)
    assert timesteps.dtype == torch.int64 and timesteps.min() == 0 and timesteps.max() == 999
    assert (torch.bincount(timesteps) == 5).all()


@pytest.mark.parametrize("sampler", ["ddim", "dpm++", "unipc"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_samplers_find_the_data_of_a_perfect_model(sampler: str, prediction_type: str) -> None:
    torch.manual_seed(0)
    data = torch.randn(1, 2, 4, 4)

    def model(noisy: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        alpha_bar = ALPHA_BAR[int(timesteps[0])].float()
        noise = (noisy - alpha_bar.sqrt() * data) / (1 - alpha_bar).sqrt()
        return noise if prediction_type == "epsilon" else alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * data

    noise, labels = torch.randn_like(data), torch.zeros(1, dtype=torch.int64)
    found = sample_latents(model, objective(prediction_type), noise, labels, 1, 20, sampler=sampler)
    torch.testing.assert_close(found, data, rtol=0, atol=0.05)


def test_other_schedulers() -> None:
    flow = objective_of(ObjectiveConfig(), {"_class_name": "FlowMatchEulerDiscreteScheduler"})
    assert isinstance(flow, VelocityObjective)
    assert isinstance(objective(), ScheduledObjective)
    with pytest.raises(UserError, match="a schedule that predicts 'sample' cannot be trained"):
        objective("sample")
