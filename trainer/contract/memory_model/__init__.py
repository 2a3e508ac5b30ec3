"""How much memory, disk and time a config takes, before anything is started. No torch.

`estimate` is the public seam. The peak of a training step comes from a model of the step itself
(`block`, `stack`): what each operator takes, keeps and gives back. `docs/estimate.md` explains the
parts, the margin and how exact it is.
"""

from trainer.contract.memory_model.automatic import (
    Automatic,
    automatic_words,
    estimate,
    estimate_sampling,
    resolve_memory,
)
from trainer.contract.memory_model.caching import caching_seconds
from trainer.contract.memory_model.clips import Clip
from trainer.contract.memory_model.costs import JobCost
from trainer.contract.memory_model.estimating import Circumstances
from trainer.contract.memory_model.fit import Change, Fit, find_fit
from trainer.contract.memory_model.gpus import GPUS, Gpu, find_gpu, gpu_of_memory
from trainer.contract.memory_model.measured import Correction, measured_correction
from trainer.contract.memory_model.result import Estimate, Phase, Verdict, memory_verdict

__all__ = [
    "GPUS",
    "Automatic",
    "Change",
    "Circumstances",
    "Clip",
    "Correction",
    "Estimate",
    "Fit",
    "Gpu",
    "JobCost",
    "Phase",
    "Verdict",
    "automatic_words",
    "caching_seconds",
    "estimate",
    "estimate_sampling",
    "find_fit",
    "find_gpu",
    "gpu_of_memory",
    "measured_correction",
    "memory_verdict",
    "resolve_memory",
]
