"""The class-conditional task: what reaches the model, what is validated, and that the trainer needs no more of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gspn_dit.errors import UserError
from gspn_dit.tasks import create_task
from gspn_dit.tasks.draws import training_draws
from tests.training.conftest import changed, tiny_config


class Recorder(nn.Module):
    """Answers nothing but zeros, and remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, ...]] = []

    def forward(self, *arguments: Tensor) -> Tensor:
        self.calls.append(arguments)
        return torch.zeros_like(arguments[0])


def test_labels_mask_and_noisy_latents_of_the_sample_numbers_reach_the_model(tmp_path: Path) -> None:
    config = changed(tiny_config(tmp_path, class_dropout=0.5), model={"drop_path_rate": 0.5})
    task, model, numbers = create_task(config), Recorder(), range(40, 48)
    loss = task.loss(model, numbers)["loss"]
    latents, labels = task.train_data.shuffled(numbers)  # type: ignore[attr-defined]
    draws = training_draws(0, numbers, latents, labels, task.objective, 0.5, 10, [0.0, 0.25, 0.5])  # type: ignore[attr-defined]
    ((noisy, timesteps, passed_labels, keep_mask),) = model.calls
    t = (draws.timesteps / 1000).float()[:, None, None, None]
    torch.testing.assert_close(noisy, (1 - t) * latents + t * draws.noise)
    assert torch.equal(timesteps, draws.timesteps.float())
    assert torch.equal(passed_labels, draws.class_labels) and 10 in passed_labels.tolist()
    assert draws.keep_mask is not None and torch.equal(keep_mask, draws.keep_mask)
    assert loss.item() == pytest.approx((draws.noise - latents).square().mean().item(), rel=1e-5)


def test_validation_sums_do_not_depend_on_how_the_images_are_cut(tmp_path: Path) -> None:
    task = create_task(tiny_config(tmp_path, validation_images=12))
    assert task.validation_count == 12
    with torch.no_grad():
        whole = task.validate(task.model, range(12))
        parts = [task.validate(task.model, range(start, start + 4)) for start in (0, 4, 8)]
    assert list(whole) == ["val_loss", "val_loss_q1", "val_loss_q2", "val_loss_q3", "val_loss_q4"]
    for name, (total, count) in whole.items():
        assert sum(part[name][0].item() for part in parts) == pytest.approx(total.item(), rel=1e-5)
        assert sum(part[name][1].item() for part in parts) == count.item()
    assert whole["val_loss"][1].item() == 12
    assert sum(whole[f"val_loss_q{quarter}"][1].item() for quarter in range(1, 5)) == 12


def test_unknown_task(tmp_path: Path) -> None:
    import dataclasses

    with pytest.raises(UserError) as caught:
        create_task(dataclasses.replace(tiny_config(tmp_path), task="class-conditionel"))
    assert "unknown task 'class-conditionel'; allowed are class-conditional" in str(caught.value)
    assert str(caught.value).endswith("did you mean 'class-conditional'?")
