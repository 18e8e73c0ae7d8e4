"""GSPN in diffusers' UNets: what is replaced, that nothing else changes, and what it lives beside."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import ControlNetModel, DDPMPipeline, DDPMScheduler, UNet2DConditionModel, UNet2DModel
from torch import Tensor

from gspn_dit.models.unet import GSPNAdapter
from gspn_dit.models.unet_scans import GSPNSelfAttention
from gspn_dit.ops import gspn_scan

TINY = {
    "sample_size": 16,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 24,
    "attention_head_dim": 8,
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
SD15 = {"sample_size": 64, "cross_attention_dim": 768}
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2, 10],
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
VARIANTS = ("pure", "qkv")


@pytest.fixture
def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(**TINY).eval()


def inputs(height: int = 16, width: int = 24, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, 4, height, width, generator=generator)
    return latents, torch.arange(batch) * 100, torch.randn(batch, 5, 24, generator=generator)


@torch.no_grad()
def run(unet: UNet2DConditionModel, *arguments: Any, **kwargs: Any) -> Tensor:
    return unet(*(arguments or inputs()), **kwargs).sample


def attention_names(unet: UNet2DConditionModel) -> list[str]:
    return [name for name, _ in unet.named_modules() if name.endswith("attn1")]


# -- one layer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("window", [None, 2])
def test_a_layer_is_the_published_formula(variant: str, window: int | None) -> None:
    """y = Σ m ⊙ (u ⊙ h + D ⊙ x), whose D of four directions are one map here: Σ m·D."""
    torch.manual_seed(0)
    layer = GSPNSelfAttention(16, variant, window, proxy_ratio=4, weight_groups=8).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    tokens = torch.randn(2, 15, 16, dtype=torch.float64)
    if variant == "pure":
        of_key = of_query = layer.mixer.to_proxy(tokens)
        scanned = tokens
    else:
        query, key, value = (tokens @ linear.weight.T for linear in layer.to_qkv)
        of_key, of_query, scanned = (
            layer.mixer.to_proxy(tokens + key),
            layer.mixer.to_proxy(tokens + query),
            tokens + value,
        )
    x = scanned.view(2, 3, 5, 16)
    y = gspn_scan(
        x,
        layer.mixer.to_logits(of_key).view(2, 3, 5, 4, 3, 8),
        layer.mixer.to_input_gate(of_key).view(2, 3, 5, 4, 16),
        layer.mixer.to_output_gate(of_query).view(2, 3, 5, 4, 16),
        layer.mixer.merge_weight,
        window=window,
    )
    assert layer.mixer.to_skip is not None
    y = y + layer.mixer.to_skip(of_query).view(2, 3, 5, 16) * x
    expected = y.reshape(2, 15, 16) @ layer.to_out.weight.T + layer.to_out.bias
    torch.testing.assert_close(layer(tokens, gspn_grid=(3, 5)), expected, rtol=1e-10, atol=1e-10)


def test_a_layer_without_skip_has_no_map_for_it() -> None:
    with_skip, without = (GSPNSelfAttention(16, proxy_ratio=4, skip=skip) for skip in (True, False))
    count = lambda layer: sum(p.numel() for p in layer.parameters())  # noqa: E731
    assert count(with_skip) - count(without) == 16 * 4


@pytest.mark.parametrize("grid", [None, (4, 4)])
def test_a_layer_refuses_another_grid(grid: tuple[int, int] | None) -> None:
    with pytest.raises(ValueError, match="got 15 tokens and the grid"):
        GSPNSelfAttention(16, proxy_ratio=4)(torch.zeros(1, 15, 16), gspn_grid=grid)


# -- Stable Diffusion's own UNets --------------------------------------------------------------------------------


@pytest.mark.parametrize("config, widths", [(SD15, {320: 5, 640: 5, 1280: 6}), (SDXL, {640: 10, 1280: 60})])
@pytest.mark.parametrize("variant, published", [("pure", (51.1e6, 422.5e6)), ("qkv", (59.3e6, 489.7e6))])
def test_published_unets(config: Any, widths: dict[int, int], variant: str, published: tuple[float, float]) -> None:
    """16 and 70 layers; the released counts, less the 3·C·P a layer that one map for four skips saves."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
        adapter = GSPNAdapter.create(unet, variant).mount(unet)
        latents, text = torch.zeros(2, 4, 64, 96), torch.zeros(2, 77, config["cross_attention_dim"])
        extra = {"text_embeds": torch.zeros(2, 1280), "time_ids": torch.zeros(2, 6)} if config is SDXL else None
        assert run(unet, latents, torch.tensor(3), text, added_cond_kwargs=extra).shape == (2, 4, 64, 96)
    assert len(adapter.mixers) == (16 if config is SD15 else 70) == sum(widths.values())
    ratio, maps = (8, 0) if variant == "pure" else (32, 3)
    a_layer = lambda c: maps * c**2 + c * (c // ratio) + 24 * c * (c // ratio) + c**2 + c + 4  # noqa: E731
    released = sum(count * a_layer(c) for c, count in widths.items())
    assert released == pytest.approx(published[0 if config is SD15 else 1], rel=1.1e-3)
    saved = sum(count * 3 * c * (c // ratio) for c, count in widths.items())
    assert sum(p.numel() for p in adapter.parameters()) == released - saved


@pytest.mark.slow
def test_sd15_computes_at_512_by_768_and_comes_back_bit_for_bit() -> None:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**SD15).eval()  # products in bfloat16 differ from one call to the next on some CPUs
    small, large = (torch.randn(1, 4, *size) for size in ((16, 8), (64, 96)))
    conditions = torch.tensor(7), torch.randn(1, 77, 768)
    before = run(unet, small, *conditions)
    adapter = GSPNAdapter.create(unet).mount(unet)
    mounted = run(unet, large, *conditions)
    assert mounted.shape == large.shape and bool(mounted.isfinite().all())
    adapter.unmount()
    assert torch.equal(run(unet, small, *conditions), before)


# -- mounting ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_self_attention_is_replaced_and_put_back(unet: UNet2DConditionModel, variant: str) -> None:
    before, weights = run(unet), copy.deepcopy(unet.state_dict())
    adapter = GSPNAdapter.create(unet, variant)
    assert torch.equal(run(unet), before)  # creating it changes nothing
    assert adapter.mount(unet) is adapter
    names = attention_names(unet)
    assert len(names) == 4
    assert all(isinstance(unet.get_submodule(name), GSPNSelfAttention) for name in names)
    assert not torch.allclose(run(unet), before, atol=1e-2)
    adapter.unmount()
    assert torch.equal(run(unet), before)
    assert {key: value.shape for key, value in unet.state_dict().items()} == {k: v.shape for k, v in weights.items()}
    assert all(not module._forward_pre_hooks for module in unet.modules())


@pytest.mark.parametrize("variant", VARIANTS)
def test_maps_that_attention_has_as_well_start_as_its_own(unet: UNet2DConditionModel, variant: str) -> None:
    adapter = GSPNAdapter.create(unet, variant)
    for name, mixer in zip(adapter.names, adapter.mixers, strict=True):
        attention = unet.get_submodule(name)
        assert torch.equal(mixer.to_out.weight, attention.to_out[0].weight)
        assert torch.equal(mixer.to_out.bias, attention.to_out[0].bias)
        originals = (attention.to_q, attention.to_k, attention.to_v)
        for own, other in zip(mixer.to_qkv, originals, strict=variant == "qkv"):
            assert torch.equal(own.weight, other.weight)


@pytest.mark.parametrize("options", [{}, {"variant": "qkv", "window": 4, "weight_groups": 4, "skip": False}])
def test_a_saved_adapter_gives_the_same_outputs(
    unet: UNet2DConditionModel, tmp_path: Path, options: dict[str, Any]
) -> None:
    adapter = GSPNAdapter.create(unet, **options).mount(unet)
    mounted = run(unet)
    adapter.save_pretrained(tmp_path)
    adapter.unmount()
    loaded = GSPNAdapter.from_pretrained(tmp_path)
    assert {key: loaded.config[key] for key in options} == options
    loaded.mount(unet)
    assert torch.equal(run(unet), mounted)


def test_height_and_width_are_not_mixed_up(unet: UNet2DConditionModel) -> None:
    """A wide image is not taken for a tall one: layers that scan along rows alone see the true rows."""
    adapter = GSPNAdapter.create(unet).mount(unet)
    grids = []
    adapter.mixers[0].register_forward_pre_hook(
        lambda _, args, kwargs: grids.append(kwargs["gspn_grid"]), with_kwargs=True
    )
    run(unet, *inputs(16, 24))
    run(unet, *inputs(24, 16))
    assert grids == [(16, 24), (24, 16)]


def test_samples_do_not_see_each_other(unet: UNet2DConditionModel) -> None:
    """As guidance needs, which runs both halves in one batch."""
    GSPNAdapter.create(unet).mount(unet)
    latents, timesteps, text = inputs()
    both = run(unet, latents, timesteps, text)
    alone = torch.cat([run(unet, latents[i : i + 1], timesteps[i : i + 1], text[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(both, alone, rtol=1e-4, atol=1e-5)


def gradients(unet: UNet2DConditionModel, adapter: GSPNAdapter, between: bool = False) -> list[Tensor]:
    output = unet(*inputs(16, 24)).sample
    if between:
        unet(*inputs(24, 16))  # of as many tokens and another grid
    unet.zero_grad()
    output.square().mean().backward()
    return [parameter.grad.clone() for parameter in adapter.parameters() if parameter.grad is not None]


def test_checkpointing_recomputes_with_the_grid_of_its_own_forward_pass(unet: UNet2DConditionModel) -> None:
    adapter = GSPNAdapter.create(unet).mount(unet)
    torch.nn.init.normal_(adapter.mixers[0].mixer.to_skip.weight)
    unet.train()
    plain = gradients(unet, adapter)
    unet.enable_gradient_checkpointing()
    recomputed = gradients(unet, adapter, between=True)
    assert len(plain) == len(list(adapter.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


def test_a_copy_of_a_mounted_unet_stands_alone(unet: UNet2DConditionModel) -> None:
    adapter = GSPNAdapter.create(unet).mount(unet)
    mounted, duplicate = run(unet), copy.deepcopy(unet)
    copy.deepcopy(adapter).mount(UNet2DConditionModel(**TINY))  # the copy is not mounted, so it can be
    adapter.unmount()
    assert torch.equal(run(duplicate), mounted)
    with pytest.raises(ValueError, match="this is a copy, which keeps its layers: save its state_dict"):
        duplicate.save_pretrained("nowhere")
    assert not Path("nowhere").exists()


def test_layers_follow_the_unet_they_are_mounted_on(unet: UNet2DConditionModel) -> None:
    adapter = GSPNAdapter.create(unet)
    adapter.mount(unet.to(torch.bfloat16))
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.bfloat16}
    latents, timesteps, text = inputs()
    assert bool(run(unet, latents.bfloat16(), timesteps, text.bfloat16()).isfinite().all())


@pytest.mark.parametrize("training", [True, False])
def test_attention_comes_back_in_the_mode_that_the_unet_has_by_then(unet: UNet2DConditionModel, training: bool) -> None:
    adapter = GSPNAdapter.create(unet).mount(unet.train(not training))
    unet.train(training)
    adapter.unmount()
    assert {module.training for module in unet.modules()} == {training}


def test_half_precision(unet: UNet2DConditionModel) -> None:
    adapter = GSPNAdapter.create(unet).mount(unet)
    exact = run(unet)
    latents, timesteps, text = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        assert (run(unet) - exact).abs().max() < 0.1
    unet.to(torch.bfloat16)
    half = run(unet, latents.bfloat16(), timesteps, text.bfloat16())
    assert half.dtype == torch.bfloat16 and (half - exact).abs().max() < 0.1
    adapter.unmount()
    assert {parameter.dtype for parameter in unet.parameters()} == {torch.bfloat16}


@pytest.mark.slow
def test_compiles_as_one_graph(unet: UNet2DConditionModel) -> None:
    GSPNAdapter.create(unet, "qkv").mount(unet)
    compiled = torch.compile(unet, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled), run(unet), rtol=1e-5, atol=1e-5)


# -- beside others -----------------------------------------------------------------------------------------------


def test_attention_is_told_of_no_grid(unet: UNet2DConditionModel, caplog: pytest.LogCaptureFixture) -> None:
    """Diffusers would warn at every call of an argument that it does not know."""
    import diffusers.utils.logging as log

    GSPNAdapter.create(unet).mount(unet)
    log.enable_propagation()
    try:
        run(unet)
    finally:
        log.disable_propagation()
    assert not [record for record in caplog.records if "gspn_grid" in record.getMessage()]


def test_attention_processors_can_be_exchanged(unet: UNet2DConditionModel) -> None:
    from diffusers.models.attention_processor import AttnProcessor

    GSPNAdapter.create(unet).mount(unet)
    before = run(unet)
    assert len(unet.attn_processors) == 8
    unet.set_attn_processor({name: AttnProcessor() for name in unet.attn_processors})
    torch.testing.assert_close(run(unet), before, rtol=1e-4, atol=1e-5)


def test_an_ip_adapter_loads_beside_it(unet: UNet2DConditionModel) -> None:
    GSPNAdapter.create(unet).mount(unet)
    widths = [p.to_k.out_features for n, p in unet.named_modules() if n.endswith("attn2")]
    attentions = {
        f"{2 * index + 1}.to_{letter}_ip.weight": torch.randn(width, 24)
        for index, width in enumerate(widths)
        for letter in "kv"
    }
    projection = {"proj.weight": torch.randn(96, 12), "proj.bias": torch.zeros(96)}
    projection |= {"norm.weight": torch.ones(24), "norm.bias": torch.zeros(24)}
    unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": attentions}], low_cpu_mem_usage=False)
    images = [run(unet, added_cond_kwargs={"image_embeds": [torch.full((2, 1, 12), value)]}) for value in (0.1, 1.0)]
    assert not torch.equal(*images)


def test_a_controlnet_drives_it(unet: UNet2DConditionModel) -> None:
    latents, timesteps, text = inputs(16, 16)
    control = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8))
    torch.nn.init.normal_(control.controlnet_mid_block.weight)
    GSPNAdapter.create(unet).mount(unet)
    down, mid = control(
        latents, timesteps, text, controlnet_cond=torch.ones(2, 3, 32, 32), return_dict=False
    )  # its condition is twice the latent's size with two widths
    driven = run(
        unet, latents, timesteps, text, down_block_additional_residuals=down, mid_block_additional_residual=mid
    )
    assert not torch.equal(driven, run(unet, latents, timesteps, text))


def test_lora_of_cross_attention_and_of_kept_maps(unet: UNet2DConditionModel) -> None:
    peft = pytest.importorskip("peft", reason="LoRA needs peft")
    GSPNAdapter.create(unet, "pure").mount(unet)
    before = run(unet)
    unet.add_adapter(peft.LoraConfig(target_modules=["to_q", "to_v"], init_lora_weights=False))
    assert not torch.equal(run(unet), before)
    unet.disable_adapters()
    torch.testing.assert_close(run(unet), before)


@pytest.mark.parametrize("method", ["mount", "create"])
def test_lora_in_what_would_be_replaced_is_refused(unet: UNet2DConditionModel, method: str) -> None:
    peft = pytest.importorskip("peft", reason="LoRA needs peft")
    adapter = GSPNAdapter.create(unet)
    unet.add_adapter(peft.LoraConfig(target_modules=["attn2.to_q"]), "elsewhere")
    adapter.mount(unet).unmount()
    unet.add_adapter(peft.LoraConfig(target_modules=["to_q"], init_lora_weights=False), "attention")
    before = run(unet)
    with pytest.raises(
        ValueError, match=r"\.attn1 holds LoRA layers, .*: unload_lora_weights\(\) first, after fuse_lora"
    ):
        adapter.mount(unet) if method == "mount" else GSPNAdapter.create(unet)
    assert torch.equal(run(unet), before)
    unet.fuse_lora()
    unet.unload_lora()
    torch.testing.assert_close(run(unet), before)
    fused = run(unet)
    adapter.mount(unet).unmount()
    assert torch.equal(run(unet), fused)


# -- what is refused ---------------------------------------------------------------------------------------------


def test_a_pipeline_without_such_a_unet() -> None:
    unconditional = UNet2DModel(
        block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
    )
    with pytest.raises(ValueError, match="a DDPMPipeline has no UNet2DConditionModel"):
        GSPNAdapter.create(DDPMPipeline(unconditional, DDPMScheduler()))


def test_a_unet_without_self_attention() -> None:
    config = {**TINY, "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    with pytest.raises(ValueError, match="no transformer blocks with self-attention"):
        GSPNAdapter.create(UNet2DConditionModel(**config, mid_block_type=None))


def test_an_adapter_of_another_unet(unet: UNet2DConditionModel) -> None:
    adapter = GSPNAdapter.create(unet)
    wider = UNet2DConditionModel(**{**TINY, "block_out_channels": (32, 96)})
    with pytest.raises(ValueError, match=r"the first that differs is mid_block\S+ with 64 channels .* 96 in the UNet"):
        adapter.mount(wider)
    assert not any(isinstance(module, GSPNSelfAttention) for module in wider.modules())


def test_mounting_twice(unet: UNet2DConditionModel) -> None:
    adapter, other = GSPNAdapter.create(unet), GSPNAdapter.create(unet)
    with pytest.raises(ValueError, match="not mounted"):
        adapter.unmount()
    adapter.mount(unet)
    with pytest.raises(ValueError, match="this adapter is mounted already"):
        adapter.mount(unet)
    with pytest.raises(ValueError, match="a GSPN adapter is mounted on this UNet already"):
        other.mount(unet)
    with pytest.raises(ValueError, match="a GSPN adapter is mounted on this UNet already"):
        GSPNAdapter.create(unet)


def test_saving_by_diffusers_is_refused_while_mounted(unet: UNet2DConditionModel, tmp_path: Path) -> None:
    adapter = GSPNAdapter.create(unet).mount(unet)
    with pytest.raises(ValueError, match=r"unmount\(\) it first"):
        unet.save_pretrained(tmp_path / "unet")
    assert not (tmp_path / "unet").exists()
    adapter.unmount()
    unet.save_pretrained(tmp_path / "unet")
    assert UNet2DConditionModel.from_pretrained(tmp_path / "unet").config.cross_attention_dim == 24


def test_saving_a_pipeline_is_refused_before_any_part_is_written(unet: UNet2DConditionModel, tmp_path: Path) -> None:
    from types import SimpleNamespace

    pipeline = SimpleNamespace(unet=unet)
    adapter = GSPNAdapter.create(pipeline).mount(pipeline)
    with pytest.raises(ValueError, match=r"unmount\(\) it first"):
        pipeline.save_pretrained(tmp_path)
    adapter.unmount()
    assert not hasattr(pipeline, "save_pretrained")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"variant": "linear"}, "unknown variant 'linear'; allowed are pure, qkv"),
        ({"window": 0}, "window is 0, but must be None or a whole number"),
        ({"window": 2.5}, r"window is 2\.5"),
        ({"window": True}, "window is True"),
        ({"weight_groups": 4.0}, r"weight_groups is 4\.0"),
        ({"proxy_ratio": 0}, "proxy_ratio is 0"),
        ({"skip": "no"}, "skip is 'no', but must be True or False"),
        ({"proxy_ratio": 7}, "proxy_ratio 7 does not divide the 32 channels"),
        ({"proxy_ratio": 64}, "proxy_ratio 64 does not divide the 32 channels"),
        ({"weight_groups": 5}, "weight_groups 5 does not divide the 32 channels"),
    ],
)
def test_options_out_of_range(unet: UNet2DConditionModel, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GSPNAdapter.create(unet, **options)


def test_masks_are_refused(unet: UNet2DConditionModel) -> None:
    GSPNAdapter.create(unet).mount(unet)
    with pytest.raises(ValueError, match="no attention_mask"):
        run(unet, *inputs(), attention_mask=torch.ones(2, 384))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_scan_starts_at_the_scale_of_its_tokens(variant: str) -> None:
    torch.manual_seed(0)
    layer = GSPNSelfAttention(128, variant, weight_groups=4)
    torch.nn.init.eye_(layer.to_out.weight)
    torch.nn.init.zeros_(layer.to_out.bias)
    tokens = F.layer_norm(torch.randn(2, 64, 128), (128,))
    assert 0.3 < layer(tokens, gspn_grid=(8, 8)).std() < 3
