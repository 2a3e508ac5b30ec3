"""From `[objective]` to the distribution of the sigmas that a run draws, without torch.

The samplers in `trainer/timesteps` draw from the same distributions; a test compares the two. The
options' defaults come from the plug-ins' own declarations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from trainer.contract.config import RunConfig
from trainer.contract.dataset_config import SourceOptions
from trainer.contract.errors import ConfigError
from trainer.contract.plugin_options import all_options
from trainer.contract.sigma_distributions import (
    BellSigma,
    CubicSigma,
    HalfBellSigma,
    LogitNormalSigma,
    MixtureSigma,
    ModeSigma,
    SigmaDistribution,
    SqueezedSigma,
    TruncatedSigma,
    UniformSigma,
)
from trainer.contract.variants import VARIANTS, Variant

Options = Mapping[str, Any]
Maker = Callable[[Options, int], SigmaDistribution]
"""Makes a sampler's distribution from its options and the tokens of a latent frame."""

LEAST_MASS = 1e-9
"""Share of a sampler's draws below which a range counts as never met."""
_CLEAN_LOGSNR = 5.36
"""Mean of the third part of the qinglong samplers: nearly clean latents."""


def sigma_distribution(name: str, options: Options, frame_tokens: int) -> SigmaDistribution:
    """Return what a timestep sampler draws from, over the whole of [0, 1].

    Args:
        name: of the sampler.
        options: all of them.
        frame_tokens: tokens of a latent frame, which some samplers go by.
    """
    return _MAKERS[name](options, frame_tokens)


def within(
    base: SigmaDistribution, low: float, high: float, *, preserve_shape: bool
) -> SigmaDistribution:
    """Return a distribution brought into a part of [0, 1].

    Args:
        base: over the whole of it.
        low: lower end, a sigma.
        high: upper end, greater than `low`.
        preserve_shape: keep the draws inside, instead of squeezing all of them in.
    """
    if (low, high) == (0.0, 1.0):
        return base
    return (TruncatedSigma if preserve_shape else SqueezedSigma)(base, low, high)


def base_distribution(config: RunConfig, frame_tokens: int) -> SigmaDistribution:
    """Return what the config's sampler draws from, before it is brought into a range."""
    section = config.objective
    name = section.timestep_sampler
    return sigma_distribution(name, sampler_options(config), frame_tokens)


def sampler_options(config: RunConfig) -> dict[str, Any]:
    """Return all options of the config's sampler, those not given at their defaults."""
    section = config.objective
    given = section.options("timestep_sampler")
    return all_options("timestep_sampler", section.timestep_sampler, given)


def high_noise_mass(
    config: RunConfig, boundary: float, variant: Variant | None = None
) -> float | None:
    """Return the share of a run's draws that are at `boundary` or above, in [0, 1].

    The draws are those of `[objective]` over its own range, as a model with one transformer would
    be trained. Where the sampler goes by the size of a frame it is the mean over the dataset's
    sources, each at its own resolution.

    Args:
        config: checked.
        boundary: sigma at which the experts meet.
        variant: the model; None: the one that the config names.

    Returns:
        None where there is no such sampler, where it practically never falls into the range, and
        where it goes by frames of which neither the dataset nor the variant tells the size.
    """
    section = config.objective
    if section.timestep_sampler not in _MAKERS:
        return None  # told with its name
    low = 0.0 if section.min_timestep is None else section.min_timestep / 1000
    high = 1.0 if section.max_timestep is None else section.max_timestep / 1000
    if low >= high or boundary >= high:
        return 0.0
    if boundary <= low:
        return 1.0
    known = variant or VARIANTS.get(config.model.variant)
    try:
        sizes = source_frame_tokens(config, known) if depends_on_size(config) else (0,)
    except ConfigError:
        return None  # told with the dataset
    shares = []
    for frame_tokens in sizes:
        base = base_distribution(config, frame_tokens)
        if section.preserve_distribution_shape:
            inside = TruncatedSigma(base, low, high).inside
            if inside < LEAST_MASS:
                return None
        part = within(base, low, high, preserve_shape=section.preserve_distribution_shape)
        shares.append(part.above(boundary))
    return sum(shares) / len(shares)


def depends_on_size(config: RunConfig) -> bool:
    """Tell whether the config's sampler goes by the size of a frame."""
    return config.objective.timestep_sampler in _BY_SIZE


def source_frame_tokens(config: RunConfig, variant: Variant | None) -> tuple[int, ...]:
    """Return the tokens of a latent frame at each source's resolution.

    Buckets keep the area of the resolution, and with it nearly the number. It is the variant's own
    size where there is no dataset.

    Raises:
        ConfigError: the dataset file is missing or a key is wrong, or the variant is not named.
    """
    if variant is None:
        raise ConfigError(
            f"timestep_sampler {config.objective.timestep_sampler!r} goes by the tokens of a "
            "frame, and model.variant is auto",
            hint='name it, e.g. --set model.variant="wan2.1-t2v-14b"',
        )
    dataset = config.dataset
    if dataset.file is None and not dataset.sources:
        return (_frame_tokens(variant.width, variant.height, variant),)
    return tuple(_of_source(source, variant) for source in dataset.load().sources)


def image_shift(frame_tokens: int, *, far_tokens: int, far_shift: float) -> float:
    """Return the flow shift e^μ, with μ linear in the tokens through (256, 0.5) and a far point."""
    slope = (far_shift - 0.5) / (far_tokens - 256)
    return math.exp(0.5 + slope * (frame_tokens - 256))


def _of_source(source: SourceOptions, variant: Variant) -> int:
    return _frame_tokens(*source.resolution, variant)


def _frame_tokens(width: int, height: int, variant: Variant) -> int:
    step = variant.pixel_multiple
    return max(width // step, 1) * max(height // step, 1)


def _shifted(mean: float, std: float, flow_shift: float) -> LogitNormalSigma:
    return LogitNormalSigma(mean + math.log(flow_shift), std)


def _flux(options: Options, frame_tokens: int) -> LogitNormalSigma:
    shift = image_shift(frame_tokens, far_tokens=4096, far_shift=1.15)
    return _shifted(0.0, options["sigmoid_scale"], shift)


def _qwen(options: Options, frame_tokens: int) -> LogitNormalSigma:
    shift = image_shift(frame_tokens, far_tokens=8192, far_shift=0.9)
    return _shifted(0.0, options["sigmoid_scale"], shift)


def _logsnr(mean: float, std: float) -> LogitNormalSigma:
    # SNR = ((1 - σ) / σ)², so that ln SNR = -2·logit σ.
    return LogitNormalSigma(-mean / 2, std / 2)


def _qinglong(by_size: Maker) -> Maker:
    def make(options: Options, frame_tokens: int) -> SigmaDistribution:
        noisy, clean = options["noisy_share"], options["clean_share"]
        parts = (
            (1 - noisy - clean, by_size(options, frame_tokens)),
            (noisy, _logsnr(options["logsnr_mean"], options["logsnr_std"])),
            (clean, _logsnr(_CLEAN_LOGSNR, 1.0)),
        )
        return MixtureSigma(tuple((share, part) for share, part in parts if share > 0))

    return make


_BY_SIZE: dict[str, Maker] = {
    "flux_shift": _flux,
    "qwen_shift": _qwen,
    "qinglong_flux": _qinglong(_flux),
    "qinglong_qwen": _qinglong(_qwen),
}
_MAKERS: dict[str, Maker] = {
    "uniform": lambda options, _: UniformSigma(),
    "sigmoid": lambda options, _: LogitNormalSigma(0.0, options["sigmoid_scale"]),
    "shift": lambda options, _: _shifted(0.0, options["sigmoid_scale"], options["flow_shift"]),
    "logit_normal": lambda options, _: _shifted(
        options["logit_mean"], options["logit_std"], options["flow_shift"]
    ),
    "logsnr": lambda options, _: _logsnr(options["logsnr_mean"], options["logsnr_std"]),
    "mode": lambda options, _: ModeSigma(options["mode_scale"]),
    "bell": lambda options, _: BellSigma(options["bell_center"], options["bell_std"]),
    "half_bell": lambda options, _: HalfBellSigma(options["bell_center"], options["bell_std"]),
    "content": lambda options, _: CubicSigma(towards_noise=True),
    "style": lambda options, _: CubicSigma(towards_noise=False),
    **_BY_SIZE,
}
