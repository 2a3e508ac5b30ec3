"""What is known of each optimizer without torch: what it can be combined with, and usual rates.

The names are those of `[optimizer] kind`. A test compares this table with the plug-ins.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerTraits:
    """Facts of one optimizer."""

    elementwise: bool = True
    """The update of a weight depends on that weight alone, so that ZeRO may cut tensors."""
    why_whole: str = ""
    """Where it is not: what it looks at."""
    cuttable: bool = True
    """Its state is one value an element, which any engine can read."""
    forgets: bool = False
    """Its state is means of gradients, of which ReLoRA may set a part to 0."""
    on_cpu: bool = True
    """Steps on the CPU as on a GPU, so that its state can be offloaded."""
    averages: bool = False
    """Returns an average of the weights, without a schedule."""
    bf16_only: bool = False
    """Is for weights that are trained in bf16."""
    one_rate: bool = False
    """Cannot give layers learning rates of their own."""
    package: str = ""
    """Python package that it needs, beyond those of Menma."""
    extra: str = ""
    """Extra of Menma that installs it."""
    learning_rate: float = 1e-4
    """Where nothing is said; usual for a LoRA."""
    lowest: float = 1e-6
    """Rates below are likely meant for another optimizer."""
    highest: float = 1e-2
    """Rates above are likely meant for another optimizer."""


_library = partial(OptimizerTraits, package="pytorch_optimizer", extra="optimizers")
_bitsandbytes = partial(OptimizerTraits, package="bitsandbytes", extra="bnb")
_MATRIX = "it works on whole matrices"

OPTIMIZERS: dict[str, OptimizerTraits] = {
    "adamw": OptimizerTraits(forgets=True),
    "adamw8bit": _bitsandbytes(cuttable=False, on_cpu=False),
    "adamw_bf16": OptimizerTraits(
        elementwise=False,
        why_whole="it rounds by itself what it updates, and ZeRO lets it see float32 copies only",
        cuttable=False,
        bf16_only=True,
        learning_rate=1e-5,
        highest=1e-3,
    ),
    "deepspeed_cpu_adam": OptimizerTraits(forgets=True),
    "lion": _library(forgets=True, learning_rate=3e-5, lowest=1e-7, highest=1e-3),
    "lion8bit": _bitsandbytes(
        cuttable=False,
        on_cpu=False,
        learning_rate=3e-5,
        lowest=1e-7,
        highest=1e-3,
    ),
    "adafactor": OptimizerTraits(
        elementwise=False,
        why_whole="it keeps sums over rows and columns of whole matrices",
        cuttable=False,
        learning_rate=1e-4,
    ),
    "came": _library(
        elementwise=False,
        why_whole="it keeps sums over rows and columns of whole matrices",
        cuttable=False,
    ),
    "prodigy": _library(
        elementwise=False,
        why_whole="its step size comes from a sum over all weights",
        one_rate=True,
        learning_rate=1.0,
        lowest=0.1,
        highest=4.0,
    ),
    "schedulefree": _library(averages=True, learning_rate=5e-4, lowest=1e-5, highest=2e-2),
    "muon": _library(elementwise=False, why_whole=_MATRIX, cuttable=False),
    "soap": _library(
        elementwise=False,
        why_whole=_MATRIX,
        cuttable=False,
        learning_rate=3e-4,
        lowest=1e-5,
        highest=1e-2,
    ),
    "sophia": OptimizerTraits(forgets=True, learning_rate=5e-5, lowest=1e-7, highest=2e-3),
    "scion": _library(elementwise=False, why_whole=_MATRIX, learning_rate=1e-3, highest=0.2),
    "automagic": OptimizerTraits(learning_rate=1e-5, lowest=1e-8, highest=1e-4),
    "custom": OptimizerTraits(
        elementwise=False,
        why_whole="what it looks at is not known",
        cuttable=False,
        lowest=0.0,
        highest=float("inf"),
    ),
}


def traits_of(kind: str) -> OptimizerTraits:
    """Return the facts of an optimizer; one that is not in the table is taken for AdamW."""
    return OPTIMIZERS.get(kind, OPTIMIZERS["adamw"])
