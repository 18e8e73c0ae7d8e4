"""The Inception net: where its weights come from, what is refused, its layers, and the whole path to a report."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fid import features, inception
from fid.images import LabelledImages, Reference
from fid.inception import WEIGHTS_SHA256, find_weights, read_weights
from gspn_dit.errors import UserError
from gspn_dit.protocols import PROTOCOLS
from tests.fid.conftest import noise_images
from tests.fid.random_inception import write_random_inception
from tests.fid.test_peer import PROTOCOL, assert_equal_figures, peer, write_pngs

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_inception(tmp_path_factory.mktemp("weights") / "random.pth")


@pytest.fixture(scope="module")
def random_net(weights: Path) -> features.FeatureNet:
    return features.load_inception(weights, allow_unknown=True)


def test_missing_weights_say_which_file_goes_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    expected = tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    with pytest.raises(UserError) as caught:
        find_weights(None)
    message = str(caught.value)
    assert str(expected) in message and "https://github.com/toshas/torch-fidelity/releases/" in message
    assert "--weights FILE" in message and "\n" not in message
    expected.parent.mkdir()
    expected.write_bytes(b"x")
    assert find_weights(None) == expected
    with pytest.raises(UserError, match=r"no Inception weights at nowhere\.pth: there is no such file"):
        find_weights("nowhere.pth")


def test_other_weights_are_refused_or_cost_the_name(weights: Path, random_net: features.FeatureNet) -> None:
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    with pytest.raises(UserError, match=f"is not the published Inception net .*{sha256[:12]}.*6726825d0af5.*no score"):
        read_weights(weights, allow_unknown=False)
    assert random_net.sha256 == sha256 and random_net.score_suffix == "unknown"
    assert random_net.names == {"fd": "FD-unknown", "sfd": "sFD-unknown", "is": "IS-unknown", "kid": "KID-unknown"}
    assert len(WEIGHTS_SHA256) == 64 and WEIGHTS_SHA256.startswith("6726825d")


def test_the_published_file_alone_gives_the_name(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inception, "WEIGHTS_SHA256", hashlib.sha256(weights.read_bytes()).hexdigest())
    net = features.load_inception(weights)
    assert net.names == {"fd": "FID", "sfd": "sFID", "is": "IS", "kid": "KID"}
    assert net.source == "Inception 2015-12-05"


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (os.environ["TRAP"],)


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAP", str(tmp_path / "trap"))
    path = tmp_path / "bad.pth"
    for write in (lambda: path.write_bytes(pickle.dumps({"a": Malicious()})), lambda: torch.save(Malicious(), path)):
        write()
        with pytest.raises(UserError, match=r"bad\.pth cannot be read as weights"):
            read_weights(path, allow_unknown=True)
    assert not (tmp_path / "trap").exists()
    torch.save([torch.zeros(1)], path)
    with pytest.raises(UserError, match="holds no state dict of tensors"):
        read_weights(path, allow_unknown=True)
    torch.save({"weight": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="are not those of the Inception net"):
        features.load_inception(path, allow_unknown=True)
    torch.save({"weight": torch.full((1,), torch.nan)}, path)
    with pytest.raises(UserError, match="are not finite: weight"):
        features.load_inception(path, allow_unknown=True)


def test_the_layers_are_those_of_the_peer_and_spatial_is_channels_last(random_net: features.FeatureNet) -> None:
    extractor = random_net.extractor
    branch: list[torch.Tensor] = []
    hook = extractor.net.Mixed_6d.branch1x1.register_forward_hook(lambda *found: branch.append(found[2]))
    images = torch.from_numpy(noise_images(1, 3, 16)).permute(0, 3, 1, 2)
    found = extractor.convert_features_tuple_to_dict(extractor(images))
    hook.remove()
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "features": (1, 2048),
        "logits": (1, 1008),
        "spatial": (1, 2023),
    }
    assert branch[0].shape == (1, 192, 17, 17)
    for row, column, channel in ((0, 0, 0), (0, 0, 6), (0, 1, 0), (3, 5, 2), (16, 16, 6)):
        place = (row * 17 + column) * 7 + channel
        assert found["spatial"][0, place] == branch[0][0, channel, row, column] >= 0
    torch.testing.assert_close(found["logits"], found["features"] @ extractor.net.fc.weight.T)
    assert found["features"].std() > 1e-3


@pytest.mark.slow
def test_figures_are_torch_fidelity_s_own_on_inception_too(
    tmp_path: Path, weights: Path, random_net: features.FeatureNet
) -> None:
    import fid

    drawn = write_pngs(noise_images(26, 0, 32, low=60), tmp_path / "drawn")
    real = write_pngs(noise_images(28, 1, 32), tmp_path / "real")
    report = fid.score(
        fid.images.read_samples(drawn), fid.images.read_reference(real, None), random_net, protocol=PROTOCOL
    )
    expected = peer(drawn, real, "inception-v3-compat", feature_extractor_weights_path=str(weights), batch_size=64)
    # with fewer images than features the peer sums the roots of 2,000 eigenvalues that are rounding errors
    assert_equal_figures(report, expected, of_distance=1e-5)


@pytest.mark.slow
def test_the_whole_path_with_a_weights_file(tmp_path: Path, weights: Path) -> None:
    """From files to a report, twice: the second time the reference's features come from the cache."""
    drawn = noise_images(24, 0, 32, low=60)
    write_pngs(drawn, tmp_path / "drawn")
    (tmp_path / "drawn" / "generation.json").write_text(json.dumps({"guidance_scale": 1.5, "seed": 3}))
    statistics = {"mu": np.zeros(2048), "sigma": np.eye(2048), "mu_s": np.zeros(2023), "sigma_s": np.eye(2023)}
    np.savez(tmp_path / "real.npz", arr_0=noise_images(22, 1, 32), **statistics)
    common = ["--samples", str(tmp_path / "drawn"), "--reference", str(tmp_path / "real.npz"), "--protocol", "quick"]
    known = ["--weights", str(weights), "--cache", str(tmp_path / "cache")]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "fid", *common, *known, *arguments], cwd=ROOT, capture_output=True, text=True
        )

    refused = run("--out", str(tmp_path / "refused"))
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and not (tmp_path / "refused").exists()
    assert "is not the published Inception net" in refused.stderr and "--allow-unknown-weights" in refused.stderr
    reports = []
    for name in ("first", "second"):
        done = run("--allow-unknown-weights", "--out", str(tmp_path / name))
        assert done.returncode == 0, done.stderr
        assert "FD-unknown" in done.stdout and "FID" not in done.stdout
        reports.append(json.loads((tmp_path / name / "report.json").read_text()))
    assert reports[0] == reports[1] and len(list((tmp_path / "cache").iterdir())) == 1
    scores = reports[0]["scores"]
    assert list(scores) == ["FD-unknown", "sFD-unknown", "IS-unknown", "KID-unknown", "precision", "recall", "n"]
    assert all(np.isfinite(scores[name]) and scores[name] > 0 for name in ("FD-unknown", "sFD-unknown"))
    assert reports[0]["settings"]["generation"] == {"guidance_scale": 1.5, "seed": 3}
    assert "FID" not in (tmp_path / "first" / "report.md").read_text().replace("are no FID", "")
    table = subprocess.run(
        [sys.executable, "-m", "fid", "compare", tmp_path / "first", tmp_path / "second"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (
        table.returncode == 0
        and "| generation" not in table.stdout
        and "| guidance_scale | 1.5 | 1.5 |" in table.stdout
    )


def test_a_full_protocol_wants_more_images_than_features(random_net: features.FeatureNet) -> None:
    import fid

    few = LabelledImages(noise_images(40, 0), "few")
    protocol = dataclasses.replace(PROTOCOLS["adm-50k"], num_samples=40, image_size=8)
    with pytest.raises(UserError, match=r"FD-unknown needs at least 2049 sample images \(its 2048 features \+ 1\), 40"):
        fid.score(few, Reference(few), random_net, protocol=protocol)
