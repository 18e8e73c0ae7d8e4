"""Turn published DiT weights into a checkpoint that sample.py and the pipeline read.

python -m gspn_dit.importers.convert --from dit --weights DiT-XL-2-256x256.pt --out runs/dit_xl2
python -m gspn_dit.importers.convert --from diffusers --weights DIR --vae stabilityai/sd-vae-ft-mse --out runs/dit_xl2
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from gspn_dit.config import Config, ModelConfig, ObjectiveConfig
from gspn_dit.errors import ArgumentParser, UserError, run_cli
from gspn_dit.models import create_model
from gspn_dit.models.presets import DIT_PRESETS, parse_name
from gspn_dit.paths import path_argument

if TYPE_CHECKING:
    from torch import Tensor

    from gspn_dit.importers.layouts import Shape

DEFAULT_VAE = "stabilityai/sd-vae-ft-mse"
PIXELS = "identity"


@dataclass(frozen=True)
class Autoencoder:
    """What the latents were made by."""

    place: str
    """Directory, name on the Hugging Face hub, or `PIXELS`."""
    factor: int = 8
    """Pixels along the side of a latent pixel; 8 in the autoencoder of every published DiT."""
    image_channels: int = 3


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; raises UserError."""
    parser = ArgumentParser(
        prog="gspn_dit.importers.convert",
        description=(__doc__ or "").split("\n")[0],
        formatter_class=argparse.HelpFormatter,  # the defaults are said in words
    )
    parser.add_argument(
        "--from", dest="layout", required=True, choices=("dit", "diffusers"), help="whose names they have"
    )
    parser.add_argument("--weights", type=path_argument, required=True, metavar="FILE|DIR",
                        help=".pt, .bin or .safetensors, or the directory that diffusers saved")  # fmt: skip
    parser.add_argument("--out", type=path_argument, required=True, metavar="DIR", help="the checkpoint to write")
    parser.add_argument("--name", help="such as DiT-XL/2; default: read from the weights")
    parser.add_argument("--heads", type=int, help="heads of attention, where the weights' width is not a published one")
    parser.add_argument("--num-classes", type=int, help="default: read from the weights")
    parser.add_argument(
        "--class-names",
        type=path_argument,
        metavar="FILE",
        help="a name per line; default: ImageNet's for 1000 classes",
    )
    parser.add_argument("--image-size", type=int, help="pixels; default: read from the weights or their config.json")
    parser.add_argument("--vae", type=path_argument, metavar="NAME|DIR",
                        help=f"autoencoder of the latents, or {PIXELS} for pixels; "
                        f"default: {DEFAULT_VAE} for 4 channels, else {PIXELS}")  # fmt: skip
    parser.add_argument("--timestep-frequencies", choices=("dit", "diffusers"),
                        help="how timesteps are encoded, which differs; default: as --from does (but weights that were "
                        "trained by DiT's code and then converted for diffusers want dit)")  # fmt: skip
    return parser.parse_args(arguments)


def convert(options: argparse.Namespace) -> Path:
    """Read, convert and write what the options ask for; raises UserError, and then leaves nothing written."""
    from gspn_dit.checkpoint import write_checkpoint
    from gspn_dit.importers.layouts import convert_weights

    out = Path(options.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} already exists; give another directory")
    theirs, config = read_weights(Path(options.weights))
    _check_config(options.layout, config)
    tensors, shape = convert_weights(theirs, options.layout)
    arguments = model_arguments(options, shape, theirs.get("pos_embed"), config)
    _check_shapes(tensors, arguments)
    manifest = {
        "model": arguments,
        "latent": latent_spec(options, arguments),
        "class_names": class_names(options, shape.num_classes),
        "config": Config(
            model=ModelConfig(name=arguments["name"]), objective=ObjectiveConfig(name="epsilon")
        ).to_dict(),
        "converted": {"from": options.layout, "weights": str(options.weights)},
    }
    write_checkpoint(out, 0, {"ema": tensors, "model": tensors}, manifest)
    parameters = sum(tensor.numel() for tensor in tensors.values())
    print(f"{out}: {arguments['name']} of {parameters:,} parameters, {shape.num_classes} classes")
    return out


# -- reading ---------------------------------------------------------------------------------------------------------


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read named tensors, and the config.json beside them if there is one; code in a pickle is never run.

    Of a training checkpoint with several sets of weights the moving average is taken. Raises UserError.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.exists():
        raise UserError(f"--weights {path} does not exist")
    file = _weights_file(path) if path.is_dir() else path
    try:
        if file.suffix == ".safetensors":
            loaded: Any = load_file(file)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # the arguments in a training checkpoint
                loaded = torch.load(file, map_location="cpu", weights_only=True)
        config = json.loads((file.parent / "config.json").read_bytes()) if path.is_dir() else {}
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, UnpicklingError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{file} cannot be read as weights: {reason}") from None
    for key in ("ema", "model", "state_dict"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
            break
    tensors = (
        {name: value for name, value in loaded.items() if isinstance(value, torch.Tensor)} if _is_dict(loaded) else {}
    )
    if not tensors:
        raise UserError(f"{file} holds no named tensors, so it is not a checkpoint of a DiT")
    return tensors, config


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(name, str) for name in value)


def _weights_file(directory: Path) -> Path:
    """Return the weights in a directory of diffusers: a model's, or a pipeline's with the model in transformer/."""
    for folder in (directory, directory / "transformer"):
        for suffix in ("safetensors", "bin"):
            files = sorted(folder.glob(f"*.{suffix}"))
            if len(files) > 1:
                raise UserError(f"{folder} holds {len(files)} files *.{suffix}; give one of them")
            if files and (folder / "config.json").exists():
                return files[0]
    raise UserError(f"{directory} holds no config.json beside a *.safetensors or *.bin; give a file")


def _check_config(layout: str, config: Mapping[str, Any]) -> None:
    """Refuse a diffusers model that computes something else."""
    if layout == "diffusers" and config:
        expected = {
            "_class_name": "DiTTransformer2DModel",
            "norm_type": "ada_norm_zero",
            "activation_fn": "gelu-approximate",
            "attention_bias": True,
            "norm_elementwise_affine": False,
        }
        for key, value in expected.items():
            if config.get(key, value) != value:
                raise UserError(f"config.json has {key} {config[key]!r}, but only {value!r} can be converted")


# -- what they are ---------------------------------------------------------------------------------------------------


def model_arguments(
    options: argparse.Namespace, shape: Shape, positions: Tensor | None, config: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the arguments of `create_model` for the weights."""
    from gspn_dit.importers.layouts import LAYOUTS

    if shape.out_channels != 2 * shape.in_channels:
        raise UserError(
            f"the weights predict {shape.out_channels} channels from {shape.in_channels}, but the epsilon objective "
            f"needs {2 * shape.in_channels}: noise and variance"
        )
    if options.num_classes not in (None, shape.num_classes):
        raise UserError(f"--num-classes is {options.num_classes}, but the weights have {shape.num_classes} classes")
    layout = LAYOUTS[options.layout]
    frequencies = options.timestep_frequencies
    quirks = {
        "timestep_endpoint": layout.timestep_endpoint if frequencies is None else frequencies == "diffusers",
        "mlp_norm_epsilon": float(config.get("norm_eps", layout.mlp_norm_epsilon)),
    }
    defaults = {"timestep_endpoint": False, "mlp_norm_epsilon": 1e-6}
    return {
        **_name_and_size(options, shape, config.get("num_attention_heads")),
        "num_classes": shape.num_classes,
        "latent_channels": shape.in_channels,
        "latent_size": _latent_size(options, shape, positions, config),
        "out_channels": shape.out_channels,
        **{key: value for key, value in quirks.items() if value != defaults[key]},
    }


def _name_and_size(options: argparse.Namespace, shape: Shape, heads: int | None) -> dict[str, Any]:
    """Return the name of the model, and width, depth and heads where they are not the preset's."""
    heads = options.heads or heads
    sizes = {size: preset for size, preset in DIT_PRESETS.items() if preset.hidden_size == shape.hidden_size}
    if heads is None:
        if not sizes:
            raise UserError(f"the weights' width of {shape.hidden_size} is not a published one; say --heads N")
        heads = next(iter(sizes.values())).num_heads
    actual = {"hidden_size": shape.hidden_size, "depth": shape.depth, "num_heads": heads}
    if options.name is None:
        same = [size for size, preset in sizes.items() if vars(preset) == actual]
        size = same[0] if same else next(iter(sizes), "S")
    else:
        try:
            family, size, patch_size = parse_name(options.name)
        except ValueError as error:
            raise UserError(f"--name: {error}") from None
        if family != "DiT" or vars(DIT_PRESETS[size]) != actual or patch_size != shape.patch_size:
            raise UserError(
                f"--name is {options.name}, but the weights have width {shape.hidden_size}, {shape.depth} blocks, "
                f"{heads} heads and patch size {shape.patch_size}; leave --name out"
            )
    differs = {key: value for key, value in actual.items() if getattr(DIT_PRESETS[size], key) != value}
    return {"name": f"DiT-{size}/{shape.patch_size}", **differs}


def _latent_size(options: argparse.Namespace, shape: Shape, positions: Tensor | None, config: Mapping[str, Any]) -> int:
    from gspn_dit.importers.layouts import grid_of_positions

    factor, known = autoencoder(options.vae, shape.in_channels).factor, config.get("sample_size")
    if positions is not None:
        known = grid_of_positions(positions) * shape.patch_size
    if options.image_size is None and known is None:
        raise UserError("the weights do not say for which images they are; give --image-size")
    if options.image_size is not None and known not in (None, options.image_size / factor):
        raise UserError(f"--image-size is {options.image_size}, but the weights are for images of {known * factor}")
    size = known or options.image_size / factor
    if size < 1 or size % shape.patch_size:
        raise UserError(f"--image-size {options.image_size} is not divisible by {factor * shape.patch_size}")
    return int(size)


def autoencoder(vae: str | None, latent_channels: int) -> Autoencoder:
    """Return what is known of the autoencoder without loading it: what the config.json of a directory says."""
    place = vae or (DEFAULT_VAE if latent_channels == 4 else PIXELS)
    if place == PIXELS:
        return Autoencoder(PIXELS, 1, latent_channels)
    configs = [path for path in (Path(place) / "config.json", Path(place) / "vae" / "config.json") if path.exists()]
    if not configs:
        return Autoencoder(place)
    try:
        config = json.loads(configs[0].read_bytes())
        found = Autoencoder(
            str(Path(place).resolve()), 2 ** (len(config["block_out_channels"]) - 1), int(config["in_channels"])
        )
        channels = int(config["latent_channels"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--vae {place} is not the directory of an autoencoder: {configs[0].name}: {error}") from None
    if channels != latent_channels:
        raise UserError(f"--vae {place} has latents of {channels} channels, but the weights take {latent_channels}")
    return found


def latent_spec(options: argparse.Namespace, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `gspn_dit.data.latents.latent_from_spec` builds the latent from."""
    vae = autoencoder(options.vae, arguments["latent_channels"])
    images = {"image_size": arguments["latent_size"] * vae.factor, "image_channels": vae.image_channels}
    return {"name": "identity", **images} if vae.place == PIXELS else {"name": "kl", "vae": vae.place, **images}


def class_names(options: argparse.Namespace, count: int) -> list[str]:
    """Return a name for each class: those of a file, ImageNet's for 1000 classes, or the ids."""
    if options.class_names is not None:
        try:
            names = Path(options.class_names).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--class-names {options.class_names} cannot be read: {error}") from None
        if len(names) != count:
            raise UserError(f"--class-names {options.class_names} has {len(names)} lines, the weights {count} classes")
        return names
    if count != 1000:
        return [str(number) for number in range(count)]
    from torchvision.models import ResNet18_Weights

    return list(ResNet18_Weights.DEFAULT.meta["categories"])


def _check_shapes(tensors: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> None:
    import torch

    try:
        with torch.device("meta"):
            expected = create_model(**arguments).state_dict()
    except ValueError as error:
        raise UserError(f"the weights do not make a DiT: {error}") from None
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise UserError(
                f"the weights do not fit a {arguments['name']}: {name} has shape {list(tensor.shape)}, "
                f"but must have {list(expected[name].shape)}"
            )


def main() -> None:
    """Convert what the command line names."""
    convert(parse_arguments())


if __name__ == "__main__":
    run_cli(main)
