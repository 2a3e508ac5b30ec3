"""musubi-tuner's and Takenoko's networks: what is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from app.domain.importing import values as v
from app.domain.importing.kinds import put_option
from app.domain.importing.tables import Keys
from trainer.contract.catalog import PLUGIN_KINDS

MODULES: Mapping[str, str] = {
    "lora_wan": "lora",
    "lora": "lora",
    "loha": "loha",
    "lokr": "lokr",
    "dora": "dora",
    "dora_wan": "dora",
    "t_lora": "tlora",
    "singlora_wan": "singlora",
    "relora_wan": "relora",
    "vera_wan": "vera",
    "wan_finetune": "none",
}
"""Last part of `network_module` -> kind of adapter."""
ALGORITHMS: Mapping[str, str] = {
    "lora": "lora", "locon": "lora", "loha": "loha", "lokr": "lokr", "full": "none",
}  # fmt: skip
"""`algo` of LyCORIS -> kind of adapter."""
ARGUMENTS: Mapping[str, tuple[str, Any]] = {
    "loraplus_lr_ratio": ("loraplus_lr_ratio", v.number),
    "rank_dropout": ("rank_dropout", v.number),
    "module_dropout": ("module_dropout", v.number),
    "use_rslora": ("rslora", v.flag),
    "rs_lora": ("rslora", v.flag),
    "rslora": ("rslora", v.flag),
    "exclude_patterns": ("exclude", v.patterns),
    "include_patterns": ("include", v.patterns),
    "decompose_both": ("decompose_both", v.flag),
    "tlora_min_rank": ("min_rank", v.whole),
    "tlora_alpha": ("rank_exponent", v.number),
    "tlora_boundary_timestep": ("full_rank_below", v.number),
    "ramp_up_steps": ("ramp_steps", v.whole),
    "ggpo_sigma": ("sigma", v.number),
    "ggpo_beta": ("beta", v.number),
    "initialize": ("init", v.text),
}
"""`network_args` -> option of the adapter."""
NOTHING = {
    "verbose": "what is trained is listed by `menma lora targets`",
    "conv_dim": "the blocks of Wan have no convolutions",
    "conv_alpha": "the blocks of Wan have no convolutions",
    "use_conv": "the blocks of Wan have no convolutions",
    "preset": "the linear layers of the blocks are trained; see adapter.targets",
}
RELORA = {
    "relora_interval": "restart_every_steps",
    "relora_restart_warmup_steps": "restart_warmup_steps",
}


def network(keys: Keys) -> None:
    """Kind, rank, alpha and arguments; what training starts from and what is put below it."""
    module = str(keys.get("network_module") or keys.default("network_module", "networks.lora_wan"))
    arguments = {key.partition(".")[2]: key for key in keys.below("network_args")}
    kind = _kind(keys, module, arguments)
    if kind is None or not keys.put("network_module", "adapter.kind", kind):
        keys.lacks("network_module", f"Menma has no adapter like {module}",
                   "choose adapter.kind (docs/config.md)")  # fmt: skip
        kind = "lora"
    if kind == "none":
        for key in ("network_dim", "network_alpha", "network_dropout", "network_weights"):
            keys.lacks(key, "a whole model has no such option")
    else:
        _size(keys, kind)
    _arguments(keys, kind, arguments)
    _below(keys)
    if keys.read("scale_weight_norms", v.number):
        value = keys.read("scale_weight_norms", v.number)
        put_option(keys, "scale_weight_norms", "adapter", "kind", value, "scale_weight_norms")


def _kind(keys: Keys, module: str, arguments: Mapping[str, str]) -> str | None:
    if "kohya" in module or v.is_on(keys.get("lycoris")):
        name = keys.get(arguments.get("algo", ""), "lora")
        kind = ALGORITHMS.get(str(name).lower())
        if kind == "lora" and v.is_on(keys.get(arguments.get("dora_wd", ""))):
            kind = "dora"
        return kind
    kind = MODULES.get(module.rpartition(".")[2])
    if kind == "lora" and any(name.startswith("ggpo") for name in arguments):
        kind = "ggpo"
    return kind if kind in PLUGIN_KINDS["adapter"] else None


def _size(keys: Keys, kind: str) -> None:
    from_weights = keys.read("dim_from_weights", v.flag, default=False)
    if from_weights and keys.get("network_weights"):
        put_option(keys, "dim_from_weights", "adapter", "kind", "from_weights", "rank")
        keys.done("network_dim", "the ranks are those of network_weights")
    else:
        rank = keys.read("network_dim", v.positive, keys.default("network_dim", 4))
        put_option(keys, "network_dim", "adapter", "kind", rank, "rank")
    alpha = keys.read("network_alpha", v.number, keys.default("network_alpha", 1))
    if kind == "vera":
        keys.lacks("network_alpha", "VeRA is scaled by its vectors")
    elif alpha:
        put_option(keys, "network_alpha", "adapter", "kind", float(alpha), "alpha")
    dropout = keys.read("network_dropout", v.number, 0.0)
    if dropout:
        put_option(keys, "network_dropout", "adapter", "kind", dropout, "dropout")
    if keys.get("network_weights"):
        path, note = keys.file_of(keys.get("network_weights"))
        if put_option(keys, "network_weights", "adapter", "kind", path, "init_from") and note:
            keys.reported["network_weights"].note = note


def _arguments(keys: Keys, kind: str, arguments: Mapping[str, str]) -> None:
    for name, key in arguments.items():
        if name in {"algo", "dora_wd"}:
            keys.done(key, f"adapter.kind = {kind!r}", "adapter.kind")
        elif name in NOTHING:
            keys.done(key, NOTHING[name])
        elif name == "factor":
            factor = keys.read(key, v.whole, -1)
            if factor < 0:
                keys.same(key, "cut near the square root, as in Menma")
            else:
                put_option(keys, key, "adapter", "kind", factor, "factor")
        elif name in ARGUMENTS:
            option, convert = ARGUMENTS[name]
            value = keys.read(key, convert)
            if value in (None, False, []):
                keys.same(key)
            else:
                put_option(keys, key, "adapter", "kind", value, option)
        else:
            put_option(keys, key, "adapter", "kind", keys.read(key, v.literal), name)
    for key, option in RELORA.items():
        if key in keys:
            put_option(keys, key, "adapter", "kind", keys.read(key, v.whole), option)


def _below(keys: Keys) -> None:
    """LoRAs that are merged into the base are put on it, frozen: the same sum."""
    files = [keys.file_of(file)[0] for file in v.several(keys.get("base_weights"))]
    factors = keys.read("base_weights_multiplier", v.numbers, [])
    if not files:
        return
    frozen: list[Any] = []
    for index, file in enumerate(files):
        strength = factors[index] if index < len(factors) else 1.0
        frozen.append({"path": file, "strength": strength})
    note = "put on the base and not trained, instead of merged into it: the same sum"
    keys.put("base_weights", "adapter.frozen", frozen, note=note)
    keys.done("base_weights_multiplier", "the strengths in adapter.frozen", "adapter.frozen")
