"""Texts and captions that are encoded beforehand: over several shards, resumed, verified, and trained from."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from gspn_dit.data.captions import captions_of
from gspn_dit.data.latent_shards import CAPTIONS, open_latents
from gspn_dit.data.text_shards import open_texts
from gspn_dit.errors import UserError
from gspn_dit.prepare import encode, encode_text
from gspn_dit.text import encode_all, load_encoder
from tests.captioned import text_config, write_captioned, write_encoder, write_pipeline
from tests.training.conftest import run_training

pytest.importorskip("transformers", reason="needs transformers (pip install 'gspn-dit[text]')")

TEXTS = ["", "a cat", "a dog", "a red cat", "a red dog"]


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, str]:
    return write_captioned(tmp_path / "data", size=16), write_encoder(tmp_path / "encoder")


def make(out: Path, places: tuple[Path, str], *more: str) -> None:
    data, encoder = places
    words = ["--data", str(data), "--caption-column", "texts", "--encoder", encoder, "--max-tokens", "8"]
    encode_text.encode(encode_text.parse_arguments([*words, "--shard-texts", "2", "--out", str(out), *more]))


def verify(out: Path) -> None:
    encode_text.verify(encode_text.parse_arguments(["--out", str(out), "--verify"]))


def test_a_table_over_several_shards_is_that_of_the_encoder(tmp_path: Path, places: tuple[Path, str]) -> None:
    make(tmp_path / "texts", places)
    table, spec = open_texts(str(tmp_path / "texts"), places[1], 8)
    encoder = load_encoder(places[1], 8)
    assert spec == encoder.spec() and sorted(table.numbers) == TEXTS and len(table.parts) == 3
    assert sorted(table.numbers.values()) == list(range(5))
    whole = encode_all(encoder, TEXTS)
    for text in TEXTS:
        found, expected = (each.batch([each.numbers[text]]) for each in (table, whole))
        assert torch.equal(found.mask, expected.mask)
        torch.testing.assert_close(found.states, expected.states, rtol=1e-3, atol=2e-3)  # kept in float16


def test_an_unfinished_encoding_is_resumed_to_the_same_bytes(tmp_path: Path, places: tuple[Path, str]) -> None:
    out = tmp_path / "texts"
    make(out, places)
    before = {file.name: file.read_bytes() for file in out.iterdir() if file.suffix != ".lock"}
    manifest = json.loads(before["manifest.json"])
    (out / "plan.json").write_text(json.dumps({key: manifest[key] for key in manifest if key != "shards"}))
    (out / "manifest.json").unlink()
    (out / "shard-00001.safetensors").unlink()
    with pytest.raises(UserError, match="holds encoded texts already; --resume goes on"):
        make(out, places)
    with pytest.raises(UserError, match="unfinished: continue with --resume"):
        open_texts(str(out), places[1], 8)
    make(out, places, "--resume")
    assert {file.name: file.read_bytes() for file in out.iterdir() if file.suffix != ".lock"} == before
    with pytest.raises(UserError, match="was begun with texts = 5, now it is 6"):
        make(out, places, "--resume", "--prompt", "red")


def test_verify_notices_what_is_damaged(tmp_path: Path, places: tuple[Path, str]) -> None:
    out = tmp_path / "texts"
    make(out, places)
    verify(out)
    shard = out / "shard-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(bytes(content))
    with pytest.raises(UserError, match=r"shard-00001.safetensors is damaged \(checksum\)"):
        verify(out)
    shard.write_bytes(bytes(content)[:-1])
    with pytest.raises(UserError, match="encode the texts again with"):
        open_texts(str(out), places[1], 8)


def test_training_reads_a_table_and_refuses_one_that_does_not_fit(tmp_path: Path, places: tuple[Path, str]) -> None:
    make(tmp_path / "texts", places)
    run_training(text_config(tmp_path / "run", *places, {"text": {"table": str(tmp_path / "texts")}}, max_steps=1))
    for text, message in (
        ({"max_tokens": 7}, "--max-tokens 8, but text.encoder is .* and text.max_tokens 7; set them alike"),
        ({"prompts": ["red"]}, "lacks 1 of 5 captions and prompts, such as 'red'"),
    ):
        config = text_config(tmp_path / "other", *places, {"text": {"table": str(tmp_path / "texts"), **text}})
        with pytest.raises(UserError, match=message):
            run_training(config)


def test_latents_keep_their_captions_and_train_a_text_model(tmp_path: Path, places: tuple[Path, str]) -> None:
    pipeline = write_pipeline(tmp_path / "pipeline")
    for split in ("train", "validation"):
        words = ["--source", f"imagefolder:{places[0]}", "--split", split, "--captions", "texts", "--image-size", "16"]
        words += ["--vae", f"{pipeline}/vae", "--out", str(tmp_path / "latents" / split), "--shard-images", "5"]
        encode.run(encode.parse_arguments(words))
    latents = open_latents(tmp_path / "latents")
    expected = [("a cat", "a red cat") if row % 2 else ("a dog", "a red dog") for row in range(12)]
    assert captions_of(latents) == expected
    config = text_config(tmp_path / "run", tmp_path / "latents", places[1], {"data": {"name": "latents"}}, max_steps=1)
    run_training(config)
    place = tmp_path / "latents" / "train" / CAPTIONS
    kept = latents.manifest["captions"]
    assert hashlib.sha256(place.read_bytes()).hexdigest() == kept["sha256"]
    place.write_text(place.read_text().replace("cat", "cow"))
    with pytest.raises(UserError, match=r"captions.jsonl are damaged \(checksum\)"):
        captions_of(open_latents(tmp_path / "latents"))
