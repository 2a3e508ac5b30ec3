"""How many numbers each kind of adapter trains in a linear layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from trainer.contract.memory_model.product_kinds import (
    dora_parameters,
    loha_parameters,
    lokr_parameters,
)

TRAINED_PARAMETERS: dict[str, Callable[[Mapping[str, Any], int, int], int]] = {
    "loha": loha_parameters,
    "lokr": lokr_parameters,
    "dora": dora_parameters,
}
"""By `adapter.kind`: (options, inputs, outputs) -> trained numbers of one layer."""
