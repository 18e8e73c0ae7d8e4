"""Muon: what it makes orthogonal, against torch's own, steps skipped on the device, and bit-exact resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gspn_dit.config import TrainingConfig
from gspn_dit.errors import UserError
from gspn_dit.training.muon import Muon, orthogonalised
from gspn_dit.training.optimizer import create_optimizer, muon_matrices, optimizer_step, optimizer_tensors
from tests.training.conftest import changed, run_training, tiny_config
from tests.training.test_loop import assert_same_tensors, metrics_of, tensors_of

SETTINGS = TrainingConfig(optimizer="muon", weight_decay=0.1)


class Net(nn.Module):
    """An embedding, two blocks with matrices of one shape and of another, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(3, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)) for _ in range(2))
        self.head = nn.Linear(4, 2)


def give_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        weight.grad = torch.randn(weight.shape, generator=generator)


@pytest.mark.parametrize("shape", [(5, 5), (4, 12), (12, 4)])
def test_singular_values_become_about_one_and_singular_vectors_stay(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    matrices = torch.randn(3, *shape, generator=generator)
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    matrices = u @ torch.diag_embed(s.clamp(min=0.2 * float(s.max()))) @ vh
    found = orthogonalised(matrices)
    inner = u.mT @ found @ vh.mT  # diagonal: the singular vectors are the matrix's own
    values = inner.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(inner, torch.diag_embed(values), atol=1e-4, rtol=0)
    assert values.min() > 0.65 and values.max() < 1.2
    assert torch.equal(orthogonalised(torch.zeros(1, *shape)), torch.zeros(1, *shape))


def test_steps_are_those_of_torchs_muon_and_of_adamw() -> None:
    """Torch's iterations are in bfloat16: an update of root mean square 0.2 · rate agrees to a few percent of it."""
    model, peer = Net(), Net()
    optimizer = create_optimizer(model, SETTINGS, list(model.blocks))
    assert isinstance(optimizer, Muon)
    matrices = muon_matrices(SETTINGS, list(peer.blocks))
    assert [tuple(matrix.shape) for matrix in matrices] == [(8, 4), (4, 8)] * 2
    chosen = {id(matrix) for matrix in matrices}
    others = [weight for weight in peer.parameters() if id(weight) not in chosen]
    muon = torch.optim.Muon(matrices, lr=0.1, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=0.1, weight_decay=0.1, fused=True)
    for seed in range(3):
        for net in (model, peer):
            give_gradients(net, seed)
        _, took = optimizer_step(optimizer, model, 0.1, None)
        assert took.item() == 1
        muon.step()
        adamw.step()
    for (name, mine), theirs in zip(model.named_parameters(), peer.parameters(), strict=True):
        if id(theirs) in chosen:
            torch.testing.assert_close(mine, theirs, atol=3 * 0.02 * 0.1, rtol=0.02, msg=name)
        else:
            assert torch.equal(mine, theirs), name
    torch.testing.assert_close(
        optimizer.state[model.blocks[1][0].weight]["momentum_buffer"],  # type: ignore[index]
        muon.state[peer.blocks[1][0].weight]["momentum_buffer"],  # type: ignore[index]
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_moves_neither_weights_nor_state(bad: float) -> None:
    model = Net()
    optimizer = create_optimizer(model, SETTINGS, list(model.blocks))
    give_gradients(model, 0)
    optimizer_step(optimizer, model, 0.1, 1.0)

    def now() -> dict[str, Tensor]:
        weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        return weights | {name: tensor.clone() for name, tensor in optimizer_tensors(optimizer, model).items()}

    before = now()
    assert {"blocks.0.0.weight.momentum_buffer", "blocks.0.0.bias.exp_avg", "head.weight.exp_avg"} <= before.keys()
    assert "blocks.0.0.weight.exp_avg" not in before
    give_gradients(model, 1)
    model.blocks[0][0].weight.grad[0, 0] = bad  # type: ignore[index]
    _, took = optimizer_step(optimizer, model, 0.1, 1.0)
    assert took.item() == 0
    assert_same_tensors(before, now())
    give_gradients(model, 2)
    optimizer_step(optimizer, model, 0.1, 1.0)
    assert not torch.equal(before["blocks.0.0.weight"], now()["blocks.0.0.weight"])


def test_a_run_resumes_bit_for_bit_with_its_averages(tmp_path: Path) -> None:
    options = {"optimizer": "muon", "ema_sigma_rel": [0.1], "weight_decay": 0.01}
    run_training(tiny_config(tmp_path / "whole", max_steps=4, **options))
    run_training(tiny_config(tmp_path / "halves", max_steps=2, **options))
    run_training(tiny_config(tmp_path / "halves", max_steps=4, **options), resume="auto")
    whole = tensors_of(tmp_path / "whole", 4)
    assert any(name.endswith("momentum_buffer") for name in whole)
    assert_same_tensors(whole, tensors_of(tmp_path / "halves", 4))
    losses = [[line["loss"] for line in metrics_of(tmp_path / name) if "loss" in line] for name in ("whole", "halves")]
    assert losses[0] == losses[1]
    with pytest.raises(UserError, match=r"training\.optimizer = muon, this run has adamw"):
        run_training(
            changed(tiny_config(tmp_path / "halves", max_steps=5, **options), training={"optimizer": "adamw"}),
            resume="auto",
        )


@pytest.mark.parametrize("sharding", ["fsdp", "zero1"])
def test_sharding_is_refused_in_one_line(tmp_path: Path, sharding: str) -> None:
    with pytest.raises(UserError, match=f"muon needs whole matrices, so no sharding \\({sharding}\\)"):
        run_training(tiny_config(tmp_path / "run", optimizer="muon", sharding=sharding))
    assert not (tmp_path / "run").exists()
