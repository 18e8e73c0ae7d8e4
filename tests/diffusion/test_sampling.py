"""Sampling with models whose answer is known: exact paths, guided calls, and noise by index."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from gspn_dit import rng
from gspn_dit.config import ObjectiveConfig
from gspn_dit.diffusion import Guidance, create_objective, draw_noise, sample_latents
from gspn_dit.diffusion.objective import Model

NULL = 7


class Straight:
    """The exact velocity of straight paths to `targets[label]`, (x_t - x₀) / t; remembers its calls."""

    def __init__(self, targets: Tensor) -> None:
        self.targets = targets
        self.calls: list[tuple[list[float], list[int]]] = []

    def __call__(self, latents: Tensor, timesteps: Tensor, class_labels: Tensor) -> Tensor:
        self.calls.append((timesteps.tolist(), class_labels.tolist()))
        return (latents - self.targets[class_labels]) / (timesteps / 1000)[:, None, None, None]


def targets() -> Tensor:
    """One image per class, small whole numbers; class 7 is "no class"."""
    return torch.arange(8 * 4).reshape(8, 1, 2, 2) - 10.0


def noise(count: int = 3) -> Tensor:
    return torch.arange(count * 4).reshape(count, 1, 2, 2) % 5 - 2.0


def sample(
    model: Model,
    labels: list[int],
    steps: int,
    guidance: Guidance | None = None,
    sampler: str = "euler",
    start: Tensor | None = None,
) -> Tensor:
    start = noise(len(labels)) if start is None else start
    objective = create_objective(ObjectiveConfig())
    return sample_latents(model, objective, start, torch.tensor(labels), NULL, steps, guidance, sampler)


@pytest.mark.parametrize("steps", [1, 2, 4, 16])
def test_euler_follows_a_straight_path_exactly(steps: int) -> None:
    """Powers of two, so that no step rounds: x₀ comes out bit by bit, in one step or many."""
    assert torch.equal(sample(Straight(targets()), [0, 3, 5], steps), targets()[[0, 3, 5]])


@pytest.mark.parametrize("sampler", ["euler", "heun"])
@pytest.mark.parametrize("steps", [1, 3, 10, 50])
def test_both_samplers_follow_a_straight_path(sampler: str, steps: int) -> None:
    result = sample(Straight(targets()), [0, 3, 5], steps, sampler=sampler)
    torch.testing.assert_close(result, targets()[[0, 3, 5]], rtol=0, atol=1e-3)


def test_heun_is_of_second_order_where_euler_is_of_first() -> None:
    """dx/dt = x from t = 1 to 0: e⁻¹ of the start. Doubling the steps halves Euler's error, Heun's falls faster."""

    def growth(latents: Tensor, timesteps: Tensor, class_labels: Tensor) -> Tensor:
        return latents

    def error(sampler: str, steps: int) -> float:
        start = torch.ones(1, 1, 1, 1)
        return abs(float(sample(growth, [0], steps, sampler=sampler, start=start)) - torch.e**-1)

    assert error("euler", 8) / error("euler", 16) == pytest.approx(2, rel=0.1)
    assert error("heun", 8) < error("euler", 8) / 10


def test_the_model_sees_1000_t_and_the_labels() -> None:
    model = Straight(targets())
    sample(model, [4, 2], 4)
    assert model.calls == [([t, t], [4, 2]) for t in (1000, 750, 500, 250)]


def test_on_step_is_called_after_every_step() -> None:
    objective, done = create_objective(ObjectiveConfig()), []
    sample_latents(Straight(targets()), objective, noise(1), torch.tensor([0]), NULL, 5, on_step=lambda: done.append(1))
    assert len(done) == 5


@pytest.mark.parametrize("guidance", [None, Guidance(1.0), Guidance(3.0, (0.8, 0.8))])
def test_no_unconditional_call_where_guidance_does_not_act(guidance: Guidance | None) -> None:
    model = Straight(targets())
    sample(model, [4, 2], 4, guidance)
    assert [labels for _, labels in model.calls] == [[4, 2]] * 4


def test_guided_call_asks_for_the_null_label_too() -> None:
    model = Straight(targets())
    sample(model, [4, 2], 2, Guidance(2.0))
    assert model.calls == [([t] * 4, [4, 2, NULL, NULL]) for t in (1000, 500)]


def test_guided_result_by_hand() -> None:
    """One step from t = 1: noise - (u + s·(c - u)) with u = noise - null's image, c = noise - the class's image."""
    result = sample(Straight(targets()), [4, 2], 1, Guidance(2.5))
    expected = targets()[[NULL, NULL]] + 2.5 * (targets()[[4, 2]] - targets()[[NULL, NULL]])
    assert torch.equal(result, expected)


@pytest.mark.parametrize(
    ("interval", "guided"),
    [
        ((0.0, 1.0), [1000, 750, 500, 250]),
        ((0.5, 1.0), [1000, 750, 500]),
        ((0.25, 0.5), [500, 250]),
        ((0.51, 0.74), []),
        ((0.75, 0.75), [750]),
    ],
)
def test_interval_decides_which_steps_are_guided(interval: tuple[float, float], guided: list[float]) -> None:
    model = Straight(targets())
    sample(model, [4], 4, Guidance(2.0, interval))
    assert [times[0] for times, labels in model.calls if NULL in labels] == guided


@pytest.mark.parametrize(("steps", "guided"), [(3, range(3)), (10, range(10)), (250, [123])])
def test_times_of_the_grid_count_as_inside_where_they_end_the_interval(steps: int, guided: Sequence[int]) -> None:
    """The scheduler rounds its times to float32; 0.508, number 123 of 250, is then no longer 0.508."""
    for k in guided:
        model, t = Straight(targets()), (steps - k) / steps
        sample(model, [4], steps, Guidance(2.0, (t, t)))
        assert [NULL in labels for _, labels in model.calls] == [step == k for step in range(steps)]


def test_guided_channels_alone_move() -> None:
    def velocity(latents: Tensor, timesteps: Tensor, class_labels: Tensor) -> Tensor:
        return torch.ones_like(latents) * class_labels[:, None, None, None]

    result = sample(velocity, [3], 1, Guidance(2.0, channels=1), start=torch.zeros(1, 2, 1, 1))
    assert result.flatten().tolist() == [-(NULL + 2 * (3 - NULL)), -3]


def test_the_noise_is_left_alone_and_no_graph_is_kept() -> None:
    start = noise(1)
    scale = torch.ones(1, requires_grad=True)
    result = sample(lambda x, t, c: x * scale, [0], 3, start=start)
    assert torch.equal(start, noise(1))
    assert not result.requires_grad


def test_a_sample_does_not_depend_on_those_beside_it() -> None:
    together = sample(Straight(targets()), [0, 3, 5], 3, Guidance(2.0))
    alone = sample(Straight(targets()), [3], 3, Guidance(2.0), start=noise(3)[1:2])
    assert torch.equal(together[1:2], alone)


def test_noise_by_index() -> None:
    together = draw_noise(5, range(10), (3, 4, 4))
    assert together.shape == (10, 3, 4, 4)
    assert torch.equal(draw_noise(5, [7, 2], (3, 4, 4)), together[[7, 2]])
    assert not torch.equal(draw_noise(6, [7], (3, 4, 4))[0], together[7])
    assert torch.equal(together, rng.normal(5, rng.Stream.SAMPLE, range(10), (3, 4, 4)))
