"""The base of every set of options: frozen, strict, documented under each field."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Options(BaseModel):
    """Options a user may write; unknown keys are errors, values never change after loading.

    Numbers are finite: infinity or NaN would spoil weights that were fine until then.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        protected_namespaces=(),
        validate_default=True,
        allow_inf_nan=False,
    )
