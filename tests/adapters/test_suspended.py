"""Every kind of adapter can be taken off for a forward, in training, and comes back."""

from __future__ import annotations

import pytest
import torch

from trainer.adapters.full import FullFineTune
from trainer.contract.catalog import ADAPTERS
from trainer.contract.config import RunConfig
from trainer.jobs.build import build_plugin

from .tiny_models import make_transformer, model_inputs, run

CASES = [
    *({"kind": kind} for kind in ADAPTERS.names if kind not in {"none", "singlora"}),
    {"kind": "singlora", "ramp_steps": 0},
    {"kind": "lora", "init": "pissa"},
    {"kind": "lora", "dropout": 0.3, "rank_dropout": 0.3, "module_dropout": 0.3},
]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_a_suspended_adapter_leaves_the_model_as_it_was(build, options):
    transformer = make_transformer()
    batch = model_inputs(transformer)
    before = run(transformer, batch)
    config = RunConfig.model_validate({"adapter": {"rank": 2, **options}})
    adapter = build_plugin(config.adapter, "kind", build, where="adapter")
    adapter.inject(transformer, 0)
    transformer.train()
    random = torch.Generator().manual_seed(0)
    for value in adapter.trainable().values():
        value.data += 0.3 * torch.randn(value.shape, generator=random)
    with torch.no_grad(), adapter.suspended():
        assert torch.equal(run(transformer, batch), before)
    transformer.eval()
    assert not torch.allclose(run(transformer, batch), before, atol=1e-4), "it is back"
    with pytest.raises(KeyError), adapter.suspended():
        raise KeyError
    assert not torch.allclose(run(transformer, batch), before, atol=1e-4)


def test_a_full_fine_tune_has_no_model_beside_it(build):
    adapter = FullFineTune(FullFineTune.Config(), build)
    with pytest.raises(RuntimeError, match="no untrained model"):
        adapter.suspended()
