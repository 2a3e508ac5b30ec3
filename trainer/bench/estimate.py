"""How long one estimate takes, with nothing remembered from an earlier one."""

from __future__ import annotations

import statistics
import time
from itertools import cycle, islice

from trainer.bench.result import Measurement
from trainer.contract.config import RunConfig
from trainer.contract.memory_model import estimate, find_fit, find_gpu
from trainer.contract.variants import VARIANTS

LIMIT_S = 0.005


def measure(*, rounds: int = 200) -> Measurement:
    """Return the median processor time of an estimate; `figures` holds that of a search, too."""
    gpu = find_gpu("RTX 4090")
    times = []
    for index, variant in enumerate(islice(cycle(VARIANTS.values()), rounds)):
        config = _config(variant.name, rank=index + 1)  # no two alike
        started = time.process_time()
        estimate(config, gpu)
        times.append(time.process_time() - started)
    started = time.process_time()
    find_fit(_config("wan2.1-t2v-14b", rank=rounds + 1), gpu)
    return Measurement(
        name="estimate",
        what="one estimate",
        value=statistics.median(times),
        unit="s",
        limit=LIMIT_S,
        figures={
            "slowest_s": round(max(times), 5),
            "fit_s": round(time.process_time() - started, 4),
        },
    )


def _config(variant: str, *, rank: int) -> RunConfig:
    expert = {"expert": "low_noise"} if VARIANTS[variant].experts else {}
    return RunConfig.model_validate(
        {
            "model": {"variant": variant, **expert},
            "dataset": {"sources": [{"video_directory": "clips", "target_frames": [1, 81]}]},
            "adapter": {"kind": "lora", "rank": rank},
        }
    )
