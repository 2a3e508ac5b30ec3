"""Pixels of a decoded video frame."""

from __future__ import annotations

import numpy as np
from av.video.frame import VideoFrame
from numpy.typing import NDArray


def rgb_pixels(frame: VideoFrame) -> NDArray[np.uint8]:
    """Return a frame as it is stored, unrotated: 8-bit RGB, (H, W, 3).

    From more than 8 bits libswscale's packed RGB comes out up to 3 levels too dark, its planar RGB
    is right to half a level.
    """
    deep = frame.format.components[0].bits > 8
    return frame.to_ndarray(format="gbrp" if deep else "rgb24").astype(np.uint8, copy=False)
