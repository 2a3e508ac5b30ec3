"""The text encoder at work: its memory on the GPU or in RAM, and the time of a caption."""

from __future__ import annotations

from trainer.contract.memory_model import encoders
from trainer.contract.memory_model.forwards import text_flops, text_seconds
from trainer.contract.memory_model.gpus import Gpu
from trainer.contract.memory_model.timing import MEMORY_SHARE, peak_rate
from trainer.contract.memory_model.workload import ELEMENT, Workload

CPU_FLOPS = 0.5e12
"""Operations a second of the text encoder on a CPU: an assumption for eight modern cores. Cores
without instructions for bf16 reach less."""
DEQUANTISED_BYTES = 7
"""Memory traffic of an fp8 weight that becomes bf16: 1 read, 2 written, 4 to apply the scale."""


def on_cpu(work: Workload) -> bool:
    """Tell whether the text encoder works on the CPU."""
    return work.config.memory.text_encoder_device == "cpu"


def text_parts(work: Workload) -> dict[str, float]:
    """Return what the text encoder holds and needs, in bytes, wherever it works."""
    rounded, element = _precision(work)
    encoding = encoders.text_encoding_bytes(work.shape.text_len, element)
    if not rounded:
        return {"text encoder": encoders.text_encoder_bytes(element), "encoding": encoding}
    # One layer's weight at a time is in bf16.
    largest = encoders.UMT5_DIM * encoders.UMT5_FFN * element
    return {"text encoder": encoders.fp8_text_encoder_bytes(), "encoding": encoding + largest}


def caption_seconds(work: Workload, gpu: Gpu) -> float:
    """Return the seconds of one text of full length; 0 for an unknown GPU."""
    if not peak_rate(gpu, 2):
        return 0.0
    tokens = work.shape.text_len
    if on_cpu(work):
        return text_flops(tokens) / CPU_FLOPS
    rounded, element = _precision(work)
    seconds = text_seconds(tokens, gpu, element)
    if rounded:
        traffic = DEQUANTISED_BYTES * encoders.UMT5_LAYER_PARAMETERS
        seconds += traffic / (gpu.memory_gb_s * 1e9 * MEMORY_SHARE)
    return seconds


def _precision(work: Workload) -> tuple[bool, int]:
    """Return whether weights are fp8, and the bytes of an element of everything else."""
    precision = work.config.memory.text_encoder_dtype
    rounded = precision == "fp8_scaled"
    return rounded, ELEMENT["bf16" if rounded else precision]
