"""The Wan VAEs: video to normalised latents and back, in bounded memory.

Both are causal in time: a video of 4 k + 1 frames becomes k + 1 latent frames, of which the first
depends on the first frame alone (Wan technical report, arXiv 2503.20314, section 4.1).

Shape letters: B batch, C channels, F frames, H/W height and width; lower case f, h, w in latents.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

from trainer.contract.errors import DataError
from trainer.io.atomic_save import save_safetensors
from trainer.io.mapped_load import open_weights
from trainer.models.wan.component_weights import Placement, Source, fill
from trainer.models.wan.fan_in import init_fan_in
from trainer.models.wan.vae_blocks import CausalConv3d, FrameCache
from trainer.models.wan.vae_coders import Decoder, Encoder
from trainer.models.wan.vae_config import VAEConfig, VAEVersion, vae_metadata
from trainer.models.wan.vae_keys import recognise_vae
from trainer.models.wan.vae_tiling import tile_in_latents, tiles

__all__ = ["VAEConfig", "WanVAE", "load_vae", "save_vae", "vae_metadata"]

_FRAMES_PER_LATENT = 4


def load_vae(
    path: Path | str,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> WanVAE:
    """Load a Wan 2.1 or 2.2 VAE; which one is told from the file.

    Args:
        path: a file with the official names (.pth or .safetensors: Wan-AI, ComfyUI, Kijai, Menma),
            or diffusers' vae folder.
        dtype: of weights and computation; norms and latents stay float32.

    Raises:
        ModelFileError: it is no Wan VAE, or damaged.
    """
    files = open_weights(path)
    layout = recognise_vae(files)
    with torch.device("meta"):
        vae = WanVAE(layout.config)
    sources = {name: Source(layout.file_name(name)) for name, _ in vae.named_parameters()}
    what = f"Wan {layout.config.version} VAE"
    fill(vae, files, sources, Placement(dtype, device), what=what)
    return vae.eval()


def save_vae(vae: WanVAE, path: Path | str) -> None:
    """Write `vae` under the official names, its config in the metadata.

    Raises:
        DiskError: it could not be written; what was at `path` is intact.
    """
    save_safetensors(vae.state_dict(), path, vae_metadata(vae.config))


class WanVAE(nn.Module):
    """Encoder, decoder and latent statistics of one VAE. Module names are the official ones.

    Gradients flow through `encode`, `decode` and `encode_moments`; memory is bounded only without.
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.conv1 = CausalConv3d(config.z_dim * 2, config.z_dim * 2, 1)
        self.conv2 = CausalConv3d(config.z_dim, config.z_dim, 1)
        self.decoder = Decoder(config)

    @classmethod
    def random(cls, config: VAEConfig, seed: int = 0) -> WanVAE:
        """Return an untrained VAE whose weights are a function of `seed` (fan-in scaled)."""
        vae = cls(config)
        init_fan_in(vae, seed)
        return vae

    @property
    def version(self) -> VAEVersion:
        """Which release's architecture it is."""
        return self.config.version

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return self.config.z_dim

    @property
    def stride(self) -> tuple[int, int, int]:
        """Pixels per latent along frames, height, width."""
        return self.config.stride

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights and of decoded videos."""
        return self.conv1.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.conv1.weight.device

    def encode(self, video_BCFHW: Tensor, *, tile: tuple[int, int] | None = None) -> Tensor:
        """Return the normalised posterior mean, (B, C, f, h, w) in float32 on the VAE's device.

        Args:
            video_BCFHW: (B, 3, 4 k + 1, H, W) in [-1, 1], any float dtype, any device.
            tile: (height, width) in pixels: encode overlapping tiles and blend them. The result
                differs slightly near the seams.

        Raises:
            DataError: frames are not 4 k + 1, or a side is not a multiple of the stride.
        """
        self._check_video(video_BCFHW)
        if tile is None:
            return self.normalise(self.encode_moments(video_BCFHW)[0])
        latents = self._new_latents(video_BCFHW)
        height, width = latents.shape[3:]
        cells = tile_in_latents(tile, self.stride)
        for small, large in tiles(height, width, cells, self.stride[1], latents.dtype):
            part = self.encode(video_BCFHW[..., large.rows, large.columns])
            latents[..., small.rows, small.columns] += small.weigh(part)
        return latents

    def encode_moments(self, video_BCFHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance of the posterior, (B, C, f, h, w) each, not normalised.

        Raises:
            DataError: frames are not 4 k + 1, or a side is not a multiple of the stride.
        """
        self._check_video(video_BCFHW)
        cache = FrameCache()
        moments = []
        for frames in _chunks(video_BCFHW, _FRAMES_PER_LATENT):
            pixels = frames.to(device=self.device, dtype=self.dtype)
            hidden = self.encoder(_fold_pixels(pixels, self.config.pixel_patch), cache)
            moments.append(self.conv1(hidden, cache))
            cache.first_chunk = False
        mean, log_variance = torch.cat(moments, dim=2).chunk(2, dim=1)
        return mean, log_variance

    def decode(
        self, latents_BCFHW: Tensor, *, tile: tuple[int, int] | None = None, clamp: bool = True
    ) -> Tensor:
        """Return the video, (B, 3, 4 (f - 1) + 1, H, W) in the VAE's dtype and device.

        Args:
            latents_BCFHW: normalised latents (B, C, f, h, w), any float dtype, any device.
            tile: (height, width) in pixels: decode overlapping tiles and blend them.
            clamp: cut to [-1, 1], which blocks the gradient of what lies outside.

        Raises:
            DataError: the latents are not of this VAE.
        """
        if tile is None:
            return torch.cat(list(self.decode_chunks(latents_BCFHW, clamp=clamp)), dim=2)
        self._check_latents(latents_BCFHW)
        video = self._new_video(latents_BCFHW)
        height, width = latents_BCFHW.shape[3:]
        cells = tile_in_latents(tile, self.stride)
        for small, large in tiles(height, width, cells, self.stride[1], video.dtype):
            part = self.decode(latents_BCFHW[..., small.rows, small.columns], clamp=clamp)
            video[..., large.rows, large.columns] += large.weigh(part.to(video.dtype))
        return video.to(self.dtype)

    def decode_chunks(self, latents_BCFHW: Tensor, *, clamp: bool = True) -> Iterator[Tensor]:
        """Yield the video as it is decoded: one frame (B, 3, 1, H, W), then four at a time.

        Raises:
            DataError: the latents are not of this VAE.
        """
        self._check_latents(latents_BCFHW)
        cache = FrameCache()
        for frames in _chunks(latents_BCFHW, 1):
            hidden = self.conv2(self.denormalise(frames), cache)
            pixels = _unfold_pixels(self.decoder(hidden, cache), self.config.pixel_patch)
            cache.first_chunk = False
            yield pixels.clamp(-1, 1) if clamp else pixels

    def normalise(self, mean_BCFHW: Tensor) -> Tensor:
        """Return (mean - latents_mean) / latents_std, in float32 or better."""
        mean, std, wide = self._statistics(mean_BCFHW)
        return (mean_BCFHW.to(wide) - mean) / std

    def denormalise(self, latents_BCFHW: Tensor) -> Tensor:
        """Undo `normalise`; the result has the VAE's dtype and device."""
        mean, std, wide = self._statistics(latents_BCFHW)
        raw = latents_BCFHW.to(device=self.device, dtype=wide) * std + mean
        return raw.to(self.dtype)

    def _statistics(self, values: Tensor) -> tuple[Tensor, Tensor, torch.dtype]:
        # Not buffers: a cast of the module to bf16 would round them.
        wide = torch.promote_types(values.dtype, torch.float32)
        mean, std = (
            torch.tensor(numbers, dtype=wide, device=self.device).view(-1, 1, 1, 1)
            for numbers in (self.config.latents_mean, self.config.latents_std)
        )
        return mean, std, wide

    def _new_latents(self, video: Tensor) -> Tensor:
        batch, _, frames, height, width = video.shape
        time, rows, columns = self.stride
        return torch.zeros(
            (
                batch,
                self.latent_channels,
                (frames - 1) // time + 1,
                height // rows,
                width // columns,
            ),
            dtype=torch.promote_types(self.dtype, torch.float32),
            device=self.device,
        )

    def _new_video(self, latents: Tensor) -> Tensor:
        batch, _, frames, height, width = latents.shape
        time, rows, columns = self.stride
        return torch.zeros(
            (batch, 3, (frames - 1) * time + 1, height * rows, width * columns),
            dtype=torch.promote_types(self.dtype, torch.float32),
            device=self.device,
        )

    def _check_video(self, video: Tensor) -> None:
        if video.ndim != 5 or video.shape[1] != 3:
            raise DataError(f"a video is (batch, 3, frames, height, width), not {_shape(video)}")
        frames, height, width = video.shape[2:]
        if frames % _FRAMES_PER_LATENT != 1:
            below = (frames - 1) // 4 * 4 + 1
            raise DataError(
                f"the VAE takes 4 k + 1 frames, the video has {frames}",
                hint=f"cut it to {max(below, 1)} frames" if frames else "it has no frame",
            )
        step = self.stride[1]
        if height % step or width % step or not height * width:
            raise DataError(
                f"the Wan {self.version} VAE takes sides that are multiples of {step}, the video "
                f"is {width}x{height}",
                hint=f"resize or crop it to {width // step * step}x{height // step * step}",
            )

    def _check_latents(self, latents: Tensor) -> None:
        if latents.ndim != 5 or latents.shape[1] != self.latent_channels or not latents.numel():
            raise DataError(
                f"latents of the Wan {self.version} VAE are (batch, {self.latent_channels}, "
                f"frames, height, width), not {_shape(latents)}",
                hint="16 channels belong to the 2.1 VAE, 48 to the 2.2 VAE",
            )


def _chunks(frames_BCFHW: Tensor, length: int) -> Iterator[Tensor]:
    """Yield the first frame, then `length` frames at a time."""
    yield frames_BCFHW[:, :, :1]
    for start in range(1, frames_BCFHW.shape[2], length):
        yield frames_BCFHW[:, :, start : start + length]


def _fold_pixels(video: Tensor, patch: int) -> Tensor:
    """Move `patch` x `patch` pixels into channels, in the order channel, column, row."""
    if patch == 1:
        return video
    return rearrange(video, "b c f (h q) (w r) -> b (c r q) f h w", q=patch, r=patch)


def _unfold_pixels(x: Tensor, patch: int) -> Tensor:
    """Undo `_fold_pixels`."""
    if patch == 1:
        return x
    return rearrange(x, "b (c r q) f h w -> b c f (h q) (w r)", q=patch, r=patch)


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
