"""What the authors of TeaCache and MagCache published for Wan 2.1.

Source: the TeaCache repository (TeaCache4Wan2.1); the thresholds are the fast ones of its table,
for about twice the speed. The Fun models are of the 1.3B model's kind, and VideoX-Fun uses its
coefficients for them. MagCache: see `published_ratios`.
"""

from __future__ import annotations

from typing import Final

from trainer.sampling.step_cache import published_ratios
from trainer.sampling.step_cache.values import ExpertValues, Polynomial

_PIXELS_OF_480P: Final = 832 * 480
_1_3B: Final = (
    (2396.76752, -1311.10545, 201.331979, -8.29855975, 0.137887774),
    (-52186.2437, 9230.41404, -528.275948, 13.6987616, -0.0499875664),
    0.08,
)
_14B: Final = (
    (-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404),
    (-303318.725, 49053.7029, -2655.30556, 58.7365115, -0.315583525),
    0.2,
)
_I2V_480: Final = (
    (-302.331670, 223.948934, -52.5463970, 5.87348440, -0.201973289),
    (257151.496, -35422.9917, 1402.86849, -13.5890334, 0.132517977),
    0.26,
)
_I2V_720: Final = (
    (-114.36346466, 65.26524496, -18.82220707, 4.91518089, -0.23412683),
    (8107.05460, 2133.93892, -372.934672, 16.6203073, -0.0417769401),
    0.3,
)
_BY_VARIANT: Final = {
    "wan2.1-t2v-1.3b": (_1_3B, _1_3B),
    "wan2.1-fun-inp-1.3b": (_1_3B, _1_3B),
    "wan2.1-fun-control-1.3b": (_1_3B, _1_3B),
    "wan2.1-t2v-14b": (_14B, _14B),
    "wan2.1-i2v-14b": (_I2V_480, _I2V_720),
}
"""Variant -> (up to 480p, above) -> (plain, retention, threshold)."""
_RATIOS: Final = {
    "wan2.1-t2v-1.3b": (published_ratios.T2V_1_3B, published_ratios.T2V_1_3B),
    "wan2.1-t2v-14b": (published_ratios.T2V_14B, published_ratios.T2V_14B),
    "wan2.1-i2v-14b": (published_ratios.I2V_480, published_ratios.I2V_720),
}
"""Variant -> (up to 480p, above) -> MagCache's ratios."""


def published_values(variant: str, num_pixels: int) -> ExpertValues | None:
    """Return what is published for a variant at so many pixels a frame; None: nothing is."""
    if variant not in _BY_VARIANT:
        return None
    is_large = num_pixels > 1.2 * _PIXELS_OF_480P
    plain, retention, threshold = _BY_VARIANT[variant][is_large]
    return ExpertValues(
        magcache=dict(_RATIOS[variant][is_large]) if variant in _RATIOS else {},
        teacache={
            "plain": Polynomial(coefficients=plain),
            "retention": Polynomial(coefficients=retention),
        },
        teacache_threshold=threshold,
    )
