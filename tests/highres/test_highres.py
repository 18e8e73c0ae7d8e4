"""Staged generation: against a plain loop, decoded by tiles, resumed between stages, in the memory announced."""

from __future__ import annotations

import io
import itertools
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from PIL import Image
from torch import Tensor, nn

from benchmarks.highres import TinyPipeline
from gspn_dit import generate_highres, rng
from gspn_dit.highres import stages
from gspn_dit.highres.decode import OVERLAP, TILE, decode_rows, spans, write_png
from gspn_dit.highres.memory import LiveMemory, measure, on_meta
from gspn_dit.highres.stages import Stage, chunked_feed_forward

FACTOR = 8


def draw(pipe: Any, out: Path, stages: Any, **options: Any) -> np.ndarray:
    return np.asarray(Image.open(generate_highres(pipe, "a cat", stages, out=out, num_inference_steps=4, **options)))


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_one_stage_is_what_a_plain_loop_draws(tmp_path: Path, guidance_scale: float) -> None:
    pipe = TinyPipeline()
    image = draw(pipe, tmp_path / "a.png", [(64, 96)], guidance_scale=guidance_scale, seed=5)
    latents = rng.normal(5, rng.Stream.SAMPLE, [0], (4, 8, 12))
    states, other = pipe.encode_prompt("a cat", None, 1, True, "")
    pipe.scheduler.set_timesteps(4)
    with torch.no_grad():
        for timestep in pipe.scheduler.timesteps:
            both = pipe.unet(latents.repeat(2, 1, 1, 1), timestep, torch.cat([other, states])).sample
            prediction = both[:1] + guidance_scale * (both[1:] - both[:1])
            latents = pipe.scheduler.step(prediction, timestep, latents).prev_sample
        expected = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample[0].permute(1, 2, 0).numpy()
    assert image.shape == (64, 96, 3)
    np.testing.assert_allclose(image, np.clip(127.5 * expected + 128, 0, 255).astype(np.uint8), atol=1)


@pytest.mark.parametrize(
    "scheduler", [DDIMScheduler(clip_sample=False), EulerDiscreteScheduler(), FlowMatchEulerDiscreteScheduler()]
)
def test_a_stage_keeps_what_it_is_given_where_the_model_is_perfect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheduler: Any
) -> None:
    """With a model that knows the answer, enlarging and refining end at that answer."""
    pipe: Any = TinyPipeline(scheduler)
    answer = 0.3
    calls: list[tuple[int, ...]] = []

    def perfect(latents: Tensor, timestep: Tensor, **_: Any) -> Any:
        calls.append(tuple(latents.shape[-2:]))
        if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            sigma = timestep / 1000
            return SimpleNamespace(sample=(latents - answer) / sigma)
        alpha_bar = scheduler.alphas_cumprod[int(timestep)]
        return SimpleNamespace(sample=(latents - alpha_bar.sqrt() * answer) / (1 - alpha_bar).sqrt())

    pipe.unet.forward = perfect
    monkeypatch.setattr(stages, "memory_bound", lambda *_: 0)
    folder = tmp_path / "stages"
    draw(pipe, tmp_path / "a.png", [(64, 64), (128, 96, 0.5)], guidance_scale=1, work_dir=folder)
    from safetensors.torch import load_file

    latents = load_file(sorted(folder.iterdir())[-1])["latents"]
    assert latents.shape == (1, 4, 16, 12)
    torch.testing.assert_close(latents, torch.full_like(latents, answer), rtol=0, atol=0.05)
    assert calls == [(8, 8)] * 4 + [(16, 12)] * 2


def test_a_second_call_goes_on_after_the_last_stage(tmp_path: Path) -> None:
    pipe = TinyPipeline()
    wanted = [(64, 64), Stage(64, 128, 0.5)]
    first = draw(pipe, tmp_path / "a.png", wanted)
    calls: list[Any] = []

    def count(module: Any, args: Any, output: Any) -> None:
        if args[0].device.type == "cpu":  # memory is measured on a copy
            calls.append(tuple(args[0].shape[-2:]))

    pipe.unet.register_forward_hook(count)
    assert np.array_equal(draw(pipe, tmp_path / "a.png", wanted), first) and calls == []
    sorted((tmp_path / "a.png.stages").iterdir())[1].unlink()
    assert np.array_equal(draw(pipe, tmp_path / "a.png", wanted), first) and calls == [(8, 16)] * 4
    other = draw(pipe, tmp_path / "b.png", wanted, seed=1, work_dir=tmp_path / "a.png.stages")
    assert not np.array_equal(other, first)


@pytest.mark.parametrize("kind", [EulerAncestralDiscreteScheduler, DPMSolverMultistepScheduler])
def test_noise_of_the_steps_depends_on_seed_and_stage(kind: Any) -> None:
    """Both: stage 1 of seed 0 draws other noise than stage 0 of seed 1, whose sums are the same."""
    options = {"algorithm_type": "sde-dpmsolver++"} if kind is DPMSolverMultistepScheduler else {}
    pipe = SimpleNamespace(
        unet=lambda latents, *_, **__: SimpleNamespace(sample=torch.zeros_like(latents)),
        vae=SimpleNamespace(config=_Config(block_out_channels=(1, 1))),
        scheduler=kind(**options),
    )
    pipe.unet.config, pipe.unet.device, pipe.unet.dtype = _Config(in_channels=4), "cpu", torch.float32
    prompt = stages._Prompt({"encoder_hidden_states": torch.zeros(1, 1, 1), "pooled": None}, None)

    def latents(seed: int, number: int) -> Tensor:
        return stages._run_stage(pipe, Stage(16, 16), None, (seed, number), prompt, 3, 1.0)

    def step_noise(seed: int, number: int) -> Tensor:
        """What the steps add: the starting noise is the same, whatever seed and stage."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stages, "draw_noise", lambda *_: torch.ones(1, 4, 8, 8))
            return latents(seed, number)

    draws = [step_noise(*of) for of in ((0, 1), (1, 0), (0, 0))]
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(draws, 2))
    assert torch.equal(draws[0], step_noise(0, 1))


def test_feed_forward_layers_take_some_tokens_at_a_time() -> None:
    unet = TinyPipeline().unet
    arguments = torch.randn(1, 4, 8, 12), torch.tensor(3), torch.randn(1, 4, 8)
    with torch.no_grad():
        whole = unet(*arguments).sample
        sizes: list[int] = []
        layer = unet.down_blocks[0].attentions[0].transformer_blocks[0].ff
        layer.net[0].register_forward_hook(lambda module, args, output: sizes.append(args[0].shape[1]))
        with chunked_feed_forward(unet, 40):
            torch.testing.assert_close(unet(*arguments).sample, whole, rtol=1e-5, atol=1e-5)
        assert sizes == [40, 40, 16]
        unet(*arguments)
    assert sizes[3:] == [96]


# -- decoding --------------------------------------------------------------------------------------------------------


@dataclass
class Enlarging:
    """An autoencoder whose pixels depend on their own latent alone, so that tiles change nothing."""

    config: Any = field(default_factory=lambda: _Config(scaling_factor=0.5, block_out_channels=(1, 1)))
    device: Any = "cpu"
    dtype: Any = torch.float32

    def decode(self, latents: Tensor) -> Any:
        return SimpleNamespace(sample=F.interpolate(latents[:, :3], scale_factor=2.0))


class _Config(dict):
    __getattr__ = dict.__getitem__


@pytest.mark.parametrize("height, width", [(8, 8), (TILE, TILE + 1), (150, 70)])
def test_tiles_join_to_the_whole(height: int, width: int) -> None:
    latents = torch.rand(1, 4, height, width) - 0.5
    rows = np.concatenate(list(decode_rows(Enlarging(), latents, 2)))
    expected = F.interpolate(latents[:, :3] / 0.5, scale_factor=2.0)[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(rows, np.clip(127.5 * expected + 128, 0, 255).astype(np.uint8), atol=1)


@pytest.mark.parametrize("extent", [1, OVERLAP, TILE - 1, TILE, TILE + 1, 100, 1024])
def test_spans_cover_a_side_and_share_the_overlap(extent: int) -> None:
    found = spans(extent)
    assert found[0][0] == 0 and found[-1][1] == extent
    assert all(end - start == OVERLAP for (_, end), (start, _) in itertools.pairwise(found))
    assert all(end - start > OVERLAP for start, end in found[1:])


def test_png_files_are_read_back(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (13, 7, 3), np.uint8)
    write_png(tmp_path / "a.png", iter([pixels[:5], pixels[5:6], pixels[6:]]), 13, 7)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), pixels)

    def breaks() -> Any:
        yield pixels
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError):
        write_png(tmp_path / "b.png", breaks(), 26, 7)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png"]


# -- memory ----------------------------------------------------------------------------------------------------------


def test_live_memory_counts_storages_while_they_live() -> None:
    def run() -> None:
        a = torch.zeros(1000)  # 4,000 bytes
        b = a[:500]  # shares them
        c = a + 1
        del a, b
        d = c * 2  # 8,000 live, 4,000 of them gone by now
        assert d.numel() + c.numel() == 2000

    memory = measure(run)
    assert memory.peak_bytes == 8000 and memory.largest == 1000 and memory.live_bytes == 0


def test_a_copy_on_meta_computes_the_same_shapes() -> None:
    unet = TinyPipeline().unet
    shadow = on_meta(unet)
    assert {p.device.type for p in shadow.parameters()} == {"meta"} and unet.device.type == "cpu"
    arguments = torch.zeros(1, 4, 32, 48), torch.zeros(()), torch.zeros(1, 4, 8)
    with torch.no_grad(), LiveMemory() as real:
        unet(*arguments)
    meta = measure(lambda: shadow(*(tensor.to("meta") for tensor in arguments)))
    assert meta.peak_bytes == pytest.approx(real.peak_bytes, rel=0.1)
    assert meta.largest == real.largest < (32 * 48) ** 2


@pytest.mark.slow
def test_4096_pixels_fit_the_memory_that_was_announced(tmp_path: Path) -> None:
    """End to end in a process of its own, with no tensor that grows with the square of the 262,144 tokens."""
    out, image = tmp_path / "highres.json", tmp_path / "large.png"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.highres", "--image", str(image), "--out", str(out)],
        capture_output=True, text=True, timeout=1500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert f"at most {found['announced_bytes'] / 1e9:.2f} GB" in done.stdout
    assert found["peak_bytes"] <= found["announced_bytes"] and found["largest_tensor_elements"] <= 512**2 * 256
    Image.MAX_IMAGE_PIXELS = None
    assert Image.open(io.BytesIO(image.read_bytes())).size == (4096, 4096)


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wanted, options, message",
    [
        ([], {}, "stages is empty"),
        ([(60, 64)], {}, "stage 1 of 60x64 pixels is not divisible by 16"),
        ([(0, 64)], {}, "stage 1 of 0x64 pixels is not divisible by 16"),
        ([(64, 64, 0.5)], {}, "has strength 0.5, but must have 1, since it starts from noise"),
        ([(64, 64), (128, 128)], {}, "stage 2 of 128x128 pixels has strength 1, but must have above 0 and below 1"),
        ([(64, 64)], {"prompt": " "}, "prompt is empty"),
        ([(64, 64)], {"prompt_embeds": torch.zeros(1, 4, 8)}, "guidance needs negative_prompt_embeds"),
    ],
)
def test_what_is_refused(tmp_path: Path, wanted: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate_highres(TinyPipeline(), **{"prompt": "x", **options}, stages=wanted, out=tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_a_pipeline_without_a_unet_and_latents_that_diverged(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a SimpleNamespace has no unet"):
        generate_highres(SimpleNamespace(), "x", [(64, 64)], out=tmp_path / "a.png")
    pipe = TinyPipeline()
    nn.init.constant_(pipe.unet.conv_out.bias, float("nan"))
    with pytest.raises(ValueError, match="the latents hold NaN"):
        draw(pipe, tmp_path / "a.png", [(64, 64)])
    assert not (tmp_path / "a.png").exists()
