"""Optimizers, schedules and the like by the names that other trainers give them.

What Menma has is asked of its catalog and schema when a config is imported, so a kind that is added
there is imported from then on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from app.domain.importing.tables import Keys
from trainer.contract.catalog import PLUGIN_KINDS
from trainer.contract.plugin_options import option_names, plugin_schemas


@dataclass(frozen=True, slots=True)
class Optimizer:
    """What an optimizer of another trainer is in Menma."""

    kinds: tuple[str, ...]
    """Names in Menma's catalog, the best first."""
    note: str = ""
    """What is different, if it is the first of them."""
    like_adamw: bool = False
    """Its learning rate means the same with AdamW."""
    paged: bool = False
    """Its state may wait in RAM."""


_BF16 = "Menma keeps fp32 masters of what it trains, so rounding needs no compensation"
_PAGED = "the state is not paged; distributed.offload_optimizer moves it to RAM"

OPTIMIZERS: Mapping[str, Optimizer] = {
    "adamw": Optimizer(("adamw",), like_adamw=True),
    "adam": Optimizer(("adam", "adamw"), like_adamw=True),
    "fusedadam": Optimizer(("adamw",), "AdamW without weight decay is Adam", like_adamw=True),
    "adamw8bit": Optimizer(("adamw8bit", "adamw"), like_adamw=True),
    "adam8bit": Optimizer(("adamw8bit", "adamw"), like_adamw=True),
    "pagedadamw": Optimizer(("adamw",), like_adamw=True, paged=True),
    "pagedadamw8bit": Optimizer(("adamw8bit", "adamw"), like_adamw=True, paged=True),
    "adamw8bitkahan": Optimizer(("adamw8bit_kahan", "adamw8bit", "adamw"), _BF16, like_adamw=True),
    "adamwkahan": Optimizer(("adamw_kahan", "adamw"), _BF16, like_adamw=True),
    "adamwoptimi": Optimizer(("adamw",), _BF16, like_adamw=True),
    "adamwbf16": Optimizer(("adamw_bf16", "adamw"), _BF16, like_adamw=True),
    "stableadamw": Optimizer(("stableadamw", "adamw"), like_adamw=True),
    "adamwfp8": Optimizer(("adamw8bit", "adamw"), "8-bit states instead of fp8", like_adamw=True),
    "adamw4bit": Optimizer(("adamw4bit", "adamw8bit"), "8-bit states instead", like_adamw=True),
    "offload": Optimizer(("adamw",), "AdamW in RAM: set distributed.zero_stage = 1 and "
                         'offload_optimizer = "cpu"', like_adamw=True),
    "adamwschedulefree": Optimizer(("schedulefree", "adamw_schedulefree", "schedulefree_adamw")),
    "schedulefree": Optimizer(("schedulefree", "adamw_schedulefree", "schedulefree_adamw")),
    "adafactor": Optimizer(("adafactor",)),
    "came": Optimizer(("came",)),
    "came8bit": Optimizer(("came8bit", "came")),
    "muon": Optimizer(("muon",)),
    "normuon": Optimizer(("normuon",)),
    "adamuon": Optimizer(("adamuon",)),
    "soap": Optimizer(("soap",)),
    "sophiag": Optimizer(("sophia", "sophiag")),
    "sophia": Optimizer(("sophia", "sophiag")),
    "scion": Optimizer(("scion",)),
    "scionlight": Optimizer(("scion_light", "scion")),
    "prodigy": Optimizer(("prodigy",)),
    "prodigy8bit": Optimizer(("prodigy8bit", "prodigy")),
    "prodigyplusschedulefree": Optimizer(("prodigy_schedulefree", "prodigyplus")),
    "lion": Optimizer(("lion",)),
    "lion8bit": Optimizer(("lion8bit", "lion")),
    "pagedlion8bit": Optimizer(("lion8bit", "lion"), paged=True),
    "ademamix": Optimizer(("ademamix",)),
    "ademamix8bit": Optimizer(("ademamix8bit", "ademamix")),
    "automagic": Optimizer(("automagic",)),
    "sgd": Optimizer(("sgd",)),
    "galore": Optimizer(("galore",)),
    "fira": Optimizer(("fira",)),
    "ivon": Optimizer(("ivon",)),
    "raven": Optimizer(("raven",)),
}  # fmt: skip
"""Name in small letters without `-`, `_`, `.` and the like -> what it is here."""

ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    "wd": ("weight_decay",),
    "mom": ("momentum",),
    "ns": ("ns_steps", "num_steps"),
    "ns_steps": ("ns_steps", "num_ns_steps", "newton_schulz_steps"),
    "rho": ("rho", "clip"),
    "use_bias_correction": ("use_bias_correction", "bias_correction"),
    "weight_lr_power": ("weight_lr_power",),
}
"""Argument of an optimizer -> names it may have in Menma, besides its own."""
THEIR_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "adafactor": {"scale_parameter": True},
}
"""Kind -> defaults of the packages that others take it from, where Menma's are not the same."""
FIXED_ARGUMENTS: Mapping[str, tuple[Any, str]] = {
    "decouple": (True, "weight decay is decoupled"),
    "stabilize": (False, "updates are as they come"),
    "kahan_sum": (True, "what is trained has fp32 masters"),
}
"""Argument -> the value that Menma always has, and why another one is not possible."""

RELATIVE_STEPS: Mapping[str, str] = {"relative_step": "relative", "warmup_init": "relative_warmup"}
"""Argument of Adafactor -> what it is in `STEP_SIZE`."""
STEP_SIZE = "optimizer.step_size"

SCHEDULES: Mapping[str, tuple[str, ...]] = {
    "constant": ("constant",),
    "constant_with_warmup": ("constant",),
    "linear": ("linear",),
    "cosine": ("cosine",),
    "cosine_with_min_lr": ("cosine",),
    "cosine_with_restarts": ("cosine_restarts", "cosine_with_restarts"),
    "sine": ("sine",),
    "polynomial": ("polynomial",),
    "inverse_sqrt": ("inverse_sqrt",),
    "warmup_stable_decay": ("warmup_stable_decay", "wsd"),
    "rex": ("rex",),
}
"""Schedule -> names it may have in Menma."""


CUSTOM = "custom"
"""Kind of optimizers and schedules that are classes of other packages."""
_CLASS = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+")


def plain_name(name: str) -> str:
    """Return a name as `OPTIMIZERS` has it, from `bitsandbytes.optim.AdamW8bit`, too."""
    last = name.strip().rpartition(".")[2].lower()
    found = re.sub(r"[^a-z0-9]", "", last)
    for prefix in ("bnb", "optimi", "ao"):
        if found not in OPTIMIZERS and found.startswith(prefix):
            found = found.removeprefix(prefix)
    if found.endswith("paged"):
        found = f"paged{found.removesuffix('paged')}"
    return found


def put_optimizer(keys: Keys, key: str, name: str) -> bool:
    """Write an optimizer by its foreign name; return whether its learning rate can be taken."""
    known = OPTIMIZERS.get(plain_name(name) or "adamw")
    found = None
    if known is not None:
        found = next((kind for kind in known.kinds if kind in PLUGIN_KINDS["optimizer"]), None)
    if found is None and _CLASS.fullmatch(name) and CUSTOM in PLUGIN_KINDS["optimizer"]:
        keys.put(key, "optimizer.kind", CUSTOM, note=f"{name} itself, which has to be installed")
        keys.draft.values["optimizer.class"] = name
        return True
    if known is None or found is None:
        like = known is not None and known.like_adamw
        rest = "" if like else ", and so is its learning rate, which is no rate of AdamW"
        keys.lacks(
            key, f"Menma has no optimizer like {name} yet; it is left out{rest}",
            "choose optimizer.kind and learning_rate (docs/config.md)",
        )  # fmt: skip
        return like
    note = known.note
    if not note and found != known.kinds[0]:
        note = f"the nearest that Menma has to {name}"
    if known.paged and "paged" not in option_names("optimizer", found):
        note = _PAGED
    keys.put(key, "optimizer.kind", found, note=note)
    if known.paged and "paged" in option_names("optimizer", found):
        keys.draft.values["optimizer.paged"] = True
    for option, value in THEIR_DEFAULTS.get(found, {}).items():
        if option in option_names("optimizer", found):
            keys.put(f"{key}: {option}", f"optimizer.{option}", value)
    return True


def put_option(keys: Keys, key: str, section: str, slot: str, value: Any, *names: str) -> bool:
    """Write an option of the plug-in that is chosen, by the first of its names that it has.

    Args:
        keys: the input.
        key: in whose name.
        section: of the config.
        slot: field of the section that names the plug-in.
        value: what to write.
        names: what the option may be called.
    """
    kind = keys.draft.chosen(f"{section}.{slot}")
    plug_in = {"optimizer": "optimizer", "lr_schedule": "lr_schedule"}.get(section, slot)
    if section == "adapter":
        plug_in = "adapter"
    known = option_names(plug_in, str(kind))
    found = next((name for name in names if name in known), None)
    if found is None:
        keys.lacks(key, f"{section}.{slot} = {kind!r} has no such option")
        return False
    return keys.put(key, f"{section}.{found}", _fitting(plug_in, str(kind), found, value))


def has_option(keys: Keys, section: str, slot: str, kind: str, name: str) -> bool:
    """Tell whether the plug-in that is chosen has an option."""
    return name in option_names(kind, str(keys.draft.chosen(f"{section}.{slot}")))


def put_argument(keys: Keys, key: str, name: str, value: Any) -> None:
    """Write one argument of the optimizer."""
    if keys.draft.chosen("optimizer.kind") == CUSTOM:
        put_class_argument(keys, key, "optimizer", name, value)
        return
    if name in RELATIVE_STEPS and keys.draft.chosen("optimizer.kind") == "adafactor":
        if not value:
            keys.same(key, "as in Menma")
        elif keys.draft.chosen(STEP_SIZE) == RELATIVE_STEPS["warmup_init"]:
            keys.done(key, "goes with warmup_init", STEP_SIZE)
        else:
            keys.put(key, STEP_SIZE, RELATIVE_STEPS[name])
        return
    if name in FIXED_ARGUMENTS and not has_option(keys, "optimizer", "kind", "optimizer", name):
        fixed, why = FIXED_ARGUMENTS[name]
        if value is None or value == fixed:
            keys.same(key, "as in Menma")
        else:
            keys.lacks(key, why)
        return
    put_option(keys, key, "optimizer", "kind", value, name, *ARGUMENTS.get(name, ()))


def put_class_argument(keys: Keys, key: str, section: str, name: str, value: Any) -> None:
    """Write an argument that a class of another package is made with."""
    if value is None:
        keys.same(key, "not set")
        return
    target = f"{section}.arguments"
    keys.draft.values[target] = {**keys.draft.values.get(target, {}), name: value}
    keys.done(key, f"an argument of {section}.class", target)


def put_schedule(keys: Keys, key: str, name: str) -> bool:
    """Write a schedule of the learning rate by its foreign name; return whether Menma has it."""
    known = PLUGIN_KINDS["lr_schedule"]
    found = next((kind for kind in SCHEDULES.get(name.lower(), ()) if kind in known), None)
    if found is None:
        keys.lacks(
            key, f"Menma has no schedule {name!r} yet; the rate stays constant",
            "choose lr_schedule.kind (docs/config.md)",
        )  # fmt: skip
        return False
    note = ""
    if name.lower() == "constant_with_warmup":
        note = "constant has a warm-up in Menma when warmup_steps is given"
    return keys.put(key, "lr_schedule.kind", found, note=note)


def _fitting(plug_in: str, kind: str, option: str, value: Any) -> Any:
    """Return a number as a whole one, or one number as a list, where the option wants that."""
    spec = plugin_schemas()[plug_in][kind]["properties"][option]
    branches = [spec, *spec.get("anyOf", ())]
    types = {branch.get("type") for branch in branches}
    if isinstance(value, float) and value == int(value) and "number" not in types:
        return int(value) if "integer" in types else value
    if "array" in types and isinstance(value, int | float) and not isinstance(value, bool):
        return [value]
    return value
