"""The scan's norms, skips, width and gates: by their formulas, counted by hand, refused where they make no sense."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gspn_dit.models import create_model
from gspn_dit.models.mixers import MIXERS, read_options
from gspn_dit.models.scans import GSPNMixer, ScanMixer, ScanOptions
from gspn_dit.ops import DIRECTIONS
from tests.models.conftest import lively
from tests.models.test_mixers import made, tokens_of

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def normed(x: Tensor, norm: Any) -> Tensor:
    """LayerNorm and RMSNorm by their definitions."""
    centred = x - x.mean(-1, keepdim=True) if isinstance(norm, nn.LayerNorm) else x
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
    return scaled + norm.bias if isinstance(norm, nn.LayerNorm) else scaled


def plain_of(mixer: GSPNMixer, **options: Any) -> GSPNMixer:
    """The scan without norm and channel skip, of the same weights."""
    plain = GSPNMixer(mixer.channels, proxy_channels=2, **options).double()
    own = plain.state_dict()
    plain.load_state_dict({name: value for name, value in mixer.state_dict().items() if name in own})
    return plain


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("place", ["before", "after"])
def test_a_norm_of_the_scans_input_or_result(norm: str, place: str) -> None:
    mixer = made(GSPNMixer(8, proxy_channels=2, norm=norm, norm_place=place, channel_skip=True))
    plain, tokens = plain_of(mixer), tokens_of(8)
    inputs = normed(tokens, mixer.norms[0]) if place == "before" else tokens
    scanned = plain(inputs) if place == "before" else normed(plain(inputs), mixer.norms[0])
    torch.testing.assert_close(mixer(tokens), scanned + mixer.channel_skip * inputs, **EXACT)


@pytest.mark.parametrize("skip", [False, True])
def test_each_directions_result_normed_by_itself(skip: bool) -> None:
    mixer = made(GSPNMixer(8, 2, proxy_channels=2, norm="rms", norm_place="directions", skip=skip))
    tokens = tokens_of(8)
    expected = mixer.to_skip(mixer.to_proxy(tokens)) * tokens if skip else torch.zeros_like(tokens)
    for number, direction in enumerate(DIRECTIONS):
        alone = GSPNMixer(8, 2, directions=[direction], proxy_channels=2).double()
        state = {name: value for name, value in mixer.state_dict().items() if name in alone.state_dict()}
        for name in ("to_logits", "to_input_gate", "to_output_gate"):
            state[f"{name}.weight"] = state[f"{name}.weight"].chunk(4)[number]
        alone.load_state_dict(state | {"merge_weight": torch.ones(1)})
        expected = expected + mixer.merge_weight[number] * normed(alone(tokens), mixer.norms[number])
    torch.testing.assert_close(mixer(tokens), expected, **EXACT)


def test_the_channel_skip_starts_as_the_tokens_themselves() -> None:
    mixer = GSPNMixer(32, channel_skip=True).double()
    tokens = tokens_of(32)
    torch.testing.assert_close(mixer(tokens) - plain_of(mixer)(tokens), tokens, **EXACT)


@pytest.mark.parametrize("place", ["before", "after", "directions"])
def test_gradients_of_tokens_and_parameters(place: str) -> None:
    options = ScanOptions(
        proxy_channels=2,
        scan_norm="layer",
        scan_norm_place=place,
        channel_skip=True,
        scan_skip=True,
        scan_expansion=1.5,
        scan_directions=("right", "up"),
    )
    mixer = made(ScanMixer(4, options))
    names, tensors = zip(*mixer.named_parameters(), strict=True)

    def run(tokens: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(mixer, dict(zip(names, parameters, strict=True)), (tokens,))

    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    tokens = tokens_of(4, 2, 3, 1).requires_grad_()
    assert torch.autograd.gradcheck(run, (tokens, *leaves), fast_mode=True)


@pytest.mark.parametrize(
    ("options", "more"),
    [
        ({"scan_norm": "layer"}, 2 * 32),
        ({"scan_norm": "rms"}, 32),
        ({"scan_norm": "rms", "scan_norm_place": "before"}, 32),
        ({"scan_norm": "layer", "scan_norm_place": "directions"}, 4 * 2 * 32),
        ({"scan_directions": ("up", "down")}, -2 * (2 * (3 * 32 + 2 * 32) + 1)),
        ({"channel_skip": True}, 32),
        ({"gate_scale": 2.0}, 0),
    ],
)
def test_parameters_counted_by_hand(options: dict[str, Any], more: int) -> None:
    """A direction has 3·32 logits and 2·32 gates from a proxy of 2, and a merge weight."""
    count = [sum(p.numel() for p in ScanOptions(**given).create(32).parameters()) for given in (options, {})]
    assert count[0] - count[1] == more


@pytest.mark.parametrize(("expansion", "width"), [(0.5, 16), (1.5, 48), (1 / 18, 1)])
def test_a_scan_of_another_width_in_both_blocks(expansion: float, width: int) -> None:
    options = {"scan_expansion": expansion, "proxy_channels": 2, "depth": 2, "hidden_size": 32, "mixer": "gspn"}
    for name, biases in (("DiT-N/2", width + 32), ("GSPN-N/2", width)):  # of both maps; of the 7×7 convolution
        model = create_model(name, 3, 2, 8, **options).double()
        lively(model)
        plain = create_model(name, 3, 2, 8, **{**options, "scan_expansion": 1.0})
        latents = torch.randn(2, 2, 8, 8, dtype=torch.float64)
        output = model(latents, torch.tensor([1.0, 500.0]).double(), torch.tensor([0, 3]))
        output.square().sum().backward()
        assert all(bool(p.grad.any()) for p in model.parameters() if p.grad is not None)
        scan = 2 * width + 2 * 4 * 5 * width  # proxy; logits and gates of four directions
        around = 2 * 32 * width + biases + (0 if name == "DiT-N/2" else 49 * width)
        whole = 2 * 32 * 32 + (64 if name == "DiT-N/2" else 32 + 49 * 32) + 2 * 32 + 40 * 32
        counts = [sum(p.numel() for p in m.parameters()) for m in (model, plain)]
        assert counts[0] - counts[1] == len(model.blocks) * (scan + around - whole)


def test_gates_start_at_the_scale_that_is_asked_for() -> None:
    mixer = GSPNMixer(2048, 1, gate_scale=3.0)
    mixer.initialise()
    deviation = float(mixer.to_input_gate.weight.detach().std())
    assert deviation == pytest.approx(3 * 4**-0.25 / 128**0.5, rel=0.01)


def test_multiply_adds_and_working_memory() -> None:
    plain = ScanOptions().create(32)
    skipping = ScanOptions(channel_skip=True, scan_norm="layer", scan_norm_place="directions").create(32)
    assert skipping.multiply_adds(2, 3) - plain.multiply_adds(2, 3) == 6 * 32
    assert plain.working_elements(2, 3) == 4 * skipping.working_elements(2, 3)
    narrow = ScanMixer(32, ScanOptions(scan_expansion=0.5, proxy_channels=3))
    assert narrow.multiply_adds(2, 3) == 6 * (2 * 32 * 16 + 16 * 3 + 3 * 20 * 16 + 6 * 4 * 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scan_norm": "batch"}, "unknown scan_norm 'batch'; allowed are layer, rms"),
        ({"scan_norm": "rms", "scan_norm_place": "within"}, "unknown scan_norm_place .within.; allowed are before"),
        ({"scan_norm_place": "before"}, "scan_norm_place is before, but there is no norm; give scan_norm layer or rms"),
        ({"gate_scale": 0.0}, "gate_scale is 0.0, but must be above 0"),
        ({"scan_expansion": 0.01}, "scan_expansion 0.01 leaves none of the 32 channels"),
        ({"scan_expansion": -1}, "scan_expansion -1 leaves none"),
        ({"scan_expansion": "wide"}, "scan_expansion is 'wide', but must be of type float"),
        ({"channel_skip": "yes"}, "channel_skip is 'yes', but must be of type bool"),
        ({"channel_skip": 1}, "channel_skip is 1, but must be of type bool"),
        ({"proxy_ratio": 2.5}, "proxy_ratio is 2.5, but must be of type int"),
        ({"scan_norm": 3}, "scan_norm is 3, but must be of type str"),
        ({"weight_groups": "all"}, "weight_groups is 'all', but must be of type int"),
    ],
)  # fmt: skip
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MIXERS["gspn"][0](32, read_options("gspn", options))
