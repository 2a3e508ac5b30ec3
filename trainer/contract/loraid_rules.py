"""What `[adapter.loraid]` must be, as far as the config alone tells."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import ValidationError

from trainer.contract.config import RunConfig
from trainer.contract.errors import Problem
from trainer.contract.loraid import LoraidOptions, beyond


def loraid_options(config: RunConfig) -> LoraidOptions | None:
    """Return the slot that a config trains, if it trains one.

    None also where the table has mistakes: each is told with its key when the config is read.
    """
    options = config.adapter.options("kind").get("loraid")
    try:
        return None if options is None else LoraidOptions.model_validate(options)
    except ValidationError:
        return None


def loraid_rule(config: RunConfig) -> Iterator[Problem]:
    """Yield what is wrong whatever the model is."""
    options = loraid_options(config)
    if options is not None and options.slot > options.slots:
        yield beyond(options)
