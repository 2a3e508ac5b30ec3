"""Optimizers of other packages, imported when somebody picks them."""

from __future__ import annotations

import importlib
from typing import Any

from trainer.contract.errors import ConfigError
from trainer.contract.optimizer_traits import traits_of


def optimizer_class(kind: str, name: str, module: str = "") -> Any:
    """Return class `name` of the package that optimizer `kind` needs.

    Args:
        kind: as in `optimizer.kind`.
        name: of the class.
        module: inside the package.

    Raises:
        ConfigError: the package is not installed, or has no such class.
    """
    traits = traits_of(kind)
    path = f"{traits.package}.{module}" if module else traits.package
    try:
        return getattr(importlib.import_module(path), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"optimizer {kind} needs the package {traits.package}: {error}",
            hint=f"pip install 'menma[{traits.extra}]', or set optimizer.kind = 'adamw'",
        ) from error
