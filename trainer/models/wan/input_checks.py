"""What the transformer is given, against what its shape takes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from trainer.contract.errors import DataError
from trainer.contract.variants import TransformerConfig
from trainer.models.wan.rope import MAX_POSITIONS


def check_latents(config: TransformerConfig, latents: Tensor, extra: Tensor | None) -> None:
    """Refuse latents, or channels behind them, that do not fit.

    Raises:
        DataError: they do not.
    """
    if latents.dim() != 5:
        raise DataError(f"latents are {tuple(latents.shape)}; (B, C, F, H, W) is needed")
    channels = latents.shape[1] + (0 if extra is None else extra.shape[1])
    if channels != config.in_channels:
        raise DataError(
            f"the model takes {config.in_channels} channels, {channels} were given",
            hint=_channel_hint(config),
        )
    if extra is not None and _without_channels(extra) != _without_channels(latents):
        raise DataError(
            f"extra channels {tuple(extra.shape)} and latents {tuple(latents.shape)} differ "
            "in more than channels"
        )
    for name, size, patch in zip(
        ("frames", "height", "width"), latents.shape[2:], config.patch_size, strict=True
    ):
        if size == 0 or size % patch or size // patch > MAX_POSITIONS:
            raise DataError(
                f"latent {name} of {size} cannot be cut into patches of {patch}",
                hint=f"give a multiple of {patch}, at most {MAX_POSITIONS * patch}",
            )


def check_conditioning(
    config: TransformerConfig,
    latents: Tensor,
    timestep: Tensor,
    context: Tensor | Sequence[Tensor],
    image: Tensor | None,
    reference: Tensor | None,
) -> None:
    """Refuse what goes beside the latents where it does not fit.

    Raises:
        DataError: something is missing, superfluous or of another shape.
    """
    batch, _, *size = latents.shape
    tokens = math.prod(size) // math.prod(config.patch_size)
    if tuple(timestep.shape) not in {(batch,), (batch, tokens)}:
        raise DataError(
            f"timestep has the shape {tuple(timestep.shape)}; ({batch},) or "
            f"({batch}, {tokens}) is needed"
        )
    if len(context) != batch:
        raise DataError(f"{len(context)} text embeddings for {batch} samples")
    wanted = _image_shape(config, batch)
    given = None if image is None else tuple(image.shape)
    if given != wanted:
        raise DataError(f"image context: {given} was given, {wanted} is needed")
    if reference is None:
        return
    if not config.reference_conv:
        raise DataError("this model takes no reference picture")
    if tuple(reference.shape) != (batch, config.out_channels, *size[1:]):
        raise DataError(f"the reference {tuple(reference.shape)} does not fit the latents")
    if timestep.dim() == 2:
        raise DataError("one timestep per token and a reference picture exclude one another")


def _image_shape(config: TransformerConfig, batch: int) -> tuple[int, int, int] | None:
    if config.image_dim is None:
        return None
    images = 2 if config.image_position_embedding else 1
    return batch, images * config.image_tokens, config.image_dim


def _channel_hint(config: TransformerConfig) -> str:
    extra = config.in_channels - config.out_channels
    if extra == 0:
        return "this is a text-to-video model: no extra channels"
    return f"{config.out_channels} latent channels and {extra} extra channels"


def _without_channels(tensor: Tensor) -> tuple[int, ...]:
    return (tensor.shape[0], *tensor.shape[2:])
