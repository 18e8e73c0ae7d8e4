"""What users of diffusers expect of a pipeline: parts that can be swapped, dtypes, callbacks and forms of output."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from gspn_dit.config import Config, LatentConfig
from gspn_dit.data.latents import latent_from_spec
from gspn_dit.errors import UserError
from gspn_dit.models import create_model
from gspn_dit.pipeline import CHUNK, GSPNPipeline
from tests.data.tiny_vae import write_vae
from tests.tiny import SIZE, model_arguments, save_checkpoint, tiny_manifest, tiny_model, tiny_tensors, write_run


@pytest.fixture
def pipeline(tmp_path: Path) -> GSPNPipeline:
    return GSPNPipeline.from_checkpoint(write_run(tmp_path / "run"))


@pytest.fixture
def of_epsilon(tmp_path: Path) -> GSPNPipeline:
    """A pipeline whose model predicts epsilon and variances."""
    manifest, tensors = tiny_manifest(), tiny_tensors()
    manifest["config"]["objective"]["name"] = "epsilon"
    manifest["model"]["out_channels"] = 2
    for named in tensors.values():
        for name in ("output.linear.weight", "output.linear.bias"):
            named[name] = named[name].repeat_interleave(2, dim=0)
    save_checkpoint(tmp_path / "epsilon", 1, tensors, manifest)
    return GSPNPipeline.from_checkpoint(tmp_path / "epsilon")


def draw(pipeline: GSPNPipeline, labels: Any = (0, 1, 2), **options: Any) -> Any:
    return pipeline(labels, **{"num_inference_steps": 3, "output_type": "latent", **options}).images


# -- the scheduler ---------------------------------------------------------------------------------------------------


def test_the_scheduler_is_that_of_the_default_sampler(pipeline: GSPNPipeline, of_epsilon: GSPNPipeline) -> None:
    assert isinstance(pipeline.scheduler, diffusers.FlowMatchEulerDiscreteScheduler)
    assert isinstance(of_epsilon.scheduler, diffusers.DDPMScheduler)
    assert torch.equal(draw(pipeline), draw(pipeline, sampler="euler"))
    assert torch.equal(draw(of_epsilon), draw(of_epsilon, sampler="ddpm"))


def test_a_flow_scheduler_of_the_users_shifts_its_times(pipeline: GSPNPipeline) -> None:
    """By hand: Euler's steps on the times s·t / (1 + (s-1)·t) of t = 1, 2/3, 1/3."""
    pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config, shift=3.0)
    times = [3 * t / (1 + 2 * t) for t in (1, 2 / 3, 1 / 3)] + [0.0]
    states: list[Tensor] = []
    latents = draw(pipeline, callback_on_step_end=lambda _, step, time, tensors: states.append(tensors["latents"]))
    start = (
        states[0]
        - (times[1] - times[0])
        * pipeline.model(
            start_of := noise_of(pipeline), torch.full((CHUNK,), 1000.0), torch.tensor([0, 1, *[2] * (CHUNK - 2)])
        )[:3]
    )
    torch.testing.assert_close(start, start_of[:3], rtol=1e-4, atol=1e-4)
    assert torch.equal(states[-1], latents)
    assert not torch.allclose(latents, draw(pipeline, sampler="euler"))


def noise_of(pipeline: GSPNPipeline) -> Tensor:
    from gspn_dit.diffusion import draw_noise

    return draw_noise(0, range(CHUNK), (1, SIZE, SIZE))


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.DDIMScheduler,
        diffusers.DPMSolverMultistepScheduler,
        diffusers.EulerDiscreteScheduler,
        diffusers.EulerAncestralDiscreteScheduler,
        diffusers.DDPMScheduler,
    ],
)
def test_epsilon_takes_schedulers_made_from_its_config(scheduler: Any, of_epsilon: GSPNPipeline) -> None:
    """The variance stays with DDPM, and image i depends on seed and i alone, though the step draws."""
    of_epsilon.scheduler = scheduler.from_config(of_epsilon.scheduler.config)
    images = draw(of_epsilon)
    assert bool(images.isfinite().all())
    assert torch.equal(draw(of_epsilon, [4, 1])[1], images[1])
    assert not torch.equal(draw(of_epsilon, seed=1), images)


def test_sde_solvers_and_generators_draw_by_image(of_epsilon: GSPNPipeline) -> None:
    for scheduler, options in (
        (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
        (diffusers.EulerAncestralDiscreteScheduler, {}),
    ):
        of_epsilon.scheduler = scheduler.from_config(of_epsilon.scheduler.config, **options)
        torch.manual_seed(1)
        first = draw(of_epsilon, [0] * (CHUNK + 2))
        torch.manual_seed(2)
        torch.testing.assert_close(draw(of_epsilon, [0, 0], first_index=CHUNK), first[CHUNK:], rtol=1e-5, atol=1e-5)


def test_a_scheduler_of_another_prediction_is_refused(pipeline: GSPNPipeline, of_epsilon: GSPNPipeline) -> None:
    pipeline.scheduler, of_epsilon.scheduler = of_epsilon.scheduler, pipeline.scheduler
    with pytest.raises(ValueError, match="takes a prediction of type 'epsilon', but the model predicts 'flow_pred"):
        draw(pipeline)
    with pytest.raises(ValueError, match="takes a prediction of type 'flow_prediction', but the model predicts 'epsi"):
        draw(of_epsilon)


# -- the other parts -------------------------------------------------------------------------------------------------


def test_from_pipe_shares_what_is_not_replaced(pipeline: GSPNPipeline) -> None:
    other = GSPNPipeline.from_pipe(pipeline, model=tiny_model(5).eval())
    assert other.latent is pipeline.latent
    assert other.class_names == pipeline.class_names
    assert not torch.equal(draw(other), draw(pipeline))
    assert torch.equal(draw(GSPNPipeline.from_pipe(pipeline)), draw(pipeline))
    pipeline.model = other.model
    assert torch.equal(draw(other), draw(pipeline))


def test_the_guide_is_a_part_that_moves_along(pipeline: GSPNPipeline) -> None:
    plain = draw(pipeline, guidance_scale=2.0)
    pipeline.guide = tiny_model(5).eval()
    guided = draw(pipeline, guidance_scale=2.0)
    assert not torch.equal(guided, plain)
    assert torch.equal(draw(GSPNPipeline.from_pipe(pipeline), guidance_scale=2.0), guided)
    pipeline.to(torch.bfloat16)
    assert pipeline.guide.dtype == torch.bfloat16


def test_another_decoder_takes_the_autoencoders_place(tmp_path: Path) -> None:
    places = [str(write_vae(tmp_path / name, seed)) for seed, name in enumerate(("first", "second"))]
    spec = {"name": "kl", "vae": places[0], "image_size": 2 * SIZE}
    latent = latent_from_spec(spec)
    config = Config(latent=LatentConfig("kl", places[0])).to_dict()
    run = write_run(tmp_path / "run", channels=latent.channels, latent=latent.spec(), config=config)
    pipeline = GSPNPipeline.from_checkpoint(run)
    latents, images = draw(pipeline), draw(pipeline, output_type="np")
    other = diffusers.AutoencoderKL.from_pretrained(places[1]).eval()
    swapped = GSPNPipeline.from_pipe(pipeline, vae=other)
    assert torch.equal(draw(swapped), latents)
    assert not np.array_equal(draw(swapped, output_type="np"), images)
    np.testing.assert_array_equal(draw(pipeline, output_type="np"), images)  # whose own latent stays
    pipeline.vae = other
    np.testing.assert_array_equal(draw(pipeline, output_type="np"), draw(swapped, output_type="np"))
    half = pipeline.to(torch.bfloat16)
    assert half.vae.dtype == half.dtype == torch.bfloat16
    near = draw(half, output_type="np").astype(int) - draw(swapped, output_type="np")
    assert half.vae is other and np.abs(near).max() == 0  # one autoencoder, shared


def test_pixels_have_no_autoencoder(pipeline: GSPNPipeline) -> None:
    assert pipeline.vae is None
    with pytest.raises(ValueError, match="pixels have no autoencoder to replace"):
        pipeline.vae = object()


# -- saving what was replaced ----------------------------------------------------------------------------------------


def saved(pipeline: GSPNPipeline, directory: Path) -> GSPNPipeline:
    """The pipeline after a save and a load."""
    pipeline.save_pretrained(directory)
    return GSPNPipeline.from_pretrained(directory)


def refusal(pipeline: GSPNPipeline, directory: Path) -> str:
    """Why a pipeline is not saved: one line, and nothing is written."""
    with pytest.raises(ValueError) as caught:
        pipeline.save_pretrained(directory)
    assert not directory.exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_replaced_model_is_saved_with_its_own_manifest(pipeline: GSPNPipeline, tmp_path: Path) -> None:
    manifest = tiny_manifest(model={**model_arguments(), "depth": 4})
    weights = create_model(**manifest["model"]).state_dict()
    other = GSPNPipeline.from_checkpoint(save_checkpoint(tmp_path, 7, {"model": weights}, manifest), "model")
    replaced = GSPNPipeline.from_pipe(pipeline, model=other.model)
    pipeline.model = other.model
    for number, each in enumerate((pipeline, replaced)):
        again = saved(each, tmp_path / str(number))
        assert (again.weights, again.manifest["step"], again.manifest["model"]["depth"]) == ("model", 7, 4)
        assert torch.equal(draw(again), draw(other))


def test_every_way_to_share_parts_can_be_saved(pipeline: GSPNPipeline, tmp_path: Path) -> None:
    copied = GSPNPipeline.from_pipe(pipeline, model=copy.deepcopy(pipeline.model))
    for number, shared in enumerate((GSPNPipeline.from_pipe(pipeline), GSPNPipeline(**pipeline.components), copied)):
        assert (shared.manifest, shared.weights) == (pipeline.manifest, "ema")
        assert torch.equal(draw(saved(shared, tmp_path / str(number))), draw(pipeline))


def test_a_model_that_its_config_does_not_describe_is_not_saved(pipeline: GSPNPipeline, tmp_path: Path) -> None:
    origin = pipeline.model.origin
    pipeline.model = tiny_model(5).eval()
    assert "does not know the config of its model" in refusal(pipeline, tmp_path / "saved")
    pipeline.model.origin = origin
    assert torch.equal(draw(saved(pipeline, tmp_path / "same")), draw(pipeline))
    del pipeline.model.blocks[1]
    assert re.search(
        r"'blocks\.\d\..*' has shape None, its config asks for \[16", refusal(pipeline, tmp_path / "saved")
    )


@pytest.mark.parametrize(
    ("name", "scheduler", "options"),
    [
        ("pipeline", diffusers.FlowMatchEulerDiscreteScheduler, {"shift": 3.0}),
        ("pipeline", diffusers.FlowMatchHeunDiscreteScheduler, {}),
        ("of_epsilon", diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    ],
)
def test_a_replaced_scheduler_is_saved(
    name: str, scheduler: Any, options: dict[str, Any], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    pipe: GSPNPipeline = request.getfixturevalue(name)
    plain = draw(pipe)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **options)
    again = saved(pipe, tmp_path / "saved")
    assert type(again.scheduler) is scheduler
    assert torch.equal(draw(again), draw(pipe)) and not torch.equal(draw(again), plain)
    assert torch.equal(draw(saved(again, tmp_path / "twice")), draw(pipe))
    assert (tmp_path / "saved" / "scheduler" / "scheduler_config.json").is_file()
    default = GSPNPipeline.from_pipe(again, scheduler=None)
    assert torch.equal(draw(saved(default, tmp_path / "saved")), plain)  # over what was there


def test_a_scheduler_of_another_library_is_not_saved(pipeline: GSPNPipeline, tmp_path: Path) -> None:
    class Own(diffusers.FlowMatchEulerDiscreteScheduler):
        pass

    pipeline.scheduler = Own.from_config(pipeline.scheduler.config)
    assert re.search(r"only schedulers of diffusers are saved, not .*\.Own", refusal(pipeline, tmp_path / "saved"))


@pytest.mark.parametrize("config", [None, "{", "{}", '{"_class_name": "AutoencoderKL"}'])
def test_a_saved_scheduler_that_cannot_be_read(pipeline: GSPNPipeline, tmp_path: Path, config: str | None) -> None:
    pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config, shift=3.0)
    pipeline.save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "scheduler" / "scheduler_config.json"
    file.write_text(config) if config else file.unlink()
    with pytest.raises(UserError, match=r"the scheduler in .*/saved/scheduler cannot be read: ") as caught:
        GSPNPipeline.from_pretrained(tmp_path / "saved")
    assert "\n" not in str(caught.value)


def test_parts_that_a_checkpoint_cannot_hold(pipeline: GSPNPipeline, of_epsilon: GSPNPipeline, tmp_path: Path) -> None:
    pipeline.guide = tiny_model(5).eval()
    assert "set guide = None, and use guide_with after loading" in refusal(pipeline, tmp_path / "saved")
    pipeline.guide = None
    pipeline.objective = of_epsilon.objective
    assert "the objective is not the one that the model was trained with" in refusal(pipeline, tmp_path / "saved")


def test_replaced_class_names_are_saved(pipeline: GSPNPipeline, tmp_path: Path) -> None:
    pipeline.class_names = ["red", "green", "blue", "white", "black"]
    again = saved(pipeline, tmp_path / "saved")
    assert torch.equal(draw(again, ["blue"]), draw(pipeline, [2]))
    assert "2. blue" in (tmp_path / "saved" / "README.md").read_text()


# -- dtypes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 0.05), (torch.float64, 1e-4)])
def test_other_dtypes_stay_near_float32(pipeline: GSPNPipeline, dtype: torch.dtype, most: float) -> None:
    expected = draw(pipeline, guidance_scale=1.5)
    assert pipeline.to("cpu", dtype) is pipeline
    assert (pipeline.dtype, pipeline.model.dtype) == (dtype, dtype)
    latents = draw(pipeline, guidance_scale=1.5)
    assert latents.dtype == torch.float32
    error = (latents - expected).norm() / expected.norm()
    assert 0 < error < most
    assert torch.equal(draw(pipeline, [2, 1], guidance_scale=1.5)[1], latents[1])


def test_half_precision_keeps_the_stream_in_float32(pipeline: GSPNPipeline) -> None:
    seen: list[torch.dtype] = []
    for block in pipeline.to(torch.bfloat16).model.blocks:
        block.register_forward_hook(lambda _, arguments, output: seen.extend([arguments[0].dtype, output.dtype]))
    draw(pipeline, num_inference_steps=1)
    assert seen == [torch.float32] * (2 * len(pipeline.model.blocks))


def test_a_dtype_to_load_in(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    for loaded in (
        GSPNPipeline.from_checkpoint(run, dtype=torch.bfloat16),
        GSPNPipeline.from_pretrained(run, dtype=torch.bfloat16),
        GSPNPipeline.from_pretrained(run, torch_dtype=torch.bfloat16),
    ):
        assert loaded.dtype == torch.bfloat16
    loaded.save_pretrained(tmp_path / "saved")
    again = GSPNPipeline.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    assert torch.equal(draw(again), draw(loaded))


# -- callbacks and output --------------------------------------------------------------------------------------------


def test_a_callback_sees_each_step_and_can_change_the_latents(pipeline: GSPNPipeline) -> None:
    seen: list[tuple[int, float, tuple[int, ...]]] = []

    def halve_last(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        assert pipe is pipeline
        seen.append((step, round(float(timestep)), tuple(tensors["latents"].shape)))
        return {"latents": tensors["latents"] / 2} if step == 2 else {}

    labels = [0] * (CHUNK + 2)
    plain, halved = draw(pipeline, labels), draw(pipeline, labels, callback_on_step_end=halve_last)
    assert torch.equal(halved, plain / 2)
    shapes = [(count, 1, SIZE, SIZE) for count in (CHUNK, 2)]
    assert seen == [(step, time, shape) for shape in shapes for step, time in enumerate((1000, 667, 333))]


def test_a_callback_asks_for_tensors_that_are_there(pipeline: GSPNPipeline) -> None:
    seen: list[dict[str, Tensor]] = []

    def look(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> None:
        seen.append(tensors)

    draw(pipeline, callback_on_step_end=look, callback_on_step_end_tensor_inputs=[])
    assert seen == [{}] * 3
    with pytest.raises(ValueError, match=r"tensor_inputs is \['prompt_embeds'\], but can hold 'latents' alone"):
        draw(pipeline, callback_on_step_end=look, callback_on_step_end_tensor_inputs=["prompt_embeds"])


def test_tensors_are_the_same_images_in_zero_to_one(pipeline: GSPNPipeline) -> None:
    images, arrays = draw(pipeline, output_type="pt"), draw(pipeline, output_type="np")
    assert (images.shape, images.dtype) == ((3, 1, SIZE, SIZE), torch.float32)
    np.testing.assert_array_equal((255 * images).round().numpy().astype(np.uint8)[:, 0], arrays[..., 0])
    assert draw(pipeline, [], output_type="pt").shape == (0, 1, SIZE, SIZE)


def test_a_plain_tuple_on_request(pipeline: GSPNPipeline) -> None:
    (images,) = pipeline([0], num_inference_steps=1, output_type="latent", return_dict=False)
    assert torch.equal(images, draw(pipeline, [0], num_inference_steps=1))


def test_the_bar_takes_its_settings(pipeline: GSPNPipeline, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline.set_progress_bar_config(desc="images of beetles", disable=False)
    draw(pipeline)
    assert "images of beetles" in capsys.readouterr().err
