"""Settings that every test needs before torch starts."""

from __future__ import annotations

import os

# With other load on two cores, two torch threads are many times slower than one; and a float
# reduction's order, so a bit-for-bit comparison, depends on their number.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from hypothesis import settings

# A slow machine is not a failing property.
settings.register_profile("menma", deadline=None)
settings.load_profile("menma")
torch.set_num_threads(1)
