"""The base of sections of a config that choose plug-ins."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import ConfigDict

from trainer.contract.options import Options
from trainer.contract.plugin_options import option_names


class PluginSection(Options):
    """A section whose further keys are the options of the plug-ins it names."""

    model_config = ConfigDict(extra="allow")

    slots: ClassVar[dict[str, str]] = {}
    """Field that holds a plug-in's name -> kind of plug-in (`catalog.PLUGIN_KINDS`)."""

    def options(self, slot: str) -> dict[str, Any]:
        """Return the options of the plug-in chosen in field `slot`."""
        names = option_names(self.slots[slot], getattr(self, slot))
        return {k: v for k, v in (self.__pydantic_extra__ or {}).items() if k in names}
