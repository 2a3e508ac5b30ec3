"""umT5, the text encoder of all Wan models: prompts to one vector per token.

The network is transformers' `UMT5EncoderModel`; names and files are handled here.

Shape letters: T text tokens (of one prompt, no padding), D width (4096 in the release).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.contract.errors import ModelFileError
from trainer.io.mapped_load import WeightFiles, open_weights
from trainer.models.wan.component_weights import Placement, Source, fill
from trainer.models.wan.tokenizer import (
    MAX_TOKENS,
    SentencePieceTokenizer,
    Tokenizer,
    find_tokenizer,
    load_tokenizer,
    truncate,
)
from trainer.quant.fp8 import Fp8Spec
from trainer.quant.linear import Fp8Linear

_EMBEDDED_TOKENIZER = "spiece_model"
_TIED = ("shared.weight", "encoder.embed_tokens.weight")
_BLOCK = {
    "layer.0.layer_norm": "norm1",
    "layer.0.SelfAttention.q": "attn.q",
    "layer.0.SelfAttention.k": "attn.k",
    "layer.0.SelfAttention.v": "attn.v",
    "layer.0.SelfAttention.o": "attn.o",
    "layer.0.SelfAttention.relative_attention_bias": "pos_embedding.embedding",
    "layer.1.layer_norm": "norm2",
    "layer.1.DenseReluDense.wi_0": "ffn.gate.0",
    "layer.1.DenseReluDense.wi_1": "ffn.fc1",
    "layer.1.DenseReluDense.wo": "ffn.fc2",
}
_OUTER = {
    "shared.weight": "token_embedding.weight",
    "encoder.final_layer_norm.weight": "norm.weight",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TextEncoderConfig:
    """Shape of a umT5 encoder. Defaults are those of umT5-xxl."""

    vocab_size: int = 256384
    dim: int = 4096
    num_layers: int = 24
    num_heads: int = 64
    head_dim: int = 64
    ffn_dim: int = 10240
    num_buckets: int = 32
    """Relative positions are sorted into so many buckets, ..."""
    max_distance: int = 128
    """... the last of which begins at this distance."""


def load_text_encoder(
    path: Path | str,
    tokenizer: Path | str | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    fp8: Fp8Spec | None = None,
) -> TextEncoder:
    """Load umT5 and its tokenizer.

    Args:
        path: a file with the official names (Wan-AI's .pth, Kijai's .safetensors) or with Hugging
            Face's (ComfyUI's, plain or scaled fp8), or diffusers' text_encoder folder.
        tokenizer: `spiece.model`, `tokenizer.json`, or a folder holding one; None takes the one
            inside the weight file or beside it.
        dtype: of weights and computation; None keeps float32 files as they are and takes
            bfloat16 for all others. float16 keeps the last feed-forward layers in float32, which
            would overflow otherwise.
        device: where it computes.
        fp8: hold the weights of the linear layers so; embeddings and norms are in `dtype`. Those
            that are fp8 in the file are used as they are, with the file's own scales.

    Raises:
        ModelFileError: it is not umT5 (T5 is another model), damaged, or has no tokenizer.
    """
    files = open_weights(path)
    original = _is_original(files)
    config = _config(files, original)
    with torch.device("meta"):
        model = build_umt5(config)
    dtype = dtype or _stored_dtype(files)
    sources = {
        name: Source(to_original(name) if original else _present(files, name))
        for name, _ in model.named_parameters()
    }
    # The tokenizer is no weight, and the table's second name no second table.
    ignore = {_EMBEDDED_TOKENIZER, *_TIED} - {source.name for source in sources.values()}
    place = Placement(dtype, device, mapped=True, fp8=fp8)
    fill(model, files, sources, place, what="umT5 encoder", ignore=ignore)
    _refuse_different_tables(files)
    _tie(model)
    for block in model.encoder.block:
        dense = block.layer[1].DenseReluDense
        if isinstance(dense.wo, Fp8Linear):
            dense.wo = _Unseen(dense.wo)
        elif dtype == torch.float16:
            dense.wo.float()
    chosen = tokenizer_of(files, tokenizer)
    _require_fit(chosen, config, files)
    return TextEncoder(model.eval(), chosen, config)


def check_text_encoder(files: WeightFiles) -> None:
    """Refuse what cannot be umT5; reads no more than the header.

    Raises:
        ModelFileError: the weights are of another model.
    """
    _config(files, _is_original(files))


def check_tokenizer(files: WeightFiles, tokenizer: Path | None = None) -> None:
    """Refuse a tokenizer that does not fit these weights of umT5; None is the one they come with.

    Raises:
        ModelFileError: it is not umT5's, or there is none.
    """
    _require_fit(tokenizer_of(files, tokenizer), _config(files, _is_original(files)), files)


class TextEncoder:
    """umT5 with its tokenizer; call it with prompts.

    Attributes:
        model: transformers' `UMT5EncoderModel`, frozen.
        config: its shape.
        tokenizer: text to ids.
        max_tokens: longer prompts are cut; `token_counts` tells which.
    """

    def __init__(self, model: Any, tokenizer: Tokenizer, config: TextEncoderConfig) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.config = config
        self.max_tokens = MAX_TOKENS

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        weight: Tensor = self.model.shared.weight
        return weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights and of the result."""
        weight: Tensor = self.model.shared.weight
        return weight.dtype

    def to(self, device: torch.device | str) -> TextEncoder:
        """Move the weights to `device`, in place."""
        self.model.to(device)
        _tie(self.model)
        return self

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        """Return the tokens of each prompt before cutting; above `max_tokens` the end is lost."""
        return [len(self.tokenizer.encode(prompt)) for prompt in prompts]

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> list[Tensor]:
        """Return one (T, D) per prompt in the encoder's dtype and device, T its true length.

        Each prompt runs alone and unpadded, which equals the official padded and masked run, and
        makes the result independent of the prompts beside it.
        """
        return [self._encode(prompt) for prompt in prompts]

    def _encode(self, prompt: str) -> Tensor:
        ids = truncate(self.tokenizer.encode(prompt), self.max_tokens)
        output = self.model(input_ids=torch.tensor([ids], device=self.device))
        states: Tensor = output.last_hidden_state[0]
        return states.to(self.dtype)


class _Unseen(nn.Module):
    """A layer whose weight transformers does not see: it rounds activations to the dtype of `wo`'s,
    which must not happen for fp8."""

    weight = None

    def __init__(self, layer: Fp8Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., I) to (..., O)."""
        out: Tensor = self.layer(x)
        return out


def build_umt5(config: TextEncoderConfig) -> Any:
    """Return transformers' umT5 encoder of this shape, embedding tied, weights uninitialised."""
    from transformers import UMT5Config, UMT5EncoderModel

    model = UMT5EncoderModel(
        UMT5Config(
            vocab_size=config.vocab_size,
            d_model=config.dim,
            d_kv=config.head_dim,
            d_ff=config.ffn_dim,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            relative_attention_num_buckets=config.num_buckets,
            relative_attention_max_distance=config.max_distance,
            feed_forward_proj="gated-gelu",
            layer_norm_epsilon=1e-6,
            dropout_rate=0.0,
        )
    )
    _tie(model)
    return model


def to_original(name: str) -> str:
    """Translate a Hugging Face name of umT5's encoder to the official one."""
    if name in _OUTER:
        return _OUTER[name]
    match = re.fullmatch(r"encoder\.block\.(\d+)\.(.+)\.weight", name)
    if match is None:
        raise ValueError(f"not a tensor of umT5's encoder: {name}")
    return f"blocks.{match[1]}.{_BLOCK[match[2]]}.weight"


def _tie(model: Any) -> None:
    # transformers 5.0 left the encoder's table untied and zero: the result was plausible noise.
    model.encoder.embed_tokens.weight = model.shared.weight
    if model.get_input_embeddings().weight is not model.encoder.embed_tokens.weight:
        raise RuntimeError("umT5's two embedding tables are not one tensor")


def _config(files: WeightFiles, original: bool) -> TextEncoderConfig:
    def name(hugging_face: str) -> str:
        return to_original(hugging_face) if original else _present(files, hugging_face)

    block = "encoder.block.0.layer."
    wanted = {
        "embedding": name("shared.weight"),
        "query": name(f"{block}0.SelfAttention.q.weight"),
        "bias": name(f"{block}0.SelfAttention.relative_attention_bias.weight"),
        "gate": name(f"{block}1.DenseReluDense.wi_0.weight"),
    }
    if not all(item in files for item in wanted.values()):
        raise ModelFileError(
            f"{files.path} is not a umT5 encoder",
            hint="give models_t5_umt5-xxl-enc-bf16.pth, umt5_xxl_*.safetensors or a text_encoder "
            "folder; T5 v1.1 (FLUX, SD3, Mochi) is another model",
        )
    shapes = {key: files[item].shape for key, item in wanted.items()}
    layers = _count_layers(files)
    biases = sum("relative_attention_bias" in item or "pos_embedding" in item for item in files)
    if biases < layers:
        raise ModelFileError(
            f"{files.path} is a T5 encoder, Wan needs umT5",
            hint="it has position biases in its first layer only, umT5 in each; give umt5-xxl",
        )
    heads = shapes["bias"][1]
    return TextEncoderConfig(
        vocab_size=shapes["embedding"][0],
        dim=shapes["embedding"][1],
        num_layers=layers,
        num_heads=heads,
        head_dim=shapes["query"][0] // heads,
        ffn_dim=shapes["gate"][0],
        num_buckets=shapes["bias"][0],
        max_distance=files.config.get("relative_attention_max_distance", 128),
    )


def _count_layers(files: WeightFiles) -> int:
    found = (re.match(r"(?:encoder\.block|blocks)\.(\d+)\.", name) for name in files)
    return 1 + max(int(match[1]) for match in found if match)


def _present(files: WeightFiles, name: str) -> str:
    """Return `name`, or its tied twin where a file has only that."""
    if name == _TIED[0] and name not in files and _TIED[1] in files:
        return _TIED[1]
    return name


def _stored_dtype(files: WeightFiles) -> torch.dtype:
    sizes: Counter[torch.dtype] = Counter()
    for info in files.values():
        if info.dtype.is_floating_point:
            sizes[info.dtype] += info.nbytes
    return torch.float32 if sizes.most_common(1)[0][0] == torch.float32 else torch.bfloat16


def _refuse_different_tables(files: WeightFiles) -> None:
    if all(name in files for name in _TIED):
        first, second = (files.read(name) for name in _TIED)
        if first.shape != second.shape or not torch.equal(first, second):
            raise ModelFileError(
                f"{files.path} holds two different embedding tables, {' and '.join(_TIED)}",
                hint="they are one tensor in umT5; the file was saved wrongly, use another",
            )


def _is_original(files: WeightFiles) -> bool:
    return any(name.endswith("blocks.0.attn.q.weight") for name in files)


def tokenizer_of(files: WeightFiles, tokenizer: Path | str | None) -> Tokenizer:
    """Return the tokenizer that is given, or the one that comes with the weights.

    Raises:
        ModelFileError: there is none, or it is not umT5's.
    """
    return load_tokenizer(tokenizer) if tokenizer else _own_tokenizer(files)


def _require_fit(tokenizer: Tokenizer, config: TextEncoderConfig, files: WeightFiles) -> None:
    if tokenizer.num_pieces > config.vocab_size:
        raise ModelFileError(
            f"the tokenizer has {tokenizer.num_pieces} pieces, {files.path} only "
            f"{config.vocab_size}",
            hint="they belong to different models; use the tokenizer of google/umt5-xxl",
        )


def _own_tokenizer(files: WeightFiles) -> Tokenizer:
    if _EMBEDDED_TOKENIZER in files:
        content = bytes(files.read(_EMBEDDED_TOKENIZER).numpy())
        return SentencePieceTokenizer(content, f"{_EMBEDDED_TOKENIZER} in {files.path}")
    path = files.path
    home = path if path.is_dir() else path.parent
    return find_tokenizer(
        folder / inner
        for folder in (home, home.absolute().parent)
        for inner in (".", "tokenizer", "google/umt5-xxl")
    )
