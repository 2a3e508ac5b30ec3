"""Shape of a Wan VAE and the statistics its latents are normalised with.

The statistics are those of the official releases (Wan2.1 and Wan2.2 repositories; diffusers'
`AutoencoderKLWan` configs carry the same numbers).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from trainer.contract.errors import ConfigError, ModelFileError

VAEVersion = Literal["2.1", "2.2"]

WIDTH_FACTORS = (1, 2, 4, 4)
"""Channels of the four resolutions, as multiples of the base width."""
RESIDUAL_BLOCKS = 2
"""Residual blocks per resolution in the encoder; the decoder has one more."""

MEAN_21 = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
STD_21 = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)
MEAN_22 = (
    *(-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557),
    *(-0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825),
    *(-0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502),
    *(-0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230),
    *(-0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748),
    *(0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
)
STD_22 = (
    *(0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013),
    *(0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978),
    *(0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659),
    *(0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093),
    *(0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887),
    *(0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
)
_STATISTICS = {16: (MEAN_21, STD_21), 48: (MEAN_22, STD_22)}

_METADATA_KEY = "menma.config"


@dataclass(frozen=True, slots=True, kw_only=True)
class VAEConfig:
    """Shape of a Wan VAE. Defaults are those of the 2.1 release.

    Raises:
        ConfigError: the latent statistics are missing or do not fit `z_dim`.
    """

    version: VAEVersion = "2.1"
    base_dim: int = 96
    """Width of the encoder at full resolution."""
    decoder_base_dim: int = 96
    """Width of the decoder at full resolution."""
    z_dim: int = 16
    """Channels of the latents."""
    latents_mean: tuple[float, ...] = ()
    """One per channel; () takes those of the release with `z_dim` channels."""
    latents_std: tuple[float, ...] = ()
    """One per channel; () takes those of the release with `z_dim` channels."""

    def __post_init__(self) -> None:
        """Fill in the released statistics."""
        if not self.latents_mean and not self.latents_std and self.z_dim in _STATISTICS:
            mean, std = _STATISTICS[self.z_dim]
            object.__setattr__(self, "latents_mean", mean)
            object.__setattr__(self, "latents_std", std)
        if {len(self.latents_mean), len(self.latents_std)} != {self.z_dim}:
            raise ConfigError(
                f"a VAE with {self.z_dim} latent channels needs latents_mean and latents_std of "
                f"{self.z_dim} numbers each",
                hint="only those of 16 and 48 channels are known; a VAE of another size carries "
                "its own in its metadata or config.json",
            )
        if not all(value > 0 for value in self.latents_std):
            raise ConfigError("latents_std must be positive")

    @property
    def pixel_patch(self) -> int:
        """2.2 folds 2x2 pixels into channels before the encoder."""
        return 2 if self.version == "2.2" else 1

    @property
    def stride(self) -> tuple[int, int, int]:
        """Pixels per latent along frames, height, width."""
        spatial = 8 * self.pixel_patch
        return (4, spatial, spatial)


VAE_21 = VAEConfig()
VAE_22 = VAEConfig(version="2.2", base_dim=160, decoder_base_dim=256, z_dim=48)


def vae_metadata(config: VAEConfig) -> dict[str, str]:
    """Return the safetensors metadata from which `load_vae` restores `config`."""
    return {"format": "pt", "menma.kind": "vae", _METADATA_KEY: json.dumps(asdict(config))}


def with_stored_statistics(
    shape: VAEConfig | Mapping[str, Any], metadata: Mapping[str, str], config: Mapping[str, Any]
) -> VAEConfig:
    """Combine what the tensors tell (`shape`) with the statistics the file carries, if any.

    Args:
        shape: `version`, `base_dim`, `decoder_base_dim`, `z_dim`, as seen in the tensors.
        metadata: the safetensors header; Menma's own files carry the whole config.
        config: diffusers' `config.json`, or {}.

    Raises:
        ModelFileError: metadata and tensors contradict each other.
    """
    seen = dict(shape) if isinstance(shape, Mapping) else asdict(shape)
    if _METADATA_KEY in metadata:
        stored = _read_config(metadata[_METADATA_KEY])
        for name, value in seen.items():
            if name in {"version", "base_dim", "decoder_base_dim", "z_dim"} and value != getattr(
                stored, name
            ):
                raise ModelFileError(
                    f"the VAE file says {name} = {getattr(stored, name)}, its tensors {value}",
                    hint="the header was edited or the file is damaged; make it again",
                )
        return stored
    seen |= {
        name: tuple(config[name]) for name in ("latents_mean", "latents_std") if config.get(name)
    }
    try:
        return VAEConfig(**seen)
    except ConfigError as error:
        raise ModelFileError(error.message, hint=error.hint) from error


def _read_config(text: str) -> VAEConfig:
    try:
        values = json.loads(text)
        known = {field.name for field in fields(VAEConfig)}
        config = replace(VAE_21, **{name: values[name] for name in values if name in known})
        return replace(
            config,
            latents_mean=tuple(config.latents_mean),
            latents_std=tuple(config.latents_std),
        )
    except (ValueError, TypeError, AttributeError, ConfigError) as error:
        raise ModelFileError(
            f"the VAE file's {_METADATA_KEY} is not readable: {error}", hint="make the file again"
        ) from error
