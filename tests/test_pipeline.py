"""The pipeline: which checkpoint it reads, and images that depend on (seed, index, label) and nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gspn_dit.checkpoint import checkpoint_directory
from gspn_dit.config import ObjectiveConfig
from gspn_dit.data.latents import to_uint8
from gspn_dit.diffusion import Guidance, create_objective, draw_noise, sample_latents
from gspn_dit.errors import UserError
from gspn_dit.pipeline import CHUNK, GSPNPipeline, resolve_class
from tests.tiny import CLASS_NAMES, SIZE, save_checkpoint, tiny_manifest, tiny_model, tiny_tensors, write_run


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def pipeline(run_directory: Path) -> GSPNPipeline:
    return GSPNPipeline.from_checkpoint(run_directory)


@pytest.fixture
def own_run(run_directory: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may damage."""
    return Path(shutil.copytree(run_directory, tmp_path / "run"))


def draw(pipeline: GSPNPipeline, labels: list[int] | list[str], **options: Any) -> np.ndarray:
    options = {"num_inference_steps": 2, "output_type": "np", **options}
    return pipeline(labels, **options).images


def refusal(checkpoint: Path, weights: str = "ema") -> str:
    with pytest.raises(UserError) as caught:
        GSPNPipeline.from_checkpoint(checkpoint, weights)
    return str(caught.value)


# -- what an image depends on ----------------------------------------------------------------------------------------


def test_an_image_does_not_depend_on_those_beside_it(pipeline: GSPNPipeline) -> None:
    among_three = draw(pipeline, [0, 1, 2])[1]
    assert among_three.std() > 0
    np.testing.assert_array_equal(draw(pipeline, [2, 1])[1], among_three)
    np.testing.assert_array_equal(draw(pipeline, [3, 1, *[0] * 70])[1], among_three)
    np.testing.assert_array_equal(draw(pipeline, [4, 1, 2], guidance_scale=1.0)[1], among_three)


def test_a_set_can_be_continued_by_chunks_bit_by_bit(pipeline: GSPNPipeline) -> None:
    labels = [index % 5 for index in range(CHUNK + 9)]
    whole = draw(pipeline, labels, guidance_scale=2.0)
    rest = draw(pipeline, labels[CHUNK:], guidance_scale=2.0, first_index=CHUNK)
    assert whole.shape == (CHUNK + 9, SIZE, SIZE, 1)
    np.testing.assert_array_equal(rest, whole[CHUNK:])


def test_first_index_moves_the_noise(pipeline: GSPNPipeline) -> None:
    whole = draw(pipeline, [2] * 6).astype(int)
    part = draw(pipeline, [2] * 3, first_index=3).astype(int)
    assert np.abs(part - whole[3:]).max() <= 1  # another place in the chunk may round differently
    assert np.abs(part - whole[:3]).max() > 10


def test_images_are_those_of_the_model_the_noise_and_the_guidance(pipeline: GSPNPipeline) -> None:
    """The whole path, put together by hand."""
    labels = [1, 3, 0]
    images = draw(pipeline, labels, num_inference_steps=3, guidance_scale=1.7, guidance_interval=(0.3, 0.9), seed=5)
    latents = sample_latents(
        tiny_model(0).eval(),
        create_objective(ObjectiveConfig()),
        draw_noise(5, range(3), (1, SIZE, SIZE)),
        torch.tensor(labels),
        len(CLASS_NAMES),
        3,
        Guidance(1.7, (0.3, 0.9)),
    )
    assert np.abs(images.astype(int) - to_uint8(latents).astype(int)).max() <= 1


def test_class_seed_steps_guidance_and_sampler_all_matter(pipeline: GSPNPipeline) -> None:
    plain = draw(pipeline, [0])
    for labels, options in (
        ([1], {}),
        ([0], {"seed": 1}),
        ([0], {"num_inference_steps": 5}),
        ([0], {"guidance_scale": 3.0}),
        ([0], {"sampler": "heun"}),
    ):
        assert not np.array_equal(draw(pipeline, labels, **options), plain), (labels, options)
    np.testing.assert_array_equal(draw(pipeline, [0], sampler="euler", seed=0), plain)
    outside = draw(pipeline, [0], guidance_scale=3.0, guidance_interval=(0.7, 0.8))  # no step at t = 1 or 0.5
    np.testing.assert_array_equal(outside, plain)


def test_global_random_state_plays_no_part(pipeline: GSPNPipeline) -> None:
    torch.manual_seed(1)
    first = draw(pipeline, [0, 1])
    torch.manual_seed(2)
    np.testing.assert_array_equal(draw(pipeline, [0, 1]), first)


@pytest.mark.parametrize("count", [1, CHUNK, CHUNK + 1])
def test_the_model_always_sees_whole_chunks_and_the_null_label(pipeline: GSPNPipeline, count: int) -> None:
    calls: list[list[int]] = []
    hook = pipeline.model.register_forward_pre_hook(lambda module, args: calls.append(args[2].tolist()))
    draw(pipeline, [3] * count, num_inference_steps=1, guidance_scale=2.0)
    hook.remove()
    assert calls == [[3] * CHUNK + [len(CLASS_NAMES)] * CHUNK] * -(-count // CHUNK)


# -- the call's surface ----------------------------------------------------------------------------------------------


def test_names_and_ids_mean_the_same(pipeline: GSPNPipeline) -> None:
    assert pipeline.class_ids(["cat", "0", 3, "10"]) == [2, 0, 3, 4]
    np.testing.assert_array_equal(draw(pipeline, ["bee"]), draw(pipeline, [1]))


def test_pil_images_hold_the_same_pixels(pipeline: GSPNPipeline, tmp_path: Path) -> None:
    arrays, images = draw(pipeline, [0, 1]), draw(pipeline, [0, 1], output_type="pil")
    assert [image.mode for image in images] == ["L", "L"]
    np.testing.assert_array_equal(np.stack([np.asarray(image) for image in images]), arrays[..., 0])
    colour = GSPNPipeline.from_checkpoint(write_run(tmp_path, channels=3))
    arrays, images = draw(colour, [0]), draw(colour, [0], output_type="pil")
    assert (arrays.shape, images[0].mode) == ((1, SIZE, SIZE, 3), "RGB")
    np.testing.assert_array_equal(np.asarray(images[0]), arrays[0])


def test_no_labels_no_images(pipeline: GSPNPipeline) -> None:
    assert draw(pipeline, []).shape == (0, SIZE, SIZE, 1)
    assert draw(pipeline, [], output_type="pil") == []


def test_on_chunk_counts_images_done(pipeline: GSPNPipeline) -> None:
    done: list[int] = []
    draw(pipeline, [0] * (2 * CHUNK + 3), num_inference_steps=1, on_chunk=done.append)
    assert done == [CHUNK, 2 * CHUNK, 2 * CHUNK + 3]


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (5, "class 5 is out of range; the model has classes 0-4"),
        (-1, "class -1 is out of range; the model has classes 0-4"),
        ("5", "class 5 is out of range"),
        ("-1", "class -1 is out of range"),
        ("caat", "unknown class 'caat'; did you mean 'cat'?; classes are 0-4: ant, bee, cat, dog, 10"),
        ("", "unknown class ''; classes are 0-4"),
        ("--1", "unknown class '--1'"),
        ("²", "unknown class '²'"),
        ("1.0", "unknown class '1.0'"),
    ],
)
def test_unknown_class(pipeline: GSPNPipeline, label: int | str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        pipeline([label])
    assert message in str(caught.value)


def test_a_name_made_of_digits_beats_the_number() -> None:
    names = ["5", "10", "0"]
    assert [resolve_class(label, names) for label in ("0", "10", "5", "1", 0, 1)] == [2, 1, 0, 1, 0, 1]


def test_only_the_first_of_many_classes_are_listed() -> None:
    with pytest.raises(UserError, match=r"classes are 0-999: c0, c1, .*c19, …$"):
        resolve_class("zzz", [f"c{index}" for index in range(1000)])


def test_unknown_sampler_and_values_out_of_range(pipeline: GSPNPipeline) -> None:
    with pytest.raises(UserError, match="unknown sampler 'ddim'; allowed are euler, heun"):
        draw(pipeline, [0], sampler="ddim")
    with pytest.raises(ValueError, match="num_inference_steps is 0, but must be at least 1"):
        draw(pipeline, [0], num_inference_steps=0)
    with pytest.raises(ValueError, match="guidance scale is -1"):
        draw(pipeline, [0], guidance_scale=-1)


def test_weights_that_diverged_are_refused(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    tensors["ema"]["output.linear.bias"][0] = float("nan")
    save_checkpoint(tmp_path, 1, tensors, tiny_manifest())
    with pytest.raises(UserError, match="samples hold NaN or infinite values: the weights have diverged"):
        draw(GSPNPipeline.from_checkpoint(tmp_path), [0])
    assert draw(GSPNPipeline.from_checkpoint(tmp_path, "model"), [0]).shape == (1, SIZE, SIZE, 1)


def test_one_label_will_do(pipeline: GSPNPipeline) -> None:
    np.testing.assert_array_equal(draw(pipeline, "bee"), draw(pipeline, [1]))  # type: ignore[arg-type]
    np.testing.assert_array_equal(draw(pipeline, 1), draw(pipeline, [1]))  # type: ignore[arg-type]


def test_a_generator_draws_the_seed(pipeline: GSPNPipeline) -> None:
    generator = torch.Generator().manual_seed(3)
    first, second = (draw(pipeline, [0], generator=generator) for _ in range(2))
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(draw(pipeline, [0], generator=torch.Generator().manual_seed(3)), first)
    seed = int(torch.randint(2**63 - 1, (), generator=torch.Generator().manual_seed(3)))
    np.testing.assert_array_equal(draw(pipeline, [0], seed=seed), first)
    with pytest.raises(ValueError, match="seed and generator exclude each other"):
        draw(pipeline, [0], seed=3, generator=generator)
    with pytest.raises(ValueError, match="generator is a list, but must be one"):
        draw(pipeline, [0, 1], generator=[generator, generator])


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, "3"])
def test_a_seed_is_a_whole_number_of_63_bits(pipeline: GSPNPipeline, seed: object) -> None:
    with pytest.raises(ValueError, match=rf"seed is {seed!r}, but must be a whole number in \[0, 2\^63\)"):
        draw(pipeline, [0], seed=seed)
    np.testing.assert_array_equal(draw(pipeline, [0], seed=np.int64(3)), draw(pipeline, [0], seed=3))


def test_any_resolution(pipeline: GSPNPipeline) -> None:
    wide = draw(pipeline, [0, 1], height=2 * SIZE, width=3 * SIZE)
    assert wide.shape == (2, 2 * SIZE, 3 * SIZE, 1)
    latents = sample_latents(
        tiny_model(0).eval(),
        create_objective(ObjectiveConfig()),
        draw_noise(0, range(2), (1, 2 * SIZE, 3 * SIZE)),
        torch.tensor([0, 1]),
        len(CLASS_NAMES),
        2,
    )
    assert np.abs(wide.astype(int) - to_uint8(latents).astype(int)).max() <= 1
    np.testing.assert_array_equal(draw(pipeline, [0], height=SIZE, width=SIZE), draw(pipeline, [0]))
    assert draw(pipeline, [], height=2).shape == (0, 2, SIZE, 1)


@pytest.mark.parametrize("side", [0, -2, 5])
def test_resolutions_that_cannot_be(pipeline: GSPNPipeline, side: int) -> None:
    with pytest.raises(ValueError, match=f"width is {side} pixels, but must be a positive multiple of 2"):
        draw(pipeline, [0], width=side)


def test_the_factor_of_the_latent_counts(pipeline: GSPNPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.latent, "factor", 8)
    assert draw(pipeline, [0]).shape == (1, SIZE, SIZE, 1)  # this latent decodes to pixels one by one
    assert draw(pipeline, [0], height=48).shape == (1, 6, SIZE, 1)
    with pytest.raises(ValueError, match="height is 40 pixels, but must be a positive multiple of 16"):
        draw(pipeline, [0], height=40)


def test_the_progress_bar_counts_model_calls(pipeline: GSPNPipeline, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline.set_progress_bar_config(disable=False)
    draw(pipeline, [0] * (CHUNK + 1), num_inference_steps=3)
    assert "6/6" in capsys.readouterr().err
    draw(pipeline, [0], num_inference_steps=3, sampler="heun")
    assert "5/5" in capsys.readouterr().err
    pipeline.set_progress_bar_config(disable=True)
    draw(pipeline, [0])
    assert capsys.readouterr().err == ""


def test_labels_may_be_integers_of_numpy_but_no_fractions(pipeline: GSPNPipeline) -> None:
    np.testing.assert_array_equal(draw(pipeline, np.int64(1)), draw(pipeline, [1]))
    with pytest.raises(UserError, match=r"class 0\.7 is neither an id nor a name"):
        draw(pipeline, [0.7])


def test_latents_decode_to_the_same_images(pipeline: GSPNPipeline) -> None:
    labels = [0, 1] * 35  # a whole chunk and a part of one
    latents = draw(pipeline, labels, output_type="latent")
    assert latents.shape == (70, pipeline.latent.channels, pipeline.latent.size, pipeline.latent.size)
    np.testing.assert_array_equal(pipeline.decode(latents), draw(pipeline, labels))
    assert len(draw(pipeline, [], output_type="latent")) == len(pipeline.decode(latents[:0])) == 0


def test_an_unknown_output_type(pipeline: GSPNPipeline) -> None:
    with pytest.raises(ValueError, match="output_type is 'jpeg', but must be 'pil', 'np', 'pt' or 'latent'"):
        draw(pipeline, [0], output_type="jpeg")


def test_guided_channels(tmp_path: Path) -> None:
    """Channels that are not guided come out as without guidance after one step; those that are do not."""
    colour = GSPNPipeline.from_checkpoint(write_run(tmp_path, channels=3))
    plain = draw(colour, [0, 1], num_inference_steps=1)
    guided = draw(colour, [0, 1], num_inference_steps=1, guidance_scale=3.0)
    first = draw(colour, [0, 1], num_inference_steps=1, guidance_scale=3.0, guidance_channels=1)
    np.testing.assert_array_equal(first[..., :1], guided[..., :1])
    assert np.abs(first[..., 1:].astype(int) - plain[..., 1:]).max() <= 1  # another batch size may round differently
    assert np.abs(guided[..., 1:].astype(int) - plain[..., 1:]).max() > 10


def test_a_stochastic_sampler_depends_on_seed_and_index_alone(tmp_path: Path) -> None:
    manifest, tensors = tiny_manifest(), tiny_tensors()
    manifest["config"]["objective"]["name"] = "epsilon"
    manifest["model"]["out_channels"] = 2
    for named in tensors.values():
        for name in ("output.linear.weight", "output.linear.bias"):
            named[name] = named[name].repeat_interleave(2, dim=0)
    save_checkpoint(tmp_path, 1, tensors, manifest)
    stochastic = GSPNPipeline.from_checkpoint(tmp_path)
    labels = [index % 5 for index in range(CHUNK + 3)]
    whole = draw(stochastic, labels, num_inference_steps=4, sampler="ddpm")
    np.testing.assert_array_equal(draw(stochastic, labels[:2], num_inference_steps=4), whole[:2])
    rest = draw(stochastic, labels[CHUNK:], num_inference_steps=4, first_index=CHUNK)
    np.testing.assert_array_equal(rest, whole[CHUNK:])
    assert not np.array_equal(draw(stochastic, labels[:2], num_inference_steps=4, seed=1), whole[:2])


IMAGENET = ["tench, Tinca tinca", "goldfish, Carassius auratus", "crane", "crane, lifting device", "golden retriever"]


def test_synonyms_name_a_class() -> None:
    labels = ["tench, Tinca tinca", "tench", "Carassius auratus", "crane", "lifting device", "golden retriever"]
    assert [resolve_class(label, IMAGENET) for label in labels] == [0, 0, 1, 2, 3, 4]
    with pytest.raises(UserError, match="class 'crane' is ambiguous: 0, 1 have that name; give the id"):
        resolve_class("crane", ["crane, bird", "crane, device"])
    with pytest.raises(UserError, match="unknown class 'golden'"):
        resolve_class("golden", IMAGENET)


# -- what is read ----------------------------------------------------------------------------------------------------


def test_reads_the_weights_that_are_asked_for(run_directory: Path) -> None:
    for weights, seed in (("ema", 0), ("model", 1)):
        loaded = GSPNPipeline.from_checkpoint(run_directory, weights).model.state_dict()
        for name, tensor in tiny_model(seed).state_dict().items():
            assert torch.equal(loaded[name], tensor), name


def test_ema_is_the_default_and_differs_from_the_model(run_directory: Path, pipeline: GSPNPipeline) -> None:
    other = GSPNPipeline.from_checkpoint(run_directory, "model")
    assert np.abs(draw(other, [0]).astype(int) - draw(pipeline, [0])).max() > 10
    np.testing.assert_array_equal(draw(GSPNPipeline.from_checkpoint(run_directory, "ema"), [0]), draw(pipeline, [0]))


def test_the_model_is_ready_to_sample(pipeline: GSPNPipeline) -> None:
    assert not pipeline.model.training
    assert not any(parameter.requires_grad for parameter in pipeline.model.parameters())
    assert pipeline.class_names == CLASS_NAMES
    assert pipeline.device == torch.device("cpu")


def test_a_run_means_its_newest_checkpoint_by_number(own_run: Path) -> None:
    # Written later, but fewer steps; and more digits than eight sort after fewer.
    write_run(own_run, step=99, seed=10)
    write_run(own_run, step=123_456_789, seed=20)
    write_run(own_run, step=99_999_999, seed=30)
    loaded = GSPNPipeline.from_checkpoint(own_run).model.state_dict()
    assert torch.equal(loaded["patch_embed.weight"], tiny_model(20).patch_embed.weight)
    one = GSPNPipeline.from_checkpoint(checkpoint_directory(own_run, 99)).model.state_dict()
    assert torch.equal(one["patch_embed.weight"], tiny_model(10).patch_embed.weight)


def leave_manifest_out(checkpoint: Path) -> None:
    (checkpoint / "config.json").unlink()


def cut_manifest(checkpoint: Path) -> None:
    path = checkpoint / "config.json"
    path.write_bytes(path.read_bytes()[:-20])


def leave_weights_out(checkpoint: Path) -> None:
    (checkpoint / "ema.safetensors").unlink()


def cut_weights(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def raise_version(checkpoint: Path) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 99}))


def replace_by_a_file(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.write_text("not a directory", encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (leave_manifest_out, "it has no config.json"),
        (cut_manifest, "its config.json cannot be read"),
        (leave_weights_out, "its file ema.safetensors is missing"),
        (cut_weights, "its file model.safetensors has "),
        (raise_version, "it has format_version 99, this version reads 1"),
        (replace_by_a_file, "does not exist; give a run directory or one of its checkpoints"),
    ],
)
def test_an_incomplete_checkpoint_is_passed_over_in_a_run_and_refused_by_itself(
    own_run: Path, damage: Callable[[Path], None], problem: str
) -> None:
    write_run(own_run, step=200, seed=10)
    newest = checkpoint_directory(own_run, 200)
    damage(newest)
    loaded = GSPNPipeline.from_checkpoint(own_run).model.state_dict()
    assert torch.equal(loaded["patch_embed.weight"], tiny_model(0).patch_embed.weight)
    message = refusal(newest)
    assert str(newest) in message
    assert problem in message


def test_what_a_killed_save_leaves_behind_is_passed_over(own_run: Path) -> None:
    checkpoint = checkpoint_directory(own_run, 100)
    shutil.copytree(checkpoint, checkpoint.with_name("step-00000300.partial"))
    assert GSPNPipeline.from_checkpoint(own_run).model.state_dict().keys() == tiny_model(0).state_dict().keys()
    shutil.rmtree(checkpoint)
    assert refusal(own_run) == f"{own_run} has no complete checkpoint yet; train it with train.py --resume auto"


def test_missing_checkpoint(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    assert refusal(missing).startswith(f"checkpoint {missing} does not exist; give a run directory or one of its")
    assert refusal(tmp_path) == f"{tmp_path} is not a complete checkpoint: it has no config.json"


def test_damaged_weights_of_the_right_size(own_run: Path) -> None:
    path = checkpoint_directory(own_run, 100) / "ema.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert refusal(own_run).startswith(f"{path} is damaged")


def test_weights_that_a_checkpoint_does_not_have(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    save_checkpoint(tmp_path, 1, {"model": tensors["model"]}, tiny_manifest())
    assert "ema.safetensors cannot be read" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"hidden_size": 32},
            "'blocks.0.gate_conv.weight' has shape [16, 1, 3, 3], its config.json asks for [32, 1, 3, 3]",
        ),
        ({"num_classes": 6}, "'class_embed.weight' has shape [6, 16], its config.json asks for [7, 16]"),
        ({"depth": 4}, "tensor 'blocks.3.gate_conv.weight' is not in its ema.safetensors"),
        ({"name": "GSPN-M/2"}, "its config.json: unknown model 'GSPN-M/2'"),
        ({"colour": 3}, "its config.json: unknown model option 'colour'"),
        ({"depth": 3}, "its config.json: depth is 3"),
    ],
)
def test_weights_of_another_model_say_what_differs(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    manifest = tiny_manifest()
    save_checkpoint(tmp_path, 1, tiny_tensors(), {**manifest, "model": {**manifest["model"], **change}})
    refused = refusal(tmp_path)
    assert message in refused
    assert str(checkpoint_directory(tmp_path, 1)) in refused


def test_a_tensor_too_many_is_named(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    tensors["ema"]["surprise"] = torch.zeros(1)
    save_checkpoint(tmp_path, 1, tensors, tiny_manifest())
    assert "belongs to another model: tensor 'surprise' is only in its ema.safetensors" in refusal(tmp_path)


@pytest.mark.parametrize("entry", ["model", "latent", "class_names", "config"])
def test_a_manifest_without_an_entry_names_it(tmp_path: Path, entry: str) -> None:
    write_run(tmp_path, **{entry: None})
    assert f"its config.json has no '{entry}'" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("model", 3, "its config.json"),
        ("latent", {"name": "magic"}, "latent 'magic' is not known"),
        ("config", {"bogus": 1}, "bogus"),
    ],
)
def test_a_manifest_of_another_kind(tmp_path: Path, entry: str, value: Any, message: str) -> None:
    write_run(tmp_path, **{entry: value})
    assert message in refusal(tmp_path)


def test_a_size_that_is_a_list_is_read(tmp_path: Path) -> None:
    """JSON has no tuples: a height and width come back as a list."""
    manifest = tiny_manifest()
    manifest["model"]["latent_size"] = [SIZE, SIZE]
    save_checkpoint(tmp_path, 1, tiny_tensors(), manifest)
    assert draw(GSPNPipeline.from_checkpoint(tmp_path), [0]).shape == (1, SIZE, SIZE, 1)
