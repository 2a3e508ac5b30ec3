"""Resampling in time: which frame of a clip is shown when."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

_EPSILON_S = 1e-6


def nearest_frames(times_s: Sequence[float], end_s: float, target_fps: float) -> tuple[int, ...]:
    """Return, for each moment k / target_fps before `end_s`, the frame nearest to it in time.

    Of two that are equally near it is the earlier. There is one frame at least.

    Args:
        times_s: when each frame is shown, ascending from 0.
        end_s: when the last one ends.
        target_fps: frames a second of the result.
    """
    count = max(1, int(end_s * target_fps + _EPSILON_S))
    return tuple(_nearest(times_s, moment / target_fps) for moment in range(count))


def constant_rate(pts: Sequence[int]) -> bool:
    """Tell whether time stamps are evenly spaced but for the container's rounding of them."""
    if len(pts) < 3:
        return True
    step = (pts[-1] - pts[0]) / (len(pts) - 1)
    tolerance = max(1.01, step / 20)
    return all(abs(stamp - pts[0] - i * step) <= tolerance for i, stamp in enumerate(pts))


def _nearest(times_s: Sequence[float], moment_s: float) -> int:
    after = bisect_right(times_s, moment_s)
    if after == 0:
        return 0
    if after == len(times_s):
        return after - 1
    later_is_nearer = times_s[after] - moment_s < moment_s - times_s[after - 1] - _EPSILON_S
    return after if later_is_nearer else after - 1
