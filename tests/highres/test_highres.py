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
from gspn_dit.highres.request import Prompt, Stage, encode
from gspn_dit.highres.stages import chunked_feed_forward, memory_bound
from tests.captioned import write_pipeline

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


def test_latents_of_another_request_are_not_taken_for_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings, scheduler, scans and LoRA count, not the texts alone."""
    peft = pytest.importorskip("peft", reason="LoRA needs peft")
    monkeypatch.setattr(stages, "memory_bound", lambda *_: 0)
    one, two = torch.zeros(1, 4, 8), torch.ones(1, 4, 8)
    found: list[set[str]] = [set()]

    def request(pipe: Any, positive: Tensor = one, negative: Tensor | None = two, scale: float = 2.0) -> int:
        """Draw, and return how many files of latents that added."""
        embeds = {"prompt_embeds": positive, "negative_prompt_embeds": negative}
        options = {"num_inference_steps": 1, "guidance_scale": scale, "work_dir": tmp_path / "stages"}
        generate_highres(pipe, stages=[(64, 64)], out=tmp_path / "a.png", **embeds, **options)
        found.append({path.name for path in (tmp_path / "stages").iterdir()})
        return len(found[-1] - found[-2])

    assert request(TinyPipeline()) == 1 and request(TinyPipeline()) == 0
    assert request(TinyPipeline(), positive=two) == 1
    assert request(TinyPipeline(), negative=one) == 1
    assert request(TinyPipeline(EulerDiscreteScheduler())) == 1
    assert request(TinyPipeline(DDIMScheduler(clip_sample=False, prediction_type="v_prediction"))) == 1
    windowed, trained, tuned = TinyPipeline(), TinyPipeline(), TinyPipeline()
    for layer in windowed.adapter.mixers:
        layer.mixer.window = 2
    assert request(windowed) == 1
    with torch.no_grad():
        trained.unet.conv_out.bias += 1e-3
    assert request(trained) == 1
    tuned.unet.add_adapter(peft.LoraConfig(target_modules=["attn2.to_q"], init_lora_weights=False), "a")
    assert request(tuned) == 1
    tuned.unet.set_adapters(["a"], [0.5])
    assert request(tuned) == 1 and request(TinyPipeline()) == 0


@pytest.mark.parametrize("negative", [None, "", "a dog"])
def test_prompts_are_encoded_as_diffusers_does(tmp_path: Path, negative: str | None) -> None:
    """SDXL without a negative prompt is guided by zeros, which are not the states of an empty one."""
    pytest.importorskip("transformers", reason="needs transformers (pip install 'gspn-dit[text]')")
    from diffusers import StableDiffusionXLPipeline

    pipe: Any = StableDiffusionXLPipeline.from_pretrained(write_pipeline(tmp_path / "sdxl", xl=True))
    encoded = encode(pipe, "a cat", negative, {"positive": None, "negative": None}, True)
    expected = pipe.encode_prompt("a cat", device="cpu", do_classifier_free_guidance=True, negative_prompt=negative)
    assert encoded.negative is not None
    for side, states, pooled in zip((encoded.positive, encoded.negative), expected[:2], expected[2:], strict=True):
        assert torch.equal(side["encoder_hidden_states"], states) and torch.equal(side["pooled"], pooled)
        assert not side["pooled"].requires_grad
    assert bool(encoded.negative["pooled"].any()) == (negative is not None)
    with pytest.raises(ValueError, match="prompt_embeds do not do for SDXL"):
        encode(pipe, None, None, {"positive": torch.zeros(1, 12, 16), "negative": None}, False)


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
    prompt = Prompt({"encoder_hidden_states": torch.zeros(1, 1, 1), "pooled": None}, None)

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


def tiny_half(force_upcast: bool) -> TinyPipeline:
    """A pipeline in float16 whose autoencoder, or not, decodes in float32."""
    pipe = TinyPipeline()
    pipe.vae.half().register_to_config(force_upcast=force_upcast)
    return pipe


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


def test_an_autoencoder_that_overflows_in_float16(tmp_path: Path) -> None:
    """It decodes in float32 where its config says so, is as it was afterwards, and else is an error, not a picture."""
    pipe, upcasting = TinyPipeline(), TinyPipeline()
    for each in (pipe, upcasting):
        with torch.no_grad():
            each.vae.decoder.conv_in.weight.mul_(3e5).clamp_(-6e4, 6e4)
        each.vae.half()
    pipe.vae.register_to_config(force_upcast=False)
    latents = 3 * torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"decodes to NaN or infinite values in torch\.float16; use it in float32"):
        write_png(tmp_path / "a.png", decode_rows(pipe.vae, latents, FACTOR), 64, 64)
    assert not list(tmp_path.iterdir())
    rows = np.concatenate(list(decode_rows(upcasting.vae, latents, FACTOR)))
    assert upcasting.vae.dtype == torch.float16
    assert np.array_equal(rows, np.concatenate(list(decode_rows(upcasting.vae.float(), latents, FACTOR))))
    side = {"encoder_hidden_states": torch.zeros(1, 4, 8), "pooled": None}
    more = [memory_bound(each, Stage(1024, 1024), side) for each in (tiny_half(True), tiny_half(False))]
    assert more[0] > more[1]


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
        ([(64,)], {}, r"stage 1 is \(64,\); give \(height, width\) or \(height, width, strength\)"),
        ([64, 64], {}, "stage 1 is 64; give"),
        ((64, 64), {}, "stage 1 is 64; give"),
        (64, {}, "stages is 64; give a list"),
        ([(64, 64, 1, 1)], {}, r"stage 1 is \(64, 64, 1, 1\); give"),
        ([(64, 64), (64, 128, "x")], {}, "stage 2 has strength 'x', but must have a number"),
        ([(64.5, 64)], {}, r"stage 1 is \(64\.5, 64\), but height and width must be whole numbers of pixels"),
        ([Stage(64, "64")], {}, "stage 1 is Stage.*, but height and width must be whole numbers"),
        ([(64, 64)], {"num_inference_steps": 0}, "num_inference_steps is 0, but must be a whole number of at least 1"),
        ([(64, 64)], {"num_inference_steps": 2.5}, r"num_inference_steps is 2\.5"),
        ([(64, 64)], {"guidance_scale": float("nan")}, "guidance_scale is nan, but must be a finite number"),
        ([(64, 64)], {"seed": 1.5}, r"seed is 1\.5, but must be a whole number"),
        ([(64, 64)], {"out": "{}"}, "out .* is a directory; give a file"),
        ([(64, 64)], {"out": "{}/x.jpg"}, r"x\.jpg: the image is a PNG; give a name that ends in \.png"),
        ([(64, 64)], {"out": "/dev/null/x.png"}, "cannot write the image: /dev/null/x.png cannot be created"),
        ([(64, 64)], {"work_dir": "/dev/null"}, "work_dir /dev/null is a file; give a directory"),
        ([(64, 64)], {"prompt": " "}, "prompt is empty"),
        ([(64, 64)], {"prompt": ["a cat"]}, r"prompt is \['a cat'\], but must be one text"),
        ([(64, 64)], {"prompt_embeds": torch.zeros(1, 4, 8)}, "guidance needs negative_prompt_embeds"),
    ],
)
def test_what_is_refused(tmp_path: Path, wanted: Any, options: dict[str, Any], message: str) -> None:
    options = {name: v.format(tmp_path) if isinstance(v, str) else v for name, v in options.items()}
    pipe = TinyPipeline()
    pipe.unet.forward = None  # nothing is drawn before it is refused
    with pytest.raises(ValueError, match=message):
        generate_highres(pipe, **{"prompt": "x", "out": tmp_path / "a.png", **options}, stages=wanted)
    assert not list(tmp_path.iterdir())


def test_a_pipeline_without_a_unet_and_latents_that_diverged(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a SimpleNamespace has no unet"):
        generate_highres(SimpleNamespace(), "x", [(64, 64)], out=tmp_path / "a.png")
    pipe = TinyPipeline()
    nn.init.constant_(pipe.unet.conv_out.bias, float("nan"))
    with pytest.raises(ValueError, match="the latents hold NaN"):
        draw(pipe, tmp_path / "a.png", [(64, 64)])
    assert not list(tmp_path.iterdir())  # nor are the latents kept
