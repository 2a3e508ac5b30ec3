"""Caches of musubi-tuner for Wan: what its files hold, and whether one fits.

A latent file belongs to a window of a clip, `{stem}_{start:05d}-{frames:03d}_{width:04d}x
{height:04d}_wan.safetensors` (images without the window), with the clip's own size in its name. It
holds `latents_{F}x{H}x{W}_{dtype}` (C, F, H, W), for image-to-video models `latents_image_…`
(4 + C, F, H, W) and perhaps `clip_…` (257, D), for Fun-Control models `latents_control_…`
(C, F, H, W), beside the other two where the first frame is given, too. A text file
`{stem}_wan_te.safetensors` holds `varlen_t5_{dtype}` (T, D), the caption in its metadata. It knows
no masks.

Latents are normalised there as in Menma, (z - mean) / std of each channel with the constants of the
Wan VAE: its VAE applies them when it encodes. Mask and image latents have Menma's layout.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from trainer.contract.dataset_config import MediaKind, SourceOptions
from trainer.contract.errors import DataError
from trainer.contract.files import write_bytes
from trainer.contract.variants import Variant
from trainer.data.buckets import Bucket
from trainer.data.cache_settings import CacheDtype, uses_image_encoder
from trainer.data.entries import DTYPES
from trainer.data.latent_cache import EncodedWindow
from trainer.data.windows import Window

ARCHITECTURE = "wan"
LATENTS_GLOB = "*_wan.safetensors"
WRITER = "menma"
"""Metadata `written_by` of files that Menma writes: those it may write again."""
MAX_ZEROS = 0.1
"""Share of zeros in latents that is not by chance: musubi-tuner writes 0 for NaN."""

_MASK_CHANNELS = 4
"""Of the image latents; the frames that a latent of Wan's first VAE stands for."""
_LATENTS = re.compile(r"latents_(\d+)x(\d+)x(\d+)_\w+")
_IMAGE = re.compile(r"latents_image_\d+x\d+x\d+_\w+")
_CONTROL = re.compile(r"latents_control_\d+x\d+x\d+_\w+")
_CLIP = re.compile(r"clip_\w+")
_TEXT = re.compile(r"varlen_t5_\w+")


@dataclass(frozen=True, slots=True)
class ClipShape:
    """What of a clip stands in the name of its files."""

    stem: str
    """File name without its ending."""
    kind: MediaKind
    width: int
    """Of the clip itself, in pixels."""
    height: int


def latents_name(clip: ClipShape, window: Window) -> str:
    """Return the name of the file of a window."""
    part = f"_{window.start:05d}-{window.num_frames:03d}" if clip.kind == "video" else ""
    return f"{clip.stem}{part}_{clip.width:04d}x{clip.height:04d}_{ARCHITECTURE}.safetensors"


def text_name(stem: str) -> str:
    """Return the name of the file of a clip's caption."""
    return f"{stem}_{ARCHITECTURE}_te.safetensors"


def cache_folders(source: SourceOptions) -> list[Path]:
    """Return where musubi-tuner has put the caches of a source: its own folder, or the media's."""
    media = source.media_path
    folders = [source.cache_directory, media.parent if source.jsonl_file is not None else media]
    return [folder for folder in dict.fromkeys(folders) if folder is not None and folder.is_dir()]


def read_latents(
    path: Path,
    bucket: Bucket,
    variant: Variant,
    dtype: CacheDtype,
    *,
    control_first_frame: bool = False,
) -> EncodedWindow:
    """Return what a latent file holds, if it is what a window of this size needs.

    Args:
        path: the file.
        bucket: size of the window.
        variant: the model that it is for.
        dtype: precision of the cache.
        control_first_frame: Fun-Control models are given the first frame, too.

    Raises:
        DataError: it does not fit; the message is a reason such as "its latents have …".
    """
    tensors, metadata = _read(path)
    _require_architecture(metadata)
    if any(name.startswith("f_indices_") for name in tensors):
        raise DataError("it is of one-frame training")
    latents = _only(tensors, _LATENTS)
    _, stride_h, stride_w = variant.vae_stride
    expected = (
        variant.latent_channels,
        (bucket.num_frames - 1) // variant.vae_stride[0] + 1,
        bucket.height // stride_h,
        bucket.width // stride_w,
    )
    _require_shape("latents", latents, expected)
    _require_values("latents", latents, dtype)
    if float((latents == 0).float().mean()) > MAX_ZEROS:
        raise DataError("its latents hold many zeros, which stand for values that were not finite")
    if variant.conditioning == "none":
        return EncodedWindow(latents_CFHW=latents)
    if variant.conditioning == "control":
        return _controlled(tensors, latents, variant, dtype, first_frame=control_first_frame)
    return _conditioned(tensors, latents, expected, variant, dtype)


def read_context(path: Path, caption: str, variant: Variant, dtype: CacheDtype) -> Tensor:
    """Return the context (T, D) of a caption from its file, if it is of this very caption.

    Raises:
        DataError: it does not fit; the message is a reason.
    """
    tensors, metadata = _read(path)
    _require_architecture(metadata)
    if metadata.get("caption1", "").strip() != caption:
        raise DataError("it is of another caption")
    context = _only(tensors, _TEXT)
    if context.ndim != 2 or not 1 <= context.shape[0] <= variant.transformer.text_len:
        raise DataError(f"its context has the shape {list(context.shape)}")
    _require_values("context", context, dtype)
    return context


def write_latents_file(
    folder: Path,
    clip: ClipShape,
    window: Window,
    encoded: EncodedWindow,
    dtype: CacheDtype,
    *,
    control: bool = False,
    first_frame: bool = True,
) -> Path:
    """Write a window as musubi-tuner would; return the file.

    Args:
        folder: where to.
        clip: of which it is.
        window: which one.
        encoded: what is in it; a mask is left out, which musubi-tuner does not know.
        dtype: precision of what is written.
        control: the extra channels are those of a Fun-Control model.
        first_frame: which is given the first frame, too.

    Raises:
        DataError: a file that is not Menma's is there.
        DiskError: the disk is full, read-only or gone.
    """
    _, frames, height, width = encoded.latents_CFHW.shape
    size, word = f"{frames}x{height}x{width}", _dtype_name(DTYPES[dtype])
    tensors = {f"latents_{size}_{word}": encoded.latents_CFHW}
    if encoded.image_context_TD is not None and first_frame:
        tensors[f"clip_{word}"] = encoded.image_context_TD
    image = encoded.extra_channels_CFHW
    if image is not None and control:
        given, image = image.chunk(2)
        tensors[f"latents_control_{size}_{word}"] = given
        image = torch.cat([_first_frame_mask(image[:_MASK_CHANNELS]), image])
    if image is not None and first_frame:
        tensors[f"latents_image_{size}_{word}"] = image
    metadata = {"width": str(clip.width), "height": str(clip.height)}
    if clip.kind == "video":
        metadata["frame_count"] = str(window.num_frames)
    path = folder / latents_name(clip, window)
    _write(path, {name: part.to(DTYPES[dtype]) for name, part in tensors.items()}, metadata)
    return path


def write_context_file(
    folder: Path, stem: str, caption: str, context_TD: Tensor, dtype: CacheDtype
) -> Path:
    """Write the context of a caption as musubi-tuner would; return the file.

    Raises:
        DataError: a file that is not Menma's is there.
        DiskError: the disk is full, read-only or gone.
    """
    word = _dtype_name(DTYPES[dtype])
    path = folder / text_name(stem)
    _write(path, {f"varlen_t5_{word}": context_TD.to(DTYPES[dtype])}, {"caption1": caption})
    return path


def difference(theirs: Tensor, ours: Tensor) -> float:
    """Return ‖theirs - ours‖ / ‖ours‖."""
    exact = ours.double()
    norm = float(torch.linalg.vector_norm(exact))
    return float(torch.linalg.vector_norm(theirs.double() - exact)) / max(norm, 1e-12)


def has_caches(folder: Path) -> bool:
    """Tell whether latent files of musubi-tuner lie in a folder."""
    return next(_latent_files(folder), None) is not None


def _latent_files(folder: Path) -> Iterator[Path]:
    try:
        yield from folder.glob(LATENTS_GLOB)
    except OSError:
        return


def _conditioned(
    tensors: Mapping[str, Tensor],
    latents: Tensor,
    expected: tuple[int, ...],
    variant: Variant,
    dtype: CacheDtype,
) -> EncodedWindow:
    if variant.conditioning != "first_frame":
        raise DataError(f"it holds the first frame only, and {variant.name} is given more")
    image = _only(tensors, _IMAGE)
    mask_channels = variant.vae_stride[0]
    _require_shape("image latents", image, (mask_channels + expected[0], *expected[1:]))
    _require_values("image latents", image, dtype)
    mask = image[:mask_channels].float()
    if not torch.equal(mask, _first_frame_mask(mask)):
        raise DataError("its mask gives other frames than the first")
    context = _features(tensors, variant) if uses_image_encoder(variant) else None
    return EncodedWindow(latents_CFHW=latents, extra_channels_CFHW=image, image_context_TD=context)


def _controlled(
    tensors: Mapping[str, Tensor],
    latents: Tensor,
    variant: Variant,
    dtype: CacheDtype,
    *,
    first_frame: bool,
) -> EncodedWindow:
    """Return the channels as musubi-tuner trains on them: control, then the first frame or zeros.

    Its training drops the mask of the image latents, and what comes after their first frame.
    """
    control = _only(tensors, _CONTROL)
    _require_shape("control latents", control, tuple(latents.shape))
    _require_values("control latents", control, dtype)
    image = torch.zeros_like(control)
    context = None
    if first_frame:
        given = _only(tensors, _IMAGE)
        channels = variant.vae_stride[0] + latents.shape[0]
        _require_shape("image latents", given, (channels, *latents.shape[1:]))
        _require_values("image latents", given, dtype)
        image[:, :1] = given[variant.vae_stride[0] :, :1].to(image)
        context = _features(tensors, variant) if uses_image_encoder(variant) else None
    elif uses_image_encoder(variant):
        shape = variant.transformer.image_tokens, variant.transformer.image_dim or 0
        context = torch.zeros(shape, dtype=latents.dtype)
    extra = torch.cat([control, image])
    return EncodedWindow(latents_CFHW=latents, extra_channels_CFHW=extra, image_context_TD=context)


def _features(tensors: Mapping[str, Tensor], variant: Variant) -> Tensor:
    """Return the CLIP features of the first frame, (T, D)."""
    context = _only(tensors, _CLIP)
    width = variant.transformer.image_dim or 0
    _require_shape("image features", context, (variant.transformer.image_tokens, width))
    if not torch.isfinite(context).all():
        raise DataError("its image features hold NaN or infinite values")
    return context


def _first_frame_mask(like_CFHW: Tensor) -> Tensor:
    """Return the mask channels of a given first frame."""
    mask = torch.zeros_like(like_CFHW)
    mask[:, 0] = 1
    return mask


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            names = list(file.offset_keys())
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise DataError(f"it cannot be read: {error}") from None


def _require_architecture(metadata: Mapping[str, str]) -> None:
    found = metadata.get("architecture")
    if found != ARCHITECTURE:
        raise DataError(f"it is of the architecture {found!r}, not of Wan")


def _only(tensors: Mapping[str, Tensor], pattern: re.Pattern[str]) -> Tensor:
    found = [name for name in tensors if pattern.fullmatch(name)]
    if len(found) != 1:
        shown = pattern.pattern.partition("_")[0]
        raise DataError(f"it holds {len(found)} tensors {shown}_…, and one is needed")
    return tensors[found[0]]


def _require_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        sizes = ["x".join(map(str, shape)) for shape in (tensor.shape, expected)]
        raise DataError(f"its {name} have the shape {sizes[0]}, and {sizes[1]} is needed")


def _require_values(name: str, tensor: Tensor, dtype: CacheDtype) -> None:
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        raise DataError(f"its {name} are of type {_dtype_name(tensor.dtype)}")
    if dtype == "fp32" and tensor.dtype != torch.float32:
        raise DataError(
            f"its {name} are {_dtype_name(tensor.dtype)}, and memory.cache_dtype asks for fp32"
        )
    if not torch.isfinite(tensor).all():
        raise DataError(f"its {name} hold NaN or infinite values")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    if path.exists() and not _is_own(path):
        raise DataError(
            f"{path} is there already and not written by Menma", hint="choose another folder"
        )
    own = {"architecture": ARCHITECTURE, "format_version": "1.0.1", "written_by": WRITER}
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes(path, save(stored, {**metadata, **own}))


def _is_own(path: Path) -> bool:
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("written_by") == WRITER
    except (SafetensorError, OSError):
        return False
