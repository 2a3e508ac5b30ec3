"""Every option of every adapter kind changes what is trained: weights after a few steps, or rates.

What is changed is compared with the kind at its defaults (and what it needs). A kind or an option
that is new has to come into `CHANGES`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.adapters.tiny_models import batch, make_transformer
from trainer.adapters.singlora import Ramp
from trainer.contract.catalog import ADAPTERS
from trainer.contract.config import RunConfig
from trainer.contract.variants import VARIANTS
from trainer.core.seams import BuildContext
from trainer.engine.process_group import World
from trainer.jobs.train_parts import assemble_model, build_engine, learning_rate

STEPS = 4
BUILD = BuildContext(
    variant=VARIANTS["wan2.1-t2v-1.3b"], seed=3, device=torch.device("cpu"), total_steps=STEPS
)
_WHERE = {
    "targets": "ffn",
    "include": [r"blocks\.0\.ffn\..*"],
    "exclude": [r"blocks\.1\..*"],
    "lr_pattern": {r"blocks\.0\..*": 0.01},
}
_SLOTTED = {**_WHERE, "loraid": {"slot": 2, "slots": 3, "granularity": "block"}}
_SLOTTED["init_from"] = "before.safetensors"
_RANKED = {**_SLOTTED, "rank": 3, "alpha": 9.0}
_PATTERNS = {"rank_pattern": {r".*self_attn.*": 5}, "alpha_pattern": {r".*self_attn.*": 0.5}}
CHANGES: dict[str, dict[str, Any]] = {
    "lora": {
        **_RANKED,
        **_PATTERNS,
        "rslora": True,
        "init": "pissa",
        "loraplus_lr_ratio": 9.0,
        "dropout": 0.5,
        "rank_dropout": 0.5,
        "module_dropout": 0.5,
        "scale_weight_norms": 0.01,
    },
    "tlora": {**_RANKED, "dropout": 0.5, "min_rank": 2, "rank_exponent": 4.0,
              "full_rank_below": 900.0},
    "singlora": {**_RANKED, "ramp_steps": 1},
    "relora": {**_RANKED, "dropout": 0.5, "restart_every_steps": 3, "restart_warmup_steps": 2,
               "optimizer_reset_ratio": 0.1, "frozen_max_rank": 1},
    "ggpo": {**_RANKED, "dropout": 0.5, "sigma": 0.9, "beta": 0.9, "norms_every_steps": 1},
    "vera": {**_SLOTTED, "rank": 3, "d_initial": 0.9, "projection_seed": 5},
    "loha": {**_RANKED, **_PATTERNS},
    "lokr": {**_RANKED, **_PATTERNS, "factor": 3, "decompose_both": True},
    "dora": {**_RANKED, **_PATTERNS},
    "none": _WHERE,
}  # fmt: skip
NEEDED: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2, "alpha": 2.0},  # left out, it makes up for rslora
    "tlora": {"rank": 4},
    "singlora": {"rank": 2, "ramp_steps": 3},
    "relora": {"rank": 2, "restart_every_steps": 2, "restart_warmup_steps": 1},
    "ggpo": {"rank": 2, "norms_every_steps": 3},
    "vera": {"rank": 2},
    "loha": {"rank": 2},
    "lokr": {"rank": 1},
    "dora": {"rank": 2},
    "none": {},
}


def trained(kind: str, **options: Any) -> dict[str, Any]:
    """Return weights after some steps, with their scales, and the rates of the steps."""
    config = RunConfig.model_validate(
        {
            "adapter": {"kind": kind, "targets": "attention", **NEEDED[kind], **options},
            "distributed": {"engine": "local"},
            "memory": {"weight_format": "fp32"},
            "optimizer": {"learning_rate": 0.05},
        }
    )
    model = assemble_model(config, BUILD, 1, make_transformer)
    engine = build_engine(config, model, BUILD, World.alone())
    rate = learning_rate(config, BUILD, model.techniques)
    norms = []
    for step in range(1, STEPS + 1):
        engine.forward_backward([batch(step)])
        norms.append(engine.update(rate(step)).grad_norm)
        for technique in model.techniques:
            technique.after_step(step)
    state: dict[str, Tensor] = {}
    for technique in model.techniques:
        state |= technique.state_dict()
    return {
        "weights": engine.full_parameters(),
        "state": {name: value.clone() for name, value in state.items()},
        "facts": dict(model.adapter.facts),
        "rates": [rate(step) for step in range(1, STEPS + 1)],
        "norms": norms,
    }


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Tell whether the same was trained in the same way."""
    if one["rates"] != other["rates"] or one["norms"] != other["norms"]:
        return False
    for part in ("weights", "state"):
        if one[part].keys() != other[part].keys():
            return False
        if not all(torch.equal(value, other[part][name]) for name, value in one[part].items()):
            return False
    return True


def test_every_option_is_tried() -> None:
    assert set(CHANGES) == set(ADAPTERS.names) == set(NEEDED)
    for kind in ADAPTERS.names:
        assert set(ADAPTERS.load(kind).Config.model_fields) == set(CHANGES[kind]), kind


@pytest.mark.parametrize("kind", CHANGES)
def test_every_option_changes_what_is_trained(kind: str, tmp_path: Path) -> None:
    plain = trained(kind)
    assert same(trained(kind), plain), "not by chance"
    for key, value in CHANGES[kind].items():
        given = value
        if key == "init_from":
            given = str(written(tmp_path / value, kind))
        assert not same(trained(kind, **{key: given}), plain), key


def written(path: Path, kind: str) -> Path:
    """Write a file of other numbers."""
    config = RunConfig.model_validate(
        {"adapter": {"kind": kind, "targets": "attention", **NEEDED[kind]}}
    )
    model = assemble_model(config, BUILD, 1, make_transformer)
    for technique in model.techniques:  # SingLoRA's update is 0 until it has faded in
        if isinstance(technique, Ramp):
            technique.after_step(9)
    random = torch.Generator().manual_seed(9)
    state = {
        name: torch.randn(value.shape, generator=random)
        for name, value in model.adapter.trainable().items()
    }
    model.adapter.write_output(state, path, layout="comfy", dtype=torch.float32, metadata={})
    return path
