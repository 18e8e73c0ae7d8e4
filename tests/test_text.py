"""Text encoders: a tiny one of known weights for the mathematics, and the one that a package holds for real texts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gspn_dit.errors import UserError
from gspn_dit.text import MINILM, TextEncoder, encode_all, encoder_place
from tests.captioned import write_encoder

transformers = pytest.importorskip(
    "transformers", reason="text encoders need transformers (pip install 'gspn-dit[text]')"
)


@pytest.fixture
def place(tmp_path: Path) -> str:
    return write_encoder(tmp_path)


def test_states_are_those_of_the_encoder_and_of_each_text_alone(place: str) -> None:
    encoder = TextEncoder(place, max_tokens=6)
    found = encoder.encode(["a red cat", "dog", ""])
    states, mask = found.states, found.mask
    assert states.shape == (3, 5, 16) and mask.sum(dim=1).tolist() == [5, 3, 2]
    alone = encoder.encode(["dog"]).states
    torch.testing.assert_close(states[1, :3], alone[0], rtol=1e-5, atol=1e-6)
    model = transformers.AutoModel.from_pretrained(place)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([[2, 4, 5, 6, 3]])).last_hidden_state[0]
    torch.testing.assert_close(states[0], expected, rtol=1e-5, atol=1e-6)


def test_a_table_gives_each_text_back_padded_with_zeros(place: str) -> None:
    encoder = TextEncoder(place, max_tokens=6)
    texts = ["dog", "a cat", "a red cat", "dog"]
    table = encode_all(encoder, texts)
    assert set(table.numbers) == {"", "dog", "a cat", "a red cat"} and table.length == 5
    found = table.batch([table.numbers[text] for text in ("a cat", "dog")] + [table.null])
    states, mask = found.states, found.mask
    assert mask.sum(dim=1).tolist() == [4, 3, 2] and not states[~mask].any()
    for row, text in enumerate(("a cat", "dog", "")):
        alone = encoder.encode([text]).states
        torch.testing.assert_close(states[row][mask[row]], alone[0], rtol=1e-5, atol=1e-6)


def test_tables_do_not_depend_on_the_order_of_texts(place: str) -> None:
    encoder = TextEncoder(place)
    texts = [f"a {'red ' * (n % 3)}{'cat' if n % 2 else 'dog'} {'a ' * n}" for n in range(20)]
    one, other = encode_all(encoder, texts), encode_all(encoder, texts[::-1])
    assert torch.equal(one.parts[0].states, other.parts[0].states) and one.numbers == other.numbers


def test_long_texts_are_cut(place: str) -> None:
    encoder = TextEncoder(place, max_tokens=4)
    assert encoder.lengths(["a red cat", "cat"]) == [4, 3]
    assert encoder.encode(["a red cat"]).states.shape == (1, 4, 16)


def test_encoders_are_told_apart(place: str) -> None:
    encoder = TextEncoder(place)
    before = encoder.spec()
    assert before == TextEncoder(place).spec()
    next(encoder.model.parameters())[0] += 1
    assert encoder.spec()["hash"] != before["hash"]
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())


def test_an_encoder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the text encoder .*nowhere cannot be loaded"):
        TextEncoder(str(tmp_path / "nowhere"))


def test_the_encoder_of_a_package_knows_what_words_mean() -> None:
    try:
        encoder_place(MINILM)
    except UserError as error:
        pytest.skip(str(error))
    found = TextEncoder().encode(["a cat", "a kitten", "a helicopter"])
    states, mask = found.states, found.mask
    means = torch.nn.functional.normalize((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=-1)
    assert states.shape[2] == 384 and means[0] @ means[1] > 0.7 > means[0] @ means[2] + 0.2
