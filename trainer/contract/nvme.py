"""What the engine tells DeepSpeed about state and weights in files, and the estimate counts."""

from __future__ import annotations

SUB_GROUP_ELEMENTS = 100_000_000
"""Of a rank's share of the optimizer's state so many are in RAM at a time: `sub_group_size`."""
WEIGHTS_IN_RAM = 0
"""Trained elements of a rank whose weights stay in RAM: `max_in_cpu`."""
WEIGHTS_AHEAD = 0
"""Elements that are gathered ahead, or kept gathered for later: a gathered weight holds one of five
buffers until it is given up, and gathering one more than there are is an assertion."""
