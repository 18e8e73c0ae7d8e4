"""diffusers' flow-matching samplers on one grid of times: 1, 1 - 1/n, …, 1/n, each shifted, and 0."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_heun_discrete import FlowMatchHeunDiscreteScheduler
from torch import Tensor

from gspn_dit.diffusion.objective import TIMESTEP_SCALE, shifted


def uniform_times(count: int) -> list[float]:
    """Return the times 1, 1 - 1/count, …, 1/count of flow matching's steps."""
    return np.linspace(1.0, 0.0, count + 1)[:-1].tolist()


class EulerMaruyamaScheduler(FlowMatchEulerDiscreteScheduler):
    """The reverse SDE of flow matching with the diffusion w_t = t (SiT, arXiv 2401.08740, eq. 5), by Euler-Maruyama.

    dx = (v - ½·w_t·s) dt + √w_t dW has the marginals of the flow dx = v dt, with the score s = -(x + (1-t)·v) / t. The
    last step goes along the flow, to the mean of x₀, and draws no noise.
    """

    def step(  # type: ignore[override]
        self, model_output: Any, timestep: Any, sample: Any, noise: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        """Return x at the next time.

        Args:
            model_output: the velocity, [B, C, H, W].
            timestep: one of `timesteps`.
            sample: [B, C, H, W].
            noise: standard normal, [B, C, H, W].
            return_dict: False, the one answer there is.
        """
        if self.step_index is None:
            self._init_step_index(timestep)
        t, end = (float(sigma) for sigma in self.sigmas[self.step_index : self.step_index + 2])
        moved = super().step(model_output, timestep, sample, return_dict=False)[0]  # along the flow
        if end == 0:
            return (moved,)
        predicted_noise = sample + (1 - t) * model_output  # -t times the score
        return (moved - (t - end) / 2 * predicted_noise + (t * (t - end)) ** 0.5 * noise,)


def make_flow_scheduler(sampler: str, num_inference_steps: int, shift: float) -> Any:
    """Return the scheduler of "euler", "heun", "dpm++" or "sde", its times set."""
    if sampler == "heun":
        return _heun(num_inference_steps, shift)
    if sampler == "dpm++":
        return _dpm_solver(num_inference_steps, shift)
    kind = EulerMaruyamaScheduler if sampler == "sde" else FlowMatchEulerDiscreteScheduler
    scheduler: Any = kind(num_train_timesteps=TIMESTEP_SCALE, shift=shift)
    scheduler.set_timesteps(sigmas=uniform_times(num_inference_steps))
    return scheduler


def _heun(num_inference_steps: int, shift: float) -> Any:
    """Its last step is one of Euler's, since the velocity is not asked for at t = 0: 2·steps - 1 model calls."""
    scheduler: Any = FlowMatchHeunDiscreteScheduler(num_train_timesteps=TIMESTEP_SCALE, shift=shift)
    scheduler.sigma_min = 1 / num_inference_steps  # its own grid goes down to .001 in steps - 1 parts, and then to 0
    scheduler.set_timesteps(num_inference_steps)
    return scheduler


def _dpm_solver(num_inference_steps: int, shift: float) -> Any:
    """DPM-Solver++ of second order; its own grid begins at .999 and asks the model at times cut to whole timesteps."""
    scheduler: Any = DPMSolverMultistepScheduler(
        num_train_timesteps=TIMESTEP_SCALE,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=shift,
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(num_inference_steps)
    times = torch.from_numpy(shifted(np.asarray(uniform_times(num_inference_steps)), shift)).float()
    scheduler.sigmas, scheduler.timesteps = torch.cat([times, times.new_zeros(1)]), TIMESTEP_SCALE * times
    return scheduler
