"""The file that training starts from: its tensors, for the layers that are trained.

What may be in it the header tells; `contract.adapter_start` has those rules.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer.adapters.base import Update
from trainer.adapters.formats.reader import load_adapter
from trainer.contract.adapter_start import start_problems
from trainer.contract.errors import ConfigError
from trainer.contract.lora_header import FileLayer

_SCALED = ("up", "w1_a", "w1")
"""Tensors that a scale goes into, of LoRA and DoRA, LoHa and LoKr."""


CLOSE = 0.01
"""Share by which tensors may differ from what they are recognised as: files are rounded."""


def load_start(
    kind: str, options: Mapping[str, Any], in_file: Mapping[str, FileLayer]
) -> dict[str, Update]:
    """Return the updates of `init_from` by canonical module name.

    Args:
        kind: of the adapter.
        options: of the adapter, with defaults.
        in_file: the file's layers by its header.

    Raises:
        ConfigError: the file says of itself that such an adapter cannot start from it.
        ModelFileError: it cannot be read.
    """
    file = load_adapter(Path(options["init_from"]))
    problems = tuple(start_problems(kind, options, file.metadata, in_file))
    if problems:
        raise ConfigError(problems=problems)
    return dict(file)


def tensors_at(update: Update, scale: float) -> dict[str, Tensor]:
    """Return float32 tensors that make the same update at another scale.

    What the scales differ by goes into one tensor; at the same scale none is changed.
    """
    tensors = {name: tensor.float() for name, tensor in update.tensors().items()}
    if update.scale != scale:
        name = next(name for name in _SCALED if name in tensors)
        tensors[name] = tensors[name] * (update.scale / scale)
    return tensors
