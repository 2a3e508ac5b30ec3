"""What is said of a config's slot when a training starts."""

from __future__ import annotations

from collections.abc import Collection

from trainer.contract.config import RunConfig
from trainer.contract.loraid import in_words
from trainer.contract.loraid_rules import loraid_options


def slot_in_words(config: RunConfig, modules: Collection[str], num_parameters: int) -> str | None:
    """Return what is trained of the network, in words; None where there is no slot.

    Args:
        config: of the run.
        modules: canonical names of the layers that are trained.
        num_parameters: trained in them.
    """
    options = loraid_options(config)
    if options is None:
        return None
    return (
        f"LORAID slot {options.slot} of {options.slots} ({options.granularity}, "
        f"{options.allocation}): {num_parameters:,} parameters in {len(modules)} layers: "
        f"{in_words(modules)}"
    )
