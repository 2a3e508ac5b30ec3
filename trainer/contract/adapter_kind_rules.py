"""What kinds of adapter beyond LoRA need of their own options and of the rest of the config."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from trainer.contract.config import RunConfig
from trainer.contract.errors import Problem
from trainer.contract.experts import SHARED
from trainer.contract.optimizer_traits import traits_of
from trainer.contract.plugin_options import plugin_schemas
from trainer.contract.targets import FROM_WEIGHTS

OUTER_LAYERS = (
    "text_embedding.0",
    "text_embedding.2",
    "time_embedding.0",
    "time_embedding.2",
    "time_projection.1",
    "img_emb.proj.1",
    "img_emb.proj.3",
    "head.head",
)
"""The linear layers outside of a transformer's blocks."""


def adapter_kind_rule(config: RunConfig) -> Iterator[Problem]:
    """Yield what goes wrong with the kind of adapter that is chosen."""
    yield from _shared(config)
    rule = _RULES.get(config.adapter.kind)
    if rule is not None:
        yield from rule(config, _with_defaults(config))


def _with_defaults(config: RunConfig) -> Mapping[str, Any]:
    schema = plugin_schemas()["adapter"].get(config.adapter.kind, {})
    defaults = {name: spec.get("default") for name, spec in schema.get("properties", {}).items()}
    return defaults | config.adapter.options("kind")


def _tlora(config: RunConfig, options: Mapping[str, Any]) -> Iterator[Problem]:
    if options["rank"] != FROM_WEIGHTS and options["min_rank"] > options["rank"]:
        yield Problem(
            f"more ranks on pure noise ({options['min_rank']}) than there are ({options['rank']})",
            "adapter.min_rank",
            hint="make it adapter.rank at most",
        )
    for pattern in options["include"]:
        outside = [name for name in OUTER_LAYERS if _matches(pattern, name)]
        if outside:
            yield Problem(
                f"{pattern!r} matches {outside[0]}, which is outside of the blocks: what passes "
                "there has no timestep of its own",
                "adapter.include",
                hint='take it out, or set adapter.kind = "lora"',
            )


def _singlora(config: RunConfig, options: Mapping[str, Any]) -> Iterator[Problem]:
    if options["init_from"] is not None and options["ramp_steps"]:
        yield Problem(
            "the update of adapter.init_from is there from the first step, and this would fade it "
            f"in over {options['ramp_steps']}",
            "adapter.ramp_steps",
            hint="set it to 0",
        )


def _vera(config: RunConfig, options: Mapping[str, Any]) -> Iterator[Problem]:
    if options["init_from"] is not None and "d_initial" in config.adapter.options("kind"):
        yield Problem(
            "the weights of the ranks begin with those of adapter.init_from",
            "adapter.d_initial",
            hint="leave it out",
        )


def _relora(config: RunConfig, options: Mapping[str, Any]) -> Iterator[Problem]:
    if options["restart_warmup_steps"] > options["restart_every_steps"]:
        yield Problem(
            "the learning rate would still be rising when the next cycle begins",
            "adapter.restart_warmup_steps",
            hint=f"make it {options['restart_every_steps']} (restart_every_steps) at most",
        )
    if config.distributed.zero_stage == 3:
        yield Problem(
            "ReLoRA freezes what was learned on every process, and ZeRO-3 leaves each a shard only",
            "distributed.zero_stage",
            hint="set it to 0, 1 or 2",
        )
    kind = config.optimizer.kind
    if traits_of(kind).averages:
        yield Problem(
            f"a restart replaces the weights, and {kind} averages them since the first step",
            "optimizer.kind",
            hint='set it to "adamw"',
        )
    elif not traits_of(kind).forgets and options["optimizer_reset_ratio"]:
        yield Problem(
            f"a restart forgets a part of the optimizer's state, and that of {kind} (8-bit, of "
            "whole matrices, or not only means of gradients) cannot be taken apart",
            "optimizer.kind",
            hint='set it to "adamw", or adapter.optimizer_reset_ratio = 0',
        )


def _ggpo(config: RunConfig, options: Mapping[str, Any]) -> Iterator[Problem]:
    if not options["sigma"] and not options["beta"]:
        yield Problem(
            "neither weights nor gradients make noise: this is plain LoRA",
            "adapter.sigma",
            hint='set sigma or beta, or adapter.kind = "lora"',
        )
    if config.distributed.zero_stage == 3:
        yield Problem(
            "the norms of weights are taken in each process, and ZeRO-3 shards the weights",
            "distributed.zero_stage",
            hint="set it to 0, 1 or 2",
        )
    if config.memory.compile_blocks:
        yield Problem(
            "noise is drawn anew for every layer and microbatch, which a compiler cannot follow",
            "memory.compile_blocks",
            hint='set it to false, or adapter.kind = "lora"',
        )


_OWN_STATE = {
    "singlora": "SingLoRA fades each update in by a count of its own",
    "relora": "ReLoRA keeps what it has frozen beside the layers of one transformer",
    "ggpo": "GGPO measures the weights that it is put on",
    "dora": "DoRA starts from the lengths of the rows of the weights that it is put on",
}
_OWN_STATE_OPTIONS = {
    "rank_dropout": "what is dropped is told to the layers of one transformer",
    "module_dropout": "what is dropped is told to the layers of one transformer",
    "scale_weight_norms": "the bound is kept by the layers of one transformer",
}


def _shared(config: RunConfig) -> Iterator[Problem]:
    """Yield what one adapter for both experts cannot be; `jobs.train_experts` finds the rest."""
    if config.model.expert != SHARED:
        return
    options = config.adapter.options("kind")
    reasons = {"kind": _OWN_STATE.get(config.adapter.kind)}
    if str(options.get("init", "")).startswith("pissa"):
        reasons["init"] = "PiSSA starts from the weights that it is added to, and those differ"
    reasons |= {key: why for key, why in _OWN_STATE_OPTIONS.items() if options.get(key)}
    for key, why in reasons.items():
        if why is not None:
            other = 'adapter.kind = "lora"' if key == "kind" else "leave this out"
            yield Problem(
                f"it cannot be shared by two experts: {why}",
                f"adapter.{key}",
                hint=f'set model.expert = "both" for an adapter each, or {other}',
            )


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error:
        return False  # who selects the layers says what is wrong with it


_RULES: Mapping[str, Callable[[RunConfig, Mapping[str, Any]], Iterator[Problem]]] = {
    "tlora": _tlora,
    "singlora": _singlora,
    "vera": _vera,
    "relora": _relora,
    "ggpo": _ggpo,
}
