"""Published weights: equal outputs to diffusers' model, both layouts, the checkpoint that is written, refusals."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gspn_dit import checkpoint
from gspn_dit.diffusion import Guidance
from gspn_dit.errors import UserError
from gspn_dit.importers import convert
from gspn_dit.importers.layouts import LAYOUTS, convert_weights
from gspn_dit.models import create_model
from gspn_dit.pipeline import GSPNPipeline
from tests.importers.published import CLASSES, DEPTH, HEADS, SIZE, WIDTH, diffusers_dit, original_layout

Convert = Callable[..., Path]


@pytest.fixture(scope="module")
def theirs() -> Any:
    return diffusers_dit()


@pytest.fixture
def run(tmp_path: Path) -> Convert:
    """Run the command line on weights (saved to a file if they are tensors) and return the checkpoint."""

    def run(layout: str, weights: Any, *options: str) -> Path:
        if not isinstance(weights, Path):
            torch.save(weights, tmp_path / "weights.pt")
            weights = tmp_path / "weights.pt"
        arguments = ["--from", layout, "--weights", str(weights), "--out", str(tmp_path / "converted"), *options]
        return convert.convert(convert.parse_arguments(arguments))

    return run


def load(directory: Path, weights: str = "ema") -> Any:
    """The model of a checkpoint, as the pipeline builds it, without the latent."""
    manifest = checkpoint.read_manifest(checkpoint.resolve_checkpoint(directory))
    model = create_model(**manifest["model"]).eval()
    model.load_state_dict(checkpoint.load_tensors(directory, weights))
    return model


@torch.no_grad()
def outputs(ours: Any, theirs: Any, size: int = SIZE) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(4, 4, size, size, generator=generator)
    timesteps, labels = torch.tensor([0.0, 17.0, 500.0, 999.0]), torch.tensor([0, 2, 4, CLASSES])
    return ours(latents, timesteps, labels), theirs(latents, timesteps, labels).sample


# -- equal outputs ---------------------------------------------------------------------------------------------------


def assert_equal(ours: Any, theirs: Any, size: int = SIZE) -> None:
    output, expected = outputs(ours, theirs, size)
    assert expected.abs().mean() > 0.3
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


def test_equals_diffusers_model(theirs: Any, run: Convert) -> None:
    assert_equal(load(run("diffusers", theirs.state_dict(), "--heads", "2", "--image-size", "64")), theirs)


@torch.no_grad()
def test_equals_diffusers_model_with_guidance(theirs: Any, run: Convert) -> None:
    """As diffusers' DiT pipeline does it: both halves in one batch, noise guided, variance of the conditional half."""
    ours = load(run("diffusers", theirs.state_dict(), "--heads", "2", "--image-size", "64"))
    latents = torch.randn(2, 4, SIZE, SIZE, generator=torch.Generator().manual_seed(2)).repeat(2, 1, 1, 1)
    timesteps, labels = torch.full((4,), 321.0), torch.tensor([1, 3, CLASSES, CLASSES])
    noise, variance = ours(latents, timesteps, labels).chunk(2, dim=1)
    guided = Guidance(4.0).combine(*noise.chunk(2))
    expected = theirs(latents, timesteps, labels).sample
    conditional, unconditional = expected[:, :4].chunk(2)
    torch.testing.assert_close(guided, unconditional + 4 * (conditional - unconditional), rtol=0, atol=5e-5)
    torch.testing.assert_close(variance[:2], expected[:2, 4:], rtol=0, atol=1e-5)


def test_interpolated_positions_equal_diffusers_at_another_size(theirs: Any, run: Convert) -> None:
    ours = load(run("diffusers", theirs.state_dict(), "--heads", "2", "--image-size", "64"))
    ours.interpolate_positions = True
    assert_equal(ours, theirs, 2 * SIZE)


def test_original_layout_equals_the_same_weights_in_diffusers(run: Convert) -> None:
    theirs = diffusers_dit(norm_eps=1e-6)
    state = original_layout(theirs)
    assert_equal(load(run("dit", state, "--heads", "2", "--timestep-frequencies", "diffusers")), theirs)


def test_the_original_code_spaces_frequencies_otherwise(run: Convert) -> None:
    """By default its weights get its frequencies, 10000^(-i/128), by which outputs differ clearly from diffusers'."""
    theirs = diffusers_dit(norm_eps=1e-6)
    ours = load(run("dit", original_layout(theirs), "--heads", "2"))
    output, expected = outputs(ours, theirs)
    torch.testing.assert_close(output[0], expected[0], rtol=0, atol=1e-5)  # at timestep 0 all frequencies are one
    assert (output[3] - expected[3]).abs().max() > 1e-2

    with torch.no_grad():  # at 999, against the formula
        angles = 999 * 10_000.0 ** (-torch.arange(128) / 128)
        module = theirs.transformer_blocks[0].norm1.emb.timestep_embedder
        embedded = module(torch.cat([angles.cos(), angles.sin()])[None])
        torch.testing.assert_close(ours.timestep_embed(torch.tensor([999.0])), embedded, rtol=0, atol=1e-4)


def test_both_layouts_name_every_tensor_of_the_model_once() -> None:
    with torch.device("meta"):
        names = list(create_model("DiT-N/2", 5, 4, 8, 8, depth=2).state_dict())
    for layout in LAYOUTS.values():
        sources = layout.sources(2)
        assert sorted(sources) == sorted(names)
        used = [name for group in sources.values() for name in group]
        assert len(used) == len(set(used))


# -- the checkpoint --------------------------------------------------------------------------------------------------


def test_what_is_written(theirs: Any, run: Convert) -> None:
    directory = run("dit", original_layout(theirs), "--heads", "2", "--vae", "some/vae")
    assert sorted(path.name for path in directory.iterdir()) == ["config.json", "ema.safetensors", "model.safetensors"]
    manifest = json.loads((directory / "config.json").read_text())
    assert manifest["format_version"] == checkpoint.FORMAT_VERSION
    assert manifest["model"] == {
        "name": "DiT-S/2",
        "hidden_size": WIDTH,
        "depth": DEPTH,
        "num_heads": HEADS,
        "num_classes": CLASSES,
        "latent_channels": 4,
        "latent_size": SIZE,
        "out_channels": 8,
    }
    assert manifest["latent"] == {"name": "kl", "vae": "some/vae", "image_size": 64, "image_channels": 3}
    assert manifest["class_names"] == ["0", "1", "2", "3", "4"]
    assert manifest["config"]["objective"]["name"] == "epsilon"
    for stem in ("ema", "model"):
        assert set(checkpoint.load_tensors(directory, stem)) == set(load(directory).state_dict())


def test_a_pipeline_draws_images_from_pixel_weights(tmp_path: Path, run: Convert) -> None:
    names = tmp_path / "names.txt"
    names.write_text("\ufeffant\nbee\ncat\ndog\neel\n", encoding="utf-8")  # some editors begin with a mark
    state = original_layout(diffusers_dit(in_channels=1, out_channels=2))
    directory = run("dit", state, "--heads", "2", "--class-names", str(names))
    pipeline = GSPNPipeline.from_checkpoint(directory)
    assert pipeline.class_names[0] == "ant"
    images = pipeline(["cat"], num_inference_steps=2, sampler="ddim", output_type="np").images
    assert images.shape == (1, SIZE, SIZE, 1)
    assert len(set(images.flatten().tolist())) > 1


def test_a_pipeline_draws_images_through_an_autoencoder(tmp_path: Path, theirs: Any, run: Convert) -> None:
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    sizes = {"block_out_channels": [4, 4], "norm_num_groups": 2, "layers_per_block": 1}
    AutoencoderKL(**blocks, **sizes, scaling_factor=0.5).save_pretrained(tmp_path / "vae")
    directory = run("dit", original_layout(theirs), "--heads", "2", "--vae", str(tmp_path / "vae"))
    pipeline = GSPNPipeline.from_checkpoint(directory)
    assert pipeline.latent.spec()["scale"] == 0.5
    images = pipeline([1], num_inference_steps=2, sampler="ddim", guidance_scale=1.5, output_type="np").images
    assert images.shape == (1, 2 * SIZE, 2 * SIZE, 3)


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("folder", ["", "transformer"])
def test_directories_that_diffusers_saved(tmp_path: Path, theirs: Any, run: Convert, safe: bool, folder: str) -> None:
    saved = tmp_path / "saved"
    if safe:
        theirs.save_pretrained(saved / folder)
    else:  # as older releases of diffusers did
        theirs.save_config(saved / folder)
        torch.save(theirs.state_dict(), saved / folder / "diffusion_pytorch_model.bin")
    directory = run("diffusers", saved)
    assert checkpoint.read_manifest(directory)["model"]["num_heads"] == HEADS  # from config.json
    assert_equal(load(directory), theirs)


def test_epsilon_of_the_norm_comes_from_config_json(tmp_path: Path, run: Convert) -> None:
    theirs = diffusers_dit(norm_eps=1e-2)
    theirs.save_pretrained(tmp_path / "saved")
    assert_equal(load(run("diffusers", tmp_path / "saved")), theirs)


def test_a_training_checkpoint_gives_its_average(theirs: Any, run: Convert) -> None:
    state = original_layout(theirs)
    other = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    nested = {"model": other, "ema": state, "opt": {"step": 3}, "args": argparse.Namespace(lr=1e-4)}
    weights = load(run("dit", nested, "--heads", "2")).state_dict()
    assert torch.equal(weights["blocks.0.expand.bias"], state["blocks.0.mlp.fc1.bias"])


def test_half_precision_weights_become_float32(theirs: Any, run: Convert) -> None:
    state = {name: tensor.half() for name, tensor in original_layout(theirs).items()}
    assert {tensor.dtype for tensor in load(run("dit", state, "--heads", "2")).state_dict().values()} == {torch.float32}


def test_names_of_imagenet() -> None:
    names = convert.class_names(argparse.Namespace(class_names=None), 1000)
    assert len(set(names)) == 1000
    assert (names[0], names[207], names[999]) == ("tench", "golden retriever", "toilet tissue")


def test_a_published_size_needs_no_options() -> None:
    """Shapes of DiT-XL/2 at 256 pixels, without its values."""
    with torch.device("meta"):
        shapes = create_model("DiT-XL/2", 1000, 4, 32, 8).state_dict()
    layout = LAYOUTS["dit"]
    state = {names[0]: shapes[ours] for ours, names in layout.sources(28).items()}
    state["x_embedder.proj.weight"] = state["x_embedder.proj.weight"].unflatten(1, (4, 2, 2))
    _, shape = convert_weights(state, "dit")
    options = convert.parse_arguments(["--from", "dit", "--weights", "w", "--out", "o", "--image-size", "256"])
    arguments = convert.model_arguments(options, shape, None, {})
    assert arguments == {
        "name": "DiT-XL/2",
        "num_classes": 1000,
        "latent_channels": 4,
        "latent_size": 32,
        "out_channels": 8,
    }
    vae = {"name": "kl", "vae": "stabilityai/sd-vae-ft-mse", "image_size": 256, "image_channels": 3}
    assert convert.latent_spec(options, arguments) == vae


def test_a_local_autoencoder_tells_its_factor(tmp_path: Path, theirs: Any, run: Convert) -> None:
    facts = {"block_out_channels": [8, 16, 16], "in_channels": 1, "latent_channels": 4}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    directory = run("dit", original_layout(theirs), "--heads", "2", "--vae", str(tmp_path))
    latent = checkpoint.read_manifest(directory)["latent"]
    assert latent == {"name": "kl", "vae": str(tmp_path.resolve()), "image_size": 4 * SIZE, "image_channels": 1}


# -- refusals --------------------------------------------------------------------------------------------------------


def refusal(run: Convert, *arguments: Any) -> str:
    with pytest.raises(UserError) as caught:
        run(*arguments)
    return " ".join(str(caught.value).split())


def without(state: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name not in names}


def test_missing_and_unexpected_tensors_are_named(theirs: Any, run: Convert) -> None:
    state = original_layout(theirs)
    message = refusal(run, "dit", without(state, "blocks.1.attn.qkv.bias", "final_layer.linear.weight"))
    assert message == "2 tensors of the weights are missing: blocks.1.attn.qkv.bias, final_layer.linear.weight"
    message = refusal(run, "dit", {**state, "blocks.0.attn.q_norm.weight": torch.ones(3)})
    assert message == "1 tensors of the weights are not a DiT's: blocks.0.attn.q_norm.weight"


def test_the_other_layout_is_recognised(theirs: Any, run: Convert) -> None:
    assert "they are in the layout of --from diffusers" in refusal(run, "dit", theirs.state_dict())
    assert "they are in the layout of --from dit" in refusal(run, "diffusers", original_layout(theirs))


def test_embeddings_that_differ_between_blocks(run: Convert) -> None:
    state = diffusers_dit().state_dict()
    name = "transformer_blocks.2.norm1.emb.class_embedder.embedding_table.weight"
    state[name] = state[name] + 1
    message = refusal(run, "diffusers", state, "--heads", "2", "--image-size", "64")
    assert message.startswith(f"{name} differs from transformer_blocks.0.norm1.emb.class_embedder")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "the weights' width of 32 is not a published one; say --heads N"),
        (["--heads", "5"], "the weights do not make a DiT: num_heads 5 does not divide the 32 channels"),
        (
            ["--heads", "2", "--name", "DiT-XL/2"],
            "--name is DiT-XL/2, but the weights have width 32, 3 blocks, 2 heads",
        ),
        (["--heads", "2", "--name", "DiT-XXL/2"], "--name: unknown model 'DiT-XXL/2'"),
        (["--heads", "2", "--num-classes", "7"], "--num-classes is 7, but the weights have 5 classes"),
        (["--heads", "2", "--image-size", "128"], "--image-size is 128, but the weights are for images of 64"),
        (["--heads", "2", "--class-names", "nowhere.txt"], "--class-names nowhere.txt cannot be read"),
        (["--heads", "2", "--steps", "3"], "unknown argument --steps"),
    ],
)
def test_options_that_do_not_fit(theirs: Any, run: Convert, tmp_path: Path, options: list[str], message: str) -> None:
    assert refusal(run, "dit", original_layout(theirs), *options).startswith(message)
    assert not (tmp_path / "converted").exists()


def test_weights_that_do_not_say_their_size(theirs: Any, run: Convert) -> None:
    state = without(original_layout(theirs), "pos_embed")
    assert "do not say for which images they are; give --image-size" in refusal(run, "dit", state, "--heads", "2")
    assert refusal(run, "dit", state, "--heads", "2", "--image-size", "60").endswith("is not divisible by 16")
    assert (
        checkpoint.read_manifest(run("dit", state, "--heads", "2", "--image-size", "96"))["model"]["latent_size"] == 12
    )


def test_other_positions(theirs: Any, run: Convert) -> None:
    state = original_layout(theirs)
    state["pos_embed"] = state["pos_embed"] + 0.1
    assert "are not the fixed sines and cosines" in refusal(run, "dit", state, "--heads", "2")


def test_weights_without_a_variance(run: Convert) -> None:
    state = original_layout(diffusers_dit(out_channels=4))
    assert "the epsilon objective needs 8: noise and variance" in refusal(run, "dit", state, "--heads", "2")


def test_a_diffusers_model_that_computes_something_else(tmp_path: Path, run: Convert) -> None:
    diffusers_dit(activation_fn="gelu").save_pretrained(tmp_path / "saved")
    message = refusal(run, "diffusers", tmp_path / "saved")
    assert message == "config.json has activation_fn 'gelu', but only 'gelu-approximate' can be converted"


@pytest.mark.parametrize(
    ("name", "content"),
    [("w.pt", b""), ("w.pt", b"not a checkpoint"), ("w.safetensors", b"\x08" + bytes(20)), ("w.bin", b"PK\x03\x04xx")],
)
def test_a_file_that_is_no_checkpoint(tmp_path: Path, run: Convert, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert refusal(run, "dit", tmp_path / name).startswith(f"{tmp_path / name} cannot be read as weights: ")


@pytest.mark.parametrize("value", [{}, [torch.ones(2)], {"a": 1}, {0: torch.ones(2)}])
def test_a_pickle_without_named_tensors(run: Convert, value: Any) -> None:
    assert "holds no named tensors, so it is not a checkpoint of a DiT" in refusal(run, "dit", value)


class Trap:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("trapped"),)


def test_nothing_that_a_stranger_pickled_is_run(tmp_path: Path, run: Convert, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "cannot be read as weights" in refusal(run, "dit", {"ema": {}, "opt": Trap()})
    assert not (tmp_path / "trapped").exists()


def test_places_that_do_not_exist_or_are_taken(theirs: Any, tmp_path: Path, run: Convert) -> None:
    assert refusal(run, "dit", tmp_path / "none.pt") == f"--weights {tmp_path / 'none.pt'} does not exist"
    (tmp_path / "empty").mkdir()
    assert "holds no config.json beside a *.safetensors" in refusal(run, "diffusers", tmp_path / "empty")
    (tmp_path / "converted").mkdir()
    (tmp_path / "converted" / "mine.txt").write_text("keep")
    assert "already exists; give another directory" in refusal(run, "dit", original_layout(theirs), "--heads", "2")
    assert [path.name for path in (tmp_path / "converted").iterdir()] == ["mine.txt"]


def test_help_is_answered_before_torch_is_loaded() -> None:
    code = (
        "import sys, gspn_dit.importers.convert as c\ntry: c.parse_arguments(['--help'])\nexcept SystemExit: pass\n"
        "print('torch' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.endswith("False\n")
    assert all(f"--{name}" in shown for name in ("from", "weights", "out", "name", "num-classes", "image-size", "vae"))


@pytest.mark.multiprocess
def test_the_command_line_exits_with_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gspn_dit.importers.convert", "--from", "dit", "--weights", "no.pt", "--out", "x"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr == "gspn_dit.importers.convert: error: --weights no.pt does not exist\n"
