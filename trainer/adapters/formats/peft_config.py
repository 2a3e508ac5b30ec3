"""The scale of PEFT-style files: it is in a JSON header or beside the file, never in a tensor.

Diffusers writes PEFT's `LoraConfig` into the safetensors header (`lora_adapter_metadata`, its keys
prefixed by the component's name); PEFT itself writes `adapter_config.json` beside the weights.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.contract.errors import ModelFileError
from trainer.io.mapped_load import read_json

HEADER_KEY = "lora_adapter_metadata"
_COMPONENTS = ("transformer.", "transformer_1.", "transformer_2.")
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "eva")
# A header is untrusted: repeated groups can take exponential time to match.
_RISKY, _REPEATS = re.compile(r"\)[*+?{]"), re.compile(r"[*+{]")
_BAD = "the LoRA settings in the header of {path} are damaged: {reason}"


class PeftConfig:
    """Answers which alpha a module was trained with, by PEFT's own rules.

    Attributes:
        settings: of the part of the pipeline that is read.
        use_dora: every module has a magnitude.
    """

    def __init__(self, settings: Mapping[str, Any], path: Path, component: str = "") -> None:
        self._path = path
        self.settings = _of_component(settings, component)
        # LoRA's key is `lora_alpha`, LoHa's and LoKr's is `alpha`.
        key = "lora_alpha" if "lora_alpha" in self.settings else "alpha"
        self._alpha = self._number(key, self.settings.get(key))
        self._alphas = self._patterns("alpha_pattern")
        self._rslora = bool(self.settings.get("use_rslora", False))
        self.use_dora = bool(self.settings.get("use_dora", False))
        init = str(self.settings.get("init_lora_weights", "")).lower()
        if init.startswith(_CHANGES_BASE):
            raise ModelFileError(
                f"{path} was trained with init_lora_weights={init!r}: it belongs to changed base "
                "weights, which it does not hold",
                hint="convert it to a plain LoRA with PEFT (save_pretrained with "
                "path_initial_model_for_weight_conversion)",
            )

    def alpha(self, spelling: str, rank: int) -> float | None:
        """Return alpha so that alpha / rank is the scale PEFT applies to module `spelling`."""
        alpha = self._of(spelling, self._alphas, self._alpha)
        if alpha is None:
            return None
        # Rank-stabilised LoRA (arXiv:2312.03732) scales by alpha / sqrt(rank).
        return alpha * math.sqrt(rank) if self._rslora else alpha

    def scale(self, spelling: str) -> float:
        """Return alpha / r as the settings alone give it; 1 where they do not."""
        alpha = self._of(spelling, self._alphas, self._alpha)
        rank = self._number("r", self.settings.get("r"))
        rank = self._of(spelling, self._patterns("rank_pattern"), rank)
        return alpha / rank if alpha is not None and rank else 1.0

    def _of(self, spelling: str, table: Mapping[str, float], default: float | None) -> float | None:
        return next((v for p, v in table.items() if self._matches(p, spelling)), default)

    def _matches(self, pattern: str, spelling: str) -> bool:
        try:
            return re.fullmatch(rf"(?:.*\.)?(?:{pattern})", spelling) is not None
        except re.error as error:
            raise self._damaged(f"{pattern!r} is no pattern ({error})") from error

    def _patterns(self, key: str) -> dict[str, float]:
        table = self.settings.get(key) or {}
        if not isinstance(table, dict):
            raise self._damaged(f"{key} is not a table")
        for name in table:
            if _RISKY.search(name) or len(_REPEATS.findall(name)) > 3:
                raise self._damaged(f"{key} has a pattern that could run for ever: {name!r}")
        numbers = {name: self._number(key, raw) for name, raw in table.items()}
        return {name: value for name, value in numbers.items() if value is not None}

    def _number(self, key: str, value: Any) -> float | None:
        if value is None:
            return None
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            raise self._damaged(f"{key} is {value!r}")
        return float(value)

    def _damaged(self, reason: str) -> ModelFileError:
        return ModelFileError(_BAD.format(path=self._path, reason=reason))


def find_peft_settings(path: Path, metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """Return PEFT's settings from the header or from `adapter_config.json` beside the file.

    Raises:
        ModelFileError: they are there but damaged.
    """
    text = metadata.get(HEADER_KEY)
    if text is not None:
        try:
            settings = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ModelFileError(_BAD.format(path=path, reason=error)) from error
        if not isinstance(settings, dict):
            raise ModelFileError(_BAD.format(path=path, reason="not a table"))
        return settings
    beside = path.with_name("adapter_config.json")
    if path.stem == "adapter_model" and beside.is_file():
        return read_json(beside)
    return None


def header_settings(
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    *,
    use_dora: bool = False,
    component: str = "transformer",
) -> str:
    """Return the header that diffusers needs to scale each module by alpha / rank.

    Args:
        ranks: rank by diffusers module name.
        alphas: alpha by diffusers module name, same keys.
        use_dora: every module has a magnitude.
        component: the pipeline's part that the LoRA belongs to.
    """
    rank, alpha = _most_common(ranks), _most_common(alphas)
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        # `^` keeps PEFT from taking `proj_out` for every module that ends so.
        "rank_pattern": {f"^{name}": value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {f"^{name}": value for name, value in alphas.items() if value != alpha},
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": use_dora,
        "lora_bias": False,
        "bias": "none",
    }
    return json.dumps({f"{component}.{key}": value for key, value in settings.items()})


def _most_common(values: Mapping[str, Any]) -> Any:
    counted = list(values.values())
    return max(dict.fromkeys(counted), key=counted.count)


def _of_component(settings: Mapping[str, Any], component: str) -> dict[str, Any]:
    wanted = f"{component}." if component else _COMPONENTS[0]
    own = {
        key.removeprefix(wanted): value for key, value in settings.items() if key.startswith(wanted)
    }
    return own or {k: v for k, v in settings.items() if not k.startswith(_COMPONENTS)}
