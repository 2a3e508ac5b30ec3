from __future__ import annotations

import pytest
import torch

from trainer.contract.variants import get_variant
from trainer.core.seams import BuildContext
from trainer.models.wan.transformer import WanTransformer

from .tiny_models import make_transformer


@pytest.fixture
def transformer() -> WanTransformer:
    return make_transformer()


@pytest.fixture
def build() -> BuildContext:
    return BuildContext(
        variant=get_variant("wan2.1-t2v-1.3b"),
        seed=0,
        device=torch.device("cpu"),
        total_steps=10,
    )
