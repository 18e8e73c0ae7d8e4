"""Scores of images that have captions: where captions come from, CLIP's, retrieval by CLIP or by a ridge map."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fid
from fid.captions import Texts, captions_beside, open_vectors
from fid.clip import load_clip
from fid.extraction import extract_all
from fid.features import load_inception
from fid.images import LabelledImages, Reference, read_reference, read_samples
from fid.inception import IMAGE_SIZE, RESIZES, resize_clean
from gspn_dit import protocols
from gspn_dit.errors import UserError
from tests.captioned import write_encoder
from tests.fid.conftest import noise_images, tiny_net
from tests.fid.random_inception import write_random_inception

COUNT = 24


def write_pngs(folder: Path, pixels: np.ndarray, captions: list[str] | None = None) -> Path:
    folder.mkdir(parents=True)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{number:03}.png")
    if captions is not None:
        rows = [{"file_name": f"{number:03}.png", "text": text} for number, text in enumerate(captions)]
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_clip(folder: Path) -> Path:
    """Write a CLIP of random weights, 8 channels and images of 16 pixels."""
    transformers = pytest.importorskip("transformers", reason="needs transformers (pip install 'gspn-dit[text]')")
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=12).save_pretrained(folder)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(words), "max_position_embeddings": 12, "bos_token_id": 52, "eos_token_id": 53, **sizes}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vision = {"image_size": 16, "patch_size": 8, **sizes}
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=6)
        transformers.CLIPModel(config).save_pretrained(folder)
    return folder


def captioned(seed: int = 0) -> LabelledImages:
    return LabelledImages(noise_images(COUNT, seed), "noise", captions=tuple(f"c{i}" for i in range(COUNT)))


# -- where captions come from ------------------------------------------------------------------------------------


def test_captions_lie_beside_samples_and_in_the_splits_of_a_reference(tmp_path: Path) -> None:
    names = [f"caption {number}" for number in range(4)]
    pixels = noise_images(4, 0)
    assert read_samples(write_pngs(tmp_path / "drawn", pixels, names)).captions == tuple(names)
    assert read_samples(write_pngs(tmp_path / "silent", pixels)).captions is None
    for split in ("train", "validation"):
        write_pngs(tmp_path / "real" / split / "group", pixels)
        rows = [{"file_name": f"group/{i:03}.png", "text": f"{split} {i}"} for i in range(4)]
        (tmp_path / "real" / split / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    real = read_reference(tmp_path / "real", 8)
    assert real.images.captions == tuple(f"train {i}" for i in range(4))
    assert real.held_out is not None and real.held_out.captions == tuple(f"validation {i}" for i in range(4))


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"file_name": "000.png"}', "metadata.jsonl has a line that is not"),
        ("[1]", "metadata.jsonl has a line that is not"),
        ('{"file_name": "001.png", "text": "a"}', "has no caption of .*000.png; every image needs one"),
    ],
)
def test_metadata_that_is_refused(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "metadata.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=message):
        captions_beside(tmp_path, lambda: [tmp_path / "000.png"])


# -- the scores --------------------------------------------------------------------------------------------------


def scored(drawn: LabelledImages, real: LabelledImages, texts: Texts, **options: Any) -> dict[str, Any]:
    return fid.score(drawn, Reference(real), tiny_net(), texts=texts, **options)


def test_retrieval_by_a_ridge_map_is_learnt_from_the_reference() -> None:
    """Vectors that a linear map of the features gives: every image finds its own caption, and moved ones do not."""
    real = captioned()
    (found,), _ = extract_all(real, [tiny_net()])
    centred = torch.nn.functional.normalize(found.features - found.features.mean(dim=0), dim=-1)
    vectors = 100 * centred @ torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    texts = Texts(lambda captions: vectors[[int(caption[1:]) for caption in captions]], "tests")
    report = scored(real, real, texts)
    assert report["scores"]["retrieval"] == 1 and "clip" not in report["scores"]
    assert report["titles"]["retrieval"] == "caption retrieval R@1"
    assert report["intervals"]["retrieval"]["low"] <= 1 and report["settings"]["captions"] == "tests"
    moved = dataclasses.replace(real, captions=(*real.captions[1:], real.captions[0]))  # type: ignore[index]
    assert scored(moved, real, texts)["scores"]["retrieval"] == 0


def test_without_captions_there_is_no_such_score() -> None:
    silent = dataclasses.replace(captioned(), captions=None)
    assert "retrieval" not in scored(silent, captioned(), Texts(lambda _: torch.zeros(0), "tests"))["scores"]


def test_the_clip_score_is_the_mean_cosine_of_transformers_own_vectors(tmp_path: Path) -> None:
    import transformers

    folder = write_clip(tmp_path)
    drawn, words = noise_images(COUNT, 3, size=16), [chr(97 + number) * 2 for number in range(COUNT)]
    images = LabelledImages(drawn, "noise", captions=tuple(words))
    net, texts = load_clip(folder)
    report = scored(images, images, dataclasses.replace(texts, net=0), others=[net])
    model: Any = transformers.CLIPModel.from_pretrained(folder)
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(words, padding=True, return_tensors="pt")
    mean, std = (np.array(values) for values in (net.extractor.mean.flatten(), net.extractor.std.flatten()))
    pixels = torch.from_numpy((drawn / 255 - mean) / std).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        out = model(**tokens, pixel_values=pixels)
    cosines = (out.image_embeds * out.text_embeds).sum(dim=1)
    assert report["scores"]["clip"] == pytest.approx(float(cosines.mean()), abs=1e-6)
    nearest = (out.image_embeds @ out.text_embeds.T).argmax(dim=1)
    assert report["scores"]["retrieval"] == pytest.approx(float((nearest == torch.arange(COUNT)).float().mean()))
    assert report["intervals"]["clip"]["low"] < report["scores"]["clip"] < report["intervals"]["clip"]["high"]
    assert f"FD-{net.score_suffix}" in report["scores"]


def test_clip_reads_oblong_images_from_their_middle(tmp_path: Path) -> None:
    net, _ = load_clip(write_clip(tmp_path))
    middle = torch.from_numpy(noise_images(2, 0, size=16)).permute(0, 3, 1, 2)
    wide = torch.nn.functional.pad(middle, (5, 5), value=9)
    assert torch.equal(net.extractor(middle)[0], net.extractor(wide)[0])


def test_vectors_are_the_mean_states_of_encoded_captions(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs transformers (pip install 'gspn-dit[text]')")
    from gspn_dit.prepare.encode_text import main
    from gspn_dit.text import TextEncoder

    encoder = write_encoder(tmp_path / "encoder")
    data = write_pngs(tmp_path / "data" / "train", noise_images(4, 0), ["a cat", "a dog", "a red cat", "a red dog"])
    words = ["--data", str(data.parent), "--encoder", encoder, "--max-tokens", "8", "--out", str(tmp_path / "texts")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["encode_text", *words])
        main()
    states = TextEncoder(encoder, 8).encode(["a red dog"]).states[0].mean(dim=0)
    texts = open_vectors(tmp_path / "texts")
    torch.testing.assert_close(
        texts.encode(["a red dog"])[0], torch.nn.functional.normalize(states, dim=0), rtol=2e-3, atol=2e-3
    )
    with pytest.raises(UserError, match="lacks 1 captions, such as 'a frog'"):
        texts.encode(["a cat", "a frog"])


# -- the protocol ------------------------------------------------------------------------------------------------


def test_clean_resizing_is_pillow_s_in_floating_point() -> None:
    """As clean-fid does: each channel as floats, bicubic with antialiasing, clipped and not rounded."""
    pixels = np.random.default_rng(0).integers(0, 256, (1, 3, 512, 400), dtype=np.uint8)
    found = resize_clean(torch.from_numpy(pixels))
    for channel in range(3):
        image = Image.fromarray(pixels[0, channel].astype(np.float32), mode="F")
        expected = np.asarray(image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)).clip(0, 255)
        np.testing.assert_allclose(found[0, channel].numpy(), expected, atol=0.01)


@pytest.mark.slow
def test_inception_sees_what_was_resized_cleanly(tmp_path: Path) -> None:
    """Of images that have its size already, both ways give the same; of smaller ones they do not."""
    weights = write_random_inception(tmp_path / "weights.pth")
    tensorflow, clean = (load_inception(weights, True, resize).extractor for resize in RESIZES)
    fitting, small = (torch.from_numpy(noise_images(2, 0, size)).permute(0, 3, 1, 2) for size in (IMAGE_SIZE + 1, 64))
    fitting = fitting[..., :IMAGE_SIZE, :IMAGE_SIZE]
    with torch.no_grad():
        assert torch.allclose(tensorflow(fitting)[0], clean(fitting)[0], rtol=1e-4, atol=1e-6)
        expected = clean(resize_clean(small).round().to(torch.uint8))[0]
        found, other = clean(small)[0], tensorflow(small)[0]
    assert (found - expected).norm() < 0.05 * (found - other).norm()


def test_every_protocol_resizes_in_a_known_way() -> None:
    assert {protocol.resize for protocol in protocols.PROTOCOLS.values()} == set(RESIZES)


def test_what_coco_30k_needs_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save: Any) -> None:
    monkeypatch.setattr("fid.evaluation._load_net", lambda *_: tiny_net(""))
    drawn, real = save(noise_images(COUNT, 0)), write_pngs(tmp_path / "real", noise_images(COUNT, 1))
    options = {"protocol": "coco-30k", "clip": write_clip(tmp_path / "clip")}
    with pytest.raises(UserError, match=r"needs --clip DIR: laion/CLIP-ViT-bigG-14-laion2B-39B-b160k of Hugging"):
        fid.evaluate(drawn, real, protocol="coco-30k")
    with pytest.raises(UserError, match=r"coco-30k needs 30,000 samples, .* has 24"):
        fid.evaluate(drawn, real, **options)
    monkeypatch.setitem(
        protocols.PROTOCOLS, "coco-30k", dataclasses.replace(protocols.PROTOCOLS["coco-30k"], num_samples=None)
    )
    with pytest.raises(UserError, match=r"coco-30k needs a caption of each sample: metadata.jsonl beside the PNGs"):
        fid.evaluate(drawn, real, **options)
    with pytest.raises(UserError, match=r"for images of captions: draw them with sample.py --prompts FILE"):
        protocols.check_model("coco-30k", 256, 1000)
    with pytest.raises(UserError, match=r"no config.json; it must hold a CLIP model with its tokenizer"):
        fid.evaluate(drawn, real, protocol="coco-30k", clip=tmp_path)


def test_captions_that_are_asked_for_and_not_there(tmp_path: Path) -> None:
    drawn = write_pngs(tmp_path / "drawn", noise_images(COUNT, 0))
    with pytest.raises(UserError, match="--clip brings its own vectors of captions; leave --texts out"):
        fid.evaluate(drawn, "digits", clip=tmp_path, texts=tmp_path)
    with pytest.raises(UserError, match="holds no encoded texts"):
        fid.evaluate(drawn, "digits", texts=tmp_path)
    with pytest.raises(UserError, match=r"the samples \(.*drawn\) have no captions to compare them with"):
        fid.evaluate(drawn, "digits", clip=write_clip(tmp_path / "clip"))
