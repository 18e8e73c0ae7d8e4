"""The classification models behind timm's interface: what timm's users ask of a backbone, compiled and exported too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

timm = pytest.importorskip("timm")
import gspn_dit.timm  # noqa: E402  (enters the models)
from gspn_dit.models.backbones import BACKBONES  # noqa: E402
from gspn_dit.ops.decompositions import scan_decompositions  # noqa: E402

ROOT = Path(__file__).parents[2]
TIMMS_TESTS = os.environ.get("TIMM_TESTS", "")
"""timm's own tests/test_models.py, which its wheel lacks."""
TINY: dict[str, Any] = {"widths": (8, 16), "depths": (1, 1), "global_stages": (1,), "proxy_channels": 2}


def tiny(**options: Any) -> Any:
    """A small model of timm's registry, no parameter of which is left at zero."""
    torch.manual_seed(0)
    model = timm.create_model("gspn_tiny", **{"num_classes": 5, "stem_stride": 2, **TINY, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


# -- the registry ----------------------------------------------------------------------------------------------------


def test_all_presets_are_registered_and_say_how_images_are_prepared() -> None:
    assert gspn_dit.timm.__name__ in sys.modules
    assert set(timm.list_models("gspn*")) == set(BACKBONES)
    for name, preset in BACKBONES.items():
        config = timm.get_pretrained_cfg(name)
        assert config.input_size == (3, *preset.image_size)
        assert (config.first_conv, config.classifier) == ("stem.0.conv", "head")
        prepared = timm.data.resolve_data_config(pretrained_cfg=config.to_dict())
        assert (prepared["crop_pct"], prepared["interpolation"]) == (0.875, "bicubic")
        assert prepared["mean"] == (0.485, 0.456, 0.406)


@pytest.mark.parametrize(("height", "width"), [(224, 224), (160, 288)])
def test_any_size_of_one_grey_image_in_evaluation(height: int, width: int) -> None:
    """Batch 1, one channel, and no classifier: pooled features, which are the mean of the last map."""
    model = tiny(in_chans=1, num_classes=0)
    image = torch.randn(1, 1, height, width)
    with torch.no_grad():
        features = model(image)
        grids = model.forward_features(image)
    assert grids.shape == (1, 16, height // 4, width // 4)
    torch.testing.assert_close(features, grids.mean((2, 3)))


def test_pretrained_weights_that_there_are_not_are_refused() -> None:
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        timm.create_model("gspn_tiny", pretrained=True)


def test_a_directory_that_was_saved_is_read_by_timm(tmp_path: Path) -> None:
    model, images = tiny(in_chans=1), torch.randn(2, 1, 20, 16)
    model.save_pretrained(tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))


# -- features --------------------------------------------------------------------------------------------------------


def test_features_of_chosen_stages_are_those_of_the_model() -> None:
    whole = tiny()
    extractor = timm.create_model("gspn_tiny", features_only=True, out_indices=(0, 1), stem_stride=2, **TINY).eval()
    extractor.model.load_state_dict(whole.state_dict(), strict=False)
    images = torch.randn(2, 3, 40, 24)
    with torch.no_grad():
        first, second = extractor(images)
        _, expected = whole.forward_intermediates(images)
    assert extractor.feature_info.channels() == [8, 16] and extractor.feature_info.reduction() == [2, 4]
    assert (first.shape, second.shape) == ((2, 8, 20, 12), (2, 16, 10, 6))
    assert torch.equal(first, expected[0]) and torch.equal(second, expected[1])
    (last,) = timm.create_model("gspn_tiny", features_only=True, out_indices=[-1], stem_stride=2, **TINY)(images)
    assert last.shape == second.shape


class Segmenter(nn.Module):
    """Features of all stages, torchvision's pyramid over them, and a linear map of each place: logits at stride 2."""

    def __init__(self, classes: int) -> None:
        from torchvision.ops import FeaturePyramidNetwork

        super().__init__()
        self.backbone = timm.create_model(
            "gspn_nano", features_only=True, in_chans=1, widths=(16, 32), depths=(1, 1), stem_stride=2, stem_blocks=0
        )
        self.pyramid = FeaturePyramidNetwork(self.backbone.feature_info.channels(), 16)
        self.head = nn.Conv2d(16, classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        levels = self.pyramid({str(level): each for level, each in enumerate(self.backbone(images))})
        return self.head(levels["0"])


def squares_and_columns(count: int) -> tuple[Tensor, Tensor]:
    """Images [n, 1, 24, 24] with a bright patch, and labels [n, 12, 12] at stride 2: 0 nothing, 1 below the patch in
    its columns, 2 the patch. Only what sees far down from the patch can know 1.
    """
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.zeros(count, 1, 24, 24), torch.zeros(count, 12, 12, dtype=torch.int64)
    for image, label in zip(images, labels, strict=True):
        top, left = (int(place) for place in torch.randint(0, 6, (2,), generator=generator))
        label[top + 3 :, left : left + 3] = 1
        label[top : top + 3, left : left + 3] = 2
        image[0, 2 * top : 2 * top + 6, 2 * left : 2 * left + 6] = 1
    return images + 0.1 * torch.randn(images.shape, generator=generator), labels


def test_a_pyramid_on_the_features_learns_to_segment() -> None:
    """torchvision's FPN on features_only: gradients reach the backbone, and a task that needs long range is learnt."""
    torch.manual_seed(0)
    model = Segmenter(3)
    images, labels = squares_and_columns(48)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(40):
        loss = nn.functional.cross_entropy(model(images[:32]), labels[:32])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(parameter.grad is not None for parameter in model.backbone.model.stages.parameters())
    with torch.no_grad():
        right = model(images[32:]).argmax(dim=1) == labels[32:]
    shares = [right[labels[32:] == kind].float().mean().item() for kind in range(3)]
    assert min(shares) > 0.8, shares


# -- compiled and exported -------------------------------------------------------------------------------------------


def test_compiles_in_one_graph() -> None:
    """Forward and gradients of the compiled model are the eager one's."""
    from torch._dynamo.testing import CompileCounter

    images, kept = torch.randn(2, 3, 24, 24), torch.tensor([[True, False]] * 4)
    model, counter = tiny(drop_path_rate=0.3).train(), CompileCounter()
    expected = model(images, kept)
    torch._dynamo.reset()
    counted = torch.compile(model, backend=counter, fullgraph=True)
    torch.testing.assert_close(counted(images, kept), expected)
    assert counter.frame_count == 1
    expected.square().sum().backward()
    gradients = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(images, kept)
    compiled.square().sum().backward()
    assert gradients.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-4, msg=name)


def test_exports_with_the_scan_as_one_operator_for_any_batch(tmp_path: Path) -> None:
    model, images = tiny(), torch.randn(2, 3, 24, 24)
    batch = torch.export.Dim("batch", min=1, max=64)
    torch.export.save(torch.export.export(model, (images,), dynamic_shapes=({0: batch},)), tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    more = torch.randn(5, 3, 24, 24)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), model(images))
        torch.testing.assert_close(loaded(more), model(more))


def test_exports_for_any_size_whose_last_grid_exceeds_the_kernel() -> None:
    """A depthwise convolution takes another way on grids of fewer places than it has taps: that is one graph more."""
    model = tiny()
    height, width = (torch.export.Dim(name, min=8, max=64) for name in ("height", "width"))
    sizes = ({2: 4 * height, 3: 4 * width},)
    exported = torch.export.export(model, (torch.randn(1, 3, 64, 48),), dynamic_shapes=sizes).module()
    images = torch.randn(1, 3, 36, 128)
    with torch.no_grad():
        torch.testing.assert_close(exported(images), model(images))


def decomposed(model: nn.Module, images: Tensor) -> Any:
    """The program of a model, for any number of images, in which PyTorch's own operators scan."""
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
    return program.run_decompositions(scan_decompositions())


def test_scans_decompose_into_operators_of_pytorch_for_any_batch() -> None:
    model, images = tiny(), torch.randn(2, 3, 20, 12)
    program = decomposed(model, images)
    foreign = [str(node.target) for node in program.graph.nodes if "gspn" in str(node.target)]
    assert foreign == []
    more = torch.randn(5, 3, 20, 12)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(images), model(images))
        torch.testing.assert_close(program.module()(more), model(more))


@pytest.mark.slow
def test_a_decomposed_model_runs_in_onnx_runtime(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="torch.onnx needs onnxscript, which is not installed")
    model, images = tiny(), torch.randn(2, 3, 20, 12)
    torch.onnx.export(decomposed(model, images), (images,), dynamo=True, verbose=False).save(tmp_path / "model.onnx")
    session, more = runtime.InferenceSession(str(tmp_path / "model.onnx")), torch.randn(5, 3, 20, 12)
    for each in (images, more):
        (found,) = session.run(None, {session.get_inputs()[0].name: each.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), model(each).detach(), rtol=1e-4, atol=1e-5)


# -- timm's own tests ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gspn_tiny", "gspn2_tiny"])
def test_timms_own_tests_pass(name: str, tmp_path: Path) -> None:
    """timm's tests/test_models.py of the installed version, with our models entered before it lists them."""
    if not Path(TIMMS_TESTS).is_file():
        pytest.skip("the environment variable TIMM_TESTS names no tests/test_models.py of timm, which its wheel lacks")
    (tmp_path / "conftest.py").write_text(
        "import pytest\nimport gspn_dit.timm\n\n\ndef pytest_configure(config):\n"
        "    for name in ('base', 'cfg', 'torchscript', 'features', 'fxforward', 'fxbackward', 'timeout'):\n"
        "        config.addinivalue_line('markers', name)\n"
    )
    tests, modules = Path(TIMMS_TESTS).read_text(encoding="utf-8"), "FEAT_INTER_FILTERS = ["
    assert modules in tests
    tests = tests.replace(modules, f"{modules}'timm', ")  # ours, by its last name, has intermediate features, too
    (tmp_path / "test_models.py").write_text(tests, encoding="utf-8")
    apart = "not torchscript and not fx and not load_pretrained and not features_pretrained"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(tmp_path),
        "-k",
        f"{name} and {apart}",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout and " failed" not in done.stdout
