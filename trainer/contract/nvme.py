"""What the engine tells DeepSpeed about state and weights in files, and the estimate counts."""

from __future__ import annotations

SUB_GROUP_ELEMENTS = 100_000_000
"""Of a rank's share of the optimizer's state so many are in RAM at a time: `sub_group_size`."""
WEIGHT_BUFFERS = 5
"""Through which weights come from files: `buffer_count`."""
_LEAST_BUFFER = 100_000_000
_STEP = 1 << 20
WEIGHTS_IN_RAM = 0
"""Trained elements of a rank whose weights stay in RAM: `max_in_cpu`."""
WEIGHTS_AHEAD = 0
"""Elements that are gathered ahead, or kept gathered for later: a gathered weight holds one of five
buffers until it is given up, and gathering one more than there are is an assertion."""


def weight_buffer_elements(largest_weight: int) -> int:
    """Return `buffer_size`: elements of each buffer for weights.

    A weight has to fit, and the time projection of the 14B model has 157 million elements, more
    than DeepSpeed's own figure, which is the least here. Files are read in whole steps.
    """
    return max(_LEAST_BUFFER, -(-largest_weight // _STEP) * _STEP)
