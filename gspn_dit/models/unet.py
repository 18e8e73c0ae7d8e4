"""GSPN in place of every self-attention of a diffusers UNet (Stable Diffusion), in an adapter of its own.

The mathematics is that of arXiv 2501.12381; the published layers are "pure" (logits and gates from a proxy of the
tokens) or keep queries, keys and values ("qkv").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gspn_dit.models.scans import GSPNMixer
from gspn_dit.ops import gspn_scan_from_proxy

PROXY_RATIOS = {"pure": 8, "qkv": 32}
"""Published width of the tokens over that of the proxy, by variant."""
GRID = "gspn_grid"
"""Key of `cross_attention_kwargs` in which height and width travel from a transformer to its blocks."""


class GSPNSelfAttention(nn.Module):
    """The stand-in for a self-attention over a grid of tokens: scans in four directions, merged, then a linear map.

    Args:
        channels: width C.
        variant: "pure" takes logits and gates from a proxy of the tokens x and scans x. "qkv" keeps the linear maps to
            q, k and v: logits and input gate come from the proxy of x + k, output gate and skip from that of x + q,
            and x + v is scanned.
        window: lines after which the scan restarts (4 in the published weights); None for global propagation.
        proxy_ratio: C over the width of the proxy.
        skip: add a linear map of the proxy times what is scanned.
        weight_groups: groups of channels that share propagation weights; None for one per channel.

    Raises:
        ValueError: a value out of range, or one that does not divide the channels.
    """

    def __init__(
        self,
        channels: int,
        variant: str = "pure",
        window: int | None = None,
        proxy_ratio: int = PROXY_RATIOS["pure"],
        skip: bool = True,
        weight_groups: int | None = None,
    ) -> None:
        super().__init__()
        if proxy_ratio < 1 or channels % proxy_ratio:
            raise ValueError(f"proxy_ratio {proxy_ratio} does not divide the {channels} channels of a layer")
        self.to_qkv = nn.ModuleList(nn.Linear(channels, channels, bias=False) for _ in "qkv" if variant == "qkv")
        self.mixer = GSPNMixer(channels, weight_groups, window, proxy_ratio=proxy_ratio, skip=skip)
        self.to_out = nn.Linear(channels, channels)
        self.mixer.initialise()

    def start_from(self, attention: Attention) -> None:
        """Copy what an attention has as well: the output map, and those to q, k and v; missing biases are zero."""
        maps = [attention.to_q, attention.to_k, attention.to_v][: len(self.to_qkv)]
        others: list[Any] = [*maps, attention.to_out[0]]
        for own, other in zip([*self.to_qkv, self.to_out], others, strict=True):
            assert isinstance(own, nn.Linear)
            with torch.no_grad():
                own.weight.copy_(other.weight)
                if own.bias is not None:
                    own.bias.zero_() if other.bias is None else own.bias.copy_(other.bias)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        gspn_grid: tuple[int, int] | None = None,
        **_: Any,
    ) -> Tensor:
        """Mix tokens [B, N, C] of a grid (height, width) to [B, N, C]; what else an attention takes is ignored.

        Raises:
            ValueError: a mask, which scans cannot follow, or no grid, or one of another number of tokens.
        """
        if attention_mask is not None:
            raise ValueError("GSPN layers take no attention_mask; leave it out, or unmount the adapter")
        if gspn_grid is None or gspn_grid[0] * gspn_grid[1] != hidden_states.shape[1]:
            raise ValueError(
                f"a GSPN layer got {hidden_states.shape[1]} tokens and the grid {gspn_grid}; it must be called by the "
                "UNet that it was mounted on"
            )
        return self.to_out(self._scan(hidden_states.unflatten(1, gspn_grid)).flatten(1, 2))

    def _scan(self, tokens: Tensor) -> Tensor:
        """Propagate tokens [B, H, W, C]."""
        mixer = self.mixer
        if not self.to_qkv:
            return mixer(tokens)
        query, key, value = (linear(tokens) for linear in self.to_qkv)
        proxy = torch.cat([mixer.to_proxy(tokens + key), mixer.to_proxy(tokens + query)], dim=-1)
        width = proxy.shape[-1] // 2
        # The operator reads one proxy, so a map is zero on the half that is not its own. That doubles the products of
        # the maps (C/16 instead of C/32 a channel), which is far less than writing 20 logits and gates to memory.
        of_key, of_query = (0, width), (width, 0)
        return gspn_scan_from_proxy(
            tokens + value,
            proxy,
            F.pad(mixer.to_logits.weight, of_key),
            F.pad(mixer.to_input_gate.weight, of_key),
            F.pad(mixer.to_output_gate.weight, of_query),
            mixer.merge_weight,
            None if mixer.to_skip is None else F.pad(mixer.to_skip.weight, of_query),
            directions=mixer.directions,
            window=mixer.window,
        )

    # Loaders (IP-Adapter, `set_attn_processor`) count a processor for every attention; this one has no effect.
    def get_processor(self, *_: Any, **__: Any) -> AttnProcessor2_0:
        return AttnProcessor2_0()

    def set_processor(self, *_: Any, **__: Any) -> None:
        pass


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
    checkpointed and copied; a copy keeps its layers for good. LoRA weights for the attentions' maps find no place.

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
        if window is not None and window < 1:
            raise ValueError(f"window is {window}, but must be None or at least 1")
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

    def mount(self, pipeline_or_unet: Any) -> GSPNAdapter:
        """Put the layers in place of the UNet's self-attentions, which are kept; return the adapter.

        Until `unmount`, `save_pretrained` of UNet and pipeline refuses: diffusers could not load what it would write.

        Raises:
            ValueError: no UNet, one whose self-attentions are others than the adapter's, or something mounted already.
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
            vars(owner)["save_pretrained"] = _refuse_to_save
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
            _replace(unet, name, attention.to(unet.device, unet.dtype))
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
    return found


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


def _refuse_to_save(*_: Any, **__: Any) -> NoReturn:
    raise ValueError(
        "a GSPN adapter is mounted, and diffusers could not load the UNet that this would save; unmount() it first, "
        "and save the adapter with its own save_pretrained"
    )
