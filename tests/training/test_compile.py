"""Compiled and eager training agree, and the compiler sees one graph."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gspn_dit.checkpoint import find_checkpoints, load_tensors
from gspn_dit.models import DiffusionModel, create_model
from tests.training.conftest import changed, run_training, tiny_config

MODELS = {
    "GSPN": {"name": "GSPN-N/2", "hidden_size": 32, "depth": 2},
    "DiT": {"name": "DiT-S/2", "hidden_size": 32, "depth": 2, "num_heads": 2},
    "DiT with GSPN": {"name": "DiT-S/2", "hidden_size": 32, "depth": 2, "mixer": "gspn"},
}


def tiny(name: str) -> DiffusionModel:
    torch.manual_seed(0)
    model = create_model(**MODELS[name], num_classes=4, latent_channels=2, latent_size=8)
    with torch.no_grad():
        for parameter in model.parameters():  # or the zeros that models start from would hide the rest
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_no_graph_break_and_the_values_and_gradients_of_eager_mode(name: str, checkpointing: bool) -> None:
    torch._dynamo.reset()
    model = tiny(name)
    model.gradient_checkpointing = checkpointing
    inputs = torch.randn(2, 2, 8, 8), torch.tensor([20.0, 700.0]), torch.tensor([1, 4])
    keep = torch.tensor([[True, False]] * len(model.blocks))
    expected = model(*inputs, keep)
    gradients = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    # A graph break is an error. Inductor's code generation has a test of its own below, it takes minutes.
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    y = compiled(*inputs, keep)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    for one, other in zip(torch.autograd.grad(y.square().sum(), list(model.parameters())), gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * max(1.0, float(other.abs().max())))


@pytest.mark.slow
def test_a_compiled_training_follows_the_eager_one_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    for name, options in (("eager", {}), ("compiled", {"compile": True})):
        torch._dynamo.reset()
        run_training(changed(tiny_config(tmp_path / name), training=options))
    torch._dynamo.reset()
    run_training(tiny_config(tmp_path / "parted", compile=True, max_steps=2))
    run_training(tiny_config(tmp_path / "parted", compile=True), resume="auto")
    eager, compiled, parted = (find_checkpoints(tmp_path / name)[4] for name in ("eager", "compiled", "parted"))
    for stem in ("model", "ema"):
        for name, tensor in load_tensors(eager, stem).items():
            torch.testing.assert_close(load_tensors(compiled, stem)[name], tensor, rtol=1e-3, atol=1e-4)
            assert torch.equal(load_tensors(parted, stem)[name], load_tensors(compiled, stem)[name])


def test_checkpointed_training_is_bit_identical(tmp_path: Path) -> None:
    run_training(tiny_config(tmp_path / "kept", max_steps=2))
    run_training(tiny_config(tmp_path / "again", max_steps=2, activation_checkpointing=True))
    for stem in ("model", "ema", "optimizer"):
        one, other = (load_tensors(find_checkpoints(tmp_path / name)[2], stem) for name in ("kept", "again"))
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("tf32", [False, True])
def test_tf32_is_what_the_config_says(tmp_path: Path, tf32: bool) -> None:
    from gspn_dit.training.accelerator import create_accelerator

    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        create_accelerator(tiny_config(tmp_path, tf32=tf32))
        assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (tf32, tf32)
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
