"""The Wan models Menma knows: one table entry each.

Sizes and sampling defaults are those of the official releases (Wan-Video repositories, 2.1 and
2.2). A size that is not of a released model (a test model, the demo's) is described by a
`TransformerConfig` of its own, read from the file's metadata or given by the caller.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from trainer.contract.errors import ConfigError
from trainer.contract.registry import nearest

Conditioning = Literal["none", "first_frame", "first_last_frame", "control"]
Expert = Literal["low_noise", "high_noise"]
"""One of Wan 2.2's two transformers."""

NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
"""What the official repositories use when the user gives no negative prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformerConfig:
    """Shape of a Wan transformer. Defaults are the 1.3B text-to-video model's."""

    dim: int = 1536
    ffn_dim: int = 8960
    num_heads: int = 12
    num_layers: int = 30
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    text_len: int = 512
    image_dim: int | None = None
    """Width of the CLIP features; None: no image branch (everything but 2.1 I2V, FLF2V, Fun)."""
    image_tokens: int = 257
    """CLIP tokens per image; FLF2V sees two images, so 514 enter."""
    image_position_embedding: bool = False
    """FLF2V adds a learned position embedding to the CLIP tokens."""
    reference_conv: bool = False
    """Fun-Control V1.1: a convolution that turns a reference image into extra tokens."""
    eps: float = 1e-6
    patch_size: tuple[int, int, int] = (1, 2, 2)
    rope_theta: float = 10000.0

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.num_heads


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A released model: its shape and the defaults its authors recommend."""

    name: str
    title: str
    transformer: TransformerConfig
    conditioning: Conditioning = "none"
    vae: Literal["2.1", "2.2"] = "2.1"
    experts: bool = False
    """Wan 2.2 A14B: two transformers, split at `expert_boundary`."""
    expert_boundary: float = 0.0
    """Sigma at and above which the high-noise expert works."""
    per_token_timestep: bool = False
    """TI2V-5B: image mode gives the first frame's tokens timestep 0."""
    num_steps: int = 50
    flow_shift: float = 5.0
    small_flow_shift: float | None = None
    """At 832 x 480 pixels and fewer, where the authors sample those with another shift."""
    guidance_scale: tuple[float, float] = (5.0, 5.0)
    """(low noise, high noise); equal for one-transformer models."""
    fps: int = 16
    num_frames: int = 81
    width: int = 832
    height: int = 480
    negative_prompt: str = NEGATIVE_PROMPT
    num_parameters: int = 0
    """Published parameter count of one transformer."""

    def flow_shift_at(self, width: int, height: int) -> float:
        """Return the shift that the authors sample this size with."""
        small = self.small_flow_shift is not None and width * height <= 832 * 480
        return self.small_flow_shift if small and self.small_flow_shift else self.flow_shift

    @property
    def vae_stride(self) -> tuple[int, int, int]:
        """Pixels per latent along frames, height, width."""
        return (4, 8, 8) if self.vae == "2.1" else (4, 16, 16)

    @property
    def latent_channels(self) -> int:
        """Channels of the VAE's latents."""
        return 16 if self.vae == "2.1" else 48

    @property
    def pixel_multiple(self) -> int:
        """Width and height must be multiples of this: VAE stride times patch size."""
        return self.vae_stride[1] * self.transformer.patch_size[1]

    @property
    def extra_channels(self) -> int:
        """Conditioning channels that follow the noise on the channel axis."""
        return self.transformer.in_channels - self.transformer.out_channels


_1_3B = TransformerConfig()
_14B = TransformerConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
_5B = TransformerConfig(
    dim=3072, ffn_dim=14336, num_heads=24, num_layers=30, in_channels=48, out_channels=48
)


def _image(base: TransformerConfig, in_channels: int, *, pair: bool = False) -> TransformerConfig:
    return replace(base, in_channels=in_channels, image_dim=1280, image_position_embedding=pair)


_I2V_NEGATIVE = "镜头晃动，" + NEGATIVE_PROMPT
_FLF2V_NEGATIVE = "镜头切换，镜头晃动，" + NEGATIVE_PROMPT

VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant(
            name="wan2.1-t2v-1.3b",
            title="Wan 2.1 text to video 1.3B",
            transformer=_1_3B,
            num_parameters=1_418_996_800,
        ),
        Variant(
            name="wan2.1-t2v-14b",
            title="Wan 2.1 text to video 14B",
            transformer=_14B,
            num_parameters=14_288_491_584,
        ),
        Variant(
            name="wan2.1-i2v-14b",
            title="Wan 2.1 image to video 14B (480P and 720P)",
            transformer=_image(_14B, 36),
            conditioning="first_frame",
            num_steps=40,
            small_flow_shift=3.0,
            negative_prompt=_I2V_NEGATIVE,
            num_parameters=16_394_878_784,
        ),
        Variant(
            name="wan2.1-flf2v-14b",
            title="Wan 2.1 first and last frame to video 14B",
            transformer=_image(_14B, 36, pair=True),
            conditioning="first_last_frame",
            flow_shift=16.0,
            negative_prompt=_FLF2V_NEGATIVE,
            num_parameters=16_395_536_704,
        ),
        Variant(
            name="wan2.1-fun-inp-1.3b",
            title="Wan 2.1 Fun InP 1.3B (image to video)",
            transformer=_image(_1_3B, 36),
            conditioning="first_frame",
            num_parameters=1_564_428_608,
        ),
        Variant(
            name="wan2.1-fun-control-1.3b",
            title="Wan 2.1 Fun Control 1.3B",
            transformer=_image(_1_3B, 48),
            conditioning="control",
            num_parameters=1_564_502_336,
        ),
        Variant(
            name="wan2.1-fun-control-14b",
            title="Wan 2.1 Fun Control 14B",
            transformer=_image(_14B, 48),
            conditioning="control",
            num_parameters=16_395_124_544,
        ),
        Variant(
            name="wan2.2-t2v-a14b",
            title="Wan 2.2 text to video A14B (two experts)",
            transformer=_14B,
            experts=True,
            expert_boundary=0.875,
            num_steps=40,
            flow_shift=12.0,
            guidance_scale=(3.0, 4.0),
            num_parameters=14_288_491_584,
        ),
        Variant(
            name="wan2.2-i2v-a14b",
            title="Wan 2.2 image to video A14B (two experts)",
            transformer=replace(_14B, in_channels=36),
            conditioning="first_frame",
            experts=True,
            expert_boundary=0.9,
            num_steps=40,
            guidance_scale=(3.5, 3.5),
            num_parameters=14_288_901_184,
        ),
        Variant(
            name="wan2.2-ti2v-5b",
            title="Wan 2.2 text and image to video 5B",
            transformer=_5B,
            vae="2.2",
            per_token_timestep=True,
            fps=24,
            num_frames=121,
            width=1280,
            height=704,
            num_parameters=4_999_787_712,
        ),
    )
}


def get_variant(name: str) -> Variant:
    """Return the table entry of `name`.

    Raises:
        ConfigError: no such variant; the hint names the nearest one.
    """
    try:
        return VARIANTS[name]
    except KeyError:
        raise ConfigError(f"unknown model variant {name!r}", hint=nearest(name, VARIANTS)) from None
