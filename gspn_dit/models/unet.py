"""GSPN in place of every self-attention of a diffusers UNet (Stable Diffusion), in an adapter of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention_processor import Attention
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn
from torch.utils.hooks import RemovableHandle

from gspn_dit.checkpoint import load_tensors, read_manifest, resolve_checkpoint
from gspn_dit.errors import UserError
from gspn_dit.models.unet_scans import GRID, PROXY_RATIOS, GSPNSelfAttention

_OUT = ".to_out.bias"
"""What the name of one tensor [C] of each layer ends with; attention has `.to_out.0.bias`."""


@dataclass
class _Mount:
    """Where an adapter is mounted, and what stood there."""

    unet: UNet2DConditionModel
    attentions: dict[str, Attention]
    hooks: list[RemovableHandle]
    saved_by_diffusers: list[Any]
    """UNet and pipeline, whose `save_pretrained` refuses for now."""

    def __deepcopy__(self, memo: Any) -> None:
        """A copy of an adapter is not mounted."""


class GSPNAdapter(ModelMixin, ConfigMixin):
    """GSPN layers for all self-attentions of one `UNet2DConditionModel`; see `create`, `mount` and `unmount`.

    Saved and loaded on its own, beside the pipeline it is for (`save_pretrained`, `from_pretrained`, `push_to_hub`).
    Hooks hand each layer its grid, so any height and width will do. A mounted UNet can be trained, compiled,
    checkpointed and copied; a copy keeps its layers for good. LoRA weights for the attentions' maps find no place once
    it is mounted, and are refused before.

    Args:
        layers: channels of each self-attention, by its name in the UNet.
        variant, window, proxy_ratio, skip, weight_groups: as in `GSPNSelfAttention`.
        base: name of the UNet, for the reader of a saved adapter.
    """

    config_name: Any = "config.json"

    @register_to_config
    def __init__(
        self,
        layers: Mapping[str, int],
        variant: str = "pure",
        window: int | None = None,
        proxy_ratio: int = PROXY_RATIOS["pure"],
        skip: bool = True,
        weight_groups: int | None = None,
        base: str | None = None,
    ) -> None:
        super().__init__()
        if variant not in PROXY_RATIOS:
            raise ValueError(f"unknown variant '{variant}'; allowed are {', '.join(PROXY_RATIOS)}")
        for name, value in (("window", window), ("proxy_ratio", proxy_ratio), ("weight_groups", weight_groups)):
            _check_count(name, value)
        if not isinstance(skip, bool):
            raise ValueError(f"skip is {skip!r}, but must be True or False")
        self.names = sorted(layers)  # JSON keeps no order of its own
        self.mixers = nn.ModuleList(
            GSPNSelfAttention(layers[name], variant, window, proxy_ratio, skip, weight_groups) for name in self.names
        )
        self._mounted: _Mount | None = None

    @classmethod
    def create(
        cls,
        unet: Any,
        variant: str = "pure",
        window: int | None = None,
        proxy_ratio: int | None = None,
        skip: bool = True,
        weight_groups: int | None = None,
    ) -> GSPNAdapter:
        """Build an adapter for a UNet, or for a pipeline's, with its device and dtype; it is not mounted yet.

        Output maps, and those to q, k and v, start as copies of the UNet's.

        Args:
            unet: a `UNet2DConditionModel`, or a pipeline that has one.
            variant, window, skip, weight_groups: as in `GSPNSelfAttention`.
            proxy_ratio: None for the variant's published one: 8 of "pure", 32 of "qkv".

        Raises:
            ValueError: no UNet, one without self-attention, or an option out of range.
        """
        unet = _unet_of(unet)
        attentions = _self_attentions(unet)
        device, dtype = unet.device, unet.dtype
        with torch.device("meta" if device.type == "meta" else "cpu"):
            adapter = cls(
                {name: attention.query_dim for name, attention in attentions.items()},
                variant,
                window,
                PROXY_RATIOS.get(variant, PROXY_RATIOS["pure"]) if proxy_ratio is None else proxy_ratio,
                skip,
                weight_groups,
                unet.config.get("_name_or_path") or None,
            )
        nn.Module.to(adapter, device, dtype)  # diffusers' own warns of every dtype
        for name, mixer in zip(adapter.names, adapter.mixers, strict=True):
            assert isinstance(mixer, GSPNSelfAttention)
            mixer.start_from(attentions[name])
        return adapter

    @classmethod
    def from_checkpoint(cls, checkpoint: str | Path, weights: str = "ema") -> GSPNAdapter:
        """Take the scans of a run that distilled them (`unet.teacher`); mount them on the teacher's pipeline.

        Args:
            checkpoint: a run directory (its newest complete checkpoint), or one checkpoint.
            weights: "ema", "model", or another average that the checkpoint holds.

        Raises:
            UserError: no complete checkpoint, one of another task, or one whose scans have no teacher to go back to.
        """
        directory = resolve_checkpoint(checkpoint)
        manifest = read_manifest(directory)
        if not manifest.get("text"):
            raise UserError(f"{directory} is not of task text-to-image; give a run with unet.teacher")
        described, teacher = manifest["model"], manifest["config"]["unet"]["teacher"]
        if described["scans"] is None or teacher is None:
            found = (
                "has no scans" if described["scans"] is None else "was trained from scratch, weights and scans alike"
            )
            raise UserError(
                f"{directory} {found}, so no adapter of it would fit another UNet; give a run with unet.teacher"
            )
        tensors = load_tensors(directory, weights)
        layers = {key.removesuffix(_OUT): len(weight) for key, weight in tensors.items() if key.endswith(_OUT)}
        options = {name: value for name, value in described["scans"].items() if value is not None}
        ratio = options.pop("proxy_ratio", PROXY_RATIOS[options["variant"]])
        adapter = cls(layers, proxy_ratio=ratio, base=teacher, **options)
        for name, mixer in zip(adapter.names, adapter.mixers, strict=True):
            start = f"{name}."
            mixer.load_state_dict({k.removeprefix(start): w for k, w in tensors.items() if k.startswith(start)})
        return adapter.eval()

    def mount(self, pipeline_or_unet: Any) -> GSPNAdapter:
        """Put the layers in place of the UNet's self-attentions, which are kept; return the adapter.

        The layers move to the UNet's device and dtype. Until `unmount`, `save_pretrained` of UNet and pipeline refuses:
        diffusers could not load what it would write. A pipeline whose `unet` alone is given refuses only when it comes
        to that part.

        Raises:
            ValueError: no UNet, one whose self-attentions are others than the adapter's or hold LoRA layers, or
                something mounted already.
        """
        unet = _unet_of(pipeline_or_unet)
        if self._mounted is not None:
            raise ValueError("this adapter is mounted already; unmount() it first")
        attentions = _self_attentions(unet)
        given, own = {name: a.query_dim for name, a in attentions.items()}, dict(self.config["layers"])
        if given != own:
            other = next(name for name in [*own, *given] if own.get(name) != given.get(name))
            raise ValueError(
                f"the adapter is for another UNet: it has {len(own)} layers and this one {len(given)}; the first that "
                f"differs is {other} with {own.get(other)} channels in the adapter, {given.get(other)} in the UNet"
            )
        nn.Module.to(self, unet.device, unet.dtype)
        hooks = []
        for name, mixer in zip(self.names, self.mixers, strict=True):
            mixer.train(attentions[name].training)
            _replace(unet, name, mixer)
        for module in unet.modules():
            if isinstance(module, Transformer2DModel):
                hooks.append(module.register_forward_pre_hook(_add_grid, with_kwargs=True))
                stock = [part for part in module.modules() if isinstance(part, Attention)]
                hooks += [part.register_forward_pre_hook(_drop_grid, with_kwargs=True) for part in stock]
        owners = [unet] if pipeline_or_unet is unet else [unet, pipeline_or_unet]
        for owner in owners:
            vars(owner)["save_pretrained"] = _Refusal()
        self._mounted = _Mount(unet, attentions, hooks, owners)
        return self

    def unmount(self) -> GSPNAdapter:
        """Put the UNet's own self-attentions back, on the device and in the dtype it has now; return the adapter.

        Raises:
            ValueError: it is not mounted.
        """
        if self._mounted is None:
            raise ValueError("this adapter is not mounted")
        unet = self._mounted.unet
        for name, attention in self._mounted.attentions.items():
            training = unet.get_submodule(name).training
            _replace(unet, name, attention.to(unet.device, unet.dtype).train(training))
        for hook in self._mounted.hooks:
            hook.remove()
        for owner in self._mounted.saved_by_diffusers:
            vars(owner).pop("save_pretrained")
        self._mounted = None
        return self


def _unet_of(pipeline_or_unet: Any) -> UNet2DConditionModel:
    unet = getattr(pipeline_or_unet, "unet", pipeline_or_unet)
    unet = getattr(unet, "_orig_mod", unet)  # of torch.compile
    if not isinstance(unet, UNet2DConditionModel):
        raise ValueError(
            f"a {type(pipeline_or_unet).__name__} has no UNet2DConditionModel; GSPN can be mounted on UNets such as "
            "Stable Diffusion's (SD 1.5, SDXL) and pipelines that have one"
        )
    return unet


def _self_attentions(unet: UNet2DConditionModel) -> dict[str, Attention]:
    """Return the self-attention of each transformer block by name."""
    parts = {name: part for name, part in unet.named_modules() if name.endswith(".attn1")}
    if any(isinstance(part, GSPNSelfAttention) for part in parts.values()):
        raise ValueError("a GSPN adapter is mounted on this UNet already; unmount() it first")
    found = {name: p for name, p in parts.items() if isinstance(p, Attention) and not p.is_cross_attention}
    if not found:
        raise ValueError("this UNet has no transformer blocks with self-attention that GSPN could replace")
    for name, attention in found.items():
        if any(hasattr(part, "base_layer") for part in attention.modules()):
            raise ValueError(
                f"{name} holds LoRA layers, which would be lost with it: unload_lora_weights() first, after "
                "fuse_lora() where their effect shall stay"
            )
    return found


def _check_count(name: str, value: Any) -> None:
    if value is not None and (type(value) is not int or value < 1):
        raise ValueError(f"{name} is {value!r}, but must be None or a whole number of at least 1")


def _replace(unet: UNet2DConditionModel, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(unet.get_submodule(parent), attribute, module)


def _add_grid(
    module: nn.Module, arguments: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Add the grid to the arguments of a transformer's blocks.

    It travels with the call and is no state, so that blocks that are recomputed in the backward pass see their own.
    """
    hidden_states = arguments[0] if arguments else kwargs["hidden_states"]
    grid = tuple(hidden_states.shape[-2:])
    return arguments, {**kwargs, "cross_attention_kwargs": {**(kwargs.get("cross_attention_kwargs") or {}), GRID: grid}}


def _drop_grid(
    module: nn.Module, arguments: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Keep the grid from attention, which would warn of it."""
    return arguments, {name: value for name, value in kwargs.items() if name != GRID}


class _Refusal:
    """Stands for `save_pretrained` of a UNet with scans, and of its pipeline."""

    def __init__(self, remedy: str = "unmount() it first, and save the adapter with its own save_pretrained") -> None:
        self.remedy = remedy

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        raise ValueError(
            f"a GSPN adapter is mounted, and diffusers could not load the UNet that this would save; {self.remedy}"
        )

    def __reduce__(self) -> Any:
        """A copy keeps its layers for good, so that it is told something else."""
        return _Refusal, (
            "this is a copy, which keeps its layers: save its state_dict(), or the adapter of the original",
        )
