"""A diffusers pipeline as teacher, end to end: Stable Diffusion's and SDXL's, encoded beforehand or while training."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gspn_dit.checkpoint import find_checkpoints, read_manifest
from gspn_dit.config import Config
from gspn_dit.diffusion import Guidance
from gspn_dit.errors import UserError
from gspn_dit.models.text_unet import call_unet
from gspn_dit.models.unet import GSPNAdapter
from gspn_dit.models.unet_scans import GSPNSelfAttention
from gspn_dit.tasks import create_task
from gspn_dit.text import Encoded, encode_all, load_encoder
from gspn_dit.text_sampler import TextSampler
from tests.captioned import text_config, write_captioned, write_pipeline
from tests.training.conftest import run_training
from tests.training.test_loop import metrics_of

pytest.importorskip("transformers", reason="needs transformers (pip install 'gspn-dit[text]')")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_captioned(tmp_path_factory.mktemp("captioned") / "data", size=16)


@pytest.fixture(scope="module", params=["stable-diffusion", "sdxl"])
def pipeline(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_pipeline(tmp_path_factory.mktemp(request.param), xl=request.param == "sdxl")


def config_of(run: Path, data: Path, pipeline: str, sections: Any = None, **training: Any) -> Config:
    wanted = {
        "unet": {"teacher": pipeline, "proxy_ratio": 4},
        "latent": {"name": "kl", "vae": f"{pipeline}/vae"},
        **(sections or {}),
    }
    return text_config(run, data, pipeline, wanted, **training)


@pytest.mark.slow
def test_a_student_of_a_pipeline_is_trained_and_drawn_with(tmp_path: Path, data: Path, pipeline: str) -> None:
    run_training(config_of(tmp_path, data, pipeline, max_steps=30, checkpoint_every=30))
    lines = [line["loss_layers"] for line in metrics_of(tmp_path) if "loss_layers" in line]
    assert sum(lines[-5:]) < 0.8 * sum(lines[:5])
    directory = find_checkpoints(tmp_path)[30]
    assert read_manifest(directory)["schedule"]["prediction_type"] == "v_prediction"
    trained, taught = (
        load_file(directory / "model.safetensors"),
        load_file(f"{pipeline}/unet/diffusion_pytorch_model.safetensors"),
    )
    kept = [name for name in trained if ".attn1." not in name]
    assert kept and all(torch.equal(trained[name], taught[name]) for name in kept)
    images = TextSampler.from_checkpoint(tmp_path).draw(["a cat", "a dog"], 2, Guidance(2.0))
    assert images.shape == (2, 16, 16, 3) and not np.array_equal(images[0], images[1])


@pytest.mark.slow
def test_distilled_scans_become_an_adapter_of_the_pipeline(tmp_path: Path, data: Path, pipeline: str) -> None:
    """Create, distil, take out, save, load, mount: the pipeline's UNet is then the run's own, bit for bit."""
    from diffusers import DiffusionPipeline

    options: dict[str, Any] = {"variant": "qkv", "window": 2, "skip": False, "weight_groups": 4}
    if "sdxl" in pipeline:
        options = {}
    run_training(
        config_of(
            tmp_path / "run", data, pipeline, {"unet": {"teacher": pipeline, "proxy_ratio": 4, **options}}, max_steps=2
        )
    )
    adapter = GSPNAdapter.from_checkpoint(tmp_path / "run")
    assert adapter.config["base"] == pipeline
    adapter.save_pretrained(tmp_path / "adapter")
    stock: Any = DiffusionPipeline.from_pretrained(pipeline)
    latents, times = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([300.0, 9.0])
    states = torch.randn(2, 12, stock.unet.config.cross_attention_dim, generator=torch.Generator().manual_seed(1))
    texts = Encoded(
        states, torch.ones(2, 12, dtype=torch.bool), torch.ones(2, 6) if hasattr(stock, "text_encoder_2") else None
    )

    def predicted(unet: Any) -> torch.Tensor:
        with torch.no_grad():
            return call_unet(unet, latents, times, texts, 1, 16)

    for weights in ("ema", "model"):
        expected = predicted(TextSampler.from_checkpoint(tmp_path / "run", weights).unet)
        taken = GSPNAdapter.from_checkpoint(tmp_path / "run", weights).mount(stock)
        assert torch.equal(predicted(stock.unet), expected)
        assert not any(part.training for part in stock.unet.modules())
        taken.unmount()
        if weights == "ema":
            loaded = GSPNAdapter.from_pretrained(tmp_path / "adapter").mount(stock)
            assert torch.equal(predicted(stock.unet), expected)
            loaded.unmount()
    assert not torch.equal(predicted(stock.unet), expected)


def test_the_teacher_is_called_as_its_pipeline_calls_it(tmp_path: Path, data: Path, pipeline: str) -> None:
    """The prediction for a prompt, against that of diffusers' own encode_prompt and UNet."""
    from diffusers import DiffusionPipeline

    task: Any = create_task(config_of(tmp_path / "run", data, pipeline))
    stock: Any = DiffusionPipeline.from_pretrained(pipeline)
    latents, times = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([300.0])
    states, _, *others = stock.encode_prompt(
        "a red cat", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    added = None
    if others:
        added = {"text_embeds": others[0], "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]])}
    with torch.no_grad():
        expected = stock.unet(latents, times, states, added_cond_kwargs=added).sample
        texts = task.table.batch([task.table.numbers["a red cat"]])
        found = call_unet(task.distillation.teacher, latents, times, texts, 1, task.image_size)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert sum(isinstance(part, GSPNSelfAttention) for part in task.model.modules()) == 4


def test_no_caption_is_zeros_for_sdxl_and_the_empty_prompt_for_others(pipeline: str) -> None:
    encoder = load_encoder(pipeline)
    table = encode_all(encoder, ["a cat"])
    empty = table.batch([table.null])
    assert empty.mask.all() and empty.states.shape == (1, 12, encoder.width)
    assert bool(empty.states.any()) == (empty.pooled is None)
    assert empty.pooled is None or not empty.pooled.any()


def test_a_teacher_that_asks_for_other_texts_is_refused(tmp_path: Path, data: Path, pipeline: str) -> None:
    """SDXL's second encoder alone is as wide as the UNet's texts would have to be, but says nothing of whole texts."""
    config = config_of(tmp_path / "run", data, pipeline)
    alone = dataclasses.replace(config, text=dataclasses.replace(config.text, encoder=f"{pipeline}/text_encoder"))
    if Path(pipeline, "text_encoder_2").is_dir():
        with pytest.raises(UserError, match="its channels of a text is 16, and 8 is needed here"):
            create_task(alone)
    else:
        with pytest.raises(UserError, match="cannot be loaded"):  # its tokenizer lies beside it
            create_task(alone)
