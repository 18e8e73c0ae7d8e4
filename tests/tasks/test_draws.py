"""What is random in a step depends on the sample number alone."""

from __future__ import annotations

import torch

from gspn_dit.config import ObjectiveConfig
from gspn_dit.diffusion import create_objective
from gspn_dit.tasks.draws import Draws, training_draws, validation_draws

OBJECTIVE = create_objective(ObjectiveConfig())
RATES = [0.0, 0.2, 0.5]


def draw(numbers: range, dropout: float = 0.5) -> Draws:
    latents, labels = torch.zeros(len(numbers), 1, 4, 4), torch.zeros(len(numbers), dtype=torch.int64)
    return training_draws(7, numbers, latents, labels, OBJECTIVE, dropout, 10, RATES)


def test_rows_do_not_depend_on_the_batch() -> None:
    whole, second_half = draw(range(100, 108)), draw(range(104, 108))
    assert torch.equal(whole.noise[4:], second_half.noise)
    assert torch.equal(whole.timesteps[4:], second_half.timesteps)
    assert torch.equal(whole.class_labels[4:], second_half.class_labels)
    assert whole.keep_mask is not None and second_half.keep_mask is not None
    assert torch.equal(whole.keep_mask[:, 4:], second_half.keep_mask)


def test_frequencies_of_dropped_labels_and_branches() -> None:
    draws = draw(range(4000))
    assert abs((draws.class_labels == 10).float().mean().item() - 0.5) < 0.03
    assert set(draws.class_labels.tolist()) == {0, 10}
    assert draws.keep_mask is not None and draws.keep_mask.shape == (3, 4000)
    kept = draws.keep_mask.float().mean(dim=1)
    torch.testing.assert_close(kept, torch.tensor([1.0, 0.8, 0.5]), atol=0.03, rtol=0)


def test_no_mask_without_stochastic_depth_and_no_null_label_without_dropout() -> None:
    latents, labels = torch.zeros(50, 1, 4, 4), torch.arange(50)
    draws = training_draws(7, range(50), latents, labels, OBJECTIVE, 0.0, 50, [0.0, 0.0])
    assert draws.keep_mask is None
    assert torch.equal(draws.class_labels, labels)


def test_validation_times_are_stratified_and_fixed() -> None:
    latents, labels = torch.zeros(36, 1, 4, 4), torch.zeros(36, dtype=torch.int64)
    draws = validation_draws(7, range(36), 36, latents, labels, OBJECTIVE)
    assert sorted((draws.timesteps * 36 / 1000).long().tolist()) == list(range(36))
    part = validation_draws(7, range(10, 20), 36, latents[:10], labels[:10], OBJECTIVE)
    assert torch.equal(part.timesteps, draws.timesteps[10:20])
    assert torch.equal(part.noise, draws.noise[10:20])
