"""Denoising diffusion with a learned range of variances (iDDPM, arXiv 2102.09672): the protocol of DiT and GSPN.

Equation numbers are iDDPM's. Timestep t here is 0 … 999; x_t has seen t + 1 steps of noise, so that t = 0 is the step
to the data, whose term of the bound is a likelihood instead of a divergence.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gspn_dit.config import ObjectiveConfig
from gspn_dit.diffusion.objective import Denoiser, Objective

NUM_TIMESTEPS = 1000
FIRST_BETA, LAST_BETA = 1e-4, 0.02
HALF_BIN = 1 / 255
"""Half the distance of two neighbours among the 256 values of a pixel in [-1, 1]."""
OPEN_BEYOND = 0.999
"""Pixels of a greater magnitude are black or white, whose bins have no outer edge."""


class Schedule(NamedTuple):
    """What the loss needs to know of each timestep, [1000] or, of a batch's timesteps, [B, 1, 1, 1]."""

    alpha_bar: Tensor
    """Share of the data's variance that is left in x_t, eq. 8."""
    mean_scale: Tensor
    """By how much an error of 1 in epsilon moves the mean of x_{t-1}, eq. 13."""
    least_log_variance: Tensor
    """Logarithm of the posterior's variance, eq. 10; that of t = 0, which is 0, is replaced by the next."""
    greatest_log_variance: Tensor
    """Logarithm of beta."""

    def to(self, device: torch.device, dtype: torch.dtype) -> Schedule:
        return Schedule(*(table.to(dtype).to(device) for table in self))

    def at(self, timesteps: Tensor) -> Schedule:
        return Schedule(*(table[timesteps][:, None, None, None] for table in self))


def linear_schedule() -> Schedule:
    """Return the schedule of 1000 betas from 1e-4 to 0.02, float64."""
    beta = torch.linspace(FIRST_BETA, LAST_BETA, NUM_TIMESTEPS, dtype=torch.float64)
    alpha_bar = torch.cumprod(1 - beta, dim=0)
    before = torch.cat([torch.ones_like(alpha_bar[:1]), alpha_bar[:-1]])
    posterior_variance = beta * (1 - before) / (1 - alpha_bar)
    posterior_variance[0] = posterior_variance[1]
    return Schedule(
        alpha_bar=alpha_bar,
        mean_scale=beta / ((1 - beta) * (1 - alpha_bar)).sqrt(),
        least_log_variance=posterior_variance.log(),
        greatest_log_variance=beta.log(),
    )


class EpsilonObjective(Objective):
    """The hybrid loss L_simple + L_vlb of a model that predicts the noise and, in C more channels, its variances.

    L_vlb is the term of the variational bound at the drawn timestep, in bits per dimension, with the mean held fixed:
    it teaches the variances alone. The paper's hybrid is L_simple + 0.001 · (the sum of all 1000 terms); a term drawn
    at random estimates the sum divided by 1000, so here it enters with weight 1.
    """

    prediction_type = "epsilon"
    samplers = ("ddpm", "ddim", "dpm++", "unipc")
    stochastic_samplers = ("ddpm",)

    def __init__(self, config: ObjectiveConfig) -> None:
        super().__init__(config)
        self.schedule = linear_schedule()
        self._copies: dict[tuple[torch.device, torch.dtype], Schedule] = {}

    def out_channels(self, latent_channels: int) -> int:
        return 2 * latent_channels

    def split_output(self, output: Tensor) -> tuple[Tensor, Tensor | None]:
        """Split [B, 2C, H, W] into epsilon and the variance's place in its range, -1 … 1 for least … greatest."""
        epsilon, variance_values = output.chunk(2, dim=1)
        return epsilon, variance_values

    # -- training ------------------------------------------------------------------------------------------------

    def timesteps(self, uniforms: Tensor) -> Tensor:
        """Map uniforms to ⌊1000·t⌋, whole numbers of 0 … 999 in the dtype of `uniforms`."""
        return (NUM_TIMESTEPS * self.times(uniforms)).floor().clamp(max=NUM_TIMESTEPS - 1)

    def loss(self, denoise: Denoiser, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the mean over channels and pixels of (epsilon - ε)², plus the variational bound's term, [B]."""
        steps = timesteps.long()
        alpha_bar = self._at(steps, latents).alpha_bar
        noisy = alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise
        output = denoise(noisy, steps.to(latents.dtype)).to(latents.dtype)
        epsilon, variance_values = output.chunk(2, dim=1)
        simple = (epsilon - noise).square().flatten(1).mean(dim=1)
        return simple + self.variational_bound(latents, noise, steps, epsilon.detach(), variance_values)

    def variational_bound(
        self, latents: Tensor, noise: Tensor, timesteps: Tensor, epsilon: Tensor, variance_values: Tensor
    ) -> Tensor:
        """Return the variational bound's term at a timestep (eq. 5 and 6), bits per dimension, [B].

        For t > 0 this is KL(q(x_{t-1} | x_t, x₀) ‖ p(x_{t-1} | x_t)), for t = 0 it is -log p(x₀ | x_1), where x₀ is
        taken as one of 256 values in [-1, 1], as it is in the published protocol for latents too.

        Args:
            latents, noise: x₀ and ε, [B, C, H, W].
            timesteps: int64 [B], 0 … 999.
            epsilon, variance_values: the model's two predictions, [B, C, H, W].
        """
        at = self._at(timesteps, latents)
        least = at.least_log_variance
        log_variance = least + (variance_values + 1) / 2 * (at.greatest_log_variance - least)  # eq. 15
        # By eq. 13 the two means, given the same x_t, differ as the two epsilons do. At t = 0 the true mean is x₀.
        mean_error = at.mean_scale * (epsilon - noise)
        difference = log_variance - least
        divergence = (difference + torch.expm1(-difference) + mean_error.square() * torch.exp(-log_variance)) / 2
        to_data = (timesteps == 0)[:, None, None, None]
        # A deviation of 1 keeps the likelihood, which is not asked for at other timesteps, from overflowing there.
        deviation = torch.where(to_data, log_variance / 2, 0).exp()
        surprise = -discretised_log_likelihood(latents, mean_error, deviation)
        nats = torch.where(to_data, surprise, divergence)
        return nats.flatten(1).mean(dim=1) / math.log(2)

    def _at(self, timesteps: Tensor, like: Tensor) -> Schedule:
        key = (like.device, like.dtype)
        if key not in self._copies:
            self._copies[key] = self.schedule.to(*key)
        return self._copies[key].at(timesteps)

    # -- sampling ------------------------------------------------------------------------------------------------

    def most_steps(self, sampler: str) -> int | None:
        return NUM_TIMESTEPS if sampler in ("ddpm", "ddim") else NUM_TIMESTEPS - 1

    def make_scheduler(self, sampler: str, num_inference_steps: int) -> Any:
        """Return diffusers' "ddpm", "ddim", "dpm++" or "unipc" scheduler on evenly spaced timesteps.

        "ddpm" and "ddim" visit the timesteps of DiT's respacing, 999 and 0 included. "dpm++" and "unipc" (second order)
        leave 0 out, as they were published, since the last step goes to a sigma of 0 anyway. "ddpm" alone takes the
        model's variance values, behind epsilon; a scheduler that does so says `variance_type="learned_range"`.
        """
        import diffusers

        shared = {
            "num_train_timesteps": NUM_TIMESTEPS,
            "beta_start": FIRST_BETA,
            "beta_end": LAST_BETA,
            "beta_schedule": "linear",
            "timestep_spacing": "linspace",
        }
        scheduler: Any
        if sampler == "ddpm":
            from gspn_dit.diffusion.ancestral import AncestralScheduler

            scheduler = AncestralScheduler(**shared, variance_type="learned_range", clip_sample=False)
        elif sampler == "ddim":
            scheduler = diffusers.DDIMScheduler(**shared, clip_sample=False)
        elif sampler == "dpm++":
            scheduler = diffusers.DPMSolverMultistepScheduler(**shared, final_sigmas_type="zero")
        else:
            scheduler = diffusers.UniPCMultistepScheduler(**shared, final_sigmas_type="zero")
        scheduler.alphas_cumprod = self.schedule.alpha_bar.clone()  # float64: 1 - ᾱ_t/ᾱ_{t-1} is little more than 1e-4
        scheduler.set_timesteps(num_inference_steps)
        if num_inference_steps == 1:
            scheduler.timesteps = torch.tensor([NUM_TIMESTEPS - 1])  # the one point between 0 and 999 would be 0
        if sampler == "ddim":
            _let_ddim_step_along_its_timesteps(scheduler)
        return scheduler


def _let_ddim_step_along_its_timesteps(scheduler: Any) -> None:
    """Make DDIM step from each of its timesteps to the next.

    It steps back by 1000 // steps, which between evenly spaced timesteps is wrong nearly always. Told to step back by
    1, in a table that is constant from each timestep up to the one above, it lands on the next.
    """
    visited = scheduler.timesteps.flip(0)
    levels = torch.cat([torch.ones(1, dtype=torch.float64), scheduler.alphas_cumprod[visited]])
    scheduler.alphas_cumprod = levels[torch.searchsorted(visited, torch.arange(NUM_TIMESTEPS), right=True)]
    scheduler.num_inference_steps = NUM_TIMESTEPS


def discretised_log_likelihood(pixels: Tensor, error: Tensor, deviation: Tensor) -> Tensor:
    """Return the log probability of a pixel's bin under a normal distribution (DDPM, arXiv 2006.11239, eq. 13).

    Args:
        pixels: values in [-1, 1]; the bins of -1 and 1 reach to infinity.
        error: pixel minus mean.
        deviation: standard deviation.
    """
    # Both edges are measured on the side where the tail is thin, so that their difference keeps its digits.
    near = torch.special.log_ndtr((HALF_BIN - error.abs()) / deviation)
    far = torch.special.log_ndtr((-HALF_BIN - error.abs()) / deviation)
    inside = near + torch.log(-torch.expm1(far - near))
    outermost = torch.special.log_ndtr((HALF_BIN - error * pixels.sign()) / deviation)
    return torch.where(pixels.abs() > OPEN_BEYOND, outermost, inside)
